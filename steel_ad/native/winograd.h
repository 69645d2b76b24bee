// Winograd's minimal filtering (Lavin & Gray 2016), for whole vectors of channels: tiles of 2x2 output pixels.
//
// A 3x3 convolution of stride 1 goes by F(2x2, 3x3), 16 products for four output pixels instead of 36. A 4x4 one of stride 2, which is
// a 2x2 one over blocks of 2x2 pixels, and the four phases of its transpose, which are 2x2 ones over pixels, go by F(2x2, 2x2),
// 9 products instead of 16. Each of them is a matrix product over the channels of the tiles of a band.

#ifndef STEEL_AD_NATIVE_WINOGRAD_H_
#define STEEL_AD_NATIVE_WINOGRAD_H_

#include "tiles.h"

namespace {

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

}  // namespace

#endif  // STEEL_AD_NATIVE_WINOGRAD_H_
