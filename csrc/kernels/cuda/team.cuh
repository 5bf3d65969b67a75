// Threads that work on one sample together, and their memory accesses.
#pragma once
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "kernels/cuda/arithmetic.h"

namespace fastlip::cuda {

constexpr int kWarp = 32, kMaxThreads = 1024;

struct Sum {
  __device__ double operator()(double a, double b) const { return a + b; }
};
struct Max {
  __device__ double operator()(double a, double b) const { return greater(a, b); }
};

// A block, or a cluster of `ranks` blocks with one sample between them. Every thread of the team calls reduce and gets
// the same bits; the order of summation depends on the team's shape alone, never on the batch.
class Team {
 public:
  struct Memory {  // two sets taken in turn, so that one barrier a reduction is enough
    double warp[2][3][kWarp];
    double block[2][3];
  };

  __device__ Team(Memory& memory, int ranks) : memory_(memory), ranks_(ranks) {}

  // Over all threads' values, none of them below 0 for Max.
  template <int kValues, typename Op>
  __device__ void reduce(double (&values)[kValues], Op op) {
    static_assert(kValues <= 3);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    turn_ ^= 1;
    across_lanes(values, op);
#pragma unroll
    for (int k = 0; k < kValues; ++k) {
      if (lane == 0) memory_.warp[turn_][k][warp] = values[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kValues; ++k) {
      values[k] = lane < static_cast<int>(blockDim.x / kWarp) ? memory_.warp[turn_][k][lane] : 0;
    }
    across_lanes(values, op);
    if (ranks_ > 1) across_blocks(values, op);
  }

  __device__ void sync() const {
    __syncthreads();
    leave();
  }

  // Before any block of the team ends: the others may still be reading its shared memory.
  __device__ void leave() const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (ranks_ > 1) cooperative_groups::this_cluster().sync();
#endif
  }

 private:
  template <int kValues, typename Op>
  __device__ static void across_lanes(double (&values)[kValues], Op op) {
#pragma unroll
    for (int k = 0; k < kValues; ++k) {
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        values[k] = op(values[k], __shfl_xor_sync(0xFFFFFFFFu, values[k], offset));
      }
    }
  }

  template <int kValues, typename Op>
  __device__ void across_blocks(double (&values)[kValues], Op op) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    const auto cluster = cooperative_groups::this_cluster();
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int k = 0; k < kValues; ++k) {
      if (threadIdx.x == 0) memory_.block[turn_][k] = values[k];
    }
    cluster.sync();
#pragma unroll
    for (int k = 0; k < kValues; ++k) {
      values[k] = lane < ranks_ ? *cluster.map_shared_rank(&memory_.block[turn_][k], lane) : 0;
    }
    across_lanes(values, op);
#endif
  }

  Memory& memory_;
  const int ranks_;
  int turn_ = 0;
};

// --- memory ----------------------------------------------------------------------------------------------------------
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

// --- what the model reads
// ---------------------------------------------------------------------------------------------- The gradient with
// respect to x, from grad at a sample's element `at`.
template <typename S, typename In, int kCount>
__device__ __forceinline__ void load_ascent(const PgdStep& p, int64_t sample, int64_t at, int valid, bool wide,
                                            Arith<S> (&grad)[kCount]) {
  using G = Ascent<S, In>;
  load<G>(static_cast<const G*>(p.grad) + sample * p.grad_stride + at, valid, wide, grad);
  if constexpr (!std::is_same_v<In, NoInput>) {
    float std[kCount];
    Bound<float>(p.std, sample).load(at, valid, wide, std);
#pragma unroll
    for (int i = 0; i < kCount; ++i) grad[i] = i < valid ? divide_rn(grad[i], std[i]) : 0;
  }
}

// (x - mean) / std of a sample's elements from `at` on.
template <typename In, int kCount, typename T>
__device__ __forceinline__ void feed(const PgdStep& p, int64_t sample, int64_t at, int valid, bool wide,
                                     const T (&x)[kCount]) {
  if constexpr (!std::is_same_v<In, NoInput>) {
    float mean[kCount], std[kCount];
    Bound<float>(p.mean, sample).load(at, valid, wide, mean);
    Bound<float>(p.std, sample).load(at, valid, wide, std);
    store_each<In, kCount>(static_cast<In*>(p.input) + sample * p.input_stride + at, valid, wide,
                           [&](int i) { return nearest<In>(divide_rn(add_rn(x[i], -mean[i]), std[i])); });
  }
}

// --- launching -------------------------------------------------------------------------------------------------------
FASTLIP_HD bool aligned(const void* pointer, int64_t stride_bytes, int64_t bytes) {
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

// Likewise, and with one of what the model reads.
template <typename Body>
cudaError_t with_storages(const PgdStep& p, Body body) {
  if (p.input == nullptr) return with_storage(p.dtype, [&](auto storage) { return body(storage, NoInput{}); });
  if (p.dtype != DType::f32) return cudaErrorInvalidValue;
  switch (p.input_dtype) {
    case DType::f32:
      return body(float{}, float{});
    case DType::f16:
      return body(float{}, __half{});
    case DType::bf16:
      return body(float{}, __nv_bfloat16{});
    case DType::f64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastlip::cuda
