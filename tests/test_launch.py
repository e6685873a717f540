"""The launch scripts: what they start, which signals and exit codes they pass on, what they tell Google and Kubernetes."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from cluster import PATIENCE

from tinyllama_jax.base import cli
from tinyllama_jax.planning import targets
from tinyllama_jax.run import addresses
from tinyllama_jax.run import cluster as run_cluster

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
RUNBOOK = LAUNCH / "RUNBOOK.md"
SCRIPTS = [LAUNCH / "local.sh", LAUNCH / "slurm.sbatch", LAUNCH / "tpu_pod.sh", ROOT / "tests" / "slurm.sh"]
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def environment(**more: object) -> dict[str, str]:
    """Without what would make this process one of several, and what a run in this process has set."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_", "XLA_"))}
    return clean | {"PYTHON": sys.executable, "MODULE": "stand_in"} | {k: str(v) for k, v in more.items()}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_bash(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.skipif(SHELLCHECK is None, reason="there is no shellcheck here")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    done = subprocess.run([SHELLCHECK, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# -- on this machine ------------------------------------------------------------------------------------------------------


def local(n: object, plan: str, *words: str, **env: object) -> subprocess.Popen:
    """`launch/local.sh n -- plan words` of the stand-in, in a process group of its own, as a terminal starts it."""
    command = [LAUNCH / "local.sh", str(n), "--", plan, *words]
    env = environment(PYTHONPATH=ROOT / "tests" / "launch", **env)
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)


def said(out: str) -> list[dict]:
    return sorted((json.loads(line) for line in out.splitlines()), key=lambda line: line["rank"])


def test_local_starts_n_processes_that_know_one_another():
    out, err = (process := local(3, "0", "two words", "--a=$b", XLA_FLAGS="--some=1")).communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    lines = said(out)
    assert [line["words"] for line in lines] == [["two words", "--a=$b"]] * 3
    assert [line["env"].pop("JAX_PROCESS_ID") for line in lines] == ["0", "1", "2"]
    address = lines[0]["env"]["JAX_COORDINATOR_ADDRESS"]
    assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
    expected = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "3", "XLA_FLAGS": "--some=1"}
    assert [line["env"] for line in lines] == [expected] * 3


def test_local_ends_with_the_code_of_the_first_that_failed():
    (process := local(3, "late,0,2")).communicate(timeout=PATIENCE)  # the late one ends with 75, six seconds later
    assert process.returncode == 2


def test_local_kills_what_does_not_end_after_a_failure():
    out, err = (process := local(2, "wait,kill", GRACE=1)).communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGKILL
    assert "others did not end within 1 s: killing them" in err
    assert "signals" not in out


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_local_passes_a_signal_on_to_each_process_once(name):
    number = signal.Signals[name]
    process = local(2, "wait", GRACE=0)  # and does not kill who saves, however long it takes
    first = [process.stdout.readline(), process.stdout.readline()]
    assert all('"words"' in line for line in first)
    os.killpg(process.pid, number)  # to the whole group of the script, as Ctrl-C does
    out, err = process.communicate(timeout=PATIENCE)
    assert [line["signals"] for line in said(out)] == [[number], [number]], err
    assert process.returncode == 128 + number


@pytest.mark.parametrize("arguments", [[], ["0", "--"], ["two", "--"], ["2"], ["2", "--config", "x"]], ids=" ".join)
def test_local_says_how_it_is_used(arguments):
    done = subprocess.run([LAUNCH / "local.sh", *arguments], capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    assert done.stderr.startswith("usage:")


# -- Slurm (tests/slurm.sh has the rest, under a real one) ------------------------------------------------------------------


def fake(folder: Path, name: str, script: str) -> None:
    """A program `name` in `folder` that writes its arguments, a line of JSON a call, to `folder/calls`, and runs `script`."""
    folder.mkdir(parents=True, exist_ok=True)
    line = f"import json, sys; open({str(folder / 'calls')!r}, 'a').write(json.dumps([{name!r}, *sys.argv[1:]]) + '\\n')"
    (folder / name).write_text(f'#!/bin/bash\n{sys.executable} -ISc {json.dumps(line)} "$@"\n{script}\n')
    (folder / name).chmod(0o755)


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def after_an_srun_that_ends_with(code: int, folder: Path, *arguments: str, **env: object) -> tuple[int, list[list[str]]]:
    fake(folder, "srun", f"exit {code}")
    fake(folder, "scontrol", "exit 0")
    env = environment(PATH=f"{folder}:{os.environ['PATH']}", SLURM_JOB_ID=7, **env)
    done = subprocess.run([LAUNCH / "slurm.sbatch", *arguments], env=env, capture_output=True, text=True)
    return done.returncode, calls(folder)


@pytest.mark.parametrize("code", [0, 1, 2, 3, 75, 126, 127, 129, 130, 134, 137, 138, 139, 140, 143, 152])
def test_slurm_queues_again_what_is_worth_another_try(tmp_path, code):
    returned, (_, *after) = after_an_srun_that_ends_with(code, tmp_path)
    assert returned == code
    assert after == ([["scontrol", "requeue", "7"]] if code in (75, 134, 137, 138, 139, 140, 143, 152) else [])


def test_slurm_gives_up_at_some_time(tmp_path):
    returned, after = after_an_srun_that_ends_with(75, tmp_path, SLURM_RESTART_COUNT=3, MAX_RESTARTS=3)
    assert returned == 75
    assert [call[0] for call in after] == ["srun"]


def test_slurm_passes_its_arguments_on(tmp_path):
    _, [srun] = after_an_srun_that_ends_with(0, tmp_path / "a", "--config", "x y.py", "--log.wandb=$a")
    assert srun[srun.index("-m") :] == ["-m", "stand_in", "--config", "x y.py", "--log.wandb=$a"]
    _, [srun] = after_an_srun_that_ends_with(0, tmp_path / "b")
    assert srun[srun.index("-m") :] == ["-m", "stand_in", "--config", "configs/3t.py"]


# -- Cloud TPU ------------------------------------------------------------------------------------------------------------

SSH = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "name", "--zone=zone"]
UNIT = LAUNCH / "tinyllama.service"
GCLOUD = """
case "$*" in
*" describe "*) sed -n "$(grep -c '"describe"' CALLS)p" STATES ;;
*" scp "*) cp "$5" HOME/ ;;
*" ssh "*) for word in "$@"; do case $word in --command=*) cd HOME && bash -c "${word#--command=}" || exit ;; esac; done ;;
esac
"""


@pytest.fixture
def tpu(tmp_path):
    """`launch/tpu_pod.sh` where gcloud, and on its hosts sudo, systemctl and Python, write down what they are told.

    `sudo tee FILE` writes a file of that name to `home`.
    """
    project, home, bin_ = tmp_path / "project", tmp_path / "home", tmp_path / "bin"
    home.mkdir()
    (project / "launch").mkdir(parents=True)
    shutil.copy(UNIT, project / "launch")
    (project / "requirements.txt").write_text("jax\n")
    (project / "not_committed").write_text("")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com", "-C", project]
    for command in (["init", "-q"], ["add", "requirements.txt", "launch"], ["commit", "-qm", "Begin"]):
        subprocess.run([*git, *command], check=True)
    paths = {"CALLS": bin_ / "calls", "STATES": tmp_path / "states", "HOME": home}
    fake(bin_, "gcloud", re.sub(r"\b(CALLS|STATES|HOME)\b", lambda name: str(paths[name[0]]), GCLOUD))
    fake(bin_, "mountpoint", "exit 1")
    fake(bin_, "sudo", f'[ "$1" != tee ] || cat >{home}/$(basename "$2")')
    fake(bin_, "systemctl", f"cat {tmp_path}/active")
    fake(bin_, "python3", "exit 0")

    def call(*arguments, states="ACTIVE", active="inactive", **env):
        (tmp_path / "states").write_text(states.replace(" ", "\n") + "\n")
        (tmp_path / "active").write_text(active)
        (bin_ / "calls").write_text("")
        settings = {"TPU": "name", "ZONE": "zone", "TYPE": "v4-32", "SHARED": "10.0.0.2:/share", "POLL": 0}
        settings |= {"PATH": f"{bin_}:{os.environ['PATH']}", "HOME": home} | env
        env = environment(**settings)
        env = {k: v for k, v in env.items() if v != "None" and k != "MODULE"}
        command = [LAUNCH / "tpu_pod.sh", *arguments]
        done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=PATIENCE)
        return done, calls(bin_)

    call.home = home
    return call


