// 1 - SSIM of pairs of images, and its gradient, on NVIDIA GPUs (ops/ssim.py says what the numbers mean).
//
// A warp goes down a strip of kLanes * kColumns columns. A lane keeps the window's rows of its columns in registers and
// sums of them; sums across columns come from its neighbours by shuffles, so that the outer lanes have no results. Each
// pixel is read from memory once, but for the strips' edges, and no warp waits for another. The gradient takes two
// passes: three factors of every window, and their sums over the windows that a pixel is in.

#ifndef STEEL_AD_EMULATED
#include <cuda_runtime_api.h>

#include "xla/ffi/api/ffi.h"
#endif

#include <cstdint>

namespace {

constexpr int kWindow = STEEL_AD_WINDOW, kLanes = 32;
constexpr int kBefore = (kWindow - 1) / 2, kAfter = kWindow / 2;
constexpr unsigned kAll = 0xffffffffu;

struct Images {
  const float *x, *y, *g;       // g: the gradient of the results
  float *out, *factors;         // factors: three maps of the results' size
  int count, height, width;     // of the images
  int rows, columns;            // of the results
  int strips;                   // so many warps share an image's rows
  bool reflect;                 // else windows stay within the image
  float c1, c2;
};

// Columns of a lane, and lanes that hold columns of its windows on either side.
template <int kColumns, int kBefore, int kAfter>
struct Shape {
  static constexpr int kLeft = (kBefore + kColumns - 1) / kColumns, kRight = (kAfter + kColumns - 1) / kColumns;
  static constexpr int kUseful = (kLanes - kLeft - kRight) * kColumns;
};

__host__ __device__ inline int Groups(int columns, int useful) { return (columns + useful - 1) / useful; }

__device__ inline int Reflected(int i, int n) {
  i = i < 0 ? -i : i;
  return i < n ? i : 2 * (n - 1) - i;
}

__device__ inline int Clamped(int i, int n) { return i < 0 ? 0 : i < n ? i : n - 1; }

template <int kColumns>
__device__ inline void ReadWhole(const float* from, float (&to)[kColumns]) {
  if constexpr (kColumns == 4) {
    const float4 v = __ldg(reinterpret_cast<const float4*>(from));
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
    const float2 v = __ldg(reinterpret_cast<const float2*>(from));
    to[0] = v.x, to[1] = v.y;
  }
}

template <int kColumns>
__device__ inline void WriteWhole(float* to, const float (&from)[kColumns]) {
  if constexpr (kColumns == 4)
    __stcs(reinterpret_cast<float4*>(to), make_float4(from[0], from[1], from[2], from[3]));
  else
    __stcs(reinterpret_cast<float2*>(to), make_float2(from[0], from[1]));
}

// What the lanes hold of the columns [-before, kColumns + after) around the lane's own.
template <int kColumns, int kBefore, int kAfter>
__device__ inline void Neighbours(const float (&own)[kColumns], float (&all)[kBefore + kColumns + kAfter]) {
#pragma unroll
  for (int n = 0; n < kBefore + kColumns + kAfter; ++n) {
    constexpr int kLeft = Shape<kColumns, kBefore, kAfter>::kLeft;
    const int at = n - kBefore + kLeft * kColumns, lane = at / kColumns - kLeft, j = at % kColumns;
    all[n] = lane == 0 ? own[j] : lane < 0 ? __shfl_up_sync(kAll, own[j], -lane) : __shfl_down_sync(kAll, own[j], lane);
  }
}

// Sums over the window around each of the lane's columns.
template <int kColumns>
__device__ inline void Across(const float (&all)[kColumns + kWindow - 1], float (&sums)[kColumns]) {
  static_assert(kWindow >= kColumns, "");
  float common = all[kColumns - 1];
#pragma unroll
  for (int n = kColumns; n < kWindow; ++n) common += all[n];
  // What only some of the windows hold, on the left and on the right.
  float left[kColumns], right[kColumns];
  left[kColumns - 1] = right[0] = 0;
#pragma unroll
  for (int j = kColumns - 2; j >= 0; --j) left[j] = left[j + 1] + all[j];
#pragma unroll
  for (int j = 1; j < kColumns; ++j) right[j] = right[j - 1] + all[kWindow - 1 + j];
#pragma unroll
  for (int j = 0; j < kColumns; ++j) sums[j] = (common + left[j]) + right[j];
}

// Residuals, or with kGradient the factors of the gradient.
template <int kColumns, bool kGradient>
__global__ void __launch_bounds__(kLanes, 12) Windows(Images images) {
  using Lanes = Shape<kColumns, kBefore, kAfter>;
  const int lane = threadIdx.x;
  const int across = Groups(images.columns + (images.reflect ? 0 : kBefore), Lanes::kUseful);
  const int group = blockIdx.x % across, strip = blockIdx.x / across % images.strips, b = blockIdx.x / across / images.strips;
  const int64_t image = int64_t(b) * images.height * images.width;
  const int first = int64_t(images.rows) * strip / images.strips, end = int64_t(images.rows) * (strip + 1) / images.strips;
  const int top = images.reflect ? first - kBefore : first, count = end - first + kWindow - 1;

  // Columns of the image in the lane, and of the results: a result is named after its window's middle column.
  const int left = group * Lanes::kUseful + (lane - Lanes::kLeft) * kColumns, to = images.reflect ? left : left - kBefore;
  const bool whole = left >= 0 && left + kColumns <= images.width && images.width % kColumns == 0;
  const bool has_results =
      lane >= Lanes::kLeft && lane < kLanes - Lanes::kRight && to < images.columns && to + kColumns > 0;
  const bool aligned = images.reflect && images.columns % kColumns == 0;
  int column[kColumns];
#pragma unroll
  for (int j = 0; j < kColumns; ++j) column[j] = Clamped(Reflected(left + j, images.width), images.width);
  auto read = [&](int row, float(&x)[kColumns], float(&y)[kColumns]) {
    // Rows beyond the last window are read ahead, and not used.
    row = images.reflect ? Reflected(row, images.height) : row;
    const int64_t start = image + int64_t(Clamped(row, images.height)) * images.width;
    if (whole) {
      ReadWhole(images.x + start + left, x), ReadWhole(images.y + start + left, y);
    } else {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) x[j] = __ldg(images.x + start + column[j]), y[j] = __ldg(images.y + start + column[j]);
    }
  };

