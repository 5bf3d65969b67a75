// A sample in L2 or L1 and the team that shares it: its operands, staged on chip where they fit, its move, its launch.
#pragma once
#include "kernels/cuda/ball.h"
#include "kernels/cuda/team.cuh"

namespace fastlip::cuda {
namespace {

// Whether every sample of every operand may be accessed in units of `pack` elements, at most 16 bytes of storage.
template <typename S, typename In>
bool all_aligned(const PgdStep& p, int64_t pack) {
  const bool many = p.batch > 1;
  const auto fits = [&](const void* data, int64_t stride, int64_t bytes) {
    return data == nullptr || aligned(data, many ? stride * bytes : 0, pack * bytes < 16 ? pack * bytes : 16);
  };
  constexpr int64_t kStorage = sizeof(S), kAscent = sizeof(Ascent<S, In>), kArith = sizeof(Arith<S>);
  return fits(p.x, p.x_stride, kStorage) && fits(p.grad, p.grad_stride, kAscent) && fits(p.x0, p.x0_stride, kStorage) &&
         fits(p.lo.data, p.lo.stride, kArith) && fits(p.hi.data, p.hi.stride, kArith) &&
         fits(p.input, p.input_stride, kAscent) && fits(p.mean.data, 0, kArith) && fits(p.std.data, 0, kArith);
}

// How a sample is shared out.
struct Shares {
  int64_t first;  // sample of block 0
  int64_t slice;  // elements a block, a whole number of chunks
  int ranks;      // blocks a sample
  bool wide;
};

// A block's slice of one sample. kStaged: v and x0 lie in shared memory once each thread has put its own chunks there.
// In: storage of what the model reads, or NoInput.
template <typename S, typename In, Norm kNorm, bool kStaged>
class Slice {
 public:
  using T = Arith<S>;
  using Ranks = Ranked<S, In>;
  static constexpr bool kFed = !std::is_same_v<In, NoInput>;  // there is a gradient, then
  static constexpr int kChunk = 16 / sizeof(T);  // 16 bytes in shared memory, as much or half of it in device memory
  using Chunk = T[kChunk];

  __device__ Slice(const PgdStep& p, const Shares& shares, int64_t sample, unsigned char* shared)
      : p_(p),
        sample_(sample),
        x_(static_cast<S*>(p.x) + sample * p.x_stride),
        grad_(kFed || p.grad == nullptr ? nullptr : static_cast<const S*>(p.grad) + sample * p.grad_stride),
        x0_(static_cast<const S*>(p.x0) + sample * p.x0_stride),
        lo_(p.lo, sample),
        hi_(p.hi, sample),
        begin_(static_cast<int64_t>(blockIdx.x % shares.ranks) * shares.slice),
        end_(begin_ + shares.slice < p.size ? begin_ + shares.slice : p.size),
        wide_(shares.wide),
        staged_v_(reinterpret_cast<T*>(shared)),
        staged_x0_(staged_v_ + shares.slice) {}

  // body(offset, elements that exist) for each chunk of this thread.
  template <typename Body>
  __device__ void each(Body body) const {
    for (int64_t at = begin_ + threadIdx.x * kChunk; at < end_; at += blockDim.x * kChunk) {
      body(at, static_cast<int>(end_ - at < kChunk ? end_ - at : kChunk));
    }
  }

  // The gradient, for the first time: it waits in v's place, and x0 is fetched along with it.
  __device__ void fetch_gradient(int64_t at, int valid, Chunk& grad) const {
    ascent(at, valid, grad);
    if constexpr (kStaged) {
      Chunk x0;
      load<S>(x0_ + at, valid, wide_, x0);
      put(staged_v_, at, grad);
      put(staged_x0_, at, x0);
    }
  }
  // The gradient again, until fetch_values.
  __device__ void gradient(int64_t at, int valid, Chunk& grad) const {
    if constexpr (kStaged) {
      get(staged_v_, at, grad);
    } else {
      ascent(at, valid, grad);
    }
  }
  // v = x + move and x0, for the first time.
  __device__ void fetch_values(int64_t at, int valid, const Move<Ranks>& move, Chunk& v, Chunk& x0) const {
    load<S>(x_ + at, valid, wide_, v);
    if (kStaged && climbs()) {
      get(staged_x0_, at, x0);
    } else {
      load<S>(x0_ + at, valid, wide_, x0);
    }
    if (climbs()) {
      Chunk grad;
      gradient(at, valid, grad);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) v[i] = moved<Ranks, kNorm>(v[i], grad[i], move);
    }
    if constexpr (kStaged) {
      put(staged_v_, at, v);
      if (!climbs()) put(staged_x0_, at, x0);
    }
  }
  // The same again.
  __device__ void values(int64_t at, int valid, const Move<Ranks>& move, Chunk& v, Chunk& x0) const {
    if constexpr (kStaged) {
      get(staged_v_, at, v);
      get(staged_x0_, at, x0);
    } else {
      fetch_values(at, valid, move, v, x0);
    }
  }
  __device__ void bounds(int64_t at, int valid, Chunk& lo, Chunk& hi) const {
    lo_.load(at, valid, wide_, lo);
    hi_.load(at, valid, wide_, hi);
  }
  __device__ void write(int64_t at, int valid, const Chunk& v, const Chunk& x0) const {
    store<S>(x_ + at, valid, wide_, v, x0);
    feed<In>(p_, sample_, at, valid, wide_, v);
  }

