// CUDA's launches and threads on the host, for test_cuda_source.py: kernels whose teams of threads exchange values
// between lanes run with one thread a block, those that only meet at barriers or multiply on matrix units with all of
// them, the others with all of them one after the other, the first last.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "fibers.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#undef __forceinline__
#undef __align__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define cudaGetDevice host_get_device
#define cudaDeviceGetAttribute host_get_attribute
#define cudaFuncGetAttributes host_get_function
#define cudaFuncSetAttribute host_set_attribute
#define cudaGetErrorString host_error_string
#define cudaLaunchKernelEx host_launch
#define cudaOccupancyMaxActiveClusters host_max_active_clusters
#define cudaGetLastError host_last_error
#define cudaMemsetAsync host_memset

struct HostIndex {
  unsigned x = 0;
};
inline HostIndex threadIdx, blockIdx, blockDim;

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// Of shared memory what FASTLIP_HOST_SHARED says, so that samples can be made to exceed it.
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  const char* const bytes = std::getenv("FASTLIP_HOST_SHARED");
  *value = std::atoi(bytes ? bytes : "200000");
  return cudaSuccess;
}
// Clusters exist, but none can be scheduled, so that launches fall back.
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t*) {
  *clusters = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "on the host"; }

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

inline void __syncthreads() { Fibers::barrier(); }
inline void __syncwarp() { Fibers::warp_barrier(); }
inline void __threadfence() {}
inline int atomicAdd(int* at, int value) {
  const int old = *at;
  *at += value;
  return old;
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int) {
  return value;
}
template <typename T>
void __stwb(T* to, T value) {
  std::memcpy(to, &value, sizeof(T));
}

template <typename T>
T __ldcg(const T* from) {
  return *from;
}

namespace fastlip {
struct OperatorStep;
}

template <typename... Declared, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Declared...), const Given&... given) {
  // Teams: launches with attributes, and random_start in L2 and L1, the one kernel of four arguments.
  const bool team = config->attrs != nullptr || sizeof...(Declared) == 4;
  blockDim.x = team ? 1 : config->blockDim.x;
  constexpr bool kBarriers = (std::is_same_v<Declared, fastlip::OperatorStep> || ...);
  for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; ++blockIdx.x) {
    if constexpr (kBarriers) {
      Fibers::instance().resumed = [](unsigned thread) { threadIdx.x = thread; };
      Fibers::run(blockDim.x, [&](unsigned) { kernel(given...); });
      continue;
    }
    for (unsigned left = blockDim.x; left > 0; --left) {
      threadIdx.x = left - 1;
      kernel(given...);
    }
  }
  return cudaSuccess;
}
