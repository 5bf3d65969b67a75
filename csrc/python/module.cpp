// fastlip._native: the fused steps on NumPy arrays, without torch, and what this build is.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>

#include "kernels/api.h"

namespace py = pybind11;

namespace fastlip {
namespace {

using PerSample = std::variant<double, py::array>;

const cpu::Kernels& kernels() {
  const char* error = nullptr;
  const cpu::Kernels* table = cpu::kernels(&error);
  if (!table) throw py::import_error(std::string("fastlip: ") + error);
  return *table;
}

[[noreturn]] void refuse(const std::string& message) { throw py::value_error(message); }

DType dtype_of(const py::array& a, const char* name) {
  if (a.dtype().is(py::dtype::of<float>())) return DType::f32;
  if (a.dtype().is(py::dtype::of<double>())) return DType::f64;
  if (a.dtype().kind() == 'f' && a.dtype().itemsize() == 2 && a.dtype().byteorder() == '=') return DType::f16;
  throw py::type_error(std::string(name) + " must be float16, float32 or float64, in native byte order");
}

void check_array(const py::array& a, const char* name) {
  dtype_of(a, name);
  if (a.ndim() < 1) refuse(std::string(name) + " must have a batch dimension");
  if (!(a.flags() & py::array::c_style))
    refuse(std::string(name) + " must be C-contiguous; see numpy.ascontiguousarray");
}

void check_like(const py::array& a, const py::array& x, const char* name) {
  check_array(a, name);
  if (!a.dtype().is(x.dtype())) throw py::type_error(std::string(name) + " must have x's dtype");
  if (a.ndim() != x.ndim() || !std::equal(a.shape(), a.shape() + a.ndim(), x.shape()))
    refuse(std::string(name) + " must have x's shape");
}

int64_t sample_size(const py::array& x) {
  int64_t size = 1;
  for (py::ssize_t d = 1; d < x.ndim(); ++d) size *= x.shape(d);
  return size;
}

// Arrays handed to the kernels as numbers per sample, kept alive for the call.
struct Held {
  py::array array;
  Value value;
};

py::array as_arithmetic(const py::array& a, const py::array& x) {
  if (x.dtype().is(py::dtype::of<double>())) return py::array_t<double, py::array::c_style | py::array::forcecast>(a);
  return py::array_t<float, py::array::c_style | py::array::forcecast>(a);
}

Held per_sample(const PerSample& value, const py::array& x, const char* name, bool negative) {
  if (const double* scalar = std::get_if<double>(&value)) {
    if (negative ? !std::isfinite(*scalar) : !(*scalar >= 0))
      refuse(std::string(name) + (negative ? " must be finite" : " must be at least 0"));
    return {py::array(), {*scalar, nullptr, 0}};
  }
  py::array a = as_arithmetic(std::get<py::array>(value), x);
  if (a.ndim() != 1 || a.shape(0) != x.shape(0)) refuse(std::string(name) + " must be a float or have shape [B]");
  return {a, {0, a.data(), 1}};
}

Held bound(const PerSample& value, const py::array& x) {
  if (const double* scalar = std::get_if<double>(&value)) return {py::array(), {*scalar, nullptr, 0}};
  const py::module_ numpy = py::module_::import("numpy");
  const py::array& given = std::get<py::array>(value);
  const bool vary = given.ndim() == x.ndim() && given.shape(0) != 1;
  py::list shape;
  for (py::ssize_t d = 0; d < x.ndim(); ++d) shape.append(d || vary ? x.shape(d) : 1);
  try {
    const py::array whole = numpy.attr("broadcast_to")(given, py::tuple(shape));
    py::array a = as_arithmetic(whole, x);
    return {a, {0, a.data(), vary ? sample_size(x) : 0}};
  } catch (py::error_already_set&) {
    refuse("bounds must broadcast to x's shape");
  }
}

std::pair<Held, Held> limits(const std::pair<PerSample, PerSample>& bounds, const py::array& x) {
  Held lo = bound(bounds.first, x), hi = bound(bounds.second, x);
  if (!lo.value.data && !hi.value.data && !(lo.value.scalar <= hi.value.scalar))
    refuse("bounds must satisfy lower <= upper");
  return {std::move(lo), std::move(hi)};
}

Norm norm_of(const std::string& norm) {
  if (norm == "linf") return Norm::linf;
  if (norm == "l2") return Norm::l2;
  if (norm == "l1") return Norm::l1;
  refuse("norm must be one of linf, l2, l1, got " + norm);
}

py::array step(py::array x, const py::array* grad, const py::array& x0, const PerSample& step_size,
               const PerSample& eps, const std::string& norm, const std::pair<PerSample, PerSample>& bounds,
               double sparsity, const std::optional<py::array>& active) {
  check_array(x, "x");
  if (!x.writeable()) refuse("x must be writeable");
  if (grad) check_like(*grad, x, "grad");
  check_like(x0, x, "x0");
  if (x.nbytes() && x0.data() == x.data())
    refuse("x0 must not share its memory with x, which is changed in place; copy one of them");
  if (!(sparsity >= 0 && sparsity <= 1)) refuse("sparsity must lie in [0, 1]");
  const Held steps = per_sample(step_size, x, "step_size", true), radii = per_sample(eps, x, "eps", false);
  const auto [lo, hi] = limits(bounds, x);
  const uint8_t* mask = nullptr;
  if (active) {
    if (!active->dtype().is(py::dtype::of<bool>())) throw py::type_error("active must be a bool array");
    if (active->ndim() != 1 || active->shape(0) != x.shape(0) || !(active->flags() & py::array::c_style))
      refuse("active must be contiguous and have shape [B]");
    mask = static_cast<const uint8_t*>(active->data());
  }
  const int64_t size = sample_size(x);
  const PgdStep p{x.mutable_data(),
                  grad ? grad->data() : nullptr,
                  x0.data(),
                  steps.value,
                  radii.value,
                  norm_of(norm),
                  lo.value,
                  hi.value,
                  kept_elements(size, sparsity),
                  mask,
                  dtype_of(x, "x"),
                  x.shape(0),
                  size,
                  size,
                  size,
                  size};
  if (p.batch == 0 || p.size == 0) return x;
  const cpu::Kernels& table = kernels();
  const auto scratch = std::make_unique_for_overwrite<std::byte[]>(cpu::scratch_bytes(size));
  const py::gil_scoped_release release;
  if (p.norm == Norm::linf) {
    table.pgd_step_linf(p, 0, p.batch * p.size);
  } else {
    table.pgd_step_ball(p, 0, p.batch, scratch.get());
  }
  return x;
}

constexpr const char* kStepDoc = R"(One projected gradient ascent step on NumPy arrays, in place; returns x.

As fastlip.ops.pgd_step_, without torch: x, grad, x0 are [B, ...], C-contiguous, float16, float32 or float64. Runs on the
calling thread with the GIL released. Raises ValueError or TypeError naming the argument.)";
constexpr const char* kProjectDoc =
    R"(Euclidean projection onto the eps ball around x0 and the box, in place; returns x.

As fastlip.ops.project_, without torch: x, x0 are [B, ...], C-contiguous, float16, float32 or float64. Runs on the
calling thread with the GIL released. Raises ValueError or TypeError naming the argument.)";
constexpr const char* kStartDoc = R"(Points uniform in the eps ball around x0, projected onto the box; a new array.

