// judge's checks and results, shared by the bindings.
#pragma once
#include <array>
#include <tuple>

#include "torch/common.h"

namespace fastlip {

inline Loss loss_of(const std::string& loss) {
  if (loss == "dlr") return Loss::dlr;
  if (loss == "ce") return Loss::ce;
  STD_TORCH_CHECK(loss == "margin", "loss must be one of dlr, ce, margin, got ", loss);
  return Loss::margin;
}

// A contiguous tensor on like's device, without a search for an operator by its name, which costs a microsecond.
template <size_t kDims>
Tensor new_rows(const Tensor& like, const std::array<int64_t, kDims>& sizes, int32_t dtype) {
  static_assert(kDims == 1 || kDims == 2);
  const int64_t strides[] = {kDims == 2 ? sizes[kDims - 1] : 1, 1};
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle out = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(kDims, sizes.data(), strides, dtype, device_type, device_index, &out));
  return Tensor(out);
}

struct Judgement {
  Tensor loss, grad, adversarial, doubtful, better;

  explicit Judgement(const Tensor& logits) {
    STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 2, "logits must be [B, C] with at least 2 classes");
    const int64_t batch = logits.size(0), classes = logits.size(1);
    int32_t dtype = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(logits.get(), &dtype));
    loss = new_rows<1>(logits, {batch}, dtype);
    grad = new_rows<2>(logits, {batch, classes}, dtype);
    for (Tensor* flags : {&adversarial, &doubtful, &better})
      *flags = new_rows<1>(logits, {batch}, aoti_torch_dtype_bool());
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tuple() const {
    return {loss, grad, adversarial, doubtful, better};
  }
};

// The schema's last five arguments.
struct BestRecord {
  const OptionalTensor &loss, &succeeded, &unconfirmed, &doubtful;
  bool early_stop;
};

inline Judge judge_of(Judgement& out, const Tensor& logits, const Tensor& labels, const OptionalTensor& targets,
                      const OptionalTensor& toward, const std::string& loss, double rounding,
                      const BestRecord& record) {
  const DType dtype = dtype_of(logits, "logits");
  STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64, "logits must be float32 or float64");
  STD_TORCH_CHECK(logits.is_contiguous() && logits.size(1) < INT32_MAX,
                  "logits must be contiguous, of less than 2**31 classes");
  STD_TORCH_CHECK(rounding >= 0, "rounding must be at least 0, got ", rounding);
  STD_TORCH_CHECK(!targets || !toward, "give either targets or toward");
  STD_TORCH_CHECK(record.loss.has_value() == record.succeeded.has_value(), "best_loss and succeeded go together");
  STD_TORCH_CHECK(record.loss || !(record.unconfirmed || record.doubtful),
                  "unconfirmed and best_doubtful need best_loss and succeeded");
  const int64_t batch = logits.size(0);
  const auto rows = [&](const Tensor& t, ScalarType type, const char* name) -> const Tensor& {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == batch && t.is_contiguous() && t.device() == logits.device() &&
                        t.scalar_type() == type,
                    name, " must be contiguous [B] on logits' device, ",
                    type == ScalarType::Long     ? "int64"
                    : type == ScalarType::Double ? "float64"
                                                 : "bool");
    return t;
  };
  const auto classes = [&](const OptionalTensor& t, const char* name) {
    return t ? static_cast<const int64_t*>(data_of(rows(*t, ScalarType::Long, name))) : nullptr;
  };
  const auto kept = [&](const OptionalTensor& t, ScalarType type, const char* name) {
    return t ? Tensor(rows(*t, type, name)).mutable_data_ptr() : nullptr;
  };
  const auto flags = [&](const OptionalTensor& t, const char* name) {
    return static_cast<uint8_t*>(kept(t, ScalarType::Bool, name));
  };
  const auto written = [](Tensor& t) { return static_cast<uint8_t*>(t.mutable_data_ptr()); };
  return {data_of(logits),
          static_cast<const int64_t*>(data_of(rows(labels, ScalarType::Long, "labels"))),
          classes(targets, "targets"),
          classes(toward, "toward"),
          loss_of(loss),
          rounding,
          static_cast<double*>(kept(record.loss, ScalarType::Double, "best_loss")),
          flags(record.succeeded, "succeeded"),
          flags(record.unconfirmed, "unconfirmed"),
          flags(record.doubtful, "best_doubtful"),
          record.early_stop,
          out.loss.mutable_data_ptr(),
          out.grad.mutable_data_ptr(),
          written(out.adversarial),
          written(out.doubtful),
          written(out.better),
          dtype,
          batch,
          logits.size(1),
          nullptr};
}

}  // namespace fastlip
