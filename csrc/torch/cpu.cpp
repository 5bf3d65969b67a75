// CPU implementations of torch.ops.fastlip: checks, scratch memory and threads; the arithmetic is in kernels/cpu.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <memory>
#include <tuple>

#include "kernels/api.h"
#include "torch/common.h"
#include "torch/convolutions.h"
#include "torch/judge.h"

namespace fastlip {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements worth a thread

const cpu::Kernels& kernels() {
  const char* error = nullptr;
  const cpu::Kernels* table = cpu::kernels(&error);
  STD_TORCH_CHECK(table != nullptr, "fastlip: ", error);
  return *table;
}

// Runs f(begin, end, scratch) over samples, each thread with scratch memory of its own.
template <typename F>
void parallel_samples(int64_t batch, int64_t size, F f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / size);
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    const auto scratch = std::make_unique_for_overwrite<std::byte[]>(cpu::scratch_bytes(size));
    f(begin, end, scratch.get());
  });
}

void run(const PgdStep& step) {
  if (step.batch == 0 || step.size == 0) return;
  const cpu::Kernels& table = kernels();
  if (step.norm == Norm::linf) {
    torch::stable::parallel_for(0, step.batch * step.size, kGrain,
                                [&](int64_t begin, int64_t end) { table.pgd_step_linf(step, begin, end); });
    return;
  }
  parallel_samples(step.batch, step.size,
                   [&](int64_t begin, int64_t end, void* scratch) { table.pgd_step_ball(step, begin, end, scratch); });
}

void pgd_step_(Tensor x, const Tensor& grad, const Tensor& x0, double step_size, OptionalTensor step_size_tensor,
               double eps, OptionalTensor eps_tensor, std::string norm, double lo, OptionalTensor lo_tensor, double hi,
               OptionalTensor hi_tensor, double sparsity, OptionalTensor active, OptionalTensor model_input,
               double mean, OptionalTensor mean_tensor, double std, OptionalTensor std_tensor, OptionalTensor best,
               OptionalTensor better, OptionalTensor not_finite) {
  const Value step = value_of(step_size, step_size_tensor, x, "step_size_tensor");
  run(pgd_step_of(x, &grad, x0, step, eps, eps_tensor, norm, lo, lo_tensor, hi, hi_tensor, sparsity, active,
                  {model_input, mean, mean_tensor, std, std_tensor}, {best, better, not_finite}));
}

void project_(Tensor x, const Tensor& x0, double eps, OptionalTensor eps_tensor, std::string norm, double lo,
              OptionalTensor lo_tensor, double hi, OptionalTensor hi_tensor, OptionalTensor active) {
  run(pgd_step_of(x, nullptr, x0, {0, nullptr, 0}, eps, eps_tensor, norm, lo, lo_tensor, hi, hi_tensor, 0, active,
                  kNotRead, kNotSaved));
}

Tensor random_start(const Tensor& x0, double eps, OptionalTensor eps_tensor, std::string norm, double lo,
                    OptionalTensor lo_tensor, double hi, OptionalTensor hi_tensor, const Tensor& ids,
                    const Tensor& key) {
  Tensor out = torch::stable::empty_like(x0);
  const RandomStart start = random_start_of(out, x0, eps, eps_tensor, norm, lo, lo_tensor, hi, hi_tensor, ids, key);
  if (start.batch == 0 || start.size == 0) return out;
  parallel_samples(start.batch, start.size,
                   [&](int64_t begin, int64_t end, void* scratch) { cpu::random_start(start, begin, end, scratch); });
  return out;
}

void apgd_step_(Tensor x, const Tensor& grad, const Tensor& loss, const Tensor& x0, Tensor x_prev, Tensor x_best,
                Tensor grad_best, Tensor best_loss, Tensor past_loss, Tensor step_size, Tensor counters,
                const Tensor& schedule, double eps, OptionalTensor eps_tensor, std::string norm, double lo,
                OptionalTensor lo_tensor, double hi, OptionalTensor hi_tensor, double momentum, double rho,
                OptionalTensor active, OptionalTensor model_input, double mean, OptionalTensor mean_tensor, double std,
                OptionalTensor std_tensor, OptionalTensor best, OptionalTensor better, OptionalTensor not_finite) {
  const ApgdStep step =
      apgd_step_of(x, grad, loss, x0, x_prev, x_best, grad_best, best_loss, past_loss, step_size, counters, schedule,
                   eps, eps_tensor, norm, lo, lo_tensor, hi, hi_tensor, momentum, rho, active,
                   {model_input, mean, mean_tensor, std, std_tensor}, {best, better, not_finite});
  if (step.step.batch == 0 || step.step.size == 0) return;
  const cpu::Kernels& table = kernels();
  parallel_samples(step.step.batch, step.step.size,
                   [&](int64_t begin, int64_t end, void* scratch) { table.apgd_step(step, begin, end, scratch); });
}

