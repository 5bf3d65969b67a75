// From tensors to launcher structs, shared by the bindings. Everything here is LibTorch stable ABI or header-only.
//
// The Python wrappers give users the full story of what is wrong; these checks keep a direct call of
// torch.ops.fastlip from reading or writing out of bounds.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/api.h"
#include "kernels/pack.h"

namespace fastlip {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, name, " must be float32, float64, float16 or bfloat16");
}

inline ScalarType arithmetic_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Norm norm_of(const std::string& norm) {
  if (norm == "linf") return Norm::linf;
  if (norm == "l2") return Norm::l2;
  STD_TORCH_CHECK(norm == "l1", "norm must be one of linf, l2, l1, got ", norm);
  return Norm::l1;
}

inline MatmulPrecision matmul_precision_of(const std::string& matmul_precision) {
  if (matmul_precision == "float32") return MatmulPrecision::float32;
  STD_TORCH_CHECK(matmul_precision == "3xtf32", "matmul_precision must be float32 or 3xtf32, got ", matmul_precision);
  return MatmulPrecision::tf32x3;
}

// Elements of one sample.
inline int64_t sample_size(const Tensor& x) {
  int64_t size = 1;
  for (int64_t d = 1; d < x.dim(); ++d) size *= x.size(d);
  return size;
}

inline bool same_sample_layout(const Tensor& t, const Tensor& x) {
  for (int64_t d = 1; d < x.dim(); ++d)
    if (t.size(d) != x.size(d) || (x.size(d) > 1 && t.stride(d) != x.stride(d))) return false;
  return true;
}

// A sample must fill one gapless block, whatever the order of its dimensions.
inline void check_dense(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() >= 1, name, " must have a batch dimension");
  if (x.numel() == 0) return;
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 1; d < x.dim(); ++d)
    if (x.size(d) > 1) dims.emplace_back(x.stride(d), x.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    STD_TORCH_CHECK(stride == expected, "every sample of ", name, " must be dense in memory");
    expected *= size;
  }
}

inline void check_layout(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.device() == x.device(), name, " must be on x's device");
  STD_TORCH_CHECK(t.dim() == x.dim() && t.size(0) == x.size(0) && same_sample_layout(t, x), name,
                  " must have x's shape and memory layout");
}

inline void check_like(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have x's dtype");
  check_layout(t, x, name);
}

// In-place results need samples that do not overlap.
inline void check_writable(const Tensor& x, const char* name) {
  check_dense(x, name);
  STD_TORCH_CHECK(x.size(0) <= 1 || x.stride(0) >= sample_size(x), "samples of ", name, " overlap in memory");
}

// Nothing says in which order what is changed and what is read are looked at.
inline void check_apart(const void* changed, const char* name, const void* other, const char* other_name) {
  STD_TORCH_CHECK(changed != other || changed == nullptr, name, " must not share its memory with ", other_name);
}

inline const void* data_of(const Tensor& t) { return t.const_data_ptr(); }

inline Value value_of(double scalar, const OptionalTensor& tensor, const Tensor& x, const char* name) {
  if (!tensor) return {scalar, nullptr, 0};
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == x.size(0) && tensor->is_contiguous() &&
                      tensor->device() == x.device() && tensor->scalar_type() == arithmetic_of(x),
                  name, " must be contiguous, of x's batch size and device, in the dtype of x's arithmetic");
  return {scalar, data_of(*tensor), 1};
}

inline Value bound_of(double scalar, const OptionalTensor& tensor, const Tensor& x, const char* name) {
  if (!tensor) return {scalar, nullptr, 0};
  const int64_t size = sample_size(x);
  STD_TORCH_CHECK(tensor->dim() == x.dim() && (tensor->size(0) == 1 || tensor->size(0) == x.size(0)) &&
                      same_sample_layout(*tensor, x) && tensor->device() == x.device() &&
                      tensor->scalar_type() == arithmetic_of(x),
                  name, " must be [1 or B, ...] in x's memory layout and device, in the dtype of x's arithmetic");
  const bool shared = tensor->size(0) == 1;
  STD_TORCH_CHECK(shared || tensor->stride(0) == size, name, " must have packed samples");
  return {scalar, data_of(*tensor), shared ? 0 : size};
}

