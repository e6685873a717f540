"""Attention against its definition in float64, forward and backward: all that can run here, on one list of shapes."""

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tinyllama_jax.base import config as c
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.kernels.attention import KERNELS, attention, choose, plain, triton

QUERY_BLOCK = 8
CASES = {  # name: (B, S, N, K, H, documents)
    "one block": (2, 8, 4, 4, 6, ""),
    "whole blocks": (2, 24, 6, 2, 4, ""),
    "one query head a key head (K = N)": (2, 16, 3, 3, 4, ""),
    "one key head (K = 1)": (1, 17, 4, 1, 8, ""),
    "a last block of one": (2, 25, 4, 2, 2, ""),
    "a single token": (1, 1, 2, 1, 8, ""),
    "two documents": (2, 24, 4, 2, 4, "two"),
    "documents of one token": (1, 20, 2, 2, 4, "one token"),
    "no whole block for a kernel": (1, 200, 4, 2, 64, "many"),
    "as trained, fewer heads": (2, 256, 8, 4, 64, ""),
    "32 heads on 1": (1, 128, 32, 1, 64, "many"),
    "32 heads on 32": (1, 128, 32, 32, 16, ""),
    "wide heads": (1, 384, 2, 1, 128, "many"),
    "a document begins a block": (1, 384, 2, 1, 64, "blocks"),
    "ids in no order": (2, 256, 2, 1, 64, "shuffled"),
}
DOCUMENTS = {
    "two": lambda B, S: np.arange(S) >= np.arange(5, 5 + 3 * B, 3)[:, None],
    "one token": lambda B, S: np.broadcast_to(np.arange(S), (B, S)),
    "many": lambda B, S: np.cumsum(np.random.default_rng(1).random((B, S)) < 0.03, axis=1),
    "blocks": lambda B, S: np.broadcast_to(np.arange(S) // 128, (B, S)),
    "shuffled": lambda B, S: np.random.default_rng(1).integers(0, 5, (B, S)) * 7,
}


def runs(impl, case):
    """Whether an implementation is for a case, in interpret mode: "cudnn" and "pallas_mosaic_gpu" have none."""
    return impl in ("reference", "xla", "pallas_triton") or CASES[case][1] % 128 == 0


IMPLEMENTATIONS = ("reference", "xla", "pallas_triton", "pallas_tpu")
MATRIX = [(case, impl) for case in CASES for impl in IMPLEMENTATIONS if runs(impl, case)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(plain, "QUERY_BLOCK", QUERY_BLOCK)


def inputs(case, dtype=np.float32, scale=1.0):
    B, S, N, K, H, documents = CASES[case]
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) * scale for shape in ((B, S, N, H), (B, S, K, H), (B, S, K, H), (B, S, N, H))]
    ids = jnp.asarray(DOCUMENTS[documents](B, S), jnp.int32) if documents else None
    return [jnp.asarray(a, dtype) for a in arrays], ids


