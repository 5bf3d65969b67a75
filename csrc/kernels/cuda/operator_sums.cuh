// How a block of operator_step_ adds up the products of a square: on vector units, or on matrix units by 3xTF32.
//
// Both take one chunk after the other from shared memory, block their float32 sums (flush), and hand them over to
// threads as Shape assigns them.
#pragma once
#include "kernels/cuda/memory.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/operator_mma.h"
#include "kernels/cuda/operator_tile.h"

namespace fastlip::cuda {

constexpr int kThreads = 64;

// A chunk in shared memory. Padding keeps neighbours' reads apart.
template <typename T, int kRowPadding, int kProductPadding>
struct alignas(16) Stage {
  static constexpr int kPiece = 16 / sizeof(T), kDepth = kPieces * kPiece;
  static_assert(kRowPadding % kPiece == 0 && kProductPadding % kPiece == 0, "copies are of 16 bytes");
  T weights[kDepth][kTileRows + kRowPadding];
  T columns[kTileColumns][kDepth + kProductPadding];
};

// A thread's share of a square.
template <typename T>
using Sums = T[Shape::kRows][Shape::kColumns];

template <typename T, typename Body>
__device__ __forceinline__ void each(Sums<T>& sums, Body body) {
#pragma unroll
  for (int i = 0; i < Shape::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < Shape::kColumns; ++j) body(i * Shape::kColumns + j, sums[i][j]);
  }
}

template <typename T, int kCount>
__device__ __forceinline__ void read(const T* from, T (&out)[kCount]) {
  const auto pack = Pack<T, kCount>::load(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = pack.at[i];
}

// Multiply-adds: 8 channels by 8 columns per thread, 256 of them for every 16 reads of 16 bytes. On squares of fewer
// channels or columns, threads share the products of an element.
template <typename T>
class VectorUnits {
 public:
  using Number = T;
  static constexpr int kPiece = 16 / sizeof(T);
  using Stage = cuda::Stage<T, 0, kPiece>;
  using Exchange = T[Shape::kRows * Shape::kColumns][kThreads / 2];
  static constexpr bool kBlocked = sizeof(T) == 4;

  __device__ VectorUnits(int lanes, int columns) : shape_(lanes, columns) {}

  __device__ Shape shape() const { return shape_; }

  __device__ void multiply(const Stage& stage) {
    const int row0 = shape_.row(threadIdx.x, 0), row1 = shape_.row(threadIdx.x, 4);
#pragma unroll 1
    for (int piece = shape_.split(threadIdx.x); piece < kPieces; piece += shape_.splits) {
      T columns[Shape::kColumns][kPiece];
#pragma unroll
      for (int j = 0; j < Shape::kColumns; ++j)
        read(stage.columns[shape_.column(threadIdx.x, j)] + piece * kPiece, columns[j]);
#pragma unroll
      for (int k = 0; k < kPiece; ++k) {
        T low[4], high[4];
        read(stage.weights[piece * kPiece + k] + row0, low);
        read(stage.weights[piece * kPiece + k] + row1, high);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < Shape::kColumns; ++j) {
            sums_[i][j] += low[i] * columns[j][k];
            sums_[i + 4][j] += high[i] * columns[j][k];
          }
        }
      }
    }
  }

  __device__ void flush() {
#pragma unroll
    for (int i = 0; i < Shape::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < Shape::kColumns; ++j) {
        total_[i][j] += sums_[i][j];
        sums_[i][j] = 0;
      }
    }
  }

  // The sums of a thread of the first split, with those of the other splits added.
  __device__ Sums<T>& hand_over(Exchange& exchange) {
    const int width = shape_.row_groups * shape_.column_groups, mine = shape_.split(threadIdx.x);
    for (int split = 1; split < shape_.splits; ++split) {
      if (mine == split) each<T>(total_, [&](int index, T& value) { exchange[index][threadIdx.x % width] = value; });
      __syncthreads();
      if (mine == 0) each<T>(total_, [&](int index, T& value) { value += exchange[index][threadIdx.x]; });
      __syncthreads();
    }
    return total_;
  }

 private:
  const Shape shape_;
  Sums<T> sums_ = {}, total_ = {};
};

// Both factors are split into two TF32 numbers, and three of their four products are added, the two small ones first
// (Ootomo and Yokota 2022). Matrix units truncate when they add, so they add eight products of an element at a time,
// and ordinary additions do the rest.
class MatrixUnits {
 public:
  using Number = float;
  using Stage = cuda::Stage<float, MatrixShape::kRowPadding, MatrixShape::kProductPadding>;
  using Exchange = float[kTileColumns][kTileRows + MatrixShape::kRowPadding];
  static constexpr bool kBlocked = true;

