"""Text from a checkpoint: greedy or sampled, with a KV cache, streamed to the terminal.

python -m tinyllama_jax.generate --checkpoint PATH --prompt TEXT
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator

from tinyllama_jax.base.errors import UserError, run_main
from tinyllama_jax.inference import options
from tinyllama_jax.inference.engine import Request
from tinyllama_jax.inference.text import Text, eos_ids, first_tokens
from tinyllama_jax.inference.weights import Loaded


def main(argv: list[str]) -> int:
    """Prints samples; returns the exit code."""
    args = _arguments(argv)
    with contextlib.redirect_stdout(sys.stderr):
        loaded, engine = options.load(args)
    model, tokenizer = loaded.model, loaded.tokenizer
    prompt = first_tokens(tokenizer, loaded.begin_with_bos, args.prompt)
    if args.show_prompt:
        _note(f"prompt: {prompt}")
    sampling = options.sampling(args)
    _note(options.introduced(args.checkpoint, args, loaded))
    settings = options.described(sampling)
    for sample in range(args.samples):
        request = Request(prompt, args.max_new_tokens, sampling, args.seed, sample, eos_ids(tokenizer))
        tokens = engine.stream(request)  # refuses a wrong prompt before anything is printed
        if not sample:
            _note(f"{settings}, seed {args.seed}; prompt of {len(prompt):,} tokens, context of {model.seq_len:,}")
        if args.samples > 1:
            print(f"--- sample {sample + 1} of {args.samples} ---", flush=True)
        _note(f"[{_print(tokens, request, loaded, args.stop)}{options.drafted(request, engine)}]")
    return 0


def _print(tokens: Iterator[list[int]], request: Request, loaded: Loaded, stop: list[str]) -> str:
    """Prints the prompt and the tokens as they come; returns a line on why they ended and how fast they came."""
    text, started, first = Text(loaded.tokenizer, stop, before=request.prompt), time.perf_counter(), 0.0
    print(loaded.tokenizer.decode(request.prompt), end="", flush=True)
    for new in tokens:
        first = first or time.perf_counter()
        print(text.add([token for token in new if token not in request.stop_ids]), end="", flush=True)
        if text.stopped:
            break
    print(text.add([], last=True), flush=True)
    tokens.close()
    n = len(request.tokens)
    reasons = {
        "stop": "end of text",
        "length": "stopped: --max-new-tokens",
        "context": f"stopped: the context of {loaded.model.seq_len:,} tokens is full",
    }
    reason = "end of text: a stop string" if text.stopped else reasons[request.finish]
    rate = f", then {(n - 1) / (time.perf_counter() - first):,.1f} tokens/s" if n > 1 else ""
    return f"{reason}; {n:,} tokens: the first after {first - started:.2f} s{rate}"


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # stdout is for the generated text alone


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tinyllama_jax.generate", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    options.add_checkpoint(parser)
    parser.add_argument("--prompt", required=True, help='the text to continue; "" begins a new document')
    options.add_sampling(parser, max_new_tokens=128)
    parser.add_argument("--samples", type=int, default=1, help="texts to write (1)")
    args = parser.parse_args(argv)
    options.check(args)
    if not 1 <= args.samples <= 10_000:
        raise UserError(f"--samples {args.samples}: must lie between 1 and 10,000")
    return args


if __name__ == "__main__":
    run_main(main)
