"""v1.1 in one step of 2,000: three stages in one run, a kill before a boundary, a branch; and what is said of them."""

import dataclasses
import json
import shutil
from pathlib import Path

import matplotlib.axes
import numpy as np
import pytest

from tinyllama_jax import report, train
from tinyllama_jax.base import cli, mixture_weights
from tinyllama_jax.base import config as c
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import feed
from tinyllama_jax.run import metrics, stages

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("stages")  # its runs are made once
FEWER = 2_000
SCALE = 128 / 1_802_240 / FEWER  # of tokens: a step of 8 x 16, and fewer of them
EXACT = ("loss", "grad_norm", "checksum", "lr", "tokens")


def scaled(name, tiny_config, workdir):
    """configs/NAME.py with its stages, schedule and mixture, and the tests' model and data."""
    config, paths = cli.read(str(ROOT / "configs" / f"{name}.py")), [*tiny_config.data.sources]
    less = lambda weight: tuple((t * SCALE, w) for t, w in weight) if isinstance(weight, tuple) else weight
    mixed = dict(zip([*paths, str(Path(paths[0]).with_name("one"))], map(less, config.data.sources.values()), strict=False))
    (ramp,) = config.train.stages[1:]
    n_base = round(ramp[0] / FEWER)
    return dataclasses.replace(
        config,
        workdir=str(workdir),
        model=tiny_config.model,
        data=c.Data(mixed, eval_blocks=8),
        optim=dataclasses.replace(config.optim, warmup_steps=2),
        train=dataclasses.replace(
            config.train,
            steps=n_base + round((config.train.steps - ramp[0]) / FEWER),
            tokens_per_step=128,
            batch_ramp=f"{n_base * 128}:512",
            seqs_per_device=1,
        ),
        mesh=c.Mesh(data=2, fsdp=4),  # as v1.1, on half the nodes
        checkpoint=c.Checkpoint(every=10, keep=1, keep_steps="410,510"),
        log=c.Log(every=1, eval_every=1_000),
    )


def run(config, tmp_path, *more):
    """Trains as the command does; returns the lines of the steps."""
    file = tmp_path / "config.json"
    file.write_text(c.to_json(config))
    assert train.main(["--config", str(file), *more]) == 0
    return [row for row in metrics.read(cli.override(config, cli.pairs(list(more))).workdir) if "loss" in row]


