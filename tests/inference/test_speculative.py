"""Speculative decoding: the target's own tokens, the target's own distribution, and what a draft may be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import FP32, GREEDY, TINY, ids, loaded, run, some_params

from tinyllama_jax.base import config as c
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import model
from tinyllama_jax.inference import sampling as sampling_lib
from tinyllama_jax.inference.engine import Engine, Request
from tinyllama_jax.inference.sampling import Sampling, Settings
from tinyllama_jax.inference.speculative import check_vocabulary, look_up

SMALL = c.Model(2, 8, 2, 1, 8, 11, 512, precision=FP32, residual="float32")
PROMPTS = [ids(n, seed=n) for n in (1, 5, 17, 60, 33, 2)] + [ids(7) * 8]


def first_layer(cfg: c.Model) -> tuple[c.Model, dict]:
    """A draft: the target's first layer with its embedding and head."""
    params = some_params(cfg)
    return dataclasses.replace(cfg, n_layers=1), {**params, "layers": jax.tree.map(lambda a: a[:1], params["layers"])}


def engine(draft: str, K: int, cfg: c.Model = TINY, slots: int = 4) -> Engine:
    drafts = {"ngram": lambda: None, "model": lambda: loaded(*first_layer(cfg)), "itself": lambda: loaded(cfg)}
    return Engine(loaded(cfg), slots, drafts[draft](), K)


@pytest.fixture(scope="module")
def alone() -> list[Request]:
    return run(Engine(loaded(), 4), *(Request(list(p), 90, GREEDY, top_logprobs=2) for p in PROMPTS))


