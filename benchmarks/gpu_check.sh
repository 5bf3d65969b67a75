#!/usr/bin/env bash
# What needs a GPU, in two runs of a few minutes each, the most valuable first:
#
#   benchmarks/gpu_check.sh first     install, a covering set of the GPU tests, memcheck, norms, steps, PGD end to end
#   benchmarks/gpu_check.sh second    the study's training, all GPU tests, racecheck, eleven Triton tests,
#                                     training under a constraint, products
#   benchmarks/gpu_check.sh           both
#
# The machine has to have torch, torchvision, triton, scipy, matplotlib and pytest; nothing is fetched. WHEEL=FILE installs
# that file (see CONTRIBUTING.md for how to make one beforehand); without it the package is built, which takes nvcc,
# scikit-build-core, pybind11 and ninja. OLD_WHEEL=FILE times another build's steps beside this one's.
# CSVs, written row by row, and logs.tar.gz go to ${OUT:-benchmarks/results/gpu}; a table of what was aimed at and what
# was measured comes last. A step that fails or overruns its time does not stop later ones; the exit status says whether
# all of them passed. DEVICE=cpu is a dry run: every step that can run without a GPU, on small problems.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
part=${1:-both}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
out=${OUT:-$repository/benchmarks/results/gpu}
for wheel in ${WHEEL:+"$WHEEL"} ${OLD_WHEEL:+"$OLD_WHEEL"}; do
  [[ -f $wheel ]] || { echo "error: no wheel $wheel" >&2; exit 2; }
done
WHEEL=${WHEEL:+$(realpath "$WHEEL")} OLD_WHEEL=${OLD_WHEEL:+$(realpath "$OLD_WHEEL")}
case $part in
  first) allowed=350 ;;
  second) allowed=300 ;;
  both) allowed=900 ;;
  *)
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
deadline=${SECONDS_IN_ALL:-$([[ $device == cpu ]] && echo 3600 || echo $allowed)}
mkdir -p "$out"
out=$(cd "$out" && pwd)
# Out of the repository: the installed package has the compiled libraries, the source tree has not.
logs=$(mktemp -d)
cd "$logs"
names=()

# begin NAME SECONDS COMMAND...: start it, to end within that time and the whole's; its output in NAME.log.
begin() {
  local name=$1 limit=$2
  shift 2
  names+=("$name")
  if [[ $device == cpu ]]; then limit=600; fi
  if ((deadline - SECONDS < limit)); then limit=$((deadline - SECONDS)); fi
  if ((limit < 5)); then
    printf '%s\n' 'not begun: no time left' >"$name.verdict"
    return
  fi
  {
    local begun=$SECONDS status=0 verdict=passed
    timeout --kill-after=5 "$limit" "$@" >"$name.log" 2>&1 || status=$?
    if ((status == 124 || status == 137)); then
      verdict="over $limit s"
    elif ((status != 0)); then
      verdict="failed ($status)"
    fi
    printf '%-14s %4d s\n' "$verdict" $((SECONDS - begun)) >"$name.verdict"
  } &
}

# step NAME SECONDS COMMAND...: the same, alone.
step() {
  wait
  begin "$@"
  wait
}

# Without the project's options, of which some need plugins that the machine may lack.
pytest=("$python" -m pytest -v -c "$repository/pyproject.toml" --rootdir "$repository" -p no:cacheprovider)
pytest+=(-o addopts=-ra --tb=short)
marks=$([[ $device == cpu ]] && echo "not gpu and not slow" || echo "gpu and not slow")
at_once=()
if [[ $device == cuda ]] && "$python" -c "import xdist" 2>/dev/null; then at_once=(-n 8 --dist worksteal); fi

# tests BACKEND PYTEST_ARGUMENT...
tests() { env FASTLIP_BACKEND="$1" "${pytest[@]}" -m "$marks" "${@:2}"; }

# sanitize TOOL: about ten tests under compute-sanitizer, every kernel among them. PyTorch's caching allocator would hide
# accesses beyond a tensor's end.
small="(test_layouts and not input) or large_samples or test_all_at_once or odd_addresses or many_of_all_kinds"
sanitize() {
  env FASTLIP_BACKEND=native PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --target-processes all \
    --error-exitcode 99 "${pytest[@]}" -m "$marks" --cover 1 -k "${SANITIZE:-$small}" "$repository/tests/ops"
}

# bench NAME ARGUMENT...: a benchmark on the CUDA library.
bench() { env FASTLIP_BACKEND=native "$python" "$repository/benchmarks/$1.py" --device "$device" --out "$out" "${@:2}"; }
# So that `timeout` can run them.
export repository python device out marks small
for name in tests sanitize bench; do
  declare -f "$name"
done >functions.sh
declare -p pytest at_once >>functions.sh
run=(bash -c 'source functions.sh; "$@"' run)

# Options of a dry run, and of what is measured.
if [[ $device == cpu ]]; then
  export OMP_NUM_THREADS=1
  chosen=(-k layouts "$repository/tests/ops" "$repository/tests/norms/solvers/test_recurrence.py") all=("${chosen[@]}")
  interpreted=(TRITON_INTERPRET=1)
  triton=(-k "matches_reference and linf" "$repository/tests/ops/test_random_start.py")
  norms=(--tiny --checkpoints 3 --seconds 0.02)
  steps=(--shape 256x3x32x32 --seconds 0.01 --no-compile)
  attack=(--images 8 --batch 4 --train-seconds "${TRAIN_SECONDS:-60}")
  study=(--images 1024 --attacked 8 --seconds 1 --warm 2 --limit 60 --no-compile --set model=torchvision:resnet18)
  operators=(--starts 1 --seconds 0.01)
  constrain=(--networks resnet18 --batch 4 --rounds 1 --warm 0 --no-memory)