inline const uint8_t* mask_of(const OptionalTensor& mask, const Tensor& x, const char* name) {
  if (!mask) return nullptr;
  STD_TORCH_CHECK(mask->dim() == 1 && mask->size(0) == x.size(0) && mask->is_contiguous() &&
                      mask->device() == x.device() && mask->scalar_type() == ScalarType::Bool,
                  name, " must be a contiguous bool tensor of x's batch size and device");
  return static_cast<const uint8_t*>(data_of(*mask));
}

// The schema's groups of these names.
struct Normalised {
  const OptionalTensor& model_input;
  double mean;
  const OptionalTensor& mean_tensor;
  double std;
  const OptionalTensor& std_tensor;
};
struct Saved {
  const OptionalTensor &best, &better, &not_finite;
};

inline const OptionalTensor kNoTensor;
inline const Normalised kNotRead{kNoTensor, 0, kNoTensor, 1, kNoTensor};
inline const Saved kNotSaved{kNoTensor, kNoTensor, kNoTensor};

// Adds it to a step on x, and checks grad, which is of its type.
inline void add_input(PgdStep& step, const Tensor& x, const Tensor& grad, const Normalised& input) {
  if (!input.model_input) return check_like(grad, x, "grad");
  Tensor values = *input.model_input;
  step.input_dtype = dtype_of(values, "model_input");
  STD_TORCH_CHECK(step.dtype == DType::f32 && step.input_dtype != DType::f64,
                  "x must be float32 and model_input float32, float16 or bfloat16");
  check_layout(values, x, "model_input");
  check_writable(values, "model_input");
  check_layout(grad, x, "grad");
  STD_TORCH_CHECK(grad.scalar_type() == values.scalar_type(), "grad must have model_input's dtype");
  step.mean = bound_of(input.mean, input.mean_tensor, x, "mean_tensor");
  step.std = bound_of(input.std, input.std_tensor, x, "std_tensor");
  STD_TORCH_CHECK(step.mean.stride == 0 && step.std.stride == 0, "mean_tensor and std_tensor must be [1, ...]");
  step.input = values.mutable_data_ptr();
  step.input_stride = values.stride(0);
  check_apart(step.input, "model_input", step.x, "x");
}

// Likewise what it saves.
inline void add_saved(PgdStep& step, const Tensor& x, const Saved& saved) {
  STD_TORCH_CHECK(saved.best.has_value() == saved.better.has_value(), "best and better go together");
  step.better = mask_of(saved.better, x, "better");
  if (saved.best) {
    Tensor best = *saved.best;
    check_like(best, x, "best");
    check_writable(best, "best");
    step.best = best.mutable_data_ptr();
    step.best_stride = best.stride(0);
    check_apart(step.best, "best", step.x, "x");
    check_apart(step.best, "best", step.grad, "grad");
    check_apart(step.best, "best", step.x0, "x0");
    check_apart(step.best, "best", step.input, "model_input");
  }
  if (mask_of(saved.not_finite, x, "not_finite")) {
    Tensor not_finite = *saved.not_finite;
    step.not_finite = static_cast<uint8_t*>(not_finite.mutable_data_ptr());
    check_apart(step.not_finite, "not_finite", step.active, "active");
    check_apart(step.not_finite, "not_finite", step.better, "better");
  }
}

inline PgdStep pgd_step_of(Tensor& x, const Tensor* grad, const Tensor& x0, const Value& step_size, double eps,
                           const OptionalTensor& eps_tensor, const std::string& norm, double lo,
                           const OptionalTensor& lo_tensor, double hi, const OptionalTensor& hi_tensor, double sparsity,
                           const OptionalTensor& active, const Normalised& input, const Saved& saved) {
  const DType dtype = dtype_of(x, "x");
  check_writable(x, "x");
  check_like(x0, x, "x0");
  STD_TORCH_CHECK(std::isfinite(step_size.scalar), "step_size must be finite");
  STD_TORCH_CHECK(eps >= 0, "eps must be at least 0");
  STD_TORCH_CHECK(lo_tensor || hi_tensor || lo <= hi, "bounds must satisfy lower <= upper");
  STD_TORCH_CHECK(sparsity >= 0 && sparsity <= 1, "sparsity must lie in [0, 1]");
  const int64_t size = sample_size(x);
  PgdStep step{x.mutable_data_ptr(),
               grad ? data_of(*grad) : nullptr,
               data_of(x0),
               step_size,
               value_of(eps, eps_tensor, x, "eps_tensor"),
               norm_of(norm),
               bound_of(lo, lo_tensor, x, "lo_tensor"),
               bound_of(hi, hi_tensor, x, "hi_tensor"),
               kept_elements(size, sparsity),
               mask_of(active, x, "active"),
               dtype,
               x.size(0),
               size,
               x.stride(0),
               grad ? grad->stride(0) : 0,
               x0.stride(0)};
  check_apart(step.x, "x", step.x0, "x0");
  if (grad) add_input(step, x, *grad, input);
  add_saved(step, x, saved);
  return step;
}