  // Variances do not know of an offset, and small numbers keep more digits: the strip's middle row tells what is usual.
  float x[kColumns], y[kColumns], next_x[kColumns], next_y[kColumns];
  read((first + end) / 2, x, y);
  float offset_x = 0, offset_y = 0;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) offset_x += x[j], offset_y += y[j];
#pragma unroll
  for (int distance = kLanes / 2; distance; distance /= 2) {
    offset_x += __shfl_xor_sync(kAll, offset_x, distance);
    offset_y += __shfl_xor_sync(kAll, offset_y, distance);
  }
  offset_x /= kLanes * kColumns, offset_y /= kLanes * kColumns;
  const float offset_t = offset_x + offset_y, offset_d = offset_x - offset_y;

  // Of the sum t = x + y and the difference d: the last kWindow rows, and of t, d, t^2, d^2 the sums over those of them
  // that came before the last multiple of kWindow and over those since, so that no rounding stays longer than that.
  float t[kWindow][kColumns] = {}, d[kWindow][kColumns] = {};
  float old[4][kColumns] = {}, fresh[4][kColumns] = {};
  read(top, next_x, next_y);
  int64_t out = (int64_t(b) * images.rows + first) * images.columns + to;
  for (int done = 0; done < count; done += kWindow) {
#pragma unroll
    for (int i = 0; i < kWindow; ++i) {
      if (done + i >= count) break;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        old[0][j] -= t[i][j], old[1][j] -= d[i][j];
        old[2][j] -= t[i][j] * t[i][j], old[3][j] -= d[i][j] * d[i][j];
        const float small_x = next_x[j] - offset_x, small_y = next_y[j] - offset_y;
        t[i][j] = small_x + small_y, d[i][j] = small_x - small_y;
        fresh[0][j] += t[i][j], fresh[1][j] += d[i][j];
        fresh[2][j] += t[i][j] * t[i][j], fresh[3][j] += d[i][j] * d[i][j];
      }
      // Only now, since what waits for one load waits for all that are under way.
      read(top + done + i + 1, next_x, next_y);
      if (done + i < kWindow - 1) continue;
      float sums[4][kColumns], g[kColumns], result[kGradient ? 3 : 1][kColumns];
      if constexpr (kGradient) {
        if (has_results && aligned) {
          ReadWhole(images.g + out, g);
        } else {
#pragma unroll
          for (int j = 0; j < kColumns; ++j)
            g[j] = has_results && to + j >= 0 && to + j < images.columns ? images.g[out + j] : 0.0f;
        }
      }
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        float own[kColumns], all[kColumns + kWindow - 1];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) own[j] = old[q][j] + fresh[q][j];
        Neighbours<kColumns, kBefore, kAfter>(own, all);
        Across<kColumns>(all, sums[q]);
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        constexpr float kShare = 1.0f / (kWindow * kWindow);
        const float small_t = sums[0][j] * kShare, small_d = sums[1][j] * kShare;
        const float raw_t = sums[2][j] * kShare - small_t * small_t, raw_d = sums[3][j] * kShare - small_d * small_d;
        const float var_t = fmaxf(raw_t, 0.0f), var_d = fmaxf(raw_d, 0.0f);
        const float mean_t = small_t + offset_t, mean_d = small_d + offset_d;
        const float of_luminance = mean_t * mean_t + (mean_d * mean_d + 2 * images.c1);
        const float of_structure = var_t + (var_d + 2 * images.c2);
        if constexpr (kGradient) {
          const float luminance_scale = 1 / of_luminance, structure_scale = 1 / of_structure;
          const float share = kShare * g[j];
          const float l = share * (1 - 2 * var_d * structure_scale) * luminance_scale * luminance_scale;
          const float c = share * (1 - 2 * mean_d * mean_d * luminance_scale) * structure_scale * structure_scale;
          // A variance that rounding made negative has no gradient, and one of exactly zero half of it.
          const float of_var_t = -2 * c * var_d * (raw_t > 0 ? 1.0f : raw_t == 0 ? 0.5f : 0.0f);
          const float of_var_d = 2 * c * (var_t + 2 * images.c2) * (raw_d > 0 ? 1.0f : raw_d == 0 ? 0.5f : 0.0f);
          const float of_mean_t = -4 * l * mean_d * mean_d * mean_t;
          const float of_mean_d = 4 * l * mean_d * (mean_t * mean_t + 2 * images.c1);
          result[0][j] = of_mean_t + of_mean_d - 2 * (of_var_t * (mean_t - 1) + of_var_d * mean_d);
          result[1][j] = 2 * of_var_t, result[2][j] = 2 * of_var_d;
        } else {
          // luminance + structure - luminance * structure in one fraction
          const float luminance = 2 * mean_d * mean_d, structure = 2 * var_d;
          result[0][j] = __fdividef(luminance * (of_structure - structure) + structure * of_luminance, of_luminance * of_structure);
        }
      }
