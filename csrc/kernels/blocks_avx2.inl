// Products of a block of rows with a few panels, for AVX2: a panel is two vectors of eight lanes.

constexpr int kMaxBf16Rows = 4, kMaxByteRows = 4, kMaxNibbleRows = 4;
constexpr int kWidePanels = 1;
constexpr int kNarrowPanels = 2;
constexpr int kNarrowRows = 1;

template <int Rows, int Panels>
static void bf16_block(int64_t pairs, const uint16_t* a, int64_t a_stride, const uint16_t* b,
                       int64_t b_stride, float* c, int64_t c_stride, bool accumulate) {
  __m256 sum[Rows][2 * Panels];
#pragma GCC unroll 4
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int h = 0; h < 2 * Panels; ++h)
      sum[m][h] = accumulate ? _mm256_loadu_ps(c + m * c_stride + h * 8) : _mm256_setzero_ps();
  const __m256i high = _mm256_set1_epi32(0xffff0000);
  for (int64_t k = 0; k < pairs; ++k) {
    __m256 even[2 * Panels], odd[2 * Panels];
#pragma GCC unroll 4
    for (int h = 0; h < 2 * Panels; ++h) {
      const uint16_t* from = b + h / 2 * b_stride + k * 32 + h % 2 * 16;
      const __m256i right = _mm256_loadu_si256((const __m256i*)from);
      even[h] = _mm256_castsi256_ps(_mm256_slli_epi32(right, 16));
      odd[h] = _mm256_castsi256_ps(_mm256_and_si256(right, high));
    }
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) {
      const uint32_t pair = load32(a + m * a_stride + 2 * k);
      const __m256 first = _mm256_castsi256_ps(_mm256_set1_epi32(pair << 16));
      const __m256 second = _mm256_castsi256_ps(_mm256_set1_epi32(pair & 0xffff0000));
#pragma GCC unroll 4
      for (int h = 0; h < 2 * Panels; ++h) {
        sum[m][h] = _mm256_fmadd_ps(first, even[h], sum[m][h]);
        sum[m][h] = _mm256_fmadd_ps(second, odd[h], sum[m][h]);
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int h = 0; h < 2 * Panels; ++h) _mm256_storeu_ps(c + m * c_stride + h * 8, sum[m][h]);
}

INLINE __m256i zero_term(const uint8_t* zeros, int32_t offset) {
  if (zeros == nullptr) return _mm256_set1_epi32(offset);
  const __m256i zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)zeros));
  return _mm256_madd_epi16(zero, _mm256_set1_epi32(offset & 0xffff));
}

// sum += two products of unsigned and signed bytes per lane of 16 bits. Written out, since the
// compiler would multiply first, keep all products in memory, and add them later.
INLINE void add_pairs(__m256i& sum, __m256i weights, __m256i x) {
  __m256i products;
  __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
          : "+x"(sum), "=&x"(products)
          : "x"(weights), "x"(x));
}

// sum[m][h] += the products of `group` columns; h counts vectors of eight rows of the weight.
template <int Rows, int Halves>
INLINE void add_nibbles(const uint8_t* b, int64_t panel_bytes, int64_t ahead, const int8_t* a,
                        int64_t a_stride, int64_t group, __m256i (&sum)[Rows][Halves]) {
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  // 32 columns at a time: 8 sums of two products of at most 15 * 127 fit in 16 bits.
  for (int64_t column = 0; column < group; column += 32, b += 256, a += 32) {
    __m256i part[Rows][Halves];
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
      for (int h = 0; h < Halves; ++h) part[m][h] = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (int step = 0; step < 4; ++step)
#pragma GCC unroll 4
      for (int h = 0; h < Halves; ++h) {
        const uint8_t* from = b + h / 2 * panel_bytes + step * 64 + h % 2 * 32;
        const __m256i both = _mm256_loadu_si256((const __m256i*)from);
        if (h % 2 == 0) _mm_prefetch(from + ahead, _MM_HINT_T1);
        const __m256i first = _mm256_and_si256(both, low);
        const __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
#pragma GCC unroll 4
        for (int m = 0; m < Rows; ++m) {
          const int8_t* x = a + m * a_stride + step * 8;
          const __m256i x0 = _mm256_set1_epi32(load32(x)), x1 = _mm256_set1_epi32(load32(x + 4));
          add_pairs(part[m][h], first, x0);
          add_pairs(part[m][h], second, x1);
        }
      }
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
      for (int h = 0; h < Halves; ++h)
        sum[m][h] = _mm256_add_epi32(sum[m][h], _mm256_madd_epi16(part[m][h], ones));
  }
}

