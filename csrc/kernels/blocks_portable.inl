// Products of a block of rows with a panel in plain C++, for any x86-64.

constexpr int kMaxBf16Rows = 1, kMaxByteRows = 1, kMaxNibbleRows = 1;
constexpr int kWidePanels = 1;
constexpr int kNarrowPanels = 1;
constexpr int kNarrowRows = 1;

template <int Rows, int Panels>
static void bf16_block(int64_t pairs, const uint16_t* a, int64_t, const uint16_t* b, int64_t,
                       float* c, int64_t, bool accumulate) {
  static_assert(Rows == 1 && Panels == 1);
  float sum[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) sum[lane] = accumulate ? c[lane] : 0.0f;
  for (int64_t k = 0; k < pairs; ++k, b += 32) {
    const float first = from_bf16(a[2 * k]), second = from_bf16(a[2 * k + 1]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t pair = load32(b + 2 * lane);
      sum[lane] += first * __builtin_bit_cast(float, pair << 16);
      sum[lane] += second * __builtin_bit_cast(float, pair & 0xffff0000);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) c[lane] = sum[lane];
}

template <int Rows, int Panels, bool Nibbles>
static void integer_block(const IntegerBlock& in) {
  static_assert(Rows == 1 && Panels == 1);
  const LinearWeight& weight = *in.weight;
  const int64_t groups = weight.groups();
  const int8_t* a = block_row(in, 0);
  const uint8_t* b = weight.values + in.panel * weight.panel_bytes();
  for (int64_t g = 0; g < groups; ++g) {
    int32_t sum[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int zero = weight.zeros ? weight.zeros[(in.panel * groups + g) * kPanel + lane] : 1;
      sum[lane] = zero * in.x->offsets[in.row * groups + g];
    }
    constexpr int columns = Nibbles ? 8 : 4;
    for (int64_t step = 0; step < weight.group / columns; ++step, b += 64, a += columns)
      for (int lane = 0; lane < kLanes; ++lane)
        for (int j = 0; j < 4; ++j) {
          const int byte = b[4 * lane + j];
          if constexpr (Nibbles)
            sum[lane] += (byte & 15) * a[j] + (byte >> 4) * a[4 + j];
          else
            sum[lane] += byte * a[j];
        }
    float scales[kLanes];
    load_scales(weight, in.panel, g, scales);
    const float x_scale = in.x->scales[in.row * groups + g];
    for (int lane = 0; lane < kLanes; ++lane) {
      const float value = static_cast<float>(sum[lane]) * (scales[lane] * x_scale);
      in.c[lane] = g == 0 ? value : in.c[lane] + value;
    }
  }
}
