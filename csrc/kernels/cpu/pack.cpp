// pack_weights_ on the CPU.
//
// Floor: every element read once and written once. Rows of a block are written whole. Where the elements
// of one target are contiguous, 64 of them at a time are transposed in a buffer, so that each cache line is read once.
#include "kernels/pack.h"

#include <algorithm>

namespace fastlip::cpu {
namespace {

constexpr int64_t kBlock = OperatorStep::kBlock, kTransposed = 64;

// One block of `count` targets, `width` with padding; `from` points to its first target and source.
template <typename From, typename To>
void pack_block(To* out, const From* from, const PackProblem& p, bool adjoint, int64_t count, int64_t width) {
  const int64_t target = pack_target_stride(p, adjoint), source = pack_source_stride(p, adjoint);
  if (adjoint || p.sources == 1) {  // targets are p.taps apart
    for (int64_t s = 0; s < p.sources; ++s) {
      for (int64_t tap = 0; tap < p.taps; ++tap) {
        To* const row = out + (tap * p.sources + s) * width;
        const From* const first = from + s * source + tap;
        if (p.taps == 1) {
          for (int64_t t = 0; t < count; ++t) row[t] = static_cast<To>(first[t]);
        } else {
          for (int64_t t = 0; t < count; ++t) row[t] = static_cast<To>(first[t * target]);
        }
        std::fill(row + count, row + width, To(0));
      }
    }
    return;
  }
  To transposed[kTransposed][kBlock] = {};
  const int64_t own = int64_t{p.sources} * p.taps;  // elements of a target
  for (int64_t at = 0; at < own; at += kTransposed) {
    const int64_t n = std::min(kTransposed, own - at);
    for (int64_t t = 0; t < count; ++t) {
      const From* const first = from + t * target + at;
      if (n == kTransposed) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < kTransposed; ++i) transposed[i][t] = static_cast<To>(first[i]);
      } else {
        for (int64_t i = 0; i < n; ++i) transposed[i][t] = static_cast<To>(first[i]);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t s = (at + i) / p.taps, tap = (at + i) % p.taps;
      std::copy_n(transposed[i], width, out + (tap * p.sources + s) * width);
    }
  }
}

template <typename From, typename To>
void pack_as(To* out, const PackProblem& p, bool adjoint) {
  const auto* const weight = static_cast<const From*>(p.weight);
  const int64_t rows = int64_t{p.sources} * p.taps;
  for (int64_t group = 0; group < p.groups; ++group) {
    for (int64_t first = 0; first < p.targets; first += kBlock) {
      const int64_t count = std::min<int64_t>(kBlock, p.targets - first);
      pack_block(out + group * rows * pack_padded(p.targets) + first * rows,
                 weight + group * p.targets * rows + first * pack_target_stride(p, adjoint), p, adjoint, count,
                 pack_padded(count));
    }
  }
}

}  // namespace

void pack_weights(const PackWeights& pack, int64_t problem) {
  const PackProblem& p = pack.problems[problem];
  if (pack.dtype == DType::f64) {
    auto* const out = static_cast<double*>(pack.out) + p.at;
    p.dtype == DType::f64 ? pack_as<double>(out, p, pack.adjoint) : pack_as<float>(out, p, pack.adjoint);
  } else {
    auto* const out = static_cast<float*>(pack.out) + p.at;
    p.dtype == DType::f64 ? pack_as<double>(out, p, pack.adjoint) : pack_as<float>(out, p, pack.adjoint);
  }
}

}  // namespace fastlip::cpu
