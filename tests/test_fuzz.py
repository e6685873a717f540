"""What damaged files and odd arguments do to each command, and whether the fuzzer's own judgement is right."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz.py"


@pytest.fixture
def fuzz(monkeypatch):
    """The module, which is made to be a process of its own."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return importlib.import_module("fuzz")


def test_300_cases_end_in_one_clear_line_or_well():
    ran = subprocess.run([sys.executable, FUZZ, "--seed=1", "--cases=300"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2_000:]
    assert ran.stdout.splitlines()[-1].startswith("seed 1: 300 cases in ") and ran.stdout.endswith(", 0 failed\n")


@pytest.mark.parametrize(
    ("status", "stderr", "how"),
    [
        (2 << 8, "error: x: is damaged\n", "one clear line"),
        (2 << 8, "usage: x\n  [-h]\nx: error: unrecognized arguments: -z\n", "one clear line"),
        (75 << 8, "error: process 0 is gone\n", "traceback"),  # an exit code that this command does not have
        (2 << 8, "", "not one line"),
        (2 << 8, "error: a\nerror: b\n", "not one line"),
        (2 << 8, "error: \x1b[31m\n", "not one line"),
        (2 << 8, "error: " + "a" * 10_000, "not one line"),
        (1 << 8, "Traceback (most recent call last):\nKeyError: 1\n", "traceback"),
        (0, "Exception in thread:\nTraceback (most recent call last):\nKeyError: 1\n", "traceback"),
        (signal.SIGABRT, "", "traceback"),
        (signal.SIGXCPU, "", "hang"),
        (4 << 8, "", "one clear line"),
    ],
)
def test_how_a_command_took_it(fuzz, tmp_path, status, stderr, how):
    (tmp_path / "stderr").write_text(stderr)
    target = fuzz.Target("audit", "", "", "", str, (2, 4))
    case = fuzz.Case(0, target, [], "", lambda: False, tmp_path)
    assert fuzz.verdict(case, int(status), False, "right")[0] == how
    assert fuzz.verdict(case, int(status), True, "right")[0] == "hang"
    (tmp_path / "stdout").write_text("step 4,100/1,000,000,000  loss 2.1\n")  # such a run is no hang
    assert fuzz.verdict(case, int(status), True, "right")[0] == "fine"


@pytest.mark.parametrize(
    ("result", "could_be", "how"), [("right", False, "fine"), ("x", True, "fine"), ("x", False, "wrong 0")]
)
def test_an_exit_code_0_must_be_earned(fuzz, tmp_path, result, could_be, how):
    (tmp_path / "stderr").touch()
    (tmp_path / "result").write_text(result)
    case = fuzz.Case(0, fuzz.Target("report", "", "", "", str), [], "", lambda: could_be, tmp_path)
    assert fuzz.verdict(case, 0, False, "right")[0] == how


@pytest.mark.parametrize(
    ("name", "after", "could_be"),
    [
        ("data.json", '{"a": 2, "b": ["x"], "more": 1}', True),
        ("data.json", '{"a": "1", "b": []}', False),
        ("data.json", '{"a": -1, "b": []}', False),
        ("data.json", '{"b": []}', False),
        ("config.json", '{"b": []}', True),  # its keys have defaults
        ("data.json", '{"a": 1, "b": [', False),
        ("data.json", '{"a": NaN, "b": []}', False),
        ("metrics.jsonl", '{"a": 1, "b": []}\n{"a": 2, "b": ["c"]}\n', True),
        ("metrics.jsonl", '{"a": 1, "b": []}\n{"a": "1"}\n', False),
        ("x.txt", "\udcff", False),
        ("x.array_record-00000-of-00001", '{"a": 2, "b": []}', False),  # it has checksums
        ("tiny.py", "config = 3", True),
        ("tiny.py", "config = = 3", False),
    ],
)
def test_what_nobody_could_tell_from_a_good_file(fuzz, name, after, could_be):
    before = b'{"a": 1, "b": ["x"]}'
    plausible = importlib.import_module("fuzz_damage").plausible
    assert plausible(Path(name), before, after.encode(errors="surrogateescape")) is could_be
    assert plausible(Path(name), before, before)


@pytest.mark.parametrize(("size", "could_be"), [(100, True), (50, False)])
def test_a_copy_of_another_good_file_is_plausible_if_it_has_its_header(fuzz, tmp_path, size, could_be):
    good, other = tmp_path / "0.bin", tmp_path / "1.bin"
    for path, n in ((good, 100), (other, size)):
        path.write_bytes(bytes([n]) * 24 + path.name.encode() * n)
    choices = iter([good, "other", other])
    rng = types.SimpleNamespace(choice=lambda _: next(choices), randrange=lambda _: 0)
    what, verdict = importlib.import_module("fuzz_damage").damage_file(rng, tmp_path, "*.bin")
    assert (what, good.read_bytes(), verdict()) == ("0.bin: other", other.read_bytes(), could_be)


def test_a_case_is_the_same_each_time(fuzz):
    damage = importlib.import_module("fuzz_damage")
    text = json.dumps({"a": [1, 2.5, {"b": None}], "c": "text"})
    bytes_of = lambda seed: damage.damage_bytes(random.Random(seed), text.encode())
    json_of = lambda seed: damage.damage_json(random.Random(seed), text)
    for what in (bytes_of, json_of):
        assert [what(seed) for seed in range(200)] == [what(seed) for seed in range(200)]
        assert len({what(seed) for seed in range(200)}) > 80
