// The kernels of steel_ad/native/ssim.cu on a CPU, lane after lane of a warp: KERNELS names the file.
//
// a.out COUNT HEIGHT WIDTH REFLECT STRIPS IN OUT
// reads float32 x, y and the gradient of the residual, writes the map, 1 less the residual, and the gradient of x.

#include <ucontext.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <vector>

#define STEEL_AD_EMULATED
#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static

struct Index {
  int x;
};
Index threadIdx, blockIdx;

// The lanes take turns: who shuffles lets all others come as far. Two sets of values, since the next shuffle begins before all
// have read theirs.
struct Lane {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 18);
  int shuffles = 0, block = 0;
};
Lane lanes[32];
ucontext_t outside;
float shuffled[2][32];

void Next() {
  const int lane = threadIdx.x, next = (lane + 1) % 32;
  threadIdx.x = next, blockIdx.x = lanes[next].block;
  swapcontext(&lanes[lane].context, &lanes[next].context);
}

// Out of range a lane keeps its own value.
float Shuffle(float value, int from) {
  const int lane = threadIdx.x, set = lanes[lane].shuffles++ % 2;
  shuffled[set][lane] = value;
  Next();
  return from >= 0 && from < 32 ? shuffled[set][from] : value;
}
float __shfl_up_sync(unsigned, float value, int n) { return Shuffle(value, threadIdx.x - n); }
float __shfl_down_sync(unsigned, float value, int n) { return Shuffle(value, threadIdx.x + n); }
float __shfl_sync(unsigned, float value, int from) { return Shuffle(value, from); }
float __shfl_xor_sync(unsigned, float value, int n) { return Shuffle(value, threadIdx.x ^ n); }

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
float2 make_float2(float x, float y) { return {x, y}; }
float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}
float Inverse(float x) { return 1 / x; }

// What is copied ahead is not there before somebody has waited for it, and what was there is lost at once.
std::vector<std::function<void()>> row;  // of the lane whose turn it is
std::deque<std::vector<std::function<void()>>> under_way[32];
template <int kBytes>
void CopyAhead(void* to, const void* from) {
  if (reinterpret_cast<std::uintptr_t>(to) % kBytes || reinterpret_cast<std::uintptr_t>(from) % kBytes) std::abort();
  for (int n = 0; n < kBytes / 4; ++n) static_cast<float*>(to)[n] = NAN;
  row.push_back([=] { std::memcpy(to, from, kBytes); });
}
void EndOfRow() {
  under_way[threadIdx.x].push_back(std::move(row));
  row.clear();
}
template <int kRows>
void WaitForRow() {
  for (auto& rows = under_way[threadIdx.x]; rows.size() > kRows; rows.pop_front())
    for (auto& copy : rows.front()) copy();
}

#include KERNELS

std::function<void()> task;

void Work() {
  task();
  // The last lane is the last to end.
  if (threadIdx.x == 31) setcontext(&outside);
  Next();
}

template <class Kernel>
void Run(Kernel kernel, Images images, int blocks) {
  task = [=] {
    const int lane = threadIdx.x;
    for (int block = 0; block < blocks; ++block) {
      lanes[lane].block = blockIdx.x = block;
      kernel(images);
    }
  };
  for (Lane& lane : lanes) {
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data(), lane.context.uc_stack.ss_size = lane.stack.size();
    makecontext(&lane.context, Work, 0);
    lane.shuffles = 0, lane.block = 0;
  }
  for (auto& rows : under_way) rows.clear();
  threadIdx.x = blockIdx.x = 0;
  swapcontext(&outside, &lanes[0].context);
}

int main(int, char** given) {
  Images images{};
  images.count = std::atoi(given[1]), images.height = std::atoi(given[2]), images.width = std::atoi(given[3]);
  images.reflect = std::atoi(given[4]), images.strips = std::atoi(given[5]);
  images.c1 = 1e-4f, images.c2 = 9e-4f, images.base = 1, images.sign = -1;
  images.rows = images.height - (images.reflect ? 0 : kWindow - 1);
  images.columns = images.width - (images.reflect ? 0 : kWindow - 1);
  const size_t pixels = size_t(images.count) * images.height * images.width;
  const size_t results = size_t(images.count) * images.rows * images.columns;
  // cudaMalloc's alignment.
  std::vector<float4> aligned_x(pixels / 4 + 1), aligned_y(pixels / 4 + 1), aligned_g(results / 4 + 1);
  std::vector<float4> aligned_out(results / 4 + 1, {NAN, NAN, NAN, NAN}), aligned_gradient(pixels / 4 + 1, {NAN, NAN, NAN, NAN});
  std::ifstream in(given[6], std::ios::binary);
  auto read = [&](std::vector<float4>& to, size_t size) {
    in.read(reinterpret_cast<char*>(to.data()), size * sizeof(float));
    return reinterpret_cast<const float*>(to.data());
  };
  images.x = read(aligned_x, pixels), images.y = read(aligned_y, pixels), images.g = read(aligned_g, results);
  images.out = reinterpret_cast<float*>(aligned_out.data());
  Run(Strip<false>, images, Groups<false>(images) * images.strips * images.count);
  images.out = reinterpret_cast<float*>(aligned_gradient.data());
  Run(Strip<true>, images, Groups<true>(images) * images.strips * images.count);
  std::ofstream to(given[7], std::ios::binary);
  to.write(reinterpret_cast<char*>(aligned_out.data()), results * sizeof(float));
  to.write(reinterpret_cast<char*>(aligned_gradient.data()), pixels * sizeof(float));
}
