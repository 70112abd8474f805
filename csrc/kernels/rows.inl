// Work on single rows: norm, quantization, lookup.

// out = bf16(bf16(x / rms(x)) * weight), as Root Mean Square Layer Normalization, section 3, rounded
// where models of that dtype round.
INLINE void norm_row(const uint16_t* x, int64_t width, const uint16_t* weight, float epsilon,
                     uint16_t* out) {
  float squares[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const float value = from_bf16(x[i + lane]);
      squares[lane] += value * value;
    }
  for (; i < width; ++i) squares[0] += from_bf16(x[i]) * from_bf16(x[i]);
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += squares[lane];
  const float factor = 1.0f / __builtin_sqrtf(sum / static_cast<float>(width) + epsilon);
  for (i = 0; i < width; ++i)
    out[i] = to_bf16(from_bf16(to_bf16(from_bf16(x[i]) * factor)) * from_bf16(weight[i]));
}

static void rms_norm(const uint16_t* x, int64_t stride, int64_t rows, int64_t width,
                     const uint16_t* weight, float epsilon, uint16_t* out) {
  for (int64_t row = 0; row < rows; ++row)
    norm_row(x + row * stride, width, weight, epsilon, out + row * width);
}

struct Step {
  float value;  // what one level of int8 stands for
  bool finite;
};

// The scale of some columns of a row. A NaN or an infinity makes it a NaN, so that it reaches the
// result.
INLINE Step find_step(const uint16_t* x, int64_t columns) {
  uint16_t most[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint16_t magnitude = x[i + lane] & 0x7fff;
      most[lane] = magnitude > most[lane] ? magnitude : most[lane];
    }
  uint16_t largest = 0;
  for (; i < columns; ++i) {
    const uint16_t magnitude = x[i] & 0x7fff;
    largest = magnitude > largest ? magnitude : largest;
  }
  for (int lane = 0; lane < kLanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  if (largest >= 0x7f80) return {__builtin_nanf(""), false};
  return {largest == 0 ? 1.0f : from_bf16(largest) / 127.0f, true};
}

// Symmetric int8 of one group of a row, and its sum; columns from `known` on are zero.
INLINE int32_t quantize_group(const uint16_t* x, int64_t known, int64_t group, Step step,
                              int8_t* out) {
  const float divisor = step.finite ? step.value : 1.0f;
  int32_t total = 0;
  int64_t i = 0;
  for (; i < known; ++i) {
    const float value = step.finite ? nearest(from_bf16(x[i]) / divisor) : 0.0f;
    const int32_t whole = static_cast<int32_t>(value);
    out[i] = static_cast<int8_t>(whole);
    total += whole;
  }
  for (; i < group; ++i) out[i] = 0;
  return total;
}

static void prepare(const LinearCall& call, int64_t begin, int64_t end) {
  const LinearWeight& weight = *call.weight;
  const Prepared& to = call.prepared;
  const int64_t columns = weight.columns, groups = weight.groups();
  for (int64_t row = begin; row < end; ++row) {
    const uint16_t* x = call.x + row * call.x_stride;
    uint16_t* halves = to.halves + row * to.stride;
    if (call.norm != nullptr)
      norm_row(x, columns, call.norm, call.epsilon, halves);
    else if (call.in_halves)
      __builtin_memcpy(halves, x, static_cast<size_t>(columns) * 2);
    if (call.in_halves) {
      __builtin_memset(halves + columns, 0, static_cast<size_t>(to.stride - columns) * 2);
      continue;
    }
    const uint16_t* source = call.norm != nullptr ? halves : x;
    const int64_t shared = weight.format == Format::w8a8 ? weight.group : kActivationGroup;
    Step step{};
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * weight.group;
      const int64_t left = columns > first ? columns - first : 0;
      if (first % shared == 0) step = find_step(source + first, least(shared, left));
      const int32_t sum = quantize_group(source + first, least(weight.group, left), weight.group,
                                         step, to.bytes + row * to.stride + first);
      to.scales[row * groups + g] = step.value;
      to.offsets[row * groups + g] = weight.blocks.low_factors != nullptr ? sum
                                     : weight.zeros != nullptr            ? -sum
                                                               : -sum * symmetric_zero(weight);
    }
  }
}

static void rows_of(const LinearWeight& weight, const int64_t* ids, int64_t count, uint16_t* out) {
  if (weight.format == Format::blocks) {
    for (int64_t i = 0; i < count; ++i)
      row_of_blocks(weight, ids[i] / kPanel, ids[i] % kPanel, out + i * weight.columns);
    return;
  }
  const int64_t groups = weight.groups();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t panel = ids[i] / kPanel, lane = ids[i] % kPanel;
    const uint8_t* from = weight.values + panel * weight.panel_bytes();
    uint16_t* to = out + i * weight.columns;
    if (weight.format == Format::bf16) {
      const auto* pairs = reinterpret_cast<const uint16_t*>(from);
      for (int64_t k = 0; k < weight.columns; ++k) to[k] = pairs[k / 2 * 32 + lane * 2 + k % 2];
      continue;
    }
    for (int64_t g = 0; g < groups; ++g) {
      float scales[kLanes];
      load_scales(weight, panel, g, scales);
      const int zero = weight.zeros ? weight.zeros[(panel * groups + g) * kPanel + lane]
                                    : symmetric_zero(weight);
      const int64_t end = least((g + 1) * weight.group, weight.columns);
      for (int64_t k = g * weight.group; k < end; ++k) {
        int value;
        if (weight.format == Format::w8a8) {
          value = from[k / 4 * 64 + lane * 4 + k % 4];
        } else {
          const int byte = from[k / 8 * 64 + lane * 4 + k % 4];
          value = k % 8 < 4 ? byte & 15 : byte >> 4;
        }
        to[k] = to_bf16(static_cast<float>(value - zero) * scales[lane]);
      }
    }
  }
}
