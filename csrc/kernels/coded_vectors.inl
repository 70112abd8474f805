// What decoding of lines needs of an instruction set: sixteen entries of a line, and their levels.
// Levels are in the lowest bits of their lanes; above, there may be others.

#if HEADRACE_LEVEL >= 2

typedef __m512 Entries;
typedef __m512i EntryLevels;

INLINE Entries repeat_entry(float value) { return _mm512_set1_ps(value); }
INLINE Entries load_entries(const float* from) { return _mm512_loadu_ps(from); }
INLINE EntryLevels count_lanes() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

template <int Bits>
INLINE EntryLevels load_levels(const uint8_t* from) {
  if constexpr (Bits == 8) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
  } else if constexpr (Bits == 4) {
    const __m512i words = _mm512_mask_set1_epi32(_mm512_set1_epi32(static_cast<int>(load32(from))),
                                                 0xff00, static_cast<int>(load32(from + 4)));
    const __m512i places = _mm512_and_si512(count_lanes(), _mm512_set1_epi32(7));
    return _mm512_srlv_epi32(words, _mm512_slli_epi32(places, 2));
  } else {
    uint32_t word = 0;
    __builtin_memcpy(&word, from, 2 * Bits);
    return _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(word)),
                             _mm512_slli_epi32(count_lanes(), Bits - 1));
  }
}

template <int Bits>
INLINE Entries scale_levels(EntryLevels levels, Entries step, Entries lowest) {
  const __m512i own = _mm512_and_si512(levels, _mm512_set1_epi32((1 << Bits) - 1));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(own), step, lowest);
}

INLINE void add_product(Entries& sum, float factor, Entries x) {
  sum = _mm512_fmadd_ps(_mm512_set1_ps(factor), x, sum);
}

// a and b as bf16, in turn.
INLINE void store_pairs(Entries a, Entries b, uint16_t* out) {
#if HEADRACE_LEVEL >= 3
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, both));
#else
  const __m512i low = _mm512_cvtepu16_epi32(halves(a)), high = _mm512_cvtepu16_epi32(halves(b));
  _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#endif
}

INLINE void widen_halves(const uint16_t* from, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = count - i >= 16 ? 0xffff : (1u << (count - i)) - 1;
    const __m256i sixteen = _mm256_maskz_loadu_epi16(mask, from + i);
    _mm512_mask_storeu_ps(out + i, mask, _mm512_cvtph_ps(sixteen));
  }
}

#elif HEADRACE_LEVEL == 1

struct Entries {
  __m256 half[2];
};
struct EntryLevels {
  __m256i half[2];
};

INLINE Entries repeat_entry(float value) {
  return {{_mm256_set1_ps(value), _mm256_set1_ps(value)}};
}
INLINE Entries load_entries(const float* from) {
  return {{_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}};
}

template <int Bits>
INLINE __m256i load_eight(const uint8_t* from) {
  if constexpr (Bits == 8) return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
  uint32_t word = 0;
  __builtin_memcpy(&word, from, Bits % 8);
  const __m256i places = _mm256_setr_epi32(0, Bits, 2 * Bits, 3 * Bits, 4 * Bits, 5 * Bits,
                                           6 * Bits, 7 * Bits);
  return _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word)), places);
}
template <int Bits>
INLINE EntryLevels load_levels(const uint8_t* from) {
  return {{load_eight<Bits>(from), load_eight<Bits>(from + Bits)}};
}

template <int Bits>
INLINE Entries scale_levels(EntryLevels levels, Entries step, Entries lowest) {
  Entries found;
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256i own = _mm256_and_si256(levels.half[i], _mm256_set1_epi32((1 << Bits) - 1));
    found.half[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(own), step.half[i], lowest.half[i]);
  }
  return found;
}

INLINE void add_product(Entries& sum, float factor, Entries x) {
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    sum.half[i] = _mm256_fmadd_ps(_mm256_set1_ps(factor), x.half[i], sum.half[i]);
}

// In the lower halves of the lanes.
INLINE __m256i round_eight(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
}
INLINE void store_pairs(Entries a, Entries b, uint16_t* out) {
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256i high = _mm256_slli_epi32(round_eight(b.half[i]), 16);
    _mm256_storeu_si256((__m256i*)(out + 16 * i), _mm256_or_si256(round_eight(a.half[i]), high));
  }
}

INLINE void widen_halves(const uint16_t* from, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  for (; i < count; ++i) out[i] = from_half(from[i]);
}

#else

struct Entries {
  float lanes[kPanel];
};
struct EntryLevels {
  uint8_t lanes[kPanel];
};

INLINE Entries repeat_entry(float value) {
  Entries found;
  for (float& lane : found.lanes) lane = value;
  return found;
}
INLINE Entries load_entries(const float* from) {
  Entries found;
  __builtin_memcpy(found.lanes, from, sizeof found.lanes);
  return found;
}

template <int Bits>
INLINE EntryLevels load_levels(const uint8_t* from) {
  EntryLevels found;
  for (int lane = 0; lane < kPanel; ++lane)
    found.lanes[lane] = static_cast<uint8_t>(from[lane * Bits / 8] >> (lane * Bits % 8));
  return found;
}

template <int Bits>
INLINE Entries scale_levels(EntryLevels levels, Entries step, Entries lowest) {
  Entries found;
  for (int lane = 0; lane < kPanel; ++lane)
    found.lanes[lane] =
        static_cast<float>(levels.lanes[lane] & ((1 << Bits) - 1)) * step.lanes[lane] +
        lowest.lanes[lane];
  return found;
}

INLINE void add_product(Entries& sum, float factor, Entries x) {
  for (int lane = 0; lane < kPanel; ++lane) sum.lanes[lane] += factor * x.lanes[lane];
}

INLINE void store_pairs(Entries a, Entries b, uint16_t* out) {
  for (int lane = 0; lane < kPanel; ++lane) {
    const uint32_t pair = to_bf16(a.lanes[lane]) | uint32_t{to_bf16(b.lanes[lane])} << 16;
    __builtin_memcpy(out + 2 * lane, &pair, sizeof pair);
  }
}

INLINE void widen_halves(const uint16_t* from, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = from_half(from[i]);
}

#endif
