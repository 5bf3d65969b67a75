// Convolutions as matrix products over gathered rows on the CPU, compiled once per instruction set.
//
// The rows of the product are the target pixels of all images, in the table's order, which puts pixels that meet the
// same taps side by side. A tile of up to kTileRows rows is gathered once, without the taps that none of its rows
// meets, and multiplied by one group of weight panels after the other, all sums in registers. Several tiles are
// gathered at a time, so that a group of panels comes from memory once for all of them; or one, where L2 holds all
// panels, so that rows of the result are written whole. Every sum is one chain of multiply-adds over taps and channels
// in the table's order, so that an image's result depends on neither its batch nor the threads.
//
// The adjoint reads the same panels, in which its channels are lanes and its outputs rows: the pixels take the lanes,
// gathered in panels of their own, and the sums are transposed when they are written.
#include "kernels/cpu/product.h"

namespace fastlip::cpu {
namespace {

constexpr int kTiles = IndirectConv::kTiles;
constexpr int64_t kTileLanes = kPanels * kLanes;  // rows of the adjoint's tiles
static_assert(kPanels <= IndirectConv::kMostPanels);

// A tile's rows: where their images begin in x, their pixels' rows of the table, where their results go in out.
struct Rows {
  static constexpr int64_t kMost = most<int64_t>(kTileRows, kTileLanes);
  int64_t count;
  bool alike;  // whether all rows meet the same taps
  const float* image[kMost];
  const int32_t* entry[kMost];
  int64_t out[kMost];
};

// Whether two rows of the table meet the same taps.
bool alike(const IndirectConv& p, const int32_t* a, const int32_t* b) {
  for (int64_t t = 1; t <= p.taps; ++t)
    if ((a[t] < 0) != (b[t] < 0)) return false;
  return true;
}

// The rows of the tile that begins at `first`. Rows that meet the same taps are shared out evenly among tiles, or fill
// the adjoint's one after the other; only where they are too few to be worth a tile of their own do others join them.
Rows rows_of_tile(const IndirectConv& p, int64_t first, int64_t end) {
  const int64_t room = p.adjoint ? kTileLanes : kTileRows, worth = (p.adjoint ? kLanes : kTileRows) / 2;
  const int32_t* entry = p.table + first / p.batch * (1 + p.taps);
  int64_t image = first % p.batch;
  int64_t run = least(end, first - image + p.batch);
  for (const int32_t* next = entry + 1 + p.taps; run < end && run - first < room * kTiles; next += 1 + p.taps) {
    if (!alike(p, entry, next)) break;
    run = least(end, run + p.batch);
  }
  Rows rows;
  const int64_t count = run - first, tiles = (count + room - 1) / room;
  rows.alike = count >= worth || run == end;
  rows.count = least(room, rows.alike ? count : end - first);
  if (rows.alike && !p.adjoint) rows.count = (count + tiles - 1) / tiles;
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

// Writes the taps that any of the rows meets; their number.
int64_t meet(const IndirectConv& p, const Rows& rows, int32_t* taps) {
  int64_t count = 0;
  for (int64_t t = 0; t < p.taps; ++t) {
    bool met = rows.entry[0][1 + t] >= 0;
    if (!rows.alike)
      for (int64_t r = 1; r < rows.count; ++r) met |= rows.entry[r][1 + t] >= 0;
    if (met) taps[count++] = static_cast<int32_t>(t);
  }
  return count;
}

struct Tile {
  Rows rows;
  int64_t panels;   // of rows: the adjoint's
  Factors factors;  // but for the weights
};

// Copies a tile's rows at their taps to `to`.
void gather(const IndirectConv& p, const Rows& rows, const int32_t* taps, int64_t count, float* to) {
  const int64_t step = rows.count * kDepth;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t source = rows.entry[r][1 + taps[i]];
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
}

// Copies up to kLanes rows, from `first` on, at their taps to `to`: [taps, channels, kLanes].
void gather_lanes(const IndirectConv& p, const Rows& rows, int64_t first, const int32_t* taps, int64_t count,
                  float* to) {
  for (int64_t i = 0; i < count; ++i, to += p.channels * kLanes) {
    for (int64_t begin = 0; begin < kLanes; begin += kWidth) {
      const float* from[kWidth] = {};  // null: 0
      for (int64_t r = first + begin; r < least(first + begin + kWidth, rows.count); ++r)
        if (const int64_t source = rows.entry[r][1 + taps[i]]; source >= 0)
          from[r - first - begin] = rows.image[r] + source * p.channels;
      int64_t c = 0;
      for (; c + kWidth <= p.channels; c += kWidth) {
        Lanes v[kWidth];
#pragma GCC unroll 16
        for (int r = 0; r < kWidth; ++r) v[r] = from[r] ? load<Lanes>(from[r] + c) : Lanes{};
        transpose(v);
#pragma GCC unroll 16
        for (int k = 0; k < kWidth; ++k) store<Lanes>(to + (c + k) * kLanes + begin, v[k]);
      }
      for (; c < p.channels; ++c)
        for (int r = 0; r < kWidth; ++r) to[c * kLanes + begin + r] = from[r] ? from[r][c] : 0.0F;
    }
  }
}

// The next tile, gathered to `values`, and where these end; none and null if there is room for fewer than it takes.
float* next_tile(const IndirectConv& p, int64_t begin, int64_t end, float* values, int64_t room, int32_t* taps,
                 Tile* tile) {
  const Rows& rows = tile->rows = rows_of_tile(p, begin, end);
  const int64_t count = meet(p, rows, taps), panels = (rows.count + kLanes - 1) / kLanes;
  const int64_t panel = count * p.channels * kLanes;
  const int64_t size = p.adjoint ? panels * panel : count * rows.count * round_up(p.channels, kDepth);
  const int64_t largest = (p.adjoint ? kTileLanes : kTileRows) * p.taps * round_up(p.channels, kDepth);
  if (room < p.values() && largest > room) return nullptr;
  tile->panels = panels;
  if (p.adjoint) {
    for (int64_t i = 0; i < panels; ++i) gather_lanes(p, rows, i * kLanes, taps, count, values + i * panel);
    tile->factors = {nullptr, p.outputs * kLanes, p.taps * p.outputs * kLanes, values, panel, taps, count, p.channels};
  } else {
    gather(p, rows, taps, count, values);
    tile->factors = {values,
                     rows.count * round_up(p.channels, kDepth),
                     rows.count * kDepth,
                     nullptr,
                     p.taps * p.channels * kLanes,
                     taps,
                     count,
                     p.channels};
  }
  return values + size;
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

// Writes outputs [begin, end) of a tile's rows, whose sums are [end - begin, kLanes x panels].
void finish_lanes(const IndirectConv& p, const float* sums, const Tile& tile, int64_t begin, int64_t end) {
  const int64_t stride = tile.panels * kLanes;
  for (int64_t channel = begin; channel < end; channel += kWidth, sums += kWidth * stride) {
    for (int64_t first = 0; first < tile.rows.count; first += kWidth) {
      Lanes v[kWidth];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i) v[i] = channel + i < end ? load<Lanes>(sums + i * stride + first) : Lanes{};
      transpose(v);
      const int64_t rows = least(kWidth, tile.rows.count - first);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = tile.rows.out[first + r] + channel;
        if (channel + kWidth <= end) {
          finish(p, at, channel, v[r]);
        } else {
          for (int64_t i = 0; channel + i < end; ++i) finish(p, at + i, channel + i, float{v[r][i]});
        }
      }
    }
  }
}

// Outputs of some panels of some tiles.
void finish_forward(const IndirectConv& p, Tile* tile, int64_t tiles, int64_t first_panel, int64_t last_panel) {
  alignas(64) float sums[kTileRows * kPanels * kLanes];
  for (int64_t q = first_panel; q < last_panel; q += kPanels) {
    const int64_t count = least<int64_t>(kPanels, last_panel - q);
    const int64_t width = least(count * kLanes, p.outputs - q * kLanes);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t rows = tile[i].rows.count;
      for (int64_t r = 0; r < rows; ++r) fetch(p, tile[i].rows.out[r] + q * kLanes, width);
      const Multiply run = count == kPanels ? multiply_of<kPanels>(rows) : multiply_of<1>(rows);
      tile[i].factors.lanes = p.weight + q * tile[i].factors.panel;
      run(sums, false, tile[i].factors);
      finish_rows(p, sums, tile[i].rows, count * kLanes, q * kLanes, width);
    }
  }
}

void finish_adjoint(const IndirectConv& p, Tile* tile, int64_t tiles, int64_t first_panel, int64_t last_panel,
                    float* sums) {
  constexpr int64_t kStep = IndirectConv::kOutputs * kTileLanes;  // from tile to tile
  const int64_t panels = last_panel - first_panel, parts = (panels * kLanes - 1) / IndirectConv::kOutputs + 1;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = (first_panel + panels * part / parts) * kLanes;
    const int64_t end = least(p.outputs, (first_panel + panels * (part + 1) / parts) * kLanes);
    const int64_t count = end - begin, groups = (count + kTileRows - 1) / kTileRows;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = count * group / groups, outputs = count * (group + 1) / groups - first;
      for (int64_t i = 0; i < tiles; ++i) {
        if (group == 0)
          for (int64_t r = 0; r < tile[i].rows.count; ++r) fetch(p, tile[i].rows.out[r] + begin, count);
        const Multiply run =
            tile[i].panels == kPanels ? multiply_of<kPanels, true>(outputs) : multiply_of<1, true>(outputs);
        tile[i].factors.rows = p.weight + (begin + first) * kLanes;
        run(sums + i * kStep + first * tile[i].panels * kLanes, false, tile[i].factors);
      }
    }
    for (int64_t i = 0; i < tiles; ++i) finish_lanes(p, sums + i * kStep, tile[i], begin, end);
  }
}

}  // namespace

