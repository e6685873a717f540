"""Runs a tool of an installed package: `python -m tinyllama_jax.tools bench_train ...`. Without a name it lists them.

In a checkout it is `python tools/bench_train.py ...`.
"""

import ast
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parent

if __name__ == "__main__":
    tools = {path.stem: path for path in sorted(FOLDER.glob("[!_]*.py"))}
    name = sys.argv[1].removesuffix(".py") if len(sys.argv) > 1 else ""
    if name in tools:
        sys.argv[:2] = [str(tools[name])]
        sys.path.insert(0, str(FOLDER))  # as for a script: tools import one another
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        summary = lambda path: ast.get_docstring(ast.parse(path.read_text())).partition("\n")[0]
        print("\n".join(f"{tool:22} {summary(path)}" for tool, path in tools.items()))
        if name not in ("", "-h", "--help"):
            print(f"error: {name}: no such tool; they are listed above", file=sys.stderr)
            sys.exit(2)
