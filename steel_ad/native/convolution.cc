// Convolutions of float32 images, channels last, as XLA custom calls: forward, to twice the size, and filter gradients.
//
// A tile of P output pixels by V vectors of output channels stays in registers while it runs over the kernel: every weight
// vector that is loaded serves P pixels, every input value that is broadcast serves V vectors. For a row of the kernel,
// its columns and the input channels are one contiguous run of the padded input, so the innermost loop knows nothing of
// either. Filter gradients are the same with pixels and channels exchanged. Bias and leaky ReLU, and the latter's
// derivative in the gradients, are applied while values are in registers or being copied anyway.
//
// With whole vectors of channels, Winograd's minimal filtering (Lavin & Gray 2016): a 3x3 convolution of stride 1 by F(2x2, 3x3),
// 16 products for four output pixels instead of 36; a 4x4 one of stride 2, which is a 2x2 one over blocks of 2x2 pixels, and the
// four phases of its transpose, which are 2x2 ones over pixels, by F(2x2, 2x2), 9 products instead of 16. Each of them is a
// matrix product over the channels of the tiles of a band.

#include <array>
#include <utility>

#include "common.h"

namespace {

constexpr int kVectors = 2;                         // most vectors of output channels in a tile
constexpr int kPixels[] = {0, kRegisters == 32 ? 14 : 12, kRegisters / 2 - 2};  // most pixels of a tile of one and two vectors
constexpr int kApart = 6;                           // most pixels of a tile that may go on in the next row: each has an address
constexpr int kTaps = kRegisters == 32 ? 12 : 6;    // most rows of a filter gradient in a tile
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

int64_t BandRows(int64_t height, int64_t width) {
  return std::max<int64_t>(std::min(height, CeilDiv(kBandPixels, std::max<int64_t>(width, 1))), 1);
}

// ---- Winograd, tiles of 2x2 output pixels ----

enum class Form { kDirect, kOfThree, kOfBlocks };

Form FormOf(int64_t kh, int64_t kw, int64_t stride, int64_t in, int64_t out) {
  if (in % kLanes || out % kLanes || kh != kw) return Form::kDirect;
  return kh == 3 && stride == 1 ? Form::kOfThree : kh == 4 && stride == 2 ? Form::kOfBlocks : Form::kDirect;
}

// Along one axis, N values become M.
template <int N, int M>
using Transform = void(const Vec (&)[N], Vec (&)[M]);

// B^T d of F(2x2, 3x3)
inline void OfPixels(const Vec (&d)[4], Vec (&to)[4]) {
  to[0] = d[0] - d[2];
  to[1] = d[1] + d[2];
  to[2] = d[2] - d[1];
  to[3] = d[1] - d[3];
}

// A^T m
inline void ToPixels(const Vec (&m)[4], Vec (&to)[2]) {
  to[0] = m[0] + m[1] + m[2];
  to[1] = m[1] - m[2] - m[3];
}

// A g, its transpose.
inline void OfGradient(const Vec (&g)[2], Vec (&to)[4]) {
  to[0] = g[0];
  to[1] = g[0] + g[1];
  to[2] = g[0] - g[1];
  to[3] = -g[1];
}

// G w
inline void OfFilter(const Vec (&w)[3], Vec (&to)[4]) {
  const Vec sum = 0.5f * (w[0] + w[2]), half = 0.5f * w[1];
  to[0] = w[0];
  to[1] = sum + half;
  to[2] = sum - half;
  to[3] = w[2];
}

// G^T u
inline void ToFilter(const Vec (&u)[4], Vec (&to)[3]) {
  const Vec half = 0.5f * (u[1] + u[2]);
  to[0] = u[0] + half;
  to[1] = 0.5f * (u[1] - u[2]);
  to[2] = u[3] + half;
}

// B^T d of F(2x2, 2x2)
inline void OfBlocks(const Vec (&d)[3], Vec (&to)[3]) {
  to[0] = d[0] - d[1];
  to[1] = d[1];
  to[2] = d[2] - d[1];
}

// The same of both phases of a transposed convolution, which begin at the first and the second value; to[2] has the wrong sign
// for the second.
inline void OfPhases(const Vec (&d)[4], Vec (&to)[5]) {
  to[0] = d[0] - d[1];
  to[1] = d[1];
  to[2] = d[2] - d[1];
  to[3] = d[2];
  to[4] = d[3] - d[2];
}

// A^T m, and G^T u.
inline void Fold(const Vec (&m)[3], Vec (&to)[2]) {
  to[0] = m[0] + m[1];
  to[1] = m[1] + m[2];
}

// A g, and G w.
inline void Spread(const Vec (&g)[2], Vec (&to)[3]) {
  to[0] = g[0];
  to[1] = g[0] + g[1];
  to[2] = g[1];
}

// Floats from one plane of so many values to the next: an odd number of cache lines, so that no two share cache sets.
int64_t Plane(int64_t size) { return (CeilDiv(size, 16) | 1) * 16; }

struct Tiles {
  int64_t rows, columns;
  int64_t count() const { return rows * columns; }
};

// Tiles of N x N values that begin every two rows and columns, to M x M planes; `row` and `column` floats lie between theirs in x,
// `step` between two tiles in a plane. Each value is one of `size` that lie beside each other.
template <int N, int M, Transform<N, M> F>
void TransformTiles(const float* x, int64_t row, int64_t column, int64_t size, const Tiles& tiles, float* to, int64_t step,
                    int64_t plane) {
  for (int64_t r = 0; r < tiles.rows; ++r)
    for (int64_t c = 0; c < size; c += kLanes) {
      const float* from = x + 2 * r * row + c;
      float* out = to + r * tiles.columns * step + c;
      Vec v[N][M];
      auto transform = [&](int64_t n, Vec(&transformed)[M]) {
        Vec d[N];
        for (int i = 0; i < N; ++i) d[i] = Load(from + i * row + n * column);
        F(d, transformed);
      };
      for (int n = 0; n < N - 2; ++n) transform(n, v[n]);
      for (int64_t t = 0; t < tiles.columns; ++t, out += step) {
        transform(2 * t + N - 2, v[N - 2]);
        transform(2 * t + N - 1, v[N - 1]);
        for (int i = 0; i < M; ++i) {
          Vec d[N], transformed[M];
          for (int n = 0; n < N; ++n) d[n] = v[n][i];
          F(d, transformed);
          for (int j = 0; j < M; ++j) Store(out + (M * i + j) * plane, transformed[j]);
          for (int n = 0; n < N - 2; ++n) v[n][i] = v[n + 2][i];
        }
      }
    }
}

// Tiles of 3x3 blocks of 2x2 pixels, for 2x2 output pixels.
void BlockTiles(const float* x, int64_t channels, const Tiles& tiles, float* to, int64_t plane) {
  const int64_t pair = 2 * channels, row = (2 * tiles.columns + 1) * pair;
  for (int64_t q = 0; q < 2; ++q)
    TransformTiles<3, 3, OfBlocks>(x + q * row, 2 * row, pair, pair, tiles, to + q * pair, 2 * pair, plane);
}

// The i-th of the `4 in` inputs of block (r, s), among those of a 4x4 kernel, `[4, 4, in]`.
int64_t RowOfBlocks(int64_t r, int64_t s, int64_t i, int64_t in) {
  const int64_t row = 2 * r + i / (2 * in), column = 2 * s + i / in % 2;
  return (4 * row + column) * in + i % in;
}

constexpr int64_t kRows = 32;  // of a filter's inputs, that are transformed by one piece of work

// Rows `first` to `end - 1` of filters `[N, N, size, out]` to `[M, M, size, width]`; `at(r, s, i)` is where row i of the filter's
// element (r, s) begins. `negative`: elements (0, *) and (*, 0) change their sign.
template <int N, int M, Transform<N, M> F, typename At>
void TransformFilter(int64_t first, int64_t end, int64_t size, int64_t width, At at, float* to, const bool (&negative)[2] = {}) {
  for (int64_t i = first; i < end; ++i) {
    const float* from[N][N];
    for (int r = 0; r < N; ++r)
      for (int s = 0; s < N; ++s) from[r][s] = at(r, s, i);
    for (int64_t c = 0; c < width; c += kLanes) {
      Vec columns[N][M];
      for (int s = 0; s < N; ++s) {
        Vec w[N];
        for (int r = 0; r < N; ++r) w[r] = Load(from[r][s] + c);
        F(w, columns[s]);
      }
      for (int r = 0; r < M; ++r) {
        Vec w[N], u[M];
        for (int s = 0; s < N; ++s) w[s] = columns[s][r];
        F(w, u);
        for (int s = 0; s < M; ++s) {
          const bool changes = (negative[0] && r == 0) != (negative[1] && s == 0);
          Store(to + ((M * r + s) * size + i) * width + c, changes ? -u[s] : u[s]);
        }
      }
    }
  }
}

// Where tiles of 2x2 pixels are written: floats between two rows and two pixels, and how many of them there are.
struct Target {
  float* to;
  int64_t row, pixel, rows, width;
};

// N x N planes `[tiles, wide]` to 2x2 pixels a tile, with bias and leaky ReLU.
template <int N, Transform<N, 2> F>
void WriteTiles(const float* m, int64_t plane, const Tiles& tiles, int64_t wide, const float* bias, float slope, Target target) {
  const int64_t rows = tiles.rows, columns = tiles.columns;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t t = 0; t < columns; ++t, m += wide) {
      const int64_t below = std::min<int64_t>(2, target.rows - 2 * r), beside = std::min<int64_t>(2, target.width - 2 * t);
      float* to = target.to + 2 * r * target.row + 2 * t * target.pixel;
      for (int64_t c = 0; c < wide; c += kLanes) {
        Vec half[2][N], offset = bias ? Load(bias + c) : Vec{};
        for (int j = 0; j < N; ++j) {
          Vec d[N], sums[2];
          for (int i = 0; i < N; ++i) d[i] = Load(m + (N * i + j) * plane + c);
          F(d, sums);
          half[0][j] = sums[0];
          half[1][j] = sums[1];
        }
        for (int64_t i = 0; i < below; ++i) {
          Vec sums[2];
          F(half[i], sums);
          for (int64_t j = 0; j < beside; ++j) {
            Vec value = sums[j] + offset;
            if (slope != 1.0f) value = value >= 0.0f ? value : slope * value;
            Store(to + i * target.row + j * target.pixel + c, value);
          }
        }
      }
    }
}

