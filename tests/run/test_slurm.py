"""`launch/slurm.sbatch` under a real Slurm: five minutes, root and Debian's packages, hence only with SLURM_TEST=1."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(os.environ.get("SLURM_TEST") != "1", reason="SLURM_TEST=1 runs it: it installs and starts a Slurm")
def test_the_batch_script_under_a_real_slurm():
    script = Path(__file__).parents[1] / "slurm.sh"
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")} | {"PYTHON": sys.executable}
    done = subprocess.run([script], env=env, capture_output=True, text=True, timeout=1_200)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
