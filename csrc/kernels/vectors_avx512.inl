// What several kernels for AVX-512 need: products in place, masks for the last columns, and rows of
// activations in pairs of bytes.

// Sums of products, in place. GCC copies the accumulators of the intrinsics back and forth in loops
// that need most registers, and does not fold broadcasts.
using Word = uint32_t __attribute__((may_alias));

INLINE void add_bytes(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

INLINE void add_bytes(__m512i& sum, __m512i unsigned_bytes, const int8_t* four) {
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(sum)
      : "v"(unsigned_bytes), "m"(*reinterpret_cast<const Word*>(four)));
}

#if HEADRACE_LEVEL >= 3

INLINE void add_halves(__m512& sum, __m512i a, __m512i b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

INLINE void add_halves(__m512& sum, __m512i a, const uint16_t* two) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0"
      : "+v"(sum)
      : "v"(a), "m"(*reinterpret_cast<const Word*>(two)));
}

#else

INLINE void add_halves(__m512& sum, __m512i a, __m512i b) {
  const __m512i high = _mm512_set1_epi32(0xffff0000);
  const auto even = [](__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
  const auto odd = [&](__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, high)); };
  sum = _mm512_fmadd_ps(odd(a), odd(b), _mm512_fmadd_ps(even(a), even(b), sum));
}

INLINE void add_halves(__m512& sum, __m512i a, const uint16_t* two) {
  add_halves(sum, a, _mm512_set1_epi32(load32(two)));
}

#endif

INLINE __mmask32 columns_left(int64_t count) {
  return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}

INLINE __mmask64 bytes_left(int64_t count) {
  return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
}

// A row of bf16 in two bytes for each value, 256 * high + low: with 15 bits and a sign it loses less
// than it lost by bf16, and bytes are multiplied by bytes. `factor` is what a level stands for, NaN
// or infinite if the row holds such a value. Returns the sum of the levels, which 32 bits hold for up
// to kMaxSplit columns, as they do the sums of products with bytes.
constexpr int64_t kMaxSplit = 1 << 16;
constexpr float kSplitLevels = 32512.0f;

INLINE int32_t split_row(const uint16_t* x, int64_t width, int8_t* high, int8_t* low,
                         float* factor) {
  int32_t bits = 0;
  for (int64_t i = 0; i < width; ++i) {
    const int32_t magnitude = (x[i] & 0x7fff) << 16;
    bits = magnitude > bits ? magnitude : bits;
  }
  float largest = __builtin_bit_cast(float, bits);
  largest = largest < 1e-30f ? 1e-30f : largest;
  const float levels = 1.0f / largest * kSplitLevels;
  int32_t sum = 0;
  for (int64_t i = 0; i < width; ++i) {
    const float level = from_bf16(x[i]) * levels;
    const bool finite = level >= -32600.0f && level <= 32600.0f;
    const int32_t value = static_cast<int32_t>(__builtin_rintf(finite ? level : 0.0f));
    const int32_t rest = ((value + 128) & 255) - 128;
    low[i] = static_cast<int8_t>(rest);
    high[i] = static_cast<int8_t>((value - rest) >> 8);
    sum += value;
  }
  *factor = largest / kSplitLevels;
  return sum;
}
