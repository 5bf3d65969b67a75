// Convolutions as matrix products over gathered rows on the CPU, compiled once per instruction set.
//
// The rows of the product are the target pixels of all images, in the table's order, which puts pixels that meet the
// same taps side by side. A tile of up to kTileRows rows is gathered once, without the taps that none of its rows
// meets, and multiplied by one group of weight panels after the other, all sums in registers. Several tiles are
// gathered at a time, so that a group of panels comes from memory once for all of them. Every sum is one chain of
// multiply-adds over taps and channels in the table's order, so that an image's result depends on neither its batch nor
// the threads.
#include "kernels/cpu/product.h"

namespace fastlip::cpu {
namespace {

constexpr int kTiles = IndirectConv::kTiles;

// A tile's rows: where their images begin in x, their pixels' rows of the table, where their results go in out.
struct Rows {
  int64_t count;
  bool alike;  // whether all rows meet the same taps
  const float* image[kTileRows];
  const int32_t* entry[kTileRows];
  int64_t out[kTileRows];
};

// Whether two rows of the table meet the same taps.
bool alike(const IndirectConv& p, const int32_t* a, const int32_t* b) {
  for (int64_t t = 1; t <= p.taps; ++t)
    if ((a[t] < 0) != (b[t] < 0)) return false;
  return true;
}

// The rows of the tile that begins at `first`. Rows that meet the same taps are shared out evenly among tiles; only
// where they are too few to be worth a tile of their own do others join them.
Rows rows_of_tile(const IndirectConv& p, int64_t first, int64_t end) {
  const int32_t* entry = p.table + first / p.batch * (1 + p.taps);
  int64_t image = first % p.batch;
  int64_t run = least(end, first - image + p.batch);
  for (const int32_t* next = entry + 1 + p.taps; run < end && run - first < kTileRows * kTiles; next += 1 + p.taps) {
    if (!alike(p, entry, next)) break;
    run = least(end, run + p.batch);
  }
  Rows rows;
  const int64_t count = run - first, tiles = (count + kTileRows - 1) / kTileRows;
  rows.alike = count >= kTileRows / 2 || run == end;
  rows.count = rows.alike ? (count + tiles - 1) / tiles : least<int64_t>(kTileRows, end - first);
  for (int64_t r = 0; r < rows.count; ++r) {
    rows.image[r] = p.x + image * p.sources * p.channels;
    rows.entry[r] = entry;
    rows.out[r] = (image * p.targets + entry[0]) * p.outputs;
    if (++image == p.batch) {
      image = 0;
      entry += 1 + p.taps;
    }
  }
  return rows;
}

// Copies the channels that a row meets at a tap; `step` elements lie between its pieces of kDepth.
inline void copy_channels(float* to, const float* from, int64_t channels, int64_t step) {
  int64_t c = 0;
  for (; c + kDepth <= channels; c += kDepth, to += step)
#pragma GCC unroll 4
    for (int64_t k = 0; k < kDepth; k += kWidth) store<Lanes>(to + k, load<Lanes>(from + c + k));
  for (int64_t k = 0; c + k < channels; ++k) to[k] = from[c + k];
}

struct Tile {
  Rows rows;
  Gathered gathered;
};

// Copies a tile's rows to `values` and the taps that any of them meets to `taps`; `end` is where the values end.
Tile gather(const IndirectConv& p, const Rows& rows, float* values, int32_t* taps, float** end) {
  const int64_t step = rows.count * kDepth;
  int64_t count = 0;
  float* to = values;
  for (int64_t t = 0; t < p.taps; ++t) {
    bool met = rows.entry[0][1 + t] >= 0;
    if (!rows.alike)
      for (int64_t r = 1; r < rows.count; ++r) met |= rows.entry[r][1 + t] >= 0;
    if (!met) continue;
    taps[count++] = static_cast<int32_t>(t);
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t source = rows.entry[r][1 + t];
      float* into = to + r * kDepth;
      if (source >= 0) {
        copy_channels(into, rows.image[r] + source * p.channels, p.channels, step);
      } else {
        for (int64_t c = 0; c < p.channels; c += kDepth, into += step)
          for (int64_t k = 0; k < kDepth; k += kWidth) store<Lanes>(into + k, Lanes{});
      }
    }
    to += rows.count * round_up(p.channels, kDepth);
  }
  *end = to;
  return {rows, {values, taps, count}};
}

// Writes `width` channels of a tile's rows, from `channel` on.
void finish_rows(const IndirectConv& p, const float* sums, const Rows& rows, int64_t stride, int64_t channel,
                 int64_t width) {
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t at = rows.out[r] + channel;
    const float* sum = sums + r * stride;
    int64_t i = 0;
    for (; i + kWidth <= width; i += kWidth) finish(p, at + i, channel + i, load<Lanes>(sum + i));
    for (; i < width; ++i) finish(p, at + i, channel + i, sum[i]);
  }
}

}  // namespace

void FASTLIP_CAT(indirect_conv_, FASTLIP_ISA)(const IndirectConv&, int64_t, int64_t, int64_t, int64_t, void*);
void FASTLIP_CAT(indirect_conv_, FASTLIP_ISA)(const IndirectConv& p, int64_t begin, int64_t end, int64_t first_panel,
                                              int64_t last_panel, void* scratch) {
  float* const values = static_cast<float*>(scratch);
  auto* const taps = reinterpret_cast<int32_t*>(values + IndirectConv::values_of(p.taps, p.channels));
  const int64_t largest = kTileRows * p.taps * round_up(p.channels, kDepth);  // values of a tile
  const int64_t most = last_panel - first_panel > kPanels ? kTiles : 1;       // what is read once may stay in L1
  const int64_t panel = p.taps * p.channels * kLanes;
  alignas(64) float sums[kTileRows * kPanels * kLanes];
  while (begin < end) {
    Tile tile[kTiles];
    int64_t tiles = 0;
    for (float* to = values; begin < end && tiles < most; ++tiles) {
      if (tiles > 0 && to - values + largest > IndirectConv::values_of(p.taps, p.channels)) break;
      tile[tiles] = gather(p, rows_of_tile(p, begin, end), to, taps + tiles * p.taps, &to);
      begin += tile[tiles].rows.count;
    }
    for (int64_t q = first_panel; q < last_panel; q += kPanels) {
      const int64_t count = least<int64_t>(kPanels, last_panel - q);
      const int64_t width = least(count * kLanes, p.outputs - q * kLanes);
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t rows = tile[i].rows.count;
        for (int64_t r = 0; r < rows; ++r) fetch(p, tile[i].rows.out[r] + q * kLanes, width);
        const Multiply run = count == kPanels ? multiply_of<kPanels>(rows) : multiply_of<1>(rows);
        run(sums, false, tile[i].gathered, p.weight + q * panel, panel, p.channels);
        finish_rows(p, sums, tile[i].rows, count * kLanes, q * kLanes, width);
      }
    }
  }
}

}  // namespace fastlip::cpu
