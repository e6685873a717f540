"""The console scripts: `tinyllama-train ...` is `python -m tinyllama_jax.train ...`, and so on; alone it lists the commands."""

import ast
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Runs the command that the script's name ends with."""
    name = Path(sys.argv[0]).stem.removeprefix("tinyllama-").replace("-", "_")
    runpy.run_module(f"tinyllama_jax.{name}", run_name="__main__", alter_sys=True)


def listed() -> str:
    """The commands, each with the first line of what it says of itself."""
    files = [path for path in sorted(Path(__file__).parent.glob("*.py")) if not path.name.startswith("_")]
    summary = lambda path: ast.get_docstring(ast.parse(path.read_text())).partition("\n")[0]
    return "\n".join(f"python -m tinyllama_jax.{path.stem:16} {summary(path)}" for path in files)


if __name__ == "__main__":
    print(listed())
