// The product with a packed weight, and what follows it while the results are in the cache.

constexpr int64_t kRowsAtOnce = 96;  // results [rows, panels * 16] in fp32 stay in the L1 cache

constexpr int64_t kMostPanels = kNarrowPanels > 2 ? kNarrowPanels : 2;

// Panels whose results are in hand at once: a gate and what it gates, or more.
INLINE int64_t panels_at_once(int64_t rows) { return rows <= kNarrowRows ? kMostPanels : 2; }

static size_t linear_scratch(const LinearWeight& weight, int64_t rows) {
  size_t bytes = kRowsAtOnce * kMostPanels * kPanel * sizeof(float);
  if (weight.format == Format::blocks) return bytes + sizeof(BlockChunk);
#if HEADRACE_LEVEL >= 4
  if (rows > kNarrowRows && weight.format == Format::w4a8)
    bytes += static_cast<size_t>(2 * weight.padded_columns * kPanel);
#else
  (void)weight, (void)rows;
#endif
  return bytes;
}

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

// Have the lines of the results, and of what is added to them, at hand when the product is done:
// rows lie so far apart that no processor fetches the next one by itself.
INLINE void fetch_results(const LinearCall& call, int64_t panel, int64_t row, int64_t rows) {
  const int64_t column = panel * kPanel / (call.weight->gated ? 2 : 1);
  const int64_t size = call.out_is_float ? 4 : 2;
  const auto* out = static_cast<const std::byte*>(call.out) + (row * call.out_stride + column) * size;
  const uint16_t* residual = call.residual + row * call.residual_stride + column;
  for (int64_t m = 0; m < rows; ++m) {
    __builtin_prefetch(out + m * call.out_stride * size, 1, 2);
    if (call.residual != nullptr) __builtin_prefetch(residual + m * call.residual_stride, 0, 2);
  }
}

#if HEADRACE_LEVEL >= 4
// Rows [row, row + count) with tiles; c has room for 16 rows more than are known.
static void multiply_with_tiles(const LinearCall& call, int64_t row, int64_t count, int64_t panel,
                                int64_t panels, const uint8_t* bytes, float* c, int64_t c_stride) {
  const LinearWeight& weight = *call.weight;
  const Prepared& x = call.prepared;
  const bool wide = panels > 1;
  for (int64_t m = 0; m < count;) {
    const bool two = count - m > kTileRows;
    float* to = c + m * c_stride;
    if (weight.format == Format::bf16) {
      const auto block = two ? (wide ? bf16_tiles<true, true> : bf16_tiles<true, false>)
                             : (wide ? bf16_tiles<false, true> : bf16_tiles<false, false>);
      const auto* b = reinterpret_cast<const uint16_t*>(weight.values + panel * weight.panel_bytes());
      block(weight.padded_columns / 2, x.halves + (row + m) * x.stride, x.stride, b,
            weight.panel_bytes() / 2, to, c_stride, false);
    } else {
      const auto block = two ? (wide ? integer_tiles<true, true> : integer_tiles<true, false>)
                             : (wide ? integer_tiles<false, true> : integer_tiles<false, false>);
      block(IntegerBlock{&weight, &x, row + m, panel, to, c_stride, 0}, bytes);
    }
    m += two ? 2 * kTileRows : kTileRows;
  }
}
#endif

static void linear(const LinearCall& call, int64_t begin, int64_t end, std::byte* scratch) {
  const LinearWeight& weight = *call.weight;
  const Prepared& x = call.prepared;
  auto* c = reinterpret_cast<float*>(scratch);
  const int64_t at_once = panels_at_once(call.rows), c_stride = at_once * kPanel;
#if HEADRACE_LEVEL >= 4
  const bool with_tiles = call.rows > kNarrowRows && weight.format != Format::blocks;
  uint8_t* widened = reinterpret_cast<uint8_t*>(c + kRowsAtOnce * kMostPanels * kPanel);
  if (with_tiles) configure_tiles(weight.format == Format::bf16 ? 64 : static_cast<int>(least(weight.group, 64)));
#endif
  for (int64_t panel = begin; panel < end; panel += at_once) {
    const int64_t panels = least(at_once, end - panel);
#if HEADRACE_LEVEL >= 4
    const uint8_t* bytes = weight.values + panel * weight.panel_bytes();
    if (with_tiles && weight.format == Format::w4a8) {
      for (int64_t p = 0; p < panels; ++p)
        widen_panel(bytes + p * weight.panel_bytes(), weight.padded_columns,
                    widened + p * weight.padded_columns * kPanel);
      bytes = widened;
    }
#endif
    for (int64_t row = 0; row < call.rows; row += kRowsAtOnce) {
      const int64_t rows = least(kRowsAtOnce, call.rows - row);
      if (rows > kNarrowRows) fetch_results(call, panel, row, rows);
#if HEADRACE_LEVEL >= 4
      if (with_tiles)
        multiply_with_tiles(call, row, rows, panel, panels, bytes, c, c_stride);
      else
#endif
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
#if HEADRACE_LEVEL >= 4
  if (with_tiles) release_tiles();
#endif
}
