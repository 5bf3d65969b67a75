// Threads that work on one sample together: a block, or a cluster of blocks.
#pragma once
#include <cuda_runtime.h>

#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/memory.cuh"

namespace fastlip::cuda {

constexpr int kMaxThreads = 256, kMaxRanks = 16;

// A block, or a cluster of `ranks` blocks with one sample between them. Every thread of the group calls reduce and gets
// the same bits; the order of summation depends on the group's shape alone, never on the batch.
class CooperativeGroup {
 public:
  static constexpr int kMostValues = 3, kMaxWarps = kMaxThreads / kWarp;
  struct Memory {  // two sets taken in turn, so that one barrier a reduction is enough; 0 for who is not there
    alignas(16) double warp[2][kMostValues][kMaxWarps];
    alignas(16) double block[2][kMostValues][kMaxRanks];
  };

  __device__ CooperativeGroup(Memory& memory, int ranks) : memory_(memory), ranks_(ranks) {
    for (int i = threadIdx.x; i < 2 * kMostValues * kMaxWarps; i += blockDim.x) (&memory.warp[0][0][0])[i] = 0;
    if (ranks_ > 1) {
      for (int i = threadIdx.x; i < 2 * kMostValues * kMaxRanks; i += blockDim.x) (&memory.block[0][0][0])[i] = 0;
      sync();  // no block's shared memory is there before the block is
    } else {
      __syncthreads();
    }
  }

  template <int kSums>
  __device__ __forceinline__ void reduce(double (&sums)[kSums]) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] = across_lanes(sums[k]);
    across_warps<0>(sums);
  }
  // Sums, and what all threads count.
  template <int kSums>
  __device__ __forceinline__ double reduce(double (&sums)[kSums], int count) {
    double values[kSums + 1];
#pragma unroll
    for (int k = 0; k < kSums; ++k) values[k] = across_lanes(sums[k]);
    values[kSums] = __reduce_add_sync(0xFFFFFFFFu, count);
    across_warps<0>(values);
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] = values[k];
    return values[kSums];
  }
  __device__ __forceinline__ double reduce(int count) {
    double values[1] = {static_cast<double>(__reduce_add_sync(0xFFFFFFFFu, count))};
    across_warps<0>(values);
    return values[0];
  }
  // The largest value, none being below 0, and what all threads count.
  template <typename T>
  __device__ __forceinline__ double reduce_peak(T& peak, int count) {
    double values[2] = {static_cast<double>(__reduce_add_sync(0xFFFFFFFFu, count)), peak_of_lanes(peak)};
    across_warps<1>(values);
    peak = static_cast<T>(values[1]);
    return values[0];
  }

  __device__ int ranks() const { return ranks_; }

  __device__ __forceinline__ void sync() const {
    if (ranks_ > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }
  }

 private:
  __device__ __forceinline__ static double across_lanes(double value) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
    return value;
  }
  __device__ __forceinline__ static double peak_of_lanes(float value) {
    return bit_cast<float>(__reduce_max_sync(0xFFFFFFFFu, bit_cast<uint32_t>(value)));
  }
  __device__ __forceinline__ static double peak_of_lanes(double value) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      value = greater(value, __shfl_xor_sync(0xFFFFFFFFu, value, offset));
    }
    return value;
  }

  // Sums, the last kPeaks of them the largest instead.
  template <int kPeaks, int kValues>
  __device__ __forceinline__ void across_warps(double (&values)[kValues]) {
    static_assert(kValues <= kMostValues);
    turn_ ^= 1;
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int k = 0; k < kValues; ++k) memory_.warp[turn_][k][threadIdx.x / kWarp] = values[k];
    }
    __syncthreads();
    gather<kPeaks>(memory_.warp[turn_], static_cast<int>(blockDim.x / kWarp), values);
    if (ranks_ > 1) {
      // A thread a block tells that block, so that after the barrier each reads its own memory alone.
      const int rank = static_cast<int>(blockIdx.x) % ranks_;
      if (static_cast<int>(threadIdx.x) < ranks_) {
#pragma unroll
        for (int k = 0; k < kValues; ++k) {
          *cluster_address(&memory_.block[turn_][k][rank], static_cast<int>(threadIdx.x)) = values[k];
        }
      }
      sync();
      gather<kPeaks>(memory_.block[turn_], ranks_, values);
    }
  }

  // Of the first `count` parts, two at a time.
  template <int kPeaks, int kValues, int kParts>
  __device__ __forceinline__ static void gather(const double (&parts)[kMostValues][kParts], int count,
                                                double (&values)[kValues]) {
    double2 totals[kValues] = {};
#pragma unroll 2
    for (int i = 0; i < count; i += 2) {
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        const double2 two = *reinterpret_cast<const double2*>(&parts[k][i]);
        totals[k].x = k < kValues - kPeaks ? totals[k].x + two.x : greater(totals[k].x, two.x);
        totals[k].y = k < kValues - kPeaks ? totals[k].y + two.y : greater(totals[k].y, two.y);
      }
    }
#pragma unroll
    for (int k = 0; k < kValues; ++k) {
      values[k] = k < kValues - kPeaks ? totals[k].x + totals[k].y : greater(totals[k].x, totals[k].y);
    }
  }

  Memory& memory_;
  const int ranks_;
  int turn_ = 0;
};

}  // namespace fastlip::cuda