def float64(q, k, v, cotangent, ids=None):
    """Output and the gradients of q, k, v, from the textbook formulas, one head at a time."""
    q, k, v, cotangent = (np.asarray(a, np.float64) for a in (q, k, v, cotangent))
    B, S, N, H = q.shape
    K = k.shape[2]
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(B):
        hidden = np.arange(S)[None, :] > np.arange(S)[:, None]
        if ids is not None:
            hidden |= np.asarray(ids)[b, :, None] != np.asarray(ids)[b, None, :]
        for n in range(N):
            j = n * K // N  # the first N / K query heads use key head 0, ...
            scores = np.where(hidden, -np.inf, q[b, :, n] @ k[b, :, j].T / np.sqrt(H))
            p = np.exp(scores - scores.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            out[b, :, n] = p @ v[b, :, j]
            dp = cotangent[b, :, n] @ v[b, :, j].T
            dscores = p * (dp - (dp * p).sum(1, keepdims=True)) / np.sqrt(H)
            dq[b, :, n] = dscores @ k[b, :, j]
            dk[b, :, j] += dscores.T @ q[b, :, n]
            dv[b, :, j] += p.T @ cotangent[b, :, n]
    return out, dq, dk, dv


@partial(jax.jit, static_argnames="impl")
def ours(impl, q, k, v, cotangent, ids=None):
    run = lambda q, k, v: attention(q, k, v, ids, impl=impl, interpret=impl in KERNELS)
    with jax.numpy_dtype_promotion("strict"):
        out, vjp = jax.vjp(run, q, k, v)
    return out, *vjp(cotangent)


def agree(got, want, tolerance):
    for name, a, b in zip(("output", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), b, atol=tolerance * max(np.abs(b).max(), 0.1), rtol=0, err_msg=name
        )


@pytest.mark.parametrize(("case", "impl"), MATRIX)
def test_fp32(case, impl):
    arrays, ids = inputs(case)
    agree(ours(impl, *arrays, ids), float64(*arrays, ids), 1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("case", "impl"),
    [m for m in MATRIX if m[0] in ("a last block of one", "no whole block for a kernel", "wide heads")],
)
def test_half_precision(case, impl, dtype):
    """Rounding errors of S terms add up as a random walk: the bound grows with the root of S."""
    arrays, ids = inputs(case, dtype)
    got = ours(impl, *arrays, ids)
    assert {a.dtype for a in got} == {jnp.dtype(dtype)}
    agree(got, float64(*arrays, ids), float(jnp.finfo(dtype).eps) * max(1, CASES[case][1] ** 0.5 / 4))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_documents_in_one_block_do_not_see_each_other(impl):
    """A change in one document changes no bit of another, forward and backward."""
    S, ends = 256, (0, 100, 101, 228, 256)
    ids = jnp.asarray(np.searchsorted(ends, np.arange(S), side="right")[None], jnp.int32)
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(1, S, n, 64)), jnp.float32) for n in (2, 1, 1, 2)]
    before = ours(impl, *arrays, ids)
    for first, end in itertools.pairwise(ends):
        inside = (np.arange(S) >= first) & (np.arange(S) < end)
        after = ours(impl, *(a.at[:, first:end].add(1.5) for a in arrays), ids)
        for name, a, b in zip(("output", "dq", "dk", "dv"), before, after, strict=True):
            np.testing.assert_array_equal(a[:, ~inside], b[:, ~inside], err_msg=name)
            if end - first > 1 or name in ("output", "dv"):  # of a single key the weight is 1, whatever q and k are
                assert np.abs(a - b)[:, inside].max() > 0.1, name


@pytest.mark.parametrize("impl", IMPLEMENTATIONS[:2])
def test_scores_of_bf16_inputs_are_fp32(impl):
    """Products of 400 and 401 (scores 200 and 200.5) differ in fp32; in bf16 both are 400: weights 0.378 and 0.622, or 1/2."""
    q = jnp.full((1, 2, 1, 4), 1.0, jnp.bfloat16)
    k = jnp.asarray([[100.0, 100, 100, 100], [100, 100, 100, 101]], jnp.bfloat16)[None, :, None]
    v = jnp.asarray([[0.0] * 4, [1.0] * 4], jnp.bfloat16)[None, :, None]
    out = attention(q, k, v, impl=impl)[:, 1]
    np.testing.assert_allclose(np.asarray(out, np.float32), 1 / (1 + np.exp(-0.5)), atol=4e-3)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS[2:])
def test_scores_of_bf16_inputs_are_fp32_in_a_kernel(impl):
    q = jnp.full((1, 128, 1, 4), 1.0, jnp.bfloat16)
    k = jnp.full((1, 128, 1, 4), -100.0, jnp.bfloat16).at[:, :2].set(100).at[0, 1, 0, 3].set(101)
    v = jnp.zeros((1, 128, 1, 4), jnp.bfloat16).at[:, 1].set(1)
    out = attention(q, k, v, impl=impl, interpret=True)
    np.testing.assert_allclose(np.asarray(out[:, 1:], np.float32), 1 / (1 + np.exp(-0.5)), atol=4e-3)


def test_the_triton_kernel_visits_no_block_of_another_document():
    """128 documents of 2 tokens: a block of 128 queries meets blocks of 64 keys 2 and 3 after 0 and 1, never all."""
    ids = jnp.arange(256)[None] // 2
    assert triton._end(ids, 128, 64, last=False).tolist() == [[0, 2]]
    assert triton._end(ids, 128, 64, last=True).tolist() == [[2, 4]]
    assert triton._end(jnp.zeros_like(ids), 128, 64, last=False).tolist() == [[0, 0]]


fp32 = np.float32


