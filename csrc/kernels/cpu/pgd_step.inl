// The PGD step on the CPU, compiled once per instruction set; FASTLIP_ISA names the table.
//
// A step must read x, grad and x0 and write x: 16 bytes an element in float32; with what the model reads in 16 bits as
// much, since the gradient has 16 bits then, too. Linf is one pass; for L2 and L1 one sample at a time stays in cache
// (ball.h).
#include "kernels/cpu/ball.h"
#include "kernels/cpu/saved.h"

namespace fastlip::cpu {
namespace {

template <typename T>
void linf_part(T* x, const T* g, const T* x0, const PgdStep& p, int64_t sample, int64_t first, int64_t n) {
  const T step = g ? finite_or_zero(at<T>(p.step_size, sample)) : T(0);
  const T eps = radius<T>(p.eps, sample);
  with_box<T>(p, sample, first, [&](const auto box) {
    const auto finish = [&]<typename P>(P v, int64_t i) FASTLIP_INLINE {
      const P centre = load<P>(x0 + i);
      const P d = lesser(greater(v - centre, broadcast<P>(-eps)), broadcast<P>(eps));
      store(x + i, box.clip(centre + d, i));
    };
    if (g) {
      map<T>(n, [&]<typename P>(int64_t i)
                    FASTLIP_INLINE { finish(load<P>(x + i) + signed_step(load<P>(g + i), step), i); });
    } else {
      map<T>(n, [&]<typename P>(int64_t i) FASTLIP_INLINE { finish(load<P>(x + i), i); });
    }
  });
}

template <typename S>
void pgd_step_linf_as(const PgdStep& p, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t sample = begin / p.size, first = begin % p.size;
    // What is saved is read while it lies in the L1 cache.
    const int64_t n = least(least(p.size - first, end - begin), saves(p) ? kChunk : p.size);
    begin += n;
    if (p.active && !p.active[sample]) continue;
    save_row<S, S>(p, sample, first, n);
    S* x = static_cast<S*>(p.x) + sample * p.x_stride + first;
    const S* x0 = static_cast<const S*>(p.x0) + sample * p.x0_stride + first;
    const S* g = p.grad ? static_cast<const S*>(p.grad) + sample * p.grad_stride + first : nullptr;
    if constexpr (is_wide<S>) {
      linf_part(x, g, x0, p, sample, first, n);
    } else {
      float wide_x[kChunk], wide_g[kChunk], wide_x0[kChunk];
      for (int64_t i = 0; i < n; i += kChunk) {
        const int64_t m = least(kChunk, n - i);
        widen_row(wide_x, x + i, m);
        widen_row(wide_x0, x0 + i, m);
        if (g) widen_row(wide_g, g + i, m);
        linf_part(wide_x, g ? wide_g : nullptr, wide_x0, p, sample, first + i, m);
        narrow_row(x + i, wide_x, wide_x0, m);
      }
    }
  }
}

template <typename T>
void ball_sample(T* x, const T* g, const T* x0, const PgdStep& p, int64_t sample, const Scratch<T>& scratch,
                 const Ahead<T>* ahead) {
  const T step = g ? finite_or_zero(at<T>(p.step_size, sample)) : T(0);
  const T eps = radius<T>(p.eps, sample);
  T* const d = scratch.row(kDisplacement);
  with_box<T>(p, sample, 0, [&](const auto box) {
    if (p.norm == Norm::l2) {
      l2_sample(x, x, g, x0, step, eps, box, p.size, x, ahead);
    } else {
      l1_sample(x, x, g, x0, step, eps, box, p.kept, p.size, d, scratch.row(kCap), ahead);
    }
  });
}

template <typename S>
void pgd_step_ball_as(const PgdStep& p, int64_t begin, int64_t end, void* scratch) {
  using T = Arithmetic<S>;
  const Scratch<T> rows(scratch, p.size);
  for (int64_t sample = begin; sample < end; ++sample) {
    if (p.active && !p.active[sample]) continue;
    save_row<S, S>(p, sample, 0, p.size);
    S* x = static_cast<S*>(p.x) + sample * p.x_stride;
    const S* x0 = static_cast<const S*>(p.x0) + sample * p.x0_stride;
    const S* g = p.grad ? static_cast<const S*>(p.grad) + sample * p.grad_stride : nullptr;
    if constexpr (is_wide<S>) {
      const bool follows = p.size <= kAhead && sample + 1 < end;
      Ahead<T> next;
      if (follows) next = {{x + p.x_stride, g ? g + p.grad_stride : x0, x0 + p.x0_stride, x0}};
      ball_sample(x, g, x0, p, sample, rows, follows ? &next : nullptr);
    } else {
      float *wide_x = rows.row(kX), *wide_x0 = rows.row(kX0), *wide_g = rows.row(kGrad);
      widen_row(wide_x, x, p.size);
      widen_row(wide_x0, x0, p.size);
      if (g) widen_row(wide_g, g, p.size);
      ball_sample<float>(wide_x, g ? wide_g : nullptr, wide_x0, p, sample, rows, nullptr);
      narrow_row(x, wide_x, wide_x0, p.size);
    }
  }
}

// With what the model reads, in storage I.
template <typename I>
void pgd_step_linf_fed(const PgdStep& p, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t sample = begin / p.size, first = begin % p.size;
    const int64_t n = least(least(p.size - first, end - begin), kChunk);
    begin += n;
    if (p.active && !p.active[sample]) continue;
    save_row<float, I>(p, sample, first, n);
    float* const x = static_cast<float*>(p.x) + sample * p.x_stride + first;
    const float* const x0 = static_cast<const float*>(p.x0) + sample * p.x0_stride + first;
    float grad[kChunk];
    widen_row(grad, static_cast<const I*>(p.grad) + sample * p.grad_stride + first, n);  // signs are all it takes
    linf_part(x, grad, x0, p, sample, first, n);
    feed_row<I>(x, p, sample, first, n);
  }
}

