// One sample's step on the CPU, in vectors: what the units compiled once per instruction set share.
//
// For L2 and L1 a sample stays in cache between passes, which read its displacement d = x - x0.
//
// How exact sums are: in float, only the terms of a block add up, kRounds to each of kUnroll accumulators of a lane; a
// block's sums join one in double. So a term meets at most 1 rounding of its own and kRounds + 1 of additions. Terms
// are not negative, so errors do not exceed 10 * 2^-24 = 6e-7 of a sum, whatever its length and magnitudes. Where
// squares may leave the range of T, lengths have a unit of their own. Searches end with sums at or below eps (or
// eps^2), which keeps lengths within 1e-6 of eps.
//
// Vectors are the compiler's own (vector_size), so the code is one for all instruction sets; the scalar tail runs the
// same generic body. No standard library header: see scalar.h.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>  // whose functions are always inlined
#endif

#include "kernels/cpu/scalar.h"

#define FASTLIP_STR_(x) #x
#define FASTLIP_STR(x) FASTLIP_STR_(x)
#define FASTLIP_CAT_(a, b) a##b
#define FASTLIP_CAT(a, b) FASTLIP_CAT_(a, b)
#define FASTLIP_INLINE __attribute__((always_inline))

namespace fastlip::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kUnroll = 4;        // independent accumulators hide the latency of additions
constexpr int kRounds = 8;        // terms to an accumulator before it moves to double
constexpr int64_t kChunk = 1024;  // elements of 16-bit storage widened at a time
constexpr int64_t kThin = 8;      // one vector in so many is looked at to guess thresholds
constexpr double kGuess = 0.003;  // of the ball's size: how exact such a guess is
// A Newton step from within this share of the ball's size mostly ends a search; the pass after it writes as well.
constexpr double kNear = 0.002, kNearSquare = 0.01;
constexpr float kFar = 0x1p20f;      // displacements beyond so many units have one of their own
constexpr int64_t kAhead = 1 << 14;  // samples of at most so many elements are fetched ahead
constexpr int kMaxPasses = 200;      // of the L1 root search; halvings alone need fewer

// Bits of a float as an integer; the smallest normal number; sums of squares trusted without a unit of their own: above
// kLow they miss nothing that counts, even where subnormal squares are flushed to zero. Numbers below kSmall may be too
// coarse to share out; as many up to 2 kSummed as a sample has, have a sum.
template <typename T>
struct Range;
template <>
struct Range<float> {
  using Bits = int32_t;
  static constexpr Bits kFinite = 0x7f800000;  // magnitudes from here on are not finite
  static constexpr float kNormal = __FLT_MIN__, kSmall = __FLT_MIN__ * 0x1p48f, kSummed = 0x1p100f;
  static constexpr double kLow = 1e-25, kHigh = 1e30;
  static constexpr double kMargin = 2e-7;  // searches end this close to what they aim at, which is this far below eps
};
template <>
struct Range<double> {
  using Bits = int64_t;
  static constexpr Bits kFinite = 0x7ff0000000000000;
  static constexpr double kNormal = __DBL_MIN__, kSmall = __DBL_MIN__ * 0x1p106, kSummed = 0x1p990;
  static constexpr double kLow = 1e-280, kHigh = 1e280;
  static constexpr double kMargin = 1e-14;
};

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  static constexpr int64_t lanes = kVectorBytes / sizeof(T);
};
template <typename T>
using Vector = typename VectorOf<T>::type;
using Doubles = Vector<double>;

// A vector in double; both halves of one in float added up.
FASTLIP_INLINE inline Doubles in_double(Vector<float> v) {
#if defined(__AVX512F__)
  const __m256 low = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 high = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_maskz_cvtps_pd(0xff, low) + _mm512_maskz_cvtps_pd(0xff, high);
#elif defined(__AVX2__)
  const __m128 low = __builtin_shufflevector(v, v, 0, 1, 2, 3), high = __builtin_shufflevector(v, v, 4, 5, 6, 7);
  return _mm256_cvtps_pd(low) + _mm256_cvtps_pd(high);
#else
  const Doubles low{static_cast<double>(v[0]), static_cast<double>(v[1])};
  return low + Doubles{static_cast<double>(v[2]), static_cast<double>(v[3])};
#endif
}
FASTLIP_INLINE inline Doubles in_double(Doubles v) { return v; }

