// CPU kernels, compiled once per instruction set; FASTLIP_ISA names the table.
//
// No standard library header with code in it: an inline std:: function emitted here could be the copy the linker keeps
// for every caller, with instructions older CPUs lack. Loops are written for `omp simd`; contraction is off
// (-ffp-contract=off) because Linf must round alike on every backend, and fma() is asked for by name.
//
// A sample is worked on in place and stays in cache between passes, so main memory sees three reads and one write.
#include "kernels/api.h"

#define FASTLIP_STR_(x) #x
#define FASTLIP_STR(x) FASTLIP_STR_(x)
#define FASTLIP_CAT_(a, b) a##b
#define FASTLIP_CAT(a, b) FASTLIP_CAT_(a, b)

namespace fastlip::cpu {
namespace {

// Elements summed in the arithmetic's type before the sum moves to double: 16 additions a vector lane, which keeps
// float sums well within 1e-6.
#if defined(__AVX512F__)
constexpr int64_t kBlock = 256;
#elif defined(__AVX2__)
constexpr int64_t kBlock = 128;
#else
constexpr int64_t kBlock = 64;
#endif
constexpr int64_t kChunk = 1024;  // elements of 16-bit storage widened at a time
constexpr int kMaxPasses = 100;   // of the L1 root search; bisection alone needs fewer

template <typename T>
struct Limits;
template <>
struct Limits<float> {
  using Bits = uint32_t;
  static constexpr float kMax = __FLT_MAX__;
  static constexpr double kLow = 1e-30, kHigh = 1e30;        // sums of squares trusted without rescaling
  static constexpr float kUp = 0x1p96f, kDown = 0x1p-96f;    // bring any float's square into range
};
template <>
struct Limits<double> {
  using Bits = uint64_t;
  static constexpr double kMax = __DBL_MAX__;
  static constexpr double kLow = 1e-280, kHigh = 1e280;
  static constexpr double kUp = 0x1p600, kDown = 0x1p-600;
};

template <typename T>
inline T clip(T v, T lo, T hi) {
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}
template <typename T>
inline T least(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
inline T most(T a, T b) {
  return a > b ? a : b;
}
inline float magnitude(float v) { return __builtin_fabsf(v); }
inline double magnitude(double v) { return __builtin_fabs(v); }
// Infinity and NaN count as 0.
template <typename T>
inline T finite_or_zero(T v) {
  return magnitude(v) <= Limits<T>::kMax ? v : T(0);
}
#ifdef __FMA__
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
inline float fma(float a, float b, float c) { return a * b + c; }
inline double fma(double a, double b, double c) { return a * b + c; }
#endif
template <typename To, typename From>
inline To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, v);
}

// --- storage -----------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float widen(Half h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16;
  const uint32_t rest = h.bits & 0x7fff;
  // Subnormals by an exact product, so that a flush-to-zero mode cannot lose them.
  const float small = static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f;
  const uint32_t normal = (rest << 13) + ((rest >= 0x7c00 ? 255u - 31u : 127u - 15u) << 23);
  const uint32_t value = rest < 0x400 ? bits_as<uint32_t>(small) : normal;
  return bits_as<float>(value | sign);
}
inline float widen(BFloat16 b) { return bits_as<float>(static_cast<uint32_t>(b.bits) << 16); }

