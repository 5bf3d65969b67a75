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
  int64_t source[kMostTaps];                  // where the first one's sources are in the first channel,
  int64_t row[kMostTaps], column[kMostTaps];  // also as the row and the column of the map;
  int64_t tap[kMostTaps];                     // the taps,
  int64_t weight[kMostTaps];                  // and their weights, among those of a channel
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

// A value through a ReLU, or through the gradient of one, with `flags`.
FASTLIP_INLINE inline void finish(bool relu, uint8_t* flags, float* to, Lanes value) {
  if (relu) {
    if (flags) store_flags(flags, value);
    value = value < 0 ? Lanes{} : value;  // keeps NaN, as torch does
  } else if (flags) {
    value = where_flagged(flags, value);
  }
  store<Lanes>(to, value);
}

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
        uint8_t* const flags = to.flags ? to.flags + r * to.flag_target + p * to.pixel + k * kLanes : nullptr;
        finish(to.relu, flags, to.out + r * to.target + p * to.pixel + k * kLanes, as_lanes(sum[r][p][k]) + bias);
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

// Calls pool(c, k, target) for channels and pixels of a phase of a row, with where the target is.
template <typename Pool>
FASTLIP_INLINE inline void each_target(const Step& step, int64_t y, int64_t phase, float* target, Pool pool) {
  const Maps& to = step.target;
  for (int64_t c = 0; c < to.channels; ++c) {
    float* at = target + (c * to.plane() + y * to.pitch + to.before + phase) * kImages;
    for (int64_t k = 0; phase + k * step.target_step < to.width; ++k, at += step.target_step * kImages) pool(c, k, at);
  }
}

// The largest of the elements that taps meet, and which of them that is: the first one, or the last NaN, as torch has
// it.
void take_maxima(const Step& step, const Met& met, int64_t y, const float* source, float* target, uint8_t* flags) {
  using Numbers = Vector<int32_t>;
  const Maps &from = step.source, &to = step.target;
  each_target(step, y, 0, target, [&](int64_t c, int64_t k, float* at) FASTLIP_INLINE {
    uint8_t* const own = flags ? flags + ((c * to.height + y) * to.width + k) * kImages : nullptr;
    const float* const first = source + (c * from.plane() + k * step.source_step) * kImages;
    for (int64_t lane = 0; lane < kImages; lane += kWidth) {
      Lanes largest = Lanes{} - __builtin_inff();
      Numbers tap = Numbers{} - 1;
      for (int64_t t = 0; t < met.taps; ++t) {
        const int64_t column = met.column[t] + k * step.source_step;
        if (column < 0 || column >= from.width) continue;
        const Lanes value = load<Lanes>(first + met.source[t] + lane);
        const Numbers better = (value > largest) | (value != value) | (tap < 0);
        largest = better ? value : largest;
        tap = better ? Numbers{} + static_cast<int32_t>(met.tap[t]) : tap;
      }
      if (step.relu) {
        tap = largest <= 0 ? Numbers{} + InterleavedLayers::kStopped : tap;
        largest = largest < 0 ? Lanes{} : largest;
      }
      if (own) store_bytes(own + lane, tap);
      store<Lanes>(at + lane, largest);
    }
  });
}

// Of the gradients of the maxima that meet an element, those that are taken from it. `taken` are the maxima's.
void share_out(const Step& step, const Met& met, int64_t y, int64_t phase, const float* source, float* target,
               const uint8_t* flags, const uint8_t* taken) {
  const Maps &from = step.source, &to = step.target;
  each_target(step, y, phase, target, [&](int64_t c, int64_t k, float* at) FASTLIP_INLINE {
    const uint8_t* const own =
        flags ? flags + ((c * to.height + y) * to.width + phase + k * step.target_step) * kImages : nullptr;
    const float* const first = source + (c * from.plane() + k) * kImages;
    for (int64_t lane = 0; lane < kImages; lane += kWidth) {
      Lanes sum{};
      for (int64_t t = 0; t < met.taps; ++t) {
        const int64_t column = met.column[t] + k;
        if (column < 0 || column >= from.width) continue;
        const uint8_t* const which = taken + ((c * from.height + met.row[t]) * from.width + column) * kImages + lane;
        sum += where_byte(which, static_cast<uint8_t>(met.tap[t]), load<Lanes>(first + met.source[t] + lane));
      }
      store<Lanes>(at + lane, own ? where_flagged(own + lane, sum) : sum);
    }
  });
}

// The mean over all taps, or its adjoint.
void average(const Step& step, const Met& met, int64_t y, int64_t phase, const float* source, float* target,
             uint8_t* flags) {
  const Maps &from = step.source, &to = step.target;
  const float share = 1.0F / static_cast<float>(step.taps);
  each_target(step, y, phase, target, [&](int64_t c, int64_t k, float* at) FASTLIP_INLINE {
    uint8_t* const own =
        flags ? flags + ((c * to.height + y) * to.width + phase + k * step.target_step) * kImages : nullptr;
    const float* const first = source + (c * from.plane() + k * step.source_step) * kImages;
    for (int64_t lane = 0; lane < kImages; lane += kWidth) {
      Lanes sum{};
      for (int64_t t = 0; t < met.taps; ++t) sum += load<Lanes>(first + met.source[t] + lane);
      finish(step.relu, own ? own + lane : nullptr, at + lane, sum * share);
    }
  });
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

// All targets of a phase of a row.
template <bool kHalf>
void sum_row(const Step& step, const Met& met, int64_t y, int64_t phase, const float* source, float* target,
             uint8_t* flags) {
  const Maps &from = step.source, &to = step.target;
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

// `flags` are the target's, and `taken` the source's, or null.
void run_step(const Step& step, const float* source, float* target, uint8_t* flags, const uint8_t* taken, bool half) {
  const Maps &from = step.source, &to = step.target;
  Met met;
  for (int64_t y = 0; y < to.height; ++y) {
    for (int64_t phase = 0; phase < step.target_step && phase < to.width; ++phase) {
      met.taps = 0;
      for (int64_t i = step.row_begin[y]; i < step.row_begin[y + 1]; ++i) {
        for (int64_t j = step.column_begin[phase]; j < step.column_begin[phase + 1]; ++j) {
          const Tap &row = step.row[i], &column = step.column[j];
          met.source[met.taps] = (row.source * from.pitch + from.before + column.source) * kImages;
          met.row[met.taps] = row.source;
          met.column[met.taps] = column.source;
          met.tap[met.taps] = row.at * step.taps_across + column.at;
          met.weight[met.taps] = met.tap[met.taps] * kTargets;
          ++met.taps;
        }
      }
      if (step.kind == InterleavedLayers::Kind::kAveragePool)
        average(step, met, y, phase, source, target, flags);
      else if (step.kind == InterleavedLayers::Kind::kMaxPool && taken)
        share_out(step, met, y, phase, source, target, flags, taken);
      else if (step.kind == InterleavedLayers::Kind::kMaxPool)
        take_maxima(step, met, y, source, target, flags);
      else if (half)
        sum_row<true>(step, met, y, phase, source, target, flags);
      else
        sum_row<false>(step, met, y, phase, source, target, flags);
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
      if (step.kind == InterleavedLayers::Kind::kSpread) {
        spread(step, source, target);
        continue;
      }
      const auto flags_at = [&](int64_t at) { return at < 0 ? nullptr : flags + at * kImages; };
      run_step(step, source, target, flags_at(step.flags), flags_at(step.taken),
               p.batch - block * kImages <= kImages / 2);
    }
    take_images(p, block, maps[p.steps % 2]);
  }
}

}  // namespace fastlip::cpu
