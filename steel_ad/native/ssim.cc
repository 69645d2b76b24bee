// The SSIM residual of pairs of float32 images and its gradient, as XLA custom calls: each image goes by two rows at a time, and
// all that is kept of it are the rows of their windows, in the first caches.

#include "means.h"

namespace {

// Row or column of an image that one of its padded form shows, padded by reflection without repeating the edge.
int64_t Reflected(int64_t i, int64_t n) {
  i = i < 0 ? -i : i;
  return i >= n ? 2 * (n - 1) - i : i;
}

// What is subtracted from an image's sums and differences before they are squared.
struct Offset {
  float sum, difference;
};

struct Pair {
  const float *x, *y;
  int64_t height, width;
  int64_t before;  // rows and columns that padding puts before the image, 0 if it is not padded
  Offset offset;
};

// Sum and difference less their offsets, row `p` of the padded images, to `columns` values each.
void SumAndDifference(const Pair& pair, int64_t p, int64_t columns, float* __restrict sum, float* __restrict difference) {
  const int64_t row = Reflected(p - pair.before, pair.height) * pair.width;
  const float *__restrict x = pair.x + row, *__restrict y = pair.y + row;
  const Offset offset = pair.offset;
  for (int64_t i = 0; i < pair.before; ++i) {
    int64_t from = Reflected(i - pair.before, pair.width);
    sum[i] = x[from] + y[from] - offset.sum;
    difference[i] = x[from] - y[from] - offset.difference;
  }
  float *__restrict sums = sum + pair.before, *__restrict differences = difference + pair.before;
  for (int64_t i = 0; i < pair.width; ++i) {
    sums[i] = x[i] + y[i] - offset.sum;
    differences[i] = x[i] - y[i] - offset.difference;
  }
  for (int64_t i = pair.before + pair.width; i < columns; ++i) {
    int64_t from = Reflected(i - pair.before, pair.width);
    sum[i] = x[from] + y[from] - offset.sum;
    difference[i] = x[from] - y[from] - offset.difference;
  }
}

inline Vec Positive(Vec v) { return v > 0.0f ? v : Vec{}; }

// The residual, from the means of a window: of the terms 1 - a / b and 1 - c / d it is 1 - (1 - a / b) (1 - c / d), with one
// division where b d is `safe` from being rounded to zero.
inline Vec ResidualOf(const Window& w, const float* means, int64_t pitch, Offset offset, bool safe) {
  const Vec t = Load(means), d = Load(means + pitch), mean_t = t + offset.sum, mean_d = d + offset.difference;
  const Vec square = mean_d * mean_d;
  const Vec var_t = Positive(Load(means + 2 * pitch) - t * t), var_d = Positive(Load(means + 3 * pitch) - d * d);
  const Vec luminance = mean_t * mean_t + square + 2 * w.c1, structure = var_t + var_d + 2 * w.c2;
  const Vec a = 2.0f * square, c = 2.0f * var_d;
  if (safe) return (a * structure + c * luminance - a * c) / (luminance * structure);
  const Vec of_luminance = a / luminance, of_structure = c / structure;
  return of_luminance + of_structure - of_luminance * of_structure;
}

// 1 - luminance term and 1 - contrast and structure term, and what their gradients need.
struct Terms {
  Vec mean_t, mean_d, var_t, var_d;  // as they enter
  Vec luminance_scale, structure_scale, luminance, structure;
  Vec raw_var_t, raw_var_d;
};

inline Terms TermsOf(const Window& w, const float* means, int64_t pitch, Offset offset) {
  Terms s;
  Vec t = Load(means), d = Load(means + pitch);
  s.raw_var_t = Load(means + 2 * pitch) - t * t;
  s.raw_var_d = Load(means + 3 * pitch) - d * d;
  s.var_t = Positive(s.raw_var_t);
  s.var_d = Positive(s.raw_var_d);
  s.mean_t = t + offset.sum;
  s.mean_d = d + offset.difference;
  s.luminance_scale = 1.0f / (s.mean_t * s.mean_t + s.mean_d * s.mean_d + 2 * w.c1);
  s.structure_scale = 1.0f / (s.var_t + s.var_d + 2 * w.c2);
  s.luminance = 2.0f * s.mean_d * s.mean_d * s.luminance_scale;
  s.structure = 2.0f * s.var_d * s.structure_scale;
  return s;
}

// Floats of a row of n values, and of the vectors behind it that `Across` reads.
int64_t Pitch(int64_t n) { return CeilDiv(n, kLanes) * kLanes + 3 * kLanes; }

constexpr int64_t kBand = 128;  // rows of a piece of work, an even number

// Of each image the middle of the range of x + y and the mean of x - y, in a fixed order.
std::vector<Offset> Offsets(ffi::ThreadPool& pool, const float* x, const float* y, int64_t images, int64_t rows, int64_t n) {
  struct Part {
    double difference;
    float least, greatest;  // of the sums
  };
  const int64_t bands = CeilDiv(rows, kBand);
  std::vector<Part> parts(images * bands);
  ParallelFor(pool, images * bands, [&](int64_t item) {
    const int64_t first = item / bands * rows + item % bands * kBand;
    const int64_t last = std::min(first + kBand, (item / bands + 1) * rows);
    const float any = x[first * n] + y[first * n];
    Part part{0, any, any};
    Vec least = Vec{} + any, greatest = least;
    for (int64_t row = first; row < last; ++row) {
      const float *__restrict a = x + row * n, *__restrict b = y + row * n;
      Vec difference{};
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) {
        const Vec of_x = Load(a + i), of_y = Load(b + i), sum = of_x + of_y;
        difference += of_x - of_y;
        least = sum < least ? sum : least;
        greatest = sum > greatest ? sum : greatest;
      }
      for (int l = 0; l < kLanes; ++l) part.difference += difference[l];
      for (; i < n; ++i) {
        part.difference += a[i] - b[i];
        part.least = std::min(part.least, a[i] + b[i]);
        part.greatest = std::max(part.greatest, a[i] + b[i]);
      }
    }
    for (int l = 0; l < kLanes; ++l) {
      part.least = std::min(part.least, least[l]);
      part.greatest = std::max(part.greatest, greatest[l]);
    }
    parts[item] = part;
  });
  std::vector<Offset> offsets(images);
  for (int64_t b = 0; b < images; ++b) {
    Part all = parts[b * bands];
    for (int64_t i = b * bands + 1; i < (b + 1) * bands; ++i) {
      all.difference += parts[i].difference;
      all.least = std::min(all.least, parts[i].least);
      all.greatest = std::max(all.greatest, parts[i].greatest);
    }
    offsets[b] = {0.5f * (all.least + all.greatest), static_cast<float>(all.difference / (rows * n))};
  }
  return offsets;
}

