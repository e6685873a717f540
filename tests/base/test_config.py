"""Configuration: what is accepted, what is refused and with which words."""

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from test_contracts import COMMANDS

from tinyllama_jax.base import cli, mixture_weights, values
from tinyllama_jax.base import config as c
from tinyllama_jax.base.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config() -> c.Config:
    return c.Config(
        workdir="runs/x",
        model=c.Model(2, 32, 4, 2, 64, 100, 16),
        data=c.Data({"a": 0.7, "b": 0.3}),
        optim=c.Optim(4e-4, 4e-5, 10, 0.1, 1.0),
        train=c.Train(100, 128, 2),
        checkpoint=c.Checkpoint(10),
    )


def test_override_by_type(config):
    new = cli.override(
        config,
        {
            "train.steps": "1_000",
            "optim.peak_lr": "1e-3",
            "workdir": "y",
            "init.from": "RUN",
            "data.sources": "p/q:0.9,r:0.1",
            "mesh.fsdp": "-1",
        },
    )
    assert (new.train.steps, new.optim.peak_lr, new.workdir, new.init.from_) == (1000, 1e-3, "y", "RUN")
    assert new.data.sources == {"p/q": 0.9, "r": 0.1} and new.mesh.fsdp == -1
    assert config.train.steps == 100
    assert cli.override(config, {"data.sources": "only"}).data.sources == {"only": 1.0}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"train.step": "5"}, "--train.step=5: no such key; did you mean --train.steps?"),
        ({"steps": "5"}, "did you mean --train.steps?"),
        ({"optim.lr": "5"}, "no such key"),
        ({"train.steps": "many"}, "--train.steps=many: must be a whole number"),
        ({"train.steps": "1.5"}, "--train.steps=1.5: must be a whole number"),
        ({"train.steps": "0"}, "--train.steps=0: must be at least 1"),
        ({"optim.peak_lr": "fast"}, "--optim.peak_lr=fast: must be a number"),
        ({"optim.min_lr": "1"}, "must lie in [0, optim.peak_lr=0.0004]"),
        ({"model.remat": "ful"}, "did you mean full?"),
        (
            {"model.attention": "flash"},
            "must be one of auto, reference, xla, pallas_triton, ",
        ),
        *[
            (
                {"model.precision": f"params={dtype},compute=float16,output=float32"},
                f"params={dtype},compute=float16,output=float32: params must be float32",
            )
            for dtype in ("float16", "bfloat16")
        ],
        ({"model.precision": "bf16"}, "--model.precision=bf16: is not a policy"),
        ({"model.n_heads": "5"}, "--model.n_heads=5: must divide model.d_model=32"),
        ({"model.n_kv_heads": "3"}, "--model.n_kv_heads=3: must divide model.n_heads=4"),
        ({"train.tokens_per_step": "100"}, "must be a multiple of model.seq_len=16"),
        ({"mesh.data": "-1"}, "only one axis can be -1"),
        ({"mesh.data": "0"}, "--mesh.data=0: must be a positive number"),
        ({"data.sources": ""}, "needs at least one folder"),
        ({"data.sources": "b:1,talks.jsonl:half"}, "jsonl:half: half is no weight for talks.jsonl; it must be DIR:WEIGHT"),
        ({"lora.rank": "5000"}, "--lora.rank=5000: the matrices "),
        ({"data.sources": "a:-1"}, "weights must be positive"),
        ({"data.sources": "d:1e999999999"}, "--data.sources=d:1e999999999: the number 1e999999999 is too long"),
        ({"data.sources": "d:1@1e400"}, "--data.sources=d:1@1e400: the number 1e400 is too large"),
        ({"train.steps": "1e6"}, "--train.steps=1e6: must be a whole number"),
        ({"train.wait": "1e7"}, "--train.wait=1e7: must be at most 1e+06"),
        ({"train.seed": "-1_0"}, "--train.seed=-1_0: must be at least 0"),
        ({"optim.warmup_steps": "101"}, "is more than train.steps=100"),
        ({"checkpoint.keep": "0"}, "must be at least 1"),
        ({"data.sources": "a:1,b:1,a:2"}, "names a folder twice"),
        ({"checkpoint.keep_every": "3"}, "--checkpoint.keep_every=3: no checkpoint is made at 3: checkpoint.every is"),
        ({"checkpoint.keep_steps": "20,7"}, "--checkpoint.keep_steps=20,7: no checkpoint is made at 7"),
        ({"checkpoint.keep_steps": "a"}, "must be STEP,STEP"),
        ({"log.profile": "5"}, "--log.profile=5: must be FIRST:LAST, such as 100:102"),
        ({"log.profile": "9:3"}, "--log.profile=9:3: must be FIRST:LAST, steps with 1 <= FIRST <= LAST, at most 100"),
        ({"log.profile": "0:3"}, "with 1 <= FIRST"),
        ({"log.profile": "1:101"}, "at most 100"),
        ({"log.profile": "99:101"}, "--log.profile=99:101: the run ends at train.steps=100"),
        ({"workdir": "runs\0x"}, "holds a NUL character"),
        ({"optim.peak_lr": "nan"}, "--optim.peak_lr=nan: must be a number"),
        ({"optim.peak_lr": "inf"}, "--optim.peak_lr=inf: must be at most 10000"),
        ({"optim.peak_lr": "-1"}, "--optim.peak_lr=-1: must be at least 1e-30"),
        ({"optim.peak_lr": "1e-5"}, "--optim.peak_lr=1e-5: does not go with the config's optim.min_lr=4e-05: must lie in [0, "),
        ({"optim.eps": "1e-50"}, "--optim.eps=1e-50: must be at least 1e-30"),
        ({"optim.b2": "0.99999999999"}, "must be at most 0.999999"),
        ({"train.wait": "1e300"}, "--train.wait=1e300: must be at most 1e+06"),
        ({"model.d_model": "4000000000"}, "--model.d_model=4000000000: must be at most 1,048,576"),
        ({"model.n_layers": "1000000000"}, "--model.n_layers=1000000000: must be at most 1,024"),
        ({"train.steps": "9" * 400}, f"--train.steps={'9' * 300}...: must be at most 2,147,483,647"),
        ({"train.tokens_per_step": "4" * 5_000}, "must be a whole number"),
        ({"train.batch_ramp": ",".join(f"{i}:144" for i in range(101))}, "has 101 parts; at most 100"),
        (
            {"model.d_model": "1048576", "model.n_layers": "1000", "model.d_ff": "1048576"},
            "--model.d_model=1048576: makes 6.6e+15 parameters; at most 1e+13",
        ),
        ({"train.batch_ramp": "1:16e999999999"}, "--train.batch_ramp=1:16e999999999: the number 16e999999999 is too long"),
        ({"train.batch_ramp": "1:2e9"}, "its tokens per step must be at most 1,073,741,824"),
        ({"data.skip": "1:2000000"}, "2,000,000 steps in 1 parts; at most 1,000,000 in 100"),
        ({"data.skip": "1:1," * 101}, "101 steps in 101 parts"),
        ({"data.sources": ",".join(f"d{i}" for i in range(1_001))}, "must be at most 1,000 weights"),
        ({"data.sources": "a:1e-200"}, "--data.sources=a:1e-200: weights must be positive numbers, from 1e-15 to 1e15"),
        ({"checkpoint.keep_steps": "10" + "0" * 400}, "must be steps of at least 0 and less than 2^31"),
        ({"checkpoint.keep_steps": "10," * 4_000}, "has more than 10,000 characters"),
        ({"workdir": "a\nb"}, "holds a NUL character or a line break"),
        (
            {"init.from": "gs://b/run"},
            "--init.from=gs://b/run: is a URL, and must be a local path; mount it, or copy it to a disk",
        ),
        ({"workdir": "gs://b"}, "--workdir gs://b: must name a folder in a bucket, such as gs://BUCKET/FOLDER"),
        ({"workdir": "s3:/b/run"}, "--workdir s3:/b/run: needs two slashes after the colon"),
        ({"workdir": "gsx:/b"}, "--workdir=gsx://b: is a URL, and must be a local path"),
        ({"workdir": "s3://b/run*"}, "--workdir=s3://b/run*: must not contain * ?"),
        ({"workdir": "file:///r"}, "--workdir=file:///r: is a URL, and must be a local path; write /r"),
        ({"init.from": "S3://b/run"}, "--init.from=S3://b/run: is a URL"),
        ({"init.from": "hdfs:/b/run"}, "--init.from=hdfs://b/run: is a URL"),
    ],
)
def test_a_mistake_is_one_line_with_key_value_and_remedy(config, arguments, words):
    with pytest.raises(UserError) as error:
        cli.override(config, arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_accumulation_is_derived_or_refused_with_what_would_do(config):
    assert config.accumulation(4) == [1] and config.accumulation(1) == [4]  # 8 sequences a step, 2 a device
    with pytest.raises(UserError, match=r"choose train.tokens_per_step as a multiple of 96"):
        config.accumulation(3)
    many = dataclasses.replace(config, train=dataclasses.replace(config.train, tokens_per_step=2**30, seqs_per_device=3_000))
    with pytest.raises(UserError, match=r"among \[1, 2, 4, .*, 2048, 4096, .*\]$") as error:  # 2^26 sequences: no list of them
        many.accumulation(1)
    assert many.fitting(1) == [2**i for i in range(27)] and many.fitting(3) == [] and len(str(error.value)) < 400
    uneven = dataclasses.replace(config, train=dataclasses.replace(config.train, seqs_per_device=3))
    with pytest.raises(UserError, match=r"choose train.seqs_per_device among \[1, 2, 4\]"):
        uneven.accumulation(2)


def test_json_round_trip(config):
    assert c.from_json(c.to_json(config)) == config
    with pytest.raises(UserError, match=r"X: is not a config of this version"):
        c.from_json('{"workdir": "x"}', "X")
    older = json.loads(c.to_json(config))  # of a run from before these keys
    del older["model"]["head_dim"], older["model"]["rope_type"]
    assert c.from_json(json.dumps(older)) == config
    unlimited = dataclasses.replace(config, optim=dataclasses.replace(config.optim, clip_norm=float("inf")))
    assert c.from_json(c.to_json(unlimited)) == unlimited
    for good, bad in (('"steps": 100', '"steps": 0'), ('"steps": 100', '"steps": "9"'), ('"b2": 0.95', '"b2": NaN'),
                      ('"a": 0.7', '"a": 1e999'), ('"a": 0.7', '"a": [[[]]]'), ('"fsdp": -1', '"fsdp": {}')):  # fmt: skip
        with pytest.raises(UserError, match="^X: --"):
            c.from_json(c.to_json(config).replace(good, bad), "X")


def test_keys_and_flat_agree(config):
    assert list(c.flat(config)) == list(c.keys())
    assert c.flat(config)["model.n_layers"] == 2 and c.flat(config)["init.from"] == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file; did you mean"),
        ("x = 1", "defines no `config = Config(...)`"),
        ("a = 1\nb = 1 / 0", "line 2: ZeroDivisionError"),
        ("def", "line 1: SyntaxError"),
        ("from tinyllama_jax.base.config import *\nModel(1, 32, 5, 1, 1, 1, 1)", "--model.n_heads=5"),
        (
            "from tinyllama_jax.base.config import *\nTrain(steps=24.0, tokens_per_step=1, seqs_per_device=1)",
            "--train.steps=24.0: must be a",
        ),
        ("from tinyllama_jax.base.config import *\nTrain(True, 1, 1)", "--train.steps=True: must be a whole number"),
        ("from tinyllama_jax.base.config import *\nData({'a': '1'})", "--data.sources={'a': '1'}: must be"),
        ("import math\nfrom tinyllama_jax.base.config import *\nData({'a': math.inf})", "weights must be positive numbers"),
        (
            "from tinyllama_jax.base.config import *\nOptim(1e-3, 1e-4, 1, float('inf'), 1.0)",
            "--optim.weight_decay=inf: must be at",
        ),
        (
            "from tinyllama_jax.base.config import *\nOptim(float('nan'), 1e-4, 1, 0.1, 1.0)",
            "--optim.peak_lr=nan: must be a number",
        ),
        (
            "from tinyllama_jax.base.config import *\nTrain(10**5000, 1, 1)",
            "--train.steps=(thousands of digits): must be at most",
        ),
        ("from tinyllama_jax.base.config import *\nOptim(10**5000, 1, 1, 1, 1)", "=(thousands of digits): must be a number"),
        (
            "from tinyllama_jax.base.config import *\nData({'a': 10**5000})",
            "--data.sources=(thousands of digits): must be DIR:",
        ),
        ("from tinyllama_jax.base.config import *\nData({1: 1})", "--data.sources={1: 1}: must be DIR:WEIGHT"),
        ("x = 1\nimport sys; sys.exit(0)", "line 2: SystemExit: 0"),
        ("raise BaseException('two\\nlines')", "line 1: BaseException: two lines"),
        ("import asyncio\nraise asyncio.CancelledError", "line 2: CancelledError"),
        ("from tinyllama_jax.base import cli\ncli.read(__file__)", "RecursionError"),
        (b"a = '\xff'", "SyntaxError"),
        (b"a = '\0'", "Error"),
        (b"#" * (1 << 21), "has more than 1,048,576 bytes"),
        ("from tinyllama_jax.base.config import *\nLog(wandb=None)", "--log.wandb=None: must be a string"),
    ],
)
def test_a_config_file_with_a_mistake(tmp_path, text, words):
    (tmp_path / "demo.py").write_text("")
    path = tmp_path / "demmo.py"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        cli.read(str(path))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_config_that_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.py")
    for path in (tmp_path, tmp_path / "pipe.py", "/dev/zero"):
        with pytest.raises(UserError, match=f"{path}: is not a regular file"):
            cli.read(str(path))


