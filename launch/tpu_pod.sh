#!/usr/bin/env bash
# A run on a Cloud TPU slice, spot by default. From the project's folder, with gcloud logged in and its project set:
#
#   export TPU=tinyllama ZONE=us-central2-b TYPE=v4-32 SHARED=10.0.0.2:/share
#   launch/tpu_pod.sh create                    request the slice, wait for it, and set up every host
#   launch/tpu_pod.sh setup                     set up again, after a new commit
#   launch/tpu_pod.sh run --config configs/3t.py --workdir=/shared/runs/3t --data.sources=/shared/data/a:0.7,/shared/data/b:0.3
#   launch/tpu_pod.sh log                       what host 0 prints; Ctrl-C leaves the run alone
#   launch/tpu_pod.sh stop                      save and end, on all hosts; `run` with the same arguments resumes
#   launch/tpu_pod.sh delete                    release the slice, so that it costs nothing any more
#
# TYPE is Cloud TPU's name of the slice: v4-32, v5litepod-16, v5p-32, v6e-16. `plan` prints it: TYPE=v5p-32 for `--on v5p:2x2x4`.
# v5litepod needs --train.seqs_per_device=4 with configs/3t.py: with 8 a chip would need 18.9 GiB, and has 15.75. TPU7x is not served here: RUNBOOK.md.
# SHARED is an NFS share (Filestore, say) that every host mounts as /shared: the run folder and the data are there. A spot slice
# that was preempted stays SUSPENDED: delete, create, and the same run again. A host that rebooted rejoins by itself.
# SPOT= (empty) asks for on-demand capacity. RUNTIME overrides the image that belongs to TYPE. MODULE (tinyllama_jax.train) is the
# module that runs. RUNBOOK.md names the page of Google's documentation for each command, the costs, and what is billed when.
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
    : "${TYPE:?says which slice, such as v4-32}"
    : "${SHARED:?says which NFS share holds the data and the run folder, such as 10.0.0.2:/share}"
    # https://docs.cloud.google.com/tpu/docs/runtimes, read on 2026-11-30
    image=${RUNTIME:-}
    [ -n "$image" ] || case ${TYPE%-*}:${TYPE##*-} in
    *:*[!0-9]* | *:) ;; # no number
    v6e:*) image=v2-alpha-tpuv6e ;;
    v5p:*) image=v2-alpha-tpuv5 ;;
    v5litepod:*) image=v2-alpha-tpuv5-lite ;;
    v4:* | v3:* | v2:*) image=tpu-ubuntu2204-base ;;
    esac
    if [ -z "$image" ]; then
        echo "TYPE=$TYPE: not a type of Cloud TPU; choose one like v4-32, v5litepod-16, v5p-32 or v6e-16 (plan prints it), or set RUNTIME as well; TPU7x: launch/RUNBOOK.md" >&2
        exit 2
    fi
    spot=(--spot)
    [ -n "${SPOT-spot}" ] || spot=()
    # Without --async it returns when the request is accepted, which is not when there is a slice: that can take minutes or days.
    gcloud compute tpus queued-resources create "$TPU" --zone="$ZONE" --node-id="$TPU" \
        --accelerator-type="$TYPE" --runtime-version="$image" ${spot[@]+"${spot[@]}"}
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
    # /etc/fstab mounts the share again after a reboot: nofail lets the host come up without it, and as retry (in
    # minutes) and mount-timeout set no end, the run waits for it (nfs(5), systemd.mount(5)). It is mounted by hand first, so that a
    # wrong share is refused. The images' own Python is older than 3.11.
    on_all "set -eo pipefail
        sudo mkdir -p /shared
        mountpoint -q /shared || { sudo apt-get install -y -q nfs-common && sudo mount -t nfs $(printf %q "$SHARED") /shared; }
        { grep -v '[[:space:]]/shared[[:space:]]' /etc/fstab || :
        echo $(printf %q "$SHARED") /shared nfs _netdev,nofail,retry=10000,x-systemd.mount-timeout=infinity 0 0
        } | sudo tee /etc/fstab.tinyllama >/dev/null
        sudo mv /etc/fstab.tinyllama /etc/fstab
        sudo systemctl daemon-reload
        mkdir -p tinyllama && tar xzf tinyllama.tar.gz -C tinyllama && cd tinyllama
        python3 -m pip install -q --user uv
        python3 -m uv venv -q --allow-existing --python 3.12 .venv
        python3 -m uv pip install -q --python .venv/bin/python -r requirements.txt 'jax[tpu]>=0.10.2,<0.13'"
    ;;
run)
    # One axis: within a slice every chip reaches every other one over ICI, and fsdp alone needs the least memory.
    # systemd, and not ssh, is the parent: a connection that breaks ends nothing; when the host is taken away or maintained, the
    # processes get a SIGTERM and save; after a reboot they start again. tinyllama.service says what else it does.
    words=$(printf ' %q' -m "${MODULE:-tinyllama_jax.train}" --mesh.data=1 --mesh.fsdp=-1 --checkpoint.minutes=8 "$@")
    on_all "set -eo pipefail
        state=\$(systemctl is-active $unit || :)
        case \$state in
        inactive | failed | unknown) ;;
        *) echo \"\$(hostname): a run is \$state; launch/tpu_pod.sh stop ends it\" >&2; exit 2 ;;
        esac
        cat >tinyllama/run <<'END'
#!/bin/bash
cd ~/tinyllama && exec .venv/bin/python$words
END
        sed \"s/^User=.*/User=\$(id -un)/\" tinyllama/launch/$unit.service | sudo tee /etc/systemd/system/$unit.service >/dev/null
        sudo systemctl daemon-reload
        sudo systemctl enable --now $unit"
    ;;
log)
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=0 --command="sudo journalctl --unit=$unit --output=cat --lines=100 --follow"
    ;;
stop)
    # Disabled, too: a stopped run must not start with the host.
    on_all "sudo systemctl disable --now $unit"
    echo "$TPU is billed until launch/tpu_pod.sh delete"
    ;;
delete)
    # --force deletes the node with the request
    gcloud compute tpus queued-resources delete "$TPU" --zone="$ZONE" --force --quiet
    ;;
*) usage ;;
esac
