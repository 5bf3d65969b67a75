// pack_weights_: convolution kernels in the layout that operator_step_ reads. One launch packs up to kMost of them,
// whose descriptions are passed as kernel parameters.
//
// Floor: every element read once and written once, 8 bytes in float32, and about 40 integer operations on addresses.
// Writes are contiguous. Neighbouring threads read elements one row of the weight apart, and a block returns to the
// same cache lines, 64 per tap, which stay in L1 and L2.
#include <cuda_runtime.h>

#include "kernels/cuda/memory.cuh"
#include "kernels/pack.h"

namespace fastlip::cuda {
namespace {

constexpr int kPackThreads = 256, kPackEach = 16, kMost = 64;

struct Batch {
  PackProblem problems[kMost];
  unsigned first_block[kMost + 1];  // of each problem, and their total
  int count;
  bool adjoint;
};

template <typename To>
__global__ void __launch_bounds__(kPackThreads) pack_weights_kernel(const __grid_constant__ Batch batch, To* out) {
  int low = 0, high = batch.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (batch.first_block[middle] <= blockIdx.x) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const PackProblem& p = batch.problems[low];
  const int64_t size = pack_size(p);
  const int64_t begin = static_cast<int64_t>(blockIdx.x - batch.first_block[low]) * (kPackThreads * kPackEach);
  for (int i = 0; i < kPackEach; ++i) {
    const int64_t at = begin + i * kPackThreads + threadIdx.x;
    if (at >= size) return;
    const int64_t from = pack_source(p, batch.adjoint, at);
    To value = 0;
    if (from >= 0) {
      value = p.dtype == DType::f64 ? static_cast<To>(static_cast<const double*>(p.weight)[from])
                                    : static_cast<To>(static_cast<const float*>(p.weight)[from]);
    }
    out[p.at + at] = value;
  }
}

}  // namespace

int pack_weights_(const PackWeights& pack, void* stream) {
  for (int64_t first = 0; first < pack.count;) {
    Batch batch = {};
    batch.adjoint = pack.adjoint;
    int64_t blocks = 0;
    for (; first < pack.count && batch.count < kMost; ++first) {
      const PackProblem& p = pack.problems[first];
      const int64_t own = (pack_size(p) + kPackThreads * kPackEach - 1) / (kPackThreads * kPackEach);
      if (batch.count > 0 && blocks + own > INT32_MAX) break;
      batch.problems[batch.count] = p;
      blocks += own;
      batch.first_block[++batch.count] = static_cast<unsigned>(blocks);
    }
    if (blocks == 0) continue;
    const auto config = configure(blocks, kPackThreads, 0, stream);
    const auto error =
        pack.dtype == DType::f64
            ? cudaLaunchKernelEx(&config, pack_weights_kernel<double>, batch, static_cast<double*>(pack.out))
            : cudaLaunchKernelEx(&config, pack_weights_kernel<float>, batch, static_cast<float*>(pack.out));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fastlip::cuda
