// A sample in L2 or L1 and the team that shares it: its operands, kept on chip where they fit, its move, its
// projection, its launch.
#pragma once
#include "kernels/cuda/ball.h"
#include "kernels/cuda/team.cuh"

namespace fastlip::cuda {
namespace {

// Where v = x + move and x0 are between passes: with each thread, or a batch at a time in shared memory (each thread
// reading back only what it wrote itself), or nowhere, so that every pass reads and computes them again.
enum class Store { registers, looped };

// Chunks that a thread handles at a time, all loads before the first use: in registers that is all it has.
template <typename T, Store kStore>
constexpr int kBatch = kStore == Store::registers ? 6
                       : std::is_same_v<T, float> ? 2
                                                  : 1;
template <Store kStore>
constexpr int kThreads = kStore == Store::registers ? 128 : kMaxThreads;

// How a sample is shared out.
struct Shares {
  int64_t first;  // sample of block 0
  int64_t slice;  // elements a block, a whole number of chunks
  int ranks;      // blocks a sample
  bool staged;    // in shared memory, where it is not in registers
  bool wide;      // chunks may be accessed as one
};

// Shared memory beside what is staged.
template <Norm kNorm>
struct BallMemory {
  Team::Memory team;
};
template <>
struct BallMemory<Norm::l1> {
  static constexpr int kBins = KeySearch<float>::kBins;
  Team::Memory team;
  alignas(16) int bins[3][kBins];  // in turn: cleared, counted into, read
  alignas(16) int merged[kBins];
};

template <typename T, Norm kNorm>
using Search = std::conditional_t<kNorm == Norm::l2, L2Search<T>, L1Search<T>>;

// A block's slice of one sample. Chunks of 16 bytes of T go round the threads in the same way whatever the operands'
// alignment, strides and types. Offsets are relative to the slice.
template <typename T, Norm kNorm, Store kStore>
class Slice {
 public:
  static constexpr int kChunk = 16 / sizeof(T), kChunks = kBatch<T, kStore>;
  using Offset = int;
  using Chunk = T[kChunk];
  using Rows = Chunk[kChunks];
  struct Batch {
    Rows v, x0, cap;
    Offset first;  // of its first chunk
  };
  struct Operand {
    void* data;  // at the slice
    DType dtype;
  };

  __device__ Slice(const PgdStep& p, const Shares& shares, int64_t sample, unsigned char* shared,
                   const Search<T, kNorm>& search)
      : p_(p),
        search_(search),
        sample_(sample),
        begin_(kStore == Store::registers ? 0 : static_cast<int64_t>(blockIdx.x % shares.ranks) * shares.slice),
        length_(static_cast<Offset>(p.size - begin_ < shares.slice ? (p.size > begin_ ? p.size - begin_ : 0)
                                                                   : shares.slice)),
        wide_(shares.wide),
        staged_(kStore == Store::looped && shares.staged),
        staged_v_(reinterpret_cast<T*>(shared)),
        staged_x0_(staged_v_ + shares.slice),
        lo_(p.lo, sample),
        hi_(p.hi, sample) {
    batch_.first = begin();
    ragged_ = !wide_ || length_ % kChunk != 0;
    x_ = operand(p.x, p.dtype, p.x_stride);
    x0_ = operand(p.x0, p.dtype, p.x0_stride);
    grad_ = operand(const_cast<void*>(p.grad), p.input == nullptr ? p.dtype : p.input_dtype, p.grad_stride);
    climbs_ = p.grad != nullptr;
    divided_ = p.input != nullptr;
  }

  __device__ Operand operand(const void* data, DType dtype, int64_t stride) const {
    const int64_t bytes = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
    return {static_cast<char*>(const_cast<void*>(data)) + (sample_ * stride + begin_) * bytes, dtype};
  }

