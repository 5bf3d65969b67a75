// Checks and operands of the convolutions that run on the CPU alone.
#pragma once
#include <algorithm>
#include <array>
#include <vector>

#include "kernels/cpu/direct_conv.h"
#include "kernels/cpu/interleaved_layers.h"
#include "torch/common.h"

namespace fastlip {

inline const float* host_floats(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.device().is_cpu(), name,
                  " must be contiguous float32 on the CPU");
  return static_cast<const float*>(t.const_data_ptr());
}

// Maps are [B, C, H, W] here, contiguous or channels_last. Their strides, also along axes of one element:
inline std::array<int64_t, 4> strides_of(const Tensor& maps, bool channels_last) {
  const int64_t channels = maps.size(1), height = maps.size(2), width = maps.size(3);
  if (channels_last) return {channels * height * width, 1, width * channels, channels};
  return {channels * height * width, height * width, width, 1};
}
inline bool has_strides(const Tensor& maps, const std::array<int64_t, 4>& strides) {
  for (int64_t d = 0; d < 4; ++d)
    if (maps.size(d) > 1 && maps.stride(d) != strides[d] && maps.numel() > 0) return false;
  return true;
}

// The elements of maps, which are channels_last, or `either`.
inline const float* map_floats(const Tensor& maps, const char* name, bool either = false) {
  STD_TORCH_CHECK(
      maps.scalar_type() == ScalarType::Float && maps.device().is_cpu() &&
          (has_strides(maps, strides_of(maps, true)) || (either && has_strides(maps, strides_of(maps, false)))),
      name, " must be float32 on the CPU, ", either ? "contiguous or channels_last" : "channels_last");
  return static_cast<const float*>(maps.const_data_ptr());
}

// What follows a convolution's sums: null where it is left out.
struct Epilogue {
  const float *bias, *other;
  uint8_t* active;
};

inline Epilogue epilogue_of(const Tensor& out, const Tensor& bias, const Tensor& other, Tensor& active) {
  const auto given = [&](const Tensor& t, const char* name, ScalarType dtype) {
    if (t.numel() == 0) return false;
    bool alike = t.dim() == 4 && t.scalar_type() == dtype && t.device().is_cpu();
    for (int64_t d = 0; alike && d < 4; ++d)
      alike = t.size(d) == out.size(d) && (t.size(d) == 1 || t.stride(d) == out.stride(d));
    STD_TORCH_CHECK(alike, name, " must be ", dtype == ScalarType::Bool ? "bool" : "float32",
                    " on the CPU with out's shape and memory format");
    return true;
  };
  STD_TORCH_CHECK(bias.numel() == 0 || (bias.dim() == 1 && bias.size(0) == out.size(1)),
                  "bias must have an element for each channel of out");
  Epilogue then{};
  if (bias.numel() > 0) then.bias = host_floats(bias, "bias");
  if (given(other, "other", ScalarType::Float)) then.other = static_cast<const float*>(other.const_data_ptr());
  if (given(active, "active", ScalarType::Bool)) then.active = static_cast<uint8_t*>(active.mutable_data_ptr());
  return then;
}

// Whether `weight` is packed for a map by `taps` taps from `channels` to `outputs`, or, for its adjoint, the other way.
inline void check_packed(const Tensor& weight, const char* taps_name, int64_t taps, bool adjoint, int64_t channels,
                         int64_t outputs) {
  constexpr int64_t kLanes = IndirectConv::kLanes;
  const int64_t lanes = adjoint ? channels : outputs, rows = adjoint ? outputs : channels;
  STD_TORCH_CHECK(weight.dim() == 3 && weight.size(0) == (lanes + kLanes - 1) / kLanes &&
                      weight.size(1) == taps * rows && weight.size(2) == kLanes,
                  "weight must be [panels, ", taps_name, " * ", adjoint ? "outputs" : "channels", ", 16]");
}

