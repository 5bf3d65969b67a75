// Vectors of the compiler's own (vector_size), so that the code is one for all instruction sets; what is left over
// after them runs the same generic body. No standard library header: see scalar.h.
#pragma once
#include "kernels/cpu/scalar.h"

#define FASTLIP_STR_(x) #x
#define FASTLIP_STR(x) FASTLIP_STR_(x)
#define FASTLIP_CAT_(a, b) a##b
#define FASTLIP_CAT(a, b) FASTLIP_CAT_(a, b)

namespace fastlip::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

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

// As std::make_integer_sequence; see scalar.h.
template <int... I>
struct Indices {};
template <int N, int... I>
struct UpTo : UpTo<N - 1, N - 1, I...> {};
template <int... I>
struct UpTo<0, I...> {
  using Type = Indices<I...>;
};

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

// Calls body<P>(i) for vectors, then single elements, until all n are done.
template <typename T, typename Body>
FASTLIP_INLINE inline void map(int64_t n, Body body) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) body.template operator()<Vector<T>>(i);
  for (; i < n; ++i) body.template operator()<T>(i);
}

}  // namespace
}  // namespace fastlip::cpu
