// What the CUDA kernels compute for one element or one sample, free of threads and memory, so that a host compiler
// takes it too. The mathematics stands in fastlip/ops/__init__.py and, as code, in fastlip/ops/reference.py.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/api.h"
#include "kernels/either.h"

namespace fastlip::cuda {

template <typename S>
using Arith = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <typename To, typename From>
FASTLIP_EITHER To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

FASTLIP_EITHER float lesser(float a, float b) { return fminf(a, b); }  // of a NaN and a number, the number
FASTLIP_EITHER double lesser(double a, double b) { return fmin(a, b); }
FASTLIP_EITHER float greater(float a, float b) { return fmaxf(a, b); }
FASTLIP_EITHER double greater(double a, double b) { return fmax(a, b); }
FASTLIP_EITHER float magnitude(float a) { return fabsf(a); }
FASTLIP_EITHER double magnitude(double a) { return fabs(a); }
FASTLIP_EITHER float with_sign(float size, float sign) { return copysignf(size, sign); }
FASTLIP_EITHER double with_sign(double size, double sign) { return copysign(size, sign); }

template <typename T>
FASTLIP_EITHER T clamp(T value, T lo, T hi) {
  return lesser(greater(value, lo), hi);
}

// Rounded once each: Linf must agree bit for bit with backends that do not contract a * b + c.
FASTLIP_EITHER float add_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
FASTLIP_EITHER double add_rn(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}
FASTLIP_EITHER float multiply_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
FASTLIP_EITHER double multiply_rn(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

FASTLIP_EITHER float divide_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

FASTLIP_EITHER float widen(float v) { return v; }
FASTLIP_EITHER double widen(double v) { return v; }
FASTLIP_EITHER float widen(__half v) { return __half2float(v); }
FASTLIP_EITHER float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename S>
FASTLIP_EITHER S nearest(float v) {
  if constexpr (std::is_same_v<S, float>) {
    return v;
  } else if constexpr (std::is_same_v<S, __half>) {
    return __float2half_rn(v);
  } else {
    return __float2bfloat16_rn(v);
  }
}

// To storage; 16-bit storage rounds towards `centre`, so that rounding never leaves the ball.
template <typename S>
FASTLIP_EITHER S narrow(Arith<S> value, Arith<S> centre) {
  if constexpr (sizeof(S) > 2) {
    return value;
  } else {
    const S out = nearest<S>(value);
    const float back = widen(out);
    const bool over = value >= centre ? back > value : back < value;
    auto bits = bit_cast<uint16_t>(out);
    if (over) bits = static_cast<uint16_t>(magnitude(back) > magnitude(value) ? bits - 1 : bits + 1);
    return bit_cast<S>(bits);
  }
}

template <typename T>
FASTLIP_EITHER T radius_of(T eps) {
  return eps > T(0) ? eps : T(0);
}

template <typename T>
FASTLIP_EITHER T finite_or_zero(T v) {
  return magnitude(v) < T(INFINITY) ? v : T(0);
}

// 2^exponent, which must be a normal number.
template <typename T>
FASTLIP_EITHER T power_of_two(int exponent) {
  if constexpr (std::is_same_v<T, double>) {
    return bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52);
  } else {
    return bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23);
  }
}
// The largest exponent whose negative is one of a normal number, too.
template <typename T>
constexpr int kMostExponent = std::is_same_v<T, double> ? 1022 : 126;
// Of a finite number's leading bit, at least -kMostExponent.
FASTLIP_EITHER int exponent_of(float v) {
  const int biased = static_cast<int>(bit_cast<uint32_t>(v) >> 23 & 0xFF);
  return (biased > 1 ? biased : 1) - 127;
}
FASTLIP_EITHER int exponent_of(double v) {
  const int biased = static_cast<int>(bit_cast<uint64_t>(v) >> 52 & 0x7FF);
  return (biased > 1 ? biased : 1) - 1023;
}
template <typename T>
FASTLIP_EITHER int fitting_exponent(int exponent) {
  constexpr int kMost = kMostExponent<T>;
  return exponent > kMost ? kMost : exponent < -kMost ? -kMost : exponent;
}

// Linf, whose result is a matter of a few roundings in a fixed order.
template <typename T>
FASTLIP_EITHER T signed_step(T grad, T step) {
  return !(magnitude(grad) < T(INFINITY)) || grad == T(0) ? T(0) : grad > T(0) ? step : -step;
}

template <typename T>
FASTLIP_EITHER T project_linf(T v, T x0, T eps, T lo, T hi) {
  return clamp(add_rn(x0, clamp(add_rn(v, -x0), -eps, eps)), lo, hi);
}

}  // namespace fastlip::cuda
