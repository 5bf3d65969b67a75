// Where a tile of operator_step_ finds its operands and puts its results, and in which order it takes the products:
// free of threads, so that a host compiler takes it too.
#pragma once
#include "kernels/cuda/arithmetic.h"

namespace fastlip::cuda {

// A tile is computed in squares of 64 target channels (rows) by 64 columns.
constexpr int kTileRows = OperatorStep::kBlock, kTileColumns = OperatorStep::kPartColumns;
constexpr int kPieces = 4;  // a chunk's products of an element, in pieces of 16 bytes

// One row of the tile table with what it refers to. Offsets are in elements.
struct TilePlace {
  const int32_t* taps;     // [bundle's taps] taps of the kernel
  const int32_t* targets;  // [pixels]
  const int32_t* sources;  // [bundle's taps, pixels]
  int64_t pixels;
  int64_t source_at;                 // of the group's first channel in pixel 0 and chain 0
  int64_t target_at;                 // of the block's first channel there
  int64_t weight_at;                 // of the block
  int source_row, target_row;        // from pixel to pixel
  int source_pixels, target_pixels;  // of a chain; times the chains fewer than 2^31, too
  int column, columns;               // fewer than 2^31 in a bundle
  int tap_count, channels, chains;
  int lanes, rows;  // channels of the block as packed, and as they are

  FASTLIP_HD TilePlace(const OperatorStep& p, const OperatorStep::Problem& problem, const OperatorStep::Tile& tile,
                       const OperatorStep::Bundle& bundle)
      : taps(p.entries + bundle.taps_at),
        targets(p.entries + bundle.targets_at),
        sources(p.entries + bundle.sources_at),
        pixels(bundle.pixels),
        source_at(problem.source_at + tile.group * problem.source_channels),
        target_at(problem.target_at + tile.group * problem.target_channels + tile.block * kTileRows),
        source_row(static_cast<int>(problem.groups * problem.source_channels)),
        target_row(static_cast<int>(problem.groups * problem.target_channels)),
        source_pixels(static_cast<int>(problem.source_pixels)),
        target_pixels(static_cast<int>(problem.target_pixels)),
        column(static_cast<int>(tile.column)),
        columns(static_cast<int>(tile.columns)),
        tap_count(static_cast<int>(bundle.taps)),
        channels(static_cast<int>(problem.source_channels)),
        chains(static_cast<int>(problem.chains)) {
    const int64_t padded =
        (problem.target_channels + OperatorStep::kLanes - 1) / OperatorStep::kLanes * OperatorStep::kLanes;
    const int64_t left = problem.target_channels - tile.block * kTileRows;
    lanes = static_cast<int>(padded - tile.block * kTileRows < kTileRows ? padded - tile.block * kTileRows : kTileRows);
    rows = static_cast<int>(left < kTileRows ? left : kTileRows);
    const int64_t products = problem.taps * (problem.depthwise ? 1 : problem.source_channels);
    weight_at = problem.weight_at + products * (tile.group * padded + tile.block * kTileRows);
  }

  // The pixel (an index into the bundle's) and the chain of a column, which counts from the bundle's first.
  FASTLIP_HD int pixel_of(int at) const { return at / chains; }
  FASTLIP_HD int chain_of(int at) const { return at % chains; }
  // Offset in x of a source pixel's channels, and in out of a target pixel's; pixels are counted over all chains.
  FASTLIP_HD int64_t source_of(int pixel) const { return source_at + static_cast<int64_t>(pixel) * source_row; }
  FASTLIP_HD int64_t target_of(int pixel) const { return target_at + static_cast<int64_t>(pixel) * target_row; }
  // Offset of the weights with which a channel meets the block through a tap of the kernel; a channel of the block has
  // fewer than 2^31 of them.
  FASTLIP_HD int64_t weight_of(int tap, int channel) const {
    return weight_at + static_cast<int64_t>(tap * channels + channel) * lanes;
  }
};

// The products of an element in chunks of four pieces of kPiece channels, taps running faster than channels: what one
// tap fetched from a pixel is still near when the next tap meets the same pixel. Few channels: several taps a chunk.
template <int kPiece>
struct Chunks {
  int taps, channels;
  int pieces;      // of a tap
  int taps_each;   // taps of a chunk
  int tap_chunks;  // chunks over the taps
  int count;

