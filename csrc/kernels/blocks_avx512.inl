// Products of a block of rows with a few panels, for AVX-512 with VNNI; with BF16 if it is there.
// The block's results stay in registers while the columns pass.

constexpr int kMaxBf16Rows = 12, kMaxByteRows = 8, kMaxNibbleRows = 8;
constexpr int kWidePanels = 2;    // for many rows
constexpr int kNarrowPanels = 4;  // for up to kNarrowRows rows: more streams from memory
constexpr int kNarrowRows = 4;

template <int Rows, int Panels>
static void bf16_block(int64_t pairs, const uint16_t* a, int64_t a_stride, const uint16_t* b,
                       int64_t b_stride, float* c, int64_t c_stride, bool accumulate) {
  __m512 sum[Rows][Panels];
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p)
      sum[m][p] = accumulate ? _mm512_loadu_ps(c + m * c_stride + p * kLanes) : _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k) {
    __m512i right[Panels];
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) right[p] = _mm512_loadu_si512(b + p * b_stride + k * 32);
#if HEADRACE_LEVEL >= 3
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m) {
      const auto left = (__m512bh)_mm512_set1_epi32(load32(a + m * a_stride + 2 * k));
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p)
        sum[m][p] = _mm512_dpbf16_ps(sum[m][p], left, (__m512bh)right[p]);
    }
#else
    const __m512i high = _mm512_set1_epi32(0xffff0000);
    __m512 even[Panels], odd[Panels];
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
      even[p] = _mm512_castsi512_ps(_mm512_slli_epi32(right[p], 16));
      odd[p] = _mm512_castsi512_ps(_mm512_and_si512(right[p], high));
    }
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m) {
      const uint32_t pair = load32(a + m * a_stride + 2 * k);
      const __m512 first = _mm512_castsi512_ps(_mm512_set1_epi32(pair << 16));
      const __m512 second = _mm512_castsi512_ps(_mm512_set1_epi32(pair & 0xffff0000));
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) {
        sum[m][p] = _mm512_fmadd_ps(first, even[p], sum[m][p]);
        sum[m][p] = _mm512_fmadd_ps(second, odd[p], sum[m][p]);
      }
    }
#endif
  }
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p)
      _mm512_storeu_ps(c + m * c_stride + p * kLanes, sum[m][p]);
}

// sum += four products of unsigned and signed bytes per lane. Written out, since around the
// intrinsic the compiler moves every sum through memory.
INLINE void add_products(__m512i& sum, __m512i weights, __m512i x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
}

// What a sum begins with, so that the zero point needs no pass of its own.
INLINE __m512i zero_term(const uint8_t* zeros, int32_t offset) {
  if (zeros == nullptr) return _mm512_set1_epi32(offset);
  // Zero points are below 16 and sums of a group fit in 16 bits: one 16-bit product per lane.
  const __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)zeros));
  return _mm512_madd_epi16(zero, _mm512_set1_epi32(offset & 0xffff));
}

template <bool Nibbles>
INLINE __m512 panel_scales(const LinearWeight& weight, int64_t panel, int64_t group) {
  if constexpr (!Nibbles)
    return _mm512_loadu_ps(static_cast<const float*>(weight.scales) + panel * kPanel);
  const auto* stored =
      static_cast<const uint16_t*>(weight.scales) + (panel * weight.groups() + group) * kPanel;
  const __m512i halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)stored));
  return _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16));
}