int64_t EvenBand(int64_t height, int64_t width) { return (BandRows(height, width) + 1) / 2 * 2; }

// A band of output pixels of one image, in tiles.
struct Band {
  int64_t image, first, rows;
  Tiles tiles;
};

Band BandOf(int64_t item, int64_t height, int64_t width) {
  const int64_t band = EvenBand(height, width), bands = CeilDiv(height, band), first = item % bands * band;
  const int64_t rows = std::min(band, height - first);
  return {item / bands, first, rows, {CeilDiv(rows, 2), CeilDiv(width, 2)}};
}

int64_t BandsOf(int64_t height, int64_t width) { return CeilDiv(height, EvenBand(height, width)); }

// Floats of what a band's tiles need of an image, padded.
int64_t PaddedSize(Form form, const Tiles& tiles, int64_t channels) {
  const int64_t pixels = form == Form::kOfBlocks ? 4 * (2 * tiles.rows + 1) * (2 * tiles.columns + 1)
                                                 : (2 * tiles.rows + 2) * (2 * tiles.columns + 2);
  return pixels * channels;
}

// The tiles of a band, `[9 or 16, tiles, channels of a tile's pixel]`: of a 4x4 kernel 4 times the image's, of a 3x3 one as many.
void InputTiles(Form form, const Image& image, const Band& band, float* padded, float* to, int64_t plane) {
  const Tiles& tiles = band.tiles;
  if (form == Form::kOfBlocks) {
    CopyPadded(image, band.image, 2 * band.first - 1, 4 * tiles.rows + 2, -1, 4 * tiles.columns + 2, padded);
    return BlockTiles(padded, image.channels, tiles, to, plane);
  }
  const int64_t columns = 2 * tiles.columns + 2, c = image.channels;
  CopyPadded(image, band.image, band.first - 1, 2 * tiles.rows + 2, -1, columns, padded);
  TransformTiles<4, 4, OfPixels>(padded, columns * c, c, c, tiles, to, c, plane);
}

