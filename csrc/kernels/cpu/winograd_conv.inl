// Convolutions by minimal filtering on the CPU, Winograd's and that of maps of 2x2 pixels, compiled once per
// instruction set.
//
// A block of tiles is transformed once: for each of the 36 (or 9) taps a matrix of tiles by channels, in the layout of
// product.h. Each is multiplied by one group of weight panels, and the products of all taps are transformed back, for
// one group after the other. Every sum is one chain of multiply-adds over channels, so that an image's result depends
// on neither its batch nor the threads.
//
// Functions that do no more than fetch are always inlined: GCC finds that others have no effect, and does not call
// them.
#include "kernels/cpu/product.h"

namespace fastlip::cpu {
namespace {

static_assert(kPanels <= Filtering::kMostPanels);

FASTLIP_INLINE inline Lanes times(float factor, Lanes value) { return broadcast<Lanes>(factor) * value; }

// What a filtering is along one side, with the sizes of its arrays.
template <const Filtering& kFiltering>
struct Sizes {
  static constexpr int kSide = kFiltering.side, kPixels = kFiltering.pixels(), kValues = kFiltering.values;
  static constexpr int kTaps = kFiltering.taps();
  static constexpr const Filtering& kSizes = kFiltering;
  // The first pixel met by a tile that begins at `place`.
  static constexpr int64_t first_met(const WinogradConv& p, int64_t place) {
    return place - p.padding() + kFiltering.left_out;
  }
};

struct Tiles4 : Sizes<kTiles4> {
  // The points are 0, +-kInner, +-kOuter and infinity, with kInner kOuter = 1.
  static constexpr float kInner = 0.70710678F, kOuter = 1.41421356F, kInner2 = 0.5F, kOuter2 = 2.0F;

  // to[i step] = (B^T d)[i].
  FASTLIP_INLINE static void transform(const Lanes (&d)[kPixels], Lanes* to, int64_t step) {
    const Lanes inner = d[4] - kOuter2 * d[2], inner_odd = times(kInner, d[3] - kOuter2 * d[1]);
    const Lanes outer = d[4] - kInner2 * d[2], outer_odd = times(kOuter, d[3] - kInner2 * d[1]);
    to[0] = d[0] - (kInner2 + kOuter2) * d[2] + d[4];
    to[step] = inner + inner_odd;
    to[2 * step] = inner - inner_odd;
    to[3 * step] = outer + outer_odd;
    to[4 * step] = outer - outer_odd;
    to[5 * step] = d[1] - (kInner2 + kOuter2) * d[3] + d[5];
  }

  // to[i step] = (A^T m)[i].
  FASTLIP_INLINE static void transform_back(const Lanes (&m)[kValues], Lanes* to, int64_t step) {
    const Lanes inner = m[1] + m[2], inner_odd = times(kInner, m[1] - m[2]);
    const Lanes outer = m[3] + m[4], outer_odd = times(kOuter, m[3] - m[4]);
    to[0] = m[0] + inner + outer;
    to[step] = inner_odd + outer_odd;
    to[2 * step] = kInner2 * inner + kOuter2 * outer;
    to[3 * step] = kInner2 * inner_odd + kOuter2 * outer_odd + m[5];
  }

