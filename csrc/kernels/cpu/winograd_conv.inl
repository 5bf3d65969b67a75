// Convolutions by Winograd's minimal filtering on the CPU, compiled once per instruction set.
//
// A block of tiles is transformed once: for each of the 36 taps a matrix of tiles by channels, in the layout of
// product.h. Each is multiplied by one group of weight panels, and the products of all taps are transformed back, for
// one group after the other. Every sum is one chain of multiply-adds over channels, so that an image's result depends
// on neither its batch nor the threads.
#include "kernels/cpu/product.h"

namespace fastlip::cpu {
namespace {

static_assert(kPanels <= WinogradConv::kMostPanels);
constexpr int kSide = WinogradConv::kSide, kPatch = WinogradConv::kPatch, kTaps = WinogradConv::kTaps;
// The points are 0, +-kInner, +-kOuter and infinity, with kInner kOuter = 1.
constexpr float kInner = 0.70710678F, kOuter = 1.41421356F, kInner2 = 0.5F, kOuter2 = 2.0F;

FASTLIP_INLINE inline Lanes times(float factor, Lanes value) { return broadcast<Lanes>(factor) * value; }

// to[i step] = (B^T d)[i].
FASTLIP_INLINE inline void transform(const Lanes (&d)[kPatch], Lanes* to, int64_t step) {
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
FASTLIP_INLINE inline void transform_back(const Lanes (&m)[kPatch], Lanes* to, int64_t step) {
  const Lanes inner = m[1] + m[2], inner_odd = times(kInner, m[1] - m[2]);
  const Lanes outer = m[3] + m[4], outer_odd = times(kOuter, m[3] - m[4]);
  to[0] = m[0] + inner + outer;
  to[step] = inner_odd + outer_odd;
  to[2 * step] = kInner2 * inner + kOuter2 * outer;
  to[3 * step] = kInner2 * inner_odd + kOuter2 * outer_odd + m[5];
}

// to[i step] = (G g)[i].
FASTLIP_INLINE inline void transform_kernel(const Lanes (&g)[3], Lanes* to, int64_t step) {
  const Lanes inner = times(-2.0F / 3.0F, g[0] + kInner2 * g[2]), inner_odd = times(-2.0F / 3.0F * kInner, g[1]);
  const Lanes outer = times(1.0F / 6.0F, g[0] + kOuter2 * g[2]), outer_odd = times(1.0F / 6.0F * kOuter, g[1]);
  to[0] = g[0];
  to[step] = inner + inner_odd;
  to[2 * step] = inner - inner_odd;
  to[3 * step] = outer + outer_odd;
  to[4 * step] = outer - outer_odd;
  to[5 * step] = g[2];
}

// A tap's weights from channel c and panel q on: the channels follow, or, for the adjoint, the outputs of c's panel.
FASTLIP_INLINE inline const float* weights_at(const WinogradConv& p, int64_t q, int64_t tap, int64_t c) {
  return p.weight +
         (p.adjoint ? (c / kLanes * 9 + tap) * p.outputs + q * kLanes : (q * 9 + tap) * p.channels + c) * kLanes;
}

// The kernels of `count` channels of a panel, transformed; from tap to tap it is `tap_step`, and then `stride`.
void transform_panel(const WinogradConv& p, const float* weight, int64_t tap_step, int64_t count, float* kernels,
                     int64_t stride) {
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t k = 0; k < kLanes; k += kWidth) {
      Lanes half[kPatch][3];
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) {
        Lanes g[3];
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
          const int tap = p.adjoint ? 8 - (3 * i + j) : 3 * i + j;
          g[i] = load<Lanes>(weight + tap * tap_step + c * kLanes + k);
        }
        transform_kernel(g, &half[0][j], 3);
      }
#pragma GCC unroll 6
      for (int i = 0; i < kPatch; ++i) {
        Lanes row[kPatch];
        transform_kernel(half[i], row, 1);
#pragma GCC unroll 6
        for (int j = 0; j < kPatch; ++j) store<Lanes>(kernels + (i * kPatch + j) * stride + c * kLanes + k, row[j]);
      }
    }
  }
}

// The same of an adjoint's panel, in whose `weight` lanes are channels; `outputs` and `left` channels are left from its
// first ones on.
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
    transform_panel(p, turned, kLanes * kLanes, least(kLanes, count - c), kernels + c * kLanes, stride);
  }
}

