// The best scale of each group of weights among a few candidates. All instruction sets find the same
// to the bit: sums go in sixteen lanes, and nothing is fused.

struct Fit {
  float gain;  // how far the squared error falls from that of all zeros
  float scale;
};

// Round x / scale candidates to the grid, then take the least-squares scale for that rounding.
INLINE Fit fit_grid(const float* x, int64_t size, float inverse, float lowest, float highest) {
  float products[kLanes] = {}, norms[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      float grid = nearest(x[i + lane] * inverse);
      grid = grid < lowest ? lowest : grid;
      grid = grid > highest ? highest : grid;
      products[lane] += grid * x[i + lane];
      norms[lane] += grid * grid;
    }
  float product = 0, norm = 0;
  for (; i < size; ++i) {
    float grid = nearest(x[i] * inverse);
    grid = grid < lowest ? lowest : grid;
    grid = grid > highest ? highest : grid;
    product += grid * x[i];
    norm += grid * grid;
  }
  for (int lane = 0; lane < kLanes; ++lane) product += products[lane], norm += norms[lane];
  norm = norm < kSmallest ? kSmallest : norm;
  return {product * product / norm, product / norm};
}

static void search_group(const ScaleSearch& search, int64_t group) {
  const int64_t size = search.size;
  const float* x = search.weights + group * size;
  float base = 0, low = 0, high = 0;
  for (int64_t i = 0; i < size; ++i) {
    base = __builtin_fabsf(x[i]) > __builtin_fabsf(base) ? x[i] : base;
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  const bool zero_points = search.zeros != nullptr;
  if (zero_points) base = high - low;
  if (__builtin_fabsf(base) < kSmallest) base = 1.0f;

  const auto lowest = static_cast<float>(search.lowest), highest = static_cast<float>(search.highest);
  float zero = static_cast<float>(search.zero), best = -1.0f, scale = __builtin_nanf("");
  for (int64_t candidate = 0; candidate < search.candidates; ++candidate) {
    const float inverse = search.ends[candidate] / base;
    float middle = static_cast<float>(search.zero);
    if (zero_points) {
      middle = nearest(-low * inverse);
      middle = middle < lowest ? lowest : middle;
      middle = middle > highest ? highest : middle;
    }
    const Fit fit = fit_grid(x, size, inverse, lowest - middle, highest - middle);
    if (fit.gain > best) best = fit.gain, scale = fit.scale, zero = middle;
  }
  if (search.round_scales) scale = from_bf16(to_bf16(scale));
  if (__builtin_fabsf(scale) < kSmallest) scale = 0.0f;

  const float divisor = scale == 0.0f ? 1.0f : scale;
  uint8_t* values = search.values + group * size;
  for (int64_t i = 0; i < size; ++i) {
    float value = nearest(x[i] / divisor) + zero;
    value = value > lowest ? value : lowest;
    value = value > highest ? highest : value;
    values[i] = static_cast<uint8_t>(static_cast<int32_t>(value));
  }
  search.scales[group] = scale;
  if (zero_points) search.zeros[group] = static_cast<uint8_t>(static_cast<int32_t>(zero));
}

static void search_scales(const ScaleSearch& search, int64_t begin, int64_t end) {
  for (int64_t group = begin; group < end; ++group) search_group(search, group);
}
