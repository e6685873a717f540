#!/usr/bin/env bash
# launch/slurm.sbatch, as it is, under a real Slurm of two nodes on this machine (slurmctld, two slurmd, munged; all of it in a
# temporary folder, on the loopback). Needs root and Debian's slurm-wlm and munge, which it installs; 77 says why it cannot.
#
#   tests/slurm.sh              five minutes; KEEP=1 leaves the folder; PYTHON=.venv/bin/python
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
skip() { echo "skipped: $1"; exit 77; }
fail() { echo "FAILED: $1" >&2; tail -n 15 "$folder"/slurm*.log "$folder"/jobs/* >&2; exit 1; }

[ "$(id -u)" = 0 ] || skip "only root can start slurmctld and slurmd"
host=$(hostname -s)
getent hosts "$host" >/dev/null || skip "this machine's own name, $host, does not resolve"
[ -x "$python" ] || skip "$python: no such program"
if ! hash slurmctld slurmd munged sbatch 2>/dev/null; then # `hash` fails if one of them is missing
    hash apt-get 2>/dev/null || skip "there is no Slurm here, and no apt-get to install it with"
    install=(env DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends slurm-wlm munge)
    "${install[@]}" >/dev/null 2>&1 || { apt-get update --quiet >/dev/null 2>&1 && "${install[@]}" >/dev/null 2>&1; } ||
        skip "apt-get install slurm-wlm munge does not work here"
fi

folder=$(mktemp -d)
chmod 755 "$folder"
daemons=()
# shellcheck disable=SC2317,SC2329  # called by the trap
end() {
    timeout 5 scancel --full --signal=KILL --user=root 2>/dev/null || true
    kill "${daemons[@]}" 2>/dev/null || true
    wait 2>/dev/null || true
    [ -n "${KEEP:-}" ] || rm -rf "$folder"
}
trap end EXIT
free_ports() {
    "$python" -c 'import socket
s = [socket.socket() for _ in range(3)]
[t.bind(("127.0.0.1", 0)) for t in s]
print(*(t.getsockname()[1] for t in s))'
}
read -r ctld_port port_1 port_2 < <(free_ports)

# -- munge and Slurm -------------------------------------------------------------------------------------------------------
mkdir "$folder"/{munge,state,"spool-$host","spool-${host}x",jobs,run}
head -c 1024 /dev/urandom >"$folder/munge/key"
chmod 600 "$folder/munge/key"
munged --foreground --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
    --seed-file="$folder/munge/seed" --log-file="$folder/munged.log" --num-threads=2 --force >/dev/null 2>&1 &
daemons+=($!)
# Two nodes, both this machine. JAX makes the coordinator's address of the first one's name, which therefore is a real one.
cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
SlurmctldPort=$ctld_port
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
StateSaveLocation=$folder/state
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmdLogFile=$folder/slurmd-%n.log
SlurmdSpoolDir=$folder/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
KillWait=20
InactiveLimit=0
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName=$host NodeAddr=127.0.0.1 Port=$port_1 CPUs=8 RealMemory=1000 Gres=gpu:a100:8
NodeName=${host}x NodeAddr=127.0.0.1 Port=$port_2 CPUs=8 RealMemory=1000 Gres=gpu:a100:8
PartitionName=all Nodes=$host,${host}x Default=YES MaxTime=INFINITE State=UP
CONF
for i in {0..7}; do mknod "$folder/gpu$i" c 1 3 || skip "this machine makes no device files"; done # eight A100, for Slurm; /dev/null
printf '%s\n' AutoDetect=off "Name=gpu Type=a100 File=$folder/gpu[0-7]" >"$folder/gres.conf"
export SLURM_CONF=$folder/slurm.conf
for _ in $(seq 50); do [ -S "$folder/munge/socket" ] && break; sleep 0.1; done
slurmctld -D -f "$SLURM_CONF" >"$folder/slurmctld.out.log" 2>&1 &
daemons+=($!)
for node in "$host" "${host}x"; do
    slurmd -D -N "$node" -f "$SLURM_CONF" >"$folder/slurmd-$node.out.log" 2>&1 &
    daemons+=($!)
done
for _ in $(seq 20); do
    [ "$(timeout 3 sinfo --noheader --format='%D %T' 2>/dev/null)" = "2 idle" ] && break
    sleep 1
done
[ "$(timeout 3 sinfo --noheader --format='%D %T' 2>/dev/null)" = "2 idle" ] || fail "Slurm did not start"
sinfo --version

# -- what a job does -------------------------------------------------------------------------------------------------------
field() { scontrol --oneliner show job "$1" | grep --only-matching --perl-regexp "(?<= $2=)\S+"; }
wait_for() { # JOB FIELD VALUE-PATTERN: up to two minutes
    for _ in $(seq 480); do
        [[ $(field "$1" "$2") =~ ^($3)$ ]] && return
        sleep 0.25
    done
    fail "job $1: $2=$(field "$1" "$2"), not $3"
}
wait_to_end() { # a job that is queued again would wait a minute or two for its turn: begin at once
    for _ in $(seq 960); do
        case $(field "$1" JobState) in
            COMPLETED | FAILED | CANCELLED | TIMEOUT | NODE_FAIL | BOOT_FAIL) return ;;
            PENDING)
                sleep 3 # sooner, the new start can be taken for the one that has just been ended ("Job credential revoked")
                scontrol update "JobId=$1" StartTime=now 2>/dev/null || true
                ;;
        esac
        sleep 0.25
    done
    fail "job $1 did not end: $(field "$1" JobState)"
}
submit() { # NAME [sbatch's options] -- the training's arguments
    local name=$1 options=()
    shift
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    sbatch --parsable --output="$folder/jobs/$name" ${options[@]+"${options[@]}"} launch/slurm.sbatch "$@"
}
expect() { # JOB NAME STATE EXIT-CODE RESTARTS
    wait_to_end "$1"
    local is
    is="$(field "$1" JobState) $(field "$1" ExitCode) $(field "$1" Restarts)"
    [ "$is" = "$3 $4 $5" ] || fail "$2: $is, and should be $3 $4 $5"
    echo "ok: $2: $is"
}
lines() { grep --count -- "$2" "$folder/jobs/$1" 2>/dev/null || true; }

export PYTHON=$python MODULE=stand_in PYTHONPATH=$root/tests/launch

job=$(submit start -- 0 "two words" "--a=\$b")
expect "$job" start COMPLETED 0:0 0
"$python" - "$folder/jobs/start" "$host" <<'CHECK' || fail "what the processes were given"
import json, sys
given = sorted((json.loads(line) for line in open(sys.argv[1]) if line.startswith("{")), key=lambda g: g["rank"])
assert [g["rank"] for g in given] == [0, 1], given
for g in given:
    assert g["words"] == ["two words", "--a=$b"], g["words"]
    e = g["env"]
    assert e["SLURM_NTASKS"] == e["SLURM_STEP_NUM_NODES"] == "2" and e["SLURM_LOCALID"] == "0", e
    assert e["SLURM_STEP_NODELIST"].startswith(sys.argv[2]), e["SLURM_STEP_NODELIST"]
assert [g["env"]["SLURMD_NODENAME"] for g in given] == [sys.argv[2], sys.argv[2] + "x"]
CHECK

expect "$(submit mistake -- 2/0)" mistake FAILED 2:0 0
expect "$(submit bug -- 1/0)" bug FAILED 1:0 0
expect "$(submit peer-died -- late,kill/0)" peer-died COMPLETED 0:0 1
[ "$(lines peer-died '"late"')" = 1 ] || fail "peer-died: the other process should have been left to end by itself"
expect "$(submit late -- 75/75/0)" late COMPLETED 0:0 2
expect "$(MAX_RESTARTS=1 submit give-up -- 75)" give-up FAILED 75:0 1

job=$(submit stop -- wait/0)
for _ in $(seq 240); do [ "$(lines stop '"words"')" = 2 ] && break; sleep 0.25; done
scancel --signal=TERM "$job"
expect "$job" stop COMPLETED 0:0 1
[ "$(lines stop '"signals": \[15\]')" = 2 ] || fail "stop: each process should have had one SIGTERM"

job=$(submit for-good -- wait/0)
for _ in $(seq 240); do [ "$(lines for-good '"words"')" = 2 ] && break; sleep 0.25; done
scancel --signal=INT "$job"
expect "$job" for-good FAILED 130:0 0
[ "$(lines for-good '"signals": \[2\]')" = 2 ] || fail "for-good: each process should have had one SIGINT"

# its time is as long as the script's own --signal=TERM@300 is early: the signal comes at once
job=$(submit time-limit --time=5 -- wait/0)
expect "$job" time-limit COMPLETED 0:0 1
[ "$(lines time-limit '"signals": \[15\]')" = 2 ] || fail "time-limit: each process should have had one SIGTERM"

# -- devices ---------------------------------------------------------------------------------------------------------------
# Two nodes with eight GPUs each, whose device files are empty files: which of the 16 do the processes take?
devices() { # NAME PROCESSES [sbatch's options]
    local name=$1 processes=$2
    shift 2
    expect "$(MODULE=devices submit "$name" "$@" --)" "$name" COMPLETED 0:0 0
    "$python" - "$folder/jobs/$name" "$processes" <<'SIXTEEN' || fail "$name: not 16 devices"
import json, sys

lines = [json.loads(line) for line in open(sys.argv[1]) if line.startswith("{")]
taken = [(line["node"], gpu) for line in lines for gpu in line["takes"]]
assert len(lines) == int(sys.argv[2]) and len(taken) == len(set(taken)) == 16, lines
assert {line["promised"] for line in lines} == {8}, lines
print(f"ok: {len(taken)} devices in {len(lines)} processes; JAX alone takes {len({(x['node'], g) for x in lines for g in x['alone']})}")
SIXTEEN
}
devices node 2
devices gpu 16 --ntasks-per-node=8
devices half 4 --ntasks-per-node=2
devices bound 16 --ntasks-per-node=8 --gpu-bind=single:1
devices mapped 16 --ntasks-per-node=8 --gpu-bind=map_gpu:7,6,5,4,3,2,1,0
# Slurm 22.05 gives this step no GPU, since the script asks for GPUs a node as well
expect "$(MODULE=devices submit per-task --ntasks-per-node=8 --gpus-per-task=a100:1 --)" per-task FAILED 2:0 0
[ "$(lines per-task 'Slurm gave this host 8 GPUs, and its 8 processes see 0; .*--gpu-bind=single:1')" = 16 ] || fail "per-task: not refused"

# -- a run ------------------------------------------------------------------------------------------------------------------
# A small model on two nodes with two (virtual) devices each: told to stop and queued again, and with a process killed.
# Either way every step is there once, with the batch and, to rounding, the loss of one process that was left alone.
export MODULE=tinyllama_jax.train PYTHONPATH=$root:$root/tests JAX_PLATFORMS=cpu
"$python" -c 'import sys, pathlib, tiny; tiny.make_tiny_data(pathlib.Path(sys.argv[1]))' "$folder"
arguments=(--config "$folder/tiny.py" --train.steps=200 --train.seqs_per_device=2 --mesh.data=2 --mesh.fsdp=2 --train.wait=20)
XLA_FLAGS=--xla_force_host_platform_device_count=4 "$python" -m "$MODULE" "${arguments[@]}" --workdir="$folder/run/one" \
    >"$folder/jobs/one" 2>&1 || fail "one process alone"
export XLA_FLAGS=--xla_force_host_platform_device_count=2
expect "$(MODULE=tinyllama_jax.plan submit preflight -- --here "${arguments[@]}" --workdir="$folder/run/preflight")" preflight COMPLETED 0:0 0
[ "$(lines preflight 'ok    devices: 4 x cpu .* in 2 processes (expected: 4 by --mesh)')" = 1 ] || fail "preflight: did not report once"
trains() { # JOB RUN: returns when it has trained 20 steps, and not yet all
    for _ in $(seq 480); do
        [ "$(cat "$folder/run/$2/metrics.jsonl" 2>/dev/null | wc -l)" -ge 20 ] && return
        sleep 0.25
    done
    fail "$2 does not train"
}
same_as_one() {
    "$python" - "$folder/run/one" "$folder/run/$1" <<'SAME' || fail "$1: not what one process gives"
import json, math, sys
from pathlib import Path

one, two = ([json.loads(line) for line in (Path(run) / "metrics.jsonl").open()] for run in sys.argv[1:])
one, two = ([line for line in lines if "loss" in line] for lines in (one, two))
assert [line["step"] for line in two] == list(range(1, 201)), [line["step"] for line in two]
assert [line["checksum"] for line in one] == [line["checksum"] for line in two]
for a, b in zip(one, two, strict=True):
    assert math.isclose(a["loss"], b["loss"], rel_tol=1e-3), (a["step"], a["loss"], b["loss"])
SAME
    echo "ok: $1: 200 steps, each once, with the batches and losses of one process"
}

job=$(submit stopped -- "${arguments[@]}" --workdir="$folder/run/stopped")
trains "$job" stopped
scancel --signal=TERM "$job"
expect "$job" stopped COMPLETED 0:0 1
[ "$(lines stopped 'stopped by SIGTERM after step')" = 1 ] || fail "stopped: did not save and say so"
same_as_one stopped

job=$(submit killed -- "${arguments[@]}" --workdir="$folder/run/killed")
trains "$job" killed
for pid in $(pgrep --full "workdir=$folder/run/killed"); do
    tr '\0' '\n' <"/proc/$pid/environ" | grep --quiet '^SLURM_PROCID=1$' && kill -s KILL "$pid"
done
expect "$job" killed COMPLETED 0:0 1
same_as_one killed
