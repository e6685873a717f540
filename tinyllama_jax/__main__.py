"""The console scripts: `tinyllama-train ...` is `python -m tinyllama_jax.train ...`, and so on; alone it lists the commands."""

import ast
import difflib
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Runs the command that the script's name ends with, as `python -m tinyllama_jax.NAME` does."""
    name = Path(sys.argv[0]).stem.removeprefix("tinyllama-").replace("-", "_")
    runpy.run_module(f"tinyllama_jax.{name}", run_name="__main__", alter_sys=True)


def commands() -> dict[str, str]:
    """Each command with the first line of what it says of itself."""
    paths = [path for path in sorted(Path(__file__).parent.glob("*.py")) if not path.name.startswith("_")]
    return {path.stem: ast.get_docstring(ast.parse(path.read_text())).partition("\n")[0] for path in paths}


if __name__ == "__main__":
    if len(sys.argv) == 1 or sys.argv[1] in ("-h", "--help"):
        print("\n".join(f"python -m tinyllama_jax.{name:16} {summary}" for name, summary in commands().items()))
    elif sys.argv[1] in commands():
        sys.argv[:2] = sys.argv[1:2]
        main()
    else:
        near = difflib.get_close_matches(sys.argv[1], commands(), 1)
        remedy = f"did you mean {near[0]}?" if near else "python -m tinyllama_jax lists them"
        print(f"error: {sys.argv[1]}: no such command; {remedy}", file=sys.stderr)
        sys.exit(2)
