"""Log-probabilities of packed texts against those of the engine, which computes one text at a time."""

import dataclasses

import jax
import models
import numpy as np
import pytest
from models import GREEDY, TINY, ids

from tinyllama_jax.base import config, dims, sharding
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import lora as lora_lib
from tinyllama_jax.core import model as core_model
from tinyllama_jax.evals import score
from tinyllama_jax.evals.score import Scorer, Text
from tinyllama_jax.inference import weights
from tinyllama_jax.inference.engine import Engine, Request
from tinyllama_jax.run import checkpoint

LONG = dataclasses.replace(TINY, seq_len=640)  # rows of 256, 512 and 1,024 tokens


def texts() -> list[Text]:
    """Questions with answers of many tokens, of one token and with a common beginning; two texts alike; a long one."""
    rng, out = np.random.default_rng(3), []
    for item in range(12):
        question = ids(int(rng.integers(1, 60)), item)
        answers = [ids(1 if item % 3 == 0 else int(rng.integers(1, 20)), 100 * item + j) for j in range(4)]
        if item % 3 == 1:
            answers = [answers[0] + answer for answer in answers]
        out += [Text(question + answer, len(answer)) for answer in answers]
    ending = ids(9, 50)  # as in winogrande: the answers come before the scored text
    out += [Text(ids(20, 51) + ids(3, seed) + ending, 9) for seed in (52, 53)]
    return [*out, out[5], out[5], Text(ids(600, 54), 599), Text(ids(300, 55), 40), Text(ids(2, 56), 1)]


def by_the_engine(text: Text) -> tuple[list[float], list[bool]]:
    engine = Engine(models.loaded(LONG))
    (request,) = models.run(engine, Request(text.ids, 0, GREEDY, score_prompt=True, top_logprobs=1))
    best = [top[0][0] == token for top, token in zip(request.prompt_top[1:], text.ids[1:], strict=True)]
    return request.prompt_logprobs[-text.n :], best[-text.n :]


@pytest.mark.parametrize("axes", [{}, {"data": 2, "tensor": 2}], ids=["one device", "four"])
def test_packed_texts_have_the_log_probabilities_of_single_ones(axes):
    given, finished = texts(), []
    scores = Scorer(models.loaded(LONG, **axes))(given, finished.append)
    assert sum(finished) == len(given) == len(scores)
    for text, scored in zip(given, scores, strict=True):
        logprobs, greedy = by_the_engine(text)
        np.testing.assert_allclose(scored.logprobs, logprobs, atol=2e-5)
        assert scored.greedy.tolist() == greedy and len(greedy) == text.n
    assert 0 < np.mean(np.concatenate([s.greedy for s in scores])) < 1


def test_common_beginnings_are_computed_once():
    given = texts()
    groups = score._grouped(given)
    assert sorted(i for group in groups for i in group.members) == list(range(len(given)))
    assert [len(group.members) for group in groups[:12:3]] == [4] * 4  # answers of one token
    assert groups[0].length(given) == len(given[0].ids) - 1
    computed = sum(group.length(given) for group in groups)
    assert computed < 0.7 * sum(len(text.ids) - 1 for text in given)


def test_rows_are_full_and_their_lengths_few():
    rng = np.random.default_rng(0)
    given = [Text(ids(int(n), i), 1) for i, n in enumerate(rng.integers(2, 500, 400))]
    packed = score._packed(score._grouped(given), given)
    assert [length for length, _ in packed] == [512, 256]
    used = sum(group.length(given) for _, rows in packed for row in rows for group in row)
    assert used == sum(len(text.ids) - 1 for text in given) >= 0.9 * sum(length * len(rows) for length, rows in packed)
    before = score._hidden._cache_size(), score._head._cache_size()
    scorer = Scorer(models.loaded(LONG), batch=3)
    for part in (given[:90], given[90:101], given[101:102]):
        scorer(part)
    assert score._hidden._cache_size() - before[0] <= 2 and score._head._cache_size() - before[1] <= 2


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (Text([1, 2], 2), "2 of a text's 2 tokens cannot be scored"),
        (Text([1, 2], 0), "0 of a text's 2 tokens"),
        (Text([1] * 642, 1), "has 642 tokens, and the model's context is 640"),
        (Text([1, 53], 1), "outside the vocabulary of 53"),
        (Text([-1, 5], 1), "outside the vocabulary of 53"),
    ],
)
def test_a_text_that_cannot_be_scored_is_refused(text, error):
    with pytest.raises(UserError, match=error):
        Scorer(models.loaded(LONG))([Text([1, 2], 1), text])


