// The geometry of layers that run on interleaved images, the same for all instruction sets.
#pragma once

#include <vector>

#include "kernels/api.h"

namespace fastlip::cpu {

// A convolution of one group, padded with zeros; a linear layer, whose maps have one pixel; or a pool over each
// channel.
struct InterleavedLayer {
  InterleavedLayers::Kind kind;
  int64_t channels, outputs;
  int64_t size[2];  // of the input's maps; rows and columns, as those below are
  int64_t kernel[2], stride[2], dilation[2], padding[2];
  bool relu;
  const float* weight;  // of a convolution, as InterleavedLayers::Step says; for the adjoint its outputs are sources
  const float* bias;

  int64_t map(int axis) const {  // the size of the output's maps; 0 or less where there is none
    const int64_t reach = dilation[axis] * (kernel[axis] - 1) + 1, room = size[axis] + 2 * padding[axis] - reach;
    return room < 0 ? 0 : room / stride[axis] + 1;
  }
  int64_t elements() const { return outputs * map(0) * map(1); }
  int64_t flags() const { return relu || kind == InterleavedLayers::Kind::kMaxPool ? elements() : 0; }
};

// What an InterleavedLayers points to.
class InterleavedPlan {
 public:
  // Completes `p`, whose operands, batch and direction are there. Each layer takes what the one before it gives.
  InterleavedPlan(InterleavedLayers& p, const std::vector<InterleavedLayer>& layers);

 private:
  using Maps = InterleavedLayers::Maps;
  using Step = InterleavedLayers::Step;
  using Tap = InterleavedLayers::Tap;
  // For each target row, or for each phase of target columns, the taps that it meets.
  struct Axis {
    std::vector<Tap> taps;
    std::vector<int64_t> begin{0};
  };
  struct Tables {
    Axis rows, columns;
    int64_t before, after;  // columns that taps reach beyond the source's
  };

  static Tables tables_of(const InterleavedLayer&, bool adjoint);

  std::vector<Tables> tables_;
  std::vector<Step> steps_;
};

}  // namespace fastlip::cpu
