// The geometry of a convolution by direct summation, the same for all instruction sets.
#pragma once

#include <vector>

#include "kernels/api.h"

namespace fastlip::cpu {

// What a DirectConv points to.
class DirectConvPlan {
 public:
  // Completes a convolution, of which all but what a plan makes is there.
  explicit DirectConvPlan(DirectConv&);

 private:
  // Which phase of the image a tap of one side meets, and how far on.
  struct Tap {
    int64_t phase, shift;
  };
  void find_taps(const DirectConv&);
  void find_phases(DirectConv&);
  void lay_out(DirectConv&);
  void pack(DirectConv&);

  std::vector<Tap> taps_[2];
  int64_t least_[2] = {}, largest_[2] = {};  // shifts
  std::vector<DirectConv::Phase> sources_, targets_;
  std::vector<int64_t> offsets_;
  std::vector<float> packed_;
};

}  // namespace fastlip::cpu
