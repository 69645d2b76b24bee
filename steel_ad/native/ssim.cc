// The SSIM residual of pairs of float32 images and its gradient, as XLA custom calls: each image goes by row after row, and
// all that is kept of it are as many rows as a window has, in the first caches.

#include "common.h"

namespace {

// Row or column of an image that one of its padded form shows, padded by reflection without repeating the edge.
int64_t Reflected(int64_t i, int64_t n) {
  i = i < 0 ? -i : i;
  return i >= n ? 2 * (n - 1) - i : i;
}

struct Pair {
  const float *x, *y;
  int64_t height, width;
  int64_t before;  // rows and columns that padding puts before the image, 0 if it is not padded
  float offset;    // subtracted from the difference
};

// Sum less 1 and difference, row `p` of the padded images, to `columns` values each.
void SumAndDifference(const Pair& pair, int64_t p, int64_t columns, float* __restrict sum, float* __restrict difference) {
  const int64_t row = Reflected(p - pair.before, pair.height) * pair.width;
  const float *__restrict x = pair.x + row, *__restrict y = pair.y + row;
  for (int64_t i = 0; i < pair.before; ++i) {
    int64_t from = Reflected(i - pair.before, pair.width);
    sum[i] = x[from] + y[from] - 1.0f;
    difference[i] = x[from] - y[from] - pair.offset;
  }
  float *__restrict sums = sum + pair.before, *__restrict differences = difference + pair.before;
  const float offset = pair.offset;
  for (int64_t i = 0; i < pair.width; ++i) {
    sums[i] = x[i] + y[i] - 1.0f;
    differences[i] = x[i] - y[i] - offset;
  }
  for (int64_t i = pair.before + pair.width; i < columns; ++i) {
    int64_t from = Reflected(i - pair.before, pair.width);
    sum[i] = x[from] + y[from] - 1.0f;
    difference[i] = x[from] - y[from] - pair.offset;
  }
}

struct Window {
  int64_t size;
  const float* taps;
  float c1, c2;
};

// Means over a window of sum, difference and their squares, of `n` output pixels in a row.
// `rows` are the window's rows: `size` pointers to sums, then as many to differences.
template <int K>  // the window's size where it is known beforehand, or 0
void Means(const Window& window, const float* const* rows, int64_t n, int64_t columns, float* vertical, int64_t pitch,
           float* means) {
  const int64_t k = K ? K : window.size;
  for (int64_t i = 0; i < columns; i += kLanes) {
    Vec t{}, d{}, tt{}, dd{};
#pragma GCC unroll 11
    for (int64_t j = 0; j < k; ++j) {
      Vec a = Load(rows[j] + i), b = Load(rows[k + j] + i), wa = window.taps[j] * a, wb = window.taps[j] * b;
      t += wa;
      d += wb;
      tt += wa * a;
      dd += wb * b;
    }
    Store(vertical + i, t);
    Store(vertical + pitch + i, d);
    Store(vertical + 2 * pitch + i, tt);
    Store(vertical + 3 * pitch + i, dd);
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec sums[4] = {};
#pragma GCC unroll 11
    for (int64_t j = 0; j < k; ++j)
      for (int f = 0; f < 4; ++f) sums[f] += window.taps[j] * Load(vertical + f * pitch + i + j);
    for (int f = 0; f < 4; ++f) Store(means + f * pitch + i, sums[f]);
  }
}

auto MeansOf(int64_t k) { return k == 11 ? &Means<11> : &Means<0>; }

inline Vec Positive(Vec v) { return v > 0.0f ? v : Vec{}; }

// 1 - luminance term and 1 - contrast and structure term, and what their gradients need.
struct Terms {
  Vec mean_t, mean_d, var_t, var_d;  // as they enter
  Vec luminance_scale, structure_scale, luminance, structure;
  Vec raw_var_t, raw_var_d;
};

inline Terms TermsOf(const Window& w, const float* means, int64_t pitch, float offset) {
  Terms s;
  Vec t = Load(means), d = Load(means + pitch);
  s.raw_var_t = Load(means + 2 * pitch) - t * t;
  s.raw_var_d = Load(means + 3 * pitch) - d * d;
  s.var_t = Positive(s.raw_var_t);
  s.var_d = Positive(s.raw_var_d);
  s.mean_t = t + 1.0f;
  s.mean_d = d + offset;
  s.luminance_scale = 1.0f / (s.mean_t * s.mean_t + s.mean_d * s.mean_d + 2 * w.c1);
  s.structure_scale = 1.0f / (s.var_t + s.var_d + 2 * w.c2);
  s.luminance = 2.0f * s.mean_d * s.mean_d * s.luminance_scale;
  s.structure = 2.0f * s.var_d * s.structure_scale;
  return s;
}

int64_t Pitch(int64_t n) { return CeilDiv(n, kLanes) * kLanes + kLanes; }

// Mean of x - y of each image, in a fixed order.
std::vector<float> Offsets(ffi::ThreadPool& pool, const float* x, const float* y, int64_t images, int64_t rows, int64_t n) {
  std::vector<double> sums(images * rows);
  ParallelFor(pool, images * rows, [&](int64_t item) {
    const float *__restrict a = x + item * n, *__restrict b = y + item * n;
    Vec sum{};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) sum += Load(a + i) - Load(b + i);
    double total = 0;
    for (int l = 0; l < kLanes; ++l) total += sum[l];
    for (; i < n; ++i) total += a[i] - b[i];
    sums[item] = total;
  });
  std::vector<float> offsets(images);
  for (int64_t b = 0; b < images; ++b) {
    double total = 0;
    for (int64_t r = 0; r < rows; ++r) total += sums[b * rows + r];
    offsets[b] = static_cast<float>(total / (rows * n));
  }
  return offsets;
}