// The rows of two windows, one below the other, that move down, without copies of those that stay.
class Rows {
 public:
  Rows(const Pair& pair, int64_t k, int64_t columns, float* memory)
      : pair_(pair), kept_(k + 1), columns_(columns), pitch_(Pitch(columns)), memory_(memory), pointers_(2 * kept_) {
    std::memset(memory, 0, Floats(k, columns) * sizeof(float));
  }
  static int64_t Floats(int64_t k, int64_t columns) { return 2 * (k + 1) * Pitch(columns); }
  float* Sum(int64_t p) { return memory_ + (p % kept_) * pitch_; }
  float* Difference(int64_t p) { return memory_ + (kept_ + p % kept_) * pitch_; }
  void Read(int64_t p) { SumAndDifference(pair_, p, columns_, Sum(p), Difference(p)); }
  const float* const* Window(int64_t first) {
    for (int64_t j = 0; j < kept_; ++j) {
      pointers_[j] = Sum(first + j);
      pointers_[kept_ + j] = Difference(first + j);
    }
    return pointers_.data();
  }

 private:
  Pair pair_;
  int64_t kept_, columns_, pitch_;
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

// What is written is base + sign * residual.
ffi::Error Residual(ffi::ThreadPool pool, Buffer x, Buffer y, Buffer taps, bool reflect, float c1, float c2, float base,
                    float sign, Result to) {
  if (!x.element_count()) return ffi::Error::Success();
  const Window window = WindowOf(taps, c1, c2);
  const bool safe = c1 * c2 > 1e-30f;
  const Sizes s = SizesOf(x, window.size, reflect);
  const auto offsets = Offsets(pool, x.typed_data(), y.typed_data(), s.images, s.height, s.width);
  const int64_t bands = CeilDiv(s.rows, kBand), pitch = Pitch(s.padded_columns);
  ParallelFor(pool, s.images * bands, [&](int64_t item) {
    const int64_t b = item / bands, first = item % bands * kBand, last = std::min(first + kBand, s.rows);
    const int64_t image = b * s.height * s.width;
    float* memory = Scratch(0, Rows::Floats(s.k, s.padded_columns) + 16 * pitch);
    float *vertical = memory + Rows::Floats(s.k, s.padded_columns), *means = vertical + 8 * pitch;
    Rows rows({x.typed_data() + image, y.typed_data() + image, s.height, s.width, s.before, offsets[b]}, s.k,
              s.padded_columns, memory);
    std::memset(vertical, 0, 16 * pitch * sizeof(float));
    for (int64_t p = first; p < first + s.k - 1; ++p) rows.Read(p);
    for (int64_t r = first; r < last; ++r) {
      const int64_t half = (r - first) % 2;
      if (!half) {
        for (int64_t p = r + s.k - 1; p < std::min(r + s.k + 1, s.padded_rows); ++p) rows.Read(p);
        WithKind(window, [&](auto kind) {
          Means(kind, window, rows.Window(r), s.columns, s.padded_columns, vertical, pitch, means);
        });
      }
      float* out = to->typed_data() + (b * s.rows + r) * s.columns;
      for (int64_t i = 0; i < s.columns; i += kLanes) {
        const Vec value = base + sign * ResidualOf(window, means + 4 * half * pitch + i, pitch, offsets[b], safe);
        if (i + kLanes <= s.columns)
          Store(out + i, value);
        else
          std::memcpy(out + i, &value, (s.columns - i) * sizeof(float));
      }
    }
  });
  return ffi::Error::Success();
}

// What the residual's gradient is in a row: given, or the same everywhere, as that of the mean, whose value is then summed up.
struct Given {
  const float* row;
  Vec At(int64_t i, int64_t left) const {
    Vec v{};
    std::memcpy(&v, row + i, std::min<int64_t>(kLanes, left) * sizeof(float));
    return v;
  }
  void Add(Vec, int64_t) {}
  void EndOfRow() {}
};

struct Same {
  float gradient;
  double sum = 0;
  Vec of_row{};
  static Vec First(Vec v, int64_t left) {
    for (int64_t l = std::max<int64_t>(left, 0); l < kLanes; ++l) v[l] = 0;
    return v;
  }
  Vec At(int64_t, int64_t left) const { return First(Vec{} + gradient, left); }
  void Add(Vec residuals, int64_t left) { of_row += First(residuals, left); }
  void EndOfRow() {
    for (int l = 0; l < kLanes; ++l) sum += of_row[l];
    of_row = Vec{};
  }
};

// Factors of row `p`'s windows for x itself, for the sum and for the difference, `[3, pitch]`, spread over the columns.
template <typename K, typename Of>
void Factors(K kind, const Window& window, const Sizes& s, Of& of, const float* means, int64_t pitch, Offset offset, float* factors,
             int64_t wide, float* to) {
  for (int64_t i = 0; i < s.columns; i += kLanes) {
    Terms t = TermsOf(window, means + i, pitch, offset);
    const Vec gradient = of.At(i, s.columns - i);
    of.Add(t.luminance + t.structure - t.luminance * t.structure, s.columns - i);
    Vec l = gradient * (1.0f - t.structure) * t.luminance_scale * t.luminance_scale;
    Vec c = gradient * (1.0f - t.luminance) * t.structure_scale * t.structure_scale;
    // A variance that rounding made negative has no gradient, and one of exactly zero half of it.
    Vec half{}, one = half + 1.0f;
    half += 0.5f;
    Vec of_var_t = -2.0f * c * t.var_d * (t.raw_var_t > 0.0f ? one : t.raw_var_t == 0.0f ? half : Vec{});
    Vec of_var_d = 2.0f * c * (t.var_t + 2 * window.c2) * (t.raw_var_d > 0.0f ? one : t.raw_var_d == 0.0f ? half : Vec{});
    Vec of_mean_t = -4.0f * l * t.mean_d * t.mean_d * t.mean_t;
    Vec of_mean_d = 4.0f * l * t.mean_d * (t.mean_t * t.mean_t + 2 * window.c1);
    Vec plain = of_mean_t - 2.0f * of_var_t * Load(means + i) + of_mean_d - 2.0f * of_var_d * Load(means + pitch + i);
    // The first k - 1 factors, and those after the last, are zero.
    Store(factors + s.k - 1 + i, plain);
    Store(factors + wide + s.k - 1 + i, of_var_t);
    Store(factors + 2 * wide + s.k - 1 + i, of_var_d);
  }
  of.EndOfRow();
  for (int f = 0; f < 3; ++f) Across(kind, window, factors + f * wide, s.padded_columns, to + f * pitch);
}

// Gradient of x; `of(q)` is the gradient of row q of the residual. A row of the window's means gives three rows of factors; each is
// spread over the windows that it came from.
template <typename K, typename Of>
void GradientOf(K kind, const Window& window, const Sizes& s, const Pair& pair, Of of, float* out) {
  const int64_t k = s.k, pitch = Pitch(s.padded_columns), wide = Pitch(s.padded_columns + k - 1);
  const int64_t rows_size = Rows::Floats(k, s.padded_columns), spread_size = 3 * (k + 1) * pitch;
  const int64_t zeroed = 16 * pitch + 3 * wide + spread_size + 2 * pitch;
  float* memory = Scratch(0, rows_size + zeroed);
  float *vertical = memory + rows_size, *means = vertical + 8 * pitch, *factors = means + 8 * pitch;
  float *spread = factors + 3 * wide, *row = spread + spread_size;
  Rows rows(pair, k, s.padded_columns, memory);
  std::vector<const float*> spreads(k + 1);  // of the next row's factors, of this one's, of the one's before, ...
  std::memset(vertical, 0, zeroed * sizeof(float));
  std::memset(out, 0, s.height * s.width * sizeof(float));
  auto ring = [&](int64_t p) { return spread + (p % (k + 1)) * 3 * pitch; };
  for (int64_t p = 0; p < k - 1; ++p) rows.Read(p);
  for (int64_t p = 0; p < s.padded_rows; p += 2) {
    for (int64_t q = p + k - 1; q < std::min(p + k + 1, s.padded_rows); ++q) rows.Read(q);
    if (p < s.rows) Means(kind, window, rows.Window(p), s.columns, s.padded_columns, vertical, pitch, means);
    for (int64_t q = p; q < p + 2; ++q)
      if (q < s.rows)
        Factors(kind, window, s, of(q), means + 4 * (q - p) * pitch, pitch, pair.offset, factors, wide, ring(q));
      else
        std::memset(ring(q), 0, 3 * pitch * sizeof(float));
    // Taps are symmetric: from the oldest row on, the first k are this row's and the last k the next one's.
    for (int64_t j = 0; j <= k; ++j) spreads[j] = ring(p + 1 + j + 1);
    for (int64_t i = 0; i < s.padded_columns; i += kLanes) {
      Vec sums[2][3];
      SumTwice(
          kind, window,
          [&](int64_t j, auto weighted, Vec(&to)[3]) {
            for (int f = 0; f < 3; ++f) to[f] += weighted(Load(spreads[j] + f * pitch + i));
          },
          sums);
      for (int64_t q = 0; q < 2; ++q)
        Store(row + q * pitch + i,
              sums[q][0] + 2.0f * (Load(rows.Sum(p + q) + i) * sums[q][1] + Load(rows.Difference(p + q) + i) * sums[q][2]));
    }
    // What was reflected is added where it came from.
    for (int64_t q = p; q < std::min(p + 2, s.padded_rows); ++q) {
      const float* from = row + (q - p) * pitch;
      float* target = out + Reflected(q - s.before, s.height) * s.width;
      for (int64_t i = 0; i < s.width; ++i) target[i] += from[s.before + i];
      for (int64_t i = 0; i < s.before; ++i) target[Reflected(i - s.before, s.width)] += from[i];
      for (int64_t i = s.before + s.width; i < s.padded_columns; ++i) target[Reflected(i - s.before, s.width)] += from[i];
    }
  }
}

ffi::Error ResidualGradient(ffi::ThreadPool pool, Buffer x, Buffer y, Buffer g, Buffer taps, bool reflect, float c1,
                            float c2, Result to) {
  if (!x.element_count()) return ffi::Error::Success();
  const Window window = WindowOf(taps, c1, c2);
  const Sizes s = SizesOf(x, window.size, reflect);
  const auto offsets = Offsets(pool, x.typed_data(), y.typed_data(), s.images, s.height, s.width);
  ParallelFor(pool, s.images, [&](int64_t b) {
    const int64_t image = b * s.height * s.width;
    const Pair pair{x.typed_data() + image, y.typed_data() + image, s.height, s.width, s.before, offsets[b]};
    const float* of = g.typed_data() + b * s.rows * s.columns;
    Given given{};
    auto row = [&](int64_t q) -> Given& { return given.row = of + q * s.columns, given; };
    WithKind(window, [&](auto kind) { GradientOf(kind, window, s, pair, row, to->typed_data() + image); });
  });
  return ffi::Error::Success();
}

// The mean of the residual and its gradient.
ffi::Error Mean(ffi::ThreadPool pool, Buffer x, Buffer y, Buffer taps, bool reflect, float c1, float c2, Result mean, Result to) {
  if (!x.element_count()) return ffi::Error::Success();
  const Window window = WindowOf(taps, c1, c2);
  const Sizes s = SizesOf(x, window.size, reflect);
  const auto offsets = Offsets(pool, x.typed_data(), y.typed_data(), s.images, s.height, s.width);
  ParallelFor(pool, s.images, [&](int64_t b) {
    const int64_t image = b * s.height * s.width;
    const Pair pair{x.typed_data() + image, y.typed_data() + image, s.height, s.width, s.before, offsets[b]};
    const double share = 1.0 / (static_cast<double>(s.rows) * s.columns);
    Same all{static_cast<float>(share)};
    auto row = [&](int64_t) -> Same& { return all; };
    WithKind(window, [&](auto kind) { GradientOf(kind, window, s, pair, row, to->typed_data() + image); });
    mean->typed_data()[b] = static_cast<float>(all.sum * share);
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
XLA_FFI_DEFINE_HANDLER_SYMBOL(steel_ad_ssim_mean, Mean,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Attr<bool>("reflect")
                                  .Attr<float>("c1")
                                  .Attr<float>("c2")
                                  .Ret<Buffer>()
                                  .Ret<Buffer>());
