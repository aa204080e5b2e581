# Sourced by the scripts of this folder, under `set -e`, in the checkout's root.

# The base interpreter (not a venv's) of $PYTHON, or of the first Python 3.10 or newer.
find_python() {
    local candidates=(python3 python3.13 python3.12 python3.11 python3.10) candidate
    if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c '
import os, sys
if sys.version_info < (3, 10):
    sys.exit(1)
print(os.path.realpath(sys._base_executable))' 2>/dev/null; then
            return
        fi
    done
    echo "dskd needs Python 3.10 or newer; none found among: ${candidates[*]} (set PYTHON)" >&2
    return 1
}

# Whether .venv is whole, made here from these files (by $PYTHON, if set), and has the extra $1.
installed() {
    local key base extra
    { read -r key && read -r base && read -r extra; } 2>/dev/null <.venv/installed || return 1
    [ "$key" = "$(install_key)" ] && .venv/bin/python -c '' 2>/dev/null || return 1
    if [ -n "${PYTHON:-}" ] && [ "$base" != "$(find_python)" ]; then return 1; fi
    [ "$extra" = test ] || [ "$extra" = "$1" ]
}

install_key() {
    { pwd -P && cat setup.py launch/constraints.txt; } | cksum | tr ' ' -
}

# Make .venv with the tested pins; `ensure_venv test` adds what the tests need. A second call does
# nothing. .venv/installed is empty until all is there: an interrupted installation is made anew.
ensure_venv() {
    local extra=${1:-none} python
    if installed "$extra"; then return; fi
    exec 9<launch/constraints.txt
    if command -v flock >/dev/null; then flock 9; fi # one installation at a time
    if ! installed "$extra"; then
        python=$(find_python)
        if installed none; then
            echo "dskd: adding the packages of the tests to .venv"
        else
            empty_venv "$python"
        fi
        : >.venv/installed
        .venv/bin/python -m pip install --disable-pip-version-check --root-user-action=ignore \
            -c launch/constraints.txt -e ".$([ "$extra" = none ] || echo "[$extra]")"
        printf '%s\n' "$(install_key)" "$python" "$extra" >.venv/installed
    fi
    exec 9<&-
}

empty_venv() {
    if [ ! -f .venv/installed ] && [ -n "$(ls -A .venv 2>/dev/null)" ]; then
        echo "dskd: .venv was not made by this script; move it away first" >&2
        return 1
    fi
    echo "dskd: making .venv with $1 (2-3 minutes and the downloads)"
    mkdir -p .venv
    : >.venv/installed
    find .venv -mindepth 1 -maxdepth 1 ! -name installed -exec rm -rf {} +
    "$1" -m venv .venv || {
        echo "dskd: '$1 -m venv' failed (on Debian: apt install python3-venv)" >&2
        return 1
    }
}

# The environment of every process: .venv first, the CPU where there is no GPU. Sets RANKS (the
# largest power of two of GPUs up to 8; 2 on a CPU) and PORT (a free one).
prepare() {
    local gpus cores
    export PATH="$PWD/.venv/bin:$PATH"
    read -r gpus PORT < <(python -c '
import socket
import torch
with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    print(torch.cuda.device_count(), listener.getsockname()[1])')
    RANKS=2
    if [ "$gpus" -eq 0 ]; then
        export DS_ACCELERATOR=cpu
    else
        RANKS=1
        while [ $((RANKS * 2)) -le "$gpus" ] && [ "$RANKS" -lt 8 ]; do RANKS=$((RANKS * 2)); done
    fi
    cores=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > RANKS ? cores / RANKS : 1))}
}

# Run a recipe on this machine: run_recipe FILE [a.b=value ...]; the status is that of the run, 75
# if a signal stopped it after a checkpoint.
run_recipe() {
    local status=0 child stopped signalled=0
    local where=(--num_gpus "$RANKS")
    # The launcher takes the GPUs named by the user only when it is told no number.
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ] && [ "${DS_ACCELERATOR:-}" != cpu ]; then where=(); fi
    deepspeed ${where[@]+"${where[@]}"} --master_port "$PORT" dskd/train.py "$@" &
    child=$!
    trap 'stopped=1 signalled=143; stop_ranks "$child"' TERM INT
    while stopped=0; do # a trapped signal ends `wait` early
        status=0
        wait "$child" || status=$?
        [ "$stopped" = 1 ] || break
    done
    trap - TERM INT
    # The launcher says 0 when it is ended before there are ranks.
    if [ "$status" = 0 ]; then status=$signalled; fi
    return "$status"
}

# Ask the ranks below the launcher $1 to save and leave. The launcher itself would die of the signal
# and leave them running; before there are ranks, what is there is ended.
stop_ranks() {
    python - "$1" <<'END'
import sys
import psutil
try:
    generation = [psutil.Process(int(sys.argv[1]))]
    for _ in ("launch.py", "ranks"):
        generation = [c for p in generation for c in p.children()] or generation
    for process in generation:
        process.terminate()
except psutil.NoSuchProcess:
    pass
END
}
