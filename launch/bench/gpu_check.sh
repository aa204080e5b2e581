#!/usr/bin/env bash
# What a GPU shows of this project, within 8 minutes: first whether it is right there (the tests of
# the kernels, then steps of every method against the CPU's losses, 3 minutes together), then the
# benchmark of the kernels. Each part has its own time; what is done when it is over is written.
#
#     bash launch/bench/gpu_check.sh            # on a machine with a CUDA device
#     bash launch/bench/gpu_check.sh --small    # the same path on a CPU, in Triton's interpreter
#
# Needs torch, triton and numpy, pytest for the tests, and deepspeed, transformers and datasets for
# the steps; Liger and TRL are measured if they can be imported. It installs nothing, and names the
# parts that it leaves out. No network. Results go to launch/bench/results/ (of --small to
# runs/gpu_check_small/) and, if OUT is set, there as well. The status is not 0 if a part is wrong,
# left out or cut off. The benchmark runs in any case; it judges no operation whose tests are red or
# did not run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

limit=440       # seconds for all of it; no case begins later
last=30         # more for the case that runs then
test_limit=105  # of them for the tests
step_limit=75   # of them for the steps
python=${PYTHON:-python3}
results=launch/bench/results
records=runs/gpu_check
words=() steps=()
export DS_ACCELERATOR=cuda
if [[ ${1:-} == --small ]]; then
    limit=2400 test_limit=900 step_limit=900  # the interpreter is slow
    results=runs/gpu_check_small
    records=$results
    words=(--small --rounds 2) steps=(--device cpu)
    # a GPU, if there is one, stays out of it: its tensors are not for interpreted kernels
    export DS_ACCELERATOR=cpu TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
elif [[ $# -gt 0 ]]; then
    echo "usage: $0 [--small]" >&2
    exit 2
fi
mkdir -p "$results" "$records"
start=$records/start
log=$records/gpu_check.log
report=$records/gpu_check_tests.xml
rm -f "$report"
touch "$start"

# Test files that cannot be imported for want of what a bare machine lacks, each with its name. A
# module of ours that is missing is a defect, which the tests are left to show.
not_importable() {
    local files
    mapfile -t files < <(find tests/kernels tests/fused -name 'test_*.py' | sort)
    "$python" - "${files[@]}" <<'END'
import importlib, sys
sys.path.insert(0, ".")
for file in sys.argv[1:]:
    try:
        importlib.import_module(file.removesuffix(".py").replace("/", "."))
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] not in {"dskd", "kernels", "launch", "tests"}:
            print(file, error.name)
END
}

run_tests() {
    # test_aot.py compiles for other devices than this one, and needs none
    local options=(--ignore=tests/kernels/test_aot.py) file module
    if ! "$python" -c "import pytest"; then
        echo "the tests do not run: there is no pytest"
        return 127
    fi
    while read -r file module; do
        echo "not run here: $file (there is no $module)"
        options+=("--ignore=$file")
    done < <(not_importable)
    if "$python" -c "import xdist" 2>/dev/null; then  # compile beside one another
        options+=(-n "$([[ $DS_ACCELERATOR == cuda ]] && echo 8 || echo 2)")
    fi
    timeout -s INT -k 20 "$test_limit" "$python" -m pytest tests/kernels tests/fused \
        -p no:cacheprovider --junitxml="$report" "${options[@]}"
}

run_steps() {
    local module
    for module in deepspeed transformers datasets; do
        if ! "$python" -c "import $module" 2>/dev/null; then
            echo "the steps do not run: there is no $module"
            return 127
        fi
    done
    # it ends by itself; its runs would be left behind by a killed one
    timeout -k 10 $((step_limit + last)) "$python" -u launch/bench/gpu_steps.py \
        --seconds "$step_limit" --results "$results" "${steps[@]}"
}

check() {
    local tests trained bench
    run_tests
    tests=$?
    # 0: green, 1: some are red; anything else did not come to its end, and nothing is green
    ((tests <= 1)) || rm -f "$report"
    echo "tests: status $tests after $SECONDS s"
    run_steps
    trained=$?
    echo "steps: status $trained after $SECONDS s"
    timeout -k 10 $((limit + last - SECONDS)) "$python" -u launch/bench/kernels.py --device cuda \
        --results "$results" --tests "$report" --seconds $((limit - SECONDS)) "${words[@]}"
    bench=$?
    # 124: ended by timeout; 137: and did not heed it
    ((bench != 124 && bench != 137)) || echo "cut off by time: the finished cases are in $results"
    echo "benchmark: status $bench after $SECONDS s"
    return $((tests != 0 || trained != 0 || bench != 0))
}

check 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
if [[ -n ${OUT:-} ]]; then
    find "$results" "$records" -type f -newer "$start" -exec cp {} "$OUT"/ \;
fi
exit "$status"