// P is T or Vector<T>.
template <typename P, typename T>
FASTLIP_INLINE inline P load(const T* p) {
  if constexpr (sizeof(P) == sizeof(T)) {
    return *p;
  } else {
    return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
  }
}
template <typename P, typename T>
FASTLIP_INLINE inline void store(T* p, P v) {
  if constexpr (sizeof(P) == sizeof(T)) {
    *p = v;
  } else {
    *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
  }
}
template <typename P, typename T>
FASTLIP_INLINE inline P broadcast(T v) {
  return P{} + v;
}
template <typename P>
FASTLIP_INLINE inline P lesser(P a, P b) {
  return a < b ? a : b;
}
template <typename P>
FASTLIP_INLINE inline P greater(P a, P b) {
  return a > b ? a : b;
}
template <typename P, typename T>
FASTLIP_INLINE inline P size_of(P v) {
  if constexpr (sizeof(P) == sizeof(T)) {
    return magnitude(v);
  } else {
    using Mask = decltype(v < v);
    constexpr auto sign = static_cast<typename Range<T>::Bits>(typename Range<T>::Bits{1} << (8 * sizeof(T) - 1));
    return (P)((Mask)v & ~(Mask{} + sign));
  }
}
// Whether a and b are the same number, zeros of different signs apart.
template <typename P>
FASTLIP_INLINE inline auto same(P a, P b) {
  if constexpr (sizeof(P) <= sizeof(double)) {
    return a == b;
  } else {
    using Mask = decltype(a < a);
    return (Mask)a == (Mask)b;  // integers compare on more of a core's units
  }
}
template <typename P, typename T>
FASTLIP_INLINE inline P finite_or_0(P v) {
  const P zero{};
  return size_of<P, T>(v) <= broadcast<P>(kLargest<T>) ? v : zero;
}

// size >= 0 with the sign of v.
template <typename P, typename T>
FASTLIP_INLINE inline P signed_as(P size, P v) {
  using Bits = typename Range<T>::Bits;
  constexpr auto sign = static_cast<Bits>(Bits{1} << (8 * sizeof(T) - 1));
  if constexpr (sizeof(P) == sizeof(T)) {
    return bits_as<T>(static_cast<Bits>(bits_as<Bits>(size) | (bits_as<Bits>(v) & sign)));
  } else {
    using Mask = decltype(v < v);
    return (P)((Mask)size | ((Mask)v & (Mask{} + sign)));
  }
}

// Rows of the sample that follows, fetched while this one is worked on.
template <typename T>
struct Ahead {
  const T* rows[4];
  // What takes the place of the next kUnroll vectors from element i.
  FASTLIP_INLINE void fetch(int64_t i) const {
#pragma GCC unroll 4
    for (int64_t k = 0; k < kUnroll * VectorOf<T>::lanes; k += 64 / static_cast<int64_t>(sizeof(T)))
#pragma GCC unroll 4
      for (const T* row : rows) __builtin_prefetch(row + i + k, 0, 2);
  }
};

// Calls body<P>(i) for vectors, then single elements, until all n are done.
template <typename T, typename Body>
FASTLIP_INLINE inline void map(int64_t n, Body body) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) body.template operator()<Vector<T>>(i);
  for (; i < n; ++i) body.template operator()<T>(i);
}

// As map, and body<P>(i, sums, count) adds to kSums sums and, by tally, to a number of elements.
template <int kSums>
struct Totals {
  double of[kSums];
  int64_t count;
};
template <typename C>
FASTLIP_INLINE inline void tally(C& count, bool where) {
  count += where;
}
template <typename C>
FASTLIP_INLINE inline void tally(C& count, C where) {  // -1 where true
  count -= where;
}
template <int kSums, typename T, typename Body>
FASTLIP_INLINE inline Totals<kSums> reduce(int64_t n, Body body, const Ahead<T>* ahead = nullptr) {
  using V = Vector<T>;
  constexpr int64_t lanes = VectorOf<T>::lanes;
  Doubles wide[kSums] = {};
  Vector<typename Range<T>::Bits> counts{};
  int64_t i = 0;
  while (i + kUnroll * lanes <= n) {
    V sums[kUnroll][kSums] = {};
    const int64_t end = least(n - kUnroll * lanes, i + (kRounds - 1) * kUnroll * lanes);
#pragma GCC unroll 1
    while (i <= end) {
      if (ahead) ahead->fetch(i);
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) body.template operator()<V>(i + u * lanes, sums[u], counts);
      i += kUnroll * lanes;
    }
#pragma GCC unroll 2
    for (int s = 0; s < kSums; ++s) wide[s] += in_double((sums[0][s] + sums[1][s]) + (sums[2][s] + sums[3][s]));
  }
  Totals<kSums> total{};
#pragma GCC unroll 2
  for (int s = 0; s < kSums; ++s)
#pragma GCC unroll 8
    for (int64_t l = 0; l < VectorOf<double>::lanes; ++l) total.of[s] += wide[s][l];
#pragma GCC unroll 16
  for (int64_t l = 0; l < lanes; ++l) total.count += counts[l];
  for (; i < n; ++i) {
    T sums[kSums] = {};
    body.template operator()<T>(i, sums, total.count);
#pragma GCC unroll 2
    for (int s = 0; s < kSums; ++s) total.of[s] += static_cast<double>(sums[s]);
  }
  return total;
}

