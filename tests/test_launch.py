"""The launch scripts: what they start, which signals and exit codes they pass on, what they tell Google and Kubernetes."""

import json
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

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
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
    folder.mkdir(exist_ok=True)
    line = f"import json, sys; open({str(folder / 'calls')!r}, 'a').write(json.dumps([{name!r}, *sys.argv[1:]]) + '\\n')"
    (folder / name).write_text(f'#!/bin/bash\n{sys.executable} -c {json.dumps(line)} "$@"\n{script}\n')
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
GCLOUD = """
case "$*" in
*" describe "*) sed -n "$(grep -c '"describe"' CALLS)p" STATES ;;
*" scp "*) cp "$5" HOME/ ;;
*" ssh "*) for word in "$@"; do case $word in --command=*) cd HOME && bash -c "${word#--command=}" || exit ;; esac; done ;;
esac
"""


@pytest.fixture
def tpu(tmp_path):
    """`launch/tpu_pod.sh` where gcloud, and on its hosts sudo and Python, write down what they are told."""
    project, home, bin_ = tmp_path / "project", tmp_path / "home", tmp_path / "bin"
    home.mkdir()
    project.mkdir()
    (project / "requirements.txt").write_text("jax\n")
    (project / "not_committed").write_text("")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com", "-C", project]
    for command in (["init", "-q"], ["add", "requirements.txt"], ["commit", "-qm", "Begin"]):
        subprocess.run([*git, *command], check=True)
    paths = {"CALLS": bin_ / "calls", "STATES": tmp_path / "states", "HOME": home}
    fake(bin_, "gcloud", re.sub(r"\b(CALLS|STATES|HOME)\b", lambda name: str(paths[name[0]]), GCLOUD))
    fake(bin_, "mountpoint", "exit 1")
    for name in ("sudo", "python3"):
        fake(bin_, name, "exit 0")

    def call(*arguments, states="ACTIVE", **env):
        (tmp_path / "states").write_text(states.replace(" ", "\n") + "\n")
        (bin_ / "calls").write_text("")
        settings = {"TPU": "name", "ZONE": "zone", "TYPE": "v4-32", "RUNTIME": "image", "SHARED": "10.0.0.2:/share", "POLL": 0}
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
    assert gcloud[0] == [*create, "--accelerator-type=v4-32", "--runtime-version=image", "--spot"]
    assert gcloud[1:4] == [[*resource, "describe", "name", "--zone=zone", "--format=value(state.state)"]] * 3
    assert gcloud[4][1:5] == ["compute", "tpus", "tpu-vm", "scp"]
    assert gcloud[4][6:] == ["name:", "--zone=zone", "--worker=all"]
    assert gcloud[5][:-1] == [*SSH, "--worker=all"]
    assert len(gcloud) == 6
    assert [f.name for f in (tpu.home / "tinyllama").iterdir()] == ["requirements.txt"]  # what is committed
    on_host = [call for call in said if call[0] in ("sudo", "python3")]
    assert ["sudo", "mount", "-t", "nfs", "10.0.0.2:/share", "/shared"] in on_host
    install = "python3 -m uv pip install -q --python .venv/bin/python -r requirements.txt jax[tpu]>=0.10.2,<0.13"
    assert on_host[-1] == install.split()


def test_tpu_create_can_ask_for_capacity_that_is_not_taken_away(tpu):
    _, said = tpu("create", SPOT="")
    assert "--spot" not in said[0]


def test_tpu_create_says_when_there_will_be_no_slice(tpu):
    done, said = tpu("create", states="PROVISIONING FAILED")
    assert done.returncode == 75
    assert "create again" in done.stderr
    assert not any("ssh" in call for call in said)


