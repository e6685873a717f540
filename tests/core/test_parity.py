"""The train step against independent references: Transformers and torch, itself in other layouts, and non-finite numbers."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from tinyllama_jax.base import config as c
from tinyllama_jax.base import dims, sharding
from tinyllama_jax.core import model, optim, step
from tinyllama_jax.core import program as program_lib
from tinyllama_jax.core.losses import Batch
from tinyllama_jax.hub import llama as hf

FP32 = "params=float32,compute=float32,output=float32"
TINY = c.Model(2, 24, 6, 2, 40, 53, 20, precision=FP32, residual="float32", loss_chunk=50)
CASES = {
    "GQA": TINY,
    "MHA, RoPE stretched by 4": dataclasses.replace(TINY, n_kv_heads=6, rope_scaling=4.0, rope_theta=500.0),
    "MQA, one layer, odd sizes, yarn": c.Model(
        1,
        30,
        3,
        1,
        37,
        101,
        17,
        head_dim=14,
        rope_scaling=4.0,
        rope_type="yarn,original_max_position_embeddings=5",
        precision=FP32,
        residual="float32",
        norm_eps=1e-3,
    ),
}


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="the reference is PyTorch, which has no wheel here")


@pytest.fixture
def transformers(torch):
    return pytest.importorskip("transformers", reason="the reference is Transformers' LlamaForCausalLM")


def configure(cfg, **changes):
    """A config of `cfg` whose sections' fields are `changes`."""
    config = c.Config(
        workdir="none",
        model=cfg,
        data=c.Data({"none": 1}),
        optim=c.Optim(4e-4, 4e-4, 0, 0.1, 1.0),
        train=c.Train(50, 8 * cfg.seq_len, 8),
        checkpoint=c.Checkpoint(1),
    )
    for section in ("optim", "train"):
        mine = {k: v for k, v in changes.items() if hasattr(getattr(config, section), k)}
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **mine)})
    return config


def some_params(cfg, scale=0.3):
    """Random parameters, norms too, of one size, larger than at the start: everything matters to the result."""
    rng = np.random.default_rng(1)
    arrays = {p.name: rng.normal(p.kind == "norm", scale, dims.shape(p, cfg)) for p in dims.PARAMETERS}
    return model.unflatten({name: jnp.asarray(a, jnp.float32) for name, a in arrays.items()})


def some_blocks(cfg, n, seed=0, padded=True):
    """`n` blocks and the number of real tokens in each: from 2, the fewest with something to predict, to all."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, cfg.vocab_size, (n, cfg.seq_len + 1)).astype(np.uint16)
    length = np.linspace(2, cfg.seq_len + 1, n).astype(np.int32) if padded else np.full(n, cfg.seq_len + 1, np.int32)
    return tokens, length


class Run:
    """A program on the mesh of its shardings, its state, and a step on blocks given as [sequences, S + 1]."""

    def __init__(self, program, params):
        self.program, self.mesh = program, program.batch.tokens.mesh
        places = jax.tree.map(lambda a: a.sharding, program.state.params)
        with jax.set_mesh(self.mesh):
            self.state = program.start(jax.device_put(params, places, may_alias=False))  # a step consumes its state

    def __call__(self, tokens, length):
        shape = self.program.shape
        with jax.set_mesh(self.mesh):
            batch = jax.device_put(Batch(tokens.reshape(*shape, -1), length.reshape(shape)), self.program.batch)
            self.state, metrics = self.program.train(self.state, batch)
        return jax.device_get(metrics)


def build(config, n_devices=1, **axes):
    """The program of `config` on a mesh of the first `n_devices`."""
    mesh = sharding.make_mesh(c.Mesh(**axes), jax.devices()[:n_devices])
    with jax.set_mesh(mesh):
        return program_lib.build(config, mesh)


def alike(got, want, tolerance):
    """Every array within `tolerance` of the largest number in its counterpart."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0, err_msg=jax.tree_util.keystr(path))


# -- Transformers ------------------------------------------------------------------------------------------------------


