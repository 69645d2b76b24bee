// 1 - SSIM of pairs of images, and its gradient, on NVIDIA GPUs (ops/ssim.py says what the numbers mean).
//
// A warp goes down a strip of kLanes * kColumns columns and waits for no other. Rows of the images come into shared
// memory ahead of their use; there the window's rows stay, each lane with columns of its own, to be taken off the sums
// again. Sums across columns come from the neighbours by shuffles, so that the outer lanes have no results. The
// gradient does the same a second time, with three factors of every window. Each pixel is read once, but for the
// strips' edges (of the gradient a third of the columns, which the second cache has).
//
// Map and gradient are one file, longer than most: they are one kernel template, whose parts make sense together alone.

#ifndef STEEL_AD_EMULATED
#include <cuda_runtime_api.h>

#include "xla/ffi/api/ffi.h"
#endif

#include <cstdint>

namespace {

constexpr int kWindow = STEEL_AD_WINDOW, kLanes = 32;
constexpr int kBefore = (kWindow - 1) / 2, kAfter = kWindow / 2;
constexpr unsigned kAll = 0xffffffffu;
static_assert(kWindow >= 4 && kWindow % 2 == 1, "windows must be as wide as a lane's columns, and have a middle");

struct Images {
  const float *x, *y, *g;  // g: the gradient of the results
  float* out;
  int count, height, width;  // of the images
  int rows, columns;         // of the results
  int strips;                // so many warps share an image's rows
  bool reflect;              // else windows stay within the image
  float c1, c2;
  float base, sign;  // what is written is base + sign * residual
};

template <bool kGradient>
struct Shape {
  static constexpr int kColumns = kGradient ? 2 : 4;  // of a lane
  // Rows and columns around a result that it depends on, and lanes that hold them.
  static constexpr int kReachBefore = kGradient ? kWindow - 1 : kBefore, kReachAfter = kGradient ? kWindow - 1 : kAfter;
  static constexpr int kLeft = (kReachBefore + kColumns - 1) / kColumns,
                       kRight = (kReachAfter + kColumns - 1) / kColumns;
  static constexpr int kUseful = (kLanes - kLeft - kRight) * kColumns;
  // Rows on their way, and warps of a multiprocessor: with a window of 11 its shared memory allows no more.
  static constexpr int kAhead = 2, kWarps = kGradient ? 14 : 16;
};

// Warps side by side: results are named after their window's middle column, gradients after the pixel.
template <bool kGradient>
__host__ __device__ inline int Groups(const Images& images) {
  return (images.width + Shape<kGradient>::kUseful - 1) / Shape<kGradient>::kUseful;
}

__device__ inline int Reflected(int i, int n) {
  i = i < 0 ? -i : i;
  return i < n ? i : 2 * (n - 1) - i;
}

template <int kColumns>
struct VectorOf;
template <>
struct VectorOf<2> {
  using Type = float2;
};
template <>
struct VectorOf<4> {
  using Type = float4;
};
template <int kColumns>
using Vector = typename VectorOf<kColumns>::Type;

__device__ inline void Read(const float2& from, float (&to)[2]) { to[0] = from.x, to[1] = from.y; }
__device__ inline void Read(const float4& from, float (&to)[4]) {
  to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}
__device__ inline float2 Whole(const float (&from)[2]) { return make_float2(from[0], from[1]); }
__device__ inline float4 Whole(const float (&from)[4]) { return make_float4(from[0], from[1], from[2], from[3]); }

__device__ inline int Clamped(int i, int n) { return i < 0 ? 0 : i < n ? i : n - 1; }

#ifndef STEEL_AD_EMULATED
template <int kBytes>
__device__ inline void CopyAhead(void* to, const void* from) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(kBytes) : "memory");
}

__device__ inline void EndOfRow() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when no more than the latest kRows rows are on their way.
template <int kRows>
__device__ inline void WaitForRow() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kRows) : "memory");
}

