"""Text from a checkpoint: greedy or sampled, with a KV cache, streamed to the terminal.

python -m tinyllama_jax.generate --checkpoint RUN_OR_HF_DIR --prompt TEXT
"""

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tinyllama_jax.base import dims, files
from tinyllama_jax.base.config import Model
from tinyllama_jax.base.errors import UserError, run_main
from tinyllama_jax.core import model
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.hub import llama
from tinyllama_jax.run import checkpoint


class Sampling(NamedTuple):
    """How the next token is drawn; the defaults draw from the model's own distribution."""

    temperature: float = 1.0  # 0: greedy, the most likely token
    top_k: int = 0  # only the k most likely tokens; 0: all
    top_p: float = 1.0  # only the most likely tokens that together reach this probability; 1: all


# -- decoding: pure functions over parameters --------------------------------------------------------------------------


def filtered(logits_V: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [V] after temperature, top-k and top-p, in this order; -inf where a token cannot be drawn.

    As Transformers' warpers: ties with the k-th token stay, and the token that crosses top_p is kept.
    """
    logits_V = logits_V / sampling.temperature
    if 0 < sampling.top_k < logits_V.size:
        kth = lax.top_k(logits_V, sampling.top_k)[0][-1]
        logits_V = jnp.where(logits_V < kth, -jnp.inf, logits_V)
    if sampling.top_p < 1:
        order_V = jnp.argsort(logits_V, descending=True)
        p_V = jax.nn.softmax(logits_V[order_V])
        kept_V = jnp.cumsum(p_V) - p_V < sampling.top_p  # the probability of all more likely tokens
        logits_V = jnp.where(jnp.zeros_like(kept_V).at[order_V].set(kept_V), logits_V, -jnp.inf)
    return logits_V


@partial(jax.jit, static_argnames=("cfg", "sampling"), donate_argnames="cache")
def _next_token(params, token, position, cache, key, cfg: Model, sampling: Sampling):
    """(the token after `token`, which is at `position`; the cache with `token` added)."""
    logits_BSV, cache = model.decode(params, token[None, None], cache, position, cfg)
    logits_V = logits_BSV[0, 0]
    if sampling.temperature == 0:
        return jnp.argmax(logits_V), cache
    return jax.random.categorical(jax.random.fold_in(key, position), filtered(logits_V, sampling)), cache


@partial(jax.jit, static_argnames="cfg", donate_argnames="cache")
def _prefill(params, tokens_S, cache, cfg: Model):
    """The cache with a prompt added. Its logits are unused, so the head is not computed."""
    return model.decode(params, tokens_S[None], cache, jnp.int32(0), cfg)[1]


def stream(
    params: dict,
    cfg: Model,
    prompt: list[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_id: int = -1,
    seed: int = 0,
    sample: int = 0,
) -> Iterator[int]:
    """The tokens that follow `prompt`, one by one as they are computed.

    Ends after `max_new_tokens`, after `eos_id` (which is returned too), or when prompt and answer fill the context of
    `cfg.seq_len` tokens. The token at a position depends on (seed, sample, position) and on the tokens before it, not on
    `max_new_tokens`. Compiles once per model and sampling, and once per power of two of the prompt's length.
    Raises UserError if the prompt is empty or leaves no room.
    """
    if not prompt:
        raise UserError("the prompt has no tokens; begin with the tokenizer's bos or eos")
    if len(prompt) >= cfg.seq_len:
        raise UserError(
            f"the prompt has {len(prompt):,} tokens, and the model's context is {cfg.seq_len:,}; "
            f"shorten it to {cfg.seq_len - 1:,} or fewer"
        )
    key = jax.random.fold_in(jax.random.key(seed), sample)
    return _tokens(params, cfg, prompt, min(max_new_tokens, cfg.seq_len - len(prompt)), sampling, eos_id, key)


def _tokens(params, cfg: Model, prompt: list[int], n: int, sampling: Sampling, eos_id: int, key: jax.Array) -> Iterator[int]:
    cache = model.init_cache(cfg, 1, cfg.seq_len)
    before = len(prompt) - 1  # these go into the cache at once; the last token of the prompt starts the loop
    if before:
        padded = min(1 << (before - 1).bit_length(), cfg.seq_len)  # padding in the cache is overwritten before it is read
        cache = _prefill(params, np.asarray(prompt[:-1] + [0] * (padded - before), np.int32), cache, cfg)
    token = jnp.int32(prompt[-1])
    for position in range(before, before + n):
        token, cache = _next_token(params, token, np.int32(position), cache, key, cfg, sampling)
        on_host = int(token)
        yield on_host
        if on_host == eos_id:
            return


# -- from a folder to text ---------------------------------------------------------------------------------------------


def load(path: str | Path, step: int | None = None) -> tuple[dict, Model, Tokenizer]:
    """(parameters on the device, model, tokenizer) of a run folder (its newest step, or `step`) or a Hugging Face folder.

    On a CPU everything is fp32, since XLA's bf16 is many times slower on it; elsewhere matrices have the model's compute
    dtype. Rows of the vocabulary without a token (padding) are left out. Raises UserError.
    """
    files.check_local("--checkpoint", path)
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run folder or a Hugging Face folder")
    if (path / "checkpoints").is_dir():
        params, config, _ = checkpoint.load_params(path, step)
        cfg, tokenizer = config.model, tokenizer_lib.load(path / "tokenizer")
    elif step is not None:
        raise UserError(f"--step {step}: {path} is not a run folder, so it has no steps")
    else:
        (params, cfg), tokenizer = llama.load_folder(path), tokenizer_lib.load(path)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise UserError(f"{path}: its tokenizer has {tokenizer.vocab_size:,} pieces, and its model only {cfg.vocab_size:,}")
    compute = "float32" if jax.default_backend() == "cpu" else cfg.compute_dtype
    cfg = dataclasses.replace(
        cfg,
        vocab_size=tokenizer.vocab_size,
        precision=f"params=float32,compute={compute},output=float32",
        residual="float32" if compute == "float32" else cfg.residual,
        attention="auto",  # the kernel of training may not run on this device
    )
    flat = model.flatten(params)
    flat = {p.name: flat[p.name][tuple(slice(n) for n in dims.shape(p, cfg))] for p in dims.PARAMETERS}
    # norms stay fp32: they are small, and the model multiplies by them in fp32
    dtypes = {p.name: "float32" if p.kind == "norm" else compute for p in dims.PARAMETERS}
    return model.unflatten({name: jnp.asarray(a, dtypes[name]) for name, a in flat.items()}), cfg, tokenizer


def first_tokens(path: str | Path, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's ids, with bos in front if the documents of training (or Hugging Face's settings) had it.

    An empty prompt begins a new document: it is bos, or else eos, which separated documents.
    """
    ids = tokenizer.encode(prompt)
    if tokenizer.bos_id >= 0 and tokenizer_lib.documents_begin_with_bos(Path(path)):
        return [tokenizer.bos_id, *ids]
    return ids or ([tokenizer.eos_id] if tokenizer.eos_id >= 0 else [])


class Text:
    """Decodes a growing list of tokens into parts that no later token changes."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._tokens, self._printed = tokenizer, [], ""

    def add(self, tokens: list[int], last: bool = False) -> str:
        """The text that `tokens` complete; all the remaining text if they are the `last`.

        A character of several byte tokens waits for its last one: until then it decodes to up to three U+FFFD.
        """
        self._tokens += tokens
        text = self._tokenizer.decode(self._tokens)
        if not last:
            waiting = len(text) - len(text.rstrip("\ufffd"))
            text = text[: len(text) - min(waiting, 3)]
            if not text.startswith(self._printed):  # some decoders show whole characters as U+FFFD beside half of one
                return ""
        new, self._printed = text[len(self._printed) :], text
        return new


def main(argv: list[str]) -> int:
    """Prints samples; returns the exit code."""
    args = _arguments(argv)
    with contextlib.redirect_stdout(sys.stderr):
        params, cfg, tokenizer = load(args.checkpoint, args.step)
    prompt = first_tokens(args.checkpoint, tokenizer, args.prompt)
    sampling = Sampling(0.0) if args.greedy else Sampling(args.temperature, args.top_k, args.top_p)
    answer = partial(stream, params, cfg, prompt, max_new_tokens=args.max_new_tokens, sampling=sampling)
    answer(eos_id=tokenizer.eos_id)  # refuses a wrong prompt before anything is printed
    how = "greedy" if args.greedy else f"temperature {args.temperature:g}, top-k {args.top_k}, top-p {args.top_p:g}"
    _note(f"{args.checkpoint}: {dims.n_parameters(cfg):,} parameters, {cfg.compute_dtype} on {jax.devices()[0].device_kind}")
    _note(f"{how}, seed {args.seed}; prompt of {len(prompt):,} tokens, context of {cfg.seq_len:,}")
    for sample in range(args.samples):
        tokens = answer(eos_id=tokenizer.eos_id, seed=args.seed, sample=sample)
        if args.samples > 1:
            print(f"--- sample {sample + 1} of {args.samples} ---", flush=True)
        _note(_print(tokens, cfg, tokenizer, prompt))
    return 0


def _print(tokens: Iterator[int], cfg: Model, tokenizer: Tokenizer, prompt: list[int]) -> str:
    """Prints the prompt and the tokens as they come; returns a line that says why they ended and how fast they came."""
    text, n, started = Text(tokenizer), 0, time.perf_counter()
    print(text.add(prompt), end="", flush=True)
    for n, token in enumerate(tokens, 1):
        if n == 1:
            first = time.perf_counter()
        if token != tokenizer.eos_id:
            print(text.add([token]), end="", flush=True)
    print(text.add([], last=True), flush=True)
    if token == tokenizer.eos_id:
        why = "end of text"
    elif len(prompt) + n == cfg.seq_len:
        why = f"stopped: the context of {cfg.seq_len:,} tokens is full"
    else:
        why = "stopped: --max-new-tokens"
    rate = f", then {(n - 1) / (time.perf_counter() - first):,.1f} tokens/s" if n > 1 else ""
    return f"[{why}; {n:,} tokens: the first after {first - started:.2f} s{rate}]"


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # stdout is for the generated text alone


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tinyllama_jax.generate", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--checkpoint", required=True, help="a run folder or a Hugging Face folder")
    parser.add_argument("--prompt", required=True, help='the text to continue; "" begins a new document')
    parser.add_argument("--step", type=int, help="which checkpoint of the run (the newest)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens to write at most (128)")
    parser.add_argument("--temperature", type=float, default=0.8, help="below 1: likely tokens become likelier (0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k most likely tokens; 0: from all (0)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the most likely tokens that together reach this probability (1.0)"
    )
    parser.add_argument(
        "--greedy", action="store_true", help="always take the most likely token; the three options above are ignored (no)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (0)")
    parser.add_argument("--samples", type=int, default=1, help="texts to write (1)")
    args = parser.parse_args(argv)
    if any("\ud800" <= character <= "\udfff" for character in args.prompt):  # Python's sign for bytes that are not UTF-8
        raise UserError(f"--prompt {args.prompt!a}: is not UTF-8")
    for name, ok, remedy in (
        ("max_new_tokens", 1 <= args.max_new_tokens < 2**31, "must be at least 1, and less than 2^31"),
        (
            "temperature",
            1e-3 <= args.temperature <= 1e3,
            "must lie between 0.001 and 1,000; for the most likely token say --greedy",
        ),
        ("top_k", 0 <= args.top_k < 2**31, "must be 0 (all) or more, and less than 2^31"),
        ("top_p", 0 < args.top_p <= 1, "must lie in (0, 1]"),
        ("seed", 0 <= args.seed < 2**31, "must lie in [0, 2^31)"),
        ("samples", 1 <= args.samples <= 10_000, "must lie between 1 and 10,000"),
    ):
        if not ok:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: {remedy}")
    return args


if __name__ == "__main__":
    run_main(main)
