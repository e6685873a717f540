"""From ids to text: what is given adds up, is never taken back, ends before a stop string, and takes linear time."""

import itertools

import numpy as np
import pytest
from tokenizers_for_tests import TOKENIZERS, make

from tinyllama_jax.inference.text import Text

TEXTS = [
    "def  f(x):\n    return  x",
    " leading",
    "naïve café — 你好, мир 😀👩‍👩‍👧!",
    "ends in the middle: 😀",
    "\ufffd a real one \ufffd",
    "",
]


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request, tmp_path_factory):
    return make(request.param, tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_printed_adds_up_and_is_never_taken_back(tokenizer, text):
    tokens = tokenizer.encode(text)
    seen = Text(tokenizer)
    parts = [seen.add([token]) for token in tokens]
    assert "".join(parts) == text.rstrip("\ufffd")
    assert "".join(parts) + seen.add([], last=True) == text == tokenizer.decode(tokens)
    assert len([part for part in parts if part]) >= len(text) / 8  # not kept back to the end
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


def test_half_a_character_is_shown_at_the_end(tokenizer):
    tokens = tokenizer.encode("a😀")
    assert len(tokens) >= 5  # four of them bytes
    seen = Text(tokenizer)
    assert "".join(seen.add([token]) for token in tokens[:-1]) == "a"
    assert set(seen.add([], last=True)) == {"\ufffd"}
    never_ending = Text(tokenizer)
    assert len("".join(never_ending.add(tokens[-1:]) for _ in range(9))) == 6  # bytes that begin nothing wait no longer


# -- stop strings ------------------------------------------------------------------------------------------------------


def until(text: str, stop: list[str]) -> str:
    """The text before the stop string that is complete first, as characters come one by one."""
    ends = [i for i in range(len(text) + 1) if text[:i].endswith(tuple(stop))]
    return text[: ends[0] - max(len(s) for s in stop if text[: ends[0]].endswith(s))] if ends else text


def shown(tokenizer, tokens, stop, sizes) -> tuple[list[str], bool]:
    """What `add` returns for `tokens`, so many at a time."""
    text, parts, left, sizes = Text(tokenizer, stop), [], list(tokens), itertools.cycle(sizes)
    while left:
        n = next(sizes)
        parts.append(text.add(left[:n]))
        left = left[n:]
    parts.append(text.add([], last=True))
    assert text.add(tokenizer.encode("more")) == "" or not text.stopped
    return parts, text.stopped


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("one\n\nUser: two", ["\nUser:"], "one\n"),
        ("one\n\nUser two", ["\nUser:"], "one\n\nUser two"),  # held back, then given
        ("stop", ["stop"], ""),
        ("a stop stop", ["stop"], "a "),
        ("aaab", ["aab"], "a"),
        ("an abc, then", ["abcd", "bc"], "an a"),  # the one that is complete first
        ("an abc, then", ["abc", "b"], "an a"),
        ("an abc, then", ["bc", "abc"], "an "),  # at the same time: the longer one
        ("xy é😀 z", ["😀"], "xy é"),
        ("xy é😀 z", ["é😀 "], "xy "),
        ("ends with half of it: <|im_e", ["<|im_end|>"], "ends with half of it: <|im_e"),
        ("long " * 60 + "END of it", ["long " * 60 + "END"], ""),
        ("x" * 200, ["x" * 199 + "y"], "x" * 200),
        ("nothing", [""], "nothing"),
    ],
)
@pytest.mark.parametrize("sizes", [[1], [2], [3, 1], [1_000]], ids=str)
def test_stop_strings(tokenizer, text, stop, want, sizes):
    tokens = tokenizer.encode(text)
    parts, stopped = shown(tokenizer, tokens, stop, sizes)
    assert "".join(parts) == want
    assert stopped == (want != text)
    if stop != [""]:
        assert want == until(text, stop)  # the reference agrees


def test_random_texts_and_stop_strings(tokenizer):
    """Against a reference that decodes everything first."""
    rng = np.random.default_rng(0)
    alphabet = ["a", "b", "ab", " ", "\n", "é", "好", "😀", "def ", "return"]
    some = lambda most: "".join(rng.choice(alphabet) for _ in range(rng.integers(1, most + 1)))
    stops = 0
    for _ in range(150):
        text, stop = "x" + some(60), [some(4) for _ in range(rng.integers(0, 4))]
        tokens = tokenizer.encode(text)
        parts, stopped = shown(tokenizer, tokens, stop, rng.integers(1, 6, 7).tolist())
        want = until(text, stop)
        assert ("".join(parts), stopped) == (want, want != text), (text, stop)
        given = "".join(parts[:-1])
        assert want.startswith(given) and len(want) - len(given) < max([4, *map(len, stop)])  # no more is held back
        stops += stopped
    assert 40 < stops < 140


def test_random_bytes(tokenizer):
    """Tokens as a model gone wrong gives them: nothing that the whole text has is lost.

    Hugging Face's decoder makes U+FFFD of all bytes beside one that belongs to no character; the parts may show them.
    """
    rng, half = np.random.default_rng(1), tokenizer.encode("é")[-1:]
    spoils = "é" not in tokenizer.decode(tokenizer.encode("é") + half)
    for _ in range(30):
        tokens = rng.integers(3, tokenizer.vocab_size, 200).tolist()
        parts, _ = shown(tokenizer, tokens, [], rng.integers(1, 6, 7).tolist())
        whole, given = (text.replace("\ufffd", "") for text in (tokenizer.decode(tokens), "".join(parts)))
        left = iter(given)
        assert all(character in left for character in whole)
        assert given == whole or spoils


# -- long texts --------------------------------------------------------------------------------------------------------


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer):
        self._tokenizer, self.decoded = tokenizer, 0

    def decode(self, tokens):
        self.decoded += len(tokens)
        return self._tokenizer.decode(tokens)

    def encode(self, text):
        return self._tokenizer.encode(text)


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("def f(x):\n    return x + 1\n", ["\n\n\n"]),
        ("你好世界", []),  # bytes alone: three a character
        ("😀", ["😀!"]),  # the beginning of a stop string is always there
        ("é😀好a", []),
        ("x ", ["x x y"]),
        (" ", []),
    ],
)
def test_a_long_text_takes_linear_time(tokenizer, text, stop):
    piece = tokenizer.encode(text * (5_000 // len(tokenizer.encode(text * 10)) * 10))
    counting = Counting(tokenizer)
    parts, _ = shown(counting, piece, stop, [1])
    assert "".join(parts) == tokenizer.decode(piece)
    assert len(piece) > 900
    assert counting.decoded <= 25 * len(piece)
