"""Checks data sets for faults, and draws what is in them.

    python -m tinyllama_jax.audit DIR... [--config CONFIG --section.key=value ...]

DIR: a folder that `prepare` wrote, or the start of LITPKDS files' names. Each finding is a line that names source, file and
record; a page shows lengths, tokens and samples to read. With a config, it also says which blocks each process would read, and
whether each is read once an epoch. Exit code 0: nothing found; 4: something is wrong with the data; 2: a user's mistake.
"""

import base64
import contextlib
import dataclasses
import html
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import rich.console
import rich.progress

from tinyllama_jax.base.config import Config
from tinyllama_jax.base.errors import UserError, disk_error
from tinyllama_jax.base.files import write
from tinyllama_jax.data import bucket, feed, litpkds
from tinyllama_jax.data.audit.survey import OCTAVE, Findings, Survey, duplicates, name_of, survey
from tinyllama_jax.data.blocks import MANIFEST, Blocks, Damaged, read_manifest

ALLOWED = ("duplicate", "overlap", "filling")  # may be harmless: small corpora repeat themselves; filling is not trained on
SAMPLES = 1 << 29  # most samples of a run whose order is checked: 1.1 x 10^12 tokens at S = 2048, a minute or two


def open_splits(path: str, seq_len: int, findings: Findings) -> list[Blocks]:
    """The splits of the source at `path`; a damaged split is a finding. Raises UserError if there is no such source."""
    try:
        if bucket.remote(path):
            read_manifest(path)  # raises: an audit reads all, again and again
        if packed := litpkds.files_of(path):
            splits = [s for s in ("train", "validation") if s == "train" or litpkds.files_of(path, s)]
        else:
            splits = list(read_manifest(path)[0]["splits"])
    except UserError as error:
        if not (Path(path) / MANIFEST).is_file():
            raise
        findings.add("damage", path, str(error))
        return []
    opened = []
    for split in splits:
        with _as_finding(findings, f"{path} ({split})", Damaged):
            opened.append(litpkds.Packed(path, split, seq_len) if packed else Blocks(path, split))
    return opened


@contextlib.contextmanager
def _as_finding(findings: Findings, source: str, kind: type[UserError]) -> Iterator[None]:
    """Turns an error of `kind`, or of the file system, in the `with` block into a finding, so that the audit continues."""
    try:
        yield
    except kind as error:
        findings.add("damage", source, str(error))
    except OSError as error:
        findings.add("damage", source, disk_error(error))


# -- what a run would read ------------------------------------------------------------------------------------------------


def coverage(config: Config, sources: list[Blocks], processes: int, findings: Findings) -> list[str]:
    """Lines that say which blocks each of `processes` would read; a block read twice or never in an epoch is a finding.

    Each process has one device. Checks the first `SAMPLES` samples of the run, as if there were no `data.skip`.
    """
    whole = dataclasses.replace(config, data=dataclasses.replace(config.data, skip=""))
    order, paths = feed.order(whole, sources), list(config.data.sources)
    total, at_once = config.train.tokens // config.model.seq_len, config.train.seqs_per_device
    config.accumulation(processes)  # raises UserError if they cannot share a step evenly
    n = min(total, SAMPLES)
    drawn, seen = np.zeros(len(sources), np.int64), [np.zeros(len(s), bool) for s in sources]
    reads, first_blocks = np.zeros((processes, len(sources)), np.int64), [[] for _ in range(processes)]
    for first in _with_progress(range(0, n, 1 << 16), "ordering"):
        sample = np.arange(first, min(first + (1 << 16), n))
        source, block = order.locate(sample)
        reader = sample // at_once % processes  # as `feed.Steps` hands out the rows of a micro-batch
        np.add.at(reads, (reader, source), 1)
        for p in range(processes) if not first else ():
            own = np.flatnonzero(reader == p)[:4]
            first_blocks[p] = [f"{Path(paths[source[i]]).name} {block[i]:,}" for i in own]
        for j in np.unique(source):
            read = block[source == j]
            while len(read):
                epoch, done = divmod(int(drawn[j]), len(sources[j]))
                part, read = read[: len(sources[j]) - done], read[len(sources[j]) - done :]
                _once(part, seen[j], f"epoch {epoch + 1}", sources[j], findings)
                drawn[j] += len(part)
                if done + len(part) == len(sources[j]):
                    never = np.flatnonzero(~seen[j])
                    findings.add_blocks("coverage", sources[j], never, lambda _, e=epoch: f"is not read in epoch {e + 1}")
                    seen[j][:] = False
    lines = [f"order: the first {n:,} of {total:,} samples of the run" if n < total else f"order: all {n:,} samples of the run"]
    if config.data.skip:
        lines[0] += f", including those that data.skip={config.data.skip} leaves out"
    for d, p, s in zip(drawn, paths, sources, strict=True):
        many = f"; after {feed.MANY_EPOCHS} epochs, repeated data help less and less" if d > feed.MANY_EPOCHS * len(s) else ""
        lines.append(f"order: {d:,} from {p}, {d / len(s):.2f} epochs{many}")
    for p in range(processes):
        share = ", ".join(f"{reads[p, j]:,} of {Path(path).name}" for j, path in enumerate(paths))
        lines.append(f"order: process {p} of {processes} reads {share}; first {', '.join(first_blocks[p])}")
    return lines


def _once(part: np.ndarray, seen: np.ndarray, epoch: str, blocks: Blocks, findings: Findings) -> None:
    """Marks the blocks `part` as `seen`; a block that is seen already, or comes twice, is a finding."""
    if part.min() < 0 or part.max() >= len(seen):
        findings.add("coverage", name_of(blocks), f"{epoch}: block {part.max():,} is read, and there are only {len(seen):,}")
        part = part[(part >= 0) & (part < len(seen))]
    values, times = np.unique(part, return_counts=True)
    again = values[(times > 1) | seen[values]]
    findings.add_blocks("coverage", blocks, again, lambda _: f"is read more than once in {epoch}")
    seen[values] = True


