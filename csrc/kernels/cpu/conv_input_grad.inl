// The gradient of a convolution with respect to an input of few channels on the CPU, compiled once per instruction set.
//
// Floor: taps * outputs multiply-adds an element of out, a vector of them at a time; grad is read once from memory, a
// padded row of it after the other is copied to where it stays in cache. Several pixels and up to four channels are
// summed together, in registers. Each vector is summed at the end, all of them together, at three instructions each.
// Every element has a chain of additions of its own, so that an image's result depends on neither its batch nor
// threads.
#include "kernels/cpu/vectors.h"

namespace fastlip::cpu {
namespace {

using Lanes = Vector<float>;
constexpr int kWidth = kVectorBytes / 4;
constexpr int kMostPixels = kRegisters == 32 ? 8 : 6;  // that leave registers for sums
constexpr int kMostChannels = 4;                       // summed together

// In each group of 2 D lanes of a, then of b: lane i plus lane i + D.
template <int D, int... I>
FASTLIP_INLINE inline Lanes halved(Lanes a, Lanes b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (I / D * 2 * D + I % D)...) +
         __builtin_shufflevector(a, b, (I / D * 2 * D + I % D + D)...);
}
// Lane i: the sum of all lanes of v[i].
template <int D = kWidth / 2, int N>
FASTLIP_INLINE inline Lanes sums_of(const Lanes (&v)[N]) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    Lanes half[N / 2];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) half[i] = halved<D>(v[2 * i], v[2 * i + 1], typename UpTo<kWidth>::Type{});
    return sums_of<D / 2>(half);
  }
}

// The rows of taps that a row of out meets.
struct Met {
  const float* const* grad;  // their rows of grad
  const int64_t* tap;        // numbers of these rows among a phase's
  int64_t count, run;        // of floats of a row of taps
};

// C channels of P pixels next to each other in a phase, `first` floats into the rows of grad. weight: of the first
// channel; channel_step: to the next one's.
template <int C, int P>
void sum_pixels(float* out, int64_t out_channel, int64_t out_pixel, const Met& met, const float* weight,
                int64_t channel_step, int64_t first, int64_t outputs, int64_t floats) {
  using Bits = Vector<int32_t>;
  Lanes sum[P][C] = {};
  const int64_t whole = floats / kWidth * kWidth;
  Bits rest;
#pragma GCC unroll 16
  for (int lane = 0; lane < kWidth; ++lane) rest[lane] = lane < floats - whole ? -1 : 0;
  const auto add = [&](const float* grad, const float* w, auto kept) FASTLIP_INLINE {
    Lanes g[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) g[p] = kept(load<Lanes>(grad + p * outputs));
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const Lanes own = load<Lanes>(w + c * channel_step);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) sum[p][c] += g[p] * own;
    }
  };
  for (int64_t row = 0; row < met.count; ++row) {
    const float* const grad = met.grad[row] + first;
    const float* const w = weight + met.tap[row] * met.run;
    for (int64_t at = 0; at < whole; at += kWidth) add(grad + at, w + at, [](Lanes v) FASTLIP_INLINE { return v; });
    // What lies behind may not be finite, and is none of these pixels' business.
    if (whole < floats) add(grad + whole, w + whole, [&](Lanes v) FASTLIP_INLINE { return (Lanes)((Bits)v & rest); });
  }
#pragma GCC unroll 8
  for (int begin = 0; begin < P * C; begin += kWidth) {
    Lanes part[kWidth] = {};
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i)
      if (begin + i < P * C) part[i] = sum[(begin + i) / C][(begin + i) % C];
    const Lanes total = sums_of(part);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i)
      if (begin + i < P * C) out[(begin + i) / C * out_pixel + (begin + i) % C * out_channel] = total[i];
  }
}

// C channels of `count` pixels.
template <int C>
void sum_row(float* out, int64_t out_channel, int64_t out_pixel, int64_t count, const Met& met, const float* weight,
             int64_t channel_step, int64_t first, int64_t outputs, int64_t floats) {
  constexpr int kPixels = most(1, least(kMostPixels, kWidth / C));
  int64_t at = 0;
  for (; at + kPixels <= count; at += kPixels) {
    sum_pixels<C, kPixels>(out + at * out_pixel, out_channel, out_pixel, met, weight, channel_step,
                           first + at * outputs, outputs, floats);
  }
  for (; at < count; ++at) {
    sum_pixels<C, 1>(out + at * out_pixel, out_channel, out_pixel, met, weight, channel_step, first + at * outputs,
                     outputs, floats);
  }
}

