"""How tokens are drawn: the filters against their definitions and Transformers', and the tokens against the distribution."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import FP32, TINY, ids, loaded, run, some_params

from tinyllama_jax.base import config as c
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import model
from tinyllama_jax.inference import sampling as sampling_lib
from tinyllama_jax.inference.engine import Engine, Request
from tinyllama_jax.inference.sampling import Sampling, Settings, draw, filtered

SETTINGS = [
    Sampling(),
    Sampling(0.7),
    Sampling(1.5, top_k=5),
    Sampling(1.0, top_k=1),
    Sampling(1.0, top_k=99),  # more than there are
    Sampling(1.0, top_p=0.5),
    Sampling(0.3, top_p=0.9),
    Sampling(1.0, top_p=1e-6),  # the first token alone reaches it
    Sampling(2.0, top_k=20, top_p=0.8),  # of the 20, not of all
    Sampling(0.5, top_k=8, top_p=0.99),
    Sampling(1.0, min_p=0.1),
    Sampling(0.8, min_p=1.0),
    Sampling(1.0, repetition_penalty=1.3),
    Sampling(1.0, repetition_penalty=0.7),
    Sampling(1.7, 12, 0.9, 0.05, 1.2),  # all together
]


def settings_of(samplings) -> Settings:
    columns = zip(*samplings, strict=True)
    return Settings(*(jnp.asarray(column, jnp.int32 if i == 1 else jnp.float32) for i, column in enumerate(columns)))


filtered, draw = jax.jit(filtered), jax.jit(draw)


def ours(logits_BV, seen_BV, samplings) -> np.ndarray:
    """Probabilities [B, V] of what is drawn from; each row has settings of its own."""
    return np.asarray(jax.nn.softmax(filtered(jnp.asarray(logits_BV), jnp.asarray(seen_BV), settings_of(samplings)), axis=1))


def by_definition(logits_V, seen_V, s: Sampling) -> np.ndarray:
    """The same in float64, one token after the other."""
    x = np.asarray(logits_V, np.float64).copy()
    for token in np.flatnonzero(seen_V):
        x[token] = x[token] * s.repetition_penalty if x[token] < 0 else x[token] / s.repetition_penalty
    if s.temperature == 0:
        return (np.arange(len(x)) == x.argmax()).astype(float)
    p = np.exp(x / s.temperature - (x / s.temperature).max())
    order = sorted(range(len(p)), key=lambda token: -p[token])
    if s.top_k:
        p[p < p[order[min(s.top_k, len(p)) - 1]]] = 0
    p /= p.sum()
    if s.top_p < 1:
        before = 0.0
        for token in order:
            p[token], before = (p[token] if before < s.top_p else 0), before + p[token]
        p /= p.sum()
    p[p < s.min_p * p.max()] = 0
    return p / p.sum()


def rows(kind: str, V=40):
    """Logits and seen tokens for each of SETTINGS, all rows different."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(SETTINGS), V)).astype(np.float32) * 3
    return (np.round(logits) if kind == "ties" else logits), rng.random((len(SETTINGS), V)) < 0.3


@pytest.mark.parametrize("kind", ["any", "ties"])
def test_filters_are_their_definitions(kind):
    """Every row of a batch with its own settings, a greedy one among them."""
    logits, seen = rows(kind)
    samplings = [*SETTINGS[:-1], Sampling(0.0, repetition_penalty=1.4)]
    want = np.stack([by_definition(*row) for row in zip(logits, seen, samplings, strict=True)])
    got = ours(logits, seen, samplings)
    if kind == "ties":  # which of equal tokens top-p drops is no one's rule
        got, want = np.sort(got), np.sort(want)
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_array_equal(got == 0, want == 0)