def reference(cfg, params):
    """`LlamaForCausalLM` with our weights."""
    return models.transformers_model(cfg, params, attn_implementation="eager")


def loss_of(torch, llama, tokens, length):
    """Mean loss over the real tokens."""
    ids = torch.tensor(tokens.astype(np.int64))
    real = torch.arange(ids.shape[1])[None] < torch.tensor(length)[:, None]
    logits = llama(input_ids=ids[:, :-1]).logits
    labels = torch.where(real, ids, -100)[:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


@pytest.mark.parametrize("cfg", CASES.values(), ids=CASES)
def test_logits_and_gradients_are_those_of_transformers(cfg, torch, transformers):
    params, (tokens, length) = some_params(cfg), some_blocks(cfg, 4)
    llama = reference(cfg, params)
    with torch.no_grad():
        want = llama(input_ids=torch.tensor(tokens[:, :-1].astype(np.int64))).logits.numpy()
    got = jax.jit(functools.partial(model.logits, model=cfg))(params, tokens[:, :-1].astype(np.int32))
    assert np.abs(want).max() > 3
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)

    loss = loss_of(torch, llama, tokens, length)
    loss.backward()
    wanted = {name: p.grad.numpy() for name, p in llama.named_parameters()}
    config = configure(cfg, tokens_per_step=4 * cfg.seq_len, seqs_per_device=4)
    state = step.new_state(params, config)
    sums, grads = jax.jit(lambda s, b: step.gradients(s, b, config))(state, Batch(tokens[None], length[None]))
    np.testing.assert_allclose(sums.loss / (length - 1).sum(), loss.item(), rtol=1e-5)
    for name, ours in hf.to_hf(grads, cfg):
        theirs = wanted.pop(name)
        assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs), name
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max(), name
    assert not wanted


def test_fifty_steps_are_those_of_transformers_with_torch_adamw(torch, transformers):
    """GQA, two micro-batches with padding, lr 4e-4 from the first step, decay on everything, clipping at work."""
    cfg = c.Model(2, 128, 4, 2, 192, 97, 32, precision=FP32, residual="float32", loss_chunk=64)
    config = configure(cfg, seqs_per_device=4)
    rng = np.random.default_rng(0)
    # text to learn: of 97 tokens few are common (Zipf), and after an even one its successor follows
    blocks = (rng.zipf(1.5, (50, 8, 33)) % 97).astype(np.uint16)
    blocks[..., 1::2] = np.where(blocks[..., :-1:2] % 2 == 0, blocks[..., :-1:2] + 1, blocks[..., 1::2]) % 97
    lengths = rng.integers(20, 34, (50, 8)).astype(np.int32)

    params = some_params(cfg, 0.05)
    llama = reference(cfg, params)
    adamw = torch.optim.AdamW(llama.parameters(), lr=4e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    theirs, their_norms = [], []
    for tokens, length in zip(blocks, lengths, strict=True):
        adamw.zero_grad()
        loss = loss_of(torch, llama, tokens, length)
        loss.backward()
        their_norms.append(torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0).item())
        adamw.step()
        theirs.append(loss.item())

    run = Run(build(config), params)
    ours = [run(*block) for block in zip(blocks, lengths, strict=True)]
    assert theirs[0] - min(theirs[-3:]) > 1
    assert sum(norm > 1 for norm in their_norms) >= 10
    np.testing.assert_allclose([m["loss"] for m in ours], theirs, rtol=1e-3)
    np.testing.assert_allclose([m["grad_norm"] for m in ours], their_norms, rtol=1e-2)
    assert {float(m["lr"]) for m in ours} == {np.float32(4e-4)}


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_a_hundred_updates_are_those_of_torch_adamw(decay, torch):
    """Clip, both moments, decay of what decays, warm-up and cosine, on gradients that are given."""
    config = configure(TINY, steps=100, peak_lr=1e-2, min_lr=1e-3, warmup_steps=10, weight_decay=0.3, decay=decay)
    names = ("embed/embedding", "layers/q/kernel", "layers/mlp_norm/scale", "lm_head/kernel")
    rng = np.random.default_rng(0)
    flat = {name: rng.normal(size=dims.shape(dims.BY_NAME[name], TINY)).astype(np.float32) for name in names}
    theirs = {name: torch.nn.Parameter(torch.tensor(a)) for name, a in flat.items()}
    kept = {"embed/embedding", "layers/mlp_norm/scale"} if decay == "matrices" else set()
    groups = [{"params": [p], "weight_decay": 0.0 if name in kept else 0.3} for name, p in theirs.items()]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)

    params = model.unflatten({name: jnp.asarray(a) for name, a in flat.items()})
    opt_state = optim.adamw(config).init(params)
    update = jax.jit(lambda g, o, p, s: optim.update(g, o, p, s, config))
    clipped = 0
    for s in range(1, 101):
        grads = {name: rng.normal(size=a.shape, scale=rng.uniform(0, 0.04)).astype(np.float32) for name, a in flat.items()}
        for name, p in theirs.items():
            p.grad = torch.tensor(grads[name])
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0).item()
        lr = 1e-2 * s / 10 if s <= 10 else 1e-3 + 0.5 * (1 + math.cos(math.pi * (s - 10) / 90)) * 9e-3
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        clipped += norm > 1
        gradient = model.unflatten({name: jnp.asarray(a) for name, a in grads.items()})
        params, opt_state, metrics = update(gradient, opt_state, params, jnp.int32(s))
        np.testing.assert_allclose([metrics["grad_norm"], metrics["lr"]], [norm, lr], rtol=1e-5)
    assert 20 < clipped < 80
    for name in names:
        of_ours = [model.flatten(tree)[name] for tree in (params, opt_state[0].mu, opt_state[0].nu)]
        state = adamw.state[theirs[name]]
        of_theirs = [a.detach().numpy() for a in (theirs[name], state["exp_avg"], state["exp_avg_sq"])]
        alike(of_ours, of_theirs, 1e-5)