// A tile's image and first pixel of the result.
struct Place {
  int64_t image, y, x;
};

Place place_of(const WinogradConv& p, int64_t tile) {
  const int64_t within = tile % p.tiles(), across = p.tiles_across();
  return {tile / p.tiles(), within / across * kSide, within % across * kSide};
}

// Lanes from `channel` on; the last ones may be beyond a pixel's channels, and are 0.
FASTLIP_INLINE inline Lanes channels_of(const float* pixel, int64_t channel, int64_t channels) {
  if (channel + kWidth <= channels) return load<Lanes>(pixel + channel);
  Lanes value{};
  for (int64_t k = channel; k < channels; ++k) value[k - channel] = pixel[k];
  return value;
}

// Fetches the pixels that the next tile meets and this one does not.
void fetch_tile(const WinogradConv& p, const Place& place) {
  const float* image = p.x + place.image * p.height * p.width * p.channels;
  const int64_t first = place.x - p.padding() + kPatch - kSide;
  for (int64_t i = 0; i < kPatch; ++i) {
    const int64_t y = place.y - p.padding() + i;
    if (y < 0 || y >= p.height) continue;
    for (int64_t x = first; x < first + kSide && x < p.width; ++x) {
      const float* pixel = image + (y * p.width + x) * p.channels;
      for (int64_t c = 0; c < p.channels; c += kLine) __builtin_prefetch(pixel + c);
    }
  }
}

// A tile's patch, transformed; `values` is where its first kDepth channels go at the first tap, `zeros` a pixel of
// padding, and from kDepth channels to the next it is `step`, from tap to tap `stride`.
void transform_tile(const WinogradConv& p, const Place& place, float* values, const float* zeros, int64_t step,
                    int64_t stride) {
  const float* pixel[kPatch][kPatch];
  const float* image = p.x + place.image * p.height * p.width * p.channels;
  for (int i = 0; i < kPatch; ++i) {
    const int64_t y = place.y - p.padding() + i;
    for (int j = 0; j < kPatch; ++j) {
      const int64_t x = place.x - p.padding() + j;
      const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
      pixel[i][j] = inside ? image + (y * p.width + x) * p.channels : zeros;
    }
  }
  for (int64_t c = 0; c < p.channels; c += kDepth, values += step) {
    for (int64_t k = 0; k < kDepth; k += kWidth) {
      Lanes half[kPatch][kPatch];
#pragma GCC unroll 6
      for (int j = 0; j < kPatch; ++j) {
        Lanes d[kPatch];
#pragma GCC unroll 6
        for (int i = 0; i < kPatch; ++i) d[i] = channels_of(pixel[i][j], c + k, p.channels);
        transform(d, &half[0][j], kPatch);
      }
#pragma GCC unroll 6
      for (int i = 0; i < kPatch; ++i) {
        Lanes row[kPatch];
        transform(half[i], row, 1);
#pragma GCC unroll 6
        for (int j = 0; j < kPatch; ++j) store<Lanes>(values + (i * kPatch + j) * stride + k, row[j]);
      }
    }
  }
}

