"""The loss head against its definition in float64: sums, gradients, what it holds, what it leaves out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tinyllama_jax.kernels.cross_entropy import Sums, chunk_of, cross_entropy, reference, token_losses

B, S, D, V = 3, 12, 8, 37


def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(B, S, D)) * 2, rng.normal(size=(D, V))
    labels, weights = rng.integers(0, V, (B, S)), rng.uniform(0.1, 2, (B, S))
    weights[0, 7:] = weights[2] = 0  # padding: the end of one row, the whole of another
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype), jnp.asarray(labels), jnp.asarray(weights, jnp.float32)


def float64(x, kernel, labels, weights):
    """(loss, correct, dx, dkernel) from the textbook formulas."""
    x, kernel, weights = (np.asarray(a, np.float64) for a in (x, kernel, weights))
    logits = x @ kernel
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    one_hot = np.eye(kernel.shape[1])[np.asarray(labels)]
    dlogits = (p - one_hot) * weights[..., None]
    loss = -(np.log((p * one_hot).sum(-1)) * weights).sum()
    correct = ((logits.argmax(-1) == np.asarray(labels)) * weights).sum()
    return loss, correct, dlogits @ kernel.T, np.einsum("bsd,bsv->dv", x, dlogits)


def cotangents(scale, batch):
    return Sums(jnp.float32(scale), jnp.float32(0), jnp.float32(scale), jnp.zeros(batch))


@partial(jax.jit, static_argnames="chunk")
def ours(x, kernel, labels, weights, chunk, cotangent=1.0):
    loss_of = reference if chunk is None else partial(cross_entropy, chunk=chunk)
    sums, vjp = jax.vjp(lambda x, kernel: loss_of(x, kernel, labels, weights), x, kernel)
    return *sums[:2], *vjp(cotangents(cotangent, len(x)))


@pytest.mark.parametrize("chunk", [None, 1, 4, 5, S], ids=["reference", "one position", "four", "three of five", "all"])
@pytest.mark.parametrize("cotangent", [1.0, 2.0**15, -0.3])
def test_fp32(chunk, cotangent):
    arrays = inputs()
    loss, correct, dx, dkernel = float64(*arrays)
    got = ours(*arrays, chunk, cotangent)
    np.testing.assert_allclose(got[:2], (loss, correct), rtol=1e-6)
    for a, b in zip(got[2:], (dx * cotangent, dkernel * cotangent), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max(), rtol=0)


def test_the_kernels_gradient_is_as_exact_as_the_kernel():
    """Of an fp32 kernel it is fp32, from matmuls in bf16: rounded once a chunk, not once more before devices add it up."""
    x, kernel, labels, weights = inputs(jnp.bfloat16)
    *_, dkernel = ours(x, kernel.astype(jnp.float32), labels, weights, 4)
    *_, rounded = ours(x, kernel, labels, weights, 4)
    assert dkernel.dtype == jnp.float32 and rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(dkernel.astype(jnp.bfloat16), rounded)
    assert (dkernel != rounded.astype(jnp.float32)).any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 1e-2), (jnp.float16, 1.5e-3)])
@pytest.mark.parametrize("chunk", [None, 4])
def test_half_precision(chunk, dtype, tolerance):
    arrays = inputs(dtype)
    loss, correct, *gradients = float64(*arrays)
    got = ours(*arrays, chunk)
    np.testing.assert_allclose(got[:2], (loss, correct), rtol=1e-6)  # from the logits on all is fp32
    for a, b in zip(got[2:], gradients, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=tolerance * np.abs(b).max(), rtol=0)


@pytest.mark.parametrize("chunk", [None, 4], ids=["reference", "four"])
def test_z_loss(chunk):
    """z x logsumexp^2, whose gradient is 2 z logsumexp x softmax."""
    x, kernel, labels, weights = inputs()
    loss_of = partial(reference, z_loss=0.3) if chunk is None else partial(cross_entropy, chunk=chunk, z_loss=0.3)
    sums, vjp = jax.vjp(lambda x, kernel: loss_of(x, kernel, labels, weights), x, kernel)
    loss, correct, dx, dkernel = float64(x, kernel, labels, weights)
    logits = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    lse = np.log(np.exp(logits).sum(-1))
    dlogits = 0.6 * (lse * weights)[..., None] * np.exp(logits - lse[..., None])
    np.testing.assert_allclose(sums[:3], (loss, correct, 0.3 * (lse**2 * weights).sum()), rtol=1e-6)
    want = dx + dlogits @ np.asarray(kernel).T, dkernel + np.einsum("bsd,bsv->dv", x, dlogits)
    for a, b in zip(vjp(cotangents(2, B)), want, strict=True):
        np.testing.assert_allclose(a, 2 * b, atol=2e-6 * np.abs(b).max(), rtol=0)


def test_by_hand():
    """Logits (0, ln 3): p = (1/4, 3/4). Two positions of label 1 and weight 1 and 2: loss 3 ln(4/3), both correct."""
    x, kernel = jnp.ones((1, 2, 1)), jnp.asarray([[0.0, np.log(3)]])
    loss, correct, dx, dkernel = ours(x, kernel, jnp.asarray([[1, 1]]), jnp.asarray([[1.0, 2.0]]), 1)
    np.testing.assert_allclose((loss, correct), (3 * np.log(4 / 3), 3), rtol=1e-6)
    np.testing.assert_allclose(dx[0, :, 0], (-np.log(3) / 4, -np.log(3) / 2), rtol=1e-6)
    np.testing.assert_allclose(dkernel, [[3 / 4, -3 / 4]], rtol=1e-6)


@pytest.mark.parametrize("chunk", [None, 4])
def test_padding_has_no_gradient_and_no_effect(chunk):
    x, kernel, labels, weights = inputs()
    padding = weights == 0
    first = ours(x, kernel, labels, weights, chunk)
    assert not np.asarray(first[2])[padding].any() and np.asarray(first[2])[~padding].all()
    rubbish = jnp.where(padding[..., None], 1e3, x)
    for a, b in zip(first, ours(rubbish, kernel, jnp.where(padding, V - 1, labels), weights, chunk), strict=True):
        np.testing.assert_array_equal(a, b)


def test_fp16_sums_over_many_tokens_do_not_overflow():
    """The kernel's gradient of the sum over 2^17 tokens is 65,536, over fp16's largest number; that of the mean is 1/2."""
    n = 2**17
    x, kernel = jnp.ones((1, n, 1), jnp.float16), jnp.zeros((1, 2), jnp.float16)
    *_, dkernel = ours(x, kernel, jnp.zeros((1, n), jnp.int32), jnp.ones((1, n)), n // 4, 1 / n)
    np.testing.assert_allclose(dkernel, [[-0.5, 0.5]], rtol=1e-3)


def equations(jaxpr):
    """All equations of a jaxpr and of those within it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def largest(loss_of, *arrays):
    """Elements of the largest floating-point array that the loss and its gradient compute."""
    jaxpr = jax.make_jaxpr(jax.value_and_grad(lambda x, k: loss_of(x, k, *arrays[2:])[0], (0, 1)))(*arrays[:2]).jaxpr
    avals = [v.aval for e in equations(jaxpr) for v in e.outvars]
    return max(a.size for a in avals if jnp.issubdtype(a.dtype, jnp.floating))


