// A gated feed-forward, neuron by neuron: the weights of a neuron are read once for all rows that go
// through it, and stay in the first cache meanwhile.

INLINE float widened(uint16_t half) { return from_bf16(half); }
INLINE float widened(int8_t step) { return static_cast<float>(step); }

#if HEADRACE_LEVEL == 0
typedef float Floats __attribute__((vector_size(16)));
INLINE Floats repeat(float value) { return Floats{} + value; }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
template <class Weight>
INLINE Floats load_wide(const Weight* from) {
  return Floats{widened(from[0]), widened(from[1]), widened(from[2]), widened(from[3])};
}
#else
INLINE Floats load_wide(const uint16_t* from) { return load_factors(from, true); }
INLINE Floats load_wide(const int8_t* from) { return to_floats(load_steps(from)); }
#endif

constexpr int kFloats = static_cast<int>(sizeof(Floats) / sizeof(float));
constexpr int kSteps = 4;     // vectors in one go: with AVX-512, a cache line of int8
constexpr int kTogether = 4;  // neurons whose columns are added in one go

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

// While weights are multiplied, those of a later neuron are fetched: where they lie, no processor
// can know.
template <class Weight>
INLINE void fetch(const Weight* from) {
  for (int i = 0; i < kSteps * kFloats; i += 64 / static_cast<int>(sizeof(Weight)))
    __builtin_prefetch(from + i, 0, 2);
}

#if HEADRACE_LEVEL >= 2

// Inputs of int8 weights; those of bf16 are bf16.
struct SplitInputs {
  alignas(64) float factor;
  int32_t sum;  // of the levels
  // high and low bytes [width each, in whole vectors] follow

  int8_t* high() { return reinterpret_cast<int8_t*>(this + 1); }
  const int8_t* high() const { return reinterpret_cast<const int8_t*>(this + 1); }
};

INLINE int64_t whole_vectors(int64_t width) { return (width + 63) / 64 * 64; }

static void prepare_inputs(const NeuronWeight& weight, const uint16_t* x, std::byte* inputs) {
  const int64_t width = weight.hidden;
  if (weight.scales == nullptr) {
    __builtin_memcpy(inputs, x, static_cast<size_t>(width) * 2);
    return;
  }
  auto* split = reinterpret_cast<SplitInputs*>(inputs);
  int8_t* high = split->high();
  split->sum = split_row(x, width, high, high + whole_vectors(width), &split->factor);
}

// Products of a row with those of gate and up.
INLINE void gate_and_up(const std::byte* inputs, const uint16_t* weight, int64_t width,
                        const uint16_t* ahead, float* gate, float* up) {
  const auto* x = reinterpret_cast<const uint16_t*>(inputs);
  const uint16_t* other = weight + width;
  __m512 gates[2] = {}, ups[2] = {};
  int64_t i = 0;
  for (; i + 64 <= width; i += 64) {
    fetch(ahead + i);
    fetch(ahead + width + i);
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512i pairs = _mm512_loadu_si512(x + i + 32 * j);
      add_halves(gates[j], _mm512_loadu_si512(weight + i + 32 * j), pairs);
      add_halves(ups[j], _mm512_loadu_si512(other + i + 32 * j), pairs);
    }
  }
  for (; i < width; i += 32) {
    const __mmask32 mask = columns_left(width - i);
    const __m512i pairs = _mm512_maskz_loadu_epi16(mask, x + i);
    add_halves(gates[0], _mm512_maskz_loadu_epi16(mask, weight + i), pairs);
    add_halves(ups[0], _mm512_maskz_loadu_epi16(mask, other + i), pairs);
  }
  *gate = _mm512_reduce_add_ps(_mm512_add_ps(gates[0], gates[1]));
  *up = _mm512_reduce_add_ps(_mm512_add_ps(ups[0], ups[1]));
}

INLINE void gate_and_up(const std::byte* inputs, const int8_t* weight, int64_t width,
                        const int8_t* ahead, float* gate, float* up) {
  const auto& x = *reinterpret_cast<const SplitInputs*>(inputs);
  const int8_t *high = x.high(), *low = high + whole_vectors(width);
  const __m512i moved = _mm512_set1_epi8(-128);
  __m512i gates[2] = {}, ups[2] = {};
  for (int64_t i = 0; i < width; i += 64) {
    fetch(ahead + i);
    fetch(ahead + width + i);
    const __mmask64 mask = bytes_left(width - i);
    const auto load = [&](const int8_t* from) { return _mm512_maskz_loadu_epi8(mask, from + i); };
    const __m512i own = _mm512_xor_si512(load(weight), moved);
    const __m512i other = _mm512_xor_si512(load(weight + width), moved);
    const __m512i highs = load(high), lows = load(low);
    add_bytes(gates[0], own, highs);
    add_bytes(gates[1], own, lows);
    add_bytes(ups[0], other, highs);
    add_bytes(ups[1], other, lows);
  }
  const auto total = [&](const __m512i* sums) {
    const int64_t highs = _mm512_reduce_add_epi32(sums[0]), lows = _mm512_reduce_add_epi32(sums[1]);
    return static_cast<float>(highs * 256 + lows - int64_t{x.sum} * 128) * x.factor;
  };
  *gate = total(gates);
  *up = total(ups);
}

#else

static void prepare_inputs(const NeuronWeight& weight, const uint16_t* x, std::byte* inputs) {
  auto* wide = reinterpret_cast<float*>(inputs);
  for (int64_t i = 0; i < weight.hidden; ++i) wide[i] = from_bf16(x[i]);
}

template <class Weight>
INLINE void gate_and_up(const std::byte* inputs, const Weight* weight, int64_t width,
                        const Weight* ahead, float* gate, float* up) {
  const auto* x = reinterpret_cast<const float*>(inputs);
  const Weight* other = weight + width;
  Floats gates[kSteps] = {}, ups[kSteps] = {};
  int64_t i = 0;
  for (; i + kSteps * kFloats <= width; i += kSteps * kFloats) {
    fetch(ahead + i);
    fetch(ahead + width + i);
#pragma GCC unroll 4
    for (int j = 0; j < kSteps; ++j) {
      const Floats wide = load_floats(x + i + j * kFloats);
      gates[j] = multiply_add(wide, load_wide(weight + i + j * kFloats), gates[j]);
      ups[j] = multiply_add(wide, load_wide(other + i + j * kFloats), ups[j]);
    }
  }
  *gate = sum_of((gates[0] + gates[1]) + (gates[2] + gates[3]));
  *up = sum_of((ups[0] + ups[1]) + (ups[2] + ups[3]));
  for (; i < width; ++i) {
    *gate = multiply_add(x[i], widened(weight[i]), *gate);
    *up = multiply_add(x[i], widened(other[i]), *up);
  }
}

#endif

static void prepare_neurons(const NeuronCall& call, int64_t row) {
  const uint16_t* x = call.x + row * call.x_stride;
  if (call.norm != nullptr) {
    uint16_t* normed = call.halves + row * call.weight->hidden;
    norm_row(x, call.weight->hidden, call.norm, call.epsilon, normed);
    x = normed;
  }
  prepare_inputs(*call.weight, x, call.inputs + row * call.input_bytes());
}

// What some neurons say to one row, and those that are fetched meanwhile.
template <class Weight>
struct Said {
  int count;
  float inner[kTogether];
  const Weight* columns[kTogether];
  const Weight* ahead[kTogether];
};

// The sums of a few vectors stay in registers while the columns of all the neurons are added.
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
  gate_and_up(call.inputs + row * call.input_bytes(), values, width, ahead, &gate, &up);
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
