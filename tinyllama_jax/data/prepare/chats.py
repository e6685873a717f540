"""Packs whole conversations into blocks of S + 1 tokens, with marks on those to learn, which the assistant writes.

A conversation longer than a block is cut after the last answer that fits. The result is a folder such as `prepare` writes, of
the kind "chat", and depends only on the rows, the template, the tokenizer and S.
"""

import bisect
import concurrent.futures
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyllama_jax.base.dims import FIRST, LEARNED
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import claim, read_json, settle, sha256, write
from tinyllama_jax.data import chat, conversations
from tinyllama_jax.data.blocks import FORMAT, MANIFEST, Record
from tinyllama_jax.data.chat import Message, Template
from tinyllama_jax.data.conversations import Row
from tinyllama_jax.data.prepare import folder as folder_lib
from tinyllama_jax.data.prepare import shards
from tinyllama_jax.data.prepare.shards import HELD_OUT
from tinyllama_jax.data.tokenizer import Tokenizer

CODE = 2  # version: raised when this file writes something else for the same rows, so that old folders are not reused
SHARE = 0.02  # of the conversations is held out for validation, if there are at least 10
WINDOW = 1 << 14  # conversations that are packed together; with more, less padding and more memory
ONE_PROCESS = 1 << 25  # bytes of input; for more, several processes encode
CHUNK = 256  # conversations that a process encodes at a time
NO_ANSWER, EMPTY, TOO_LONG = "without an assistant turn", "with an empty answer", "whose first turn does not fit"
REFUSED, ALIKE = "refused by the chat template", "whose two answers are the same"
CUT, SHORT_PROMPT, SHORT_ANSWER = (
    "cut after an answer that fits",
    "cut at the beginning of the prompt",
    "cut at the end of an answer",
)
KEPT = ("", CUT, SHORT_PROMPT, SHORT_ANSWER)


