#include <algorithm>
#include <stdexcept>
#include <vector>

#include "context.h"

namespace nb = nanobind;

namespace headrace {

namespace {

// Parts of the neurons whose sums are kept apart and joined in one order, so that results do not
// depend on which thread took which part. Each has about so many bytes of weights at least.
constexpr int64_t kMostParts = 16;
constexpr int64_t kPartBytes = 96 << 10;

struct Result {
  const float* bias;         // [hidden], or null
  const uint16_t* residual;  // bf16 [rows, hidden], or null
  int64_t residual_stride;
  uint16_t* out;  // bf16 [rows, hidden]
};

// The neurons that any of the rows goes through, ascending; `takers` [neurons] says which rows.
std::vector<int32_t> find_takers(const int32_t* chosen, int64_t most, int64_t rows,
                                 std::vector<uint8_t>& takers) {
  std::fill(takers.begin(), takers.end(), uint8_t{0});
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < most && chosen[row * most + i] >= 0; ++i)
      takers[static_cast<size_t>(chosen[row * most + i])] |= static_cast<uint8_t>(1u << row);
  std::vector<int32_t> taken;
  for (size_t neuron = 0; neuron < takers.size(); ++neuron)
    if (takers[neuron] != 0) taken.push_back(static_cast<int32_t>(neuron));
  return taken;
}

void run_neurons(Context& context, NeuronCall& call, const std::vector<int32_t>& taken,
                 const Result& result) {
  const Kernels& kernels = *context.kernels;
  const int64_t width = call.weight->hidden, count = static_cast<int64_t>(taken.size());
  const int64_t parts = std::clamp<int64_t>(count * call.weight->neuron_bytes() / kPartBytes, 1, kMostParts);
  const auto elements = static_cast<size_t>(call.rows * width);
  const size_t inputs = align64(elements * 2);
  const size_t sums = inputs + static_cast<size_t>(call.rows * call.input_bytes());
  std::byte* memory = context.workspace(sums + elements * 4 * static_cast<size_t>(parts));
  call.halves = reinterpret_cast<uint16_t*>(memory);
  call.inputs = memory + inputs;
  auto* apart = reinterpret_cast<float*>(memory + sums);
  context.pool.run(call.rows, [&](int64_t row, int) { kernels.prepare_neurons(call, row); });
  context.pool.run(parts, [&](int64_t part, int) {
    const int64_t begin = count * part / parts, end = count * (part + 1) / parts;
    kernels.neurons(call, taken.data() + begin, end - begin, apart + part * call.rows * width);
  });
  context.pool.run(call.rows, [&](int64_t row, int) {
    const uint16_t* residual =
        result.residual == nullptr ? nullptr : result.residual + row * result.residual_stride;
    kernels.join(apart + row * width, parts, call.rows * width, width, result.bias, residual,
                 result.out + row * width);
  });
}

void multiply_chosen(Context& context, const NeuronWeight& weight, uintptr_t bias, uintptr_t x,
                     int64_t x_stride, int64_t rows, uintptr_t chosen, int64_t most, uintptr_t norm,
                     float epsilon, uintptr_t residual, int64_t residual_stride, uintptr_t out) {
  const auto* ids = pointer<const int32_t>(chosen);
  if (std::any_of(ids, ids + rows * most,
                  [&](int32_t id) { return id < -1 || id >= weight.neurons; }))
    throw nb::index_error("chosen: every neuron must be one of the weight's, or -1");
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(context.busy);
  std::vector<uint8_t> takers(static_cast<size_t>(weight.neurons));
  for (int64_t first = 0; first < rows; first += kNeuronRows) {
    const int64_t count = std::min(kNeuronRows, rows - first);
    const std::vector<int32_t> taken = find_takers(ids + first * most, most, count, takers);
    NeuronCall call{&weight,
                    pointer<const uint16_t>(x) + first * x_stride,
                    x_stride,
                    count,
                    pointer<const uint16_t>(norm),
                    epsilon,
                    nullptr,
                    nullptr,
                    takers.data()};
    const auto* added = pointer<const uint16_t>(residual);
    run_neurons(context, call, taken,
                Result{pointer<const float>(bias),
                       added == nullptr ? nullptr : added + first * residual_stride,
                       residual_stride, pointer<uint16_t>(out) + first * weight.hidden});
  }
}

}  // namespace

void bind_neurons(nb::module_& module, nb::class_<Context>& context) {
  nb::class_<NeuronWeight>(module, "NeuronWeight").def("__init__", [](NeuronWeight* self,
      int64_t neurons, int64_t hidden, uintptr_t values, uintptr_t scales, uintptr_t inner_bias) {
    if (neurons < 1 || hidden < 1) throw std::invalid_argument("neurons, hidden: must be positive");
    if (hidden > kMaxNeuronHidden) throw std::invalid_argument("hidden: must be at most 65536");
    new (self) NeuronWeight{neurons, hidden, pointer<const void>(values),
                            pointer<const float>(scales), pointer<const float>(inner_bias)};
  }, nb::arg("neurons"), nb::arg("hidden"), nb::arg("values"), nb::arg("scales"),
     nb::arg("inner_bias"));
  context.def("multiply_chosen", &multiply_chosen);
}

}  // namespace headrace