def test_every_number_has_limits():
    assert values.LIMITS.keys() == {key for key, kind in c.keys().items() if kind in (int, float)}


def test_a_config_nested_too_deeply():
    with pytest.raises(UserError, match="^X: is not a config of this version: "):
        c.from_json(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "X")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"3", b'{"a": 1}', b"null"])
def test_damaged_json_is_one_line(content):
    with pytest.raises(UserError, match="is not a config of this version"):
        c.from_json(content)


def test_the_command_line(config):
    assert cli.pairs(["--a.b=c=d", "--e", "f"]) == {"a.b": "c=d", "e": "f"}
    with pytest.raises(UserError, match="an option is written"):
        cli.pairs(["train.steps=1"])
    with pytest.raises(UserError, match="has no value"):
        cli.pairs(["--train.steps"])


def test_a_config_that_came_with_the_package(tmp_path, monkeypatch, capsys):
    """Only where there is no folder configs: a checkout's own, and what a user wrote there, come first."""
    monkeypatch.setattr(cli, "INSTALLED", ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    assert cli.read("configs/3t.py") == cli.read(str(ROOT / "configs" / "3t.py"))
    assert capsys.readouterr().err == f"--config=configs/3t.py: {ROOT}/configs/3t.py\n"
    with pytest.raises(UserError, match="--config=configs/3tt.py: no such file; did you mean configs/3t.py?"):
        cli.read("configs/3tt.py")
    with pytest.raises(UserError, match="--config=3t.py: no such file"):
        cli.read("3t.py")
    (tmp_path / "configs").mkdir()
    with pytest.raises(UserError, match="--config=configs/3t.py: no such file"):
        cli.read("configs/3t.py")


def test_errors_end_with_exit_code_2_and_no_traceback():
    command = [sys.executable, "-m", "tinyllama_jax.train", "--config", "configs/nope.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --config=configs/nope.py: no such file")
    assert done.stderr.count("\n") == 1


def test_stages_of_a_batch_ramp():
    """1,000 tokens are reached by the 10th step of 100 tokens, 1,050 only by the 11th: a step is never cut."""
    train = c.Train(steps=20, tokens_per_step=100, seqs_per_device=1, batch_ramp="1050:400,2e3:1600")
    assert train.stages == [(0, 0, 100), (11, 1_100, 400), (14, 2_300, 1_600)]
    assert [train.tokens_after(step) for step in (0, 1, 11, 12, 14, 15, 20)] == [0, 100, 1_100, 1_500, 2_300, 3_900, 11_900]
    assert train.tokens == 11_900


def test_weights_over_the_run_are_read_written_and_checked(config):
    text = "a:1@1.5e12..0.75@1.506e12,b:0@1.5e12..0.25@1.506e12,c:2"
    mixed = cli.override(config, {"data.sources": text})
    assert mixed.data.sources["a"] == ((1.5e12, 1.0), (1.506e12, 0.75)) and mixed.data.sources["c"] == 2.0
    assert c.from_json(c.to_json(mixed)) == mixed
    assert cli.override(config, {"data.sources": mixture_weights.sources_text(mixed.data.sources)}) == mixed
    assert [mixture_weights.weight_at(mixed.data.sources["b"], t) for t in (0, 1.503e12, 2e12)] == [
        0,
        Fraction(1, 8),
        Fraction(1, 4),
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        {"train.batch_ramp": "1/0:8"},
        {"train.batch_ramp": "1e999999999:128"},
        {"data.sources": "a:1e999999999"},
        {"data.sources": "a:1e1_000_000_000"},
        {"data.sources": "a:1@1e-999999999"},
        {"data.sources": "a:1/" + "3" * 200},
        {"train.batch_ramp": "1e400:128"},
        {"data.sources": "a:1/0"},
        {"data.sources": "a:1@1/0"},
        {"data.sources": "a:1e400"},
        {"data.sources": "a:1@1e400"},
        {"train.steps": "2147483648"},
        {"data.skip": "99999999999999999999:99999999999999999999"},
    ],
    ids=str,
)
def test_numbers_beyond_all_bounds(config, arguments):
    with pytest.raises(UserError, match=f"--{next(iter(arguments))}="):
        cli.override(config, arguments)