// Rounds v to 16 bits in the direction of x0, itself a 16-bit number: never past x0, never away from it.
inline void narrow(Half& out, float v, float x0) {
  const uint32_t bits = bits_as<uint32_t>(v);
  const uint32_t size = bits & 0x7fffffffu;
  const bool negative = bits >> 31;
  const bool away_from_zero = negative == (v >= x0);  // towards -inf where v >= x0, else towards +inf
  const uint32_t normal = (size - ((127u - 15u) << 23) + (away_from_zero ? 0x1fffu : 0u)) >> 13;
  const float units = bits_as<float>(size < 0x38800000u ? size : 0u) * 0x1p24f;
  const int32_t floor = static_cast<int32_t>(units);
  const uint32_t small = static_cast<uint32_t>(floor + (away_from_zero && static_cast<float>(floor) < units));
  uint32_t result = size < 0x38800000u ? small : normal;  // 2^-14
  const uint32_t top = away_from_zero ? 0x7c00u : 0x7bffu;  // beyond 65504
  result = size > 0x477fe000u ? top : result;
  result = size == 0x7f800000u ? 0x7c00u : result;
  result = size > 0x7f800000u ? 0x7e00u : result;
  out.bits = static_cast<uint16_t>(result | (negative ? 0x8000u : 0u));
}
inline void narrow(BFloat16& out, float v, float x0) {
  const uint32_t bits = bits_as<uint32_t>(v);
  const bool away_from_zero = static_cast<bool>(bits >> 31) == (v >= x0);
  const uint32_t rounded = (bits + (away_from_zero ? 0xffffu : 0u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}

template <typename S>
inline constexpr bool is_wide = false;
template <>
inline constexpr bool is_wide<float> = true;
template <>
inline constexpr bool is_wide<double> = true;

template <typename S>
struct ArithmeticOf {
  using Type = float;
};
template <>
struct ArithmeticOf<double> {
  using Type = double;
};
template <typename S>
using Arithmetic = typename ArithmeticOf<S>::Type;

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

// --- values ------------------------------------------------------------------------------

template <typename T>
inline T at(const Value& v, int64_t sample) {
  return v.data ? static_cast<const T*>(v.data)[sample * v.stride] : static_cast<T>(v.scalar);
}
template <typename T>
inline T radius(const Value& v, int64_t sample) {
  const T eps = at<T>(v, sample);
  return eps > T(0) ? eps : T(0);
}
// A limit of one sample: a row, or one number for all elements.
template <typename T>
struct Limit {
  const T* row;
  T scalar;
  Limit(const Value& v, int64_t sample)
      : row(v.data ? static_cast<const T*>(v.data) + sample * v.stride : nullptr), scalar(static_cast<T>(v.scalar)) {}
};
template <bool kRow, typename T>
inline T limit(const T* row, T scalar, int64_t i) {
  if constexpr (kRow) return row[i];
  return scalar;
}
// Calls f<kLoRow, kHiRow>() for the kind of limits at hand, so that loops carry no test.
template <typename T, typename F>
inline void with_limits(const Limit<T>& lo, const Limit<T>& hi, F f) {
  if (lo.row && hi.row) return f.template operator()<true, true>();
  if (lo.row) return f.template operator()<true, false>();
  if (hi.row) return f.template operator()<false, true>();
  return f.template operator()<false, false>();
}

// --- Linf --------------------------------------------------------------------------------

template <bool kStep, bool kLoRow, bool kHiRow, typename T>
void linf(T* x, const T* __restrict g, const T* __restrict x0, T step, T eps, const T* __restrict lo_row, T lo,
          const T* __restrict hi_row, T hi, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    T v = x[i];
    if constexpr (kStep) {
      const T gi = finite_or_zero(g[i]);
      v += step * (static_cast<T>(gi > T(0)) - static_cast<T>(gi < T(0)));
    }
    const T d = clip(v - x0[i], -eps, eps);
    x[i] = clip(x0[i] + d, limit<kLoRow>(lo_row, lo, i), limit<kHiRow>(hi_row, hi, i));
  }
}

template <typename T>
void linf_part(T* x, const T* g, const T* x0, const PgdStep& p, int64_t sample, int64_t first, int64_t n) {
  T step = g ? at<T>(p.step_size, sample) : T(0);
  step = finite_or_zero(step);
  const T eps = radius<T>(p.eps, sample);
  const Limit<T> lo(p.lo, sample), hi(p.hi, sample);
  const T* lo_row = lo.row ? lo.row + first : nullptr;
  const T* hi_row = hi.row ? hi.row + first : nullptr;
  with_limits(lo, hi, [&]<bool kLoRow, bool kHiRow>() {
    if (g) {
      linf<true, kLoRow, kHiRow>(x, g, x0, step, eps, lo_row, lo.scalar, hi_row, hi.scalar, n);
    } else {
      linf<false, kLoRow, kHiRow>(x, g, x0, step, eps, lo_row, lo.scalar, hi_row, hi.scalar, n);
    }
  });
}

template <typename S>
void pgd_step_linf_as(const PgdStep& p, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t sample = begin / p.size, first = begin % p.size;
    const int64_t n = least(p.size - first, end - begin);
    begin += n;
    if (p.active && !p.active[sample]) continue;
    S* x = static_cast<S*>(p.x) + sample * p.x_stride + first;
    const S* x0 = static_cast<const S*>(p.x0) + sample * p.x0_stride + first;
    const S* g = p.grad ? static_cast<const S*>(p.grad) + sample * p.grad_stride + first : nullptr;
    if constexpr (is_wide<S>) {
      linf_part(x, g, x0, p, sample, first, n);
    } else {
      float wide_x[kChunk], wide_g[kChunk], wide_x0[kChunk];
      for (int64_t i = 0; i < n; i += kChunk) {
        const int64_t m = least(kChunk, n - i);
        widen_row(wide_x, x + i, m);
        widen_row(wide_x0, x0 + i, m);
        if (g) widen_row(wide_g, g + i, m);
        linf_part(wide_x, g ? wide_g : nullptr, wide_x0, p, sample, first + i, m);
        narrow_row(x + i, wide_x, wide_x0, m);
      }
    }
  }
}

