// One sample's operands on the CPU: limits of its box, its rows as they are stored, what the model reads.
#pragma once
#include "kernels/cpu/vectors.h"

namespace fastlip::cpu {
inline namespace FASTLIP_ISA {

// Both limits of one sample. kRows: read from memory, where a number for all elements is a vector that is read over and
// over; else both are such numbers, in registers.
template <typename T, bool kRows>
struct Box {
  const T *lo_row, *hi_row;
  int64_t lo_mask, hi_mask;  // of indices: 0 for one number, else -1
  T lo_scalar, hi_scalar;
  template <typename P>
  FASTLIP_INLINE P lo(int64_t i) const {
    if constexpr (kRows) return load<P>(lo_row + (i & lo_mask));
    return broadcast<P>(lo_scalar);
  }
  template <typename P>
  FASTLIP_INLINE P hi(int64_t i) const {
    if constexpr (kRows) return load<P>(hi_row + (i & hi_mask));
    return broadcast<P>(hi_scalar);
  }
  template <typename P>
  FASTLIP_INLINE P clip(P v, int64_t i) const {
    return lesser(greater(v, lo<P>(i)), hi<P>(i));
  }
  // clip(centre + d) - centre, without the rounding of the sum.
  template <typename P>
  FASTLIP_INLINE P clip_from(P d, P centre, int64_t i) const {
    return lesser(greater(d, lo<P>(i) - centre), hi<P>(i) - centre);
  }
};

}  // namespace FASTLIP_ISA

namespace {

constexpr int64_t kChunk = 1024;  // elements of 16-bit storage widened at a time

// Calls f(box) with the kind of box at hand, from element `first` of the sample on. Every kind is another copy of all
// that f does, so that a number beside a row has none of its own, nor numbers in double.
template <typename T, typename F>
inline void with_box(const PgdStep& p, int64_t sample, int64_t first, F f) {
  const Limit<T> lo(p.lo, sample), hi(p.hi, sample);
  if constexpr (__is_same(T, float)) {
    if (!lo.row && !hi.row) return f(Box<T, false>{nullptr, nullptr, 0, 0, lo.scalar, hi.scalar});
  }
  const Vector<T> all_lo = broadcast<Vector<T>>(lo.scalar), all_hi = broadcast<Vector<T>>(hi.scalar);
  const auto row = [&](const Limit<T>& limit, const Vector<T>& all) {
    return limit.row ? limit.row + first : reinterpret_cast<const T*>(&all);
  };
  f(Box<T, true>{row(lo, all_lo), row(hi, all_hi), lo.row ? -1 : 0, hi.row ? -1 : 0, 0, 0});
}

// --- 16-bit storage ----------------------------------------------------------------------

template <typename S>
void widen_row(float* __restrict to, const S* __restrict from, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}
template <typename S>
void narrow_row(S* __restrict to, const float* __restrict from, const float* __restrict x0, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) narrow(to[i], from[i], x0[i]);
}

// --- what the model reads ----------------------------------------------------------------

// Calls f with a number of the type of what the model reads.
template <typename F>
void with_input(DType dtype, F f) {
  if (dtype == DType::f16) return f(Half{});
  if (dtype == DType::bf16) return f(BFloat16{});
  f(float{});
}

// The gradient with respect to x, from that with respect to (x - mean) / std; elements [first, first + n) of a sample.
template <typename I>
void ascent_row(float* __restrict to, const PgdStep& p, int64_t sample, int64_t first, int64_t n) {
  const I* __restrict from = static_cast<const I*>(p.grad) + sample * p.grad_stride + first;
  const Limit<float> std(p.std, sample);
  const float* __restrict row = std.row + (std.row ? first : 0);
  if (std.row) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]) / row[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]) / std.scalar;
  }
}

// (x - mean) / std, from elements [first, first + n) of a sample's x.
template <typename I>
void feed_row(const float* __restrict x, const PgdStep& p, int64_t sample, int64_t first, int64_t n) {
  I* __restrict to = static_cast<I*>(p.input) + sample * p.input_stride + first;
  const Limit<float> mean(p.mean, sample), std(p.std, sample);
  const float* __restrict mean_row = mean.row + (mean.row ? first : 0);
  const float* __restrict std_row = std.row + (std.row ? first : 0);
  if (mean.row && std.row) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) nearest(to[i], (x[i] - mean_row[i]) / std_row[i]);
  } else if (mean.row) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) nearest(to[i], (x[i] - mean_row[i]) / std.scalar);
  } else if (std.row) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) nearest(to[i], (x[i] - mean.scalar) / std_row[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) nearest(to[i], (x[i] - mean.scalar) / std.scalar);
  }
}

// --- scratch memory ------------------------------------------------------------------------

// Rows of n elements each, aligned to cache lines and not all at the same place of a page.
template <typename T>
struct Scratch {
  T* first;
  int64_t stride;
  Scratch(void* memory, int64_t n) {
    constexpr int64_t line = 64 / sizeof(T);
    first = at_cache_line<T>(memory);
    stride = (n + line - 1) / line * line + line;
  }
  T* row(int64_t k) const { return first + k * stride; }
};
// What a row is for; those from kX on hold 16-bit storage or gradients widened, in float.
enum Row { kDisplacement, kCap, kAim, kX, kX0, kGrad, kLast, kRows };
static_assert(kRows * (1 + 16 + 15) * sizeof(float) + 63 <= scratch_bytes(1));
static_assert((kAim + 1) * (1 + 8 + 7) * sizeof(double) + 63 <= scratch_bytes(1));

}  // namespace
}  // namespace fastlip::cpu