// Writes kWidth outputs of a tile, from `channel` on; `sums` are those of the first tap.
void finish_tile(const WinogradConv& p, const Place& place, const float* sums, int64_t stride, int64_t channel) {
  Lanes half[kSide][kPatch];
#pragma GCC unroll 6
  for (int j = 0; j < kPatch; ++j) {
    Lanes m[kPatch];
#pragma GCC unroll 6
    for (int i = 0; i < kPatch; ++i) m[i] = load<Lanes>(sums + (i * kPatch + j) * stride);
    transform_back(m, &half[0][j], kPatch);
  }
  const int64_t height = least<int64_t>(kSide, p.out_height - place.y);
  const int64_t width = least<int64_t>(kSide, p.out_width - place.x);
  for (int64_t i = 0; i < height; ++i) {
    Lanes row[kSide];
    transform_back(half[i], row, 1);
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

// Fetches where `width` outputs of tiles [begin, end) go, from `channel` on, and what is added to them or masks them.
void fetch_outputs(const WinogradConv& p, int64_t begin, int64_t end, int64_t channel, int64_t width) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const Place place = place_of(p, tile);
    for (int64_t y = place.y; y < least(place.y + kSide, p.out_height); ++y) {
      for (int64_t x = place.x; x < least(place.x + kSide, p.out_width); ++x) {
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
// panel.
void multiply_tap(const Block& block, int64_t tap, int64_t padded, int64_t begin, int64_t end, const float* kernels,
                  int64_t panel, int64_t panels) {
  const int32_t only = 0;
  for (int64_t group = 0; group < block.groups; ++group) {
    const int64_t first = block.row(group), rows = block.row(group + 1) - first;
    const float* const values = block.values + tap * block.value_step + first * padded + begin * rows;
    const Multiply run = panels == kPanels ? multiply_of<kPanels>(rows) : multiply_of<1>(rows);
    run(block.sums + tap * block.sum_step + first * panels * kLanes, begin > 0,
        {values, 0, rows * kDepth, kernels, panel, &only, 1, end - begin});
  }
}

}  // namespace

void FASTLIP_CAT(winograd_conv_, FASTLIP_ISA)(const WinogradConv&, int64_t, int64_t, int64_t, int64_t, void*);
void FASTLIP_CAT(winograd_conv_, FASTLIP_ISA)(const WinogradConv& p, int64_t begin, int64_t end, int64_t first_panel,
                                              int64_t last_panel, void* scratch) {
  const int64_t padded = WinogradConv::padded(p.channels), most = WinogradConv::together(p.channels);
  const int64_t lanes = kPanels * kLanes;
  const int64_t kernel_step = WinogradConv::tap_stride(WinogradConv::kChannels, kLanes);
  float* const values = static_cast<float*>(scratch);
  float* const sums = values + kTaps * WinogradConv::tap_stride(most, padded);
  float* const kernels = sums + kTaps * WinogradConv::tap_stride(most, lanes);
  float* const zeros = kernels + kTaps * kPanels * kernel_step;
  __builtin_memset(zeros, 0, static_cast<decltype(sizeof(float))>(padded) * sizeof(float));
  while (begin < end) {
    const int64_t blocks = (end - begin + most - 1) / most, count = (end - begin + blocks - 1) / blocks;
    const Block block{count, (count + kTileRows - 1) / kTileRows,     values,
                      sums,  WinogradConv::tap_stride(count, padded), WinogradConv::tap_stride(count, lanes)};
    for (int64_t group = 0; group < block.groups; ++group) {
      const int64_t first = block.row(group), rows = block.row(group + 1) - first;
      for (int64_t r = 0; r < rows; ++r) {
        if (begin + first + r + 1 < end) fetch_tile(p, place_of(p, begin + first + r + 1));
        transform_tile(p, place_of(p, begin + first + r), values + first * padded + r * kDepth, zeros, rows * kDepth,
                       block.value_step);
      }
    }
    for (int64_t q = first_panel; q < last_panel; q += kPanels) {
      const int64_t panels = least<int64_t>(kPanels, last_panel - q);
      int64_t c = 0;
      do {  // once without channels, too
        const int64_t to = least(c + WinogradConv::kChannels, p.channels);
        for (int64_t i = 0; i < panels; ++i) {
          float* const own = kernels + i * kTaps * kernel_step;
          const float* const weight = weights_at(p, q + i, 0, c);
          if (p.adjoint) {
            transform_adjoint_panel(p, weight, p.outputs - (q + i) * kLanes, p.channels - c, to - c, own, kernel_step);
          } else {
            transform_panel(p, weight, p.channels * kLanes, to - c, own, kernel_step);
          }
        }
        for (int64_t tap = 0; tap < kTaps; ++tap) {
          multiply_tap(block, tap, padded, c, to, kernels + tap * kernel_step, kTaps * kernel_step, panels);
          if (to == p.channels)  // meanwhile
            fetch_outputs(p, begin + count * tap / kTaps, begin + count * (tap + 1) / kTaps, q * kLanes,
                          panels * kLanes);
        }
        c = to;
      } while (c < p.channels);
      for (int64_t tile = 0; tile < count; ++tile)
        for (int64_t k = 0; k < panels * kLanes && q * kLanes + k < p.outputs; k += kWidth)
          finish_tile(p, place_of(p, begin + tile), sums + tile * panels * kLanes + k, block.sum_step, q * kLanes + k);
    }
    begin += count;
  }
}

}  // namespace fastlip::cpu
