"""configs/continue.py, on the tests' model: the first loss is that of the weights as they came, with moments and without."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from tinyllama_jax import convert, train
from tinyllama_jax.base import cli, sharding
from tinyllama_jax.base import config as c
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core.program import build, on_devices
from tinyllama_jax.data import feed
from tinyllama_jax.run import checkpoint, initialize, metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def published(tiny_config_file, tmp_path_factory):
    """A run with moments, and the folder for Hugging Face that it was exported to."""
    folder = tmp_path_factory.mktemp("published")
    run = ["--config", str(tiny_config_file), f"--workdir={folder / 'run'}", "--train.steps=10", "--train.seqs_per_device=1"]
    assert train.main(run) == 0
    convert.export(folder / "run", folder / "hf")
    return folder


def continued(tiny_config, origin, workdir, **init):
    """configs/continue.py with everything that has a size smaller, and the data the other way round."""
    config = cli.read(str(ROOT / "configs" / "continue.py"))
    return dataclasses.replace(
        config,
        workdir=str(workdir),
        model=tiny_config.model,
        data=c.Data({path: 1 - weight for path, weight in tiny_config.data.sources.items()}),
        optim=dataclasses.replace(config.optim, warmup_steps=2, cooldown_steps=4),
        train=dataclasses.replace(config.train, steps=6, tokens_per_step=8 * 16, seqs_per_device=1),
        mesh=c.Mesh(),
        checkpoint=c.Checkpoint(every=100),
        log=c.Log(every=1, eval_every=100),
        init=c.Init(str(origin), **init),
    )


def run(config, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(c.to_json(config))
    assert train.main(["--config", str(file)]) == 0
    return [row for row in metrics.read(config.workdir) if "loss" in row]


def of_first_batch(config):
    """(loss of `init.from`'s weights on the batch of step 1 by evaluation, that batch's tokens)."""
    sources = feed.open_sources(config)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        state, _ = initialize.initial_state(config, program, initialize.check_origin(config, sources)[0])
        tokens, length, *_ = feed.gather(sources, *feed.order(config, sources).at(1))
        sums, n = program.evaluate(state.params, on_devices((tokens, length), program.eval_batch, 8))
        return float(sums.loss) / float(n), tokens


@pytest.mark.parametrize("init", [{}, {"state": "moments"}, {"state": "moments", "step": 5}], ids=str)
def test_the_first_loss_is_the_evaluations(published, tiny_config, tmp_path, init):
    config = continued(tiny_config, published / "run", tmp_path / "on", **init)
    rows = run(config, tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    of = lambda run: [row for row in metrics.read(run) if "val_loss" in row]
    assert of(config.workdir)[0]["step"] == 0
    if "step" not in init:  # what the run that the weights are of ended with
        assert of(config.workdir)[0]["val_loss"] == pytest.approx(of(published / "run")[-1]["val_loss"], rel=1e-6)
    assert rows[0]["loss"] == pytest.approx(of_first_batch(config)[0], rel=1e-6)
    np.testing.assert_allclose([row["lr"] for row in rows], [2e-5, 4e-5, 3e-5, 2e-5, 1e-5, 0], atol=1e-9)


def test_the_first_loss_is_transformers_of_the_published_folder(published, tiny_config, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = continued(tiny_config, published / "hf", tmp_path / "on")
    loss, tokens = of_first_batch(config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(published / "hf")
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens[:, :-1].astype(np.int64))).logits
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(tokens[:, 1:].astype(np.int64)).flatten())
    assert run(config, tmp_path)[0]["loss"] == pytest.approx(float(want), rel=1e-5)
    assert loss == pytest.approx(float(want), rel=1e-5)


def test_moments_are_taken_or_not(published, tiny_config, tmp_path):
    """One step: with Adam's moments of the run before, its count goes on; without, it is Adam's first step."""
    states = {}
    for state in ("weights", "moments"):
        config = continued(tiny_config, published / "run", tmp_path / state, state=state)
        mesh = sharding.make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            program = build(config, mesh)
            states[state], said = initialize.initial_state(config, program, published / "run")
            before = checkpoint.restore_state(published / "run", 10, program.state)
        assert "step 10 of" in said and int(states[state].step) == 0
    adam = {state: states[state].opt_state[0] for state in states}
    assert int(adam["weights"].count) == 0 and not any(np.asarray(m).any() for m in jax.tree.leaves(adam["weights"].mu))
    assert int(adam["moments"].count) == 10
    for ours, theirs in zip(jax.tree.leaves(adam["moments"]), jax.tree.leaves(before.opt_state[0]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_branch_begins_where_it_began_though_the_other_goes_on(published, tiny_config, tmp_path):
    config = continued(tiny_config, published / "run", tmp_path / "on", state="moments", step=0)
    (tmp_path / "on").mkdir()
    first = initialize.resolved(config, published / "run")
    assert first.init.step == 10
    (tmp_path / "on" / "config.json").write_text(
        c.to_json(dataclasses.replace(first, init=c.Init(first.init.from_, 5, "moments")))
    )
    assert initialize.resolved(config, published / "run").init.step == 5  # as it was when it was first started


@pytest.mark.parametrize(
    ("origin", "init", "words"),
    [
        ("hf", {"state": "moments"}, "--init.state=moments: .* is no run folder, and has weights only"),
        ("hf", {"step": 5}, "--init.step=5: .* is no run folder"),
        ("run", {"step": 7}, "--init.step=7: .* has checkpoints of the steps 5, 10"),
        ("imported", {"state": "all"}, "--init.state=all: .* without AdamW.s moments"),
        ("run", {"state": "all"}, "step 10 .* more than train.steps=6"),
    ],
    ids=str,
)
def test_mistakes(published, tiny_config, tmp_path, origin, init, words):
    if origin == "imported" and not (published / "imported").is_dir():
        convert.import_checkpoint(published / "hf", published / "imported")
    with pytest.raises(UserError, match=words):
        run(continued(tiny_config, published / origin, tmp_path / "on", **init), tmp_path)
