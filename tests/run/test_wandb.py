"""Weights & Biases, offline: what the real package writes of a run, across a restart, is read back."""

import json
import math
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinyllama_jax.base import cli
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.run import metrics

pytest.importorskip("wandb", reason="W&B is not installed; pip install wandb")

WRITE = """
import math, sys
from tinyllama_jax.base import cli
from tinyllama_jax.run import metrics

config = cli.load(sys.argv[2:])
start, end = map(int, sys.argv[1].split(":"))
writer = metrics.Writer(config, start)
for step in range(start + 1, end + 1):
    writer.write(step, {"loss": 8 / step, "finite": step != 2, "checksum": 7, "blocks": "text", "grad_norm": math.nan})
writer.close()
"""


def records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: after 7 bytes LevelDB's log, blocks of 32 KiB with parts of (crc, length, kind)."""
    data, at, record = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        if (left := 32_768 - at % 32_768) < 7:  # the end of a block, in which no header fits
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def logged(run: Path) -> list[tuple[dict, dict[int, dict[str, float]]]]:
    """For each start of a run, in order: (its id, group and config, step -> what W&B has of it)."""
    from wandb.proto.wandb_internal_pb2 import Record

    out = []
    for path in sorted(run.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        all_ = [*map(Record.FromString, records(path))]
        history = [record.history for record in all_ if record.HasField("history")]
        about = next(record.run for record in all_ if record.HasField("run"))
        config = {item.key: json.loads(item.value_json) for item in about.config.update}
        rows = [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in h.item} for h in history]
        known = {"id": about.run_id, "group": about.run_group, **config}
        out.append((known, {int(row["_step"]): row for row in rows}))
    return out


def write(part: str, run: Path, config_file: Path, *more: str) -> None:
    """Writes the steps after "START:END" of a run in a process of its own."""
    options = ["--config", str(config_file), f"--workdir={run}", "--log.wandb=tiny", *more]
    done = subprocess.run([sys.executable, "-c", WRITE, part, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_an_offline_run_is_read_back(tiny_config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "a run: #1"  # no id of W&B may have : or #
    run.mkdir()
    write("0:3", run, tiny_config_file)
    write("2:4", run, tiny_config_file)  # step 3 is trained again
    write("2:3", run, tiny_config_file, "--data.skip=3:4")  # it goes back, and leaves out a batch
    (run.parent / "other" / run.name).mkdir(parents=True)
    write("0:1", run.parent / "other" / run.name, tiny_config_file)
    (about, first), (again, second), (back, third) = logged(run)
    [(other, _)] = logged(run.parent / "other" / run.name)
    assert about["id"] == again["id"] and len({about["id"], back["id"], other["id"]}) == 3
    assert back["group"] == about["group"] == about["id"] and (back["continues"], back["from_step"]) == (about["id"], 2)
    assert back["data.skip"] == "3:4" and about["optim.peak_lr"] == again["optim.peak_lr"] > 0 and list(third) == [3]
    assert list(first) == [1, 2, 3] and list(second) == [3, 4]
    assert first[2]["loss"] == 4.0 and first[2]["finite"] == 0.0 and second[4]["loss"] == 2.0
    assert "checksum" not in first[1] and "blocks" not in first[1]
    assert math.isnan(float(first[1]["grad_norm"]))


def test_what_wandb_refuses_is_one_line(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = cli.override(tiny_config, {"workdir": str(tmp_path), "log.wandb": "a/b"})
    with pytest.raises(UserError, match=r"^--log.wandb=a/b: Invalid project name .* WANDB_MODE=offline needs no account$"):
        metrics.Writer(config, 0)