  // Start from another point than x, whose gradient is with respect to x.
  __device__ void start_from(const Operand& x, const Operand& grad) {
    x_ = x;
    grad_ = grad;
    divided_ = false;
  }
  // Copy x and its gradient, which is finite or not, to the best so far.
  __device__ __forceinline__ void keep(const Operand& x_best, const Operand& grad_best) const {
#pragma unroll 1
    for (Offset here = begin(); here < length_; here += stride()) {
      Chunk x, grad[1];
      load(x_, here, x);
      fetch(grad_, here, grad);
      ascend(here, grad);
      write(x_best, here, x, x);
      write(grad_best, here, grad[0], grad[0]);
    }
  }

  // --- passes: body(batch) ---
  // The gradient, 0 where it is not finite: `again` after the first time, and before `moves`.
  template <typename Body>
  __device__ __forceinline__ void gradients(bool again, Body body) {
    if constexpr (kStore == Store::registers) {
      if (!again) {
        fetch(grad_, batch_.first, batch_.cap);
        fetch(x0_, batch_.first, batch_.x0);
        fetch(x_, batch_.first, batch_.v);
        prepare(batch_.first, batch_.cap);
      }
      forget(batch_.first, batch_.cap);
      body(batch_.cap);
    } else {
#pragma unroll 1
      for (Offset first = begin(); first < length_; first += stride() * kChunks) {
        Rows grad;
        if (staged_ && again) {
          get(staged_v_, first, grad);
        } else {
          Rows x0;
          fetch(grad_, first, grad);
          if (staged_) fetch(x0_, first, x0);
          prepare(first, grad);
          if (staged_) {
            unpack(x0_.dtype, x0);
            put(staged_v_, first, grad);
            put(staged_x0_, first, x0);
          }
        }
        body(grad);
      }
    }
  }
  // v, x0 and caps; `again` after the first time.
  template <typename Body>
  __device__ __forceinline__ void values(bool again, const Move<T>& move, Body body) {
    if constexpr (kStore == Store::registers) {
      if (!again) {
        if (!climbs_) {
          fetch(x0_, batch_.first, batch_.x0);
          fetch(x_, batch_.first, batch_.v);
        }
        unpack(x_.dtype, batch_.v);
        unpack(x0_.dtype, batch_.x0);
        climb(batch_, move);
        forget(batch_.first, batch_.v);
        caps(batch_);
      }
      forget(batch_.first, batch_.v);
      body(batch_);
    } else {
#pragma unroll 1
      for (Offset first = begin(); first < length_; first += stride() * kChunks) {
        Batch batch;
        batch.first = first;
        if (staged_ && again) {
          get(staged_v_, first, batch.v);
          get(staged_x0_, first, batch.x0);
        } else {
          fetch(x_, first, batch.v);
          if (staged_ && climbs_) {
            get(staged_x0_, first, batch.x0);
            get(staged_v_, first, batch.cap);
          } else {
            fetch(x0_, first, batch.x0);
            if (climbs_) {
              fetch(grad_, first, batch.cap);
              prepare(first, batch.cap);
            }
            unpack(x0_.dtype, batch.x0);
          }
          unpack(x_.dtype, batch.v);
          climb(batch, move);
          if (staged_) {
            put(staged_v_, first, batch.v);
            if (!climbs_) put(staged_x0_, first, batch.x0);
          }
        }
        caps(batch);
        body(batch);
      }
    }
  }
  // v has changed: keep it.
  __device__ __forceinline__ void replace(Batch& batch) const {
    if (staged_) put(staged_v_, batch.first, batch.v);
    caps(batch);
  }

  // Whether v is kept between passes.
  __device__ bool kept() const { return kStore == Store::registers || staged_; }