def assembly(exp2, scale):
    """The text that `exp2` (triton._exp2) is compiled to, as a function of x, minus and the error of ex2.approx, in NumPy.

    By the PTX ISA ex2.approx has a relative error of at most 2**-22; with ftz it takes a denormal for 0 and gives 0 for one.
    """
    x = jnp.zeros(1)
    trace = jax.make_jaxpr(partial(exp2, scale=scale, minus=x, interpret=False))(x)
    (text,) = [e.params["asm"] for e in trace.jaxpr.eqns if "asm" in e.params]
    begin, *lines = text.strip("{ }").rstrip(";").split("; ")
    assert begin == ".reg .f32 t"
    instructions = [re.split("[, ]+", line) for line in lines]

    def ftz(a):
        with np.errstate(over="ignore"):
            return np.where(np.abs(a) < np.finfo(fp32).tiny, fp32(0), fp32(a))

    def ex2(a, error):
        with np.errstate(over="ignore"):
            return ftz(np.exp2(np.float64(ftz(a))) * (1 + error))

    def run(x, minus, error):
        registers = {"$1": fp32(x), "$2": fp32(minus)}
        value = lambda name: np.uint32(int(name[2:], 16)).view(fp32) if name.startswith("0f") else registers[name]
        operations = {
            "neg.f32": np.negative,
            "fma.rn.f32": lambda a, b, c: fp32(np.float64(a) * b + c),  # 24 times 24 bits are exact in fp64
            "ex2.approx.ftz.f32": partial(ex2, error=error),
        }
        for operation, out, *operands in instructions:
            registers[out] = operations[operation](*map(value, operands))
        return registers["$0"]

    return run


HEADS = (1, 2, 3, 16, 64, 80, 128)


@pytest.mark.parametrize("error", [-(2**-22), 2**-22])
@pytest.mark.parametrize("H", HEADS)
def test_the_assembly_against_fp64(H, error):
    """Scores from 0 and denormal ones to 2**30 in powers of two, and a maximum or logsumexp that is as large or larger.

    From 2**31 on, the rounding error of a maximum is 128 or more, and 2**128 is infinite.
    """
    scale = triton.LOG2_E / H**0.5
    scores = [sign * 2.0**e / scale for e in (-149, -130, -1, 0, 3, 7, 13, 20, 24, 30) for sign in (-1, -0.7, 1, 0.7)]
    above = [0, 1e-40, 1e-6, 0.1, 0.7, 1, 3, 20, 87, 100, 125, 126, 127, 140, 149, 160, 1e4, 1e30, 3e38]
    x, above = np.meshgrid(fp32([*scores, 0]), fp32(above))
    minus = x * fp32(scale) + above  # rounded, as the kernels' maximum is
    got, want = assembly(triton._exp2, scale)(x, minus, error), np.exp2(np.float64(x) * fp32(scale) - minus)
    # where a result is normal, the exponent is at most 126 and rounded to 24 bits
    assert (np.abs(got - want) <= want * (2**-22 + 126 * np.log(2) * 2**-24) * 1.01 + np.finfo(fp32).tiny).all()
    assert np.isfinite(got).all() and (got > 0.9).any() and (got == 0).any()


@pytest.mark.parametrize("H", HEADS)
def test_hidden_scores_in_the_assembly(H):
    """Beside a visible one they weigh 0. In a block that hides all of a row they weigh 1, which a visible one shrinks to 0."""
    scale = fp32(triton.LOG2_E / H**0.5)
    weigh, shrink, seen = assembly(triton._exp2, scale), assembly(triton._exp2, 1.0), fp32([-1e6, -10, 0, 10, 1e6])
    hidden = np.full_like(seen, triton.HIDDEN)
    assert (weigh(hidden, seen, 0) == 0).all() and (shrink(hidden * scale, seen, 0) == 0).all()
    assert (weigh(hidden, hidden * scale, 0) == 1).all()


def test_a_hidden_score_that_is_no_power_of_two_leaves_a_rounding_error():
    scales = [fp32(triton.LOG2_E / H**0.5) for H in HEADS]
    assert np.inf in [assembly(triton._exp2, scale)(fp32(-1e30), fp32(-1e30) * scale, 0) for scale in scales]


