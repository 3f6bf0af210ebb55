#!/usr/bin/env bash
# Everything that has to be tried and measured on a GPU, in the order that answers most first. Nothing is installed: the
# packages are used from this checkout, with the torch, triton and transformers that PYTHON (default python3) has.
#
#   benchmarks/gpu_run.sh                     every phase that is not done yet
#   benchmarks/gpu_run.sh ceilings suite      these phases
#   benchmarks/gpu_run.sh --dry-run           what each would run, and whether its program starts; needs no GPU
#
# Results go to $OUT (default benchmarks/results/gpu), with one log per phase. A phase that has passed leaves a file
# PHASE.done there and is not run again; remove it to repeat the phase. Each has LIMIT seconds (default 530). Tests run in
# JOBS processes (default: one less than there are cores).
# Exit status: 0 all passed or skipped with a reason, 1 a phase failed, 2 bad use.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results/gpu}
LIMIT=${LIMIT:-530}
JOBS=${JOBS:-$(($(nproc) > 3 ? $(nproc) - 1 : 1))}
PHASES=(ceilings tests golden targets sanitizer suite models graphs training waterfall tune ncu demo parity)
DRY=

SKIPPED=77 # a phase's status when something it needs is not there: no failure, and not done either

skip() { printf 'skipped: %s\n' "$*"; return "$SKIPPED"; }

# Run a program, or in a dry run say so and try its --help. "python -m NAME" comes as: program NAME ARGUMENTS.
program() {
    local module=$1
    shift
    printf '+ %s -m %s %s\n' "$PYTHON" "$module" "$*"
    if [[ -z $DRY ]]; then "$PYTHON" -m "$module" "$@"; else "$PYTHON" -m "$module" --help >/dev/null; fi
}

# Run a tool of the CUDA toolkit on each_kernel.
tool() {
    local name=$1
    shift
    program benchmarks.each_kernel --help >/dev/null || return 1
    printf '+ %s %s\n' "$name" "$*"
    command -v "$name" >/dev/null || { skip "$name is not on PATH (it comes with the CUDA toolkit)"; return; }
    [[ -n $DRY ]] || "$name" "$@"
}

phase_ceilings() { # measured limits: copy, matrix products, addmm with beta = 1 and K = 128
    program benchmarks.ceilings --device cuda --output "$OUT/ceilings.jsonl"
}

# pytest in JOBS processes, each with its share of the tests (tests/conftest.py): most of their time goes into compiling,
# one kernel after another. Needs no pytest-xdist. Status 5 of a process: its share was empty.
shared_out() {
    local number code status=0 processes=()
    [[ -z $DRY ]] || { program pytest "$@"; return; }
    for ((number = 0; number < JOBS; number++)); do
        ROUTINGVL_TEST_SHARD=$number/$JOBS program pytest "$@" >"$OUT/share$number.txt" 2>&1 &
        processes+=($!)
    done
    for number in "${!processes[@]}"; do
        code=0
        wait "${processes[number]}" || code=$?
        cat "$OUT/share$number.txt" && rm "$OUT/share$number.txt"
        ((code == 0 || code == 5)) || status=$code
    done
    return "$status"
}

phase_tests() { # the tests marked gpu; alone those that take much of the GPU's memory
    local status=0
    export TORCHINDUCTOR_COMPILE_THREADS=1
    shared_out -m gpu -q -p no:cacheprovider tests/kernels tests/bottlenecks/test_triton_suite.py \
        tests/benchmarks/test_cuda_graphs.py -k "not golden and not addresses" || status=$?
    program pytest -m gpu -q -p no:cacheprovider tests/kernels/test_gpu.py -k addresses || status=$?
    return "$status"
}

phase_golden() { # the published code's numbers in fp32, tf32, bf16 and fp16
    shared_out -m gpu -q -p no:cacheprovider tests/kernels/test_gpu.py tests/kernels/test_triton_golden.py -k golden
}

phase_targets() { # the targets of benchmarks/NOTES.md: summed kernels, graphs, wall and host time of every side
    program benchmarks.targets --time-limit $((LIMIT - 60)) --output "$OUT/targets.jsonl"
}

phase_sanitizer() { # memcheck and racecheck over one run of every kernel
    local status=0
    for check in memcheck racecheck; do
        tool compute-sanitizer --tool "$check" --error-exitcode 9 "$PYTHON" -m benchmarks.each_kernel || status=$?
    done
    return "$status"
}

phase_suite() { # ops and layers at the paper's shapes: published chain, eager and compiled, PEFT, both backends
    program benchmarks.run --suite gpu --levels op,layer --time-limit $((LIMIT - 80)) --resume \
        --output "$OUT/suite.jsonl"
}

phase_models() { # steps, generation and training of whole models
    program benchmarks.run --suite gpu --levels step,generate,train --time-limit $((LIMIT - 80)) \
        --resume --output "$OUT/models.jsonl"
}

