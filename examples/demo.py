"""Runs every stage on this computer, offline: corpus, tokenizer, data, training, export, samples (`make demo`).

python -m examples.demo [--workdir runs/demo]

Stopped at any moment, the same command resumes, and finished stages are not repeated. Heavy imports stand where they
are needed, so that a demo with nothing left to do ends at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from examples import demo_corpus
from tinyllama_jax import report
from tinyllama_jax.base import cli
from tinyllama_jax.base import config as config_lib
from tinyllama_jax.base.config import Config
from tinyllama_jax.base.errors import UserError, run_main
from tinyllama_jax.run import metrics

if TYPE_CHECKING:
    from tinyllama_jax.data.blocks import Blocks

CONFIG = "configs/demo.py"
PROMPTS = ("Return a list of", "This module", "def __init__(self")
SAMPLE_TOKENS = 60


def main(argv: list[str]) -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--workdir", default="runs/demo", help="folder for everything that the demo makes (%(default)s)")
    return demo(Path(parser.parse_args(argv).workdir), CONFIG)


def demo(work: Path, config_file: str, stdlib: Path | None = None) -> int:
    """Runs all stages in `work` with a config file and the modules in `stdlib` (default: this Python's). Raises UserError."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the model is small enough for a CPU
    started = time.monotonic()
    config, overrides = placed(cli.read(config_file), work)
    stages = Stages(work, config, stdlib)
    if stages.todo("corpus", work / "corpus"):
        make_corpus(work / "corpus", stdlib)
        stages.done("corpus")
    if stages.todo("tokenizer", work / "tokenizer"):
        make_tokenizer(work / "tokenizer", work / "corpus", config)
        stages.done("tokenizer")
    if stages.todo("data", work / "data"):
        make_data(work, config)
        stages.done("data")
    if stages.todo("run", work / "run/checkpoints" / str(config.train.steps)):
        stages.done("run")  # noted at the start: a run that was stopped resumes by itself
        if code := train(config, ["--config", config_file, *overrides]):
            return code
    if stages.todo("picture", work / "run/loss.png"):
        report.main([str(work / "run"), "--png"])
        stages.done("picture")
    if stages.todo("export", work / "hf"):
        export(work)
        stages.done("export")
    if stages.todo("samples", work / "samples.txt"):
        sample(work)
        stages.done("samples")
    say(conclusion(work, ["--config", config_file, *overrides[1:]], time.monotonic() - started))
    return 0


def placed(config: Config, work: Path) -> tuple[Config, list[str]]:
    """Returns the config with its run and data in `work`, and the options that `train` needs for that (none if unchanged)."""
    sources = {str(work / "data" / Path(path).name): weight for path, weight in config.data.sources.items()}
    if set(map(os.path.basename, sources)) != set(demo_corpus.SOURCES):
        raise UserError(f"data.sources: the demo has the sources {', '.join(demo_corpus.SOURCES)}, not {', '.join(sources)}")
    if (config.workdir, config.data.sources) == (str(work / "run"), sources):
        return config, []
    sources_option = ",".join(f"{path}:{weight}" for path, weight in sources.items())
    config = dataclasses.replace(config, workdir=str(work / "run"), data=dataclasses.replace(config.data, sources=sources))
    return config, [f"--workdir={config.workdir}", f"--data.sources={sources_option}"]


class Stages:
    """Records in WORK/stages.json what each stage was made from: an output is reused only if its inputs are unchanged."""

    def __init__(self, work: Path, config: Config, stdlib: Path | None):
        """Raises UserError if `work` holds a run that was made from other inputs."""
        self._file = work / "stages.json"
        settings = {key: value for key, value in config_lib.flat(config).items() if key not in ("workdir", "data.sources")}
        self._inputs = {
            "corpus": demo_corpus.fingerprint(stdlib),
            "tokenizer": {"vocab_size": config.model.vocab_size, "shares": list(config.data.sources.values())},
            "data": {"seq_len": config.model.seq_len},
            "run": settings,
            "picture": {},
            "export": {},
            "samples": {},
        }
        self._made = json.loads(self._file.read_text()) if self._file.is_file() else {}
        for key, before, after in self._changes():
            changed = f"{work} was made with {key}={before}, and it is now {after}"
            if (work / "run").exists():
                raise UserError(f"{changed}; delete {work} to start again, or choose another folder with --workdir NEW")
            say(f"{changed}; the stages that depend on it are repeated")

    def _changes(self) -> list[tuple[str, object, object]]:
        pairs = [(self._made.get(stage, inputs), inputs) for stage, inputs in self._inputs.items()]
        return [(key, made.get(key), inputs[key]) for made, inputs in pairs for key in inputs if made.get(key) != inputs[key]]

    def todo(self, stage: str, output: Path) -> bool:
        """Whether the stage has to run: its output is missing, incomplete, or made from other inputs."""
        return self._made.get(stage) != self._inputs[stage] or not output.exists()

    def done(self, stage: str) -> None:
        """Records that the stage is done; later stages then have to run again."""
        before = list(self._inputs)[: list(self._inputs).index(stage)]
        self._made = {name: self._inputs[name] for name in [*before, stage]}
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(self._made, indent=2) + "\n")
        partial.replace(self._file)


