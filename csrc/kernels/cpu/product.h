// Products of a few rows by panels of weights on the CPU, all sums in registers: what convolutions are made of.
#pragma once

#include "kernels/cpu/vectors.h"

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

// What a few rows hold at some taps: for each tap and each kDepth channels, the rows' channels one row after the other.
struct Gathered {
  const float* values;
  const int32_t* taps;
  int64_t tap_count;
};

// sums[row][lane] = sum over taps and channels, for R rows and P panels; `more`: added to what is there.
template <int R, int P>
void multiply(float* sums, bool more, const Gathered& rows, const float* weight, int64_t panel, int64_t channels) {
  constexpr int V = P * kPerPanel;
  Lanes sum[R][V] = {};
  if (more) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[r][v] = load<Lanes>(sums + (r * V + v) * kWidth);
  }
  const float* a = rows.values;
  for (int64_t t = 0; t < rows.tap_count; ++t) {
    const float* w = weight + rows.taps[t] * channels * kLanes;
    for (int64_t c = 0; c < channels; c += kDepth) {
      const int64_t depth = least(kDepth, channels - c);
#pragma GCC unroll 2
      for (int64_t k = 0; k < depth; ++k) {
        Lanes factor[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) factor[v] = load<Lanes>(w + (v / kPerPanel) * panel + (v % kPerPanel) * kWidth);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
          for (int v = 0; v < V; ++v) sum[r][v] += factor[v] * a[r * kDepth + k];
        w += kLanes;
      }
      a += R * kDepth;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store<Lanes>(sums + (r * V + v) * kWidth, sum[r][v]);
}

using Multiply = void (*)(float*, bool, const Gathered&, const float*, int64_t, int64_t);

template <int P, int R = kTileRows>
Multiply multiply_of(int64_t rows) {
  if constexpr (R == 1) {
    return multiply<1, P>;
  } else {
    return rows == R ? multiply<R, P> : multiply_of<P, R - 1>(rows);
  }
}

// Fetches `width` elements of the result from `at` on, and what is added to them or masks them.
template <typename Conv>
FASTLIP_INLINE inline void fetch(const Conv& p, int64_t at, int64_t width) {
  for (int64_t k = 0; k < width; k += kLine) {
    __builtin_prefetch(p.out + at + k, 1);
    if (p.other) __builtin_prefetch(p.other + at + k);
    if (p.mask) __builtin_prefetch(p.mask + at + k);
  }
}

// Writes a sum with its bias to element `at` of the result: with the other summand, through ReLU and mask. L is float
// or Lanes.
template <typename L, typename Conv>
FASTLIP_INLINE inline void finish(const Conv& p, int64_t at, L value) {
  if (p.other) value += load<L>(p.other + at);
  if (p.relu) value = value < 0 ? L{} : value;  // keeps NaN, as torch does
  if (p.mask) value = load<L>(p.mask + at) <= 0 ? L{} : value;
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