As fastlip.ops.random_start, without torch: x0 is [B, ...], C-contiguous, float16, float32 or float64; key is the 64-bit
key of the Philox generator, ids the [B] int64 sample ids (0 .. B-1 if None). The same key and id give the same start
as torch.ops.fastlip.random_start. Raises ValueError or TypeError naming the argument.)";

py::array pgd_step_(py::array x, const py::array& grad, const py::array& x0, const PerSample& step_size,
                    const PerSample& eps, const std::string& norm, const std::pair<PerSample, PerSample>& bounds,
                    double sparsity, const std::optional<py::array>& active) {
  return step(std::move(x), &grad, x0, step_size, eps, norm, bounds, sparsity, active);
}

py::array project_(py::array x, const py::array& x0, const PerSample& eps, const std::string& norm,
                   const std::pair<PerSample, PerSample>& bounds, const std::optional<py::array>& active) {
  return step(std::move(x), nullptr, x0, 0.0, eps, norm, bounds, 0, active);
}

py::array random_start(const py::array& x0, const PerSample& eps, const std::string& norm,
                       const std::pair<PerSample, PerSample>& bounds, const std::optional<py::array>& ids,
                       int64_t key) {
  check_array(x0, "x0");
  py::array out(x0.dtype(), std::vector<py::ssize_t>(x0.shape(), x0.shape() + x0.ndim()));
  const Held radii = per_sample(eps, x0, "eps", false);
  const auto [lo, hi] = limits(bounds, x0);
  if (!radii.value.data && std::isinf(radii.value.scalar)) refuse("eps must be finite for a random start");
  const py::module_ numpy = py::module_::import("numpy");
  if (ids && (ids->dtype().kind() != 'i' || ids->itemsize() != 8)) throw py::type_error("ids must be an int64 array");
  const py::array_t<int64_t, py::array::c_style> numbers(ids ? py::object(*ids) : numpy.attr("arange")(x0.shape(0)));
  if (numbers.ndim() != 1 || numbers.shape(0) != x0.shape(0)) refuse("ids must have shape [B]");
  const int64_t size = sample_size(x0);
  const RandomStart p{
      out.mutable_data(), x0.data(),   radii.value, norm_of(norm), lo.value, hi.value, numbers.data(), &key,
      dtype_of(x0, "x0"), x0.shape(0), size,        size,          size,     1};
  if (p.batch == 0 || p.size == 0) return out;
  const auto scratch = std::make_unique_for_overwrite<std::byte[]>(cpu::scratch_bytes(size));
  const py::gil_scoped_release release;
  cpu::random_start(p, 0, p.batch, scratch.get());
  return out;
}

