// Convolutions of float32 images, channels last, as XLA custom calls: forward, to twice the size, and filter gradients.
//
// Bias and leaky ReLU, and the latter's derivative in the gradients, are applied while values are in registers or being copied
// anyway. All of them are one source, since they share the scratch memory of their threads.

#include "filter_gradient.h"
#include "tiles.h"
#include "winograd.h"

namespace {

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