def test_nothing_to_score():
    assert Scorer(models.loaded(LONG))([]) == []


TRAINED = [(config.Lora(), {}), (config.Lora(), {"fsdp": 2, "tensor": 2}), (config.Lora(4, 8.0), {}),
           (config.Lora(4, 8.0, base="nf4"), {"fsdp": 2})]  # fmt: skip


def trainers(model: config.Model, lora: config.Lora, **axes: int) -> tuple[dict, jax.sharding.Mesh]:
    """Random parameters as a trainer has them, sharded, and their mesh."""
    mesh = config.Mesh(**({"data": 1, "fsdp": 1, "tensor": 1} | axes))
    mesh = sharding.make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor])
    params = models.some_params(model)
    if lora.rank:
        whole = dataclasses.replace(checkpoint.unscheduled(model), lora=lora)
        trained, frozen = lora_lib.split(lora_lib.start(params, whole))
        params = lora_lib.join(jax.tree.map(lambda a: a + 0.1, trained), frozen)  # else B is 0
    return jax.device_put(params, core_model.unflatten(sharding.parameter_shardings(mesh, model, lora))), mesh


@pytest.mark.parametrize(("lora", "axes"), TRAINED, ids=["one device", "four", "LoRA", "QLoRA"])
def test_a_trainers_own_parameters_score_as_their_copy_does(lora, axes):
    model = dataclasses.replace(LONG, d_model=64, d_ff=128, n_heads=4, vocab_size=64)
    params, mesh = trainers(model, lora, **axes)
    copy = models.loaded(model)._replace(weights=weights.of_params(params, model, mesh, lora), mesh=mesh)
    given, padded = texts(), dataclasses.replace(model, vocab_size=53)
    own = copy._replace(weights=weights.of_trainer(params, lora), model=padded)
    cut = copy.weights._replace(head_DV=copy.weights.head_DV[:, :53])
    for one, other in zip(Scorer(own)(given), Scorer(copy._replace(weights=cut))(given), strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
        assert one.greedy.tolist() == other.greedy.tolist()


@pytest.mark.parametrize(
    ("lora", "compute", "axes"),
    [(config.Lora(), "float32", {}), (config.Lora(), "bfloat16", {"fsdp": 2, "tensor": 2}), (config.Lora(4), "bfloat16", {})],
)
def test_scoring_in_training_copies_no_weights(lora, compute, axes):
    """Temporaries are the same for any number of layers; those of the copy of `of_params` are as large as the weights."""

    def temporaries(n_layers: int, up_front: bool) -> int:
        policy = f"params=float32,compute={compute},output=float32"
        model = config.Model(n_layers, 128, 4, 2, 384, 64, 64, precision=policy)
        mesh = config.Mesh(**({"data": 1, "fsdp": 1, "tensor": 1} | axes))
        mesh = sharding.make_mesh(mesh, jax.devices()[: mesh.fsdp * mesh.tensor])
        shardings = sharding.parameter_shardings(mesh, model, lora)
        like = {a.name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=shardings[a.name]) for a in dims.arrays(model, lora)}
        rows = score._Rows(*[jax.ShapeDtypeStruct((4, 64), np.int32)] * 4)
        prepared = lambda params: weights._of_params(params, model, lora) if up_front else weights.of_trainer(params, lora)
        with jax.set_mesh(mesh):
            program = jax.jit(lambda params, rows: score._hidden(prepared(params), rows, model))
            memory = program.lower(core_model.unflatten(like), rows).compile().memory_analysis()
        return memory.temp_size_in_bytes, memory.argument_size_in_bytes

    (few, less), (many, most) = temporaries(2, False), temporaries(16, False)
    assert many - few < 0.02 * (most - less) and many < 0.5 * most, (few, many, most)
    (few, less), (many, most) = temporaries(2, True), temporaries(16, True)
    assert many - few > 0.4 * (most - less), (few, many, most)