def say(text: str) -> None:
    """Prints a line at once, also into a pipe."""
    print(text, flush=True)


def fresh(folder: Path) -> Path:
    """Removes `folder` and returns an empty folder beside it, which is renamed to `folder` when it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    for path in (folder, partial):
        shutil.rmtree(path, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def make_corpus(folder: Path, stdlib: Path | None) -> None:
    """Writes text and code into `folder`, one jsonl file for each source and split."""
    partial = fresh(folder)
    counts = demo_corpus.gather(partial, stdlib)
    sizes = {source: (partial / f"{source}.train.jsonl").stat().st_size / 1e6 for source in demo_corpus.SOURCES}
    partial.rename(folder)
    say(
        f"corpus: {counts['modules']:,} modules of Python's library, {counts['held out']} of them for validation "
        f"({counts['skipped']} skipped): " + ", ".join(f"{source} {size:.1f} MB" for source, size in sizes.items())
    )


def make_tokenizer(folder: Path, corpus: Path, config: Config) -> None:
    """Writes tokenizer.model into `folder`."""
    shares = {Path(path).name: weight for path, weight in config.data.sources.items()}
    partial = fresh(folder)
    (partial / "tokenizer.model").write_bytes(demo_corpus.train_tokenizer(corpus, shares, config.model.vocab_size))
    partial.rename(folder)
    say(f"tokenizer: SentencePiece BPE, {config.model.vocab_size:,} pieces")


def make_data(work: Path, config: Config) -> None:
    """Writes the blocks of each source into `work`/data."""
    from tinyllama_jax import prepare

    shutil.rmtree(work / "data", ignore_errors=True)
    for source in demo_corpus.SOURCES:
        prepare.prepare(
            train=[work / "corpus" / f"{source}.train.jsonl"],
            validation=[work / "corpus" / f"{source}.validation.jsonl"],
            tokenizer=work / "tokenizer",
            output=work / "data" / source,
            seq_len=config.model.seq_len,
        )


def train(config: Config, arguments: list[str]) -> int:
    """Writes the unigram model's loss, then runs `python -m tinyllama_jax.train` with `arguments`. Returns its exit code."""
    from tinyllama_jax import train as train_lib

    run = Path(config.workdir)
    run.mkdir(exist_ok=True)
    baseline = unigram_loss(config)
    (run / report.UNIGRAM).write_text(json.dumps({"val_loss": baseline}) + "\n")
    say(f"to beat: a unigram model, {baseline:.3f} nats a token on the validation data")
    say(f"training: {shlex.join(['python', '-m', 'tinyllama_jax.train', *arguments])}")
    return train_lib.main(arguments)


def unigram_loss(config: Config) -> float:
    """Returns the validation loss of a unigram model in nats a token, over the same tokens as the run's own validation loss.

    The model has the frequencies of the training tokens, mixed as in training, with add-one smoothing.
    """
    from tinyllama_jax.data import feed

    V = config.model.vocab_size
    sources = feed.open_sources(config)
    train_V = [label_counts(blocks, V) for blocks in sources]
    validation_V = sum(label_counts(blocks, V) for blocks in feed.open_held_out(config, sources).values())
    return unigram_cross_entropy(train_V, list(config.data.sources.values()), validation_V)


