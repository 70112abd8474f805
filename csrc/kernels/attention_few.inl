// Few queries on AVX-512: keys and values are multiplied as soon as they are brought in order, in
// registers; to store them in packed form would cost as much as the products.

constexpr int64_t kFewRows = 8;

// ---- bf16 ---------------------------------------------------------------------------------------

template <int Rows>
static void few_scores(const AttentionTask& task, const KeyBlock& block, const KeyBlock* next,
                       float* scores) {
  constexpr int parts = Rows <= 4 ? 2 : 1;  // sums that do not wait for each other
  const int64_t width = task.width;
  for (int64_t first = 0; first < block.count; first += kPanel) {
    const std::byte* keys = block.panels[first / kPanel];
    const std::byte* ahead = panel_ahead(block, next, first / kPanel);
    __m512 sum[Rows][parts];
#pragma GCC unroll 16
    for (int i = 0; i < Rows * parts; ++i) sum[i / parts][i % parts] = _mm512_setzero_ps();
    for (int64_t column = 0; column < width; column += 32) {
      const __mmask32 mask = columns_left(width - column);
      const uint16_t* q = task.q + column;
      __m512i pairs[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        pairs[i] = _mm512_maskz_loadu_epi16(mask, keys + (i * width + column) * 2);
      transpose(pairs);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        prefetch(ahead + (i * width + column) * 2);
        if (column + 2 * i >= width) continue;
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
          add_halves(sum[r][i % parts], pairs[i], q + r * width + 2 * i);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      if constexpr (parts == 2) sum[r][0] = _mm512_add_ps(sum[r][0], sum[r][1]);
      _mm512_storeu_ps(scores + r * kKeyBlock + first, sum[r][0]);
    }
  }
}

template <int Rows>
static void few_values(const KeyBlock& block, const KeyBlock* next, int64_t width,
                       const uint16_t* probability, float* result, int64_t columns) {
  for (int64_t column = 0; column < width; column += 32) {
    const __mmask32 mask = columns_left(width - column);
    __m512 sum[Rows][2];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      sum[r][0] = _mm512_loadu_ps(result + r * columns + column);
      sum[r][1] = _mm512_loadu_ps(result + r * columns + column + 16);
    }
    for (int64_t first = 0; first < block.count; first += kPanel) {
      const std::byte* at = block.panels[first / kPanel] + column * 2;
      const std::byte* ahead = panel_ahead(block, next, first / kPanel) + column * 2;
      for (int64_t n = first; n < first + kPanel; n += 2, at += width * 4, ahead += width * 4) {
        prefetch(ahead);
        prefetch(ahead + width * 2);
        const __m512i a = _mm512_maskz_loadu_epi16(mask, at);
        const __m512i b = _mm512_maskz_loadu_epi16(mask, at + width * 2);
        const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const __m512i p = _mm512_set1_epi32(load32(probability + r * kKeyBlock + n));
          add_halves(sum[r][0], low, p);
          add_halves(sum[r][1], high, p);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      _mm512_storeu_ps(result + r * columns + column, sum[r][0]);
      _mm512_storeu_ps(result + r * columns + column + 16, sum[r][1]);
    }
  }
}

// ---- int8 ---------------------------------------------------------------------------------------

// Probabilities are split into bytes like queries, without a sign. Sums of 256 products fit in 32
// bits.
constexpr int64_t kMaxByteWidth = 256;
constexpr float kProbabilityLevels = 65280.0f;

struct ByteQueries {
  alignas(64) int8_t high[kFewRows][kMaxByteWidth];
  alignas(64) int8_t low[kFewRows][kMaxByteWidth];
  float factor[kFewRows];
  int32_t offset[kFewRows];  // what keys that are shifted by 128 add
};

static void split_queries(const AttentionTask& task, ByteQueries& out) {
  __builtin_memset(&out, 0, sizeof out);
  for (int64_t row = 0; row < task.rows; ++row) {
    const int32_t sum = split_row(task.q + row * task.width, task.width, out.high[row],
                                  out.low[row], &out.factor[row]);
    out.offset[row] = 128 * sum;
  }
}

template <int Rows>
static void few_byte_scores(const AttentionTask& task, const ByteQueries& queries,
                            const KeyBlock& block, const KeyBlock* next, float* scores) {
  const int64_t width = task.width;
  for (int64_t first = 0; first < block.count; first += kPanel) {
    const std::byte* keys = block.panels[first / kPanel];
    const std::byte* ahead = panel_ahead(block, next, first / kPanel);
    __m512i high[Rows], low[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) high[r] = low[r] = _mm512_setzero_si512();
    for (int64_t column = 0; column < width; column += 64) {
      const __mmask64 mask = bytes_left(width - column);
      __m512i quads[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        quads[i] = _mm512_xor_si512(_mm512_set1_epi8(-128),
                                    _mm512_maskz_loadu_epi8(mask, keys + i * width + column));
      transpose(quads);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        prefetch(ahead + i * width + column);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          add_bytes(high[r], quads[i], queries.high[r] + column + 4 * i);
          add_bytes(low[r], quads[i], queries.low[r] + column + 4 * i);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[r], 8), low[r]);
      const __m512i total = _mm512_sub_epi32(sum, _mm512_set1_epi32(queries.offset[r]));
      _mm512_storeu_ps(scores + r * kKeyBlock + first,
                       _mm512_mul_ps(_mm512_cvtepi32_ps(total),
                                     _mm512_set1_ps(queries.factor[r])));
    }
  }
}