#pragma unroll
      for (int q = 0; q < (kGradient ? 3 : 1); ++q) {
        if (!has_results) break;
        float* target = kGradient ? images.factors + q * int64_t(images.count) * images.rows * images.columns : images.out;
        if (aligned) {
          WriteWhole(target + out, result[q]);
        } else {
#pragma unroll
          for (int j = 0; j < kColumns; ++j)
            if (to + j >= 0 && to + j < images.columns) target[out + j] = result[q][j];
        }
      }
      out += images.columns;
    }
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) old[q][j] = fresh[q][j], fresh[q][j] = 0;
  }
}

// The gradient of x from the factors of the windows that a pixel is in, also by reflection.
template <int kColumns>
__global__ void __launch_bounds__(kLanes, 12) Spread(Images images) {
  using Lanes = Shape<kColumns, kAfter, kBefore>;
  const int lane = threadIdx.x;
  const int across = Groups(images.width, Lanes::kUseful);
  const int group = blockIdx.x % across, strip = blockIdx.x / across % images.strips, b = blockIdx.x / across / images.strips;
  const int64_t image = int64_t(b) * images.height * images.width, map = int64_t(images.rows) * images.columns;
  const int h = images.height, w = images.width, shift = images.reflect ? 0 : kBefore;
  // Rows of pixels, the first and the last strip's with those beyond the border.
  int first = int64_t(h) * strip / images.strips, end = int64_t(h) * (strip + 1) / images.strips;
  if (images.reflect && strip == 0) first -= kBefore;
  if (images.reflect && strip == images.strips - 1) end += kAfter;
  const int count = end - first + kWindow - 1;
  const int left = group * Lanes::kUseful + (lane - Lanes::kLeft) * kColumns;
  const bool whole = images.reflect && left >= 0 && left + kColumns <= images.columns && images.columns % kColumns == 0;
  const bool has_results = lane >= Lanes::kLeft && lane < kLanes - Lanes::kRight && left < w;
  const bool aligned = left >= 0 && left + kColumns <= w && w % kColumns == 0;
  const bool folds = images.reflect && (group * Lanes::kUseful <= kBefore || (group + 1) * Lanes::kUseful + kAfter >= w);
  auto read = [&](int row, float(&to)[3][kColumns]) {
    row -= shift;
    const bool inside = row >= 0 && row < images.rows;
#pragma unroll
    for (int q = 0; q < 3; ++q) {
      const float* from = images.factors + q * images.count * map + b * map + int64_t(row) * images.columns;
      if (inside && whole) {
        ReadWhole(from + left, to[q]);
      } else {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const int column = left + j - shift;
          to[q][j] = inside && column >= 0 && column < images.columns ? __ldg(from + column) : 0.0f;
        }
      }
    }
  };

  float factor[3][kWindow][kColumns] = {}, old[3][kColumns] = {}, fresh[3][kColumns] = {}, next[3][kColumns];
  read(first - kAfter, next);
  for (int done = 0; done < count; done += kWindow) {
#pragma unroll
    for (int i = 0; i < kWindow; ++i) {
      if (done + i >= count) break;
#pragma unroll
      for (int q = 0; q < 3; ++q)
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          old[q][j] -= factor[q][i][j];
          factor[q][i][j] = next[q][j];
          fresh[q][j] += next[q][j];
        }
      read(first - kAfter + done + i + 1, next);
      if (done + i < kWindow - 1) continue;
      const int virtual_row = first + done + i - (kWindow - 1);
      const int row = images.reflect ? Reflected(virtual_row, h) : virtual_row;
      const int64_t start = image + int64_t(row) * w + left;
      float x[kColumns], y[kColumns], sums[3][kColumns], result[kColumns];
      if (aligned) {
        ReadWhole(images.x + start, x), ReadWhole(images.y + start, y);
      } else {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const bool inside = left + j >= 0 && left + j < w;
          x[j] = inside ? __ldg(images.x + start + j) : 0.0f, y[j] = inside ? __ldg(images.y + start + j) : 0.0f;
        }
      }