  // --- a batch's chunks ---
  __device__ Offset at(const Batch& batch, int c) const { return batch.first + c * stride(); }
  __device__ int valid(Offset at) const {
    return static_cast<int>(length_ - at < kChunk ? (length_ > at ? length_ - at : 0) : kChunk);
  }
  // The operand's elements, 0 beyond the slice.
  __device__ __forceinline__ void load(const Operand& from, Offset at, Chunk& chunk) const {
    Chunk rows[1];
    fetch(from, at, rows);
    unpack(from.dtype, rows);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) chunk[i] = rows[0][i];
  }
  // Copy what a batch has of an operand.
  __device__ __forceinline__ void copy(const Operand& from, const Operand& to, const Batch& batch) const {
#pragma unroll 1
    for (int c = 0; c < kChunks; ++c) {
      const Offset here = at(batch, c);
      Chunk chunk;
      load(from, here, chunk);
      if (here < length_) write(to, here, chunk, chunk);
    }
  }
  __device__ Operand origin() const { return x_; }
  // How many elements of this thread differ between a point and x0.
  __device__ int support(Operand point) const {
    int count = 0;
#pragma unroll 1
    for (Offset here = begin(); here < length_; here += stride()) {
      Chunk x, x0;
      load(point, here, x);
      load(x0_, here, x0);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) count += x[i] != x0[i] ? 1 : 0;  // beyond the slice both are 0
    }
    return count;
  }
  // body(chunk, lane, lo, hi) for each element.
  template <typename Body>
  __device__ __forceinline__ void bounded(const Batch& batch, Body body) const {
    if (lo_.data == nullptr && hi_.data == nullptr) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) body(c, i, lo_.scalar, hi_.scalar);
      }
    } else {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        Chunk lo, hi;
        const Offset here = at(batch, c);
        lo_.load(begin_ + here, valid(here), wide_, lo);
        hi_.load(begin_ + here, valid(here), wide_, hi);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) body(c, i, lo[i], hi[i]);
      }
    }
  }
  // In storage; 16 bits round towards `centre`.
  __device__ __forceinline__ void store(const Operand& to, const Batch& batch, const Rows& rows,
                                        const Rows& centre) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const Offset here = at(batch, c);
      if (here >= length_) break;
      write(to, here, rows[c], centre[c]);
    }
  }
  // v to x.
  __device__ __forceinline__ void finish(const Batch& batch) const {
    store(operand(p_.x, p_.dtype, p_.x_stride), batch, batch.v, batch.x0);
  }
  // What the model reads of x, which has been written.
  __device__ __forceinline__ void feed_all() const {
    if constexpr (std::is_same_v<T, float>) {
      if (p_.input == nullptr) return;
      const Operand x = operand(p_.x, p_.dtype, p_.x_stride);
#pragma unroll 1
      for (Offset here = begin(); here < length_; here += stride()) {
        Chunk chunk;
        load(x, here, chunk);
        feed(p_, sample_, begin_ + here, valid(here), wide_, chunk);
      }
    }
  }

 private:
  __device__ static Offset stride() { return static_cast<Offset>(blockDim.x) * kChunk; }
  __device__ static Offset begin() { return static_cast<Offset>(threadIdx.x) * kChunk; }
  __device__ bool whole(Offset at) const { return at + kChunk <= length_; }

  // For the compiler these may have changed: what it keeps of them from pass to pass leaves too few registers.
  __device__ __forceinline__ static void forget(Offset& first, Rows& rows) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(first));
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) asm volatile("" : "+f"(rows[c][i]));
    }
