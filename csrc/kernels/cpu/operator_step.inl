// Half a bidiagonalisation step of many operators on the CPU, compiled once per instruction set.
//
// A tile is at most 64 target channels by a run of columns. It takes 2 * taps * source channels operations per element,
// and reads the weights of its block once. A few taps and source channels, whose weights stay in L1, are applied to all
// columns before the next ones: kColumns at a time, by as many SIMD registers of channels as there are. Each such part
// is summed in registers of its own before it is added to the tile's sums, so that the longest chain of additions is
// kDepth + taps * source channels / kDepth: float32 certificates depend on it.
#include "kernels/cpu/vectors.h"

namespace fastlip::cpu {
namespace {

constexpr int kVectors = kVectorBytes == 64 ? 4 : 2;
constexpr int kColumns = 6;      // kColumns * kVectors sums, kVectors weights and one factor fit the registers
constexpr int64_t kDepth = 128;  // source channels summed at a time
constexpr int64_t kRun = 48;     // columns whose sums stay in L1, beside the weights

using Problem = OperatorStep::Problem;
using GatherGroup = OperatorStep::GatherGroup;
using Tile = OperatorStep::Tile;

template <typename T>
using Lanes __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias)) = T;
template <typename T>
inline constexpr int kWidth = kVectorBytes / sizeof(T);

// sums[column][lane] += sum over k of weights[k][lane] * columns[column][k], for V SIMD registers of lanes and C
// columns.
template <typename T, int V, int C>
void multiply(T* sums, const T* weights, int64_t lanes, const T* const* columns, int64_t depth) {
  Lanes<T> part[C][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Lanes<T> w[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) w[v] = *reinterpret_cast<const Lanes<T>*>(weights + k * lanes + v * kWidth<T>);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const T factor = columns[c][k];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) part[c][v] += w[v] * factor;
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      *reinterpret_cast<Lanes<T>*>(sums + c * OperatorStep::kBlock + v * kWidth<T>) += part[c][v];
}

template <typename T, int V>
void multiply_columns(T* sums, const T* weights, int64_t lanes, const T* const* columns, int count, int64_t depth) {
  switch (count) {
    case 1:
      return multiply<T, V, 1>(sums, weights, lanes, columns, depth);
    case 2:
      return multiply<T, V, 2>(sums, weights, lanes, columns, depth);
    case 3:
      return multiply<T, V, 3>(sums, weights, lanes, columns, depth);
    case 4:
      return multiply<T, V, 4>(sums, weights, lanes, columns, depth);
    case 5:
      return multiply<T, V, 5>(sums, weights, lanes, columns, depth);
    default:
      return multiply<T, V, kColumns>(sums, weights, lanes, columns, depth);
  }
}

// All lanes of a block, as many SIMD registers at a time as fit; lanes is a multiple of kLanes.
template <typename T>
void multiply_block(T* sums, const T* weights, int64_t lanes, const T* const* columns, int count, int64_t depth) {
  int64_t lane = 0;
  for (; lanes - lane >= kVectors * kWidth<T>; lane += kVectors * kWidth<T>)
    multiply_columns<T, kVectors>(sums + lane, weights + lane, lanes, columns, count, depth);
  for (; lanes - lane >= 2 * kWidth<T>; lane += 2 * kWidth<T>)
    multiply_columns<T, 2>(sums + lane, weights + lane, lanes, columns, count, depth);
  for (; lane < lanes; lane += kWidth<T>)
    multiply_columns<T, 1>(sums + lane, weights + lane, lanes, columns, count, depth);
}

// Where a run of a tile's columns lies in memory.
struct Columns {
  const Problem& problem;
  const GatherGroup& gather_group;
  const int32_t* entries;
  int64_t first, count;

  int64_t vector(int64_t column) const { return (first + column) % problem.vectors; }
  int64_t pixel(int64_t column) const { return (first + column) / problem.vectors; }
  int64_t tap(int64_t entry) const { return entries[gather_group.taps_at + entry]; }
  // First source channel of a column that meets a tap, -1 where it meets none.
  int64_t source(int64_t entry, int64_t column) const {
    const int64_t at = entries[gather_group.sources_at + entry * gather_group.pixels + pixel(column)];
    return at < 0 ? -1 : row(at, column, problem.source_pixels, problem.source_channels);
  }
  int64_t target(int64_t column) const {
    return row(entries[gather_group.targets_at + pixel(column)], column, problem.target_pixels,
               problem.target_channels);
  }
  int64_t row(int64_t at, int64_t column, int64_t pixels, int64_t channels) const {
    return (vector(column) * pixels + at) * problem.groups * channels;
  }
};