// Bands whose tiles are multiplied together, so that weights are loaded for no fewer than half of kBandPixels.
struct Group {
  int64_t begin, end, tiles;
};

class Groups {
 public:
  Groups(int64_t images, int64_t height, int64_t width, int64_t tiles)
      : height_(height), width_(width), bands_(images * BandsOf(height, width)),
        together_(std::max<int64_t>(tiles / std::max<int64_t>(BandOf(0, height, width).tiles.count(), 1), 1)) {}
  int64_t bands() const { return bands_; }
  int64_t count() const { return CeilDiv(bands_, together_); }
  // Of those that end before `end`, that which begins with band `begin`.
  Group From(int64_t begin, int64_t end) const {
    Group group{begin, std::min(begin + together_, end), 0};
    for (int64_t i = group.begin; i < group.end; ++i) group.tiles += BandOf(i, height_, width_).tiles.count();
    return group;
  }
  Group operator[](int64_t i) const { return From(i * together_, bands_); }

 private:
  int64_t height_, width_, bands_, together_;
};

constexpr int64_t kTiles = kBandPixels / 4;  // of a group, unless one band has more

ffi::Error Winograd(ffi::ThreadPool& pool, Form form, const Image& image, int64_t images, int64_t height, int64_t width,
                    const float* weights, const float* bias, float slope, int64_t out, float* y) {
  const bool of_blocks = form == Form::kOfBlocks;
  const int64_t in = image.channels, size = of_blocks ? 4 * in : in, planes = of_blocks ? 9 : 16, pieces = CeilDiv(size, kRows);
  const auto blocks = Blocks(out);
  const Memory transformed = Allocate(planes * size * out);
  ParallelFor(pool, blocks.size() * pieces, [&](int64_t item) {
    const Block& block = blocks[item / pieces];
    const int64_t wide = block.vectors * kLanes, first = item % pieces * kRows, end = std::min(first + kRows, size);
    float* to = transformed.get() + planes * size * block.channel;
    const float* from = weights + block.channel;
    if (of_blocks)
      TransformFilter<2, 3, Spread>(
          first, end, size, wide, [&](int r, int s, int64_t i) { return from + RowOfBlocks(r, s, i, in) * out; }, to);
    else
      TransformFilter<3, 4, OfFilter>(
          first, end, size, wide, [&](int r, int s, int64_t i) { return from + ((3 * r + s) * in + i) * out; }, to);
  });
  const Groups groups(images, height, width, kTiles);
  ParallelFor(pool, groups.count(), [&](int64_t item) {
    const Group group = groups[item];
    const int64_t of_input = Plane(group.tiles * size);
    float* v = Scratch(1, planes * of_input);
    float* m = Scratch(2, planes * Plane(group.tiles * kVectors * kLanes));
    for (int64_t i = group.begin, done = 0; i < group.end; ++i) {
      const Band band = BandOf(i, height, width);
      InputTiles(form, image, band, Scratch(0, PaddedSize(form, band.tiles, in)), v + done * size, of_input);
      done += band.tiles.count();
    }
    for (const Block& block : blocks) {
      const int64_t wide = block.vectors * kLanes, plane = Plane(group.tiles * wide);
      const float* w = transformed.get() + planes * size * block.channel;
      const float* offset = bias ? bias + block.channel : nullptr;
      for (int64_t k = 0; k < planes; ++k)
        RunRow({v + k * of_input, 0, size, 1, size, w + k * size * wide, nullptr, 1.0f, false, m + k * plane, wide, wide},
               block.vectors, group.tiles);
      for (int64_t i = group.begin, done = 0; i < group.end; ++i) {
        const Band band = BandOf(i, height, width);
        float* to = y + (band.image * height + band.first) * width * out + block.channel;
        const Target target{to, width * out, out, band.rows, width};
        if (of_blocks)
          WriteTiles<3, Fold>(m + done * wide, plane, band.tiles, wide, offset, slope, target);
        else
          WriteTiles<4, ToPixels>(m + done * wide, plane, band.tiles, wide, offset, slope, target);
        done += band.tiles.count();
      }
    }
  });
  return ffi::Error::Success();
}