// --- L2 ----------------------------------------------------------------------------------

// Sum of (scale * g)^2, infinities and NaN left out.
template <typename T, typename Sum>
double sum_squares(const T* __restrict g, T scale, int64_t n) {
  double total = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t m = least(kBlock, n - first);
    const T* __restrict b = g + first;
    Sum sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < m; ++i) {
      const T v = finite_or_zero(b[i]) * scale;
      sum = fma(static_cast<Sum>(v), static_cast<Sum>(v), sum);
    }
    total += static_cast<double>(sum);
  }
  return total;
}

// g * first * second has length `step`; two factors, so that neither leaves the range of T.
template <typename T>
struct Factors {
  T first, second;
};
template <typename T>
Factors<T> l2_factors(const T* g, T step, int64_t n) {
  T scale = 1;
  double sum = sum_squares<T, T>(g, scale, n);
  if (!(sum > Limits<T>::kLow && sum < Limits<T>::kHigh)) {
    scale = sum > 1 || sum != sum ? Limits<T>::kDown : Limits<T>::kUp;
    sum = sum_squares<T, double>(g, scale, n);
  }
  if (!(sum > 0)) return {0, 0};
  return {scale, static_cast<T>(static_cast<double>(step) / __builtin_sqrt(sum))};
}

template <bool kStep, bool kLoRow, bool kHiRow, typename T, typename Sum>
void l2_displace(T* x, const T* __restrict g, const T* __restrict x0, Factors<T> f, const T* __restrict lo_row, T lo,
                 const T* __restrict hi_row, T hi, int64_t n, double& full, double& clipped) {
  full = clipped = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t last = least(n, first + kBlock);
    Sum a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
    for (int64_t i = first; i < last; ++i) {
      T v = x[i];
      if constexpr (kStep) v = fma(finite_or_zero(g[i]) * f.first, f.second, v);
      const T d = v - x0[i];
      const T c = clip(d, least(limit<kLoRow>(lo_row, lo, i) - x0[i], T(0)),
                       most(limit<kHiRow>(hi_row, hi, i) - x0[i], T(0)));
      a = fma(static_cast<Sum>(d), static_cast<Sum>(d), a);
      b = fma(static_cast<Sum>(c), static_cast<Sum>(c), b);
      x[i] = d;
    }
    full += static_cast<double>(a);
    clipped += static_cast<double>(b);
  }
}

