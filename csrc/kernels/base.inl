// Small helpers that every kernel uses. Loops over arrays are written so that the compiler turns
// them into the vectors of the instruction set.

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE float from_bf16(uint16_t half) { return __builtin_bit_cast(float, uint32_t{half} << 16); }

// Round to nearest even; a NaN stays one.
INLINE uint16_t to_bf16(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

#if HEADRACE_LEVEL >= 2
// The same of sixteen numbers: the processor's own conversion would make small ones zero.
INLINE __m256i halves_of(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0)));
}
#endif

// Nearest whole number, ties to even, for |value| < 2**22: in every instruction set one way.
INLINE float nearest(float value) {
  constexpr float shift = 12582912.0f;  // 1.5 * 2**23
  return (value + shift) - shift;
}

// a * b + c, rounded once where that is fast.
INLINE float multiply_add(float a, float b, float c) {
#if HEADRACE_LEVEL >= 1
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// e**x with a relative error below 2e-7; 0 below -87, and infinity is never reached (x <= 88).
INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float n = nearest(x * 1.44269504f);
  const float r = multiply_add(n, 2.12194440e-4f, multiply_add(n, -0.693359375f, x));
  float p = 1.9875691500e-4f;
  p = multiply_add(p, r, 1.3981999507e-3f);
  p = multiply_add(p, r, 8.3334519073e-3f);
  p = multiply_add(p, r, 4.1665795894e-2f);
  p = multiply_add(p, r, 1.6666665459e-1f);
  p = multiply_add(p, r, 5.0000001201e-1f);
  p = multiply_add(p * r, r, r) + 1.0f;
  const int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
  return p * __builtin_bit_cast(float, exponent);
}

#if HEADRACE_LEVEL >= 2
INLINE __m512 exponential(__m512 x) {
  const auto all = [](float value) { return _mm512_set1_ps(value); };
  // In this order a NaN stays.
  x = _mm512_min_ps(all(88.0f), _mm512_max_ps(all(-87.0f), x));
  const __m512 shift = all(12582912.0f);
  const __m512 n = _mm512_sub_ps(_mm512_add_ps(_mm512_mul_ps(x, all(1.44269504f)), shift), shift);
  __m512 r = _mm512_fmadd_ps(n, all(-0.693359375f), x);
  r = _mm512_fmadd_ps(n, all(2.12194440e-4f), r);
  __m512 p = all(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, all(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, all(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, all(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, all(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, all(5.0000001201e-1f));
  p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r), all(1.0f));
  const __m512i exponent =
      _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
  return _mm512_mul_ps(p, _mm512_castsi512_ps(exponent));
}
#endif

INLINE uint32_t load32(const void* address) {
  uint32_t value;
  __builtin_memcpy(&value, address, sizeof value);
  return value;
}

constexpr int kLanes = static_cast<int>(kPanel);

// The sixteen scales of a panel and group as fp32.
INLINE void load_scales(const LinearWeight& weight, int64_t panel, int64_t group, float* scales) {
  if (weight.format == Format::w8a8) {
    const float* stored = static_cast<const float*>(weight.scales) + panel * kPanel;
    for (int lane = 0; lane < kLanes; ++lane) scales[lane] = stored[lane];
    return;
  }
  const uint16_t* stored = static_cast<const uint16_t*>(weight.scales) +
                           (panel * weight.groups() + group) * kPanel;
  for (int lane = 0; lane < kLanes; ++lane) scales[lane] = from_bf16(stored[lane]);
}

// AVX2 multiplies bytes of all eight bits as signed ones, 128 less.
constexpr int kMovedBytes = HEADRACE_LEVEL == 1 ? 128 : 0;

INLINE int symmetric_zero(const LinearWeight& weight) {
  if (weight.format == Format::w8a8) return 128;
  if (weight.format == Format::w4a8) return 8;
  const bool bytes = weight.blocks.bits[0] == 8 || weight.blocks.table != nullptr;
  return weight.blocks.zero - (bytes ? kMovedBytes : 0);
}

// One block of an integer product: some rows of activations times some panels of a weight.
struct IntegerBlock {
  const LinearWeight* weight;
  const Prepared* x;
  int64_t row, panel;
  float* c;          // [rows of the block, c_stride]
  int64_t c_stride;
  int64_t ahead;  // how many bytes further memory is fetched: the next panels, or 0
};

INLINE const int8_t* block_row(const IntegerBlock& in, int64_t m) {
  return in.x->bytes + (in.row + m) * in.x->stride;
}
