"""A short round of chaos.py: two processes, broken at random moments, end with the bits of a run that nothing happened to."""

import chaos
import pytest


@pytest.mark.parametrize("seed", [5])
def test_whatever_happens_the_bits_are_the_same(seed, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))  # each start is some seconds shorter
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    assert chaos.main(["--faults", "6", "--seed", str(seed)]) == 0
    assert "0 differ" in capsys.readouterr().out
