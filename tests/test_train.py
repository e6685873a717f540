"""The loop as a person runs it: killed, resumed, moved to another mesh, started from other weights, given bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cluster import PATIENCE
from jax.profiler import ProfileData

from tinyllama_jax import replay, train
from tinyllama_jax.base import cli
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.data.export import litpkds as export_litpkds
from tinyllama_jax.data.prepare.pipeline import prepare
from tinyllama_jax.inference import weights
from tinyllama_jax.inference.engine import Engine, Request
from tinyllama_jax.inference.sampling import Sampling
from tinyllama_jax.inference.text import first_tokens
from tinyllama_jax.run import checkpoint, goodput, spikes

EXACT = ("loss", "grad_norm", "checksum", "lr", "accuracy", "tokens")


def command(config_file, workdir, **keys):
    return ["--config", str(config_file), f"--workdir={workdir}", *(f"--{k.replace('__', '.')}={v}" for k, v in keys.items())]


def start(config_file, workdir, **keys):
    """A real process on one device."""
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    argv = [sys.executable, "-W", "error", "-m", "tinyllama_jax.train", *command(config_file, workdir, **keys)]
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def curve(workdir):
    """(lines of training steps, lines of validation) of metrics.jsonl, without what a clock says."""
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in x.items() if k not in ("time", "goodput") and not k.startswith("seconds/")} for x in lines]
    return [x for x in lines if "loss" in x], [x for x in lines if "val_loss" in x]


def exact(lines):
    return [[x["step"], *(x[name] for name in EXACT)] for x in lines]


@pytest.fixture(scope="module")
def quiet(tiny_config_file, tmp_path_factory):
    """An uninterrupted run in a process of its own: its folder and what it printed."""
    workdir = tmp_path_factory.mktemp("quiet") / "run"
    process = start(tiny_config_file, workdir, log__profile="5:7")
    out = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, out
    return workdir, out


def last_line(workdir):
    return json.loads((Path(workdir) / "metrics.jsonl").read_text().splitlines()[-1])


def test_steps_are_profiled_as_xprof_reads_them(quiet):
    workdir, out = quiet
    folder = workdir / "tensorboard" / "plugins" / "profile" / "steps_5-7"
    assert f"steps 5-7 are profiled: pip install xprof; tensorboard --logdir {workdir / 'tensorboard'}\n" in out
    (file,) = folder.glob("*.xplane.pb")
    events = [e for plane in ProfileData.from_file(str(file)).planes for line in plane.lines for e in line.events]
    steps = [dict(event.stats) for event in events if event.name == "train"]
    assert [step["step_num"] for step in steps] == [5, 6, 7] and all(step["_r"] == 1 for step in steps)  # roots of a step
    assert sum(event.name == "data_wait" for event in events) == 3 and any("fusion" in event.name for event in events)
    assert not list(workdir.glob(".profile*"))


def test_the_parts_of_a_runs_time_are_the_time_that_it_took(quiet):
    rows = [json.loads(line) for line in (quiet[0] / "metrics.jsonl").read_text().splitlines()]
    first, parts = goodput.seconds(rows[0]), goodput.seconds(rows[-1])
    assert sum(parts.values()) - sum(first.values()) == pytest.approx(rows[-1]["time"] - rows[0]["time"], abs=0.1)
    assert {part for part, seconds in parts.items() if not seconds} == {"restarting", "lost", "down"}
    assert rows[-1]["goodput"] == pytest.approx(parts["productive"] / sum(parts.values()), abs=1e-3)
    assert "memory_peak_gib" not in rows[-1]  # a CPU does not tell


def test_a_run_writes_what_it_should(quiet, tiny_config_file):
    workdir, out = quiet
    config = cli.read(str(tiny_config_file))
    steps, validations = curve(workdir)
    assert [x["step"] for x in steps] == list(range(1, config.train.steps + 1))
    assert [x["step"] for x in validations] == [10, 20, 24]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5 and validations[-1]["val_loss"] < validations[0]["val_loss"]
    assert {"grad_norm", "lr", "tokens", "tokens_per_second", "data_wait_seconds", "checksum", "tflops_per_device_palm"} <= set(
        steps[0]
    )
    last = validations[-1]
    assert last["val_perplexity"] == pytest.approx(np.exp(last["val_loss"])) and 0 < last["val_accuracy"] < 1
    a, b = (last[f"val_loss/{Path(p).name}"] for p in config.data.sources)
    blocks = [Blocks(p, "validation") for p in config.data.sources]
    n = [(x.read(np.arange(len(x)))[1] - 1).sum() for x in blocks]
    assert n[0] != n[1] and sum(n) == last["val_tokens"]
    assert last["val_loss"] == pytest.approx((a * n[0] + b * n[1]) / sum(n), rel=1e-6)  # of tokens, not of sources
    assert steps[-1]["tokens"] == config.train.steps * config.train.tokens_per_step
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [15, 20, 24]  # every 5, 3 kept, the last always
    assert list((workdir / "tensorboard").iterdir())
    for words in (
        "attention: xla (no kernel for float32",
        "from scratch",
        "1 micro-batches",
        "validation loss",
        "step 24/24",
    ):
        assert words in out, out


def test_killed_at_any_moment_it_goes_on_to_the_same_bits(quiet, tiny_config_file, tmp_path):
    workdir, rng = tmp_path / "run", np.random.default_rng(0)
    kills, begun = 0, time.time()
    for kill_at in (2, 7, 13, 19):
        process = start(tiny_config_file, workdir)
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            steps = curve_so_far(workdir)
            if steps and steps[-1] >= kill_at:
                time.sleep(rng.uniform(0, 0.05))
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        process.communicate()
    assert kills >= 3
    process = start(tiny_config_file, workdir)
    out = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, out
    assert f"of {workdir}" in out  # "weights: step N of RUN"
    (steps, validations), (quiet_steps, quiet_validations) = curve(workdir), curve(quiet[0])
    assert exact(steps) == exact(quiet_steps)
    assert validations == quiet_validations
    starts = events(workdir)
    assert [event for event, _, _ in starts] == ["start"] * (kills + 1) + ["end"] and starts[0][2] == "from step 0"
    last, first = last_line(workdir), json.loads((workdir / "events.jsonl").read_text().partition("\n")[0])
    parts = goodput.seconds(last)
    assert last["time"] - first["time"] < sum(parts.values()) < last["time"] - begun and min(parts.values()) > 0
    assert any(f"from step {step}; the steps up to" in text for _, step, text in starts[1:-1])
    ours, theirs = (checkpoint.load_params(w)[0] for w in (workdir, quiet[0]))
    for name in ("q", "down"):
        np.testing.assert_array_equal(ours["layers"][name]["kernel"], theirs["layers"][name]["kernel"])


def curve_so_far(workdir):
    path = Path(workdir) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line)["step"] for line in text.splitlines(keepends=True) if line.endswith("\n")]


def events(workdir):
    lines = map(json.loads, (Path(workdir) / "events.jsonl").read_text().splitlines())
    return [(line["event"], line["step"], line["text"]) for line in lines]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGALRM, 142)]
)
def test_a_signal_saves_and_ends(quiet, tiny_config_file, tmp_path, number, code):
    # the schedule of the quiet run, and far more steps, so that no load makes the signal come too late
    more = {"checkpoint__every": 100_000, "train__steps": 100_000, "optim__decay_steps": 24}
    process = start(tiny_config_file, tmp_path / "run", **more)
    while process.poll() is None and not [s for s in curve_so_far(tmp_path / "run") if s >= 3]:
        time.sleep(0.002)
    process.send_signal(number)
    out = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 128 + number and "which is saved" in out, out
    step = checkpoint.find_step(tmp_path / "run")
    assert step >= 3 and f"after step {step}" in out
    steps, _ = curve(tmp_path / "run")
    known = exact(curve(quiet[0])[0])[:step]
    assert exact(steps)[: len(known)] == known
    _, stop, end = events(tmp_path / "run")
    assert stop[:2] == ("stop", step) and stop[2] in out and end == ("end", step, f"after step {step}")


def test_it_also_saves_by_the_clock_and_a_save_that_does_not_fit_in_the_grace_is_not_begun(tiny_config_file, tmp_path):
    run, often = tmp_path / "run", 1e-4  # minutes
    more = {"checkpoint__every": 100_000, "train__steps": 100_000, "checkpoint__minutes": often, "checkpoint__grace": 1e-4}
    process = start(tiny_config_file, run, **more)
    while process.poll() is None and not ((run / "checkpoints").is_dir() and len(checkpoint.steps_in(run)) > 1):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 128 + signal.SIGTERM, out
    end = re.search(
        r"after step ([\d,]+), which is not saved: that takes .* --checkpoint.grace=0.0001; .* from step ([\d,]+)", out
    )
    stopped, saved = (int(n.replace(",", "")) for n in end.groups())
    assert checkpoint.steps_in(run)[-1] == saved < stopped and not [*(run / "checkpoints").glob("*.partial")]


def test_when_nobody_reads_the_output_it_saves_and_ends(tiny_config_file, tmp_path):
    """As `train | head` does."""
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    argv = [sys.executable, "-W", "error", "-m", "tinyllama_jax.train", *command(tiny_config_file, tmp_path / "run")]
    argv += ["--train.steps=100_000", "--checkpoint.every=100_000"]
    process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("model: ")
    while process.poll() is None and not [s for s in curve_so_far(tmp_path / "run") if s >= 3]:  # "started in" is printed
        time.sleep(0.002)
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(120) == 128 + signal.SIGPIPE, error
    step = checkpoint.find_step(tmp_path / "run")
    assert error.splitlines() == [
        "standard output cannot be written: nobody reads the output any more",
        f"stopped by a failed standard output after step {step}, which is saved; the same command resumes",
    ]


def test_an_output_that_fails_before_the_first_step_is_named(tiny_config_file, tmp_path):
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    argv = [sys.executable, "-W", "error", "-m", "tinyllama_jax.train", *command(tiny_config_file, tmp_path / "run")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(argv, env=env, stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert done.stderr.splitlines() == [
        "standard output cannot be written: the disk is full; free some room and run the same command again",
        "stopped by a failed standard output before its first step",
    ]
    assert done.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    "keys",
    [
        {"mesh__fsdp": 8, "train__seqs_per_device": 1},
        {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "train__seqs_per_device": 1},
        {"mesh__data": 4, "mesh__fsdp": 1, "mesh__tensor": 2, "train__seqs_per_device": 1},  # two micro-batches
    ],
    ids=str,
)
def test_on_another_mesh_the_same_tokens_and_the_same_loss(quiet, tiny_config_file, tmp_path, keys):
    assert train.main(command(tiny_config_file, tmp_path / "run", train__steps=24, **keys)) == 0
    steps, validations = curve(tmp_path / "run")
    quiet_steps, quiet_validations = curve(quiet[0])
    assert [x["checksum"] for x in steps] == [x["checksum"] for x in quiet_steps]
    np.testing.assert_allclose([x["loss"] for x in steps], [x["loss"] for x in quiet_steps], rtol=2e-4)
    np.testing.assert_allclose(validations[-1]["val_loss"], quiet_validations[-1]["val_loss"], rtol=2e-4)


def test_a_text_is_continued_after_each_validation(tiny_config_file, tmp_path, capsys):
    """On a mesh, and as the checkpoint continues it afterwards."""
    keys = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "train__seqs_per_device": 1}
    argv = command(tiny_config_file, tmp_path / "run", train__steps=12, log__sample="x = 1", **keys)
    assert train.main(argv) == 0
    printed = capsys.readouterr().out
    assert "step 10: x = 1" in printed
    loaded = weights.load(tmp_path / "run")
    prompt = first_tokens(loaded.tokenizer, loaded.begin_with_bos, "x = 1")
    request = Request(prompt, 64, Sampling(0.8), seed=12, stop_ids=(loaded.tokenizer.eos_id,))
    assert list(Engine(loaded).stream(request))
    text = loaded.tokenizer.decode(prompt + request.tokens)
    assert f"step 12: {text}\n" in printed
    start, *samples, end = events(tmp_path / "run")
    assert [s[:2] for s in samples] == [("sample", 10), ("sample", 12)] and samples[-1][2] == text
    assert (start, end) == (("start", 0, "from step 0"), ("end", 12, "after step 12"))


def test_a_second_run_in_the_same_folder_is_refused(tiny_config_file, tmp_path):
    first = start(tiny_config_file, tmp_path / "run", train__steps=100_000)
    while first.poll() is None and not curve_so_far(tmp_path / "run"):
        time.sleep(0.01)
    second = start(tiny_config_file, tmp_path / "run", train__steps=100_000)
    out = second.communicate(timeout=PATIENCE)[0]
    assert second.returncode == 2 and "another process is training in this folder" in out, out
    assert first.poll() is None
    first.kill()
    first.communicate()
    third = start(tiny_config_file, tmp_path / "run", train__steps=100_000)
    steps = curve_so_far(tmp_path / "run")[-1]
    while third.poll() is None and curve_so_far(tmp_path / "run")[-1] <= steps:
        time.sleep(0.01)
    assert third.poll() is None
    third.kill()
    third.communicate()


def test_a_finished_run_has_nothing_to_do(quiet, tiny_config_file, capsys):
    before = [(quiet[0] / name).read_text() for name in ("metrics.jsonl", "config.json")]
    keys = {"mesh__fsdp": 8, "train__seqs_per_device": 1, "train__z_loss": 0.1}
    assert train.main(command(tiny_config_file, quiet[0], **keys)) == 0
    assert [(quiet[0] / name).read_text() for name in ("metrics.jsonl", "config.json")] == before  # what trained it, not this
    said = capsys.readouterr().out
    assert "nothing to do" in said and "changed since this run was last started: train.z_loss from 0.0 to 0.1" in said


def test_start_from_another_run(quiet, tiny_config_file, tmp_path, capsys):
    keys = {"init__from": quiet[0], "train__steps": 2, "optim__warmup_steps": 1, "mesh__fsdp": 8, "train__seqs_per_device": 1}
    assert train.main(command(tiny_config_file, tmp_path / "run", **keys)) == 0
    out = capsys.readouterr().out
    assert f"weights: step 24 of {quiet[0]}, weights only" in out
    assert re.search(r"weights \d+\.\d s, scores \d+\.\d s, compilation and first step \d+\.\d s\n", out)  # scored before
    steps, _ = curve(tmp_path / "run")
    # the same first batch: the trained weights do better on it than the fresh ones did
    assert steps[0]["checksum"] == curve(quiet[0])[0][0]["checksum"]
    assert steps[0]["loss"] < curve(quiet[0])[0][0]["loss"] - 0.5
    assert steps[0]["step"] == 1 and steps[0]["lr"] > steps[1]["lr"]  # a new schedule
    # now that the run has a checkpoint of its own, that comes first
    keys |= {"train__steps": 3}
    assert train.main(command(tiny_config_file, tmp_path / "run", **keys)) == 0
    assert f"weights: step 2 of {tmp_path / 'run'}" in capsys.readouterr().out


def test_without_a_validation_split_it_trains_and_says_so(tiny_config_file, tiny_data, tmp_path, capsys):
    data = tmp_path / "data"
    files, tokenizer = [tiny_data / "a.train.jsonl"], tiny_data / "512.model"
    prepare(train=files, held_out=0, tokenizer=tokenizer, output=data, seq_len=16, workers=1)
    keys = {"data__sources": data, "train__steps": 2, "optim__warmup_steps": 1, "mesh__fsdp": 8, "train__seqs_per_device": 1}
    assert train.main(command(tiny_config_file, tmp_path / "run", **keys)) == 0
    assert "validation: none: no source has that split" in capsys.readouterr().out
    assert [len(part) for part in curve(tmp_path / "run")] == [2, 0]


def test_a_missing_file_of_the_originals_is_said(tiny_config_file, tiny_data, tmp_path, capsys):
    export_litpkds.export(tiny_data / "a", "train", tmp_path, "train_a", 10 * 17)
    (tmp_path / "train_a_0000000001.bin").unlink()
    source = tmp_path / "train_a"
    keys = {"data__sources": source, "train__steps": 2, "optim__warmup_steps": 1, "mesh__fsdp": 8, "train__seqs_per_device": 1}
    assert train.main(command(tiny_config_file, tmp_path / "run", **keys)) == 0
    assert f"warning: {source}: 1 files are missing, such as train_a_0000000001.bin" in capsys.readouterr().out


def test_a_longer_context_from_the_same_weights_is_said(quiet, tiny_config_file, tmp_path, capsys):
    keys = {"init__from": quiet[0], "model__rope_scaling": 4, "train__steps": 1, "optim__warmup_steps": 1}
    keys |= {"mesh__fsdp": 8, "train__seqs_per_device": 1}
    assert train.main(command(tiny_config_file, tmp_path / "run", **keys)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"{quiet[0]} was trained with model.rope_scaling=1.0; here it is 4.0" in out


@pytest.mark.parametrize("delay", [0.3, 1.5, 3.0])
def test_a_signal_while_it_starts_is_not_lost(tiny_config_file, tmp_path, delay):
    process = start(tiny_config_file, tmp_path / "run", train__steps=100_000)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode in (130, -signal.SIGINT), out  # the latter: before main, while Python still imports
    assert "Traceback" not in out and (process.returncode != 130 or "stopped by SIGINT" in out), out


@pytest.fixture
def bad_weights(quiet, tmp_path):
    """A run folder whose weights give losses that are not finite."""
    params, config, _ = checkpoint.load_params(quiet[0])
    params["lm_head"]["kernel"][0, 0] = np.inf
    checkpoint.save_import(tmp_path / "bad", config, params)
    shutil.copytree(quiet[0] / "tokenizer", tmp_path / "bad" / "tokenizer")
    return tmp_path / "bad", params


EIGHT = {"mesh__fsdp": 8, "train__seqs_per_device": 1, "optim__warmup_steps": 1}


def test_a_run_that_only_skips_gives_up_also_over_a_restart(bad_weights, tiny_config_file, tmp_path, capsys):
    """By its last step, where it can no longer learn, or after `train.give_up` steps, whatever was restarted in between."""
    keys = EIGHT | {"init__from": bad_weights[0], "train__steps": 3, "log__every": 10}
    for _ in range(2):  # the second time there is nothing to do: it is as bad as it was
        assert train.main(command(tiny_config_file, tmp_path / "run", **keys)) == 3
        out = capsys.readouterr().out
        assert "error: since step 1 all 3 steps, up to 3, were skipped as not finite (the run ends there)" in out
        assert "--data.skip=1:3" in out
    keys |= {"train__steps": 9, "train__give_up": 5}
    with pytest.raises(UserError, match=r"since step 1 all 5 steps, up to 5, were skipped .*\(train.give_up=5\)") as error:
        train.main(command(tiny_config_file, tmp_path / "run", **keys))
    ended = next(text for _, step, text in events(tmp_path / "run") if step == 5)
    assert ended.startswith("Spike: since step 1 all 5 steps")
    assert error.value.code == 3 and checkpoint.steps_in(tmp_path / "run") == [3]


def test_what_is_saved_is_logged_and_the_losses_before_it_are_remembered(quiet, tiny_config_file, tmp_path):
    keys = {"mesh__fsdp": 8, "train__seqs_per_device": 1, "log__every": 10, "checkpoint__every": 7}
    run = tmp_path / "run"
    assert train.main(command(tiny_config_file, run, **keys)) == 0
    steps, _ = curve(run)
    assert [x["step"] for x in steps] == [7, 10, 14, 20, 21, 24]
    whole = {x["step"]: x for x in curve(quiet[0])[0]}
    before = 0
    for x in steps:  # shares are of the steps since the line before, however many
        shares = [whole[step]["share/a"] for step in range(before + 1, x["step"] + 1)]
        assert x["share/a"] == pytest.approx(np.mean(shares)) and x["tokens"] == whole[x["step"]]["tokens"]
        before = x["step"]
    assert replay.main(["--run", str(run), "--step", "24"]) == 0
    losses, _, in_a_row = spikes.remembered(run, 24)
    np.testing.assert_allclose(losses, [x["loss"] for x in whole.values()], rtol=2e-4)
    assert in_a_row == 0
    losses, _, _ = spikes.remembered(quiet[0], 24)
    assert list(losses) == [x["loss"] for x in whole.values()]


def test_when_a_checkpoint_is_saved_its_lines_are_written(tiny_config_file, tmp_path, monkeypatch):
    seen, save = [], checkpoint.Checkpoints.save

    def watched(self, step, state):
        seen.append((step, curve_so_far(tmp_path / "run")[-1]))
        save(self, step, state)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", watched)
    keys = EIGHT | {"train__steps": 5, "checkpoint__every": 2, "log__eval_every": 100}
    assert train.main(command(tiny_config_file, tmp_path / "run", **keys)) == 0
    assert seen == [(2, 2), (4, 4), (5, 5)]


def test_weights_of_another_tokenizer_are_refused(quiet, tiny_config_file, tiny_data, tmp_path):
    shutil.copytree(quiet[0], tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "tokenizer")
    shutil.copytree(tiny_data / "other" / "tokenizer", tmp_path / "other" / "tokenizer")
    with pytest.raises(UserError, match="its tokenizer is not the one that the data were prepared with"):
        train.main(command(tiny_config_file, tmp_path / "run", **EIGHT, init__from=tmp_path / "other"))


def test_other_precision_is_refused(quiet, tiny_config_file):
    precision = "params=float32,compute=float16,output=float32"
    with pytest.raises(UserError, match="--model.precision=params=float32,compute=float16"):
        train.main(command(tiny_config_file, quiet[0], **EIGHT, model__precision=precision))


@pytest.mark.parametrize("every", [1, 10])
def test_a_step_that_is_not_finite_is_skipped_and_named(bad_weights, tiny_config_file, tmp_path, capsys, every):
    origin, params = bad_weights
    keys = EIGHT | {"init__from": origin, "train__steps": 2, "log__every": every}
    assert train.main(command(tiny_config_file, tmp_path / "run", **keys)) == 3  # it ends in them
    out = capsys.readouterr().out
    assert "step 1: loss, gradient or new weights not finite" in out and "weights unchanged" in out
    steps, _ = curve(tmp_path / "run")
    assert [x["skipped"] for x in steps] == [1, 2] and not steps[0]["finite"]
    sources, blocks = json.loads(steps[0]["blocks"])
    assert len(sources) == len(blocks) == 8
    after = checkpoint.load_params(tmp_path / "run")[0]
    np.testing.assert_array_equal(after["layers"]["q"]["kernel"], params["layers"]["q"]["kernel"])


def test_mistakes_are_one_line_each(quiet, tiny_config_file, tmp_path):
    (tmp_path / "file").write_text("")
    for keys, words in [
        ({"data__sources": tmp_path / "nowhere"}, "nowhere"),
        ({"model__seq_len": 32}, "was prepared with --seq-len 16"),
        ({"workdir": quiet[0], "model__d_ff": 32}, "--model.d_ff=32: the run in"),
        ({"mesh__data": 3, "mesh__fsdp": 1}, "needs 3 devices, and 8 are here"),
        ({"init__from": tmp_path / "nowhere"}, "nowhere"),
        ({"init__from": quiet[0], "model__d_ff": 32}, "is of a model with d_ff=64"),
        ({"model__attention": "cudnn"}, "--model.attention=cudnn"),
        ({"train__seqs_per_device": 5}, "choose train.seqs_per_device among"),
    ]:
        argv = command(
            tiny_config_file, keys.pop("workdir", tmp_path / "run"), **({"mesh__fsdp": 8, "train__seqs_per_device": 1} | keys)
        )
        with pytest.raises(UserError) as error:
            train.main(argv)
        assert words in str(error.value) and "\n" not in str(error.value), error.value
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("where", ["file", "file/run"])
def test_a_workdir_that_cannot_be_made(tiny_config_file, tmp_path, where):
    (tmp_path / "file").write_text("")
    process = start(tiny_config_file, tmp_path / where)
    out = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 2 and out.startswith("error: ") and out.count("\n") == 1, out


BREAKS_AT_10 = """
import errno, os, resource, sys
from pathlib import Path
from tinyllama_jax import train
from tinyllama_jax.run import checkpoint, seals, supervise

