// What the threads of a sample do together in L2 or L1: its move and its projection, pass by pass.
#pragma once
#include "kernels/cuda/sample_tile.cuh"

namespace fastlip::cuda {
namespace {

// Steepest ascent in L2: what step / ||grad|| multiplies. Where the sum of squares may be wrong in T, it is taken again
// of gradients scaled by a power of two.
template <typename T, Store kStore>
__device__ __forceinline__ Move<T> find_move(SampleTile<T, Norm::l2, kStore>& tile, CooperativeGroup& group,
                                             BallMemory<Norm::l2>&, T step, int) {
  using Rows = typename SampleTile<T, Norm::l2, kStore>::Rows;
  T scale = 1;
  int exponent = 0;
  for (int round = 0;; ++round) {
    Tally<T, 1> tally;
    T mine = 0;
    tile.gradients(round > 0, [&](const Rows& grad) FASTLIP_INLINE {
      tally.open();
      each(grad, [&](T g, int lane) FASTLIP_INLINE {
        const T size = g * scale;
        tally.parts[0][lane] += size * size;
        mine = greater(mine, magnitude(g));
      });
      tally.template close<1>();
    });
    group.reduce(tally.sums);
    if (round > 0 || safe_squares<T>(tally.sums[0])) return l2_move(step, tally.sums[0], exponent);
    group.reduce_peak(mine, 0);
    if (mine == 0) return {};
    exponent = fitting_exponent<T>(exponent_of(mine));
    scale = power_of_two<T>(-exponent);
  }
}

// The bin of the key search in which the `wanted`-th largest key is.
struct Found {
  int bin, beyond, within;
};

// Of the group's bins, which are complete; every warp by itself. Lane l has bins 8 l to 8 l + 7.
__device__ __forceinline__ Found find_bin(const int* bins, int wanted) {
  constexpr int kEach = KeySearch<float>::kBins / kWarp;
  const int lane = threadIdx.x % kWarp;
  int mine[kEach], sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; i += 4) {
    const int4 four = *reinterpret_cast<const int4*>(bins + lane * kEach + i);
    mine[i] = four.x;
    mine[i + 1] = four.y;
    mine[i + 2] = four.z;
    mine[i + 3] = four.w;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum += mine[i];
  int upper = sum;  // of this lane and those above
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int other = __shfl_down_sync(0xFFFFFFFFu, upper, offset);
    if (lane + offset < kWarp) upper += other;
  }
  // The highest lane that reaches it knows.
  const unsigned reaching = __ballot_sync(0xFFFFFFFFu, upper >= wanted);
  const int knowing = bit_width(reaching) - 1;
  Found found = {lane * kEach, upper - sum, 0};
  bool done = false;
#pragma unroll
  for (int i = kEach - 1; i >= 0; --i) {
    if (!done && (i == 0 || found.beyond + mine[i] >= wanted)) {
      found.bin += i;
      found.within = mine[i];
      done = true;
    }
    if (!done) found.beyond += mine[i];
  }
  return {__shfl_sync(0xFFFFFFFFu, found.bin, knowing), __shfl_sync(0xFFFFFFFFu, found.beyond, knowing),
          __shfl_sync(0xFFFFFFFFu, found.within, knowing)};
}

// Steepest ascent in L1: the threshold that `kept` magnitudes reach, and what each such element moves by.
template <typename T, Store kStore>
__device__ __forceinline__ Move<T> find_move(SampleTile<T, Norm::l1, kStore>& tile, CooperativeGroup& group,
                                             BallMemory<Norm::l1>& memory, T step, int kept) {
  using Rows = typename SampleTile<T, Norm::l1, kStore>::Rows;
  constexpr int kBins = KeySearch<T>::kBins;
  KeySearch<T> search(0, 0, kept);
  int nonzero = 0, turn = -1;  // below 0: a look at all of them, to begin with
  T mine = 0;
  for (;;) {
    int* const bins = memory.bins[turn < 0 ? 0 : turn];
    tile.gradients(turn >= 0, [&](const Rows& grad) FASTLIP_INLINE {
      if (turn < 0) {
        each(grad, [&](T g, int) FASTLIP_INLINE {
          nonzero += g != T(0) ? 1 : 0;
          mine = greater(mine, magnitude(g));
        });
      } else {
        each(grad, [&](T g, int) FASTLIP_INLINE {
          const Key<T> key = key_of(g);
          if (search.in(key)) atomicAdd(bins + search.bin(key), 1);
        });
      }
    });
    const bool counted = turn >= 0;
    turn = turn == 2 ? 0 : turn + 1;
    for (int i = threadIdx.x; i < kBins; i += blockDim.x) memory.bins[turn][i] = 0;
    if (!counted) {
      const int all =
          static_cast<int>(group.reduce_peak(mine, nonzero));  // with a barrier, so the first bins are clear
      if (all == 0) return {};
      search = KeySearch<T>(mine, all, kept);
    } else {
      group.sync();  // bins are complete, and those of the next pass clear
      const int* complete = bins;
      if (group.ranks() > 1) {
        for (int i = threadIdx.x; i < kBins; i += blockDim.x) {
          int sum = 0;
          for (int rank = 0; rank < group.ranks(); ++rank) sum += *cluster_address(bins + i, rank);
          memory.merged[i] = sum;
        }
        __syncthreads();
        complete = memory.merged;
      }
      const Found found = find_bin(complete, kept - search.above);
      search.update(found.bin, found.beyond, found.within);
    }
    if (search.done()) break;
  }
  return {0, step / static_cast<T>(search.count), bit_cast<T>(search.low)};
}

// Where the search led.
template <typename T, Norm kNorm, Store kStore>
__device__ __forceinline__ void project(const Search<T, kNorm>& search, const SampleTile<T, kNorm, kStore>& tile,
                                        typename SampleTile<T, kNorm, kStore>::Batch& batch) {
  if (!search.inside) {
#pragma unroll
    for (int c = 0; c < SampleTile<T, kNorm, kStore>::kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < SampleTile<T, kNorm, kStore>::kChunk; ++i) {
        batch.v[c][i] = search.projected(batch.v[c][i], batch.x0[c][i], batch.cap[c][i]);
      }
    }
  }
  tile.bounded(batch, [&](int c, int i, T lo, T hi) FASTLIP_INLINE { batch.v[c][i] = clamp(batch.v[c][i], lo, hi); });
}

