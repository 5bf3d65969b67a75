// apgd_step_: Auto-PGD's bookkeeping, step, momentum and both projections.
//
// Floor: x, grad, x0 and x_prev read once, x and x_prev written once: 24 bytes an element in float32, 12 in 16 bits; 8
// (4) more where the iterate is the best so far and goes to x_best and grad_best; as many with what the model reads in
// 16 bits. A sample that restarts reads x_best and grad_best instead of x and grad.
//
// Every thread works out for itself what its sample does (apgd.h), from numbers that nobody writes until all of the
// sample's threads have read them. Linf: as many blocks a sample as it takes, each thread with 16 bytes of each
// operand; the last of the blocks to arrive, counted in `counters`, writes the sample's numbers. L2 and L1: a group a
// sample, as in pgd_step.cu. x is read again, from cache, where the momentum, x_prev and the best so far need it.
#include "kernels/apgd.h"
#include "kernels/cuda/ball_launch.cuh"
#include "kernels/cuda/ball_passes.cuh"

namespace fastlip::cuda {
namespace {

constexpr int kLinfThreads = 256;

// One sample's operands, their addresses worked out where they are used: registers are what limits these kernels.
template <typename S>
struct Operands {
  const ApgdStep& a;
  int64_t sample;

  __device__ S* x() const { return static_cast<S*>(a.step.x) + sample * a.step.x_stride; }
  __device__ S* x_prev() const { return static_cast<S*>(a.x_prev) + sample * a.x_prev_stride; }
  __device__ S* x_best() const { return static_cast<S*>(a.x_best) + sample * a.x_best_stride; }
  __device__ S* grad_best() const { return static_cast<S*>(a.grad_best) + sample * a.grad_best_stride; }
  __device__ const S* x0() const { return static_cast<const S*>(a.step.x0) + sample * a.step.x0_stride; }
};

// x + momentum (z - x) + (1 - momentum) (x - last), rounded after each operation in this order.
template <typename T>
struct HeavyBall {
  T momentum, rest;
  __device__ explicit HeavyBall(double weight) : momentum(static_cast<T>(weight)), rest(static_cast<T>(1 - weight)) {}
  __device__ T operator()(T x, T z, T last) const {
    const T ahead = multiply_rn(add_rn(z, -x), momentum), behind = multiply_rn(add_rn(x, -last), rest);
    return add_rn(add_rn(x, ahead), behind);
  }
};

// The gradient with respect to x, at a sample's element `at`.
template <typename S, int kCount>
__device__ __forceinline__ void load_ascent(const PgdStep& p, int64_t sample, int64_t at, int valid,
                                            Arith<S> (&grad)[kCount]) {
  with_ascent<S>(p, [&](auto stored) FASTLIP_INLINE {
    using G = decltype(stored);
    load<G>(static_cast<const G*>(p.grad) + sample * p.grad_stride + at, valid, true, grad);
  });
  look_at(p, sample, grad);
  if constexpr (std::is_same_v<S, float>) {
    if (p.input == nullptr) return;
    float std[kCount];
    Bound<float>(p.std, sample).load(at, valid, true, std);
#pragma unroll
    for (int i = 0; i < kCount; ++i) grad[i] = i < valid ? divide_rn(grad[i], std[i]) : 0;
  }
}

// --- Linf ------------------------------------------------------------------------------------------------------------
template <typename S, int kWidth>
__global__ void __launch_bounds__(kLinfThreads)
    apgd_step_linf_kernel(const __grid_constant__ ApgdStep a, int64_t first_sample, int blocks) {
  using T = Arith<S>;
  const PgdStep& p = a.step;
  const int64_t sample = first_sample + blockIdx.x / static_cast<unsigned>(blocks);
  const int64_t block = blockIdx.x % static_cast<unsigned>(blocks);
  if (p.active != nullptr && p.active[sample] == 0) return;

  const int64_t at = (block * blockDim.x + threadIdx.x) * kWidth;
  if (at < p.size) {
    const int valid = static_cast<int>(p.size - at < kWidth ? p.size - at : kWidth);
    const Operands<S> of{a, sample};
    ApgdRow<T> row = read_apgd_row<T>(a, sample);
    const ApgdMove<T> move = apgd_begin(row);
    const bool restart = move.window > 0 && apgd_check(row, move.window, a.rho);
    const bool back = restart && !move.improved;  // else the best iterate is the one at hand
    T x[kWidth], grad[kWidth], x0[kWidth], lo[kWidth], hi[kWidth], out[kWidth], last[kWidth];
    const bool better = is_better(p, sample);
    load<S>((back ? of.x_best() : of.x()) + at, valid, true, x);
    if (!back || p.not_finite != nullptr) load_ascent<S>(p, sample, at, valid, grad);
    if (back) load<S>(of.grad_best() + at, valid, true, grad);
    if (better) save<S, kWidth>(p, sample, at, valid);
    load<S>(of.x0() + at, valid, true, x0);
    if (!move.first) load<S>(of.x_prev() + at, valid, true, last);
    Bound<T>(p.lo, sample).load(at, valid, true, lo);
    Bound<T>(p.hi, sample).load(at, valid, true, hi);
    if (move.improved) {
      store<S>(of.x_best() + at, valid, true, x, x);
      store<S>(of.grad_best() + at, valid, true, grad, grad);
    }
    store<S>(of.x_prev() + at, valid, true, x, x);
    const T eps = radius_of(number<T>(p.eps, sample)), step = finite_or_zero(row.step_size);
    const HeavyBall<T> heavy(a.momentum);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      out[i] = project_linf(add_rn(x[i], signed_step(grad[i], step)), x0[i], eps, lo[i], hi[i]);
      if (!move.first) out[i] = project_linf(heavy(x[i], out[i], last[i]), x0[i], eps, lo[i], hi[i]);
    }
    store<S>(of.x() + at, valid, true, out, x0);
    feed(p, sample, at, valid, true, out);
  }