// y = a + b + c on float32 arrays: the benchmarks' floor of three reads and one write.
void stream(py::array_t<float, py::array::c_style> y, const py::array_t<float, py::array::c_style>& a,
            const py::array_t<float, py::array::c_style>& b, const py::array_t<float, py::array::c_style>& c) {
  if (a.size() != y.size() || b.size() != y.size() || c.size() != y.size()) refuse("all arrays must have y's size");
  const cpu::Kernels& table = kernels();
  float* to = y.mutable_data();
  const py::gil_scoped_release release;
  table.stream(to, a.data(), b.data(), c.data(), y.size());
}

py::dict build_info() {
  py::dict info;
  info["version"] = FASTLIP_VERSION;
  info["compiler"] = FASTLIP_COMPILER;
  info["cpu_isas"] = cpu::compiled_isas();
  info["torch_built_with"] = FASTLIP_TORCH_VERSION;
  info["cuda_toolkit"] =
      std::string(FASTLIP_CUDA_TOOLKIT).empty() ? py::object(py::none()) : py::str(FASTLIP_CUDA_TOOLKIT);
  info["cuda_architectures"] =
      std::string(FASTLIP_CUDA_ARCHS).empty() ? py::object(py::none()) : py::str(FASTLIP_CUDA_ARCHS);
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Fused PGD steps on NumPy arrays, without torch, and build information.";
  const auto unit_box = std::make_pair(PerSample(0.0), PerSample(1.0));
  m.def("pgd_step_", &pgd_step_, kStepDoc, py::arg("x").noconvert(), py::arg("grad").noconvert(),
        py::arg("x0").noconvert(), py::kw_only(), py::arg("step_size"), py::arg("eps"), py::arg("norm") = "linf",
        py::arg("bounds") = unit_box, py::arg("sparsity") = 0.99, py::arg("active") = py::none());
  m.def("project_", &project_, kProjectDoc, py::arg("x").noconvert(), py::arg("x0").noconvert(), py::kw_only(),
        py::arg("eps"), py::arg("norm") = "linf", py::arg("bounds") = unit_box, py::arg("active") = py::none());
  m.def("random_start", &random_start, kStartDoc, py::arg("x0").noconvert(), py::kw_only(), py::arg("eps"),
        py::arg("norm") = "linf", py::arg("bounds") = unit_box, py::arg("ids") = py::none(), py::arg("key"));
  m.def("_stream", &stream, py::arg("y").noconvert(), py::arg("a").noconvert(), py::arg("b").noconvert(),
        py::arg("c").noconvert());
  m.def(
      "cpu_isa", [] { return kernels().isa; },
      "Instruction set of the CPU kernels in use. Raises ImportError where FASTLIP_CPU_ISA asks for one that this CPU "
      "or build lacks.");
  m.def("build_info", &build_info, "What was built: version, compiler, instruction sets, CUDA toolkit, torch.");
}

}  // namespace fastlip