#endif
  }
  // As they are stored: 16-bit elements two by two in the bits of a chunk's first ones.
  template <int kCount>
  __device__ __forceinline__ void fetch(const Operand& from, Offset first, Chunk (&rows)[kCount]) const {
    if constexpr (std::is_same_v<T, float>) {
      if (from.dtype != DType::f32) {
        const auto* const data = static_cast<const uint16_t*>(from.data);
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          uint2 words = {};
          const Offset here = first + c * stride();
          if (wide_ && whole(here)) words = *reinterpret_cast<const uint2*>(data + here);
          rows[c][0] = bit_cast<float>(words.x);
          rows[c][1] = bit_cast<float>(words.y);
          rows[c][2] = rows[c][3] = 0;
        }
        if (!ragged_) return;
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          const Offset here = first + c * stride();
          if (wide_ && whole(here)) continue;
          uint32_t bits[kChunk] = {};
#pragma unroll
          for (int i = 0; i < kChunk; ++i) {
            if (here + i < length_) bits[i] = data[here + i];
          }
          rows[c][0] = bit_cast<float>(bits[0] | bits[1] << 16);
          rows[c][1] = bit_cast<float>(bits[2] | bits[3] << 16);
        }
        return;
      }
    }
    const auto* const data = static_cast<const T*>(from.data);
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      Pack<T, kChunk> pack = {};
      const Offset here = first + c * stride();
      if (wide_ && whole(here)) pack = Pack<T, kChunk>::load(data + here);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) rows[c][i] = pack.at[i];
    }
    if (!ragged_) return;
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const Offset here = first + c * stride();
      if (wide_ && whole(here)) continue;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (here + i < length_) rows[c][i] = data[here + i];
      }
    }
  }
  template <int kCount>
  __device__ __forceinline__ static void unpack(DType dtype, Chunk (&rows)[kCount]) {
    if constexpr (std::is_same_v<T, float>) {
      if (dtype == DType::f16) unpack_as<__half>(rows);
      if (dtype == DType::bf16) unpack_as<__nv_bfloat16>(rows);
    }
  }
  template <typename S, int kCount>
  __device__ __forceinline__ static void unpack_as(Chunk (&rows)[kCount]) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const uint32_t words[2] = {bit_cast<uint32_t>(rows[c][0]), bit_cast<uint32_t>(rows[c][1])};
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        rows[c][i] = widen(bit_cast<S>(static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2))));
      }
    }
  }
  // A fetched gradient, now with respect to x.
  template <int kCount>
  __device__ __forceinline__ void ascend(Offset first, Chunk (&grad)[kCount]) const {
    unpack(grad_.dtype, grad);
    if constexpr (std::is_same_v<T, float>) {
      if (!divided_) return;
      const Bound<float> std(p_.std, sample_);
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        Chunk divisor;
        const Offset here = first + c * stride();
        std.load(begin_ + here, valid(here), wide_, divisor);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) grad[c][i] = i < valid(here) ? divide_rn(grad[c][i], divisor[i]) : 0;
      }
    }
  }
  // Likewise, and finite.
  __device__ __forceinline__ void prepare(Offset first, Rows& grad) const {
    ascend(first, grad);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) grad[c][i] = finite_or_zero(grad[c][i]);
    }
  }
  // The gradient is in cap's place.
  __device__ __forceinline__ void climb(Batch& batch, const Move<T>& move) const {
    if (!climbs_) return;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) batch.v[c][i] = moved<kNorm>(batch.v[c][i], batch.cap[c][i], move);
    }
  }
  __device__ __forceinline__ void caps(Batch& batch) const {
    bounded(batch, [&](int c, int i, T lo, T hi) FASTLIP_INLINE {
      batch.cap[c][i] = search_.cap_in_units(gap_cap(batch.v[c][i], batch.x0[c][i], lo, hi));
    });
  }
  __device__ __forceinline__ void write(const Operand& to, Offset at, const Chunk& values, const Chunk& centre) const {
    if constexpr (std::is_same_v<T, float>) {
      if (to.dtype != DType::f32) {
        uint32_t bits[kChunk];
        if (to.dtype == DType::f16) {
#pragma unroll
          for (int i = 0; i < kChunk; ++i) bits[i] = bit_cast<uint16_t>(narrow<__half>(values[i], centre[i]));
        } else {
#pragma unroll
          for (int i = 0; i < kChunk; ++i) bits[i] = bit_cast<uint16_t>(narrow<__nv_bfloat16>(values[i], centre[i]));
        }
        auto* const data = static_cast<uint16_t*>(to.data) + at;
        if (wide_ && whole(at)) {
          __stwb(reinterpret_cast<uint2*>(data), uint2{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16});
        } else {
#pragma unroll
          for (int i = 0; i < kChunk; ++i) {
            if (at + i < length_) data[i] = static_cast<uint16_t>(bits[i]);
          }
        }
        return;
      }
    }
    T* const data = static_cast<T*>(to.data) + at;
    if (wide_ && whole(at)) {
      Pack<T, kChunk> pack;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) pack.at[i] = values[i];
      pack.write(data);
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (at + i < length_) data[i] = values[i];
      }
    }
  }
  __device__ __forceinline__ void put(T* staged, Offset first, const Rows& rows) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const Offset here = first + c * stride();
      Pack<T, kChunk> pack;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) pack.at[i] = rows[c][i];
      if (here < length_) pack.store(staged + here);
    }
  }
  __device__ __forceinline__ void get(const T* staged, Offset first, Rows& rows) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const Offset here = first + c * stride();
      Pack<T, kChunk> pack = {};
      if (here < length_) pack = Pack<T, kChunk>::load(staged + here);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) rows[c][i] = pack.at[i];
    }
  }

  const PgdStep& p_;
  const Search<T, kNorm>& search_;
  int64_t sample_, begin_;
  Offset length_;
  bool wide_, staged_, ragged_, climbs_, divided_;
  T* staged_v_;
  T* staged_x0_;
  Bound<T> lo_, hi_;
  Operand x_, x0_, grad_;  // the gradient: with respect to what the model reads where it is divided
  Batch batch_;            // all there is, in registers
};

