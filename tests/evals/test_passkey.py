"""The passkey test: what is asked and compared, and that a try is right where real greedy generation gives the number."""

import dataclasses
from types import SimpleNamespace

import models
import numpy as np
import pytest
from tokenizers_for_tests import TOKENIZERS, make

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.evals import passkey
from tinyllama_jax.evals.score import Scorer, Scores, Text
from tinyllama_jax.inference.engine import Engine, Request


class Remembers:
    """A scorer that gives back every token but, in texts whose number it does not know, the last."""

    context = 900

    def __init__(self, knows):
        self.knows, self.texts = knows, []

    def __call__(self, texts: list[Text]) -> list[Scores]:
        self.texts = texts
        return [Scores(np.zeros(n), np.arange(n) < n - (not self.knows(ids, n))) for ids, n in texts]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_number_is_hidden_at_its_depth_and_asked_for_at_the_end(kind, tmp_path):
    tokenizer = make(kind, tmp_path)
    number_of = lambda ids, n: tokenizer.decode(ids)[-5:]
    scorer = Remembers(lambda ids, n: int(number_of(ids, n)) % 2)
    mean, by_depth = passkey.scores(scorer, tokenizer, True, 3)
    assert list(by_depth) == [0, 0.25, 0.5, 0.75, 1] and len(scorer.texts) == 15
    longest = max(len(tokenizer.encode(f"It is {word} so")) for word in passkey.FILLER.split())
    numbers = []
    for i, (ids, n) in enumerate(scorer.texts):
        text, number = tokenizer.decode(ids), number_of(ids, n)
        numbers.append(number)
        assert ids[0] == tokenizer.bos_id and 900 - longest <= len(ids) <= 900
        assert tokenizer.decode(ids[-n:]).strip() == number and 10_000 <= int(number) <= 99_999
        assert text.startswith(passkey.TASK) and text.endswith(f"{passkey.QUESTION} {number}") and text.count(number) == 3
        key = passkey.KEY.format(number)
        before, after = text.removeprefix(passkey.TASK).split(key)
        after = after.removesuffix(f"{passkey.QUESTION} {number}")
        assert len(before) / len(before + after) == pytest.approx(passkey.DEPTHS[i // 3], abs=0.04)
        assert before.strip()[-1:] in ("", ".") and (before + after).rstrip().endswith("There and back again.")
    right = np.array([int(number) % 2 for number in numbers]).reshape(5, 3)
    assert len(set(numbers)) == 15 and 0 < right.mean() < 1
    assert [row.accuracy for row in by_depth.values()] == pytest.approx(right.mean(1))
    assert mean.accuracy == pytest.approx(right.mean()) and mean.tries == 15
    assert mean.stderr == pytest.approx(np.sqrt(right.mean() * (1 - right.mean()) / 14))
    again = Remembers(scorer.knows)
    passkey.scores(again, tokenizer, True, 1)
    assert again.texts == scorer.texts[::3]  # more tries begin with the same ones
    with pytest.raises(
        UserError, match=r"--passkey: needs [2-4]\d\d tokens, and the context has 32; a longer one, with --longer, "
    ):
        passkey.scores(SimpleNamespace(context=32), tokenizer, True, 1)


def test_a_try_is_right_where_greedy_generation_gives_the_number(tmp_path):
    tokenizer = make("byte-level BPE", tmp_path)
    loaded = models.loaded(dataclasses.replace(models.TINY, vocab_size=420, seq_len=512))
    scorer, engine = Scorer(loaded), Engine(loaded, 2)
    tries = [passkey.text(tokenizer, False, 512, depth, 31_415) for depth in (0.25, 0.75)]
    asked = models.run(engine, *(Request(ids[:-n], n, models.GREEDY) for ids, n in tries))
    written = [Text(ids[:-n] + request.tokens, n) for (ids, n), request in zip(tries, asked, strict=True)]
    other = [Text([*ids[:-1], (ids[-1] + 1) % 420], n) for ids, n in written]
    for a, b in zip(scorer(written), scorer(other), strict=True):
        assert a.greedy.all() and b.greedy.tolist() == [True] * (len(b.greedy) - 1) + [False]
