// The blocks of a cluster (sm_90): cooperative_groups has the same, at two seconds of the compiler's a file.
#pragma once
#include <cuda_runtime.h>

namespace fastlip::cuda {

// Wait for all threads of the cluster; each then sees what any wrote before.
__device__ __forceinline__ void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Where a block of the cluster has what lies at `at` in this one's shared memory.
template <typename V>
__device__ __forceinline__ V* cluster_address(V* at, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  V* there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(at), "r"(rank));
  return there;
#else
  return at;
#endif
}

}  // namespace fastlip::cuda
