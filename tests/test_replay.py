"""A spike stops a run, its batch is left out; a step is replayed bit for bit, and a device that errs is named."""

import dataclasses
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from cluster import PATIENCE, Cluster

from tinyllama_jax import replay, train
from tinyllama_jax.base import cli
from tinyllama_jax.base import config as c
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import model
from tinyllama_jax.core.program import build
from tinyllama_jax.data import feed
from tinyllama_jax.run import checkpoint, cluster, seals, spikes

FSDP = {"mesh__fsdp": 8, "train__seqs_per_device": 1, "log__eval_every": 100}


def command(config_file, workdir, **keys):
    return ["--config", str(config_file), f"--workdir={workdir}", *(f"--{k.replace('__', '.')}={v}" for k, v in keys.items())]


def curve(run):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: x for x in lines if "loss" in x}


def blocks_of(config, step):
    """(source, block) of each sequence of a step."""
    source, block = feed.order(config, feed.open_sources(config)).at(step)
    return list(zip(source.tolist(), block.tolist(), strict=True))


def said(text, module):
    """The arguments of the one command of a module that a text has."""
    (line,) = [x for x in text.splitlines() if f"-m tinyllama_jax.{module} " in x]
    return shlex.split(line)[3:]


# -- the guard ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def garbage(monkeypatch, tiny_config_file):
    """Makes the blocks of step 15 bytes that no text has, wherever they are read; what step 15 has without any skip."""
    bad, gather, config = [], feed.gather, cli.read(str(tiny_config_file))

    def damaged(sources, source, block):
        read = gather(sources, source, block)
        for i, key in enumerate(zip(source.tolist(), block.tolist(), strict=True)):
            if key in bad:
                read.tokens[i] = np.random.default_rng(key).integers(131, 259, read.tokens.shape[1])
        return read

    monkeypatch.setattr(feed, "gather", damaged)
    bad += blocks_of(config, 15)
    return bad


@pytest.mark.parametrize(("every", "resumed"), [(1, False), (4, False), (1, True)])  # of log.every; and stopped after step 12
def test_a_spike_stops_the_run_with_the_command_that_leaves_it_out(garbage, tiny_config_file, tmp_path, every, resumed):
    keys = FSDP | {"train__spike": 1, "log__every": every, "data__skip": "3:3", "checkpoint__every": 7}
    if resumed:  # what was seen before the restart counts
        train.main(command(tiny_config_file, tmp_path / "run", **keys | {"train__steps": 12}))
    with pytest.raises(spikes.Spike, match="step 14: loss .* nats above the mean of the 13 finite steps before it") as error:
        train.main(command(tiny_config_file, tmp_path / "run", **keys))
    steps = checkpoint.steps_in(tmp_path / "run")
    assert steps == ([7, 12] if resumed else [7])  # 14 was due
    last = curve(tmp_path / "run")[14]
    assert last["finite"] and sorted(zip(*json.loads(last["blocks"]), strict=True)) == sorted(garbage)
    assert said(str(error.value), "replay") == ["--run", str(tmp_path / "run"), "--step", "14"]
    again = said(str(error.value), "train")
    assert again[-1] == "--data.skip=3:3,14:14" and sum("data.skip" in word for word in again) == 1
    assert train.main(again) == 0  # from the checkpoint before, and to the end
    config = cli.override(cli.read(str(tiny_config_file)), {"data.skip": "3:3,14:14"})
    seen = curve(tmp_path / "run")
    assert max(seen) == 24 and not {key for step in range(1, 25) for key in blocks_of(config, step)} & set(garbage)
    assert max(x["loss"] for step, x in seen.items() if step > 7) < last["loss"] - 0.8


def test_without_the_option_nothing_stops_it(garbage, tiny_config_file, tmp_path):
    assert train.main(command(tiny_config_file, tmp_path / "run", **FSDP)) == 0