@pytest.mark.parametrize("kind", ["any", "ties"])
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_filters_are_transformers_processors(sampling, kind):
    torch = pytest.importorskip("torch", reason="the reference is Transformers on PyTorch, which has no wheel here")
    transformers = pytest.importorskip("transformers", reason="the reference is Transformers")
    logits, seen = (a[:1] for a in rows(kind))
    scores, text = torch.tensor(logits), torch.tensor(np.flatnonzero(seen[0])[None])
    processors = [
        transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        transformers.TemperatureLogitsWarper(sampling.temperature),
        *([transformers.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []),
        *([transformers.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []),
        transformers.MinPLogitsWarper(sampling.min_p),
    ]
    for processor in processors:
        scores = processor(text, scores)
    got, want = ours(logits, seen, [sampling])[0], torch.softmax(scores, 1)[0].numpy()
    if kind == "ties" and sampling.top_p < 1:
        got, want = np.sort(got), np.sort(want)
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_array_equal(got == 0, want == 0)


def test_top_p_keeps_the_token_that_crosses_it():
    logits = np.log([[0.1, 0.4, 0.3, 0.2]])
    kept = lambda p: np.flatnonzero(ours(logits, np.zeros((1, 4), bool), [Sampling(top_p=p)])[0]).tolist()
    assert [kept(p) for p in (0.3, 0.45, 0.75, 0.95)] == [[1], [1, 2], [1, 2, 3], [0, 1, 2, 3]]


def test_a_row_is_filtered_and_drawn_as_it_would_be_alone():
    logits, seen = rows("any")
    samplings, keys = [*SETTINGS[:-1], Sampling(0.0)], jnp.arange(2 * len(SETTINGS), dtype=jnp.uint32).reshape(-1, 2)
    position = jnp.arange(len(SETTINGS)) % 4
    together = filtered(jnp.asarray(logits), jnp.asarray(seen), settings_of(samplings))
    tokens = draw(together, keys, position, settings_of(samplings))
    for i in range(len(SETTINGS)):
        one = filtered(jnp.asarray(logits[i : i + 1]), jnp.asarray(seen[i : i + 1]), settings_of(samplings[i : i + 1]))
        np.testing.assert_array_equal(one[0], together[i])
        assert draw(one, keys[i : i + 1], position[i : i + 1], settings_of(samplings[i : i + 1]))[0] == tokens[i]


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(-0.1), "temperature -0.1: must be 0"),
        (Sampling(float("nan")), "temperature nan: must be 0"),
        (Sampling(1e-9), "temperature 1e-09: must be 0"),
        (Sampling(top_k=-1), "top_k -1: must be 0"),
        (Sampling(top_k=2**31), "top_k 2147483648: must be 0"),
        (Sampling(top_p=0.0), "top_p 0.0: must lie in"),
        (Sampling(top_p=1.1), "top_p 1.1: must lie in"),
        (Sampling(min_p=-0.1), "min_p -0.1: must lie in"),
        (Sampling(min_p=float("nan")), "min_p nan: must lie in"),
        (Sampling(repetition_penalty=0.0), "repetition_penalty 0.0: must lie between"),
    ],
)
def test_settings_out_of_bounds_are_refused(sampling, message):
    with pytest.raises(UserError, match=message):
        sampling_lib.check(sampling)


# -- tokens ------------------------------------------------------------------------------------------------------------

SMALL = c.Model(1, 8, 2, 1, 8, 11, 512, precision=FP32, residual="float32")


def chi_square(tokens, p):
    """Pearson's statistic in standard deviations above its mean, over the tokens that can be drawn."""
    counts, possible = np.bincount(tokens, minlength=len(p)), p > 0
    assert not counts[~possible].any()
    expected = len(tokens) * p[possible]
    freedom = possible.sum() - 1
    return (((counts[possible] - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.fixture(scope="module")
def many():
    """An engine that answers many requests at a time."""
    return Engine(loaded(SMALL), 250)


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.6, top_k=7, top_p=0.95), Sampling(1.3, min_p=0.1, repetition_penalty=1.5)], ids=str
)
def test_samples_have_the_distribution(many, sampling):
    prompt = [3, 1, 4]
    logits = np.asarray(model.logits(some_params(SMALL), jnp.asarray([prompt]), SMALL)[0, -1])
    p = by_definition(logits, np.isin(np.arange(11), prompt), sampling)
    requests = run(many, *(Request(list(prompt), 1, sampling, seed=7, sample=i) for i in range(2_000)))
    tokens = [request.tokens[0] for request in requests]
    assert chi_square(tokens, p) < 4
    assert chi_square(tokens, p[::-1] + 1e-3) > 20  # it can tell


def test_samples_of_seeds_have_the_distribution(many):
    p = np.asarray(jax.nn.softmax(model.logits(some_params(SMALL), jnp.asarray([[3]]), SMALL)[0, -1]), np.float64)
    requests = run(many, *(Request([3], 1, Sampling(), seed=i) for i in range(2_000)))
    assert chi_square([request.tokens[0] for request in requests], p / p.sum()) < 4


def test_tokens_of_one_answer_are_independent():
    flat = model.flatten(some_params(SMALL))
    params = model.unflatten(flat | {"lm_head/kernel": flat["lm_head/kernel"] * 0})  # every token as likely as another
    tokens = np.asarray(run(Engine(loaded(SMALL, params)), Request([0], 500, Sampling()))[0].tokens)
    assert chi_square(tokens, np.full(11, 1 / 11)) < 4
    assert chi_square((tokens[:-1] - tokens[1:]) % 11, np.full(11, 1 / 11)) < 4


def test_seed_and_sample_decide_and_the_slot_does_not():
    asked = [(7, 0, 30), (7, 0, 12), (8, 0, 30), (7, 1, 30), (7, 2, 30), (2**32 - 1, 0, 30)]
    ask = lambda: [Request(ids(5), n, Sampling(1.5), seed, sample) for seed, sample, n in asked]
    engine = Engine(loaded(TINY), 6)
    first = [request.tokens for request in run(engine, *ask())]
    assert first[1] == first[0][:12]  # however much is asked for
    assert all(a != b for a, b in itertools.combinations([first[0], *first[2:]], 2))
    assert [request.tokens for request in run(engine, *ask()[::-1])][::-1] == first
