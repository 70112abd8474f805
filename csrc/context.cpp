#include "context.h"

#include <cstdlib>
#include <new>
#include <stdexcept>

namespace headrace {

Context::Context(int threads, const std::string& isa)
    : kernels(&find_kernels(isa)),
      pool(threads >= 1 ? threads : throw std::invalid_argument("threads: must be at least 1")) {}

void Context::Free::operator()(std::byte* memory) const { std::free(memory); }

std::byte* Context::workspace(size_t bytes) {
  if (bytes > capacity_) {
    workspace_.reset();
    capacity_ = 0;
    auto* memory = static_cast<std::byte*>(std::aligned_alloc(64, align64(bytes)));
    if (memory == nullptr) throw std::bad_alloc();
    workspace_.reset(memory);
    capacity_ = align64(bytes);
  }
  return workspace_.get();
}

}  // namespace headrace