void operator_step_(Tensor out, Tensor out_square, const Tensor& x, OptionalTensor x_square, OptionalTensor previous,
                    OptionalTensor previous_square, const Tensor& weights, const Tensor& problems, const Tensor& tiles,
                    const Tensor& gather_groups, const Tensor& entries, int64_t max_vectors, int64_t parts,
                    std::string matmul_precision, OptionalTensor active) {
  STD_TORCH_CHECK(parts == 0, "the CPU kernels take plans of whole tiles: part_products must be 0");
  Tensor partial = torch::stable::new_empty(out_square, {tiles.size(0), max_vectors});
  const OperatorStep step =
      operator_step_of(out, out_square, x, x_square, previous, previous_square, weights, problems, tiles, gather_groups,
                       entries, max_vectors, parts, matmul_precision, active, partial);
  const cpu::Kernels& table = kernels();
  // Tiles differ widely in cost, so each thread takes the next one when it is done.
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, step.tile_count, 1, [&](int64_t, int64_t) {
    for (int64_t tile; (tile = next.fetch_add(1, std::memory_order_relaxed)) < step.tile_count;)
      table.operator_tile(step, tile);
  });
  cpu::operator_squares(step);
}

void pack_weights_(Tensor out, std::vector<Tensor> weights, std::vector<int64_t> groups, bool adjoint) {
  std::vector<PackWeights::Problem> problems;
  const PackWeights pack = pack_weights_of(out, weights, groups, adjoint, problems);
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, pack.count, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < pack.count;) cpu::pack_weights(pack, i);
  });
}

// In its lifetime no graph is recorded.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