  FASTLIP_HD Chunks(int taps, int channels)
      : taps(taps),
        channels(channels),
        pieces((channels + kPiece - 1) / kPiece),
        taps_each(pieces == 1   ? 4
                  : pieces == 2 ? 2
                                : 1),
        tap_chunks((taps + taps_each - 1) / taps_each),
        count(tap_chunks * ((pieces + kPieces - 1) / kPieces)) {}

  // First chunk of a part; that of `parts` ends the last.
  FASTLIP_HD int begin(int64_t part, int64_t parts) const { return static_cast<int>(count * part / parts); }

  struct Cursor {
    int tap_chunk, channel_chunk;
  };
  FASTLIP_HD Cursor cursor(int chunk) const {
    return tap_chunks == 0 ? Cursor{0, 0} : Cursor{chunk % tap_chunks, chunk / tap_chunks};
  }
  FASTLIP_HD void advance(Cursor& cursor) const {
    if (++cursor.tap_chunk == tap_chunks) {
      cursor.tap_chunk = 0;
      ++cursor.channel_chunk;
    }
  }

  // A piece: its tap, an index into the bundle's, and its first channel. No tap (-1) where nothing is left.
  struct Piece {
    int tap, channel;
  };
  FASTLIP_HD Piece piece(const Cursor& cursor, int index) const {
    Piece out{cursor.tap_chunk, (cursor.channel_chunk * kPieces + index) * kPiece};
    if (pieces == 1) out = {cursor.tap_chunk * 4 + index, 0};
    if (pieces == 2) out = {cursor.tap_chunk * 2 + index / 2, index % 2 * kPiece};
    if (out.tap >= taps || out.channel >= channels) out.tap = -1;
    return out;
  }
};

// How 64 threads share a square of up to 64 x 64: each takes 8 rows by 8 columns, and where that leaves threads over,
// they take every second or every fourth piece of the products.
struct Shape {
  static constexpr int kRows = 8, kColumns = 8;  // of a thread
  int row_groups, column_groups, splits;

  FASTLIP_HD Shape(int rows, int columns) {
    row_groups = rows <= 16 ? 2 : rows <= 32 ? 4 : 8;
    column_groups = 8;
    splits = 8 / row_groups;
    while (splits < kPieces && columns <= kColumns * column_groups / 2) {
      column_groups /= 2;
      splits *= 2;
    }
  }

  // Neighbours differ in their column, then in their rows: a quarter of a warp reads few words more than once.
  FASTLIP_HD int row_group(int thread) const { return thread / 2 % row_groups; }
  FASTLIP_HD int column_group(int thread) const {
    return thread % 2 + thread / 2 / row_groups % (column_groups / 2) * 2;
  }
  FASTLIP_HD int split(int thread) const { return thread / (row_groups * column_groups); }
  // A thread's rows are two runs of four, its columns stand apart: neighbours' accesses are contiguous.
  FASTLIP_HD int row(int thread, int index) const {
    return index / 4 * row_groups * 4 + row_group(thread) * 4 + index % 4;
  }
  FASTLIP_HD int column(int thread, int index) const { return column_group(thread) + index * column_groups; }
};

// What a column is multiplied by, and its previous vector: 1 / |x| and |x| / |previous|; 0 where a length is 0.
template <typename T>
struct Scales {
  T scale, shift;

  FASTLIP_HD Scales(const OperatorStep& p, int64_t chain) : scale(1), shift(0) {
    if (p.x_square == nullptr) return;
    const double length = sqrt(p.x_square[chain]);
    scale = static_cast<T>(length > 0 ? 1 / length : 0);
    if (p.previous == nullptr) return;
    const double other = sqrt(p.previous_square[chain]);
    shift = static_cast<T>(other > 0 ? length / other : 0);
  }
};

}  // namespace fastlip::cuda
