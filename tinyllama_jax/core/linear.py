"""The matmuls of a layer: with a matrix that trains, and with one that is frozen."""

from functools import partial

import jax
import jax.numpy as jnp

from tinyllama_jax.base import sharding
from tinyllama_jax.kernels import nf4


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def linear(einsum: str, reduce_dtype: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns `jnp.einsum(einsum, x, kernel)` in x's dtype. The matmul for the kernel's gradient returns `reduce_dtype`.

    That is then also the dtype of the gradient's sum over devices. The backward matmuls are written out because autodiff
    computes the kernel's gradient transposed, for which XLA's CPU backend copies the activations: the MLP's forward and
    backward took 1.6 times the CPU time.
    """
    return jnp.einsum(einsum, x, kernel.astype(x.dtype))


def _linear_forward(einsum, reduce_dtype, x, kernel):
    return linear(einsum, reduce_dtype, x, kernel), (x, kernel)


def _linear_backward(einsum, reduce_dtype, residuals, dy):
    (x, kernel), (inputs, y) = residuals, einsum.split("->")
    x_dims, kernel_dims = inputs.split(",")
    dx = jnp.einsum(f"{y},{kernel_dims}->{x_dims}", dy, kernel.astype(dy.dtype))
    dkernel = jnp.einsum(f"{x_dims},{y}->{kernel_dims}", x, dy, preferred_element_type=reduce_dtype)
    return dx, dkernel.astype(kernel.dtype)


linear.defvjp(_linear_forward, _linear_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def down(reduce_dtype: str, gate_BSF: jax.Array, up_BSF: jax.Array, kernel_FD: jax.Array) -> jax.Array:
    """SwiGLU's second half: (silu(gate) * up) kernel, [B, S, D]. Backward saves only gate and up; otherwise like `linear`."""
    return jnp.einsum("bsf,fd->bsd", swiglu(gate_BSF, up_BSF), kernel_FD.astype(gate_BSF.dtype))


def swiglu(gate_BSF: jax.Array, up_BSF: jax.Array) -> jax.Array:
    """silu(gate) * up, [B, S, F]."""
    return jax.nn.silu(gate_BSF) * up_BSF


def _down_forward(reduce_dtype, gate_BSF, up_BSF, kernel_FD):
    return down(reduce_dtype, gate_BSF, up_BSF, kernel_FD), (gate_BSF, up_BSF, kernel_FD)


def _down_backward(reduce_dtype, residuals, dy_BSD):
    gate_BSF, up_BSF, kernel_FD = residuals
    h_BSF, vjp = jax.vjp(swiglu, gate_BSF, up_BSF)
    dkernel_FD = jnp.einsum("bsf,bsd->fd", h_BSF, dy_BSD, preferred_element_type=reduce_dtype)
    dgate_BSF, dup_BSF = vjp(jnp.einsum("bsd,fd->bsf", dy_BSD, kernel_FD.astype(dy_BSD.dtype)))
    return dgate_BSF, dup_BSF, dkernel_FD.astype(kernel_FD.dtype)


down.defvjp(_down_forward, _down_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def frozen(einsum: str, x: jax.Array, kernel: jax.Array | nf4.Nf4) -> jax.Array:
    """`linear` with a kernel that has no gradient. Backward saves the kernel as it is kept: a 4-bit one is expanded again."""
    return jnp.einsum(einsum, x, _dense(einsum, kernel, x.dtype))


def _dense(einsum: str, kernel: jax.Array | nf4.Nf4, dtype: jnp.dtype) -> jax.Array:
    if not isinstance(kernel, dict):
        return kernel.astype(dtype)
    inputs, y = einsum.split("->")
    letters = inputs.split(",")[1]
    codes = sharding.constrain(kernel["codes"], letters.upper())  # so that devices exchange codes, not expanded weights
    return nf4.dequantize(kernel | {"codes": codes}, len(set(letters) - set(y)), dtype)


def _frozen_forward(einsum, x, kernel):
    return frozen(einsum, x, kernel), kernel


def _frozen_backward(einsum, kernel, dy):
    inputs, y = einsum.split("->")
    x_dims, kernel_dims = inputs.split(",")
    return jnp.einsum(f"{y},{kernel_dims}->{x_dims}", dy, _dense(einsum, kernel, dy.dtype)), None


frozen.defvjp(_frozen_forward, _frozen_backward)