# -- the page -------------------------------------------------------------------------------------------------------------


def page(surveys: list[Survey], lines: list[str], verdict: str, findings: list[str], n_samples: int) -> str:
    """The whole audit as one HTML file that contains its pictures."""
    items = lambda rows: "<ul>" + "".join(f"<li>{html.escape(row)}</li>" for row in rows) + "</ul>"
    parts = [f"<h1>{verdict}</h1>", items(findings), items(lines)]
    for surveyed in surveys:
        parts.append(f"<h2>{html.escape(surveyed.name)}</h2><p>{surveyed.summary()}</p>")
        if not surveyed.tokens:  # everything is damaged
            continue
        parts.append(f"<img src='data:image/png;base64,{base64.b64encode(draw(surveyed)).decode()}'>")
        common = np.argsort(-surveyed.counts_V, kind="stable")[:30]
        share = surveyed.counts_V / max(surveyed.tokens, 1)
        shown = (f"{surveyed.text(common[i : i + 1])!r} ({common[i]}) {share[common[i]]:.2%}" for i in range(len(common)))
        parts.append("<p>most common: " + html.escape(", ".join(shown)) + "</p>")
        parts += [f"<h3>{html.escape(where)}</h3><pre>{html.escape(text)}</pre>" for where, text in surveyed.samples(n_samples)]
    style = "body{font-family:sans-serif;max-width:75em;margin:2em auto}pre{white-space:pre-wrap;background:#eee;padding:1em}"
    head = f"<!doctype html><meta charset='utf-8'><title>audit</title><style>{style}</style>"
    return head + "\n".join(parts) + "\n"


def draw(surveyed: Survey) -> bytes:
    """A PNG with the lengths of blocks and documents, and how often each token occurs."""
    from matplotlib.figure import Figure  # half a second, which a mistaken command need not wait for

    figure = Figure(figsize=(13, 3.5), layout="constrained")
    blocks, documents, tokens = figure.subplots(1, 3)
    width = max(-(-len(surveyed.lengths) // 50), 1)
    bins = np.arange(0, len(surveyed.lengths) + width, width)
    blocks.hist(np.arange(len(surveyed.lengths)), bins, weights=surveyed.lengths, log=True)
    blocks.set(xlabel="tokens in a block", ylabel="blocks")
    used = np.flatnonzero(surveyed.documents)
    if used.size:
        edges = 2.0 ** (np.arange(used[0], used[-1] + 2) / OCTAVE)
        documents.stairs(surveyed.documents[used[0] : used[-1] + 1], edges, fill=True)
    documents.set(xlabel="tokens in a document", ylabel="documents", xscale="log")
    ranked = np.sort(surveyed.counts_V)[::-1]
    ranked = ranked[ranked > 0]
    tokens.plot(np.arange(1, len(ranked) + 1), ranked)
    tokens.set(
        xlabel=f"rank of a token ({len(ranked):,} of {surveyed.vocab_size:,} occur)", ylabel="times", xscale="log", yscale="log"
    )
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=80)
    return png.getvalue()


# -- the command ----------------------------------------------------------------------------------------------------------


def audit(
    paths: list[str],
    page_file: Path,
    config: Config | None = None,
    processes: int = 1,
    seq_len: int = 2048,
    samples: int = 3,
    allow: tuple[str, ...] = (),
) -> list[str]:
    """Checks the sources in `paths`, prints what is wrong and writes the page; returns the findings. Raises UserError.

    `seq_len`: S of LITPKDS files, which do not record it. `samples`: blocks of each split to show as text. `allow`: kinds of
    finding, from `ALLOWED`, that are only warnings.
    """
    findings, began = Findings(), time.perf_counter()
    opened = [blocks for path in paths for blocks in open_splits(path, seq_len, findings)]
    surveys, lines = [], []
    with _progress(sum(map(len, opened)), "reading") as advance:
        for blocks in opened:
            with _as_finding(findings, name_of(blocks), UserError):
                surveys.append(survey(blocks, findings, advance))
    if surveys:
        n = duplicates(surveys, findings)
        lines += [f"{surveyed.name}: {surveyed.summary()}" for surveyed in surveys] + [f"{n:,} duplicate blocks"]
    seconds, tokens = time.perf_counter() - began, sum(surveyed.tokens for surveyed in surveys)
    lines.append(f"{tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} a second")
    if config is not None:
        try:
            lines += coverage(config, feed.open_sources(config), processes, findings)
        except UserError as error:
            if not findings.lines:
                raise
            lines.append(f"order: not checked: {error}")
    wrong, allowed = findings.all(allow)
    n = sum(times for (kind, _), times in findings.times.items() if not kind.startswith(allow))
    verdict = f"{n:,} finding{'s' * (n > 1)}" if wrong else "nothing wrong found"
    for line in [*lines, *(f"allowed: {line}" for line in allowed), *(f"wrong: {line}" for line in wrong)]:
        print(line)
    text = page(surveys, [*lines, *allowed], verdict, wrong, samples)
    write(page_file, text.encode(errors="backslashreplace"))  # names of files need not be UTF-8
    print(verdict, f"({page_file})")
    return wrong


def _with_progress(items: range, what: str) -> Iterator[int]:
    with _progress(len(items), what) as advance:
        for item in items:
            yield item
            advance(1)


@contextlib.contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A progress bar, if standard error is a terminal."""
    console = rich.console.Console(stderr=True)
    columns = what, rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(), rich.progress.TimeRemainingColumn()
    with rich.progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda n: progress.advance(task, n)
