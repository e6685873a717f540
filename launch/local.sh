#!/usr/bin/env bash
# N processes of one run on this machine, as on N hosts: to try and to test a run on many hosts.
#
#   launch/local.sh 2 -- --config configs/demo.py --workdir=runs/two
#   XLA_FLAGS=--xla_force_host_platform_device_count=4 launch/local.sh 2 -- --config configs/demo.py    (2 x 4 devices)
#
# Not for speed: one process can drive all the GPUs of a machine.
# Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 go to every process once: they save and end. A second Ctrl-C or SIGTERM ends them
# at once. The processes listen on the loopback only.
# When one has failed, the others have GRACE seconds (30) to end and are then killed. The exit code is that of the first
# that failed. The command is PYTHON (.venv/bin/python) -m MODULE (tinyllama_jax.train).
set -uo pipefail

if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]] || [ "${2:-}" != -- ]; then
    echo "usage: $0 N -- --config FILE --section.key=value ...    (N processes)" >&2
    exit 2
fi
n=$1
shift 2
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || { echo "error: PYTHON=$python: no such program; run from the project's folder after make demo" >&2; exit 2; }

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$n

# Each in its own process group: the terminal's Ctrl-C then reaches this script alone, which passes it on, once.
set -m
pids=()
passed= # the signal that was passed on
# shellcheck disable=SC2317,SC2329  # called by the traps
pass_on() {
    passed=$1
    kill -s "$1" "${pids[@]}" 2>/dev/null
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM
trap 'pass_on HUP' HUP
trap 'pass_on USR1' USR1
trap 'pass_on USR2' USR2
for ((i = 0; i < n; i++)); do
    JAX_PROCESS_ID=$i "$python" -m "${MODULE:-tinyllama_jax.train}" "$@" </dev/null &
    pids+=($!)
done

first=0 # exit code of the first that failed
failed_at=0
while [ ${#pids[@]} -gt 0 ]; do
    sleep 0.2
    running=()
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            running+=("$pid")
        else
            wait "$pid"
            code=$?
            if [ $code -ne 0 ] && [ $first -eq 0 ]; then
                first=$code
                failed_at=$SECONDS
            fi
        fi
    done
    pids=(${running[@]+"${running[@]}"})
    # after a signal they are saving, however long it takes
    if [ $first -ne 0 ] && [ -z "$passed" ] && [ $((SECONDS - failed_at)) -ge "${GRACE:-30}" ] && [ ${#pids[@]} -gt 0 ]; then
        echo "$0: a process ended with $first, and ${#pids[@]} others did not end within ${GRACE:-30} s: killing them" >&2
        kill -s KILL "${pids[@]}"
    fi
done
exit $first