def test_tpu_run_starts_the_same_command_on_all_hosts(tpu):
    done, (gcloud, sudo) = tpu("run", "--config", "configs/3t.py", "--workdir=/shared/a b", "--log.wandb=$x'y")
    assert done.returncode == 0, done.stderr
    assert gcloud[:-1] == [*SSH, "--worker=all"]
    program = sudo.index(f"{tpu.home}/tinyllama/.venv/bin/python")
    words = ["--mesh.data=1", "--mesh.fsdp=-1", "--config", "configs/3t.py", "--workdir=/shared/a b", "--log.wandb=$x'y"]
    assert sudo[program + 1 :] == ["-m", "tinyllama_jax.train", *words]
    options = sudo[1:program]
    assert options[0] == "systemd-run"
    assert all(option.startswith("--") for option in options[1:])
    assert {"--property=Restart=on-failure", "--property=RestartPreventExitStatus=1 2 3"} <= set(options)
    assert {"--setenv=TINYLLAMA_JAX_JOIN=1", f"--working-directory={tpu.home}/tinyllama"} <= set(options)
    config = cli.load([*words[:-2], "--workdir=/shared/a b", "--data.sources=/shared/data"])
    assert (config.mesh.data, config.mesh.fsdp) == (1, -1)


def test_tpu_log_stop_and_delete(tpu):
    _, (gcloud, sudo) = tpu("stop")
    assert gcloud[:-1] == [*SSH, "--worker=all"]
    assert sudo == ["sudo", "systemctl", "stop", "tinyllama"]
    _, (gcloud, sudo) = tpu("log")
    assert gcloud[:-1] == [*SSH, "--worker=0"]
    assert sudo[:4] == ["sudo", "journalctl", "--unit=tinyllama", "--output=cat"]
    _, said = tpu("delete")
    assert said == [["gcloud", "compute", "tpus", "queued-resources", "delete", "name", "--zone=zone", "--force", "--quiet"]]


@pytest.mark.parametrize("missing", ["TPU", "ZONE", "TYPE", "RUNTIME", "SHARED"])
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


@pytest.fixture
def jobset() -> dict:
    return yaml.safe_load((LAUNCH / "k8s_jobset.yaml").read_text())


def wrong(jobset: dict) -> list[str]:
    return [error.json_path for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(jobset)]


def test_the_jobset_is_one(jobset):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert wrong(jobset) == []


def test_a_wrong_jobset_is_seen(jobset):
    def job():
        return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]

    job()["template"]["spec"]["containers"][0]["env"][2]["value"] = 2
    assert wrong(jobset) == ["$.spec.replicatedJobs[0].template.spec.template.spec.containers[0].env[2].value"]
    job()["template"]["spec"]["containers"][0]["env"][2]["value"] = "2"
    jobset["spec"]["failurePolicy"]["maxRestart"] = 3
    assert wrong(jobset) == ["$.spec.failurePolicy"]
    del jobset["spec"]["failurePolicy"]["maxRestart"]
    job()["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"].append(256)
    assert wrong(jobset)[0].endswith("onExitCodes.values[9]")


def test_the_jobset_starts_one_process_a_host_and_tells_each_who_it_is(jobset):
    [hosts] = jobset["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    env = {e["name"]: e.get("value") or e["valueFrom"]["fieldRef"]["fieldPath"] for e in container["env"]}
    assert hosts["replicas"] == 1
    assert job["completions"] == job["parallelism"] == int(env["JAX_NUM_PROCESSES"])
    assert job["completionMode"] == "Indexed"
    assert env["JAX_PROCESS_ID"] == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert env["COORDINATOR"] == "metadata.annotations['jobset.sigs.k8s.io/coordinator']"
    assert re.fullmatch(r"\$\(COORDINATOR\):\d+", env["JAX_COORDINATOR_ADDRESS"])
    names = list(env)
    assert names.index("COORDINATOR") < names.index("JAX_COORDINATOR_ADDRESS")  # only an earlier one is put in
    assert jobset["spec"]["coordinator"] == {"replicatedJob": hosts["name"], "jobIndex": 0, "podIndex": 0}
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert container["command"] == ["python", "-m", "tinyllama_jax.train"]
    config = cli.load(container["args"])
    assert all(Path(path).is_relative_to("/shared") for path in [config.workdir, *config.data.sources])


def test_slurm_and_kubernetes_try_again_after_the_same_exit_codes(jobset):
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    [rule] = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert rule["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    [codes] = re.findall(r"^case \$code in ([\d |]+)\) ;;", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
    assert rule["onExitCodes"]["values"] == [int(code) for code in codes.split("|")]
    assert jobset["spec"]["failurePolicy"]["rules"] == [
        {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    assert job["backoffLimit"] == 0