// The largest of size(v[i]) >= 0.
template <typename T, typename Size>
FASTLIP_INLINE inline T greatest(const T* v, int64_t n, Size size) {
  using V = Vector<T>;
  constexpr int64_t lanes = VectorOf<T>::lanes;
  V top[kUnroll] = {};
  T result = 0;
  int64_t i = 0;
  for (; i + kUnroll * lanes <= n; i += kUnroll * lanes) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) top[u] = greater(size(load<V>(v + i + u * lanes)), top[u]);
  }
  for (const V& t : top)
    for (int64_t l = 0; l < lanes; ++l) result = greater(result, t[l]);
  for (; i < n; ++i) result = greater(result, size(v[i]));
  return result;
}

// The power of two at or below v > 0, or the nearest to it that has an inverse.
template <typename T>
inline T unit_of(T v) {
  using Bits = typename Range<T>::Bits;
  constexpr T least_unit = Range<T>::kNormal;
  return least(most(bits_as<T>(static_cast<Bits>(bits_as<Bits>(v) & Range<T>::kFinite)), least_unit), 1 / least_unit);
}

// --- limits of the box -------------------------------------------------------------------

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

// Calls f(box) with the kind of box at hand, from element `first` of the sample on. Every kind is another copy of all
// that f does, so that a number beside a row has none of its own.
template <typename T, typename F>
inline void with_box(const PgdStep& p, int64_t sample, int64_t first, F f) {
  const Limit<T> lo(p.lo, sample), hi(p.hi, sample);
  if (!lo.row && !hi.row) return f(Box<T, false>{nullptr, nullptr, 0, 0, lo.scalar, hi.scalar});
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

// --- Linf --------------------------------------------------------------------------------

// sign(g) * step where |g|, as an integer, exceeds `below` and g is finite, else 0: step with g's sign flipped in.
template <typename P, typename T>
FASTLIP_INLINE inline P signed_step(P g, T step, typename Range<T>::Bits below = 0) {
  using Bits = typename Range<T>::Bits;
  constexpr auto sign = static_cast<Bits>(Bits{1} << (8 * sizeof(T) - 1));
  if constexpr (sizeof(P) == sizeof(T)) {
    const Bits bits = bits_as<Bits>(g), size = bits & ~sign;
    return size > below && size < Range<T>::kFinite ? bits_as<T>(static_cast<Bits>(bits_as<Bits>(step) ^ (bits & sign)))
                                                    : T(0);
  } else {
    using Mask = decltype(g < g);
    const Mask bits = (Mask)g, size = bits & ~(Mask{} + sign);
    const Mask moved = (Mask)broadcast<P>(step) ^ (bits & (Mask{} + sign));
    return (P)(moved & (size > Mask{} + below) & (size < Mask{} + Range<T>::kFinite));
  }
}

template <typename T>
void linf_part(T* x, const T* g, const T* x0, const PgdStep& p, int64_t sample, int64_t first, int64_t n) {
  const T step = g ? finite_or_zero(at<T>(p.step_size, sample)) : T(0);
  const T eps = radius<T>(p.eps, sample);
  with_box<T>(p, sample, first, [&](const auto box) {
    const auto finish = [&]<typename P>(P v, int64_t i) FASTLIP_INLINE {
      const P centre = load<P>(x0 + i);
      const P d = lesser(greater(v - centre, broadcast<P>(-eps)), broadcast<P>(eps));
      store(x + i, box.clip(centre + d, i));
    };
    if (g) {
      map<T>(n, [&]<typename P>(int64_t i)
                    FASTLIP_INLINE { finish(load<P>(x + i) + signed_step(load<P>(g + i), step), i); });
    } else {
      map<T>(n, [&]<typename P>(int64_t i) FASTLIP_INLINE { finish(load<P>(x + i), i); });
    }
  });
}

// --- L2 ----------------------------------------------------------------------------------

template <typename T>
inline bool trusted(double square) {
  return square > Range<T>::kLow && square < Range<T>::kHigh;
}

// g * first * second has length `step`; two factors, so that neither leaves the range of T. plain: first is 1 and every
// element of g is finite.
template <typename T>
struct Factors {
  T first, second;
  bool plain;
};
template <typename T>
Factors<T> l2_factors(const T* g, T step, int64_t n) {
  const auto factor = [&](double sum) { return static_cast<T>(static_cast<double>(step) / __builtin_sqrt(sum)); };
  double sum = reduce<1, T>(n, [&]<typename P>(int64_t i, P* sums, auto&) FASTLIP_INLINE {
                 const P v = load<P>(g + i);
                 sums[0] += v * v;
               }).of[0];
  if (trusted<T>(sum)) {
    const T second = factor(sum), size = magnitude(second);
    if (size >= Range<T>::kNormal && size <= kLargest<T>) return {1, second, true};
  }
  const T peak = greatest(g, n, []<typename P>(P v) FASTLIP_INLINE { return size_of<P, T>(finite_or_0<P, T>(v)); });
  if (peak == T(0)) return {0, 0, false};
  const T scale = 1 / unit_of(peak);
  sum = reduce<1, T>(n, [&]<typename P>(int64_t i, P* sums, auto&) FASTLIP_INLINE {
          const P v = finite_or_0<P, T>(load<P>(g + i)) * scale;
          sums[0] += v * v;
        }).of[0];
  return {scale, factor(sum), false};
}

// d <- advance<P>(i) - x0; the sums of d^2 and of what the box leaves of it, squared.
template <typename T, typename B, typename Advance>
FASTLIP_INLINE inline Totals<2> l2_displace(T* d, const T* x0, const B box, int64_t n, Advance advance) {
  return reduce<2, T>(n, [&]<typename P>(int64_t i, P* sums, auto&) FASTLIP_INLINE {
    const P centre = load<P>(x0 + i), v = advance.template operator()<P>(i) - centre;
    const P c = box.clip_from(v, centre, i);
    sums[0] += v * v;
    sums[1] += c * c;
    store(d + i, v);
  });
}

// Displacements from x0 and how the box limits them; kScaled: in a unit, given it and its inverse.
template <typename T, typename B, bool kScaled>
struct Displacements {
  const B box;
  T unit, inverse;
  template <typename P>
  FASTLIP_INLINE P in_units(P d) const {
    if constexpr (kScaled) return d * inverse;
    return d;
  }
  template <typename P>
  FASTLIP_INLINE P limit(P d, P centre, int64_t i) const {
    if constexpr (kScaled)
      return lesser(greater(d, (box.template lo<P>(i) - centre) * inverse), (box.template hi<P>(i) - centre) * inverse);
    return box.clip_from(d, centre, i);
  }
  template <typename P>
  FASTLIP_INLINE P place(P d, P centre, int64_t i) const {
    if constexpr (kScaled) return box.clip(d * unit + centre, i);
    return box.clip(d + centre, i);
  }
};

// out <- x0 + clip(s d) for the largest s that keeps the square of its length within `budget`, given `full`, ||d||^2.
// The search for s^2 starts at budget / slope.
// N(s^2) = ||clip(x0 + s d) - x0||^2 is concave and piecewise linear in s^2, its slope the squared norm of the elements
// still loose, so Newton from either side lands left of the root and then rises to it. The pass that writes
// measures what it writes.
template <typename T, typename D>
void l2_search(T* out, T* d, const T* x0, double budget, const D space, double full, double slope, int64_t n,
               const Ahead<T>* ahead) {
  const auto write = [&](T s) FASTLIP_INLINE {
    map<T>(n, [&]<typename P>(int64_t i)
                  FASTLIP_INLINE { store(out + i, space.place(load<P>(d + i) * s, load<P>(x0 + i), i)); });
  };
  const auto measure = [&](T s) FASTLIP_INLINE {
    return reduce<2, T>(
        n,
        [&]<typename P>(int64_t i, P* part, auto&) FASTLIP_INLINE {
          const P zero{}, v = load<P>(d + i), free = v * s;
          const P c = space.limit(free, load<P>(x0 + i), i);
          const P moving = same(c, free) ? v : zero;
          part[0] += c * c;
          part[1] += moving * moving;
        },
        ahead);
  };
  const auto write_measured = [&](T s) FASTLIP_INLINE {
    return reduce<1, T>(n,
                        [&]<typename P>(int64_t i, P* part, auto&) FASTLIP_INLINE {
                          const P centre = load<P>(x0 + i), c = space.limit(load<P>(d + i) * s, centre, i);
                          part[0] += c * c;
                          store(out + i, space.place(c, centre, i));
                        })
        .of[0];
  };
  // In squares a margin counts twice.
  const double slack = 2 * Range<T>::kMargin * budget, aim = budget - slack;
  double least_square = aim / full, fits = least_square, square = aim / slope;
  const auto good = [&](double length) { return length >= aim - slack && length <= aim + slack; };
  bool left = false, near = false, written = false;
  for (int64_t pass = 0; pass <= n + 1; ++pass) {
    T s = static_cast<T>(__builtin_sqrt(square));
    if (near && !written) {
      if (good(write_measured(s))) return;
      // On from what was written: what met the box there stays there.
      full = reduce<1, T>(n, [&]<typename P>(int64_t i, P* part, auto&) FASTLIP_INLINE {
               const P v = space.in_units(load<P>(out + i) - load<P>(x0 + i));
               part[0] += v * v;
               store(d + i, v);
             }).of[0];
      fits = least_square = aim / full;
      square = s = 1;
      left = false;
      written = true;
    }
    const auto [length, loose] = measure(s).of;
    if (good(length)) return write(s);
    if (length > aim && left) break;  // by rounding alone
    const double newton = square + (aim - length) / loose;
    const double next = newton > least_square ? newton : least_square;  // also where nothing is loose
    if (length <= aim) {
      left = true;
      fits = square;
    }
    if (left ? !(next > square) : !(next < square)) break;
    near = __builtin_fabs(next - square) < kNearSquare * square;
    square = next;
  }
  write(static_cast<T>(__builtin_sqrt(fits)));
}

// out <- x0 + the projection of d, given the sums of l2_displace.
template <typename T, typename B>
void l2_project(T* out, T* d, const T* x0, T eps, const B box, Totals<2> sums, int64_t n,
                const Ahead<T>* ahead = nullptr) {
  const auto write = [&](T s) FASTLIP_INLINE {
    map<T>(n, [&]<typename P>(int64_t i)
                  FASTLIP_INLINE { store(out + i, box.clip(load<P>(d + i) * s + load<P>(x0 + i), i)); });
  };
  if (eps == T(0)) return write(0);
  if (eps > kLargest<T>) return write(1);
  const double budget = static_cast<double>(eps) * static_cast<double>(eps);
  if (trusted<T>(budget) && sums.of[0] < Range<T>::kHigh) {
    if (!(sums.of[1] > budget)) return write(1);
    // From the right of the root, on the chord through N(1): there the saturated set is nearly that of the root, and
    // one pass is the rule before the one that writes.
    const Displacements<T, B, false> space{box, 1, 1};
    return l2_search(out, d, x0, budget, space, sums.of[0], sums.of[1], n, ahead);
  }
  // Either square leaves the range: in units of a power of two near eps.
  const T unit = unit_of(eps), inverse = 1 / unit;
  const double own_budget = static_cast<double>(eps * inverse) * static_cast<double>(eps * inverse);
  const double within = reduce<1, T>(n, [&]<typename P>(int64_t i, P* part, auto&) FASTLIP_INLINE {
                          const P c = box.clip_from(load<P>(d + i), load<P>(x0 + i), i) * inverse;
                          part[0] += c * c;
                        }).of[0];
  if (!(within > own_budget)) return write(1);
  // Far beyond eps d has a unit near its largest instead, and s makes up for it.
  const T peak = greatest(d, n, []<typename P>(P v) FASTLIP_INLINE { return size_of<P, T>(v); });
  const T scale = peak * inverse < kFar ? inverse : 1 / unit_of(peak);
  const double full = reduce<1, T>(n, [&]<typename P>(int64_t i, P* part, auto&) FASTLIP_INLINE {
                        const P most = broadcast<P>(kLargest<T>);
                        const P v = lesser(greater(load<P>(d + i), -most), most) * scale;
                        part[0] += v * v;
                        store(d + i, v);
                      }).of[0];
  const Displacements<T, B, true> space{box, unit, inverse};
  l2_search(out, d, x0, own_budget, space, full, scale == inverse ? within : full, n, ahead);
}

// out <- the projection of x, moved by `step` along g where there is one. d: scratch.
template <typename T, typename B>
void l2_sample(T* out, const T* x, const T* g, const T* x0, T step, T eps, const B box, int64_t n, T* d,
               const Ahead<T>* ahead) {
  const Factors<T> f = g ? l2_factors(g, step, n) : Factors<T>{0, 0, false};
  const auto still = [&]<typename P>(int64_t i) FASTLIP_INLINE { return load<P>(x + i); };
  const auto plain = [&]<typename P>(int64_t i) FASTLIP_INLINE { return load<P>(g + i) * f.second + load<P>(x + i); };
  const auto guarded = [&]<typename P>(int64_t i) FASTLIP_INLINE {
    return finite_or_0<P, T>(load<P>(g + i)) * f.first * f.second + load<P>(x + i);
  };
  const Totals<2> sums = !g        ? l2_displace(d, x0, box, n, still)
                         : f.plain ? l2_displace(d, x0, box, n, plain)
                                   : l2_displace(d, x0, box, n, guarded);
  l2_project(out, d, x0, eps, box, sums, n, ahead);
}

// --- L1 ----------------------------------------------------------------------------------

// keys <- magnitudes as integers, which order alike; what is not finite counts as 0. Returns the largest.
template <typename T>
typename Range<T>::Bits magnitudes(typename Range<T>::Bits* keys, const T* g, int64_t n) {
  using Bits = typename Range<T>::Bits;
  Vector<Bits> tops{};
  Bits top = 0;
  map<T>(n, [&]<typename P>(int64_t i) FASTLIP_INLINE {
    if constexpr (sizeof(P) == sizeof(T)) {
      const Bits size = bits_as<Bits>(magnitude(g[i]));
      keys[i] = size < Range<T>::kFinite ? size : 0;
      top = greater(keys[i], top);
    } else {
      const auto size = (Vector<Bits>)size_of<P, T>(load<P>(g + i));
      const auto key = size & (size < Vector<Bits>{} + Range<T>::kFinite);
      store(keys + i, key);
      tops = greater(key, tops);
    }
  });
  for (int64_t l = 0; l < VectorOf<T>::lanes; ++l) top = greater(top, Bits{tops[l]});
  return top;
}

// How many keys reach the threshold >= 1; of one vector in `thin`.
template <typename Bits>
int64_t count_from(const Bits* keys, Bits threshold, int64_t n, int64_t thin) {
  using V = Vector<Bits>;
  constexpr int64_t lanes = VectorOf<Bits>::lanes;
  const int64_t stride = thin * lanes;
  const V below = V{} + (threshold - 1);
  V counts[kUnroll] = {};
  int64_t i = 0, total = 0;
  for (; i + kUnroll * stride <= n; i += kUnroll * stride) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) counts[u] -= load<V>(keys + i + u * stride) > below;
  }
  for (; i + stride <= n; i += stride) counts[0] -= load<V>(keys + i) > below;
  const V sum = (counts[0] + counts[1]) + (counts[2] + counts[3]);
