"""Loss head: logits, softmax cross-entropy and their gradients, a chunk of positions at a time."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Sums(NamedTuple):
    """Sums over positions, fp32 scalars except `rows`. Divide by the sum of the weights for means."""

    loss: jax.Array  # negative log-likelihood, nats
    correct: jax.Array  # positions where the label is the likeliest token
    z: jax.Array  # z_loss x logsumexp^2; the step minimises loss + z (PaLM, arXiv:2204.02311, section 5: z_loss 1e-4)
    rows: jax.Array  # [B]: the loss of each sequence, for reports; it has no gradient
    more: dict[str, jax.Array] | None = None  # what else a loss reports, by name


def zero_sums(n_rows: int) -> Sums:
    """Returns zero sums with `n_rows` rows."""
    return Sums(*(np.float32(0),) * 3, np.zeros(n_rows, np.float32))


def reference(x_BSD: jax.Array, kernel_DV: jax.Array, labels_BS: jax.Array, weights_BS: jax.Array, z_loss: float = 0.0) -> Sums:
    """The definition: all logits [B, S, V] at once, fp32 from the logits on."""
    return _sums(_logits(x_BSD, kernel_DV), labels_BS, weights_BS, z_loss)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    x_BSD: jax.Array, kernel_DV: jax.Array, labels_BS: jax.Array, weights_BS: jax.Array, chunk: int, z_loss: float = 0.0
) -> Sums:
    """Computes `reference` with matmuls in x's dtype and the logits of only `chunk` positions of each sequence at a time.

    Forward also computes the gradients of x and kernel, in one pass over the logits; backward only scales them by the
    cotangent. They are the gradients of loss + z, so both must have the same cotangent. Without differentiation no gradient is
    computed.
    """
    n_chunks, kernel_DV = -(-x_BSD.shape[1] // chunk), kernel_DV.astype(x_BSD.dtype)
    arrays = [_padded(a, chunk) for a in (x_BSD, labels_BS, weights_BS)]

    def body(sums: Sums, i: jax.Array) -> tuple[Sums, None]:
        x, labels, weights = (_slice(a, i, chunk) for a in arrays)
        return jax.tree.map(jnp.add, sums, _sums(_logits(x, kernel_DV), labels, weights, z_loss)), None

    return lax.scan(body, zero_sums(len(x_BSD)), jnp.arange(n_chunks))[0]


def _padded(a_BS: jax.Array, chunk: int) -> jax.Array:
    """Pads with zeros, which have no weight, to a multiple of `chunk` positions."""
    return jnp.pad(a_BS, ((0, 0), (0, -a_BS.shape[1] % chunk), *((0, 0),) * (a_BS.ndim - 2)))


def _logits(x_BSD: jax.Array, kernel_DV: jax.Array) -> jax.Array:
    # fp32 results: in bf16 the logits of a confident model (10 to 30) would be rounded to multiples of 1/16 to 1/8
    return jnp.einsum("bsd,dv->bsv", x_BSD, kernel_DV, preferred_element_type=jnp.float32)


def token_losses(x_BSD: jax.Array, kernel_DV: jax.Array, labels_BS: jax.Array, chunk: int) -> jax.Array:
    """Returns the negative log-likelihood of each label: [B, S], nats, fp32."""
    S = x_BSD.shape[1]
    arrays = [_padded(a, chunk) for a in (x_BSD, labels_BS)]

    def body(_, i: jax.Array) -> tuple[None, jax.Array]:
        x, labels = (_slice(a, i, chunk) for a in arrays)
        logits = _logits(x, kernel_DV)
        return None, jax.nn.logsumexp(logits, axis=-1) - _of_labels(logits, labels)

    _, parts = lax.scan(body, None, jnp.arange(-(-S // chunk)))  # [S / chunk, B, chunk]
    return jnp.swapaxes(parts, 0, 1).reshape(len(x_BSD), -1)[:, :S]


def _of_labels(logits_BSV: jax.Array, labels_BS: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits_BSV, labels_BS[..., None], axis=-1)[..., 0]


def _sums(logits_BSV: jax.Array, labels_BS: jax.Array, weights_BS: jax.Array, z_loss: float) -> Sums:
    lse_BS, chosen_BS = jax.nn.logsumexp(logits_BSV, axis=-1), _of_labels(logits_BSV, labels_BS)
    # logsumexp has computed the maximum; an argmax would be another pass (6 times slower on a CPU)
    correct_BS = (chosen_BS >= jnp.max(logits_BSV, axis=-1)).astype(jnp.float32)
    z = z_loss * jnp.sum(jnp.square(lse_BS) * weights_BS) if z_loss else jnp.float32(0)
    rows_B = jnp.sum((lse_BS - chosen_BS) * weights_BS, axis=1)
    return Sums(jnp.sum(rows_B), jnp.sum(correct_BS * weights_BS), z, rows_B)


def _slice(a: jax.Array, i: jax.Array, chunk: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(a, i * chunk, chunk, axis=1)


def _forward(x_BSD, kernel_DV, labels_BS, weights_BS, chunk, z_loss):
    S, like, kernel_DV = x_BSD.shape[1], jnp.zeros((), kernel_DV.dtype), kernel_DV.astype(x_BSD.dtype)
    arrays = [_padded(a, chunk) for a in (x_BSD, labels_BS, weights_BS)]

    def body(carry, i):
        sums, dx_BSD, dkernel_DV = carry
        x, labels, weights = (_slice(a, i, chunk) for a in arrays)
        logits = _logits(x, kernel_DV)
        sums = jax.tree.map(jnp.add, sums, _sums(logits, labels, weights, z_loss))
        one_hot = labels[..., None] == jnp.arange(logits.shape[-1])
        dlse = 1 + 2 * z_loss * jax.nn.logsumexp(logits, axis=-1, keepdims=True) if z_loss else 1.0
        dlogits = (jax.nn.softmax(logits, axis=-1) * dlse - one_hot.astype(jnp.float32)) * weights[..., None]
        dlogits = dlogits.astype(x.dtype)  # as in autodiff, the matmuls of backward run in the compute dtype
        dx = jnp.einsum("bsv,dv->bsd", dlogits, kernel_DV)
        dx_BSD = lax.dynamic_update_slice_in_dim(dx_BSD, dx, i * chunk, axis=1)
        dkernel_DV += jnp.einsum("bsd,bsv->dv", x, dlogits, preferred_element_type=jnp.float32)
        return (sums, dx_BSD, dkernel_DV), None

    zeros = (zero_sums(len(x_BSD)), jnp.zeros_like(arrays[0]), jnp.zeros(kernel_DV.shape, jnp.float32))
    (sums, dx_BSD, dkernel_DV), _ = lax.scan(body, zeros, jnp.arange(-(-S // chunk)))
    return sums, (dx_BSD[:, :S], dkernel_DV, like)


def _backward(chunk, z_loss, residuals, cotangent):
    # fp32 until scaled: the kernel's gradient sums over all tokens, which can exceed fp16's largest number, 65,504
    dx_BSD, dkernel_DV, like = residuals
    dx = (dx_BSD.astype(jnp.float32) * cotangent.loss).astype(dx_BSD.dtype)
    return dx, (dkernel_DV * cotangent.loss).astype(like.dtype), None, None


cross_entropy.defvjp(_forward, _backward)


def chunk_of(seq_len: int, sequences: int, tokens: int) -> int:
    """Returns the positions in a chunk: the largest divisor n of `seq_len` with n x `sequences` <= `tokens`, or 1.

    If that is less than half of what is allowed (`seq_len` may be prime), the chunks are equal and the last one is padded.
    """
    most = min(max(tokens // sequences, 1), seq_len)
    divisor = max(n for n in range(1, most + 1) if seq_len % n == 0)
    return divisor if 2 * divisor >= most else -(-seq_len // -(-seq_len // most))
