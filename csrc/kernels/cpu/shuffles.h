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

// Exchanges the lanes l with l & D of a and those without of b.
template <int D, int... I>
FASTLIP_INLINE inline void exchange(Vector<float>& a, Vector<float>& b, Indices<I...>) {
  constexpr int kWidth = sizeof...(I);
  const Vector<float> low = __builtin_shufflevector(a, b, (I & D ? kWidth + I - D : I)...);
  b = __builtin_shufflevector(a, b, (I & D ? kWidth + I : I + D)...);
  a = low;
}

template <int D, int N>
FASTLIP_INLINE inline void transpose_lanes(Vector<float> (&v)[N]) {
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
    if (!(i & D)) exchange<D>(v[i], v[i + D], LanesOfFloats{});
  if constexpr (D > 1) transpose_lanes<D / 2>(v);
}

// v[i][j] = from[j * step + i].
FASTLIP_INLINE inline void load_transposed(Vector<float> (&v)[kVectorBytes / 4], const float* from, int64_t step) {
#pragma GCC unroll 16
  for (int i = 0; i < kVectorBytes / 4; ++i) v[i] = load<Vector<float>>(from + i * step);
  transpose_lanes<kVectorBytes / 8>(v);
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