 protected:
  __device__ bool climbs() const { return kFed || grad_ != nullptr; }
  __device__ void ascent(int64_t at, int valid, Chunk& grad) const {
    if (!kFed || grad_ != nullptr) {
      load<S>(grad_ + at, valid, wide_, grad);
    } else {
      load_ascent<S, In>(p_, sample_, at, valid, wide_, grad);
    }
  }
  __device__ void put(T* staged, int64_t at, const Chunk& values) const {
    Pack<T, kChunk> pack;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) pack.at[i] = values[i];
    pack.store(staged + (at - begin_));
  }
  __device__ void get(const T* staged, int64_t at, Chunk& values) const {
    const auto pack = Pack<T, kChunk>::load(staged + (at - begin_));
#pragma unroll
    for (int i = 0; i < kChunk; ++i) values[i] = pack.at[i];
  }

  const PgdStep& p_;
  int64_t sample_;
  S* x_;
  const S* grad_;  // with respect to x; null where the one at hand is not
  const S* x0_;
  Bound<T> lo_, hi_;
  int64_t begin_, end_;
  bool wide_;
  T* staged_v_;
  T* staged_x0_;
};

// Steepest ascent in L2: what step / ||grad|| multiplies. Squares of float are exact in double's range; a double
// gradient whose squares are not is scaled by a power of two first.
template <typename S, typename In, bool kStaged>
__device__ Move<Ranked<S, In>> find_move(const Slice<S, In, Norm::l2, kStaged>& slice, Team& team, double step,
                                         double) {
  using T = Arith<S>;
  using Ranks = Ranked<S, In>;
  T grad[Slice<S, In, Norm::l2, kStaged>::kChunk];
  double sums[2] = {};  // squares; the largest magnitude
  slice.each([&](int64_t at, int valid) {
    slice.fetch_gradient(at, valid, grad);
    for (const T g : grad) {
      const double size = finite_or_zero(g);
      sums[0] += size * size;
      if constexpr (std::is_same_v<T, double>) sums[1] = greater(sums[1], magnitude(size));
    }
  });
  double squares[1] = {sums[0]};
  team.reduce(squares, Sum());
  if constexpr (std::is_same_v<T, double>) {
    if (!(squares[0] > 1e-200 && squares[0] < 1e200)) {
      double peak[1] = {sums[1]};
      team.reduce(peak, Max());
      if (peak[0] == 0) return {};
      const int exponent = ilogb(peak[0]);
      squares[0] = 0;
      slice.each([&](int64_t at, int valid) {
        slice.gradient(at, valid, grad);
        for (const T g : grad) {
          const double size = ldexp(finite_or_zero(g), -exponent);
          squares[0] += size * size;
        }
      });
      team.reduce(squares, Sum());
      return l2_move<Ranks>(step, squares[0], exponent);
    }
  }
  return l2_move<Ranks>(step, squares[0], 0);
}

// Steepest ascent in L1: the threshold that `kept` magnitudes reach, and what each such element moves by.
template <typename S, typename In, bool kStaged>
__device__ Move<Ranked<S, In>> find_move(const Slice<S, In, Norm::l1, kStaged>& slice, Team& team, double step,
                                         double kept) {
  using T = Arith<S>;
  using Ranks = Ranked<S, In>;
  T grad[Slice<S, In, Norm::l1, kStaged>::kChunk];
  double nonzero[1] = {}, peak[1] = {};
  slice.each([&](int64_t at, int valid) {
    slice.fetch_gradient(at, valid, grad);
    for (const T g : grad) {
      const T size = magnitude(finite_or_zero(g));
      nonzero[0] += size > T(0) ? 1 : 0;
      peak[0] = greater(peak[0], static_cast<double>(size));
    }
  });
  team.reduce(nonzero, Sum());
  team.reduce(peak, Max());
  if (nonzero[0] == 0) return {};
  KeySearch<Ranks> search(static_cast<T>(peak[0]), nonzero[0]);
  while (!search.done(kept)) {
    const Key<Ranks> candidates[3] = {search.candidate(0), search.candidate(1), search.candidate(2)};
    int counts[3] = {};
    slice.each([&](int64_t at, int valid) {
      slice.gradient(at, valid, grad);
      for (const T g : grad) {
        const Key<Ranks> key = key_of<Ranks>(g);
#pragma unroll
        for (int i = 0; i < 3; ++i) counts[i] += key >= candidates[i] ? 1 : 0;
      }
    });
    double reached[3] = {static_cast<double>(counts[0]), static_cast<double>(counts[1]),
                         static_cast<double>(counts[2])};
    team.reduce(reached, Sum());
    search.update(reached, kept);
  }
  return {static_cast<T>(step / search.count), 0, search.low};
}

