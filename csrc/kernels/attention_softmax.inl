// From scores to probabilities, block by block, with a running maximum.
// FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning, section 3.1.

constexpr float kLowest = -1e30f;  // a maximum before any score; finite, so that no NaN arises
constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
// The running maximum may lag behind by this (as a power of two): probabilities stay far from the
// limits of fp32, and most blocks need no rescaling.
constexpr float kSlack = 8.0f;

// 2**x with a relative error below 2e-7; below -126 that of -126.
INLINE float power_of_two(float x) {
  x = x < -126.0f ? -126.0f : x;
  const float n = nearest(x), f = x - n;
  float p = 1.3276460598e-3f;
  p = p * f + 9.6755412435e-3f;
  p = p * f + 5.5507133087e-2f;
  p = p * f + 2.4022119726e-1f;
  p = p * f + 6.9314696704e-1f;
  p = p * f + 1.0f;
  const int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
  return p * __builtin_bit_cast(float, exponent);
}

INLINE float binary_logarithm(float x) { return __builtin_log2f(x); }

// The slots [begin, end) of a block, from 0, that a row sees.
struct Visible {
  int64_t begin, end;
};

INLINE Visible visible_slots(const AttentionTask& task, int64_t row, int64_t first, int64_t count) {
  const int64_t own = task.first_slot + row / task.ratio - first;
  if (!task.causal) return {0, count};
  const int64_t end = own < 0 ? 0 : least(count, own + 1);
  const int64_t begin = task.window > 0 ? own + 1 - task.window : 0;
  return {begin < 0 ? 0 : least(begin, end), end};
}

// softcap * tanh(score / softcap) of a score that is a power of two already.
INLINE float capped(float score, float softcap) {
  const float cap = softcap * kLog2E;
  const float x = score * (2.0f * kLog2E / cap);
  return cap - 2.0f * cap / (power_of_two(x > 126.0f ? 126.0f : x) + 1.0f);
}

// Scores of a row and block, as powers of two: factors applied, and hidden ones -inf.
INLINE void finish_scores(const AttentionTask& task, int64_t row, int64_t first, int64_t count,
                          const float* factors, float* scores) {
  for (int64_t j = 0; j < kKeyBlock; ++j) scores[j] *= factors[j];
  if (task.softcap > 0.0f)
    for (int64_t j = 0; j < kKeyBlock; ++j) scores[j] = capped(scores[j], task.softcap);
  const Visible seen = visible_slots(task, row, first, count);
  for (int64_t j = 0; j < seen.begin; ++j) scores[j] = -kInfinity;
  for (int64_t j = seen.end; j < kKeyBlock; ++j) scores[j] = -kInfinity;
}

// What the products of a block leave in `scores`, factor by factor.
INLINE void block_factors(const AttentionTask& task, const KeyBlock& block, float* factors) {
  const float scale = task.scale * kLog2E;
  const bool scaled = task.keys.scale_offsets != nullptr;
  for (int64_t j = 0; j < kKeyBlock; ++j)
    factors[j] = j >= block.count ? 0.0f : scaled ? scale * block.scales[j] : scale;
}

#if HEADRACE_LEVEL >= 2

