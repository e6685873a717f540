"""Loss, perplexity, accuracy and bits per byte of a model on a prepared data set."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tinyllama_jax.base import rope
from tinyllama_jax.base.config import Bos, Data, Model
from tinyllama_jax.base.dims import FIRST, LEARNED
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import read_json
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.data.export import tokenizer as exporter
from tinyllama_jax.data.export.tokenizer import BYTE, CONTROL, UNKNOWN, UNUSED
from tinyllama_jax.data.tokenizer import SPACE, SentencePieceTokenizer, Tokenizer
from tinyllama_jax.evals.score import Scorer, Text

READ = 64  # blocks read and scored at a time
PARTS = 8  # of the context, in `by_position`


def scores(scorer: Scorer, tokenizer: Tokenizer, blocks: Blocks, data: Data, edge: int, limit: int | None = None) -> dict:
    """What the trainer reports of a split as `val_...`, with the standard error of the loss over blocks, and bits per byte.

    `data`: for `document_mask` and `eod_mask_loss`, which decide what a token sees and which tokens count. `edge`: the token
    that separates documents, as `feed.eos_id`. Of conversations only the answers count, each within its conversation.
    `limit`: blocks; None: all.
    Bits per byte leave out tokens that stand for no byte, such as eos, and are None, with `no_bytes` saying why, where the
    tokens' bytes cannot be known. A block longer than the context is scored in parts. Raises UserError for another tokenizer.
    """
    check_tokenizer(tokenizer, blocks)
    if blocks.kind == "preferences":
        raise UserError(f"{blocks.directory}: holds preferences, whose held-out pairs `dpo` scores as it trains")
    sizes, why = bytes_of(tokenizer)
    n = min(limit or len(blocks), len(blocks))
    per_block, totals = [], np.zeros(5)  # nats, tokens, correct ones, nats of tokens with bytes, bytes
    for first in range(0, n, READ):
        blocks.hold(first, min(first + READ, n))
        read = blocks.sequences(np.arange(first, min(first + READ, n)))
        owners, texts = [], []
        for i, (row, size) in enumerate(zip(read.tokens.astype(np.int32), read.length, strict=True)):
            if read.marks is None:
                parts = [(text, None) for text in _texts(row[:size], data.document_mask, edge, scorer.context)]
            else:
                parts = list(_conversations(row[:size], read.marks[i, :size]))
            texts += parts
            owners += [i] * len(parts)
        sums = np.zeros((len(read.tokens), 5))
        for i, (text, learned), scored in zip(owners, texts, scorer([text for text, _ in texts]), strict=True):
            labels, before = np.array(text.ids[1:]), np.array(text.ids[:-1])
            counted = learned if learned is not None else before != edge if data.eod_mask_loss else np.full(len(labels), True)
            nats = -scored.logprobs.astype(np.float64) * counted
            n_bytes = sizes(before, labels) * counted
            sums[i] += nats.sum(), counted.sum(), (scored.greedy & counted).sum(), nats[n_bytes > 0].sum(), n_bytes.sum()
        per_block += [row for row in sums if row[1]]
        totals += sums.sum(0)
    nats, count, right, nats_of_bytes, n_bytes = totals.tolist()
    if not count:
        raise UserError(f"{blocks.directory}: the split {blocks.split} has no token with another before it; prepare more text")
    loss, means = nats / count, [row[0] / row[1] for row in per_block]
    error = np.std(means, ddof=1) / math.sqrt(len(means)) if len(means) > 1 else None
    return {
        "loss": loss,
        "loss_stderr": None if error is None else float(error),
        "perplexity": math.exp(min(loss, 700)),
        "accuracy": right / count,
        "tokens": int(count),
        "blocks": len(per_block),
        "bytes": int(n_bytes) if not why else None,
        "bits_per_byte": nats_of_bytes / math.log(2) / n_bytes if n_bytes else None,
        **({"no_bytes": why} if why else {}),
    }


def by_position(scorer: Scorer, tokenizer: Tokenizer, blocks: Blocks, limit: int | None = None) -> list[dict]:
    """Loss and perplexity of tokens by their position in the context, of which there are PARTS equal parts.

    Texts of the context's length + 1 are cut from the blocks in their order, and see across documents. `limit`: texts; None:
    all. Raises UserError if the data do not fill one text, or have another tokenizer.
    """
    check_tokenizer(tokenizer, blocks)
    if blocks.kind != "text":
        raise UserError(f"{blocks.directory}: --longer needs long texts, and this holds {blocks.kind}")
    context, texts, waiting = scorer.context, [], []
    for first in range(0, len(blocks), READ):
        if limit and len(texts) >= limit:
            break
        blocks.hold(first, min(first + READ, len(blocks)))
        tokens, length = blocks.read(np.arange(first, min(first + READ, len(blocks))))
        waiting += [token for row, size in zip(tokens, length, strict=True) for token in row[:size].tolist()]
        while len(waiting) > context:
            texts.append(Text(waiting[: context + 1], context))
            del waiting[: context + 1]
    if not texts:
        raise UserError(f"{blocks.directory}: the split {blocks.split} has fewer than the {context + 1:,} tokens of one text")
    losses = [-scored.logprobs.astype(np.float64) for scored in scorer(texts[:limit])]
    edges = [context * i // PARTS for i in range(PARTS + 1)]
    parts = [(a, b, float(np.mean([row[a:b] for row in losses]))) for a, b in itertools.pairwise(edges) if b > a]
    return [{"from": a, "to": b, "loss": loss, "perplexity": math.exp(min(loss, 700))} for a, b, loss in parts]


def lengthened(model: Model, factor: float, kind: str | None) -> Model:
    """`model` with a context `factor` times as long, and RoPE scaled by `factor` in the way `kind`; None: RoPE as it is.

    Raises UserError for a kind that this model cannot have.
    """
    length = round(model.seq_len * factor)
    if kind is None or factor == 1:
        return dataclasses.replace(model, seq_len=length)
    if model.rope_scaling != 1:
        raise UserError(f"--rope {kind}: the model's RoPE is scaled by {model.rope_scaling:g} already ({model.rope_type})")
    text = f"yarn,{rope.LENGTH}={model.seq_len}" if kind == "yarn" else kind
    scaled = dataclasses.replace(model, seq_len=length, rope_type=text, rope_scaling=float(factor))
    return dataclasses.replace(scaled, rope_type=rope.checked(scaled))


def _texts(tokens: np.ndarray, mask: bool, edge: int, context: int) -> Iterator[Text]:
    """The parts of a block whose tokens see only one another. Each part ends with the first token of the next one."""
    starts = [0]
    if mask:  # eos ends a document and bos begins one
        at = np.flatnonzero(tokens == edge) + (0 if isinstance(edge, Bos) else 1)
        starts += [int(i) for i in at if 0 < i < len(tokens) - 1]
    for start, end in zip(starts, [*starts[1:], len(tokens) - 1], strict=True):
        for part in range(start, end, context):
            ids = tokens[part : min(part + context, end) + 1].tolist()
            yield Text(ids, len(ids) - 1)


def _conversations(tokens: np.ndarray, marks: np.ndarray) -> Iterator[tuple[Text, np.ndarray]]:
    """(each conversation of a block, whether each of its tokens but the first is learned)."""
    starts = np.flatnonzero(marks & FIRST).tolist()
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        yield Text(tokens[start:end].tolist(), end - start - 1), marks[start + 1 : end] & LEARNED > 0


def check_tokenizer(tokenizer: Tokenizer, blocks: Blocks) -> None:
    """Raises UserError unless the data have the model's vocabulary."""
    if tokenizer.sha256 == blocks.tokenizer_sha256:
        return
    other = tokenizer_lib.load(blocks.tokenizer)
    if tokenizer.pieces() != other.pieces():
        raise UserError(
            f"{blocks.directory}: was prepared with another tokenizer than the model's; prepare it with the model's"
        )