@pytest.mark.parametrize("case", ["no whole block for a kernel", "a document begins a block", "ids in no order"])
def test_the_triton_kernel_with_its_assembly(case, monkeypatch):
    """In interpret mode with what the assembly computes, its error as large as it may be."""
    real = triton._exp2

    def exp2(x, scale, minus, interpret):
        run = partial(assembly(real, scale), error=2**-22)
        return jax.pure_callback(run, jax.ShapeDtypeStruct(x.shape, x.dtype), x, jnp.broadcast_to(minus, x.shape))

    monkeypatch.setattr(triton, "_exp2", exp2)
    arrays, ids = inputs(case)
    agree(ours.__wrapped__("pallas_triton", *arrays, ids), float64(*arrays, ids), 1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
def test_the_triton_kernel_accumulates_in_fp32(dtype):
    """Every matmul, forward and backward, by its dtype: a CPU keeps more bits than it is told to, so values do not show it."""
    arrays, ids = inputs("no whole block for a kernel", dtype)
    f = partial(ours, "pallas_triton")
    products = [e for e in equations(jax.make_jaxpr(lambda *a: f(*a, ids))(*arrays).jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) == 2 * 2 + 2 * 3 + 2 * 4 + 1  # on the diagonal and off it, and the rows' sums of out dout
    assert {e.outvars[0].aval.dtype for e in products} == {jnp.dtype(jnp.float32)}


def products(f, *arrays):
    """(dtypes of operands and result, multiplications) of every matmul in `f`, those of a loop as often as it runs."""

    def within(jaxpr, times):
        for e in jaxpr.eqns:
            if e.primitive.name == "dot_general":
                contracted = np.prod([e.invars[0].aval.shape[i] for i in e.params["dimension_numbers"][0][0]])
                dtypes = tuple(v.aval.dtype.name for v in (*e.invars, *e.outvars))
                yield dtypes, times * e.outvars[0].aval.size * int(contracted)
            for inner in jaxprs_in_params(e.params):
                yield from within(inner, times * e.params.get("length", 1))

    return list(within(jax.make_jaxpr(f)(*arrays).jaxpr, 1))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", ["a last block of one", "two documents", "a single token"])
def test_xla_multiplies_in_half_precision_and_accumulates_in_fp32_also_backward(case, dtype):
    """fp32 operands, as autodiff would have them, are off a GPU's half-precision units."""
    arrays, ids = inputs(case, dtype)
    found = products(lambda *a: ours("xla", *a, ids), *arrays)
    pieces = -(-CASES[case][1] // QUERY_BLOCK)
    assert len(found) == 7 * pieces  # scores and output; scores, dv, the weights' gradient, dq, dk
    name = jnp.dtype(dtype).name
    assert {dtypes for dtypes, _ in found} == {(name, name, "float32")}


@pytest.mark.parametrize(("blocks", "share"), [(1, 1), (2, 3 / 4), (8, 9 / 16), (16, 9 / 16)])
def test_xla_skips_keys_that_no_query_of_a_piece_sees(blocks, share):
    """8 pieces at most: of 16 blocks two share the keys that the second sees."""
    S = blocks * QUERY_BLOCK
    arrays = [jnp.ones((2, S, n, 4), jnp.bfloat16) for n in (4, 2, 2, 4)]
    count = lambda impl: sum(n for _, n in products(lambda *a: ours(impl, *a), *arrays))
    every_pair = 2 * 4 * S * S * 4  # B N S T H
    assert count("xla") == 7 * every_pair * share


@pytest.mark.parametrize("impl", ["reference", "xla", *KERNELS])
def test_more_keys_than_queries_are_refused(impl):
    q, k = jnp.ones((1, 4, 2, 8)), jnp.ones((1, 8, 1, 8))
    with pytest.raises(ValueError, match="4 queries and 8 keys"):
        attention(q, k, k, impl=impl)


def equations(jaxpr):
    """All equations of a jaxpr and of those within it."""
    for e in jaxpr.eqns:
        yield e
        for inner in jaxprs_in_params(e.params):
            yield from equations(inner)


def kernels(jaxpr):
    """How many kernels a jaxpr runs whose output it reads: JAX keeps kernels that need not run, and XLA removes them."""
    read = {id(v) for v in (*jaxpr.outvars, *(v for e in jaxpr.eqns for v in e.invars))}
    inner = (kernels(j) for e in jaxpr.eqns for j in jaxprs_in_params(e.params))
    return sum(e.primitive.name == "pallas_call" and not read.isdisjoint(map(id, e.outvars)) for e in jaxpr.eqns) + sum(inner)


@pytest.mark.parametrize("impl", ["pallas_triton", "pallas_tpu"])
def test_backward_does_not_rerun_forward_if_attention_is_saved(impl):
    arrays, _ = inputs("as trained, fewer heads", jnp.bfloat16)
    for policy, runs in (
        (jax.checkpoint_policies.save_only_these_names("attention"), 3),  # forward, dq, dk and dv
        (jax.checkpoint_policies.nothing_saveable, 4),
    ):
        f = jax.checkpoint(lambda *qkv: attention(*qkv, impl=impl).astype(jnp.float32).sum(), policy=policy)
        assert kernels(jax.make_jaxpr(jax.grad(f, (0, 1, 2)))(*arrays[:3]).jaxpr) == runs


def sizes(jaxpr):
    """Number of elements of every array that a jaxpr or one within it computes."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from sizes(inner)


def test_xla_never_holds_all_scores():
    (q, *_), _ = arrays, _ = inputs("whole blocks")
    B, S, N, _ = q.shape
    largest = {impl: max(sizes(jax.make_jaxpr(partial(ours, impl))(*arrays).jaxpr)) for impl in ("reference", "xla")}
    # `reference` holds all scores, so the check can see them
    assert largest == {"reference": B * N * S * S, "xla": B * N * QUERY_BLOCK * S}


class Device:
    """What `choose` asks of a device."""

    def __init__(self, platform, capability=None):
        self.platform = platform
        if capability:
            self.compute_capability = capability


A100, H100, TPU, V100 = Device("gpu", "8.0"), Device("gpu", "9.0"), Device("tpu"), Device("gpu", "7.0")


@pytest.mark.parametrize(
    ("device", "dtype", "shape", "want"),
    [
        (A100, "bfloat16", {}, "pallas_triton"),
        (A100, "float16", {"segments": True}, "pallas_triton"),
        (A100, "bfloat16", {"head_dim": 160}, "xla"),
        (A100, "float32", {}, "xla"),
        (V100, "float16", {}, "xla"),
        (H100, "bfloat16", {}, "cudnn"),
        (H100, "bfloat16", {"segments": True}, "pallas_triton"),
        (H100, "bfloat16", {"head_dim": 36}, "pallas_triton"),
        (TPU, "bfloat16", {"seq_len": 2048}, "pallas_tpu"),
        (TPU, "float32", {"seq_len": 2048}, "pallas_tpu"),
        (TPU, "bfloat16", {"seq_len": 2000}, "xla"),
        (Device("cpu"), "bfloat16", {}, "xla"),
    ],
)
def test_auto_chooses_by_device_dtype_and_shape(device, dtype, shape, want):
    impl, reason = choose("auto", dtype, device, **shape)
    assert impl == want and reason
    assert choose(impl, dtype, device, **shape) == (impl, "asked for")


@pytest.mark.parametrize(
    ("impl", "device", "dtype", "shape", "message"),
    [
        ("cudnn", Device("cpu"), "bfloat16", {}, "needs bf16 or fp16 .* this is bfloat16 on the backend cpu"),
        ("pallas_triton", V100, "float16", {}, "this is float16 on compute capability 7.0"),
        ("pallas_triton", A100, "float32", {}, "this is float32 on compute capability 8.0"),
        ("pallas_triton", A100, "bfloat16", {"head_dim": 256}, "needs heads of at most 128; these are 256 wide"),
        ("cudnn", H100, "bfloat16", {"head_dim": 36}, "a multiple of 8; these are 36 wide"),
        ("pallas_mosaic_gpu", A100, "bfloat16", {}, "of compute capability 9.0 or more"),
        ("pallas_tpu", A100, "bfloat16", {}, "needs a TPU; this is the backend gpu"),
        ("pallas_tpu", TPU, "bfloat16", {"seq_len": 2000}, "a multiple of 128; this is 2000"),
    ],
)  # fmt: skip
def test_an_implementation_that_cannot_run_is_an_error_that_says_why(impl, device, dtype, shape, message):
    with pytest.raises(UserError, match=f"--model.attention={impl}: .*{message}"):
        choose(impl, dtype, device, **shape)


def test_without_tokamax_or_a_jax_that_has_triton(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs tokamax: pip install tokamax"):
        choose("pallas_mosaic_gpu", "bfloat16", H100)
    with pytest.raises(UserError, match="needs a JAX that still has Pallas' Triton language; cudnn is its successor"):
        choose("pallas_triton", "bfloat16", A100)
    assert choose("auto", "bfloat16", A100)[0] == "cudnn"


def test_every_implementation_has_a_name_in_the_config():
    assert set(c.ATTENTION) == {"auto", "reference", "xla", *KERNELS}