# -- itself in other layouts -------------------------------------------------------------------------------------------

# divides among 8 devices; heads of another width than D / N
EVEN = dataclasses.replace(TINY, d_model=32, n_heads=4, head_dim=12, d_ff=48, vocab_size=56, seq_len=16)
LAYOUTS = {  # name: (devices, data, fsdp, tensor, sequences a device), and the (A, B) that come of it
    "1 x 8": ((1, 1, 1, 1, 8), (1, 8)),
    "8 x 1": ((1, 1, 1, 1, 1), (8, 1)),
    "fsdp": ((8, 1, 8, 1, 1), (1, 8)),
    "data and fsdp": ((8, 2, 4, 1, 1), (1, 8)),
    "data, fsdp and tensor": ((8, 2, 2, 2, 1), (2, 4)),
}


@functools.cache
def laid_out(name):
    n_devices, data, fsdp, tensor, sequences = LAYOUTS[name][0]
    # eps: at the usual 1e-8, Adam makes a whole step of a gradient's rounding error
    config = configure(EVEN, seqs_per_device=sequences, eps=1e-3, peak_lr=1e-2, min_lr=1e-3)
    return build(config, n_devices, data=data, fsdp=fsdp, tensor=tensor)


@functools.cache
def three_steps(name):
    """(metrics, state) of three steps with 1 to 16 tokens to predict in each sequence."""
    run = Run(laid_out(name), some_params(EVEN))
    return [run(*some_blocks(EVEN, 8, seed)) for seed in range(3)], jax.device_get(run.state)


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_accumulation_and_devices_change_nothing(name):
    """A mean of the micro-batches' means would be another number: their real tokens are unequal."""
    assert laid_out(name).shape == LAYOUTS[name][1]
    (metrics, state), (whole_metrics, whole_state) = three_steps(name), three_steps("1 x 8")
    for got, want in zip(metrics, whole_metrics, strict=True):
        assert want["real_tokens"] == (some_blocks(EVEN, 8)[1] - 1).sum()
        for exact in ("checksum", "real_tokens", "finite", "skipped", "lr"):
            assert got[exact] == want[exact], exact
        for rounded in ("loss", "grad_norm", "accuracy"):
            np.testing.assert_allclose(got[rounded], want[rounded], rtol=1e-5, err_msg=rounded)
    alike(state, whole_state, 1e-5)


