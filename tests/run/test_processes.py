"""Several real processes as one run: the same numbers as one, agreement on where to stop, and no waiting without end."""

import contextlib
import itertools
import json
import mmap
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from cluster import Cluster, signal_to
from jax.profiler import ProfileData

from tinyllama_jax.base import cli
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.run import checkpoint, cluster, supervise

EXACT = ("step", "checksum", "tokens")
pytestmark = pytest.mark.xdist_group("processes")  # not beside one another, on two cores
RAMP = "1152:256"  # 9 steps of 128 tokens, then 256
WAIT = 20  # six of it for starting, which a busy machine may need


def lines(workdir):
    everything = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return [x for x in everything if "loss" in x]


@pytest.fixture(scope="module")
def quiet(tiny_config_file, tmp_path_factory):
    """An uninterrupted run of one process on eight devices."""
    keys = {"train__seqs_per_device": 1, "train__batch_ramp": RAMP}
    run = Cluster(tiny_config_file, tmp_path_factory.mktemp("quiet") / "run", 1, 8, **keys)
    assert run.wait() == [0], run.output(0)
    return lines(run.workdir)


def same(ours, theirs):
    assert [[x[k] for k in EXACT] for x in ours] == [[x[k] for k in EXACT] for x in theirs]
    np.testing.assert_allclose([x["loss"] for x in ours], [x["loss"] for x in theirs], rtol=2e-4)


def test_two_processes_then_one_then_four_are_one_run(quiet, tiny_config_file, tmp_path):
    """8 devices in 2 processes, 4 in 1, 16 in 4: every batch is that of the quiet run, every loss to rounding.

    The batch grows just before the first stop. Until then it also saves by the clock, after a step on which all agree.
    The four profile the same steps, each its own devices.
    """
    workdir = tmp_path / "run"
    for n, devices, steps, keys in (
        (2, 4, 10, {"train__seqs_per_device": 1, "checkpoint__every": 1_000, "checkpoint__minutes": 1e-4}),
        (1, 4, 15, {"train__seqs_per_device": 2, "mesh__data": 2}),
        (4, 4, 24, {"train__seqs_per_device": 1, "mesh__tensor": 2}),
    ):
        if n == 4:
            (workdir / "profile").touch()
        # a stop at `steps`, and not another train.steps: that would be another schedule
        run = Cluster(tiny_config_file, workdir, n, devices, train__batch_ramp=RAMP, **keys)
        if steps < 24:
            assert run.until(steps), run.output(0)
            run.processes[-1].send_signal(signal.SIGTERM)
        codes = run.wait()
        assert codes == [143 if steps < 24 else 0] * n, (codes, run.output(0), run.output(n - 1))
        assert "mesh: {'data': " in run.output(0) and all("mesh: " not in run.output(i) for i in range(1, n))
        if steps < 24:
            stopped = checkpoint.find_step(workdir)
            assert f"stopped by SIGTERM after step {stopped}, which is saved" in run.output(0)
            assert lines(workdir)[-1]["step"] == stopped < 24
            assert n != 2 or len(checkpoint.steps_in(workdir)) > 1  # of which the clock made all but the last
    same(lines(workdir), quiet)
    (folder,) = (workdir / "tensorboard" / "plugins" / "profile").iterdir()
    first, last = map(int, folder.name.removeprefix("steps_").split("-"))
    assert 15 < first == last - 4 and f"steps {first}-{last} are profiled" in run.output(0)
    for i, file in enumerate(sorted(folder.glob("*.xplane.pb"))):
        host = ProfileData.from_file(str(file)).find_plane_with_name("/host:CPU")
        numbers = [dict(e.stats)["step_num"] for line in host.lines for e in line.events if e.name == "train"]
        assert file.name.startswith(f"{i:04}-") and numbers == [*range(first, last + 1)]
    assert i == 3
    seconds = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert seconds["seconds/restarting"] > 0 and seconds["seconds/down"] > 0 and not seconds["seconds/lost"]


