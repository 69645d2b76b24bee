// Convolutions of float32 images, channels last, as XLA custom calls: forward, to twice the size, and filter gradients.
//
// A tile of P output pixels by V vectors of output channels stays in registers while it runs over the kernel: every weight
// vector that is loaded serves P pixels, every input value that is broadcast serves V vectors. For a row of the kernel,
// its columns and the input channels are one contiguous run of the padded input, so the innermost loop knows nothing of
// either. Filter gradients are the same with pixels and channels exchanged. Bias and leaky ReLU, and the latter's
// derivative in the gradients, are applied while values are in registers or being copied anyway.
//
// 3x3 convolutions of stride 1 with whole vectors of channels go by Winograd's F(2x2, 3x3) (Lavin & Gray 2016): 16 products
// for four output pixels instead of 36, each of them a matrix product over the channels of the tiles of a band.

#include <array>
#include <utility>

#include "common.h"

namespace {

constexpr int kVectors = 2;                         // most vectors of output channels in a tile
constexpr int kPixels[] = {0, kRegisters == 32 ? 14 : 12, kRegisters / 2 - 2};  // most pixels of a tile of one and two vectors
constexpr int kApart = 6;                           // most pixels of a tile that may go on in the next row: each has an address
constexpr int kTaps = kRegisters == 32 ? 12 : 6;    // most rows of a filter gradient in a tile
constexpr int kBandPixels = 128;                    // output pixels of a band, whose input is copied and stays in caches
constexpr int64_t kNear = 4096;                     // weights that a band's tiles take one after the other, half of a first cache

struct Image {
  const float* data;
  const float* activated;  // null, or the leaky ReLU's results whose derivative multiplies `data`
  float slope;
  int64_t height, width, channels;
};

// `n` values, times the derivative of the leaky ReLU.
inline void CopyRun(const Image& x, int64_t offset, int64_t n, float* __restrict to) {
  const float* __restrict from = x.data + offset;
  if (!x.activated) {
    std::memcpy(to, from, n * sizeof(float));
    return;
  }
  const float* __restrict of = x.activated + offset;
  const float slope = x.slope;
  for (int64_t i = 0; i < n; ++i) to[i] = from[i] * (of[i] >= 0.0f ? 1.0f : slope);
}

// Adds `n` pixels of `channels` values each to `sum`.
inline void AddPixels(const float* __restrict from, int64_t n, int64_t channels, float* __restrict sum) {
  for (int64_t p = 0; p < n; ++p)
    for (int64_t c = 0; c < channels; ++c) sum[c] += from[p * channels + c];
}

// Rows `top` to `top + rows - 1` and columns `left` to `left + columns - 1` of image `b`, zero outside of it.
void CopyPadded(const Image& x, int64_t b, int64_t top, int64_t rows, int64_t left, int64_t columns, float* to) {
  int64_t c = x.channels, first = std::max<int64_t>(0, -left), last = std::min(columns, x.width - left);
  for (int64_t r = 0; r < rows; ++r, to += columns * c) {
    int64_t y = top + r;
    if (y < 0 || y >= x.height) {
      std::memset(to, 0, columns * c * sizeof(float));
      continue;
    }
    std::memset(to, 0, first * c * sizeof(float));
    CopyRun(x, ((b * x.height + y) * x.width + left + first) * c, (last - first) * c, to + first * c);
    std::memset(to + last * c, 0, (columns - last) * c * sizeof(float));
  }
}

// ---- Forward ----

struct Tile {
  const float* x;         // of the first pixel, padded
  int64_t row, step;      // floats between two rows of the kernel, and between two output pixels, in x
  int64_t rows, run;      // of the kernel: rows, and columns times channels
  const float* weights;   // packed, [rows, run, V * kLanes]
  const float* bias;      // padded, or null
  float slope;            // 1: no leaky ReLU
  bool adds;              // to what is in out, in place of the bias
  float* out;
  int64_t out_step;       // floats between two output pixels
  int64_t channels;       // that are there to be written, at most V * kLanes
  int64_t split = kWhole; // pixels of the first row, where a tile of at most kApart goes on in the next one
  int64_t gap = 0, out_gap = 0;  // floats from where the first row ends to the next one, in x and out
  static constexpr int64_t kWhole = 1 << 30;
};

template <int P, int V>
void RunTile(const Tile& t) {
  constexpr bool apart = P <= kApart;
  const int64_t step = t.step;
  auto out = [&](int p) { return t.out + p * t.out_step + (apart && p >= t.split ? t.out_gap : 0); };
  Vec acc[P][V];
#pragma GCC unroll 32
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      acc[p][v] = t.adds ? Load(out(p) + v * kLanes) : t.bias ? Load(t.bias + v * kLanes) : Vec{};
  const float* w = t.weights;
  const float* at[apart ? P : 1];
  if constexpr (apart)
    for (int p = 0; p < P; ++p) at[p] = t.x + p * step + (p >= t.split ? t.gap : 0);
  for (int64_t r = 0; r < t.rows; ++r) {
    const float* x = t.x + r * t.row;
    for (int64_t j = 0; j < t.run; ++j, ++x, w += V * kLanes) {
      Vec weight[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) weight[v] = Load(w + v * kLanes);
#pragma GCC unroll 32
      for (int p = 0; p < P; ++p) {
        float value;
        if constexpr (apart)
          value = at[p][r * t.row + j];
        else
          value = x[p * step];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[p][v] += value * weight[v];
      }
    }
  }
#pragma GCC unroll 32
  for (int p = 0; p < P; ++p) {
    float* to = out(p);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      Vec y = acc[p][v];
      if (t.slope != 1.0f) y = y >= 0.0f ? y : t.slope * y;
      int64_t left = t.channels - v * kLanes;
      if (left >= kLanes)
        Store(to + v * kLanes, y);
      else if (left > 0)
        std::memcpy(to + v * kLanes, &y, left * sizeof(float));
    }
  }
}

