// The kernels of steel_ad/native/ssim.cu on 32 threads of a CPU, a warp at a time: KERNELS names the file.
//
// a.out COUNT HEIGHT WIDTH REFLECT STRIPS IN OUT
// reads float32 x, y and the gradient of the residual, writes the residual and the gradient of x.

#include <barrier>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <thread>
#include <vector>

#define STEEL_AD_EMULATED
#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)

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
float __shfl_xor_sync(unsigned, float value, int n) { return Shuffle(value, threadIdx.x ^ n); }

struct float2 {
  float x, y;
};
struct float4 {
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
float __fdividef(float a, float b) { return a / b; }

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
  images.c1 = 1e-4f, images.c2 = 9e-4f;
  images.rows = images.height - (images.reflect ? 0 : kWindow - 1);
  images.columns = images.width - (images.reflect ? 0 : kWindow - 1);
  const size_t pixels = size_t(images.count) * images.height * images.width;
  const size_t results = size_t(images.count) * images.rows * images.columns;
  std::vector<float> x(pixels), y(pixels), g(results), out(results, NAN), factors(3 * results, NAN), gradient(pixels, NAN);
  std::ifstream in(given[6], std::ios::binary);
  for (auto* v : {&x, &y, &g}) in.read(reinterpret_cast<char*>(v->data()), v->size() * sizeof(float));
  images.x = x.data(), images.y = y.data(), images.g = g.data(), images.out = out.data(), images.factors = factors.data();
  const int groups = Groups(images.columns + (images.reflect ? 0 : kBefore), Shape<kWide, kBefore, kAfter>::kUseful);
  Run(Windows<kWide, false>, images, groups * images.strips * images.count);
  Run(Windows<kWide, true>, images, groups * images.strips * images.count);
  images.out = gradient.data();
  const int narrow = Groups(images.width, Shape<kNarrow, kAfter, kBefore>::kUseful);
  Run(Spread<kNarrow>, images, narrow * images.strips * images.count);
  std::ofstream to(given[7], std::ios::binary);
  for (auto* v : {&out, &gradient}) to.write(reinterpret_cast<char*>(v->data()), v->size() * sizeof(float));
}
