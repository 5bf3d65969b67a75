// How two warps multiply a square of operator_step_ on matrix units by 3xTF32: which elements each lane holds, and how
// a number is split in two. No thread index occurs here, so a host compiler can build it too.
#pragma once
#include "kernels/cuda/operator_tile.h"

namespace fastlip::cuda {

// x as two TF32 numbers (11 significant bits), large + small = x (1 + e) with |e| < 2^-22: rounding leaves 12 bits for
// the small one, of which one may be lost. Both are bit patterns of float32 whose last 13 bits are 0. For a NaN `small`
// is NaN; infinities and |x| >= 2^128 (1 - 2^-12) also give NaN.
struct Tf32Pair {
  uint32_t large, small;
};

FASTLIP_EITHER Tf32Pair split_tf32(float x) {
  constexpr uint32_t kHalf = 0x1000, kKept = ~0x1FFFu;
  const uint32_t large = (bit_cast<uint32_t>(x) + kHalf) & kKept;  // to nearest, ties away from zero
  return {large, bit_cast<uint32_t>(x - bit_cast<float>(large)) & kKept};
}

// A square's chunk of 16 products in tiles of 16 rows (target channels) by 8 columns by 8 products, one instruction
// each. By PTX, with g = lane / 4 and t = lane % 4, lane holds
//   of the weights    a[i]: row g + 8 (i % 2), product t + 4 (i / 2);
//   of the columns    b[i]: product t + 4 i, column g;
//   of the sums       c[i]: row g + 8 (i / 2), column 2 t + i % 2.
// Rows and products may be permuted, as long as both operands use the same order of products. Here rows g and g + 8 are
// neighbours in memory, and so are products t and t + 4, so that pairs are read at once.
//
// With more than 32 columns each warp takes half of their tiles. With up to 32 each warp takes all of them, and one of
// the two steps, which is half of a chunk's products.
struct MatrixShape {
  static constexpr int kLanes = 32, kWarps = 2;
  static constexpr int kRows = 16, kColumns = 8, kDepth = 8;     // of a tile
  static constexpr int kMostRowTiles = 4, kMostColumnTiles = 4;  // of a warp
  static constexpr int kSteps = 2;                               // of a chunk
  // Padding of weights, [product][row], and of columns, [column][product], in shared memory: it puts the pairs that
  // half a warp reads at once, or writes to sums as [column][row], into different banks.
  static constexpr int kRowPadding = 4, kProductPadding = 8;

  int lanes, columns;  // of the square

  FASTLIP_EITHER MatrixShape(int lanes, int columns) : lanes(lanes), columns(columns) {}

  // A warp of split i takes every splits()-th step from i on.
  FASTLIP_EITHER int splits() const { return columns <= kMostColumnTiles * kColumns ? kWarps : 1; }
  FASTLIP_EITHER int split(int warp) const { return splits() == 1 ? 0 : warp; }
  // A warp's tiles of rows and of columns; the last tile of columns may be empty.
  FASTLIP_EITHER int row_tiles() const { return lanes / kRows; }
  FASTLIP_EITHER int column_tiles() const {
    const int each = splits() == 1 ? kColumns * kWarps : kColumns;
    return (columns + each - 1) / each;
  }
  // The first of a warp's columns.
  FASTLIP_EITHER int first_column(int warp) const { return splits() == 1 ? warp * column_tiles() * kColumns : 0; }

  // Rows of a[i], c[2 i] and c[2 i + 1], i < 2; a[i + 2] is in the row of a[i].
  FASTLIP_EITHER static int row(int lane, int tile, int i) { return tile * kRows + lane / 4 * 2 + i; }
  // Products of a[2 i], a[2 i + 1] and b[i], i < 2.
  FASTLIP_EITHER static int product(int lane, int step, int i) { return step * kDepth + lane % 4 * 2 + i; }
  // Column of b.
  FASTLIP_EITHER static int column(int lane, int tile) { return tile * kColumns + lane / 4; }
  // Columns of c[i] and c[i + 2], i < 2.
  FASTLIP_EITHER static int sum_column(int lane, int tile, int i) { return tile * kColumns + lane % 4 * 2 + i; }
};

}  // namespace fastlip::cuda
