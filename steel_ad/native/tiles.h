// What every convolution here is made of: images that are copied with their padding, and tiles of P output pixels by V vectors of
// output channels.
//
// A tile stays in registers while it runs over the kernel: every weight vector that is loaded serves P pixels, every input value
// that is broadcast serves V vectors. For a row of the kernel, its columns and the input channels are one contiguous run of the
// padded input, so the innermost loop knows nothing of either.

#ifndef STEEL_AD_NATIVE_TILES_H_
#define STEEL_AD_NATIVE_TILES_H_

#include <array>
#include <utility>

#include "common.h"

namespace {

constexpr int kVectors = 2;                         // most vectors of output channels in a tile
constexpr int kPixels[] = {0, kRegisters == 32 ? 14 : 12, kRegisters / 2 - 2};  // most pixels of a tile of one and two vectors
constexpr int kApart = 6;                           // most pixels of a tile that may go on in the next row: each has an address
constexpr int kBandPixels = 128;                    // pixels of a band, whose input is copied and stays in caches
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
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec value = Load(from + i);
    Store(to + i, Load(of + i) >= 0.0f ? value : slope * value);
  }
  for (; i < n; ++i) to[i] = of[i] >= 0.0f ? from[i] : slope * from[i];
}

// Adds `n` pixels of `channels` values each to `sum`.
inline void AddPixels(const float* __restrict from, int64_t n, int64_t channels, float* __restrict sum) {
  if (channels % kLanes == 0) {
    for (int64_t c = 0; c < channels; c += kLanes) {
      Vec total = Load(sum + c);
      for (int64_t p = 0; p < n; ++p) total += Load(from + p * channels + c);
      Store(sum + c, total);
    }
    return;
  }
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

int64_t BandRows(int64_t height, int64_t width) {
  return std::max<int64_t>(std::min(height, CeilDiv(kBandPixels, std::max<int64_t>(width, 1))), 1);
}

}  // namespace

#endif  // STEEL_AD_NATIVE_TILES_H_