@pytest.mark.parametrize(("draft", "K"), [("model", 1), ("model", 4), ("ngram", 3), ("ngram", 15), ("itself", 5)])
def test_greedy_tokens_are_those_of_the_target(draft, K, alone):
    """Rows accept different numbers, join late, and end at the limit or where the context is full."""
    requests = run(engine(draft, K), *(Request(list(p), 90, GREEDY, top_logprobs=2) for p in PROMPTS))
    for request, want in zip(requests, alone, strict=True):
        assert (request.tokens, request.finish) == (want.tokens, want.finish)
        np.testing.assert_allclose(request.logprobs, want.logprobs, atol=1e-5, rtol=0)
        assert [[t for t, _ in each] for each in request.top] == [[t for t, _ in each] for each in want.top]
        assert request.rounds < len(request.tokens)  # some tokens of each draft are accepted
    if draft == "itself":
        assert all(request.rounds == -(-len(request.tokens) // (K + 1)) for request in requests)
    assert {request.finish for request in requests} == {"length", "context"}


@pytest.mark.parametrize("draft", ["model", "ngram"])
def test_the_penalty_counts_the_tokens_of_the_draft(draft):
    asked = lambda: [Request(list(p), 40, Sampling(0.0, repetition_penalty=1.3)) for p in PROMPTS]
    without, with_draft = run(Engine(loaded(), 4), *asked()), run(engine(draft, 4), *asked())
    assert [r.tokens for r in with_draft] == [r.tokens for r in without]
    assert any(r.tokens != run(Engine(loaded()), Request(r.prompt, 40, GREEDY))[0].tokens for r in without)  # it matters


@pytest.mark.parametrize("draft", ["model", "ngram", "itself"])
def test_a_stop_id_inside_a_draft_ends_the_answer(draft, alone):
    for request in alone[:3]:
        for i in range(5, 12):
            stop = request.tokens[i]
            end = request.tokens.index(stop) + 1
            (stopped,) = run(engine(draft, 5), Request(request.prompt, 90, GREEDY, stop_ids=(stop,)))
            assert (stopped.tokens, stopped.finish) == (request.tokens[:end], "stop")


@pytest.mark.parametrize(
    ("draft", "K", "sampling"),
    [
        ("model", 3, Sampling(1.0)),
        ("model", 3, Sampling(0.7, top_k=8, top_p=0.9, min_p=0.02, repetition_penalty=1.4)),
        ("itself", 2, Sampling(1.3, top_p=0.95)),
        ("ngram", 3, Sampling(0.8, repetition_penalty=0.8)),
    ],
    ids=["model", "model, all filters", "itself", "prompt lookup, penalty"],
)
def test_samples_have_the_targets_distribution(draft, K, sampling):
    """Chi-square over the pairs of second and third tokens, which a draft proposes: 121 pairs, 1,536 answers."""
    prompt, n, every = [3, 1, 4, 1, 5, 3, 1], 1_536, range(11)
    beginnings = [[], *([a] for a in every), *([a, b] for a in every for b in every)]
    p = dict(zip(map(tuple, beginnings), _allowed([prompt + more for more in beginnings], sampling), strict=True))
    pairs = np.stack([sum(p[()][a] * p[a,][b] * p[a, b] for a in every) for b in every])
    requests = run(engine(draft, K, SMALL, 64), *(Request(list(prompt), 3, sampling, 7, sample=i) for i in range(n)))
    counts = np.zeros((11, 11))
    for request in requests:
        counts[*request.tokens[1:]] += 1
    assert not counts[pairs == 0].any()
    enough = n * pairs > 5  # and the others as one cell
    observed, expected = np.append(counts[enough], counts[~enough].sum()), n * np.append(pairs[enough], pairs[~enough].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic, freedom = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    assert freedom > 5 and (statistic - freedom) / np.sqrt(2 * freedom) < 4
    assert sum(request.rounds for request in requests) < 3 * n


def _allowed(texts: list[list[int]], sampling: Sampling) -> np.ndarray:
    """The probabilities of the token after each text, under the trainer's logits and the filters."""
    rows, seen = np.zeros((len(texts), max(map(len, texts))), np.int32), np.zeros((len(texts), 11), bool)
    for i, text in enumerate(texts):
        rows[i, : len(text)] = text
        seen[i, text] = True
    logits = model.logits(some_params(SMALL), jnp.asarray(rows), SMALL)
    last = logits[jnp.arange(len(texts)), jnp.asarray([len(text) - 1 for text in texts])]
    settings = Settings(*(jnp.full(len(texts), value) for value in sampling))
    return np.asarray(jax.nn.softmax(sampling_lib.filtered(last, jnp.asarray(seen), settings)), np.float64)


def test_prompt_lookup_finds_what_followed_the_longest_match():
    text = [5, 1, 2, 3, 9, 8, 1, 2, 7, 7, 3, 4, 1, 2, 3, 0, 0, 0]  # the last three, 1 2 3, were followed by 9 8 1
    proposal = look_up(jnp.asarray([text, text, text]), jnp.asarray([14, 13, 11]), 3)
    assert proposal.tokens_BK[0].tolist() == [9, 8, 1] and proposal.n_B[0] == 3
    assert proposal.tokens_BK[1].tolist() == [7, 7, 3]  # 4 1 2 is new; 1 2 was last followed by 7 7 3
    assert proposal.n_B[2] == 0  # 4 is new
    only = look_up(jnp.asarray([[6, 6, 0, 0]]), jnp.asarray([1]), 3)
    assert (only.tokens_BK[0, 0], only.n_B[0]) == (6, 1)  # nothing is known after the text's end


def test_a_wrong_draft_is_refused(tmp_path):
    with pytest.raises(UserError, match="--draft-tokens 16: must lie between 1 and 15"):
        Engine(loaded(), 1, None, 16)

    class Vocabulary:
        def __init__(self, *pieces):
            self.sha256, self._pieces = str(pieces), list(pieces)

        def pieces(self):
            return self._pieces

    check_vocabulary(Vocabulary("a", "b"), Vocabulary("a", "b"), "d")
    for other, message in ((("a", "c"), r"id 1 is 'b' and 'c'"), (("a",), "2 and 1 tokens")):
        with pytest.raises(UserError, match=f"--draft d: its vocabulary differs from the model's .{message}"):
            check_vocabulary(Vocabulary("a", "b"), Vocabulary(*other), "d")
