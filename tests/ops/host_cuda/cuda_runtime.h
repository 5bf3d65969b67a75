// CUDA's launches and threads on the host, for test_cuda_source.py: blocks, or clusters of them, one after the other,
// each with all of its threads.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>

#include "fibers.h"
#include "shared_memory.h"

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
// As much shared memory for a multiprocessor as for a block.
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == cudaDevAttrReservedSharedMemoryPerBlock ? 0 : HostShared::limit();
  return cudaSuccess;
}
// FASTLIP_HOST_THREADS: how many threads of any kernel a block may have, registers being what limits them.
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  const char* const most = std::getenv("FASTLIP_HOST_THREADS");
  attributes->ptxVersion = 90;
  attributes->maxThreadsPerBlock = std::atoi(most ? most : "1024");
  return cudaSuccess;
}
// The most dynamic shared memory that launches of a kernel may ask for.
inline int& host_dynamic_limit(const void* kernel) {
  static std::map<const void*, int> limits;
  return limits.try_emplace(kernel, 48 * 1024).first->second;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    host_dynamic_limit(reinterpret_cast<const void*>(kernel)) = value;
  }
  return cudaSuccess;
}
// FASTLIP_HOST_CLUSTERS=0: clusters exist, but none can be scheduled, so that launches fall back.
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t*) {
  const char* const most = std::getenv("FASTLIP_HOST_CLUSTERS");
  *clusters = std::atoi(most ? most : "1");
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
// The value of the lane that `source` gives for this one.
template <typename T, typename Source>
T host_exchange(unsigned mask, T value, unsigned kind, Source source) {
  struct Lanes {
    T value[32];
    uint64_t call[32];  // which exchange these values are of
  };
  static Lanes warps[2][Fibers::kMostBlocks][Fibers::kMost / 32];  // in turn: others may still read the values before
  const uint64_t call = Fibers::next_call() << 8 | kind;
  const unsigned lane = threadIdx.x % 32;
  Lanes& lanes = warps[call >> 8 & 1][Fibers::block_in_cluster()][threadIdx.x / 32];
  lanes.value[lane] = value;
  lanes.call[lane] = call;
  Fibers::warp_barrier();
  for (const uint64_t other : lanes.call) {
    if (other != call) host_abort("lanes of a warp are at different shuffles");
  }
  if (mask != 0xFFFFFFFFu) host_abort("a shuffle of some lanes of a warp alone");
  return source(lanes.value, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  return host_exchange(mask, value, offset, [&](const T* lanes, unsigned lane) { return lanes[lane ^ offset]; });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int offset) {
  return host_exchange(mask, value, 32 + offset,
                       [&](const T* lanes, unsigned lane) { return lanes[lane + offset < 32 ? lane + offset : lane]; });
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return host_exchange(mask, value, 64 + source, [&](const T* lanes, unsigned) { return lanes[source]; });
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return host_exchange(mask, value, 96, [](const int* lanes, unsigned) {
    int sum = 0;
    for (int i = 0; i < 32; ++i) sum += lanes[i];
    return sum;
  });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return host_exchange(mask, value, 98, [](const unsigned* lanes, unsigned) {
    unsigned most = 0;
    for (int i = 0; i < 32; ++i) most = lanes[i] > most ? lanes[i] : most;
    return most;
  });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return host_exchange(mask, predicate, 97, [](const int* lanes, unsigned) {
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= lanes[i] != 0 ? 1u << i : 0u;
    return bits;
  });
}
template <typename T>
void __stwb(T* to, T value) {
  *to = value;  // at an address that it may have: sanitizers look
}

template <typename T>
T __ldcg(const T* from) {
  return *from;
}

template <typename... Declared, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Declared...), const Given&... given) {
  const size_t bytes = config->dynamicSmemBytes;
  if (bytes > static_cast<size_t>(host_dynamic_limit(reinterpret_cast<const void*>(kernel))))
    return cudaErrorInvalidValue;
  const unsigned ranks = config->numAttrs > 0 ? config->attrs[0].val.clusterDim.x : 1;
  if (ranks == 0 || config->gridDim.x % ranks != 0) return cudaErrorInvalidValue;
  blockDim.x = config->blockDim.x;
  for (unsigned first = 0; first < config->gridDim.x; first += ranks) {
    for (unsigned rank = 0; rank < ranks; ++rank) HostShared::start(rank, bytes);
    Fibers::instance().resumed = [first](unsigned block, unsigned thread) {
      blockIdx.x = first + block;
      threadIdx.x = thread;
    };
    Fibers::run(ranks, blockDim.x, [&] { kernel(given...); });
    for (unsigned rank = 0; rank < ranks; ++rank) HostShared::end(rank);
  }
  return cudaSuccess;
}