#pragma unroll
      for (int q = 0; q < 3; ++q) {
        float own[kColumns], all[kColumns + kWindow - 1];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) own[j] = old[q][j] + fresh[q][j];
        Neighbours<kColumns, kAfter, kBefore>(own, all);
        Across<kColumns>(all, sums[q]);
        if (folds) {
          // Windows that hold a pixel a second time, by reflection, lie among those around it.
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            const int c = left + j, from_end = w - 1 - c;
#pragma unroll
            for (int n = 0; n < kWindow; ++n) {
              const int window = c - kAfter + n;
              if (c >= 1 && c <= kBefore && window <= kBefore - c) sums[q][j] += all[n + j];
              if (from_end >= 1 && from_end <= kAfter && window >= c + 2 * from_end - kAfter) sums[q][j] += all[n + j];
            }
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        result[j] = sums[0][j] + ((x[j] + y[j] - 1) * sums[1][j] + (x[j] - y[j]) * sums[2][j]);
      if (!has_results) continue;
      // The same lane has come by this row before.
      const bool again = images.reflect && (virtual_row >= h || (virtual_row >= 1 && virtual_row <= kBefore));
      if (aligned && !again) {
        WriteWhole(images.out + start, result);
      } else {
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
          if (left + j < w) images.out[start + j] = result[j] + (again ? images.out[start + j] : 0.0f);
      }
    }
