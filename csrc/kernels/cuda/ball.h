// L2 and L1 steps, per element and per sample: directions, and projections onto ball and box. Free of threads and
// memory, like arithmetic.h.
//
// A thread's few elements add up in T before they go into a sum in double: see Tally.
#pragma once
#include "kernels/cuda/arithmetic.h"

namespace fastlip::cuda {

// What a thread adds up: sums of its elements, lane by lane in T over one batch of them, in double over all batches;
// and a number of elements.
template <typename T, int kSums>
struct Tally {
  static constexpr int kLanes = 16 / sizeof(T);
  double sums[kSums] = {};
  int count = 0;
  T parts[kSums][kLanes];

  FASTLIP_EITHER void open() {
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) parts[k][i] = 0;
    }
  }
  // The first kUsed of them.
  template <int kUsed>
  FASTLIP_EITHER void close() {
#pragma unroll
    for (int k = 0; k < kUsed; ++k) {
      if constexpr (kLanes == 4) {
        sums[k] += (parts[k][0] + parts[k][1]) + (parts[k][2] + parts[k][3]);
      } else {
        sums[k] += parts[k][0] + parts[k][1];
      }
    }
  }
};

// --- gradient direction ----------------------------------------------------------------------------------------------
// Between these a sum of squares is exact enough whatever the elements: what falls below T's range does not count, and
// nothing exceeds it.
template <typename T>
FASTLIP_EITHER bool safe_squares(double sum) {
  return std::is_same_v<T, double> ? sum > 1e-200 && sum < 1e200 : sum > 1e-20 && sum < 1e30;
}

// The move of an element: L2 grad * scale * rate, L1 rate times the sign of grad where |grad| reaches threshold.
template <typename T>
struct Move {
  T scale, rate, threshold;
};

// step / ||grad|| with ||grad|| = sqrt(squares) 2^exponent, as two factors because it may not fit in one.
template <typename T>
FASTLIP_EITHER Move<T> l2_move(T step, double squares, int exponent) {
  if (!(squares > 0)) return {0, 0, 0};
  const T root = sqrt(static_cast<T>(squares));
  const int own = exponent_of(root), all = own + exponent, fits = fitting_exponent<T>(all);
  return {power_of_two<T>(-fits), step / (root * power_of_two<T>(-own) * power_of_two<T>(all - fits)), 0};
}

template <Norm kNorm, typename T>
FASTLIP_EITHER T moved(T x, T grad, const Move<T>& move) {
  if constexpr (kNorm == Norm::l2) {
    return x + grad * move.scale * move.rate;
  } else {
    return magnitude(grad) >= move.threshold && grad != T(0) ? x + (grad > T(0) ? move.rate : -move.rate) : x;
  }
}

// Magnitudes as integers in the same order.
template <typename T>
using Key = std::conditional_t<std::is_same_v<T, double>, uint64_t, uint32_t>;
template <typename T>
FASTLIP_EITHER Key<T> key_of(T grad) {
  return bit_cast<Key<T>>(magnitude(grad));
}

FASTLIP_EITHER int bit_width(uint64_t v) {
#ifdef __CUDA_ARCH__
  return 64 - __clzll(static_cast<long long>(v));
#else
  return v == 0 ? 0 : 64 - __builtin_clzll(v);
#endif
}

// Search for the threshold that `kept` magnitudes reach, ties apart: each pass tells how many fall into each of kBins
// parts of a bracket, and the next looks into one of them. The first parts are alike in value, which spreads gradients
// of networks well, the others in key, which narrows any bracket. It ends as soon as exactly `kept` reach a bound.
template <typename T>
struct KeySearch {
  static constexpr int kBins = 256, kBits = 8;
  Key<T> low, high;        // reached by at least `kept` keys; by fewer
  int count, above, kept;  // keys that reach low; high; that shall be reached
  T rate;                  // of the first pass, 0 afterwards
  int shift;

  FASTLIP_EITHER KeySearch(T peak, int nonzero, int wanted)
      : low(1), high(key_of(peak) + 1), count(nonzero), above(0), kept(wanted), rate((kBins - 1) / peak), shift(0) {
    if (!(rate < T(1e30))) rate = 0;
    narrow();
  }
  FASTLIP_EITHER bool done() const { return count <= kept || high - low <= 1; }
  FASTLIP_EITHER bool in(Key<T> key) const { return key >= low && key < high; }
  FASTLIP_EITHER int bin(Key<T> key) const { return rate > T(0) ? even(key) : static_cast<int>((key - low) >> shift); }
  // What the pass found: the bin with the key in question, keys in the bins above it, keys in it.
  FASTLIP_EITHER void update(int bin, int beyond, int within) {
    const Key<T> bottom = edge(bin), top = edge(bin + 1);
    low = bottom;
    high = top;
    above += beyond;
    count = above + within;
    rate = 0;
    narrow();
  }

