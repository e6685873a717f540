"""Holds docs/errata.md: the right values, by this repository's own code."""

import re
from pathlib import Path

import pytest

from tinyllama_jax.base import config as c
from tinyllama_jax.base import dims
from tinyllama_jax.core import optim

TINYLLAMA = c.Model(22, 2048, 32, 4, 5632, 32000, 2048)


def test_every_row_names_a_test_of_this_file():
    rows = (Path(__file__).parents[1] / "docs" / "errata.md").read_text().splitlines()
    named = [re.findall(r"`(test_\w+)`", row)[-1] for row in rows if row.startswith('| "')]
    assert len(named) == 8 and all(callable(globals().get(name)) for name in named)


def test_shape():
    assert dims.n_parameters(TINYLLAMA) == 1_100_048_384
    assert TINYLLAMA.d_head == 64
    # 24 layers of width 3072 in GPT's form: 12 L D^2 in the blocks and one table of 32,000 rows
    assert round((12 * 24 * 3072**2 + 32000 * 3072) / 1e9, 1) == 2.8


def test_architecture():
    names = {p.name for p in dims.PARAMETERS}
    assert {"layers/gate/kernel", "layers/up/kernel", "lm_head/kernel", "embed/embedding"} <= names
    assert not any("bias" in name or "position" in name for name in names)


def test_no_dropout():
    assert not any("dropout" in key for key in c.keys())


def test_precision():
    assert TINYLLAMA.precision == "params=float32,compute=bfloat16,output=float32"


def test_schedule_ends_at_its_floor():
    lr = optim.schedule(c.Optim(4e-4, 4e-5, 2_000, 0.1, 1.0), c.Train(1_430_512, 8, 1))
    assert float(lr(1_430_512)) == pytest.approx(4e-5, rel=1e-6)
    assert float(lr(1_430_512 * 99 // 100)) > 4e-5


def test_chinchilla():
    # table 2 of the paper: the exponents of N and of D in the compute are both close to 1/2
    exponents = {"minimum over training curves": (0.50, 0.50), "isoFLOP": (0.49, 0.51), "parametric": (0.46, 0.54)}
    for n, d in exponents.values():
        assert n + d == pytest.approx(1.0) and n / d > 0.8  # N grows about as D, not as its square root


def test_tokens_at_the_released_steps():
    tokens_per_step = 1_024 * 2_048
    assert 480_000 * tokens_per_step / 1e12 == pytest.approx(1.0, abs=0.01)
    assert 480_000 / 1_430_512 == pytest.approx(0.336, abs=0.001)
    assert 1_430_512 * tokens_per_step / 1e12 == pytest.approx(3.0, abs=0.001)


def test_mfu():
    percent = {k: round(24_000 * f / 312e12 * 100, 1) for k, f in dims.flops_per_token(TINYLLAMA).items()}
    assert percent == {"palm": 59.3, "matmul": 56.3, "palm_causal": 55.0, "matmul_causal": 52.0}