phase_graphs() { # layers and steps replayed from CUDA graphs, beside the same by wall time; then with dropout
    local dropout status=0
    for dropout in 0 0.1; do
        program benchmarks.run --suite gpu --case roberta_lora_m10240 --case linear_lora_m2040 --case gpt2_lora_m2040 \
            --case gpt2_lora_decode_m40 --case gpt2_step_b8 --routing mul --routing vllora --dtype bfloat16 \
            --dropout "$dropout" --clock wall --provider compile --provider closed --provider eager --provider triton \
            --cuda-graphs --time-limit $(((LIMIT - 80) / 2)) --resume --output "$OUT/graphs.jsonl" || status=$?
    done
    return "$status"
}

phase_training() { # steps and training throughput of both recipes
    local size dtype status=0
    for size in base large; do
        for dtype in float32 bfloat16; do # of the published step; ours runs in both
            program benchmarks.training_speed --device cuda --size "$size" --published-dtype "$dtype" \
                --output "$OUT/training.jsonl" || status=$?
        done
    done
    return "$status"
}

phase_waterfall() { # what each technique takes off the published step's memory and time
    program benchmarks.waterfall --device cuda --rounds 20 --output "$OUT/waterfall.jsonl"
}

phase_tune() { # sweep of tile configurations
    program benchmarks.tune --output "$OUT/tiles.json"
}

phase_ncu() { # the two kernels that take most of the time, at the paper's size
    tool ncu --set full --clock-control none --force-overwrite --export "$OUT/hottest" \
        --kernel-name "regex:lora_forward_kernel|lora_backward_kernel" \
        "$PYTHON" -m benchmarks.each_kernel --sizes paper --dtype bfloat16 --only lora-mul
}

phase_demo() { # the demonstration on the CPU, then its runs on the GPU: compare the two metrics
    local runs=$OUT/demo/runs name
    "$PYTHON" -c 'import yaml, tokenizers, accelerate' || { skip "a package of the above is missing"; return; }
    CUDA_VISIBLE_DEVICES='' program routingvl demo --quick --workers 8 --output "$OUT/demo" || return 1
    [[ -z $DRY ]] || { program routingvl train && program routingvl evaluate; return; }
    for config in "$runs"/*/config.yaml; do
        name=$(basename "$(dirname "$config")")
        program routingvl train --config "$config" --device auto --output_dir "$OUT/demo/gpu/$name" --overwrite &&
            program routingvl evaluate "$OUT/demo/gpu/$name" --split test || return 1
    done
}

phase_parity() { # 200 steps of the demo's two tasks with our layers and with the published chain, curves overlaid
    local runs=$OUT/demo/runs rows=$OUT/convergence.jsonl status=0
    [[ -n $DRY || -d $runs ]] || { skip "the phase demo makes its data; run that first"; return; }
    program benchmarks.convergence "$runs/vqa-lora-mul-seed0" --device cuda --output "$rows" || status=$?
    program benchmarks.convergence "$runs/caption-adapter-mul-seed0" --lr 0.02 --device cuda --output "$rows" || status=$?
    ! "$PYTHON" -c 'import matplotlib' 2>/dev/null ||
        program benchmarks.convergence --read "$rows" --plot "$OUT/convergence.png" || status=$?
    return "$status"
}

run_phase() {
    local name=$1 status=0
    printf '=== %s\n' "$name"
    if [[ -n $DRY ]]; then
        "phase_$name" || status=$?
        ((status == 0 || status == SKIPPED)) || printf '%s FAILED (%d)\n' "$name" "$status"
        return "$status"
    fi
    [[ ! -e $OUT/$name.done ]] || { printf 'done before\n'; return 0; }
    # A shell of its own, because timeout takes programs and not functions.
    timeout --kill-after=10 "$LIMIT" "$BASH" "${BASH_SOURCE[0]}" --inside "$name" 2>&1 | tail -c 15000000 >"$OUT/$name.log"
    status=${PIPESTATUS[0]}
    tail -n 15 "$OUT/$name.log"
    if ((status == 0)); then date -u +%FT%TZ >"$OUT/$name.done"; fi
    if ((status != 0 && status != SKIPPED)); then printf '%s FAILED (%d)\n' "$name" "$status"; fi
    return "$status"
}

if [[ ${1-} == --inside ]]; then "phase_$2"; exit; fi
if [[ ${1-} == --dry-run ]]; then DRY=1 OUT=$(mktemp -d); trap 'rm -rf "$OUT"' EXIT; shift; fi
export OUT PYTHON LIMIT
(($#)) || set -- "${PHASES[@]}"
for name in "$@"; do
    [[ " ${PHASES[*]} " == *" $name "* ]] || { echo "unknown phase $name; there are: ${PHASES[*]}" >&2; exit 2; }
done
if [[ -z $DRY ]]; then
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        { echo "no CUDA device for $PYTHON; --dry-run needs none" >&2; exit 2; }
    mkdir -p "$OUT"
fi
failed=0
for name in "$@"; do
    run_phase "$name" || (($? == SKIPPED)) || failed=1
done
exit "$failed"
