"""The options that `generate`, `chat`, `serve` and `evaluate` share."""

import argparse

import jax

from tinyllama_jax.base import dims
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.inference import sampling as sampling_lib
from tinyllama_jax.inference import weights
from tinyllama_jax.inference.engine import Engine, Request
from tinyllama_jax.inference.retrieval import Index
from tinyllama_jax.inference.sampling import Sampling
from tinyllama_jax.inference.speculative import MOST_TOKENS, check_vocabulary
from tinyllama_jax.inference.weights import Loaded


def add_checkpoint(parser: argparse.ArgumentParser, draft: bool = True) -> None:
    """The options that name a checkpoint and say how it is computed. `draft`: whether another one may draft."""
    parser.add_argument("--checkpoint", required=True, help="a run folder, a Hugging Face folder or a GGUF file")
    parser.add_argument("--step", type=int, help="which checkpoint of the run (the newest)")
    parser.add_argument(
        "--weights",
        choices=weights.KINDS,
        default="auto",
        help="their type in memory; auto: fp32 on a CPU, the model's compute dtype elsewhere (auto)",
    )
    if not draft:
        parser.set_defaults(draft=None)
        return
    parser.add_argument(
        "--draft", metavar="DIR|ngram", help="a smaller checkpoint of the same vocabulary, or ngram: prompt lookup (no draft)"
    )
    parser.add_argument(
        "--draft-tokens", type=int, metavar="K", help="tokens that the draft proposes at a time (4; 8 for ngram)"
    )


def load(args: argparse.Namespace, slots: int = 1) -> tuple[Loaded, Engine]:
    """The checkpoint that `args` name, and an engine for it. Raises UserError."""
    loaded, draft = weights.load(args.checkpoint, args.step, args.weights), None
    if args.draft is None:
        if args.draft_tokens is not None:
            raise UserError(f"--draft-tokens {args.draft_tokens}: needs --draft, a checkpoint or ngram")
        return loaded, Engine(loaded, slots)
    if args.draft != "ngram":
        draft = weights.load(args.draft, weights=args.weights, option="--draft")
        check_vocabulary(loaded.tokenizer, draft.tokenizer, args.draft)
    tokens = (4 if draft else 8) if args.draft_tokens is None else args.draft_tokens
    if not 1 <= tokens <= MOST_TOKENS:
        raise UserError(f"--draft-tokens {tokens}: must lie between 1 and {MOST_TOKENS}")
    return loaded, Engine(loaded, slots, draft, tokens)


def add_retrieval(parser: argparse.ArgumentParser) -> None:
    """The options that put passages before a question."""
    add = parser.add_argument
    add("--retrieve", metavar="INDEX", help="put passages of this index, which `retrieve` made, before each question (none)")
    add("--passages", type=int, metavar="K", help="how many at most (3)")
    add("--retrieve-tokens", type=int, metavar="N", help="how many tokens they may have together (a quarter of the context)")


def index(args: argparse.Namespace) -> Index | None:
    """The index that `args` name; None without --retrieve. Raises UserError."""
    if args.retrieve is not None:
        return Index(args.retrieve, 3 if args.passages is None else args.passages, args.retrieve_tokens)
    for name in ("passages", "retrieve_tokens"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: needs --retrieve INDEX")
    return None


def introduced(name: str, args: argparse.Namespace, loaded: Loaded) -> str:
    """A line: the model, the type in which it is computed, and where these differ its weights' form and its draft."""
    model = loaded.model
    weights = "" if args.weights in ("auto", model.compute_dtype) else f", weights in {args.weights}"
    draft = f", draft {args.draft}" if args.draft else ""
    where = jax.devices()[0].device_kind
    return f"{name}: {dims.n_parameters(model):,} parameters, {model.compute_dtype} on {where}{weights}{draft}"


def drafted(request: Request, engine: Engine) -> str:
    """How many tokens a pass of the model gave, and what share of a draft model's was accepted; "" without a draft."""
    if not engine.draft_tokens or not request.rounds:
        return ""
    accepted = max(len(request.tokens) - request.rounds, 0) / (request.rounds * engine.draft_tokens)
    share = f" ({accepted:.0%} of the draft's accepted)" if engine.has_draft_model else ""  # prompt lookup may propose fewer
    return f", {len(request.tokens) / request.rounds:.2f} tokens a pass{share}"


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """The options of how tokens are drawn, and of where an answer ends."""
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=max_new_tokens, help=f"most tokens to write ({max_new_tokens})")
    add("--temperature", type=float, default=0.8, help="below 1: likely tokens become likelier (0.8)")
    add("--top-k", type=int, default=0, help="draw from the k most likely tokens; 0: from all (0)")
    add("--top-p", type=float, default=1.0, help="draw from the most likely tokens that together reach this probability (1.0)")
    add("--min-p", type=float, default=0.0, help="draw from tokens at least this likely, relative to the most likely (0.0)")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: tokens seen before become less likely (1.0)")
    add("--greedy", action="store_true", help="always take the most likely token; temperature, top-k, top-p, min-p are ignored")
    add("--seed", type=int, default=0, help="seed of the sampling (0)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times (none)")
    add("--show-prompt", action="store_true", help="print the token ids that go into the model")


def check(args: argparse.Namespace) -> None:
    """Raises UserError for a value out of bounds, or a text that is not UTF-8."""
    for name in ("prompt", "stop", "system"):
        for text in [value] if isinstance(value := getattr(args, name, None), str) else value or ():
            if any("\ud800" <= character <= "\udfff" for character in text):  # how Python represents bytes that are not UTF-8
                raise UserError(f"--{name} {text!a}: is not UTF-8")
    if any(not text for text in args.stop):
        raise UserError('--stop "": is empty, and would end every text at once')
    if not 1 <= args.max_new_tokens < 2**31:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: must be at least 1, and less than 2^31")
    if not 1e-3 <= args.temperature <= 1e3:
        remedy = "must lie between 0.001 and 1,000; for the most likely token say --greedy"
        raise UserError(f"--temperature {args.temperature}: {remedy}")
    sampling_lib.check(
        Sampling(*(getattr(args, field) for field in Sampling._fields)), lambda field: "--" + field.replace("_", "-")
    )
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed {args.seed}: must lie in [0, 2^31)")


def sampling(args: argparse.Namespace) -> Sampling:
    """The sampling that `args` ask for."""
    if args.greedy:
        return Sampling(0.0, repetition_penalty=args.repetition_penalty)
    return Sampling(*(getattr(args, field) for field in Sampling._fields))


def described(sampling: Sampling) -> str:
    """A short text that names the settings of `sampling`."""
    penalty = f", repetition penalty {sampling.repetition_penalty:g}" if sampling.repetition_penalty != 1 else ""
    if sampling.temperature == 0:
        return f"greedy{penalty}"
    min_p = f", min-p {sampling.min_p:g}" if sampling.min_p else ""
    return f"temperature {sampling.temperature:g}, top-k {sampling.top_k}, top-p {sampling.top_p:g}{min_p}{penalty}"