def label_counts(blocks: Blocks, vocab_size: int) -> np.ndarray:
    """Counts how often each token is to be predicted in `blocks`: [V]."""
    tokens, length = blocks.read(np.arange(len(blocks)))
    real = np.arange(1, tokens.shape[1]) < length[:, None]
    return np.bincount(tokens[:, 1:][real], minlength=vocab_size)


def unigram_cross_entropy(train_V: list[np.ndarray], weights: list[float], validation_V: np.ndarray) -> float:
    """Returns -sum q log p in nats, for frequencies q of `validation_V`, and p of `train_V` mixed by `weights`; all counts [V].

    Add-one smoothing: p is (n f + 1) / (n + V), where f is the mixture's frequency and n the number of training tokens.
    """
    n = sum(counts.sum() for counts in train_V)
    f_V = sum(weight / sum(weights) * counts / counts.sum() for weight, counts in zip(weights, train_V, strict=True))
    p_V = (n * f_V + 1) / (n + len(f_V))
    return float(-(validation_V @ np.log(p_V)) / validation_V.sum())


def export(work: Path) -> None:
    """Exports the run to `work`/hf, which Transformers loads."""
    from tinyllama_jax import convert

    shutil.rmtree(work / "hf", ignore_errors=True)
    step = convert.export(work / "run", work / "hf")
    say(f"export: {work / 'hf'} holds step {step:,} for Hugging Face Transformers")


def sample(work: Path) -> None:
    """Writes `work`/samples.txt: the model's continuations of `PROMPTS`."""
    from tinyllama_jax.inference import weights
    from tinyllama_jax.inference.engine import Engine, Request
    from tinyllama_jax.inference.sampling import Sampling
    from tinyllama_jax.inference.text import first_tokens

    loaded = weights.load(work / "run")
    tokenizer, engine, sampling = loaded.tokenizer, Engine(loaded, slots=len(PROMPTS)), Sampling(temperature=0.6, top_p=0.9)
    stop = (tokenizer.eos_id,) if tokenizer.eos_id >= 0 else ()
    starts = [first_tokens(tokenizer, loaded.begin_with_bos, prompt) for prompt in PROMPTS]
    requests = [Request(start, SAMPLE_TOKENS, sampling, stop_ids=stop) for start in starts]
    for request in requests:
        engine.submit(request)
    while engine.busy:
        engine.step()
    answers = zip(PROMPTS, requests, strict=True)
    texts = [f"--- {prompt!r}\n{tokenizer.decode([*request.prompt, *request.tokens])}\n" for prompt, request in answers]
    partial = work / "samples.partial"
    partial.write_text("\n".join(texts), encoding="utf-8")
    partial.replace(work / "samples.txt")


def conclusion(work: Path, arguments: list[str], seconds: float) -> str:
    """Returns the final message: samples, the two losses, where the results are, and what to try next."""
    run, samples = work / "run", work / "samples.txt"
    loss = [row["val_loss"] for row in metrics.read(run) if row.get("val_loss") is not None][-1]
    baseline = report.unigram(run)
    inside = Path(sys.executable).is_relative_to(Path.cwd())
    python = shlex.join([os.path.relpath(sys.executable) if inside else sys.executable, "-m"])
    places = {
        work / "corpus": "text and code, a jsonl file for each source and split",
        work / "tokenizer": "the SentencePiece model",
        work / "data": "the corpus in blocks of tokens, with manifests",
        run: "checkpoints, config, metrics.jsonl, TensorBoard events, report.html, the loss curve loss.png",
        work / "hf": "the model for Hugging Face Transformers",
        samples: "the samples above",
    }
    width = max(len(str(path)) for path in places)
    lines = [
        "",
        samples.read_text(encoding="utf-8"),
        f"validation loss {loss:.3f} nats a token, a unigram model's {baseline:.3f}: {baseline - loss:.3f} less",
        f"made in {seconds:.0f} s" if seconds > 5 else "nothing was left to do",
        "",
        *(f"{path!s:{width}}  {what}" for path, what in places.items()),
        "",
        "Three commands to try next:",
        f"  {python} tinyllama_jax.generate --checkpoint {run} --prompt 'Returns the' --samples 3",
        f"  {python} tinyllama_jax.train {shlex.join(arguments)} --workdir runs/longer --train.steps 8000",
        f"  {python} tensorboard.main --logdir {run / 'tensorboard'}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
