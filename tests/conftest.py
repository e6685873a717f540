"""Eight virtual CPU devices for the whole session, and small real data: a trained tokenizer, two prepared sources, a config."""

import atexit
import os
import shutil
import tempfile

import kept

# before anything imports jax
os.environ["JAX_PLATFORMS"] = "cpu"
# level 0, of LLVM's optimizations: two thirds of the processor time, which is nearly all the compiler's
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # for all workers and the processes that they start
    try:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(kept.programs())
    except OSError:  # a home that cannot be written to: for this session only
        os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tests-compiled-")
        atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import gc
import signal
import sys
from pathlib import Path

import pytest
from tiny import make_tiny_data

# what a shell's background jobs and nohup ignore, the processes that tests start would ignore too
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_let_go():
    """At the end of a file, if the worker has more than 3 GiB: three of them with all programs came to 18 GiB."""
    yield
    statm = Path("/proc/self/statm")  # on Linux
    if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > 3 << 30:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def no_mesh_is_left():
    """Once in 4,000 tests one left a mesh (which was not found), and the next program of eight devices failed."""
    yield
    if (jax := sys.modules.get("jax")) and not jax.sharding.get_mesh().empty:
        jax.set_mesh(None)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """What `make_tiny_data` writes."""
    return make_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_config_file(tiny_data) -> Path:
    """A config of a model of 60,000 parameters on `tiny_data`."""
    return tiny_data / "tiny.py"


@pytest.fixture
def tiny_config(tiny_config_file):
    """What `tiny_config_file` says."""
    from tinyllama_jax.base import cli

    return cli.read(str(tiny_config_file))