#pragma GCC unroll 16
  for (int64_t l = 0; l < lanes; ++l) total += sum[l];
  if (thin == 1)
    for (; i < n; ++i) total += keys[i] >= threshold;
  return total;
}

// A threshold and how many keys reach it.
template <typename Bits>
struct Cut {
  Bits threshold;
  int64_t reached;
};

// The largest threshold >= 1 that at least `kept` keys reach, or any that `kept` to `kept + slack` do. Where fewer than
// `kept` keys are nonzero the threshold is 1 and all those count. Of one vector in `thin`, like all counts here.
template <typename Bits>
Cut<Bits> search_cut(const Bits* keys, Bits peak, int64_t kept, int64_t slack, Bits start, Bits step, int64_t n,
                     int64_t thin) {
  // The answer lies in [low, high); -1: not counted yet.
  Bits low = 1, high = peak + 1, width = high;
  int64_t at_low = -1, at_high = -1;
  const auto log = [](double count) { return static_cast<double>(bits_as<int32_t>(static_cast<float>(count))); };
  int slow = 0;
  for (Bits guess = start; high - low > 1;) {
    guess = guess > low ? guess < high ? guess : high - 1 : low + 1;
    const int64_t reached = count_from(keys, guess, n, thin);
    if (reached >= kept) {
      low = guess;
      at_low = reached;
      if (reached <= kept + slack) break;
    } else {
      high = guess;
      at_high = reached;
    }
    if (at_low < 0 || at_high < 0) {
      if (step >= high - low) step = (high - low) / 2;
      guess = at_low < 0 ? high - step : low + step;
      step = step < peak / 4 ? 4 * step : peak;
    } else {  // numbers and magnitudes in logarithms, roughly: their bits
      const double top = log(static_cast<double>(at_low)),
                   bottom = at_high ? log(static_cast<double>(at_high)) : log(0.5);
      const double share = (top - log(static_cast<double>(kept))) / (top - bottom);
      slow = high - low > width / 2 ? slow + 1 : 0;
      guess = low + (slow < 2 ? static_cast<Bits>(share * static_cast<double>(high - low)) : (high - low) / 2);
      width = high - low;
    }
  }
  if (at_low < 0) at_low = count_from(keys, low, n, thin);
  return {low, at_low};
}

