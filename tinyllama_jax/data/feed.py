"""Batches for training and validation: each a pure function of (sources, seed, step), read ahead by Grain."""

from __future__ import annotations

from collections.abc import Iterator

import grain
import jax
import numpy as np

from tinyllama_jax.config import Config, Data, UserError
from tinyllama_jax.data import litpkds
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.data.mixture import Mixture

NONE = np.empty(0, np.int64)


def open_source(path: str, split: str, seq_len: int) -> Blocks:
    """One split of a source: a folder that `data.prepare` wrote, or DIR/PREFIX of LITPKDS files, which have any S."""
    return litpkds.Packed(path, split, seq_len) if litpkds.files_of(path, split) else Blocks(path, split)


def open_sources(config: Config) -> list[Blocks]:
    """The training split of each source of `config`. Raises UserError where they do not fit the model or one another."""
    opened = [open_source(path, "train", config.model.seq_len) for path in config.data.sources]
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
        if blocks.tokenizer_sha256 != opened[0].tokenizer_sha256:
            raise UserError(
                f"--data.sources: {path} and {next(iter(config.data.sources))} were prepared with different "
                "tokenizers; prepare one of them again"
            )
    return opened


def eos_id(config: Config, sources: list[Blocks]) -> int:
    """What ends a document. Raises UserError if `data.document_mask` needs it and a source does not have it."""
    for path, blocks in zip(config.data.sources, sources, strict=True):
        if config.data.document_mask and not blocks.manifest["eos"]:
            raise UserError(
                f"--data.document_mask=true: {path} was prepared with --no-eos, so that nothing says where a document ends; "
                "prepare it again with --eos"
            )
    return sources[0].manifest["tokenizer"]["eos_id"]


def open_held_out(config: Config, sources: list[Blocks]) -> dict[str, Blocks]:
    """Source -> its validation split, of those sources that have one."""
    named = zip(config.data.sources, sources, strict=True)
    has = [(path, blocks) for path, blocks in named if "validation" in blocks.manifest["splits"]]
    return {path: open_source(path, "validation", blocks.seq_len) for path, blocks in has}


class Order:
    """Which block of which source each sample of the run is."""

    def __init__(self, sizes: list[int], weights: list[float], seed: int, seqs_per_step: int = 1, left_out: np.ndarray = NONE):
        """`sizes`: blocks a source. Each epoch of a source is its own permutation, drawn from (seed, source, epoch).

        `left_out`: as `left_out` gives.
        """
        self.sizes, self.mixture, self.seed = sizes, Mixture(weights), seed
        self.seqs_per_step, self.left_out = seqs_per_step, left_out

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Global sample indices of the run [n] -> (source [n], block of it [n])."""
        step, row = np.divmod(np.asarray(samples, np.int64), self.seqs_per_step)
        source, k = self.mixture.locate((batch_of(step + 1, self.left_out) - 1) * self.seqs_per_step + row)
        block = np.empty_like(k)
        for i, (j, epoch, position) in enumerate(zip(source, *self._epochs(source, k), strict=True)):
            block[i] = self._permuted(int(j), int(epoch), int(position))
        return source, block

    def _epochs(self, source: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.divmod(k, np.asarray(self.sizes, np.int64)[source])

    def _permuted(self, source: int, epoch: int, position: int) -> int:
        seed = int(np.random.SeedSequence((self.seed, source, epoch)).generate_state(1)[0])
        return grain.experimental.index_shuffle(position, max_index=self.sizes[source] - 1, seed=seed, rounds=4)


def order(config: Config, sources: list[Blocks]) -> Order:
    """The order of the run that `config` describes."""
    weights, skip = list(config.data.sources.values()), left_out(config.data)
    return Order([len(s) for s in sources], weights, config.train.seed, config.seqs_per_step, skip)


def left_out(data: Data) -> np.ndarray:
    """The batches that `data.skip` leaves out, in order; batch b is what step b would have without any skip."""
    out = NONE
    for first, last in data.skipped:
        out = np.union1d(out, batch_of(np.arange(first, last + 1), out))
    return out


def batch_of(step: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """The batch of each step (both from 1): the step-th of those that are not left out."""
    return step + np.searchsorted(left_out - np.arange(len(left_out)), step, side="right")


def same_batches(ours: Data, theirs: Data, steps: int) -> bool:
    """Whether two data sections that differ in `skip` alone have the same batches from step 1 to `steps`."""
    a, b = left_out(ours), left_out(theirs)
    end = max(batch_of(np.int64(steps), a), batch_of(np.int64(steps), b))
    return np.array_equal(a[a <= end], b[b <= end])


class Steps(grain.sources.RandomAccessDataSource):
    """Element s is the part that this process reads of step s + 1: `tokens` [A, rows, S + 1] and `length` [A, rows]."""

    def __init__(self, sources: list[Blocks], order: Order, steps: int, shape: tuple[int, int], rows: np.ndarray):
        """`shape`: (A, B) of the global batch. `rows`: which of each micro-batch's B sequences this process reads."""
        self._sources, self._order, self._steps, self._shape, self._rows = sources, order, steps, shape, rows

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        accumulation, batch = self._shape
        in_step = np.arange(accumulation)[:, None] * batch + self._rows[None, :]
        source, block = self._order.locate(step * accumulation * batch + in_step.ravel())
        tokens, length = gather(self._sources, source, block)
        return tokens.reshape(*in_step.shape, -1), length.reshape(in_step.shape)


def gather(sources: list[Blocks], source: np.ndarray, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks by (source [n], block [n]) -> tokens [n, S + 1], length [n]; one batched read a source."""
    dtype = np.result_type(*(s.dtype for s in sources))
    tokens, length = np.empty((len(source), sources[0].seq_len + 1), dtype), np.empty(len(source), np.int32)
    for j in np.unique(source):
        here = source == j
        tokens[here], length[here] = sources[j].read(block[here])
    return tokens, length


def rows_here(sharding: jax.sharding.Sharding, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """The indices along `axis` of a global array of `shape` that this process's devices hold, in order."""
    slices = [index[axis] for index in sharding.addressable_devices_indices_map(shape).values()]
    return np.unique(np.concatenate([np.arange(shape[axis])[s] for s in slices]))


def training(config: Config, sources: list[Blocks], shape: tuple[int, int], rows: np.ndarray, start: int) -> Iterator:
    """(tokens, length) of steps `start` + 1, `start` + 2, ... as `Steps` describes; `start` costs nothing."""
    steps = grain.MapDataset.source(Steps(sources, order(config, sources), config.train.steps, shape, rows))
    # a few steps ahead, whatever the number of threads: a step of 2 M tokens is 4 MB
    ahead = grain.ReadOptions(num_threads=config.data.workers, prefetch_buffer_size=2 * config.data.workers)
    return iter(steps[start:].to_iter_dataset(ahead))


def validation(blocks: Blocks, limit: int, batch: int, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first `limit` blocks (0: all) once each, `batch` at a time over all processes; short batches have length 0 rows."""
    n = min(limit, len(blocks)) if limit else len(blocks)
    for first in range(0, n, batch):
        index = first + rows
        tokens, length = blocks.read(np.minimum(index, n - 1))
        yield tokens, np.where(index < n, length, 0).astype(np.int32)