// The table's entries are trusted.
inline IndirectConv indirect_conv_of(Tensor& out, const Tensor& x, const Tensor& weight, const Tensor& table,
                                     bool adjoint, const Tensor& bias, const Tensor& other, Tensor& active, bool relu) {
  STD_TORCH_CHECK(x.dim() == 4 && out.dim() == 4 && x.size(0) == out.size(0),
                  "x must be [B, channels, H, W], and out [B, outputs, H', W']");
  map_floats(out, "out");
  const int64_t targets = out.size(2) * out.size(3), channels = x.size(1), outputs = out.size(1);
  STD_TORCH_CHECK(table.dim() == 2 && table.scalar_type() == ScalarType::Int && table.is_contiguous() &&
                      table.size(0) == targets && table.size(1) > 0,
                  "table must be contiguous int32 [H' W', 1 + taps]");
  const int64_t taps = table.size(1) - 1;
  check_packed(weight, "taps", taps, adjoint, channels, outputs);
  const Epilogue then = epilogue_of(out, bias, other, active);
  return {static_cast<float*>(out.mutable_data_ptr()),
          map_floats(x, "x"),
          host_floats(weight, "weight"),
          then.bias,
          then.other,
          then.active,
          static_cast<const int32_t*>(table.const_data_ptr()),
          adjoint,
          relu,
          out.size(0),
          x.size(2) * x.size(3),
          targets,
          taps,
          channels,
          outputs};
}

inline WinogradConv winograd_conv_of(Tensor& out, const Tensor& x, const Tensor& weight, bool adjoint,
                                     const Tensor& bias, const Tensor& other, Tensor& active, bool relu) {
  STD_TORCH_CHECK(x.dim() == 4 && out.dim() == 4 && x.size(0) == out.size(0),
                  "x must be [B, channels, H, W], and out [B, outputs, H', W']");
  map_floats(out, "out");
  const int64_t more = out.size(2) - x.size(2) + 2;
  STD_TORCH_CHECK(more == out.size(3) - x.size(3) + 2 && more >= 0 && more % 2 == 0,
                  "out must have x's height and width, plus 2 padding - 2");
  const int64_t channels = x.size(1), outputs = out.size(1);
  check_packed(weight, "9", 9, adjoint, channels, outputs);
  const Epilogue then = epilogue_of(out, bias, other, active);
  return {static_cast<float*>(out.mutable_data_ptr()),
          map_floats(x, "x"),
          host_floats(weight, "weight"),
          adjoint,
          then.bias,
          then.other,
          then.active,
          relu,
          out.size(0),
          x.size(2),
          x.size(3),
          out.size(2),
          out.size(3),
          channels,
          outputs};
}

