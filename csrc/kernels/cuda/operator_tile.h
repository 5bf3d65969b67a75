// Where a tile of operator_step_ finds its operands and writes its results, and the order of its products. No thread
// index occurs here, so a host compiler can build it too.
#pragma once
#include "kernels/cuda/arithmetic.h"

namespace fastlip::cuda {

// A tile is computed in squares of 64 target channels (rows) by 64 columns.
constexpr int kTileRows = OperatorStep::kBlock, kTileColumns = OperatorStep::kPartColumns;
constexpr int kPieces = 4;  // pieces, of 16 bytes, of a chunk of an element's products

// One row of the tile table with the rows it refers to. Offsets are in elements.
struct TilePlace {
  const int32_t* taps;     // [gather group's taps] taps of the kernel
  const int32_t* targets;  // [pixels]
  const int32_t* sources;  // [gather group's taps, pixels]
  int64_t pixels;
  int64_t source_at;                 // of the group's first channel in pixel 0 and vector 0
  int64_t target_at;                 // of the block's first channel there
  int64_t weight_at;                 // of the block
  int source_row, target_row;        // from pixel to pixel
  int source_pixels, target_pixels;  // of a vector; times the number of vectors also below 2^31
  int column, columns;               // below 2^31 in a gather group
  int tap_count, channels, vectors;
  int lanes, rows;  // channels of the block with and without padding

  FASTLIP_EITHER TilePlace(const OperatorStep& p, const OperatorStep::Problem& problem, const OperatorStep::Tile& tile,
                           const OperatorStep::GatherGroup& gather_group)
      : taps(p.entries + gather_group.taps_at),
        targets(p.entries + gather_group.targets_at),
        sources(p.entries + gather_group.sources_at),
        pixels(gather_group.pixels),
        source_at(problem.source_at + tile.group * problem.source_channels),
        target_at(problem.target_at + tile.group * problem.target_channels + tile.block * kTileRows),
        source_row(static_cast<int>(problem.groups * problem.source_channels)),
        target_row(static_cast<int>(problem.groups * problem.target_channels)),
        source_pixels(static_cast<int>(problem.source_pixels)),
        target_pixels(static_cast<int>(problem.target_pixels)),
        column(static_cast<int>(tile.column)),
        columns(static_cast<int>(tile.columns)),
        tap_count(static_cast<int>(gather_group.taps)),
        channels(static_cast<int>(problem.source_channels)),
        vectors(static_cast<int>(problem.vectors)) {
    const int64_t padded =
        (problem.target_channels + OperatorStep::kLanes - 1) / OperatorStep::kLanes * OperatorStep::kLanes;
    const int64_t left = problem.target_channels - tile.block * kTileRows;
    lanes = static_cast<int>(padded - tile.block * kTileRows < kTileRows ? padded - tile.block * kTileRows : kTileRows);
    rows = static_cast<int>(left < kTileRows ? left : kTileRows);
    const int64_t products = problem.taps * (problem.depthwise ? 1 : problem.source_channels);
    weight_at = problem.weight_at + products * (tile.group * padded + tile.block * kTileRows);
  }

  // The pixel (an index into the gather group's) and the vector of a column; columns count from the group's first.
  FASTLIP_EITHER int pixel_of(int at) const { return at / vectors; }
  FASTLIP_EITHER int vector_of(int at) const { return at % vectors; }
  // Offset in x of a source pixel's channels, and in out of a target pixel's; pixels are counted over all vectors.
  FASTLIP_EITHER int64_t source_of(int pixel) const { return source_at + static_cast<int64_t>(pixel) * source_row; }
  FASTLIP_EITHER int64_t target_of(int pixel) const { return target_at + static_cast<int64_t>(pixel) * target_row; }
  // Offset of the weights from a source channel to the block's channels for a tap of the kernel. Each target channel
  // has fewer than 2^31 weights.
  FASTLIP_EITHER int64_t weight_of(int tap, int channel) const {
    return weight_at + static_cast<int64_t>(tap * channels + channel) * lanes;
  }
};

// The products of an element in chunks of four pieces of kPiece channels. Taps run faster than channels, because what
// one tap fetched from a pixel is still in cache when the next tap reads that pixel. With few channels a chunk holds
// several taps.
template <int kPiece>
struct Chunks {
  int taps, channels;
  int pieces;      // of a tap
  int taps_each;   // taps of a chunk
  int tap_chunks;  // chunks over the taps
  int count;

