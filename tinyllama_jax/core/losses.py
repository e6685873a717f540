"""The loss of pre-training, next-token cross-entropy, and the interface of any loss that a step can minimise."""

import dataclasses
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import jmp
from jax import lax

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
    reference: jax.Array | None = None  # [A, B, S + 1] fp32, of preferences: see base/dims.py


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
        """Loss of each next token of a micro-batch: [B, S], for `replay`, DPO's reference and benchmarks; no step uses it."""


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
            parts, chunk = self._parts(params, batch, config), self._chunk(config)
            head = partial(cross_entropy, chunk=chunk, z_loss=config.train.z_loss)
            losses = jax.vmap(head)(*parts, _split(self.counted(batch, config).astype(jnp.float32), len(parts[0])))
            by_source = sum_by_source(losses.rows.reshape(-1), batch.source, len(config.data.sources))
            return Sums(*map(jnp.sum, losses[:3]), by_source)

    def _parts(self, params: dict, batch: Batch, config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The head's input [X, B / X, S, D], its kernel [X, D, V] and the labels [X, B / X, S].

        A loss for each of the X parts of the batch: the head's gradient crosses devices once, not once per chunk.
        """
        cfg, tokens_BS = config.model, batch.tokens.astype(jnp.int32)
        x_BSD = model.hidden(params, tokens_BS[:, :-1], cfg, self.documents(batch, config), config.lora)
        kernel_XDV = sharding.gather_per_part(params["lm_head"]["kernel"], "DV", cfg.compute_dtype, cfg.reduce_dtype)
        return _split(x_BSD, len(kernel_XDV)), kernel_XDV, _split(tokens_BS[:, 1:], len(kernel_XDV))

    def _chunk(self, config: Config) -> int:
        return chunk_of(config.model.seq_len, config.train.seqs_per_device, config.model.loss_chunk)

    def predicted(self, batch: Batch, config: Config) -> jax.Array:
        """See `Loss`."""
        return self.counted(batch, config).sum(-1, dtype=jnp.int32)

    def token_losses(self, params: dict, batch: Batch, config: Config) -> jax.Array:
        """See `Loss`; nats, fp32. At padding it means nothing."""
        with jax.numpy_dtype_promotion("strict"):
            cfg, tokens_BS = config.model, batch.tokens.astype(jnp.int32)
            x_BSD = model.hidden(params, tokens_BS[:, :-1], cfg, self.documents(batch, config), config.lora)
            kernel_DV = jmp.get_policy(cfg.precision).cast_to_compute(params["lm_head"]["kernel"])
            return head_losses(x_BSD, kernel_DV, tokens_BS[:, 1:], self._chunk(config))

    def documents(self, batch: Batch, config: Config) -> jax.Array | None:
        """Segment ids [B, S] for attention: the number of eos before each token, or of bos up to it; None without the mask."""
        if self.eos_id is None or not config.data.document_mask:
            return None
        edges_BS = (batch.tokens[:, :-1].astype(jnp.int32) == jnp.int32(self.eos_id)).astype(jnp.int32)
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


@dataclasses.dataclass(frozen=True)
class Preferences(Answers):
    """The loss of DPO (Rafailov et al., arXiv:2305.18290, equation 7) over pairs: a chosen conversation, then a rejected one.

    A pair's loss is -log sigmoid(beta x margin). Its margin is the sum over the tokens of the chosen answer of log p -
    log p_reference, less that of the rejected answer. `Sums.correct` counts the pairs with a positive margin.
    """

    extras = ("marks", "reference")

    def sums(self, params: dict, batch: Batch, config: Config) -> Sums:
        """See `Loss`. `more`: the margins, and of both answers the sum of log p - log p_reference and the number of tokens."""
        with jax.numpy_dtype_promotion("strict"):
            parts, beta = self._parts(params, batch, config), jnp.float32(config.train.dpo_beta)
            counted_BS = self.counted(batch, config)
            losses = jax.vmap(partial(head_losses, chunk=self._chunk(config)))(*jax.tree.map(lax.stop_gradient, parts))
            gain_BS = jnp.where(counted_BS, -losses.reshape(counted_BS.shape) - batch.reference[:, 1:], jnp.float32(0))
            begun_BS = jnp.cumsum((batch.marks & FIRST) // FIRST, axis=1, dtype=jnp.int32)[:, 1:]  # of the label's conversation
            P = counted_BS.shape[1] // 2 + 1  # more pairs than a block can have
            pair_BS, chosen_BS = (begun_BS - 1) // 2, begun_BS % 2 == 1
            by_pair = jax.vmap(partial(jax.ops.segment_sum, num_segments=P))
            of = lambda which_BS, values_BS: by_pair(jnp.where(which_BS, values_BS, jnp.zeros_like(values_BS)), pair_BS)
            chosen_BP, rejected_BP = of(chosen_BS, gain_BS), of(~chosen_BS, gain_BS)
            margin_BP = chosen_BP - rejected_BP
            real_BP = jnp.arange(P) < self.predicted(batch, config)[:, None]
            total = lambda values_BP: jnp.where(real_BP, values_BP, jnp.zeros_like(values_BP)).sum(dtype=jnp.float32)
            # -d loss / d log p of each chosen token; of a rejected one with the other sign. The cross-entropy weighted with it
            # has the gradient of the loss, and is computed without all logits in memory at once
            slope_BS = jnp.take_along_axis(beta * jax.nn.sigmoid(-beta * margin_BP), pair_BS, axis=1)
            weights_BS = jnp.where(counted_BS, jnp.where(chosen_BS, slope_BS, -slope_BS), jnp.float32(0))
            head = partial(cross_entropy, chunk=self._chunk(config))
            carrier = jax.vmap(head)(*parts, _split(weights_BS, len(parts[0]))).loss.sum()
            loss_BP = jnp.where(real_BP, jax.nn.softplus(-beta * margin_BP), jnp.float32(0))
            tokens = lambda which_BS: (counted_BS & which_BS).sum(dtype=jnp.float32)
            more = {"margin": beta * total(margin_BP), "chosen_reward": beta * total(chosen_BP),
                    "rejected_reward": beta * total(rejected_BP), "chosen_tokens": tokens(chosen_BS),
                    "rejected_tokens": tokens(~chosen_BS)}  # fmt: skip
            loss = loss_BP.sum() + carrier - lax.stop_gradient(carrier)
            by_source = sum_by_source(loss_BP.sum(axis=1), batch.source, len(config.data.sources))
            return Sums(loss, total((margin_BP > 0).astype(jnp.float32)), jnp.float32(0), by_source, more)

    def predicted(self, batch: Batch, config: Config) -> jax.Array:
        """The number of pairs in each sequence: int32 [..., B]."""
        real = jnp.arange(batch.marks.shape[-1]) < batch.length[..., None]
        return (real & (batch.marks & FIRST > 0)).sum(-1, dtype=jnp.int32) // 2


NEXT_TOKEN = NextToken()


def for_data(kind: str, eos_id: int | None) -> Loss:
    """The loss of training on data of a `kind`, a key of `dims.EXTRAS`."""
    return {"text": NextToken, "chat": Answers, "preferences": Preferences}[kind](eos_id)


def _split(a: jax.Array, parts: int) -> jax.Array:
    return a.reshape(parts, -1, *a.shape[1:])


def sum_by_source(values: jax.Array, source: jax.Array | None, n_sources: int) -> jax.Array | None:
    """Sums the `values` of sequences by source: [n_sources]; None without sources."""
    if source is None:
        return None
    return jnp.stack([jnp.where(source == j, values, 0).sum() for j in range(n_sources)])


def count_tokens(predicted: jax.Array) -> jax.Array:
    """The number of tokens that the mean is over, at least 1, as fp32 (exact below 2^24 = 16.8 M)."""
    return jnp.maximum(predicted.sum(), 1).astype(jnp.float32)
