// Gradients of a convolution's kernel and bias: as a convolution, with pixels and channels exchanged.

#ifndef STEEL_AD_NATIVE_FILTER_GRADIENT_H_
#define STEEL_AD_NATIVE_FILTER_GRADIENT_H_

#include <array>
#include <utility>

#include "winograd.h"

namespace {

constexpr int kTaps = kRegisters == 32 ? 12 : 6;    // most rows of a filter gradient in a tile

struct Outer {
  const float* x;    // of the first pixel, padded
  int64_t row, step; // floats between two rows and two columns of output pixels, in x
  const float* g;    // [rows, pixels, V * kLanes]
  int64_t rows, pixels;
  float* to;         // added to, [taps, V * kLanes] with rows `width` apart
  int64_t width;
};

template <int M, int V>
void RunOuter(const Outer& o) {
  Vec acc[M][V] = {};
  const float* g = o.g;
  const int64_t step = o.step;
  for (int64_t r = 0; r < o.rows; ++r) {
    const float* x = o.x + r * o.row;
    for (int64_t p = 0; p < o.pixels; ++p, x += step, g += V * kLanes) {
      Vec value[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) value[v] = Load(g + v * kLanes);
#pragma GCC unroll 32
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[m][v] += x[m] * value[v];
    }
  }
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* to = o.to + m * o.width + v * kLanes;
      Store(to, Load(to) + acc[m][v]);
    }
}

using OuterFunction = void (*)(const Outer&);

template <int V, int... M>
constexpr auto OuterTable(std::integer_sequence<int, M...>) {
  return std::array<OuterFunction, sizeof...(M)>{&RunOuter<M + 1, V>...};
}
constexpr auto kOuterOfOne = OuterTable<1>(std::make_integer_sequence<int, kTaps>());
constexpr auto kOuterOfTwo = OuterTable<2>(std::make_integer_sequence<int, kTaps>());

// Rows of a filter gradient in blocks of nearly the same height.
void RunOuters(Outer o, int vectors, int64_t taps) {
  int64_t blocks = CeilDiv(taps, kTaps);
  for (int64_t n = 0; n < blocks; ++n) {
    int64_t m = taps / blocks + (n < taps % blocks);
    (vectors == 1 ? kOuterOfOne.data() : kOuterOfTwo.data())[m - 1](o);
    o.x += m;
    o.to += m * o.width;
  }
}

// Planes of `[size, out]`, N x N of them, to a filter's elements `[M, M, size, out]`, of which row i of (r, s) begins at `at(r, s, i)`.
template <int N, int M, Transform<N, M> F, typename At>
void FilterOfTiles(ffi::ThreadPool& pool, const float* u, int64_t size, int64_t out, At at) {
  ParallelFor(pool, size, [&](int64_t i) {
    for (int64_t c = 0; c < out; c += kLanes) {
      Vec half[N][M];
      for (int s = 0; s < N; ++s) {
        Vec d[N];
        for (int r = 0; r < N; ++r) d[r] = Load(u + ((N * r + s) * size + i) * out + c);
        F(d, half[s]);
      }
      for (int r = 0; r < M; ++r) {
        Vec d[N], w[M];
        for (int s = 0; s < N; ++s) d[s] = half[s][r];
        F(d, w);
        for (int s = 0; s < M; ++s) Store(at(r, s, i) + c, w[s]);
      }
    }
  });
}

constexpr int64_t kTilesOfSums = 64;  // of a group, unless one band has more: each adds to all sums once

