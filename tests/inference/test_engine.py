"""The engine: Transformers' tokens, the trainer's log-probabilities, and requests that do not affect one another."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from models import FP32, GREEDY, TINY, ids, loaded, run, some_params

from tinyllama_jax.base import config as c
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import model
from tinyllama_jax.inference import device, forward
from tinyllama_jax.inference import engine as engine_lib
from tinyllama_jax.inference.engine import Engine, Request
from tinyllama_jax.inference.sampling import Sampling

LONG = dataclasses.replace(TINY, seq_len=800)


@pytest.fixture
def transformers():
    pytest.importorskip("torch", reason="the reference is Transformers on PyTorch, which has no wheel here")
    return pytest.importorskip("transformers", reason="the reference is Transformers")


def answer(prompt, n, sampling=GREEDY, on=None, **options) -> Request:
    """One request in a fresh engine of one slot."""
    return run(Engine(on or loaded()), Request(list(prompt), n, sampling, **options))[0]


def same(a: Request, b: Request) -> None:
    """Equal tokens, and log-probabilities equal but for the rounding of sums of another shape."""
    assert (a.tokens, a.finish) == (b.tokens, b.finish)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5, rtol=0)


# -- against Transformers ----------------------------------------------------------------------------------------------

MODELS = {  # and (prompt, new tokens) besides the random ones
    "GQA": (LONG, [(700, 30), (230, 60)]),  # 512 tokens and a second piece; a cache that grows while it is decoded
    "MQA, linear": (dataclasses.replace(TINY, rope_scaling=4.0, n_kv_heads=1), []),
    "MHA, odd sizes": (c.Model(3, 20, 2, 2, 24, 53, 101, precision=FP32, residual="float32"), [(1, 100), (100, 1)]),
    "llama3, wide heads": (
        dataclasses.replace(
            TINY,
            head_dim=10,
            rope_scaling=8.0,
            rope_theta=500.0,
            rope_type="llama3,low_freq_factor=1,high_freq_factor=4,original_max_position_embeddings=32",
        ),
        [],
    ),
    "yarn, narrow heads": (
        dataclasses.replace(
            TINY,
            n_kv_heads=3,
            head_dim=2,
            d_ff=37,
            rope_scaling=4.0,
            rope_theta=100.0,
            rope_type="yarn,original_max_position_embeddings=32",
        ),
        [],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_transformers(name, transformers):
    """Fifty random prompts over five models, more than there are slots."""
    cfg, more = MODELS[name]
    params, rng = some_params(cfg, 0.7), np.random.default_rng(len(name))
    sizes = [*more, *((int(rng.integers(1, 61)), int(rng.integers(20, 41))) for _ in range(10 - len(more)))]
    requests = [Request(ids(size, seed=i), n, GREEDY) for i, (size, n) in enumerate(sizes)]
    run(Engine(loaded(cfg, params), slots=4), *requests)
    reference = models.transformers_model(cfg, params)
    for request in requests:
        assert request.tokens == models.transformers_greedy(reference, request.prompt, request.max_new_tokens)
    assert np.median([len(set(request.tokens)) for request in requests]) > 8  # not the same again and again


# -- against the trainer -----------------------------------------------------------------------------------------------


def trainers(cfg, params, tokens):
    """log_softmax of the trainer's logits [S, V]: row i is of the token after tokens[: i + 1]."""
    return np.asarray(jax.nn.log_softmax(model.logits(params, jnp.asarray([tokens]), cfg)[0]))


@pytest.mark.parametrize("top", [-1, 0, 5, 20])
def test_log_probabilities_are_the_trainers(top):
    """For answer and prompt, and with any sampling, they are the model's own, before any filter."""
    (request,) = run(
        Engine(loaded(), 2), Request(ids(40), 30, Sampling(2.0, 9, 0.9, 0.01, 1.3), 5, top_logprobs=top, score_prompt=True)
    )
    all_tokens = request.prompt + request.tokens
    want = trainers(TINY, some_params(TINY), all_tokens)
    got = [*request.prompt_logprobs[1:], *request.logprobs]
    assert request.prompt_logprobs[0] is None and len(got) == 69
    np.testing.assert_allclose(got, want[np.arange(69), all_tokens[1:]], atol=2e-5, rtol=0)  # 4e-6 measured
    best = [*request.prompt_top, *request.top]
    assert best[0] == [] and all(len(each) == max(top, 0) for each in best[1:])
    for i, each in enumerate(best[1:]):
        assert [token for token, _ in each] == np.argsort(-want[i], kind="stable")[: len(each)].tolist()
        np.testing.assert_allclose([p for _, p in each], -np.sort(-want[i])[: len(each)], atol=2e-5, rtol=0)


