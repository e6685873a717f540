"""The model: its size, its first weights, its mathematics against independent formulas, what is kept, and in which dtype."""

import dataclasses
import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tinyllama_jax.base import config as c
from tinyllama_jax.base import dims, sharding
from tinyllama_jax.core import model
from tinyllama_jax.core.program import build
from tinyllama_jax.kernels import cross_entropy
from tinyllama_jax.kernels.attention import plain

FP32 = "params=float32,compute=float32,output=float32"
LLAMA_1B = c.Model(22, 2048, 32, 4, 5632, 32_000, 2048)
LLAMA_120M = c.Model(12, 768, 12, 1, 2048, 32_000, 2048)
TINY = c.Model(3, 24, 6, 2, 40, 53, 20, precision=FP32, residual="float32")  # H = 4; every letter another size
SHAPES = {
    "GQA": TINY,
    "GQA, reference": dataclasses.replace(TINY, attention="reference"),
    "MHA, wide heads": dataclasses.replace(TINY, n_kv_heads=6, head_dim=10),
    "MQA, longer RoPE": dataclasses.replace(TINY, n_kv_heads=1, rope_scaling=4.0),
}


@functools.cache
def first(cfg):
    """Parameters as at the start, by name."""
    return model.flatten(jax.jit(partial(model.init, model=cfg))(jax.random.key(0)))


def some_params(cfg, scale=0.3):
    """Random parameters, larger than at the start, so that every part of the model matters to the result."""
    rng = np.random.default_rng(1)
    arrays = {p.name: rng.normal(p.kind == "norm", scale, dims.shape(p, cfg)) for p in dims.PARAMETERS}
    return model.unflatten({name: jnp.asarray(a, jnp.float32) for name, a in arrays.items()})


def some_tokens(cfg, batch=2):
    return jnp.asarray(np.random.default_rng(2).integers(0, cfg.vocab_size, (batch, cfg.seq_len)))


