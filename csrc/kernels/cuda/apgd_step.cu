// apgd_step_: Auto-PGD's bookkeeping, step, momentum and both projections.
//
// Floor: x, grad, x0 and x_prev read once, x and x_prev written once: 24 bytes an element in float32, 12 in 16 bits; 8
// (4) more where the iterate is the best so far and goes to x_best and grad_best; as many with what the model reads in
// 16 bits. A sample that restarts reads x_best
// and grad_best instead of x and grad. Operations, an element: Linf 18. L2: those of pgd_step_ twice, without a second
// norm of a gradient, and 6 for the momentum. L1: those of pgd_step_, and 2 at a checkpoint for the support.
//
// Every thread works out for itself what its sample does (apgd.h), from numbers that nobody writes until all of the
// sample's threads have read them. Linf: as many blocks a sample as it takes, each thread with 16 bytes of each
// operand; the last of the blocks to arrive, counted in `counters`, writes the sample's numbers. L2 and L1: a team a
// sample, as in pgd_step.cu. x is read again, from cache, where the momentum and
// x_prev need it.
#include "kernels/apgd.h"
#include "kernels/cuda/slice.cuh"

namespace fastlip::cuda {
namespace {

constexpr int kLinfThreads = 256;
constexpr int kStreamedThreads = 512;  // more would not leave registers enough

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

// --- Linf ------------------------------------------------------------------------------------------------------------
template <typename S, typename In, int kWidth>
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
    load<S>((back ? of.x_best() : of.x()) + at, valid, true, x);
    if (back) {
      load<S>(of.grad_best() + at, valid, true, grad);
    } else {
      load_ascent<S, In>(p, sample, at, valid, true, grad);
    }
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
    feed<In>(p, sample, at, valid, true, out);
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
template <typename S, typename In>
bool all_aligned(const ApgdStep& a, int64_t pack) {
  constexpr int64_t kBytes = sizeof(S);
  const int64_t unit = pack * kBytes < 16 ? pack * kBytes : 16;
  const auto fits = [&](const void* data, int64_t stride) {
    return aligned(data, a.step.batch > 1 ? stride * kBytes : 0, unit);
  };
  return all_aligned<S, In>(a.step, pack) && fits(a.x_prev, a.x_prev_stride) && fits(a.x_best, a.x_best_stride) &&
         fits(a.grad_best, a.grad_best_stride);
}

template <typename S, typename In>
cudaError_t launch_linf(const ApgdStep& a, void* stream) {
  constexpr int kWidth = 16 / sizeof(S);
  constexpr int64_t kMostBlocks = int64_t{1} << 30;
  const int width = all_aligned<S, In>(a, kWidth) ? kWidth : 1;
  const int64_t chunks = (a.step.size + width - 1) / width;
  const int64_t wanted = (chunks + kWarp - 1) / kWarp * kWarp;
  const int threads = static_cast<int>(wanted < kLinfThreads ? wanted : kLinfThreads);
  const int64_t blocks = (chunks + threads - 1) / threads;  // at most 2^31 elements a sample, so below 2^26
  const int64_t most = kMostBlocks / blocks;
  for (int64_t first = 0; first < a.step.batch; first += most) {
    const int64_t samples = a.step.batch - first < most ? a.step.batch - first : most;
    const auto config = configure(samples * blocks, threads, 0, stream);
    const auto kernel = width == 1 ? apgd_step_linf_kernel<S, In, 1> : apgd_step_linf_kernel<S, In, kWidth>;
    const auto error = cudaLaunchKernelEx(&config, kernel, a, first, static_cast<int>(blocks));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// --- L2 and L1 -------------------------------------------------------------------------------------------------------
// A block's slice of a sample; the move starts from x and grad, or from the best iterate.
template <typename S, typename In, Norm kNorm, bool kStaged>
class ApgdSlice : public Slice<S, In, kNorm, kStaged> {
 public:
  using Base = Slice<S, In, kNorm, kStaged>;
  using Base::kChunk;
  using typename Base::Chunk, typename Base::T;

  __device__ ApgdSlice(const ApgdStep& a, const Shares& shares, int64_t sample, unsigned char* shared)
      : Base(a.step, shares, sample, shared), of_{a, sample} {}

  // x and grad are the best so far.
  __device__ void keep() const {
    Chunk x, grad;
    this->each([&](int64_t at, int valid) {
      load<S>(of_.x() + at, valid, this->wide_, x);
      this->ascent(at, valid, grad);
      store<S>(of_.x_best() + at, valid, this->wide_, x, x);
      store<S>(of_.grad_best() + at, valid, this->wide_, grad, grad);
    });
  }
  // How many elements of this thread differ between the best iterate and x0.
  __device__ double support(bool improved) const {
    Chunk x, x0;
    int count = 0;
    this->each([&](int64_t at, int valid) {
      load<S>((improved ? of_.x() : of_.x_best()) + at, valid, this->wide_, x);
      load<S>(of_.x0() + at, valid, this->wide_, x0);  // beyond `valid` both are 0
#pragma unroll
      for (int i = 0; i < kChunk; ++i) count += x[i] != x0[i] ? 1 : 0;
    });
    return count;
  }
  __device__ void start_from_best() {
    this->x_ = of_.x_best();
    this->grad_ = of_.grad_best();
  }
  __device__ void origin(int64_t at, int valid, Chunk& x) const { load<S>(this->x_ + at, valid, this->wide_, x); }
  __device__ void previous(int64_t at, int valid, Chunk& last) const {
    load<S>(of_.x_prev() + at, valid, this->wide_, last);
  }
  // In place of v, where it is staged.
  __device__ void replace(int64_t at, const Chunk& v) const {
    if constexpr (kStaged) this->put(this->staged_v_, at, v);
  }
  // x_prev <- where the step started, x <- out.
  __device__ void finish(int64_t at, int valid, const Chunk& out, const Chunk& x0) const {
    Chunk x;
    origin(at, valid, x);
    store<S>(of_.x_prev() + at, valid, this->wide_, x, x);
    store<S>(of_.x() + at, valid, this->wide_, out, x0);
    feed<In>(this->p_, this->sample_, at, valid, this->wide_, out);
  }

 private:
  Operands<S> of_;
};

// The projection of one element, given the search's result.
template <typename Search, typename Here, typename T>
__device__ T projected(const Search& search, const Here& here, T v, T x0, T lo, T hi) {
  if (!search.inside) {
    const Gap<T> gap = gap_of(v, x0, lo, hi);
    v = x0 + with_sign(Search::shrunk(gap, here), gap.sign);
  }
  return clamp(v, lo, hi);
}

// Continues from the sums of Search::begin; gaps(add) calls add(gap) for every element of this thread.
template <typename Search, typename T, typename Gaps>
__device__ Search searched(Team& team, T eps, double (&sums)[Search::kSums], Gaps gaps) {
  team.reduce(sums, Sum());
  Search search(eps, sums);
  for (bool more = search.searching(); more; more = search.update(sums)) {
    const auto here = search.at();
    for (double& sum : sums) sum = 0;
    gaps([&](const Gap<T>& gap) { Search::add(gap, here, sums); });
    team.reduce(sums, Sum());
  }
  return search;
}

template <typename S, typename In, Norm kNorm, bool kStaged>
__global__ void __launch_bounds__(kStaged ? kMaxThreads : kStreamedThreads, 1)
    apgd_step_ball_kernel(const __grid_constant__ ApgdStep a, const __grid_constant__ Shares shares) {
  using T = Arith<S>;
  using Search = std::conditional_t<kNorm == Norm::l2, L2Search<T>, L1Search<T>>;
  using Mine = ApgdSlice<S, In, kNorm, kStaged>;
  using Chunk = typename Mine::Chunk;
  constexpr int kChunk = Mine::kChunk;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Team::Memory memory;
  const PgdStep& p = a.step;
  const int64_t sample = shares.first + blockIdx.x / shares.ranks;
  if (p.active != nullptr && p.active[sample] == 0) return;
  Team team(memory, shares.ranks);
  Mine slice(a, shares, sample, shared);

  const T eps = radius_of(number<T>(p.eps, sample));
  ApgdRow<T> row = read_apgd_row<T>(a, sample);
  const ApgdMove<T> outcome = apgd_begin(row);
  bool restart = false;
  if (outcome.window > 0) {
    if constexpr (kNorm == Norm::l1) {
      double support[1] = {slice.support(outcome.improved)};
      team.reduce(support, Sum());
      restart = apgd_check_l1(row, static_cast<int64_t>(support[0]), eps);
    } else {
      restart = apgd_check(row, outcome.window, a.rho);
    }
  }
  if (outcome.improved) {
    slice.keep();
  } else if (restart) {
    slice.start_from_best();
  }
  team.sync();  // every thread has read the sample's numbers; writing them now frees their registers
  if (threadIdx.x == 0 && blockIdx.x % shares.ranks == 0) write_apgd_row(a, sample, row, restart);
  const T step = finite_or_zero(row.step_size);
  const int32_t kept = row.kept < 1 ? 1 : row.kept > p.size ? static_cast<int32_t>(p.size) : row.kept;
  const Move<Ranked<S, In>> move = find_move(slice, team, step, kept);

  Chunk v, x0, lo, hi;
  double sums[Search::kSums] = {};
  slice.each([&](int64_t at, int valid) {
    slice.fetch_values(at, valid, move, v, x0);
    slice.bounds(at, valid, lo, hi);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) Search::begin(gap_of(v[i], x0[i], lo[i], hi[i]), sums);
  });
  const Search search = searched<Search>(team, eps, sums, [&](auto add) {
    slice.each([&](int64_t at, int valid) {
      slice.values(at, valid, move, v, x0);
      slice.bounds(at, valid, lo, hi);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) add(gap_of(v[i], x0[i], lo[i], hi[i]));
    });
  });
  const auto found = search.at();

  if (kNorm == Norm::l1 || outcome.first) {
    slice.each([&](int64_t at, int valid) {
      slice.values(at, valid, move, v, x0);
      slice.bounds(at, valid, lo, hi);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) v[i] = projected(search, found, v[i], x0[i], lo[i], hi[i]);
      slice.finish(at, valid, v, x0);
    });
  } else {
    const HeavyBall<T> heavy(a.momentum);
    // v <- the point after the momentum, from v as it was.
    const auto push = [&](int64_t at, int valid) {
      Chunk x, last;
      slice.origin(at, valid, x);
      slice.previous(at, valid, last);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const T z = projected(search, found, v[i], x0[i], lo[i], hi[i]);
        v[i] = i < valid ? heavy(x[i], z, last[i]) : T(0);  // what does not exist counts for nothing in the sums
      }
    };
    const auto values = [&](int64_t at, int valid) {
      slice.values(at, valid, move, v, x0);
      slice.bounds(at, valid, lo, hi);
      if constexpr (!kStaged) push(at, valid);
    };
    for (double& sum : sums) sum = 0;
    slice.each([&](int64_t at, int valid) {
      slice.values(at, valid, move, v, x0);
      slice.bounds(at, valid, lo, hi);
      push(at, valid);
      slice.replace(at, v);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) Search::begin(gap_of(v[i], x0[i], lo[i], hi[i]), sums);
    });
    const Search again = searched<Search>(team, eps, sums, [&](auto add) {
      slice.each([&](int64_t at, int valid) {
        values(at, valid);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) add(gap_of(v[i], x0[i], lo[i], hi[i]));
      });
    });
    const auto here = again.at();
    slice.each([&](int64_t at, int valid) {
      values(at, valid);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) v[i] = projected(again, here, v[i], x0[i], lo[i], hi[i]);
      slice.finish(at, valid, v, x0);
    });
  }
  team.leave();
}

template <typename S, typename In, Norm kNorm>
cudaError_t launch_ball(const ApgdStep& a, void* stream) {
  const bool wide = all_aligned<S, In>(a, ApgdSlice<S, In, kNorm, true>::kChunk);
  return launch_teams<Arith<S>>(a, a.step, apgd_step_ball_kernel<S, In, kNorm, true>,
                                apgd_step_ball_kernel<S, In, kNorm, false>, kStreamedThreads, wide, stream);
}

}  // namespace

int apgd_step_(const ApgdStep& step, void* stream) {
  if (step.step.batch == 0 || step.step.size == 0) return cudaSuccess;
  return with_storages(step.step, [&](auto storage, auto input) {
    using S = decltype(storage);
    using In = decltype(input);
    if (step.step.norm == Norm::linf) return launch_linf<S, In>(step, stream);
    return step.step.norm == Norm::l2 ? launch_ball<S, In, Norm::l2>(step, stream)
                                      : launch_ball<S, In, Norm::l1>(step, stream);
  });
}

}  // namespace fastlip::cuda
