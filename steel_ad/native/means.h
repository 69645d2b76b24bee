// Means over the windows around every pixel of a row, with equal taps or others: of four fields at once, first down, then across. Two
// windows of equal taps, one below the other, share all but two rows.

#ifndef STEEL_AD_NATIVE_MEANS_H_
#define STEEL_AD_NATIVE_MEANS_H_

#include <utility>

#include "common.h"

namespace {

struct Window {
  int64_t size;
  const float* taps;
  bool uniform;
  float c1, c2;
};

Window WindowOf(const Buffer& taps, float c1, float c2) {
  const float* t = taps.typed_data();
  const int64_t k = taps.dimensions().back();
  return {k, t, std::all_of(t, t + k, [&](float tap) { return tap == t[0]; }), c1, c2};
}

constexpr int kUnrolled = 11;  // the size of a window for which there is code of its own

// Windows whose code differs: K is their size where it is known beforehand, or 0; equal taps need no products.
template <int K, bool kUniform>
struct Kind {
  static constexpr int kSize = K;
  static constexpr bool kEqual = kUniform;
  static int64_t size(const Window& window) { return K ? K : window.size; }
};

// Calls f with the window's kind.
template <typename F>
void WithKind(const Window& window, F f) {
  const bool unrolled = window.size == kUnrolled;
  if (window.uniform)
    unrolled ? f(Kind<kUnrolled, true>()) : f(Kind<0, true>());
  else
    unrolled ? f(Kind<kUnrolled, false>()) : f(Kind<0, false>());
}

// Weighted sums, N at once, of what `add(j, weighted, to)` adds for rows `first` to `first + k - 1`.
template <int N, typename K, typename Add>
inline void SumRows(K kind, const Window& window, int64_t first, Add add, Vec (&to)[N]) {
  for (int f = 0; f < N; ++f) to[f] = Vec{};
#pragma GCC unroll 11
  for (int64_t j = 0; j < kind.size(window); ++j) add(first + j, [tap = window.taps[j]](Vec v) { return tap * v; }, to);
}

// The same for rows 0 to k - 1, `to[0]`, and for 1 to k, `to[1]`.
template <int N, typename K, typename Add>
inline void SumTwice(K kind, const Window& window, Add add, Vec (&to)[2][N]) {
  if constexpr (!K::kEqual) {
    for (int64_t r = 0; r < 2; ++r) SumRows(kind, window, r, add, to[r]);
    return;
  }
  const int64_t k = kind.size(window);
  auto plain = [](Vec v) { return v; };
  for (int f = 0; f < N; ++f) to[0][f] = Vec{};
#pragma GCC unroll 11
  for (int64_t j = 1; j < k; ++j) add(j, plain, to[0]);
  for (int f = 0; f < N; ++f) to[1][f] = to[0][f];
  for (int64_t r = 0; r < 2; ++r) {
    add(r * k, plain, to[r]);
    for (int f = 0; f < N; ++f) to[r][f] *= window.taps[0];
  }
}

#if defined(__clang__)
template <int N, int... L>
inline Vec Shifted(Vec a, Vec b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, (N + L)...);
}
#else
template <int N, int... L>
inline Vec Shifted(Vec a, Vec b, std::integer_sequence<int, L...>) {
  using Lanes = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));
  return __builtin_shuffle(a, b, Lanes{(N + L)...});
}
#endif

// The values from the N-th on of three vectors in a row.
template <int N>
inline Vec From(Vec a, Vec b, Vec c) {
  if constexpr (N < kLanes)
    return Shifted<N>(a, b, std::make_integer_sequence<int, kLanes>());
  else if constexpr (N == kLanes)
    return b;
  else
    return Shifted<N - kLanes>(b, c, std::make_integer_sequence<int, kLanes>());
}

// Means across a row, of values i to i + k - 1 for each i below n; up to three vectors behind them are read.
template <typename K>
void Across(K kind, const Window& window, const float* from, int64_t n, float* to) {
  const int64_t k = kind.size(window);
  const float* taps = window.taps;
  if constexpr (K::kEqual && K::kSize == 11 && kLanes >= 8) {
    // Sums of two, four and eight values; eight and two and one are eleven.
    const float tap = taps[0];
    Vec a = Load(from), next_a = Load(from + kLanes), far_a = Load(from + 2 * kLanes);
    Vec two = a + From<1>(a, next_a, far_a), next_two = next_a + From<1>(next_a, far_a, far_a);
    Vec four = two + From<2>(two, next_two, next_two);
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec new_a = Load(from + i + 3 * kLanes), far_two = far_a + From<1>(far_a, new_a, new_a);
      const Vec next_four = next_two + From<2>(next_two, far_two, far_two);
      const Vec eight = four + From<4>(four, next_four, next_four);
      Store(to + i, tap * (eight + From<8>(two, next_two, far_two) + From<10>(a, next_a, far_a)));
      a = next_a;
      next_a = far_a;
      far_a = new_a;
      two = next_two;
      next_two = far_two;
      four = next_four;
    }
    return;
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec sum{};
#pragma GCC unroll 11
    for (int64_t j = 0; j < k; ++j) sum += taps[j] * Load(from + i + j);
    Store(to + i, sum);
  }
}

// Means over a window of sum, difference and their squares, of `n` output pixels in each of two rows: `[2, 4, pitch]`, as
// `vertical`. `rows` are the windows' rows: `size + 1` pointers to sums, then as many to differences.
template <typename K>
void Means(K kind, const Window& window, const float* const* rows, int64_t n, int64_t columns, float* vertical, int64_t pitch,
           float* means) {
  const int64_t k = kind.size(window);
  for (int64_t r = 0; r < 2; ++r) {
    for (int64_t i = 0; i < columns; i += kLanes) {
      auto add = [&](int64_t j, auto weighted, Vec(&to)[4]) {
        const Vec t = Load(rows[j] + i), d = Load(rows[k + 1 + j] + i), of_t = weighted(t), of_d = weighted(d);
        to[0] += of_t;
        to[1] += of_d;
        to[2] += of_t * t;
        to[3] += of_d * d;
      };
      if constexpr (K::kEqual) {
        Vec sums[2][4];
        SumTwice(kind, window, add, sums);
        for (int f = 0; f < 8; ++f) Store(vertical + f * pitch + i, sums[f / 4][f % 4]);
      } else {
        Vec sums[4];
        SumRows(kind, window, r, add, sums);
        for (int f = 0; f < 4; ++f) Store(vertical + f * pitch + i, sums[f]);
      }
    }
    const int fields = K::kEqual ? 8 : 4;
    for (int f = 0; f < fields; ++f) Across(kind, window, vertical + f * pitch, n, means + (4 * r + f) * pitch);
    if (K::kEqual) return;  // with both rows
  }
}

}  // namespace

#endif  // STEEL_AD_NATIVE_MEANS_H_