// Bytes are stored with an offset of 128 and none is -128 without it: |x| times the weight with the
// sign of x keeps two products within 16 bits. The offset's share is left out of `sum`.
template <int Rows, int Halves>
INLINE void add_bytes(const uint8_t* b, int64_t panel_bytes, const int8_t* a, int64_t a_stride,
                      int64_t group, __m256i (&sum)[Rows][Halves]) {
  const __m256i offset = _mm256_set1_epi8(-128), ones = _mm256_set1_epi16(1);
  for (int64_t column = 0; column < group; column += 4, b += 64, a += 4)
#pragma GCC unroll 4
    for (int h = 0; h < Halves; ++h) {
      const uint8_t* from = b + h / 2 * panel_bytes + h % 2 * 32;
      const __m256i right = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)from), offset);
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m) {
        const __m256i x = _mm256_set1_epi32(load32(a + m * a_stride));
        const __m256i two = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(right, x));
        sum[m][h] = _mm256_add_epi32(sum[m][h], _mm256_madd_epi16(two, ones));
      }
    }
}

// Eight of the sixteen scales of a panel and group, those of half h.
template <bool Nibbles>
INLINE __m256 half_scales(const LinearWeight& weight, int64_t panel, int64_t group, int h) {
  if constexpr (!Nibbles)
    return _mm256_loadu_ps(static_cast<const float*>(weight.scales) + panel * kPanel + h * 8);
  const auto* stored = static_cast<const uint16_t*>(weight.scales) +
                       (panel * weight.groups() + group) * kPanel + h * 8;
  const __m256i halves = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)stored));
  return _mm256_castsi256_ps(_mm256_slli_epi32(halves, 16));
}

template <int Rows, int Panels, bool Nibbles>
__attribute__((noinline)) static void integer_block(const IntegerBlock& in) {
  const LinearWeight& weight = *in.weight;
  constexpr int Halves = 2 * Panels;
  const int64_t groups = weight.groups(), group = weight.group;
  const int64_t panel_bytes = weight.panel_bytes();
  const int64_t group_bytes = panel_bytes / groups;
  const float* x_scales = in.x->scales + in.row * groups;
  const int32_t* offsets = in.x->offsets + in.row * groups;
  const uint8_t* b = weight.values + in.panel * panel_bytes;
  const int8_t* a = block_row(in, 0);
  // A single row has registers to spare: scales of activations are applied where they change.
  constexpr bool shares = Rows == 1;
  const int64_t shared = Nibbles ? kActivationGroup / group : 1;
  __m256 total[Rows][Halves];
#pragma GCC unroll 4
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int h = 0; h < Halves; ++h) total[m][h] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; ++g, a += group, b += group_bytes) {
    __m256i sum[Rows][Halves];
#pragma GCC unroll 4
    for (int h = 0; h < Halves; ++h) {
      const uint8_t* zeros =
          weight.zeros ? weight.zeros + ((in.panel + h / 2) * groups + g) * kPanel + h % 2 * 8
                       : nullptr;
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m)
        sum[m][h] = Nibbles ? zero_term(zeros, offsets[m * groups + g]) : _mm256_setzero_si256();
    }
    if constexpr (Nibbles)
      add_nibbles<Rows, Halves>(b, panel_bytes, in.ahead, a, in.x->stride, group, sum);
    else
      add_bytes<Rows, Halves>(b, panel_bytes, a, in.x->stride, group, sum);
#pragma GCC unroll 4
    for (int h = 0; h < Halves; ++h) {
      const __m256 scale = half_scales<Nibbles>(weight, in.panel + h / 2, g, h % 2);
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m) {
        const __m256 factor =
            shares ? scale : _mm256_mul_ps(scale, _mm256_set1_ps(x_scales[m * groups + g]));
        total[m][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[m][h]), factor, total[m][h]);
      }
    }
    if constexpr (shares) {
      if ((g + 1) % shared != 0 && g + 1 != groups) continue;
      const __m256 x_scale = _mm256_set1_ps(x_scales[g]);
#pragma GCC unroll 4
      for (int h = 0; h < Halves; ++h) {
        const __m256 before = g < shared ? _mm256_setzero_ps() : _mm256_loadu_ps(in.c + h * 8);
        _mm256_storeu_ps(in.c + h * 8, _mm256_fmadd_ps(total[0][h], x_scale, before));
        total[0][h] = _mm256_setzero_ps();
      }
    }
  }
  if constexpr (shares) return;
#pragma GCC unroll 4
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int h = 0; h < Halves; ++h)
      _mm256_storeu_ps(in.c + m * in.c_stride + h * 8, total[m][h]);
}
