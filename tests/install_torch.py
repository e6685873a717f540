"""Installs PyTorch for the parity tests where a CPU build of it can be had; where only a CUDA build can, says so."""

import json
import subprocess
import sys

TORCH = "torch==2.13.0"  # the version that the parity tests were last held against
ON_TORCH = ("peft==0.21.2", "bitsandbytes==0.50.2")  # 44 MB: what adapters and nf4 are held against


def main() -> None:
    """Asks pip what it would install, and installs it if no GPU package is among it."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", TORCH]
    plan = subprocess.run([*pip, "--dry-run", "--report", "-"], capture_output=True, text=True)
    if plan.returncode:
        print(f"{TORCH} cannot be had here; the tests that need it will be skipped")
        return
    report = plan.stdout[plan.stdout.index("{") :]
    names = [item["metadata"]["name"].lower() for item in json.loads(report)["install"]]
    heavy = [name for name in names if name.startswith(("nvidia", "cuda", "triton"))]
    if heavy:
        print(f"{TORCH} would bring {len(heavy)} CUDA packages; the tests that need it will be skipped")
    else:
        subprocess.run(pip, check=True)
        if subprocess.run([*pip[:-1], *ON_TORCH]).returncode:
            print(f"{' and '.join(ON_TORCH)} cannot be had here; the tests that need them will be skipped")


if __name__ == "__main__":
    main()
