"""Writes docs/files.md from the first line of each module's docstring."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORDER = ("base/", "kernels/", "core/", "data/", "hub/", "run/", "planning/", "inference/", "evals/", "")


def rows() -> dict[str, str]:
    """Path -> what the file is, from the lowest module up."""
    out = {}
    for path in (ROOT / "tinyllama_jax").rglob("*.py"):
        if path.name != "__init__.py" or path.read_text().count("\n") > 1:
            first = ast.get_docstring(ast.parse(path.read_text())).split("\n")[0].rstrip(".")
            out[str(path.relative_to(ROOT))] = first.replace("|", "\\|")
    place = lambda name: next((i for i, o in enumerate(ORDER) if name.startswith(f"tinyllama_jax/{o}")), len(ORDER))
    return {name: out[name] for name in sorted(out, key=lambda n: (place(n), n))}


def page() -> str:
    """docs/files.md."""
    head = "# What each file is\n\nMade by `python tests/file_map.py` from the files' own first lines, lowest first.\n\n"
    head += "| file | what it is |\n|---|---|\n"
    return head + "".join(f"| `{path}` | {what} |\n" for path, what in rows().items())


if __name__ == "__main__":
    (ROOT / "docs" / "files.md").write_text(page())