// Saturated elements at scale s: their squared bounds and number; and the squares of the others.
template <bool kLoRow, bool kHiRow, typename T, typename Sum>
void l2_split(const T* __restrict d, const T* __restrict x0, T s, const T* __restrict lo_row, T lo,
              const T* __restrict hi_row, T hi, int64_t n, double& bound, double& free, int64_t& saturated) {
  bound = free = 0;
  saturated = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t last = least(n, first + kBlock);
    Sum a = 0, b = 0;
    int32_t count = 0;
#pragma omp simd reduction(+ : a, b, count)
    for (int64_t i = first; i < last; ++i) {
      const T t = s * d[i];
      const T c = clip(t, least(limit<kLoRow>(lo_row, lo, i) - x0[i], T(0)),
                       most(limit<kHiRow>(hi_row, hi, i) - x0[i], T(0)));
      const bool sat = c != t;
      const T held = sat ? c : T(0), loose = sat ? T(0) : d[i];
      a = fma(static_cast<Sum>(held), static_cast<Sum>(held), a);
      b = fma(static_cast<Sum>(loose), static_cast<Sum>(loose), b);
      count += sat;
    }
    bound += static_cast<double>(a);
    free += static_cast<double>(b);
    saturated += count;
  }
}

// The largest scale s in [0, 1] with ||clip(s d, lo - x0, hi - x0)|| <= eps: s^2 <- (eps^2 - bound) / free rises
// monotonically from eps / ||d||, the squared norm being concave and piecewise linear in s^2, and ends exactly when the
// saturated set stands still (METHODS section 6).
template <bool kLoRow, bool kHiRow, typename T, typename Sum>
T l2_scale(const T* d, const T* x0, T eps, const T* lo_row, T lo, const T* hi_row, T hi, int64_t n, double full) {
  const double budget = static_cast<double>(eps) * static_cast<double>(eps);
  double square = budget / full;
  int64_t before = 0;
  for (int64_t pass = 0; pass <= n; ++pass) {
    double bound, free;
    int64_t saturated;
    l2_split<kLoRow, kHiRow, T, Sum>(d, x0, static_cast<T>(__builtin_sqrt(square)), lo_row, lo, hi_row, hi, n, bound,
                                     free, saturated);
    if (saturated <= before || !(free > 0)) break;
    before = saturated;
    const double next = (budget - bound) / free;
    if (!(next > square)) break;
    square = least(next, 1.0);
  }
  return static_cast<T>(__builtin_sqrt(square));
}

template <bool kLoRow, bool kHiRow, typename T>
void l2_place(T* x, const T* __restrict x0, T s, const T* __restrict lo_row, T lo, const T* __restrict hi_row, T hi,
              int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    x[i] = clip(fma(s, x[i], x0[i]), limit<kLoRow>(lo_row, lo, i), limit<kHiRow>(hi_row, hi, i));
}

template <bool kLoRow, bool kHiRow, typename T, typename Sum>
bool l2_sample(T* x, const T* g, const T* x0, T step, T eps, const T* lo_row, T lo, const T* hi_row, T hi, int64_t n) {
  double full, clipped;
  if (g) {
    const Factors<T> f = l2_factors(g, step, n);
    l2_displace<true, kLoRow, kHiRow, T, Sum>(x, g, x0, f, lo_row, lo, hi_row, hi, n, full, clipped);
  } else {
    l2_displace<false, kLoRow, kHiRow, T, Sum>(x, g, x0, {}, lo_row, lo, hi_row, hi, n, full, clipped);
  }
  if (sizeof(Sum) < sizeof(double) && !(full < Limits<T>::kHigh)) return false;
  T s = 1;
  if (eps == T(0)) {
    s = 0;
  } else if (!(clipped <= static_cast<double>(eps) * static_cast<double>(eps))) {
    s = l2_scale<kLoRow, kHiRow, T, Sum>(x, x0, eps, lo_row, lo, hi_row, hi, n, full);
  }
  l2_place<kLoRow, kHiRow>(x, x0, s, lo_row, lo, hi_row, hi, n);
  return true;
}

// --- L1 ----------------------------------------------------------------------------------

