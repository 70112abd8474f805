// Products of more rows than a few with a packed weight, with tiles. Rows pass in blocks: while one
// is in the cache it meets all panels of a task, and its results are then written side by side.

constexpr int64_t kTilePanels = 8;  // of a task at most at once
constexpr int64_t kPairColumns = 2 * kPanel;
// Bytes of a row's activations that one pass takes: those of a pair of panels, thirty-two times as
// many, stay in the nearest cache for all rows of a block.
constexpr int64_t kPassBytes = 512;
constexpr int64_t kWidenedBytes = 512 << 10;  // of widened panels, which are to stay in the second

struct TileScratch {
  int64_t panels;   // at once
  float* results;   // [pairs of panels, kRowsAtOnce, 32]
  int32_t* sums;    // [2, 32, 32]: of a group
  BlockChunk* chunk;
  uint8_t* widened;  // panels as bf16; for few rows groups as bytes [2, group / 4, 16, 4]
};

static size_t carve_tiles(const LinearWeight& weight, std::byte* at, TileScratch& out) {
  constexpr size_t results = kTilePanels * kPanel * kRowsAtOnce * sizeof(float);
  constexpr size_t sums = 2 * 2 * kTileRows * kPairColumns * sizeof(int32_t);
  constexpr size_t chunk = (sizeof(BlockChunk) + 63) / 64 * 64;
  const bool stored = weight.format == Format::bf16 || weight.format == Format::w8a8;
  const int64_t width = stored ? 0 : weight.padded_columns * kPanel * 2;
  const int64_t fitting = stored ? kTilePanels : least(kTilePanels, kWidenedBytes / width / 2 * 2);
  out.panels = fitting < 2 ? 2 : fitting;
  out.results = reinterpret_cast<float*>(at);
  out.sums = reinterpret_cast<int32_t*>(at + results);
  out.chunk = reinterpret_cast<BlockChunk*>(at + results + sums);
  out.widened = reinterpret_cast<uint8_t*>(at + results + sums + chunk);
  return results + sums + chunk + static_cast<size_t>(out.panels * width);
}

// ---- whole panels as bf16, for many rows ----------------------------------------------------------

// value * scale + low of each column, in pairs as tiles take them: [columns / 2, 16, 2].
static void widen_chunk(const BlockChunk& chunk, int64_t columns, int64_t group, uint16_t* to) {
  const __m512i byte = _mm512_set1_epi32(255);
  const __m512i in_pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9,
                                            24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
                                            16, 0);
  for (int64_t column = 0; column < columns; column += 4, to += 64) {
    const __m512i four = _mm512_load_si512(chunk.values + column * kPanel);
    const __m512 scale = _mm512_loadu_ps(chunk.scales[column / group]);
    const __m512 low = _mm512_loadu_ps(chunk.lows[column / group]);
    const auto widen = [&](__m512i value) {
      return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_and_si512(value, byte)), scale, low);
    };
    const auto store = [&](uint16_t* at, __m512 first, __m512 second) {
      const auto both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
      _mm512_store_si512(at, _mm512_permutexvar_epi16(in_pairs, both));
    };
    store(to, widen(four), widen(_mm512_srli_epi32(four, 8)));
    store(to + 32, widen(_mm512_srli_epi32(four, 16)), widen(_mm512_srli_epi32(four, 24)));
  }
}

// Where zero is, as what is added to value * scale.
INLINE void lows_of_zeros(const LinearWeight& weight, int64_t panel, int64_t group, int64_t count,
                          BlockChunk& chunk) {
  for (int64_t g = 0; g < count; ++g) {
    const uint8_t* zeros =
        weight.zeros ? weight.zeros + (panel * weight.groups() + group + g) * kPanel : nullptr;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int zero = zeros ? zeros[lane] : symmetric_zero(weight);
      chunk.lows[g][lane] = -static_cast<float>(zero) * chunk.scales[g][lane];
    }
  }
}

INLINE void unpack_nibbles(const LinearWeight& weight, int64_t panel, int64_t column,
                           int64_t columns, BlockChunk& chunk) {
  const uint8_t* from = weight.values + panel * weight.panel_bytes() + column * kPanel / 2;
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t byte = 0; byte < columns * kPanel; byte += 128, from += 64) {
    const __m512i both = _mm512_loadu_si512(from);
    _mm512_store_si512(chunk.values + byte, _mm512_and_si512(both, low));
    _mm512_store_si512(chunk.values + byte + 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
  }
  for (int64_t g = 0; g < columns / weight.group; ++g)
    load_scales(weight, panel, column / weight.group + g, chunk.scales[g]);
}