// Launches a kernel with a team for each sample; `staged` where v and x0 of a slice fit in shared memory, in T.
template <typename T, typename Parameters>
cudaError_t launch_teams(const Parameters& parameters, const PgdStep& p, void (*staged_kernel)(Parameters, Shares),
                         void (*streamed_kernel)(Parameters, Shares), int streamed_threads, bool wide, void* stream) {
  constexpr int64_t kChunk = 16 / sizeof(T), kBytes = 2 * sizeof(T);
  constexpr int kMostRanks = 8;  // the largest cluster that every device with clusters accepts
  int device = 0, shared_limit = 0;
  if (const auto error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const auto error = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      error != cudaSuccess) {
    return error;
  }
  // Whether this code knows clusters is a matter of what it was compiled for: PTX for sm_80 runs on an sm_90, too.
  cudaFuncAttributes compiled = {};
  if (const auto error = cudaFuncGetAttributes(&compiled, staged_kernel); error != cudaSuccess) return error;
  const bool clustered = compiled.ptxVersion >= 90;
  const int64_t capacity = (shared_limit - static_cast<int64_t>(sizeof(Team::Memory))) / kBytes;
  const auto slice_of = [&](int ranks) { return ((p.size + ranks - 1) / ranks + kChunk - 1) / kChunk * kChunk; };
  int ranks = 1;
  while (slice_of(ranks) > capacity && clustered && ranks < kMostRanks) ranks *= 2;
  bool staged = slice_of(ranks) <= capacity;
  if (staged) {  // always the same number, so that threads launching other sizes do not undercut this one
    const auto error = cudaFuncSetAttribute(staged_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(capacity * kBytes));
    if (error != cudaSuccess) return error;
  }

  constexpr int64_t kLeast = 64, kChunksEach = 3;  // 3 x 32 x 32 in float32: 256 threads, three chunks each
  const auto threads_of = [&](int64_t slice, int64_t most) {
    const int64_t wanted = (slice / kChunk / kChunksEach + kWarp - 1) / kWarp * kWarp;
    return static_cast<int>(wanted < kLeast ? kLeast : wanted > most ? most : wanted);
  };
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  if (staged && ranks > 1) {
    // Where a GPU is shared or partitioned, no group of multiprocessors may have room for a whole cluster.
    cluster.val.clusterDim.x = static_cast<unsigned>(ranks);
    auto config = configure(ranks, threads_of(slice_of(ranks), kMaxThreads),
                            static_cast<size_t>(slice_of(ranks) * kBytes), stream);
    config.attrs = &cluster;
    config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, staged_kernel, &config) != cudaSuccess) {
      cudaGetLastError();  // not this launch's error: the streamed kernel needs no cluster
      clusters = 0;
    }
    staged = clusters > 0;
  }
  if (!staged) ranks = 1;
  const int64_t slice = slice_of(ranks);
  const int threads = threads_of(slice, staged ? kMaxThreads : streamed_threads);
  const auto kernel = staged ? staged_kernel : streamed_kernel;
  const size_t bytes = staged ? static_cast<size_t>(slice * kBytes) : 0;

  constexpr int64_t kMostBlocks = int64_t{1} << 30;
  Shares shares{0, slice, ranks, wide};
  for (; shares.first < p.batch; shares.first += kMostBlocks / ranks) {
    const int64_t samples = p.batch - shares.first < kMostBlocks / ranks ? p.batch - shares.first : kMostBlocks / ranks;
    auto config = configure(samples * ranks, threads, bytes, stream);
    config.attrs = &cluster;
    config.numAttrs = ranks > 1 ? 1 : 0;
    if (const auto failed = cudaLaunchKernelEx(&config, kernel, parameters, shares); failed != cudaSuccess)
      return failed;
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace fastlip::cuda