 private:
  // Adding 1.5 2^(digits - 1) rounds to an integer and leaves it in the last bits.
  FASTLIP_EITHER int even(Key<T> key) const {
    const T size = bit_cast<T>(key);
    if constexpr (std::is_same_v<T, double>) {
      return static_cast<int>(bit_cast<uint64_t>(fma(size, rate, 0x1.8p52)) & 0xFFFF);
    } else {
      return static_cast<int>(bit_cast<uint32_t>(fmaf(size, rate, 0x1.8p23f)) & 0xFFFF);
    }
  }
  // The least key of the bracket whose bin is not below this.
  FASTLIP_EITHER Key<T> edge(int bin) const {
    if (bin <= 0) return low;
    if (bin >= kBins) return high;
    Key<T> at;
    if (rate > T(0)) {
      at = key_of((static_cast<T>(bin) - T(0.5)) / rate);
      at = at < low ? low : at > high ? high : at;
      while (at > low && even(at - 1) >= bin) --at;
      while (at < high && even(at) < bin) ++at;
    } else {
      const uint64_t offset = static_cast<uint64_t>(bin) << shift;
      at = offset < static_cast<uint64_t>(high - low) ? low + static_cast<Key<T>>(offset) : high;
    }
    return at;
  }
  FASTLIP_EITHER void narrow() {
    const int bits = bit_width(static_cast<uint64_t>(high - low - 1));
    shift = bits > kBits ? bits - kBits : 0;
  }
};

// --- projections onto ball and box -----------------------------------------------------------------------------------
// Displacement from x0: its size, at most `most` whatever the input, so that searches end; and how far the box lets it
// go.
template <typename T>
FASTLIP_EITHER T gap_size(T v, T x0, T most) {
  return lesser(magnitude(v - x0), most);
}
template <typename T>
FASTLIP_EITHER T gap_cap(T v, T x0, T lo, T hi) {
  return greater(v > x0 ? hi - x0 : x0 - lo, T(0));
}

// L2: delta = min(s size, cap). In s^2 the squared norm is concave and piecewise linear; from the left, solving the
// piece at hand for s^2 is monotone and ends when no further element meets its cap. Caps and moves are in units of a
// power of two near eps, so that what matters has squares in T; so are sizes, or they are in one near the largest where
// that is far beyond eps.
template <typename T>
struct L2Search {
  static constexpr int kSums = 2;
  static constexpr T kLargest = std::is_same_v<T, double> ? T(1.7e308) : T(3.4e38);
  T target;        // eps^2
  T unit;          // of caps: a factor into it
  T size_unit;     // of sizes
  T ratio, scale;  // s^2 in these units; what takes sizes to moves
  uint32_t capped = UINT32_MAX;
  bool inside = false;

  FASTLIP_EITHER explicit L2Search(T eps) {
    const int exponent = eps > T(0) && eps < T(INFINITY) ? exponent_of(eps) : 0;
    const int fits = fitting_exponent<T>(exponent);
    unit = power_of_two<T>(-fits);
    size_unit = unit;
    target = eps * unit * (eps * unit);
    ratio = scale = 0;
  }
  FASTLIP_EITHER T cap_in_units(T cap) const { return cap * unit; }
  // sums: of min(size, cap)^2, of size^2. The size, as it is.
  FASTLIP_EITHER T begin(T v, T x0, T cap, Tally<T, 2>& tally, int lane) const {
    const T whole = gap_size(v, x0, kLargest), size = whole * unit, within = lesser(size, cap);
    tally.parts[0][lane] += within * within;
    tally.parts[1][lane] += size * size;
    return whole;
  }
  FASTLIP_EITHER bool start(const double (&sums)[2], double) {  // false: done
    inside = sums[0] <= target && target > 0;
    if (inside || !(target > 0)) return false;
    ratio = target / static_cast<T>(sums[1]);
    scale = sqrt(ratio) * size_unit;
    return true;
  }
  // Whether sizes need a unit of their own; and given it, by the largest: the next pass sums them.
  FASTLIP_EITHER bool far(const double (&sums)[2]) const {
    return !(sums[1] < (std::is_same_v<T, double> ? 1e200 : 1e30));
  }
  FASTLIP_EITHER void restart(T peak) {
    size_unit = power_of_two<T>(-fitting_exponent<T>(exponent_of(peak)));
    ratio = scale = 0;
  }
  // sums: of cap^2 where capped, of size^2 elsewhere; number capped.
  FASTLIP_EITHER void add(T v, T x0, T cap, Tally<T, 2>& tally, int lane) const {
    const T size = gap_size(v, x0, kLargest), own = size * size_unit;
    if (size * scale >= cap) {
      tally.parts[0][lane] += cap * cap;
      ++tally.count;
    } else {
      tally.parts[1][lane] += own * own;
    }
  }
  FASTLIP_EITHER bool update(const double (&sums)[2], double count) {  // false: done
    if (static_cast<uint32_t>(count) == capped) return false;
    capped = static_cast<uint32_t>(count);
    const T next = static_cast<T>(target - sums[0]) / static_cast<T>(sums[1]), further = sqrt(next) * size_unit;
    if (!(next > ratio && further <= unit)) return false;  // rounding; what was reached is feasible
    ratio = next;
    scale = further;
    return true;
  }
  FASTLIP_EITHER T projected(T v, T x0, T cap) const {
    const T move = lesser(gap_size(v, x0, kLargest) * scale, cap);
    return x0 + with_sign(move, v - x0) * power_of_two<T>(-exponent_of(unit));
  }
};