@pytest.mark.parametrize(
    ("who", "which", "how", "words"),
    [
        (0, "child", signal.SIGKILL, "error: process 0 (HOST) was killed by SIGKILL at step "),  # the coordinator
        (1, "child", signal.SIGKILL, "error: process 1 (HOST) was killed by SIGKILL at step "),
        (0, "both", signal.SIGKILL, f"error: process 0 (HOST) has not been heard of for {WAIT} s; it was at step "),  # a host
        (1, "child", signal.SIGSTOP, "error: process 1 (HOST): late, at step "),  # it hangs
    ],
)
def test_when_one_is_gone_the_other_ends_and_says_who(quiet, tiny_config_file, tmp_path, who, which, how, words):
    run = Cluster(tiny_config_file, tmp_path / "run", 2, 4, train__seqs_per_device=1, train__wait=WAIT, train__steps=100_000)
    assert run.until(3), run.output(0)
    child = run.child(who)
    for pid in (child, run.processes[who].pid) if which == "both" else (child,):
        os.kill(pid, how)
    codes = run.wait()  # who has not ended by then is killed, and has another code
    other = 1 - who
    assert codes[other] == supervise.TRY_AGAIN, (codes, run.output(other))
    assert words.replace("HOST", os.uname().nodename) in run.output(other), run.output(other)
    assert how != signal.SIGSTOP or codes[who] == supervise.TRY_AGAIN
    signal_to(child, signal.SIGKILL)


def test_the_same_command_twice_is_refused_and_the_first_goes_on(tiny_config_file, tmp_path):
    keys = {"train__seqs_per_device": 1, "train__wait": WAIT, "train__steps": 100_000}
    first = Cluster(tiny_config_file, tmp_path / "run", 2, 4, **keys)
    assert first.until(3), first.output(0)
    assert (tmp_path / "run" / "lock").is_file()
    (tmp_path / "second").mkdir()
    second = Cluster(tiny_config_file, tmp_path / "run", 2, 4, out=tmp_path / "second", **keys)
    assert second.wait() == [2, 2]
    alone = Cluster(tiny_config_file, tmp_path / "run", 1, 8, out=tmp_path / "second", **keys)
    assert alone.wait() == [2]
    for run, n in ((second, 1), (alone, 0)):
        assert f"error: {tmp_path / 'run'}: another process is training in this folder" in run.output(n), run.output(n)
    assert first.until(first.steps() + 3), first.output(0)
    first.kill()
    first.wait()


def test_who_never_comes_is_named(tiny_config_file, tmp_path):
    run = Cluster(tiny_config_file, tmp_path / "run", 2, 4, train__seqs_per_device=1, train__wait=2)
    run.processes[1].kill()
    assert run.wait()[0] == supervise.TRY_AGAIN
    assert "process 1 of 2 has not come within 2 s" in run.output(0)


def test_a_users_mistake_ends_all_with_2(tiny_config_file, tmp_path):
    run = Cluster(tiny_config_file, tmp_path / "run", 2, 4, train__seqs_per_device=1, model__attention="cudnn")
    assert run.wait() == [2, 2]
    assert all("error: --model.attention=cudnn" in run.output(i) and "Traceback" not in run.output(i) for i in (0, 1))


