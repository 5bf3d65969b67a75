// Copies from device to shared memory that go on while a thread does other things (sm_80).
#pragma once
#include <cuda_runtime.h>

namespace fastlip::cuda {

// Copy the first `valid` of kBytes (4, 8 or 16), all aligned to kBytes, and fill the rest with zeros. kNear keeps a
// copy in L1, which smaller accesses take anyway.
template <int kBytes, bool kNear>
__device__ __forceinline__ void copy_async(void* to, const void* from, int valid) {
#ifdef __CUDA_ARCH__
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16 && !kNear) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(valid) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(at), "l"(from), "r"(valid), "n"(kBytes)
                 : "memory");
  }
#else
  memset(to, 0, kBytes);
  memcpy(to, from, valid);
#endif
}

// Close a group of copies.
__device__ __forceinline__ void commit_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all but the last kLeft groups of this thread are there.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

}  // namespace fastlip::cuda
