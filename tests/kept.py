"""Results of the compilers that tests keep between sessions, in $XDG_CACHE_HOME/tinyllama_jax-tests (~/.cache if unset)."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyllama_jax-tests"
LARGEST = 2 << 30  # bytes; a session writes about 0.1 GB
COMPILERS = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "nvidia-cuda-nvcc-cu12")
COMPILERS += ("nvidia-cuda-nvdisasm",)


def programs() -> Path:
    """Returns the folder for XLA's compilation cache on this kind of processor, emptied if it has grown beyond `LARGEST`.

    XLA's key holds the program, the options and the versions, but not the processor, which another machine with the same home
    may lack. Raises OSError if the folder cannot be made.
    """
    cpu = Path("/proc/cpuinfo")
    flags = next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "") if cpu.is_file() else ""
    folder = FOLDER / f"programs-{hashlib.sha256((platform.platform() + flags).encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    if sum(file.stat().st_size for file in folder.iterdir()) > LARGEST:
        shutil.rmtree(folder)
        folder.mkdir()
    return folder


def result(sources: list[str], key: list[str], compute) -> dict:
    """Returns what `compute()` returned for the same `key`, the same content of `sources` and the same compilers.

    `sources`: patterns of files below the checkout.
    """
    digest = hashlib.sha256(json.dumps(key).encode())
    for file in sorted({file for pattern in sources for file in ROOT.glob(pattern)}):
        digest.update(f"\0{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    for name in COMPILERS:
        try:
            digest.update(f"{name} {importlib.metadata.version(name)}\0".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    file = FOLDER / "results" / f"{digest.hexdigest()}.json"
    if file.is_file():
        return json.loads(file.read_text())
    value = compute()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(value))
        partial.rename(file)
    except OSError:  # a home that cannot be written to
        pass
    return value