  // to[i step] = (G g)[i].
  FASTLIP_INLINE static void transform_kernel(const Lanes (&g)[3], Lanes* to, int64_t step) {
    const Lanes inner = times(-2.0F / 3.0F, g[0] + kInner2 * g[2]), inner_odd = times(-2.0F / 3.0F * kInner, g[1]);
    const Lanes outer = times(1.0F / 6.0F, g[0] + kOuter2 * g[2]), outer_odd = times(1.0F / 6.0F * kOuter, g[1]);
    to[0] = g[0];
    to[step] = inner + inner_odd;
    to[2 * step] = inner - inner_odd;
    to[3 * step] = outer + outer_odd;
    to[4 * step] = outer - outer_odd;
    to[5 * step] = g[2];
  }
};

struct Map2 : Sizes<kMap2> {
  FASTLIP_INLINE static void transform(const Lanes (&d)[kPixels], Lanes* to, int64_t step) {
    to[0] = d[0];
    to[step] = d[0] + d[1];
    to[2 * step] = d[1];
  }
  FASTLIP_INLINE static void transform_back(const Lanes (&m)[kValues], Lanes* to, int64_t step) {
    to[0] = m[1] + m[2];
    to[step] = m[1] + m[0];
  }
  FASTLIP_INLINE static void transform_kernel(const Lanes (&g)[3], Lanes* to, int64_t step) {
    to[0] = g[0] - g[1];
    to[step] = g[1];
    to[2 * step] = g[2] - g[1];
  }
};

// A tap's weights from channel c and panel q on: the channels follow, or, for the adjoint, the outputs of c's panel.
FASTLIP_INLINE inline const float* weights_at(const WinogradConv& p, int64_t q, int64_t tap, int64_t c) {
  return p.weight +
         (p.adjoint ? (c / kLanes * 9 + tap) * p.outputs + q * kLanes : (q * 9 + tap) * p.channels + c) * kLanes;
}

// Panels that are multiplied at once, and channels [begin, end) whose kernels are transformed at a time.
struct Step {
  int64_t panel, panels, begin, end;
};

Step step_from(const WinogradConv& p, int64_t panel, int64_t last_panel, int64_t channel) {
  return {panel, least<int64_t>(kPanels, last_panel - panel), channel,
          least(channel + Filtering::kChannels, p.channels)};
}

// Fetches a part of the weights of a step at one of the kernel's nine taps: they lie in short runs far from each other,
// which the processor does not fetch of itself.
FASTLIP_INLINE inline void fetch_weights(const WinogradConv& p, const Step& step, int64_t tap, int64_t part,
                                         int64_t parts) {
  if (step.panels <= 0) return;  // none are left
  const int64_t runs = p.adjoint ? round_up(step.end - step.begin, kLanes) / kLanes : step.panels;
  const int64_t lines =
      p.adjoint ? least(step.panels * kLanes, p.outputs - step.panel * kLanes) : step.end - step.begin;
  for (int64_t run = 0; run < runs; ++run) {
    const float* const from = p.adjoint ? weights_at(p, step.panel, tap, step.begin + run * kLanes)
                                        : weights_at(p, step.panel + run, tap, step.begin);
    for (int64_t line = lines * part / parts; line < lines * (part + 1) / parts; ++line)
      __builtin_prefetch(from + line * kLanes, 0, 2);
  }
}

// The kernels of `count` channels of a panel, transformed; from tap to tap it is `tap_step`, and then `stride`.
template <typename F>
void transform_panel(const WinogradConv& p, const float* weight, int64_t tap_step, int64_t count, float* kernels,
                     int64_t stride) {
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t k = 0; k < kLanes; k += kWidth) {
      Lanes half[F::kValues][3];
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) {
        Lanes g[3];
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
          const int tap = p.adjoint ? 8 - (3 * i + j) : 3 * i + j;
          g[i] = load<Lanes>(weight + tap * tap_step + c * kLanes + k);
        }
        F::transform_kernel(g, &half[0][j], 3);
      }
#pragma GCC unroll 6
      for (int i = 0; i < F::kValues; ++i) {
        Lanes row[F::kValues];
        F::transform_kernel(half[i], row, 1);
#pragma GCC unroll 6
        for (int j = 0; j < F::kValues; ++j)
          store<Lanes>(kernels + (i * F::kValues + j) * stride + c * kLanes + k, row[j]);
      }
    }
  }
}

