#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "context.h"

namespace nb = nanobind;

namespace headrace {

namespace {

// About this many bytes of weights per task: enough to make handing out a task cheap, few enough
// for an even share at the end.
constexpr int64_t kTaskBytes = 96 << 10;
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kTileRows = 32;  // kernels may read rows up to the next multiple
constexpr int64_t kPrepareBytes = 16 << 10;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Where the parts of the working memory lie.
struct Layout {
  int64_t stride = 0;
  size_t halves = 0, bytes = 0, scales = 0, offsets = 0, scratch = 0, per_thread = 0, total = 0;

  Layout(const Kernels& kernels, const LinearCall& call, int threads) {
    const LinearWeight& weight = *call.weight;
    const auto rows = static_cast<size_t>(round_up(call.rows, kTileRows));
    const auto groups = static_cast<size_t>(weight.groups());
    const bool integers = !call.in_halves;
    const bool needs_halves = !integers || call.norm != nullptr;
    // One cache line more than a row, so that equal columns of many rows do not compete for the
    // same few lines of the cache.
    stride = weight.padded_columns + (integers ? 64 : 32);
    const size_t elements = rows * static_cast<size_t>(stride);
    bytes = align64(needs_halves ? elements * 2 : 0);
    scales = bytes + align64(integers ? elements : 0);
    offsets = scales + align64(integers ? rows * groups * 4 : 0);
    scratch = offsets + align64(integers ? rows * groups * 4 : 0);
    per_thread = align64(kernels.linear_scratch(weight, call.rows));
    total = scratch + per_thread * static_cast<size_t>(threads);
  }
};

void run_linear(Context& context, LinearCall& call) {
  const LinearWeight& weight = *call.weight;
  const Kernels& kernels = *context.kernels;
  call.in_halves = kernels.in_halves(weight, call.rows);
  const Layout layout(kernels, call, context.pool.threads());
  std::byte* memory = context.workspace(layout.total);
  call.prepared = Prepared{call.rows,
                           layout.stride,
                           reinterpret_cast<uint16_t*>(memory + layout.halves),
                           reinterpret_cast<int8_t*>(memory + layout.bytes),
                           reinterpret_cast<float*>(memory + layout.scales),
                           reinterpret_cast<int32_t*>(memory + layout.offsets)};

  const int64_t rows_each = std::max<int64_t>(1, kPrepareBytes / (weight.padded_columns * 2));
  context.pool.run((call.rows + rows_each - 1) / rows_each, [&](int64_t task, int) {
    kernels.prepare(call, task * rows_each, std::min(call.rows, (task + 1) * rows_each));
  });

  int64_t each = std::max<int64_t>(1, kTaskBytes / weight.panel_bytes());
  if (call.rows <= kTileRows)
    each = round_up(each, 4);
  else  // so wide that a task writes whole lines, and so narrow that threads finish together
    each = std::clamp<int64_t>(weight.panels / (kTasksPerThread * context.pool.threads()) / 2 * 2, 2, 8);
  context.pool.run((weight.panels + each - 1) / each, [&](int64_t task, int thread) {
    kernels.linear(call, task * each, std::min(weight.panels, (task + 1) * each),
                   memory + layout.scratch + layout.per_thread * static_cast<size_t>(thread));
  });
}

LinearWeight make_weight(const std::string& format, int64_t panels, int64_t rows, int64_t columns,
                         int64_t padded_columns, int64_t group, bool gated, uintptr_t values,
                         uintptr_t scales, uintptr_t zeros, uintptr_t bias) {
  const Format kind = format == "bf16"   ? Format::bf16
                      : format == "w8a8" ? Format::w8a8
                      : format == "w4a8" ? Format::w4a8
                                         : throw std::invalid_argument("format: " + format);
  return LinearWeight{kind,
                      panels,
                      rows,
                      columns,
                      padded_columns,
                      group,
                      gated,
                      pointer<const uint8_t>(values),
                      pointer<const void>(scales),
                      pointer<const uint8_t>(zeros),
                      pointer<const float>(bias),
                      {}};
}

LinearWeight make_blocks(int64_t panels, int64_t rows, int64_t columns, int64_t padded_columns,
                         int64_t group, bool gated, std::pair<int, int> bits,
                         std::pair<uintptr_t, uintptr_t> planes, uintptr_t table, int zero,
                         int64_t super, bool wide_factors, uintptr_t factors, uintptr_t steps,
                         uintptr_t low_factors, uintptr_t low_steps, uintptr_t zeros,
                         uintptr_t bias) {
  const int kind = bits.first * 10 + bits.second;
  const int known[] = {20, 21, 40, 41, 42, 80};
  if (std::find(std::begin(known), std::end(known), kind) == std::end(known))
    throw std::invalid_argument("bits: planes must have 2, 2+1, 4, 4+1, 4+2 or 8");
  if (group < 16 || kActivationGroup % group != 0 || padded_columns % group != 0 ||
      padded_columns % 32 != 0)
    throw std::invalid_argument("group: must be 16 to 256 columns, and divide the stored ones");
  if ((steps != 0 || low_steps != 0) && super * group % kActivationGroup != 0)
    throw std::invalid_argument("steps: their factors must hold for multiples of 256 columns");
  LinearWeight weight{Format::blocks, panels, rows, columns, padded_columns, group, gated, nullptr,
                      nullptr, pointer<const uint8_t>(zeros), pointer<const float>(bias), {}};
  weight.blocks = BlockParts{
      .bits = {bits.first, bits.second},
      .planes = {pointer<const uint8_t>(planes.first), pointer<const uint8_t>(planes.second)},
      .table = pointer<const uint8_t>(table),
      .zero = zero,
      .super = super,
      .wide_factors = wide_factors,
      .factors = pointer<const uint16_t>(factors),
      .steps = pointer<const int8_t>(steps),
      .low_factors = pointer<const uint16_t>(low_factors),
      .low_steps = pointer<const int8_t>(low_steps),
  };
  return weight;
}

void multiply(Context& context, const LinearWeight& weight, uintptr_t x, int64_t x_stride,
              int64_t rows, uintptr_t norm, float epsilon, uintptr_t residual,
              int64_t residual_stride, uintptr_t out, int64_t out_stride, bool out_is_float) {
  LinearCall call{&weight,
                  pointer<const uint16_t>(x),
                  x_stride,
                  rows,
                  pointer<const uint16_t>(norm),
                  epsilon,
                  pointer<const uint16_t>(residual),
                  residual_stride,
                  pointer<void>(out),
                  out_stride,
                  out_is_float,
                  false,
                  {}};
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(context.busy);
  run_linear(context, call);
}

void rows_of(Context& context, const LinearWeight& weight, uintptr_t ids, int64_t count,
             uintptr_t out) {
  const auto* first = pointer<const int64_t>(ids);
  if (std::any_of(first, first + count, [&](int64_t id) { return id < 0 || id >= weight.rows; }))
    throw nb::index_error("ids: every row must be one of the weight's");
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(context.busy);
  constexpr int64_t each = 16;
  context.pool.run((count + each - 1) / each, [&](int64_t task, int) {
    context.kernels->rows_of(weight, pointer<const int64_t>(ids) + task * each,
                             std::min(each, count - task * each),
                             pointer<uint16_t>(out) + task * each * weight.columns);
  });
}

void rms_norm(Context& context, uintptr_t x, int64_t stride, int64_t rows, int64_t width,
              uintptr_t weight, float epsilon, uintptr_t out) {
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(context.busy);
  const int64_t each = std::max<int64_t>(1, kPrepareBytes / (width * 2));
  context.pool.run((rows + each - 1) / each, [&](int64_t task, int) {
    const int64_t first = task * each;
    context.kernels->rms_norm(pointer<const uint16_t>(x) + first * stride, stride,
                              std::min(each, rows - first), width,
                              pointer<const uint16_t>(weight), epsilon,
                              pointer<uint16_t>(out) + first * width);
  });
}

// Rows [rows, columns] of bf16 to panels [panels, padded / 2, 16, 2]; what is not there is zero.
void pack_bf16(Context& context, uintptr_t source, int64_t rows, int64_t columns, int64_t padded,
               bool gated, uintptr_t target) {
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(context.busy);
  const int64_t parts = gated ? 2 : 1, part = rows / parts;
  const int64_t panels = parts * ((part + kPanel - 1) / kPanel);
  const std::vector<uint16_t> nothing(static_cast<size_t>(columns), 0);
  context.pool.run(panels, [&](int64_t panel, int) {
    auto* to = pointer<uint16_t>(target) + panel * padded * kPanel;
    const int64_t first = panel / parts * kPanel, offset = panel % parts * part;
    const uint16_t* lanes[kPanel];
    for (int64_t lane = 0; lane < kPanel; ++lane)
      lanes[lane] = first + lane < part
                        ? pointer<const uint16_t>(source) + (offset + first + lane) * columns
                        : nothing.data();
    int64_t k = 0;
    for (; k + 2 <= columns; k += 2, to += 32)
      for (int64_t lane = 0; lane < kPanel; ++lane) std::memcpy(to + lane * 2, lanes[lane] + k, 4);
    std::memset(to, 0, static_cast<size_t>(padded - k) * kPanel * 2);
    for (int64_t lane = 0; k < columns && lane < kPanel; ++lane) to[lane * 2] = lanes[lane][k];
  });
}

void search_scales(Context& context, uintptr_t weights, int64_t groups, int64_t size,
                   const std::vector<float>& ends, int lowest, int highest, int zero,
                   bool round_scales, uintptr_t values, uintptr_t scales, uintptr_t zeros) {
  const ScaleSearch search{.weights = pointer<const float>(weights),
                           .size = size,
                           .ends = ends.data(),
                           .candidates = static_cast<int64_t>(ends.size()),
                           .lowest = lowest,
                           .highest = highest,
                           .zero = zero,
                           .round_scales = round_scales,
                           .values = pointer<uint8_t>(values),
                           .scales = pointer<float>(scales),
                           .zeros = pointer<uint8_t>(zeros)};
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(context.busy);
  const int64_t each = std::max<int64_t>(1, kTaskBytes / (size * 4));
  context.pool.run((groups + each - 1) / each, [&](int64_t task, int) {
    context.kernels->search_scales(search, task * each, std::min(groups, (task + 1) * each));
  });
}

// Reads [data, data + bytes) with all threads at once.
uint64_t read(Context& context, uintptr_t data, size_t bytes) {
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(context.busy);
  const int threads = context.pool.threads();
  const size_t share = bytes / static_cast<size_t>(threads) / 4096 * 4096;
  std::atomic<uint64_t> mixed{0};
  context.pool.run(threads, [&](int64_t task, int) {
    mixed ^= context.kernels->read(pointer<const std::byte>(data) + static_cast<size_t>(task) * share, share);
  });
  return mixed;
}

// Operations done by all threads together, each running `steps` of the inner product.
double peak(Context& context, const std::string& kind, int64_t steps) {
  if (kind != "int8" && kind != "bf16") throw std::invalid_argument("kind: int8 or bf16");
  const auto run = kind == "int8" ? context.kernels->peak_int8 : context.kernels->peak_bf16;
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(context.busy);
  const int threads = context.pool.threads();
  std::atomic<double> total{0};
  context.pool.run(threads, [&](int64_t, int) { total += run(steps); });
  return total;
}

}  // namespace

void bind_linear(nb::module_& module, nb::class_<Context>& context) {
  nb::class_<LinearWeight>(module, "LinearWeight").def("__init__", [](LinearWeight* self,
      const std::string& format, int64_t panels, int64_t rows, int64_t columns,
      int64_t padded_columns, int64_t group, bool gated, uintptr_t values, uintptr_t scales,
      uintptr_t zeros, uintptr_t bias) {
    new (self) LinearWeight(make_weight(format, panels, rows, columns, padded_columns, group, gated,
                                        values, scales, zeros, bias));
  }, nb::arg("format"), nb::arg("panels"), nb::arg("rows"), nb::arg("columns"),
     nb::arg("padded_columns"), nb::arg("group"), nb::arg("gated"), nb::arg("values"),
     nb::arg("scales"), nb::arg("zeros"), nb::arg("bias"))
      .def_static("blocks", &make_blocks, nb::kw_only(), nb::arg("panels"), nb::arg("rows"),
                  nb::arg("columns"), nb::arg("padded_columns"), nb::arg("group"),
                  nb::arg("gated"), nb::arg("bits"), nb::arg("planes"), nb::arg("table"),
                  nb::arg("zero"), nb::arg("super"), nb::arg("wide_factors"), nb::arg("factors"),
                  nb::arg("steps"), nb::arg("low_factors"), nb::arg("low_steps"), nb::arg("zeros"),
                  nb::arg("bias"));
  context.def("linear", &multiply)
      .def("in_halves", [](const Context& self, const LinearWeight& weight, int64_t rows) {
        return self.kernels->in_halves(weight, rows);
      })
      .def("rows_of", &rows_of)
      .def("rms_norm", &rms_norm)
      .def("pack_bf16", &pack_bf16)
      .def("search_scales", &search_scales)
      .def("read", &read)
      .def("peak", &peak);
}

}  // namespace headrace