def test_a_prompt_of_several_pieces_is_scored():
    prompt = ids(700)
    for n in (0, 3):
        request = answer(prompt, n, on=loaded(LONG), score_prompt=True, top_logprobs=1)
        want = trainers(LONG, some_params(LONG), prompt)
        np.testing.assert_allclose(request.prompt_logprobs[1:], want[np.arange(699), prompt[1:]], atol=5e-5, rtol=0)
        assert [each[0][0] for each in request.prompt_top[1:]] == want[:-1].argmax(1).tolist()
        assert (len(request.tokens), request.finish) == (n, "length")


def test_more_top_tokens_than_the_vocabulary_has():
    cfg = dataclasses.replace(TINY, vocab_size=11)
    request = answer(ids(5, vocab_size=11), 4, on=loaded(cfg), top_logprobs=20, score_prompt=True)
    for each in request.top + request.prompt_top[1:]:
        assert sorted(token for token, _ in each) == list(range(11))
        assert np.exp([p for _, p in each]).sum() == pytest.approx(1)


# -- neighbours --------------------------------------------------------------------------------------------------------

CROWD = [  # one of each kind
    (ids(33, 1), 40, GREEDY),
    (ids(1, 2), 60, Sampling(1.5)),
    (ids(90, 3), 20, Sampling(1.0, top_k=5, repetition_penalty=1.2)),
    (ids(17, 4), 50, Sampling(0.7, top_p=0.8)),
    (ids(64, 5), 7, GREEDY),
    (ids(2, 6), 80, Sampling(1.2, min_p=0.05)),
    (ids(50, 7), 30, Sampling(0.0, repetition_penalty=1.5)),
    (ids(12, 8), 1, Sampling(3.0)),
]


def crowd():
    return [Request(list(prompt), n, sampling, seed=i) for i, (prompt, n, sampling) in enumerate(CROWD)]


@pytest.fixture(scope="module")
def alone():
    engine = Engine(loaded(), 1)
    out = []
    for request in crowd():
        for slot in engine._slots:
            slot.held = []  # as in a fresh engine
        out += run(engine, request)
        assert request.cached == 0
    return out


@pytest.fixture(scope="module")
def of_eight():
    return Engine(loaded(), 8)


@pytest.fixture
def eight(of_eight):
    """An engine of eight slots, which the tests use in turn; what a failed test left in it is removed."""
    for request in [*of_eight._queue, *(slot.request for slot in of_eight._slots if slot.request)]:
        of_eight.cancel(request)
    of_eight.step()
    return of_eight


def test_requests_together_are_answered_as_alone(eight, alone):
    for got, want in zip(run(eight, *crowd()), alone, strict=True):
        same(got, want)


def test_requests_that_join_late_are_answered_as_alone(eight, alone):
    requests = crowd()
    for i, request in enumerate(requests):
        eight.submit(request)
        for _ in range(i % 4):
            eight.step()
    run(eight)
    for got, want in zip(requests, alone, strict=True):
        same(got, want)


def test_more_requests_than_slots_are_answered_as_alone(alone):
    engine = Engine(loaded(), 3)
    for got, want in zip(run(engine, *crowd()[::-1])[::-1], alone, strict=True):
        same(got, want)


@pytest.mark.parametrize("when", ["queued", "prefill", "decoding"])
def test_cancelled_neighbours_change_no_answer(eight, alone, when):
    requests, others = crowd(), [Request(ids(60, 20 + i), 60, Sampling(1.0), seed=i) for i in range(4)]
    for pair in zip(others, requests, strict=False):
        for request in pair:
            eight.submit(request)
    for request in requests[4:]:
        eight.submit(request)
    for _ in range(when == "prefill"):
        eight.step()
    while when == "decoding" and not others[-1].tokens:
        eight.step()
    for request in others:
        eight.cancel(request)
        eight.cancel(request)  # twice is as good as once
        assert request.finish == "cancelled"
    run(eight)
    for got, want in zip(requests, alone, strict=True):
        same(got, want)