  __device__ MatrixUnits(int lanes, int columns) : shape_(lanes, columns) {}

  __device__ Shape shape() const { return {shape_.lanes, shape_.columns}; }

  // Indices of sums are compile-time constants. Branches are uniform in a warp, so all lanes execute each instruction.
  __device__ void multiply(const Stage& stage) {
#pragma unroll 1
    for (int step = shape_.split(warp()); step < MatrixShape::kSteps; step += shape_.splits()) {
      switch (shape_.column_tiles()) {
        case 1:
          multiply<1>(stage, step);
          break;
        case 2:
          multiply<2>(stage, step);
          break;
        case 3:
          multiply<3>(stage, step);
          break;
        default:
          multiply<4>(stage, step);
      }
    }
  }

  __device__ void flush() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total_[m][n][i] += sums_[m][n][i];
          sums_[m][n][i] = 0;
        }
      }
    }
  }

  // A thread's share.
  __device__ Sums<float>& hand_over(Exchange& exchange) {
    for (int split = 0; split < shape_.splits(); ++split) {
      if (shape_.split(warp()) == split) leave(exchange, split > 0);
      __syncthreads();
    }
    const Shape shape = this->shape();
#pragma unroll
    for (int j = 0; j < Shape::kColumns; ++j) {
      const int column = shape.column(threadIdx.x, j);
#pragma unroll
      for (int i = 0; i < Shape::kRows; i += 4) {
        float run[4] = {};
        const int row = shape.row(threadIdx.x, i);
        if (row < shape_.lanes && column < shape_.columns) read(exchange[column] + row, run);
#pragma unroll
        for (int k = 0; k < 4; ++k) share_[i + k][j] = run[k];
      }
    }
    __syncthreads();  // this memory is reused afterwards
    return share_;
  }

 private:
  static constexpr int kRowTiles = MatrixShape::kMostRowTiles, kColumnTiles = MatrixShape::kMostColumnTiles;

  __device__ static int lane() { return threadIdx.x % MatrixShape::kLanes; }
  __device__ static int warp() { return threadIdx.x / MatrixShape::kLanes; }

  template <int kCount>
  struct Factor {  // registers of one operand
    uint32_t large[kCount], small[kCount];

    __device__ void set(int index, float x) {
      const Tf32Pair pair = split_tf32(x);
      large[index] = pair.large;
      small[index] = pair.small;
    }
  };

  template <int kTiles>
  __device__ void multiply(const Stage& stage, int step) {
    Factor<2> columns[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float pair[2];
      const int column = shape_.first_column(warp()) + shape_.column(lane(), n);
      read(stage.columns[column] + shape_.product(lane(), step, 0), pair);
      columns[n].set(0, pair[0]);
      columns[n].set(1, pair[1]);
    }
    float ahead[4];  // weights of the next tile, read while this one is multiplied
    read_weights(stage, step, 0, ahead);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      if (m >= shape_.row_tiles()) break;
      Factor<4> weights;
#pragma unroll
      for (int i = 0; i < 4; ++i) weights.set(i, ahead[i]);
      if (m + 1 < kRowTiles) read_weights(stage, step, m + 1, ahead);
      __syncwarp();  // only keeps the compiler from delaying these reads
      float sums[kTiles][4] = {};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) mma(sums[n], weights.small, columns[n].large);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) mma(sums[n], weights.large, columns[n].small);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) mma(sums[n], weights.large, columns[n].large);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[m][n][i] += sums[n][i];
      }
    }
  }

  __device__ void read_weights(const Stage& stage, int step, int tile, float (&out)[4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float pair[2];
      read(stage.weights[shape_.product(lane(), step, i)] + shape_.row(lane(), tile, 0), pair);
      out[2 * i] = pair[0];
      out[2 * i + 1] = pair[1];
    }
  }

  // Writes this warp's sums to shared memory.
  __device__ void leave(Exchange& exchange, bool add) const {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        if (m >= shape_.row_tiles() || n >= shape_.column_tiles()) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = shape_.first_column(warp()) + shape_.sum_column(lane(), n, i);
          float* const to = exchange[column] + shape_.row(lane(), m, 0);
          Pack<float, 2> pair{total_[m][n][i], total_[m][n][i + 2]};
          if (add) {
            const auto other = Pack<float, 2>::load(to);
            pair.at[0] += other.at[0];
            pair.at[1] += other.at[1];
          }
          pair.store(to);
        }
      }
    }
  }

  const MatrixShape shape_;
  float sums_[kRowTiles][kColumnTiles][4] = {}, total_[kRowTiles][kColumnTiles][4] = {};
  Sums<float> share_;
};

}  // namespace fastlip::cuda
