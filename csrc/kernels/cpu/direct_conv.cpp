#include "kernels/cpu/direct_conv.h"

#include <algorithm>

namespace fastlip::cpu {
namespace {

constexpr int64_t kLanes = IndirectConv::kLanes;
constexpr int64_t kFloats = 1 << 16;  // of planes and sums together, which L2 holds with room to spare

int64_t divided(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }  // rounded down, for b > 0
int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }           // for a >= 0
int64_t rounded_up(int64_t a, int64_t to) { return divided_up(a, to) * to; }

}  // namespace

DirectConvPlan::DirectConvPlan(DirectConv& p) {
  find_taps(p);
  find_phases(p);
  lay_out(p);
  pack(p);
}

// With i - padding = stride * shift + phase, output X meets pixel X + shift of the phase, which meets output X in turn.
void DirectConvPlan::find_taps(const DirectConv& p) {
  for (int axis = 0; axis < 2; ++axis) {
    bool any = false;
    for (int64_t i = 0; i < p.kernel[axis]; ++i) {
      const int64_t at = i - p.padding[axis], shift = divided(at, p.stride[axis]);
      const Tap tap{at - shift * p.stride[axis], p.adjoint ? -shift : shift};
      taps_[axis].push_back(tap);
      if (tap.phase >= p.image[axis]) continue;  // no pixel has this phase
      least_[axis] = any ? std::min(least_[axis], tap.shift) : tap.shift;
      largest_[axis] = any ? std::max(largest_[axis], tap.shift) : tap.shift;
      any = true;
    }
  }
}

void DirectConvPlan::find_phases(DirectConv& p) {
  // Of the image; those that no tap meets matter as targets alone, as all pixels of the other side do.
  std::vector<int64_t> own[2];
  for (int axis = 0; axis < 2; ++axis) {
    for (int64_t phase = 0; phase < std::min(p.stride[axis], p.image[axis]); ++phase) {
      const auto meets = [&](const Tap& tap) { return tap.phase == phase; };
      if (p.adjoint || std::any_of(taps_[axis].begin(), taps_[axis].end(), meets)) own[axis].push_back(phase);
    }
    const auto count = static_cast<int64_t>(own[axis].size());
    p.source_phases[axis] = p.adjoint ? 1 : count;
    p.target_phases[axis] = p.adjoint ? count : 1;
    p.source_step[axis] = p.adjoint ? 1 : p.stride[axis];
  }
  std::vector<DirectConv::Phase>&image = p.adjoint ? targets_ : sources_, &map = p.adjoint ? sources_ : targets_;
  for (const int64_t a : own[0]) {
    for (const int64_t b : own[1]) {
      image.push_back({{a, b}, {}, 0, nullptr, 0});
      for (int axis = 0; axis < 2; ++axis)
        image.back().size[axis] = divided_up(p.image[axis] - image.back().at[axis], p.stride[axis]);
    }
  }
  map.push_back({{0, 0}, {p.map[0], p.map[1]}, 0, nullptr, 0});
  if (sources_.empty()) p.source_phases[0] = 0;
  p.source_phase = sources_.data();
  p.target_phase = targets_.data();
}

void DirectConvPlan::lay_out(DirectConv& p) {
  int64_t own = 0;  // pixels of a row of a source
  for (const DirectConv::Phase& phase : sources_) own = std::max(own, phase.size[1]);
  const int64_t across = targets_[0].size[1], down = targets_[0].size[0];  // the first phases are the largest
  p.above = least_[0];
  p.reach = largest_[0] - least_[0];
  p.before = std::max<int64_t>(0, -least_[1]);
  // A row's last taps may meet the zeros before the next one.
  p.pitch = std::max(own + std::max(p.before, across - 1 + largest_[1] - (own - 1)), across);
  const int64_t target_phases = p.target_phases[0] * p.target_phases[1];
  const int64_t planes = p.sources * static_cast<int64_t>(sources_.size()), sums = target_phases * p.targets;
  const int64_t room = (kFloats / p.pitch - planes * p.reach) / (planes + sums);
  p.bands = divided_up(down, std::clamp<int64_t>(room, 1, down));
  p.rows = divided_up(down, p.bands);
  // Vectors that begin in a plane end in it.
  p.plane = (p.rows + p.reach) * p.pitch + p.before + kLanes;
  p.planes = static_cast<int64_t>(sources_.size()) * p.plane;
  p.sums = rounded_up(p.rows * p.pitch, kLanes) + kLanes;
  p.joined = rounded_up(p.rows * p.target_phases[0] * (p.adjoint ? p.image[1] : p.map[1]), kLanes) + 2 * kLanes;
  p.x_floats = p.batch * p.sources * (p.adjoint ? p.map[0] * p.map[1] : p.image[0] * p.image[1]);
}

void DirectConvPlan::pack(DirectConv& p) {
  constexpr int64_t kTargets = DirectConv::kTargets;
  const int64_t taps = p.kernel[0] * p.kernel[1];
  const int64_t source_stride = p.adjoint ? p.targets * taps : taps;
  const int64_t target_stride = p.adjoint ? taps : p.sources * taps;
  packed_.reserve(static_cast<size_t>(rounded_up(p.targets, kTargets) * p.sources * taps));
  std::vector<int64_t> met;  // by the phase
  offsets_.reserve(static_cast<size_t>(taps));
  for (DirectConv::Phase& phase : targets_) {
    met.clear();
    phase.offset = offsets_.data() + offsets_.size();
    for (int64_t i = 0; i < p.kernel[0]; ++i) {
      for (int64_t j = 0; j < p.kernel[1]; ++j) {
        const Tap a = taps_[0][i], b = taps_[1][j];
        const DirectConv::Phase* source = sources_.data();
        if (p.adjoint) {
          if (a.phase != phase.at[0] || b.phase != phase.at[1]) continue;
        } else {
          const auto meets = [&](const DirectConv::Phase& s) { return s.at[0] == a.phase && s.at[1] == b.phase; };
          const auto found = std::find_if(sources_.begin(), sources_.end(), meets);
          if (found == sources_.end()) continue;  // no pixel has this phase
          source = &*found;
        }
        met.push_back(i * p.kernel[1] + j);
        offsets_.push_back((source - sources_.data()) * p.plane + (a.shift - p.above) * p.pitch + p.before + b.shift);
      }
    }
    phase.taps = static_cast<int64_t>(met.size());
    phase.weight = static_cast<int64_t>(packed_.size());
    for (int64_t first = 0; first < p.targets; first += kTargets)
      for (int64_t c = 0; c < p.sources; ++c)
        for (const int64_t tap : met)
          for (int64_t t = first; t < first + kTargets; ++t)
            packed_.push_back(t < p.targets ? p.weight[c * source_stride + t * target_stride + tap] : 0.0F);
  }
  p.packed = packed_.data();
}

}  // namespace fastlip::cpu
