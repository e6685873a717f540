"""Batches for training and validation. Each is a pure function of (sources, seed, step); Grain reads ahead."""

import bisect
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import grain
import jax
import numpy as np

from tinyllama_jax.base import store
from tinyllama_jax.base.config import Bos, Config
from tinyllama_jax.base.dims import EXTRAS
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.schedule import NONE, batch_of, left_out
from tinyllama_jax.base.values import LIMITS
from tinyllama_jax.data import bucket, litpkds
from tinyllama_jax.data.blocks import Blocks, Sequences
from tinyllama_jax.data.mixture import Mixture
from tinyllama_jax.data.shuffle import permuted

MANY_EPOCHS = 4  # up to this many, repeated data are worth nearly as much as new data (Muennighoff et al., arXiv:2305.16264)


def open_source(path: str, split: str, seq_len: int, cache: str = "") -> Blocks:
    """One split of a source: a folder that `prepare` wrote, or LITPKDS files DIR/PREFIX, which can be read with any S.

    Either may be in a bucket; `cache` is `data.cache`.
    """
    return litpkds.Packed(path, split, seq_len, cache) if litpkds.files_of(path, split) else Blocks(path, split, cache)


def open_sources(config: Config) -> list[Blocks]:
    """The training split of each source of `config`. Raises UserError if one does not fit the model or another source."""
    bucket.cache(config.data.cache)  # is checked even if nothing needs it
    opened = [open_source(path, "train", config.model.seq_len, config.data.cache) for path in config.data.sources]
    if len(opened) > 1:
        _check_apart(config, opened)
    for path, blocks in zip(config.data.sources, opened, strict=True):
        if blocks.seq_len != config.model.seq_len:
            raise UserError(
                f"--model.seq_len={config.model.seq_len}: {path} was prepared with --seq-len {blocks.seq_len}; "
                f"prepare it again, or train with --model.seq_len={blocks.seq_len}"
            )
        size = blocks.manifest["tokenizer"]["vocab_size"]
        if size > config.model.vocab_size:
            raise UserError(
                f"--model.vocab_size={config.model.vocab_size}: {path} was prepared with a tokenizer of {size} "
                f"pieces; set it to {size} or more"
            )
        if blocks.kind != opened[0].kind:
            first = f"{next(iter(config.data.sources))} {opened[0].kind}"
            raise UserError(f"--data.sources: {path} holds {blocks.kind}, and {first}; a run learns from one kind of data")
        if blocks.tokenizer_sha256 != opened[0].tokenizer_sha256:
            raise UserError(
                f"--data.sources: {path} and {next(iter(config.data.sources))} were prepared with different "
                "tokenizers; prepare one of them again"
            )
    return opened


def in_epochs(config: Config, sources: list[Blocks]) -> tuple[Config, list[str]]:
    """(`config` with the `train.steps` of `train.epochs`, a line about it); as it is without epochs.

    Warm-up, decay and cool-down keep their shares of the run.
    """
    train, optim = config.train, config.optim
    if not train.epochs:
        return config, []
    sequences = math.ceil(train.epochs * sum(map(len, sources)))
    steps = bisect.bisect_left(range(LIMITS["train.steps"][1]), sequences * config.model.seq_len, lo=1, key=train.tokens_after)
    long = dataclasses.replace(train, steps=steps)
    share = long.tokens / train.tokens
    parts = {name: round(getattr(optim, name) * share) for name in ("warmup_steps", "decay_steps", "cooldown_steps")}
    config = dataclasses.replace(config, train=long, optim=dataclasses.replace(optim, **parts))
    return config, [
        f"train.epochs={train.epochs:g}: {sequences:,} sequences, {steps:,} steps, {parts['warmup_steps']:,} of warm-up"
    ]


def dtype(sources: list[Blocks]) -> np.dtype:
    """The dtype of the tokens of a batch."""
    return np.result_type(*(source.dtype for source in sources))