def test_of_several_processes_all_stop_and_one_says_why(tiny_config_file, tmp_path):
    keys = FSDP | {"train__spike": 1, "checkpoint__every": 1, "checkpoint__keep": 30}
    train.main(command(tiny_config_file, tmp_path / "run", **keys | {"train__steps": 12}))
    run = Cluster(tiny_config_file, tmp_path / "run", 2, 4, **keys | {"optim__peak_lr": 30, "optim__min_lr": 30})
    assert run.wait() == [cluster.EXIT_SPIKE] * 2, (run.output(0), run.output(1))
    assert ["error: step " in run.output(i) for i in (0, 1)] == [True, False], run.output(1)
    assert "-m tinyllama_jax.replay" in run.output(0)
    spike = max(curve(tmp_path / "run"))
    assert checkpoint.steps_in(tmp_path / "run") == list(range(1, spike))


def test_the_earlier_skip_is_kept_and_said_once():
    data = c.Data({"a": 1}, skip="3:4,9:9")
    given = ["--data.skip", "3:4", "--config=x", "--data.skip=3:4,9:9", "--workdir", "data.skip"]
    assert cli.skipping(given, data, 7, 8) == ["--config=x", "--workdir", "data.skip", "--data.skip=3:4,9:9,7:8"]
    assert cli.skipping([], c.Data({"a": 1}), 7, 8) == ["--data.skip=7:8"]


# -- replay ---------------------------------------------------------------------------------------------------------------

CUBE = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "train__seqs_per_device": 1, "log__eval_every": 100}


@pytest.fixture(scope="module")
def cube(tiny_config_file, tmp_path_factory):
    """A run on 2 x 2 x 2 devices with two micro-batches a step, its batches of step 3 left out."""
    run = tmp_path_factory.mktemp("replay") / "run"
    keys = CUBE | {"data__skip": "3:3", "train__steps": 24, "checkpoint__keep": 30}
    assert train.main(command(tiny_config_file, run, **keys)) == 0
    return run


def again(run, step, *more):
    return replay.main(["--run", str(run), "--step", str(step), *more])


def contents(run):
    return {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in sorted(run.rglob("*")) if f.is_file()}


@pytest.mark.parametrize(("number", "base"), [(4, 0), (6, 5), (18, 15), (20, 15)])  # at 20 the checkpoint is compared too
def test_the_same_bits_and_nothing_is_written(cube, capsys, number, base):
    before = contents(cube)
    assert again(cube, number) == 0
    out = capsys.readouterr().out
    assert f"all equal, bit for bit: loss, grad_norm, checksum of {number - base} recorded steps" in out
    assert f"steps {base + 1} to {number} again" in out and contents(cube) == before


def test_a_run_of_two_processes_in_two_processes(tiny_config_file, tmp_path):
    run = Cluster(tiny_config_file, tmp_path / "run", 2, 2, train__seqs_per_device=2, train__steps=7)
    assert run.wait() == [0, 0], run.output(0)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    argv = [sys.executable, "-m", "tinyllama_jax.replay", "--run", str(tmp_path / "run"), "--step", "7"]
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]  # as `Cluster` has them
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join([*flags, "--xla_force_host_platform_device_count=2"])}
    env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    started = [subprocess.Popen(argv, env=env | {"JAX_PROCESS_ID": str(i)}, stdout=-1, stderr=-2, text=True) for i in (0, 1)]
    out = [process.communicate(timeout=PATIENCE)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], out
    assert "all equal" in out[0] and "documents of step 7" in out[0] and "equal" not in out[1]