def test_tpu_create_waits_for_the_slice_and_sets_every_host_up(tpu):
    done, said = tpu("create", states="WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    assert done.returncode == 0, done.stderr
    gcloud = [call for call in said if call[0] == "gcloud"]
    resource = ["gcloud", "compute", "tpus", "queued-resources"]
    create = [*resource, "create", "name", "--zone=zone", "--node-id=name"]
    assert gcloud[0] == [*create, "--accelerator-type=v4-32", "--runtime-version=tpu-ubuntu2204-base", "--spot"]
    assert gcloud[1:4] == [[*resource, "describe", "name", "--zone=zone", "--format=value(state.state)"]] * 3
    assert gcloud[4][1:5] == ["compute", "tpus", "tpu-vm", "scp"]
    assert gcloud[4][6:] == ["name:", "--zone=zone", "--worker=all"]
    assert gcloud[5][:-1] == [*SSH, "--worker=all"]
    assert len(gcloud) == 6
    assert sorted(f.name for f in (tpu.home / "tinyllama").iterdir()) == ["launch", "requirements.txt"]  # what is committed
    on_host = [call for call in said if call[0] in ("sudo", "python3")]
    assert "\n10.0.0.2:/share /shared nfs _netdev,nofail," in "\n" + (tpu.home / "fstab.tinyllama").read_text()
    fstab = on_host.index(["sudo", "mv", "/etc/fstab.tinyllama", "/etc/fstab"])
    assert on_host.index(["sudo", "mount", "-t", "nfs", "10.0.0.2:/share", "/shared"]) < fstab  # a wrong share is not written
    install = "python3 -m uv pip install -q --python .venv/bin/python -r requirements.txt jax[tpu]>=0.10.2,<0.13"
    assert on_host[-1] == install.split()


GENERATOR = Path("/usr/lib/systemd/system-generators/systemd-fstab-generator")
READS = GENERATOR.exists() and b"SYSTEMD_FSTAB" in GENERATOR.read_bytes()


@pytest.mark.skipif(not READS, reason="there is no systemd-fstab-generator here that reads another file than /etc/fstab")
def test_tpu_setup_mounts_the_share_at_every_start_of_a_host(tpu, tmp_path):
    """The host comes up without it, and whoever needs it waits for it: systemd's own reading of the line."""
    tpu("setup")
    fstab = tpu.home / "fstab.tinyllama"
    [line] = [line for line in fstab.read_text().splitlines() if "/shared" in line]
    assert line.split()[:3] == ["10.0.0.2:/share", "/shared", "nfs"]
    out = tmp_path / "generated"
    out.mkdir()
    subprocess.run([GENERATOR, out, out, out], env={"SYSTEMD_FSTAB": str(fstab)}, check=True, timeout=PATIENCE)
    mount = (out / "shared.mount").read_text().splitlines()
    assert {"What=10.0.0.2:/share", "Where=/shared", "Type=nfs", "TimeoutSec=infinity"} <= set(mount)
    assert (out / "remote-fs.target.wants" / "shared.mount").is_symlink()
    assert not (out / "remote-fs.target.requires").exists()


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        ("v6e-16", "v2-alpha-tpuv6e"),
        ("v5p-32", "v2-alpha-tpuv5"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v3-8", "tpu-ubuntu2204-base"),
    ],
)
def test_tpu_create_takes_the_image_of_the_type(tpu, kind, image):
    _, (create, _) = tpu("create", TYPE=kind, states="FAILED")
    assert create[-3:-1] == [f"--accelerator-type={kind}", f"--runtime-version={image}"]


