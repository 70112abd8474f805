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
template <int C, int A, int B, class Right>
INLINE void dot_integers() {
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < tiles.k_bytes / 4; ++k)
      for (int n = 0; n < 16; ++n) {
        int32_t c;
        __builtin_memcpy(&c, tiles.rows[C][m] + 4 * n, 4);
        for (int j = 0; j < 4; ++j)
          c += static_cast<int8_t>(tiles.rows[A][m][4 * k + j]) *
               static_cast<Right>(tiles.rows[B][k][4 * n + j]);
        __builtin_memcpy(tiles.rows[C][m] + 4 * n, &c, 4);
      }
}
template <int C, int A, int B>
INLINE void dot_bytes() {
  dot_integers<C, A, B, uint8_t>();
}
template <int C, int A, int B>
INLINE void dot_signed_bytes() {
  dot_integers<C, A, B, int8_t>();
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
template <int C, int A, int B>
INLINE void dot_signed_bytes() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
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

enum class Product { bf16, bytes, signed_bytes };

template <Product kind, int C, int A, int B>
INLINE void dot() {
  if constexpr (kind == Product::bf16) dot_bf16<C, A, B>();
  if constexpr (kind == Product::bytes) dot_bytes<C, A, B>();
  if constexpr (kind == Product::signed_bytes) dot_signed_bytes<C, A, B>();
}

// One step of the inner dimension, as wide as the tiles are configured.
template <bool TwoRows, bool TwoPanels, Product kind>
INLINE void multiply_step(const void* a, int64_t a_stride, const void* b0, const void* b1) {
  load_tile<6>(b0, 64);
  load_tile<4>(a, a_stride);
  dot<kind, 0, 4, 6>();
  if constexpr (TwoPanels) {
    load_tile<7>(b1, 64);
    dot<kind, 1, 4, 7>();
  }
  if constexpr (TwoRows) {
    load_tile<5>(static_cast<const char*>(a) + kTileRows * a_stride, a_stride);
    dot<kind, 2, 5, 6>();
  }
  if constexpr (TwoRows && TwoPanels) dot<kind, 3, 5, 7>();
}

// Some steps for 16 or 32 rows; c is [rows, c_stride] of four bytes each, strides are in bytes.
template <bool TwoRows, bool TwoPanels, Product kind>
static void multiply_tiles(int64_t steps, const void* a, int64_t a_stride, const void* b,
                           int64_t b_stride, void* c, int64_t c_stride, bool accumulate) {
  if (accumulate)
    load_results<TwoRows, TwoPanels>(c, c_stride);
  else
    zero_results<TwoRows, TwoPanels>();
  const char *left = static_cast<const char*>(a), *right = static_cast<const char*>(b);
  for (int64_t step = 0; step < steps; ++step, left += 64, right += kTileBytes)
    multiply_step<TwoRows, TwoPanels, kind>(left, a_stride, right, right + b_stride);
  store_results<TwoRows, TwoPanels>(c, c_stride);
}

// Rows in pairs of tiles, the last one perhaps alone; `c` has room for a multiple of 16.
template <Product kind>
static void multiply_tile_rows(int64_t rows, bool two_panels, int64_t steps, const void* a,
                               int64_t a_stride, const void* b, int64_t b_stride, void* c,
                               int64_t c_stride, bool accumulate) {
  const char* from = static_cast<const char*>(a);
  char* to = static_cast<char*>(c);
  for (int64_t row = 0; row < rows;) {
    const bool two = rows - row > kTileRows;
    const auto multiply =
        two_panels ? (two ? multiply_tiles<true, true, kind> : multiply_tiles<false, true, kind>)
                   : (two ? multiply_tiles<true, false, kind> : multiply_tiles<false, false, kind>);
    multiply(steps, from + row * a_stride, a_stride, b, b_stride, to + row * c_stride, c_stride,
             accumulate);
    row += two ? 2 * kTileRows : kTileRows;
  }
}
