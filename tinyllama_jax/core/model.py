"""Llama 2 as a Flax module, and pure functions around it: init, hidden, logits. `layer` also serves inference."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jmp
from jax.ad_checkpoint import checkpoint_name

from tinyllama_jax.base import dims, sharding
from tinyllama_jax.base import rope as rope_lib
from tinyllama_jax.base.config import Lora, Model
from tinyllama_jax.core import lora as lora_lib
from tinyllama_jax.core.linear import down, linear
from tinyllama_jax.kernels import attention as attention_kernels

NO_LORA = Lora()
# The activations of a layer that are saved for backward, by their checkpoint_name; the others are computed again.
_MATMULS = ("q", "k", "v", "residual", "gate", "up")
REMAT_POLICIES = {
    "save_matmuls_and_attention": jax.checkpoint_policies.save_only_these_names(*_MATMULS, "attention"),
    "save_matmuls": jax.checkpoint_policies.save_only_these_names(*_MATMULS),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _initializer(parameter: dims.Parameter, model: Model):
    if parameter.kind == "norm":
        return nn.initializers.ones
    std = dims.init_std(parameter, model)
    if model.init == "torch_default" and parameter.fan_in:
        return lambda key, shape, dtype: std * 3**0.5 * jax.random.uniform(key, shape, dtype, -1.0, 1.0)
    return nn.initializers.normal(std)


class Weight(nn.Module):
    """Makes a parameter. Its random key comes from its path, so that adding a parameter changes no other."""

    entry: str  # the name in dims.PARAMETERS
    model: Model

    @nn.compact
    def __call__(self) -> jax.Array:
        parameter = dims.BY_NAME[self.entry]
        shape = dims.shape(parameter, self.model)[parameter.dims.startswith("L") :]
        dtype = jmp.get_policy(self.model.precision).param_dtype
        return self.param(self.entry.rpartition("/")[2], _initializer(parameter, self.model), shape, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(table_VD: jax.Array, tokens_BS: jax.Array, dtype: str, reduce_dtype: str) -> jax.Array:
    """Returns `table_VD[tokens_BS]` in `dtype`. Gathers the table over fsdp first; otherwise XLA would gather activations."""
    return sharding.constrain(table_VD.astype(dtype), "VD")[tokens_BS]


def _lookup_forward(table_VD, tokens_BS, dtype, reduce_dtype):
    return lookup(table_VD, tokens_BS, dtype, reduce_dtype), (jnp.zeros((len(table_VD), 0), table_VD.dtype), tokens_BS)


def _lookup_backward(dtype, reduce_dtype, residuals, dx_BSD):
    like, tokens_BS = residuals
    D, X = dx_BSD.shape[-1], sharding.parts()
    # fp32: a row sums over all occurrences of its token, and a bf16 sum of equal numbers stops growing after 256 of them
    zeros_VD = jnp.zeros((len(like), D), jnp.float32)
    add = jax.vmap(lambda tokens, dx: zeros_VD.at[tokens].add(dx.astype(jnp.float32)))
    d_XVD = add(tokens_BS.reshape(X, -1), dx_BSD.reshape(X, -1, D))
    return sharding.sum_of_parts(d_XVD, "VD", reduce_dtype).astype(like.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)


def rms_norm(x_BSD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale, in fp32: a bf16 sum of squares would lose all but the largest."""
    x_f32 = x_BSD.astype(jnp.float32)
    return x_f32 * jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + eps) * scale_D.astype(jnp.float32)


def rope_table(positions: jax.Array, model: Model) -> tuple[jax.Array, jax.Array]:
    """cos and sin [..., S, H/2] of positions [..., S], in fp32: a bf16 table is off by up to 1/256 (transformers PR 29285)."""
    frequency_P, scale = rope_lib.frequencies(model)
    angle = positions.astype(jnp.float32)[..., None] * frequency_P
    return scale * jnp.cos(angle), scale * jnp.sin(angle)


