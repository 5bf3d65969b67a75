// Layers on interleaved images, compiled once per instruction set.
//
// Floor: the layers' multiply-adds, all lanes of them useful if the last block of images is full; x is read and out
// written once, between which a block's maps stay in L2. Sums of several targets and pixels are in registers together,
// each one chain of multiply-adds, so that an image's result depends on neither its batch nor the threads.
#include "kernels/cpu/product.h"

namespace fastlip::cpu {
namespace {

using Maps = InterleavedLayers::Maps;
using Step = InterleavedLayers::Step;
using Tap = InterleavedLayers::Tap;

constexpr int64_t kImages = InterleavedLayers::kImages, kTargets = InterleavedLayers::kTargets;
constexpr int64_t kMostTaps = InterleavedLayers::kMostTaps * InterleavedLayers::kMostTaps;
constexpr int kSums = kRegisters == 32 ? 24 : 12;  // registers; the others hold sources and a weight

// The vectors that an element's sums take: of all images of a block, or with kHalf of the first half.
template <bool kHalf>
struct Sums {
  static constexpr int kBytes = least(kVectorBytes, static_cast<int>(4 * kImages) / (kHalf ? 2 : 1));
  typedef float Part __attribute__((vector_size(kBytes)));
  static constexpr int64_t kLanes = kBytes / 4;
  static constexpr int kParts = static_cast<int>(kImages / (kHalf ? 2 : 1) / kLanes);
  static constexpr int kMostTargets = kParts == 1 ? least(8, kSums / 3) : least(4, kSums / kParts);
  // Pixels of some targets that are summed together.
  static constexpr int most_pixels(int targets) { return least(8, kSums / (targets * kParts)); }
};

FASTLIP_INLINE inline Lanes as_lanes(Lanes v) { return v; }
#ifdef __AVX512F__
FASTLIP_INLINE inline Lanes as_lanes(Sums<true>::Part v) {
  return __builtin_shufflevector(v, Sums<true>::Part{}, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
#endif

// What some target pixels of a row meet.
struct Met {
  int64_t taps;
  int64_t source[kMostTaps];  // where the first one's sources are in the first channel
  int64_t weight[kMostTaps];  // and the weights, among those of a channel
};

// Where the sums of targets go: `out`, `flags` and `bias` are those of the first target and pixel.
struct Place {
  float* out;
  uint8_t* flags;
  const float* bias;
  int64_t target, flag_target;  // from target to target
  int64_t pixel;                // from pixel to pixel, of out and flags
  bool relu;
};

using SumTile = void (*)(const Step&, const Met&, const float*, const float*, const Place&);

// R targets at P pixels; `source` is where the first pixel's sources begin.
template <bool kHalf, int R, int P>
void sum_tile(const Step& step, const Met& met, const float* weight, const float* source, const Place& to) {
  using Part = Sums<kHalf>::Part;
  constexpr int kParts = Sums<kHalf>::kParts;
  constexpr int64_t kLanes = Sums<kHalf>::kLanes;
  Part sum[R][P][kParts] = {};
  const int64_t pixel = step.source_step * kImages, plane = step.source.plane() * kImages;
  for (int64_t c = 0; c < step.source.channels; ++c, source += plane, weight += step.taps * kTargets) {
    for (int64_t t = 0; t < met.taps; ++t) {
      const float* const from = source + met.source[t];
      const float* const w = weight + met.weight[t];
      Part x[P][kParts];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int k = 0; k < kParts; ++k) __builtin_memcpy(&x[p][k], from + p * pixel + k * kLanes, sizeof(Part));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
          for (int k = 0; k < kParts; ++k) sum[r][p][k] += x[p][k] * w[r];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const float bias = to.bias ? to.bias[r] : 0.0F;
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int k = 0; k < kParts; ++k) {
        Lanes value = as_lanes(sum[r][p][k]) + bias;
        uint8_t* const flags = to.flags + r * to.flag_target + p * to.pixel + k * kLanes;
        if (to.relu) {
          if (to.flags) store_flags(flags, value);
          value = value < 0 ? Lanes{} : value;  // keeps NaN, as torch does
        } else if (to.flags) {
          value = where_flagged(flags, value);
        }
        store<Lanes>(to.out + r * to.target + p * to.pixel + k * kLanes, value);
      }
    }
  }
}

template <bool kHalf, int R, int P = Sums<kHalf>::most_pixels(R)>
SumTile sum_tile_of(int64_t pixels) {
  if constexpr (P == 1) {
    return sum_tile<kHalf, R, 1>;
  } else {
    return pixels == P ? sum_tile<kHalf, R, P> : sum_tile_of<kHalf, R, P - 1>(pixels);
  }
}

// Up to R targets at `pixels` pixels, in tiles that are as even as can be.
template <bool kHalf, int R = Sums<kHalf>::kMostTargets>
void sum_targets(const Step& step, const Met& met, int64_t targets, int64_t pixels, const float* weight,
                 const float* source, Place to) {
  if constexpr (R > 1) {
    if (targets < R) return sum_targets<kHalf, R - 1>(step, met, targets, pixels, weight, source, to);
  }
  constexpr int64_t kMost = Sums<kHalf>::most_pixels(R);
  const int64_t tiles = (pixels + kMost - 1) / kMost;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t count = pixels * (tile + 1) / tiles - pixels * tile / tiles;
    sum_tile_of<kHalf, R>(count)(step, met, weight, source, to);
    source += count * step.source_step * kImages;
    to.out += count * to.pixel;
    if (to.flags) to.flags += count * to.pixel;
  }
}

// Zeros at the sides of all rows.
void clear_sides(const Maps& maps, float* at) {
  const int64_t before = maps.before * kImages, own = maps.width * kImages, pitch = maps.pitch * kImages;
  if (own == pitch) return;
  for (int64_t row = 0; row < maps.channels * maps.height; ++row, at += pitch) {
    for (int64_t i = 0; i < before; i += kWidth) store<Lanes>(at + i, Lanes{});
    for (int64_t i = before + own; i < pitch; i += kWidth) store<Lanes>(at + i, Lanes{});
  }
}

// `flags` are the target's, or null.
template <bool kHalf>
void run_step(const Step& step, const float* source, float* target, uint8_t* flags) {
  const Maps &from = step.source, &to = step.target;
  Met met;
  for (int64_t y = 0; y < to.height; ++y) {
    for (int64_t phase = 0; phase < step.target_step && phase < to.width; ++phase) {
      met.taps = 0;
      for (int64_t i = step.row_begin[y]; i < step.row_begin[y + 1]; ++i) {
        for (int64_t j = step.column_begin[phase]; j < step.column_begin[phase + 1]; ++j) {
          const Tap &row = step.row[i], &column = step.column[j];
          met.source[met.taps] = (row.source * from.pitch + from.before + column.source) * kImages;
          met.weight[met.taps++] = (row.at * step.taps_across + column.at) * kTargets;
        }
      }
      const int64_t pixels = (to.width - phase - 1) / step.target_step + 1;
      for (int64_t block = 0; block < to.channels; block += kTargets) {
        const float* const weight = step.weight + block * from.channels * step.taps;
        const int64_t count = least(kTargets, to.channels - block);
        constexpr int64_t kMost = Sums<kHalf>::kMostTargets;
        for (int64_t first = 0; first < count; first += kMost) {
          const int64_t t = block + first;
          const Place place{target + (t * to.plane() + y * to.pitch + to.before + phase) * kImages,
                            flags ? flags + ((t * to.height + y) * to.width + phase) * kImages : nullptr,
                            step.bias ? step.bias + t : nullptr,
                            to.plane() * kImages,
                            to.height * to.width * kImages,
                            step.target_step * kImages,
                            step.relu};
          sum_targets<kHalf>(step, met, least(kMost, count - first), pixels, weight + first, source, place);
        }
      }
    }
  }
}

// The same elements, laid out as the target.
void spread(const Step& step, const float* source, float* target) {
  const int64_t own = step.source.width * kImages;
  target += step.target.before * kImages;
  for (int64_t row = 0; row < step.source.channels * step.source.height; ++row) {
    for (int64_t i = 0; i < own; i += kWidth) store<Lanes>(target + i, load<Lanes>(source + i));
    source += own;
    target += step.target.pitch * kImages;
  }
}

// Rows of `width` elements of `images` images, `step` floats apart. What a block has no images for is a copy of its
// last one.
void put_row(float* to, const float* from, int64_t step, int64_t images, int64_t width) {
  for (int64_t k = 0; k < kImages; k += kWidth) {
    int64_t i = 0;
    for (; width >= kWidth && i < width; i += kWidth) {
      if (i + kWidth > width) i = width - kWidth;  // once more what is there already
      Lanes v[kWidth];
#pragma GCC unroll 16
      for (int lane = 0; lane < kWidth; ++lane) v[lane] = load<Lanes>(from + least(k + lane, images - 1) * step + i);
      transpose(v);
#pragma GCC unroll 16
      for (int lane = 0; lane < kWidth; ++lane) store<Lanes>(to + (i + lane) * kImages + k, v[lane]);
    }
    for (; i < width; ++i)
      for (int64_t lane = k; lane < k + kWidth; ++lane)
        to[i * kImages + lane] = from[least(lane, images - 1) * step + i];
  }
}

void put_images(const InterleavedLayers& p, int64_t block, float* planes) {
  const Maps& maps = p.step[0].source;
  const int64_t first = block * kImages, images = least(kImages, p.batch - first), step = maps.elements();
  const float* from = p.x + first * step;
  clear_sides(maps, planes);
  planes += maps.before * kImages;
  if (maps.pitch == maps.width) return put_row(planes, from, step, images, step);
  for (int64_t row = 0; row < maps.channels * maps.height; ++row, from += maps.width, planes += maps.pitch * kImages)
    put_row(planes, from, step, images, maps.width);
}

// x where the ReLU behind it passes it on.
void put_through_relu(const Maps& maps, float* planes, const uint8_t* flags) {
  planes += maps.before * kImages;
  for (int64_t row = 0; row < maps.channels * maps.height; ++row, planes += maps.pitch * kImages)
    for (int64_t i = 0; i < maps.width * kImages; i += kWidth, flags += kWidth)
      store<Lanes>(planes + i, where_flagged(flags, load<Lanes>(planes + i)));
}

void take_images(const InterleavedLayers& p, int64_t block, const float* planes) {
  const int64_t first = block * kImages, images = least(kImages, p.batch - first);
  const int64_t count = p.step[p.steps - 1].target.elements();
  float* const to = p.out + first * count;
  for (int64_t k = 0; k < images; k += kWidth) {
    int64_t i = 0;
    for (; count >= kWidth && i < count; i += kWidth) {
      if (i + kWidth > count) i = count - kWidth;
      Lanes v[kWidth];
      load_transposed(v, planes + i * kImages + k, kImages);
#pragma GCC unroll 16
      for (int lane = 0; lane < kWidth; ++lane)
        if (k + lane < images) store<Lanes>(to + (k + lane) * count + i, v[lane]);
    }
    for (; i < count; ++i)
      for (int64_t lane = k; lane < least(k + kWidth, images); ++lane)
        to[lane * count + i] = planes[i * kImages + lane];
  }
}

}  // namespace

