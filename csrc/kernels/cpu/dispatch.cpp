// Chooses the table of kernels for the CPU at hand, once.
#include <cstdlib>
#include <string>
#include <string_view>

#include "kernels/api.h"

namespace fastlip::cpu {

extern const Kernels kernels_baseline;
#ifdef FASTLIP_X86_DISPATCH
extern const Kernels kernels_avx2, kernels_avx512;
#endif

namespace {

struct Candidate {
  const Kernels* table;
  bool supported;
};

struct Choice {
  const Kernels* table = nullptr;
  std::string error;
};

Choice choose() {
  const Candidate candidates[] = {
#ifdef FASTLIP_X86_DISPATCH
      {&kernels_avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")},
      {&kernels_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&kernels_baseline, true},
  };
  const char* env = std::getenv("FASTLIP_CPU_ISA");
  const std::string_view want = env ? env : "";
  for (const Candidate& c : candidates) {
    if (!want.empty() && want != c.table->isa) continue;
    if (c.supported) return {c.table, ""};
    if (!want.empty()) return {nullptr, "FASTLIP_CPU_ISA=" + std::string(want) + " is not supported by this CPU"};
  }
  return {nullptr, "FASTLIP_CPU_ISA=" + std::string(want) + " is unknown; this build has " + compiled_isas()};
}

}  // namespace

const Kernels* kernels(const char** error) {
  static const Choice choice = choose();
  *error = choice.error.c_str();
  return choice.table;
}

void operator_squares(const OperatorStep& p) {
  const auto* problems = reinterpret_cast<const OperatorStep::Problem*>(p.problems);
  for (int64_t i = 0; i < p.problem_count; ++i) {
    const OperatorStep::Problem& problem = problems[i];
    if (p.active && !p.active[i]) continue;
    for (int64_t vector = 0; vector < problem.vectors; ++vector) {
      double sum = 0;
      for (int64_t tile = problem.tile_at; tile < problem.tile_at + problem.tiles; ++tile)
        sum += p.partial[tile * p.max_vectors + vector];
      p.out_square[problem.vector_at + vector] = sum;
    }
  }
}

const char* compiled_isas() {
#ifdef FASTLIP_X86_DISPATCH
  return "avx512, avx2, baseline";
#else
  return "baseline";
#endif
}

}  // namespace fastlip::cpu
