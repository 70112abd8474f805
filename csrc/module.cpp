// The Python module headrace.ops._native. Tensors are passed as addresses, sizes and strides, which
// the Python side checks.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "context.h"

namespace nb = nanobind;

NB_MODULE(_native, module) {
  using namespace headrace;
  module.def("known_isas", &known_isas);
  module.def("supported_isas", &supported_isas);
  nb::class_<Context> context(module, "Context");
  context.def(nb::init<int, const std::string&>(), nb::arg("threads"), nb::arg("isa") = "auto")
      .def_prop_ro("isa", [](const Context& self) { return std::string(self.kernels->name); })
      .def_prop_ro("threads", [](const Context& self) { return self.pool.threads(); });
  bind_linear(module, context);
  bind_neurons(module, context);
  bind_attention(module, context);
  bind_coded_attention(module, context);
  bind_sampling(context);
}
