// L2 and L1 steps, per element and per sample: directions, and projections onto ball and box. Free of threads and
// memory, like arithmetic.h.
#pragma once
#include "kernels/cuda/arithmetic.h"

namespace fastlip::cuda {

// --- gradient direction ----------------------------------------------------------------------------------------------
// Magnitudes as integers in the same order. Bits that 16-bit storage cannot set are dropped to shorten the search.
template <typename S>
using Key = std::conditional_t<std::is_same_v<S, double>, uint64_t, uint32_t>;

template <typename S>
FASTLIP_HD Key<S> key_of(Arith<S> grad) {
  constexpr int kUnused = std::is_same_v<S, __half> ? 13 : std::is_same_v<S, __nv_bfloat16> ? 16 : 0;
  return bit_cast<Key<S>>(magnitude(finite_or_zero(grad))) >> kUnused;
}

// The move of an element: L2 grad * first * second, L1 first times the sign of grad where its key reaches threshold.
template <typename S>
struct Move {
  Arith<S> first, second;
  Key<S> threshold;
};

// step / ||grad|| with ||grad|| = sqrt(squares) 2^exponent, as two factors because it may not fit in one.
template <typename S>
FASTLIP_HD Move<S> l2_move(double step, double squares, int exponent) {
  constexpr int kLimit = std::is_same_v<S, double> ? 1000 : 126;
  if (!(squares > 0)) return {0, 0, 0};
  const double root = sqrt(squares);
  const int shift = ilogb(root) + exponent;
  const int fits = shift > kLimit ? kLimit : shift < -kLimit ? -kLimit : shift;
  return {static_cast<Arith<S>>(ldexp(1.0, -fits)), static_cast<Arith<S>>(step / ldexp(root, exponent - fits)), 0};
}

template <typename S, Norm kNorm>
FASTLIP_HD Arith<S> moved(Arith<S> x, Arith<S> grad, const Move<S>& move) {
  if constexpr (kNorm == Norm::l2) {
    return x + finite_or_zero(grad) * move.first * move.second;
  } else {
    const Key<S> key = key_of<S>(grad);
    return key != 0 && key >= move.threshold ? x + (grad > 0 ? move.first : -move.first) : x;
  }
}

// Search for the threshold that `kept` magnitudes reach, ties apart: each pass counts the keys that reach three
// candidates, so it is worth two bits, and it ends as soon as one of them separates exactly `kept`.
template <typename S>
struct KeySearch {
  Key<S> low, high;  // reached by at least `kept` keys; by fewer
  double count;      // keys that reach low

  FASTLIP_HD KeySearch(Arith<S> peak, double nonzero) : low(1), high(key_of<S>(peak) + 1), count(nonzero) {}
  FASTLIP_HD bool done(double kept) const { return count <= kept || high - low <= 1; }
  FASTLIP_HD Key<S> candidate(int i) const {
    const Key<S> step = (high - low) / 4 > 0 ? (high - low) / 4 : 1;
    const Key<S> at = low + static_cast<Key<S>>(i + 1) * step;
    return at < high ? at : high;
  }
  FASTLIP_HD void update(const double (&reached)[3], double kept) {
    const Key<S> at[3] = {candidate(0), candidate(1), candidate(2)};
    for (int i = 0; i < 3; ++i) {  // ascending: the last that enough keys reach wins, the first of the others bounds
      if (reached[i] >= kept) {
        low = at[i];
        count = reached[i];
      } else if (at[i] < high) {
        high = at[i];
      }
    }
  }
};

// --- projections onto ball and box -----------------------------------------------------------------------------------
// Displacement from x0: its size, and how far the box lets it go. Finite whatever the input, so that searches end.
template <typename T>
struct Gap {
  T size, cap, sign;
};

template <typename T>
FASTLIP_HD Gap<T> gap_of(T v, T x0, T lo, T hi) {
  constexpr T kLargest = std::is_same_v<T, double> ? T(1e150) : T(3.4e38);  // squares in double stay finite
  const T d = clamp(v - x0, -kLargest, kLargest);
  return {magnitude(d), greater(d > T(0) ? hi - x0 : x0 - lo, T(0)), d};
}

// L2: delta = min(s size, cap). In s^2 the squared norm is concave and piecewise linear; from the left, solving the
// piece at hand for s^2 is monotone and ends when no further element meets its cap.
template <typename T>
struct L2Search {
  static constexpr int kSums = 3;
  double target, square;  // eps^2; s^2
  double saturated = -1;
  bool inside;