// The rows of a window that moves down, without copies of those that stay.
class Rows {
 public:
  Rows(const Pair& pair, int64_t k, int64_t columns, float* memory)
      : pair_(pair), k_(k), columns_(columns), pitch_(Pitch(columns)), memory_(memory), pointers_(2 * k) {
    std::memset(memory, 0, Floats(k, columns) * sizeof(float));
  }
  static int64_t Floats(int64_t k, int64_t columns) { return 2 * k * Pitch(columns); }
  float* Sum(int64_t p) { return memory_ + (p % k_) * pitch_; }
  float* Difference(int64_t p) { return memory_ + (k_ + p % k_) * pitch_; }
  void Read(int64_t p) { SumAndDifference(pair_, p, columns_, Sum(p), Difference(p)); }
  const float* const* Window(int64_t first) {
    for (int64_t j = 0; j < k_; ++j) {
      pointers_[j] = Sum(first + j);
      pointers_[k_ + j] = Difference(first + j);
    }
    return pointers_.data();
  }

 private:
  Pair pair_;
  int64_t k_, columns_, pitch_;
  float* memory_;
  std::vector<const float*> pointers_;
};

struct Sizes {
  int64_t images, height, width, k, before, rows, columns, padded_rows, padded_columns;
};

Sizes SizesOf(const Buffer& x, int64_t k, bool reflect) {
  auto d = x.dimensions();
  Sizes s;
  s.height = d[d.size() - 2];
  s.width = d[d.size() - 1];
  s.images = s.height * s.width ? static_cast<int64_t>(x.element_count()) / (s.height * s.width) : 0;
  s.k = k;
  s.before = reflect ? (k - 1) / 2 : 0;
  s.rows = reflect ? s.height : s.height - k + 1;
  s.columns = reflect ? s.width : s.width - k + 1;
  s.padded_rows = s.rows + k - 1;
  s.padded_columns = s.columns + k - 1;
  return s;
}

constexpr int64_t kBand = 64;  // output rows of a piece of work

