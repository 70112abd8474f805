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

// The inner products on operands that are in the nearest cache, in the shape with the most reuse.
static double peak_bf16(int64_t steps) {
  constexpr int64_t pairs = 128;
  constexpr int rows = HEADRACE_LEVEL >= 4 ? 32 : kMaxBf16Rows;
  constexpr int panels = HEADRACE_LEVEL >= 4 ? 2 : kWidePanels;
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
  constexpr int rows = HEADRACE_LEVEL >= 4 ? 32 : kMaxByteRows;
  constexpr int panels = HEADRACE_LEVEL >= 4 ? 2 : kWidePanels;
  alignas(64) int8_t a[rows * columns] = {};
  alignas(64) uint8_t b[panels * kLanes * columns] = {};
  alignas(64) float c[rows * panels * kLanes], scales[panels * kLanes] = {}, x_scales[rows] = {};
  int32_t offsets[rows] = {};
  const LinearWeight weight{Format::w8a8, panels, panels * kPanel, columns, columns, columns,
                            false, b, scales, nullptr, nullptr};
  const Prepared x{rows, columns, nullptr, a, x_scales, offsets};
#if HEADRACE_LEVEL >= 4
  configure_tiles(64);
#endif
  for (int64_t i = 0; i < steps; ++i) {
#if HEADRACE_LEVEL >= 4
    integer_tiles<true, true>(IntegerBlock{&weight, &x, 0, 0, c, panels * kLanes, 0}, b);
#else
    multiply_integer<false>(weight, x, 0, panels, 0, rows, c, panels * kLanes);
#endif
    keep(a, c);
  }
#if HEADRACE_LEVEL >= 4
  release_tiles();
#endif
  return 2.0 * static_cast<double>(steps * rows * panels * kLanes * columns);
}