// To one unit in the last place: a division by the book takes ten times as many instructions.
__device__ inline float Inverse(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
#endif

// Sums over the window around each of the lane's columns.
template <int kBefore, int kAfter, int kColumns>
__device__ inline void Across(const float (&own)[kColumns], float (&sums)[kColumns]) {
  // Of the lane's first and last n + 1 columns.
  float first[kColumns], last[kColumns];
  first[0] = own[0], last[0] = own[kColumns - 1];
#pragma unroll
  for (int n = 1; n < kColumns; ++n) first[n] = first[n - 1] + own[n], last[n] = last[n - 1] + own[kColumns - 1 - n];
  last[kColumns - 1] = first[kColumns - 1];
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
    sums[j] =
        j <= kBefore ? first[j + kAfter < kColumns ? j + kAfter : kColumns - 1] : last[kColumns - 1 - (j - kBefore)];
  // Columns of the lanes around that are in the window; whole lanes first, since several windows have them.
#pragma unroll
  for (int n = kColumns; n > 0; --n)
#pragma unroll
    for (int lanes = 1; lanes <= (kWindow + kColumns - 2) / kColumns; ++lanes) {
      float left = 0, right = 0;
      bool has_left = false, has_right = false;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int before = kBefore - j - (lanes - 1) * kColumns, after = kAfter + j + 1 - lanes * kColumns;
        has_left |= (before < kColumns ? before : kColumns) == n,
            has_right |= (after < kColumns ? after : kColumns) == n;
      }
      if (has_left) left = __shfl_up_sync(kAll, last[n - 1], lanes);
      if (has_right) right = __shfl_down_sync(kAll, first[n - 1], lanes);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int before = kBefore - j - (lanes - 1) * kColumns, after = kAfter + j + 1 - lanes * kColumns;
        if ((before < kColumns ? before : kColumns) == n) sums[j] += left;
        if ((after < kColumns ? after : kColumns) == n) sums[j] += right;
      }
    }
}

// Adds what lies beyond the image's left and right border where it is reflected. `base`: the first lane's column.
template <int kColumns>
__device__ inline void Fold(int base, int left, int width, float (&result)[kColumns]) {
  float total[kColumns];
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const int c = left + j, from_end = width - 1 - c, before = -c - base, after = 2 * (width - 1) - c - base;
    // All lanes ask for the same one of another lane's columns, since lanes begin at multiples of kColumns.
    static_assert(2 % kColumns == 0, "the columns on the right depend on the width");
    const float source = result[(kColumns - j) % kColumns];
    const float left_one = __shfl_sync(kAll, source, before / kColumns & (kLanes - 1));
    const float right_one = __shfl_sync(kAll, source, after / kColumns & (kLanes - 1));
    total[j] = result[j];
    if (c >= 1 && c <= kBefore) total[j] += left_one;
    if (from_end >= 1 && from_end <= kAfter) total[j] += right_one;
  }
#pragma unroll
  for (int j = 0; j < kColumns; ++j) result[j] = total[j];
}