static void widen_panel(const LinearWeight& weight, int64_t panel, BlockChunk& chunk,
                        uint16_t* to) {
  for (int64_t column = 0; column < weight.padded_columns; column += kBlockColumns) {
    const int64_t columns = least(kBlockColumns, weight.padded_columns - column);
    if (weight.format == Format::blocks) {
      unpack_chunk(weight, panel, column, columns, chunk);
      if (weight.blocks.table != nullptr)
        for (int64_t i = 0; i < columns * kPanel; ++i)
          chunk.values[i] = weight.blocks.table[chunk.values[i]];
    } else {
      unpack_nibbles(weight, panel, column, columns, chunk);
    }
    if (weight.blocks.low_factors == nullptr)
      lows_of_zeros(weight, panel, column / weight.group, columns / weight.group, chunk);
    widen_chunk(chunk, columns, weight.group, to + column * kPanel);
  }
}

// ---- groups as bytes, for few rows ----------------------------------------------------------------

// Nibbles of a group of a panel to bytes in the order of tiles, less their zero points.
INLINE void widen_group(const LinearWeight& weight, int64_t panel, int64_t group, int8_t* to) {
  const uint8_t* from =
      weight.values + panel * weight.panel_bytes() + group * weight.group * kPanel / 2;
  __m512i zeros = _mm512_set1_epi8(static_cast<char>(symmetric_zero(weight)));
  if (weight.zeros != nullptr) {
    const auto* stored = weight.zeros + (panel * weight.groups() + group) * kPanel;
    zeros = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)stored)),
                               _mm512_set1_epi32(0x01010101));
  }
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t step = 0; step < weight.group / 8; ++step, from += 64, to += 128) {
    const __m512i both = _mm512_loadu_si512(from);
    const __m512i first = _mm512_and_si512(both, low);
    const __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    _mm512_storeu_si512(to, _mm512_sub_epi8(first, zeros));
    _mm512_storeu_si512(to + 64, _mm512_sub_epi8(second, zeros));
  }
}

// Sums of a group that are still to be scaled and added to the results.
struct GroupSums {
  const int32_t* sums;  // [rows, 32]
  const float* scales;  // [32]
  const float* x_scales;
  int64_t x_stride;
  float* c;  // [rows, 32]
  bool first;
  int64_t rows, done;
};

INLINE void add_sums(GroupSums& group, int64_t count) {
  if (group.done == group.rows) return;
  const __m512 low = _mm512_load_ps(group.scales), high = _mm512_load_ps(group.scales + kLanes);
  const int64_t end = least(group.rows, group.done + count);
  for (; group.done < end; ++group.done) {
    const __m512 factor = _mm512_set1_ps(group.x_scales[group.done * group.x_stride]);
    const int32_t* sums = group.sums + group.done * kPairColumns;
    float* c = group.c + group.done * kPairColumns;
    __m512 a = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums)),
                             _mm512_mul_ps(low, factor));
    __m512 b = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + kLanes)),
                             _mm512_mul_ps(high, factor));
    if (!group.first) {
      a = _mm512_add_ps(_mm512_load_ps(c), a);
      b = _mm512_add_ps(_mm512_load_ps(c + kLanes), b);
    }
    _mm512_store_ps(c, a);
    _mm512_store_ps(c + kLanes, b);
  }
}

// The sums of a group, while those of the one before are added to the results: tiles and vectors
// are different parts of the processor.
template <bool TwoRows, bool TwoPanels>
static void multiply_group(const int8_t* a, int64_t a_stride, const int8_t* b, int64_t group,
                           int64_t step, int32_t* sums, GroupSums& before) {
  const int64_t portion = (before.rows - before.done) * step / group + 1;
  zero_results<TwoRows, TwoPanels>();
  for (int64_t column = 0; column < group; column += step) {
    const int8_t* right = b + column * kPanel;
    multiply_step<TwoRows, TwoPanels, Product::signed_bytes>(a + column, a_stride, right,
                                                             right + group * kPanel);
    add_sums(before, portion);
  }
  store_results<TwoRows, TwoPanels>(sums, kPairColumns * 4);
}

// Rows [row, row + rows) times panels `panel` and, if there are two, the next.
static void multiply_nibble_tiles(const LinearCall& call, int64_t row, int64_t rows, int64_t panel,
                                  bool two_panels, const TileScratch& scratch, float* c) {
  const LinearWeight& weight = *call.weight;
  const Prepared& x = call.prepared;
  const int64_t groups = weight.groups(), group = weight.group, step = least(group, 64);
  alignas(64) float scales[2][kPairColumns] = {};
  GroupSums before{};
  int64_t which = 0;
  for (int64_t g = 0; g < groups; ++g) {
    auto* values = reinterpret_cast<int8_t*>(scratch.widened);
    for (int64_t p = 0; p < 1 + two_panels; ++p) {
      widen_group(weight, panel + p, g, values + p * group * kPanel);
      load_scales(weight, panel + p, g, scales[g % 2] + p * kPanel);
    }
    for (int64_t m = 0; m < rows; which = 1 - which) {
      const bool two = rows - m > kTileRows;
      const auto multiply = two_panels ? (two ? multiply_group<true, true> : multiply_group<false, true>)
                                       : (two ? multiply_group<true, false> : multiply_group<false, false>);
      int32_t* sums = scratch.sums + which * 2 * kTileRows * kPairColumns;
      multiply(x.bytes + (row + m) * x.stride + g * group, x.stride, values, group, step, sums,
               before);
      add_sums(before, before.rows);
      const int64_t count = two ? 2 * kTileRows : kTileRows;
      before = {sums, scales[g % 2], x.scales + (row + m) * groups + g, groups,
                c + m * kPairColumns, g == 0, least(count, rows - m), 0};
      m += count;
    }
  }
  add_sums(before, before.rows);
}

