// One sample's step on the CPU, in vectors: what the units compiled once per instruction set share.
//
// For L2 and L1 a sample is worked on in place and stays in cache between passes, x holding d = x - x0 meanwhile; sums
// run in several vector accumulators and move to double every kRounds additions, which keeps float sums well within
// 1e-6.
//
// Vectors are the compiler's own (vector_size), so the code is one for all instruction sets; the scalar tail runs the
// same generic body. No standard library header: see scalar.h.
#pragma once
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
constexpr int kRounds = 16;       // additions to an accumulator before it moves to double
constexpr int64_t kChunk = 1024;  // elements of 16-bit storage widened at a time
constexpr int64_t kThin = 8;      // one vector in so many is looked at to guess an L1 threshold
constexpr int kMaxPasses = 200;   // of the L1 root search; halvings alone need fewer

// Bits of a float as an integer; sums of squares trusted without rescaling; a factor that brings any square in range.
template <typename T>
struct Range;
template <>
struct Range<float> {
  using Bits = int32_t;
  static constexpr Bits kFinite = 0x7f800000;  // magnitudes from here on are not finite
  static constexpr double kLow = 1e-30, kHigh = 1e30;
  static constexpr float kUp = 0x1p96f, kDown = 0x1p-96f;
  static constexpr double kUnused = 1e-6;     // of eps^2 when the L2 scale is good enough; it only ever errs low
  static constexpr double kTolerance = 5e-7;  // of eps in the L1 threshold
};
template <>
struct Range<double> {
  using Bits = int64_t;
  static constexpr Bits kFinite = 0x7ff0000000000000;
  static constexpr double kLow = 1e-280, kHigh = 1e280;
  static constexpr double kUp = 0x1p520, kDown = 0x1p-520;
  static constexpr double kUnused = 1e-14;
  static constexpr double kTolerance = 1e-15;
};

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  static constexpr int64_t lanes = kVectorBytes / sizeof(T);
};
template <typename T>
using Vector = typename VectorOf<T>::type;

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
template <typename P, typename T>
FASTLIP_INLINE inline P finite_or_0(P v) {
  const P zero{};
  return size_of<P, T>(v) <= broadcast<P>(kLargest<T>) ? v : zero;
}

// Calls body<P>(i) for vectors, then single elements, until all n are done.
template <typename T, typename Body>
FASTLIP_INLINE inline void map(int64_t n, Body body) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) body.template operator()<Vector<T>>(i);
  for (; i < n; ++i) body.template operator()<T>(i);
}

// As map, and body<P>(i, sums) adds to kSums sums, whose totals are returned.
template <int kSums>
struct Totals {
  double of[kSums];
};
template <int kSums, typename T, typename Body>
FASTLIP_INLINE inline Totals<kSums> reduce(int64_t n, Body body) {
  using V = Vector<T>;
  constexpr int64_t lanes = VectorOf<T>::lanes;
  typedef double Wide __attribute__((vector_size(lanes * sizeof(double))));
  Wide wide[kSums] = {};
  int64_t i = 0;
  while (i + kUnroll * lanes <= n) {
    V sums[kUnroll][kSums] = {};
    for (int round = 0; round < kRounds && i + kUnroll * lanes <= n; ++round) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u, i += lanes) body.template operator()<V>(i, sums[u]);
    }
    for (int s = 0; s < kSums; ++s)
      wide[s] += __builtin_convertvector((sums[0][s] + sums[1][s]) + (sums[2][s] + sums[3][s]), Wide);
  }
  Totals<kSums> total{};
  for (int s = 0; s < kSums; ++s) {
    double part[2] = {};  // two chains of additions rather than one
    for (int64_t l = 0; l < lanes; ++l) part[l % 2] += wide[s][l];
    total.of[s] = part[0] + part[1];
  }
  for (; i < n; ++i) {
    T sums[kSums] = {};
    body.template operator()<T>(i, sums);
    for (int s = 0; s < kSums; ++s) total.of[s] += static_cast<double>(sums[s]);
  }
  return total;
}