// Magnitudes as integers, which order alike; what is not finite counts as 0. Returns the largest.
template <typename T>
typename Limits<T>::Bits magnitudes(typename Limits<T>::Bits* __restrict out, const T* __restrict g, int64_t n) {
  using Bits = typename Limits<T>::Bits;
  Bits top = 0;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; ++i) {
    const Bits b = bits_as<Bits>(magnitude(finite_or_zero(g[i])));
    out[i] = b;
    top = b > top ? b : top;
  }
  return top;
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
Bits top_threshold(const Bits* keys, Bits top, int64_t kept, int64_t n, int64_t& count) {
  Bits low = 1, high = top;  // the answer lies in [low, high]
  int64_t low_count = -1;    // not yet counted
  while (low < high) {
    const Bits middle = low + (high - low + 1) / 2;
    const int64_t reached = count_from(keys, middle, n);
    if (reached >= kept) {
      low = middle;
      low_count = reached;
      if (reached == kept) break;
    } else {
      high = middle - 1;
    }
  }
  count = low_count >= 0 ? low_count : count_from(keys, low, n);
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

// x <- d = x - x0 and cap <- how far the box lets d reach. Returns f(0) = sum of min(|d|, cap).
template <bool kLoRow, bool kHiRow, typename T, typename Sum>
void l1_displace(T* x, T* __restrict cap, const T* __restrict x0, const T* __restrict lo_row, T lo,
                 const T* __restrict hi_row, T hi, int64_t n, double& sum, int64_t& moving, T& peak) {
  sum = 0;
  moving = 0;
  peak = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t last = least(n, first + kBlock);
    Sum a = 0;
    int32_t count = 0;
    T top = 0;
#pragma omp simd reduction(+ : a, count) reduction(max : top)
    for (int64_t i = first; i < last; ++i) {
      const T d = x[i] - x0[i];
      const T up = most(limit<kHiRow>(hi_row, hi, i) - x0[i], T(0));
      const T down = most(x0[i] - limit<kLoRow>(lo_row, lo, i), T(0));
      const T c = d > T(0) ? up : down;
      const T size = magnitude(d);
      x[i] = d;
      cap[i] = c;
      a += static_cast<Sum>(least(size, c));
      count += size > T(0) && size < c;
      top = size > top ? size : top;
    }
    sum += static_cast<double>(a);
    moving += count;
    peak = most(peak, top);
  }
}

// f(lambda) = sum of min(max(|d| - lambda, 0), cap), and the number of elements it moves. lambda = high + low: a single
// T would be too coarse where |d| is much larger than the ball.
template <typename T, typename Sum>
void l1_shrunk(const T* __restrict d, const T* __restrict cap, double lambda, int64_t n, double& sum, int64_t& moving) {
  const T high = static_cast<T>(lambda), low = static_cast<T>(lambda - static_cast<double>(high));
  sum = 0;
  moving = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t last = least(n, first + kBlock);
    Sum a = 0;
    int32_t count = 0;
#pragma omp simd reduction(+ : a, count)
    for (int64_t i = first; i < last; ++i) {
      const T t = (magnitude(d[i]) - high) - low;
      const T kept = least(most(t, T(0)), cap[i]);
      a += static_cast<Sum>(kept);
      count += t > T(0) && t < cap[i];
    }
    sum += static_cast<double>(a);
    moving += count;
  }
}

// The smallest lambda with f(lambda) <= eps, to the accuracy of the sums: Newton on a falling piecewise linear function,
// kept inside a bracket, with false position or halving where Newton leaves it.
template <typename T, typename Sum>
double l1_threshold(const T* d, const T* cap, T eps, int64_t n, double sum, int64_t moving, T peak) {
  const double target = static_cast<double>(eps);
  const double tolerance = target * (sizeof(T) == 4 ? 2e-7 : 1e-15);
  double low = 0, low_sum = sum, high = static_cast<double>(peak), high_sum = 0;
  double lambda = 0;
  for (int pass = 0; pass < kMaxPasses; ++pass) {
    double next = moving ? lambda + (sum - target) / static_cast<double>(moving) : low;
    if (!(next > low && next < high)) {
      next = low + (high - low) * ((low_sum - target) / (low_sum - high_sum));
      // Every other rescue halves: false position alone can creep.
      if (pass % 2 || !(next > low && next < high)) next = low + (high - low) / 2;
      if (!(next > low && next < high)) break;
    }
    lambda = next;
    l1_shrunk<T, Sum>(d, cap, lambda, n, sum, moving);
    if (sum <= target) {
      high = lambda;
      high_sum = sum;
      if (sum >= target - tolerance) break;
    } else {
      low = lambda;
      low_sum = sum;
      if (sum <= target + tolerance) return lambda;
    }
  }
  return high;
}

