// Sums over a row, in vectors.
//
// How exact they are: in float, only the terms of a block add up, kRounds to each of kUnroll accumulators of a lane; a
// block's sums join one in double. So a term meets at most 1 rounding of its own and kRounds + 1 of additions. Where
// terms are not negative, errors do not exceed 10 * 2^-24 = 6e-7 of a sum, whatever its length and magnitudes.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>  // whose functions are always inlined
#endif

#include "kernels/cpu/vectors.h"

namespace fastlip::cpu {

// What units of one instruction set share is in a namespace of its name: the linker must not mix them up.
inline namespace FASTLIP_ISA {

// Rows of the sample that follows, fetched while this one is worked on.
template <typename T>
struct Ahead {
  const T* rows[4];
};
// Sums, and a number of elements.
template <int kSums>
struct Totals {
  double of[kSums];
  int64_t count;
};

}  // namespace FASTLIP_ISA

namespace {

constexpr int kUnroll = 4;  // independent accumulators hide the latency of additions
constexpr int kRounds = 8;  // terms to an accumulator before it moves to double

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

// What takes the place of the next kUnroll vectors from element i.
template <typename T>
FASTLIP_INLINE inline void fetch(const Ahead<T>& ahead, int64_t i) {
#pragma GCC unroll 4
  for (int64_t k = 0; k < kUnroll * VectorOf<T>::lanes; k += 64 / static_cast<int64_t>(sizeof(T)))
#pragma GCC unroll 4
    for (const T* row : ahead.rows) __builtin_prefetch(row + i + k, 0, 2);
}

// As map, and body<P>(i, sums, count) adds to kSums sums and, by tally, to a number of elements.
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
      if (ahead) fetch(*ahead, i);
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

}  // namespace
}  // namespace fastlip::cpu
