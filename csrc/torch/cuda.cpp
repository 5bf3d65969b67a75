// CUDA implementations of torch.ops.fastlip: checks, device and stream; the arithmetic is in kernels/cuda.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "kernels/api.h"
#include "torch/common.h"
#include "torch/judge.h"

// In libtorch_cuda.so; torch's header declares it only where CUDA headers are on the include path.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fastlip {
namespace {

// Launches on the current stream of x's device, which stays current for the launch.
bool empty(const PgdStep& step) { return step.batch == 0 || step.size == 0; }
bool empty(const ApgdStep& step) { return empty(step.step); }
bool empty(const RandomStart& start) { return start.batch == 0 || start.size == 0; }
bool empty(const OperatorStep& step) { return step.tile_count == 0; }
bool empty(const PackWeights& pack) { return pack.count == 0; }
bool empty(const Judge& judge) { return judge.batch == 0; }
template <typename Parameters>
void launch(int (*launcher)(const Parameters&, void*), const Parameters& parameters, const Tensor& x) {
  if (empty(parameters)) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const int error = launcher(parameters, stream);
  STD_TORCH_CHECK(error == 0, "fastlip: CUDA error: ", cuda::error_string(error));
}

void pgd_step_(Tensor x, const Tensor& grad, const Tensor& x0, double step_size, OptionalTensor step_size_tensor,
               double eps, OptionalTensor eps_tensor, std::string norm, double lo, OptionalTensor lo_tensor, double hi,
               OptionalTensor hi_tensor, double sparsity, OptionalTensor active, OptionalTensor model_input,
               double mean, OptionalTensor mean_tensor, double std, OptionalTensor std_tensor, OptionalTensor best,
               OptionalTensor better, OptionalTensor not_finite) {
  const Value step = value_of(step_size, step_size_tensor, x, "step_size_tensor");
  launch(&cuda::pgd_step_,
         pgd_step_of(x, &grad, x0, step, eps, eps_tensor, norm, lo, lo_tensor, hi, hi_tensor, sparsity, active,
                     {model_input, mean, mean_tensor, std, std_tensor}, {best, better, not_finite}),
         x);
}

void project_(Tensor x, const Tensor& x0, double eps, OptionalTensor eps_tensor, std::string norm, double lo,
              OptionalTensor lo_tensor, double hi, OptionalTensor hi_tensor, OptionalTensor active) {
  launch(&cuda::pgd_step_,
         pgd_step_of(x, nullptr, x0, {0, nullptr, 0}, eps, eps_tensor, norm, lo, lo_tensor, hi, hi_tensor, 0, active,
                     kNotRead, kNotSaved),
         x);
}

Tensor random_start(const Tensor& x0, double eps, OptionalTensor eps_tensor, std::string norm, double lo,
                    OptionalTensor lo_tensor, double hi, OptionalTensor hi_tensor, const Tensor& ids,
                    const Tensor& key) {
  Tensor out = torch::stable::empty_like(x0);
  launch(&cuda::random_start, random_start_of(out, x0, eps, eps_tensor, norm, lo, lo_tensor, hi, hi_tensor, ids, key),
         x0);
  return out;
}

void apgd_step_(Tensor x, const Tensor& grad, const Tensor& loss, const Tensor& x0, Tensor x_prev, Tensor x_best,
                Tensor grad_best, Tensor best_loss, Tensor past_loss, Tensor step_size, Tensor counters,
                const Tensor& schedule, double eps, OptionalTensor eps_tensor, std::string norm, double lo,
                OptionalTensor lo_tensor, double hi, OptionalTensor hi_tensor, double momentum, double rho,
                OptionalTensor active, OptionalTensor model_input, double mean, OptionalTensor mean_tensor, double std,
                OptionalTensor std_tensor, OptionalTensor best, OptionalTensor better, OptionalTensor not_finite) {
  launch(&cuda::apgd_step_,
         apgd_step_of(x, grad, loss, x0, x_prev, x_best, grad_best, best_loss, past_loss, step_size, counters, schedule,
                      eps, eps_tensor, norm, lo, lo_tensor, hi, hi_tensor, momentum, rho, active,
                      {model_input, mean, mean_tensor, std, std_tensor}, {best, better, not_finite}),
         x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> judge(const Tensor& logits, const Tensor& labels,
                                                         OptionalTensor targets, OptionalTensor toward,
                                                         std::string loss, double rounding, OptionalTensor best_loss,
                                                         OptionalTensor succeeded, OptionalTensor unconfirmed,
                                                         OptionalTensor best_doubtful, bool early_stop) {
  Judgement out(logits);
  launch(&cuda::judge,
         judge_of(out, logits, labels, targets, toward, loss, rounding,
                  {best_loss, succeeded, unconfirmed, best_doubtful, early_stop}),
         logits);
  return out.tuple();
}

void operator_step_(Tensor out, Tensor out_square, const Tensor& x, OptionalTensor x_square, OptionalTensor previous,
                    OptionalTensor previous_square, const Tensor& weights, const Tensor& problems, const Tensor& tiles,
                    const Tensor& gather_groups, const Tensor& entries, int64_t max_vectors, int64_t parts,
                    std::string matmul_precision, OptionalTensor active) {
  STD_TORCH_CHECK(parts >= 0, "parts must not be negative");
  Tensor partial = torch::stable::new_empty(out_square, {tiles.size(0), max_vectors});
  Tensor sums = torch::stable::new_empty(out, {parts, OperatorStep::kBlock * OperatorStep::kPartColumns});
  Tensor counters = torch::stable::new_empty(entries, {problems.size(0) + parts});
  OperatorStep step =
      operator_step_of(out, out_square, x, x_square, previous, previous_square, weights, problems, tiles, gather_groups,
                       entries, max_vectors, parts, matmul_precision, active, partial);
  step.sums = sums.mutable_data_ptr();
  step.counters = static_cast<int32_t*>(counters.mutable_data_ptr());
  launch(&cuda::operator_step_, step, out);
}

void pack_weights_(Tensor out, std::vector<Tensor> weights, std::vector<int64_t> groups, bool adjoint) {
  std::vector<PackWeights::Problem> problems;
  launch(&cuda::pack_weights_, pack_weights_of(out, weights, groups, adjoint, problems), out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlip, CUDA, m) {
  m.impl("pgd_step_", TORCH_BOX(&pgd_step_));
  m.impl("project_", TORCH_BOX(&project_));
  m.impl("random_start", TORCH_BOX(&random_start));
  m.impl("apgd_step_", TORCH_BOX(&apgd_step_));
  m.impl("judge", TORCH_BOX(&judge));
  m.impl("operator_step_", TORCH_BOX(&operator_step_));
  m.impl("pack_weights_", TORCH_BOX(&pack_weights_));
}

}  // namespace fastlip