// All of a convolution but what DirectConvPlan makes.
inline DirectConv direct_conv_of(Tensor& out, const Tensor& x, const Tensor& weight, const Tensor& bias,
                                 const Tensor& other, Tensor& active, const std::vector<int64_t>& stride,
                                 const std::vector<int64_t>& padding, bool adjoint, bool relu) {
  STD_TORCH_CHECK(x.dim() == 4 && out.dim() == 4 && x.size(0) == out.size(0),
                  "x must be [B, sources, H, W], and out [B, targets, H', W']");
  map_floats(out, "out", true);
  DirectConv p{};
  p.out = static_cast<float*>(out.mutable_data_ptr());
  p.x = map_floats(x, "x", true);
  p.weight = host_floats(weight, "weight");
  const Epilogue then = epilogue_of(out, bias, other, active);
  p.bias = then.bias;
  p.other = then.other;
  p.active = then.active;
  p.relu = relu;
  p.adjoint = adjoint;
  p.batch = out.size(0);
  p.sources = x.size(1);
  p.targets = out.size(1);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == (adjoint ? p.sources : p.targets) &&
                      weight.size(1) == (adjoint ? p.targets : p.sources),
                  "weight must be [outputs, channels, h, w]");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2, "stride and padding must be two numbers");
  const auto own_strides = [](const Tensor& maps, int64_t (&to)[4]) {
    const auto strides = strides_of(maps, !has_strides(maps, strides_of(maps, false)));
    std::copy(strides.begin(), strides.end(), to);
  };
  own_strides(out, p.out_stride);
  own_strides(x, p.x_stride);
  for (int axis = 0; axis < 2; ++axis) {
    p.image[axis] = (adjoint ? out : x).size(2 + axis);
    p.map[axis] = (adjoint ? x : out).size(2 + axis);
    p.kernel[axis] = weight.size(2 + axis);
    p.stride[axis] = stride[axis];
    p.padding[axis] = padding[axis];
    STD_TORCH_CHECK(p.kernel[axis] >= 1 && p.kernel[axis] <= DirectConv::kMostTaps,
                    "weight must have 1 to 64 taps along each side");
    STD_TORCH_CHECK(p.stride[axis] >= 1 && p.stride[axis] <= DirectConv::kMostTaps, "stride must be 1 to 64");
    STD_TORCH_CHECK(p.padding[axis] >= 0 && p.padding[axis] <= DirectConv::kMostPadding, "padding must be 0 to 2^30");
    STD_TORCH_CHECK(p.image[axis] + 2 * p.padding[axis] >= p.kernel[axis] &&
                        p.map[axis] == (p.image[axis] + 2 * p.padding[axis] - p.kernel[axis]) / p.stride[axis] + 1,
                    adjoint ? "x" : "out", " must have the height and width that the convolution of ",
                    adjoint ? "out" : "x", " has");
  }
  return p;
}

