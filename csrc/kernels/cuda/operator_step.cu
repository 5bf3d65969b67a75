// operator_step_: half a step of bidiagonalisation for many convolutions at once.
//
// Floor, for an operator with k x k taps, C source and N target channels, m' source and m target pixels, applied to b
// vectors: 4 C N k^2 bytes of weights; 4 b (C m' + 2 N m) bytes of x, previous and out; 2 b m C N k^2 operations, fewer
// with padding. One application of A and of A^T for the 53 convolutions of ResNet-50 on 32 x 32 images takes 5.19 GFLOP
// and 82 MB per vector and 188 MB of weights, that is 19, 40 and 49 operations per byte with 1, 4 and 8 vectors (the 17
// larger than 1 x 1: 2.42 GFLOP, 14 MB and 91 MB; 23, 67 and 97). A GPU of 67 TFLOP/s in float32 and 4.8 TB/s does 14
// operations per byte, so float32 multiply-adds at full precision are the floor.
//
// Matrix units: TF32 and bfloat16 inputs make certificates useless (intervals 6 to 50 times as wide as the norm, see
// benchmarks/bench_precision.py). 3xTF32, three products of split inputs, is as accurate as float32. By data sheets it
// reaches 52 TFLOP/s where multiply-adds reach 19.5 (A100), and 165 where they reach 67 (H100, H200), or 34 operations
// per byte: worth having from four vectors on. It is opt-in (matmul_precision; operator_sums.cuh) because no GPU has
// timed it yet. A warp's step of 8 products on a full tile takes 48 instructions of the matrix units and, as compiled
// for sm_80, about 170 others: 72 to split, 64 to add, 12 to read.
//
// One block of 64 threads takes one row of the tile table: up to 64 target channels by 64 columns (pixels and vectors)
// over a part of the products (split-K). No thread knows the geometry: for each tap the table names the source pixel of
// a target pixel. Its channels, which are contiguous, are gathered by asynchronous copies of 16 bytes (of one element
// where channels or addresses are odd) in a pipeline of three chunks; padding is filled with zeros. operator_sums.cuh
// multiplies. float32 sums are blocked: 64 products are added up in one register, which is then added to another.
//
// Parts of a tile write their sums to scratch, and the part that finishes last adds them up in order. Then the tile is
// scaled, the previous vector is subtracted, and the result is written, with its squared norm per vector to scratch;
// the block that finishes an operator last adds those up, also in order. So results do not depend on scheduling.
// Neighbouring blocks share weights or columns in L2. Blocks of inactive operators return at once.
//
// Depthwise convolutions are bound by memory: a thread takes 16 bytes of channels of four columns at a time.
#include "kernels/cuda/copy_async.cuh"
#include "kernels/cuda/memory.cuh"
#include "kernels/cuda/operator_sums.cuh"
#include "kernels/cuda/operator_tile.h"

namespace fastlip::cuda {
namespace {

constexpr int kBlocksEach = 4;  // per multiprocessor: 256 registers per thread
constexpr int kStages = 3;
constexpr int kFlush = 4;  // chunks, of 16 products each, that float32 sums add up in one register

template <typename Units, typename T = typename Units::Number>
struct Shared {
  union {
    typename Units::Stage stages[kStages];
    typename Units::Exchange exchange;
    double squares[kTileRows * sizeof(T) / 16][kTileColumns];  // of runs of channels
    double sums[kThreads];
  };
  int64_t target_at[kTileColumns];
  T scale[kTileColumns], shift[kTileColumns];
  int last;
};

// A block's share of the work: one row of the tile table.
template <typename Units>
class TileBlock {
 public:
  using T = typename Units::Number;
  using Stage = typename Units::Stage;
  using Piece = typename Chunks<16 / sizeof(T)>::Piece;
  static constexpr int kPiece = 16 / sizeof(T);
  static constexpr int kRowPieces = kTileRows / kPiece;  // of 16 bytes

  __device__ TileBlock(const OperatorStep& p, Shared<Units>& shared)
      : p_(p),
        shared_(shared),
        tile_(reinterpret_cast<const OperatorStep::Tile*>(p.tiles)[blockIdx.x]),
        problem_(reinterpret_cast<const OperatorStep::Problem*>(p.problems)[tile_.problem]),
        place_(p, problem_, tile_,
               reinterpret_cast<const OperatorStep::GatherGroup*>(p.gather_groups)[tile_.gather_group]) {
    const auto fits = [](const void* data, int64_t at, int64_t row) {
      return aligned(static_cast<const T*>(data) + at, row * static_cast<int64_t>(sizeof(T)), 16);
    };
    wide_weights_ = fits(p.weights, place_.weight_at, 0);
    wide_source_ = fits(p.x, place_.source_at, place_.source_row) && place_.channels % kPiece == 0;
    wide_target_ = fits(p.out, place_.target_at, place_.target_row);
    wide_previous_ = p.previous != nullptr && fits(p.previous, place_.target_at, place_.target_row);
  }