#pragma unroll
    for (int q = 0; q < 3; ++q)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) old[q][j] = fresh[q][j], fresh[q][j] = 0;
  }
}

static_assert(kWindow % 2 == 1, "reflected windows must lie among those around a pixel");
constexpr int kWide = 4;    // columns of a lane
constexpr int kNarrow = 2;                     // where more is kept of each

}  // namespace

#ifndef STEEL_AD_EMULATED
namespace ffi = xla::ffi;

namespace {

using Buffer = ffi::Buffer<ffi::F32>;

// So many strips of an image that the GPU's multiprocessors finish together, at little overlap.
template <class Kernel>
int Strips(Kernel kernel, int64_t columns_of_warps, int rows) {
  int device = 0, processors = 1, warps = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&warps, kernel, kLanes, 0);
  const double at_once = double(processors) * (warps > 0 ? warps : 1);
  int best = 1;
  double least = 0;
  for (int strips = 1; strips <= rows / (2 * kWindow) || strips == 1; ++strips) {
    const int64_t tasks = columns_of_warps * strips;
    const double rounds = double((tasks + int64_t(at_once) - 1) / int64_t(at_once));
    const double time = rounds * (double(rows) / strips + kWindow - 1);
    if (strips == 1 || time < 0.98 * least) best = strips, least = time;
  }
  return best;
}

Images ImagesOf(const Buffer& x, const Buffer& y, const bool reflect, float c1, float c2) {
  const auto shape = x.dimensions();
  const size_t n = shape.size();
  Images images{x.typed_data(), y.typed_data()};
  images.count = 1;
  for (size_t i = 0; i + 2 < n; ++i) images.count *= shape[i];
  images.height = shape[n - 2], images.width = shape[n - 1];
  images.rows = images.height - (reflect ? 0 : kWindow - 1), images.columns = images.width - (reflect ? 0 : kWindow - 1);
  images.reflect = reflect, images.c1 = c1, images.c2 = c2;
  return images;
}

template <class Kernel>
ffi::Error Launch(Kernel kernel, cudaStream_t stream, Images images, int groups, int rows) {
  images.strips = Strips(kernel, int64_t(groups) * images.count, rows);
  const int64_t tasks = int64_t(groups) * images.strips * images.count;
  if (tasks > 0) kernel<<<tasks, kLanes, 0, stream>>>(images);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? ffi::Error::Success() : ffi::Error::Internal(cudaGetErrorString(error));
}

ffi::Error Residual(cudaStream_t stream, Buffer x, Buffer y, bool reflect, float c1, float c2, ffi::Result<Buffer> to) {
  Images images = ImagesOf(x, y, reflect, c1, c2);
  images.out = to->typed_data();
  const int groups = Groups(images.columns + (reflect ? 0 : kBefore), Shape<kWide, kBefore, kAfter>::kUseful);
  return Launch(Windows<kWide, false>, stream, images, groups, images.rows);
}

ffi::Error ResidualGradient(cudaStream_t stream, Buffer x, Buffer y, Buffer g, bool reflect, float c1, float c2,
                            ffi::Result<Buffer> to, ffi::Result<Buffer> factors) {
  Images images = ImagesOf(x, y, reflect, c1, c2);
  images.g = g.typed_data(), images.out = to->typed_data(), images.factors = factors->typed_data();
  const int groups = Groups(images.columns + (reflect ? 0 : kBefore), Shape<kWide, kBefore, kAfter>::kUseful);
  const ffi::Error error = Launch(Windows<kWide, true>, stream, images, groups, images.rows);
  if (error.failure()) return error;
  return Launch(Spread<kNarrow>, stream, images, Groups(images.width, Shape<kNarrow, kAfter, kBefore>::kUseful), images.height);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(steel_ad_ssim_residual_cuda, Residual,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Attr<bool>("reflect")
                                  .Attr<float>("c1")
                                  .Attr<float>("c2")
                                  .Ret<Buffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(steel_ad_ssim_residual_gradient_cuda, ResidualGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Attr<bool>("reflect")
                                  .Attr<float>("c1")
                                  .Attr<float>("c2")
                                  .Ret<Buffer>()
                                  .Ret<Buffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
#endif