template <typename T>
void sum_dense(T* sums, const OperatorStep& p, const Tile& tile, const Columns& at, int64_t lanes, int64_t padded) {
  const Problem& problem = at.problem;
  const int64_t depth = problem.source_channels;
  const T* x = static_cast<const T*>(p.x) + problem.source_at + tile.group * depth;
  // A group's blocks are full but for the last one.
  const T* weights = static_cast<const T*>(p.weights) + problem.weight_at +
                     problem.taps * depth * (tile.group * padded + tile.block * OperatorStep::kBlock);
  static const T zeros[kDepth] = {};
  for (int64_t entry = 0; entry < at.gather_group.taps; ++entry) {
    const T* of_tap = weights + at.tap(entry) * depth * lanes;
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t part = least<int64_t>(kDepth, depth - k);
      for (int64_t column = 0; column < at.count; column += kColumns) {
        const int count = static_cast<int>(least<int64_t>(kColumns, at.count - column));
        const T* columns[kColumns];
        for (int c = 0; c < count; ++c) {
          const int64_t source = at.source(entry, column + c);
          columns[c] = source < 0 ? zeros : x + source + k;
        }
        multiply_block(sums + column * OperatorStep::kBlock, of_tap + k * lanes, lanes, columns, count, part);
      }
    }
  }
}

template <typename T>
void sum_depthwise(T* sums, const OperatorStep& p, const Tile& tile, const Columns& at, int64_t lanes, int64_t used) {
  const Problem& problem = at.problem;
  const int64_t first = tile.block * OperatorStep::kBlock;
  const T* x = static_cast<const T*>(p.x) + problem.source_at + first;
  const T* weights = static_cast<const T*>(p.weights) + problem.weight_at + problem.taps * first;
  for (int64_t column = 0; column < at.count; ++column)
    for (int64_t entry = 0; entry < at.gather_group.taps; ++entry) {
      const int64_t source = at.source(entry, column);
      if (source < 0) continue;
      const T* w = weights + at.tap(entry) * lanes;
      for (int64_t c = 0; c < used; ++c) sums[column * OperatorStep::kBlock + c] += w[c] * x[source + c];
    }
}

// Scales the sums, subtracts what came before and writes; adds the squares to the tile's row of `partial`.
template <typename T>
void finish(const T* sums, const OperatorStep& p, const Tile& tile, const Columns& at, int64_t used, double* partial) {
  const Problem& problem = at.problem;
  const int64_t first = problem.target_at + tile.group * problem.target_channels + tile.block * OperatorStep::kBlock;
  for (int64_t column = 0; column < at.count; ++column) {
    const int64_t vector = at.vector(column), number = problem.vector_at + vector;
    const T* sum = sums + column * OperatorStep::kBlock;
    const int64_t target = first + at.target(column);
    T* out = static_cast<T*>(p.out) + target;
    T scale = 1, shift = 0;
    if (p.x_square) {
      const double length = __builtin_sqrt(p.x_square[number]);
      scale = static_cast<T>(length > 0 ? 1 / length : 0);
      const double other = p.previous ? __builtin_sqrt(p.previous_square[number]) : 0;
      shift = static_cast<T>(other > 0 ? length / other : 0);
    }
    double square = 0;
    if (p.previous) {
      const T* previous = static_cast<const T*>(p.previous) + target;
      for (int64_t c = 0; c < used; ++c) out[c] = sum[c] * scale - previous[c] * shift;
    } else {
      for (int64_t c = 0; c < used; ++c) out[c] = sum[c] * scale;
    }
#pragma omp simd reduction(+ : square)
    for (int64_t c = 0; c < used; ++c) square += static_cast<double>(out[c]) * static_cast<double>(out[c]);
    partial[vector] += square;
  }
}

template <typename T>
void tile_as(const OperatorStep& p, int64_t index) {
  const Tile& tile = reinterpret_cast<const Tile*>(p.tiles)[index];
  const Problem& problem = reinterpret_cast<const Problem*>(p.problems)[tile.problem];
  if (p.active && !p.active[tile.problem]) return;
  const GatherGroup& gather_group = reinterpret_cast<const GatherGroup*>(p.gather_groups)[tile.gather_group];
  const int64_t channels = problem.target_channels;
  const int64_t padded = (channels + OperatorStep::kLanes - 1) / OperatorStep::kLanes * OperatorStep::kLanes;
  const int64_t used = least<int64_t>(OperatorStep::kBlock, channels - tile.block * OperatorStep::kBlock);
  const int64_t lanes = least<int64_t>(OperatorStep::kBlock, padded - tile.block * OperatorStep::kBlock);
  double* partial = p.partial + index * p.max_vectors;
  for (int64_t c = 0; c < problem.vectors; ++c) partial[c] = 0;
  alignas(64) T sums[kRun * OperatorStep::kBlock];
  for (int64_t column = 0; column < tile.columns; column += kRun) {
    const Columns at{problem, gather_group, p.entries, tile.column + column,
                     least<int64_t>(kRun, tile.columns - column)};
    for (int64_t i = 0; i < at.count * OperatorStep::kBlock; ++i) sums[i] = 0;
    if (problem.depthwise)
      sum_depthwise(sums, p, tile, at, lanes, used);
    else
      sum_dense(sums, p, tile, at, lanes, padded);
    finish(sums, p, tile, at, used, partial);
  }
}

}  // namespace

void FASTLIP_CAT(operator_tile_, FASTLIP_ISA)(const OperatorStep&, int64_t);
void FASTLIP_CAT(operator_tile_, FASTLIP_ISA)(const OperatorStep& p, int64_t tile) {
  return p.dtype == DType::f64 ? tile_as<double>(p, tile) : tile_as<float>(p, tile);
}

}  // namespace fastlip::cpu
