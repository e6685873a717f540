"""Planted copies are found and nothing else is, however they are written; the work stays linear in one great bucket."""

import itertools
import random

import numpy as np
import pytest

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data.prepare import duplicates

WORDS = [f"w{i}" for i in range(30_000)]


def jaccard(a: list, b: list) -> float:
    """The similarity by its definition, of sets of word 5-grams."""
    a, b = ({tuple(x[i : i + 5]) for i in range(len(x) - 4)} for x in (a, b))
    return len(a & b) / len(a | b)


def copies_in(texts: list[str], method: str = "minhash", threshold: float = 0.8) -> dict[int, int]:
    looked = [duplicates.look(method, threshold, [text]) for text in texts]
    for doc, (rows, _) in enumerate(looked):
        rows["doc"] = doc
    pairs = duplicates.pairs(method, np.concatenate([rows for rows, _ in looked]))
    return duplicates.copies(pairs, lambda doc: looked[doc][1], threshold)


def planted(rng: random.Random, n: int) -> tuple[list[list[str]], dict[int, tuple[int, float]]]:
    """Documents in random order, 2 n / 3 of which come in pairs; the later one of each pair -> the earlier, similarity.

    Of half of the pairs, words here and there differ; of the others, the end. A sixth have a similarity of 0.8 exactly.
    """
    docs, pairs = [], []
    for i in range(n // 3):
        words = rng.choices(WORDS, k=rng.choice([40, 184, 184, 700, 5_000] if i % 20 == 0 else [40, 184, 184, 700]))
        other = list(words)
        if i % 3 == 0 and len(words) == 184:  # 160 of 200
            other[164:] = rng.choices(WORDS, k=20)
        elif i % 2:
            for at in rng.sample(range(len(words)), int(len(words) * rng.uniform(0, 0.08))):
                other[at] = rng.choice(WORDS)
        else:
            cut = int(len(words) * rng.uniform(0.6, 1))
            other[cut:] = rng.choices(WORDS, k=len(words) - cut)
        pairs.append((len(docs), len(docs) + 1, jaccard(words, other)))
        docs += [words, other, rng.choices(WORDS, k=rng.randrange(5, 400))]
    order = rng.sample(range(len(docs)), len(docs))
    place = {old: new for new, old in enumerate(order)}
    return [docs[old] for old in order], {max(place[a], place[b]): (min(place[a], place[b]), j) for a, b, j in pairs}


def test_recall_and_precision():
    docs, truth = planted(random.Random(0), 3_000)
    got = copies_in([" ".join(words) for words in docs])
    similar = {doc: of for doc, (of, j) in truth.items() if j >= 0.8}
    at = [doc for doc, (_, j) in truth.items() if j == 0.8]
    assert len(truth) == 1_000 and len(at) > 100 and 300 < len(similar) < 900
    assert sum(0.5 <= j < 0.8 for _, j in truth.values()) > 150
    right = sum(similar.get(doc) == of for doc, of in got.items())
    assert right / len(similar) >= 0.95 and right / len(got) >= 0.95  # 1 and 1 when this was written
    assert sum(doc in got for doc in at) / len(at) >= 0.95


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_recall_and_precision_at_other_thresholds(threshold):
    docs, truth = planted(random.Random(1), 600)
    got = copies_in([" ".join(words) for words in docs], threshold=threshold)
    similar = {doc: of for doc, (of, j) in truth.items() if j >= threshold}
    right = sum(similar.get(doc) == of for doc, of in got.items())
    assert right / len(similar) >= 0.95 and right / len(got) >= 0.95


def test_bands():
    assert duplicates.bands(0.8) == (32, 8)  # 1 - (1 - 0.8^8)^32 = 0.997; 9 rows: 1 - (1 - 0.8^9)^28 = 0.98
    for threshold in np.linspace(0.5, 0.99, 50):
        n, rows = duplicates.bands(threshold)
        assert n * rows <= 256 and 1 - (1 - threshold**rows) ** n >= 0.99


def test_similarity_is_exact_for_short_documents_and_close_for_long_ones():
    rng = random.Random(2)
    for size, error in ((30, 1e-12), (4_000, 1e-12), (30_000, 0.03)):
        words = rng.choices(WORDS, k=size)
        other = [rng.choice(WORDS) if rng.random() < 0.04 else word for word in words]
        (_, a), (_, b) = (duplicates.look("minhash", 0.8, [" ".join(x)]) for x in (words, other))
        assert len(a) <= 4_096 and duplicates.similarity(a, b) == pytest.approx(jaccard(words, other), abs=error)


def test_case_punctuation_and_white_space_make_no_difference():
    text = "The river runs past the old mill, and people sit on its banks in summer to read."
    same = [text, "  The river runs past\r\n\tthe old mill, and people sit on its banks in summer to  read.\n"]
    loud = text.upper().replace(",", " -")
    accents = ["caf\u00e9 au lait et cr\u00e8me", "cafe\u0301 au lait et cre\u0300me"]
    assert copies_in([*same, loud], "exact") == {1: 0} and copies_in([*same, loud]) == {1: 0, 2: 0}
    assert copies_in(accents, "exact") == {1: 0} == copies_in(accents)
    assert copies_in(["a b", "a b c", "b a", "a, b!", "...", "!!", "...", "", "", "\n", " \n"]) == {3: 0, 6: 4, 10: 9}
    assert copies_in(["abc", "ab", "a b c", "a bc"], "exact") == {}


def test_scripts_without_spaces():
    rng = random.Random(3)
    for low, high in ((0x4E00, 0x9FFF), (0x3041, 0x3096), (0x0E01, 0x0E2E)):
        chars = [chr(rng.randrange(low, high)) for _ in range(600)]
        other = list(chars)
        other[300] = "a"
        cut = chars[:300]
        assert copies_in(["".join(chars), "".join(other), "".join(cut)]) == {1: 0}
        (_, a), (_, b) = (duplicates.look("minhash", 0.8, ["".join(x)]) for x in (chars, other))
        assert duplicates.similarity(a, b) == pytest.approx(jaccard(chars, other))


def test_the_parts_of_a_document_make_no_difference():
    rng = random.Random(4)
    text = "\n".join(" ".join(rng.choices(WORDS, k=9)) for _ in range(30_000))  # 1.6 MB: read in two parts
    rows, sketch = duplicates.look("minhash", 0.8, [text])
    assert [*map(len, duplicates._parts("字" * 3_000_000))] == [(1 << 20) + (1 << 16)] * 2 + [
        3_000_000 - 2 * ((1 << 20) + (1 << 16))
    ]
    for size in (999, 1 << 20):
        again, other = duplicates.look("minhash", 0.8, [text[i : i + size] for i in range(0, len(text), size)])
        assert (again == rows).all() and (sketch == other).all()


def test_the_earliest_stays_and_the_order_of_the_rows_makes_no_difference():
    rng = random.Random(5)
    words = rng.choices(WORDS, k=200)
    variants = [" ".join([*words[:i], "x", *words[i + 1 :]]) for i in range(0, 200, 10)]
    assert copies_in(variants) == dict.fromkeys(range(1, 20), 0)
    looked = [duplicates.look("minhash", 0.8, [text])[0] for text in variants]
    for doc, rows in enumerate(looked):
        rows["doc"] = doc
    pairs = duplicates.pairs("minhash", np.concatenate(looked))
    assert (duplicates.pairs("minhash", np.concatenate(looked[::-1])) == pairs).all()
    # a chain: b is like a, c is like b but not like a. Neither has a right to stay, since something earlier says the same
    b, c = words[:-20] + rng.choices(WORDS, k=20), words[20:-20] + rng.choices(WORDS, k=20)
    assert copies_in([" ".join(x) for x in (words, b, c)]) == {1: 0}


def test_work_is_linear_in_the_copies_of_one_page():
    n = 100_000
    rows = np.zeros((n, 2), duplicates.ROW)
    rows["doc"] = np.arange(n)[:, None]
    rows["key"] = [7, 8]
    rows["same"] = 9  # n copies of one page
    pairs = duplicates.pairs("minhash", rows.ravel())
    assert len(pairs) == n - 1 and pairs["sure"].all() and not pairs["of"].any()
    rows["same"] = np.arange(n)[:, None]  # n pages that differ a little
    pairs = duplicates.pairs("minhash", rows.ravel())
    assert len(pairs) < 8 * n and {*pairs["of"].tolist()} == {*range(8)}
    compared = itertools.count()
    sketch = np.arange(100, dtype=np.uint32)
    got = duplicates.copies(pairs[:80_000], lambda doc: (next(compared), sketch)[1], 0.8)
    assert got == dict.fromkeys(got, 0) and next(compared) == 2 * len(got)


def test_impossible_options_are_errors():
    assert duplicates.check("minhash", None) == duplicates.check("", None) == 0.8 and duplicates.check("minhash", 0.7) == 0.7
    for method, threshold, says in (
        ("fuzzy", None, "--dedup fuzzy: must be one of exact minhash"),
        ("exact", 0.8, "--dedup-threshold 0.8: is for --dedup minhash"),
        ("", 0.8, "--dedup-threshold 0.8: is for --dedup minhash"),
        ("minhash", 80, "--dedup-threshold 80: must be from 0.5 to 0.99"),
        ("minhash", 0.2, "--dedup-threshold 0.2: must be from 0.5 to 0.99"),
        ("minhash", float("nan"), "must be from 0.5 to 0.99"),
    ):
        with pytest.raises(UserError, match=says):
            duplicates.check(method, threshold)