def equations(jaxpr):
    """All equations of a jaxpr and of those within it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


# -- size and names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cfg", "parameters"), [(LLAMA_1B, 1_100_048_384), (LLAMA_120M, 121_129_728)], ids=["1.1B", "120M"])
def test_number_of_parameters(cfg, parameters):
    shapes = jax.eval_shape(partial(model.init, model=cfg), jax.random.key(0))
    assert sum(a.size for a in jax.tree.leaves(shapes)) == parameters
    assert dims.n_parameters(cfg) == parameters


@pytest.mark.parametrize("cfg", [LLAMA_1B, LLAMA_120M, *SHAPES.values()], ids=["1.1B", "120M", *SHAPES])
def test_names_and_shapes_are_the_table(cfg):
    shapes = jax.eval_shape(partial(model.init, model=cfg), jax.random.key(0))
    assert {name: a.shape for name, a in model.flatten(shapes).items()} == {p.name: dims.shape(p, cfg) for p in dims.PARAMETERS}


def test_flatten_and_unflatten_are_inverse():
    params = some_params(TINY)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, model.unflatten(model.flatten(params)), params))


# -- first weights -----------------------------------------------------------------------------------------------------


def test_standard_deviations_of_the_original():
    """lit_gpt/model.py:40-54 at D = 2048, L = 22."""
    stds = {p.name: dims.init_std(p, LLAMA_1B) for p in dims.PARAMETERS if p.kind != "norm"}
    residual = {"layers/o/kernel", "layers/down/kernel"}
    assert {f"{stds[name]:.7f}" for name in residual} == {"0.0010044"}
    assert {f"{stds[name]:.6f}" for name in stds if name not in residual} == {"0.013975"}


def test_standard_deviations_of_tensors_of_the_real_model():
    names = ("layers/k/kernel", "layers/o/kernel")  # not all: 3 s for 10^8 values
    # jitted and asked for two tensors, XLA computes no other
    k, o = jax.jit(lambda key: [model.flatten(model.init(key, LLAMA_1B))[name] for name in names])(jax.random.key(0))
    np.testing.assert_allclose([jnp.std(k), jnp.std(o)], [0.013975, 0.0010044], rtol=0.01)
    np.testing.assert_allclose([jnp.mean(k), jnp.mean(o)], 0, atol=2e-5)


SAMPLED = c.Model(5, 96, 6, 3, 208, 1_100, 8)  # at least 23,040 values a tensor: their std is within 1% (2 sigma)


@pytest.mark.parametrize("init", ["tinyllama", "torch_default"])
def test_standard_deviation_of_every_tensor(init):
    for name, a in first(dataclasses.replace(SAMPLED, init=init)).items():
        if name.endswith("scale"):
            assert (a == 1).all()
            continue
        a = np.asarray(a, np.float64)
        if init == "tinyllama":
            want = 1 / (np.sqrt(96) * 5) if name in ("layers/o/kernel", "layers/down/kernel") else np.sqrt(2 / 5 / 96)
            np.testing.assert_allclose((a**4).mean() / want**4, 3, rtol=0.05, err_msg=name)  # normal
        elif name == "embed/embedding":
            want = 1.0
        else:  # uniform
            fan_in = 208 if name == "layers/down/kernel" else 96
            want = 1 / np.sqrt(3 * fan_in)
            assert 0.999 < np.abs(a).max() * np.sqrt(fan_in) <= 1.0001, name
        np.testing.assert_allclose(a.std(), want, rtol=0.01, err_msg=name)
        assert abs(a.mean()) < 5 * want / np.sqrt(a.size), name


def test_no_tensor_and_no_layer_is_another_again():
    matrices = {name: np.asarray(a) for name, a in first(SAMPLED).items() if not name.endswith("scale")}
    n = 96 * 48  # the first values of each: jax's random bits depend on the key and the place, not on the shape
    rows = [a.ravel()[:n] for name, a in matrices.items() if not name.startswith("layers")]
    rows += [layer.ravel()[:n] for name, a in matrices.items() if name.startswith("layers") for layer in a]
    assert len(rows) == 2 + 7 * 5
    assert np.abs(np.corrcoef(rows) - np.eye(len(rows))).max() < 6 / np.sqrt(n)


def test_a_tensor_depends_on_its_name_and_not_on_the_others():
    a, b = first(SAMPLED), first(dataclasses.replace(SAMPLED, vocab_size=1_110, d_ff=210))
    moved = {name for name in a if a[name].shape != b[name].shape or (a[name] != b[name]).any()}
    assert moved == {"embed/embedding", "lm_head/kernel", "layers/gate/kernel", "layers/up/kernel", "layers/down/kernel"}


def test_first_weights_are_the_same_on_one_device_and_on_eight():
    cfg = dataclasses.replace(TINY, d_model=32, n_heads=4, d_ff=48, vocab_size=56)
    config = c.Config("none", cfg, c.Data({"none": 1}), c.Optim(1e-3, 0, 0, 0, 1), c.Train(1, 160, 1, seed=7), c.Checkpoint(1))

    def on(n_devices, **axes):
        mesh = sharding.make_mesh(c.Mesh(**axes), jax.devices()[:n_devices])
        with jax.set_mesh(mesh):
            return build(config, mesh).init().params

    split = on(8, data=2, fsdp=2, tensor=2)
    assert not any(a.is_fully_replicated for a in jax.tree.leaves(split))
    jax.tree.map(np.testing.assert_array_equal, on(1), split)


# -- mathematics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_rms_norm_is_its_formula(dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 64)) * np.asarray([1e-3, 1e-2, 1, 1e3, 1e4])[:, None]  # at 1e-3, eps = 1e-5 outweighs x^2
    x, scale = jnp.asarray(x, dtype), jnp.asarray(rng.normal(size=64), jnp.float32)
    wide = np.asarray(x, np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(scale, np.float64)
    got = model.rms_norm(x, scale, 1e-5)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=2e-6)


@pytest.mark.parametrize("scaling", [1.0, 4.0])
def test_rope_turns_complex_numbers(scaling):
    """The pair (i, i + H/2) is the number x_i + j x_(i+H/2), turned by position / scaling x 10000^(-2i/H) radians."""
    cfg = dataclasses.replace(LLAMA_1B, rope_scaling=scaling)
    positions = np.asarray([0, 1, 2, 17, 500, 2047])
    x = np.random.default_rng(0).normal(size=(2, len(positions), 3, cfg.d_head))
    z = x[..., :32] + 1j * x[..., 32:]
    turn = np.exp(1j * positions[:, None] / scaling * 10_000.0 ** (-np.arange(32) / 32))
    want = z * turn[None, :, None, :]
    got = model.rope(jnp.asarray(x, jnp.float32), model.rope_table(jnp.asarray(positions), cfg))
    error = np.abs(np.asarray(got) - np.concatenate([want.real, want.imag], -1)).max((0, 2, 3))
    assert (error < 1e-6 + 4e-7 * positions).all()  # fp32 knows an angle of p radians to p x 2^-23
    assert error.max() > 0


@pytest.mark.parametrize("cfg", SHAPES.values(), ids=SHAPES)
def test_no_logit_sees_a_later_token(cfg, monkeypatch):
    monkeypatch.setattr(plain, "QUERY_BLOCK", 6)
    params, tokens = some_params(cfg), some_tokens(cfg)
    run = jax.jit(lambda tokens: model.logits(params, tokens, cfg))
    before = run(tokens)
    for t in (0, 1, 7, 19):
        after = run(tokens.at[:, t].set((tokens[:, t] + 1) % cfg.vocab_size))
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert (np.abs(before - after).max(-1)[:, t:] > 1e-4).all()  # and every later one sees it


# -- what backward keeps -----------------------------------------------------------------------------------------------

# Matrix products of a gradient: 9 a layer forward (q k v o gate up down, and 2 in attention), two more for each of them
# backward, and what is done again. "xla" keeps no scores, whatever remat says.
AGAIN = {"none": 1, "save_matmuls_and_attention": 1, "save_matmuls": 3, "full": 9}  # scores; + attention; + q k v o gate up


def gradient(cfg, tokens):
    def loss(params):
        x = model.hidden(params, tokens, cfg)
        weights = jnp.ones(tokens.shape, jnp.float32)
        return cross_entropy.reference(x, params["lm_head"]["kernel"], tokens, weights).loss

    return jax.value_and_grad(loss)


@functools.cache
def without_remat():
    return jax.jit(gradient(TINY, some_tokens(TINY)))(some_params(TINY))


@pytest.mark.parametrize("remat", c.REMAT)
def test_remat_does_again_what_it_says_and_changes_nothing(remat):
    cfg = dataclasses.replace(TINY, remat=remat)
    params, tokens = some_params(cfg), some_tokens(cfg)
    got = gradient(cfg, tokens)
    products = [e for e in equations(jax.make_jaxpr(got)(params).jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) == 3 * 9 + AGAIN[remat] + 3  # 3: the head
    if remat != "none":
        for a, b in zip(jax.tree.leaves(jax.jit(got)(params)), jax.tree.leaves(without_remat()), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.abs(b).max()), rtol=0)


KEPT = {  # a layer's: letters of each array that it keeps
    "full": ["BSD"],
    "save_matmuls": ["BSD", "BSq", "BSk", "BSk", "BSD", "BSF", "BSF"],
    "save_matmuls_and_attention": ["BSD", "BSq", "BSk", "BSk", "BSNH", "BSD", "BSF", "BSF"],
}


@pytest.mark.parametrize("remat", KEPT)
def test_remat_keeps_what_it_says(remat, capsys):
    cfg = dataclasses.replace(TINY, remat=remat)
    params, tokens = some_params(cfg), some_tokens(cfg)
    jax.ad_checkpoint.print_saved_residuals(lambda params: model.hidden(params, tokens, cfg).sum(), params)
    kept = re.findall(r"^float32\[(3,2,[\d,]+)\] output of scan", capsys.readouterr().out.replace("f32", "float32"), re.M)
    size = dims.sizes(cfg) | {"B": 2, "q": cfg.n_heads * cfg.d_head, "k": cfg.n_kv_heads * cfg.d_head}
    assert sorted(kept) == sorted(",".join(str(size[letter]) for letter in "L" + letters) for letters in KEPT[remat])


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("impl", ["reference", "xla"])
def test_dtypes(impl, compute, residual):
    precision = f"params=float32,compute={compute},output=float32"
    cfg = dataclasses.replace(TINY, precision=precision, residual=residual, attention=impl)
    params, tokens = jax.eval_shape(partial(model.init, model=cfg), jax.random.key(0)), some_tokens(cfg)
    with jax.numpy_dtype_promotion("strict"):
        assert jax.eval_shape(lambda p: model.hidden(p, tokens, cfg), params).dtype == compute
        assert jax.eval_shape(lambda p: model.logits(p, tokens, cfg), params).dtype == jnp.float32
        jaxpr = jax.make_jaxpr(lambda p: model.logits(p, tokens, cfg))(params).jaxpr
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}

    (scan,) = (e for e in equations(jaxpr) if e.primitive.name == "scan" and e.params["length"] == cfg.n_layers)
    assert [v.aval.dtype for v in scan.outvars if v.aval.shape == (2, 20, 24)] == [jnp.dtype(residual)]  # what it carries
    # every matrix product is of the compute dtype, but for the reference's own, which are fp32 by definition
    products = [e.invars[0].aval.dtype for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    allowed = {jnp.dtype(compute)} | ({jnp.dtype(jnp.float32)} if impl == "reference" else set())
    assert set(products) <= allowed and jnp.dtype(compute) in products


def test_an_fp32_residual_stream_begins_with_the_embedding_as_it_is():
    """1 + 2^-12 is not 1, which it is in bf16."""
    table, tokens = jnp.full((5, 4), 1 + 2.0**-12), jnp.array([[1, 4]])
    assert (model.lookup(table, tokens, "float32", "float32") == 1 + 2.0**-12).all()
    cfg = dataclasses.replace(TINY, precision=FP32.replace("compute=float32", "compute=bfloat16"))
    params = jax.eval_shape(partial(model.init, model=cfg), jax.random.key(0))
    jaxpr = jax.make_jaxpr(lambda p: model.hidden(p, some_tokens(cfg), cfg))(params).jaxpr
    shape = (cfg.vocab_size, cfg.d_model)
    assert not [
        e
        for e in equations(jaxpr)
        if e.outvars and e.outvars[0].aval.shape == shape and e.outvars[0].aval.dtype == jnp.bfloat16
    ]


@pytest.mark.parametrize(("compute", "stream"), [("bfloat16", "bfloat16"), ("float16", "float32"), ("float32", "float32")])
def test_the_residual_stream_unless_it_is_said(compute, stream):
    cfg = dataclasses.replace(TINY, precision=f"params=float32,compute={compute},output=float32", residual="auto")
    assert cfg.residual_dtype == stream
    params = jax.eval_shape(partial(model.init, model=cfg), jax.random.key(0))
    jaxpr = jax.make_jaxpr(lambda p: model.hidden(p, some_tokens(cfg), cfg))(params).jaxpr
    (scan,) = (e for e in equations(jaxpr) if e.primitive.name == "scan" and e.params["length"] == cfg.n_layers)
    assert [v.aval.dtype for v in scan.outvars if v.aval.shape == (2, 20, 24)] == [jnp.dtype(stream)]


@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
def test_bf16_is_close_to_fp32(residual):
    half = dataclasses.replace(TINY, precision=FP32.replace("compute=float32", "compute=bfloat16"), residual=residual)
    params, tokens = some_params(TINY, 0.13), some_tokens(TINY)
    exact, rounded = (jax.nn.log_softmax(jax.jit(partial(model.logits, model=m))(params, tokens)) for m in (TINY, half))
    error = np.abs(exact - rounded).max()
    assert 0 < error < 0.02 * np.abs(exact - exact.mean(-1, keepdims=True)).max()