def test_not_a_number_is_no_share():
    with pytest.raises(UserError, match=r"--data.sources=a:0.5@0..nan@10: weights must be positive numbers"):
        c.Data({"a": ((0, 0.5), (10, float("nan")))})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (5, "under a minute"),
        (90, "2 min"),
        (7_000, "117 min"),
        (7_200, "2.0 h"),
        (86_400, "24.0 h"),
        (90 * 86_400, "90.0 days"),
    ],
)
def test_time_left(seconds, text):
    assert cli.time_left(seconds) == text


def parsers_of_help(command, monkeypatch):
    """Returns the parser whose help `python -m tinyllama_jax.COMMAND --help` prints, and those of its subcommands."""
    shown = []
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda parser, file=None: shown.append(parser))
    module = importlib.import_module(f"tinyllama_jax.{command}")
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    for action in shown[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            shown += action.choices.values()
    return shown


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_line_and_the_default_of_every_option(command, monkeypatch):
    for parser in parsers_of_help(command, monkeypatch):
        for action in parser._actions:
            name = (action.option_strings or [action.dest])[-1]
            assert isinstance(action, argparse._SubParsersAction) or action.help, f"{command} {name} has no line"
            if action.option_strings and not action.required and action.nargs != 0:
                assert action.help.endswith(")"), f"{command} {name} does not end with its default in parentheses"


def test_help_of_train_lists_every_key(monkeypatch):
    (parser,) = parsers_of_help("train", monkeypatch)
    listed = [action.option_strings[-1].removeprefix("--") for action in parser._actions]
    assert listed == ["help", "config", *c.keys()]
    lines = cli.key_lines()
    assert lines["model.remat"].endswith(f"{', '.join(c.REMAT)} (none)")
    assert lines["data.verify"].endswith("(false)") and lines["data.skip"].endswith("(empty)")
    assert lines["train.steps"].endswith("(set by the config)") and lines["checkpoint.keep"].endswith("(3)")
    assert all(f"--{key} " in parser.format_help() for key in c.keys())
    for key, line in lines.items():  # for people without the source, and no second time the key
        assert ".py" not in line and "dims." not in line and f"--{key}" not in line
    assert "conversations" in lines["data.sources"]
