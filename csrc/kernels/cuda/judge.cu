// judge: what an attack reads off logits, a warp to a sample of few classes, a block to one of many.
//
// Floor: logits read once, their gradient written once, 8 bytes a class in float32. Cross-entropy reads them twice
// more, out of L1 or L2: a sample of 21,841 classes is 87 KB. It is computed in double, as margins are, about 60
// operations a class; the others compare and move. For 64 samples of ten classes the launch is all there is.
#include <cuda_runtime.h>

#include "kernels/cuda/memory.cuh"
#include "kernels/judge.h"

namespace fastlip::cuda {
namespace {

constexpr int kLoads = 4;             // loads that a thread has under way
constexpr int kClassesPerWarp = 256;  // beyond which another warp helps
constexpr int kMostWarps = 16;
constexpr int kSamplesPerBlock = 4;  // of a warp each

template <typename T>
struct BlockMemory {
  Ranking<T> ranking[kMostWarps];
  double sum[kMostWarps];
};

template <typename T>
__device__ void merge_lanes(Ranking<T>& mine) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    Ranking<T> other;
#pragma unroll
    for (int place = 0; place < Ranking<T>::kPlaces; ++place) {
      other.top[place] = __shfl_xor_sync(0xFFFFFFFFu, mine.top[place], offset);
      other.at[place] = __shfl_xor_sync(0xFFFFFFFFu, mine.at[place], offset);
    }
    other.least = __shfl_xor_sync(0xFFFFFFFFu, mine.least, offset);
    other.nan = __shfl_xor_sync(0xFFFFFFFFu, static_cast<int>(mine.nan), offset) != 0;
    mine.merge(other);
  }
}

// The threads that share a sample: a warp, or a block.
template <typename T>
class SampleThreads {
 public:
  __device__ SampleThreads(BlockMemory<T>& memory, int warps)
      : memory_(memory), warps_(warps), lanes_(warps * kWarp), lane_(static_cast<int>(threadIdx.x) % lanes_) {}

  __device__ int lane() const { return lane_; }

  // each(class) for the classes of this thread.
  template <typename Each>
  __device__ __forceinline__ void classes(int64_t count, Each each) const {
#pragma unroll 4
    for (int64_t c = lane_; c < count; c += lanes_) each(static_cast<int32_t>(c));
  }
  __device__ Ranking<T> rank(const T* logits, int64_t count) const {
    Ranking<T> ranking = Ranking<T>::empty();
    for (int64_t first = lane_; first < count; first += kLoads * lanes_) {
      T logit[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int64_t c = first + i * lanes_;
        logit[i] = c < count ? logits[c] : -kInfinite<T>;
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        ranking.note(logit[i]);
        if (logit[i] > -kInfinite<T>) ranking.insert(logit[i], static_cast<int32_t>(first + i * lanes_));
      }
    }
    merge_lanes(ranking);
    if (warps_ == 1) return ranking;
    if (lane_ % kWarp == 0) memory_.ranking[lane_ / kWarp] = ranking;
    __syncthreads();
    Ranking<T> all = memory_.ranking[0];
    for (int warp = 1; warp < warps_; ++warp) all.merge(memory_.ranking[warp]);
    return all;
  }
  // The same bits for every thread, in an order that the number of classes decides.
  __device__ double sum(double value) const {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
    if (warps_ == 1) return value;
    if (lane_ % kWarp == 0) memory_.sum[lane_ / kWarp] = value;
    __syncthreads();
    double all = 0;
    for (int warp = 0; warp < warps_; ++warp) all += memory_.sum[warp];
    return all;
  }

 private:
  BlockMemory<T>& memory_;
  const int warps_, lanes_, lane_;
};

template <typename T>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1) judge_kernel(const __grid_constant__ Judge j, int warps) {
  __shared__ BlockMemory<T> memory;
  const int64_t sample =
      static_cast<int64_t>(blockIdx.x) * (blockDim.x / (warps * kWarp)) + threadIdx.x / (warps * kWarp);
  if (sample >= j.batch) return;
  const SampleThreads<T> threads(memory, warps);
  const T* const logits = static_cast<const T*>(j.logits) + sample * j.classes;
  T* const grad = static_cast<T*>(j.grad) + sample * j.classes;
  const Ranking<T> ranking = threads.rank(logits, j.classes);
  const Classes classes(j, sample);
  const bool known = classes.known && !ranking.nan;
  T loss = static_cast<T>(NAN);
  if (!known) {
    threads.classes(j.classes, [&](int32_t c) { grad[c] = loss; });
  } else if (j.kind == Loss::ce) {
    const double peak = ranking.top[0];
    double sum = 0;
    threads.classes(j.classes, [&](int32_t c) { sum += exp(logits[c] - peak); });
    sum = threads.sum(sum);
    const bool reach = j.targets != nullptr || j.toward != nullptr;
    const int32_t at = j.toward != nullptr ? classes.toward : classes.own;
    const double log_softmax = (logits[at] - peak) - log(sum);
    loss = static_cast<T>(reach ? log_softmax : -log_softmax);
    threads.classes(j.classes, [&](int32_t c) {
      const double share = exp(logits[c] - peak) / sum, one = c == at ? 1.0 : 0.0;
      grad[c] = static_cast<T>(reach ? one - share : share - one);
    });
  } else {
    const Margin margin(j, ranking, classes, logits);
    const T unmentioned = static_cast<T>(margin.grad(kNoClass));
    loss = static_cast<T>(margin.loss);
    threads.classes(j.classes,
                    [&](int32_t c) { grad[c] = margin.mentions(c) ? static_cast<T>(margin.grad(c)) : unmentioned; });
  }
  if (threads.lane() == 0) Decision(j, ranking, classes, known, loss, sample).write(j, sample, loss);
}

template <typename T>
cudaError_t launch(const Judge& j, void* stream) {
  const int64_t wanted = (j.classes + kClassesPerWarp - 1) / kClassesPerWarp;
  const int warps = static_cast<int>(wanted < kMostWarps ? wanted : kMostWarps);
  const int samples = warps == 1 ? kSamplesPerBlock : 1;
  const int64_t blocks = (j.batch + samples - 1) / samples;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const auto config = configure(blocks, samples * warps * kWarp, 0, stream);
  return cudaLaunchKernelEx(&config, judge_kernel<T>, j, warps);
}

}  // namespace

int judge(const Judge& judge, void* stream) {
  if (judge.batch == 0) return cudaSuccess;
  return with_arithmetic(judge.dtype, [&](auto arithmetic) { return launch<decltype(arithmetic)>(judge, stream); });
}

}  // namespace fastlip::cuda