def test_tpu_create_takes_another_image_if_told(tpu):
    _, (create, _) = tpu("create", TYPE="v9-8", RUNTIME="own", states="FAILED")
    assert create[-3:-1] == ["--accelerator-type=v9-8", "--runtime-version=own"]


@pytest.mark.parametrize("kind", ["v5p:2x2x4", "v5e-16", "tpu7x-16", "v5p", "v5p-", "v6e-4x4", "a100", "v5p-32 "])
def test_tpu_create_refuses_an_unknown_type(tpu, kind):
    done, said = tpu("create", TYPE=kind)
    assert (done.returncode, said) == (2, [])
    assert (
        done.stderr.startswith(f"TYPE={kind}: not a type of Cloud TPU; choose one like v4-32") and done.stderr.count("\n") == 1
    )


def test_tpu_create_can_ask_for_capacity_that_is_not_taken_away(tpu):
    _, said = tpu("create", SPOT="", states="FAILED")
    assert "--spot" not in said[0]


def test_tpu_create_says_when_there_will_be_no_slice(tpu):
    done, said = tpu("create", states="PROVISIONING FAILED")
    assert done.returncode == 75
    assert "create again" in done.stderr
    assert not any("ssh" in call for call in said)


def test_tpu_run_starts_the_same_command_on_all_hosts(tpu):
    shutil.copytree(LAUNCH, tpu.home / "tinyllama" / "launch")
    done, (gcloud, *on_host) = tpu("run", "--config", "configs/3t.py", "--workdir=/shared/a b", "--log.wandb=$x'y %h")
    assert done.returncode == 0, done.stderr
    assert gcloud[:-1] == [*SSH, "--worker=all"]
    installed = tpu.home / "tinyllama.service"
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    assert installed.read_text() == UNIT.read_text().replace("User=USER", f"User={user}")
    assert on_host[1:] == [
        ["sudo", "tee", "/etc/systemd/system/tinyllama.service"],
        ["sudo", "systemctl", "daemon-reload"],
        ["sudo", "systemctl", "enable", "--now", "tinyllama"],
    ]
    # what the unit then starts
    fake(tpu.home / "tinyllama" / ".venv" / "bin", "python", "exit 7")
    start = setting(UNIT, "ExecStart").split()
    assert subprocess.run(start, cwd=tpu.home, env={"HOME": str(tpu.home), "PATH": os.environ["PATH"]}).returncode == 7
    [[_, *words]] = calls(tpu.home / "tinyllama" / ".venv" / "bin")
    given = ["--config", "configs/3t.py", "--workdir=/shared/a b", "--log.wandb=$x'y %h"]
    assert words == ["-m", "tinyllama_jax.train", "--mesh.data=1", "--mesh.fsdp=-1", "--checkpoint.minutes=8", *given]
    config = cli.load([*words[2:-2], "--workdir=/shared/a b", "--data.sources=/shared/data"])
    assert (config.mesh.data, config.mesh.fsdp) == (1, -1)