struct ByteProbabilities {
  alignas(64) uint8_t high[kFewRows][kKeyBlock];
  alignas(64) uint8_t low[kFewRows][kKeyBlock];
  float factor[kFewRows];
};

// `p` are a row's probabilities, to which the values' scales are applied.
INLINE void split_probabilities(const __m512* p, const float* value_scales, int64_t row,
                                ByteProbabilities& out) {
  __m512 scaled[4], most = _mm512_setzero_ps();
  __mmask16 nan = 0;
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    scaled[j] = _mm512_mul_ps(p[j], _mm512_load_ps(value_scales + 16 * j));
    nan |= _mm512_cmp_ps_mask(scaled[j], scaled[j], _CMP_UNORD_Q);
    most = _mm512_max_ps(most, scaled[j]);
  }
  float largest = _mm512_reduce_max_ps(most);
  largest = largest < 1e-30f ? 1e-30f : largest;
  const __m512 levels = _mm512_set1_ps(1.0f / largest * kProbabilityLevels);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(scaled[j], levels));
    _mm_store_si128((__m128i*)(out.low[row] + 16 * j), _mm512_cvtepi32_epi8(value));
    _mm_store_si128((__m128i*)(out.high[row] + 16 * j),
                    _mm512_cvtepi32_epi8(_mm512_srli_epi32(value, 8)));
  }
  out.factor[row] = nan ? __builtin_nanf("") : largest / kProbabilityLevels;
}

// Where the results of `few_byte_values` have column `d`.
INLINE int64_t byte_column(int64_t d) {
  return d - d % 64 + d % 16 / 4 * 16 + d % 64 / 16 * 4 + d % 4;
}

template <int Rows>
static void few_byte_values_rows(const KeyBlock& block, const KeyBlock* next, int64_t width,
                                 const ByteProbabilities& probability, int64_t row, float* result,
                                 int64_t columns) {
  for (int64_t column = 0; column < width; column += 64) {
    const __mmask64 mask = bytes_left(width - column);
    __m512i high[Rows][4], low[Rows][4];
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) high[r][j] = low[r][j] = _mm512_setzero_si512();
    for (int64_t n = 0; n < round_up(block.count, kPanel); n += 4) {
      const int64_t place = n % kPanel * width + column;
      const std::byte* at = block.panels[n / kPanel] + place;
      const std::byte* ahead = panel_ahead(block, next, n / kPanel) + place;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) prefetch(ahead + i * width);
      const auto load = [&](int64_t i) { return _mm512_maskz_loadu_epi8(mask, at + i * width); };
      const __m512i a = load(0), b = load(1), c = load(2), d = load(3);
      const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
      const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
      const __m512i x[4] = {
          _mm512_unpacklo_epi16(ab_low, cd_low), _mm512_unpackhi_epi16(ab_low, cd_low),
          _mm512_unpacklo_epi16(ab_high, cd_high), _mm512_unpackhi_epi16(ab_high, cd_high)};
#pragma GCC unroll 2
      for (int r = 0; r < Rows; ++r) {
        const __m512i p = _mm512_set1_epi32(load32(probability.high[row + r] + n));
        const __m512i rest = _mm512_set1_epi32(load32(probability.low[row + r] + n));
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          add_bytes(high[r][j], p, x[j]);
          add_bytes(low[r][j], rest, x[j]);
        }
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        float* at = result + (row + r) * columns + column + 16 * j;
        const __m512i total = _mm512_add_epi32(_mm512_slli_epi32(high[r][j], 8), low[r][j]);
        _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(total),
                                             _mm512_set1_ps(probability.factor[row + r]),
                                             _mm512_loadu_ps(at)));
      }
  }
}

static void few_byte_values(const AttentionTask& task, const KeyBlock& block, const KeyBlock* next,
                            const ByteProbabilities& probability, float* result, int64_t columns) {
  int64_t row = 0;
  for (; row + 2 <= task.rows; row += 2)
    few_byte_values_rows<2>(block, row == 0 ? next : nullptr, task.width, probability, row, result,
                            columns);
  if (row < task.rows)
    few_byte_values_rows<1>(block, row == 0 ? next : nullptr, task.width, probability, row, result,
                            columns);
}
