// What the sources share: vectors of the machine's width, and work on the threads that XLA gives to a call.

#ifndef STEEL_AD_NATIVE_COMMON_H_
#define STEEL_AD_NATIVE_COMMON_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
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

// Calls f(0) to f(n - 1) on the calling thread and those of the pool that are free.
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
  for (int64_t t = std::min(pool.num_threads(), n); t > 1; --t) pool.Schedule([state] { state->Run(); });
  state->Run();
  while (state->done.load() < n) std::this_thread::yield();
}

float* Scratch(int which, size_t size) {
  thread_local std::vector<float> buffers[4];
  if (buffers[which].size() < size) buffers[which].resize(size);
  return buffers[which].data();
}

}  // namespace

#endif  // STEEL_AD_NATIVE_COMMON_H_