@pytest.mark.parametrize("state", ["active", "activating", "deactivating"])
def test_tpu_run_leaves_a_run_alone(tpu, state):
    done, (_, asked) = tpu("run", "--config", "configs/3t.py", active=state)
    assert done.returncode == 2
    assert f"a run is {state}; launch/tpu_pod.sh stop ends it" in done.stderr
    assert asked == ["systemctl", "is-active", "tinyllama"]


def setting(unit: Path, key: str) -> str:
    [value] = re.findall(rf"^{key}=(.*)$", unit.read_text(), re.MULTILINE)
    return value


def retried() -> list[int]:
    """The exit codes after which slurm.sbatch queues a run again."""
    [codes] = re.findall(r"^case \$code in ([\d |]+)\) ;;", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
    return [int(code) for code in codes.split("|")]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")
def test_systemd_has_nothing_to_say_about_the_unit(tmp_path):
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("User=USER", "User=root"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=PATIENCE)
    about = [line for line in (done.stdout + done.stderr).splitlines() if "tinyllama" in line]  # not of the machine's own units
    assert about == []
    if done.returncode:
        pytest.skip(f"systemd-analyze does not work here: {done.stderr}")


def test_the_unit_starts_again_what_slurm_does():
    """After a failure worth another try, and with the host; what ended for good is disabled, and starts with no host."""
    assert [int(code) for code in setting(UNIT, "RestartForceExitStatus").split()] == retried()
    assert setting(UNIT, "Restart") == "on-abnormal"  # signals, not exit codes
    assert (setting(UNIT, "WantedBy"), setting(UNIT, "RequiresMountsFor")) == ("multi-user.target", "/shared")
    assert "TINYLLAMA_JAX_JOIN=1" in setting(UNIT, "Environment").split()
    [script] = re.fullmatch(r"\+/bin/sh -c '(.*)'", setting(UNIT, "ExecStopPost")).groups()
    every = " ".join([*(f"exited:{code}" for code in range(256)), "killed:TERM", "killed:KILL", "dumped:SEGV"])
    script = script.replace("systemctl", "echo $EXIT_STATUS:")
    loop = f"for end in {every}; do EXIT_CODE=${{end%:*}} EXIT_STATUS=${{end#*:}}; {script}; done"
    done = subprocess.run(["/bin/sh", "-c", loop], capture_output=True, text=True, check=True)
    final = [int(line.split(":")[0]) for line in done.stdout.splitlines()]
    assert final == [code for code in range(256) if code not in retried()]
    assert {line.split(": ")[1] for line in done.stdout.splitlines()} == {"--no-reload disable tinyllama"}


def test_tpu_log_stop_and_delete(tpu):
    done, (gcloud, sudo) = tpu("stop")
    assert done.stdout == "name is billed until launch/tpu_pod.sh delete\n"
    assert gcloud[:-1] == [*SSH, "--worker=all"]
    assert sudo == ["sudo", "systemctl", "disable", "--now", "tinyllama"]
    _, (gcloud, sudo) = tpu("log")
    assert gcloud[:-1] == [*SSH, "--worker=0"]
    assert sudo[:4] == ["sudo", "journalctl", "--unit=tinyllama", "--output=cat"]
    _, said = tpu("delete")
    assert said == [["gcloud", "compute", "tpus", "queued-resources", "delete", "name", "--zone=zone", "--force", "--quiet"]]


@pytest.mark.parametrize("missing", ["TPU", "ZONE", "TYPE", "SHARED"])
def test_tpu_names_what_is_not_set(tpu, missing):
    done, said = tpu("create", **{missing: None})
    assert done.returncode != 0
    assert f"{missing}: " in done.stderr
    assert said == []


def test_tpu_says_how_it_is_used(tpu):
    for arguments in ([], ["start"]):
        done, said = tpu(*arguments)
        assert done.returncode == 2
        assert "tpu_pod.sh create" in done.stderr
        assert said == []


# -- Kubernetes -----------------------------------------------------------------------------------------------------------

SCHEMA = yaml.safe_load((ROOT / "tests" / "launch" / "jobset.schema.yaml").read_text())
GPU, TPU = "k8s_jobset.yaml", "k8s_tpu_jobset.yaml"


def read(name: str) -> dict:
    return yaml.safe_load((LAUNCH / name).read_text())


def parts(jobset: dict) -> tuple[dict, dict, dict]:
    """Its only job, that job's pod, and the pod's only container."""
    [hosts] = jobset["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    return job, job["template"]["spec"], container


def env_of(container: dict) -> dict[str, str]:
    return {e["name"]: e.get("value") or e["valueFrom"]["fieldRef"]["fieldPath"] for e in container["env"]}


def wrong(jobset: dict) -> list[str]:
    return [error.json_path for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(jobset)]


@pytest.mark.parametrize("name", [GPU, TPU])
def test_the_jobsets_are_some(name):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert wrong(read(name)) == []


def test_a_wrong_jobset_is_seen():
    jobset = read(GPU)
    job, pod, container = parts(jobset)
    container["env"][2]["value"] = 2
    assert wrong(jobset) == ["$.spec.replicatedJobs[0].template.spec.template.spec.containers[0].env[2].value"]
    container["env"][2]["value"] = "2"
    jobset["spec"]["failurePolicy"]["maxRestart"] = 3
    assert wrong(jobset) == ["$.spec.failurePolicy"]
    del jobset["spec"]["failurePolicy"]["maxRestart"]
    pod["nodeSelector"]["topology"] = 4
    assert wrong(jobset) == ["$.spec.replicatedJobs[0].template.spec.template.spec.nodeSelector.topology"]
    pod["nodeSelector"]["topology"] = "4"
    container["resources"]["requests"]["memory"] = 128
    assert wrong(jobset)[0].endswith("containers[0].resources.requests.memory")
    container["resources"]["requests"]["memory"] = "128Gi"
    job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"].append(256)
    assert wrong(jobset)[0].endswith("onExitCodes.values[9]")


@pytest.mark.parametrize("name", [GPU, TPU])
def test_a_jobset_starts_one_process_a_host_on_what_it_asks_for(name):
    jobset = read(name)
    job, pod, container = parts(jobset)
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 1
    assert job["completions"] == job["parallelism"] and job["completionMode"] == "Indexed"
    assert jobset["spec"]["network"]["enableDNSHostnames"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert container["command"] == ["python", "-m", "tinyllama_jax.train"]
    config = cli.load(container["args"])
    assert all(Path(path).is_relative_to("/shared") for path in [config.workdir, *config.data.sources])
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert limits.items() <= requests.items()  # Kubernetes: as many devices as the limit, or none
    assert {"cpu", "memory"} <= requests.keys()
    assert any(key.startswith("cloud.google.com/gke-") for key in pod["nodeSelector"])


def test_the_gpu_jobset_tells_each_process_who_it_is():
    jobset = read(GPU)
    job, _, container = parts(jobset)
    env = env_of(container)
    assert job["completions"] == int(env["JAX_NUM_PROCESSES"])
    assert env["JAX_PROCESS_ID"] == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert env["COORDINATOR"] == "metadata.annotations['jobset.sigs.k8s.io/coordinator']"
    assert re.fullmatch(r"\$\(COORDINATOR\):\d+", env["JAX_COORDINATOR_ADDRESS"])
    names = list(env)
    assert names.index("COORDINATOR") < names.index("JAX_COORDINATOR_ADDRESS")  # only an earlier one is put in
    assert jobset["spec"]["coordinator"] == {"replicatedJob": "hosts", "jobIndex": 0, "podIndex": 0}
    assert env["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"  # GKE's


def test_the_tpu_jobset_has_a_host_for_all_chips_of_the_topology():
    job, pod, container = parts(read(TPU))
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert job["completions"] * container["resources"]["limits"]["google.com/tpu"] == chips
    config = cli.load(container["args"])
    assert (config.mesh.data, config.mesh.fsdp) == (1, -1)
    # one of the runbook's slices, and the header's command makes that node pool
    labels = pod["nodeSelector"]
    of_shape = [row for row in slices() if row["on"].endswith(f":{labels['cloud.google.com/gke-tpu-topology']}")]
    [row] = [row for row in of_shape if f"`{labels['cloud.google.com/gke-tpu-accelerator']}`" in row["gke"]]
    assert (row["chips"], row["hosts"]) == (chips, job["completions"])
    machine, topology, nodes = re.search(
        r"--machine-type=(\S+) --tpu-topology=(\S+) --num-nodes=(\d+)", (LAUNCH / TPU).read_text()
    ).groups()
    assert (machine in row["gke"], topology, int(nodes)) == (True, row["on"].partition(":")[2], row["hosts"])


def test_jax_finds_the_hosts_of_the_tpu_jobset(monkeypatch):
    """JAX's own detection, with what GKE tells a pod; only the answers of DNS and of Google's metadata server stand in."""
    from jax._src.clusters import cloud_tpu_cluster, cluster

    jobset = read(TPU)
    job, _, container = parts(jobset)
    name = jobset["metadata"]["name"]
    hosts = [f"{name}-hosts-0-{i}.{name}" for i in range(job["completions"])]
    for key in [key for key in os.environ if key.startswith(("JAX_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_"))]:
        monkeypatch.delenv(key)
    given = {"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": ",".join(hosts), "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    for key, value in (env_of(container) | given).items():
        monkeypatch.setenv(key, value)
    assert run_cluster.identity() == (-1, -1) and run_cluster.several()
    assert addresses.arguments(*run_cluster.identity(), 60) == {}  # all is left to JAX
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value_from_metadata", lambda key: None)
    monkeypatch.setattr(cloud_tpu_cluster.socket, "gethostbyname", {hosts[0]: "10.0.0.2"}.__getitem__)
    detected = cluster.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 60)
    assert detected[:3] == (f"{hosts[0]}:8482", job["completions"], 2)


def test_slurm_and_kubernetes_try_again_after_the_same_exit_codes():
    for jobset in (read(GPU), read(TPU)):
        job, _, container = parts(jobset)
        [rule] = job["podFailurePolicy"]["rules"]
        assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
        assert rule["onExitCodes"]["containerName"] == container["name"]
        assert rule["onExitCodes"]["values"] == retried()
        assert jobset["spec"]["failurePolicy"]["rules"] == [
            {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
        ]
        assert job["backoffLimit"] == 0


# -- the runbook ------------------------------------------------------------------------------------------------------------


def slices() -> list[dict]:
    """The runbook's table of TPU slices."""
    rows = re.findall(
        r"^\| `(v\w+:[\dx]+)` \| `(.*?)` \| (\d+) \| (\d+) \| (.*?) \| ([\d,]+) \|", RUNBOOK.read_text(), re.MULTILINE
    )
    return [{"on": on, "type": kind, "chips": int(chips), "hosts": int(hosts), "gke": gke, "day": int(day.replace(",", ""))}
            for on, kind, chips, hosts, gke, day in rows]  # fmt: skip


def test_the_runbook_knows_the_slices_of_plan():
    assert {row["on"].partition(":")[0] for row in slices()} == set(targets.CLOUD)  # TPU7x has no TYPE
    for row in slices():
        name, _, shape = row["on"].partition(":")
        chips = math.prod(map(int, shape.split("x")))
        assert row["type"] == targets.cloud_type(row["on"])
        assert (row["chips"], row["hosts"]) == (chips, chips // 4)
        assert row["day"] == round(24 * chips * targets.TARGETS[name].price)


@pytest.mark.parametrize(
    ("setup", "on", "devices"),
    [("8 A100-40G", "a100-40g", 8), ("8 H100", "h100", 8), ("Slurm, 2 x 8 A100", "a100-40g", 16),
     ("Slurm, 4 nodes of 4", "a100-40g", 16), ("Kubernetes, 2 x 8 A100", "a100-40g", 16),
     ("Kubernetes, TPU v6e 4x4", "v6e", 16)],
)  # fmt: skip
def test_the_runbook_has_the_price_of_a_day_that_plan_has(setup, on, devices):
    [line] = [line for line in RUNBOOK.read_text().splitlines() if setup in line and line.endswith(" |")]
    assert f"{24 * devices * targets.TARGETS[on].price:,.0f}" in line.split(setup)[1].split(" | ")[-1]


def test_the_runbook_has_a_source_for_every_command_of_a_provider():
    documented = set()
    for row in re.findall(r"^\| `((?:gcloud|kubectl) .*?)`", RUNBOOK.read_text().partition("## Sources")[2], re.MULTILINE):
        first, *more = row.split(", ")  # `gcloud GROUP create, delete`
        documented |= {first, *(f"{first.rpartition(' ')[0]} {verb}" for verb in more)}
    text = "\n".join(path.read_text().partition("## Sources")[0] for path in LAUNCH.iterdir())
    used = set(re.findall(r"\b(?:gcloud (?:compute|container)|kubectl)(?: [a-z][a-z-]+)+", text))
    assert len(used) > 10
    assert {command for command in used if not any(f"{command} ".startswith(f"{d} ") for d in documented)} == set()
