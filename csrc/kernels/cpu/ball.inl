// L2 and L1 steps of one sample on the CPU, compiled once per instruction set.
//
// A sample stays in cache between passes, which read its displacement d = x - x0. Where squares may leave the range of
// T, lengths have a unit of their own. Searches end with sums at or below eps (or eps^2), which keeps lengths within
// 1e-6 of eps.
#include "kernels/cpu/ball.h"

namespace fastlip::cpu {
namespace {

constexpr int64_t kThin = 8;      // one vector in so many is looked at to guess thresholds
constexpr double kGuess = 0.003;  // of the ball's size: how exact such a guess is
// A Newton step from within this share of the ball's size mostly ends a search; the pass after it writes as well.
constexpr double kNear = 0.002, kNearSquare = 0.01;
constexpr float kFar = 0x1p20f;  // displacements beyond so many units have one of their own
constexpr int kMaxPasses = 200;  // of the L1 root search; halvings alone need fewer

// The power of two at or below v > 0, or the nearest to it that has an inverse.
template <typename T>
inline T unit_of(T v) {
  using Bits = typename Range<T>::Bits;
  constexpr T least_unit = Range<T>::kNormal;
  return least(most(bits_as<T>(static_cast<Bits>(bits_as<Bits>(v) & Range<T>::kFinite)), least_unit), 1 / least_unit);
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

}  // namespace

inline namespace FASTLIP_ISA {

template <typename T, typename B>
void l2_project(T* out, T* d, const T* x0, T eps, const B box, Totals<2> sums, int64_t n, const Ahead<T>* ahead) {
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

template <typename T, typename B>
void l2_sample(T* out, const T* x, const T* g, const T* x0, T step, T eps, const B box, int64_t n, T* d,
               const Ahead<T>* ahead) {
  const Factors<T> factors = g ? l2_factors(g, step, n) : Factors<T>{0, 0, false};
  const T first = factors.first, second = factors.second;
  const auto still = [&]<typename P>(int64_t i) FASTLIP_INLINE { return load<P>(x + i); };
  const auto plain = [&]<typename P>(int64_t i) FASTLIP_INLINE { return load<P>(g + i) * second + load<P>(x + i); };
  const auto guarded = [&]<typename P>(int64_t i) FASTLIP_INLINE {
    return finite_or_0<P, T>(load<P>(g + i)) * first * second + load<P>(x + i);
  };
  const Totals<2> sums = !g              ? l2_displace(d, x0, box, n, still)
                         : factors.plain ? l2_displace(d, x0, box, n, plain)
                                         : l2_displace(d, x0, box, n, guarded);
  l2_project(out, d, x0, eps, box, sums, n, ahead);
}

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
    const auto below = cut.threshold - 1;
    at_zero = displace([&]<typename P>(int64_t i)
                           FASTLIP_INLINE { return load<P>(x + i) + signed_step(load<P>(g + i), move, below); });
  } else {
    at_zero = displace([&]<typename P>(int64_t i) FASTLIP_INLINE { return load<P>(x + i); });
  }
  l1_project(out, d, cap, x0, eps, box, at_zero, n, ahead);
}

#define FASTLIP_BALLS(T, kRows)                                                                                       \
  template void l2_sample(T*, const T*, const T*, const T*, T, T, const Box<T, kRows>, int64_t, T*, const Ahead<T>*); \
  template void l2_project(T*, T*, const T*, T, const Box<T, kRows>, Totals<2>, int64_t, const Ahead<T>*);            \
  template void l1_sample(T*, const T*, const T*, const T*, T, T, const Box<T, kRows>, int64_t, int64_t, T*, T*,      \
                          const Ahead<T>*);
FASTLIP_BALLS(float, false)
FASTLIP_BALLS(float, true)
FASTLIP_BALLS(double, true)

}  // namespace FASTLIP_ISA
}  // namespace fastlip::cpu
