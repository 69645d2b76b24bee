// The kernels of steel_ad/native/ssim.cu on 32 threads of a CPU, a warp at a time: KERNELS names the file.
//
// a.out COUNT HEIGHT WIDTH REFLECT STRIPS IN OUT
// reads float32 x, y and the gradient of the residual, writes the map, 1 less the residual, and the gradient of x.

#include <barrier>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <thread>
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
thread_local Index threadIdx, blockIdx;

std::barrier<> warp(32);
float shuffled[32];

// Out of range a lane keeps its own value.
float Shuffle(float value, int from) {
  shuffled[threadIdx.x] = value;
  warp.arrive_and_wait();
  const float found = from >= 0 && from < 32 ? shuffled[from] : value;
  warp.arrive_and_wait();
  return found;
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

// What is copied ahead is not there before somebody has waited for it.
thread_local std::vector<std::function<void()>> row;
thread_local std::deque<std::vector<std::function<void()>>> under_way;
template <int kBytes>
void CopyAhead(void* to, const void* from) {
  if (reinterpret_cast<std::uintptr_t>(to) % kBytes || reinterpret_cast<std::uintptr_t>(from) % kBytes) std::abort();
  row.push_back([=] { std::memcpy(to, from, kBytes); });
}
void EndOfRow() {
  under_way.push_back(std::move(row));
  row.clear();
}
template <int kRows>
void WaitForRow() {
  for (; under_way.size() > kRows; under_way.pop_front())
    for (auto& copy : under_way.front()) copy();
}

#include KERNELS

template <class Kernel>
void Run(Kernel kernel, Images images, int blocks) {
  std::vector<std::thread> lanes;
  for (int lane = 0; lane < 32; ++lane)
    lanes.emplace_back([=] {
      for (int block = 0; block < blocks; ++block) {
        threadIdx.x = lane, blockIdx.x = block;
        kernel(images);
        warp.arrive_and_wait();
      }
    });
  for (auto& lane : lanes) lane.join();
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
