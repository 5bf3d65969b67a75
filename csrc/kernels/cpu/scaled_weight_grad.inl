// The gradient of a weight that was scaled to a bound on its norm, on the CPU, compiled once per instruction set.
//
// Floor: the weight and its gradient read once for their product; the gradient read again and the result written. The
// low-rank part is added in registers, kTogether rows and kVectors SIMD registers of columns at a time.
#include "kernels/cpu/sample.h"

namespace fastlip::cpu {
namespace {

constexpr int kTogether = 4, kVectors = kVectorBytes == 64 ? 4 : 2;

template <typename T>
inline constexpr int kWidth = kVectorBytes / sizeof(T);

template <typename T>
double product(const ScaledWeightGrad& p, int64_t begin, int64_t end) {
  const T *const grad = static_cast<const T*>(p.grad), *const scaled = static_cast<const T*>(p.scaled);
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = begin; i < end; ++i) sum += static_cast<double>(grad[i]) * static_cast<double>(scaled[i]);
  return sum;
}

// R rows from `row` on and V registers of columns from `column` on.
template <typename T, int R, int V>
void update(const ScaledWeightGrad& p, int64_t row, int64_t column, T scale, T factor) {
  const int64_t at = row * p.columns + column;
  const T* const grad = static_cast<const T*>(p.grad) + at;
  const T* const left = static_cast<const T*>(p.left) + row * p.rank;
  const T* const right = static_cast<const T*>(p.right) + column;
  Vector<T> sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = load<Vector<T>>(grad + r * p.columns + v * kWidth<T>) * scale;
  for (int64_t k = 0; k < p.rank; ++k) {
    Vector<T> other[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) other[v] = load<Vector<T>>(right + k * p.columns + v * kWidth<T>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T own = factor * left[r * p.rank + k];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] += other[v] * own;
    }
  }
  T* const out = static_cast<T*>(p.out) + at;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(out + r * p.columns + v * kWidth<T>, sum[r][v]);
}

template <typename T, int R>
void update_rows(const ScaledWeightGrad& p, int64_t row, T scale, T factor) {
  int64_t column = 0;
  for (; p.columns - column >= kVectors * kWidth<T>; column += kVectors * kWidth<T>)
    update<T, R, kVectors>(p, row, column, scale, factor);
  for (; p.columns - column >= kWidth<T>; column += kWidth<T>) update<T, R, 1>(p, row, column, scale, factor);
  for (; column < p.columns; ++column) {
    for (int r = 0; r < R; ++r) {
      const int64_t at = (row + r) * p.columns + column;
      T sum = static_cast<const T*>(p.grad)[at] * scale;
      for (int64_t k = 0; k < p.rank; ++k)
        sum += static_cast<const T*>(p.right)[k * p.columns + column] *
               (factor * static_cast<const T*>(p.left)[(row + r) * p.rank + k]);
      static_cast<T*>(p.out)[at] = sum;
    }
  }
}

template <typename T>
void rows_as(const ScaledWeightGrad& p, int64_t begin, int64_t end) {
  const T scale = static_cast<T>(p.scale), factor = static_cast<T>(p.factor);
  if (p.rank == 0) {
    const T *const grad = static_cast<const T*>(p.grad), *const left = static_cast<const T*>(p.left);
    T* const out = static_cast<T*>(p.out);
#pragma omp simd
    for (int64_t i = begin * p.columns; i < end * p.columns; ++i) out[i] = grad[i] * scale + left[i] * factor;
    return;
  }
  int64_t row = begin;
  for (; end - row >= kTogether; row += kTogether) update_rows<T, kTogether>(p, row, scale, factor);
  for (; row < end; ++row) update_rows<T, 1>(p, row, scale, factor);
}

}  // namespace

double FASTLIP_CAT(weight_product_, FASTLIP_ISA)(const ScaledWeightGrad&, int64_t, int64_t);
double FASTLIP_CAT(weight_product_, FASTLIP_ISA)(const ScaledWeightGrad& p, int64_t begin, int64_t end) {
  return p.dtype == DType::f64 ? product<double>(p, begin, end) : product<float>(p, begin, end);
}

void FASTLIP_CAT(scaled_weight_grad_, FASTLIP_ISA)(const ScaledWeightGrad&, int64_t, int64_t);
void FASTLIP_CAT(scaled_weight_grad_, FASTLIP_ISA)(const ScaledWeightGrad& p, int64_t begin, int64_t end) {
  return p.dtype == DType::f64 ? rows_as<double>(p, begin, end) : rows_as<float>(p, begin, end);
}

}  // namespace fastlip::cpu
