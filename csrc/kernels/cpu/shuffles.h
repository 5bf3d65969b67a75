// Rearranging the lanes of vectors of floats.
#pragma once

#include "kernels/cpu/vectors.h"

namespace fastlip::cpu {
namespace {

// As std::make_integer_sequence; see scalar.h.
template <int... I>
struct Indices {};
template <int N, int... I>
struct UpTo : UpTo<N - 1, N - 1, I...> {};
template <int... I>
struct UpTo<0, I...> {
  using Type = Indices<I...>;
};
using LanesOfFloats = UpTo<kVectorBytes / 4>::Type;

// Every second lane of a, then of b, from lane kFirst on.
template <int kFirst, int... I>
FASTLIP_INLINE inline Vector<float> every_second(Vector<float> a, Vector<float> b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (2 * I + kFirst)...);
}

// The lanes of a and b in turns; of their first half, or with `kHalf` 1 of their second.
template <int kHalf, int... I>
FASTLIP_INLINE inline Vector<float> in_turns(Vector<float> a, Vector<float> b, Indices<I...>) {
  constexpr int kWidth = sizeof...(I);
  return __builtin_shufflevector(a, b, (I / 2 + kHalf * kWidth / 2 + I % 2 * kWidth)...);
}

// Exchanges D lanes of a and b in each group of 2 D lanes: a's second ones for b's first ones.
template <int D, int... I>
FASTLIP_INLINE inline void exchange(Vector<float>& a, Vector<float>& b, Indices<I...>) {
  constexpr int kWidth = sizeof...(I);
  const Vector<float> first = __builtin_shufflevector(a, b, (I / D % 2 ? I - D + kWidth : I)...);
  b = __builtin_shufflevector(a, b, (I / D % 2 ? I + kWidth : I + D)...);
  a = first;
}
// Interleaves runs of D lanes of a and b in each group of four lanes: their first ones in a, their second ones in b.
template <int D, int... I>
FASTLIP_INLINE inline void interleave(Vector<float>& a, Vector<float>& b, Indices<I...>) {
  constexpr int kWidth = sizeof...(I);
  const Vector<float> first =
      __builtin_shufflevector(a, b, (I / 4 * 4 + I % 4 / (2 * D) * D + I % D + I / D % 2 * kWidth)...);
  b = __builtin_shufflevector(a, b, (I / 4 * 4 + I % 4 / (2 * D) * D + I % D + I / D % 2 * kWidth + 2)...);
  a = first;
}
// v[i][j] for v[j][i]. By instructions that do not mix lanes across groups of four, as far as it goes: GCC makes two of
// each other one.
template <int D = kVectorBytes / 8>
FASTLIP_INLINE inline void transpose(Vector<float> (&v)[kVectorBytes / 4]) {
  constexpr int kWidth = kVectorBytes / 4;
  using All = LanesOfFloats;
  if constexpr (D >= 4) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i)
      if (i / D % 2 == 0) exchange<D>(v[i], v[i + D], All{});
    transpose<D / 2>(v);
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < kWidth; i += 4) {
      interleave<1>(v[i], v[i + 1], All{});  // each two elements of two rows
      interleave<1>(v[i + 2], v[i + 3], All{});
      interleave<2>(v[i], v[i + 2], All{});  // an element of four rows
      interleave<2>(v[i + 1], v[i + 3], All{});
      const Vector<float> second = v[i + 2];
      v[i + 2] = v[i + 1];
      v[i + 1] = second;
    }
  }
}

// v[i][j] = from[j * step + i].
FASTLIP_INLINE inline void load_transposed(Vector<float> (&v)[kVectorBytes / 4], const float* from, int64_t step) {
#pragma GCC unroll 16
  for (int i = 0; i < kVectorBytes / 4; ++i) v[i] = load<Vector<float>>(from + i * step);
  transpose(v);
}

// to[i * to_step + j] = from[j * from_step + i] for as many i and j as a vector has lanes.
FASTLIP_INLINE inline void transpose(float* to, int64_t to_step, const float* from, int64_t from_step) {
  Vector<float> v[kVectorBytes / 4];
  load_transposed(v, from, from_step);
#pragma GCC unroll 16
  for (int i = 0; i < kVectorBytes / 4; ++i) store<Vector<float>>(to + i * to_step, v[i]);
}

}  // namespace
}  // namespace fastlip::cpu
