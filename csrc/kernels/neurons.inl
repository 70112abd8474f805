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

#if HEADRACE_LEVEL == 0
typedef float Floats __attribute__((vector_size(16)));
INLINE Floats repeat(float value) { return Floats{} + value; }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
#endif

constexpr int kFloats = static_cast<int>(sizeof(Floats) / sizeof(float));
constexpr int kSteps = 4;  // vectors in one go: of int8 on AVX-512, what the first cache fetches
constexpr int kTogether = 4;  // neurons whose columns are added in one go

INLINE float widened(uint16_t half) { return from_bf16(half); }
INLINE float widened(int8_t step) { return static_cast<float>(step); }
#if HEADRACE_LEVEL == 0
template <class Weight>
INLINE Floats load_wide(const Weight* from) {
  return Floats{widened(from[0]), widened(from[1]), widened(from[2]), widened(from[3])};
}
#else
INLINE Floats load_wide(const uint16_t* from) { return load_factors(from, true); }
INLINE Floats load_wide(const int8_t* from) { return to_floats(load_steps(from)); }
#endif
INLINE Floats load_floats(const float* from) {
  Floats value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
INLINE float sum_of(Floats value) {
  float sum = 0;
  for (int lane = 0; lane < kFloats; ++lane) sum += value[lane];
  return sum;
}

template <class Weight>
INLINE void fetch(const Weight* from) {
  for (int i = 0; i < kSteps * kFloats; i += 64 / static_cast<int>(sizeof(Weight)))
    __builtin_prefetch(from + i, 0, 2);
}

// Products of a row with those of gate and up. A neuron that comes later is fetched meanwhile: where
// it lies, no processor can know.
template <class Weight>
INLINE void gate_and_up(const float* x, const Weight* weight, int64_t width, const Weight* ahead,
                        float* gate, float* up) {
  const Weight* other = weight + width;
  Floats gates[kSteps] = {}, ups[kSteps] = {};
  int64_t i = 0;
  for (; i + kSteps * kFloats <= width; i += kSteps * kFloats) {
    fetch(ahead + i);
    fetch(ahead + width + i);
#pragma GCC unroll 4
    for (int j = 0; j < kSteps; ++j) {
      const Floats inputs = load_floats(x + i + j * kFloats);
      gates[j] = multiply_add(inputs, load_wide(weight + i + j * kFloats), gates[j]);
      ups[j] = multiply_add(inputs, load_wide(other + i + j * kFloats), ups[j]);
    }
  }
  *gate = sum_of((gates[0] + gates[1]) + (gates[2] + gates[3]));
  *up = sum_of((ups[0] + ups[1]) + (ups[2] + ups[3]));
  for (; i < width; ++i) {
    *gate = multiply_add(x[i], widened(weight[i]), *gate);
    *up = multiply_add(x[i], widened(other[i]), *up);
  }
}

// What some neurons say to one row.
template <class Weight>
struct Said {
  int count;
  float inner[kTogether];
  const Weight* columns[kTogether];
  const Weight* ahead[kTogether];
};

template <int Count, class Weight>
INLINE void add_columns(const Said<Weight>& said, int64_t width, float* sums) {
  Floats inner[Count];
#pragma GCC unroll 4
  for (int n = 0; n < Count; ++n) inner[n] = repeat(said.inner[n]);
  int64_t i = 0;
  for (; i + kSteps * kFloats <= width; i += kSteps * kFloats) {
    Floats sum[kSteps];
#pragma GCC unroll 4
    for (int j = 0; j < kSteps; ++j) sum[j] = load_floats(sums + i + j * kFloats);
#pragma GCC unroll 4
    for (int n = 0; n < Count; ++n) {
      fetch(said.ahead[n] + i);
#pragma GCC unroll 4
      for (int j = 0; j < kSteps; ++j)
        sum[j] = multiply_add(inner[n], load_wide(said.columns[n] + i + j * kFloats), sum[j]);
    }
    __builtin_memcpy(sums + i, sum, sizeof sum);
  }
  for (; i < width; ++i)
    for (int n = 0; n < Count; ++n)
      sums[i] = multiply_add(said.inner[n], widened(said.columns[n][i]), sums[i]);
}

template <class Weight>
INLINE float say(const NeuronCall& call, int64_t row, int32_t id, const Weight* values,
                 const Weight* ahead) {
  const NeuronWeight& weight = *call.weight;
  const int64_t width = weight.hidden;
  const float* scales = weight.scales == nullptr ? nullptr : weight.scales + id * 3;
  float gate, up;
  gate_and_up(call.wide + row * width, values, width, ahead, &gate, &up);
  if (scales != nullptr) gate *= scales[0], up *= scales[1];
  if (weight.inner_bias != nullptr) {
    gate += weight.inner_bias[id * 2];
    up += weight.inner_bias[id * 2 + 1];
  }
  const float inner = gate / (1.0f + exponential(-gate)) * up;
  return scales == nullptr ? inner : inner * scales[2];
}

template <class Weight>
static void add_neurons(const NeuronCall& call, const int32_t* ids, int64_t count, float* sums) {
  const int64_t width = call.weight->hidden;
  const auto* all = static_cast<const Weight*>(call.weight->values);
  __builtin_memset(sums, 0, static_cast<size_t>(call.rows * width) * sizeof(float));
  for (int64_t first = 0; first < count; first += kTogether) {
    Said<Weight> said[kNeuronRows];
    for (int64_t row = 0; row < call.rows; ++row) said[row].count = 0;
    for (int64_t i = first; i < least(first + kTogether, count); ++i) {
      const Weight* values = all + ids[i] * 3 * width;
      const Weight* ahead = all + ids[least(i + kTogether, count - 1)] * 3 * width;
      for (uint32_t takers = call.takers[ids[i]]; takers != 0; takers &= takers - 1) {
        const int row = __builtin_ctz(takers);
        Said<Weight>& to = said[row];
        to.inner[to.count] = say(call, row, ids[i], values, ahead);
        to.columns[to.count] = values + 2 * width;
        to.ahead[to.count++] = ahead + 2 * width;
      }
    }
    for (int64_t row = 0; row < call.rows; ++row) {
      float* to = sums + row * width;
      switch (said[row].count) {
        case 4: add_columns<4>(said[row], width, to); break;
        case 3: add_columns<3>(said[row], width, to); break;
        case 2: add_columns<2>(said[row], width, to); break;
        case 1: add_columns<1>(said[row], width, to); break;
      }
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
