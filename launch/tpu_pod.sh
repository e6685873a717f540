#!/usr/bin/env bash
# A run on a Cloud TPU slice, spot by default. From the project's folder, with gcloud logged in and its project set:
#
#   export TPU=tinyllama ZONE=us-central2-b TYPE=v4-32 RUNTIME=tpu-ubuntu2204-base SHARED=10.0.0.2:/share
#   launch/tpu_pod.sh create                    ask for the slice and wait until there is one, then set up every host of it
#   launch/tpu_pod.sh setup                     the latter alone: after a new commit, or after the hosts have started anew
#   launch/tpu_pod.sh run --config configs/3t.py --workdir=/shared/runs/3t --data.sources=/shared/data/a:0.7,/shared/data/b:0.3
#   launch/tpu_pod.sh log                       what host 0 prints; Ctrl-C leaves the run alone
#   launch/tpu_pod.sh stop                      save and end, on all hosts; `run` with the same arguments resumes
#   launch/tpu_pod.sh delete                    release the slice, so that it costs nothing any more
#
# SHARED is an NFS share (Filestore, say) that every host mounts as /shared: the run folder and the data are there. A spot slice
# that was preempted stays SUSPENDED: delete, create, and the same run again.
# SPOT= (empty) asks for on-demand capacity. MODULE (tinyllama_jax.train) is the module that runs.
set -euo pipefail

usage() { grep '^#   ' "$0" >&2; exit 2; }
[ $# -ge 1 ] || usage
command=$1
shift
: "${TPU:?names the slice}" "${ZONE:?says where, such as us-central2-b}"
on_all() { gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"; }
unit=tinyllama # the systemd unit of the run, on every host

case $command in
create)
    : "${TYPE:?says which slice, such as v4-32}" "${RUNTIME:?says which image, such as tpu-ubuntu2204-base}"
    : "${SHARED:?says which NFS share holds the data and the run folder, such as 10.0.0.2:/share}"
    spot=(--spot)
    [ -n "${SPOT-spot}" ] || spot=()
    # Without --async it returns when the request is accepted, which is not when there is a slice: that can take minutes or days.
    gcloud compute tpus queued-resources create "$TPU" --zone="$ZONE" --node-id="$TPU" \
        --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${spot[@]+"${spot[@]}"}
    while :; do
        state=$(gcloud compute tpus queued-resources describe "$TPU" --zone="$ZONE" --format='value(state.state)')
        echo "$TPU: $state"
        case $state in
        ACTIVE) break ;;
        FAILED | SUSPENDING | SUSPENDED) echo "no slice: launch/tpu_pod.sh delete, and create again" >&2; exit 75 ;;
        esac
        sleep "${POLL:-30}"
    done
    ;& # goes on with setup
setup)
    : "${SHARED:?says which NFS share holds the data and the run folder, such as 10.0.0.2:/share}"
    # Only what is committed, so that a commit identifies the code of a run.
    code=$(mktemp -d)
    trap 'rm -rf "$code"' EXIT
    git archive --format=tar.gz --output="$code/tinyllama.tar.gz" HEAD
    gcloud compute tpus tpu-vm scp "$code/tinyllama.tar.gz" "$TPU:" --zone="$ZONE" --worker=all
    # The images' own Python is older than 3.11.
    on_all "set -e
        sudo mkdir -p /shared
        mountpoint -q /shared || { sudo apt-get install -y -q nfs-common && sudo mount -t nfs $(printf %q "$SHARED") /shared; }
        mkdir -p tinyllama && tar xzf tinyllama.tar.gz -C tinyllama && cd tinyllama
        python3 -m pip install -q --user uv
        python3 -m uv venv -q --allow-existing --python 3.12 .venv
        python3 -m uv pip install -q --python .venv/bin/python -r requirements.txt 'jax[tpu]>=0.10.2,<0.13'"
    ;;
run)
    # One axis: within a slice every chip reaches every other one over ICI, and fsdp alone needs the least memory.
    # systemd, and not ssh, is the parent: a connection that breaks ends nothing; when the host is taken away or maintained, the
    # processes get a SIGTERM and save. It starts them again, but not after a bug (1), a mistake (2),
    # a loss that jumped (3), or `stop`.
    # TINYLLAMA_JAX_JOIN: on a slice only JAX knows how to find the other hosts.
    # The limits are those of a login, which a service does not have: libtpu locks memory.
    words=$(printf ' %q' -m "${MODULE:-tinyllama_jax.train}" --mesh.data=1 --mesh.fsdp=-1 "$@")
    on_all "sudo systemd-run --unit=$unit --collect --uid=\$(id -u) --working-directory=\$HOME/tinyllama \
--setenv=PYTHONUNBUFFERED=1 --setenv=TINYLLAMA_JAX_JOIN=1 --property=Restart=on-failure --property=RestartPreventExitStatus='1 2 3' --property=RestartSec=30 \
--property=TimeoutStopSec=300 --property=LimitMEMLOCK=infinity --property=LimitNOFILE=1048576 \$HOME/tinyllama/.venv/bin/python$words"
    ;;
log)
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=0 --command="sudo journalctl --unit=$unit --output=cat --lines=100 --follow"
    ;;
stop)
    on_all "sudo systemctl stop $unit"
    ;;
delete)
    # --force deletes the node with the request
    gcloud compute tpus queued-resources delete "$TPU" --zone="$ZONE" --force --quiet
    ;;
*) usage ;;
esac
