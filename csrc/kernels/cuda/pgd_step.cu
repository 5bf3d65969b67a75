// pgd_step_ and project_ (a step without a gradient).
//
// Floor: x, grad and x0 read once, x written once: 16 bytes an element in float32, 12 for project_, 8 in 16 bits. With
// what the model reads in 16 bits: 16 too, since grad has 16 bits then; a quotient more, two in L2 and L1.
//
// Linf: a thread takes 16 bytes of each operand; without per-sample values the batch is one long sample.
//
// L2 and L1: a group of threads takes a sample, and all it needs is on its way before anything waits for it. Up to
// 3,072 floats (3 x 32 x 32) a block of at most 128 threads has it in registers, four such blocks a multiprocessor.
// Beyond, v and x0 lie in shared memory: of one block, or where there are clusters of up to 16 that add up over
// distributed shared memory, so many that up to three of them share a multiprocessor and one computes while others wait
// for memory (3 x 224 x 224: 16 blocks, 9,408 floats each). Larger samples still: up to eight blocks that read and
// compute everything again in every pass. A pass of the search costs about 7 instructions an element in L2, 9 in L1;
// sums are in T over a thread's batch of chunks and in double from there. Types of storage are a matter of reading and
// writing alone, chosen at run time. Chunks of four floats go round the threads in the same way whether they can be
// accessed as one or not: sums do not depend on alignment, strides or the batch.
//
// What is saved: x where it is better, in L2 and L1 read again, from cache, just before it is overwritten; and whether
// gradients are finite, which is seen as they arrive.
#include "kernels/cuda/ball_launch.cuh"
#include "kernels/cuda/ball_passes.cuh"