template <typename T>
Cut<typename Range<T>::Bits> top_cut(typename Range<T>::Bits* keys, const T* g, int64_t kept, int64_t n) {
  using Bits = typename Range<T>::Bits;
  const Bits peak = magnitudes(keys, g, n), octave = Bits{1} << (sizeof(Bits) == 4 ? 23 : 52);
  Bits start = peak - octave, step = octave;
  if (n >= 16 * kThin * VectorOf<T>::lanes) {
    const int64_t few = most<int64_t>(1, kept / kThin);
    start = search_cut(keys, peak, few, few / 16, start, step, n, kThin).threshold;
    step = octave / 8;
  }
  return search_cut(keys, peak, kept, 0, start, step, n, 1);
}

// What one pass over the elements tells of f: its value and, but for the sign, its slope.
struct Point {
  double lambda, sum, moving;
};

// Where f = target by the cubic through both points and slopes of the inverse of f: f is piecewise linear, but with
// many pieces nearly smooth, so this converges faster than Newton. Not a number where a slope is zero.
inline double l1_hermite(const Point& a, const Point& b, double target) {
  const double width = b.sum - a.sum, t = (target - a.sum) / width, u = 1 - t;
  const double from_a = a.lambda - t * width / a.moving, from_b = b.lambda + u * width / b.moving;  // the tangents
  return u * u * (1 + 2 * t) * a.lambda + t * t * (1 + 2 * u) * b.lambda + u * u * (from_a - a.lambda) +
         t * t * (from_b - b.lambda);
}