INLINE __m512 power_of_two(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.3276460598e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6755412435e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5507133087e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022119726e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314696704e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

INLINE __m512 capped(__m512 score, float softcap) {
  const float cap = softcap * kLog2E;
  const __m512 x = _mm512_mul_ps(score, _mm512_set1_ps(2.0f * kLog2E / cap));
  const __m512 below = _mm512_add_ps(power_of_two(x), _mm512_set1_ps(1.0f));
  return _mm512_sub_ps(_mm512_set1_ps(cap), _mm512_div_ps(_mm512_set1_ps(2.0f * cap), below));
}

#endif

// What a row has gathered.
struct RowState {
  float& highest;  // the running maximum
  float* sums;     // [kPanel]
  float* result;   // [columns]
  int64_t columns;
};

INLINE RowState row_state(const AttentionScratch& scratch, int64_t row, int64_t columns) {
  return {scratch.highest[row], scratch.sums + row * kPanel, scratch.result + row * columns,
          columns};
}

// Sums and result follow the maximum.
static void raise_maximum(const RowState& state, float most) {
  const float factor = power_of_two(state.highest - most);
  state.highest = most;
  for (int64_t j = 0; j < kPanel; ++j) state.sums[j] *= factor;
  for (int64_t j = 0; j < state.columns; ++j) state.result[j] *= factor;
}

#if HEADRACE_LEVEL >= 2

// The probabilities of a row, given its products with a block of keys.
INLINE void softmax(const AttentionTask& task, int64_t row, int64_t first, int64_t count,
                    const float* factors, const float* scores, const RowState& state, __m512* p) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)
    p[j] = _mm512_mul_ps(_mm512_loadu_ps(scores + 16 * j), _mm512_load_ps(factors + 16 * j));
  if (task.softcap > 0.0f) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) p[j] = capped(p[j], task.softcap);
  }
  const Visible seen = visible_slots(task, row, first, count);
  if (seen.begin > 0 || seen.end < kKeyBlock) {
    const uint64_t below = seen.end < kKeyBlock ? (uint64_t{1} << seen.end) - 1 : ~uint64_t{0};
    const uint64_t mask = seen.begin < kKeyBlock ? below >> seen.begin << seen.begin : 0;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      p[j] = _mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), (mask >> (16 * j)) & 0xffff, p[j]);
  }
  // A score of NaN is not above the limit; it makes the row's sum NaN.
  const __m512 most = _mm512_max_ps(_mm512_max_ps(p[0], p[1]), _mm512_max_ps(p[2], p[3]));
  const __m512 limit = _mm512_set1_ps(state.highest + kSlack);
  if (_mm512_cmp_ps_mask(most, limit, _CMP_GT_OQ) != 0)
    raise_maximum(state, _mm512_reduce_max_ps(most));
  __m512 sum = _mm512_loadu_ps(state.sums);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    p[j] = power_of_two(_mm512_sub_ps(p[j], _mm512_set1_ps(state.highest)));
    sum = _mm512_add_ps(sum, p[j]);
  }
  _mm512_storeu_ps(state.sums, sum);
}

INLINE __m256i halves(__m512 x) {
#if HEADRACE_LEVEL >= 3
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  return halves_of(x);
#endif
}

#else

INLINE void softmax(const AttentionTask& task, int64_t row, int64_t first, int64_t count,
                    const float* factors, float* scores, const RowState& state, float* p) {
  finish_scores(task, row, first, count, factors, scores);
  const float limit = state.highest + kSlack;
  float lanes[8], most = limit;
  for (int64_t lane = 0; lane < 8; ++lane) lanes[lane] = limit;
  for (int64_t j = 0; j < kKeyBlock; j += 8)
    for (int64_t lane = 0; lane < 8; ++lane)
      lanes[lane] = scores[j + lane] > lanes[lane] ? scores[j + lane] : lanes[lane];
  for (int64_t lane = 0; lane < 8; ++lane) most = lanes[lane] > most ? lanes[lane] : most;
  if (most > limit) raise_maximum(state, most);
  for (int64_t j = 0; j < kKeyBlock; ++j) {
    const float x = scores[j] - state.highest;
    p[j] = x < -126.0f ? 0.0f : power_of_two(x);
  }
  for (int64_t j = 0; j < kKeyBlock; j += kPanel)
    for (int64_t lane = 0; lane < kPanel; ++lane) state.sums[lane] += p[j + lane];
}

#endif

// The same as bf16, the values' scales applied if there are any.
INLINE void half_softmax(const AttentionTask& task, int64_t row, int64_t first, int64_t count,
                         const float* factors, const float* value_scales,
                         const AttentionScratch& scratch, int64_t columns) {
  float* scores = scratch.scores + row * kKeyBlock;
  uint16_t* out = scratch.probability + row * kKeyBlock;
  const RowState state = row_state(scratch, row, columns);
#if HEADRACE_LEVEL >= 2
  __m512 p[4];
  softmax(task, row, first, count, factors, scores, state, p);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    if (value_scales != nullptr) p[j] = _mm512_mul_ps(p[j], _mm512_load_ps(value_scales + 16 * j));
    _mm256_storeu_si256((__m256i*)(out + 16 * j), halves(p[j]));
  }
#else
  float p[kKeyBlock];
  softmax(task, row, first, count, factors, scores, state, p);
  if (value_scales != nullptr)
    for (int64_t j = 0; j < kKeyBlock; ++j) p[j] *= value_scales[j];
  for (int64_t j = 0; j < kKeyBlock; ++j) out[j] = to_bf16(p[j]);
#endif
}