inline ApgdStep apgd_step_of(Tensor& x, const Tensor& grad, const Tensor& loss, const Tensor& x0, Tensor& x_prev,
                             Tensor& x_best, Tensor& grad_best, Tensor& best_loss, Tensor& past_loss, Tensor& step_size,
                             Tensor& counters, const Tensor& schedule, double eps, const OptionalTensor& eps_tensor,
                             const std::string& norm, double lo, const OptionalTensor& lo_tensor, double hi,
                             const OptionalTensor& hi_tensor, double momentum, double rho, const OptionalTensor& active,
                             const Normalised& input, const Saved& saved) {
  const PgdStep step = pgd_step_of(x, &grad, x0, {0, nullptr, 0}, eps, eps_tensor, norm, lo, lo_tensor, hi, hi_tensor,
                                   0, active, input, saved);
  STD_TORCH_CHECK(step.size <= INT32_MAX, "a sample of x must have less than 2**31 elements");
  STD_TORCH_CHECK(step.norm != Norm::l1 || std::isfinite(eps), "eps must be finite for norm l1");
  const auto buffer = [&](Tensor& t, const char* name) {
    check_like(t, x, name);
    check_writable(t, name);
    check_apart(t.mutable_data_ptr(), name, step.best, "best");
    return t.mutable_data_ptr();
  };
  const auto rows = [&](const Tensor& t, int64_t width, ScalarType type, const char* name) {
    STD_TORCH_CHECK(t.dim() == (width ? 2 : 1) && t.size(0) == x.size(0) && (!width || t.size(1) == width) &&
                        t.is_contiguous() && t.device() == x.device() && t.scalar_type() == type,
                    name, " must be contiguous, of x's batch size and device, in its dtype");
  };
  const ScalarType arithmetic = arithmetic_of(x);
  rows(loss, 0, arithmetic, "loss");
  rows(best_loss, 0, arithmetic, "best_loss");
  rows(past_loss, 2, arithmetic, "past_loss");
  rows(step_size, 0, arithmetic, "step_size");
  rows(counters, 6, ScalarType::Int, "counters");
  STD_TORCH_CHECK(schedule.dim() == 1 && schedule.is_contiguous() && schedule.device() == x.device() &&
                      schedule.scalar_type() == ScalarType::Int,
                  "schedule must be contiguous, [steps] int32 on x's device");
  STD_TORCH_CHECK(momentum >= 0 && momentum <= 1, "momentum must lie in [0, 1]");
  STD_TORCH_CHECK(rho >= 0 && rho <= 1, "rho must lie in [0, 1]");
  return {step,
          data_of(loss),
          buffer(x_prev, "x_prev"),
          buffer(x_best, "x_best"),
          buffer(grad_best, "grad_best"),
          best_loss.mutable_data_ptr(),
          past_loss.mutable_data_ptr(),
          step_size.mutable_data_ptr(),
          static_cast<int32_t*>(counters.mutable_data_ptr()),
          static_cast<const int32_t*>(data_of(schedule)),
          schedule.size(0),
          momentum,
          rho,
          x_prev.stride(0),
          x_best.stride(0),
          grad_best.stride(0)};
}

