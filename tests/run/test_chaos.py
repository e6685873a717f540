"""Two faults of chaos.py; `make test-long` has 20. The run ends with the bits of a run that nothing happened to."""

import chaos
import pytest

pytestmark = pytest.mark.xdist_group("processes")  # see test_processes.py


@pytest.mark.parametrize("seed", [5])
def test_whatever_happens_the_bits_are_the_same(seed, capsys):
    assert chaos.main(["--faults", "2", "--seed", str(seed)]) == 0
    assert "0 differ" in capsys.readouterr().out