template <bool kLoRow, bool kHiRow, typename T>
void l1_place(T* x, const T* __restrict cap, const T* __restrict x0, double lambda, const T* __restrict lo_row, T lo,
              const T* __restrict hi_row, T hi, int64_t n) {
  const T high = static_cast<T>(lambda), low = static_cast<T>(lambda - static_cast<double>(high));
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T d = x[i];
    const T kept = least(most((magnitude(d) - high) - low, T(0)), cap[i]);
    const T v = x0[i] + (d > T(0) ? kept : -kept);
    x[i] = clip(v, limit<kLoRow>(lo_row, lo, i), limit<kHiRow>(hi_row, hi, i));
  }
}

template <bool kLoRow, bool kHiRow, typename T, typename Sum>
bool l1_sample(T* x, const T* g, const T* x0, T step, T eps, const T* lo_row, T lo, const T* hi_row, T hi, int64_t kept,
               int64_t n, T* cap) {
  using Bits = typename Limits<T>::Bits;
  if (g && step != T(0)) {
    Bits* keys = reinterpret_cast<Bits*>(cap);  // read before cap is written
    const Bits top = magnitudes(keys, g, n);
    if (top > 0) {
      int64_t count;
      const Bits threshold = top_threshold(keys, top, kept, n, count);
      l1_move(x, g, keys, threshold, static_cast<T>(static_cast<double>(step) / static_cast<double>(count)), n);
    }
  }
  double sum;
  int64_t moving;
  T peak;
  l1_displace<kLoRow, kHiRow, T, Sum>(x, cap, x0, lo_row, lo, hi_row, hi, n, sum, moving, peak);
  if (sizeof(Sum) < sizeof(double) && !(sum < Limits<T>::kHigh)) return false;
  double lambda = 0;
  if (eps == T(0)) {
    lambda = static_cast<double>(peak);
  } else if (!(sum <= static_cast<double>(eps))) {
    lambda = l1_threshold<T, Sum>(x, cap, eps, n, sum, moving, peak);
  }
  l1_place<kLoRow, kHiRow>(x, cap, x0, lambda, lo_row, lo, hi_row, hi, n);
  return true;
}

// --- one sample of either ball -------------------------------------------------------------

template <typename T>
void ball_sample(T* x, const T* g, const T* x0, const PgdStep& p, int64_t sample, T* scratch) {
  const T step = g ? finite_or_zero(at<T>(p.step_size, sample)) : T(0);
  const T eps = radius<T>(p.eps, sample);
  const Limit<T> lo(p.lo, sample), hi(p.hi, sample);
  const int64_t n = p.size;
  with_limits(lo, hi, [&]<bool kLoRow, bool kHiRow>() {
    if (p.norm == Norm::l2) {
      if (l2_sample<kLoRow, kHiRow, T, T>(x, g, x0, step, eps, lo.row, lo.scalar, hi.row, hi.scalar, n)) return;
      // Displacements too large for sums in T: x holds d by now; put x back, sum in double.
      for (int64_t i = 0; i < n; ++i) x[i] += x0[i];
      l2_sample<kLoRow, kHiRow, T, double>(x, nullptr, x0, step, eps, lo.row, lo.scalar, hi.row, hi.scalar, n);
    } else {
      if (l1_sample<kLoRow, kHiRow, T, T>(x, g, x0, step, eps, lo.row, lo.scalar, hi.row, hi.scalar, p.kept, n, scratch))
        return;
      for (int64_t i = 0; i < n; ++i) x[i] += x0[i];
      l1_sample<kLoRow, kHiRow, T, double>(x, nullptr, x0, step, eps, lo.row, lo.scalar, hi.row, hi.scalar, p.kept, n,
                                           scratch);
    }
  });
}