using TileFunction = void (*)(const Tile&);

template <int V, int... P>
constexpr auto TileTable(std::integer_sequence<int, P...>) {
  return std::array<TileFunction, sizeof...(P)>{&RunTile<P + 1, V>...};
}
constexpr auto kTilesOfOne = TileTable<1>(std::make_integer_sequence<int, kPixels[1]>());
constexpr auto kTilesOfTwo = TileTable<2>(std::make_integer_sequence<int, kPixels[2]>());

void Run(const Tile& t, int vectors, int64_t pixels) {
  (vectors == 1 ? kTilesOfOne.data() : kTilesOfTwo.data())[pixels - 1](t);
}

// Output pixels of one row in tiles of nearly the same width.
void RunRow(Tile t, int vectors, int64_t pixels) {
  int64_t tiles = CeilDiv(pixels, kPixels[vectors]);
  for (int64_t n = 0; n < tiles; ++n) {
    int64_t p = pixels / tiles + (n < pixels % tiles);
    Run(t, vectors, p);
    t.x += p * t.step;
    t.out += p * t.out_step;
  }
}

// Rows of output pixels, `x_row` and `out_row` floats apart. Tiles go on from row to row where they would be narrow otherwise.
void RunRows(const Tile& t, int vectors, int64_t rows, int64_t pixels, int64_t x_row, int64_t out_row) {
  const int64_t most = kPixels[vectors], tiles = CeilDiv(rows * pixels, most);
  const bool goes_on = most <= kApart && pixels >= most && tiles < rows * CeilDiv(pixels, most);
  for (int64_t row = 0; row < rows && !goes_on; ++row) {
    Tile of_row = t;
    of_row.x += row * x_row;
    of_row.out += row * out_row;
    RunRow(of_row, vectors, pixels);
  }
  for (int64_t n = 0, pixel = 0; n < tiles && goes_on; ++n) {
    const int64_t p = rows * pixels / tiles + (n < rows * pixels % tiles), row = pixel / pixels, column = pixel % pixels;
    Tile tile = t;
    tile.x += row * x_row + column * t.step;
    tile.out += row * out_row + column * t.out_step;
    tile.split = pixels - column;
    tile.gap = x_row - pixels * t.step;
    tile.out_gap = out_row - pixels * t.out_step;
    Run(tile, vectors, p);
    pixel += p;
  }
}