namespace fastlip::cuda {
namespace {

// --- Linf ------------------------------------------------------------------------------------------------------------
constexpr int kLinfThreads = 256;

template <typename S, int kWidth>
__global__ void __launch_bounds__(kLinfThreads)
    pgd_step_linf_kernel(const __grid_constant__ PgdStep p, int64_t chunks) {
  using T = Arith<S>;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kLinfThreads + threadIdx.x;
  const int64_t all = p.batch * chunks;
  if (index >= all) return;
  const int64_t sample =
      all <= UINT32_MAX ? static_cast<uint32_t>(index) / static_cast<uint32_t>(chunks) : index / chunks;
  if (p.active != nullptr && p.active[sample] == 0) return;
  const int64_t at = (index - sample * chunks) * kWidth;
  const int valid = static_cast<int>(p.size - at < kWidth ? p.size - at : kWidth);

  S* const out = static_cast<S*>(p.x) + sample * p.x_stride + at;
  T x[kWidth], grad[kWidth], x0[kWidth], lo[kWidth], hi[kWidth];
  const bool better = is_better(p, sample);
  load<S>(out, valid, true, x);
  load<S>(static_cast<const S*>(p.x0) + sample * p.x0_stride + at, valid, true, x0);
  if (p.grad != nullptr) {
    // Signs are all it takes: no standard deviation changes them.
    with_ascent<S>(p, [&](auto stored) FASTLIP_INLINE {
      using G = decltype(stored);
      load<G>(static_cast<const G*>(p.grad) + sample * p.grad_stride + at, valid, true, grad);
    });
    if (better) save<S, kWidth>(p, sample, at, valid);
    look_at(p, sample, grad);
    const T step = finite_or_zero(number<T>(p.step_size, sample));
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = add_rn(x[i], signed_step(grad[i], step));
  }
  Bound<T>(p.lo, sample).load(at, valid, true, lo);
  Bound<T>(p.hi, sample).load(at, valid, true, hi);
  const T eps = radius_of(number<T>(p.eps, sample));
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x[i] = project_linf(x[i], x0[i], eps, lo[i], hi[i]);
  store<S>(out, valid, true, x, x0);
  feed(p, sample, at, valid, true, x);
}

template <typename S>
cudaError_t launch_linf(PgdStep p, void* stream) {
  constexpr int kWidth = 16 / sizeof(S);
  const bool uniform = p.step_size.data == nullptr && p.eps.data == nullptr && p.lo.data == nullptr &&
                       p.hi.data == nullptr && p.active == nullptr && p.mean.data == nullptr && p.std.data == nullptr &&
                       p.best == nullptr && p.not_finite == nullptr;
  const bool packed = p.x_stride == p.size && p.x0_stride == p.size && (p.grad == nullptr || p.grad_stride == p.size) &&
                      (p.input == nullptr || p.input_stride == p.size);
  if (uniform && packed) {
    p.size *= p.batch;
    p.batch = 1;
  }
  const int width = all_aligned(p, kWidth) ? kWidth : 1;
  const int64_t chunks = (p.size + width - 1) / width;
  const auto config = configure((p.batch * chunks + kLinfThreads - 1) / kLinfThreads, kLinfThreads, 0, stream);
  if (width == 1) return cudaLaunchKernelEx(&config, pgd_step_linf_kernel<S, 1>, p, chunks);
  return cudaLaunchKernelEx(&config, pgd_step_linf_kernel<S, kWidth>, p, chunks);
}

// --- L2 and L1 -------------------------------------------------------------------------------------------------------
template <typename T, Norm kNorm, Store kStore>
constexpr int kLeastBlocks = kStore == Store::registers                      ? 4
                             : std::is_same_v<T, float> && kNorm == Norm::l2 ? 3
                                                                             : 2;

template <typename T, Norm kNorm, Store kStore>
__global__ void __launch_bounds__(kThreads<kStore>, kLeastBlocks<T, kNorm, kStore>)
    pgd_step_ball_kernel(const __grid_constant__ PgdStep p, const __grid_constant__ Shares shares) {
  using Mine = SampleTile<T, kNorm, kStore>;
  using Batch = typename Mine::Batch;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ BallMemory<kNorm> memory;
  const int64_t sample = shares.first + (kStore == Store::registers ? blockIdx.x : blockIdx.x / shares.ranks);
  if (p.active != nullptr && p.active[sample] == 0) return;
  CooperativeGroup group(memory.group, kStore == Store::registers ? 1 : shares.ranks);
  Search<T, kNorm> search(radius_of(number<T>(p.eps, sample)));
  Mine tile(p, shares, sample, shared, search);

  Move<T> move = {};
  if (p.grad != nullptr) {
    const T step = finite_or_zero(number<T>(p.step_size, sample));
    move = find_move(tile, group, memory, step, static_cast<int>(p.kept));
  }
  project_all(
      tile, group, move, search, 1, search, [](Batch&) {},
      [&](const Batch& batch) FASTLIP_INLINE {
        if (is_better(p, sample)) {
          tile.copy(tile.operand(p.x, p.dtype, p.x_stride), tile.operand(p.best, p.dtype, p.best_stride), batch);
        }
        tile.finish(batch);
      });
  tile.feed_all();
}

template <typename T, Norm kNorm>
cudaError_t launch_ball(const PgdStep& p, void* stream) {
  Kernels<PgdStep> kernels = {nullptr, pgd_step_ball_kernel<T, kNorm, Store::looped>};
  if constexpr (std::is_same_v<T, float>) kernels.registers = pgd_step_ball_kernel<T, kNorm, Store::registers>;
  return launch_groups<T, kNorm>(p, p, kernels, all_aligned(p, SampleTile<T, kNorm, Store::looped>::kChunk), stream);
}

}  // namespace

int pgd_step_(const PgdStep& step, void* stream) {
  if (step.batch == 0 || step.size == 0) return cudaSuccess;
  if (!known_input(step)) return cudaErrorInvalidValue;
  if (step.norm == Norm::linf) {
    return with_storage(step.dtype,
                        [&](auto storage) FASTLIP_INLINE { return launch_linf<decltype(storage)>(step, stream); });
  }
  return with_arithmetic(step.dtype, [&](auto arithmetic) FASTLIP_INLINE {
    using T = decltype(arithmetic);
    return step.norm == Norm::l2 ? launch_ball<T, Norm::l2>(step, stream) : launch_ball<T, Norm::l1>(step, stream);
  });
}

const char* error_string(int error) {
  cudaGetLastError();  // it is reported here, and shall not be again by whoever asks next
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace fastlip::cuda