  __device__ void run() {
    for (int first = 0; first < place_.columns; first += kTileColumns) {
      first_ = place_.column + first;
      columns_ = place_.columns - first < kTileColumns ? place_.columns - first : kTileColumns;
      describe_columns();
      if (problem_.depthwise) {
        depthwise();
      } else if (!dense()) {
        return;
      }
      add_squares(first == 0);
    }
    arrive_at_operator();
  }

 private:
  // --- columns -------------------------------------------------------------------------------------------------------
  __device__ void describe_columns() {
    const int at = threadIdx.x;
    if (at >= columns_) return;
    const int vector = place_.vector_of(first_ + at);
    const Scales<T> scales(p_, problem_.vector_at + vector);
    shared_.target_at[at] =
        place_.target_of(vector * place_.target_pixels + place_.targets[place_.pixel_of(first_ + at)]);
    shared_.scale[at] = scales.scale;
    shared_.shift[at] = scales.shift;
  }

  // Scale a run of channels of a column, subtract the previous vector, write, and return the sum of squares.
  __device__ double finish_piece(int column, int row, T (&values)[kPiece]) const {
    const int valid = place_.rows - row < kPiece ? place_.rows - row : kPiece;
    const int64_t at = shared_.target_at[column] + row;
    T previous[kPiece] = {};
    if (p_.previous != nullptr) load<T>(static_cast<const T*>(p_.previous) + at, valid, wide_previous_, previous);
    double squares = 0;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      values[i] = shared_.scale[column] * values[i] - shared_.shift[column] * previous[i];
      if (i < valid) squares += static_cast<double>(values[i]) * static_cast<double>(values[i]);
    }
    store<T>(static_cast<T*>(p_.out) + at, valid, wide_target_, values, values);
    return squares;
  }

  // --- dense kernels -------------------------------------------------------------------------------------------------
  using Products = Chunks<kPiece>;
  using Cursor = typename Products::Cursor;

  // What a thread copies of a chunk, looked up in the tables one chunk ahead.
  struct Fetch {
    int tap[kPieces];     // of the kernel, for the weights of each piece
    int source[kPieces];  // source pixels, over all vectors, of four columns through the tap of this thread's piece
  };

  // The four columns of which a thread copies a piece: their target pixels, an index into the gather group's (-1 beyond
  // the last), and the first source pixels of their vectors.
  struct Columns {
    int pixel[kPieces], first_source[kPieces];
  };

  __device__ void look_up(const Products& products, const Cursor& cursor, const Columns& columns, Fetch& fetch) const {
    const Piece mine = products.piece(cursor, threadIdx.x % kPieces);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const Piece piece = products.piece(cursor, i);
      fetch.tap[i] = piece.tap < 0 ? -1 : place_.taps[piece.tap];
      fetch.source[i] = -1;
      if (mine.tap < 0 || columns.pixel[i] < 0) continue;
      const int source = place_.sources[mine.tap * place_.pixels + columns.pixel[i]];
      if (source >= 0) fetch.source[i] = columns.first_source[i] + source;
    }
  }

