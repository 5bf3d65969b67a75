// The layout in which operator_step_ reads convolution kernels. CPU and CUDA share this header; everything has internal
// linkage (see cpu/scalar.h).
//
// The target channels of a group are in blocks of 64, the last one padded with zeros to a multiple of 16. A block holds
// its targets next to each other, for each tap and each source channel. A depthwise convolution is one group whose
// targets have one source channel.
#pragma once
#include "kernels/api.h"
#include "kernels/either.h"

namespace fastlip {
namespace {

using PackProblem = PackWeights::Problem;

FASTLIP_EITHER int64_t pack_padded(int64_t channels) {
  return (channels + OperatorStep::kLanes - 1) / OperatorStep::kLanes * OperatorStep::kLanes;
}
FASTLIP_EITHER int64_t pack_size(const PackProblem& p) {
  return int64_t{p.groups} * p.sources * p.taps * pack_padded(p.targets);
}
// Elements from one target to the next, and from one source to the next, in the weight; taps are 1 apart.
FASTLIP_EITHER int64_t pack_target_stride(const PackProblem& p, bool adjoint) {
  return adjoint ? p.taps : int64_t{p.sources} * p.taps;
}
FASTLIP_EITHER int64_t pack_source_stride(const PackProblem& p, bool adjoint) {
  return adjoint ? int64_t{p.targets} * p.taps : p.taps;
}

// Index in the weight of the packed element `at` of a problem, -1 for padding.
FASTLIP_EITHER int64_t pack_source(const PackProblem& p, bool adjoint, int64_t at) {
  const int64_t rows = int64_t{p.sources} * p.taps, per_group = rows * pack_padded(p.targets);
  const int64_t group = at / per_group;
  at -= group * per_group;
  const int64_t block = at / (rows * OperatorStep::kBlock), first = block * OperatorStep::kBlock;
  at -= first * rows;
  const int64_t left = p.targets - first;
  const int64_t width = left < OperatorStep::kBlock ? pack_padded(left) : OperatorStep::kBlock;
  const int64_t row = at / width, lane = at - row * width;
  if (lane >= left) return -1;
  const int64_t tap = row / p.sources, source = row - tap * p.sources;
  return group * p.targets * rows + (first + lane) * pack_target_stride(p, adjoint) +
         source * pack_source_stride(p, adjoint) + tap;
}

}  // namespace
}  // namespace fastlip
