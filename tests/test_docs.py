"""README, docs and docstrings: every command line parses, every link and every path exists."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest
from test_contracts import COMMANDS

from tinyllama_jax.base import cli
from tinyllama_jax.base.config import keys

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("launch/*")]
SOURCES = [*ROOT.glob("configs/*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("examples/*.py"), *ROOT.glob("tinyllama_jax/*.py")]
PLACEHOLDERS = {" TRAIN": " --config configs/demo.py", "--step N": "--step 1", " --section.key=value": ""}
OVERRIDES = ("train", "sft", "dpo", "plan", "audit", "replay")  # take --section.key=value


class Parsed(Exception):
    """The arguments of a command were accepted."""


def command_lines() -> list[tuple[str, str]]:
    """Returns (file, command line) for every command line with options."""
    out = []
    for path in [*PAGES, *SOURCES]:
        text = re.sub(r"\\\n\s*", "", path.read_text())
        start = r"(?m)^ *" if path.suffix == ".py" else ""  # a line of its own: an error message is no command line
        for line in re.findall(start + r"(python (?:-m tinyllama_jax\.|tools/)[^`\n]*)", text):
            line = re.split(r"  |\s#| \[|&&|\|", line)[0].rstrip(".")
            for placeholder, value in PLACEHOLDERS.items():
                line = line.replace(placeholder, value)
            if " --" in line and not re.search(r"\{|\.\.\. | \.*$", line) and path.name != "CHANGELOG.md":
                out.append((str(path.relative_to(ROOT)), line))
    return out


def test_the_readme_is_short_and_names_every_command():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 200
    assert [name for name in COMMANDS if f"python -m tinyllama_jax.{name} " not in readme] == []
    assert len(command_lines()) > 50


@pytest.mark.parametrize(("file", "line"), dict.fromkeys(command_lines()))
def test_every_command_line_parses(file, line, monkeypatch):
    name, *arguments = shlex.split(line.removeprefix("python ").removeprefix("-m "))
    if name.startswith(("tools/bench", "tools/profile")):
        options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert all(f'"{option}"' in (ROOT / name).read_text() for option in options), line
        return
    kind = re.search(r"convert_((?:to|from)_torch)", name)
    command = "convert" if kind else name.removeprefix("tinyllama_jax.")
    arguments = [kind[1].replace("_", "-"), *arguments] if kind else arguments
    parse = argparse.ArgumentParser.parse_known_args

    def only_parse(*args, **kwargs):
        raise Parsed(parse(*args, **kwargs)[1])

    with monkeypatch.context() as patch, pytest.raises(Parsed) as parsed:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", only_parse)
        importlib.import_module(f"tinyllama_jax.{command}").main(arguments)
    overrides = parsed.value.args[0]
    assert command in (*OVERRIDES, "prepare") or not overrides, overrides
    if command in OVERRIDES:
        assert cli.pairs(overrides).keys() <= keys().keys()


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [p for p in PAGES if p.suffix == ".md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_paths_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    for path in re.findall(r"`((?:docs|tools|configs|launch|tests|examples|benchmarks|tinyllama_jax)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