def bytes_of(tokenizer: Tokenizer) -> tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], str | None]:
    """(the number of bytes of text that each token stands for, given the tokens before them; why it is not known, or None).

    Counted from the tokens' own bytes: a token that is half of a character counts its half. Control tokens count none. The
    space that SentencePiece puts before a document's first word is not in the text, and does not count after a control token.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        pieces = exporter.read(tokenizer.path, lambda *_: None).pieces
        no_text = [piece.kind in (CONTROL, UNKNOWN, UNUSED) for piece in pieces]
        is_byte = [piece.kind == BYTE for piece in pieces]
        texts = [piece.text for piece in pieces]
    else:
        content = read_json(tokenizer.path, dict)
        added = {token["id"]: token for token in content.get("added_tokens") or ()}
        texts = tokenizer.pieces()
        no_text = [text is None or bool(added.get(i, {}).get("special")) for i, text in enumerate(texts)]
        decoders = str(content.get("decoder"))
        if "ByteLevel" in decoders:  # a character of a piece stands for one byte
            sizes = np.array([0 if no else len(t.encode()) if i in added else len(t)
                              for i, (no, t) in enumerate(zip(no_text, texts, strict=True))])  # fmt: skip
            return lambda before, labels: sizes[labels], None
        if SPACE not in decoders and "Metaspace" not in decoders:
            return lambda before, labels: np.zeros(len(labels)), f"{Path(tokenizer.path).name} does not tell its tokens' bytes"
        is_byte = [bool(t) and len(t) == 6 and t.startswith("<0x") and t.endswith(">") for t in texts]
    sizes = np.array([0 if no else 1 if byte else len(text.replace(SPACE, " ").encode())
                      for no, byte, text in zip(no_text, is_byte, texts, strict=True)])  # fmt: skip
    first = tokenizer.encode("a")
    prefix = bool(first) and texts[first[0]].startswith(SPACE)
    spaced = np.array([prefix and not no and text.startswith(SPACE) for no, text in zip(no_text, texts, strict=True)])
    control = np.array(no_text)
    return lambda before, labels: sizes[labels] - (spaced[labels] & control[before]), None
