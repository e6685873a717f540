"""The passkey test: a random number of five digits, hidden in repeated sentences and asked for at the end.

Mohtashami & Jaggi 2023 (arXiv:2305.16300, landmark attention), whose wording this is.
"""

import bisect
import math
import random
from typing import NamedTuple

import numpy as np

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.evals.score import Scorer, Text
from tinyllama_jax.inference.text import first_tokens

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEY = "The pass key is {0}. Remember it. {0} is the pass key."
QUESTION = "\nWhat is the pass key? The pass key is"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the filler that come before the key
SEED = 0


class Scored(NamedTuple):
    """The share of right answers, its standard error (None for one try), and the number of tries."""

    accuracy: float
    stderr: float | None
    tries: int


def _summary(right: np.ndarray) -> Scored:
    """Of tries that are right or not [n]."""
    error = float(np.std(right, ddof=1) / np.sqrt(right.size)) if right.size > 1 else None
    return Scored(float(np.mean(right)), error, right.size)


def scores(scorer: Scorer, tokenizer: Tokenizer, bos: bool, tries: int) -> tuple[Scored, dict[float, Scored]]:
    """(the result of all tries, depth -> the result of `tries` numbers there), each in a text as long as the context.

    A try is right if the tokens that the model finds most likely, one after another, are those of the number. Raises UserError
    if the context is too short.
    """
    numbers = {depth: random.Random(f"{SEED} {depth}") for depth in DEPTHS}
    texts = [
        text(tokenizer, bos, scorer.context, depth, number.randint(10_000, 99_999))
        for depth, number in numbers.items()
        for _ in range(tries)
    ]
    right = np.array([scored.greedy.all() for scored in scorer(texts)]).reshape(len(DEPTHS), tries)
    return _summary(right), {depth: _summary(row) for depth, row in zip(DEPTHS, right, strict=True)}


def text(tokenizer: Tokenizer, bos: bool, context: int, depth: float, number: int) -> Text:
    """The tokens of a try, of which those of the number at the end are scored.

    Together they are as many as the context, or fewer by less than one more word takes. The filler ends with a whole sentence.
    """
    fewest = len(FILLER.split())  # five sentences: enough for DEPTHS
    encoded = lambda more, n: first_tokens(tokenizer, bos, _prompt(depth, number, n) + more)
    size = lambda n: len(encoded(f" {number}", n))
    if (least := size(fewest)) > context:
        remedy = f"a longer one, with --longer, must be {math.ceil(10 * least / context) / 10:g} times as long as this"
        raise UserError(f"--passkey: needs {least:,} tokens, and the context has {context:,}; {remedy}")
    n = bisect.bisect_right(range(context), context, lo=fewest, key=size) - 1
    while size(n) > context:  # a word's tokens can depend on its neighbours
        n -= 1
    before, whole = encoded("", n), encoded(f" {number}", n)
    same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    return Text(whole, len(whole) - same)


def _prompt(depth: float, number: int, n: int) -> str:
    """With `n` words of filler."""
    words = FILLER.split()
    filler = (words * (n // len(words) + 1))[-n:]
    ends = [0, *(i for i, word in enumerate(filler, start=1) if word.endswith("."))]
    at = ends[round(depth * (len(ends) - 1))]
    return TASK + " ".join([*filler[:at], KEY.format(number), *filler[at:]]) + QUESTION