  FASTLIP_EITHER Chunks(int taps, int channels)
      : taps(taps),
        channels(channels),
        pieces((channels + kPiece - 1) / kPiece),
        taps_each(pieces == 1   ? 4
                  : pieces == 2 ? 2
                                : 1),
        tap_chunks((taps + taps_each - 1) / taps_each),
        count(tap_chunks * ((pieces + kPieces - 1) / kPieces)) {}

  // First chunk of a part; begin(parts, parts) is the end of the last one.
  FASTLIP_EITHER int begin(int64_t part, int64_t parts) const { return static_cast<int>(count * part / parts); }

  struct Cursor {
    int tap_chunk, channel_chunk;
  };
  FASTLIP_EITHER Cursor cursor(int chunk) const {
    return tap_chunks == 0 ? Cursor{0, 0} : Cursor{chunk % tap_chunks, chunk / tap_chunks};
  }
  FASTLIP_EITHER void advance(Cursor& cursor) const {
    if (++cursor.tap_chunk == tap_chunks) {
      cursor.tap_chunk = 0;
      ++cursor.channel_chunk;
    }
  }

  // A piece: its tap, an index into the gather group's, and its first channel. The tap is -1 if no product is left.
  struct Piece {
    int tap, channel;
  };
  FASTLIP_EITHER Piece piece(const Cursor& cursor, int index) const {
    Piece out{cursor.tap_chunk, (cursor.channel_chunk * kPieces + index) * kPiece};
    if (pieces == 1) out = {cursor.tap_chunk * 4 + index, 0};
    if (pieces == 2) out = {cursor.tap_chunk * 2 + index / 2, index % 2 * kPiece};
    if (out.tap >= taps || out.channel >= channels) out.tap = -1;
    return out;
  }
};

// How 64 threads share a square of up to 64 x 64: each takes 8 rows by 8 columns. On smaller squares several threads
// share the same rows and columns, and each takes every second or every fourth piece of the products.
struct Shape {
  static constexpr int kRows = 8, kColumns = 8;  // of a thread
  int row_groups, column_groups, splits;

  FASTLIP_EITHER Shape(int rows, int columns) {
    row_groups = rows <= 16 ? 2 : rows <= 32 ? 4 : 8;
    column_groups = 8;
    splits = 8 / row_groups;
    while (splits < kPieces && columns <= kColumns * column_groups / 2) {
      column_groups /= 2;
      splits *= 2;
    }
  }

  // Neighbouring threads differ in their column first, then in their rows: few words are read twice by a quarter warp.
  FASTLIP_EITHER int row_group(int thread) const { return thread / 2 % row_groups; }
  FASTLIP_EITHER int column_group(int thread) const {
    return thread % 2 + thread / 2 / row_groups % (column_groups / 2) * 2;
  }
  FASTLIP_EITHER int split(int thread) const { return thread / (row_groups * column_groups); }
  // A thread's rows are two runs of four and its columns are strided, so that neighbours' accesses are contiguous.
  FASTLIP_EITHER int row(int thread, int index) const {
    return index / 4 * row_groups * 4 + row_group(thread) * 4 + index % 4;
  }
  FASTLIP_EITHER int column(int thread, int index) const { return column_group(thread) + index * column_groups; }
};

// The factors of a column and of its previous vector: 1 / |x| and |x| / |previous|, or 0 where a length is 0.
template <typename T>
struct Scales {
  T scale, shift;

  FASTLIP_EITHER Scales(const OperatorStep& p, int64_t vector) : scale(1), shift(0) {
    if (p.x_square == nullptr) return;
    const double length = sqrt(p.x_square[vector]);
    scale = static_cast<T>(length > 0 ? 1 / length : 0);
    if (p.previous == nullptr) return;
    const double other = sqrt(p.previous_square[vector]);
    shift = static_cast<T>(other > 0 ? length / other : 0);
  }
};

}  // namespace fastlip::cuda
