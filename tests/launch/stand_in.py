"""Stands in for `tinyllama_jax.train` where only starting, signals and exit codes are asked for: `-m stand_in PLAN WORDS`.

PLAN says what the processes do, one part a process (the last holds for the rest) and `/` between the starts of a job that
queues again: `0,75/0` is "process 0 ends with 0 and process 1 with 75; started again, all end with 0". A part is an exit code,
`kill` (dies of SIGKILL), `wait` (until SIGTERM: 143, or SIGINT: 130) or `late` (75, after six seconds). What a process was
given is printed as a line of JSON.
"""

import json
import os
import signal
import sys
import time

SLURM = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURMD_NODENAME", "SLURM_JOB_GPUS")

rank = int(os.environ.get("JAX_PROCESS_ID") or os.environ["SLURM_PROCID"])
start = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
got: list[int] = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: got.append(number))
given = {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_", "SLURM_STEP_N")) or k in SLURM}
# one write: lines of several processes do not mix; srun breaks those of more than 1,024 bytes
os.write(1, (json.dumps({"rank": rank, "start": start, "words": sys.argv[2:], "env": given}) + "\n").encode())

starts = sys.argv[1].split("/")
parts = starts[min(start, len(starts) - 1)].split(",")
part = parts[min(rank, len(parts) - 1)]
if part == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if part == "wait":
    ends = time.monotonic() + 300
    while not got and time.monotonic() < ends:
        time.sleep(0.05)
    time.sleep(1 + rank)  # saving; a second signal within it would be seen
    os.write(1, (json.dumps({"rank": rank, "start": start, "signals": got}) + "\n").encode())
    sys.exit(128 + got[0] if got else 99)
if part == "late":
    time.sleep(6)
    os.write(1, (json.dumps({"rank": rank, "start": start, "late": True}) + "\n").encode())
    sys.exit(75)
sys.exit(int(part))
