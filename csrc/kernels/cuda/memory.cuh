// A thread's accesses to device memory, and launches.
#pragma once
#include <cuda_runtime.h>

#include "kernels/cuda/arithmetic.h"

namespace fastlip::cuda {

constexpr int kWarp = 32;

// kCount elements as they lie, moved in accesses of 16 bytes (8 where they are no more).
template <typename S, int kCount>
struct Pack {
  using Word = std::conditional_t<(sizeof(S) * kCount) % 16 == 0, uint4, uint2>;
  static constexpr int kWords = sizeof(S) * kCount / sizeof(Word);
  static_assert(sizeof(Word) * kWords == sizeof(S) * kCount);
  S at[kCount];

  __device__ static Pack load(const S* from) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const Word word = reinterpret_cast<const Word*>(from)[i];
      memcpy(reinterpret_cast<char*>(&pack) + i * sizeof(Word), &word, sizeof(Word));
    }
    return pack;
  }
  // To shared memory.
  __device__ void store(S* to) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<Word*>(to)[i] = word(i);
  }
  // To device memory, by an instruction that the compiler cannot take apart again.
  __device__ void write(S* to) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) __stwb(reinterpret_cast<Word*>(to) + i, word(i));
  }

 private:
  __device__ Word word(int i) const {
    Word word;
    memcpy(&word, reinterpret_cast<const char*>(this) + i * sizeof(Word), sizeof(Word));
    return word;
  }
};

// The first `valid` elements at `from`, 0 for the rest. `wide`: the address is a multiple of the pack's size or of 16.
template <typename S, int kCount>
__device__ __forceinline__ void load(const S* from, int valid, bool wide, Arith<S> (&out)[kCount]) {
  if (kCount > 1 && wide && valid == kCount) {
    if constexpr (kCount > 1) {
      const auto pack = Pack<S, kCount>::load(from);
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[i] = widen(pack.at[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = i < valid ? widen(from[i]) : Arith<S>(0);
  }
}

// element(i) to each of them.
template <typename S, int kCount, typename Element>
__device__ __forceinline__ void store_each(S* to, int valid, bool wide, Element element) {
  if (kCount > 1 && wide && valid == kCount) {
    if constexpr (kCount > 1) {
      Pack<S, kCount> pack;
#pragma unroll
      for (int i = 0; i < kCount; ++i) pack.at[i] = element(i);
      pack.write(to);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < valid) to[i] = element(i);
    }
  }
}

template <typename S, int kCount>
__device__ __forceinline__ void store(S* to, int valid, bool wide, const Arith<S> (&values)[kCount],
                                      const Arith<S> (&centre)[kCount]) {
  store_each<S, kCount>(to, valid, wide, [&](int i) { return narrow<S>(values[i], centre[i]); });
}

// The first `valid` elements as they lie.
template <typename S, int kCount>
__device__ __forceinline__ void copy(const S* from, S* to, int valid) {
  if (kCount > 1 && valid == kCount) {
    if constexpr (kCount > 1) Pack<S, kCount>::load(from).write(to);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < valid) to[i] = from[i];
    }
  }
}

// A sample's number.
template <typename T>
__device__ __forceinline__ T number(const Value& value, int64_t sample) {
  return value.data == nullptr ? static_cast<T>(value.scalar)
                               : static_cast<const T*>(value.data)[sample * value.stride];
}

// A sample's bound: one number, or one for each element.
template <typename T>
struct Bound {
  const T* data;
  T scalar;

  __device__ Bound(const Value& value, int64_t sample)
      : data(value.data == nullptr ? nullptr : static_cast<const T*>(value.data) + sample * value.stride),
        scalar(static_cast<T>(value.scalar)) {}
  __device__ T at(int64_t element) const { return data == nullptr ? scalar : data[element]; }
  template <int kCount>
  __device__ void load(int64_t element, int valid, bool wide, T (&out)[kCount]) const {
    if (data != nullptr) {
      cuda::load<T>(data + element, valid, wide, out);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[i] = scalar;
    }
  }
};

// --- what the model reads --------------------------------------------------------------------------------------------
// body(value of the type) for what grad is stored in, S itself where x is what the model reads.
template <typename S, typename Body>
__device__ __forceinline__ void with_ascent(const PgdStep& p, Body body) {
  if constexpr (std::is_same_v<S, float>) {
    if (p.input != nullptr && p.input_dtype == DType::f16) return body(__half{});
    if (p.input != nullptr && p.input_dtype == DType::bf16) return body(__nv_bfloat16{});
  }
  body(S{});
}