// The numbers in the tables are trusted: fastlip/ops/_operator_plan.py makes them.
inline OperatorStep operator_step_of(Tensor& out, Tensor& out_square, const Tensor& x, const OptionalTensor& x_square,
                                     const OptionalTensor& previous, const OptionalTensor& previous_square,
                                     const Tensor& weights, const Tensor& problems, const Tensor& tiles,
                                     const Tensor& gather_groups, const Tensor& entries, int64_t max_vectors,
                                     int64_t parts, const std::string& matmul_precision, const OptionalTensor& active,
                                     Tensor& partial) {
  const DType dtype = dtype_of(out, "out");
  STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64, "out must be float32 or float64");
  const auto vector = [&](const Tensor& t, ScalarType type, int64_t size, const char* name) {
    STD_TORCH_CHECK(t.dim() == 1 && t.is_contiguous() && t.device() == out.device() && t.scalar_type() == type &&
                        (size < 0 || t.size(0) == size),
                    name, " must be contiguous, on out's device, of the dtype and size that operator_step_ describes");
    return data_of(t);
  };
  const auto table = [&](const Tensor& t, size_t row, const char* name) {
    STD_TORCH_CHECK(t.dim() == 2 && t.is_contiguous() && t.device() == out.device() &&
                        t.scalar_type() == ScalarType::Long && t.size(1) * sizeof(int64_t) == row,
                    name, " must be a table of an OperatorPlan on out's device");
    return static_cast<const int64_t*>(data_of(t));
  };
  const auto squares = [&](const OptionalTensor& t, const char* name) {
    return t ? static_cast<const double*>(vector(*t, ScalarType::Double, out_square.size(0), name)) : nullptr;
  };
  vector(out, out.scalar_type(), -1, "out");
  vector(out_square, ScalarType::Double, -1, "out_square");
  STD_TORCH_CHECK(!previous || (x_square && previous_square), "previous needs x_square and previous_square");
  return {out.mutable_data_ptr(),
          static_cast<double*>(out_square.mutable_data_ptr()),
          vector(x, out.scalar_type(), -1, "x"),
          squares(x_square, "x_square"),
          previous ? vector(*previous, out.scalar_type(), out.size(0), "previous") : nullptr,
          squares(previous_square, "previous_square"),
          vector(weights, out.scalar_type(), -1, "weights"),
          table(problems, sizeof(OperatorStep::Problem), "problems"),
          table(tiles, sizeof(OperatorStep::Tile), "tiles"),
          table(gather_groups, sizeof(OperatorStep::GatherGroup), "gather_groups"),
          static_cast<const int32_t*>(vector(entries, ScalarType::Int, -1, "entries")),
          active ? static_cast<const uint8_t*>(vector(*active, ScalarType::Bool, problems.size(0), "active")) : nullptr,
          static_cast<double*>(partial.mutable_data_ptr()),
          dtype,
          matmul_precision_of(matmul_precision),
          problems.size(0),
          tiles.size(0),
          max_vectors,
          parts,
          nullptr,
          nullptr};
}

// `problems` is filled, and kept by the caller.
inline PackWeights pack_weights_of(Tensor& out, const std::vector<Tensor>& weights, const std::vector<int64_t>& groups,
                                   bool adjoint, std::vector<PackWeights::Problem>& problems) {
  STD_TORCH_CHECK(weights.size() == groups.size(), "groups must be as many as weights");
  const auto known = [](DType dtype) { return dtype == DType::f32 || dtype == DType::f64; };
  const DType dtype = dtype_of(out, "out");
  STD_TORCH_CHECK(known(dtype) && out.dim() == 1 && out.is_contiguous(), "out must be flat, float32 or float64");
  problems.clear();
  problems.reserve(weights.size());
  int64_t at = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    const DType own = dtype_of(w, "weights");
    STD_TORCH_CHECK(known(own) && w.is_contiguous() && w.dim() >= 2 && w.numel() > 0 && w.device() == out.device(),
                    "weights must be contiguous [Cout, Cin / groups, *kernel], float32 or float64, on out's device");
    int64_t count = groups[i];
    STD_TORCH_CHECK(count > 0 && w.size(0) % count == 0, "groups must divide the output channels");
    int64_t outputs = w.size(0) / count, inputs = w.size(1);
    const int64_t taps = w.numel() / (w.size(0) * w.size(1));
    STD_TORCH_CHECK(w.numel() <= INT32_MAX, "a weight must have less than 2**31 elements");
    if (count > 1 && outputs == 1 && inputs == 1) {  // depthwise
      if (adjoint) {
        inputs = count;
      } else {
        outputs = count;
      }
      count = 1;
    }
    const auto number = [](int64_t n) { return static_cast<int32_t>(n); };
    problems.push_back({data_of(w), own, number(count), number(adjoint ? inputs : outputs),
                        number(adjoint ? outputs : inputs), number(taps), at});
    at += pack_size(problems.back());
  }
  STD_TORCH_CHECK(at == out.size(0), "out must have ", at, " elements");
  return {out.mutable_data_ptr(), dtype, problems.data(), static_cast<int64_t>(problems.size()), adjoint};
}