// Rows of an image's grad with zeros at the sides, the last few that were asked for.
class PaddedRows {
 public:
  PaddedRows(const ConvInputGrad& p, float* memory)
      : p_(p), memory_(memory), kept_(p.kernel[0] / p.stride[0] + 2), floats_(p.row_floats()), before_(p.before()) {}
  void begin(const float* image) {
    image_ = image;
    next_ = 0;
  }
  // Rows are asked for in order, but for as many as are kept.
  const float* row(int64_t y) {
    for (next_ = most(next_, y - kept_ + 1); next_ <= y; ++next_) {
      const int64_t own = p_.grad_size[1] * p_.outputs, left = before_ * p_.outputs;
      float* const to = memory_ + next_ % kept_ * floats_;
      const auto bytes = [](int64_t n) { return static_cast<decltype(sizeof(float))>(n) * sizeof(float); };
      __builtin_memset(to, 0, bytes(left));
      __builtin_memcpy(to + left, image_ + next_ * own, bytes(own));
      __builtin_memset(to + left + own, 0, bytes(floats_ - left - own));
    }
    return memory_ + y % kept_ * floats_;
  }

 private:
  const ConvInputGrad& p_;
  float* const memory_;
  const int64_t kept_, floats_, before_;
  const float* image_ = nullptr;
  int64_t next_ = 0;
};

// One row of a phase, given the rows of taps that it meets.
void phase_row(const ConvInputGrad& p, float* out, const ConvInputGrad::Phase& across, int64_t down_taps,
               int64_t pixels, const Met& met, const float* weight) {
  const int64_t step = down_taps * met.run, first = (across.offset + p.before()) * p.outputs;
  const int64_t floats = across.taps * p.outputs, pixel = p.stride[1] * p.out_stride[3];
  for (int64_t c = 0; c < p.channels;) {
    const auto next = [&](auto sum, int64_t channels) FASTLIP_INLINE {
      sum(out + c * p.out_stride[1], p.out_stride[1], pixel, pixels, met, weight + c * step, step, first, p.outputs,
          floats);
      c += channels;
    };
    switch (least<int64_t>(p.channels - c, kMostChannels)) {
      case 1:
        next(sum_row<1>, 1);
        break;
      case 2:
        next(sum_row<2>, 2);
        break;
      case 3:
        next(sum_row<3>, 3);
        break;
      default:
        next(sum_row<4>, 4);
    }
  }
}

}  // namespace

void FASTLIP_CAT(conv_input_grad_, FASTLIP_ISA)(const ConvInputGrad&, int64_t, int64_t, void*);
void FASTLIP_CAT(conv_input_grad_, FASTLIP_ISA)(const ConvInputGrad& p, int64_t begin, int64_t end, void* scratch) {
  PaddedRows rows(p, at_cache_line<float>(scratch));
  const int64_t runs = p.channels * p.runs();
  const float* weight = p.packed;  // of the phase
  for (int64_t a = 0; a < begin % p.size[0] % p.stride[0]; ++a) weight += runs * p.phase(0, a).taps;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / p.size[0], y = row % p.size[0];
    if (y % p.stride[0] == 0) weight = p.packed;
    if (row == begin || y == 0) rows.begin(p.grad + image * p.grad_size[0] * p.grad_size[1] * p.outputs);
    const auto down = p.phase(0, y % p.stride[0]);
    const int64_t top = y / p.stride[0] + down.offset;
    const float* grad[ConvInputGrad::kMostTaps];
    int64_t tap[ConvInputGrad::kMostTaps], count = 0;
    for (int64_t t = 0; t < down.taps; ++t) {
      if (top + t < 0 || top + t >= p.grad_size[0]) continue;
      grad[count] = rows.row(top + t);
      tap[count++] = t;
    }
    float* const out = p.out + image * p.out_stride[0] + y * p.out_stride[2];
    for (int64_t b = 0; b < p.phases(1); ++b) {
      const auto across = p.phase(1, b);
      const int64_t run = p.run(across), pixels = (p.size[1] - b + p.stride[1] - 1) / p.stride[1];
      phase_row(p, out + b * p.out_stride[3], across, down.taps, pixels, Met{grad, tap, count, run}, weight);
      weight += p.channels * down.taps * run;
    }
  }
}

}  // namespace fastlip::cpu