template <int Rows, int Panels, bool Nibbles>
static void integer_block(const IntegerBlock& in) {
  const LinearWeight& weight = *in.weight;
  const int64_t groups = weight.groups(), group = weight.group;
  const int64_t panel_bytes = weight.panel_bytes(), x_stride = in.x->stride;
  const int8_t* a = block_row(in, 0);
  const uint8_t* b = weight.values + in.panel * panel_bytes;
  const float* x_scales = in.x->scales + in.row * groups;
  const int32_t* offsets = in.x->offsets + in.row * groups;
  const __m512i low = _mm512_set1_epi8(15);
  // Sums over the groups of weights that share a scale of activations: in registers where these
  // last. Those over all columns are in c.
  constexpr bool in_registers = Rows * Panels <= 8;
  const int64_t shared = Nibbles ? kActivationGroup / group : 1;
  __m512 part[Rows][Panels];
  alignas(64) float parts[Rows][Panels * kLanes];
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
      if constexpr (in_registers)
        part[m][p] = _mm512_setzero_ps();
      else
        _mm512_store_ps(parts[m] + p * kLanes, _mm512_setzero_ps());
    }

  for (int64_t g = 0; g < groups; ++g) {
    __m512i sum[Rows][Panels];
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
      const uint8_t* zeros =
          weight.zeros ? weight.zeros + ((in.panel + p) * groups + g) * kPanel : nullptr;
#pragma GCC unroll 16
      for (int m = 0; m < Rows; ++m) sum[m][p] = zero_term(zeros, offsets[m * groups + g]);
    }
    if constexpr (Nibbles) {
      for (int64_t step = 0; step < group / 8; ++step, b += 64, a += 8) {
        __m512i first[Panels], second[Panels];
#pragma GCC unroll 4
        for (int p = 0; p < Panels; ++p) {
          const __m512i both = _mm512_loadu_si512(b + p * panel_bytes);
          _mm_prefetch(b + p * panel_bytes + in.ahead, _MM_HINT_T1);
          first[p] = _mm512_and_si512(both, low);
          second[p] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        }
#pragma GCC unroll 16
        for (int m = 0; m < Rows; ++m) {
          const __m512i x0 = _mm512_set1_epi32(load32(a + m * x_stride));
          const __m512i x1 = _mm512_set1_epi32(load32(a + m * x_stride + 4));
#pragma GCC unroll 4
          for (int p = 0; p < Panels; ++p) {
            add_products(sum[m][p], first[p], x0);
            add_products(sum[m][p], second[p], x1);
          }
        }
      }
    } else {
      for (int64_t step = 0; step < group / 4; ++step, b += 64, a += 4) {
        __m512i right[Panels];
#pragma GCC unroll 4
        for (int p = 0; p < Panels; ++p) {
          right[p] = _mm512_loadu_si512(b + p * panel_bytes);
          _mm_prefetch(b + p * panel_bytes + in.ahead, _MM_HINT_T1);
        }
#pragma GCC unroll 16
        for (int m = 0; m < Rows; ++m) {
          const __m512i x = _mm512_set1_epi32(load32(a + m * x_stride));
#pragma GCC unroll 4
          for (int p = 0; p < Panels; ++p)
            add_products(sum[m][p], right[p], x);
        }
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
      const __m512 scale = panel_scales<Nibbles>(weight, in.panel + p, g);
#pragma GCC unroll 16
      for (int m = 0; m < Rows; ++m) {
        const __m512 value = _mm512_cvtepi32_ps(sum[m][p]);
        float* kept = parts[m] + p * kLanes;
        if constexpr (in_registers)
          part[m][p] = _mm512_fmadd_ps(value, scale, part[m][p]);
        else
          _mm512_store_ps(kept, _mm512_fmadd_ps(value, scale, _mm512_load_ps(kept)));
      }
    }
    if ((g + 1) % shared != 0 && g + 1 != groups) continue;
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m) {
      const __m512 x_scale = _mm512_set1_ps(x_scales[m * groups + g]);
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) {
        float *kept = parts[m] + p * kLanes, *c = in.c + m * in.c_stride + p * kLanes;
        const __m512 value = in_registers ? part[m][p] : _mm512_load_ps(kept);
        const __m512 before = g < shared ? _mm512_setzero_ps() : _mm512_loadu_ps(c);
        _mm512_storeu_ps(c, _mm512_fmadd_ps(value, x_scale, before));
        if constexpr (in_registers)
          part[m][p] = _mm512_setzero_ps();
        else
          _mm512_store_ps(kept, _mm512_setzero_ps());
      }
    }
  }
}