def test_answers_get_as_much_of_the_time_as_prompts(monkeypatch):
    clock = [0.0]

    def takes(name, seconds):
        run = getattr(device, name)
        monkeypatch.setattr(device, name, lambda *a: (clock.__setitem__(0, clock[0] + seconds(*a)), run(*a))[1])

    takes("prefill", lambda *_: 3.0)
    takes("decode", lambda weights, draft, state, rows, n, *_: 0.1 * n)
    monkeypatch.setattr(engine_lib, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(engine_lib, "PREFILL", (16,))
    engine = Engine(loaded(LONG), slots=2)
    short, long = Request([1, 2], 49, GREEDY), Request(ids(700), 1, GREEDY)
    engine.submit(short)
    engine.step()
    engine.submit(long)
    steps = 0
    while not short.finish:
        engine.step()
        steps += 1
    assert steps == 3 and not long.tokens  # 1 + 3 x CHUNK tokens; 24 steps where a chunk takes 0.2 s


def test_a_long_prompt_is_not_damaged_while_others_decode():
    """Between its pieces other rows decode, and this row, which is idle then, writes into the margin."""
    long, short = Request(ids(700), 20, GREEDY), Request(ids(5, 1), 40, GREEDY)
    engine = Engine(loaded(LONG), 2)
    engine.submit(short)
    engine.step()
    engine.submit(long)
    run(engine)
    same(long, answer(ids(700), 20, on=loaded(LONG)))
    same(short, answer(ids(5, 1), 40, on=loaded(LONG)))


# -- prefixes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh():
    """Requests as a fresh engine answers them."""
    return lambda prompt, n=20: answer(prompt, n)


def test_the_next_turn_of_a_conversation_uses_the_cache(fresh):
    engine, first = Engine(loaded(), 1), Request(ids(30), 20, GREEDY)
    run(engine, first)
    second = Request([*first.prompt, *first.tokens, *ids(9, 1)], 20, GREEDY)
    run(engine, second)
    assert second.cached == 30 + 20 - 1  # the newest token of an answer has no key yet
    same(second, fresh(second.prompt))
    again = Request([*first.prompt, *first.tokens[:4], 7, 8], 20, GREEDY)  # an edit
    run(engine, again)
    assert again.cached >= 34
    same(again, fresh(again.prompt))
    once_more = Request(list(again.prompt), 20, GREEDY)  # regenerated
    run(engine, once_more)
    assert once_more.cached == len(again.prompt) - 1
    same(once_more, again)


@pytest.mark.parametrize("steps", [0, 1, 2, 6])
def test_a_prefix_of_a_cancelled_request_is_right(fresh, steps):
    """Cancelled in the queue, in prefill (700 tokens are two pieces), and in decoding."""
    on, engine = loaded(LONG), Engine(loaded(LONG), 1)
    first, second = Request(ids(700), 100, GREEDY), Request([*ids(650), *ids(20, 1)], 20, GREEDY)
    engine.submit(first)
    for _ in range(steps):
        engine.step()
    engine.cancel(first)
    assert first.finish == "cancelled" and not engine.busy
    run(engine, second)
    assert second.cached == {0: 0, 1: 512}.get(steps, 650)
    same(second, answer(second.prompt, 20, on=on))


def test_a_slot_is_chosen_by_its_prefix():
    engine = Engine(loaded(), 3)
    a, b = run(engine, Request(ids(30, 1), 5, GREEDY), Request(ids(40, 2), 5, GREEDY))
    again = run(engine, Request(list(b.prompt), 5, GREEDY), Request(list(a.prompt), 5, GREEDY))
    assert [request.cached for request in again] == [39, 29]
    same(again[0], b)
    same(again[1], a)


def test_a_scored_prompt_takes_nothing_from_the_cache():
    engine = Engine(loaded(), 1)
    first, second = (Request(ids(30), 5, GREEDY, score_prompt=True) for _ in range(2))
    run(engine, first), run(engine, second)
    assert second.cached == 0 and len(second.prompt_logprobs) == 30
    assert second.prompt_logprobs == first.prompt_logprobs


# -- where an answer ends ----------------------------------------------------------------------------------------------


def test_an_answer_ends_with_its_stop_id():
    whole = answer(ids(3), 100)
    assert whole.finish == "length"
    first = {token: i for i, token in reversed(list(enumerate(whole.tokens)))}
    late = [token for token, i in first.items() if i > 10]
    ended = answer(ids(3), 100, stop_ids=tuple(late))
    assert (ended.tokens, ended.finish) == (whole.tokens[: min(first[token] for token in late) + 1], "stop")
    for request in run(Engine(loaded(), 3), *(Request(ids(3), 100, GREEDY, stop_ids=(token,)) for token in late[:3])):
        assert request.tokens == whole.tokens[: first[request.stop_ids[0]] + 1]  # each row its own


@pytest.mark.parametrize(("prompt", "n"), [(127, 1), (128 - 20, 20), (1, 127)])
def test_an_answer_ends_where_the_context_is_full(prompt, n):
    request = answer(ids(prompt), 1_000)
    assert (len(request.tokens), request.finish) == (n, "context")


def test_the_context_and_the_limit_can_end_at_the_same_token():
    assert answer(ids(120), 8).finish == "length"


@pytest.mark.parametrize("size", [1, 2, 127, 128])
def test_a_prompt_that_is_only_scored(size):
    request = answer(ids(size), 0, score_prompt=True)
    assert (request.tokens, request.finish, len(request.prompt_logprobs)) == ([], "length", size)


@pytest.mark.parametrize("seq_len", [2, 5, 15, 17])
def test_a_short_context(seq_len):
    cfg = dataclasses.replace(TINY, seq_len=seq_len)
    requests = run(Engine(loaded(cfg), 2), *(Request(ids(n), 99, GREEDY) for n in (1, seq_len - 1)))
    for request in requests:
        assert len(request.prompt) + len(request.tokens) == seq_len
        same(request, dataclasses.replace(answer(request.prompt, len(request.tokens)), finish="context"))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(ids(128), 1), "the prompt has 128 tokens, and the model's context is 128; shorten it to 127 or fewer"),
        (Request(ids(129), 0), "the prompt has 129 tokens, .*; shorten it to 128 or fewer"),
        (Request([], 1), "has no tokens"),
        (Request([53], 1), "a token outside the vocabulary of 53"),
        (Request([-1], 1), "a token outside the vocabulary of 53"),
        (Request([1], -1), "max_new_tokens -1: must be 0 or more"),
        (Request([1], 1, seed=-1), r"seed -1, sample 0: both must lie in \[0, 2\^32\)"),
        (Request([1], 1, seed=2**32), r"seed 4294967296, sample 0: both must lie in \[0, 2\^32\)"),
        (Request([1], 1, stop_ids=tuple(range(17))), "stop_ids has 17 ids, and at most 16 can end an answer"),
        (Request([1], 1, top_logprobs=21), "top_logprobs 21: must be at most 20"),
        (Request([1], 1, Sampling(-1.0)), "temperature -1.0: must be 0"),
        (Request([1], 1, Sampling(top_p=0.0)), r"top_p 0.0: must lie in \(0, 1\]"),
    ],
)
def test_a_wrong_request_is_refused(eight, request_, message):
    with pytest.raises(UserError, match=message):
        eight.submit(request_)
    with pytest.raises(UserError, match=message):
        eight.stream(request_)  # before a token is asked for
    assert not eight.busy


