#!/usr/bin/env bash
# Everything that needs a GPU, in one run of under nine minutes: install, tests on the CUDA library and on Triton,
# compute-sanitizer, measured ceilings and benchmarks. The machine has to have nvcc, torch, torchvision, triton, scipy,
# scikit-build-core, pybind11, ninja and pytest; nothing is fetched. CSVs and logs.tar.gz go to
# ${OUT:-benchmarks/results/gpu}; a table of what was aimed at and what was measured comes last.
# A step that fails or overruns its time does not stop later ones; the exit status says whether all of them passed.
# DEVICE=cpu is a dry run: every step that can run without a GPU, on small problems, with nothing installed.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
out=${OUT:-$repository/benchmarks/results/gpu}
deadline=${SECONDS_IN_ALL:-$([[ $device == cpu ]] && echo 1800 || echo 530)}
mkdir -p "$out"
out=$(cd "$out" && pwd)
# Out of the repository: the installed package has the compiled libraries, the source tree has not.
logs=$(mktemp -d)
cd "$logs"

table=()
failures=0

# step NAME SECONDS COMMAND...: run it within that time and the whole's, its output in NAME.log, a line in the table.
step() {
  local name=$1 limit=$2 begun=$SECONDS status=0 verdict=passed counts
  shift 2
  if ((deadline - SECONDS < limit)); then limit=$((deadline - SECONDS)); fi
  if ((limit < 5)); then
    table+=("$(printf '%-19s %s' "$name" 'not begun: no time left')")
    failures=$((failures + 1))
    return
  fi
  timeout --kill-after=5 "$limit" "$@" >"$name.log" 2>&1 || status=$?
  if ((status != 0)); then
    verdict="failed ($status)"
    if ((status == 124 || status == 137)); then verdict="over $limit s"; fi
    failures=$((failures + 1))
    printf -- '--- %s %s; the end of its log:\n' "$name" "$verdict"
    tail -n 12 "$name.log"
  fi
  counts=$(grep -aE '[0-9]+ (passed|failed|error)|(ERROR|RACECHECK) SUMMARY' "$name.log" | tail -n 1 | tr -d '=' || true)
  table+=("$(printf '%-19s %-13s %4d s  %s' "$name" "$verdict" $((SECONDS - begun)) "$counts")")
}

# Without the project's options, of which some need plugins that the machine may lack.
pytest=("$python" -m pytest -q -c "$repository/pyproject.toml" --rootdir "$repository" -p no:cacheprovider)
pytest+=(-o addopts=-ra)
small="layouts or values_per_sample or large or all_at_once or odd_addresses or (random_geometries and merged) or pack_weights"

# tests NAME SECONDS BACKEND PYTEST_ARGUMENT...
tests() {
  local name=$1 limit=$2 backend=$3
  shift 3
  local marks="gpu and not slow"
  if [[ $device == cpu ]]; then marks="not gpu and not slow"; fi
  step "$name" "$limit" env FASTLIP_BACKEND="$backend" "${pytest[@]}" -m "$marks" "$@"
}

# sanitize SECONDS TOOL: the smaller tests under compute-sanitizer. PyTorch's caching allocator would hide accesses
# beyond a tensor's end.
sanitize() {
  step "$2" "$1" env FASTLIP_BACKEND=native PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$2" \
    --target-processes all --error-exitcode 99 "${pytest[@]}" -m "gpu and not slow" -k "${SANITIZE:-$small}" \
    "$repository/tests/ops"
}

# bench NAME SECONDS ARGUMENT...: a benchmark on the CUDA library.
bench() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" env FASTLIP_BACKEND=native "$python" "$repository/benchmarks/$name.py" --device "$device" \
    --out "$out" "$@"
}

if [[ $device == cuda ]]; then
  # Code for this machine alone builds faster.
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')
  export FASTLIP_CUDA=ON FASTLIP_CUDA_ARCHITECTURES=${FASTLIP_CUDA_ARCHITECTURES:-$capability-real}
  step machine 10 nvidia-smi
  step install 150 "$python" -m pip install --no-build-isolation --no-deps --force-reinstall "$repository"
  step build_info 20 "$python" -m fastlip
  tests native 60 native "$repository/tests"
  bench bench_gpu_norms 90 --seconds 0.3
  bench bench_pgd_step 80 --seconds 0.05
  bench bench_apgd_step 50 --seconds 0.05
  bench bench_gpu_attack 100 --train-seconds 15
  sanitize 45 memcheck
  sanitize 45 racecheck
  tests triton 70 triton "$repository/tests/ops"
  bench bench_operator_step 45 --seconds 0.05
else
  export OMP_NUM_THREADS=1
  step build_info 100 "$python" -m fastlip
  tests native 300 native -k "layouts" "$repository/tests/ops" "$repository/tests/norms/test_recurrence.py"
  TRITON_INTERPRET=1 tests triton 300 triton -k "matches_reference and linf" "$repository/tests/ops/test_random_start.py"
  bench bench_gpu_norms 300 --tiny --checkpoints 3 --seconds 0.02
  bench bench_gpu_attack 300 --images 8 --batch 4 --train-seconds "${TRAIN_SECONDS:-60}"
  bench bench_pgd_step 300 --shape 256x3x32x32 --seconds 0.01 --no-compile
  bench bench_apgd_step 300 --shape 256x3x32x32 --seconds 0.01 --no-compile
  bench bench_operator_step 300 --starts 1 --seconds 0.01
fi

for log in build_info bench_operator_step bench_pgd_step bench_apgd_step bench_gpu_norms bench_gpu_attack; do
  [[ -f $log.log ]] || continue
  printf '\n--- %s\n' "$log"
  tail -n 85 "$log.log"
done
tar -czf "$out/logs.tar.gz" ./*
cd "$out"
rm -r "$logs"
printf '\n'
printf '%s\n' "${table[@]}"
printf '%s of %s steps failed; %d s; logs in %s\n\n' "$failures" "${#table[@]}" "$SECONDS" "$out/logs.tar.gz"
"$python" "$repository/benchmarks/gpu_summary.py" "$out" --device "$device"
((failures == 0))
