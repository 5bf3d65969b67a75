// What a step saves of the iterate that it leaves, and of the gradient that it reads; see PgdStep.
#pragma once
#include "kernels/cpu/sample.h"

namespace fastlip::cpu {
namespace {

template <typename S>
void copy_row(S* __restrict to, const S* __restrict from, int64_t n) {
  __builtin_memcpy(to, from, static_cast<decltype(sizeof(S))>(n) * sizeof(S));
}

// Bits of a stored number, and those that are all set where it is not finite.
template <typename S>
struct Exponent {
  using Bits = uint16_t;
  static constexpr Bits kAll = __is_same(S, Half) ? 0x7c00 : 0x7f80;
};
template <>
struct Exponent<float> {
  using Bits = uint32_t;
  static constexpr Bits kAll = 0x7f800000;
};
template <>
struct Exponent<double> {
  using Bits = uint64_t;
  static constexpr Bits kAll = 0x7ff0000000000000;
};

template <typename S>
bool all_finite(const S* row, int64_t n) {
  using Bits = typename Exponent<S>::Bits;
  constexpr Bits all = Exponent<S>::kAll;
  Bits lost = 0;
#pragma omp simd reduction(| : lost)
  for (int64_t i = 0; i < n; ++i) lost |= static_cast<Bits>((bits_as<Bits>(row[i]) & all) == all);
  return lost == 0;
}

inline bool saves(const PgdStep& p) { return p.best || p.not_finite; }

// Elements [first, first + n) of a sample that takes part, x stored as S and grad as G; before x moves. Threads that
// share a sample all write the same to its flag.
template <typename S, typename G>
void save_row(const PgdStep& p, int64_t sample, int64_t first, int64_t n) {
  if (p.best && p.better[sample]) {
    copy_row(static_cast<S*>(p.best) + sample * p.best_stride + first,
             static_cast<const S*>(p.x) + sample * p.x_stride + first, n);
  }
  if (p.not_finite && !all_finite(static_cast<const G*>(p.grad) + sample * p.grad_stride + first, n)) {
    __atomic_store_n(p.not_finite + sample, uint8_t{1}, __ATOMIC_RELAXED);
  }
}

}  // namespace
}  // namespace fastlip::cpu
