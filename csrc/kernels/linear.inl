// The product with a packed weight, and what follows it while the results are in the cache.

// With tiles, so many rows are worth making bf16 of groups of integers, whose sums would each have
// to be scaled: to round a weight to bf16 loses less than to round activations to int8.
constexpr int64_t kRowsToWiden = 32;
constexpr int64_t kRowsAtOnce = 96;  // results [rows, panels * 16] in fp32 stay in the L1 cache

constexpr int64_t kMostPanels = kNarrowPanels > 2 ? kNarrowPanels : 2;

// Panels whose results are in hand at once: a gate and what it gates, or more.
INLINE int64_t panels_at_once(int64_t rows) { return rows <= kNarrowRows ? kMostPanels : 2; }

#if HEADRACE_LEVEL >= 2

// Bias, gate, residual and rounding for one row of one panel (a pair of panels if gated).
INLINE void finish_row(const LinearCall& call, int64_t row, int64_t panel, const float* c) {
  const LinearWeight& weight = *call.weight;
  const int64_t column = panel * kPanel / (weight.gated ? 2 : 1);
  const int64_t known = least(kPanel, weight.rows - column);
  const auto mask = static_cast<__mmask16>((1 << known) - 1);
  const float* bias = weight.bias == nullptr ? nullptr : weight.bias + panel * kPanel;
  __m512 value = _mm512_loadu_ps(c);
  if (bias != nullptr) value = _mm512_add_ps(value, _mm512_loadu_ps(bias));
  if (weight.gated) {
    __m512 up = _mm512_loadu_ps(c + kPanel);
    if (bias != nullptr) up = _mm512_add_ps(up, _mm512_loadu_ps(bias + kPanel));
    const __m512 minus = _mm512_sub_ps(_mm512_set1_ps(-0.0f), value);
    const __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(minus));
    value = _mm512_mul_ps(_mm512_div_ps(value, below), up);
  }
  if (call.residual != nullptr) {
    const uint16_t* residual = call.residual + row * call.residual_stride + column;
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, residual));
    value = _mm512_add_ps(value, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
  }
  const int64_t at = row * call.out_stride + column;
  if (call.out_is_float)
    _mm512_mask_storeu_ps(static_cast<float*>(call.out) + at, mask, value);
  else
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(call.out) + at, mask, halves_of(value));
}

#else

// Bias, gate, residual and rounding for one row of one panel (a pair of panels if gated).
INLINE void finish_row(const LinearCall& call, int64_t row, int64_t panel, const float* c) {
  const LinearWeight& weight = *call.weight;
  float value[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = c[lane];
  if (weight.bias != nullptr)
    for (int lane = 0; lane < kLanes; ++lane) value[lane] += weight.bias[panel * kPanel + lane];
  int64_t column = panel * kPanel;
  if (weight.gated) {
    column /= 2;
    float up[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) up[lane] = c[kPanel + lane];
    if (weight.bias != nullptr)
      for (int lane = 0; lane < kLanes; ++lane) up[lane] += weight.bias[(panel + 1) * kPanel + lane];
    for (int lane = 0; lane < kLanes; ++lane)
      value[lane] = value[lane] / (1.0f + exponential(-value[lane])) * up[lane];
  }
  const int64_t known = least(kPanel, weight.rows - column);
  if (call.residual != nullptr) {
    const uint16_t* residual = call.residual + row * call.residual_stride + column;
    if (known == kPanel)
      for (int lane = 0; lane < kLanes; ++lane) value[lane] += from_bf16(residual[lane]);
    else
      for (int lane = 0; lane < known; ++lane) value[lane] += from_bf16(residual[lane]);
  }
  if (call.out_is_float) {
    float* out = static_cast<float*>(call.out) + row * call.out_stride + column;
    for (int lane = 0; lane < known; ++lane) out[lane] = value[lane];
    return;
  }
  uint16_t halves[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) halves[lane] = to_bf16(value[lane]);
  uint16_t* out = static_cast<uint16_t*>(call.out) + row * call.out_stride + column;
  if (known == kPanel)
    __builtin_memcpy(out, halves, sizeof halves);
  else
    for (int lane = 0; lane < known; ++lane) out[lane] = halves[lane];
}

#endif

// Have the lines of the results, and of what is added to them, at hand when the product is done:
// rows lie so far apart that no processor fetches the next one by itself.
INLINE void fetch_results(const LinearCall& call, int64_t panel, int64_t panels, int64_t row,
                          int64_t rows) {
  const int64_t parts = call.weight->gated ? 2 : 1, column = panel * kPanel / parts;
  const int64_t size = call.out_is_float ? 4 : 2, bytes = panels * kPanel / parts * size;
  const auto* out = static_cast<const std::byte*>(call.out) + (row * call.out_stride + column) * size;
  const uint16_t* residual = call.residual + row * call.residual_stride + column;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t byte = 0; byte < bytes; byte += 64) {
      __builtin_prefetch(out + m * call.out_stride * size + byte, 1, 2);
      if (call.residual != nullptr)
        __builtin_prefetch(residual + m * call.residual_stride + byte / size, 0, 2);
    }
}