void FASTLIP_CAT(interleaved_layers_, FASTLIP_ISA)(const InterleavedLayers&, int64_t, int64_t, float*);
void FASTLIP_CAT(interleaved_layers_, FASTLIP_ISA)(const InterleavedLayers& p, int64_t begin, int64_t end,
                                                   float* scratch) {
  float* maps[2];
  maps[0] = at_cache_line<float>(scratch);
  maps[1] = maps[0] + p.floats[0];
  for (int64_t block = begin; block < end; ++block) {
    uint8_t* const flags = p.active ? p.active + block * p.flags * kImages : nullptr;
    put_images(p, block, maps[0]);
    if (p.x_flags >= 0) put_through_relu(p.step[0].source, maps[0], flags + p.x_flags * kImages);
    for (int64_t i = 0; i < p.steps; ++i) {
      const Step& step = p.step[i];
      const float* const source = maps[i % 2];
      float* const target = maps[(i + 1) % 2];
      clear_sides(step.target, target);
      uint8_t* const own = step.flags < 0 ? nullptr : flags + step.flags * kImages;
      if (!step.weight)
        spread(step, source, target);
      else if (p.batch - block * kImages > kImages / 2)
        run_step<false>(step, source, target, own);
      else
        run_step<true>(step, source, target, own);
    }
    take_images(p, block, maps[p.steps % 2]);
  }
}

}  // namespace fastlip::cpu
