"""The table of accelerators, and what `--on` may say."""

import importlib.util
import re

import jax
import pytest

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import xla
from tinyllama_jax.planning import targets

assert len(jax.devices()) == 8  # asked for here, so that a machine of fewer takes some of them


@pytest.mark.parametrize("on", ["h300:1x8", "a100-40g", "a100-40g:16", "v5e:4", "v5e:4x4x", "v5e:0x4", "cpu:0", "cpu:2x2", ""])
def test_an_unknown_target_lists_the_known_ones(on):
    with pytest.raises(UserError, match=f"--on={on}: not a known target and its size; .*choose one like a100-40g:2x8, .*v6e"):
        targets.machine(on)


@pytest.mark.parametrize("on", ["a100-40g:2x8", "v5e:4x4"])
def test_a_missing_compiler_says_what_to_install(on, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"--on={on}: .* is not installed; pip install '.\[plan\]'"):
        targets.machine(on)


@pytest.mark.parametrize(
    ("on", "words"),
    [
        ("a100:2x8", "write a100-40g:2x8; choose"),
        ("a100-40g:16", "write a100-40g:2x8, NODESxGPUS; choose"),
        ("a100-40g:2x8x2", "write a100-40g:2x8, NODESxGPUS; choose"),
        ("v5e:16", "write v5e:4x4, the chips along each axis of a slice; choose"),
    ],
)
def test_a_near_miss_is_told_what_to_write(on, words):
    with pytest.raises(UserError, match=f"--on={on}: not a known target and its size; {words}"):
        targets.machine(on)


def test_virtual_devices():
    machine = targets.machine("cpu:4")
    assert machine.devices == jax.devices()[:4] and machine.target is None and machine.per_node == 4
    with pytest.raises(UserError, match="--on=cpu:9: this process has 8 devices"):
        targets.machine("cpu:9")


@pytest.mark.parametrize(
    ("on", "cloud"),  # docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e
    [("v4:2x2x4", "v4-32"), ("v5e:4x4", "v5litepod-16"), ("v5e:1x1", "v5litepod-1"), ("v5p:2x2x4", "v5p-32"),
     ("v5p:2x2x1", "v5p-8"), ("v6e:4x8", "v6e-32"), ("a100-40g:2x8", None), ("cpu:8", None)],
)  # fmt: skip
def test_the_name_of_a_slice_at_cloud_tpu(on, cloud):
    assert targets.cloud_type(on) == cloud


def test_the_table_is_complete_and_in_its_units():
    assert targets.CLOUD.keys() == {name for name, t in targets.TARGETS.items() if not t.sm} - {"tpu7x"}  # which has no TYPE
    for name, t in targets.TARGETS.items():
        assert t.source.count(";") >= 1 and t.rates.source, name
        assert 15 * 2**30 < t.memory < 200e9, name
        assert 50e12 < t.flops <= 2.5e15 and 0.5e12 < t.bandwidth <= 8e12, name
        assert 10e9 < t.link <= 900e9 and t.between < 4e12, name
        assert (0.1 < t.price < 15) if t.price else "no price is published" in t.source, name
        assert not t.spot or re.search(r"20\d\d-\d\d.* spot [\d.]+ USD", t.spot), name
        for slow, middle, fast in (t.rates.matmul, t.rates.memory, t.rates.links):
            assert 0.4 < slow < middle < fast <= 1.05, name
        for slow, middle, fast in (t.rates.latency, t.rates.gap):
            assert 1e-4 > slow >= middle >= fast >= 0, name
        assert 0 < t.rates.error < 1 and len(t.rates.attention) == (5 if t.sm else 3), name
        assert all(0.1 * t.flops < rate * 1e12 < 0.8 * t.flops for rate in t.rates.attention.values()), name
        assert bool(t.sm) == (t.platform == "cuda") == (t.between > 0), name
        if t.sm:  # 4 tensor cores an SM; the peak follows from their width and the clock, within that at which it is quoted
            per_clock = {(8, 0): 2_048, (8, 6): 512, (8, 9): 512, (9, 0): 4_096, (10, 0): 8_192, (12, 0): 512}[t.sm.capability]
            assert t.flops == pytest.approx(t.sm.count * per_clock * t.sm.clock * 1e9, rel=0.09), name
            assert f"device_memory_size: {t.memory}" in targets._target_config(t)


@pytest.mark.parametrize(
    ("on", "n"),
    [("cpu:1000000000", 10**9), ("a100-40g:100000x8", 800_000), ("v5p:64x64x64", 2**18), ("v5e:99999x99999", 1e10)],
)
def test_more_devices_than_there_are(on, n):
    with pytest.raises(UserError, match=f"--on={on}: .* devices; at most (1,024|16,384)") as error:
        targets.machine(on)
    assert int(str(error.value).split()[1].replace(",", "")) == pytest.approx(n, rel=1e-4)


def test_the_budget_follows_the_memory_fraction_in_the_environment(monkeypatch):
    for name in xla.MEMORY_NAMES:
        monkeypatch.delenv(name, raising=False)
    a100 = targets.Machine("a100-40g:1x1", targets.TARGETS["a100-40g"], [], 1)
    assert a100.budget == int(a100.target.memory * 0.92)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")
    assert a100.budget == a100.target.memory // 2
    for wrong in ("much", "nan", "0", "-1", "1.1", "1e999"):
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", wrong)
        with pytest.raises(UserError, match=f"XLA_PYTHON_CLIENT_MEM_FRACTION={wrong}: must be a fraction of a GPU's memory"):
            _ = a100.budget


def test_a_device_is_known_by_the_longest_name():
    assert targets.of("TPU v5 lite").flops == 197e12
    assert targets.of("TPU v5").flops == 459e12
    assert targets.of("NVIDIA A100-SXM4-40GB") is targets.of("NVIDIA A100-PCIE-40GB") is targets.TARGETS["a100-40g"]
    assert targets.of("NVIDIA A100-SXM4-80GB") is targets.of("NVIDIA A100 80GB PCIe") is targets.TARGETS["a100-80g"]
    assert targets.of("NVIDIA H100 80GB HBM3").flops == 989e12
    assert targets.of("cpu") is None
