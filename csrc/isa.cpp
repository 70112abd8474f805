#include "isa.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <stdexcept>

namespace headrace {

namespace portable { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512_vnni { extern const Kernels kernels; }
namespace avx512_bf16 { extern const Kernels kernels; }
namespace amx { extern const Kernels kernels; }
namespace amx_emulated { extern const Kernels kernels; }

namespace {

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512_vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

// The operating system hands out the tile registers on request, once for the whole process.
bool may_use_tiles() {
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned tile = 1u << 24, int8 = 1u << 25, bf16 = 1u << 22;
  const bool all = (d & tile) && (d & int8) && (d & bf16);
  return all && may_use_tiles();
}

struct Isa {
  std::string name;
  std::function<bool()> supported;
  const Kernels* kernels;
  bool chosen;  // whether "auto" may choose it
};

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = {
      {"portable", [] { return true; }, &portable::kernels, true},
      {"avx2", has_avx2, &avx2::kernels, true},
      {"avx512_vnni", has_avx512_vnni, &avx512_vnni::kernels, true},
      {"avx512_bf16", has_avx512_bf16, &avx512_bf16::kernels, true},
      // The code of the next one with its tiles emulated: for tests where there are none.
      {"amx_emulated", has_avx512_bf16, &amx_emulated::kernels, false},
      {"amx", has_amx, &amx::kernels, true},
  };
  return all;
}

}  // namespace

const std::vector<std::string>& known_isas() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> found;
    for (const Isa& isa : isas()) found.push_back(isa.name);
    return found;
  }();
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> found;
  for (const Isa& isa : isas())
    if (isa.supported()) found.push_back(isa.name);
  return found;
}

const Kernels& find_kernels(const std::string& name) {
  const auto& all = isas();
  std::string supported;
  for (auto isa = all.rbegin(); isa != all.rend(); ++isa) {
    if (!isa->supported()) continue;
    if (name == isa->name || (name == "auto" && isa->chosen)) return *isa->kernels;
    if (isa->chosen) supported = isa->name + (supported.empty() ? "" : ", ") + supported;
  }
  const auto known = known_isas();
  const bool real = std::find(known.begin(), known.end(), name) != known.end();
  throw std::invalid_argument("isa: " + name + (real ? " is not supported by this processor" : " is unknown") +
                              "; it runs auto, " + supported);
}

}  // namespace headrace
