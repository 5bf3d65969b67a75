// The Auto-PGD step on the CPU, compiled once per instruction set, and without contraction: in Linf the momentum must
// round like every other backend's.
//
// A step must read x, grad, x0 and x_prev and write x and x_prev: 24 bytes an element in float32, 32 where the best
// iterate changes. Linf goes through a sample once, a chunk in the L1 cache at a time; L2 and L1 keep it in cache.
#include "kernels/apgd.h"
#include "kernels/cpu/ball.h"
#include "kernels/cpu/saved.h"

namespace fastlip::cpu {
namespace {

// x + momentum (z - x) + rest (x - last), rounded after each operation in this order.
template <typename P, typename T>
FASTLIP_INLINE inline P heavy_ball(P x, P z, P last, T momentum, T rest) {
  const P ahead = (z - x) * momentum, behind = (x - last) * rest;
  return (x + ahead) + behind;
}

// out <- the next iterate of n elements; it may be x, and is written after x is read.
template <typename T, typename B>
void linf_apgd(T* out, const T* x, const T* g, const T* x0, const T* last, T step, T eps, bool first, T momentum,
               T rest, const B box, int64_t n) {
  const auto project = [&]<typename P>(P v, P centre, int64_t i) FASTLIP_INLINE {
    const P d = lesser(greater(v - centre, broadcast<P>(-eps)), broadcast<P>(eps));
    return box.clip(centre + d, i);
  };
  const auto aim = [&]<typename P>(P point, P centre, int64_t i)
                       FASTLIP_INLINE { return project(point + signed_step(load<P>(g + i), step), centre, i); };
  if (first) {
    map<T>(n, [&]<typename P>(int64_t i) FASTLIP_INLINE { store(out + i, aim(load<P>(x + i), load<P>(x0 + i), i)); });
  } else {
    map<T>(n, [&]<typename P>(int64_t i) FASTLIP_INLINE {
      const P point = load<P>(x + i), centre = load<P>(x0 + i);
      const P z = aim(point, centre, i);
      store(out + i, project(heavy_ball(point, z, load<P>(last + i), momentum, rest), centre, i));
    });
  }
}

template <typename S>
int64_t support_of(const S* a, const S* b, int64_t n) {
  int64_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (is_wide<S>) {
      count += a[i] != b[i];
    } else {
      count += widen(a[i]) != widen(b[i]);
    }
  }
  return count;
}

// Operands of one sample in storage; from, ascent: where the step starts and the gradient there.
template <typename S>
struct Rows {
  S *x, *x_prev, *x_best, *grad_best;
  const S *grad, *x0, *from, *ascent;
};

template <typename S, typename T>
void linf_rows(const Rows<S>& r, const ApgdStep& a, int64_t sample, bool first, T step, T eps, T momentum, T rest) {
  const int64_t n = a.step.size;
  for (int64_t at = 0; at < n; at += kChunk) {
    const int64_t m = least(kChunk, n - at);
    with_box<T>(a.step, sample, at, [&](const auto box) {
      if constexpr (is_wide<S>) {
        T next[kChunk];
        linf_apgd<T>(next, r.from + at, r.ascent + at, r.x0 + at, r.x_prev + at, step, eps, first, momentum, rest, box,
                     m);
        copy_row(r.x_prev + at, r.from + at, m);
        copy_row(r.x + at, next, m);
      } else {
        float x[kChunk], g[kChunk], x0[kChunk], last[kChunk];
        widen_row(x, r.from + at, m);
        widen_row(g, r.ascent + at, m);
        widen_row(x0, r.x0 + at, m);
        widen_row(last, r.x_prev + at, m);
        linf_apgd<T>(x, x, g, x0, last, step, eps, first, momentum, rest, box, m);
        copy_row(r.x_prev + at, r.from + at, m);
        narrow_row(r.x + at, x, x0, m);
      }
    });
  }
}

template <typename S, typename T>
void ball_rows(const Rows<S>& r, const ApgdStep& a, int64_t sample, bool first, T step, T eps, int64_t kept, T momentum,
               T rest, const Scratch<T>& scratch, const Ahead<T>* ahead) {
  const int64_t n = a.step.size;
  const bool heavy = a.step.norm == Norm::l2 && !first;
  T *const d = scratch.row(kDisplacement), *const z = scratch.row(kAim);
  T* out;
  const T *x, *g, *x0, *last;
  if constexpr (is_wide<S>) {
    out = r.x;
    x = r.from;
    g = r.ascent;
    x0 = r.x0;
    last = r.x_prev;
  } else {
    T *wide_x = scratch.row(kX), *wide_x0 = scratch.row(kX0), *wide_g = scratch.row(kGrad),
      *wide_last = scratch.row(kLast);
    widen_row(wide_x, r.from, n);
    widen_row(wide_x0, r.x0, n);
    widen_row(wide_g, r.ascent, n);
    if (heavy) widen_row(wide_last, r.x_prev, n);
    out = z;
    x = wide_x;
    g = wide_g;
    x0 = wide_x0;
    last = wide_last;
  }
  with_box<T>(a.step, sample, 0, [&](const auto box) {
    if (!heavy) {
      copy_row(r.x_prev, r.from, n);
      if (a.step.norm == Norm::l1) {
        l1_sample(out, x, g, x0, step, eps, box, kept, n, d, scratch.row(kCap), ahead);
      } else {
        l2_sample(out, x, g, x0, step, eps, box, n, out, ahead);
      }
      return;
    }
    l2_sample(z, x, g, x0, step, eps, box, n, z, ahead);
    const Totals<2> sums = l2_displace(z, x0, box, n, [&]<typename P>(int64_t i) FASTLIP_INLINE {
      return heavy_ball(load<P>(x + i), load<P>(z + i), load<P>(last + i), momentum, rest);
    });
    copy_row(r.x_prev, r.from, n);
    l2_project<T>(out, z, x0, eps, box, sums, n, nullptr);
  });
  if constexpr (!is_wide<S>) narrow_row(r.x, z, x0, n);
}

template <typename S>
void apgd_step_as(const ApgdStep& a, int64_t begin, int64_t end, void* scratch) {
  using T = Arithmetic<S>;
  const PgdStep& p = a.step;
  const Scratch<T> rows(scratch, p.size);
  const auto row = [](auto* data, int64_t sample, int64_t stride) {
    using Row = __typeof__(data);
    if constexpr (__is_same(Row, const void*)) {
      return static_cast<const S*>(data) + sample * stride;
    } else {
      return static_cast<S*>(data) + sample * stride;
    }
  };
  for (int64_t sample = begin; sample < end; ++sample) {
    if (p.active && !p.active[sample]) continue;
    Rows<S> r{row(p.x, sample, p.x_stride),
              row(a.x_prev, sample, a.x_prev_stride),
              row(a.x_best, sample, a.x_best_stride),
              row(a.grad_best, sample, a.grad_best_stride),
              p.input ? nullptr : row(p.grad, sample, p.grad_stride),
              row(p.x0, sample, p.x0_stride),
              nullptr,
              nullptr};
    if constexpr (__is_same(S, float)) {
      if (p.input) {
        float* const grad = rows.row(kGrad);
        with_input(p.input_dtype, [&]<typename I>(I) {
          save_row<S, I>(p, sample, 0, p.size);
          ascent_row<I>(grad, p, sample, 0, p.size);
        });
        r.grad = grad;
      }
    }
    if (!p.input) save_row<S, S>(p, sample, 0, p.size);
    ApgdRow<T> state = read_apgd_row<T>(a, sample);
    const T eps = radius<T>(p.eps, sample);
    const ApgdMove<T> move = apgd_begin(state);
    if (move.improved) {
      copy_row(r.x_best, r.x, p.size);
      copy_row(r.grad_best, r.grad, p.size);
    }
    bool restart = false;
    if (move.window > 0) {
      restart = p.norm == Norm::l1 ? apgd_check_l1(state, support_of(r.x_best, r.x0, p.size), eps)
                                   : apgd_check(state, move.window, a.rho);
    }
    r.from = restart ? r.x_best : r.x;
    r.ascent = restart ? r.grad_best : r.grad;
    const T step = finite_or_zero(state.step_size);
    const T momentum = static_cast<T>(a.momentum), rest = static_cast<T>(1 - a.momentum);
    if (p.norm == Norm::linf) {
      linf_rows<S, T>(r, a, sample, move.first, step, eps, momentum, rest);
    } else {
      const int64_t kept = most<int64_t>(1, least<int64_t>(p.size, state.kept));
      const bool follows = is_wide<S> && p.size <= kAhead && sample + 1 < end;
      Ahead<T> next;
      if constexpr (is_wide<S>) {
        const T* const ascent = p.input ? r.x0 : r.grad + p.grad_stride;
        if (follows) next = {{r.x + p.x_stride, ascent, r.x0 + p.x0_stride, r.x_prev + a.x_prev_stride}};
      }
      ball_rows<S, T>(r, a, sample, move.first, step, eps, kept, momentum, rest, rows, follows ? &next : nullptr);
    }
    if constexpr (__is_same(S, float)) {
      if (p.input) with_input(p.input_dtype, [&]<typename I>(I) { feed_row<I>(r.x, p, sample, 0, p.size); });
    }
    write_apgd_row(a, sample, state, restart);
  }
}

}  // namespace

void FASTLIP_CAT(apgd_step_, FASTLIP_ISA)(const ApgdStep&, int64_t, int64_t, void*);
void FASTLIP_CAT(apgd_step_, FASTLIP_ISA)(const ApgdStep& a, int64_t begin, int64_t end, void* scratch) {
  switch (a.step.dtype) {
    case DType::f32:
      return apgd_step_as<float>(a, begin, end, scratch);
    case DType::f64:
      return apgd_step_as<double>(a, begin, end, scratch);
    case DType::f16:
      return apgd_step_as<Half>(a, begin, end, scratch);
    case DType::bf16:
      return apgd_step_as<BFloat16>(a, begin, end, scratch);
  }
}

}  // namespace fastlip::cpu
