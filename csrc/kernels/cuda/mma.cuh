// The matrix units' instruction (sm_80). tests/ops/host_cuda holds one for the host.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastlip::cuda {

// sums += a b, 16 x 8 by 8 x 8, in TF32 with float32 sums; all lanes of a warp together. operator_mma.h says which lane
// holds what.
__device__ __forceinline__ void mma(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace fastlip::cuda
