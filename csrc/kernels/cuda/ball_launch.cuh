// How samples in L2 or L1 are launched: threads, blocks and clusters for a size and a device.
#pragma once
#include "kernels/cuda/sample_tile.cuh"

namespace fastlip::cuda {
namespace {

template <typename Parameters>
using Kernel = void (*)(Parameters, Shares);

// The kernels of a norm and arithmetic; no `registers` for double.
template <typename Parameters>
struct Kernels {
  Kernel<Parameters> registers, looped;
};

// How samples of one size are launched on a device.
template <typename Parameters>
struct Plan {
  Kernel<Parameters> kernel;
  int64_t tile;
  int ranks, threads;
  bool staged;
  size_t bytes;
};

inline cudaLaunchAttribute cluster_of(int ranks) {
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(ranks);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  return cluster;
}

// Whether the device has room for a cluster as planned: where it is shared or partitioned, no group of multiprocessors
// may.
template <typename Parameters>
bool has_room(const Plan<Parameters>& plan) {
  constexpr int kPortable = 8;  // the largest cluster that every device with clusters accepts
  if (plan.ranks == 1) return true;
  auto cluster = cluster_of(plan.ranks);
  auto config = configure(plan.ranks, plan.threads, plan.bytes, nullptr);
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  if ((plan.ranks > kPortable &&
       cudaFuncSetAttribute(plan.kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess) ||
      cudaOccupancyMaxActiveClusters(&clusters, plan.kernel, &config) != cudaSuccess) {
    cudaGetLastError();  // not this launch's error: there are other plans
    return false;
  }
  return clusters > 0;
}

template <typename T, Norm kNorm, typename Parameters>
cudaError_t make_plan(int device, int64_t size, const Kernels<Parameters>& kernels, Plan<Parameters>& plan) {
  constexpr int64_t kChunk = 16 / sizeof(T), kBytes = 2 * sizeof(T), kStatic = sizeof(BallMemory<kNorm>);
  const auto tile_of = [&](int ranks) { return ((size + ranks - 1) / ranks + kChunk - 1) / kChunk * kChunk; };
  const auto threads_of = [&](int64_t tile, int64_t each, int64_t most) {
    const int64_t wanted = ((tile / kChunk + each - 1) / each + kWarp - 1) / kWarp * kWarp;
    return static_cast<int>(wanted < kWarp ? kWarp : wanted > most ? most : wanted);
  };
  // Offsets and counts are ints, a step beyond the end included.
  if (size > INT32_MAX - 2 * kMaxThreads * kChunk * kBatch<T, Store::looped>) return cudaErrorInvalidValue;
  // Whether this code knows clusters is a matter of what it was compiled for: PTX for sm_80 runs on an sm_90, too.
  cudaFuncAttributes compiled = {};
  if (kernels.registers != nullptr) {
    if (const auto error = cudaFuncGetAttributes(&compiled, kernels.registers); error != cudaSuccess) return error;
    constexpr int64_t kEach = kBatch<T, Store::registers>, kMost = kThreads<Store::registers>;
    const int64_t most = compiled.maxThreadsPerBlock < kMost ? compiled.maxThreadsPerBlock : kMost;
    if (tile_of(1) <= kEach * kChunk * most) {
      plan = {kernels.registers, tile_of(1), 1, threads_of(tile_of(1), kEach, most), false, 0};
      return cudaSuccess;
    }
  }
  if (const auto error = cudaFuncGetAttributes(&compiled, kernels.looped); error != cudaSuccess) return error;
  const bool clustered = compiled.ptxVersion >= 90;
  int shared_limit = 0, shared_all = 0, reserved = 0;
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(&value, attribute, device);
  };
  auto error = ask(shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error == cudaSuccess) error = ask(shared_all, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  if (error == cudaSuccess) error = ask(reserved, cudaDevAttrReservedSharedMemoryPerBlock);
  if (error != cudaSuccess) return error;
  const int64_t limit = (shared_limit - kStatic) / kBytes;
  // Always the same number, so that threads launching other sizes do not undercut this one.
  if (limit > 0) {
    const auto error = cudaFuncSetAttribute(kernels.looped, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(limit * kBytes));
    if (error != cudaSuccess) return error;
  }
  // Rather several blocks a multiprocessor, one of which computes while others wait for memory, than one.
  for (int64_t blocks = 3; blocks > 0; --blocks) {
    const int64_t share = (shared_all / blocks - reserved - kStatic) / kBytes, capacity = share < limit ? share : limit;
    for (int ranks = 1; ranks <= (clustered ? kMaxRanks : 1); ranks *= 2) {
      if (tile_of(ranks) > capacity) continue;
      plan = {kernels.looped, tile_of(ranks),
              ranks,          threads_of(tile_of(ranks), 2 * kBatch<T, Store::looped>, kMaxThreads),
              true,           static_cast<size_t>(tile_of(ranks) * kBytes)};
      if (has_room(plan)) return cudaSuccess;
    }
  }
  for (int ranks = clustered ? 8 : 1;; ranks /= 2) {
    plan = {kernels.looped, tile_of(ranks),
            ranks,          threads_of(tile_of(ranks), 2 * kBatch<T, Store::looped>, kMaxThreads),
            false,          0};
    if (ranks == 1 || has_room(plan)) return cudaSuccess;
  }
}

// Launches a group for each sample.
template <typename T, Norm kNorm, typename Parameters>
cudaError_t launch_groups(const Parameters& parameters, const PgdStep& p, const Kernels<Parameters>& kernels, bool wide,
                          void* stream) {
  int device = 0;
  if (const auto error = cudaGetDevice(&device); error != cudaSuccess) return error;
  // Asking the driver takes microseconds: each thread remembers the plans that it made last.
  constexpr int kRemembered = 8;
  struct Known {
    int device = -1;
    int64_t size = 0;
    Plan<Parameters> plan = {};
  };
  thread_local Known known[kRemembered];
  thread_local int oldest = 0;
  int which = 0;
  while (which < kRemembered && (known[which].device != device || known[which].size != p.size)) ++which;
  if (which == kRemembered) {
    Plan<Parameters> made = {};
    if (const auto error = make_plan<T, kNorm>(device, p.size, kernels, made); error != cudaSuccess) return error;
    which = oldest;
    oldest = (oldest + 1) % kRemembered;
    known[which] = {device, p.size, made};
  }
  const Plan<Parameters>& plan = known[which].plan;
  constexpr int64_t kMostBlocks = int64_t{1} << 30;
  auto cluster = cluster_of(plan.ranks);
  Shares shares{0, plan.tile, plan.ranks, plan.staged, wide};
  const int64_t most = kMostBlocks / plan.ranks;
  for (; shares.first < p.batch; shares.first += most) {
    const int64_t samples = p.batch - shares.first < most ? p.batch - shares.first : most;
    auto config = configure(samples * plan.ranks, plan.threads, plan.bytes, stream);
    config.attrs = &cluster;
    config.numAttrs = plan.ranks > 1 ? 1 : 0;
    if (const auto error = cudaLaunchKernelEx(&config, plan.kernel, parameters, shares); error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace fastlip::cuda
