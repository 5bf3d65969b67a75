// A block's tile of a sample in L2 or L1: its operands, kept on chip where they fit.
#pragma once
#include "kernels/cuda/ball.h"
#include "kernels/cuda/cooperative_group.cuh"

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
  int64_t tile;   // elements a block, a whole number of chunks
  int ranks;      // blocks a sample
  bool staged;    // in shared memory, where it is not in registers
  bool wide;      // chunks may be accessed as one
};

// Shared memory beside what is staged.
template <Norm kNorm>
struct BallMemory {
  CooperativeGroup::Memory group;
};
template <>
struct BallMemory<Norm::l1> {
  static constexpr int kBins = KeySearch<float>::kBins;
  CooperativeGroup::Memory group;
  alignas(16) int bins[3][kBins];  // in turn: cleared, counted into, read
  alignas(16) int merged[kBins];
};

template <typename T, Norm kNorm>
using Search = std::conditional_t<kNorm == Norm::l2, L2Search<T>, L1Search<T>>;

// A block's tile of one sample. Chunks of 16 bytes of T go round the threads in the same way whatever the operands'
// alignment, strides and types. Offsets are relative to the tile.
template <typename T, Norm kNorm, Store kStore>
class SampleTile {
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
    void* data;  // at the tile
    DType dtype;
  };

  __device__ SampleTile(const PgdStep& p, const Shares& shares, int64_t sample, unsigned char* shared,
                        const Search<T, kNorm>& search)
      : p_(p),
        search_(search),
        sample_(sample),
        begin_(kStore == Store::registers ? 0 : static_cast<int64_t>(blockIdx.x % shares.ranks) * shares.tile),
        length_(
            static_cast<Offset>(p.size - begin_ < shares.tile ? (p.size > begin_ ? p.size - begin_ : 0) : shares.tile)),
        wide_(shares.wide),
        staged_(kStore == Store::looped && shares.staged),
        staged_v_(reinterpret_cast<T*>(shared)),
        staged_x0_(staged_v_ + shares.tile),
        lo_(p.lo, sample),
        hi_(p.hi, sample) {
    batch_.first = begin();
    ragged_ = !wide_ || length_ % kChunk != 0;
    x_ = operand(p.x, p.dtype, p.x_stride);
    x0_ = operand(p.x0, p.dtype, p.x0_stride);
    grad_ = operand(const_cast<void*>(p.grad), p.input == nullptr ? p.dtype : p.input_dtype, p.grad_stride);
    climbs_ = p.grad != nullptr;
    divided_ = p.input != nullptr;
    watched_ = true;
  }

  __device__ Operand operand(const void* data, DType dtype, int64_t stride) const {
    const int64_t bytes = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
    return {static_cast<char*>(const_cast<void*>(data)) + (sample_ * stride + begin_) * bytes, dtype};
  }

  // Start from another point than x, whose gradient is with respect to x.
  __device__ void start_from(const Operand& x, const Operand& grad) {
    x_ = x;
    grad_ = grad;
    divided_ = watched_ = false;
  }
  // Before that: x to the best of the attack's iterates; x and its gradient, which is finite or not, to those of the
  // largest loss; and a look at the gradient where the step is to start elsewhere, so that no pass has one.
  __device__ __forceinline__ void keep(bool better, const Operand& best, bool improved, const Operand& x_best,
                                       const Operand& grad_best, bool elsewhere) const {
#pragma unroll 1
    for (Offset here = begin(); here < length_; here += stride()) {
      Chunk x[1], grad[1];
      fetch(x_, here, x);
      if (improved || elsewhere) {
        fetch(grad_, here, grad);
        ascend(here, grad, elsewhere);
      }
      if (better) put_stored(best, here, x[0]);
      if (improved) {
        put_stored(x_best, here, x[0]);
        write(grad_best, here, grad[0], grad[0]);
      }
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
        prepare(batch_.first, batch_.cap, watched_);
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
          prepare(first, grad, watched_ && !again);
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
              prepare(first, batch.cap, false);
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
  // The operand's elements, 0 beyond the tile.
  __device__ __forceinline__ void load(const Operand& from, Offset at, Chunk& chunk) const {
    Chunk rows[1];
    fetch(from, at, rows);
    unpack(from.dtype, rows);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) chunk[i] = rows[0][i];
  }
  // Copy what a batch has of an operand, as it is stored.
  __device__ __forceinline__ void copy(const Operand& from, const Operand& to, const Batch& batch) const {
    Offset here = batch.first;
    forget(here);
#pragma unroll 1
    for (int c = 0; c < kChunks && here < length_; ++c, here += stride()) {
      Chunk rows[1];
      fetch(from, here, rows);
      put_stored(to, here, rows[0]);
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
      for (int i = 0; i < kChunk; ++i) count += x[i] != x0[i] ? 1 : 0;  // beyond the tile both are 0
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
  __device__ __forceinline__ static void forget(Offset& first) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(first));
#endif
  }
  __device__ __forceinline__ static void forget(Offset& first, Rows& rows) {
    forget(first);
#ifdef __CUDA_ARCH__
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
  // A fetched gradient, now with respect to x; looked at before, where it is to be.
  template <int kCount>
  __device__ __forceinline__ void ascend(Offset first, Chunk (&grad)[kCount], bool watched) const {
    unpack(grad_.dtype, grad);
    if (watched) look_at(p_, sample_, grad);
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
  __device__ __forceinline__ void prepare(Offset first, Rows& grad, bool watched) const {
    ascend(first, grad, watched);
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
        const Chunk packed = {bit_cast<float>(bits[0] | bits[1] << 16), bit_cast<float>(bits[2] | bits[3] << 16)};
        put_stored(to, at, packed);
        return;
      }
    }
    put_stored(to, at, values);
  }
  // As fetch() leaves them.
  __device__ __forceinline__ void put_stored(const Operand& to, Offset at, const Chunk& values) const {
    if constexpr (std::is_same_v<T, float>) {
      if (to.dtype != DType::f32) {
        auto* const data = static_cast<uint16_t*>(to.data) + at;
        const uint2 words = {bit_cast<uint32_t>(values[0]), bit_cast<uint32_t>(values[1])};
        if (wide_ && whole(at)) {
          __stwb(reinterpret_cast<uint2*>(data), words);
        } else {
#pragma unroll
          for (int i = 0; i < kChunk; ++i) {
            if (at + i < length_) data[i] = static_cast<uint16_t>((i < 2 ? words.x : words.y) >> 16 * (i % 2));
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
  bool wide_, staged_, ragged_, climbs_, divided_, watched_;
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

}  // namespace
}  // namespace fastlip::cuda