void FASTLIP_CAT(indirect_conv_, FASTLIP_ISA)(const IndirectConv&, int64_t, int64_t, int64_t, int64_t, void*);
void FASTLIP_CAT(indirect_conv_, FASTLIP_ISA)(const IndirectConv& p, int64_t begin, int64_t end, int64_t first_panel,
                                              int64_t last_panel, void* scratch) {
  float* const values = static_cast<float*>(scratch);
  float* const sums = values + p.values();
  auto* const taps = reinterpret_cast<int32_t*>(sums + p.sums());
  const int64_t panels = last_panel - first_panel;
  const bool whole = panels <= kPanels || panels * kLanes * p.taps * p.channels <= IndirectConv::kInL2;
  while (begin < end) {
    Tile tile[kTiles];
    int64_t tiles = 0;
    for (float* to = values; begin < end && tiles < (whole ? 1 : kTiles); ++tiles) {
      to = next_tile(p, begin, end, to, values + p.values() - to, taps + tiles * p.taps, tile + tiles);
      if (to == nullptr) break;
      begin += tile[tiles].rows.count;
    }
    if (p.adjoint) {
      finish_adjoint(p, tile, tiles, first_panel, last_panel, sums);
    } else {
      finish_forward(p, tile, tiles, first_panel, last_panel);
    }
  }
}

}  // namespace fastlip::cpu