// The same of an adjoint's panel, in whose `weight` lanes are channels; `outputs` and `left` channels are left from its
// first ones on.
template <typename F>
void transform_adjoint_panel(const WinogradConv& p, const float* weight, int64_t outputs, int64_t left, int64_t count,
                             float* kernels, int64_t stride) {
  alignas(64) float turned[9 * kLanes * kLanes];
  for (int64_t c = 0; c < count; c += kLanes, weight += 9 * p.outputs * kLanes) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      const float* const from = weight + tap * p.outputs * kLanes;
      if (c + kLanes < left)  // the next channels lie far behind, so that the processor does not fetch them of itself
        for (int64_t k = 0; k < least(outputs, kLanes); ++k) __builtin_prefetch(from + (9 * p.outputs + k) * kLanes);
      transpose_block(from, outputs, turned + tap * kLanes * kLanes);
    }
    transform_panel<F>(p, turned, kLanes * kLanes, least(kLanes, count - c), kernels + c * kLanes, stride);
  }
}

// A tile's image and first pixel of the result.
struct Place {
  int64_t image, y, x;
};

template <typename F>
Place place_of(const WinogradConv& p, int64_t tile) {
  const int64_t tiles = p.tiles(F::kSide), within = tile % tiles, across = p.tiles_across(F::kSide);
  return {tile / tiles, within / across * F::kSide, within % across * F::kSide};
}

// Lanes from `channel` on; the last ones may be beyond a pixel's channels, and are 0.
FASTLIP_INLINE inline Lanes channels_of(const float* pixel, int64_t channel, int64_t channels) {
  if (channel + kWidth <= channels) return load<Lanes>(pixel + channel);
  Lanes value{};
  for (int64_t k = channel; k < channels; ++k) value[k - channel] = pixel[k];
  return value;
}

// Fetches the pixels that the next tile meets and this one does not.
template <typename F>
FASTLIP_INLINE inline void fetch_tile(const WinogradConv& p, const Place& place) {
  const float* image = p.x + place.image * p.height * p.width * p.channels;
  const int64_t first = F::first_met(p, place.x) + F::kPixels - F::kSide;
  for (int64_t i = 0; i < F::kPixels; ++i) {
    const int64_t y = F::first_met(p, place.y) + i;
    if (y < 0 || y >= p.height) continue;
    for (int64_t x = first; x < first + F::kSide && x < p.width; ++x) {
      const float* pixel = image + (y * p.width + x) * p.channels;
      for (int64_t c = 0; c < p.channels; c += kLine) __builtin_prefetch(pixel + c);
    }
  }
}

// A tile's patch, transformed; `values` is where its first kDepth channels go at the first tap, `zeros` a pixel of
// padding, and from kDepth channels to the next it is `step`, from tap to tap `stride`.
template <typename F>
void transform_tile(const WinogradConv& p, const Place& place, float* values, const float* zeros, int64_t step,
                    int64_t stride) {
  const float* pixel[F::kPixels][F::kPixels];
  const float* image = p.x + place.image * p.height * p.width * p.channels;
  for (int i = 0; i < F::kPixels; ++i) {
    const int64_t y = F::first_met(p, place.y) + i;
    for (int j = 0; j < F::kPixels; ++j) {
      const int64_t x = F::first_met(p, place.x) + j;
      const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
      pixel[i][j] = inside ? image + (y * p.width + x) * p.channels : zeros;
    }
  }
  for (int64_t c = 0; c < p.channels; c += kDepth, values += step) {
    for (int64_t k = 0; k < kDepth; k += kWidth) {
      Lanes half[F::kValues][F::kPixels];
#pragma GCC unroll 6
      for (int j = 0; j < F::kPixels; ++j) {
        Lanes d[F::kPixels];
#pragma GCC unroll 6
        for (int i = 0; i < F::kPixels; ++i) d[i] = channels_of(pixel[i][j], c + k, p.channels);
        F::transform(d, &half[0][j], F::kPixels);
      }
#pragma GCC unroll 6
      for (int i = 0; i < F::kValues; ++i) {
        Lanes row[F::kValues];
        F::transform(half[i], row, 1);
#pragma GCC unroll 6
        for (int j = 0; j < F::kValues; ++j) store<Lanes>(values + (i * F::kValues + j) * stride + k, row[j]);
      }
    }
  }
}