// Adds products of a group's transformed tiles to `sum`, `[9 or 16, size, out]`, and to `bias` the sums of the gradient's channels,
// or, with 4x4 kernels, of the image's if they are `exchanged`.
void AddTiles(Form form, const Image& image, const Image& gradient, const std::vector<Block>& blocks, const Group& group,
              bool exchanged, float* sum, float* bias) {
  const bool of_blocks = form == Form::kOfBlocks;
  const int64_t in = image.channels, out = gradient.channels, size = of_blocks ? 4 * in : in, planes = of_blocks ? 9 : 16;
  const int64_t height = gradient.height, width = gradient.width;
  const int64_t tiles = group.tiles, of_input = Plane(tiles * size), of_gradient = Plane(tiles * out);
  float* v = Scratch(1, planes * of_input);
  float* m = Scratch(2, planes * of_gradient);
  for (int64_t i = group.begin, done = 0; i < group.end; ++i) {
    const Band band = BandOf(i, height, width);
    const int64_t columns = 2 * band.tiles.columns;
    float* padded = Scratch(0, std::max(PaddedSize(form, band.tiles, in), 4 * band.tiles.count() * out));
    InputTiles(form, image, band, padded, v + done * size, of_input);
    for (int64_t r = 1; exchanged && r <= 2 * band.rows; ++r)
      AddPixels(padded + (r * (2 * columns + 2) + 1) * in, 2 * width, in, bias);
    CopyPadded(gradient, band.image, band.first, 2 * band.tiles.rows, 0, columns, padded);
    if (!exchanged) AddPixels(padded, 4 * band.tiles.count(), out, bias);
    for (const Block& block : blocks) {
      const int64_t wide = block.vectors * kLanes;
      float* to = m + tiles * block.channel + done * wide;
      if (of_blocks)
        TransformTiles<2, 3, Spread>(padded + block.channel, columns * out, out, wide, band.tiles, to, wide, of_gradient);
      else
        TransformTiles<2, 4, OfGradient>(padded + block.channel, columns * out, out, wide, band.tiles, to, wide, of_gradient);
    }
    done += band.tiles.count();
  }
  for (int64_t k = 0; k < planes; ++k)
    for (const Block& block : blocks)
      RunOuters({v + k * of_input, 0, size, m + k * of_gradient + tiles * block.channel, 1, tiles,
                 sum + k * size * out + block.channel, out},
                block.vectors, size);
}

