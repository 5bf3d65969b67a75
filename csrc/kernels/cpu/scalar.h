// Arithmetic on single elements, shared by the CPU kernels: storage types, limits, values per sample.
//
// Everything has internal linkage, because translation units of several instruction sets include it, and no standard
// header with code in it is used: an inline std:: function emitted by one of them could be the copy the linker keeps
// for every caller, with instructions older CPUs lack. What units of one set share is in a namespace of its name
// (sums.h). tests/build/test_instruction_sets.py looks for the rest.
#pragma once
#include "kernels/api.h"

namespace fastlip::cpu {
namespace {

template <typename T>
inline constexpr T kLargest = __DBL_MAX__;
template <>
inline constexpr float kLargest<float> = __FLT_MAX__;

template <typename T>
inline T clip(T v, T lo, T hi) {
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}
template <typename T>
constexpr T least(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
constexpr T most(T a, T b) {
  return a > b ? a : b;
}
inline float magnitude(float v) { return __builtin_fabsf(v); }
inline double magnitude(double v) { return __builtin_fabs(v); }
// Infinity and NaN count as 0.
template <typename T>
inline T finite_or_zero(T v) {
  return magnitude(v) <= kLargest<T> ? v : T(0);
}
template <typename To, typename From>
inline To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, v);
}

template <typename T>
inline T* at_cache_line(void* memory) {
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
}

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

inline float widen(float v) { return v; }

// The nearest 16-bit number, ties to even; beyond the largest, infinity.
inline void nearest(float& out, float v) { out = v; }
inline void nearest(Half& out, float v) {
  const uint32_t bits = bits_as<uint32_t>(v);
  const uint32_t size = bits & 0x7fffffffu, odd = (size >> 13) & 1;
  const uint32_t normal = (size - ((127u - 15u) << 23) + 0xfffu + odd) >> 13;  // a carry may reach the exponent
  // Below 2^-14 units are 2^-24: those of a float just above 2^-1.
  const uint32_t small = bits_as<uint32_t>(bits_as<float>(size < 0x38800000u ? size : 0u) + 0.5f) - 0x3f000000u;
  uint32_t result = size < 0x38800000u ? small : normal;
  result = size >= 0x477ff000u ? 0x7c00u : result;  // 65520 and beyond
  result = size > 0x7f800000u ? 0x7e00u : result;
  out.bits = static_cast<uint16_t>(result | (bits >> 16 & 0x8000u));
}
inline void nearest(BFloat16& out, float v) {
  const uint32_t bits = bits_as<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

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
  uint32_t result = size < 0x38800000u ? small : normal;    // 2^-14
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

// --- numbers of one sample ------------------------------------------------------------------

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
}  // namespace
}  // namespace fastlip::cpu
