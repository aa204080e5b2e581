#!/usr/bin/env bash
# The kernels on a GPU: their tests, then their benchmark, within 8 minutes.
#
#     bash launch/bench/gpu_check.sh            # on a machine with a CUDA device
#     bash launch/bench/gpu_check.sh --small    # the same path on a CPU, in Triton's interpreter
#
# Needs torch, triton and numpy, and pytest for the tests; Liger and TRL are measured if they can be
# imported. No network. Results go to launch/bench/results/ (of --small to runs/gpu_check_small/)
# and, if OUT is set, there as well. The status is not 0 if a test fails, without pytest, if a
# measured result is wrong or if time cuts the benchmark off, which leaves the results of the cases
# before. The benchmark runs in any case; it judges no operation whose tests are red or did not run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

limit=440       # seconds for all of it; no case begins later
last=30         # more for the case that runs then
test_limit=210  # of them for the tests
python=${PYTHON:-python3}
results=launch/bench/results
records=runs/gpu_check
words=()
export DS_ACCELERATOR=cuda
if [[ ${1:-} == --small ]]; then
    limit=1500 test_limit=900  # the interpreter is slow
    results=runs/gpu_check_small
    records=$results
    words=(--small --rounds 2)
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

check() {
    local tests bench
    run_tests
    tests=$?
    # 0: green, 1: some are red; anything else did not come to its end, and nothing is green
    ((tests <= 1)) || rm -f "$report"
    echo "tests: status $tests after $SECONDS s"
    timeout -k 10 $((limit + last - SECONDS)) "$python" -u launch/bench/kernels.py --device cuda \
        --results "$results" --tests "$report" --seconds $((limit - SECONDS)) "${words[@]}"
    bench=$?
    # 124: ended by timeout; 137: and did not heed it
    ((bench != 124 && bench != 137)) || echo "cut off by time: the finished cases are in $results"
    echo "benchmark: status $bench after $SECONDS s"
    return $((tests != 0 || bench != 0))
}

check 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
if [[ -n ${OUT:-} ]]; then
    find "$results" "$records" -type f -newer "$start" -exec cp {} "$OUT"/ \;
fi
exit "$status"
