// What operations run on: a thread pool, the kernels of one instruction set, working memory.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <string>

#include <nanobind/nanobind.h>

#include "isa.h"
#include "thread_pool.h"

namespace headrace {

// Operations of one context run one at a time; several contexts do not disturb each other.
class Context {
 public:
  Context(int threads, const std::string& isa);

  // At least `bytes` of memory aligned to 64, valid until the next operation asks for more.
  std::byte* workspace(size_t bytes);

  const Kernels* kernels;
  ThreadPool pool;
  std::mutex busy;  // held during an operation

 private:
  struct Free {
    void operator()(std::byte* memory) const;
  };
  std::unique_ptr<std::byte, Free> workspace_;
  size_t capacity_ = 0;
};

constexpr size_t align64(size_t bytes) { return (bytes + 63) & ~size_t{63}; }

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_linear(nanobind::module_& module, nanobind::class_<Context>& context);
void bind_neurons(nanobind::module_& module, nanobind::class_<Context>& context);
void bind_sampling(nanobind::class_<Context>& context);
void bind_attention(nanobind::module_& module, nanobind::class_<Context>& context);
void bind_coded_attention(nanobind::module_& module, nanobind::class_<Context>& context);

}  // namespace headrace