// Projects v and calls finish(batch) where it is; in Auto-PGD's second of two rounds, from where push(batch) moves v
// given the first's result, `aimed`. One loop for all passes: what reads a batch is there once.
template <typename T, Norm kNorm, Store kStore, typename Push, typename Finish>
__device__ __forceinline__ void project_all(SampleTile<T, kNorm, kStore>& tile, CooperativeGroup& group,
                                            const Move<T>& move, Search<T, kNorm>& search, int rounds,
                                            Search<T, kNorm>& aimed, Push push, Finish finish) {
  using Mine = SampleTile<T, kNorm, kStore>;
  using Batch = typename Mine::Batch;
  constexpr int kSums = Search<T, kNorm>::kSums;
  const auto each_of = [](const Batch& batch, auto body) FASTLIP_INLINE {
#pragma unroll
    for (int c = 0; c < Mine::kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < Mine::kChunk; ++i) body(batch.v[c][i], batch.x0[c][i], batch.cap[c][i], i);
    }
  };
  const Search<T, kNorm> fresh = search;
  bool begins = true, ends = false;
  for (int round = 0, pass = 0;; ++pass) {
    Tally<T, 2> tally;
    T mine = 0;
    tile.values(pass > 0, move, [&](Batch& batch) FASTLIP_INLINE {
      if (round > 0 && (begins || !tile.kept())) push(batch);
      if (ends) {
        project(search, tile, batch);
        finish(batch);
      } else if (begins) {
        tally.open();
        each_of(batch, [&](T v, T x0, T cap, int i) FASTLIP_INLINE {
          const T size = search.begin(v, x0, cap, tally, i);
          if constexpr (kNorm == Norm::l2) mine = greater(mine, size);
        });
        tally.template close<2>();
      } else {
        tally.open();
        each_of(batch, [&](T v, T x0, T cap, int i) FASTLIP_INLINE { search.add(v, x0, cap, tally, i); });
        tally.template close<kSums>();
      }
    });
    if (ends) return;
    bool more;
    if (begins) {
      const double free = group.reduce(tally.sums, tally.count);
      more = search.start(tally.sums, free);
      if constexpr (kNorm == Norm::l2) {
        if (more && search.far(tally.sums)) {
          group.reduce_peak(mine, 0);
          search.restart(mine);
        }
      }
      begins = false;
    } else {
      double sums[kSums];
#pragma unroll
      for (int k = 0; k < kSums; ++k) sums[k] = tally.sums[k];
      const double count = group.reduce(sums, tally.count);
      more = search.update(sums, count);
    }
    if (more) continue;
    if (++round == rounds) {
      --round;
      ends = true;
    } else {
      aimed = search;
      search = fresh;
      begins = true;
    }
  }
}

}  // namespace
}  // namespace fastlip::cuda