template <typename... Arguments>
Tensor call_aten(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Puts the gradient of cross-entropy, or of log softmax, into `out` and returns log softmax, both as torch computes
// them: how its vectorised exp rounds depends on the CPU and on torch's build, so that no arithmetic of our own is the
// same bit for bit.
template <typename T>
Tensor cross_entropy(Judgement& out, const Tensor& logits, Judge& judge) {
  const NoGrad no_grad;
  const Tensor log_softmax = call_aten("aten::_log_softmax", logits, int64_t{1}, false);
  const int64_t* const classes = judge.toward ? judge.toward : judge.targets ? judge.targets : judge.labels;
  const T sign = judge.toward || judge.targets ? 1 : -1;
  T* const ascent = static_cast<T*>(judge.grad);
  std::fill_n(ascent, judge.batch * judge.classes, T(0));
  for (int64_t sample = 0; sample < judge.batch; ++sample) {
    const int64_t c = classes[sample];
    if (c >= 0 && c < judge.classes) ascent[sample * judge.classes + c] = sign;
  }
  out.grad = call_aten("aten::_log_softmax_backward_data", out.grad, log_softmax, int64_t{1}, logits.scalar_type());
  judge.grad = out.grad.mutable_data_ptr();
  judge.log_softmax = log_softmax.const_data_ptr();
  return log_softmax;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> judge(const Tensor& logits, const Tensor& labels,
                                                         OptionalTensor targets, OptionalTensor toward,
                                                         std::string loss, double rounding, OptionalTensor best_loss,
                                                         OptionalTensor succeeded, OptionalTensor unconfirmed,
                                                         OptionalTensor best_doubtful, bool early_stop) {
  Judgement out(logits);
  Judge judge = judge_of(out, logits, labels, targets, toward, loss, rounding,
                         {best_loss, succeeded, unconfirmed, best_doubtful, early_stop});
  if (judge.batch == 0) return out.tuple();
  OptionalTensor log_softmax;
  if (judge.kind == Loss::ce) {
    log_softmax = judge.dtype == DType::f64 ? cross_entropy<double>(out, logits, judge)
                                            : cross_entropy<float>(out, logits, judge);
  }
  torch::stable::parallel_for(0, judge.batch, std::max<int64_t>(1, kGrain / judge.classes),
                              [&](int64_t begin, int64_t end) { cpu::judge(judge, begin, end); });
  return out.tuple();
}

void run(const IndirectConv& conv) {
  if (conv.targets == 0 || conv.batch == 0 || conv.outputs == 0) return;
  // Images are taken together as far as it needs them to fill tiles; their own pixels are closer to each other.
  constexpr int64_t kTogether = 512;                       // pixels
  constexpr int64_t kWorth = 1 << 19;                      // multiply-adds worth a thread
  constexpr int64_t kSplit = 4 * IndirectConv::kMostRows;  // rows worth being divided from others
  const int64_t panels = (conv.outputs + IndirectConv::kLanes - 1) / IndirectConv::kLanes;
  const int64_t pairs = (panels + 1) / 2, threads = torch::stable::get_num_threads();
  const int64_t blocks = std::clamp<int64_t>(conv.batch * conv.targets / kTogether, 1, conv.batch);
  const int64_t rows = conv.targets * (conv.batch / blocks), work = rows * conv.taps * conv.channels * conv.outputs;
  // Panels are divided last, because each part of them gathers its rows again.
  const int64_t wanted = threads == 1 ? 1 : std::clamp<int64_t>(2 * threads / blocks, 1, work / kWorth + 1);
  const int64_t row_parts = std::clamp<int64_t>(rows / kSplit, 1, wanted);
  const int64_t panel_parts = std::clamp<int64_t>(wanted / row_parts, 1, pairs);
  const auto product = kernels().indirect_conv;
  torch::stable::parallel_for(0, blocks * row_parts * panel_parts, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = std::make_unique_for_overwrite<std::byte[]>(static_cast<size_t>(conv.scratch_bytes()));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / (row_parts * panel_parts), row = i / panel_parts % row_parts, panel = i % panel_parts;
      const IndirectConv part = conv.images(conv.batch * block / blocks, conv.batch * (block + 1) / blocks);
      const int64_t own = part.targets * part.batch;
      product(part, own * row / row_parts, own * (row + 1) / row_parts, 2 * (pairs * panel / panel_parts),
              std::min(panels, 2 * (pairs * (panel + 1) / panel_parts)), scratch.get());
    }
  });
}

// One convolution after the other. An operand that has no elements is left out.
void indirect_convs_(std::vector<Tensor> out, std::vector<Tensor> x, std::vector<Tensor> weight,
                     std::vector<Tensor> table, std::vector<int64_t> adjoint, std::vector<Tensor> bias,
                     std::vector<Tensor> other, std::vector<Tensor> active, std::vector<int64_t> relu) {
  for (const size_t count :
       {x.size(), weight.size(), table.size(), adjoint.size(), bias.size(), other.size(), active.size(), relu.size()})
    STD_TORCH_CHECK(count == out.size(), "all lists must be as long as out");
  std::vector<IndirectConv> convs;
  convs.reserve(out.size());
  for (size_t i = 0; i < out.size(); ++i)
    convs.push_back(indirect_conv_of(out[i], x[i], weight[i], table[i], adjoint[i] != 0, bias[i], other[i], active[i],
                                     relu[i] != 0));
  for (const IndirectConv& conv : convs) run(conv);
}

void winograd_conv_(Tensor out, const Tensor& x, const Tensor& weight, bool adjoint, const Tensor& bias,
                    const Tensor& other, Tensor active, bool relu) {
  const WinogradConv conv = winograd_conv_of(out, x, weight, adjoint, bias, other, active, relu);
  const Filtering& filtering = conv.filtering();
  const int64_t tiles = conv.batch * conv.tiles(filtering.side),
                panels = (conv.outputs + WinogradConv::kLanes - 1) / WinogradConv::kLanes;
  if (tiles == 0 || panels == 0) return;
  constexpr int64_t kWorth = 2 * IndirectConv::kMostRows;  // tiles worth being divided from others
  const int64_t pairs = (panels + 1) / 2, threads = torch::stable::get_num_threads();
  const int64_t wanted = threads == 1 ? 1 : 2 * threads;
  // Panels are divided last, because each part of them transforms its tiles again.
  const int64_t tile_parts = std::clamp<int64_t>(tiles / kWorth, 1, wanted);
  const int64_t panel_parts = std::clamp<int64_t>(wanted / tile_parts, 1, pairs);
  const auto product = kernels().winograd_conv;
  torch::stable::parallel_for(0, tile_parts * panel_parts, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = std::make_unique_for_overwrite<std::byte[]>(filtering.scratch_bytes(conv.channels));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i / panel_parts, panel = i % panel_parts;
      product(conv, tiles * tile / tile_parts, tiles * (tile + 1) / tile_parts, 2 * (pairs * panel / panel_parts),
              std::min(panels, 2 * (pairs * (panel + 1) / panel_parts)), scratch.get());
    }
  });
}

