"""Trains a tokenizer on a user's text, and warns before a run of what a given tokenizer loses of its text."""

import contextlib
import io
import itertools
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import tokenizer
from tinyllama_jax.data.export import tokenizer as export_tokenizer
from tinyllama_jax.data.prepare import documents
from tinyllama_jax.data.prepare.inputs import Source

FILES = 1_000  # files from which a sample is taken, spread evenly over all
LONGEST = 1 << 20  # most characters of a text given to the trainer; longer documents are cut
LOOK = 1 << 20  # characters of the sample that `warnings` checks


def sample(sources: list[Source], text_key: str, size: int, longest: int = 0, files: int = FILES) -> Iterator[str]:
    """Texts of about `size` characters in all, taken from each piece of each file in proportion to its size.

    `longest`: if given, at most so many characters of each document. The same files give the same sample. Raises BadFile.
    """
    chosen = sources[:: -(-len(sources) // files)]
    total = sum(source.size * source.factor for source in chosen)
    for source in chosen:
        pieces = documents.pieces(source, documents.units(source, text_key), max(size // 64, 1 << 16))
        quota = total if total <= size else size * source.size * source.factor / total / max(len(pieces), 1)
        for piece in pieces:
            left = quota
            for document in documents.read(piece, text_key, {}, Counter()):
                for text in itertools.islice(_cut(document, longest or LONGEST), 1 if longest else None):
                    yield text[: int(left) + 1]
                    left -= len(text)
                    if left <= 0:
                        break
                if left <= 0:
                    break


def _cut(document: Iterable[str], n: int) -> Iterator[str]:
    """Cuts a document into parts of `n` characters."""
    text = ""
    for part in document:
        text += part
        while len(text) >= n:
            yield text[:n]
            text = text[n:]
    yield text


def train(texts: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE model of `vocab_size` pieces. The same texts give the same bytes.

    Ids 0, 1, 2 are unk, bos, eos as in Llama 2. Decoding restores every text exactly, except "▁" (U+2581), which stands for a
    space in SentencePiece. Raises UserError if there is too little text for so many pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            byte_fallback=True,  # characters without a piece are spelt in bytes: no text is unknown
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,  # the ids of a text do not depend on whether it begins a document
            allow_whitespace_only_pieces=True,  # indentation is one token
            character_coverage=0.9995,  # of the corpus's characters; rarer ones are spelt in bytes
            max_sentence_length=4 * LONGEST,  # bytes; longer ones would be left out silently
            num_threads=1,  # more would not help: most of the work is serial
            minloglevel=3,  # errors are raised, and explained below
        )
    except (RuntimeError, ValueError) as error:
        if most := re.search(r"value <= (\d+)", str(error)):
            reason = f"there is too little text: it makes {int(most[1]):,} pieces at most; give more text, or a smaller number"
        elif least := re.search(r"vs (\d+)", str(error)):
            reason = f"its bytes and characters alone take {int(least[1]):,}; give a larger number"
        else:
            reason = "there is no text to learn from" if "[" in str(error) else str(error).splitlines()[0]
        raise UserError(f"--vocab-size {vocab_size}: {reason}") from None
    return model.getvalue()


def warnings(ours: tokenizer.Tokenizer, sources: list[Source], text_key: str) -> list[str]:
    """Lines that warn if decoding changes texts of a sample, and if an export would change ids or is impossible."""
    lines, texts = [], []
    with contextlib.suppress(documents.BadFile):  # reported later, when all files are read
        texts += [text for text in sample(sources, text_key, LOOK, 1 << 14, 64) if text]
    texts = [text.replace(tokenizer.SPACE, " ") for text in texts]  # no SentencePiece model preserves it
    decoded = [ours.decode(ids) for ids in ours.encode_batch(texts)]
    lost = [(a, b) for a, b in zip(texts, decoded, strict=True) if a != b]
    if lost:
        at = next((i for i, (a, b) in enumerate(zip(*lost[0], strict=False)) if a != b), min(map(len, lost[0])))
        was, became = (text[max(at - 8, 0) : at + 12] for text in lost[0])
        share = f"{len(lost):,} of {len(texts):,} documents of a sample ({len(lost) / len(texts):.1%}) are not decoded"
        other = "`python -m tinyllama_jax.train_tokenizer` makes one that loses nothing"
        lines.append(f"{ours.path}: warning: {share} to the same text: {was!r} becomes {became!r}; {other}")
    without = "export a run on it with --tokenizer none, without a tokenizer.json"
    try:
        with tempfile.TemporaryDirectory() as folder:
            export_tokenizer.export(ours, Path(folder), False, 1)
            exported = tokenizer.HuggingFaceTokenizer(Path(folder) / "tokenizer.json")
    except UserError as error:
        return [*lines, *([] if "pip install" in str(error) else [f"warning: {error}; or {without}"])]
    pairs = zip(exported.encode_batch(texts), ours.encode_batch(texts), strict=True)
    if differ := sum(a != b for a, b in pairs):
        what = f"{differ:,} of {len(texts):,} documents of a sample ({differ / len(texts):.1%}) get other ids"
        lines.append(f"{ours.path}: warning: {what} from a tokenizer.json made from it; if that is too many, {without}")
    return lines
