// What an attack reads off logits, a sample at a time: they are read once, and their gradient, zero but for at most
// five classes, is written once. Compares and moves, so compiled for the baseline alone, and without contraction:
// numbers are the same on every backend.
#include "kernels/judge.h"

#include "kernels/cpu/scalar.h"

namespace fastlip::cpu {
namespace {

template <typename T>
Ranking<T> ranked(const T* logits, int64_t classes) {
  constexpr int64_t kLanes = 16;
  Ranking<T> r;
  int64_t c = 0;
  if (classes >= 2 * kLanes) {
    // Most logits are no candidate: these are looked at side by side.
    T least_of[kLanes];
    for (T& v : least_of) v = kInfinite<T>;
    for (; c + kLanes <= classes; c += kLanes) {
      const T last = r.top[Ranking<T>::kPlaces - 1];
      int candidate = 0, nan = 0;
#pragma omp simd reduction(| : candidate, nan)
      for (int64_t i = 0; i < kLanes; ++i) {
        const T v = logits[c + i], there = v > -kInfinite<T> ? v : kInfinite<T>;
        candidate |= v > last;
        nan |= v != v;
        least_of[i] = there < least_of[i] ? there : least_of[i];
      }
      r.nan |= nan != 0;
      if (!candidate) continue;
      for (int64_t i = c; i < c + kLanes; ++i) r.insert(logits[i], static_cast<int32_t>(i));
    }
    for (const T v : least_of) r.least = least(v, r.least);
  }
  for (; c < classes; ++c) r.see(logits[c], static_cast<int32_t>(c));
  return r;
}

template <typename T>
void fill(T* row, T value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = value;
}

template <typename T>
void judge_as(const Judge& j, int64_t begin, int64_t end) {
  for (int64_t sample = begin; sample < end; ++sample) {
    const T* const logits = static_cast<const T*>(j.logits) + sample * j.classes;
    T* const grad = static_cast<T*>(j.grad) + sample * j.classes;
    const Ranking<T> r = ranked(logits, j.classes);
    const Classes classes(j, sample);
    const bool known = classes.known && !r.nan;
    T loss = static_cast<T>(__builtin_nan(""));
    if (!known) {
      fill(grad, loss, j.classes);
    } else if (j.kind == Loss::ce) {
      const T at = static_cast<const T*>(j.log_softmax)[sample * j.classes + (j.toward ? classes.toward : classes.own)];
      loss = j.targets || j.toward ? at : -at;
    } else {
      const Margin margin(j, r, classes, logits);
      loss = static_cast<T>(margin.loss);
      fill(grad, static_cast<T>(margin.grad(kNoClass)), j.classes);
      const int32_t mentioned[] = {margin.up, margin.down, margin.top, margin.below, margin.below_too};
      for (const int32_t c : mentioned)
        if (c >= 0) grad[c] = static_cast<T>(margin.grad(c));
    }
    static_cast<T*>(j.loss)[sample] = loss;
    Decision(j, r, classes, known, loss, sample).write(j, sample);
  }
}

}  // namespace

void judge(const Judge& j, int64_t begin, int64_t end) {
  j.dtype == DType::f64 ? judge_as<double>(j, begin, end) : judge_as<float>(j, begin, end);
}

}  // namespace fastlip::cpu