def test_a_request_runs_once(eight):
    request = Request(ids(3), 5, GREEDY)
    eight.submit(request)
    eight.cancel(request)
    with pytest.raises(ValueError, match="has been run"):
        eight.submit(request)
    assert eight.step() == [request] and eight.step() == [] and not eight.busy
    same(*run(eight, Request(ids(3), 5, GREEDY)), answer(ids(3), 5))


# -- how it runs -------------------------------------------------------------------------------------------------------


def test_a_stream_gives_all_tokens_once_and_can_be_left(eight):
    want = answer(ids(8), 70, Sampling(1.1), seed=3)
    request = Request(ids(8), 70, Sampling(1.1), seed=3)
    parts = list(eight.stream(request))
    assert [token for part in parts for token in part] == want.tokens
    assert len(parts[0]) == 1 and all(1 <= len(part) <= device.CHUNK for part in parts) and len(parts) >= 5
    left = Request(ids(9), 70, GREEDY)
    for _ in eight.stream(left):
        break
    assert left.finish == "cancelled" and len(left.tokens) == 1 and not eight.busy


def test_step_returns_the_requests_that_changed(eight):
    short, long = Request(ids(3, 1), 2, GREEDY), Request(ids(4, 2), 100, GREEDY)
    assert eight.step() == []
    eight.submit(short), eight.submit(long)
    counts, seen = {short: 0, long: 0}, []
    while eight.busy:
        changed = eight.step()
        seen.append(changed)
        for request in (short, long):
            assert (request in changed) == (len(request.tokens) > counts[request])
            counts[request] = len(request.tokens)
    assert short in seen[0] + seen[1] and seen[-1] == [long]


