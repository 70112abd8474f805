// The threads that share the work of one operation: the caller and helpers that wait for it.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace headrace {

// Helpers spin for a short while after each job, since the next operation of a step comes within
// microseconds, and then sleep: a pool that is not used takes no time from anybody.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(helpers_.size()) + 1; }

  // Call work(task, thread) for every task in [0, tasks); tasks go to threads as these get free.
  // Returns when all are done. Work must not throw, nor call run().
  template <class Work>
  void run(int64_t tasks, const Work& work) {
    if (tasks <= 1 || helpers_.empty()) {
      for (int64_t task = 0; task < tasks; ++task) work(task, 0);
      return;
    }
    start(tasks, &work, [](const void* context, int64_t task, int thread) {
      (*static_cast<const Work*>(context))(task, thread);
    });
  }

 private:
  using Call = void (*)(const void* context, int64_t task, int thread);

  void start(int64_t tasks, const void* context, Call call);
  void help(int thread);
  void take_tasks(int thread);

  std::vector<std::thread> helpers_;
  const void* context_ = nullptr;
  Call call_ = nullptr;
  int64_t tasks_ = 0;
  bool stopping_ = false;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> job_{0};      // number of the current job
  alignas(64) std::atomic<uint32_t> helping_{0};  // helpers that have not finished it
};

}  // namespace headrace
