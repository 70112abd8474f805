// What the processor can do at best: the speeds that kernels are measured against.

static uint64_t read(const std::byte* data, size_t bytes) {
  const auto* words = reinterpret_cast<const uint64_t*>(data);
  uint64_t mixed[32] = {};
  for (size_t i = 0; i + 32 <= bytes / 8; i += 32)
    for (int j = 0; j < 32; ++j) mixed[j] ^= words[i + j];
  uint64_t all = 0;
  for (int j = 0; j < 32; ++j) all ^= mixed[j];
  return all;
}

// Keeps the compiler from doing repeated work once.
INLINE void keep(void* input, void* output) {
  __asm__ volatile("" : : "r"(input), "r"(output) : "memory");
}

#if HEADRACE_LEVEL >= 4

// Two tiles of rows times two of panels, from the nearest cache.
template <Product kind>
static double peak_of(int64_t steps, int64_t elements) {
  constexpr int64_t rows = 2 * kTileRows, columns = 2 * kPanel, inner = 8;
  alignas(64) std::byte a[rows * 64 * inner] = {}, b[columns * 64 * inner] = {};
  alignas(64) std::byte c[rows * columns * 4];
  configure_tiles(64);
  for (int64_t i = 0; i < steps; ++i) {
    multiply_tiles<true, true, kind>(inner, a, 64 * inner, b, kTileBytes * inner, c, columns * 4,
                                     false);
    keep(a, c);
  }
  release_tiles();
  return 2.0 * static_cast<double>(steps * rows * columns * elements * inner);
}

static double peak_bf16(int64_t steps) { return peak_of<Product::bf16>(steps, 32); }
static double peak_int8(int64_t steps) { return peak_of<Product::bytes>(steps, 64); }

#else

// The inner products on operands that are in the nearest cache, in the shape with the most reuse.
static double peak_bf16(int64_t steps) {
  constexpr int64_t pairs = 128;
  constexpr int rows = kMaxBf16Rows, panels = kWidePanels;
  alignas(64) uint16_t a[rows * 2 * pairs] = {}, b[panels * 32 * pairs] = {};
  alignas(64) float c[rows * panels * kLanes];
  for (int64_t i = 0; i < steps; ++i) {
    multiply_bf16(rows, panels, pairs, a, 2 * pairs, b, 32 * pairs, c, panels * kLanes, false);
    keep(a, c);
  }
  return 2.0 * static_cast<double>(steps * rows * panels * kLanes * 2 * pairs);
}

static double peak_int8(int64_t steps) {
  constexpr int64_t columns = 512;
  constexpr int rows = kMaxByteRows, panels = kWidePanels;
  alignas(64) int8_t a[rows * columns] = {};
  alignas(64) uint8_t b[panels * kLanes * columns] = {};
  alignas(64) float c[rows * panels * kLanes], scales[panels * kLanes] = {}, x_scales[rows] = {};
  int32_t offsets[rows] = {};
  const LinearWeight weight{Format::w8a8, panels, panels * kPanel, columns, columns, columns,
                            false, b, scales, nullptr, nullptr};
  const Prepared x{rows, columns, nullptr, a, x_scales, offsets};
  for (int64_t i = 0; i < steps; ++i) {
    multiply_integer<false>(weight, x, 0, panels, 0, rows, c, panels * kLanes);
    keep(a, c);
  }
  return 2.0 * static_cast<double>(steps * rows * panels * kLanes * columns);
}

#endif