// L1: delta = min(max(size - lambda, 0), cap), its sum decreasing and piecewise linear in lambda: Newton's method on
// the piece at hand inside a bracket, bisecting where it leaves that or is slow.
template <typename T>
struct L1Search {
  static constexpr int kSums = 1;
  static constexpr T kLargest = std::is_same_v<T, double> ? T(1e300) : T(8e36);  // 24 of them have a sum
  static constexpr double kTolerance = std::is_same_v<T, double> ? 1e-13 : 2e-7;
  static constexpr int kPatience = 12, kMost = 200;
  T target;
  double low = 0, high = 0, lambda = 0;
  int steps = 0;
  bool inside = false, ended = false;

  FASTLIP_EITHER explicit L1Search(T eps) : target(eps) {}
  FASTLIP_EITHER T cap_in_units(T cap) const { return cap; }
  // sums: of min(size, cap), of size; number between 0 and cap. The size.
  FASTLIP_EITHER T begin(T v, T x0, T cap, Tally<T, 2>& tally, int lane) const {
    const T size = gap_size(v, x0, kLargest);
    tally.parts[0][lane] += lesser(size, cap);
    tally.parts[1][lane] += size;
    tally.count += size > T(0) && size < cap ? 1 : 0;
    return size;
  }
  FASTLIP_EITHER bool start(const double (&sums)[2], double free) {  // false: done
    high = sums[1];
    const bool fits = sums[0] <= target;
    inside = fits && (target < kLargest || target == T(INFINITY));  // else sizes may have been cut
    ended = fits || !(target > 0);
    if (ended) {
      lambda = fits ? 0 : high;
    } else {
      propose(sums[0], free);
    }
    return !ended;
  }
  // sums: of delta; number between 0 and cap.
  FASTLIP_EITHER void add(T v, T x0, T cap, Tally<T, 2>& tally, int lane) const {
    const T move = shrunk(v, x0, cap);
    tally.parts[0][lane] += move;
    tally.count += move > T(0) && move < cap ? 1 : 0;
  }
  FASTLIP_EITHER bool update(const double (&sums)[1], double free) {  // false: done
    if (fabs(sums[0] - static_cast<double>(target)) <= kTolerance * static_cast<double>(target)) return false;
    (sums[0] > target ? low : high) = lambda;
    if (++steps >= kMost) {
      lambda = high;
      ended = true;
    } else {
      propose(sums[0], free);
    }
    return !ended;
  }
  FASTLIP_EITHER T projected(T v, T x0, T cap) const { return x0 + with_sign(shrunk(v, x0, cap), v - x0); }

 private:
  // Lambda in two parts: one float is too coarse where eps is far below the sizes.
  FASTLIP_EITHER T shrunk(T v, T x0, T cap) const {
    const T head = static_cast<T>(lambda), tail = static_cast<T>(lambda - head);
    return lesser(greater(gap_size(v, x0, kLargest) - head - tail, T(0)), cap);
  }
  FASTLIP_EITHER void propose(double sum, double free) {
    double next = free > 0 ? lambda + static_cast<T>(sum - static_cast<double>(target)) / static_cast<T>(free) : low;
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