def test_the_checksum_is_of_the_tokens_and_their_places():
    tokens, length = some_blocks(TINY, 8)
    here = lambda tokens, length: int(step.checksum(Batch(tokens, length)))
    first = here(tokens, length)
    assert first == here(tokens.reshape(4, 2, -1), length.reshape(4, 2))
    padding = tokens.copy()
    padding[0, length[0]] += 1
    assert first == here(padding, length)
    swapped, changed = tokens[[1, 0, *range(2, 8)]], tokens.copy()
    changed[7, 3] += 1
    full = np.full_like(length, tokens.shape[1])
    assert len({first, here(swapped, length), here(changed, length), here(tokens, full), here(swapped, full)}) == 5


# -- what is not finite ------------------------------------------------------------------------------------------------


def bits(tree):
    return [np.asarray(a).tobytes() for a in jax.tree.leaves(tree)]


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters():
    run, blocks = Run(laid_out("1 x 8"), some_params(EVEN)), some_blocks(EVEN, 8)
    assert run(*blocks)["finite"]
    before = jax.device_get(run.state)
    broken = before.params["layers"]["up"]["kernel"].copy()
    broken[1, 3, 5] = np.inf
    healthy = before.params["layers"]["up"]["kernel"]
    before.params["layers"]["up"]["kernel"] = broken
    run.state = jax.device_put(before, jax.tree.map(lambda a: a.sharding, run.program.state))
    metrics = run(*blocks)
    assert not metrics["finite"] and not np.isfinite(metrics["loss"]) and metrics["skipped"] == 1
    after = jax.device_get(run.state)
    assert (after.step, after.skipped) == (2, 1)
    assert bits((after.params, after.opt_state)) == bits((before.params, before.opt_state))

    after.params["layers"]["up"]["kernel"] = healthy  # and the next step is as if nothing had been
    run.state = jax.device_put(after, jax.tree.map(lambda a: a.sharding, run.program.state))
    metrics = run(*blocks)
    assert metrics["finite"] and metrics["skipped"] == 1
    assert bits(run.state.params) != bits(after.params)


def test_fp16_overflows_halve_the_loss_scale_and_training_goes_on():
    cfg = dataclasses.replace(TINY, precision=FP32.replace("compute=float32", "compute=float16"))
    config = configure(cfg, peak_lr=1e-2, min_lr=1e-2)
    params, blocks, program = some_params(cfg, 0.1), some_blocks(cfg, 8), build(config)
    assert Run(program, params).state.loss_scale["scale"] == step.FIRST_LOSS_SCALE

    def run_at(scale):
        run = Run(program, params)
        run.state = dataclasses.replace(run.state, loss_scale={"scale": jnp.float32(scale), "counter": jnp.int32(0)})
        return run

    norms = [run_at(scale)(*blocks)["grad_norm"] for scale in (2.0**8, 2.0**12)]
    np.testing.assert_allclose(*norms, rtol=0.01)  # the scale is taken out again
    run = run_at(2.0**24)  # too large by far
    history = []
    for _ in range(40):
        before = bits((run.state.params, run.state.opt_state))
        history.append(run(*blocks))
        assert (bits((run.state.params, run.state.opt_state)) == before) == (not history[-1]["finite"])
    finite = [bool(m["finite"]) for m in history]
    assert finite[:3] == [False] * 3 and all(finite[-20:])
    assert [m["skipped"] for m in history] == list(np.cumsum(np.logical_not(finite)))
    assert [m["loss_scale"] for m in history[1:]] == [2.0 ** (24 - m["skipped"]) for m in history[:-1]]
    assert history[0]["loss"] - history[-1]["loss"] > 0.5
    # 2,000 steps without an overflow double it
    run.state = dataclasses.replace(run.state, loss_scale=run.state.loss_scale | {"counter": jnp.int32(1999)})
    last = run(*blocks)["loss_scale"]
    assert run.state.loss_scale["scale"] == 2 * last