void direct_conv_(Tensor out, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& other,
                  Tensor active, std::vector<int64_t> stride, std::vector<int64_t> padding, bool adjoint, bool relu) {
  DirectConv conv = direct_conv_of(out, x, weight, bias, other, active, stride, padding, adjoint, relu);
  if (out.numel() == 0) return;
  const cpu::DirectConvPlan plan(conv);
  constexpr int64_t kWorth = 1 << 17;  // multiply-adds worth a thread
  const int64_t products = conv.sources * conv.targets * conv.kernel[0] * conv.kernel[1] * conv.map[0] * conv.map[1];
  const int64_t grain = std::max<int64_t>(1, kWorth * conv.bands / (products + 1));
  const auto sum = kernels().direct_conv;
  torch::stable::parallel_for(0, conv.batch * conv.bands, grain, [&](int64_t begin, int64_t end) {
    const auto scratch = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(conv.scratch_floats()));
    sum(conv, begin, end, scratch.get());
  });
}

void interleaved_layers_(Tensor out, const Tensor& x, std::vector<Tensor> weight, std::vector<Tensor> bias,
                         std::vector<int64_t> geometry, Tensor active, bool adjoint) {
  InterleavedLayers problem{};
  const auto layers = interleaved_layers_of(problem, out, x, weight, bias, geometry, active, adjoint);
  if (problem.batch == 0) return;
  const cpu::InterleavedPlan plan(problem, layers);
  constexpr int64_t kMostScratch = int64_t{1} << 28;
  STD_TORCH_CHECK(problem.scratch_floats() <= kMostScratch, "layers must take at most 2^28 floats of scratch memory");
  const auto run_blocks = kernels().interleaved_layers;
  torch::stable::parallel_for(0, problem.blocks(), 1, [&](int64_t begin, int64_t end) {
    const auto scratch = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(problem.scratch_floats()));
    run_blocks(problem, begin, end, scratch.get());
  });
}

// The sum of f(begin, end) over [0, count) in chunks of a fixed size, so that it does not depend on the threads.
template <typename F>
double sum_over(int64_t count, int64_t chunk, F f) {
  std::vector<double> sums((count + chunk - 1) / chunk);
  torch::stable::parallel_for(0, static_cast<int64_t>(sums.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] = f(i * chunk, std::min(count, (i + 1) * chunk));
  });
  double sum = 0;
  for (const double part : sums) sum += part;
  return sum;
}

// Rows worth a thread, a multiple of those that the kernels take at once.
int64_t rows_each(const NormGradient& g) { return std::max<int64_t>(1, kGrain / g.columns / 4) * 4; }

Tensor norm_along(const Tensor& weight, const Tensor& left, const Tensor& right) {
  const NormGradient gradient = norm_gradient_of(weight, "weight", left, right);
  Tensor out = torch::stable::new_zeros(weight, {}, ScalarType::Double);
  if (weight.numel() == 0) return out;
  const cpu::Kernels& table = kernels();
  const void* const at = data_of(weight);
  *static_cast<double*>(out.mutable_data_ptr()) =
      sum_over(gradient.rows, rows_each(gradient),
               [&](int64_t begin, int64_t end) { return table.norm_along(gradient, at, begin, end); });
  return out;
}

Tensor scaled_weight_grad(const Tensor& grad, const Tensor& scaled, const Tensor& left, const Tensor& right,
                          double norm, double bound) {
  Tensor out = torch::stable::empty_like(grad);
  ScaledWeightGrad problem = scaled_weight_grad_of(out, grad, scaled, left, right, norm, bound);
  if (grad.numel() == 0) return out;
  const cpu::Kernels& table = kernels();
  const double product = sum_over(grad.numel(), kGrain, [&](int64_t begin, int64_t end) {
    return table.product(problem.grad, problem.scaled, problem.gradient.dtype, begin, end);
  });
  problem.factor = -product / norm;
  torch::stable::parallel_for(0, problem.gradient.rows, rows_each(problem.gradient),
                              [&](int64_t begin, int64_t end) { table.scaled_weight_grad(problem, begin, end); });
  return out;
}