// Writes kWidth outputs of a tile, from `channel` on; `sums` are those of the first tap.
template <typename F>
void finish_tile(const WinogradConv& p, const Place& place, const float* sums, int64_t stride, int64_t channel) {
  Lanes half[F::kSide][F::kValues];
#pragma GCC unroll 6
  for (int j = 0; j < F::kValues; ++j) {
    Lanes m[F::kValues];
#pragma GCC unroll 6
    for (int i = 0; i < F::kValues; ++i) m[i] = load<Lanes>(sums + (i * F::kValues + j) * stride);
    F::transform_back(m, &half[0][j], F::kValues);
  }
  const int64_t height = least<int64_t>(F::kSide, p.out_height - place.y);
  const int64_t width = least<int64_t>(F::kSide, p.out_width - place.x);
  for (int64_t i = 0; i < height; ++i) {
    Lanes row[F::kSide];
    F::transform_back(half[i], row, 1);
    const int64_t pixel = (place.image * p.out_height + place.y + i) * p.out_width + place.x;
    for (int64_t j = 0; j < width; ++j) {
      const int64_t at = (pixel + j) * p.outputs + channel;
      if (channel + kWidth <= p.outputs) {
        finish(p, at, channel, row[j]);
      } else {
        for (int64_t k = 0; channel + k < p.outputs; ++k) finish(p, at + k, channel + k, float{row[j][k]});
      }
    }
  }
}

// Fetches where `width` outputs of tiles [begin, end) go, from `channel` on, and what goes into or along with them.
template <typename F>
FASTLIP_INLINE inline void fetch_outputs(const WinogradConv& p, int64_t begin, int64_t end, int64_t channel,
                                         int64_t width) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const Place place = place_of<F>(p, tile);
    for (int64_t y = place.y; y < least(place.y + F::kSide, p.out_height); ++y) {
      for (int64_t x = place.x; x < least(place.x + F::kSide, p.out_width); ++x) {
        const int64_t at = ((place.image * p.out_height + y) * p.out_width + x) * p.outputs + channel;
        fetch(p, at, width);
      }
    }
  }
}

// A block of tiles in groups of as many as are multiplied at once, and its memory.
struct Block {
  int64_t count, groups;
  float *values, *sums;          // transformed tiles; their products with a group of panels
  int64_t value_step, sum_step;  // from tap to tap

  int64_t row(int64_t group) const { return count * group / groups; }  // the first of a group; at `groups`, the end
};

// Multiplies a block's channels [begin, end) at a tap with the tap's kernels, which lie `panel` apart from panel to
// panel. Before each group `fetch` is called with it.
template <typename Fetch>
void multiply_tap(const Block& block, int64_t tap, int64_t padded, int64_t begin, int64_t end, const float* kernels,
                  int64_t panel, int64_t panels, Fetch fetch) {
  const int32_t only = 0;
  for (int64_t group = 0; group < block.groups; ++group) {
    const int64_t first = block.row(group), rows = block.row(group + 1) - first;
    const float* const values = block.values + tap * block.value_step + first * padded + begin * rows;
    const Multiply run = panels == kPanels ? multiply_of<kPanels>(rows) : multiply_of<1>(rows);
    fetch(group);
    run(block.sums + tap * block.sum_step + first * panels * kLanes, begin > 0,
        {values, 0, rows * kDepth, kernels, panel, &only, 1, end - begin});
  }
}

