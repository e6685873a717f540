"""FLOPs a token, the metrics file across a restart, TensorBoard events."""

import dataclasses
import json
import math
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tinyllama_jax.base import cli, dims
from tinyllama_jax.base import config as c
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.planning import targets
from tinyllama_jax.run import metrics, progress

TINYLLAMA = c.Model(22, 2048, 32, 4, 5632, 32000, 2048)


def test_flops_per_token_of_the_four_conventions():
    flops = dims.flops_per_token(TINYLLAMA)
    # 6 x 1,100,048,384 + 12 x 22 x 2048 x 2048; 6 x 1,034,420,224 + the same; and each with half of the attention
    assert flops["palm"] == 6 * 1_100_048_384 + 1_107_296_256 == 7_707_586_560
    assert flops["matmul"] == 6 * 1_034_420_224 + 1_107_296_256 == 7_313_817_600
    assert flops["palm_causal"] == 7_153_938_432
    assert flops["matmul_causal"] == 6_760_169_472
    narrow = dataclasses.replace(TINYLLAMA, head_dim=32)  # half the attention, and half of q k v o: 22 x 4.72 M weights
    less = 6 * 22 * (2 * 2048 * 1024 + 2 * 2048 * 128)
    assert dims.flops_per_token(narrow)["matmul"] == flops["matmul"] - less - 1_107_296_256 // 2


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("padding", [0, 10_000])  # lines longer than the block that is read from the end
@pytest.mark.parametrize("keep", [0, 1, 7, 10, 99])
def test_truncate_after(tmp_path, keep, padding):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": s, "x": "a" * padding} for s in range(1, 11)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 11, "lo')  # the last line cut by a kill
    metrics.truncate_after(path, keep)
    assert lines(path) == [r for r in rows if r["step"] <= keep]


def test_truncate_reads_only_the_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as f:
        f.write("this is not JSON\n")
        f.writelines(f'{{"step": {s}}}\n' for s in range(1, 1001))
    metrics.truncate_after(path, 998)  # would fail on the first line
    assert path.read_text().endswith('{"step": 998}\n')


def test_what_cannot_be_read_at_all_is_not_thrown_away(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for text in ("x\n" * 3, '{"step": "1"}\n' * 3):
        path.write_text(text)
        with pytest.raises(UserError, match="none of its lines up to step 2 can be read"):
            metrics.truncate_after(path, 2)
        assert path.read_text() == text


@pytest.fixture
def config(tmp_path):
    return c.Config(
        str(tmp_path),
        c.Model(2, 32, 4, 2, 64, 100, 16),
        c.Data({"a": 1}),
        c.Optim(4e-4, 4e-5, 10, 0.1, 1.0),
        c.Train(100, 128, 2),
        c.Checkpoint(10),
    )


def test_a_restart_leaves_one_unbroken_curve(config, tmp_path):
    for start, end in ((0, 7), (4, 10)):  # killed at 7, its last checkpoint at 4
        writer = metrics.Writer(config, start)
        for step in range(start + 1, end + 1):
            values = {"loss": 1 / 3 + step, "checksum": 2**32 - 1, "finite": True, "loss/caf\udce9": math.nan}
            writer.write(step, values | {"recent_losses": [1.5]})
        writer.close()
        time.sleep(1.1)  # event files are named by the second
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == list(range(1, 11))
    assert lines(tmp_path / "metrics.jsonl")[2]["loss"] == 1 / 3 + 3  # to the bit
    assert metrics.read(tmp_path)[2]["loss/caf\\udce9"] is None
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(1, 11))
    assert events.Scalars("loss")[9].value == pytest.approx(10 + 1 / 3)


def test_a_log_says_the_time_left(monkeypatch, capsys):
    now = [1_000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = progress.Progress(100, 1_000_000, [])
    for step, seconds in ((101, 60), (111, 11), (112, 1), (1_000_000, 11)):  # the first was compiled before
        now[0] += seconds
        shown.update(step, 2.5, 1e6)
    first, second, last = capsys.readouterr().out.splitlines()  # one every ten seconds, and the last
    assert first == "step 101/1,000,000  loss 2.5000  1,000,000 tokens/s"
    assert second == "step 111/1,000,000  loss 2.5000  1,000,000 tokens/s, 12.7 days left"  # 999,889 steps of 1.1 s
    assert last == "step 1,000,000/1,000,000  loss 2.5000  1,000,000 tokens/s"


def test_wandb_asked_for_and_absent_is_said(config, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    asked = cli.override(config, {"log.wandb": "project"})
    with pytest.raises(UserError, match="pip install wandb"):
        metrics.Writer(asked, 0)


def test_clock_counts_waiting_and_leaves_evaluation_out(config, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    clock = progress.Timer(config, 0, 4, targets.peak_flops("NVIDIA A100"))

    def spend(what, seconds):
        with clock.timed(what):
            now[0] += seconds

    spend("data_wait", 1)
    now[0] += 1
    clock.lap(1)
    spend("data_wait", 1)
    spend("evaluating", 50)
    spend("saving", 2)
    now[0] += 3
    lap = clock.lap(3)  # two steps of 128 tokens in 1 + 2 + 3 seconds
    assert lap["tokens_per_second"] == pytest.approx(2 * 128 / 6) and lap["step_seconds"] == pytest.approx(3)
    assert (lap["data_wait_seconds"], lap["checkpoint_seconds"]) == (0.5, 1)
    flops = dims.flops_per_token(config.model)["palm"]
    assert math.isclose(lap["mfu_palm"], flops * 2 * 128 / 6 / 4 / 312e12)
    assert "mfu_palm" not in progress.Timer(config, 0, 4, targets.peak_flops("cpu")).lap(1)