template <int kChunks, int kChunk, typename T, typename Body>
__device__ __forceinline__ void each(const T (&rows)[kChunks][kChunk], Body body) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) body(rows[c][i], i);
  }
}

// Steepest ascent in L2: what step / ||grad|| multiplies. Where the sum of squares may be wrong in T, it is taken again
// of gradients scaled by a power of two.
template <typename T, Store kStore>
__device__ __forceinline__ Move<T> find_move(Slice<T, Norm::l2, kStore>& slice, Team& team, BallMemory<Norm::l2>&,
                                             T step, int) {
  using Rows = typename Slice<T, Norm::l2, kStore>::Rows;
  T scale = 1;
  int exponent = 0;
  for (int round = 0;; ++round) {
    Tally<T, 1> tally;
    T mine = 0;
    slice.gradients(round > 0, [&](const Rows& grad) FASTLIP_INLINE {
      tally.open();
      each(grad, [&](T g, int lane) FASTLIP_INLINE {
        const T size = g * scale;
        tally.parts[0][lane] += size * size;
        mine = greater(mine, magnitude(g));
      });
      tally.template close<1>();
    });
    team.reduce(tally.sums);
    if (round > 0 || safe_squares<T>(tally.sums[0])) return l2_move(step, tally.sums[0], exponent);
    team.reduce_peak(mine, 0);
    if (mine == 0) return {};
    exponent = fitting_exponent<T>(exponent_of(mine));
    scale = power_of_two<T>(-exponent);
  }
}

// The bin of the key search in which the `wanted`-th largest key is.
struct Found {
  int bin, beyond, within;
};