// `weight` is called `name`; `left` and `right` are what NormGradient says.
inline NormGradient norm_gradient_of(const Tensor& weight, const char* name, const Tensor& left, const Tensor& right) {
  const DType dtype = dtype_of(weight, name);
  STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64, name, " must be float32 or float64");
  STD_TORCH_CHECK(weight.dim() >= 1, name, " must have at least one axis");
  for (const auto& [t, own] : {std::pair{&weight, name}, {&left, "left"}, {&right, "right"}})
    STD_TORCH_CHECK(t->scalar_type() == weight.scalar_type() && t->is_contiguous() && t->device().is_cpu(), own,
                    " must be contiguous, in ", name, "'s dtype and on the CPU");
  const int64_t rows = weight.size(0);
  int64_t columns = 1;
  for (int64_t d = 1; d < weight.dim(); ++d) columns *= weight.size(d);
  STD_TORCH_CHECK(left.dim() == 2 && left.size(0) == rows, "left must be [rows, rank]");
  const int64_t rank = right.dim() == 2 ? left.size(1) : 0;
  if (rank) {
    STD_TORCH_CHECK(right.size(0) == rank && right.size(1) == columns, "right must be [rank, columns]");
  } else {
    STD_TORCH_CHECK(right.numel() == 0, "right must be [rank, columns]");
    STD_TORCH_CHECK(left.numel() == weight.numel(), "left must be [rows, columns] without right");
  }
  return {data_of(left), data_of(right), dtype, rows, columns, rank};
}

inline ScaledWeightGrad scaled_weight_grad_of(Tensor& out, const Tensor& grad, const Tensor& scaled, const Tensor& left,
                                              const Tensor& right, double norm, double bound) {
  const NormGradient gradient = norm_gradient_of(grad, "grad", left, right);
  STD_TORCH_CHECK(scaled.scalar_type() == grad.scalar_type() && scaled.is_contiguous() && scaled.device().is_cpu(),
                  "scaled must be contiguous, in grad's dtype and on the CPU");
  STD_TORCH_CHECK(scaled.numel() == grad.numel(), "scaled must have grad's shape");
  return {gradient, out.mutable_data_ptr(), data_of(grad), data_of(scaled), bound / norm, 0};
}

// Logical dimension 1 where x is channels_last, else 1; see RandomStart::channels.
inline int64_t channels_of(const Tensor& x) {
  const auto ordered = [&](auto&& dims) {
    int64_t expected = 1;
    for (const int64_t d : dims) {
      if (x.size(d) > 1 && x.stride(d) != expected) return false;
      expected *= x.size(d);
    }
    return true;
  };
  std::vector<int64_t> dims;
  for (int64_t d = x.dim() - 1; d >= 1; --d) dims.push_back(d);
  if (ordered(dims)) return 1;
  std::rotate(dims.begin(), dims.end() - 1, dims.end());  // the channel, last here, moves fastest
  STD_TORCH_CHECK(ordered(dims), "x0 must be contiguous or channels_last");
  return x.size(1);
}

inline RandomStart random_start_of(Tensor& out, const Tensor& x0, double eps, const OptionalTensor& eps_tensor,
                                   const std::string& norm, double lo, const OptionalTensor& lo_tensor, double hi,
                                   const OptionalTensor& hi_tensor, const Tensor& ids, const Tensor& key) {
  const DType dtype = dtype_of(x0, "x0");
  check_dense(x0, "x0");
  check_like(out, x0, "out");
  STD_TORCH_CHECK(ids.dim() == 1 && ids.size(0) == x0.size(0) && ids.is_contiguous() && ids.device() == x0.device() &&
                      ids.scalar_type() == ScalarType::Long,
                  "ids must be a contiguous int64 tensor of x0's batch size and device");
  STD_TORCH_CHECK(key.numel() == 1 && key.device() == x0.device() && key.scalar_type() == ScalarType::Long,
                  "key must be one int64 on x0's device");
  return {out.mutable_data_ptr(),
          data_of(x0),
          value_of(eps, eps_tensor, x0, "eps_tensor"),
          norm_of(norm),
          bound_of(lo, lo_tensor, x0, "lo_tensor"),
          bound_of(hi, hi_tensor, x0, "hi_tensor"),
          static_cast<const int64_t*>(data_of(ids)),
          static_cast<const int64_t*>(data_of(key)),
          dtype,
          x0.size(0),
          sample_size(x0),
          out.stride(0),
          x0.stride(0),
          x0.numel() ? channels_of(x0) : 1};
}

}  // namespace fastlip