// What is written is base + sign * residual.
ffi::Error Residual(ffi::ThreadPool pool, Buffer x, Buffer y, Buffer taps, bool reflect, float c1, float c2, float base,
                    float sign, Result to) {
  const Sizes s = SizesOf(x, taps.dimensions().back(), reflect);
  const Window window{s.k, taps.typed_data(), c1, c2};
  const auto offsets = Offsets(pool, x.typed_data(), y.typed_data(), s.images, s.height, s.width);
  const int64_t bands = CeilDiv(s.rows, kBand), pitch = Pitch(s.padded_columns);
  ParallelFor(pool, s.images * bands, [&](int64_t item) {
    const int64_t b = item / bands, first = item % bands * kBand, last = std::min(first + kBand, s.rows);
    const int64_t image = b * s.height * s.width;
    float* memory = Scratch(0, Rows::Floats(s.k, s.padded_columns) + 8 * pitch);
    float *vertical = memory + Rows::Floats(s.k, s.padded_columns), *means = vertical + 4 * pitch;
    Rows rows({x.typed_data() + image, y.typed_data() + image, s.height, s.width, s.before, offsets[b]}, s.k,
              s.padded_columns, memory);
    std::memset(vertical, 0, 8 * pitch * sizeof(float));
    for (int64_t p = first; p < first + s.k - 1; ++p) rows.Read(p);
    for (int64_t r = first; r < last; ++r) {
      rows.Read(r + s.k - 1);
      MeansOf(s.k)(window, rows.Window(r), s.columns, s.padded_columns, vertical, pitch, means);
      float* out = to->typed_data() + (b * s.rows + r) * s.columns;
      for (int64_t i = 0; i < s.columns; i += kLanes) {
        Terms t = TermsOf(window, means + i, pitch, offsets[b]);
        Vec value = base + sign * (t.luminance + t.structure - t.luminance * t.structure);
        if (i + kLanes <= s.columns)
          Store(out + i, value);
        else
          std::memcpy(out + i, &value, (s.columns - i) * sizeof(float));
      }
    }
  });
  return ffi::Error::Success();
}