def test_a_save_may_take_longer_than_the_others_wait(tiny_config_file, tmp_path, monkeypatch):
    """Told to stop by SIGHUP while a slow seal is under way: both wait for it and for their own, and end saved."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]))
    monkeypatch.setenv("CHAOS_SEAL_SECONDS", str(WAIT + 3))
    keys = {"train__seqs_per_device": 1, "train__wait": WAIT, "train__steps": 100_000}
    run = Cluster(tiny_config_file, tmp_path / "run", 2, 4, module="chaos_train", **keys)
    assert run.until(5, 400), run.output(0)
    run.processes[1].send_signal(signal.SIGHUP)
    assert run.wait() == [129, 129], run.output(0) + run.output(1)
    assert f"stopped by SIGHUP after step {checkpoint.find_step(tmp_path / 'run')}, which is saved" in run.output(0)


@contextlib.contextmanager
def watch(config, own, other):
    """What the parent of process 0 of two knows: where both are, and for how many seconds they have not moved."""
    child = subprocess.Popen(["sleep", "60"])
    with tempfile.TemporaryFile() as shared:
        shared.write(cluster.HEARTBEAT.pack(0, 2, own["moves"], 7, own["doing"].encode()))
        shared.flush()
        watch = supervise._Watch(config, child, mmap.mmap(shared.fileno(), cluster.HEARTBEAT.size))
        try:
            watch.look()
            record = watch.own.last | {"process": 1, "moves": other["moves"], "doing": other["doing"], "host": "far"}
            watch.others[0].hear(record)
            watch.own.moved, watch.others[0].moved = (time.monotonic() - side["still"] for side in (own, other))
            yield watch
        finally:
            child.kill()
            child.wait()
            os.close(watch.file)


@pytest.mark.parametrize(
    ("own", "other", "says"),
    [
        (("saving", 5, 900), ("saving", 5, 900), None),  # ten times as patient
        (("training", 6, 900), ("saving", 5, 900), None),
        (("training", 6, 2_000), ("saving", 5, 5), None),  # it writes
        (
            ("training", 6, 1_100),
            ("saving", 5, 1_100),
            "process 1 (far): the save of step 7 has neither read nor",
        ),
        (
            ("saving", 5, 1_100),
            ("saving", 5, 1_100),
            "save of step 7 has neither read nor written for 1000 s; is the",
        ),
        (("saving", 6, 150), ("training", 5, 150), "process 1 (far): late, at step 7 (training) for more than 100 s"),
        (("starting", 5, 500), ("starting", 5, 500), None),
        (("training", 5, 150), ("training", 5, 150), "no process has moved for 100 s"),
    ],
)
def test_how_long_what_is_waited_for(tiny_config_file, tmp_path, own, other, says):
    config = cli.load(["--config", str(tiny_config_file), f"--workdir={tmp_path}", "--train.wait=100"])
    sides = (dict(zip(("doing", "moves", "still"), side, strict=True)) for side in (own, other))
    with watch(config, *sides) as parent:
        verdict = parent.verdict()
    assert verdict is None if says is None else (says in verdict[0] and verdict[1] == supervise.TRY_AGAIN), verdict


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"moves": "many"}', b"[" * 1_000, b"\xff", b" " * 10_000])
def test_what_is_no_record_is_not_there_yet(tmp_path, text):
    (tmp_path / "0.json").write_bytes(text)
    assert supervise._read(tmp_path / "0.json") is None
    os.mkfifo(tmp_path / "1.json")
    assert supervise._read(tmp_path / "1.json") is supervise._read(tmp_path) is supervise._read(tmp_path / "2.json") is None


def test_signals_that_ask_to_stop(monkeypatch):
    """What a scheduler sends first does not make its SIGTERM a second one; what was to be ignored is, as after `nohup`."""
    monkeypatch.setattr(supervise.time, "monotonic", itertools.count(0, 60).__next__)  # a minute between any two
    with cluster.stop_on_signal() as stop:
        timers = signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, *timers, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop == [signal.SIGUSR1]
    for number in timers:
        with cluster.stop_on_signal() as stop:
            os.kill(os.getpid(), number)
            assert stop == [number]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cluster.stop_on_signal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop and signal.SIGHUP not in cluster.caught_signals()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert {128 + number for number in cluster.STOP_SIGNALS} < set(supervise.EXPECTED_EXIT_CODES)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"TINYLLAMA_JAX_JOIN": "1"}, (-1, -1)),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, (3, 4)),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}, (0, 1)),  # within salloc, but not srun
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, (0, 2)),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, (1, 2)),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_PROCESS_ID=None and JAX_NUM_PROCESSES=None; both must be numbers"),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID=2, which must lie",
        ),
    ],
)
def test_what_the_environment_says(monkeypatch, environment, expected):
    for name in list(os.environ):
        if name.startswith(("JAX_COORD", "JAX_NUM", "JAX_PROC", "SLURM_", "OMPI_", "TINYLLAMA_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            cluster.several()
    else:
        assert cluster.identity() == expected and cluster.several() == (expected != (0, 1))
