// A norm and the gradient of a weight that was scaled to a bound on it, on the CPU, compiled once per instruction set.
//
// Both go by the gradient G of the norm. Floor: the norm reads the weight once; the gradient reads the weight and its
// own gradient once for their product, and that once more while the result is written. Elements of G = left right are
// made in registers, kTogether rows and kVectors SIMD registers of columns at a time.
#include "kernels/cpu/sums.h"

namespace fastlip::cpu {
namespace {

constexpr int kTogether = 4, kVectors = kVectorBytes == 64 ? 4 : 2;
constexpr int64_t kLarge = 1 << 18;  // bytes of a gradient from which on it is written past the caches

// Stores past the caches what is read again only after much else; `p` is at a multiple of a vector's size.
template <typename T>
FASTLIP_INLINE inline void store_past(T* p, Vector<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#else
  store(p, v);
#endif
}

FASTLIP_INLINE inline void stores_done() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <typename T>
double product(const T* a, const T* b, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

// Calls f(at, v) for V registers v of elements of each of R rows of G, which begin at index `at`.
template <typename T, int R, int V, typename F>
FASTLIP_INLINE inline void tile(const NormGradient& g, int64_t row, int64_t column, F f) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  const T* const left = static_cast<const T*>(g.left) + row * g.rank;
  const T* const right = static_cast<const T*>(g.right) + column;
  Vector<T> sum[R][V]{};
  for (int64_t k = 0; k < g.rank; ++k) {
    Vector<T> other[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) other[v] = load<Vector<T>>(right + k * g.columns + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T own = left[r * g.rank + k];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] += other[v] * own;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) f((row + r) * g.columns + column + v * lanes, sum[r][v]);
}

// Calls f(at, v) for all elements of R rows of G, `v` a vector of them or, in the last columns, one.
template <typename T, int R, typename F>
FASTLIP_INLINE inline void tiles(const NormGradient& g, int64_t row, F f) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  int64_t column = 0;
  for (; g.columns - column >= kVectors * lanes; column += kVectors * lanes) tile<T, R, kVectors>(g, row, column, f);
  for (; g.columns - column >= lanes; column += lanes) tile<T, R, 1>(g, row, column, f);
  for (; column < g.columns; ++column) {
    for (int r = 0; r < R; ++r) {
      T sum = 0;
      for (int64_t k = 0; k < g.rank; ++k)
        sum += static_cast<const T*>(g.right)[k * g.columns + column] *
               static_cast<const T*>(g.left)[(row + r) * g.rank + k];
      f((row + r) * g.columns + column, sum);
    }
  }
}

template <typename T, typename F>
FASTLIP_INLINE inline void all_tiles(const NormGradient& g, int64_t begin, int64_t end, F f) {
  int64_t row = begin;
  for (; end - row >= kTogether; row += kTogether) tiles<T, kTogether>(g, row, f);
  for (; row < end; ++row) tiles<T, 1>(g, row, f);
}

template <typename T>
double norm_as(const NormGradient& g, const void* weights, int64_t begin, int64_t end) {
  const T* const weight = static_cast<const T*>(weights);
  const int64_t at = begin * g.columns;
  if (g.rank == 0) return product(weight + at, static_cast<const T*>(g.left) + at, (end - begin) * g.columns);
  Doubles sums{};
  double sum = 0;
  all_tiles<T>(g, begin, end, [&]<typename P>(int64_t i, P v) FASTLIP_INLINE {
    if constexpr (sizeof(P) == sizeof(T)) {
      sum += static_cast<double>(v) * static_cast<double>(weight[i]);
    } else {
      sums += in_double(v * load<P>(weight + i));
    }
  });
  for (int64_t l = 0; l < VectorOf<double>::lanes; ++l) sum += sums[l];
  return sum;
}

template <typename T, bool kPast>
void write_rows(const ScaledWeightGrad& p, int64_t begin, int64_t end) {
  const T scale = static_cast<T>(p.scale), factor = static_cast<T>(p.factor);
  const NormGradient& g = p.gradient;
  const T *const grad = static_cast<const T*>(p.grad), *const left = static_cast<const T*>(g.left);
  T* const out = static_cast<T*>(p.out);
  const auto write = [&]<typename P>(int64_t i, P v) FASTLIP_INLINE {
    const P found = load<P>(grad + i) * scale + v * factor;
    if constexpr (kPast && sizeof(P) > sizeof(T)) {
      store_past(out + i, found);
    } else {
      store(out + i, found);
    }
  };
  if (g.rank == 0) {
    const int64_t at = begin * g.columns;
    map<T>((end - begin) * g.columns,
           [&]<typename P>(int64_t i) FASTLIP_INLINE { write(at + i, load<P>(left + at + i)); });
  } else {
    all_tiles<T>(g, begin, end, write);
  }
}

template <typename T>
void rows_as(const ScaledWeightGrad& p, int64_t begin, int64_t end) {
  const NormGradient& g = p.gradient;
  const int64_t row = g.columns * static_cast<int64_t>(sizeof(T));
  const bool aligned = reinterpret_cast<uintptr_t>(p.out) % kVectorBytes == 0 && row % kVectorBytes == 0;
  if (aligned && g.rows * row >= kLarge) {
    write_rows<T, true>(p, begin, end);
    stores_done();
  } else {
    write_rows<T, false>(p, begin, end);
  }
}

}  // namespace

double FASTLIP_CAT(norm_along_, FASTLIP_ISA)(const NormGradient&, const void*, int64_t, int64_t);
double FASTLIP_CAT(norm_along_, FASTLIP_ISA)(const NormGradient& g, const void* weight, int64_t begin, int64_t end) {
  return g.dtype == DType::f64 ? norm_as<double>(g, weight, begin, end) : norm_as<float>(g, weight, begin, end);
}

double FASTLIP_CAT(product_, FASTLIP_ISA)(const void*, const void*, DType, int64_t, int64_t);
double FASTLIP_CAT(product_, FASTLIP_ISA)(const void* a, const void* b, DType dtype, int64_t begin, int64_t end) {
  const auto of = [&]<typename T>(T) {
    return product(static_cast<const T*>(a) + begin, static_cast<const T*>(b) + begin, end - begin);
  };
  return dtype == DType::f64 ? of(double{}) : of(float{});
}

void FASTLIP_CAT(scaled_weight_grad_, FASTLIP_ISA)(const ScaledWeightGrad&, int64_t, int64_t);
void FASTLIP_CAT(scaled_weight_grad_, FASTLIP_ISA)(const ScaledWeightGrad& p, int64_t begin, int64_t end) {
  return p.gradient.dtype == DType::f64 ? rows_as<double>(p, begin, end) : rows_as<float>(p, begin, end);
}

}  // namespace fastlip::cpu
