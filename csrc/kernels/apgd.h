// What an Auto-PGD step decides for one sample from its numbers: whether its iterate is the best, whether it is at a
// checkpoint, whether it restarts there. One copy for CPU and CUDA, of internal linkage (see cpu/scalar.h).
// The rules stand in fastlip/ops/__init__.py and, as code, in fastlip/ops/reference.py.
#pragma once
#include "kernels/api.h"
#include "kernels/either.h"

namespace fastlip {
namespace {

enum ApgdCounter { kIteration, kIncreases, kReduced, kKept, kSupport, kArrived, kApgdCounters };

template <typename T>
struct ApgdRow {
  T loss, best_loss, last_loss, check_loss, step_size;
  int32_t iteration, increases, reduced, kept, support;
  int32_t window;  // steps since the last checkpoint where this is one, else 0
};

template <typename T>
FASTLIP_EITHER ApgdRow<T> read_apgd_row(const ApgdStep& a, int64_t sample) {
  const int32_t* const count = a.counters + sample * kApgdCounters;
  const T loss = static_cast<const T*>(a.loss)[sample];
  const T* const past = static_cast<const T*>(a.past_loss) + 2 * sample;
  const int32_t k = count[kIteration];
  return {loss == loss ? loss : -static_cast<T>(__builtin_huge_val()),
          static_cast<const T*>(a.best_loss)[sample],
          past[0],
          past[1],
          static_cast<const T*>(a.step_size)[sample],
          k,
          count[kIncreases],
          count[kReduced],
          count[kKept],
          count[kSupport],
          k > 0 && k < a.steps ? a.schedule[k] : 0};
}

template <typename T>
FASTLIP_EITHER void write_apgd_row(const ApgdStep& a, int64_t sample, const ApgdRow<T>& row, bool restart) {
  int32_t* const count = a.counters + sample * kApgdCounters;
  T* const past = static_cast<T*>(a.past_loss) + 2 * sample;
  static_cast<T*>(a.best_loss)[sample] = row.best_loss;
  past[0] = restart ? row.best_loss : row.loss;
  past[1] = row.check_loss;
  static_cast<T*>(a.step_size)[sample] = row.step_size;
  count[kIteration] = row.iteration + 1;
  count[kIncreases] = row.increases;
  count[kReduced] = row.reduced;
  count[kKept] = row.kept;
  count[kSupport] = row.support;
}

template <typename T>
struct ApgdMove {
  bool first, improved;
  int32_t window;
};

// Takes account of the iterate at hand.
template <typename T>
FASTLIP_EITHER ApgdMove<T> apgd_begin(ApgdRow<T>& row) {
  const bool first = row.iteration == 0, improved = first || row.loss > row.best_loss;
  if (!first && row.loss > row.last_loss) ++row.increases;
  if (improved) row.best_loss = row.loss;
  if (first) row.check_loss = row.loss;
  return {first, improved, row.window};
}

// At a checkpoint in Linf and L2; whether the sample restarts from its best iterate.
template <typename T>
FASTLIP_EITHER bool apgd_check(ApgdRow<T>& row, int32_t window, double rho) {
  const bool stuck = row.reduced == 0 && row.best_loss == row.check_loss;
  const bool restart = static_cast<double>(row.increases) < rho * static_cast<double>(window) || stuck;
  if (restart) row.step_size /= T(2);
  row.increases = 0;
  row.reduced = restart;
  row.check_loss = row.best_loss;
  return restart;
}

// At a checkpoint in L1, given ||x_best - x0||_0.
template <typename T>
FASTLIP_EITHER bool apgd_check_l1(ApgdRow<T>& row, int64_t support, T eps) {
  const bool restart = static_cast<double>(support) < 0.95 * static_cast<double>(row.support);
  const T shorter = row.step_size / T(1.5), shortest = eps / T(10);
  row.step_size = restart ? eps : shorter < shortest ? shortest : shorter;
  row.support = static_cast<int32_t>(support);
  row.kept = static_cast<int32_t>((2 * support + 2) / 3);
  row.increases = 0;
  row.reduced = restart;
  row.check_loss = row.best_loss;
  return restart;
}

}  // namespace
}  // namespace fastlip
