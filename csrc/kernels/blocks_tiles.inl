// Products with AMX tiles: 16 or 32 rows times one or two panels. The packed layouts are those of
// the right-hand tiles, so bf16 and byte panels are loaded as they lie.
//
// Tiles 0 to 3 hold results (row tile * 2 + panel), 4 and 5 rows, 6 and 7 panels.

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;

#ifdef HEADRACE_EMULATED_TILES

struct Tiles {
  uint8_t rows[8][16][64];
  int k_bytes;
};
static thread_local Tiles tiles;

INLINE void configure_tiles(int k_bytes) { tiles.k_bytes = k_bytes; }
INLINE void release_tiles() {}

template <int Tile>
INLINE void zero_tile() {
  __builtin_memset(tiles.rows[Tile], 0, sizeof tiles.rows[Tile]);
}
template <int Tile>
INLINE void load_tile(const void* from, int64_t stride) {
  const int rows = Tile >= 6 ? tiles.k_bytes / 4 : 16;
  const int bytes = Tile == 4 || Tile == 5 ? tiles.k_bytes : 64;
  for (int row = 0; row < rows; ++row)
    __builtin_memcpy(tiles.rows[Tile][row], static_cast<const char*>(from) + row * stride, bytes);
}
template <int Tile>
INLINE void store_tile(void* to, int64_t stride) {
  for (int row = 0; row < 16; ++row)
    __builtin_memcpy(static_cast<char*>(to) + row * stride, tiles.rows[Tile][row], 64);
}
template <int C, int A, int B>
INLINE void dot_bf16() {
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < tiles.k_bytes / 4; ++k)
      for (int n = 0; n < 16; ++n) {
        float c;
        uint16_t a[2], b[2];
        __builtin_memcpy(&c, tiles.rows[C][m] + 4 * n, 4);
        __builtin_memcpy(a, tiles.rows[A][m] + 4 * k, 4);
        __builtin_memcpy(b, tiles.rows[B][k] + 4 * n, 4);
        c += from_bf16(a[0]) * from_bf16(b[0]) + from_bf16(a[1]) * from_bf16(b[1]);
        __builtin_memcpy(tiles.rows[C][m] + 4 * n, &c, 4);
      }
}
template <int C, int A, int B>
INLINE void dot_bytes() {
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < tiles.k_bytes / 4; ++k)
      for (int n = 0; n < 16; ++n) {
        int32_t c;
        __builtin_memcpy(&c, tiles.rows[C][m] + 4 * n, 4);
        for (int j = 0; j < 4; ++j)
          c += static_cast<int8_t>(tiles.rows[A][m][4 * k + j]) * tiles.rows[B][k][4 * n + j];
        __builtin_memcpy(tiles.rows[C][m] + 4 * n, &c, 4);
      }
}

#else

struct __attribute__((packed)) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles whose inner dimension is k_bytes: 64 as a rule, 32 for groups of 32 columns.
INLINE void configure_tiles(int k_bytes) {
  TileConfiguration configuration;
  for (int tile = 0; tile < 8; ++tile) {
    configuration.bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? k_bytes : 64);
    configuration.rows[tile] = static_cast<uint8_t>(tile >= 6 ? k_bytes / 4 : 16);
  }
  _tile_loadconfig(&configuration);
}
INLINE void release_tiles() { _tile_release(); }

// The compiler's intrinsics take literal tile numbers only; these take template parameters.
template <int Tile>
INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Tile>
INLINE void load_tile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
INLINE void store_tile(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(Tile) : "memory");
}
template <int C, int A, int B>
INLINE void dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
INLINE void dot_bytes() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

template <bool TwoRows, bool TwoPanels>
INLINE void zero_results() {
  zero_tile<0>();
  if constexpr (TwoPanels) zero_tile<1>();
  if constexpr (TwoRows) zero_tile<2>();
  if constexpr (TwoRows && TwoPanels) zero_tile<3>();
}

// Results move to or from memory [rows, stride in bytes], 64 bytes per panel.
template <bool TwoRows, bool TwoPanels>
INLINE void store_results(void* c, int64_t stride) {
  char* to = static_cast<char*>(c);
  store_tile<0>(to, stride);
  if constexpr (TwoPanels) store_tile<1>(to + 64, stride);
  if constexpr (TwoRows) store_tile<2>(to + kTileRows * stride, stride);
  if constexpr (TwoRows && TwoPanels) store_tile<3>(to + kTileRows * stride + 64, stride);
}
template <bool TwoRows, bool TwoPanels>
INLINE void load_results(const void* c, int64_t stride) {
  const char* from = static_cast<const char*>(c);
  load_tile<0>(from, stride);
  if constexpr (TwoPanels) load_tile<1>(from + 64, stride);
  if constexpr (TwoRows) load_tile<2>(from + kTileRows * stride, stride);
  if constexpr (TwoRows && TwoPanels) load_tile<3>(from + kTileRows * stride + 64, stride);
}