#if HEADRACE_LEVEL >= 4
#include "linear_tiles.inl"
#endif

INLINE bool uses_tiles(const LinearWeight& weight, int64_t rows) {
  return HEADRACE_LEVEL >= 4 &&
         rows > (weight.format == Format::blocks ? kRowsToWiden : kNarrowRows);
}

static bool multiplies_halves(const LinearWeight& weight, int64_t rows) {
  return weight.format == Format::bf16 ||
         (HEADRACE_LEVEL >= 4 && weight.format != Format::w8a8 && rows > kRowsToWiden);
}

static size_t linear_scratch(const LinearWeight& weight, int64_t rows) {
#if HEADRACE_LEVEL >= 4
  TileScratch unused;
  if (uses_tiles(weight, rows)) return carve_tiles(weight, nullptr, unused);
#else
  (void)rows;
#endif
  const size_t results = kRowsAtOnce * kMostPanels * kPanel * sizeof(float);
  return results + (weight.format == Format::blocks ? sizeof(BlockChunk) : 0);
}

static void linear(const LinearCall& call, int64_t begin, int64_t end, std::byte* scratch) {
  const LinearWeight& weight = *call.weight;
  const Prepared& x = call.prepared;
#if HEADRACE_LEVEL >= 4
  if (uses_tiles(weight, call.rows)) return linear_with_tiles(call, begin, end, scratch);
#endif
  auto* c = reinterpret_cast<float*>(scratch);
  const int64_t at_once = panels_at_once(call.rows), c_stride = at_once * kPanel;
  for (int64_t panel = begin; panel < end; panel += at_once) {
    const int64_t panels = least(at_once, end - panel);
    for (int64_t row = 0; row < call.rows; row += kRowsAtOnce) {
      const int64_t rows = least(kRowsAtOnce, call.rows - row);
      if (rows > kNarrowRows) fetch_results(call, panel, panels, row, rows);
      if (weight.format == Format::bf16)
        for (int64_t m = 0; m < rows;) {
          const int64_t blocks = (rows - m + kMaxBf16Rows - 1) / kMaxBf16Rows;
          const int64_t count = (rows - m + blocks - 1) / blocks;
          bf16_panels(count, panels, weight.padded_columns / 2, x.halves + (row + m) * x.stride,
                      x.stride,
                      reinterpret_cast<const uint16_t*>(weight.values + panel * weight.panel_bytes()),
                      weight.panel_bytes() / 2, c + m * c_stride, c_stride, false);
          m += count;
        }
      else if (weight.format == Format::blocks)
        multiply_blocks(weight, x, panel, panels, row, rows, c, c_stride,
                        *reinterpret_cast<BlockChunk*>(c + kRowsAtOnce * kMostPanels * kPanel));
      else if (weight.format == Format::w8a8)
        multiply_integer<false>(weight, x, panel, panels, row, rows, c, c_stride);
      else
        multiply_integer<true>(weight, x, panel, panels, row, rows, c, c_stride);
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t p = 0; p < panels; p += weight.gated ? 2 : 1)
          finish_row(call, row + m, panel + p, c + m * c_stride + p * kPanel);
    }
  }
}
