// L2 and L1 steps of one sample on the CPU; ball.inl, compiled once per instruction set, has them.
#pragma once
#include "kernels/cpu/sample.h"
#include "kernels/cpu/sums.h"

namespace fastlip::cpu {
inline namespace FASTLIP_ISA {

// For float with both kinds of limits, and double with those in rows. x may be out; d and cap are scratch, and in L2 d
// may be out.

// out <- the projection of x, moved by `step` along g where there is one.
template <typename T, typename B>
void l2_sample(T* out, const T* x, const T* g, const T* x0, T step, T eps, const B box, int64_t n, T* d,
               const Ahead<T>* ahead);
// out <- the projection of x, moved by `step` along the signs of g's `kept` largest elements.
template <typename T, typename B>
void l1_sample(T* out, const T* x, const T* g, const T* x0, T step, T eps, const B box, int64_t kept, int64_t n, T* d,
               T* cap, const Ahead<T>* ahead);
// out <- x0 + the projection of d, given the sums of l2_displace.
template <typename T, typename B>
void l2_project(T* out, T* d, const T* x0, T eps, const B box, Totals<2> sums, int64_t n, const Ahead<T>* ahead);

}  // namespace FASTLIP_ISA

namespace {

constexpr int64_t kAhead = 1 << 14;  // samples of at most so many elements are fetched ahead

// d <- advance<P>(i) - x0; the sums of d^2 and of what the box leaves of it, squared.
template <typename T, typename B, typename Advance>
FASTLIP_INLINE inline Totals<2> l2_displace(T* d, const T* x0, const B box, int64_t n, Advance advance) {
  return reduce<2, T>(n, [&]<typename P>(int64_t i, P* sums, auto&) FASTLIP_INLINE {
    const P centre = load<P>(x0 + i), v = advance.template operator()<P>(i) - centre;
    const P c = box.clip_from(v, centre, i);
    sums[0] += v * v;
    sums[1] += c * c;
    store(d + i, v);
  });
}

}  // namespace
}  // namespace fastlip::cpu
