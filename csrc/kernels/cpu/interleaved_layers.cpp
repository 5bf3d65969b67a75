#include "kernels/cpu/interleaved_layers.h"

#include <algorithm>

namespace fastlip::cpu {
namespace {

int64_t divided(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }  // rounded down, for b > 0

}  // namespace

InterleavedPlan::Tables InterleavedPlan::tables_of(const InterleavedLayer& layer, bool adjoint) {
  Tables tables{};
  // Output o meets input o * stride + shift at a tap, and so input i meets output (i - shift) / stride where that is
  // whole.
  const auto shift = [&](int axis, int64_t tap) { return tap * layer.dilation[axis] - layer.padding[axis]; };
  const auto met = [&](int axis, int64_t target, int64_t tap) {
    return adjoint ? divided(target - shift(axis, tap), layer.stride[axis])
                   : target * layer.stride[axis] + shift(axis, tap);
  };
  const auto meets = [&](int axis, int64_t target, int64_t tap) {
    return !adjoint || (target - shift(axis, tap)) % layer.stride[axis] == 0;
  };
  const int64_t source_height = adjoint ? layer.map(0) : layer.size[0];
  const int64_t target_height = adjoint ? layer.size[0] : layer.map(0);
  for (int64_t row = 0; row < target_height; ++row) {
    for (int64_t tap = 0; tap < layer.kernel[0]; ++tap) {
      const int64_t source = met(0, row, tap);
      if (meets(0, row, tap) && source >= 0 && source < source_height) tables.rows.taps.push_back({tap, source});
    }
    tables.rows.begin.push_back(static_cast<int64_t>(tables.rows.taps.size()));
  }
  const int64_t source_width = adjoint ? layer.map(1) : layer.size[1];
  const int64_t target_width = adjoint ? layer.size[1] : layer.map(1);
  const int64_t phases = adjoint ? layer.stride[1] : 1, step = adjoint ? 1 : layer.stride[1];
  for (int64_t phase = 0; phase < phases; ++phase) {
    const int64_t count = phase < target_width ? (target_width - phase - 1) / phases + 1 : 0;
    for (int64_t tap = 0; tap < layer.kernel[1] && count > 0; ++tap) {
      if (!meets(1, phase, tap)) continue;
      const int64_t first = met(1, phase, tap), last = first + (count - 1) * step;
      if (last < 0 || first >= source_width) continue;  // padding alone
      tables.columns.taps.push_back({tap, first});
      tables.before = std::max(tables.before, -first);
      tables.after = std::max(tables.after, last - (source_width - 1));
    }
    tables.columns.begin.push_back(static_cast<int64_t>(tables.columns.taps.size()));
  }
  return tables;
}

InterleavedPlan::InterleavedPlan(InterleavedLayers& p, const std::vector<InterleavedLayer>& layers) {
  const auto count = static_cast<int64_t>(layers.size());
  // Where the flags of each layer's output begin; one more in front, for the input, which has none.
  std::vector<int64_t> flags{-1};
  for (const InterleavedLayer& layer : layers) {
    flags.push_back(layer.flags() && p.active ? p.flags : -1);
    p.flags += layer.flags();
  }
  const auto is_max = [&](int64_t i) { return i >= 0 && layers[i].kind == InterleavedLayers::Kind::kMaxPool; };
  tables_.reserve(layers.size());
  for (int64_t i = 0; i < count; ++i) tables_.push_back(tables_of(layers[p.adjoint ? count - 1 - i : i], p.adjoint));

  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = p.adjoint ? count - 1 - i : i;
    const InterleavedLayer& layer = layers[at];
    const Tables& own = tables_[i];
    const Maps image{layer.channels, layer.size[0], layer.size[1], layer.size[1], 0};
    const Maps map{layer.outputs, layer.map(0), layer.map(1), layer.map(1), 0};
    Step step{};
    step.kind = layer.kind;
    step.source = p.adjoint ? map : image;
    step.target = p.adjoint ? image : map;
    step.source.before = own.before;
    step.source.pitch += own.before + own.after;
    // Maps that are not laid out as this step wants them are laid out anew.
    if (!steps_.empty()) {
      Maps& last = steps_.back().target;
      if (last.channels == step.source.channels) {
        last = step.source;
      } else if (step.source.pitch != step.source.width) {
        Step spread{};
        spread.kind = InterleavedLayers::Kind::kSpread;
        spread.source = step.source;
        spread.source.pitch = step.source.width;
        spread.source.before = 0;
        spread.target = step.source;
        spread.flags = spread.taken = -1;
        steps_.push_back(spread);
      }
    }
    step.weight = layer.weight;
    step.bias = p.adjoint ? nullptr : layer.bias;
    step.relu = !p.adjoint && layer.relu;
    step.flags = flags[p.adjoint ? at : at + 1];
    step.taken = -1;
    if (p.adjoint) {
      if (is_max(at)) step.taken = flags[at + 1];
      if (is_max(at - 1)) step.flags = -1;  // which of them a ReLU stops is known where they are shared out
    }
    step.taps = layer.kernel[0] * layer.kernel[1];
    step.taps_across = layer.kernel[1];
    step.source_step = p.adjoint ? 1 : layer.stride[1];
    step.target_step = p.adjoint ? layer.stride[1] : 1;
    step.row = own.rows.taps.data();
    step.row_begin = own.rows.begin.data();
    step.column = own.columns.taps.data();
    step.column_begin = own.columns.begin.data();
    steps_.push_back(step);
  }
  p.x_flags = p.adjoint && !is_max(count - 1) ? flags[count] : -1;
  p.step = steps_.data();
  p.steps = static_cast<int64_t>(steps_.size());
  for (int64_t i = 0; i < p.steps; ++i) {
    p.floats[i % 2] = std::max(p.floats[i % 2], p.step[i].source.floats());
    p.floats[(i + 1) % 2] = std::max(p.floats[(i + 1) % 2], p.step[i].target.floats());
  }
}

}  // namespace fastlip::cpu