  __device__ void copy(const Products& products, const Cursor& cursor, const Columns& columns, const Fetch& fetch,
                       Stage& stage) const {
    // Weights: pass i brings the rows of piece i.
    constexpr int kRowsEach = kThreads / kRowPieces;
    static_assert(kRowsEach == kPiece);
    const int within = threadIdx.x / kRowPieces, lane = threadIdx.x % kRowPieces * kPiece;
    const T* const weights = static_cast<const T*>(p_.weights);
    if (lane < place_.lanes) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int channel = products.piece(cursor, i).channel + within;
        const bool real = fetch.tap[i] >= 0 && channel < place_.channels;
        const T* const from = weights + (real ? place_.weight_of(fetch.tap[i], channel) + lane : place_.weight_at);
        copy_piece<false>(stage.weights[i * kPiece + within] + lane, from, real ? kPiece : 0, wide_weights_);
      }
    }
    // Columns: four threads bring a column's chunk, each its piece of four columns.
    const int mine = threadIdx.x % kPieces, channel = products.piece(cursor, mine).channel;
    const T* const x = static_cast<const T*>(p_.x);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int column = threadIdx.x / kPieces + i * (kThreads / kPieces);
      if (columns.pixel[i] < 0) continue;
      const int left = place_.channels - channel;
      const bool real = fetch.source[i] >= 0;
      const T* const from = x + (real ? place_.source_of(fetch.source[i]) + channel : place_.source_at);
      copy_piece<true>(stage.columns[column] + mine * kPiece, from,
                       !real           ? 0
                       : left < kPiece ? left
                                       : kPiece,
                       wide_source_);
    }
  }

  template <bool kNear>
  __device__ static void copy_piece(T* to, const T* from, int valid, bool wide) {
    if (wide) {
      copy_async<16, kNear>(to, from, valid == kPiece ? 16 : 0);
    } else {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        copy_async<sizeof(T), true>(to + i, i < valid ? from + i : from, i < valid ? sizeof(T) : 0);
      }
    }
  }

  // False if other parts of the tile are not done; the last one finishes the tile.
  __device__ bool dense() {
    const Products products(place_.tap_count, place_.channels);
    const int begin = products.begin(tile_.part, tile_.parts), end = products.begin(tile_.part + 1, tile_.parts);
    Columns columns;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int column = threadIdx.x / kPieces + i * (kThreads / kPieces);
      columns.pixel[i] = column < columns_ ? place_.pixel_of(first_ + column) : -1;
      columns.first_source[i] = place_.vector_of(first_ + column) * place_.source_pixels;
    }

    Units units(place_.lanes, columns_);
    Fetch fetch;
    Cursor next = products.cursor(begin);
    int ahead = begin;  // the chunk that `next` and `fetch` belong to
    if (begin < end) look_up(products, next, columns, fetch);
    const auto copy_next = [&] {
      if (ahead < end) {
        copy(products, next, columns, fetch, shared_.stages[(ahead - begin) % kStages]);
        ++ahead;
        products.advance(next);
        if (ahead < end) look_up(products, next, columns, fetch);
      }
      commit_copies();  // an empty group at the end keeps the count right
    };
    for (int i = 0; i < kStages - 1; ++i) copy_next();
    for (int chunk = begin; chunk < end; ++chunk) {
      wait_for_copies<kStages - 2>();
      __syncthreads();  // this chunk has arrived, and the stage of the one before it is free again
      copy_next();
      units.multiply(shared_.stages[(chunk - begin) % kStages]);
      if (Units::kBlocked && (chunk - begin) % kFlush == kFlush - 1) units.flush();
    }
    units.flush();
    wait_for_copies<0>();
    __syncthreads();  // the memory of the stages is reused below

    Sums<T>& total = units.hand_over(shared_.exchange);
    const Shape shape = units.shape();
    const bool mine = shape.split(threadIdx.x) == 0;
    if (tile_.parts > 1 && !gather_parts(mine, total)) return false;
    if (mine) {
#pragma unroll
      for (int j = 0; j < Shape::kColumns; ++j) {
        const int column = shape.column(threadIdx.x, j);
        double squares = 0;
        if (column < columns_) {
#pragma unroll
          for (int i = 0; i < Shape::kRows; i += kPiece) {
            T values[kPiece];
#pragma unroll
            for (int k = 0; k < kPiece; ++k) values[k] = total[i + k][j];
            const int row = shape.row(threadIdx.x, i);
            if (row < place_.rows) squares += finish_piece(column, row, values);
          }
        }
        shared_.squares[shape.row_group(threadIdx.x)][column] = squares;
      }
    }
    square_groups_ = shape.row_groups;
    return true;
  }

  // --- parts and operators -------------------------------------------------------------------------------------------
  __device__ bool gather_parts(bool mine, Sums<T>& total) {
    constexpr int64_t kElements = OperatorStep::kBlock * OperatorStep::kPartColumns;
    T* const sums = static_cast<T*>(p_.sums) + (tile_.slot - tile_.part) * kElements + threadIdx.x;
    if (mine) each<T>(total, [&](int index, T& value) { sums[tile_.part * kElements + index * kThreads] = value; });
    // The tile's squares are in the row of its first part.
    if (tile_.part > 0) {
      for (int vector = threadIdx.x; vector < place_.vectors; vector += kThreads) partial(blockIdx.x)[vector] = 0;
    }
    if (!last_of(p_.counters + p_.problem_count + tile_.slot - tile_.part, tile_.parts)) {
      arrive_at_operator();
      return false;
    }
    if (mine) {
      each<T>(total, [](int, T& value) { value = 0; });
      for (int64_t part = 0; part < tile_.parts; ++part) {
        each<T>(total, [&](int index, T& value) { value += __ldcg(sums + part * kElements + index * kThreads); });
      }
    }
    return true;
  }

  __device__ double* partial(int64_t row) const { return p_.partial + row * p_.max_vectors; }

  // Whether this block is the last of `count` to arrive; it can then read what the others wrote before.
  __device__ bool last_of(int32_t* counter, int64_t count) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared_.last = atomicAdd(counter, 1) == count - 1;
    __syncthreads();
    __threadfence();
    return shared_.last;
  }

  // Squared norms of each vector's columns, from those of runs of channels; `fresh` starts the tile's sums.
  __device__ void add_squares(bool fresh) {
    __syncthreads();
    const int skip = place_.vector_of(first_);
    double* const to = partial(static_cast<int64_t>(blockIdx.x) - tile_.part);
    for (int vector = threadIdx.x; vector < place_.vectors; vector += kThreads) {
      double sum = fresh ? 0 : to[vector];
      for (int at = vector < skip ? vector - skip + place_.vectors : vector - skip; at < columns_;
           at += place_.vectors) {
        for (int group = 0; group < square_groups_; ++group) sum += shared_.squares[group][at];
      }
      to[vector] = sum;
    }
    __syncthreads();  // the stages of the next columns reuse this memory
  }

  __device__ void arrive_at_operator() {
    if (!last_of(p_.counters + tile_.problem, problem_.tiles)) return;
    for (int vector = 0; vector < place_.vectors; ++vector) {
      double sum = 0;
#pragma unroll 4
      for (int64_t row = threadIdx.x; row < problem_.tiles; row += kThreads)
        sum += __ldcg(partial(problem_.tile_at + row) + vector);
      shared_.sums[threadIdx.x] = sum;
      for (int half = kThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < half) shared_.sums[threadIdx.x] += shared_.sums[threadIdx.x + half];
      }
      if (threadIdx.x == 0) p_.out_square[problem_.vector_at + vector] = shared_.sums[0];
      __syncthreads();
    }
  }

  // --- depthwise kernels ---------------------------------------------------------------------------------------------
  __device__ void depthwise() {
    constexpr int kAtOnce = 4, kGroups = kThreads / kRowPieces;
    const int run = threadIdx.x % kRowPieces, row = run * kPiece;
    const int valid = place_.rows - row < kPiece ? place_.rows - row : kPiece;
    const T* const weights = static_cast<const T*>(p_.weights) + place_.weight_at + row;
    const T* const x = static_cast<const T*>(p_.x) + tile_.block * kTileRows + row;
    __syncthreads();  // the columns' descriptions
    for (int first = threadIdx.x / kRowPieces; first < kTileColumns; first += kAtOnce * kGroups) {
      T sums[kAtOnce][kPiece] = {};
      for (int tap = 0; valid > 0 && tap < place_.tap_count; ++tap) {
        T weight[kPiece], value[kPiece];
        load<T>(weights + static_cast<int64_t>(place_.taps[tap]) * place_.lanes, kPiece, wide_weights_, weight);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int column = first_ + first + i * kGroups;
          if (first + i * kGroups >= columns_) continue;
          const int source = place_.sources[tap * place_.pixels + place_.pixel_of(column)];
          if (source < 0) continue;
          load<T>(x + place_.source_of(place_.vector_of(column) * place_.source_pixels + source), valid, wide_source_,
                  value);
#pragma unroll
          for (int k = 0; k < kPiece; ++k) sums[i][k] += weight[k] * value[k];
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int column = first + i * kGroups;
        if (column < columns_) shared_.squares[run][column] = valid > 0 ? finish_piece(column, row, sums[i]) : 0;
      }
    }
    square_groups_ = kRowPieces;
  }

  const OperatorStep& p_;
  Shared<Units>& shared_;
  const OperatorStep::Tile tile_;
  const OperatorStep::Problem problem_;
  const TilePlace place_;
  bool wide_weights_, wide_source_, wide_target_, wide_previous_;
  int first_;    // column
  int columns_;  // of this square
  int square_groups_;
};

