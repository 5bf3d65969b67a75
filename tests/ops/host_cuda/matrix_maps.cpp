// operator_mma.h for test_matrix_maps.py.
#include "kernels/cuda/operator_mma.h"

using fastlip::cuda::MatrixShape;

extern "C" {
int row(int lane, int tile, int i) { return MatrixShape::row(lane, tile, i); }
int product(int lane, int step, int i) { return MatrixShape::product(lane, step, i); }
int column(int lane, int tile) { return MatrixShape::column(lane, tile); }
int sum_column(int lane, int tile, int i) { return MatrixShape::sum_column(lane, tile, i); }

int splits(int lanes, int columns) { return MatrixShape(lanes, columns).splits(); }
int split(int lanes, int columns, int warp) { return MatrixShape(lanes, columns).split(warp); }
int row_tiles(int lanes, int columns) { return MatrixShape(lanes, columns).row_tiles(); }
int column_tiles(int lanes, int columns) { return MatrixShape(lanes, columns).column_tiles(); }
int first_column(int lanes, int columns, int warp) { return MatrixShape(lanes, columns).first_column(warp); }

int row_padding() { return MatrixShape::kRowPadding; }
int product_padding() { return MatrixShape::kProductPadding; }

void split_tf32(const float* x, int64_t count, uint32_t* large, uint32_t* small) {
  for (int64_t i = 0; i < count; ++i) {
    const auto pair = fastlip::cuda::split_tf32(x[i]);
    large[i] = pair.large;
    small[i] = pair.small;
  }
}
}