// Gradient of x, given g, that of the residual. A row of the window's means gives three rows of factors, for x itself, for the
// sum and for the difference; each is spread over the windows that it came from.
ffi::Error ResidualGradient(ffi::ThreadPool pool, Buffer x, Buffer y, Buffer g, Buffer taps, bool reflect, float c1,
                            float c2, Result to) {
  const Sizes s = SizesOf(x, taps.dimensions().back(), reflect);
  const int64_t k = s.k;
  const Window window{k, taps.typed_data(), c1, c2};
  const auto offsets = Offsets(pool, x.typed_data(), y.typed_data(), s.images, s.height, s.width);
  const int64_t pitch = Pitch(s.padded_columns), wide = Pitch(s.padded_columns + k - 1);
  const int64_t rows_size = Rows::Floats(k, s.padded_columns);
  ParallelFor(pool, s.images, [&](int64_t b) {
    const int64_t image = b * s.height * s.width;
    float* memory = Scratch(0, rows_size + 8 * pitch + 3 * wide + 3 * k * pitch + pitch);
    float *vertical = memory + rows_size, *means = vertical + 4 * pitch, *factors = means + 4 * pitch;
    float *spread = factors + 3 * wide, *row = spread + 3 * k * pitch;
    const Pair pair{x.typed_data() + image, y.typed_data() + image, s.height, s.width, s.before, offsets[b]};
    Rows rows(pair, k, s.padded_columns, memory);
    std::vector<const float*> spreads(k);  // of this row's factors, of the row's before, ...
    std::memset(vertical, 0, (8 * pitch + 3 * wide + 3 * k * pitch + pitch) * sizeof(float));
    float* out = to->typed_data() + image;
    std::memset(out, 0, s.height * s.width * sizeof(float));
    for (int64_t p = 0; p < k - 1; ++p) rows.Read(p);
    for (int64_t p = 0; p < s.padded_rows; ++p) {
      float* ring = spread + (p % k) * 3 * pitch;
      if (p < s.rows) {
        rows.Read(p + k - 1);
        MeansOf(s.k)(window, rows.Window(p), s.columns, s.padded_columns, vertical, pitch, means);
        const float* of = g.typed_data() + (b * s.rows + p) * s.columns;
        for (int64_t i = 0; i < s.columns; i += kLanes) {
          Terms t = TermsOf(window, means + i, pitch, offsets[b]);
          Vec gradient{};
          std::memcpy(&gradient, of + i, std::min<int64_t>(kLanes, s.columns - i) * sizeof(float));
          Vec l = gradient * (1.0f - t.structure) * t.luminance_scale * t.luminance_scale;
          Vec c = gradient * (1.0f - t.luminance) * t.structure_scale * t.structure_scale;
          // A variance that rounding made negative has no gradient, and one of exactly zero half of it.
          Vec half{}, one = half + 1.0f;
          half += 0.5f;
          Vec of_var_t = -2.0f * c * t.var_d * (t.raw_var_t > 0.0f ? one : t.raw_var_t == 0.0f ? half : Vec{});
          Vec of_var_d = 2.0f * c * (t.var_t + 2 * c2) * (t.raw_var_d > 0.0f ? one : t.raw_var_d == 0.0f ? half : Vec{});
          Vec of_mean_t = -4.0f * l * t.mean_d * t.mean_d * t.mean_t;
          Vec of_mean_d = 4.0f * l * t.mean_d * (t.mean_t * t.mean_t + 2 * c1);
          Vec plain = of_mean_t - 2.0f * of_var_t * Load(means + i) + of_mean_d - 2.0f * of_var_d * Load(means + pitch + i);
          // The first k - 1 factors, and those after the last, are zero.
          Store(factors + k - 1 + i, plain);
          Store(factors + wide + k - 1 + i, of_var_t);
          Store(factors + 2 * wide + k - 1 + i, of_var_d);
        }
        for (int64_t i = 0; i < s.padded_columns; i += kLanes) {
          Vec sums[3] = {};
          for (int64_t j = 0; j < k; ++j)
            for (int f = 0; f < 3; ++f) sums[f] += window.taps[j] * Load(factors + f * wide + i + j);
          for (int f = 0; f < 3; ++f) Store(ring + f * pitch + i, sums[f]);
        }
      } else {
        std::memset(ring, 0, 3 * pitch * sizeof(float));
      }
      for (int64_t j = 0; j < k; ++j) spreads[j] = spread + ((p - j + k) % k) * 3 * pitch;
      const float *sum = rows.Sum(p), *difference = rows.Difference(p);
      for (int64_t i = 0; i < s.padded_columns; i += kLanes) {
        Vec sums[3] = {};
        for (int64_t j = 0; j < k; ++j)
          for (int f = 0; f < 3; ++f) sums[f] += window.taps[j] * Load(spreads[j] + f * pitch + i);
        Store(row + i, sums[0] + 2.0f * (Load(sum + i) * sums[1] + Load(difference + i) * sums[2]));
      }
      // What was reflected is added where it came from.
      float* target = out + Reflected(p - s.before, s.height) * s.width;
      for (int64_t i = 0; i < s.width; ++i) target[i] += row[s.before + i];
      for (int64_t i = 0; i < s.before; ++i) target[Reflected(i - s.before, s.width)] += row[i];
      for (int64_t i = s.before + s.width; i < s.padded_columns; ++i)
        target[Reflected(i - s.before, s.width)] += row[i];
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(steel_ad_ssim_residual, Residual,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Attr<bool>("reflect")
                                  .Attr<float>("c1")
                                  .Attr<float>("c2")
                                  .Attr<float>("base")
                                  .Attr<float>("sign")
                                  .Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(steel_ad_ssim_residual_gradient, ResidualGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Attr<bool>("reflect")
                                  .Attr<float>("c1")
                                  .Attr<float>("c2")
                                  .Ret<Buffer>());
