// The highest of `count` scores, a multiple of 16; NaN if one is. Scores are compared as integers of
// the same order: compilers do not make vectors of comparisons that may meet a NaN.
static float highest(const float* scores, int64_t count) {
  constexpr int32_t magnitude = 0x7fffffff, infinity = 0x7f800000;
  int32_t best[kLanes], largest[kLanes] = {};
  for (int lane = 0; lane < kLanes; ++lane) best[lane] = INT32_MIN;
  for (const float* end = scores + count; scores != end; scores += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const int32_t bits = __builtin_bit_cast(int32_t, scores[lane]);
      const int32_t size = bits & magnitude, key = bits ^ ((bits >> 31) & magnitude);
      best[lane] = key > best[lane] ? key : best[lane];
      largest[lane] = size > largest[lane] ? size : largest[lane];
    }
  int32_t key = INT32_MIN;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (largest[lane] > infinity) return __builtin_nanf("");
    key = best[lane] > key ? best[lane] : key;
  }
  return __builtin_bit_cast(float, key ^ ((key >> 31) & magnitude));
}