def _check_apart(config: Config, opened: list[Blocks]) -> None:
    """Raises UserError if two sources have a file in common."""
    owner: dict[str, str] = {}  # real path of a file -> the source that has it
    for path, blocks in zip(config.data.sources, opened, strict=True):
        for file, _, _ in blocks.files():
            if (other := owner.setdefault(os.path.realpath(str(file)), path)) != path:
                remedy = "add up their weights, or name other files"
                raise UserError(f"--data.sources: {path} and {other} both have {file}; {remedy}")


def eos_id(config: Config, sources: list[Blocks]) -> int:
    """The token that separates documents: eos; or `Bos`, for `data.document_mask` when a source has no eos.

    Raises UserError if a source has no such token. `data.eod_mask_loss` needs eos.
    """
    manifests, vocabulary = [blocks.manifest for blocks in sources], sources[0].manifest["tokenizer"]
    if sources[0].kind != "text":
        _check_conversations(config, sources[0].kind)
        if sources[0].kind == "preferences" and not all("reference" in manifest for manifest in manifests):
            raise UserError("--data.sources: the pairs have no reference log-probabilities; use `python -m tinyllama_jax.dpo`")
        return vocabulary["eos_id"]
    if all(manifest["eos"] for manifest in manifests) or not (config.data.document_mask or config.data.eod_mask_loss):
        return vocabulary["eos_id"]
    if not config.data.eod_mask_loss and all(manifest["bos"] for manifest in manifests):
        return Bos(vocabulary["bos_id"])
    option, more = ("eod_mask_loss", "") if config.data.eod_mask_loss else ("document_mask", ", or bos before every document,")
    named = zip(config.data.sources, sources, strict=True)
    without = "; ".join(f"{path} has {litpkds.edges(b)[2]}" for path, b in named if not b.manifest["eos"])
    raise UserError(
        f"--data.{option}=true: needs eos after every document{more} in all sources: {without}; prepare it with --eos"
    )


def _check_conversations(config: Config, kind: str) -> None:
    """Raises UserError if `config` does not fit conversations, which lie side by side in a block."""
    if not config.data.document_mask:
        what = f"the data are {kind}, packed several to a block"
        raise UserError(f"--data.document_mask=false: {what}; set it to true, so that none sees its neighbours")
    if config.data.eod_mask_loss:
        raise UserError(f"--data.eod_mask_loss=true: the data are {kind}, whose marks say which tokens count; set it to false")


def open_held_out(config: Config, sources: list[Blocks]) -> dict[str, Blocks]:
    """Path -> validation split, of the sources that have one."""
    named = zip(config.data.sources, sources, strict=True)
    with_validation = [(path, blocks) for path, blocks in named if "validation" in blocks.manifest["splits"]]
    return {path: open_source(path, "validation", blocks.seq_len, config.data.cache) for path, blocks in with_validation}


def verify(config: Config, sources: list[Blocks], after_file: Callable[[], None] = lambda: None) -> list[str]:
    """Reads and checks all files of `sources` if `data.verify`; returns a line on the time taken. Raises UserError.

    `after_file`: called after each file, so that a process can show that it is alive.
    """
    if not config.data.verify:
        return []
    started = time.perf_counter()
    for source in sources:
        source.verify(after_file)
    sizes = [n for s in sources for n in (s.shards.sizes if s.shards else [store.bytes_of(file) for file, _, _ in s.files()])]
    size, seconds = sum(sizes) / 1e9, time.perf_counter() - started
    return [f"data.verify: {len(sizes):,} files, {size:,.3f} GB, read in {seconds:,.1f} s ({size / seconds:.2f} GB/s)"]