def test_the_number_of_programs_is_bounded():
    """The bound depends on the lengths of the cache and of the pieces of prompts, not on what requests ask for."""
    cfg = c.Model(1, 8, 2, 1, 8, 53, 800, precision=FP32, residual="float32", norm_eps=2e-5)  # no other test's program
    before = [f._cache_size() for f in (device.decode, device.prefill, device.longer_cache)]
    engine, rng = Engine(loaded(cfg), 3), np.random.default_rng(0)
    sizes = [1, 2, 15, 16, 17, 18, 33, 34, 65, 130, 255, 256, 257, 258, 300, 511, 512, 513, 514, 600, 798, 799]
    for round_ in range(2):
        requests = [
            Request(
                ids(n, round_ * 100 + i), int(rng.integers(0, 20)), Sampling(float(i % 3), i % 5), i, score_prompt=i % 4 == 0
            )
            for i, n in enumerate(sizes)
        ]
        run(engine, *requests)
        made = [f._cache_size() for f in (device.decode, device.prefill, device.longer_cache)]
        decode, prefill, longer = (b - a for a, b in zip(before, made, strict=True))
        lengths = 3  # 256, 512 and 816
        assert decode <= lengths and longer <= lengths - 1 and prefill <= 2 * lengths * len(engine_lib.PREFILL)


def test_no_head_is_computed_for_a_prompt_that_is_not_scored():
    engine = Engine(loaded(), 2)
    for score in (False, True):
        arguments = (engine._weights, engine._state.cache, 0, np.zeros(64 + score, np.int32), 0, False, TINY, score)
        with jax.set_mesh(engine._mesh):
            text = device.prefill.lower(*arguments).compile().as_text()
        assert "64,40]" in text and ("64,53]" in text) == score  # the MLP is, the logits are not


def test_the_cache_starts_short_and_grows():
    engine = Engine(loaded(LONG), 2)
    length = lambda: engine._state.cache[0][0].shape[2]
    assert length() == 256
    run(engine, Request(ids(5), 100, GREEDY))
    assert length() == 256
    run(engine, Request(ids(200), 100, GREEDY))
    assert length() == 512
    run(engine, Request(ids(5), 795, GREEDY))
    assert length() == 816
    assert {a.dtype for a in jax.tree.leaves(engine._state.cache)} == {jnp.dtype("float32")}


# -- on many devices ---------------------------------------------------------------------------------------------------


EVEN = dataclasses.replace(TINY, vocab_size=54)  # the vocabulary is split too


@pytest.fixture(scope="module")
def on_one_device():
    return run(Engine(loaded(EVEN), 3), *crowd()[:4])