// Of y = convolve(x, weights) + bias, given g, the gradient of y. With `exchanged` the leaky ReLU's derivative multiplies
// x instead of g, and the bias's gradient is x's sum: a transposed convolution's gradient is the same with its roles exchanged.
ffi::Error FilterGradient(ffi::ThreadPool pool, Buffer x, Buffer g, Buffer activated, int64_t stride, int64_t padding,
                          float slope, bool exchanged, Result of_weights, Result of_bias) {
  Image image = ImageOf(x, activated, slope), gradient = ImageOf(g, activated, slope);
  (exchanged ? gradient : image).activated = nullptr;
  auto k = of_weights->dimensions();
  const int64_t kh = k[0], kw = k[1], in = k[2], out = k[3], height = gradient.height, width = gradient.width;
  const Form form = exchanged && stride == 1 ? Form::kDirect : FormOf(kh, kw, stride, in, out);
  const bool winograd = form != Form::kDirect;
  const int64_t run = kw * in, padded = Padded(out), biases = of_bias->element_count();
  const int64_t size = form == Form::kOfBlocks ? 9 * 4 * in * out : winograd ? 16 * in * out : kh * run * padded;
  const auto blocks = Blocks(out);
  const int64_t band = BandRows(height, width), bands = CeilDiv(height, band), columns = (width - 1) * stride + kw;
  const Groups groups(g.dimensions()[0], height, width, kTilesOfSums);
  const int64_t total = winograd ? groups.bands() : g.dimensions()[0] * bands;
  if (!total) {
    std::memset(of_weights->typed_data(), 0, of_weights->size_bytes());
    std::memset(of_bias->typed_data(), 0, of_bias->size_bytes());
    return ffi::Error::Success();
  }
  // Sums of fixed parts in a fixed order, so that the result does not depend on the threads.
  const int64_t parts = std::min(total, std::clamp<int64_t>((1 << 19) / size, 8, 32)), part_size = size + biases;
  const Memory sums = Allocate(parts * part_size);
  ParallelFor(pool, parts, [&](int64_t part) {
    float *sum = sums.get() + part * part_size, *bias = sum + size;
    std::fill(sum, sum + part_size, 0.0f);
    const int64_t end = (part + 1) * total / parts;
    for (int64_t item = part * total / parts; item < end;) {
      if (winograd) {
        const Group group = groups.From(item, end);
        float* band_bias = Scratch(3, biases);
        std::fill(band_bias, band_bias + biases, 0.0f);
        AddTiles(form, image, gradient, blocks, group, exchanged, sum, band_bias);
        for (int64_t c = 0; c < biases; ++c) bias[c] += band_bias[c];
        item = group.end;
        continue;
      }
      int64_t b = item / bands, first = item % bands * band, rows = std::min(band, height - first);
      ++item;
      int64_t padded_rows = (rows - 1) * stride + kh;
      float* xs = Scratch(0, padded_rows * columns * in);
      CopyPadded(image, b, first * stride - padding, padded_rows, -padding, columns, xs);
      float* gs = Scratch(1, rows * width * (padded + out) + biases);
      float *plain = gs + rows * width * padded, *band_bias = plain + rows * width * out;
      CopyRun(gradient, (b * height + first) * width * out, rows * width * out, plain);
      for (const Block& block : blocks) {
        int64_t wide = block.vectors * kLanes, there = std::min(wide, out - block.channel);
        float* to = gs + block.offset * rows * width;
        for (int64_t p = 0; p < rows * width; ++p, to += wide) {
          std::memcpy(to, plain + p * out + block.channel, there * sizeof(float));
          std::memset(to + there, 0, (wide - there) * sizeof(float));
        }
      }
      std::fill(band_bias, band_bias + biases, 0.0f);
      if (exchanged) {
        for (int64_t r = 0; r < rows * stride; ++r)
          AddPixels(xs + ((r + padding) * columns + padding) * in, width * stride, in, band_bias);
      } else {
        AddPixels(plain, rows * width, out, band_bias);
      }
      for (int64_t c = 0; c < biases; ++c) bias[c] += band_bias[c];
      for (const Block& block : blocks)
        for (int64_t r = 0; r < kh; ++r)
          RunOuters({xs + r * columns * in, stride * columns * in, stride * in, gs + block.offset * rows * width, rows,
                     width, sum + r * run * padded + block.channel, padded},
                    block.vectors, run);
    }
  });
  // All into the first part.
  constexpr int64_t kPiece = 4096;
  ParallelFor(pool, CeilDiv(part_size, kPiece), [&](int64_t piece) {
    float* __restrict total = sums.get() + piece * kPiece;
    const int64_t n = std::min(kPiece, part_size - piece * kPiece);
    for (int64_t part = 1; part < parts; ++part) {
      const float* __restrict of_part = total + part * part_size;
      for (int64_t i = 0; i < n; ++i) total[i] += of_part[i];
    }
  });
  const float* found = sums.get();
  float* to = of_weights->typed_data();
  if (form == Form::kOfThree)
    FilterOfTiles<4, 3, ToFilter>(pool, found, in, out, [&](int r, int s, int64_t i) { return to + ((3 * r + s) * in + i) * out; });
  else if (form == Form::kOfBlocks)
    FilterOfTiles<3, 2, Fold>(pool, found, 4 * in, out,
                              [&](int r, int s, int64_t i) { return to + RowOfBlocks(r, s, i, in) * out; });
  else
    for (int64_t i = 0; i < kh * run; ++i) std::copy_n(found + i * padded, out, to + i * out);
  std::copy_n(found + size, biases, of_bias->typed_data());
  return ffi::Error::Success();
}

}  // namespace

#endif  // STEEL_AD_NATIVE_FILTER_GRADIENT_H_