// Of the team's bins, which are complete; every warp by itself. Lane l has bins 8 l to 8 l + 7.
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
__device__ __forceinline__ Move<T> find_move(Slice<T, Norm::l1, kStore>& slice, Team& team,
                                             BallMemory<Norm::l1>& memory, T step, int kept) {
  using Rows = typename Slice<T, Norm::l1, kStore>::Rows;
  constexpr int kBins = KeySearch<T>::kBins;
  KeySearch<T> search(0, 0, kept);
  int nonzero = 0, turn = -1;  // below 0: a look at all of them, to begin with
  T mine = 0;
  for (;;) {
    int* const bins = memory.bins[turn < 0 ? 0 : turn];
    slice.gradients(turn >= 0, [&](const Rows& grad) FASTLIP_INLINE {
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
      const int all = static_cast<int>(team.reduce_peak(mine, nonzero));  // with a barrier, so the first bins are clear
      if (all == 0) return {};
      search = KeySearch<T>(mine, all, kept);
    } else {
      team.sync();  // bins are complete, and those of the next pass clear
      const int* complete = bins;
      if (team.ranks() > 1) {
        for (int i = threadIdx.x; i < kBins; i += blockDim.x) {
          int sum = 0;
          for (int rank = 0; rank < team.ranks(); ++rank) sum += *cluster_address(bins + i, rank);
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
__device__ __forceinline__ void project(const Search<T, kNorm>& search, const Slice<T, kNorm, kStore>& slice,
                                        typename Slice<T, kNorm, kStore>::Batch& batch) {
  if (!search.inside) {
#pragma unroll
    for (int c = 0; c < Slice<T, kNorm, kStore>::kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < Slice<T, kNorm, kStore>::kChunk; ++i) {
        batch.v[c][i] = search.projected(batch.v[c][i], batch.x0[c][i], batch.cap[c][i]);
      }
    }
  }
  slice.bounded(batch, [&](int c, int i, T lo, T hi) FASTLIP_INLINE { batch.v[c][i] = clamp(batch.v[c][i], lo, hi); });
}

// Projects v and calls finish(batch) where it is; in Auto-PGD's second of two rounds, from where push(batch) moves v
// given the first's result, `aimed`. One loop for all passes: what reads a batch is there once.
template <typename T, Norm kNorm, Store kStore, typename Push, typename Finish>
__device__ __forceinline__ void project_all(Slice<T, kNorm, kStore>& slice, Team& team, const Move<T>& move,
                                            Search<T, kNorm>& search, int rounds, Search<T, kNorm>& aimed, Push push,
                                            Finish finish) {
  using Mine = Slice<T, kNorm, kStore>;
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
    slice.values(pass > 0, move, [&](Batch& batch) FASTLIP_INLINE {
      if (round > 0 && (begins || !slice.kept())) push(batch);
      if (ends) {
        project(search, slice, batch);
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
      const double free = team.reduce(tally.sums, tally.count);
      more = search.start(tally.sums, free);
      if constexpr (kNorm == Norm::l2) {
        if (more && search.far(tally.sums)) {
          team.reduce_peak(mine, 0);
          search.restart(mine);
        }
      }
      begins = false;
    } else {
      double sums[kSums];
#pragma unroll
      for (int k = 0; k < kSums; ++k) sums[k] = tally.sums[k];
      const double count = team.reduce(sums, tally.count);
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

// --- launching -------------------------------------------------------------------------------------------------------
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
  int64_t slice;
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
  const auto slice_of = [&](int ranks) { return ((size + ranks - 1) / ranks + kChunk - 1) / kChunk * kChunk; };
  const auto threads_of = [&](int64_t slice, int64_t each, int64_t most) {
    const int64_t wanted = ((slice / kChunk + each - 1) / each + kWarp - 1) / kWarp * kWarp;
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
    if (slice_of(1) <= kEach * kChunk * most) {
      plan = {kernels.registers, slice_of(1), 1, threads_of(slice_of(1), kEach, most), false, 0};
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
      if (slice_of(ranks) > capacity) continue;
      plan = {kernels.looped, slice_of(ranks),
              ranks,          threads_of(slice_of(ranks), 2 * kBatch<T, Store::looped>, kMaxThreads),
              true,           static_cast<size_t>(slice_of(ranks) * kBytes)};
      if (has_room(plan)) return cudaSuccess;
    }
  }
  for (int ranks = clustered ? 8 : 1;; ranks /= 2) {
    plan = {kernels.looped, slice_of(ranks),
            ranks,          threads_of(slice_of(ranks), 2 * kBatch<T, Store::looped>, kMaxThreads),
            false,          0};
    if (ranks == 1 || has_room(plan)) return cudaSuccess;
  }
}

// Launches a team for each sample.
template <typename T, Norm kNorm, typename Parameters>
cudaError_t launch_teams(const Parameters& parameters, const PgdStep& p, const Kernels<Parameters>& kernels, bool wide,
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
  Shares shares{0, plan.slice, plan.ranks, plan.staged, wide};
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
