#!/usr/bin/env bash
# Everything that needs a GPU, in one run of under nine minutes: install, tests on the CUDA library and on Triton,
# compute-sanitizer, measured ceilings and benchmarks. The machine has to have nvcc, torch, triton, scikit-build-core, pybind11 and pytest;
# nothing is fetched. Logs, JUnit reports and CSVs go to ${OUT:-benchmarks/results/gpu}; a table comes last.
# A step that fails or overruns its time does not stop later ones; the exit status says whether all of them passed.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-$repository/benchmarks/results/gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
# Out of the repository: the installed package has the compiled libraries, the source tree has not.
cd "$out"

table=()
failures=0

# step NAME SECONDS COMMAND...: run it within that time, its output in NAME.log, a line about it in the table.
step() {
  local name=$1 limit=$2 begun=$SECONDS status=0 verdict=passed
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$name.log" 2>&1 || status=$?
  if ((status != 0)); then
    verdict="failed ($status)"
    if ((status == 124 || status == 137)); then verdict="over $limit s"; fi
    failures=$((failures + 1))
    printf -- '--- %s %s; the end of %s:\n' "$name" "$verdict" "$out/$name.log"
    tail -n 12 "$name.log"
  fi
  local counts
  counts=$(grep -aE '[0-9]+ (passed|failed|error)|(ERROR|RACECHECK) SUMMARY' "$name.log" | tail -n 1 | tr -d '=' || true)
  table+=("$(printf '%-19s %-13s %4d s  %s' "$name" "$verdict" $((SECONDS - begun)) "$counts")")
}

# tests NAME SECONDS BACKEND PYTEST_ARGUMENT...
tests() {
  local name=$1 limit=$2 backend=$3
  shift 3
  step "$name" "$limit" env FASTLIP_BACKEND="$backend" "$python" -m pytest -q -c "$repository/pyproject.toml" \
    --rootdir "$repository" -p no:cacheprovider --junitxml "$name.xml" -m "gpu and not slow" "$@"
}

# sanitize NAME SECONDS TOOL: the smaller tests under compute-sanitizer. PyTorch's caching allocator would hide accesses
# beyond a tensor's end.
sanitize() {
  step "$1" "$2" env FASTLIP_BACKEND=native PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$3" \
    --target-processes all --error-exitcode 99 "$python" -m pytest -q -c "$repository/pyproject.toml" \
    --rootdir "$repository" -p no:cacheprovider -m "gpu and not slow" -k "${SANITIZE:-$smaller}" "$repository/tests/ops"
}
smaller="layouts or values_per_sample or large or all_at_once or odd_addresses or (random_geometries and merged)"

# bench NAME SECONDS ARGUMENT...: a benchmark on the CUDA library.
bench() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" env FASTLIP_BACKEND=native "$python" "$repository/benchmarks/$name.py" --device cuda --out "$out" "$@"
}

# Limits add up to less than nine minutes.
step machine 10 nvidia-smi
step install 130 "$python" -m pip install --no-build-isolation --no-deps --force-reinstall "$repository"
step build_info 20 "$python" -m fastlip
tests native 60 native "$repository/tests"
tests triton 70 triton "$repository/tests/ops"
sanitize memcheck 45 memcheck
sanitize racecheck 45 racecheck
bench bench_operator_step 45 --seconds 0.1
bench bench_pgd_step 60 --seconds 0.1
bench bench_apgd_step 20 --no-compile --seconds 0.1
if [[ -f $repository/benchmarks/bench_layer_norms.py ]]; then bench bench_layer_norms 30; fi

for log in build_info bench_operator_step bench_pgd_step bench_apgd_step bench_layer_norms; do
  [[ -f $log.log ]] || continue
  printf '\n--- %s\n' "$log"
  tail -n 45 "$log.log"
done
printf '\n'
printf '%s\n' "${table[@]}"
printf '%s of %s steps failed; logs in %s\n' "$failures" "${#table[@]}" "$out"
((failures == 0))