def test_never_holds_all_logits():
    arrays = inputs()
    assert largest(reference, *arrays) == B * S * V  # the check can see it
    assert largest(partial(cross_entropy, chunk=2), *arrays) == max(B * 2 * V, D * V, B * S * D)


@pytest.mark.parametrize("chunk", [None, 4])
def test_the_loss_of_each_sequence(chunk):
    x, kernel, labels, weights = inputs()
    loss_of = reference if chunk is None else partial(cross_entropy, chunk=chunk)
    for i, row in enumerate(loss_of(x, kernel, labels, weights).rows):
        np.testing.assert_allclose(row, reference(x[i][None], kernel, labels[i][None], weights[i][None]).loss, rtol=1e-5)


@pytest.mark.parametrize("chunk", [2, 5])
def test_losses_of_single_tokens(chunk):
    """Each is the reference's loss of that position alone; and the logits of all positions never exist."""
    x, kernel, labels, _ = inputs()
    losses = token_losses(x, kernel, labels, chunk)
    one_at_a_time = jnp.eye(B * S).reshape(B * S, B, S)
    expected = jax.vmap(lambda weights: reference(x, kernel, labels, weights).loss)(one_at_a_time)
    np.testing.assert_allclose(losses, expected.reshape(B, S), rtol=1e-5)
    jaxpr = jax.make_jaxpr(lambda *arrays: token_losses(*arrays, 2))(x, kernel, labels).jaxpr
    assert max(v.aval.size for e in equations(jaxpr) for v in e.outvars) < B * S * V


def test_peak_memory_is_that_of_a_chunk():
    """Compiled at B S V = 2 x 512 x 4096: 16.8 MB of logits in fp32; a chunk of 16 positions is 0.5 MB."""
    shapes = ((2, 512, 16), jnp.float32), ((16, 4096), jnp.float32), ((2, 512), jnp.int32), ((2, 512), jnp.float32)
    arguments = [jax.ShapeDtypeStruct(*s) for s in shapes]

    def megabytes(loss_of):
        program = jax.jit(lambda x, k, *rest: jax.grad(lambda x, k: loss_of(x, k, *rest)[0], (0, 1))(x, k))
        return program.lower(*arguments).compile().memory_analysis().temp_size_in_bytes / 1e6

    assert megabytes(reference) > 16.8
    assert megabytes(partial(cross_entropy, chunk=16)) < 4


def test_a_loss_that_is_not_differentiated_computes_no_gradient():
    arrays = inputs()

    def matmuls(f):
        return sum(e.primitive.name == "dot_general" for e in equations(jax.make_jaxpr(f)(*arrays).jaxpr))

    assert matmuls(partial(cross_entropy, chunk=4)) == 1
    assert matmuls(partial(ours, chunk=4)) == 3  # logits once, and the two gradients


@pytest.mark.parametrize(
    ("seq_len", "sequences", "tokens", "chunk"),
    [
        (2048, 8, 2048, 256),
        (2048, 1, 2048, 2048),
        (2048, 8, 3000, 256),  # 375 does not divide 2,048
        (96, 4, 100, 24),
        (2048, 8, 4, 1),  # not even one position each: one, then
        (7, 2, 13, 4),  # 7 is prime: 4 and 3
        (2039, 8, 2048, 255),  # prime: 7 of 255 and one of 254
        (4078, 8, 2048, 255),  # 2 x 2039
        (2039, 1, 4096, 2039),
        (1, 5, 1, 1),
    ],
)
def test_chunk_of(seq_len, sequences, tokens, chunk):
    assert chunk_of(seq_len, sequences, tokens) == chunk