// The same, where there are many weights: all rows take some of them before others come, and sums wait in the results.
void RunParts(Tile t, int vectors, int64_t rows, int64_t pixels, int64_t x_row, int64_t out_row) {
  const int64_t wide = vectors * kLanes, kernel_rows = t.rows, run = t.run;
  if (t.channels < wide) return RunRows(t, vectors, rows, pixels, x_row, out_row);  // sums are stored as whole vectors
  const int64_t parts = CeilDiv(run * wide, kNear), together = std::max<int64_t>(kNear / (run * wide), 1);
  const Tile whole = t;
  for (int64_t r = 0; r < kernel_rows; r += together)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t j = part * run / parts;
      t.rows = std::min(together, kernel_rows - r);
      t.run = (part + 1) * run / parts - j;
      t.adds = r + part > 0;
      t.slope = r + t.rows == kernel_rows && part + 1 == parts ? whole.slope : 1.0f;
      t.weights = whole.weights + (r * run + j) * wide;
      t.x = whole.x + r * t.row + j;
      RunRows(t, vectors, rows, pixels, x_row, out_row);
    }
}

struct Block {
  int64_t channel;  // the first of its output channels
  int vectors;
  int64_t offset;   // floats before it in the packed weights, for one row of [run]
};

std::vector<Block> Blocks(int64_t channels) {
  std::vector<Block> blocks;
  for (int64_t c = 0; c < channels;) {
    int vectors = channels - c > kLanes ? kVectors : 1;
    blocks.push_back({c, vectors, c});
    c += vectors * kLanes;
  }
  return blocks;
}

int64_t Padded(int64_t channels) { return CeilDiv(channels, kLanes) * kLanes; }

// Weights `[rows, run, channels]`, of which rows and columns are chosen by `at(row, column)`, block after block.
template <typename At>
void Pack(const std::vector<Block>& blocks, int64_t rows, int64_t columns, int64_t in, int64_t out, At at, float* to) {
  for (const Block& block : blocks) {
    int64_t width = block.vectors * kLanes, there = std::min(width, out - block.channel);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t s = 0; s < columns; ++s) {
        const float* from = at(r, s) + block.channel;
        for (int64_t i = 0; i < in; ++i, from += out, to += width) {
          std::memcpy(to, from, there * sizeof(float));
          std::memset(to + there, 0, (width - there) * sizeof(float));
        }
      }
  }
}

std::vector<float> PaddedBias(const float* bias, int64_t size, int64_t channels) {
  std::vector<float> padded(size ? Padded(channels) : 0, 0.0f);
  std::copy(bias, bias + size, padded.begin());
  return padded;
}

Image ImageOf(const Buffer& x, const Buffer& activated, float slope) {
  auto d = x.dimensions();
  return {x.typed_data(), activated.element_count() ? activated.typed_data() : nullptr, slope, d[1], d[2], d[3]};
}

int64_t BandRows(int64_t height, int64_t width) { return std::min(height, CeilDiv(kBandPixels, width)); }

// ---- Winograd, tiles of 4x4 input and 2x2 output pixels ----

bool ByWinograd(int64_t kh, int64_t kw, int64_t stride, int64_t in, int64_t out) {
  return kh == 3 && kw == 3 && stride == 1 && in % kLanes == 0 && out % kLanes == 0;
}

// B^T d: four values a column of a tile become four, for the columns and then for the rows.
template <typename T>
inline void TransformInput(const T (&d)[4], T (&to)[4]) {
  to[0] = d[0] - d[2];
  to[1] = d[1] + d[2];
  to[2] = d[2] - d[1];
  to[3] = d[1] - d[3];
}

// A^T m
template <typename T>
inline void TransformOutput(const T (&m)[4], T (&to)[2]) {
  to[0] = m[0] + m[1] + m[2];
  to[1] = m[1] - m[2] - m[3];
}

// A g, the transpose of TransformOutput.
template <typename T>
inline void SpreadOutput(const T (&g)[2], T (&to)[4]) {
  to[0] = g[0];
  to[1] = g[0] + g[1];
  to[2] = g[0] - g[1];
  to[3] = -g[1];
}

// Floats from one of 16 planes of so many values to the next: an odd number of cache lines, so that no two share cache sets.
int64_t Plane(int64_t size) { return (CeilDiv(size, 16) | 1) * 16; }