def rope(x_BSNH: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of each head (the half-split layout, as in Hugging Face), in fp32."""
    cos, sin = (t[..., :, None, :] for t in table)
    first, second = jnp.split(x_BSNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BSNH.dtype)


class Parts(NamedTuple):
    """What a layer computes with. Training and inference differ only in these four."""

    weight: Callable[[str], jax.Array]  # name -> a norm's scale [D]
    project: Callable[[str, str, jax.Array], jax.Array]  # (name, einsum, x) -> x times the matrix of that name
    down: Callable[[jax.Array, jax.Array], jax.Array]  # (gate, up) [B, S, F] -> SwiGLU's second half [B, S, D]
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (q, k, v) -> the attention output [B, S, N, H]


def layer(x_BSD: jax.Array, table: tuple[jax.Array, jax.Array], parts: Parts, model: Model) -> jax.Array:
    """One layer, [B, S, D] to [B, S, D]: x + attention(norm(x)), then x + mlp(norm(x)). `table`: from `rope_table`."""
    policy, project = jmp.get_policy(model.precision), parts.project

    def norm(name: str, x: jax.Array) -> jax.Array:
        return policy.cast_to_compute(rms_norm(x, parts.weight(name), model.norm_eps))

    h_BSD = norm("attention_norm", x_BSD)
    q_BSNH = rope(sharding.constrain(project("q", "bsd,dnh->bsnh", h_BSD), "BSNH"), table)
    k_BSKH = rope(sharding.constrain(project("k", "bsd,dkh->bskh", h_BSD), "BSKH"), table)
    v_BSKH = sharding.constrain(project("v", "bsd,dkh->bskh", h_BSD), "BSKH")
    out_BSD = project("o", "bsnh,nhd->bsd", parts.attend(q_BSNH, k_BSKH, v_BSKH))
    x_BSD = checkpoint_name(sharding.constrain(x_BSD + out_BSD.astype(x_BSD.dtype), "BSD"), "residual")

    h_BSD = norm("mlp_norm", x_BSD)
    gate_BSF = sharding.constrain(project("gate", "bsd,df->bsf", h_BSD), "BSF")
    up_BSF = sharding.constrain(project("up", "bsd,df->bsf", h_BSD), "BSF")
    return sharding.constrain(x_BSD + parts.down(gate_BSF, up_BSF).astype(x_BSD.dtype), "BSD")


class Block(nn.Module):
    """`layer` in training: its parameters, and what backward saves of it."""

    model: Model
    lora: Lora = NO_LORA

    @nn.compact
    def __call__(self, x_BSD: jax.Array, ids_BS: jax.Array | None, table: tuple[jax.Array, jax.Array]):
        model = self.model

        def weight(name: str) -> jax.Array:
            kind = "scale" if name.endswith("norm") else "kernel"
            return Weight(f"layers/{name}/{kind}", model, name=name)()

        def project(name: str, einsum: str, x: jax.Array) -> jax.Array:
            if self.lora.rank:
                y = lora_lib.project(einsum, model.reduce_dtype, x, self.variables["params"][name], self.lora)
            else:
                y = linear(einsum, model.reduce_dtype, x, weight(name))
            # saved without H as a dimension of its own: TPUs pad the last dimension to 128, twice the memory for H = 64
            return checkpoint_name(y.reshape(*y.shape[:2], -1), name).reshape(y.shape)

        def attend(q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
            impl = model.attention
            if impl == "auto":  # outside `program.build`, which chooses for its mesh
                shape = {"seq_len": q_BSNH.shape[1], "head_dim": model.d_head, "segments": ids_BS is not None}
                impl = attention_kernels.choose(impl, model.compute_dtype, **shape)[0]
            arrays = [a for a in (q_BSNH, k_BSKH, v_BSKH, ids_BS) if a is not None]
            run = partial(attention_kernels.attention, impl=impl)
            if impl in attention_kernels.KERNELS:
                run = sharding.per_device(run, ("BSNH", "BSKH", "BSKH", "BS")[: len(arrays)], "BSNH")
            return run(*arrays)

        def second_half(gate_BSF: jax.Array, up_BSF: jax.Array) -> jax.Array:
            if self.lora.rank:
                return lora_lib.down(model.reduce_dtype, gate_BSF, up_BSF, self.variables["params"]["down"], self.lora)
            return down(model.reduce_dtype, gate_BSF, up_BSF, weight("down"))

        return layer(x_BSD, table, Parts(weight, project, second_half, attend), model), None


class Llama(nn.Module):
    """Embedding, L blocks under one scan, final norm, head. Under `lora` it reads the parameters of core/lora.py."""

    model: Model
    lora: Lora = NO_LORA

    def setup(self):
        model = self.model
        block = Block
        if model.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[model.remat])
        self.embed = Weight("embed/embedding", model)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=model.n_layers,
        )(model, self.lora)
        self.final_norm = Weight("final_norm/scale", model)
        self.lm_head = Weight("lm_head/kernel", model)

    def hidden(self, tokens_BS: jax.Array, segment_ids_BS: jax.Array | None = None) -> jax.Array:
        """The head's input [B, S, D] in the compute dtype."""
        policy = jmp.get_policy(self.model.precision)
        # in the residual stream's dtype: a table gathered in bf16 would round an fp32 stream by 0.2%
        x_BSD = lookup(self.embed(), tokens_BS, self.model.residual_dtype, self.model.reduce_dtype)
        x_BSD = sharding.constrain(x_BSD, "BSD")
        table = rope_table(jnp.arange(tokens_BS.shape[1]), self.model)
        x_BSD, _ = self.layers(x_BSD, segment_ids_BS, table)
        return policy.cast_to_compute(rms_norm(x_BSD, self.final_norm(), self.model.norm_eps))

    def __call__(self, tokens_BS: jax.Array) -> jax.Array:
        """Logits [B, S, V] in the policy's output dtype."""
        policy = jmp.get_policy(self.model.precision)
        kernel_DV = policy.cast_to_compute(self.lm_head())
        logits_BSV = jnp.einsum("bsd,dv->bsv", self.hidden(tokens_BS), kernel_DV, preferred_element_type=jnp.float32)
        return policy.cast_to_output(logits_BSV)


# -- pure functions over a plain dict of parameters --------------------------------------------------------------------


def init(key: jax.Array, model: Model) -> dict:
    """Returns fresh parameters: a nested dict whose paths are the names in `dims.PARAMETERS`; the same on any mesh."""
    model = dataclasses.replace(model, attention="reference")  # this trace has a single token, which no kernel takes
    return Llama(model).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def hidden(
    params: dict, tokens_BS: jax.Array, model: Model, segment_ids_BS: jax.Array | None = None, lora: Lora = NO_LORA
) -> jax.Array:
    """The head's input [B, S, D] in the compute dtype. With segments, a token sees only its own segment."""
    return Llama(model, lora).apply({"params": params}, tokens_BS, segment_ids_BS, method="hidden")


def logits(params: dict, tokens_BS: jax.Array, model: Model) -> jax.Array:
    """Logits [B, S, V] in fp32."""
    return Llama(model).apply({"params": params}, tokens_BS)


def flatten(params: dict) -> dict[str, jax.Array]:
    """Nested dict -> {"layers/q/kernel": array, ...}."""
    return {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


unflatten = lora_lib.unflatten  # the inverse of `flatten`