class Order:
    """Maps each sample of the run to a block of a source."""

    def __init__(
        self, sizes: list[int], mixture: Mixture, seed: int, stages: Sequence[tuple[int, int, int]], left_out: np.ndarray = NONE
    ):
        """`sizes`: blocks per source. Each epoch of a source is its own permutation, drawn from (seed, source, epoch).

        `stages`: (batches before it, samples before it, samples per batch). `left_out`: as `schedule.left_out` returns.
        """
        self.sizes, self.mixture, self.seed, self.left_out = sizes, mixture, seed, left_out
        self._batches, self._samples, self._each = np.asarray(stages, np.int64).T

    def size(self, step: int) -> int:
        """Samples of a step (from 1)."""
        return int(self._each[self._stage(self._batch(step))])

    def at(self, step: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(source [n], block [n]) of the samples `rows` [n] (from 0) of a step (from 1); by default of all its samples."""
        rows = np.arange(self.size(step)) if rows is None else rows
        return self.locate(self.samples(self._batch(step)) + rows)

    def samples(self, batches: int) -> int:
        """How many samples the first `batches` batches have."""
        stage = self._stage(batches)
        return int(self._samples[stage] + (batches - self._batches[stage]) * self._each[stage])

    def counts(self, step: int) -> np.ndarray:
        """How many samples each source has given by the end of a step [n_sources], without those of batches left out."""
        until = self._batch(step) + 1 if step else 0
        passed = self.left_out[self.left_out <= until]
        out = self.mixture.counts(self.samples(until))
        for span in np.split(passed, np.flatnonzero(np.diff(passed) > 1) + 1):  # consecutive batches, numbered from 1
            if span.size:
                out -= self.mixture.counts(self.samples(span[-1])) - self.mixture.counts(self.samples(span[0] - 1))
        return out

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample indices [n], counted as if no batch were left out -> (source [n], block [n])."""
        source, k = self.mixture.locate(samples)
        epoch, position = np.divmod(k, np.asarray(self.sizes, np.int64)[source])
        block = np.empty_like(k)
        for j, e in np.unique(np.stack([source, epoch]), axis=1).T.tolist():
            rows = (source == j) & (epoch == e)
            seed = int(np.random.SeedSequence((self.seed, j, e)).generate_state(1)[0])
            block[rows] = permuted(position[rows], self.sizes[j], seed)
        return source, block

    def _batch(self, step: int) -> int:
        return int(batch_of(np.int64(step), self.left_out)) - 1

    def _stage(self, batch: int) -> int:
        return int(np.searchsorted(self._batches, batch, side="right")) - 1


def mixture(config: Config) -> Mixture:
    """The mixture of the sources of `config`."""
    return Mixture(list(config.data.sources.values()), config.model.seq_len)


def order(config: Config, sources: list[Blocks]) -> Order:
    """The order of samples in the run that `config` describes."""
    stages = [(batches, *(n // config.model.seq_len for n in tokens)) for batches, *tokens in config.train.stages]
    return Order([len(s) for s in sources], mixture(config), config.train.seed, stages, left_out(config.data))


def names(paths: Iterable[str]) -> list[str]:
    """Names of sources in metrics: the last part of the path, or the whole path where two sources share that part."""
    paths = list(paths)
    last = [Path(path).name for path in paths]
    return [name if last.count(name) == 1 else path for name, path in zip(last, paths, strict=True)]


class Steps(grain.sources.RandomAccessDataSource):
    """Element s is this process's part of step s + 1, in A micro-batches.

    `tokens` [A, rows, S + 1], `length` [A, rows], `source` [A, rows] if there are several sources (else None), and what EXTRAS
    names [A, rows, S + 1]: the fields of `losses.Batch`.
    """

    def __init__(self, sources: list[Blocks], order: Order, steps: int, batch: int, rows: np.ndarray):
        """`batch`: B of the global micro-batch. `rows`: which of its sequences this process reads."""
        self._sources, self._order, self._steps, self._batch, self._rows = sources, order, steps, batch, rows

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> tuple[np.ndarray | None, ...]:
        accumulation = self._order.size(index + 1) // self._batch
        in_step = np.arange(accumulation)[:, None] * self._batch + self._rows[None, :]
        source, block = self._order.at(index + 1, in_step.ravel())
        read = gather(self._sources, source, block)
        source = source.astype(np.int32) if len(self._sources) > 1 else None
        by_step = lambda a: None if a is None else a.reshape(*in_step.shape, *a.shape[1:])
        return tuple(map(by_step, (read.tokens, read.length, source, read.marks, read.reference)))


def gather(sources: list[Blocks], source: np.ndarray, block: np.ndarray) -> Sequences:
    """Blocks by (source [n], block [n]); one batched read per source."""
    if len(sources) == 1:
        return sources[0].sequences(block)
    shape = (len(source), sources[0].seq_len + 1)
    extras = {name: np.empty(shape, dtype) for name, dtype in EXTRAS[sources[0].kind].items()}
    out = Sequences(np.empty(shape, dtype(sources)), np.empty(len(source), np.int32), **extras)
    for j in np.unique(source):
        rows = source == j
        for whole, part in zip(out, sources[j].sequences(block[rows]), strict=True):
            if whole is not None:
                whole[rows] = part
    return out


def checksum(sequences: Sequences) -> int:
    """`step.checksum` of a whole batch, on the host."""
    tokens, length, marks, _ = sequences
    if marks is not None:
        tokens = tokens.astype(np.uint32) ^ (marks.astype(np.uint32) << np.uint32(24))
    place = np.arange(tokens.size, dtype=np.uint32)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        place = (place ^ (place >> np.uint32(shift))) * np.uint32(factor)
    product = (tokens.astype(np.uint32) + np.uint32(1)) * (place | np.uint32(1)).reshape(tokens.shape)
    return int(product[np.arange(tokens.shape[1]) < length[:, None]].sum(dtype=np.uint32))


def rows_here(sharding: jax.sharding.Sharding, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """The indices along `axis` of a global array of `shape` that the devices of this process hold, in order."""
    slices = [index[axis] for index in sharding.addressable_devices_indices_map(shape).values()]
    return np.unique(np.concatenate([np.arange(shape[axis])[s] for s in slices]))


def training(config: Config, sources: list[Blocks], batch: int, rows: np.ndarray, start: int) -> Iterator:
    """Steps `start` + 1, `start` + 2, ... as in `Steps`. No earlier step is read."""
    data_order = order(config, sources)
    read = Steps(sources, data_order, config.train.steps, batch, rows)
    if any(source.shards for source in sources) and start < len(read):
        yield read[start]  # by itself, and before shards are fetched: it comes sooner
        start += 1
        bucket.ahead(_needed(sources, data_order, config.train.steps, batch, rows, start))
    # two steps ahead per thread; a step of 2 M tokens is 4 MB
    ahead = grain.ReadOptions(num_threads=config.data.workers, prefetch_buffer_size=2 * config.data.workers)
    yield from grain.MapDataset.source(read)[start:].to_iter_dataset(ahead)


def _needed(
    sources: list[Blocks], order: Order, steps: int, batch: int, rows: np.ndarray, start: int
) -> Iterator[tuple[bucket.Shards, int]]:
    """(shards, shard) in the order in which the `rows` of this process first need them after step `start`."""
    left = [set(range(len(source.files()))) if source.shards else set() for source in sources]
    for step in range(start + 1, steps + 1):
        in_step = np.arange(order.size(step) // batch)[:, None] * batch + rows[None, :]
        source, block = order.at(step, in_step.ravel())
        for j in [j for j, files in enumerate(left) if files]:
            for file in dict.fromkeys(sources[j].files_of(block[source == j]).tolist()):
                if file in left[j]:
                    left[j].remove(file)
                    yield sources[j].shards, file
        if not any(left):
            return


def news(sources: Iterable[Blocks], last: bool = False) -> list[str]:
    """Lines on what was fetched from buckets, when there is something new: see `Shards.news`."""
    return [line for source in sources if source.shards for line in source.shards.news(last)]


def validation(blocks: Blocks, limit: int, batch: int, rows: np.ndarray) -> Iterator[tuple[np.ndarray | None, ...]]:
    """The first `limit` blocks (0: all) once each, `batch` at a time over all processes. Missing rows have length 0.

    The parts of a batch are the fields of `losses.Batch`, as in `Steps` but without A and without sources.
    """
    n = min(limit, len(blocks)) if limit else len(blocks)
    for first in range(0, n, batch):
        index = first + rows
        blocks.hold(first, min(first + batch, n))  # each evaluation reads them again
        read = blocks.sequences(np.minimum(index, n - 1))
        yield read.tokens, np.where(index < n, read.length, 0).astype(np.int32), None, read.marks, read.reference