// `[2 rows + 2, 2 columns + 2, channels]` to 16 planes of `[rows columns, channels]`.
void InputTiles(const float* x, int64_t rows, int64_t columns, int64_t channels, float* to) {
  const int64_t row = (2 * columns + 2) * channels, plane = Plane(rows * columns * channels);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; c += kLanes) {
      const float* from = x + 2 * r * row + c;
      float* out = to + r * columns * channels + c;
      Vec v[4][4];
      auto column = [&](int64_t n, Vec(&transformed)[4]) {
        Vec d[4];
        for (int i = 0; i < 4; ++i) d[i] = Load(from + i * row + n * channels);
        TransformInput(d, transformed);
      };
      column(0, v[0]);
      column(1, v[1]);
      for (int64_t t = 0; t < columns; ++t, out += channels) {
        column(2 * t + 2, v[2]);
        column(2 * t + 3, v[3]);
        for (int i = 0; i < 4; ++i) {
          Vec d[4] = {v[0][i], v[1][i], v[2][i], v[3][i]}, transformed[4];
          TransformInput(d, transformed);
          for (int j = 0; j < 4; ++j) Store(out + (4 * i + j) * plane, transformed[j]);
          v[0][i] = v[2][i];
          v[1][i] = v[3][i];
        }
      }
    }
}

// `[2 rows, 2 columns, channels]` of a gradient, of which `width` channels count, to 16 planes of `[rows columns, width]`.
void GradientTiles(const float* g, int64_t rows, int64_t columns, int64_t channels, int64_t width, float* to) {
  const int64_t plane = Plane(rows * columns * width);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t t = 0; t < columns; ++t)
      for (int64_t c = 0; c < width; c += kLanes) {
        const float* from = g + (2 * r * 2 * columns + 2 * t) * channels + c;
        float* out = to + (r * columns + t) * width + c;
        Vec half[2][4];
        for (int j = 0; j < 2; ++j) {
          Vec d[2] = {Load(from + j * channels), Load(from + (2 * columns + j) * channels)};
          SpreadOutput(d, half[j]);
        }
        for (int i = 0; i < 4; ++i) {
          Vec d[2] = {half[0][i], half[1][i]}, transformed[4];
          SpreadOutput(d, transformed);
          for (int j = 0; j < 4; ++j) Store(out + (4 * i + j) * plane, transformed[j]);
        }
      }
}

// G w G^T of weights `[3, 3, in, out]`: for each block `[16, in, its width]`.
std::vector<float> TransformWeights(const std::vector<Block>& blocks, const float* w, int64_t in, int64_t out) {
  std::vector<float> to(16 * in * out);
  auto transform = [](const Vec(&g)[3], Vec(&u)[4]) {
    Vec sum = 0.5f * (g[0] + g[2]), half = 0.5f * g[1];
    u[0] = g[0];
    u[1] = sum + half;
    u[2] = sum - half;
    u[3] = g[2];
  };
  for (const Block& block : blocks)
    for (int64_t i = 0; i < in; ++i)
      for (int64_t c = 0; c < block.vectors * kLanes; c += kLanes) {
        Vec columns[3][4];
        for (int s = 0; s < 3; ++s) {
          Vec g[3];
          for (int r = 0; r < 3; ++r) g[r] = Load(w + ((3 * r + s) * in + i) * out + block.channel + c);
          transform(g, columns[s]);
        }
        for (int r = 0; r < 4; ++r) {
          Vec g[3] = {columns[0][r], columns[1][r], columns[2][r]}, u[4];
          transform(g, u);
          for (int s = 0; s < 4; ++s)
            Store(to.data() + 16 * in * block.channel + ((4 * r + s) * in + i) * block.vectors * kLanes + c, u[s]);
        }
      }
  return to;
}

int64_t EvenBand(int64_t height, int64_t width) { return (BandRows(height, width) + 1) / 2 * 2; }

