// What the kernels of blocks need of an instruction set, AVX-512 with VNNI or AVX2, beyond what the
// compiler knows of vectors. A panel's sixteen rows are kParts of them.

#if HEADRACE_LEVEL >= 2

typedef __m512i Integers;
typedef __m512 Floats;
constexpr int kParts = 1;
// Panels at once, and the most rows: what registers allow.
constexpr int kOneRowPanels = 4, kFewRowsPanels = 2, kBlockRows = 4;

INLINE Integers load_table(const uint8_t* table) {
  return _mm512_maskz_broadcast_i32x4(0xffff, _mm_loadu_si128((const __m128i*)table));
}
INLINE Integers look_up(Integers table, Integers places) {
  return _mm512_shuffle_epi8(table, places);
}

// value | (above & mask)
INLINE Integers put_above(Integers value, Integers above, Integers mask) {
  return _mm512_ternarylogic_epi32(value, above, mask, 0xf8);
}

INLINE Integers repeat_quad(const int8_t* x) {
  return _mm512_set1_epi32(static_cast<int>(load32(x)));
}
INLINE Floats repeat(float value) { return _mm512_set1_ps(value); }
INLINE Floats to_floats(Integers value) { return _mm512_cvtepi32_ps(value); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

INLINE Floats load_factors(const uint16_t* factors, bool wide) {
  const __m256i halves = _mm256_loadu_si256((const __m256i*)factors);
  if (wide) return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  return _mm512_cvtph_ps(halves);
}
INLINE Integers load_steps(const int8_t* steps) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)steps));
}
// sum += steps * total, which has 16 bits.
INLINE void add_step(Integers& sum, Integers steps, int32_t total) {
  sum = _mm512_dpwssd_epi32(sum, steps, _mm512_set1_epi32(total & 0xffff));
}

// The sum of a group has its own register from the first quad of columns on.
template <int Bits>
constexpr int kNarrowQuads = 8;

INLINE Integers load_bytes(const uint8_t* from) { return _mm512_loadu_si512(from); }

template <int Bits>
INLINE Integers first_sum(const uint8_t* zeros, int32_t offset, bool has_lows) {
  return has_lows ? Integers{} : zero_term(zeros, offset);
}
template <int Bits>
INLINE void multiply_quad(Integers& sum, Integers&, bool, Integers weights, Integers x) {
  add_products(sum, weights, x);
}
template <int Bits>
INLINE void fold_products(Integers&, Integers&) {}

#else

typedef __m256i Integers;
typedef __m256 Floats;
constexpr int kParts = 2;
constexpr int kOneRowPanels = 2, kFewRowsPanels = 1, kBlockRows = 4;

INLINE Integers load_table(const uint8_t* table) {
  const __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  return _mm256_xor_si256(entries, _mm256_set1_epi8(-128));
}
INLINE Integers look_up(Integers table, Integers places) {
  return _mm256_shuffle_epi8(table, places);
}
INLINE Integers put_above(Integers value, Integers above, Integers mask) {
  return value | (above & mask);
}

INLINE Integers repeat_quad(const int8_t* x) {
  return _mm256_set1_epi32(static_cast<int>(load32(x)));
}
INLINE Floats repeat(float value) { return _mm256_set1_ps(value); }
INLINE Floats to_floats(Integers value) { return _mm256_cvtepi32_ps(value); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

INLINE Floats load_factors(const uint16_t* factors, bool wide) {
  const __m128i halves = _mm_loadu_si128((const __m128i*)factors);
  if (wide) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  return _mm256_cvtph_ps(halves);
}
INLINE Integers load_steps(const int8_t* steps) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)steps));
}
// sum += steps * total, which has 16 bits.
INLINE void add_step(Integers& sum, Integers steps, int32_t total) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(steps, _mm256_set1_epi32(total & 0xffff)));
}

// Quads of columns whose products, two and two added, 16 bits are sure to hold. Values of 8 bits
// are made signed for that, kMovedBytes less.
template <int Bits>
constexpr int kNarrowQuads = Bits < 4 ? 4 : Bits == 4 ? 8 : Bits == 5 ? 4 : Bits == 6 ? 2 : 1;

INLINE Integers load_bytes(const uint8_t* from) {
  return _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)from), _mm256_set1_epi8(-128));
}

template <int Bits>
INLINE Integers first_sum(const uint8_t* zeros, int32_t offset, bool has_lows) {
  constexpr int moved = Bits == 8 ? kMovedBytes : 0;
  if (has_lows) return _mm256_set1_epi32(moved * offset);
  if (zeros == nullptr) return _mm256_set1_epi32(offset);
  const __m256i stored = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)zeros));
  const __m256i zero = _mm256_sub_epi32(stored, _mm256_set1_epi32(moved));
  return _mm256_madd_epi16(zero, _mm256_set1_epi32(offset & 0xffff));
}

// sum += two products of 16 bits per lane of 32. Written out for the reason that add_pairs is.
INLINE void add_lanes(Integers& sum, Integers pairs) {
  const __m256i ones = _mm256_set1_epi16(1);
  Integers products;
  __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
          : "+x"(sum), "=&x"(products)
          : "x"(pairs), "x"(ones));
}

// The magnitude of a signed weight is the unsigned byte: that of -128 is one, too.
template <int Bits>
INLINE void multiply_quad(Integers& sum, Integers& narrow, bool first, Integers weights,
                          Integers x) {
  if constexpr (Bits == 8)
    add_lanes(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights)));
  else if (first)
    narrow = _mm256_maddubs_epi16(weights, x);
  else
    add_pairs(narrow, weights, x);
}
template <int Bits>
INLINE void fold_products(Integers& sum, Integers& narrow) {
  if constexpr (Bits < 8) add_lanes(sum, narrow);
  narrow = Integers{};
}

#endif
