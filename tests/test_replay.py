"""A spike stops a run, its batch is left out; a step is replayed bit for bit, and a device that errs is named."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from cluster import Cluster

from tinyllama_jax import checkpoint, metrics, processes, train
from tinyllama_jax import config as c
from tinyllama_jax.data import feed

FSDP = {"mesh__fsdp": 8, "train__seqs_per_device": 1, "log__eval_every": 100}


def command(config_file, workdir, **keys):
    return ["--config", str(config_file), f"--workdir={workdir}", *(f"--{k.replace('__', '.')}={v}" for k, v in keys.items())]


def curve(run):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: x for x in lines if "loss" in x}


def blocks_of(config, step):
    """(source, block) of each sequence of a step."""
    source, block = feed.order(config, feed.open_sources(config)).locate(np.arange(8 * (step - 1), 8 * step))
    return list(zip(source.tolist(), block.tolist(), strict=True))


def said(text, module):
    """The arguments of the one command of a module that a text has."""
    (line,) = [x for x in text.splitlines() if f"-m tinyllama_jax.{module} " in x]
    return shlex.split(line)[3:]


# -- the guard ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def garbage(monkeypatch, tiny_config_file):
    """Makes the blocks of step 15 noise wherever they are read; what step 15 has without any skip."""
    bad, gather, config = [], feed.gather, c.read(str(tiny_config_file))

    def damaged(sources, source, block):
        tokens, length = gather(sources, source, block)
        for i, key in enumerate(zip(source.tolist(), block.tolist(), strict=True)):
            if key in bad:
                tokens[i] = np.random.default_rng(key).integers(3, 512, tokens.shape[1])
        return tokens, length

    monkeypatch.setattr(feed, "gather", damaged)
    bad += blocks_of(config, 15)
    return bad


@pytest.mark.parametrize(("every", "resumed"), [(1, False), (4, False), (1, True)])  # of log.every; and stopped after step 12
def test_a_spike_stops_the_run_with_the_command_that_leaves_it_out(garbage, tiny_config_file, tmp_path, every, resumed):
    keys = FSDP | {"train__spike": 1, "log__every": every, "data__skip": "3:3", "checkpoint__every": 7}
    if resumed:  # what was seen before the restart counts
        train.main(command(tiny_config_file, tmp_path / "run", **keys | {"train__steps": 12}))
    with pytest.raises(metrics.Spike, match="step 14: loss .* nats above the mean of the 13 finite steps before it") as error:
        train.main(command(tiny_config_file, tmp_path / "run", **keys))
    steps = checkpoint.steps_in(tmp_path / "run")
    assert steps == ([7, 12] if resumed else [7])  # 14 was due
    last = curve(tmp_path / "run")[14]
    assert last["finite"] and sorted(zip(*json.loads(last["blocks"]), strict=True)) == sorted(garbage)
    assert said(str(error.value), "replay") == ["--run", str(tmp_path / "run"), "--step", "14"]
    again = said(str(error.value), "train")
    assert again[-1] == "--data.skip=3:3,14:14" and sum("data.skip" in word for word in again) == 1
    assert train.main(again) == 0  # from the checkpoint before, and to the end
    config = c.override(c.read(str(tiny_config_file)), {"data.skip": "3:3,14:14"})
    seen = curve(tmp_path / "run")
    assert max(seen) == 24 and not {key for step in range(1, 25) for key in blocks_of(config, step)} & set(garbage)
    assert max(x["loss"] for step, x in seen.items() if step > 7) < last["loss"] - 0.8


def test_without_the_option_nothing_stops_it(garbage, tiny_config_file, tmp_path):
    assert train.main(command(tiny_config_file, tmp_path / "run", **FSDP)) == 0


def test_of_several_processes_all_stop_and_one_says_why(tiny_config_file, tmp_path):
    keys = FSDP | {"train__spike": 1, "checkpoint__every": 1, "checkpoint__keep": 30}
    train.main(command(tiny_config_file, tmp_path / "run", **keys | {"train__steps": 12}))
    run = Cluster(tiny_config_file, tmp_path / "run", 2, 4, **keys | {"optim__peak_lr": 30, "optim__min_lr": 30})
    assert run.wait(120) == [processes.SPIKE] * 2, (run.output(0), run.output(1))
    assert "error: step " in run.output(0) and "-m tinyllama_jax.replay" in run.output(0) and "error" not in run.output(1)
    spike = max(curve(tmp_path / "run"))
    assert checkpoint.steps_in(tmp_path / "run") == list(range(1, spike))


def test_the_earlier_skip_is_kept_and_said_once():
    data = c.Data({"a": 1}, skip="3:4,9:9")
    given = ["--data.skip", "3:4", "--config=x", "--data.skip=3:4,9:9", "--workdir", "data.skip"]
    assert c.skipping(given, data, 7, 8) == ["--config=x", "--workdir", "data.skip", "--data.skip=3:4,9:9,7:8"]
    assert c.skipping([], c.Data({"a": 1}), 7, 8) == ["--data.skip=7:8"]