ffi::Error Winograd(ffi::ThreadPool& pool, const Image& image, int64_t images, const float* weights, const float* bias,
                    float slope, int64_t out, float* y) {
  const int64_t in = image.channels, height = image.height, width = image.width;
  const auto blocks = Blocks(out);
  const auto transformed = TransformWeights(blocks, weights, in, out);
  const int64_t band = EvenBand(height, width), bands = CeilDiv(height, band), columns = CeilDiv(width, 2);
  ParallelFor(pool, images * bands, [&](int64_t item) {
    const int64_t b = item / bands, first = item % bands * band, rows = std::min(band, height - first);
    const int64_t tile_rows = CeilDiv(rows, 2), tiles = tile_rows * columns;
    float* padded = Scratch(0, (2 * tile_rows + 2) * (2 * columns + 2) * in);
    float* v = Scratch(1, 16 * Plane(tiles * in));
    float* m = Scratch(2, 16 * Plane(tiles * kVectors * kLanes));
    CopyPadded(image, b, first - 1, 2 * tile_rows + 2, -1, 2 * columns + 2, padded);
    InputTiles(padded, tile_rows, columns, in, v);
    for (const Block& block : blocks) {
      const int64_t wide = block.vectors * kLanes, plane = Plane(tiles * wide);
      for (int64_t k = 0; k < 16; ++k)
        RunRow({v + k * Plane(tiles * in), 0, in, 1, in, transformed.data() + 16 * in * block.channel + k * in * wide, nullptr,
                1.0f, false, m + k * plane, wide, wide},
               block.vectors, tiles);
      for (int64_t t = 0; t < tiles; ++t)
        for (int64_t c = 0; c < wide; c += kLanes) {
          Vec half[2][4], offset = bias ? Load(bias + block.channel + c) : Vec{};
          for (int j = 0; j < 4; ++j) {
            Vec d[4], sums[2];
            for (int i = 0; i < 4; ++i) d[i] = Load(m + (4 * i + j) * plane + t * wide + c);
            TransformOutput(d, sums);
            half[0][j] = sums[0];
            half[1][j] = sums[1];
          }
          const int64_t row = 2 * (t / columns), column = 2 * (t % columns);
          for (int i = 0; i < 2 && row + i < rows; ++i) {
            Vec sums[2];
            TransformOutput(half[i], sums);
            float* to = y + ((b * height + first + row + i) * width + column) * out + block.channel + c;
            for (int j = 0; j < 2 && column + j < width; ++j) {
              Vec value = sums[j] + offset;
              if (slope != 1.0f) value = value >= 0.0f ? value : slope * value;
              Store(to + j * out, value);
            }
          }
        }
    }
  });
  return ffi::Error::Success();
}

ffi::Error Convolve(ffi::ThreadPool pool, Buffer x, Buffer activated, Buffer weights, Buffer bias, int64_t stride,
                    int64_t padding, float slope, Result y) {
  const Image image = ImageOf(x, activated, slope);
  auto k = weights.dimensions(), d = y->dimensions();
  const int64_t kh = k[0], kw = k[1], in = k[2], out = k[3], height = d[1], width = d[2];
  const float after = image.activated ? 1.0f : slope;
  if (ByWinograd(kh, kw, stride, in, out))
    return Winograd(pool, image, d[0], weights.typed_data(), bias.element_count() ? bias.typed_data() : nullptr, after,
                    out, y->typed_data());
  const auto blocks = Blocks(out);
  const float* w = weights.typed_data();
  std::vector<float> packed;
  if (blocks.size() > 1 || out % kLanes) {
    packed.resize(kh * kw * in * Padded(out));
    Pack(blocks, kh, kw, in, out, [&](int64_t r, int64_t s) { return w + (r * kw + s) * in * out; }, packed.data());
    w = packed.data();
  }
  const auto offsets = PaddedBias(bias.typed_data(), bias.element_count(), out);
  const int64_t band = BandRows(height, width), bands = CeilDiv(height, band), columns = (width - 1) * stride + kw;
  ParallelFor(pool, d[0] * bands, [&](int64_t item) {
    int64_t b = item / bands, first = item % bands * band, rows = std::min(band, height - first);
    int64_t padded_rows = (rows - 1) * stride + kh;
    float* scratch = Scratch(0, padded_rows * columns * in);
    CopyPadded(image, b, first * stride - padding, padded_rows, -padding, columns, scratch);
    for (const Block& block : blocks) {
      Tile tile{scratch, columns * in, stride * in, kh, kw * in, w + block.offset * kh * kw * in,
                offsets.empty() ? nullptr : offsets.data() + block.channel, after, false,
                y->typed_data() + (b * height + first) * width * out + block.channel, out, out - block.channel};
      RunParts(tile, block.vectors, rows, width, stride * columns * in, width * out);
    }
  });
  return ffi::Error::Success();
}

