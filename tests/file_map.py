"""Writes the README's file map from the first line of each module's docstring."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORDER = (
    "dims",
    "errors",
    "config",
    "cli",
    "xla",
    "sharding",
    "targets",
    "kernels/",
    "data/",
    "model",
    "optim",
    "hf",
    "lit",
    "step",
    "checkpoint",
    "run_folder",
    "metrics",
    "weights",
)


def rows() -> dict[str, str]:
    """Path -> what the file is, from the lowest module up."""
    out = {}
    for path in (ROOT / "tinyllama_jax").rglob("*.py"):
        if path.name != "__init__.py" or path.read_text().count("\n") > 1:
            first = ast.get_docstring(ast.parse(path.read_text())).split("\n")[0].rstrip(".")
            out[str(path.relative_to(ROOT))] = first.replace("|", "\\|")
    place = lambda name: next((i for i, o in enumerate(ORDER) if name.startswith(f"tinyllama_jax/{o}")), len(ORDER))
    return {name: out[name] for name in sorted(out, key=lambda n: (place(n), n))}


def table() -> str:
    """The rows as they stand in the README."""
    return "".join(f"| `{path}` | {what} |\n" for path, what in rows().items())


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(re.sub(r"(?m)(^\| `tinyllama_jax/.*\n)+|^FILEMAP\n", lambda _: table(), readme.read_text(), count=1))