// Layers by fourteen numbers each, as ops.LayerGeometry says. All of `p` but what InterleavedPlan makes is set.
inline std::vector<cpu::InterleavedLayer> interleaved_layers_of(InterleavedLayers& p, Tensor& out, const Tensor& x,
                                                                const std::vector<Tensor>& weight,
                                                                const std::vector<Tensor>& bias,
                                                                const std::vector<int64_t>& geometry, Tensor& active,
                                                                bool adjoint) {
  using Kind = InterleavedLayers::Kind;
  constexpr size_t kNumbers = 14;
  constexpr int64_t kTaps = InterleavedLayers::kMostTaps, kStride = InterleavedLayers::kMostStride;
  constexpr int64_t kTargets = InterleavedLayers::kTargets;
  constexpr int64_t kMost = 1 << 20, kMostElements = int64_t{1} << 31;  // whose products do not overflow
  const size_t count = weight.size();
  STD_TORCH_CHECK(count > 0 && bias.size() == count && geometry.size() == kNumbers * count,
                  "there must be a layer, and a weight, a bias and 14 numbers for each");
  std::vector<cpu::InterleavedLayer> layers;
  layers.reserve(count);
  int64_t elements = 0, flags = 0;  // of the last output; of all ReLUs
  for (size_t i = 0; i < count; ++i) {
    const int64_t* n = geometry.data() + kNumbers * i;
    STD_TORCH_CHECK(n[13] >= 0 && n[13] <= static_cast<int64_t>(Kind::kAveragePool), "kind must be 0, 1 or 2");
    cpu::InterleavedLayer layer{
        static_cast<Kind>(n[13]), n[0],       n[1],    {n[2], n[3]}, {n[4], n[5]}, {n[6], n[7]}, {n[8], n[9]},
        {n[10], n[11]},           n[12] != 0, nullptr, nullptr};
    for (const int64_t count : {layer.channels, layer.outputs})
      STD_TORCH_CHECK(count >= 1 && count <= kMost, "channels must be 1 to 2^20");
    for (int axis = 0; axis < 2; ++axis) {
      STD_TORCH_CHECK(layer.size[axis] >= 1 && layer.size[axis] <= kMost, "maps must have 1 to 2^20 pixels a side");
      STD_TORCH_CHECK(layer.kernel[axis] >= 1 && layer.kernel[axis] <= kTaps, "kernels must have 1 to 16 taps a side");
      for (const int64_t number : {layer.stride[axis], layer.dilation[axis]})
        STD_TORCH_CHECK(number >= 1 && number <= kStride, "stride and dilation must be 1 to 64");
      STD_TORCH_CHECK(layer.padding[axis] >= 0 && layer.padding[axis] <= kStride, "padding must be 0 to 64");
      STD_TORCH_CHECK(layer.map(axis) >= 1, "maps must have 1 to 2^20 pixels a side");
    }
    const int64_t own = layer.channels * layer.size[0] * layer.size[1];
    const auto fits = [&](const cpu::InterleavedLayer& last) {
      const bool same = last.outputs == layer.channels && last.map(0) == layer.size[0] && last.map(1) == layer.size[1];
      return same || (layer.size[0] == 1 && layer.size[1] == 1 && own == elements);
    };
    STD_TORCH_CHECK(i == 0 || fits(layers.back()), "a layer must take what the one before it gives");
    const int64_t targets = adjoint ? layer.channels : layer.outputs,
                  sources = adjoint ? layer.outputs : layer.channels;
    const int64_t taps = layer.kernel[0] * layer.kernel[1];
    if (layer.kind == Kind::kConvolution) {
      layer.weight = host_floats(weight[i], "weight");
      STD_TORCH_CHECK(weight[i].dim() == 4 && weight[i].size(0) == (targets + kTargets - 1) / kTargets &&
                          weight[i].size(1) == sources && weight[i].size(2) == taps && weight[i].size(3) == kTargets,
                      "weight must be [ceil(targets / 8), sources, taps, 8]");
    } else {
      STD_TORCH_CHECK(layer.channels == layer.outputs && weight[i].numel() == 0 && bias[i].numel() == 0,
                      "pools have as many outputs as channels, and neither weight nor bias");
      STD_TORCH_CHECK(layer.kind != Kind::kMaxPool || taps <= InterleavedLayers::kStopped,
                      "maxima must be of at most 255 taps");
    }
    if (bias[i].numel() > 0) {
      layer.bias = host_floats(bias[i], "bias");
      STD_TORCH_CHECK(bias[i].numel() == layer.outputs, "bias must have an element for each output");
    }
    elements = layer.elements();
    STD_TORCH_CHECK(std::max(own, elements) <= kMostElements, "maps must have at most 2^31 elements");
    flags += layer.flags();
    layers.push_back(layer);
  }
  const int64_t inputs = layers[0].channels * layers[0].size[0] * layers[0].size[1];
  p.adjoint = adjoint;
  p.x = host_floats(x, "x");
  host_floats(out, "out");
  p.out = static_cast<float*>(out.mutable_data_ptr());
  STD_TORCH_CHECK(x.dim() > 0 && out.dim() > 0 && x.size(0) == out.size(0), "x and out must have as many images");
  p.batch = x.size(0);
  STD_TORCH_CHECK(x.numel() == p.batch * (adjoint ? elements : inputs), "x must have the elements of ",
                  adjoint ? "the last output" : "the first input");
  STD_TORCH_CHECK(out.numel() == p.batch * (adjoint ? inputs : elements), "out must have the elements of ",
                  adjoint ? "the first input" : "the last output");
  if (active.numel() > 0) {
    STD_TORCH_CHECK(active.scalar_type() == ScalarType::Byte && active.is_contiguous() && active.device().is_cpu() &&
                        active.numel() == p.blocks() * flags * InterleavedLayers::kImages,
                    "active must be contiguous uint8 on the CPU, [ceil(B / 16), elements of all ReLUs and maxima, 16]");
    p.active = static_cast<uint8_t*>(active.mutable_data_ptr());
  } else {
    STD_TORCH_CHECK(!adjoint || flags == 0 || p.batch == 0,
                    "the adjoint must have active, unless there are neither ReLUs nor maxima");
  }
  return layers;
}

}  // namespace fastlip