// Transposed 4x4 convolution of stride 2: each of the four phases of the output is a 2x2 convolution.
ffi::Error Double(ffi::ThreadPool pool, Buffer x, Buffer activated, Buffer weights, Buffer bias, float slope, Result y) {
  const Image image = ImageOf(x, activated, slope);
  const int64_t height = image.height, width = image.width, in = image.channels, out = weights.dimensions()[3];
  const auto blocks = Blocks(out);
  const int64_t phase_size = 4 * in * Padded(out);
  std::vector<float> packed(4 * phase_size);
  for (int phase = 0; phase < 4; ++phase)
    Pack(blocks, 2, 2, in, out,
         [&](int64_t r, int64_t s) {
           return weights.typed_data() + ((phase / 2 + 2 * r) * 4 + phase % 2 + 2 * s) * in * out;
         },
         packed.data() + phase * phase_size);
  const auto offsets = PaddedBias(bias.typed_data(), bias.element_count(), out);
  const float after = image.activated ? 1.0f : slope;
  const int64_t band = BandRows(height, 2 * width), bands = CeilDiv(height, band), columns = width + 2;
  ParallelFor(pool, x.dimensions()[0] * bands, [&](int64_t item) {
    int64_t b = item / bands, first = item % bands * band, rows = std::min(band, height - first);
    float* scratch = Scratch(0, (rows + 2) * columns * in);
    CopyPadded(image, b, first - 1, rows + 2, -1, columns, scratch);
    for (const Block& block : blocks)
      for (int64_t phase = 0; phase < 4; ++phase) {
        const int64_t r = phase / 2, s = phase % 2;
        Tile tile{scratch + (r * columns + s) * in, columns * in, in, 2, 2 * in,
                  packed.data() + phase * phase_size + block.offset * 4 * in,
                  offsets.empty() ? nullptr : offsets.data() + block.channel, after, false,
                  y->typed_data() + ((2 * (b * height + first) + r) * 2 * width + s) * out + block.channel, 2 * out,
                  out - block.channel};
        RunParts(tile, block.vectors, rows, width, columns * in, 4 * width * out);
      }
  });
  return ffi::Error::Success();
}

// ---- Filter gradient ----

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

// Adds a band's products of transformed tiles to `sum`, `[16, in, out]`, and its gradient to `bias`.
void AddTiles(const Image& image, const Image& gradient, const std::vector<Block>& blocks, int64_t b, int64_t first,
              int64_t rows, float* sum, float* bias) {
  const int64_t in = image.channels, out = gradient.channels, columns = CeilDiv(gradient.width, 2);
  const int64_t tile_rows = CeilDiv(rows, 2), tiles = tile_rows * columns;
  float* v = Scratch(1, 16 * Plane(tiles * in));
  float* m = Scratch(2, 16 * Plane(tiles * kVectors * kLanes));
  float* padded = Scratch(0, std::max((2 * tile_rows + 2) * (2 * columns + 2) * in, 4 * tiles * out));
  CopyPadded(image, b, first - 1, 2 * tile_rows + 2, -1, 2 * columns + 2, padded);
  InputTiles(padded, tile_rows, columns, in, v);
  CopyPadded(gradient, b, first, 2 * tile_rows, 0, 2 * columns, padded);
  AddPixels(padded, 4 * tiles, out, bias);
  for (const Block& block : blocks) {
    const int64_t wide = block.vectors * kLanes;
    GradientTiles(padded + block.channel, tile_rows, columns, out, wide, m);
    for (int64_t k = 0; k < 16; ++k)
      RunOuters({v + k * Plane(tiles * in), 0, in, m + k * Plane(tiles * wide), 1, tiles,
                 sum + k * in * out + block.channel, out},
                block.vectors, in);
  }
}

