// random_start: points uniform in the ball, each sample's numbers a function of the key, its id and the element alone.
//
// Floor: x0 read once, the result written once: 8 bytes an element in float32. Operations, an element: Philox 20
// (80 for a block of four words, the multiplications being wide), Linf 5 more; L2 and L1 about 20 more for logarithm,
// sine and cosine, all of it twice, since the numbers are drawn once for their sum and, cheaper than keeping them,
// again to be used.
//
// A thread takes the numbers of one Philox block. Linf: one thread a block. L2 and L1: a block of threads a sample. In
// channels_last neighbours in the logical order lie apart, so accesses are single elements there.
#include "kernels/cuda/cooperative_group.cuh"
#include "kernels/cuda/random.h"

namespace fastlip::cuda {
namespace {

constexpr int kLinfThreads = 256;

// Moves one Philox block's elements of a sample from x0 to out. How they are stored is a matter of this alone.
template <typename T>
class Mover {
 public:
  static constexpr int kLanes = Draw<T>::kLanes;

  __device__ Mover(const RandomStart& p, int64_t sample, bool wide)
      : p_(p),
        sample_(sample),
        lo_(p.lo, sample),
        hi_(p.hi, sample),
        size_(p.size),
        channels_(p.channels),
        plane_(p.size / p.channels),
        wide_(wide && p.channels == 1) {}

  __device__ void operator()(int64_t block, T radius, const T (&unit)[kLanes]) const {
    if constexpr (std::is_same_v<T, float>) {
      if (p_.dtype == DType::f16) return move<__half>(block, radius, unit);
      if (p_.dtype == DType::bf16) return move<__nv_bfloat16>(block, radius, unit);
    }
    move<T>(block, radius, unit);
  }

 private:
  template <typename S>
  __device__ void move(int64_t block, T radius, const T (&unit)[kLanes]) const {
    S* const to = static_cast<S*>(p_.out) + sample_ * p_.out_stride;
    const S* const from = static_cast<const S*>(p_.x0) + sample_ * p_.x0_stride;
    const int64_t first = block * kLanes;
    const int valid = static_cast<int>(size_ - first < kLanes ? size_ - first : kLanes);
    if (wide_ && valid == kLanes) {
      T x0[kLanes], lo[kLanes], hi[kLanes], out[kLanes];
      load<S>(from + first, valid, true, x0);
      lo_.load(first, valid, true, lo);
      hi_.load(first, valid, true, hi);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) out[i] = clamp(add_rn(x0[i], multiply_rn(radius, unit[i])), lo[i], hi[i]);
      store<S>(to + first, valid, true, out, x0);
      return;
    }
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      if (i >= valid) break;
      const int64_t at = position(first + i, channels_, plane_);
      const T x0 = widen(from[at]);
      to[at] = narrow<S>(clamp(add_rn(x0, multiply_rn(radius, unit[i])), lo_.at(at), hi_.at(at)), x0);
    }
  }

  const RandomStart& p_;
  int64_t sample_;
  Bound<T> lo_, hi_;
  int64_t size_, channels_, plane_;
  bool wide_;
};

template <typename T>
__device__ T finite_radius(const RandomStart& p, int64_t sample) {
  return finite_or_zero(radius_of(number<T>(p.eps, sample)));
}

template <typename T>
__global__ void __launch_bounds__(kLinfThreads)
    random_start_linf_kernel(const __grid_constant__ RandomStart p, int64_t blocks, bool wide) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kLinfThreads + threadIdx.x;
  const int64_t all = p.batch * blocks;
  if (index >= all) return;
  const int64_t sample =
      all <= UINT32_MAX ? static_cast<uint32_t>(index) / static_cast<uint32_t>(blocks) : index / blocks;
  const int64_t block = index - sample * blocks;
  T unit[Draw<T>::kLanes];
  draw_block<T, Norm::linf>(static_cast<uint64_t>(*p.key), static_cast<uint64_t>(p.ids[sample]), block, unit);
  Mover<T>(p, sample, wide)(block, finite_radius<T>(p, sample), unit);
}

template <typename T, Norm kNorm>
__global__ void __launch_bounds__(kMaxThreads)
    random_start_ball_kernel(const __grid_constant__ RandomStart p, int64_t first_sample, int64_t blocks, bool wide) {
  constexpr int kLanes = Draw<T>::kLanes;
  __shared__ CooperativeGroup::Memory memory;
  const int64_t sample = first_sample + blockIdx.x;
  const auto key = static_cast<uint64_t>(*p.key), id = static_cast<uint64_t>(p.ids[sample]);
  T unit[kLanes];
  double sum[1] = {};
  for (int64_t block = threadIdx.x; block < blocks; block += blockDim.x) {
    draw_block<T, kNorm>(key, id, block, unit);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const double size = block * kLanes + i < p.size ? magnitude(unit[i]) : T(0);
      sum[0] += kNorm == Norm::l2 ? size * size : size;
    }
  }
  CooperativeGroup(memory, 1).reduce(sum);
  const T radius = static_cast<T>(finite_radius<T>(p, sample) * ball_scale<T, kNorm>(key, id, sum[0], p.size));
  const Mover<T> move(p, sample, wide);
  for (int64_t block = threadIdx.x; block < blocks; block += blockDim.x) {
    draw_block<T, kNorm>(key, id, block, unit);
    move(block, radius, unit);
  }
}

template <typename T>
cudaError_t launch(const RandomStart& p, void* stream) {
  constexpr int64_t kLanes = Draw<T>::kLanes;
  const int64_t blocks = (p.size + kLanes - 1) / kLanes;
  const bool many = p.batch > 1;
  const auto fits = [&](const void* data, int64_t stride, int64_t bytes) {
    return data == nullptr || aligned(data, many ? stride * bytes : 0, 16);
  };
  const bool wide = fits(p.out, p.out_stride, bytes_of(p.dtype)) && fits(p.x0, p.x0_stride, bytes_of(p.dtype)) &&
                    fits(p.lo.data, p.lo.stride, sizeof(T)) && fits(p.hi.data, p.hi.stride, sizeof(T));
  if (p.norm == Norm::linf) {
    const auto config = configure((p.batch * blocks + kLinfThreads - 1) / kLinfThreads, kLinfThreads, 0, stream);
    return cudaLaunchKernelEx(&config, random_start_linf_kernel<T>, p, blocks, wide);
  }
  const auto kernel =
      p.norm == Norm::l2 ? random_start_ball_kernel<T, Norm::l2> : random_start_ball_kernel<T, Norm::l1>;
  constexpr int64_t kLeast = 64, kMost = kMaxThreads, kMostBlocks = int64_t{1} << 30;
  const int64_t wanted = (blocks + kWarp - 1) / kWarp * kWarp;
  const int threads = static_cast<int>(wanted < kLeast ? kLeast : wanted > kMost ? kMost : wanted);
  for (int64_t first = 0; first < p.batch; first += kMostBlocks) {
    const auto config = configure(p.batch - first < kMostBlocks ? p.batch - first : kMostBlocks, threads, 0, stream);
    const auto error = cudaLaunchKernelEx(&config, kernel, p, first, blocks, wide);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

int random_start(const RandomStart& start, void* stream) {
  if (start.batch == 0 || start.size == 0) return cudaSuccess;
  return with_arithmetic(start.dtype, [&](auto arithmetic) { return launch<decltype(arithmetic)>(start, stream); });
}

}  // namespace fastlip::cuda
