"""nf4 by hand, and against bitsandbytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax.kernels import nf4

SHAPES = ((64, 8), (128, 96), (2_048, 130), (192, 100))  # inputs, outputs: whole groups of 256 scales, and parts of one


def weights(inputs, outputs):
    """Two blocks of a matrix are zeros; one holds numbers so small that 1 / them is infinite in fp32."""
    w_OI = np.random.default_rng(inputs).normal(0, 0.02, (outputs, inputs)).astype(np.float32)
    w_OI[0, :64] = w_OI[3, :64] = 0
    w_OI[2, :64] *= 1e-3
    return w_OI


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_number_is_at_most_half_a_gap_away(inputs, outputs):
    w_OI = weights(inputs, outputs)
    w = jax.jit(nf4.quantize, static_argnums=1)(w_OI.T, 1)
    back_OI = np.asarray(nf4.dequantize(w, 1, jnp.float32)).T
    largest = np.abs(w_OI.reshape(-1, 64)).max(1, keepdims=True)
    gap = np.diff(nf4.LEVELS).max() / 2  # 0.152 of a block's largest; its scale is off by at most 1/127 of the largest scale
    error = np.abs(back_OI - w_OI).reshape(-1, 64)
    assert (error <= largest * gap + np.abs(largest - largest.mean()).max() / 127).all() and error.max() > 0
    assert sum(a.nbytes for a in jax.tree.leaves(w)) * 8 / w_OI.size < (4.2 if w_OI.size > 2**16 else 5)


def test_levels_are_exact_and_the_first_input_is_the_high_half_of_a_byte():
    w_IO = np.tile(np.array(nf4.LEVELS, np.float32)[:, None], (4, 1))  # one block with all levels
    w = nf4.quantize(jnp.asarray(w_IO), 1)
    assert np.asarray(w["codes"])[:8, 0].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    np.testing.assert_array_equal(nf4.dequantize(w, 1, jnp.float32), w_IO)


@pytest.mark.parametrize(("shape", "n"), [((64, 4, 16), 1), ((4, 16, 64), 2)])
def test_heads_are_joined(shape, n):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    flat = w.reshape(64, 64)
    np.testing.assert_array_equal(
        nf4.dequantize(nf4.quantize(jnp.asarray(w), n), n, jnp.float32).reshape(64, 64),
        nf4.dequantize(nf4.quantize(jnp.asarray(flat), 1), 1, jnp.float32),
    )


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_it_is_bitsandbytes(inputs, outputs):
    """The 4-bit codes bit for bit. Its 8-bit codes are not always the nearest level: it looks numbers up in 65,536 bins."""
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    w_OI = weights(inputs, outputs)
    codes, state = functional.quantize_4bit(torch.from_numpy(w_OI), compress_statistics=True, quant_type="nf4")
    ours = jax.jit(nf4.quantize, static_argnums=1)(w_OI.T, 1)
    np.testing.assert_array_equal(nf4.dynamic_levels(), state.state2.code.numpy())
    np.testing.assert_array_equal(np.asarray(ours["codes"]).T.ravel(), codes.numpy().ravel())
    assert float(ours["scale_mean"]) == pytest.approx(float(state.offset), rel=1e-6)
    np.testing.assert_allclose(ours["scale_scale"], state.state2.absmax.numpy(), rtol=1e-5)
    theirs = state.absmax.numpy().ravel()
    other = np.flatnonzero(np.asarray(ours["scale"]) != theirs)
    levels, exact = nf4.dynamic_levels(), np.abs(w_OI.reshape(-1, 64)).max(1) - float(state.offset)
    exact = (exact / np.repeat(state.state2.absmax.numpy(), 256)[: len(exact)])[other]
    middle = (levels[theirs[other]] + levels[np.asarray(ours["scale"])[other]]) / 2
    assert len(other) <= len(theirs) / 200 and (np.abs(exact - middle) < 2 / 65_536).all()
    # what bitsandbytes reads from its own numbers is what we read from them
    read = {"codes": codes.numpy().reshape(outputs, -1).T, "scale": theirs, "scale_scale": state.state2.absmax.numpy()}
    read = jax.tree.map(jnp.asarray, read | {"scale_mean": state.offset.numpy()})
    ours = nf4.dequantize(read, 1, jnp.float32)
    back = functional.dequantize_4bit(codes, state).numpy()
    np.testing.assert_allclose(np.asarray(ours).T, back, rtol=0, atol=np.abs(w_OI).max() * 2**-23)
