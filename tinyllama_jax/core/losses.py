"""The loss of pre-training, next-token cross-entropy, and the interface of any loss that a step can minimise."""

import dataclasses
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import jmp

from tinyllama_jax.base import sharding
from tinyllama_jax.base.config import Bos, Config
from tinyllama_jax.base.dims import FIRST, LEARNED
from tinyllama_jax.core import model
from tinyllama_jax.kernels.cross_entropy import Sums, chunk_of, cross_entropy
from tinyllama_jax.kernels.cross_entropy import token_losses as head_losses


class Batch(NamedTuple):
    """The blocks of a step: `tokens` [A, B, S + 1] and `length` [A, B], the number of real tokens; padding follows them.

    A micro-batches of B sequences over all devices. Evaluation takes batches without A.
    """

    tokens: jax.Array
    length: jax.Array
    source: jax.Array | None = None  # [A, B] int32: the source of each sequence, if training has several
    marks: jax.Array | None = None  # [A, B, S + 1] uint8, of conversations: see base/dims.py
    reference: jax.Array | None = None  # [A, B, S + 1] fp32, of preferences


class Loss(Protocol):
    """A loss. A step minimises the sum of `sums.loss` + `sums.z` over all micro-batches, divided by the sum of `predicted`.

    `config` is that of the program: with the attention chosen for the mesh, and `train` in steps. `extras`: the fields of a
    batch that it needs besides tokens and length.
    """

    extras: tuple[str, ...]

    def sums(self, params: dict, batch: Batch, config: Config) -> Sums:
        """Sums over a micro-batch [B, S + 1], fp32: `loss` (nats), `correct`, `z` (0 if unused).

        `rows`: the loss of each source [n_sources], or None if `batch.source` is None.
        """

    def predicted(self, batch: Batch, config: Config) -> jax.Array:
        """The number of tokens that the loss counts in each sequence: int32 [..., B] for tokens [..., B, S + 1]."""

    def token_losses(self, params: dict, batch: Batch, config: Config) -> jax.Array:
        """Loss of each next token of a micro-batch: [B, S]. `replay` and the benchmarks use it; training does not."""


@dataclasses.dataclass(frozen=True)
class NextToken:
    """The loss of pre-training: the cross-entropy of each real token of a block but the first. Padding does not count.

    A subclass that counts other tokens overrides `counted` alone.

    `eos_id`: the token that ends a document (or a `Bos`, which begins one), for `data.document_mask` and `data.eod_mask_loss`.
    """

    eos_id: int | None = None
    extras = ()

    def sums(self, params: dict, batch: Batch, config: Config) -> Sums:
        """See `Loss`."""
        with jax.numpy_dtype_promotion("strict"):
            cfg, tokens_BS = config.model, batch.tokens.astype(jnp.int32)
            labels_BS = tokens_BS[:, 1:]
            real_BS = self.counted(batch, config).astype(jnp.float32)
            x_BSD = model.hidden(params, tokens_BS[:, :-1], cfg, self.documents(batch, config), config.lora)
            kernel_XDV = sharding.gather_per_part(params["lm_head"]["kernel"], "DV", cfg.compute_dtype, cfg.reduce_dtype)
            chunk = chunk_of(cfg.seq_len, config.train.seqs_per_device, cfg.loss_chunk)
            # a loss for each of the X parts of the batch: the head's gradient crosses devices once, not once per chunk
            split = lambda a: a.reshape(len(kernel_XDV), -1, *a.shape[1:])
            head = partial(cross_entropy, chunk=chunk, z_loss=config.train.z_loss)
            losses = jax.vmap(head)(split(x_BSD), kernel_XDV, split(labels_BS), split(real_BS))
            by_source = sum_by_source(losses.rows.reshape(-1), batch.source, len(config.data.sources))
            return Sums(*map(jnp.sum, losses[:3]), by_source)

    def predicted(self, batch: Batch, config: Config) -> jax.Array:
        """See `Loss`."""
        return self.counted(batch, config).sum(-1, dtype=jnp.int32)

    def token_losses(self, params: dict, batch: Batch, config: Config) -> jax.Array:
        """See `Loss`; nats, fp32. At padding it means nothing."""
        with jax.numpy_dtype_promotion("strict"):
            cfg, tokens_BS = config.model, batch.tokens.astype(jnp.int32)
            x_BSD = model.hidden(params, tokens_BS[:, :-1], cfg, self.documents(batch, config), config.lora)
            kernel_DV = jmp.get_policy(cfg.precision).cast_to_compute(params["lm_head"]["kernel"])
            chunk = chunk_of(cfg.seq_len, config.train.seqs_per_device, cfg.loss_chunk)
            return head_losses(x_BSD, kernel_DV, tokens_BS[:, 1:], chunk)

    def documents(self, batch: Batch, config: Config) -> jax.Array | None:
        """Segment ids [B, S] for attention: the number of eos before each token, or of bos up to it; None without the mask."""
        if self.eos_id is None or not config.data.document_mask:
            return None
        edges_BS = (batch.tokens[:, :-1] == self.eos_id).astype(jnp.int32)
        return jnp.cumsum(edges_BS, axis=1) - (0 if isinstance(self.eos_id, Bos) else edges_BS)

    def counted(self, batch: Batch, config: Config) -> jax.Array:
        """Whether position s counts, bool [..., S]: token s + 1 is real and token s is not eos under `data.eod_mask_loss`."""
        tokens, left_out = batch.tokens[..., :-1], self._left_out(config)
        real = jnp.arange(1, tokens.shape[-1] + 1, dtype=jnp.int32) < batch.length[..., None]
        return real if left_out is None else real & (tokens != left_out)

    def _left_out(self, config: Config) -> int | None:
        return self.eos_id if config.data.eod_mask_loss else None


@dataclasses.dataclass(frozen=True)
class Answers(NextToken):
    """The loss of fine-tuning: as `NextToken`, over the tokens that are marked as learned, within each conversation."""

    extras = ("marks",)

    def documents(self, batch: Batch, config: Config) -> jax.Array:
        """Segment ids [B, S] for attention: the number of conversations that have begun."""
        return jnp.cumsum((batch.marks[:, :-1] & FIRST) // FIRST, axis=1, dtype=jnp.int32)

    def counted(self, batch: Batch, config: Config) -> jax.Array:
        """Whether position s counts, bool [..., S]: token s + 1 is real and marked."""
        return super().counted(batch, config) & (batch.marks[..., 1:] & LEARNED > 0)


NEXT_TOKEN = NextToken()


def for_data(kind: str, eos_id: int | None) -> Loss:
    """The loss of training on data of a `kind` (of `dims.EXTRAS`)."""
    return {"text": NextToken, "chat": Answers}[kind](eos_id)


def sum_by_source(values: jax.Array, source: jax.Array | None, n_sources: int) -> jax.Array | None:
    """Sums the `values` of sequences by source: [n_sources]; None without sources."""
    if source is None:
        return None
    return jnp.stack([jnp.where(source == j, values, 0).sum() for j in range(n_sources)])


def count_tokens(predicted: jax.Array) -> jax.Array:
    """The number of tokens that the mean is over, at least 1, as fp32 (exact below 2^24 = 16.8 M)."""
    return jnp.maximum(predicted.sum(), 1).astype(jnp.float32)