  __syncthreads();  // all of the block have read the sample's numbers
  if (threadIdx.x != 0) return;
  if (blocks > 1) {
    int32_t* const arrived = a.counters + sample * kApgdCounters + kArrived;
    __threadfence();
    if (atomicAdd(arrived, 1) != blocks - 1) return;
    __threadfence();
    *arrived = 0;
  }
  ApgdRow<T> row = read_apgd_row<T>(a, sample);
  const ApgdMove<T> move = apgd_begin(row);
  const bool restart = move.window > 0 && apgd_check(row, move.window, a.rho);
  write_apgd_row(a, sample, row, restart);
}

// Whether all operands may be accessed in units of `pack` elements.
bool all_fit(const ApgdStep& a, int64_t pack) {
  const int64_t bytes = bytes_of(a.step.dtype), unit = pack * bytes < 16 ? pack * bytes : 16;
  const auto fits = [&](const void* data, int64_t stride) {
    return aligned(data, a.step.batch > 1 ? stride * bytes : 0, unit);
  };
  return cuda::all_aligned(a.step, pack) && fits(a.x_prev, a.x_prev_stride) && fits(a.x_best, a.x_best_stride) &&
         fits(a.grad_best, a.grad_best_stride);
}

template <typename S>
cudaError_t launch_linf(const ApgdStep& a, void* stream) {
  constexpr int kWidth = 16 / sizeof(S);
  constexpr int64_t kMostBlocks = int64_t{1} << 30;
  const int width = all_fit(a, kWidth) ? kWidth : 1;
  const int64_t chunks = (a.step.size + width - 1) / width;
  const int64_t wanted = (chunks + kWarp - 1) / kWarp * kWarp;
  const int threads = static_cast<int>(wanted < kLinfThreads ? wanted : kLinfThreads);
  const int64_t blocks = (chunks + threads - 1) / threads;  // at most 2^31 elements a sample, so below 2^26
  const int64_t most = kMostBlocks / blocks;
  for (int64_t first = 0; first < a.step.batch; first += most) {
    const int64_t samples = a.step.batch - first < most ? a.step.batch - first : most;
    const auto config = configure(samples * blocks, threads, 0, stream);
    const auto kernel = width == 1 ? apgd_step_linf_kernel<S, 1> : apgd_step_linf_kernel<S, kWidth>;
    const auto error = cudaLaunchKernelEx(&config, kernel, a, first, static_cast<int>(blocks));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// --- L2 and L1 -------------------------------------------------------------------------------------------------------
template <typename T, Norm kNorm, Store kStore>
__global__ void __launch_bounds__(kThreads<kStore>, kStore == Store::registers ? 3 : 2)
    apgd_step_ball_kernel(const __grid_constant__ ApgdStep a, const __grid_constant__ Shares shares) {
  using Mine = SampleTile<T, kNorm, kStore>;
  using Batch = typename Mine::Batch;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ BallMemory<kNorm> memory;
  const PgdStep& p = a.step;
  const int64_t sample = shares.first + (kStore == Store::registers ? blockIdx.x : blockIdx.x / shares.ranks);
  if (p.active != nullptr && p.active[sample] == 0) return;
  CooperativeGroup group(memory.group, kStore == Store::registers ? 1 : shares.ranks);
  const T eps = radius_of(number<T>(p.eps, sample));
  Search<T, kNorm> search(eps);
  Mine tile(p, shares, sample, shared, search);
  const auto x_best = tile.operand(a.x_best, p.dtype, a.x_best_stride);
  const auto grad_best = tile.operand(a.grad_best, p.dtype, a.grad_best_stride);
  const auto x_prev = tile.operand(a.x_prev, p.dtype, a.x_prev_stride);

  ApgdRow<T> row = read_apgd_row<T>(a, sample);
  const ApgdMove<T> outcome = apgd_begin(row);
  bool restart = false;
  if (outcome.window > 0) {
    if constexpr (kNorm == Norm::l1) {
      auto best = tile.origin();
      if (!outcome.improved) best.data = x_best.data;
      const double support = group.reduce(tile.support(best));
      restart = apgd_check_l1(row, static_cast<int64_t>(support), eps);
    } else {
      restart = apgd_check(row, outcome.window, a.rho);
    }
  }
  const bool better = is_better(p, sample), back = restart && !outcome.improved;
  if (outcome.improved || better || (back && p.not_finite != nullptr)) {
    tile.keep(better, tile.operand(p.best, p.dtype, p.best_stride), outcome.improved, x_best, grad_best, back);
  }
  if (back) tile.start_from(x_best, grad_best);
  group.sync();  // every thread has read the sample's numbers; writing them now frees their registers
  if (threadIdx.x == 0 && blockIdx.x % shares.ranks == 0) write_apgd_row(a, sample, row, restart);
  const T step = finite_or_zero(row.step_size);
  const int32_t kept = row.kept < 1 ? 1 : row.kept > p.size ? static_cast<int32_t>(p.size) : row.kept;
  const Move<T> move = find_move(tile, group, memory, step, kept);

  const HeavyBall<T> heavy(a.momentum);
  Search<T, kNorm> aimed(eps);
  project_all(
      tile, group, move, search, kNorm == Norm::l1 || outcome.first ? 1 : 2, aimed,
      [&](Batch& batch) FASTLIP_INLINE {  // v <- the point after the momentum
        if constexpr (kNorm == Norm::l2) {
          project(aimed, tile, batch);
#pragma unroll
          for (int c = 0; c < Mine::kChunks; ++c) {
            const auto at = tile.at(batch, c);
            const int valid = tile.valid(at);  // what does not exist counts for nothing in the sums
            typename Mine::Chunk x, last;
            tile.load(tile.origin(), at, x);
            tile.load(x_prev, at, last);
#pragma unroll
            for (int i = 0; i < Mine::kChunk; ++i) {
              batch.v[c][i] = i < valid ? heavy(x[i], batch.v[c][i], last[i]) : T(0);
            }
          }
          tile.replace(batch);
        }
      },
      [&](const Batch& batch) FASTLIP_INLINE {  // x_prev <- where the step started, x <- v
        tile.copy(tile.origin(), x_prev, batch);
        tile.finish(batch);
      });
  tile.feed_all();
}

template <typename T, Norm kNorm>
cudaError_t launch_ball(const ApgdStep& a, void* stream) {
  Kernels<ApgdStep> kernels = {nullptr, apgd_step_ball_kernel<T, kNorm, Store::looped>};
  if constexpr (std::is_same_v<T, float>) kernels.registers = apgd_step_ball_kernel<T, kNorm, Store::registers>;
  return launch_groups<T, kNorm>(a, a.step, kernels, all_fit(a, SampleTile<T, kNorm, Store::looped>::kChunk), stream);
}

}  // namespace

int apgd_step_(const ApgdStep& step, void* stream) {
  const PgdStep& p = step.step;
  if (p.batch == 0 || p.size == 0) return cudaSuccess;
  if (!known_input(p)) return cudaErrorInvalidValue;
  if (p.norm == Norm::linf) {
    return with_storage(p.dtype,
                        [&](auto storage) FASTLIP_INLINE { return launch_linf<decltype(storage)>(step, stream); });
  }
  return with_arithmetic(p.dtype, [&](auto arithmetic) FASTLIP_INLINE {
    using T = decltype(arithmetic);
    return p.norm == Norm::l2 ? launch_ball<T, Norm::l2>(step, stream) : launch_ball<T, Norm::l1>(step, stream);
  });
}

}  // namespace fastlip::cuda