template <typename S>
void pgd_step_ball_as(const PgdStep& p, int64_t begin, int64_t end, void* scratch) {
  using T = Arithmetic<S>;
  for (int64_t sample = begin; sample < end; ++sample) {
    if (p.active && !p.active[sample]) continue;
    S* x = static_cast<S*>(p.x) + sample * p.x_stride;
    const S* x0 = static_cast<const S*>(p.x0) + sample * p.x0_stride;
    const S* g = p.grad ? static_cast<const S*>(p.grad) + sample * p.grad_stride : nullptr;
    T* spare = static_cast<T*>(scratch);
    if constexpr (is_wide<S>) {
      ball_sample(x, g, x0, p, sample, spare);
    } else {
      const int64_t row = p.size + 64;
      float *wide_x = spare + row, *wide_x0 = spare + 2 * row, *wide_g = spare + 3 * row;
      widen_row(wide_x, x, p.size);
      widen_row(wide_x0, x0, p.size);
      if (g) widen_row(wide_g, g, p.size);
      ball_sample<float>(wide_x, g ? wide_g : nullptr, wide_x0, p, sample, spare);
      narrow_row(x, wide_x, wide_x0, p.size);
    }
  }
}

// --- random starts -------------------------------------------------------------------------

struct Words {
  uint32_t w[4];
};
// Philox4x32-10 (Salmon et al., SC 2011).
inline Words philox(int64_t key, uint32_t block, uint32_t tag, int64_t id) {
  uint32_t c0 = block, c1 = tag, c2 = static_cast<uint32_t>(id), c3 = static_cast<uint32_t>(id >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}
constexpr uint32_t kElements = 0, kSample = 1;  // second counter word

// Uniform integers of the arithmetic's precision: a word each for float, two for double.
template <typename T>
struct Draw;
template <>
struct Draw<float> {
  static constexpr int kLanes = 4;
  static constexpr float kUlp = 0x1p-24f;
  static int64_t integer(const Words& w, int lane) { return w.w[lane] >> 8; }
  static bool sign(const Words& w, int lane) { return w.w[lane] & 1; }
};
template <>
struct Draw<double> {
  static constexpr int kLanes = 2;
  static constexpr double kUlp = 0x1p-53;
  static int64_t integer(const Words& w, int lane) {
    return static_cast<int64_t>((static_cast<uint64_t>(w.w[2 * lane] >> 5) << 26) | (w.w[2 * lane + 1] >> 6));
  }
  static bool sign(const Words& w, int lane) { return w.w[2 * lane + 1] & 1; }
};
template <typename T>
inline T open_unit(int64_t integer) {  // (0, 1]
  return (static_cast<T>(integer) + T(0.5)) * Draw<T>::kUlp;
}

template <typename T>
void linf_unit(T* out, const Words& w) {
  constexpr int64_t half = static_cast<int64_t>(0.5 / Draw<T>::kUlp);
  for (int i = 0; i < Draw<T>::kLanes; ++i)
    out[i] = static_cast<T>(Draw<T>::integer(w, i) - half) * (2 * Draw<T>::kUlp);
}
// Box-Muller on pairs of draws.
template <typename T>
void normals(T* out, const Words& w) {
  constexpr int lanes = Draw<T>::kLanes;
  for (int i = 0; i < lanes; i += 2) {
    const double length = __builtin_sqrt(-2 * __builtin_log(static_cast<double>(open_unit<T>(Draw<T>::integer(w, i)))));
    const double angle = static_cast<double>(Draw<T>::integer(w, i + 1)) * (Draw<T>::kUlp * 6.283185307179586);
    out[i] = static_cast<T>(length * __builtin_cos(angle));
    out[i + 1] = static_cast<T>(length * __builtin_sin(angle));
  }
}
template <typename T>
void signed_exponentials(T* out, const Words& w) {
  for (int i = 0; i < Draw<T>::kLanes; ++i) {
    const T size = static_cast<T>(-__builtin_log(static_cast<double>(open_unit<T>(Draw<T>::integer(w, i)))));
    out[i] = Draw<T>::sign(w, i) ? -size : size;
  }
}

// Fills unit with a point of the unit ball, up to `scale`, which is returned.
template <typename T>
T unit_ball(T* unit, const RandomStart& p, int64_t id) {
  constexpr int lanes = Draw<T>::kLanes;
  const int64_t key = *p.key;
  for (int64_t e = 0; e < p.size; e += lanes) {  // writes up to lanes - 1 past size: scratch has room
    const Words w = philox(key, static_cast<uint32_t>(e / lanes), kElements, id);
    p.norm == Norm::linf ? linf_unit(unit + e, w) : p.norm == Norm::l2 ? normals(unit + e, w)
                                                                       : signed_exponentials(unit + e, w);
  }
  if (p.norm == Norm::linf) return 1;
  const double once = open_unit<T>(Draw<T>::integer(philox(key, 0, kSample, id), 0));
  double sum = 0;
  if (p.norm == Norm::l2) {
    for (int64_t e = 0; e < p.size; ++e) sum += static_cast<double>(unit[e]) * static_cast<double>(unit[e]);
    const double length = __builtin_sqrt(sum);
    return length > 0 ? static_cast<T>(__builtin_pow(once, 1.0 / static_cast<double>(p.size)) / length) : T(0);
  }
  for (int64_t e = 0; e < p.size; ++e) sum += __builtin_fabs(static_cast<double>(unit[e]));
  return static_cast<T>(1 / (sum - __builtin_log(once)));
}

template <typename S>
void random_start_as(const RandomStart& p, int64_t begin, int64_t end, void* scratch) {
  using T = Arithmetic<S>;
  T* unit = static_cast<T*>(scratch);
  const int64_t plane = p.size / p.channels;
  for (int64_t sample = begin; sample < end; ++sample) {
    S* out = static_cast<S*>(p.out) + sample * p.out_stride;
    const S* x0 = static_cast<const S*>(p.x0) + sample * p.x0_stride;
    const T eps = finite_or_zero(radius<T>(p.eps, sample));
    const T length = eps * unit_ball(unit, p, p.ids[sample]);
    const Limit<T> lo(p.lo, sample), hi(p.hi, sample);
    for (int64_t e = 0; e < p.size; ++e) {
      const int64_t i = p.channels == 1 ? e : (e % plane) * p.channels + e / plane;
      T centre;
      if constexpr (is_wide<S>) {
        centre = x0[i];
      } else {
        centre = widen(x0[i]);
      }
      const T v = clip(centre + length * unit[e], lo.row ? lo.row[i] : lo.scalar, hi.row ? hi.row[i] : hi.scalar);
      if constexpr (is_wide<S>) {
        out[i] = v;
      } else {
        narrow(out[i], v, centre);
      }
    }
  }
}

// --- table -----------------------------------------------------------------------------------

void pgd_step_linf(const PgdStep& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::f32: return pgd_step_linf_as<float>(p, begin, end);
    case DType::f64: return pgd_step_linf_as<double>(p, begin, end);
    case DType::f16: return pgd_step_linf_as<Half>(p, begin, end);
    case DType::bf16: return pgd_step_linf_as<BFloat16>(p, begin, end);
  }
}
void pgd_step_ball(const PgdStep& p, int64_t begin, int64_t end, void* scratch) {
  switch (p.dtype) {
    case DType::f32: return pgd_step_ball_as<float>(p, begin, end, scratch);
    case DType::f64: return pgd_step_ball_as<double>(p, begin, end, scratch);
    case DType::f16: return pgd_step_ball_as<Half>(p, begin, end, scratch);
    case DType::bf16: return pgd_step_ball_as<BFloat16>(p, begin, end, scratch);
  }
}
void random_start(const RandomStart& p, int64_t begin, int64_t end, void* scratch) {
  switch (p.dtype) {
    case DType::f32: return random_start_as<float>(p, begin, end, scratch);
    case DType::f64: return random_start_as<double>(p, begin, end, scratch);
    case DType::f16: return random_start_as<Half>(p, begin, end, scratch);
    case DType::bf16: return random_start_as<BFloat16>(p, begin, end, scratch);
  }
}
void stream(float* __restrict y, const float* __restrict a, const float* __restrict b, const float* __restrict c,
            int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = a[i] + b[i] + c[i];
}

}  // namespace

extern const Kernels FASTLIP_CAT(kernels_, FASTLIP_ISA);
const Kernels FASTLIP_CAT(kernels_, FASTLIP_ISA){FASTLIP_STR(FASTLIP_ISA), pgd_step_linf, pgd_step_ball, random_start,
                                                 stream};

}  // namespace fastlip::cpu