// One step of the inner dimension, as wide as the tiles are configured.
template <bool TwoRows, bool TwoPanels, bool Bytes>
INLINE void multiply_step(const void* a, int64_t a_stride, const void* b0, const void* b1) {
  load_tile<6>(b0, 64);
  if constexpr (TwoPanels) load_tile<7>(b1, 64);
  load_tile<4>(a, a_stride);
  if constexpr (TwoRows) load_tile<5>(static_cast<const char*>(a) + kTileRows * a_stride, a_stride);
  if constexpr (Bytes) {
    dot_bytes<0, 4, 6>();
    if constexpr (TwoPanels) dot_bytes<1, 4, 7>();
    if constexpr (TwoRows) dot_bytes<2, 5, 6>();
    if constexpr (TwoRows && TwoPanels) dot_bytes<3, 5, 7>();
  } else {
    dot_bf16<0, 4, 6>();
    if constexpr (TwoPanels) dot_bf16<1, 4, 7>();
    if constexpr (TwoRows) dot_bf16<2, 5, 6>();
    if constexpr (TwoRows && TwoPanels) dot_bf16<3, 5, 7>();
  }
}

// Like bf16_block, for 16 or 32 rows; `pairs` is a multiple of 16, tiles are configured for 64.
template <bool TwoRows, bool TwoPanels>
static void bf16_tiles(int64_t pairs, const uint16_t* a, int64_t a_stride, const uint16_t* b,
                       int64_t b_stride, float* c, int64_t c_stride, bool accumulate) {
  if (accumulate)
    load_results<TwoRows, TwoPanels>(c, c_stride * 4);
  else
    zero_results<TwoRows, TwoPanels>();
  for (int64_t k = 0; k < pairs; k += 16)
    multiply_step<TwoRows, TwoPanels, false>(a + 2 * k, a_stride * 2, b + 32 * k,
                                             b + b_stride + 32 * k);
  store_results<TwoRows, TwoPanels>(c, c_stride * 4);
}

// Nibbles of a panel to bytes in the byte layout, ready for tiles.
INLINE void widen_panel(const uint8_t* packed, int64_t columns, uint8_t* bytes) {
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t step = 0; step < columns / 8; ++step) {
    const __m512i both = _mm512_loadu_si512(packed + step * 64);
    _mm512_storeu_si512(bytes + step * 128, _mm512_and_si512(both, low));
    _mm512_storeu_si512(bytes + step * 128 + 64,
                        _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
  }
}

// Like integer_block, for 16 or 32 rows on panels in the byte layout at `bytes`; tiles are
// configured for 64, or for 32 if that is the group.
template <bool TwoRows, bool TwoPanels>
static void integer_tiles(const IntegerBlock& in, const uint8_t* bytes) {
  constexpr int rows = TwoRows ? 32 : 16, panels = TwoPanels ? 2 : 1;
  const LinearWeight& weight = *in.weight;
  const int64_t groups = weight.groups(), group = weight.group;
  const int64_t step = least(group, 64), panel_bytes = weight.padded_columns * kPanel;
  alignas(64) int32_t sums[rows * panels * kLanes];
  for (int64_t g = 0; g < groups; ++g) {
    zero_results<TwoRows, TwoPanels>();
    for (int64_t column = g * group; column < (g + 1) * group; column += step) {
      const uint8_t* b = bytes + column * kPanel;
      multiply_step<TwoRows, TwoPanels, true>(block_row(in, 0) + column, in.x->stride, b,
                                              b + panel_bytes);
    }
    store_results<TwoRows, TwoPanels>(sums, panels * 64);
    for (int p = 0; p < panels; ++p) {
      alignas(64) float stored[kLanes];
      load_scales(weight, in.panel + p, g, stored);
      const __m512 scale = _mm512_load_ps(stored);
      const uint8_t* zeros =
          weight.zeros ? weight.zeros + ((in.panel + p) * groups + g) * kPanel : nullptr;
      const int64_t known = least(rows, in.x->rows - in.row);
      for (int m = 0; m < known; ++m) {
        const int64_t at = (in.row + m) * groups + g;
        const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums + (m * panels + p) * kLanes),
                                             zero_term(zeros, in.x->offsets[at]));
        const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(in.x->scales[at]));
        const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), factor);
        float* c = in.c + m * in.c_stride + p * kLanes;
        _mm512_storeu_ps(c, g == 0 ? value : _mm512_add_ps(_mm512_loadu_ps(c), value));
      }
    }
  }
}
