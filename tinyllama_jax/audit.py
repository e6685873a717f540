"""Checks data sets for faults, and draws what is in them.

    python -m tinyllama_jax.audit DIR... [--config CONFIG --section.key=value ...]

DIR: a folder that `prepare` wrote, or the start of LITPKDS files' names. Each finding is a line that names source, file and
record; a page shows lengths, tokens and samples to read. With a config, it also says which blocks each process would read, and
whether each is read once an epoch. Exit code 0: nothing found; 4: something is wrong with the data; 2: a user's mistake.
"""

import argparse
from pathlib import Path

from tinyllama_jax.base import cli
from tinyllama_jax.base.errors import UserError, run_main
from tinyllama_jax.data.audit.report import ALLOWED, audit
from tinyllama_jax.data.blocks import LONGEST

WRONG = 4  # exit code


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser("python -m tinyllama_jax.audit", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("dirs", nargs="*", metavar="DIR", help="data sets; those of --config by default")
    parser.add_argument("--config", help="a training config, with --section.key=value: check what its run would read (none)")
    parser.add_argument("--processes", type=int, metavar="N", help="processes of that run, each with one device (1)")
    parser.add_argument("--seq-len", type=int, metavar="S", help="sequence length of LITPKDS files (the config's, or 2048)")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="blocks of each split to show as text (3)")
    parser.add_argument("--page", type=Path, default=Path("audit.html"), metavar="FILE", help="the page to write (audit.html)")
    parser.add_argument(
        "--allow", default="", metavar="KINDS", help=f"{','.join(ALLOWED)}: findings that are only warnings (none)"
    )
    args, overrides = parser.parse_known_args(_joined(argv))
    allow = tuple(filter(None, args.allow.split(",")))
    if unknown := set(allow) - set(ALLOWED):
        raise UserError(f"--allow {args.allow}: {unknown.pop()} is none of {', '.join(ALLOWED)}")
    if args.page.suffix != ".html":
        raise UserError(f"--page {args.page}: the page is HTML, and its name must end in .html")
    if not args.config and (overrides or args.processes):
        raise UserError(f"{overrides[0] if overrides else '--processes'}: is about a training run; give its --config too")
    if args.page.is_dir() or not args.page.parent.is_dir():
        raise UserError(f"--page {args.page}: is a folder, or its folder does not exist; name a file")
    for option, least, most in (("processes", 1, 1 << 20), ("seq_len", 1, LONGEST), ("samples", 0, 1_000)):
        if (value := getattr(args, option)) is not None and not least <= value <= most:
            raise UserError(f"--{option.replace('_', '-')} {value}: must be {least} to {most:,}")
    config = cli.override(cli.read(args.config), cli.pairs(overrides)) if args.config else None
    paths = args.dirs or (list(config.data.sources) if config else [])
    if not paths:
        raise UserError("name a data set: python -m tinyllama_jax.audit DIR, or --config CONFIG for those of a run")
    seq_len = args.seq_len or (config.model.seq_len if config else 2048)
    return WRONG if audit(paths, args.page, config, args.processes or 1, seq_len, args.samples, allow) else 0


def _joined(argv: list[str]) -> list[str]:
    """Joins `--section.key value` into one word, so that the value is not taken for a DIR."""
    out: list[str] = []
    for word in argv:
        before = out[-1] if out else ""
        if before.startswith("--") and "." in before and "=" not in before and not word.startswith("--"):
            out[-1] = f"{before}={word}"
        else:
            out.append(word)
    return out


if __name__ == "__main__":
    run_main(main)
