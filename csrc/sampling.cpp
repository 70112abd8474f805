#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "context.h"

namespace nb = nanobind;

namespace headrace {

namespace {

// The lowest score of the smallest upper set of a row that measures at least `wanted`: radix
// selection over the bits of scores that are at most 0, most significant digit first.
float lowest_kept_of_row(const float* scores, const float* measures, int64_t width, double wanted) {
  struct Digit {
    int end, start;
  };
  uint32_t prefix = 0;
  double above = 0;
  for (const Digit digit : {Digit{31, 21}, Digit{21, 11}, Digit{11, 0}}) {
    constexpr int kBins = 1 << 11;
    const int bins = 1 << (digit.end - digit.start);
    double measured[kBins] = {};
    for (int64_t i = 0; i < width; ++i) {
      const uint32_t key = std::bit_cast<uint32_t>(scores[i]) & 0x7fffffff;
      if (key >> digit.end == prefix)
        measured[key >> digit.start & static_cast<uint32_t>(bins - 1)] += measures[i];
    }
    double total = above;
    for (int bin = 0; bin < bins; ++bin) total += measured[bin];
    const double target = std::min(wanted, total);
    int place = 0;
    for (double sum = above; place < bins; ++place) {
      sum += measured[place];
      if (!(sum < target)) break;
      above = sum;
    }
    prefix = prefix << (digit.end - digit.start) | static_cast<uint32_t>(place);
  }
  return -std::bit_cast<float>(prefix);
}

// scores and measures [rows, width], wanted and lowest [rows].
void lowest_kept(Context& context, uintptr_t scores, uintptr_t measures, int64_t rows,
                 int64_t width, uintptr_t wanted, uintptr_t lowest) {
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(context.busy);
  context.pool.run(rows, [&](int64_t row, int) {
    pointer<float>(lowest)[row] = lowest_kept_of_row(
        pointer<const float>(scores) + row * width, pointer<const float>(measures) + row * width,
        width, pointer<const double>(wanted)[row]);
  });
}

// Scores [rows, width], width a multiple of 64; values and their first places [rows].
void highest(Context& context, uintptr_t scores, int64_t rows, int64_t width, uintptr_t values,
             uintptr_t places) {
  if (width <= 0 || width % 64 != 0)
    throw std::invalid_argument("scores: the width must be a multiple of 64");
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(context.busy);
  constexpr int64_t each = 4 << 10;
  const int64_t pieces = (width + each - 1) / each;
  std::vector<float> found(static_cast<size_t>(rows * pieces));
  context.pool.run(rows * pieces, [&](int64_t task, int) {
    const int64_t begin = task % pieces * each;
    found[static_cast<size_t>(task)] = context.kernels->highest(
        pointer<const float>(scores) + task / pieces * width + begin, std::min(each, width - begin));
  });
  for (int64_t row = 0; row < rows; ++row) {
    const float* first = found.data() + row * pieces;
    const float* best = std::find_if(first, first + pieces, [](float one) { return std::isnan(one); });
    if (best == first + pieces) best = std::max_element(first, first + pieces);
    const float* piece = pointer<const float>(scores) + row * width + (best - first) * each;
    pointer<float>(values)[row] = *best;
    pointer<int64_t>(places)[row] =
        (best - first) * each + (std::isnan(*best) ? 0 : std::find(piece, piece + each, *best) - piece);
  }
}

}  // namespace

void bind_sampling(nb::class_<Context>& context) {
  context.def("highest", &highest).def("lowest_kept", &lowest_kept);
}

}  // namespace headrace