// Residuals, or with kGradient the gradient of x.
template <bool kGradient>
__global__ void __launch_bounds__(kLanes, Shape<kGradient>::kWarps) Strip(Images images) {
  using S = Shape<kGradient>;
  constexpr int kColumns = S::kColumns, kRows = kWindow + S::kAhead;
  using Vec = Vector<kColumns>;
  __shared__ Vec shared[kRows][2][kLanes], shared_factors[kGradient ? kWindow : 1][3][kLanes];
  const int lane = threadIdx.x, across = Groups<kGradient>(images);
  const int group = blockIdx.x % across, strip = blockIdx.x / across % images.strips,
            b = blockIdx.x / across / images.strips;
  const int height = images.height, width = images.width;
  const int64_t image = int64_t(b) * height * width;
  // Where the middle pixels of windows are.
  const int window_top = images.reflect ? 0 : kBefore, window_left = window_top;
  const int window_bottom = window_top + images.rows, window_right = window_left + images.columns;
  const float* const g = kGradient ? images.g + int64_t(b) * images.rows * images.columns : nullptr;

  // Rows of results: of gradients the first and the last strip also have those beyond the border.
  const int all_rows = kGradient ? height : images.rows, shift = kGradient ? 0 : window_top;
  int first = int64_t(all_rows) * strip / images.strips, end = int64_t(all_rows) * (strip + 1) / images.strips;
  if (kGradient && images.reflect && strip == 0) first -= kBefore;
  if (kGradient && images.reflect && strip == images.strips - 1) end += kAfter;
  const int top = first + shift - S::kReachBefore, count = end - first + S::kReachBefore + S::kReachAfter;

  const int left = group * S::kUseful + (lane - S::kLeft) * kColumns;
  const bool whole = left >= 0 && left + kColumns <= width && width % kColumns == 0;
  const bool inner = lane >= S::kLeft && lane < kLanes - S::kRight;
  const bool folds =
      kGradient && images.reflect && (group * S::kUseful <= kBefore || (group + 1) * S::kUseful + kAfter >= width);
  int column[kColumns];
#pragma unroll
  for (int j = 0; j < kColumns; ++j) column[j] = Clamped(Reflected(left + j, width), width);
  auto start_of = [&](int row) {
    // Rows and columns that are in no window are somewhere in the image.
    return image + int64_t(Clamped(Reflected(row, height), height)) * width;
  };

  // Variances do not know of an offset, and small numbers keep more digits: the strip's middle row tells what is usual.
  float offset_x = 0, offset_y = 0;
  const int64_t middle = start_of((first + end) / 2);
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
    offset_x += __ldg(images.x + middle + column[j]), offset_y += __ldg(images.y + middle + column[j]);
#pragma unroll
  for (int distance = kLanes / 2; distance; distance /= 2) {
    offset_x += __shfl_xor_sync(kAll, offset_x, distance);
    offset_y += __shfl_xor_sync(kAll, offset_y, distance);
  }
  offset_x /= kLanes * kColumns, offset_y /= kLanes * kColumns;
  const float offset_t = offset_x + offset_y, offset_d = offset_x - offset_y;

  auto copy = [&](int i, int slot) {
    if (i < count) {
      const int64_t start = start_of(top + i);
      Vec *const to_x = &shared[slot][0][lane], *const to_y = &shared[slot][1][lane];
      if (whole) {
        CopyAhead<sizeof(Vec)>(to_x, images.x + start + left), CopyAhead<sizeof(Vec)>(to_y, images.y + start + left);
      } else {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          CopyAhead<4>(reinterpret_cast<float*>(to_x) + j, images.x + start + column[j]);
          CopyAhead<4>(reinterpret_cast<float*>(to_y) + j, images.y + start + column[j]);
        }
      }
    }
    EndOfRow();
  };