// Bytes have one scale a row: sums of all columns are whole numbers, scaled in place.
static void scale_sums(const LinearWeight& weight, const Prepared& x, int64_t row, int64_t rows,
                       int64_t panel, int64_t panels, float* c) {
  for (int64_t p = 0; p < panels; ++p) {
    alignas(64) float stored[kLanes];
    load_scales(weight, panel + p, 0, stored);
    const __m512 scale = _mm512_load_ps(stored);
    for (int64_t m = 0; m < rows; ++m) {
      float* at = c + m * kPairColumns + p * kPanel;
      const __m512i sum =
          _mm512_add_epi32(_mm512_load_si512(at), _mm512_set1_epi32(x.offsets[row + m]));
      const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[row + m]));
      _mm512_store_ps(at, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), factor));
    }
  }
}

// c [rows, 32] = rows times panels `panel` and, if there are two, the next, which lie at `b`.
static void multiply_with_tiles(const LinearCall& call, int64_t row, int64_t rows, int64_t panel,
                                int64_t panels, const uint8_t* b, float* c) {
  const LinearWeight& weight = *call.weight;
  const Prepared& x = call.prepared;
  const int64_t size = call.in_halves ? 2 : 1, width = weight.padded_columns * size;
  const auto* a = call.in_halves ? reinterpret_cast<const std::byte*>(x.halves)
                                 : reinterpret_cast<const std::byte*>(x.bytes);
  const auto multiply =
      call.in_halves ? multiply_tile_rows<Product::bf16> : multiply_tile_rows<Product::bytes>;
  const int64_t pass = rows > 2 * kTileRows ? kPassBytes : width;
  for (int64_t at = 0; at < width; at += pass)
    multiply(rows, panels > 1, least(pass, width - at) / 64, a + row * x.stride * size + at,
             x.stride * size, b + at * kPanel, width * kPanel, c, kPairColumns * 4, at > 0);
  if (!call.in_halves) scale_sums(weight, x, row, rows, panel, panels, c);
}

// What the results of some panels and rows become.
INLINE void finish_rows(const LinearCall& call, int64_t row, int64_t rows, int64_t panel,
                        int64_t panels, const float* results) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t p = 0; p < panels; p += call.weight->gated ? 2 : 1)
      finish_row(call, row + m, panel + p,
                 results + (p / 2 * kRowsAtOnce + m) * kPairColumns + p % 2 * kPanel);
}

static void linear_with_tiles(const LinearCall& call, int64_t begin, int64_t end,
                              std::byte* memory) {
  const LinearWeight& weight = *call.weight;
  TileScratch scratch;
  carve_tiles(weight, memory, scratch);
  const bool nibbles = weight.format == Format::w4a8 && !call.in_halves;
  const bool widened = weight.format != Format::bf16 && call.in_halves;
  const int64_t panel_bytes = widened ? weight.padded_columns * kPanel * 2 : weight.panel_bytes();
  configure_tiles(nibbles ? static_cast<int>(least(weight.group, 64)) : 64);
  for (int64_t first = begin; first < end; first += scratch.panels) {
    const int64_t panels = least(scratch.panels, end - first);
    const uint8_t* b = widened ? scratch.widened : weight.values + first * panel_bytes;
    for (int64_t p = 0; widened && p < panels; ++p)
      widen_panel(weight, first + p, *scratch.chunk,
                  reinterpret_cast<uint16_t*>(scratch.widened + p * panel_bytes));
    for (int64_t row = 0; row < call.rows; row += kRowsAtOnce) {
      const int64_t rows = least(kRowsAtOnce, call.rows - row);
      fetch_results(call, first, panels, row, rows);
      for (int64_t p = 0; p < panels; p += 2) {
        float* c = scratch.results + p * kPanel * kRowsAtOnce;
        if (nibbles)
          multiply_nibble_tiles(call, row, rows, first + p, panels - p > 1, scratch, c);
        else
          multiply_with_tiles(call, row, rows, first + p, least(2, panels - p),
                              b + p * panel_bytes, c);
      }
      finish_rows(call, row, rows, first, panels, scratch.results);
    }
  }
  release_tiles();
}
