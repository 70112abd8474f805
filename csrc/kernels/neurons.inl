// A gated feed-forward, neuron by neuron: the weights of a neuron are read once for all rows that go
// through it, and stay in the first cache meanwhile.

static void widen(const NeuronCall& call, int64_t row) {
  const int64_t width = call.weight->hidden;
  const uint16_t* x = call.x + row * call.x_stride;
  if (call.norm != nullptr) {
    uint16_t* normed = call.halves + row * width;
    norm_row(x, width, call.norm, call.epsilon, normed);
    x = normed;
  }
  float* wide = call.wide + row * width;
  for (int64_t i = 0; i < width; ++i) wide[i] = from_bf16(x[i]);
}

INLINE float as_float(uint16_t half) { return from_bf16(half); }
INLINE float as_float(int8_t step) { return static_cast<float>(step); }

// Products of a row with those of gate and up, in sixteen lanes each. Memory that follows is
// fetched meanwhile: where the next neuron lies, no processor can know.
template <class Weight>
INLINE void gate_and_up(const float* x, const Weight* weight, int64_t width, const Weight* ahead,
                        float* gate, float* up) {
  const Weight* other = weight + width;
  float gates[kLanes] = {}, ups[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    __builtin_prefetch(ahead + i, 0, 2);
    __builtin_prefetch(ahead + width + i, 0, 2);
    for (int lane = 0; lane < kLanes; ++lane) {
      gates[lane] = multiply_add(x[i + lane], as_float(weight[i + lane]), gates[lane]);
      ups[lane] = multiply_add(x[i + lane], as_float(other[i + lane]), ups[lane]);
    }
  }
  for (; i < width; ++i) {
    gates[0] = multiply_add(x[i], as_float(weight[i]), gates[0]);
    ups[0] = multiply_add(x[i], as_float(other[i]), ups[0]);
  }
  *gate = *up = 0;
  for (int lane = 0; lane < kLanes; ++lane) *gate += gates[lane], *up += ups[lane];
}

template <class Weight>
INLINE void add_column(float inner, const Weight* column, int64_t width, const Weight* ahead,
                       float* __restrict sums) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    __builtin_prefetch(ahead + i, 0, 2);
    for (int lane = 0; lane < kLanes; ++lane)
      sums[i + lane] = multiply_add(inner, as_float(column[i + lane]), sums[i + lane]);
  }
  for (; i < width; ++i) sums[i] = multiply_add(inner, as_float(column[i]), sums[i]);
}

template <class Weight>
static void add_neurons(const NeuronCall& call, const int32_t* ids, int64_t count, float* sums) {
  const NeuronWeight& weight = *call.weight;
  const int64_t width = weight.hidden;
  const auto* all = static_cast<const Weight*>(weight.values);
  __builtin_memset(sums, 0, static_cast<size_t>(call.rows * width) * sizeof(float));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = ids[i], next = ids[i + 1 < count ? i + 1 : i];
    const Weight *values = all + id * 3 * width, *ahead = all + next * 3 * width;
    const float* scales = weight.scales == nullptr ? nullptr : weight.scales + id * 3;
    const uint32_t takers = call.takers[id];
    for (int64_t row = 0; row < call.rows; ++row) {
      if ((takers >> row & 1) == 0) continue;
      float gate, up;
      gate_and_up(call.wide + row * width, values, width, ahead, &gate, &up);
      if (scales != nullptr) gate *= scales[0], up *= scales[1];
      if (weight.inner_bias != nullptr) {
        gate += weight.inner_bias[id * 2];
        up += weight.inner_bias[id * 2 + 1];
      }
      float inner = gate / (1.0f + exponential(-gate)) * up;
      if (scales != nullptr) inner *= scales[2];
      add_column(inner, values + 2 * width, width, ahead + 2 * width, sums + row * width);
    }
  }
}

static void neurons(const NeuronCall& call, const int32_t* ids, int64_t count, float* sums) {
  if (call.weight->scales == nullptr)
    add_neurons<uint16_t>(call, ids, count, sums);
  else
    add_neurons<int8_t>(call, ids, count, sums);
}

static void join(const float* sums, int64_t parts, int64_t stride, int64_t width, const float* bias,
                 const uint16_t* residual, uint16_t* out) {
  for (int64_t i = 0; i < width; ++i) {
    float value = sums[i];
    for (int64_t part = 1; part < parts; ++part) value += sums[part * stride + i];
    if (bias != nullptr) value += bias[i];
    if (residual != nullptr) value += from_bf16(residual[i]);
    out[i] = to_bf16(value);
  }
}