// Tiles [begin, end), by panels [first_panel, last_panel).
template <typename F>
void filter(const WinogradConv& p, int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel, void* scratch) {
  const int64_t padded = Filtering::padded(p.channels), most = F::kSizes.together(p.channels);
  const int64_t lanes = kPanels * kLanes;
  const int64_t kernel_step = Filtering::tap_stride(Filtering::kChannels, kLanes);
  float* const values = static_cast<float*>(scratch);
  float* const sums = values + F::kTaps * Filtering::tap_stride(most, padded);
  float* const kernels = sums + F::kTaps * Filtering::tap_stride(most, lanes);
  float* const zeros = kernels + F::kTaps * kPanels * kernel_step;
  __builtin_memset(zeros, 0, static_cast<decltype(sizeof(float))>(padded) * sizeof(float));
  while (begin < end) {
    const int64_t blocks = (end - begin + most - 1) / most, count = (end - begin + blocks - 1) / blocks;
    const Block block{count, (count + kTileRows - 1) / kTileRows,  values,
                      sums,  Filtering::tap_stride(count, padded), Filtering::tap_stride(count, lanes)};
    for (int64_t group = 0; group < block.groups; ++group) {
      const int64_t first = block.row(group), rows = block.row(group + 1) - first;
      for (int64_t r = 0; r < rows; ++r) {
        if (begin + first + r + 1 < end) fetch_tile<F>(p, place_of<F>(p, begin + first + r + 1));
        transform_tile<F>(p, place_of<F>(p, begin + first + r), values + first * padded + r * kDepth, zeros,
                          rows * kDepth, block.value_step);
      }
    }
    for (int64_t q = first_panel; q < last_panel; q += kPanels) {
      Step step = step_from(p, q, last_panel, 0);
      const int64_t panels = step.panels;
      bool last = false;
      do {  // once without channels, too
        const int64_t c = step.begin, to = step.end;
        last = to == p.channels;
        const Step next = last ? step_from(p, q + kPanels, last_panel, 0) : step_from(p, q, last_panel, to);
        for (int64_t i = 0; i < panels; ++i) {
          float* const own = kernels + i * F::kTaps * kernel_step;
          const float* const weight = weights_at(p, q + i, 0, c);
          if (p.adjoint) {
            transform_adjoint_panel<F>(p, weight, p.outputs - (q + i) * kLanes, p.channels - c, to - c, own,
                                       kernel_step);
          } else {
            transform_panel<F>(p, weight, p.channels * kLanes, to - c, own, kernel_step);
          }
        }
        for (int64_t tap = 0; tap < F::kTaps; ++tap) {
          multiply_tap(block, tap, padded, c, to, kernels + tap * kernel_step, F::kTaps * kernel_step, panels,
                       [&](int64_t group) FASTLIP_INLINE {
                         for (int64_t k = 9 * tap / F::kTaps; k < 9 * (tap + 1) / F::kTaps; ++k)
                           fetch_weights(p, next, k, group, block.groups);
                       });
          if (last)  // meanwhile
            fetch_outputs<F>(p, begin + count * tap / F::kTaps, begin + count * (tap + 1) / F::kTaps, q * kLanes,
                             panels * kLanes);
        }
        step = next;
      } while (!last);
      for (int64_t tile = 0; tile < count; ++tile)
        for (int64_t k = 0; k < panels * kLanes && q * kLanes + k < p.outputs; k += kWidth)
          finish_tile<F>(p, place_of<F>(p, begin + tile), sums + tile * panels * kLanes + k, block.sum_step,
                         q * kLanes + k);
    }
    begin += count;
  }
}

}  // namespace

void FASTLIP_CAT(winograd_conv_, FASTLIP_ISA)(const WinogradConv&, int64_t, int64_t, int64_t, int64_t, void*);
void FASTLIP_CAT(winograd_conv_, FASTLIP_ISA)(const WinogradConv& p, int64_t begin, int64_t end, int64_t first_panel,
                                              int64_t last_panel, void* scratch) {
  (p.is_map2() ? filter<Map2> : filter<Tiles4>)(p, begin, end, first_panel, last_panel, scratch);
}

}  // namespace fastlip::cpu