class Encoder(NamedTuple):
    """How messages become tokens and marks."""

    template: Template
    tokenizer: Tokenizer
    begin_with_bos: bool
    width: int  # S + 1, the most tokens of a conversation
    kind: str = "chat"  # or "preferences": pairs of a chosen and a rejected conversation, one after the other

    def identity(self) -> list:
        """What the tokens depend on, besides the messages."""
        return [CODE, self.template.source, self.tokenizer.sha256, self.begin_with_bos, self.width, self.kind]

    def encode(self, row: list[Message] | tuple[list[Message], list[Message]]) -> tuple[np.ndarray, str, int]:
        """(tokens with their marks in the bits from 24 up, uint32 [n]; one of KEPT; how many the whole row has).

        Raises _LeftOut, which says why.
        """
        return self._pair(*row) if self.kind == "preferences" else self._conversation(row)

    def _conversation(self, messages: list[Message]) -> tuple[np.ndarray, str, int]:
        _check_answers(messages)
        answers = [i for i, message in enumerate(messages, 1) if message["role"] == "assistant"]
        if not answers:
            raise _LeftOut(NO_ANSWER)
        encoded = lambda end: chat.encode_with_mask(
            self.template, self.tokenizer, messages[:end], begin_with_bos=self.begin_with_bos
        )
        try:
            ids, mask = encoded(answers[-1])  # what follows the last answer teaches nothing
            fits, whole = len(answers), len(ids)
            if whole > self.width:
                fits = bisect.bisect_left(range(len(answers)), True, key=lambda k: len(encoded(answers[k])[0]) > self.width)
                if not fits:
                    needed = f"{len(encoded(answers[0])[0]):,} tokens, and there is room for {self.width:,}"
                    raise _LeftOut(TOO_LONG, f" ({needed}: raise --model.seq_len={self.width - 1})")
                ids, mask = encoded(answers[fits - 1])
        except UserError as error:
            raise _LeftOut(REFUSED, f": {error}") from None
        if not any(mask):
            raise _LeftOut(NO_ANSWER)
        return _marked(ids, mask), CUT if fits < len(answers) else "", whole

    def _pair(self, chosen: list[Message], rejected: list[Message]) -> tuple[np.ndarray, str, int]:
        """Both conversations, in at most half of a block each; only what differs is learned.

        If one is too long, prompts lose their beginning, down to a quarter of a block, and then long answers lose their end.
        """
        if chosen == rejected:
            raise _LeftOut(ALIKE)
        _check_answers(chosen)
        common = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        common = min(len(chosen), len(rejected)) if common is None else common
        sides = [self._prompt_and_answer(messages, common) for messages in (chosen, rejected)]
        half, out, notes = self.width // 2, [], []
        longest = max(len(answer) for _, answer, _ in sides)
        for prompt, answer, learned in sides:
            keep = min(len(prompt), max(half - longest, half // 2))
            bos = prompt[: int(self.begin_with_bos and keep < len(prompt))]
            ids = [*bos, *prompt[len(prompt) - keep + len(bos) :], *answer][:half]
            mask = [False] * keep + learned
            notes += [SHORT_PROMPT] * (keep < len(prompt)) + [SHORT_ANSWER] * (keep + len(answer) > half)
            if not any(mask[: len(ids)]):
                raise _LeftOut(NO_ANSWER)
            out.append(_marked(ids, mask[: len(ids)]))
        whole = sum(len(prompt) + len(answer) for prompt, answer, _ in sides)
        return np.concatenate(out), max(notes, key=KEPT.index, default=""), whole

    def _prompt_and_answer(self, messages: list[Message], common: int) -> tuple[list[int], list[int], list[bool]]:
        """(tokens of the prompt, those of the answer, whether each of these is learned) after the `common` first messages."""
        last = max((i for i, message in enumerate(messages, 1) if message["role"] == "assistant"), default=0)
        answers = sum(message["role"] == "assistant" for message in messages[common:last])
        if not answers or not common:
            raise _LeftOut(NO_ANSWER)
        try:
            ids, mask = chat.encode_with_mask(
                self.template, self.tokenizer, messages[:last], begin_with_bos=self.begin_with_bos
            )
        except UserError as error:
            raise _LeftOut(REFUSED, f": {error}") from None
        begins = [i for i, learned in enumerate(mask) if learned and not (i and mask[i - 1])]
        if len(begins) < answers:
            raise _LeftOut(NO_ANSWER)
        first, end = begins[-answers], len(mask) - mask[::-1].index(True)
        return ids[:first], ids[first:end], mask[first:end]


def _check_answers(messages: list[Message]) -> None:
    if any(message["role"] == "assistant" and not message["content"].strip() for message in messages):
        raise _LeftOut(EMPTY)  # a model would learn to say nothing


def _marked(ids: list[int], mask: list[bool]) -> np.ndarray:
    out = np.array(ids, np.uint32) | np.array(mask, np.uint32) * np.uint32(LEARNED << 24)
    out[0] |= np.uint32(FIRST << 24)
    return out


class _LeftOut(Exception):
    def __init__(self, reason: str, more: str = ""):
        self.reason, self.more = reason, more


# -- encoding, in several processes if there is much ---------------------------------------------------------------------


def _encode(rows: list[Row], encoder: Encoder | None = None) -> list[tuple[np.ndarray | None, str, str]]:
    """(tokens or None; why the row was cut or left out, or ""; its place, with details) for each row."""
    out, encoder = [], encoder or _encoder
    for where, messages in rows:
        try:
            tokens, note, whole = encoder.encode(messages)
            out.append((tokens, note, f"{where} ({len(tokens):,} of {whole:,} tokens kept)"))
        except _LeftOut as left_out:
            out.append((None, left_out.reason, f"{where}{left_out.more}"))
    return out


_encoder: Encoder | None = None  # of this worker: sent once, not with each chunk


def _begin(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder


def _encoded(rows: Iterable[Row], encoder: Encoder, size: int) -> Iterator[tuple[np.ndarray | None, str, str]]:
    """What `_encode` gives for all rows, in order. `size`: bytes of the input."""
    rows = iter(rows)
    chunks = iter(lambda: list(itertools.islice(rows, CHUNK)), [])
    workers = min(os.cpu_count() or 1, 16) if size > ONE_PROCESS else 1
    if workers == 1:
        for chunk in chunks:
            yield from _encode(chunk, encoder)
        return
    context, waiting = multiprocessing.get_context("spawn"), deque()  # a fork of JAX's threads could hang
    with concurrent.futures.ProcessPoolExecutor(workers, context, _begin, (encoder,)) as pool:
        for chunk in chunks:
            waiting.append(pool.submit(_encode, chunk))
            if len(waiting) > 4 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


# -- packing ------------------------------------------------------------------------------------------------------------


def pack(lengths: np.ndarray, width: int) -> list[list[int]]:
    """Groups conversations of `lengths` [n] into blocks of at most `width` tokens: indices of each block, ascending.

    Best fit, longest first, within windows of `WINDOW`. Blocks are ordered by their first conversation.
    """
    blocks = []
    for start in range(0, len(lengths), WINDOW):
        window, free = lengths[start : start + WINDOW], []  # free: (tokens left, block) of this window, sorted
        first = len(blocks)
        for i in np.argsort(-window, kind="stable").tolist():
            n = int(window[i])
            at = bisect.bisect_left(free, (n, 0))
            left, block = free.pop(at) if at < len(free) else (width, len(blocks))
            if block == len(blocks):
                blocks.append([])
            blocks[block].append(start + i)
            if left > n:
                bisect.insort(free, (left - n, block))
        blocks[first:] = sorted(sorted(block) for block in blocks[first:])
    return blocks


def held_out(digests: np.ndarray) -> np.ndarray:
    """Which conversations are held out, bool [n]: those of the smallest digests [n], so that copies stay together."""
    n = len(digests)
    if n < 10:
        return np.zeros(n, bool)
    chosen = digests <= np.sort(digests)[max(round(SHARE * n), 1) - 1]
    return chosen if not chosen.all() else np.zeros(n, bool)


# -- the folder ---------------------------------------------------------------------------------------------------------


def prepared(source: str, encoder: Encoder, place: Path, wait: float) -> tuple[Path, str]:
    """(the folder in `place` that holds the conversations of `source` as blocks, a line about it).

    It is written unless it is there already. One of several processes writes, and the others wait for it. Raises UserError,
    also if that process has written nothing for `wait` seconds.
    """
    files = conversations.files_of(source)
    made_of = [[file.name, sha256(file)] for file in files]
    key = hashlib.sha256(json.dumps([made_of, *encoder.identity()]).encode()).hexdigest()
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in Path(source).name.split(".")[0]) or "chats"
    output = place / f"{name}-{key[:16]}"
    place.mkdir(parents=True, exist_ok=True)
    lock = _lock(place, wait)
    try:
        kept = (output / MANIFEST).is_file()
        if not kept and output.exists():
            raise UserError(f"{output}: is in the way, and has no {MANIFEST}; delete it")
        if not kept:
            _write(source, files, made_of, encoder, output)
    finally:
        os.close(lock)
    line = read_json(output / "conversations.json", dict[str, str], f"delete {output}")["line"]
    return output, f"{source}: {line}; {'kept' if kept else 'written'} in {output}"


def _lock(place: Path, wait: float) -> int:
    while True:
        try:
            return claim(place / ".lock", f"{place}: the process that writes there has not moved for {wait:g} s", seconds=wait)
        except UserError:
            moved = [path.stat().st_mtime for path in place.glob("*.partial/*")]
            if time.time() - max(moved, default=0) > wait:
                raise


def _write(source: str, files: list[Path], made_of: list, encoder: Encoder, output: Path) -> None:
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed; nobody else writes there: see `prepared`
    partial.mkdir()
    scratch, lengths, digests, notes, examples = partial / "tokens", [], [], Counter(), {}
    due = time.monotonic() + 30
    with scratch.open("wb") as spilled:  # so that memory is bounded
        size = sum(file.stat().st_size for file in files)
        for tokens, note, where in _encoded(conversations.read(files, encoder.kind), encoder, size):
            notes[note] += 1
            if time.monotonic() > due:
                print(f"{source}: {notes.total():,} conversations read", flush=True)
                due += 30
            examples.setdefault(note, where)
            if tokens is not None:
                spilled.write(tokens.tobytes())
                lengths.append(len(tokens))
                digests.append(int.from_bytes(hashlib.sha256(tokens.tobytes()).digest()[:8], "big"))
    if not lengths:
        left = "; ".join(f"{n:,} {note}, the first: {examples[note]}" for note, n in notes.items() if note)
        raise UserError(f"--data.sources={source}: no conversation to learn from ({left or 'it is empty'})")
    lengths, held = np.array(lengths, np.int64), held_out(np.array(digests, np.uint64))
    ends = np.cumsum(lengths)
    everything = np.memmap(scratch, np.uint32, "r")
    dtype = "uint16" if encoder.tokenizer.vocab_size <= 1 << 16 else "int32"
    splits, inputs = {}, [{"file": n, "bytes": f.stat().st_size, "sha256": h} for f, (n, h) in zip(files, made_of, strict=True)]
    for split, chosen in (("train", ~held), (HELD_OUT, held)):
        if not chosen.any():
            continue
        index = np.flatnonzero(chosen)
        blocks = pack(lengths[index], encoder.width)
        file = partial / f"blocks-{split}.array_record-00000-of-00001"
        members = ([everything[ends[i] - lengths[i] : ends[i]] for i in index[block]] for block in blocks)
        learned = write_blocks(file, members, encoder.width, dtype, encoder.kind)
        entry = {"file": file.name, "blocks": len(blocks), "tokens": int(lengths[index].sum())}
        entry |= {"bytes": file.stat().st_size, "sha256": sha256(file)}
        dropped = {note: n for note, n in sorted(notes.items()) if note not in KEPT} if split == "train" else {}
        counts = {"documents": len(index), "empty_documents": 0, "tokens": entry["tokens"], "blocks": len(blocks)}
        splits[split] = {**counts, "learned": learned, "dropped": dropped, "shards": [entry]}
        splits[split]["sources"] = inputs if split == "train" else []
    del everything
    scratch.unlink()
    encoder.tokenizer.save(partial / "tokenizer")
    chat.keep(encoder.template, partial / "tokenizer")
    spm = encoder.tokenizer
    vocabulary = {"sha256": spm.sha256, "vocab_size": spm.vocab_size, "bos_id": spm.bos_id, "eos_id": spm.eos_id}
    manifest = {
        "format": FORMAT,
        "kind": encoder.kind,
        "seq_len": encoder.width - 1,
        "dtype": dtype,
        "bos": encoder.begin_with_bos,
    }
    manifest |= {"eos": False, "tokenizer": vocabulary, "splits": splits}
    record = Record(encoder.width - 1, dtype, encoder.kind)
    folder_lib.write_metadata(partial, record.features, {name: split["shards"] for name, split in splits.items()})
    write(partial / "conversations.json", json.dumps({"line": _line(splits, notes, examples, encoder)}) + "\n")
    write(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    settle(partial)
    os.rename(partial, output)


def write_blocks(file: Path, blocks: Iterable[list[np.ndarray]], width: int, dtype: str, kind: str = "chat") -> int:
    """Writes a block for each list of conversations (tokens with marks, uint32); returns how many tokens are learned."""
    record, writer, learned = Record(width - 1, dtype, kind), shards.writer(file), 0
    extras = {"reference": np.zeros(width, np.float32)} if kind == "preferences" else {}  # run/references.py fills it in
    for block in blocks:
        whole = np.zeros(width, np.uint32)
        joined = np.concatenate(block)
        whole[: len(joined)] = joined
        marks = (whole >> 24).astype(np.uint8)
        tokens = (whole & 0xFFFFFF).astype(dtype)
        shards.written(file, writer.write, record.encode(tokens, len(joined), marks=marks, **extras))
        learned += int((marks & LEARNED).sum())
    shards.written(file, writer.close)
    return learned


def _line(splits: dict[str, dict], notes: Counter[str], examples: dict[str, str], encoder: Encoder) -> str:
    """What a person should know about the data."""
    total = {key: sum(split[key] for split in splits.values()) for key in ("documents", "tokens", "learned", "blocks")}
    what, width = {"chat": "conversations", "preferences": "pairs"}[encoder.kind], encoder.width
    held = splits.get(HELD_OUT, {}).get("documents", 0)
    padding = 1 - total["tokens"] / (total["blocks"] * width)
    parts = [
        f"{total['documents']:,} {what} ({held:,} held out) of {total['tokens']:,} tokens, {total['learned']:,} of them "
        f"learned, in {total['blocks']:,} blocks of {width:,} with {padding:.1%} padding"
    ]
    parts += [f"{notes[note]:,} {note}, the first: {examples[note]}" for note in KEPT[1:] if notes[note]]
    left = [(note, n) for note, n in sorted(notes.items()) if note not in KEPT]
    parts += [f"left out {n:,} {note}, the first: {examples[note]}" for note, n in left]
    return "; ".join(parts)