template <typename I>
void pgd_step_ball_fed(const PgdStep& p, int64_t begin, int64_t end, void* scratch) {
  const Scratch<float> rows(scratch, p.size);
  float* const grad = rows.row(kGrad);
  for (int64_t sample = begin; sample < end; ++sample) {
    if (p.active && !p.active[sample]) continue;
    save_row<float, I>(p, sample, 0, p.size);
    float* const x = static_cast<float*>(p.x) + sample * p.x_stride;
    ascent_row<I>(grad, p, sample, 0, p.size);
    ball_sample<float>(x, grad, static_cast<const float*>(p.x0) + sample * p.x0_stride, p, sample, rows, nullptr);
    feed_row<I>(x, p, sample, 0, p.size);
  }
}

// --- table -----------------------------------------------------------------------------------

void pgd_step_linf(const PgdStep& p, int64_t begin, int64_t end) {
  if (p.input) return with_input(p.input_dtype, [&]<typename I>(I) { pgd_step_linf_fed<I>(p, begin, end); });
  switch (p.dtype) {
    case DType::f32:
      return pgd_step_linf_as<float>(p, begin, end);
    case DType::f64:
      return pgd_step_linf_as<double>(p, begin, end);
    case DType::f16:
      return pgd_step_linf_as<Half>(p, begin, end);
    case DType::bf16:
      return pgd_step_linf_as<BFloat16>(p, begin, end);
  }
}
void pgd_step_ball(const PgdStep& p, int64_t begin, int64_t end, void* scratch) {
  if (p.input) return with_input(p.input_dtype, [&]<typename I>(I) { pgd_step_ball_fed<I>(p, begin, end, scratch); });
  switch (p.dtype) {
    case DType::f32:
      return pgd_step_ball_as<float>(p, begin, end, scratch);
    case DType::f64:
      return pgd_step_ball_as<double>(p, begin, end, scratch);
    case DType::f16:
      return pgd_step_ball_as<Half>(p, begin, end, scratch);
    case DType::bf16:
      return pgd_step_ball_as<BFloat16>(p, begin, end, scratch);
  }
}
void stream(float* y, const float* a, const float* b, const float* c, int64_t n) {
  map<float>(
      n, [&]<typename P>(int64_t i) FASTLIP_INLINE { store(y + i, load<P>(a + i) + load<P>(b + i) + load<P>(c + i)); });
}

}  // namespace

void FASTLIP_CAT(apgd_step_, FASTLIP_ISA)(const ApgdStep&, int64_t, int64_t, void*);  // apgd_step.inl
void FASTLIP_CAT(operator_tile_, FASTLIP_ISA)(const OperatorStep&, int64_t);          // operator_step.inl
void FASTLIP_CAT(indirect_conv_, FASTLIP_ISA)(const IndirectConv&, int64_t, int64_t, int64_t, int64_t, void*);
void FASTLIP_CAT(winograd_conv_, FASTLIP_ISA)(const WinogradConv&, int64_t, int64_t, int64_t, int64_t, void*);
void FASTLIP_CAT(direct_conv_, FASTLIP_ISA)(const DirectConv&, int64_t, int64_t, float*);
void FASTLIP_CAT(interleaved_layers_, FASTLIP_ISA)(const InterleavedLayers&, int64_t, int64_t, float*);
double FASTLIP_CAT(norm_along_, FASTLIP_ISA)(const NormGradient&, const void*, int64_t, int64_t);  // norm_gradient.inl
double FASTLIP_CAT(product_, FASTLIP_ISA)(const void*, const void*, DType, int64_t, int64_t);
void FASTLIP_CAT(scaled_weight_grad_, FASTLIP_ISA)(const ScaledWeightGrad&, int64_t, int64_t);

extern const Kernels FASTLIP_CAT(kernels_, FASTLIP_ISA);
const Kernels FASTLIP_CAT(kernels_, FASTLIP_ISA){FASTLIP_STR(FASTLIP_ISA),
                                                 pgd_step_linf,
                                                 pgd_step_ball,
                                                 FASTLIP_CAT(apgd_step_, FASTLIP_ISA),
                                                 FASTLIP_CAT(operator_tile_, FASTLIP_ISA),
                                                 FASTLIP_CAT(indirect_conv_, FASTLIP_ISA),
                                                 FASTLIP_CAT(winograd_conv_, FASTLIP_ISA),
                                                 FASTLIP_CAT(direct_conv_, FASTLIP_ISA),
                                                 FASTLIP_CAT(interleaved_layers_, FASTLIP_ISA),
                                                 FASTLIP_CAT(norm_along_, FASTLIP_ISA),
                                                 FASTLIP_CAT(product_, FASTLIP_ISA),
                                                 FASTLIP_CAT(scaled_weight_grad_, FASTLIP_ISA),
                                                 stream};

}  // namespace fastlip::cpu