def rewrite(run, number, **values):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [row | values if row["step"] == number and "loss" in row else row for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_line_that_was_tampered_with(cube, tmp_path, capsys):
    run = shutil.copytree(cube, tmp_path / "run")
    name, was = "loss", curve(run)[17]["loss"]
    wrong = float(np.nextafter(np.float32(was), np.float32(9)))  # the last bit
    rewrite(run, 17, loss=wrong)
    assert again(run, 18) == 1
    out = capsys.readouterr().out
    assert f"step 17: {name} recorded {wrong!r}, replayed {was!r}\n" in out and out.count(" recorded ") == 1
    assert "agrees with itself" in out and "with the run's checkpoint of step 20, bit for bit" in out
    assert again(run, 20, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["differences"] == [{"step": 17, "name": name, "recorded": wrong, "replayed": was}]


def test_each_number_is_compared_to_the_bit():
    line = {"loss": 0.1, "grad_norm": None, "checksum": 7, "lr": 1}
    assert replay.differing(3, line, {"loss": 0.1, "grad_norm": None, "checksum": 7}) == []
    assert replay.differing(3, None, {"loss": 0.2, "grad_norm": 1.0, "checksum": 8}) == []  # log.every
    found = replay.differing(3, line, {"loss": 0.1 + 2**-56, "grad_norm": 1.0, "checksum": 8})
    assert [(d["name"], d["recorded"]) for d in found] == [("loss", 0.1), ("grad_norm", None), ("checksum", 7)]


def test_on_another_mesh_it_says_what_can_be_rounding(cube, tmp_path, capsys):
    """As if another mesh had rounded differently at step 17; not every processor does."""
    run = shutil.copytree(cube, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] == 17 and "loss" in line:
            line["loss"] = float(np.nextafter(np.float32(line["loss"]), np.float32(9)))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert again(run, 18, "--mesh.data=1", "--mesh.fsdp=8", "--mesh.tensor=1") == 1
    out = capsys.readouterr().out
    assert "the recorded run differed: a fault then, another mesh" in out and "checksum recorded" not in out
    assert "the step is not the one that trained from step 1 on: settings, devices, versions or code changed" in out


# -- a device that errs ---------------------------------------------------------------------------------------------------

NAME = "layers/down/kernel"


def flip(state, device):
    """`state` with one bit of what one device holds of one parameter turned over."""
    flat = model.flatten(state.params)
    parts = [np.array(shard.data) for shard in flat[NAME].addressable_shards]
    on = [shard.device for shard in flat[NAME].addressable_shards]
    parts[[d.id for d in on].index(device)].view(np.uint32).flat[7] ^= 1 << 21
    parts = [jax.device_put(part, d) for part, d in zip(parts, on, strict=True)]
    flat[NAME] = jax.make_array_from_single_device_arrays(flat[NAME].shape, flat[NAME].sharding, parts)
    return state.replace(params=model.unflatten(flat))


def err(monkeypatch, where, at, device):
    """Makes `device` err after step `at`, the first time that the program built in module `where` comes there."""
    left = [1]

    def erring(config, mesh, loss):
        program = build(config, mesh, loss)

        def trained(state, batch):
            state, now = program.train(state, batch)
            if int(state.step) == at and left[0]:
                left[0] -= 1
                state = flip(state, device)
            return state, now

        def lower(*shapes):
            lowered = program.train.lower(*shapes)
            compiled = lowered.compile()
            trained.as_text, trained.memory_analysis = compiled.as_text, compiled.memory_analysis
            return SimpleNamespace(as_text=lowered.as_text, compile=lambda: trained)

        trained.lower = lower
        return program._replace(train=trained)

    monkeypatch.setattr(where, "build", erring)


def test_a_device_that_errs_now_is_named(tiny_config_file, tmp_path, monkeypatch, capsys):
    assert train.main(command(tiny_config_file, tmp_path / "run", **FSDP, train__steps=20)) == 0
    err(monkeypatch, replay, 17, device=5)
    capsys.readouterr()
    assert again(tmp_path / "run", 18) == 1
    out = capsys.readouterr().out
    assert "step 18: loss recorded" in out
    assert f"this machine does not agree with itself: step 17, device 5 (process 0), params/{NAME}\n" in out


def test_replicas_that_err_now_are_named(cube, monkeypatch, capsys):
    err(monkeypatch, replay, 18, device=6)
    assert again(cube, 18) == 1  # whose numbers were out before
    out = capsys.readouterr().out
    assert f"step 18: params/{NAME} on devices 2 (process 0), 6 (process 0) differs from its replicas" in out
    assert f"does not agree with itself: step 18, device 6 (process 0), params/{NAME}\n" in out


def test_a_minority_of_three_is_one_device(tiny_config_file, tmp_path):
    config = cli.override(cli.read(str(tiny_config_file)), {"mesh.data": "4", "mesh.fsdp": "2", "train.seqs_per_device": "1"})
    mesh = replay.sharding.make_mesh(config.mesh)
    program = build(config, mesh)
    state = flip(program.init(), 3)
    run = replay.Run(tmp_path, config, [], {}, mesh, program, replay.checksums(program, mesh), 0)
    assert replay.replicas_apart(run, np.asarray(run.checksums(program.init()))) is None
    assert replay.replicas_apart(run, np.asarray(run.checksums(state))) == (f"params/{NAME}", "device 3 (process 0)")


@pytest.mark.parametrize("every", [17, 10])  # of checkpoint.every: one right after the fault, or only later
def test_a_device_that_erred_in_the_run(tiny_config_file, tmp_path, monkeypatch, capsys, every):
    with monkeypatch.context() as patch:
        err(patch, train, 17, device=5)
        assert train.main(command(tiny_config_file, tmp_path / "run", **FSDP, checkpoint__every=every)) == 0
    capsys.readouterr()
    assert again(tmp_path / "run", 17 if every == 17 else 19) == 1
    out = capsys.readouterr().out
    assert "this machine agrees with itself: three executions gave the same bits" in out and "the recorded run differed" in out
    assert ") is the one that trained from step 1 on" in out  # not the compiler
    if every == 17:
        assert f"step 17: params/{NAME} on device 5 (process 0) differs from the run's checkpoint" in out
    else:
        assert "step 18: loss recorded" in out and "step 20: params/" in out and "differs from the run's checkpoint" in out


# -- documents, and without them ------------------------------------------------------------------------------------------


def test_the_documents_losses_are_the_steps_loss(tiny_config_file, tiny_data, tmp_path, capsys):
    keys = CUBE | {"data__sources": f"{tiny_data / 'a'}:0.5,{tiny_data / 'one'}:0.5", "train__steps": 7}
    assert train.main(command(tiny_config_file, tmp_path / "run", **keys)) == 0
    capsys.readouterr()
    assert again(tmp_path / "run", 7, "--json", "--top", "1000") == 0
    out = json.loads(capsys.readouterr().out)
    documents, line = out["documents"], curve(tmp_path / "run")[7]
    assert sum(d["tokens"] for d in documents) == line["real_tokens"] < 8 * 16  # the source "one" is mostly padding
    total = sum(d["tokens"] * d["loss"] for d in documents)
    assert total / line["real_tokens"] == pytest.approx(line["loss"], rel=1e-6)
    assert [d["loss"] for d in documents] == sorted((d["loss"] for d in documents), reverse=True)
    assert {(d["source"], d["block"]) for d in documents if d["source"].endswith("one")} == {(str(tiny_data / "one"), 0)}
    assert any(d["text"] == "x = 1" and d["tokens"] < 16 for d in documents)


def test_where_documents_begin_and_end():
    bos, eos = 1, 2
    spans = lambda tokens: replay.spans(np.array(tokens), bos, eos)
    assert spans([5, 6, 7]) == [(0, 3)]
    assert spans([5, 2, 6, 2]) == [(0, 2), (2, 4)]
    assert spans([5, 2, 1, 6, 2, 1]) == [(0, 2), (2, 5), (5, 6)]  # eos and bos between two are one edge
    assert spans([1, 5, 1, 6]) == [(0, 2), (2, 4)]


def test_a_text_stays_on_its_line():
    assert replay.one_line("a\n\x1b[2J\u202eé漢") == "a\\n\\x1b[2J\\u202eé漢"
    assert len(replay.one_line("x" * 100)) == 80


def test_the_command_to_skip_works_and_the_steps_can_be_replayed(cube, tiny_config_file, tmp_path, capsys):
    run = shutil.copytree(cube, tmp_path / "run")
    out_of = set(blocks_of(cli.override(cli.read(str(tiny_config_file)), {"data.skip": "3:3"}), 18))
    assert again(run, 18) == 0
    arguments = said(capsys.readouterr().out, "train")
    assert arguments[-1] == "--data.skip=3:3,18:18"
    assert train.main(arguments) == 0
    assert "weights: step 15 of" in capsys.readouterr().out and sorted(curve(run)) == list(range(1, 25))
    config = checkpoint.load_config(run)
    assert not {key for number in range(1, 25) for key in blocks_of(config, number)} & out_of
    for number in (12, 18, 23):  # before, at and after: the seals before it say another skip
        assert again(run, number) == 0
    assert again(run, 2) == 0  # no checkpoint is from before it
    arguments = said(capsys.readouterr().out.rpartition("again,")[2], "train")
    assert f"--workdir={run}-without-2" in arguments and arguments[-1] == "--data.skip=3:3,18:18,2:2"


def test_a_damaged_checkpoint_is_not_begun_with(cube, tmp_path, capsys):
    run = shutil.copytree(cube, tmp_path / "run")
    (run / "checkpoints" / "15" / seals.SEAL).unlink()
    assert again(run, 16) == 0 and "from its checkpoint of step 10" in capsys.readouterr().out


def test_mistakes(cube, tmp_path, monkeypatch):
    shutil.copytree(cube, tmp_path / "import", ignore=shutil.ignore_patterns("data.json"))
    shutil.copytree(cube, tmp_path / "gone on")
    kept = [x for x in (tmp_path / "gone on/metrics.jsonl").read_text().splitlines(True) if json.loads(x)["step"] > 4]
    (tmp_path / "gone on/metrics.jsonl").write_text("".join(kept))
    for run, number, more, words in [
        (cube, 0, (), "--step 0: the run's steps are 1 to 24"),
        (cube, 25, (), "--step 25: the run's steps are 1 to 24"),
        (tmp_path / "nowhere", 3, (), "nowhere: is not a run folder"),
        (tmp_path / "import", 3, (), "it has no steps to replay"),
        (tmp_path / "gone on", 4, (), "--step 4: is not in .*metrics.jsonl, whose nearest steps are 5, 6"),
        (tmp_path / "gone on", 5, (), "--step 5: .* has no whole checkpoint before it"),
        (cube, 3, ("--data.skip=1:1",), "--data.skip=1:1: may not change"),
        (cube, 3, ("--model.d_ff=1",), "--model.d_ff=1: may not change"),
        (cube, 3, ("--mesh.date=1",), "did you mean --mesh.data"),
        (cube, 3, ("--mesh.data=3",), "devices, and 8 are here"),
    ]:
        with pytest.raises(UserError, match=words):
            again(run, number, *more)
    four = jax.devices()[:4]
    monkeypatch.setattr(jax, "devices", lambda: four)
    with pytest.raises(UserError, match="ran on 8 x cpu, and here are 4"):
        replay.mesh_of(cube, checkpoint.load_config(cube), {})


def test_a_working_copy_is_resumed_in_its_bucket(tiny_config_file, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = dataclasses.replace(cli.read(str(tiny_config_file)), workdir="s3://bucket/run")
    for folder, place in ((config.folder, "s3://bucket/run"), (tmp_path / "copy", tmp_path / "copy")):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(c.to_json(config))
        run = replay.Run(folder, config, [], {}, None, None, None, 0)
        assert f" --workdir={place} --data.skip=3:3" in replay.how_to_skip(run, 3, {})
