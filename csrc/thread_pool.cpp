#include "thread_pool.h"

#include <immintrin.h>

namespace headrace {

namespace {

// About 50 microseconds: longer than the gaps inside a step, shorter than a time slice by far.
constexpr int kSpins = 2000;

// Wait until value differs from old: spinning first, then asleep.
uint32_t wait_for_change(std::atomic<uint32_t>& value, uint32_t old) {
  for (int spin = 0; spin < kSpins; ++spin) {
    const uint32_t now = value.load(std::memory_order_acquire);
    if (now != old) return now;
    _mm_pause();
  }
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  for (int thread = 1; thread < threads; ++thread)
    helpers_.emplace_back([this, thread] { help(thread); });
}

ThreadPool::~ThreadPool() {
  stopping_ = true;
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();
  for (std::thread& helper : helpers_) helper.join();
}

void ThreadPool::start(int64_t tasks, const void* context, Call call) {
  context_ = context;
  call_ = call;
  tasks_ = tasks;
  next_.store(0, std::memory_order_relaxed);
  helping_.store(static_cast<uint32_t>(helpers_.size()), std::memory_order_relaxed);
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();
  take_tasks(0);
  for (uint32_t left = helping_.load(std::memory_order_acquire); left != 0;)
    left = wait_for_change(helping_, left);
}

void ThreadPool::take_tasks(int thread) {
  while (true) {
    const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
    if (task >= tasks_) return;
    call_(context_, task, thread);
  }
}

void ThreadPool::help(int thread) {
  uint32_t seen = 0;
  while (true) {
    seen = wait_for_change(job_, seen);
    if (stopping_) return;
    take_tasks(thread);
    helping_.fetch_sub(1, std::memory_order_acq_rel);
    helping_.notify_one();
  }
}

}  // namespace headrace