  // sums: of min(size, cap)^2, of size^2; the third is 0.
  FASTLIP_HD L2Search(T eps, const double (&sums)[kSums])
      : target(static_cast<double>(eps) * eps), square(target / sums[1]), inside(sums[0] <= target) {}
  FASTLIP_HD bool searching() const { return !inside; }
  FASTLIP_HD static void begin(const Gap<T>& gap, double (&sums)[kSums]) {
    const double within = lesser(gap.size, gap.cap), size = gap.size;
    sums[0] += within * within;
    sums[1] += size * size;
  }
  FASTLIP_HD T at() const { return static_cast<T>(sqrt(square)); }
  FASTLIP_HD static T shrunk(const Gap<T>& gap, T scale) { return lesser(gap.size * scale, gap.cap); }
  // sums: of cap^2 where capped, of size^2 elsewhere, number capped.
  FASTLIP_HD static void add(const Gap<T>& gap, T scale, double (&sums)[kSums]) {
    const bool capped = gap.size * scale >= gap.cap;
    const double value = capped ? gap.cap : gap.size;
    sums[0] += capped ? value * value : 0;
    sums[1] += capped ? 0 : value * value;
    sums[2] += capped ? 1 : 0;
  }
  FASTLIP_HD bool update(const double (&sums)[kSums]) {  // false: done
    if (sums[2] == saturated) return false;
    saturated = sums[2];
    const double next = (target - sums[0]) / sums[1];
    if (!(next > square && next <= 1)) return false;  // rounding; what was reached is feasible
    square = next;
    return true;
  }
};

// L1: delta = min(max(size - lambda, 0), cap), its sum decreasing and piecewise linear in lambda: Newton's method on
// the piece at hand inside a bracket, bisecting where it leaves that or is slow.
template <typename T>
struct L1Search {
  static constexpr int kSums = 3;
  static constexpr double kTolerance = std::is_same_v<T, double> ? 1e-13 : 2e-7;
  static constexpr int kPatience = 12, kMost = 200;
  // Lambda in two parts: one float is too coarse where eps is far below the sizes.
  struct Lambda {
    T head, tail;
  };
  double target, low = 0, high, lambda = 0;
  int steps = 0;
  bool inside, ended;

  // sums: of min(size, cap), number between 0 and cap, of size.
  FASTLIP_HD L1Search(T eps, const double (&sums)[kSums]) : target(eps), high(sums[2]), inside(sums[0] <= target) {
    ended = inside || !(target > 0);
    if (ended) {
      lambda = high;
    } else {
      propose(sums[0], sums[1]);
    }
  }
  FASTLIP_HD static void begin(const Gap<T>& gap, double (&sums)[kSums]) {
    sums[0] += lesser(gap.size, gap.cap);
    sums[1] += gap.size > T(0) && gap.size < gap.cap ? 1 : 0;
    sums[2] += gap.size;
  }
  FASTLIP_HD bool searching() const { return !ended; }
  FASTLIP_HD Lambda at() const {
    const T head = static_cast<T>(lambda);
    return {head, static_cast<T>(lambda - head)};
  }
  FASTLIP_HD static T shrunk(const Gap<T>& gap, const Lambda& at) {
    return lesser(greater(gap.size - at.head - at.tail, T(0)), gap.cap);
  }
  // sums: of delta, number between 0 and cap; the third stays 0.
  FASTLIP_HD static void add(const Gap<T>& gap, const Lambda& at, double (&sums)[kSums]) {
    const T value = shrunk(gap, at);
    sums[0] += value;
    sums[1] += value > T(0) && value < gap.cap ? 1 : 0;
  }
  FASTLIP_HD bool update(const double (&sums)[kSums]) {  // false: done
    if (fabs(sums[0] - target) <= kTolerance * target) return false;
    (sums[0] > target ? low : high) = lambda;
    if (++steps >= kMost) {
      lambda = high;
      return false;
    }
    propose(sums[0], sums[1]);
    return !ended;
  }

 private:
  FASTLIP_HD void propose(double sum, double free) {
    double next = free > 0 ? lambda + (sum - target) / free : low;
    if (free > 0 && next == lambda) {  // lambda is as fine as it gets
      if (sum < target) {
        ended = true;
        return;
      }
      next = nextafter(lambda, high);
    }
    if (!(next > low && next < high) || (steps >= kPatience && steps % 2 == 1)) next = low + (high - low) / 2;
    ended = !(next > low && next < high);
    lambda = ended ? high : next;
  }
};

}  // namespace fastlip::cuda