template <typename Units>
__global__ void __launch_bounds__(kThreads, kBlocksEach) operator_step_kernel(const __grid_constant__ OperatorStep p) {
  __shared__ Shared<Units> shared;
  const auto problem = reinterpret_cast<const OperatorStep::Tile*>(p.tiles)[blockIdx.x].problem;
  if (p.active != nullptr && p.active[problem] == 0) return;
  TileBlock<Units>(p, shared).run();
}

template <typename Units>
cudaError_t launch(const OperatorStep& p, void* stream) {
  const size_t bytes = static_cast<size_t>(p.problem_count + p.parts) * sizeof(int32_t);
  if (const auto error = cudaMemsetAsync(p.counters, 0, bytes, static_cast<cudaStream_t>(stream)); error != cudaSuccess)
    return error;
  const auto config = configure(p.tile_count, kThreads, 0, stream);
  return cudaLaunchKernelEx(&config, operator_step_kernel<Units>, p);
}

}  // namespace

int operator_step_(const OperatorStep& step, void* stream) {
  if (step.tile_count == 0) return cudaSuccess;
  if (step.dtype == DType::f64) return launch<VectorUnits<double>>(step, stream);
  return step.matmul_precision == MatmulPrecision::tf32x3 ? launch<MatrixUnits>(step, stream)
                                                          : launch<VectorUnits<float>>(step, stream);
}

}  // namespace fastlip::cuda