// Root of f(lambda) = target, f falling and piecewise linear: Newton and the cubic kept inside a bracket, with false
// position and halving in turn where they leave it. f(lambda, near): its value and slope; near: this looks like the
// last pass. peak(): where f is 0. Returns lambda with f within the tolerance, or the neighbour of the root with less.
template <typename F, typename Peak>
FASTLIP_INLINE inline double l1_root(F f, Peak peak, Point before, double target, double tolerance, double start,
                                     int passes) {
  double low = before.lambda, low_sum = before.sum, high = kLargest<double>, high_sum = 0, lambda = start;
  for (int pass = 0; pass < passes; ++pass) {
    const bool near = __builtin_fabs(before.sum - target) < kNear * target;
    const Totals<1> found = f(lambda, near);
    const double sum = found.of[0], moving = static_cast<double>(found.count);
    if (sum <= target * (1 + tolerance) && sum >= target * (1 - tolerance)) return lambda;
    if (sum <= target) {
      high = lambda;
      high_sum = sum;
    } else {
      low = lambda;
      low_sum = sum;
    }
    const Point here{lambda, sum, moving};
    lambda = l1_hermite(before, here, target);
    if (pass > 6 || !(lambda > low && lambda < high)) {
      lambda = here.lambda + (sum - target) / moving;  // not finite where nothing moves
    }
    before = here;
    if (!(lambda > low && lambda < high)) {
      if (high == kLargest<double>) high = peak();
      const double share = (low_sum - target) / (low_sum - high_sum);
      lambda = low + (high - low) * (pass % 2 ? 0.5 : share);
      if (!(lambda > low && lambda < high)) lambda = low + (high - low) / 2;
      if (!(lambda > low && lambda < high)) break;  // neighbours
    }
  }
  return high;
}