#pragma unroll
  for (int i = 0; i < S::kAhead; ++i) copy(i, i);

  // Of the sum t = x + y and the difference d and their squares: sums over those of the last kWindow rows that came
  // before the last multiple of kWindow and over those since, so that no rounding stays longer than that.
  float old[4][kColumns] = {}, fresh[4][kColumns] = {};
  float old_factors[3][kColumns] = {}, fresh_factors[3][kColumns] = {};
  constexpr float kCount = kWindow * kWindow;
  const float c1 = 2 * kCount * kCount * images.c1, c2 = 2 * kCount * kCount * images.c2;
  float of_next[kColumns] = {};
  // The gradient of the results in a row of windows, 0 where there are none.
  auto read_gradient = [&](int row) {
    const bool row_inside = row >= window_top && row < window_bottom;
    const float* const from = g + int64_t(row - window_top) * images.columns + (left - window_left);
    if (whole && images.reflect) {
      if (row_inside) Read(__ldg(reinterpret_cast<const Vec*>(from)), of_next);
    } else {
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        of_next[j] = row_inside && left + j >= window_left && left + j < window_right ? __ldg(from + j) : 0.0f;
    }
    if (!row_inside)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) of_next[j] = 0;
  };
  // Where in shared memory the row is, and that which leaves the window, to be followed by that kAhead later.
  int slot = 0, leaving = S::kAhead;
  if constexpr (kGradient) read_gradient(top + kBefore);
  for (int done = 0; done < count; done += kWindow) {
#pragma unroll 1
    for (int i = done; i < done + kWindow && i < count; ++i) {
      WaitForRow<S::kAhead - 1>();
      if (i >= kWindow) {
        float t[kColumns], d[kColumns];
        Read(shared[leaving][0][lane], t), Read(shared[leaving][1][lane], d);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          old[0][j] -= t[j], old[1][j] -= d[j];
          old[2][j] -= t[j] * t[j], old[3][j] -= d[j] * d[j];
        }
      }
      {
        float x[kColumns], y[kColumns], t[kColumns], d[kColumns];
        Read(shared[slot][0][lane], x), Read(shared[slot][1][lane], y);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const float small_x = x[j] - offset_x, small_y = y[j] - offset_y;
          t[j] = small_x + small_y, d[j] = small_x - small_y;
          fresh[0][j] += t[j], fresh[1][j] += d[j];
          fresh[2][j] += t[j] * t[j], fresh[3][j] += d[j] * d[j];
        }
        shared[slot][0][lane] = Whole(t), shared[slot][1][lane] = Whole(d);
      }
      copy(i + S::kAhead, leaving);

      if (i >= kWindow - 1) {
        float sums[4][kColumns];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          float own[kColumns];
#pragma unroll
          for (int j = 0; j < kColumns; ++j) own[j] = old[q][j] + fresh[q][j];
          Across<kBefore, kAfter>(own, sums[q]);
        }
        const int window_row = top + i - kAfter;
        float result[kColumns], factors[3][kColumns], of_result[kColumns];
        if constexpr (kGradient) {
#pragma unroll
          for (int j = 0; j < kColumns; ++j) of_result[j] = of_next[j];
          read_gradient(window_row + 1);
        }
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          // All in units of kCount or its square.
          const float mean_t = sums[0][j] + kCount * offset_t, mean_d = sums[1][j] + kCount * offset_d;
          const float raw_t = kCount * sums[2][j] - sums[0][j] * sums[0][j],
                      raw_d = kCount * sums[3][j] - sums[1][j] * sums[1][j];
          const float var_t = fmaxf(raw_t, 0.0f) + c2, var_d = fmaxf(raw_d, 0.0f);
          const float square_t = mean_t * mean_t + c1, square_d = mean_d * mean_d;
          const float of_luminance = square_t + square_d, of_structure = var_t + var_d;
          if constexpr (kGradient) {
            const float luminance_scale = Inverse(of_luminance), structure_scale = Inverse(of_structure);
            const float both = 2 * kCount * of_result[j] * luminance_scale * structure_scale;
            const float of_means = both * (2 / kCount) * luminance_scale * (var_t - var_d);
            const float of_variances = 2 * both * structure_scale * (square_t - square_d);
            // A variance that rounding made negative has no gradient, and one of exactly zero half of it.
            factors[1][j] = -of_variances * var_d * (raw_t > 0 ? 1.0f : raw_t == 0 ? 0.5f : 0.0f);
            factors[2][j] = of_variances * var_t * (raw_d > 0 ? 1.0f : raw_d == 0 ? 0.5f : 0.0f);
            factors[0][j] = of_means * mean_d * (square_t - mean_d * mean_t) -
                            (factors[1][j] * sums[0][j] + factors[2][j] * sums[1][j]) * (1 / kCount);
          } else {
            // luminance + structure - luminance * structure in one fraction
            const float top = 2 * (square_d * (var_t - var_d) + var_d * of_luminance);
            result[j] = images.base + images.sign * (top * Inverse(of_luminance * of_structure));
          }
        }
        if constexpr (kGradient) {
          const int at = i - done;
#pragma unroll
          for (int q = 0; q < 3; ++q) {
            if (i >= 2 * kWindow - 1) {
              float gone[kColumns];
              Read(shared_factors[at][q][lane], gone);
#pragma unroll
              for (int j = 0; j < kColumns; ++j) old_factors[q][j] -= gone[j];
            }
            shared_factors[at][q][lane] = Whole(factors[q]);
#pragma unroll
            for (int j = 0; j < kColumns; ++j) fresh_factors[q][j] += factors[q][j];
          }
          if (i >= 2 * kWindow - 2) {
            float over[3][kColumns];
#pragma unroll
            for (int q = 0; q < 3; ++q) {
              float own[kColumns];
#pragma unroll
              for (int j = 0; j < kColumns; ++j) own[j] = old_factors[q][j] + fresh_factors[q][j];
              Across<kAfter, kBefore>(own, over[q]);
            }
            float t[kColumns], d[kColumns];
            // The oldest row of the window, which is kWindow - 1 back.
            const int oldest = leaving + 1 < kRows ? leaving + 1 : 0;
            Read(shared[oldest][0][lane], t), Read(shared[oldest][1][lane], d);
#pragma unroll
            for (int j = 0; j < kColumns; ++j) result[j] = over[0][j] + (t[j] * over[1][j] + d[j] * over[2][j]);
            if (folds) Fold(left - lane * kColumns, left, width, result);
          }
        }
        if (inner && (!kGradient || i >= 2 * kWindow - 2)) {
          const int row = first + i - (S::kReachBefore + S::kReachAfter);
          if constexpr (kGradient) {
            const int64_t start = image + int64_t(images.reflect ? Reflected(row, height) : row) * width + left;
            // The same lane has come by this row before.
            const bool again = images.reflect && (row >= height || (row >= 1 && row <= kBefore));
            if (whole && !again) {
              __stcs(reinterpret_cast<Vec*>(images.out + start), Whole(result));
            } else {
#pragma unroll
              for (int j = 0; j < kColumns; ++j)
                if (left + j < width) images.out[start + j] = result[j] + (again ? images.out[start + j] : 0.0f);
            }
          } else {
            float* const to = images.out + (int64_t(b) * images.rows + row) * images.columns + (left - window_left);
            if (whole && images.reflect) {
              __stcs(reinterpret_cast<Vec*>(to), Whole(result));
            } else {
#pragma unroll
              for (int j = 0; j < kColumns; ++j)
                if (left + j >= window_left && left + j < window_right) to[j] = result[j];
            }
          }
        }
      }

      slot = slot + 1 < kRows ? slot + 1 : 0, leaving = leaving + 1 < kRows ? leaving + 1 : 0;
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int q = 0; q < 4; ++q) old[q][j] = fresh[q][j], fresh[q][j] = 0;
#pragma unroll
      for (int q = 0; q < 3; ++q) old_factors[q][j] = fresh_factors[q][j], fresh_factors[q][j] = 0;
    }
  }
}

}  // namespace