// (x - mean) / std of a sample's elements from `at` on.
template <int kCount, typename T>
__device__ __forceinline__ void feed(const PgdStep& p, int64_t sample, int64_t at, int valid, bool wide,
                                     const T (&x)[kCount]) {
  if constexpr (std::is_same_v<T, float> && (kCount == 1 || kCount == 4)) {
    if (p.input == nullptr) return;
    float mean[kCount], std[kCount];
    Bound<float>(p.mean, sample).load(at, valid, wide, mean);
    Bound<float>(p.std, sample).load(at, valid, wide, std);
#pragma unroll
    for (int i = 0; i < kCount; ++i) std[i] = divide_rn(add_rn(x[i], -mean[i]), std[i]);
    const int64_t offset = sample * p.input_stride + at;
    if (p.input_dtype == DType::f32) {
      store_each<float, kCount>(static_cast<float*>(p.input) + offset, valid, wide, [&](int i) { return std[i]; });
    } else if (p.input_dtype == DType::f16) {
      store_each<__half, kCount>(static_cast<__half*>(p.input) + offset, valid, wide,
                                 [&](int i) { return nearest<__half>(std[i]); });
    } else {
      store_each<__nv_bfloat16, kCount>(static_cast<__nv_bfloat16*>(p.input) + offset, valid, wide,
                                        [&](int i) { return nearest<__nv_bfloat16>(std[i]); });
    }
  }
}

// --- what is saved ---------------------------------------------------------------------------------------------------
// Whether the sample's x is to be saved.
__device__ __forceinline__ bool is_better(const PgdStep& p, int64_t sample) {
  return p.best != nullptr && p.better[sample] != 0;
}
// Of its elements from `at` on, as many as a thread takes; from cache.
template <typename S, int kCount>
__device__ __forceinline__ void save(const PgdStep& p, int64_t sample, int64_t at, int valid) {
  copy<S, kCount>(static_cast<const S*>(p.x) + sample * p.x_stride + at,
                  static_cast<S*>(p.best) + sample * p.best_stride + at, valid);
}

// Tells where an element of a gradient as it is stored is not finite; all threads of a sample write the same.
template <int kRows, int kCount, typename T>
__device__ __forceinline__ void look_at(const PgdStep& p, int64_t sample, const T (&grad)[kRows][kCount]) {
  if (p.not_finite == nullptr) return;
  T sum = 0;
#pragma unroll
  for (int c = 0; c < kRows; ++c) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += grad[c][i] * T(0);  // 0, but NaN where it is not finite
  }
  if (sum != T(0)) p.not_finite[sample] = 1;
}
template <int kCount, typename T>
__device__ __forceinline__ void look_at(const PgdStep& p, int64_t sample, const T (&grad)[kCount]) {
  look_at(p, sample, reinterpret_cast<const T(&)[1][kCount]>(grad));
}

// --- launching -------------------------------------------------------------------------------------------------------
FASTLIP_EITHER bool aligned(const void* pointer, int64_t stride_bytes, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0 && stride_bytes % bytes == 0;
}

inline cudaLaunchConfig_t configure(int64_t blocks, int threads, size_t shared_bytes, void* stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return config;
}

// Call body with a value of the storage type.
template <typename Body>
cudaError_t with_storage(DType dtype, Body body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::f64:
      return body(double{});
    case DType::f16:
      return body(__half{});
    case DType::bf16:
      return body(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

// Likewise with one of the arithmetic's.
template <typename Body>
cudaError_t with_arithmetic(DType dtype, Body body) {
  return dtype == DType::f64 ? body(double{}) : body(float{});
}

inline int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
inline DType ascent_dtype(const PgdStep& p) { return p.input == nullptr ? p.dtype : p.input_dtype; }

// Whether every sample of every operand may be accessed in units of `pack` elements, at most 16 bytes of storage.
inline bool all_aligned(const PgdStep& p, int64_t pack) {
  const bool many = p.batch > 1;
  const int64_t storage = bytes_of(p.dtype), ascent = bytes_of(ascent_dtype(p)), arithmetic = storage < 4 ? 4 : storage;
  const auto fits = [&](const void* data, int64_t stride, int64_t bytes) {
    return data == nullptr || aligned(data, many ? stride * bytes : 0, pack * bytes < 16 ? pack * bytes : 16);
  };
  return fits(p.x, p.x_stride, storage) && fits(p.grad, p.grad_stride, ascent) && fits(p.x0, p.x0_stride, storage) &&
         fits(p.lo.data, p.lo.stride, arithmetic) && fits(p.hi.data, p.hi.stride, arithmetic) &&
         fits(p.best, p.best_stride, storage) && fits(p.input, p.input_stride, ascent) &&
         fits(p.mean.data, 0, arithmetic) && fits(p.std.data, 0, arithmetic);
}

inline bool known_input(const PgdStep& p) {
  return p.input == nullptr || (p.dtype == DType::f32 && p.input_dtype != DType::f64);
}

}  // namespace fastlip::cuda