// f(lambda) = sum of min(max(|d| - lambda, 0), cap), and how many elements lambda moves; over one vector in `thin`.
// lambda = high + low: a single T is too coarse where |d| is large against the ball. kWrite: out <- x0 + what is left,
// which is in a unit.
template <bool kWrite, typename T, typename B>
FASTLIP_INLINE inline Totals<1> l1_shrink(T* out, const T* d, const T* cap, const T* x0, const B box, double lambda,
                                          T unit, int64_t n, int64_t thin, const Ahead<T>* ahead = nullptr) {
  const T high = static_cast<T>(lambda), low = static_cast<T>(lambda - static_cast<double>(high));
  return reduce<1, T>(
      n / thin,
      [&]<typename P>(int64_t i, P* sums, auto& count) FASTLIP_INLINE {
        const P zero{}, v = load<P>(d + i * thin);
        const P t = size_of<P, T>(v) - high - low;
        const P kept = lesser(greater(t, zero), load<P>(cap + i * thin));
        sums[0] += kept;
        tally(count, same(kept, t));  // t itself was kept: it lies in [0, cap]
        if constexpr (kWrite) store(out + i, box.clip(signed_as<P, T>(kept, v) * unit + load<P>(x0 + i), i));
      },
      ahead);
}

// out <- x0 + the projection of d, given the sum of min(|d|, cap) and how many |d| are in (0, cap].
template <typename T, typename B>
void l1_project(T* out, T* d, T* cap, const T* x0, T eps, const B box, Totals<1> at_zero, int64_t n,
                const Ahead<T>* ahead) {
  double written = -1;
  T unit = 1;
  const auto write = [&](double lambda) FASTLIP_INLINE {
    written = lambda;
    return l1_shrink<true>(out, d, cap, x0, box, lambda, unit, n, 1);
  };
  const auto peak = [&] {
    return static_cast<double>(greatest(d, n, []<typename P>(P v) FASTLIP_INLINE { return size_of<P, T>(v); }));
  };
  if (eps == T(0)) {
    map<T>(n, [&]<typename P>(int64_t i) FASTLIP_INLINE { store(out + i, box.clip(load<P>(x0 + i), i)); });
    return;
  }
  if (eps < Range<T>::kSmall || !(at_zero.of[0] <= kLargest<double>)) {  // in units of a power of two
    const T largest = least(static_cast<T>(peak()), kLargest<T>);
    const T inverse = least(1 / unit_of(eps), Range<T>::kSummed / unit_of(largest));
    unit = 1 / inverse;
    eps *= inverse;
    at_zero = reduce<1, T>(n, [&]<typename P>(int64_t i, P* sums, auto& count) FASTLIP_INLINE {
      const P zero{}, most = broadcast<P>(kLargest<T>);
      const P v = lesser(greater(load<P>(d + i), -most), most) * inverse, reach = load<P>(cap + i) * inverse;
      store(d + i, v);
      store(cap + i, reach);
      const P size = size_of<P, T>(v), kept = lesser(size, reach);
      sums[0] += kept;
      tally(count, same(kept, size) & (size > zero));
    });
  }
  double lambda = 0;
  const Point zero{0, at_zero.of[0], static_cast<double>(at_zero.count)};
  if (zero.sum > static_cast<double>(eps)) {
    constexpr double margin = Range<T>::kMargin;
    constexpr int64_t lanes = VectorOf<T>::lanes;
    const double target = static_cast<double>(eps) * (1 - margin);
    const auto newton = [](const Point& p, double aim) {  // from 0; stays there where that tells nothing
      const double next = (p.sum - aim) / p.moving;
      return next > 0 && next < kLargest<double> ? next : 0;
    };
    double start = newton(zero, target);
    if (n >= 16 * kThin * lanes) {  // a guess from a part of the elements; the bracket makes up for a bad one
      const auto f = [&](double at, bool) FASTLIP_INLINE {
        return l1_shrink<false>(out, d, cap, x0, box, at, unit, n - n % (kThin * lanes), kThin);
      };
      const Totals<1> whole = f(0, false);
      const Point thin{0, whole.of[0], static_cast<double>(whole.count)};
      const double aim = target * (thin.sum / zero.sum);
      const double guess = l1_root(f, peak, thin, aim, kGuess, newton(thin, aim), 8);
      if (guess > 0 && guess < kLargest<double>) start = guess;  // else: no end in sight within 8 passes
    }
    const auto f = [&](double at, bool near) FASTLIP_INLINE {
      return near ? write(at) : l1_shrink<false>(out, d, cap, x0, box, at, unit, n, 1, ahead);
    };
    lambda = l1_root(f, peak, zero, target, margin, start, kMaxPasses);
  }
  if (written != lambda) write(lambda);
}