#ifndef STEEL_AD_EMULATED
namespace ffi = xla::ffi;

namespace {

using Buffer = ffi::Buffer<ffi::F32>;

// So many strips of an image that the GPU's multiprocessors finish together, at little overlap.
template <class Kernel>
int Strips(Kernel kernel, int64_t columns_of_warps, int rows, int overlap) {
  int device = 0, processors = 1, warps = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&warps, kernel, kLanes, 0);
  const int64_t at_once = int64_t(processors) * (warps > 0 ? warps : 1);
  int best = 1;
  double least = 0;
  for (int strips = 1; strips <= rows / kWindow || strips == 1; ++strips) {
    const double rounds = double((columns_of_warps * strips + at_once - 1) / at_once);
    const double time = rounds * (double(rows) / strips + overlap);
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
  images.rows = images.height - (reflect ? 0 : kWindow - 1),
  images.columns = images.width - (reflect ? 0 : kWindow - 1);
  images.reflect = reflect, images.c1 = c1, images.c2 = c2;
  return images;
}

template <bool kGradient>
ffi::Error Launch(cudaStream_t stream, Images images) {
  using S = Shape<kGradient>;
  const int64_t groups = int64_t(Groups<kGradient>(images)) * images.count;
  const int rows = kGradient ? images.height : images.rows;
  images.strips = Strips(Strip<kGradient>, groups, rows, S::kReachBefore + S::kReachAfter);
  if (groups > 0) Strip<kGradient><<<groups * images.strips, kLanes, 0, stream>>>(images);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? ffi::Error::Success() : ffi::Error::Internal(cudaGetErrorString(error));
}

ffi::Error Residual(cudaStream_t stream, Buffer x, Buffer y, bool reflect, float c1, float c2, float base, float sign,
                    ffi::Result<Buffer> to) {
  Images images = ImagesOf(x, y, reflect, c1, c2);
  images.base = base, images.sign = sign, images.out = to->typed_data();
  return Launch<false>(stream, images);
}

ffi::Error ResidualGradient(cudaStream_t stream, Buffer x, Buffer y, Buffer g, bool reflect, float c1, float c2,
                            ffi::Result<Buffer> to) {
  Images images = ImagesOf(x, y, reflect, c1, c2);
  images.g = g.typed_data(), images.out = to->typed_data();
  return Launch<true>(stream, images);
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
                                  .Attr<float>("base")
                                  .Attr<float>("sign")
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
                                  .Ret<Buffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
#endif