// G^T u G of `[16, in, out]`: `[3, 3, in, out]`.
void FiltersOfTiles(const float* u, int64_t in, int64_t out, float* to) {
  const int64_t plane = in * out;
  auto transform = [](const Vec(&d)[4], Vec(&g)[3]) {
    Vec half = 0.5f * (d[1] + d[2]);
    g[0] = d[0] + half;
    g[1] = 0.5f * (d[1] - d[2]);
    g[2] = d[3] + half;
  };
  for (int64_t i = 0; i < plane; i += kLanes) {
    Vec half[4][3];
    for (int s = 0; s < 4; ++s) {
      Vec d[4];
      for (int r = 0; r < 4; ++r) d[r] = Load(u + (4 * r + s) * plane + i);
      transform(d, half[s]);
    }
    for (int r = 0; r < 3; ++r) {
      Vec d[4] = {half[0][r], half[1][r], half[2][r], half[3][r]}, g[3];
      transform(d, g);
      for (int s = 0; s < 3; ++s) Store(to + (3 * r + s) * plane + i, g[s]);
    }
  }
}

// Of y = convolve(x, weights) + bias, given g, the gradient of y. With `exchanged` the leaky ReLU's derivative multiplies
// x instead of g, and the bias's gradient is x's sum: a transposed convolution's gradient is the same with its roles exchanged.
ffi::Error FilterGradient(ffi::ThreadPool pool, Buffer x, Buffer g, Buffer activated, int64_t stride, int64_t padding,
                          float slope, bool exchanged, Result of_weights, Result of_bias) {
  Image image = ImageOf(x, activated, slope), gradient = ImageOf(g, activated, slope);
  (exchanged ? gradient : image).activated = nullptr;
  auto k = of_weights->dimensions();
  const int64_t kh = k[0], kw = k[1], in = k[2], out = k[3], height = gradient.height, width = gradient.width;
  const bool winograd = ByWinograd(kh, kw, stride, in, out) && !exchanged;
  const int64_t run = kw * in, padded = Padded(out), biases = of_bias->element_count();
  const int64_t size = winograd ? 16 * in * out : kh * run * padded;
  const auto blocks = Blocks(out);
  const int64_t band = winograd ? EvenBand(height, width) : BandRows(height, width), bands = CeilDiv(height, band);
  const int64_t columns = (width - 1) * stride + kw;
  const int64_t total = g.dimensions()[0] * bands;
  // Sums of fixed parts in a fixed order, so that the result does not depend on the threads.
  const int64_t parts = std::min(total, std::clamp<int64_t>((1 << 18) / size, 4, 32));
  std::vector<float> sums(parts * (size + biases), 0.0f);
  ParallelFor(pool, parts, [&](int64_t part) {
    float *sum = sums.data() + part * (size + biases), *bias = sum + size;
    for (int64_t item = part * total / parts; item < (part + 1) * total / parts; ++item) {
      int64_t b = item / bands, first = item % bands * band, rows = std::min(band, height - first);
      if (winograd) {
        float* band_bias = Scratch(3, biases);
        std::fill(band_bias, band_bias + biases, 0.0f);
        AddTiles(image, gradient, blocks, b, first, rows, sum, band_bias);
        for (int64_t c = 0; c < biases; ++c) bias[c] += band_bias[c];
        continue;
      }
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
  std::vector<float> weights(size + biases, 0.0f);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t i = 0; i < size + biases; ++i) weights[i] += sums[part * (size + biases) + i];
  if (winograd)
    FiltersOfTiles(weights.data(), in, out, of_weights->typed_data());
  else
    for (int64_t i = 0; i < kh * run; ++i)
      std::copy_n(weights.data() + i * padded, out, of_weights->typed_data() + i * out);
  std::copy_n(weights.data() + size, biases, of_bias->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(steel_ad_convolve, Convolve,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("padding")
                                  .Attr<float>("slope")
                                  .Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(steel_ad_double, Double,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Attr<float>("slope")
                                  .Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(steel_ad_filter_gradient, FilterGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("padding")
                                  .Attr<float>("slope")
                                  .Attr<bool>("exchanged")
                                  .Ret<Buffer>()
                                  .Ret<Buffer>());