// The transposed 4x4 convolution of stride 2: the four phases share the tiles of their input. Bands are of the input's pixels.
ffi::Error WinogradDouble(ffi::ThreadPool& pool, const Image& image, int64_t images, const float* weights, const float* bias,
                          float slope, int64_t out, float* y) {
  const int64_t in = image.channels, height = image.height, width = image.width, pieces = CeilDiv(in, kRows);
  const auto blocks = Blocks(out);
  const Memory transformed = Allocate(4 * 9 * in * out);  // [blocks, 4, 9, in, wide]
  ParallelFor(pool, blocks.size() * 4 * pieces, [&](int64_t item) {
    const Block& block = blocks[item / pieces / 4];
    const int64_t wide = block.vectors * kLanes, phase = item / pieces % 4, first = item % pieces * kRows;
    TransformFilter<2, 3, Spread>(
        first, std::min(first + kRows, in), in, wide,
        [&](int r, int s, int64_t i) {
          return weights + ((4 * (phase / 2 + 2 * r) + phase % 2 + 2 * s) * in + i) * out + block.channel;
        },
        transformed.get() + (4 * block.channel + phase * wide) * 9 * in, {phase / 2 == 1, phase % 2 == 1});
  });
  const Groups groups(images, height, width, kTiles);
  ParallelFor(pool, groups.count(), [&](int64_t item) {
    const Group group = groups[item];
    const int64_t of_input = Plane(group.tiles * in);
    float* v = Scratch(1, 25 * of_input);
    float* m = Scratch(2, 9 * Plane(group.tiles * kVectors * kLanes));
    for (int64_t i = group.begin, done = 0; i < group.end; ++i) {
      const Band band = BandOf(i, height, width);
      const int64_t columns = 2 * band.tiles.columns + 2;
      float* padded = Scratch(0, PaddedSize(Form::kOfThree, band.tiles, in));
      CopyPadded(image, band.image, band.first - 1, 2 * band.tiles.rows + 2, -1, columns, padded);
      TransformTiles<4, 5, OfPhases>(padded, columns * in, in, in, band.tiles, v + done * in, in, of_input);
      done += band.tiles.count();
    }
    for (const Block& block : blocks)
      for (int64_t phase = 0; phase < 4; ++phase) {
        const int64_t wide = block.vectors * kLanes, plane = Plane(group.tiles * wide), r = phase / 2, s = phase % 2;
        const float* w = transformed.get() + (4 * block.channel + phase * wide) * 9 * in;
        for (int64_t k = 0; k < 9; ++k)
          RunRow({v + (5 * (2 * r + k / 3) + 2 * s + k % 3) * of_input, 0, in, 1, in, w + k * in * wide, nullptr, 1.0f, false,
                  m + k * plane, wide, wide},
                 block.vectors, group.tiles);
        for (int64_t i = group.begin, done = 0; i < group.end; ++i) {
          const Band band = BandOf(i, height, width);
          float* to = y + ((2 * (band.image * height + band.first) + r) * 2 * width + s) * out + block.channel;
          WriteTiles<3, Fold>(m + done * wide, plane, band.tiles, wide, bias ? bias + block.channel : nullptr, slope,
                              {to, 4 * width * out, 2 * out, band.rows, width});
          done += band.tiles.count();
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
  const Form form = FormOf(kh, kw, stride, in, out);
  if (form != Form::kDirect)
    return Winograd(pool, form, image, d[0], height, width, weights.typed_data(),
                    bias.element_count() ? bias.typed_data() : nullptr, after, out, y->typed_data());
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
  const float after = image.activated ? 1.0f : slope;
  if (in % kLanes == 0 && out % kLanes == 0)
    return WinogradDouble(pool, image, x.dimensions()[0], weights.typed_data(),
                          bias.element_count() ? bias.typed_data() : nullptr, after, out, y->typed_data());
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

// e^x to a few units in the last place, for x in [-87, 88] and at these limits beyond.
inline Vec Exp(Vec x) {
  using Lanes = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));
  const Vec least = Vec{} - 87.0f, most = Vec{} + 88.0f;
  x = x < least ? least : x > most ? most : x;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const Vec n = (x * 1.44269504f + kMagic) - kMagic, r = x - n * 0.693145752f - n * 1.42860677e-6f;
  Vec sum = r * (1.0f / 720) + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  const Lanes power = (__builtin_convertvector(n, Lanes) + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &power, sizeof(scale));
  return sum * scale;
}

// The transposed 4x4 convolution of stride 2 to one channel: of each input pixel the products for 4x4 output pixels, which are
// added where they overlap. `logistic`: then 1 / (1 + e^-y), in place of the leaky ReLU.
ffi::Error DoubleToOne(ffi::ThreadPool pool, Buffer x, Buffer activated, Buffer weights, Buffer bias, float slope, bool logistic,
                       Result y) {
  const Image image = ImageOf(x, activated, slope);
  const int64_t height = image.height, width = image.width, in = image.channels;
  const float offset = bias.element_count() ? bias.typed_data()[0] : 0.0f, after = image.activated ? 1.0f : slope;
  const auto blocks = Blocks(16);
  std::vector<float> matrix(in * 16), packed(in * Padded(16));
  for (int64_t i = 0; i < in; ++i)
    for (int64_t tap = 0; tap < 16; ++tap) matrix[i * 16 + tap] = weights.typed_data()[(15 - tap) * in + i];
  Pack(blocks, 1, 1, in, 16, [&](int64_t, int64_t) { return matrix.data(); }, packed.data());
  // Bands of one height; of their products, 64 bytes an input pixel, 128 KiB.
  const int64_t most = std::max<int64_t>(2048 / std::max<int64_t>(width, 1) - 2, 4), bands = CeilDiv(height, most);
  ParallelFor(pool, x.dimensions()[0] * bands, [&](int64_t item) {
    const int64_t b = item / bands, part = item % bands, first = part * height / bands;
    const int64_t rows = (part + 1) * height / bands - first;
    float* products = Scratch(1, (rows + 2) * width * 16);  // [rows + 2, width, 4, 4]
    float* sums = Scratch(2, (width + 2) * 4 + 2 * width + kLanes);
    float* line = sums + (width + 2) * 4;
    for (int64_t r = 0; r < rows + 2; ++r) {
      const int64_t row = first - 1 + r;
      float* to = products + r * width * 16;
      if (row < 0 || row >= height) {
        std::memset(to, 0, width * 16 * sizeof(float));
        continue;
      }
      const int64_t at = (b * height + row) * width * in;
      const float* from = image.data + at;
      if (image.activated) {
        float* copied = Scratch(0, width * in);
        CopyRun(image, at, width * in, copied);
        from = copied;
      }
      for (const Block& block : blocks)
        RunRow({from, 0, in, 1, in, packed.data() + block.offset * in, nullptr, 1.0f, false, to + block.channel, 16,
                16 - block.channel},
               block.vectors, width);
    }
    std::memset(sums, 0, (width + 2) * 4 * sizeof(float));
    for (int64_t r = 0; r < 2 * rows; ++r) {
      // Output row 2 m is row 1 of pixel row m's products and row 3 of the one's above, 2 m + 1 is row 2 and row 0 of the one's below.
      const int64_t m = r / 2 + 1, odd = r % 2;
      const float* here = products + m * width * 16 + (1 + odd) * 4;
      const float* there = products + (odd ? m + 1 : m - 1) * width * 16 + (odd ? 0 : 3) * 4;
      for (int64_t c = 0; c < width; ++c)
        for (int64_t j = 0; j < 4; ++j) sums[4 * (c + 1) + j] = here[16 * c + j] + there[16 * c + j];
      for (int64_t c = 0; c < width; ++c) {
        const float* at = sums + 4 * (c + 1);
        line[2 * c] = at[1] + at[-1] + offset;
        line[2 * c + 1] = at[2] + at[4] + offset;
      }
      float* to = y->typed_data() + (2 * (b * height + first) + r) * 2 * width;
      for (int64_t c = 0; c < 2 * width; c += kLanes) {
        Vec value = Load(line + c);
        if (logistic)
          value = 1.0f / (1.0f + Exp(-value));
        else if (after != 1.0f)
          value = value >= 0.0f ? value : after * value;
        const int64_t left = 2 * width - c;
        if (left >= kLanes)
          Store(to + c, value);
        else
          std::memcpy(to + c, &value, left * sizeof(float));
      }
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
XLA_FFI_DEFINE_HANDLER_SYMBOL(steel_ad_double_to_one, DoubleToOne,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Attr<float>("slope")
                                  .Attr<bool>("logistic")
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
