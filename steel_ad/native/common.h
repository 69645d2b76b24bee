// What the sources share: vectors of the machine's width, and work on several threads.

#ifndef STEEL_AD_NATIVE_COMMON_H_
#define STEEL_AD_NATIVE_COMMON_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Buffer = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<Buffer>;

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

using Vec = float __attribute__((vector_size(kLanes * sizeof(float))));
using Unaligned = float __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

inline Vec Load(const float* a) { return *reinterpret_cast<const Unaligned*>(a); }
inline void Store(float* a, Vec v) { *reinterpret_cast<Unaligned*>(a) = v; }

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads for calls to which XLA gives none, as in the bodies of loops.
class Workers {
 public:
  static Workers& Get() {
    static auto* workers = new Workers;  // never ends, as its threads never do
    return *workers;
  }
  int64_t count() const { return count_; }
  void Schedule(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    ready_.notify_one();
  }

 private:
  Workers() : count_(std::max<int64_t>(std::thread::hardware_concurrency(), 1) - 1) {
    for (int64_t t = 0; t < count_; ++t) std::thread([this] { Run(); }).detach();
  }
  void Run() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        ready_.wait(lock, [this] { return !tasks_.empty(); });
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      task();
    }
  }

  const int64_t count_;
  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<std::function<void()>> tasks_;
};

// Calls f(0) to f(n - 1) on the calling thread and others that are free.
template <typename F>
void ParallelFor(ffi::ThreadPool& pool, int64_t n, F f) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    int64_t n;
    F f;
    State(int64_t n, F f) : n(n), f(f) {}
    void Run() {
      for (int64_t i; (i = next.fetch_add(1)) < n;) {
        f(i);
        done.fetch_add(1);
      }
    }
  };
  // A task that starts late finds nothing left to do and touches the state alone, so nobody waits for it.
  auto state = std::make_shared<State>(n, f);
  if (pool.num_threads() > 1) {
    for (int64_t t = std::min(pool.num_threads(), n); t > 1; --t) pool.Schedule([state] { state->Run(); });
  } else {
    for (int64_t t = std::min(Workers::Get().count() + 1, n); t > 1; --t) Workers::Get().Schedule([state] { state->Run(); });
  }
  state->Run();
  while (state->done.load() < n) std::this_thread::yield();
}

// Floats at the beginning of a cache line, of no particular value.
struct Free {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<float[], Free>;

inline Memory Allocate(size_t size) {
  return Memory(static_cast<float*>(::operator new[](size * sizeof(float), std::align_val_t(64))));
}

// Memory of this thread, whose values a call for more of it loses.
float* Scratch(int which, size_t size) {
  struct Kept {
    Memory memory;
    size_t size = 0;
  };
  thread_local Kept kept[4];
  if (kept[which].size < size) {
    kept[which].memory = Allocate(size);
    kept[which].size = size;
  }
  return kept[which].memory.get();
}

}  // namespace

#endif  // STEEL_AD_NATIVE_COMMON_H_