// out <- the projection of x, moved by `step` along the signs of g's `kept` largest elements. d, cap: scratch.
template <typename T, typename B>
void l1_sample(T* out, const T* x, const T* g, const T* x0, T step, T eps, const B box, int64_t kept, int64_t n, T* d,
               T* cap, const Ahead<T>* ahead) {
  // d <- the displacement, and cap <- how far the box lets it reach.
  const auto displace = [&](auto advance) FASTLIP_INLINE {
    return reduce<1, T>(n, [&]<typename P>(int64_t i, P* sums, auto& count) FASTLIP_INLINE {
      const P zero{}, centre = load<P>(x0 + i), v = advance.template operator()<P>(i) - centre;
      const P up = box.template hi<P>(i) - centre, down = centre - box.template lo<P>(i);
      const P most = greater(v > zero ? up : down, zero);
      store(d + i, v);
      store(cap + i, most);
      const P size = size_of<P, T>(v), kept = lesser(size, most);
      sums[0] += kept;
      tally(count, same(kept, size) & (size > zero));
    });
  };
  Totals<1> at_zero;
  if (g && step != T(0)) {
    const auto cut = top_cut(reinterpret_cast<typename Range<T>::Bits*>(cap), g, kept, n);
    const T move =
        cut.reached > 0 ? static_cast<T>(static_cast<double>(step) / static_cast<double>(cut.reached)) : T(0);
    at_zero = displace([&]<typename P>(int64_t i) FASTLIP_INLINE {
      return load<P>(x + i) + signed_step(load<P>(g + i), move, cut.threshold - 1);
    });
  } else {
    at_zero = displace([&]<typename P>(int64_t i) FASTLIP_INLINE { return load<P>(x + i); });
  }
  l1_project(out, d, cap, x0, eps, box, at_zero, n, ahead);
}

// --- scratch memory ------------------------------------------------------------------------

// Rows of n elements each, aligned to cache lines and not all at the same place of a page.
template <typename T>
struct Scratch {
  T* first;
  int64_t stride;
  Scratch(void* memory, int64_t n) {
    constexpr int64_t line = 64 / sizeof(T);
    first = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
    stride = (n + line - 1) / line * line + line;
  }
  T* row(int64_t k) const { return first + k * stride; }
};
// What a row is for; those from kX on hold 16-bit storage or gradients widened, in float.
enum Row { kDisplacement, kCap, kAim, kX, kX0, kGrad, kLast, kRows };
static_assert(kRows * (1 + 16 + 15) * sizeof(float) + 63 <= scratch_bytes(1));
static_assert((kAim + 1) * (1 + 8 + 7) * sizeof(double) + 63 <= scratch_bytes(1));

// --- one sample of either ball -------------------------------------------------------------

template <typename T>
void ball_sample(T* x, const T* g, const T* x0, const PgdStep& p, int64_t sample, const Scratch<T>& scratch,
                 const Ahead<T>* ahead) {
  const T step = g ? finite_or_zero(at<T>(p.step_size, sample)) : T(0);
  const T eps = radius<T>(p.eps, sample);
  T* const d = scratch.row(kDisplacement);
  with_box<T>(p, sample, 0, [&](const auto box) {
    if (p.norm == Norm::l2) {
      l2_sample(x, x, g, x0, step, eps, box, p.size, x, ahead);
    } else {
      l1_sample(x, x, g, x0, step, eps, box, p.kept, p.size, d, scratch.row(kCap), ahead);
    }
  });
}

}  // namespace
}  // namespace fastlip::cpu