else
  chosen=(--cover 2 "$repository/tests") all=("$repository/tests")
  interpreted=()
  # Eleven cases that reach every Triton kernel with seventeen compilations.
  ops=$repository/tests/ops
  triton=(
    "$ops/test_pgd_ops.py::test_values_per_sample[torch.float32-linf-cuda]"
    "$ops/test_pgd_ops.py::test_large_samples_match_reference[(2, 3, 224, 224)-torch.float32-linf-cuda]"
    "$ops/test_pgd_ops.py::test_step_and_projection_match_reference[0.5-(1, 3, 32, 32)-torch.float32-l2-cuda]"
    "$ops/test_pgd_ops.py::test_large_samples_match_reference[(2, 3, 224, 224)-torch.float32-l2-cuda]"
    "$ops/test_pgd_ops.py::test_layouts[torch.float32-l1-cuda]"
    "$ops/test_apgd_step.py::test_values_per_sample[torch.float32-l2-cuda]"
    "$ops/test_apgd_step.py::test_step_matches_reference[(1, 3, 32, 32)-torch.float32-linf-cuda]"
    "$ops/test_model_input.py::test_apgd_step_matches_reference[(12, 3, 5, 7)-torch.float16-linf-cuda]"
    "$ops/test_random_start.py::test_matches_reference[(2, 3, 5, 4)-torch.float32-l2-cuda]"
    "$ops/test_operator_step.py::test_random_geometries[merged-cuda-float32]"
    "$ops/test_judge.py::test_matches_reference[1000-torch.float32-ce-cuda]"
  )
  norms=(--seconds 0.3 --limit 50)
  steps=(--seconds 0.05 --limit 32)
  attack=(--train-seconds 12 --limit 45)
  study=(--seconds 4 --limit 100)
  operators=(--starts 4 --seconds 0.05)
  constrain=(--networks resnet18 --batch 128 --rounds 8 --warm 0 --no-memory)
  step machine 10 nvidia-smi
fi

# install NAME WHEEL: the package into a folder of its own, from that file or else built from source.
install() {
  local from=("$repository" --no-build-isolation)
  if [[ -n $2 ]]; then from=("$2" --no-index --no-compile -q); fi
  step "install_$1" 240 "$python" -m pip install --no-deps --target "$logs/$1" "${from[@]}"
}
if [[ $device == cuda || -n $WHEEL ]]; then
  install new "$WHEEL"
  export PYTHONPATH=$logs/new${PYTHONPATH:+:$PYTHONPATH}
fi
step build_info 60 "$python" -m fastlip

if [[ $part != second ]]; then
  begin tests 90 "${run[@]}" tests native "${at_once[@]}" "${chosen[@]}"
  if [[ $device == cuda ]]; then begin memcheck 90 "${run[@]}" sanitize memcheck; fi
  step bench_gpu_norms 75 "${run[@]}" bench bench_gpu_norms "${norms[@]}"
  step bench_pgd_step 50 "${run[@]}" bench bench_pgd_step "${steps[@]}"
  if [[ -n $OLD_WHEEL ]]; then
    install old "$OLD_WHEEL"
    if [[ $(<install_old.verdict) == passed* ]]; then
      step bench_pgd_step_old 20 env PYTHONPATH="$logs/old:$PYTHONPATH" "${run[@]}" bench bench_pgd_step "${steps[@]}" \
      --only "fastlip pgd_step_" --label old
    fi
  fi
  step bench_gpu_attack 65 "${run[@]}" bench bench_gpu_attack "${attack[@]}"
  step bench_apgd_step 30 "${run[@]}" bench bench_apgd_step "${steps[@]}" --no-compile
fi

if [[ $part != first ]]; then
  step bench_study 125 "${run[@]}" bench bench_study "${study[@]}"
  begin all_tests 100 "${run[@]}" tests native "${at_once[@]}" "${all[@]}"
  if [[ $device == cuda ]]; then begin racecheck 100 "${run[@]}" sanitize racecheck; fi
  begin triton 100 env "${interpreted[@]}" "${run[@]}" tests triton "${triton[@]}"
  step bench_constrain 35 "${run[@]}" bench bench_constrain "${constrain[@]}"
  step bench_operator_step 30 "${run[@]}" bench bench_operator_step "${operators[@]}"
fi

failures=0
table=()
for name in "${names[@]}"; do
  verdict=$(<"$name.verdict")
  counts=$(grep -aE '[0-9]+ (passed|failed|error)|(ERROR|RACECHECK) SUMMARY' "$name.log" 2>/dev/null | tail -n 1 | tr -d '=' || true)
  table+=("$(printf '%-20s %-22s %s' "$name" "$verdict" "$counts")")
  [[ $verdict == passed* ]] && continue
  failures=$((failures + 1))
  printf -- '--- %s %s; the end of its log:\n' "$name" "$verdict"
  grep -aE '^(FAILED|ERROR|E  )|=== ' "$name.log" | tail -n 25 || true
  tail -n 12 "$name.log" || true
done
rm -rf new old functions.sh
tar -czf "$out/logs.tar.gz" ./*
cd "$out"
for log in build_info bench_pgd_step bench_apgd_step bench_gpu_norms bench_gpu_attack bench_study bench_constrain; do
  [[ -f $logs/$log.log ]] || continue
  printf '\n--- %s\n' "$log"
  tail -n 60 "$logs/$log.log"
done
rm -r "$logs"
printf '\n'
printf '%s\n' "${table[@]}"
printf '%s of %s steps failed; %d s; logs in %s\n\n' "$failures" "${#table[@]}" "$SECONDS" "$out/logs.tar.gz"
"$python" "$repository/benchmarks/gpu_summary.py" "$out" --device "$device"
((failures == 0))
