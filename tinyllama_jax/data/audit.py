"""Looks through data sets for what is wrong with them, and draws what is in them.

    python -m tinyllama_jax.data.audit DIR... [--config CONFIG --section.key=value ...]

DIR: what `data.prepare` wrote, or the beginning of LITPKDS files' names. Each finding is a line that names source, file and
record; a page shows lengths, tokens and samples to read. With a config: which blocks each process would read, and whether each
is read once an epoch. Exit code 0: nothing found; 4: something is wrong with the data; 2: a user's mistake.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import hashlib
import html
import io
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import rich.console
import rich.progress

from tinyllama_jax import config as config_lib
from tinyllama_jax.config import Config, UserError, run_main
from tinyllama_jax.data import feed, litpkds, shards
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.blocks import MANIFEST, Blocks, Damaged, read_manifest

WRONG = 4  # exit code
ALLOWED = ("duplicate", "filling")  # kinds that can be allowed: small corpora repeat themselves, and filling is left out
MOST = 10  # lines on one kind of finding in one source; the others are counted
AT_ONCE = 1 << 22  # tokens in memory
SAMPLES = 1 << 29  # samples of a run whose order is looked at, at most: 1.1 x 10^12 tokens at S = 2048, a minute or two
OCTAVE = 4  # bins of document lengths to a factor of two


class Findings:
    """Lines on what is wrong; beyond `MOST` of a kind in a source they are only counted."""

    def __init__(self):
        self.lines: list[tuple[str, str]] = []  # kind and line
        self.times: Counter = Counter()

    def add(self, kind: str, source: str, line: str, times: int = 1) -> None:
        """One more, or `times` more of which `line` tells one."""
        if self.times[kind, source] < MOST:
            self.lines.append((kind, f"{source}: {line}"))
        self.times[kind, source] += times

    def add_blocks(self, kind: str, blocks: Blocks, indices: np.ndarray, what: Callable[[int], str]) -> None:
        """One for each of the blocks `indices`, of which `what` gives the line's end (of the i-th of them)."""
        for i, index in enumerate(indices[:MOST]):
            file, record = blocks.place(int(index))
            self.add(kind, name_of(blocks), f"{file.name}, record {record}: {what(i)}")
        self.times[kind, name_of(blocks)] += max(len(indices) - MOST, 0)

    def all(self, allowed: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
        """Everything to print: what is wrong, and what is of a kind that begins with one of `allowed`."""
        more = [(kind, f"{source}: {kind}: {n - MOST:,} more") for (kind, source), n in self.times.items() if n > MOST]
        sorted_out: tuple[list[str], list[str]] = [], []
        for kind, line in self.lines + more:
            sorted_out[kind.startswith(allowed)].append(line)
        return sorted_out


def name_of(blocks: Blocks) -> str:
    """How lines call a split of a source."""
    return f"{blocks.directory} ({blocks.split})"


def open_splits(path: str, seq_len: int, findings: Findings) -> list[Blocks]:
    """The splits of the source at `path`; one that is damaged is a finding. Raises UserError if there is no such source."""
    try:
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
        try:
            opened.append(litpkds.Packed(path, split, seq_len) if packed else Blocks(path, split))
        except Damaged as error:
            findings.add("damage", f"{path} ({split})", str(error))
    return opened


# -- one split ------------------------------------------------------------------------------------------------------------


class Survey:
    """What one pass over a split found."""

    def __init__(self, blocks: Blocks, findings: Findings):
        self.blocks, self.findings, self.name = blocks, findings, name_of(blocks)
        self.manifest, vocabulary = blocks.manifest, blocks.manifest["tokenizer"]
        self.vocab_size, self.bos, self.eos = (vocabulary[key] for key in ("vocab_size", "bos_id", "eos_id"))
        self.tokenizer = tokenizer_lib.load(blocks.tokenizer)
        if self.tokenizer.sha256 != vocabulary["sha256"]:
            findings.add("tokenizer", self.name, f"{blocks.tokenizer}: is another tokenizer than the manifest's")
        self.apart = {self.bos: "bos", self.eos: "eos"}  # what never stands twice in a row
        self.edges = sum(self.manifest[name] for name in ("bos", "eos")) if self.bos == self.eos else 1  # to a document
        if self.edges == 2:
            self.apart = {}
        if self.tokenizer.decode([0]).strip(" ⁇") == "":  # else it is a character, which text may repeat
            self.apart.setdefault(0, "0")
        self.apart.pop(-1, None)
        self.tokens = self.damaged = self.filling = 0
        self.counts_V = np.zeros(self.vocab_size, np.int64)
        self.lengths = np.zeros(blocks.seq_len + 2, np.int64)
        self.documents = np.zeros(64 * OCTAVE, np.int64)  # by length
        self.open = 0  # tokens since a document last began
        self.first: dict[int, int] = {}  # bos and eos -> the block that first has it
        self.hashes = np.zeros(len(blocks), np.uint64)  # of each block; 0: of none

    def read(self, first: int, end: int) -> None:
        """Takes in the blocks [first, end); those that are damaged are findings."""
        indices = np.arange(first, end)
        try:
            tokens, length = self.blocks.read(indices)
        except Damaged:
            good = []
            for i in indices:
                try:
                    self.blocks.read([i])
                    good.append(i)
                except Damaged as error:
                    self.findings.add("damage", self.name, str(error))
            self.damaged += len(indices) - len(good)
            indices = np.array(good, np.int64)
            tokens, length = self.blocks.read(indices)
        self.lengths += np.bincount(length, minlength=len(self.lengths))
        hashed = [hashlib.blake2b(row[:n], digest_size=8).digest() for row, n in zip(tokens, length.tolist(), strict=True)]
        self.hashes[indices] = np.where(length > 0, np.frombuffer(b"".join(hashed), np.uint64), 0)
        if isinstance(self.blocks, litpkds.Packed):
            self._look_at_filling(indices, length)
        flat = tokens.ravel() if (length == tokens.shape[1]).all() else tokens[np.arange(tokens.shape[1]) < length[:, None]]
        self._look_at(flat, np.cumsum(length), indices)

    def _look_at(self, flat: np.ndarray, ends: np.ndarray, indices: np.ndarray) -> None:
        """`flat`: all tokens. `ends`: where each of the blocks `indices` ends in them."""
        self.tokens += len(flat)
        outside = (flat >= self.vocab_size) | (flat < 0)
        if outside.any():
            at = np.flatnonzero(outside)
            rows, firsts, times = np.unique(np.searchsorted(ends, at, "right"), return_index=True, return_counts=True)
            what = lambda i: f"{times[i]} ids out of the vocabulary of {self.vocab_size}: {flat[at[firsts[i]]]}"
            self.findings.add_blocks("ids out of the vocabulary", self.blocks, indices[rows], what)
            self.counts_V += np.bincount(flat[~outside], minlength=self.vocab_size)
        else:
            self.counts_V += np.bincount(flat, minlength=self.vocab_size)
        for id_, name in self.apart.items():
            at = np.flatnonzero(flat == id_)
            if at.size:
                self.first.setdefault(id_, int(indices[np.searchsorted(ends, at[0], "right")]))
            second = at[1:][np.diff(at) == 1]
            rows, times = np.unique(np.searchsorted(ends, second, "right"), return_counts=True)
            what = lambda i, times=times, name=name, id_=id_: f"{name} ({id_}) after {name}, {times[i]} times: padding?"
            self.findings.add_blocks(f"runs of {name}", self.blocks, indices[rows], what)
            if id_ == self._edge():
                self._documents(at + 1 if self.manifest["eos"] else at, len(flat))

    def _edge(self) -> int | None:
        """The id that stands between documents, if there is one."""
        return self.eos if self.manifest["eos"] else self.bos if self.manifest["bos"] else None

    def _documents(self, edges: np.ndarray, size: int) -> None:
        if edges.size:
            lengths = np.diff(edges, prepend=-self.open)
            lengths = lengths[lengths > 0]
            self.documents += np.bincount((np.log2(lengths) * OCTAVE).astype(int), minlength=len(self.documents))
        self.open = size - int(edges[-1]) if edges.size else self.open + size

    def _look_at_filling(self, indices: np.ndarray, length: np.ndarray) -> None:
        """Blocks of one file that was filled up at its end."""
        filling = self.blocks.stored(indices) - length
        rows = np.flatnonzero(filling)
        if rows.size:
            file, record = self.blocks.place(int(indices[rows[0]]))
            line = f"{file.name}, record {record}: is the first of {rows.size:,} blocks that end in bos or eos over and over"
            line += f", {filling.sum():,} in all, left out when they are read"
            self.findings.add("filling (the original's issue #83)", self.name, line)
        self.filling += int(filling.sum())

    def n_documents(self) -> int:
        """How many there are, by what ends or begins one."""
        edge = self._edge()
        return int(self.counts_V[edge]) // self.edges if edge is not None else 0

    def compare(self) -> None:
        """Looks for what is not as the manifest says."""
        packed, says = isinstance(self.blocks, litpkds.Packed), self.manifest["splits"][self.blocks.split]
        add = lambda kind, where, line: self.findings.add(kind, self.name, f"{where}: {line}")
        for id_ in {self.bos, self.eos} - {-1}:  # can be the same
            names = [name for name in ("bos", "eos") if self.manifest["tokenizer"][f"{name}_id"] == id_]
            name, a_document, found = "/".join(names), sum(self.manifest[n] for n in names), int(self.counts_V[id_])
            if not a_document and found:
                file, record = self.blocks.place(self.first[id_])
                add(
                    f"{name} policy",
                    f"{file.name}, record {record}",
                    f"is the first of {found:,} {name} ({id_}); there should be none",
                )
            elif a_document and packed and not found:
                add(f"{name} policy", "all files", f"have no {name} ({id_}), which should stand at each document's end")
            elif a_document and not packed and not self.damaged and found != a_document * says["documents"]:
                should = f"{says['documents']:,} documents, each with {name} ({id_})"
                add(f"{name} policy", MANIFEST, f"speaks of {should}; there are {found:,}")
        if not packed and not self.damaged and self.tokens != says["tokens"]:
            add("counts", MANIFEST, f"speaks of {says['tokens']:,} tokens; there are {self.tokens:,}")

    def summary(self) -> str:
        """What is in it, in a line."""
        n, real = self.n_documents(), self.tokens / max(len(self.blocks) * (self.blocks.seq_len + 1), 1)
        mean = f", {self.tokens / n:,.0f} tokens each" if n else ""
        filling = f"; {self.filling:,} tokens of filling left out" if self.filling else ""
        return f"{len(self.blocks):,} blocks, {self.tokens:,} tokens ({real:.2%} of what fits), {n:,} documents{mean}{filling}"

    def text(self, ids: np.ndarray) -> str:
        """The text of those ids that the tokenizer knows."""
        return self.tokenizer.decode(ids[(ids >= 0) & (ids < self.tokenizer.vocab_size)].tolist())

    def samples(self, n: int) -> list[tuple[str, str]]:
        """`n` blocks at random: (where, the beginning of its text, documents apart)."""
        chosen, out = np.random.default_rng(0).choice(len(self.blocks), min(n, len(self.blocks)), replace=False), []
        for index in sorted(chosen.tolist()):
            file, record = self.blocks.place(index)
            with contextlib.suppress(Damaged):  # named already
                (tokens,), (length,) = self.blocks.read([index])
                ids = tokens[: min(length, 300)]
                parts = np.split(ids, np.flatnonzero(ids == self._edge()) + 1)
                out.append((f"{file.name}, record {record}", "\n---\n".join(map(self.text, parts))))
        return out


def survey(blocks: Blocks, findings: Findings, advance: Callable[[int], None]) -> Survey:
    """Reads all of a split, and all bytes of its files; calls `advance` with the number of blocks read since it last did."""
    found = Survey(blocks, findings)
    entries = blocks.manifest["splits"][blocks.split].get("shards", ())
    checksums = {entry["file"]: entry["sha256"] for entry in entries}
    step = max(AT_ONCE // (blocks.seq_len + 1), 1)
    for file, first, last in blocks.files():
        if file.name in checksums and shards.sha256(file) != checksums[file.name]:  # which leaves it in the page cache
            findings.add("checksums", found.name, f"{file.name}: is not the file that was written (sha256)")
        for start in range(first, last, step):
            found.read(start, min(start + step, last))
            advance(min(start + step, last) - start)
    found.compare()
    return found


def duplicates(surveys: list[Survey], findings: Findings) -> int:
    """Finds blocks that are there twice, in whatever source or split; returns how many. 24 bytes of memory a block."""
    hashes = np.concatenate([s.hashes for s in surveys])
    ordered = np.sort(hashes)
    again = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    again = again[again > 0]
    starts = np.cumsum([0, *(len(s.blocks) for s in surveys)])
    first: dict[int, int] = {}
    n = 0
    for begin in range(0, len(hashes) if again.size else 0, 1 << 20):
        part = hashes[begin : begin + (1 << 20)]
        near = np.minimum(np.searchsorted(again, part), len(again) - 1)
        for index in (np.flatnonzero(again[near] == part) + begin).tolist():
            one = first.setdefault(int(hashes[index]), index)
            if one == index:
                continue
            (a, i), (b, k) = (((j := int(np.searchsorted(starts, x, "right")) - 1), int(x - starts[j])) for x in (one, index))
            n += 1
            (file, record), (other, where) = surveys[b].blocks.place(k), surveys[a].blocks.place(i)
            same = "" if a == b else f"{surveys[a].name}, "
            line = f"{file.name}, record {record}: has the same tokens as {same}{other.name}, record {where}"
            findings.add("duplicate blocks", surveys[b].name, line)
    return n


# -- what a run would read ------------------------------------------------------------------------------------------------


def coverage(config: Config, sources: list[Blocks], processes: int, findings: Findings) -> list[str]:
    """Lines on which blocks `processes`, each with one device, would read; one read twice or never in an epoch is a finding.

    Without `data.skip`, whose batches are left out. Looks at the first `SAMPLES` samples of the run.
    """
    whole = dataclasses.replace(config, data=dataclasses.replace(config.data, skip=""))
    order, paths = feed.order(whole, sources), list(config.data.sources)
    total, at_once = config.train.tokens // config.model.seq_len, config.train.seqs_per_device
    config.accumulation(processes)  # refused unless a step divides into them
    n = min(total, SAMPLES)
    drawn, seen = np.zeros(len(sources), np.int64), [np.zeros(len(s), bool) for s in sources]
    reads, begins = np.zeros((processes, len(sources)), np.int64), [[] for _ in range(processes)]
    for first in _shown(range(0, n, 1 << 16), "ordering"):
        sample = np.arange(first, min(first + (1 << 16), n))
        source, block = order.locate(sample)
        reader = sample // at_once % processes  # as `feed.Steps` hands out the rows of a micro-batch
        np.add.at(reads, (reader, source), 1)
        for p in range(processes) if not first else ():
            mine = np.flatnonzero(reader == p)[:4]
            begins[p] = [f"{Path(paths[source[i]]).name} {block[i]:,}" for i in mine]
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
        lines[0] += f", those that data.skip={config.data.skip} leaves out among them"
    lines += [f"order: {d:,} from {p}, {d / len(s):.2f} epochs" for d, p, s in zip(drawn, paths, sources, strict=True)]
    for p in range(processes):
        share = ", ".join(f"{reads[p, j]:,} of {Path(path).name}" for j, path in enumerate(paths))
        lines.append(f"order: process {p} of {processes} reads {share}; first {', '.join(begins[p])}")
    return lines


def _once(part: np.ndarray, seen: np.ndarray, epoch: str, blocks: Blocks, findings: Findings) -> None:
    """Marks the blocks `part` as `seen`; those that are already, or come twice, are findings."""
    if part.min() < 0 or part.max() >= len(seen):
        findings.add("coverage", name_of(blocks), f"{epoch}: block {part.max():,} of {len(seen):,} is asked for")
        part = part[(part >= 0) & (part < len(seen))]
    values, times = np.unique(part, return_counts=True)
    again = values[(times > 1) | seen[values]]
    findings.add_blocks("coverage", blocks, again, lambda _: f"is read more than once in {epoch}")
    seen[values] = True


# -- the page -------------------------------------------------------------------------------------------------------------


def page(surveys: list[Survey], lines: list[str], verdict: str, findings: list[str], n_samples: int) -> str:
    """All of it as one HTML file, its pictures inside."""
    items = lambda rows: "<ul>" + "".join(f"<li>{html.escape(row)}</li>" for row in rows) + "</ul>"
    parts = [f"<h1>{verdict}</h1>", items(findings), items(lines)]
    for found in surveys:
        picture = base64.b64encode(draw(found)).decode()
        parts.append(f"<h2>{html.escape(found.name)}</h2><p>{found.summary()}</p><img src='data:image/png;base64,{picture}'>")
        common = np.argsort(-found.counts_V, kind="stable")[:30]
        share = found.counts_V / max(found.tokens, 1)
        shown = (f"{found.text(common[i : i + 1])!r} ({common[i]}) {share[common[i]]:.2%}" for i in range(len(common)))
        parts.append("<p>most common: " + html.escape(", ".join(shown)) + "</p>")
        parts += [f"<h3>{html.escape(where)}</h3><pre>{html.escape(text)}</pre>" for where, text in found.samples(n_samples)]
    style = "body{font-family:sans-serif;max-width:75em;margin:2em auto}pre{white-space:pre-wrap;background:#eee;padding:1em}"
    head = f"<!doctype html><meta charset='utf-8'><title>audit</title><style>{style}</style>"
    return head + "\n".join(parts) + "\n"


def draw(found: Survey) -> bytes:
    """A PNG: how long blocks and documents are, and how often tokens come."""
    from matplotlib.figure import Figure  # half a second, which a mistaken command need not wait for

    figure = Figure(figsize=(13, 3.5), layout="constrained")
    blocks, documents, tokens = figure.subplots(1, 3)
    width = max(-(-len(found.lengths) // 50), 1)
    bins = np.arange(0, len(found.lengths) + width, width)
    blocks.hist(np.arange(len(found.lengths)), bins, weights=found.lengths, log=True)
    blocks.set(xlabel="tokens in a block", ylabel="blocks")
    there = np.flatnonzero(found.documents)
    if there.size:
        edges = 2.0 ** (np.arange(there[0], there[-1] + 2) / OCTAVE)
        documents.stairs(found.documents[there[0] : there[-1] + 1], edges, fill=True)
    documents.set(xlabel="tokens in a document", ylabel="documents", xscale="log")
    ranked = np.sort(found.counts_V)[::-1]
    ranked = ranked[ranked > 0]
    tokens.plot(np.arange(1, len(ranked) + 1), ranked)
    tokens.set(
        xlabel=f"rank of a token ({len(ranked):,} of {found.vocab_size:,} occur)", ylabel="times", xscale="log", yscale="log"
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
    """Looks at the sources in `paths`, prints what it finds and writes the page; returns the findings. Raises UserError.

    `seq_len`: S of LITPKDS files, which do not say it. `samples`: blocks of each split to show as text. `allow`: of `ALLOWED`,
    what is told and is not wrong.
    """
    findings, began = Findings(), time.perf_counter()
    opened = [blocks for path in paths for blocks in open_splits(path, seq_len, findings)]
    surveys, lines = [], []
    with _progress(sum(map(len, opened)), "reading") as advance:
        for blocks in opened:
            surveys.append(survey(blocks, findings, advance))
    if surveys:
        n = duplicates(surveys, findings)
        lines += [f"{found.name}: {found.summary()}" for found in surveys] + [f"{n:,} blocks are there a second time"]
    seconds, tokens = time.perf_counter() - began, sum(found.tokens for found in surveys)
    lines.append(f"{tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} a second")
    if config is not None:
        lines += coverage(config, feed.open_sources(config), processes, findings)
    found, allowed = findings.all(allow)
    n = sum(times for (kind, _), times in findings.times.items() if not kind.startswith(allow))
    verdict = f"{n:,} findings" if found else "nothing wrong found"
    page_file.write_text(page(surveys, [*lines, *allowed], verdict, found, samples), encoding="utf-8")
    for line in [*lines, *(f"allowed: {line}" for line in allowed), *(f"wrong: {line}" for line in found)]:
        print(line)
    print(verdict, f"({page_file})")
    return found


def _shown(items: range, what: str) -> Iterator[int]:
    with _progress(len(items), what) as advance:
        for item in items:
            yield item
            advance(1)


@contextlib.contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A line on the terminal, if there is one."""
    console = rich.console.Console(stderr=True)
    columns = what, rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(), rich.progress.TimeRemainingColumn()
    with rich.progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda n: progress.advance(task, n)


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tinyllama_jax.data.audit", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("dirs", nargs="*", metavar="DIR", help="data sets; those of --config by default")
    parser.add_argument("--config", help="a training config, and --section.key=value on top: what its run would read")
    parser.add_argument("--processes", type=int, metavar="N", help="of that run, each with one device (1)")
    parser.add_argument("--seq-len", type=int, metavar="S", help="of LITPKDS files (the config's, or 2048)")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="blocks of each split shown as text (3)")
    parser.add_argument("--page", type=Path, default=Path("audit.html"), metavar="FILE", help="what it writes (audit.html)")
    parser.add_argument("--allow", default="", metavar="KINDS", help=f"{','.join(ALLOWED)}: told, and not wrong (none)")
    args, rest = parser.parse_known_args(_joined(argv))
    allow = tuple(filter(None, args.allow.split(",")))
    if unknown := set(allow) - set(ALLOWED):
        raise UserError(f"--allow {args.allow}: {unknown.pop()} is none of {', '.join(ALLOWED)}")
    if args.page.suffix != ".html":
        raise UserError(f"--page {args.page}: is a page, and its name ends in .html")
    if not args.config and (rest or args.processes):
        raise UserError(f"{rest[0] if rest else '--processes'}: is about a training run; give its --config too")
    for option in ("processes", "seq_len", "samples"):
        if (value := getattr(args, option)) is not None and value < (option != "samples"):
            raise UserError(f"--{option.replace('_', '-')} {value}: must be positive")
    config = config_lib.override(config_lib.read(args.config), config_lib.pairs(rest)) if args.config else None
    paths = args.dirs or (list(config.data.sources) if config else [])
    if not paths:
        raise UserError("name a data set: python -m tinyllama_jax.data.audit DIR, or --config CONFIG for those of a run")
    seq_len = args.seq_len or (config.model.seq_len if config else 2048)
    return WRONG if audit(paths, args.page, config, args.processes or 1, seq_len, args.samples, allow) else 0


def _joined(argv: list[str]) -> list[str]:
    """`--section.key value` as one word: the value is no DIR."""
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
