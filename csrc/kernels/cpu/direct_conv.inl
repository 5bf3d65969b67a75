// Convolutions of few channels and their adjoints on the CPU by direct summation, compiled once per instruction set.
//
// Floor: taps * channels multiply-adds an element of out, a vector of neighbouring pixels at a time; x is read once
// from memory but for the rows that bands share. A band of rows is copied to planes that stay in cache, one for each
// channel and phase, with zeros at the sides, so that a tap is an offset for all pixels of a plane: pixels of several
// rows share a vector, and those at the sides that belong to no row are dropped. Sums of several targets and vectors
// are in registers together. Every sum is one chain of multiply-adds over channels and taps, so that an image's result
// depends on neither its batch nor the threads.
#include "kernels/cpu/product.h"

namespace fastlip::cpu {
namespace {

constexpr int kSums = kRegisters == 32 ? 24 : 12;  // registers; the others hold sources and a weight
constexpr int kMostTargets = kRegisters == 32 ? 8 : 4;
static_assert(DirectConv::kTargets % kMostTargets == 0);

// Vectors of R targets that are summed together.
constexpr int most_vectors(int targets) { return least(8, kSums / targets); }

using SumTile = void (*)(const DirectConv&, const DirectConv::Phase&, const float*, const float*, float*);

// R targets at V vectors of pixels; `source` and `sums` are those of the first one.
template <int R, int V>
void sum_tile(const DirectConv& p, const DirectConv::Phase& phase, const float* weight, const float* source,
              float* sums) {
  Lanes sum[R][V] = {};
  for (int64_t c = 0; c < p.sources; ++c, source += p.planes) {
    for (int64_t t = 0; t < phase.taps; ++t, weight += DirectConv::kTargets) {
      const float* const from = source + phase.offset[t];
      Lanes x[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) x[v] = load<Lanes>(from + v * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sum[r][v] += x[v] * weight[r];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store<Lanes>(sums + r * p.sums + v * kWidth, sum[r][v]);
}

template <int R, int V = most_vectors(R)>
SumTile sum_tile_of(int64_t vectors) {
  if constexpr (V == 1) {
    return sum_tile<R, 1>;
  } else {
    return vectors == V ? sum_tile<R, V> : sum_tile_of<R, V - 1>(vectors);
  }
}

// Up to R targets at a phase's pixels, in tiles that are as even as can be.
template <int R = kMostTargets>
void sum_targets(const DirectConv& p, const DirectConv::Phase& phase, int64_t targets, int64_t pixels,
                 const float* weight, const float* source, float* sums) {
  if constexpr (R > 1) {
    if (targets < R) return sum_targets<R - 1>(p, phase, targets, pixels, weight, source, sums);
  }
  constexpr int64_t kMost = most_vectors(R);
  const int64_t vectors = (pixels + kWidth - 1) / kWidth, tiles = (vectors + kMost - 1) / kMost;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = vectors * tile / tiles, count = vectors * (tile + 1) / tiles - first;
    sum_tile_of<R>(count)(p, phase, weight, source + first * kWidth, sums + first * kWidth);
  }
}

// All targets of a phase in `rows` rows.
void sum_phase(const DirectConv& p, const DirectConv::Phase& phase, int64_t rows, const float* source, float* sums) {
  constexpr int64_t kTargets = DirectConv::kTargets;
  const int64_t pixels = (rows - 1) * p.pitch + phase.size[1];
  for (int64_t first = 0; first < p.targets; first += kMostTargets) {
    const int64_t block = first / kTargets * p.sources * phase.taps * kTargets + first % kTargets;
    sum_targets(p, phase, least<int64_t>(kMostTargets, p.targets - first), pixels, p.packed + phase.weight + block,
                source, sums + first * p.sums);
  }
}

// What lies between the pixels of a row of a plane and those of the next one is 0 from the start, and stays so: the
// functions below write whole vectors, but zeros beyond the row's end, and the rows of a plane one after the other.

void clear(float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) store<Lanes>(to + i, Lanes{});
}

struct FirstLanes {
  int32_t lanes[2 * kWidth] = {};
  constexpr FirstLanes() {
    for (int i = 0; i < kWidth; ++i) lanes[i] = -1;
  }
};
constexpr FirstLanes kFirst;

// The first `count` lanes of a vector, up to all, and 0 in the others.
FASTLIP_INLINE inline Lanes first_lanes(Lanes v, int64_t count) {
  using Mask = decltype(v < v);
  return (Lanes)((Mask)v & load<Mask>(kFirst.lanes + kWidth - count));
}

// to[i] = from[i * step]; `there`: floats that there are from `from` on.
FASTLIP_INLINE inline void take(float* to, const float* from, int64_t step, int64_t count, int64_t there) {
  int64_t i = 0;
  if (step == 1) {
    for (; i < count && i + kWidth <= there; i += kWidth)
      store<Lanes>(to + i, first_lanes(load<Lanes>(from + i), least(kWidth, count - i)));
  }
  for (; i < count; ++i) to[i] = from[i * step];
}

// to[i] = from[2 * i] for `even` i, and to[plane + i] = from[2 * i + 1] for `odd` ones, as many or one fewer.
FASTLIP_INLINE inline void take_both(float* to, int64_t plane, const float* from, int64_t even, int64_t odd,
                                     int64_t there) {
  int64_t i = 0;
  for (; i < even && 2 * (i + kWidth) <= there; i += kWidth) {
    const Lanes a = load<Lanes>(from + 2 * i), b = load<Lanes>(from + 2 * i + kWidth);
    const Lanes first = every_second<0>(a, b, LanesOfFloats{}), second = every_second<1>(a, b, LanesOfFloats{});
    store<Lanes>(to + i, first_lanes(first, least(kWidth, even - i)));
    store<Lanes>(to + plane + i, first_lanes(second, least(kWidth, odd - i)));
  }
  for (; i < even; ++i) {
    to[i] = from[2 * i];
    if (i < odd) to[plane + i] = from[2 * i + 1];
  }
}

// `count` pixels, `step` apart, of kWidth sources that are neighbours in memory.
FASTLIP_INLINE inline void take_transposed(float* to, int64_t to_step, const float* from, int64_t step, int64_t count,
                                           int64_t there) {
  int64_t i = 0;
  for (; i < count && (i + kWidth - 1) * step + kWidth <= there; i += kWidth) {
    Lanes v[kWidth];
    load_transposed(v, from + i * step, step);
#pragma GCC unroll 16
    for (int k = 0; k < kWidth; ++k) store<Lanes>(to + k * to_step + i, first_lanes(v[k], least(kWidth, count - i)));
  }
  for (; i < count; ++i)
    for (int64_t k = 0; k < kWidth; ++k) to[k * to_step + i] = from[i * step + k];
}

// Calls put(to, at) for the rows that `rows` rows of targets from `begin` on meet, in all phases of rows: `to` is where
// the row begins in the planes of a source and of a phase of columns, whose first one is at `planes`; `at` where it
// begins in x for the first source and phase of columns, or negative if it is none of the image's.
template <typename Put>
FASTLIP_INLINE inline void each_row(const DirectConv& p, int64_t image, float* planes, int64_t begin, int64_t rows,
                                    Put put) {
  const int64_t across = p.source_phases[1];
  for (int64_t a = 0; a < p.source_phases[0]; ++a) {
    const DirectConv::Phase& phase = p.source_phase[a * across];
    float* to = planes + a * across * p.plane + p.before;
    int64_t y = begin + p.above;
    int64_t at = image * p.x_stride[0] + (y * p.source_step[0] + phase.at[0]) * p.x_stride[2];
    for (int64_t row = 0; row < rows + p.reach; ++row) {
      put(to, y >= 0 && y < phase.size[0] ? at : -1);
      to += p.pitch;
      at += p.source_step[0] * p.x_stride[2];
      ++y;
    }
  }
}

// The planes of an image for the `rows` rows of targets from `begin` on.
void put_planes(const DirectConv& p, int64_t image, float* planes, int64_t begin, int64_t rows) {
  const int64_t phases = p.source_phases[1], pixel = p.x_stride[3], step = p.source_step[1] * pixel;
  const DirectConv::Phase* const phase = p.source_phase;  // each phase of rows has the same ones of columns
  if (p.source_phases[0] == 0) return;
  int64_t c = 0;
  if (p.x_stride[1] == 1) {
    for (; c + kWidth <= p.sources; c += kWidth) {
      for (int64_t b = 0; b < phases; ++b) {
        const int64_t own = phase[b].at[1] * pixel + c, count = phase[b].size[1];
        each_row(p, image, planes + c * p.planes + b * p.plane, begin, rows, [&](float* to, int64_t at) FASTLIP_INLINE {
          if (at >= 0)
            take_transposed(to, p.planes, p.x + at + own, step, count, p.x_floats - at - own);
          else
            for (int64_t k = 0; k < kWidth; ++k) clear(to + k * p.planes, count);
        });
      }
    }
  }
  for (; c < p.sources; ++c) {
    const int64_t source = c * p.x_stride[1];
    if (phases == 2 && step == 2) {
      const int64_t even = phase[0].size[1], odd = phase[1].size[1];
      each_row(p, image, planes + c * p.planes, begin, rows, [&](float* to, int64_t at) FASTLIP_INLINE {
        if (at >= 0) {
          take_both(to, p.plane, p.x + at + source, even, odd, p.x_floats - at - source);
        } else {
          clear(to, even);
          clear(to + p.plane, odd);
        }
      });
      continue;
    }
    for (int64_t b = 0; b < phases; ++b) {
      const int64_t own = source + phase[b].at[1] * pixel, count = phase[b].size[1];
      each_row(p, image, planes + c * p.planes + b * p.plane, begin, rows, [&](float* to, int64_t at) FASTLIP_INLINE {
        if (at >= 0)
          take(to, p.x + at + own, step, count, p.x_floats - at - own);
        else
          clear(to, count);
      });
    }
  }
}

// A row of out from a row of each phase, which are `step` apart; beyond its end comes what the next row replaces.
FASTLIP_INLINE inline void join(const DirectConv& p, float* to, const float* sums, int64_t step, int64_t width) {
  int64_t x = 0;
  if (p.target_phases[1] == 1) {
    for (; x < width; x += kWidth) store<Lanes>(to + x, load<Lanes>(sums + x));
  } else if (p.target_phases[1] == 2) {
    for (; x < width; x += 2 * kWidth) {
      const Lanes a = load<Lanes>(sums + x / 2), b = load<Lanes>(sums + step + x / 2);
      store<Lanes>(to + x, in_turns<0>(a, b, LanesOfFloats{}));
      if (x + kWidth < width) store<Lanes>(to + x + kWidth, in_turns<1>(a, b, LanesOfFloats{}));
    }
  }
  for (int64_t at = 0; x < width; ++at)
    for (int64_t phase = 0; phase < p.target_phases[1] && x < width; ++phase, ++x) to[x] = sums[phase * step + at];
}

// Up to kWidth targets: sums that begin `step` apart, whose rows begin `pitch` apart, are rows of out from element `at`
// on, which follow one another. What lies between rows of sums is transposed too, and dropped.
void put_targets(const DirectConv& p, int64_t first, int64_t targets, int64_t at, const float* sums, int64_t step,
                 int64_t rows, int64_t width, int64_t pitch) {
  if (p.out_stride[1] == 1 && targets == kWidth) {  // as p.targets < kWidth would leave most of a vector empty
    const int64_t pixels = (rows - 1) * pitch + width;
    for (int64_t begin = 0, column = 0; begin < pixels; begin += kWidth) {
      Lanes v[kWidth];
      load_transposed(v, sums + begin, step);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        if (column < width && begin + i < pixels) {
          finish(p, at, first, v[i]);
          at += p.out_stride[3];
        }
        column = column + 1 == pitch ? 0 : column + 1;
      }
    }
    return;
  }
  for (int64_t t = 0; t < targets; ++t) {
    const float bias = p.bias ? p.bias[first + t] : 0.0F;
    int64_t to = at + t * p.out_stride[1];
    for (int64_t y = 0; y < rows; ++y, to += width * p.out_stride[3]) {
      const float* const found = sums + t * step + y * pitch;
      int64_t i = 0;
      if (p.out_stride[3] == 1)
        for (; i + kWidth <= width; i += kWidth) finish(p, to + i, load<Lanes>(found + i) + bias);
      for (; i < width; ++i) finish(p, to + i * p.out_stride[3], found[i] + bias);
    }
  }
}

// Writes `rows` rows of out from `begin` on.
void put_rows(const DirectConv& p, int64_t image, int64_t begin, int64_t rows, const float* sums, float* joined) {
  const int64_t width = p.adjoint ? p.image[1] : p.map[1], step = p.targets * p.sums;
  const int64_t down = p.target_phases[0], across = p.target_phases[1];
  for (int64_t first = 0; first < p.targets; first += kWidth) {
    const int64_t targets = least(kWidth, p.targets - first);
    const int64_t at = image * p.out_stride[0] + first * p.out_stride[1] + begin * p.out_stride[2];
    // Pixels of one target are joined where vectors of them would else end with each row.
    if (down * across == 1 && (p.out_stride[1] == 1 || width % kWidth == 0)) {
      put_targets(p, first, targets, at, sums + first * p.sums, p.sums, rows, width, p.pitch);
      continue;
    }
    for (int64_t t = 0; t < targets; ++t) {
      const float* own = sums + (first + t) * p.sums;
      float* to = joined + t * p.joined;
      for (int64_t y = 0; y < rows; own += p.pitch)
        for (int64_t a = 0; a < down && y < rows; ++a, ++y, to += width)
          join(p, to, own + a * across * step, step, width);
    }
    put_targets(p, first, targets, at, joined, p.joined, 1, rows * width, rows * width);
  }
}

}  // namespace

void FASTLIP_CAT(direct_conv_, FASTLIP_ISA)(const DirectConv&, int64_t, int64_t, float*);
void FASTLIP_CAT(direct_conv_, FASTLIP_ISA)(const DirectConv& p, int64_t begin, int64_t end, float* scratch) {
  float* const planes = at_cache_line<float>(scratch);
  float* const sums = planes + p.sources * p.planes;
  float* const joined = sums + p.target_phases[0] * p.target_phases[1] * p.targets * p.sums;
  const int64_t height = p.adjoint ? p.image[0] : p.map[0];
  clear(planes, p.sources * p.planes);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.bands, first = item % p.bands * p.rows;
    const int64_t rows = least(p.rows, p.target_phase[0].size[0] - first);
    put_planes(p, image, planes, first, rows);
    for (int64_t i = 0; i < p.target_phases[0] * p.target_phases[1]; ++i) {
      const DirectConv::Phase& phase = p.target_phase[i];
      const int64_t own = least(rows, phase.size[0] - first);
      if (own > 0) sum_phase(p, phase, own, planes, sums + i * p.targets * p.sums);
    }
    const int64_t top = first * p.target_phases[0];
    put_rows(p, image, top, least(rows * p.target_phases[0], height - top), sums, joined);
  }
}

}  // namespace fastlip::cpu