Tridiagonal tridiagonal_of(const Tensor& diagonal, const Tensor& off) {
  for (const Tensor* t : {&diagonal, &off}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Double && t->is_contiguous(),
                    "matrices must be contiguous float64");
    STD_TORCH_CHECK(t->dim() == 2 && t->size(1) > 0, "matrices must be [matrices, steps], of at least one step");
  }
  STD_TORCH_CHECK(diagonal.size(0) == off.size(0) && diagonal.size(1) == off.size(1),
                  "off_diagonal must be like diagonal");
  return {static_cast<const double*>(diagonal.const_data_ptr()), static_cast<const double*>(off.const_data_ptr()),
          diagonal.size(0), diagonal.size(1)};
}

// Runs f(begin, end) over matrices; a thread gets at least a few microseconds of work.
template <typename F>
void parallel_matrices(const Tridiagonal& t, F f) {
  constexpr int64_t kMatricesEach = 64;
  torch::stable::parallel_for(0, t.count, kMatricesEach, f);
}

std::tuple<Tensor, Tensor> top_eigenpairs(const Tensor& diagonal, const Tensor& off) {
  const Tridiagonal matrix = tridiagonal_of(diagonal, off);
  Tensor values = torch::stable::new_empty(diagonal, {matrix.count});
  Tensor vectors = torch::stable::new_empty(diagonal, {matrix.count, matrix.steps});
  auto* const value = static_cast<double*>(values.mutable_data_ptr());
  auto* const vector = static_cast<double*>(vectors.mutable_data_ptr());
  parallel_matrices(matrix,
                    [&](int64_t begin, int64_t end) { cpu::top_eigenpairs(matrix, value, vector, begin, end); });
  return {values, vectors};
}

Tensor krylov_bound(const Tensor& diagonal, const Tensor& off, const Tensor& last, const Tensor& residual,
                    const Tensor& start_overlap, double tolerance) {
  const Tridiagonal matrix = tridiagonal_of(diagonal, off);
  const auto numbers = [&](const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double && t.is_contiguous() && t.dim() == 1, name,
                    " must be contiguous float64 [matrices]");
    STD_TORCH_CHECK(t.size(0) == matrix.count, name, " must be contiguous float64 [matrices]");
    return static_cast<const double*>(t.const_data_ptr());
  };
  Tensor upper = torch::stable::new_empty(diagonal, {matrix.count});
  const KrylovBound bound{matrix,
                          numbers(last, "last"),
                          numbers(residual, "residual"),
                          numbers(start_overlap, "start_overlap"),
                          tolerance,
                          static_cast<double*>(upper.mutable_data_ptr())};
  parallel_matrices(matrix, [&](int64_t begin, int64_t end) { cpu::krylov_bound(bound, begin, end); });
  return upper;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlip, CPU, m) {
  m.impl("pgd_step_", TORCH_BOX(&pgd_step_));
  m.impl("project_", TORCH_BOX(&project_));
  m.impl("random_start", TORCH_BOX(&random_start));
  m.impl("apgd_step_", TORCH_BOX(&apgd_step_));
  m.impl("operator_step_", TORCH_BOX(&operator_step_));
  m.impl("judge", TORCH_BOX(&judge));
  m.impl("pack_weights_", TORCH_BOX(&pack_weights_));
  m.impl("indirect_convs_", TORCH_BOX(&indirect_convs_));
  m.impl("winograd_conv_", TORCH_BOX(&winograd_conv_));
  m.impl("direct_conv_", TORCH_BOX(&direct_conv_));
  m.impl("interleaved_layers_", TORCH_BOX(&interleaved_layers_));
  m.impl("norm_along", TORCH_BOX(&norm_along));
  m.impl("scaled_weight_grad", TORCH_BOX(&scaled_weight_grad));
  m.impl("top_eigenpairs", TORCH_BOX(&top_eigenpairs));
  m.impl("krylov_bound", TORCH_BOX(&krylov_bound));
}

}  // namespace fastlip
