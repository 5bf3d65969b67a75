// Products of a few rows by panels of weights on the CPU, all sums in registers: what convolutions are made of.
#pragma once

#include "kernels/cpu/flags.h"
#include "kernels/cpu/shuffles.h"

namespace fastlip::cpu {
namespace {

constexpr int64_t kLanes = IndirectConv::kLanes;
constexpr int kPanels = kVectorBytes == 64 ? 2 : 1;  // multiplied at once
constexpr int kPerPanel = static_cast<int>(kLanes) * 4 / kVectorBytes;
constexpr int kVectors = kPanels * kPerPanel;
constexpr int kTileRows = (kRegisters - kVectors - 1) / kVectors;  // the other registers hold weights and one factor
constexpr int64_t kDepth = 16;                                     // channels of a row that lie side by side
constexpr int64_t kWidth = kVectorBytes / 4;
constexpr int64_t kLine = 16;  // floats of a cache line
static_assert(kTileRows <= IndirectConv::kMostRows);

using Lanes = Vector<float>;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The factors of a product at some taps. One of them is packed weights, which have all taps; the other was gathered
// from maps, and has these alone.
struct Factors {
  const float* rows;   // for each kDepth channels, the rows' channels one row after the other
  int64_t row_tap;     // from tap to tap
  int64_t row_step;    // from kDepth channels to the next
  const float* lanes;  // [taps, channels, kLanes]
  int64_t panel;       // from one of these to the next
  const int32_t* taps;
  int64_t tap_count, channels;
};

// sums[row][lane] = sum over taps and channels, for R rows and P panels; `more`: added to what is there. The
// packed weights are the lanes or, for an adjoint, the rows.
template <int R, int P, bool kAdjoint>
void multiply(float* sums, bool more, const Factors& p) {
  constexpr int V = P * kPerPanel;
  Lanes sum[R][V] = {};
  if (more) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[r][v] = load<Lanes>(sums + (r * V + v) * kWidth);
  }
  for (int64_t t = 0; t < p.tap_count; ++t) {
    const float* a = p.rows + (kAdjoint ? p.taps[t] : t) * p.row_tap;
    const float* w = p.lanes + (kAdjoint ? t : p.taps[t]) * p.channels * kLanes;
    for (int64_t c = 0; c < p.channels; c += kDepth) {
      if (kAdjoint) {  // these channels' weights for the outputs that come next: the processor sees no order in them
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) __builtin_prefetch(a + (IndirectConv::kOutputs + r) * kDepth, 0, 2);
      }
      const int64_t depth = least(kDepth, p.channels - c);
#pragma GCC unroll 2
      for (int64_t k = 0; k < depth; ++k) {
        Lanes factor[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) factor[v] = load<Lanes>(w + (v / kPerPanel) * p.panel + (v % kPerPanel) * kWidth);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
          for (int v = 0; v < V; ++v) sum[r][v] += factor[v] * a[r * kDepth + k];
        w += kLanes;
      }
      a += p.row_step;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store<Lanes>(sums + (r * V + v) * kWidth, sum[r][v]);
}

using Multiply = void (*)(float*, bool, const Factors&);

template <int P, bool kAdjoint = false, int R = kTileRows>
Multiply multiply_of(int64_t rows) {
  if constexpr (R == 1) {
    return multiply<1, P, kAdjoint>;
  } else {
    return rows == R ? multiply<R, P, kAdjoint> : multiply_of<P, kAdjoint, R - 1>(rows);
  }
}

// to[j][i] = from[i][j] for the `rows` first i < kLanes, and 0 for the others.
FASTLIP_INLINE inline void transpose_block(const float* from, int64_t rows, float* to) {
  alignas(64) float padded[kLanes * kLanes];
  if (rows < kLanes) {
    for (int64_t i = 0; i < kLanes * kLanes; ++i) padded[i] = i < rows * kLanes ? from[i] : 0.0F;
    from = padded;
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < kLanes; i += kWidth)
#pragma GCC unroll 4
    for (int64_t j = 0; j < kLanes; j += kWidth) transpose(to + j * kLanes + i, kLanes, from + i * kLanes + j, kLanes);
}

// Fetches `width` elements of the result from `at` on, and what goes into or along with them.
template <typename Conv>
FASTLIP_INLINE inline void fetch(const Conv& p, int64_t at, int64_t width) {
  for (int64_t k = 0; k < width; k += kLine) {
    __builtin_prefetch(p.out + at + k, 1);
    if (p.other) __builtin_prefetch(p.other + at + k);
    if (p.active && k % (4 * kLine) == 0) __builtin_prefetch(p.active + at + k);
  }
}

// Writes a sum with its bias to element `at` of the result: with the other summand, through a ReLU or its gradient. L
// is float or Lanes.
template <typename L, typename Conv>
FASTLIP_INLINE inline void finish(const Conv& p, int64_t at, L value) {
  if (p.other) value += load<L>(p.other + at);
  if (p.relu) {
    if (p.active) store_flags(p.active + at, value);
    value = value < 0 ? L{} : value;  // keeps NaN, as torch does
  } else if (p.active) {
    value = where_flagged(p.active + at, value);
  }
  store<L>(p.out + at, value);
}
// Writes a sum to element `at`, which is `channel` of its pixel.
template <typename L, typename Conv>
FASTLIP_INLINE inline void finish(const Conv& p, int64_t at, int64_t channel, L value) {
  if (p.bias) value += load<L>(p.bias + channel);
  finish(p, at, value);
}

}  // namespace
}  // namespace fastlip::cpu