@pytest.fixture(scope="module")
def math_code(tiny_config_file, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("v1_1")
    config = scaled("v1_1_math_code", cli.read(str(tiny_config_file)), tmp_path / "run")
    return config, run(config, tmp_path)


def test_learning_rate_batch_and_mixture_are_the_tables(math_code, monkeypatch):
    config, rows = math_code
    assert [row["step"] for row in rows] == list(range(1, 524))  # 513 + 10
    tokens = np.array([row["tokens"] for row in rows])
    assert np.diff(tokens, prepend=0).tolist() == [128] * 513 + [512] * 10
    full = 513 * 128 + 10 * 512
    # the cosine over the tokens, by hand; after 2 steps of warm-up
    part = (tokens[1:] - 256) / (full - 256)
    want = 4e-5 + 0.5 * (1 + np.cos(np.pi * part)) * (4e-4 - 4e-5)
    np.testing.assert_allclose([row["lr"] for row in rows[1:]], want, rtol=2e-5)
    # 100 / 0 / 0 until 1.5T, 75 / 15 / 10 from 1.506T on, straight between: blocks of each against the integral
    sizes = [len(s) for s in feed.open_sources(config)]
    names = feed.names(config.data.sources)
    at = np.arange(tokens[-1] // 16 + 1) * 16 / SCALE  # of the full run's tokens, at each block
    for name, size, last in zip(names, sizes, (0.75, 0.15, 0.10), strict=True):
        first = 1.0 if last == 0.75 else 0.0
        share = np.interp(at, [1.5e12, 1.506e12], [first, last])
        wanted = np.concatenate([[0], np.cumsum((share[1:] + share[:-1]) / 2)])
        drawn = np.array([row[f"epochs/{name}"] for row in rows]) * size
        assert np.abs(drawn - wanted[tokens // 16]).max() < 1 + 0.5  # a knot is at a whole block
        assert rows[-1][f"share/{name}"] == pytest.approx(last, abs=2 / 32)
    # a loss for each source, which make up the whole's
    row = rows[-1]
    assert rows[0][f"loss/{names[1]}"] is None
    low, high = (f([row[f"loss/{name}"] for name in names if row[f"loss/{name}"]]) for f in (min, max))
    assert low < row["loss"] < high
    seen = {}
    plot = matplotlib.axes.Axes.plot
    record = lambda self, x, y, *a, **k: (seen.update({k["label"]: np.array(y)}), plot(self, x, y, *a, **k))[1]
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", record)
    second, axes = matplotlib.axes.Axes.secondary_xaxis, []
    monkeypatch.setattr(matplotlib.axes.Axes, "secondary_xaxis", lambda *a, **k: (axes.append(k), second(*a, **k))[1])
    assert report.draw(config.workdir).is_file()
    to_tokens, to_steps = axes[0]["functions"]
    for step, n in (0, 0), (100, 100 * 128), (513, 513 * 128), (523, full), (530, full + 7 * 512):
        assert (to_tokens(step), to_steps(n)) == (n, step)
    assert {"learning rate", "tokens a step", *names} <= set(seen)
    assert seen["tokens a step"][[0, 512, 513, -1]].tolist() == [128, 128, 512, 512]
    share = seen[names[1]]  # means of 10 steps
    assert len(share) == 514 and share[[0, 406]].tolist() == [0, 0] and share[421:504].mean() == pytest.approx(0.15, abs=0.01)


def test_killed_before_a_boundary(math_code, tmp_path):
    """From the checkpoint of step 510, the larger batch at 514 comes as it came: to the bit."""
    config, rows = math_code
    again = dataclasses.replace(config, workdir=str(tmp_path / "again"))
    shutil.copytree(config.workdir, again.workdir)
    for folder in (Path(again.workdir) / "checkpoints").iterdir():
        if int(folder.name) > 510:
            shutil.rmtree(folder)
    got = run(again, tmp_path)
    assert [[row[k] for k in EXACT] for row in got] == [[row[k] for k in EXACT] for row in rows]


def test_a_branch_is_the_run_that_it_would_have_been(math_code, tiny_config, tmp_path, capsys):
    config, rows = math_code
    plain = scaled("v1_1", tiny_config, tmp_path / "v1_1")
    plain = dataclasses.replace(plain, log=c.Log(every=10, eval_every=2_000))
    until = cli.override(
        plain, {"optim.decay_steps": str(config.train.tokens // 128), "train.steps": "410", "train.batch_ramp": ""}
    )
    trunk = run(until, tmp_path)
    assert trunk[-1]["loss"] == rows[409]["loss"]
    branch = ["--workdir", str(tmp_path / "branch"), "--init.from", plain.workdir, "--init.step=410", "--init.state=all"]
    got = run(config, tmp_path, *branch)
    said = capsys.readouterr().out
    assert "step 410 of" in said and f"changed since the run in {plain.workdir}: train.steps from 410 to 523" in said
    assert [[row[k] for k in EXACT] for row in got] == [[row[k] for k in EXACT] for row in rows[410:]]
    for change, words in (
        ({"train.seed": "7"}, "train.seed"),
        ({"train.tokens_per_step": "256"}, "52,480 tokens there, 144,128 here"),
        ({"data.skip": "3:3"}, "data.skip: none there"),
        ({"data.sources": mixture_weights.sources_text(config.data.sources).replace("0@53", "0.1@53")}, "data.sources"),
    ):
        with pytest.raises(UserError, match=f"--init.state=all: until step 410 .*{words}"):
            run(cli.override(config, change), tmp_path, "--workdir", str(tmp_path / "other"), *branch[2:])
    # and goes on by itself from its own checkpoints
    shutil.rmtree(tmp_path / "branch" / "checkpoints" / "523")
    assert run(config, tmp_path, *branch)[-1]["loss"] == rows[-1]["loss"]


def test_what_is_to_come_can_be_changed_and_what_was_cannot(math_code, tmp_path):
    """At step 510 of 523: another mixture, another batch from then on; not another past."""
    config, _ = math_code
    again = tmp_path / "again"
    shutil.copytree(config.workdir, again)
    for folder in (again / "checkpoints").iterdir():
        if int(folder.name) > 510:
            shutil.rmtree(folder)
    sources = mixture_weights.sources_text(config.data.sources)
    kept = lambda more: dataclasses.replace(cli.override(config, more), workdir=str(again))
    for change, words in (
        ({"data.sources": sources.replace("0.15@", "0.2@")}, "these are other mixture weights"),
        ({"train.batch_ramp": "60000:512"}, "train.batch_ramp"),
        ({"train.tokens_per_step": "256", "train.batch_ramp": ""}, "train.tokens_per_step"),
    ):
        with pytest.raises(UserError, match=words):
            run(kept(change), tmp_path)
    first, second, third = sources.split(",")
    later = f"{first},{second}..0.15@{510 * 128}..0.5@{512 * 128},{third}"
    got = run(kept({"data.sources": later, "train.batch_ramp": f"{515 * 128}:256", "train.steps": "520"}), tmp_path)
    assert np.diff([row["tokens"] for row in got])[-6:].tolist() == [128, 256, 256, 256, 256, 256]
    assert json.loads((again / "data.json").read_text())[1]["weight"][-1] == [512 * 128, 0.5]


def test_stages_of_the_published_runs():
    """The table of docs and of `plan`, from the config alone."""
    table = stages.stages(cli.read(str(ROOT / "configs" / "v1_1_chinese.py")))
    assert [row["steps"] for row in table] == [
        (1, 2_000), (2_001, 832_298), (832_299, 835_627), (835_628, 1_026_501), (1_026_502, 1_047_308)
    ]  # fmt: skip
    assert [row["tokens_per_step"] for row in table] == [1_802_240] * 4 + [7_208_960]
    assert table[-1]["tokens"][1] == pytest.approx(2e12, rel=2e-6) and table[-1]["lr"][1] == pytest.approx(4e-5)
    assert table[3]["shares"] == {"slimpajama": (0.5, 0.5), "skypile": (0.5, 0.5)} == table[4]["shares"]
    assert table[1]["shares"]["skypile"] == (0, 0) and table[2]["shares"]["skypile"] == (0, 0.5)
    only = stages.stages(cli.read(str(ROOT / "configs" / "3t.py")))
    assert [row["steps"] for row in only] == [(1, 2_000), (2_001, 1_430_512)]
    assert only[1]["shares"]["slimpajama"] == (0.693584, 0.693584)


def test_a_source_read_more_than_four_times_is_warned_about(tiny_config):
    config = cli.override(tiny_config, {"train.steps": "1_000"})
    sources = feed.open_sources(config)
    read = [share * 8_000 / len(s) for share, s in zip((0.7, 0.3), sources, strict=True)]
    assert read[0] > 4 > read[1]
    (line,) = stages.epochs(config, sources)
    assert f"{next(iter(config.data.sources))} is read {read[0]:.1f} times" in line
    assert not stages.epochs(tiny_config, sources)
