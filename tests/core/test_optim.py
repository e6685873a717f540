"""The schedule at the steps that matter, and which parameters decay."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax.base import config as c
from tinyllama_jax.base import dims
from tinyllama_jax.core import model, optim

STEPS, WARMUP = 1_430_512, 2_000
OPTIM = c.Optim(4e-4, 4e-5, WARMUP, 0.1, 1.0)
TRAIN = c.Train(STEPS, 8, 1)


def original(micro_step: int) -> float:
    """The original's formula (pretrain/tinyllama.py:375-386), per micro-batch of which a step has 8, counted from 0."""
    warmup, decay = 8 * WARMUP, 8 * STEPS
    if micro_step < warmup:
        return 4e-4 * micro_step / warmup
    return 4e-5 + 0.5 * (1 + math.cos(math.pi * (micro_step - warmup) / (decay - warmup))) * (4e-4 - 4e-5)


@pytest.mark.parametrize(
    ("step", "lr"),
    [(0, 0.0), (1_000, 2e-4), (2_000, 4e-4), (2_000 + (STEPS - 2_000) // 2, 2.2e-4), (STEPS, 4e-5)],
)
def test_schedule_by_hand(step, lr):
    assert float(optim.schedule(OPTIM, TRAIN)(step)) == pytest.approx(lr, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("step", [100, 1_000, 2_000, 50_000, 715_000, 1_431_000])
def test_schedule_is_the_original_to_an_eighth_of_a_step(step):
    step = min(step, STEPS)
    assert float(optim.schedule(OPTIM, TRAIN)(step)) == pytest.approx(original(8 * step - 1), rel=2e-3)


def test_no_warmup_begins_at_the_peak_and_all_warmup_never_decays():
    assert float(optim.schedule(c.Optim(4e-4, 4e-4, 0, 0.1, 1.0), c.Train(50, 8, 1))(1)) == pytest.approx(4e-4)
    assert float(optim.schedule(c.Optim(4e-4, 0.0, 10, 0.1, 1.0), c.Train(10, 8, 1))(10)) == pytest.approx(4e-4)


@pytest.mark.parametrize(
    ("how", "rates"),
    [
        ({"schedule": "linear"}, {10: 1.0, 55: 0.55, 100: 0.1}),
        ({"schedule": "constant"}, {10: 1.0, 55: 1.0, 100: 1.0}),
        ({"schedule": "constant", "cooldown_steps": 20}, {80: 1.0, 90: 0.5, 100: 0.0}),  # WSD
        ({"schedule": "constant", "cooldown_steps": 20, "cooldown_lr": 0.2}, {80: 1.0, 90: 0.6, 100: 0.2}),
        ({"schedule": "linear", "cooldown_steps": 45}, {55: 0.55, 100: 0.0}),
        ({"schedule": "linear", "cooldown_steps": 45, "cooldown": "constant"}, {54: 0.56, 55: 0.55, 99: 0.55, 100: 0.55}),
        ({"decay_steps": 60}, {10: 1.0, 35: 0.55, 60: 0.1, 61: 0.1, 100: 0.1}),  # the cosine's middle is at (10 + 60) / 2
        ({"decay_steps": 60, "cooldown_steps": 20}, {80: 0.1, 90: 0.05, 100: 0.0}),  # what a finished run is cooled down with
    ],
    ids=str,
)
def test_other_schedules_by_hand(how, rates):
    rate = jax.jit(optim.schedule(c.Optim(1.0, 0.1, 10, 0.1, 1.0, **how), c.Train(100, 8, 1)))
    assert {step: pytest.approx(float(rate(step)), abs=1e-6) for step in (*rates, 5)} == {**rates, 5: 0.5}


def test_a_cool_down_to_0_does_not_go_below():
    """By rounding it did, to -3e-12."""
    rate = optim.schedule(c.Optim(2e-4, 2e-5, 5, 0.1, 1.0, schedule="constant", cooldown_steps=20), c.Train(30, 8, 1))
    assert float(jax.jit(rate)(29)) == pytest.approx(1e-5) and float(jax.jit(rate)(30)) == 0


def test_a_larger_batch_does_not_bend_the_schedule():
    """From token 480 on steps are four times as large: step 60 + n is where 60 + 4 n was, and the run ends where it did."""
    optim_, plain = c.Optim(1.0, 0.1, 10, 0.1, 1.0, cooldown_steps=20), c.Train(100, 8, 1)
    ramp = c.Train(70, 8, 1, batch_ramp="480:32")
    assert ramp.tokens == plain.tokens == 800
    rates = [jax.jit(optim.schedule(optim_, train)) for train in (plain, ramp)]
    for step in (1, 10, 59, 60):
        assert float(rates[0](step)) == float(rates[1](step))
    for n in range(1, 11):
        assert float(rates[1](60 + n)) == pytest.approx(float(rates[0](60 + 4 * n)), rel=1e-6, abs=1e-9)


def test_what_decays():
    params = model.unflatten({p.name: 0 for p in dims.PARAMETERS})
    matrices = model.flatten(optim.decays(params, "matrices"))
    assert {name for name, decays in matrices.items() if not decays} == {
        "embed/embedding",
        "layers/attention_norm/scale",
        "layers/mlp_norm/scale",
        "final_norm/scale",
    }
    assert all(model.flatten(optim.decays(params, "all")).values())


def test_one_update_by_hand():
    """With zero moments Adam's first direction is g / (|g| + eps): its sign; so w - lr (sign(g) + decay w), clipped or not."""
    config = c.Config(
        "x",
        c.Model(1, 8, 2, 1, 8, 8, 8),
        c.Data({"x": 1}),
        c.Optim(1e-2, 1e-2, 0, 0.1, 1.0),
        c.Train(10, 8, 1),
        c.Checkpoint(1),
    )
    params = {"lm_head": {"kernel": jnp.full((4,), 2.0)}}
    grads = {"lm_head": {"kernel": jnp.array([3.0, -4.0, 0.0, 12.0])}}
    new, _, out = optim.update(grads, optim.adamw(config).init(params), params, jnp.int32(1), config)
    assert float(out["grad_norm"]) == 13.0 and float(out["lr"]) == pytest.approx(1e-2)
    wanted = 2.0 - 1e-2 * (np.array([1.0, -1.0, 0.0, 1.0]) + 0.1 * 2.0)
    np.testing.assert_allclose(new["lm_head"]["kernel"], wanted, rtol=1e-6)