save, seal, how = checkpoint.Checkpoints.save, seals.seal, sys.argv.pop(1)

def sealed(folder, skip):
    if list(folder.glob("10.*")):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "seal")
    seal(folder, skip)

def broken(self, step, state):
    if step == 10 and how == "file size":
        self.check(wait=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    if step == 10 and how == "folder":
        self.check(wait=True)
        self._folder.rename(self._folder.with_name("away"))
        self._folder.write_text("")
    save(self, step, state)

checkpoint.Checkpoints.save = broken
if how == "seal":
    seals.seal = sealed
supervise.run(train.main)
"""


@pytest.mark.parametrize("how", ["seal", "file size", "folder"])
def test_a_save_that_fails_ends_the_run_with_one_line(tiny_config_file, tmp_path, how):
    argv = command(tiny_config_file, tmp_path / "run", log__eval_every=1_000, train__steps=100_000)
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [sys.executable, "-c", BREAKS_AT_10, how, *argv], env=env, capture_output=True, text=True, timeout=240
    )
    errors = process.stderr.splitlines()
    words = {"seal": "the disk quota is used up", "file size": "File too large", "folder": "part of this path is a file"}[how]
    assert process.returncode == 2 and len(errors) == 1 and errors[0].startswith("error: ") and words in errors[0], errors
    if how == "folder":
        (tmp_path / "run" / "checkpoints").unlink()
        (tmp_path / "run" / "away").rename(tmp_path / "run" / "checkpoints")
    assert checkpoint.find_step(tmp_path / "run") == 5


@pytest.mark.parametrize("mount", ["ro", "size=200k"])
def test_a_read_only_or_full_disk(quiet, tiny_config_file, tmp_path, mount):
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", mount, "tmpfs", str(folder)], capture_output=True).returncode
    ):
        pytest.skip("needs root and leave to mount a tmpfs")
    try:
        process = start(tiny_config_file, folder / "run")
        out = process.communicate(timeout=PATIENCE)[0]
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    words = "read-only" if mount == "ro" else "the disk is full"
    assert process.returncode == 2 and words in out and "Traceback" not in out, out