@pytest.mark.parametrize("axes", [{"tensor": 2}, {"data": 2, "tensor": 2}], ids=str)
def test_on_a_mesh_as_on_one_device(on_one_device, axes):
    engine, data = Engine(loaded(EVEN, **axes), 3), axes.get("data", 1)
    assert len(engine._slots) == (4 if data == 2 else 3)
    requests = run(engine, *crowd()[:4])
    for a, split in (
        (engine._weights.layers[0]["q"], (24, 24 // 2)),
        (engine._weights.head_DV, (24, 54 // 2)),
        (engine._state.cache[0][0], (len(engine._slots) // data, 2 // 2, 144, 4)),
    ):
        assert a.sharding.shard_shape(a.shape) == split
    for got, want in zip(requests, on_one_device, strict=True):
        same(got, want)


# -- bf16 --------------------------------------------------------------------------------------------------------------

BF16 = dataclasses.replace(TINY, precision=FP32.replace("compute=float32", "compute=bfloat16"), residual="auto")


def margin(request: Request, i: int) -> str:
    """How far the two most likely tokens were apart where two runs diverge."""
    (a, p), (b, q) = request.top[i][:2]
    return f"token {i}: {a} or {b}, log-probabilities {p:.4f} and {q:.4f}, {p - q:.4f} apart"


def test_bf16_repeats_its_tokens_and_differs_from_other_batches_only_at_near_ties():
    ask = lambda: [Request(ids(20, i), 40, GREEDY, top_logprobs=2) for i in range(8)]
    on = loaded(BF16)
    first, again = (run(Engine(on, 8), *ask()) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert a.tokens == b.tokens and a.logprobs == b.logprobs  # bit for bit
    assert {a.dtype for a in jax.tree.leaves(Engine(on, 1)._state.cache)} == {jnp.dtype("bfloat16")}
    exact = run(Engine(loaded(), 8), *ask())
    for other in (run(Engine(on, 1), *ask()), exact):
        parted = 0
        for a, b in zip(first, other, strict=True):
            i = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), None)
            if i is not None:
                print(margin(a, i))
                parted += 1
                assert a.top[i][0][1] - a.top[i][1][1] < 0.5, margin(a, i)
        assert parted < 8
    assert any(a.tokens != b.tokens for a, b in zip(first, exact, strict=True))  # rounding is seen at all


# -- the forward pass alone --------------------------------------------------------------------------------------------


def test_keys_are_written_at_their_positions_alone():
    on = loaded()
    with jax.set_mesh(on.mesh):
        cache = forward.init_cache(TINY, 2, 24)
        positions = jnp.asarray([[3, 4], [22, 23]])
        _, after = forward.forward(on.weights, jnp.ones((2, 2), jnp.int32), positions, cache, TINY)
    for a in jax.tree.leaves(after):
        written = np.flatnonzero(np.abs(a).sum((1, 3)))  # [B, T]
        assert written.tolist() == [3, 4, 24 + 22, 24 + 23]


@pytest.mark.parametrize(
    "cfg", [TINY, dataclasses.replace(TINY, n_kv_heads=6), dataclasses.replace(TINY, n_kv_heads=1, rope_scaling=4.0)], ids=str
)
def test_decoding_with_a_cache_is_the_whole_forward_pass(cfg):
    on, params, tokens = loaded(cfg), some_params(cfg), jnp.asarray([ids(20, 1), ids(20, 2)])

    @jax.jit
    def decode(tokens, cache, start):
        positions = start + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x, cache = forward.forward(on.weights, tokens, positions, cache, cfg)
        return forward.logits(on.weights, x), cache

    with jax.set_mesh(on.mesh):
        cache, parts, start = forward.init_cache(cfg, 2, 23), [], 0
        for n in (7, 1, 1, 1, 7, 1, 1, 1):  # a prompt, single tokens, more text at once
            part, cache = decode(tokens[:, start : start + n], cache, jnp.int32(start))
            parts, start = [*parts, part], start + n
    whole = model.logits(params, tokens, cfg)
    assert jnp.abs(whole).max() > 3
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("residual", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
def test_dtypes(compute, residual):
    cfg = dataclasses.replace(TINY, precision=FP32.replace("compute=float32", f"compute={compute}"), residual=residual)
    on, tokens = loaded(cfg), jnp.ones((2, 3), jnp.int32)

    def decode(cache):
        x, after = forward.forward(on.weights, tokens, tokens, cache, cfg)
        return x, forward.logits(on.weights, x), after

    with jax.set_mesh(on.mesh), jax.numpy_dtype_promotion("strict"):
        cache = forward.init_cache(cfg, 2, 30)
        x, logits, after = jax.eval_shape(decode, cache)
    assert (x.dtype, logits.dtype) == (compute, jnp.float32)
    assert {a.dtype for a in jax.tree.leaves((cache, after))} == {jnp.dtype(compute)}
    assert {name: a.dtype == jnp.float32 for name, a in on.weights.layers[0].items() if name.endswith("norm")} == {
        "attention_norm": True,
        "mlp_norm": True,
    }
    assert on.weights.layers[0]["q"].dtype == on.weights.embed_VD.dtype == compute