// --- limits of the box -------------------------------------------------------------------

// Both limits of one sample; kLoRow, kHiRow: a row of its own rather than one number.
template <typename T, bool kLoRow, bool kHiRow>
struct Box {
  const T* lo_row;
  const T* hi_row;
  T lo_scalar, hi_scalar;
  template <typename P>
  FASTLIP_INLINE P lo(int64_t i) const {
    if constexpr (kLoRow) return load<P>(lo_row + i);
    return broadcast<P>(lo_scalar);
  }
  template <typename P>
  FASTLIP_INLINE P hi(int64_t i) const {
    if constexpr (kHiRow) return load<P>(hi_row + i);
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

// Calls f(box) with the kind of box at hand, from element `first` of the sample on.
template <typename T, typename F>
inline void with_box(const PgdStep& p, int64_t sample, int64_t first, F f) {
  const Limit<T> lo(p.lo, sample), hi(p.hi, sample);
  const T* lo_row = lo.row ? lo.row + first : nullptr;
  const T* hi_row = hi.row ? hi.row + first : nullptr;
  if (lo_row && hi_row) return f(Box<T, true, true>{lo_row, hi_row, 0, 0});
  if (lo_row) return f(Box<T, true, false>{lo_row, nullptr, 0, hi.scalar});
  if (hi_row) return f(Box<T, false, true>{nullptr, hi_row, lo.scalar, 0});
  return f(Box<T, false, false>{nullptr, nullptr, lo.scalar, hi.scalar});
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

// sign(g) * step, 0 where g is not finite: step with g's sign flipped in, kept where 0 < |g| < inf.
template <typename P, typename T>
FASTLIP_INLINE inline P signed_step(P g, T step) {
  using Bits = typename Range<T>::Bits;
  constexpr auto sign = static_cast<Bits>(Bits{1} << (8 * sizeof(T) - 1));
  if constexpr (sizeof(P) == sizeof(T)) {
    const Bits bits = bits_as<Bits>(g), size = bits & ~sign;
    return size > 0 && size < Range<T>::kFinite ? bits_as<T>(static_cast<Bits>(bits_as<Bits>(step) ^ (bits & sign)))
                                                : T(0);
  } else {
    using Mask = decltype(g < g);
    const Mask bits = (Mask)g, size = bits & ~(Mask{} + sign);
    const Mask moved = (Mask)broadcast<P>(step) ^ (bits & (Mask{} + sign));
    return (P)(moved & (size > Mask{}) & (size < Mask{} + Range<T>::kFinite));
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
  const auto trusted = [](double sum) { return sum > Range<T>::kLow && sum < Range<T>::kHigh; };
  double sum = reduce<1, T>(n, [&]<typename P>(int64_t i, P* sums) FASTLIP_INLINE {
                 const P v = load<P>(g + i);
                 sums[0] += v * v;
               }).of[0];
  if (trusted(sum)) return {1, factor(sum), true};
  const T scales[] = {1, Range<T>::kUp, Range<T>::kDown};
  for (const T scale : scales) {
    sum = reduce<1, T>(n, [&]<typename P>(int64_t i, P* sums) FASTLIP_INLINE {
            const P v = finite_or_0<P, T>(load<P>(g + i)) * scale;
            sums[0] += v * v;
          }).of[0];
    if (trusted(sum)) return {scale, factor(sum), false};
  }
  return {0, 0, false};  // a zero gradient
}

// The largest scale s with N(s^2) = ||clip(x0 + s d) - x0||^2 <= eps^2, given full = ||d||^2 and N(1) > eps^2.
// N is concave and piecewise linear in s^2, its slope the squared norm of the elements still loose, so Newton from
// either side lands left of the root and then rises to it (METHODS section 6). It starts right of the root, on the
// chord through N(1): there the saturated set is nearly that of the root, and one pass is the rule.
template <typename T, typename B>
T l2_scale(const T* d, const T* x0, const B box, double budget, double full, double start, int64_t n) {
  const double least_square = budget / full;
  double square = start;
  for (int64_t pass = 0; pass <= n + 1; ++pass) {
    const T s = static_cast<T>(__builtin_sqrt(square));
    const auto [length, loose] = reduce<2, T>(n, [&]<typename P>(int64_t i, P* sums) FASTLIP_INLINE {
                                   const P zero{}, v = load<P>(d + i), free = v * s;
                                   const P c = box.clip_from(free, load<P>(x0 + i), i);
                                   const P moving = c == free ? v : zero;
                                   sums[0] += c * c;
                                   sums[1] += moving * moving;
                                 }).of;
    const double newton = square + (budget - length) / loose;
    const double next = newton > least_square ? newton : least_square;  // also where nothing is loose
    if (length > budget) {
      if (!(next < square)) break;
      // Between the two points the slope is at most `full`, which bounds what Newton leaves unused.
      const double unused = (square - next) * (full - loose) / budget;
      const bool near = square < 2 * next;  // else the difference has lost its digits
      square = next;
      if (near && next == newton && unused < Range<T>::kUnused) break;
    } else {
      if (!(next > square)) break;
      square = next;
      if (1 - length / budget < Range<T>::kUnused) break;
    }
  }
  return static_cast<T>(__builtin_sqrt(square));
}

template <typename T, typename B>
void l2_sample(T* x, const T* g, const T* x0, T step, T eps, const B box, int64_t n) {
  const auto displace = [&](auto advance) FASTLIP_INLINE {
    return reduce<2, T>(n, [&]<typename P>(int64_t i, P* sums) FASTLIP_INLINE {
      const P v = advance.template operator()<P>(i), centre = load<P>(x0 + i);
      const P d = v - centre, c = box.clip_from(d, centre, i);
      sums[0] += d * d;
      sums[1] += c * c;
      store(x + i, d);
    });
  };
  const auto still = [&]<typename P>(int64_t i) FASTLIP_INLINE { return load<P>(x + i); };
  const Factors<T> f = g ? l2_factors(g, step, n) : Factors<T>{0, 0, false};
  const auto plain = [&]<typename P>(int64_t i) FASTLIP_INLINE { return load<P>(g + i) * f.second + load<P>(x + i); };
  const auto guarded = [&]<typename P>(int64_t i) FASTLIP_INLINE {
    return finite_or_0<P, T>(load<P>(g + i)) * f.first * f.second + load<P>(x + i);
  };
  const Totals<2> sums = !g ? displace(still) : f.plain ? displace(plain) : displace(guarded);
  double full = sums.of[0];
  const double budget = static_cast<double>(eps) * static_cast<double>(eps);
  T whole = 1;
  if (full >= Range<T>::kHigh) {  // squares of d leave the range: shrink d, let s grow
    whole = Range<T>::kUp;
    full = reduce<1, T>(n, [&]<typename P>(int64_t i, P* out) FASTLIP_INLINE {
             const P d = load<P>(x + i) * Range<T>::kDown;
             out[0] += d * d;
             store(x + i, d);
           }).of[0];
  }
  T s = whole;
  if (eps == T(0)) {
    s = 0;
  } else if (full > 0 && sums.of[1] > budget) {
    s = l2_scale(x, x0, box, budget, full, whole == T(1) ? budget / sums.of[1] : budget / full, n);
  }
  map<T>(n, [&]<typename P>(int64_t i)
                FASTLIP_INLINE { store(x + i, box.clip(load<P>(x + i) * s + load<P>(x0 + i), i)); });
}

// --- L1 ----------------------------------------------------------------------------------

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

// Magnitudes as integers, which order alike; what is not finite counts as 0.
template <typename T>
void magnitudes(typename Range<T>::Bits* __restrict out, const T* __restrict g, int64_t n) {
  using Bits = typename Range<T>::Bits;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Bits size = bits_as<Bits>(magnitude(g[i]));
    out[i] = size < Range<T>::kFinite ? size : 0;
  }
}
template <typename Bits>
int64_t count_from(const Bits* __restrict keys, Bits threshold, int64_t n) {
  Bits count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += static_cast<Bits>(keys[i] >= threshold);
  return static_cast<int64_t>(count);
}
// The largest threshold >= 1 that at least `kept` keys reach, or any that exactly `kept` do; and how many do. Where
// fewer than `kept` keys are nonzero the threshold is 1 and all those count.
template <typename Bits>
Bits top_threshold(const Bits* keys, int64_t kept, int64_t n, int64_t& count) {
  // The answer lies in [low, high]; count is of low, when counted.
  Bits low = 1, high = greatest(keys, n, [](auto key) FASTLIP_INLINE { return key; });
  count = -1;
  // The top keys are mostly within a few powers of two of the largest: look there first.
  for (Bits width = Bits{1} << (sizeof(Bits) == 4 ? 23 : 52); low < high;) {
    const Bits middle = width < high - low ? high - width : low + (high - low) / 2 + 1;
    const int64_t reached = count_from(keys, middle, n);
    if (reached >= kept) {
      low = middle;
      count = reached;
      if (reached == kept) break;
      width = high;  // from here on halve
    } else {
      high = middle - 1;
      width = width < high / 2 ? 2 * width : high;
    }
  }
  if (count < 0) count = count_from(keys, low, n);
  return low;
}

// x <- x + move * sign(g) on the elements whose key reaches the threshold.
template <typename T, typename Bits>
void l1_move(T* __restrict x, const T* __restrict g, const Bits* __restrict keys, Bits threshold, T move, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T way = g[i] > T(0) ? move : -move;
    x[i] += keys[i] >= threshold ? way : T(0);
  }
}

// f(lambda) = sum of min(max(|d| - lambda, 0), cap), and how many elements lambda moves; over one vector in `thin`.
// lambda = high + low: a single T is too coarse where |d| is large against the ball.
template <typename T>
Totals<2> l1_shrunk(const T* d, const T* cap, double lambda, int64_t n, int64_t thin) {
  const T high = static_cast<T>(lambda), low = static_cast<T>(lambda - static_cast<double>(high));
  return reduce<2, T>(n / thin, [&]<typename P>(int64_t i, P* sums) FASTLIP_INLINE {
    const P zero{}, one = broadcast<P>(T(1));
    const P t = size_of<P, T>(load<P>(d + i * thin)) - high - low;
    const P most = load<P>(cap + i * thin), kept = lesser(greater(t, zero), most);
    sums[0] += kept;
    sums[1] += kept == t ? one : zero;  // t itself was kept: it lies in [0, cap]
  });
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
// position and halving in turn where they leave it. The side with f <= target (1 + tolerance) is returned.
template <typename T>
double l1_root(const T* d, const T* cap, double target, double tolerance, double start, double at_zero, int64_t n,
               int64_t thin, int passes) {
  double low = 0, low_sum = at_zero, high = kLargest<double>, high_sum = 0, lambda = start;
  Point before{0, 0, 0};
  for (int pass = 0; pass < passes; ++pass) {
    const auto [sum, moving] = l1_shrunk(d, cap, lambda, n, thin).of;
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
    if (pass == 0 || pass > 6 || !(lambda > low && lambda < high)) {
      lambda = here.lambda + (sum - target) / moving;  // not finite where nothing moves
    }
    before = here;
    if (!(lambda > low && lambda < high)) {
      if (high == kLargest<double>) {
        const T peak = greatest(d, n, []<typename P>(P v) FASTLIP_INLINE { return size_of<P, T>(v); });
        high = static_cast<double>(peak);  // f is 0 there
      }
      const double share = (low_sum - target) / (low_sum - high_sum);
      lambda = low + (high - low) * (pass % 2 ? 0.5 : share);
      if (!(lambda > low && lambda < high)) lambda = low + (high - low) / 2;
      if (!(lambda > low && lambda < high)) break;  // neighbours
    }
  }
  return high;
}

template <typename T>
double l1_threshold(const T* d, const T* cap, T eps, double at_zero, int64_t n) {
  const double target = static_cast<double>(eps), tolerance = Range<T>::kTolerance;
  double start = 0;
  constexpr int64_t lanes = VectorOf<T>::lanes;
  if (n >= 16 * kThin * lanes) {  // a guess from a part of the elements; the bracket makes up for a bad one
    const double share = 1.0 / static_cast<double>(kThin);
    const double first = (at_zero - target) / static_cast<double>(n);  // Newton from 0, were all of them moving
    start = l1_root(d, cap, target * share, 0.03, first, at_zero * share, n - n % (kThin * lanes), kThin, 8);
    if (start == kLargest<double>) start = 0;  // no end in sight within 8 passes
  }
  return l1_root(d, cap, target, tolerance, start, at_zero, n, 1, kMaxPasses);
}

template <typename T, typename B>
void l1_sample(T* x, const T* g, const T* x0, T step, T eps, const B box, int64_t kept, int64_t n, T* cap) {
  using Bits = typename Range<T>::Bits;
  if (g && step != T(0)) {
    Bits* keys = reinterpret_cast<Bits*>(cap);  // done with before cap is written
    magnitudes(keys, g, n);
    int64_t count;
    const Bits threshold = top_threshold(keys, kept, n, count);
    if (count > 0) {
      l1_move(x, g, keys, threshold, static_cast<T>(static_cast<double>(step) / static_cast<double>(count)), n);
    }
  }
  // x <- d = x - x0, and cap <- how far the box lets d reach.
  const double at_zero = reduce<1, T>(n, [&]<typename P>(int64_t i, P* sums) FASTLIP_INLINE {
                           const P zero{}, centre = load<P>(x0 + i), d = load<P>(x + i) - centre;
                           const P up = box.template hi<P>(i) - centre, down = centre - box.template lo<P>(i);
                           const P most = greater(d > zero ? up : down, zero);
                           store(x + i, d);
                           store(cap + i, most);
                           sums[0] += lesser(size_of<P, T>(d), most);
                         }).of[0];
  double lambda = 0;
  if (eps > T(0) && at_zero > static_cast<double>(eps)) lambda = l1_threshold(x, cap, eps, at_zero, n);
  const T high = static_cast<T>(lambda), low = static_cast<T>(lambda - static_cast<double>(high));
  const T reach = eps > T(0) ? kLargest<T> : T(0);
  map<T>(n, [&]<typename P>(int64_t i) FASTLIP_INLINE {
    const P zero{}, d = load<P>(x + i);
    const P shrunk =
        lesser(greater(size_of<P, T>(d) - high - low, zero), lesser(load<P>(cap + i), broadcast<P>(reach)));
    store(x + i, box.clip(load<P>(x0 + i) + (d > zero ? shrunk : -shrunk), i));
  });
}

// --- one sample of either ball -------------------------------------------------------------

template <typename T>
void ball_sample(T* x, const T* g, const T* x0, const PgdStep& p, int64_t sample, T* scratch) {
  const T step = g ? finite_or_zero(at<T>(p.step_size, sample)) : T(0);
  const T eps = radius<T>(p.eps, sample);
  with_box<T>(p, sample, 0, [&](const auto box) {
    if (p.norm == Norm::l2) {
      l2_sample(x, g, x0, step, eps, box, p.size);
    } else {
      l1_sample(x, g, x0, step, eps, box, p.kept, p.size, scratch);
    }
  });
}

}  // namespace
}  // namespace fastlip::cpu
