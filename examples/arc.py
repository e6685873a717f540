"""The whole arc on this computer, offline: pre-training, fine-tuning, preferences, evaluation, exports, a chat (`make arc`).

python -m examples.arc [--workdir runs/arc]

1. A text that states facts, the demo's corpus and tokenizer, and a base model that reads them.
2. Fine-tuning on questions and answers (SFT), of which half of the single answers run on into user turns that nobody wrote,
   as conversations cut out of web pages do.
3. Preferences (DPO): answers that are right and stop, against answers that run on or belong to another question.
4. After each of the three, the same measures on held-out questions; the table at the end says what each stage improved.
   Then the final model's own answers, with and without retrieval.

Stopped at any moment, the same command resumes, and finished stages are not repeated. The exit code is 1 if a claim fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

from examples import arc_facts, arc_measures, demo_corpus
from examples.demo import fresh, say
from tinyllama_jax.base import cli
from tinyllama_jax.base import config as config_lib
from tinyllama_jax.base.config import Config
from tinyllama_jax.base.errors import UserError, run_main

CONFIG = "configs/arc.py"
QUESTIONS = 500  # held out
SFT_STEPS, DPO_STEPS = 120, 100  # for the pre-training steps of CONFIG; fewer of these give fewer of those
CHAT = "--data.template=zephyr --data.document_mask=true --optim.weight_decay=0"
SFT = f"{CHAT} --optim.peak_lr=1e-3 --optim.min_lr=1e-4"
DPO = f"{CHAT} --optim.peak_lr=2e-4 --optim.min_lr=2e-5 --train.dpo_beta=0.1"
RUN_ON = 0.5  # of the answers to a single question in the data of SFT
WRONG = 0.7  # of the pairs of DPO have another question's answer as the rejected one; the others run on
PAIRS = 19  # of each step of DPO: its 8 sequences hold so many, so that all are seen once
COPIES = 6  # of each statement of a fact in the text, in different neighbourhoods


def main(argv: list[str]) -> int:
    """Runs the arc; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--workdir", type=Path, default=Path("runs/arc"), help="folder for everything that the arc makes (%(default)s)")
    add("--steps", type=int, help="pre-training steps (those of the config); the other stages in proportion")
    add("--questions", type=int, default=QUESTIONS, metavar="N", help="held-out questions (%(default)s)")
    add("--glosses", type=Path, metavar="FILE", help="words of your own: a word, a tab and its gloss in each line (none)")
    args = parser.parse_args(argv)
    if args.questions < 4 or (args.steps is not None and args.steps < 1):
        raise UserError(f"--questions {args.questions}, --steps {args.steps}: at least 4 questions and 1 step")
    if args.glosses and not args.glosses.is_file():
        raise UserError(f"--glosses {args.glosses}: no such file; write a word, a tab and its gloss in each line")
    return arc(args.workdir, CONFIG, args.steps, args.questions, args.glosses)


def arc(
    work: Path,
    config_file: str,
    steps: int | None = None,
    n: int = QUESTIONS,
    glosses: Path | None = None,
    stdlib: Path | None = None,
) -> int:
    """Runs all stages in `work`, with `n` held-out questions and the modules in `stdlib` (default: this Python's)."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the model is small enough for a CPU
    started = time.monotonic()
    config, sizes = placed(config_file, work, steps)
    facts = arc_facts.gather(stdlib, glosses)
    taught, asked = arc_facts.held_out(facts, n)
    corpus = demo_corpus.fingerprint(stdlib)
    check(
        work,
        config,
        {"corpus": corpus, "facts": hashlib.sha256(repr(facts).encode()).hexdigest()[:16], "questions": n, "sizes": sizes},
    )
    from tinyllama_jax.hub import gguf

    gguf.package()  # refuses at once if it is not installed: it is needed at the end
    if importlib.util.find_spec("bm25s") is None:  # importing it would ask JAX for its devices before the training does
        raise UserError("bm25s is not installed: pip install '.[retrieve]'")

    # 1. the text, the tokenizer, the base model
    if not (work / "corpus").is_dir():
        make_corpus(work / "corpus", facts, stdlib)
    if not (work / "tokenizer").is_dir():
        make_tokenizer(work / "tokenizer", work / "corpus", config)
    make_data(work, config)
    train("train", work / "base", sizes["base"], ["--config", config_file, *sources(config), *size(config, sizes["base"], 1)])
    questions = arc_facts.questions(asked)
    stages = {"base": measured(work, "base", questions)}

    # 2. fine-tuning
    if not (work / "chats").is_dir():
        make_chats(work / "chats", taught, asked, PAIRS * sizes["dpo"])
    origin = [f"--init.from={work / 'base'}", f"--data.sources={work / 'chats/sft.jsonl'}"]
    train("sft", work / "sft", sizes["sft"], ["--config", config_file, *origin, *SFT.split(), *size(config, sizes["sft"], 8)])
    stages["sft"] = measured(work, "sft", questions)

    # 3. preferences
    origin = [f"--init.from={work / 'sft'}", f"--data.sources={work / 'chats/dpo.jsonl'}"]
    train("dpo", work / "dpo", sizes["dpo"], ["--config", config_file, *origin, *DPO.split(), *size(config, sizes["dpo"], 8)])
    stages["dpo"] = measured(work, "dpo", questions)

    # 4. exports, retrieval and a chat
    export(work)
    if not (work / "retrieve").is_dir():
        partial = fresh(work / "retrieve")
        arc_facts.write_retrieval(partial, facts, questions)
        partial.rename(work / "retrieve")
    answers = arc_measures.retrieved(work / "retrieve", work / "dpo")
    if not (work / "task/arc_choices.yaml").is_file():
        (work / "task").mkdir(exist_ok=True)
        arc_measures.write_task(work / "task", work / "dpo", questions)
    if not (work / "chat.txt").is_file():
        talk(work, taught)
    text, code = conclusion(work, stages, answers, time.monotonic() - started)
    say(text)
    return code


def placed(config_file: str, work: Path, steps: int | None) -> tuple[Config, dict[str, int]]:
    """(the base model's config with its data in `work`, the steps of each stage)."""
    config = cli.read(config_file)
    every = {str(work / "data" / Path(path).name): weight for path, weight in config.data.sources.items()}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=every))
    share = (steps or config.train.steps) / config.train.steps
    sizes = {"base": steps or config.train.steps}
    return config, sizes | {name: max(2, round(share * n)) for name, n in {"sft": SFT_STEPS, "dpo": DPO_STEPS}.items()}


def sources(config: Config) -> list[str]:
    """The option of `train` that names the data."""
    return ["--data.sources=" + ",".join(f"{path}:{weight}" for path, weight in config.data.sources.items())]


def size(config: Config, steps: int, larger: int) -> list[str]:
    """The options for a stage of `steps` steps of `larger` sequences, or for 1 of the config's own."""
    every = [f"--train.steps={steps}", f"--log.eval_every={max(1, steps // 4)}"]
    if larger == 1:
        return [*every, f"--optim.warmup_steps={min(config.optim.warmup_steps, steps // 4)}"]
    tokens = [f"--train.tokens_per_step={larger * config.model.seq_len}", f"--train.seqs_per_device={larger}"]
    return [*every, *tokens, f"--optim.warmup_steps={steps // 10}", "--checkpoint.every=50"]


def check(work: Path, config: Config, inputs: dict) -> None:
    """Writes what the arc is made from into `work`. Raises UserError if `work` was made from something else."""
    own = [Path(__file__).with_name(f"{name}.py") for name in ("arc_facts", "arc_measures")]
    settings = {key: value for key, value in config_lib.flat(config).items() if key not in ("workdir", "data.sources")}
    inputs = {
        **inputs,
        "config": settings,
        "options": [SFT, DPO, RUN_ON, WRONG, PAIRS, COPIES],
        "code": [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in own],
    }
    inputs, file = json.loads(json.dumps(inputs)), work / "made_from.json"
    if file.is_file():
        before = json.loads(file.read_text())
        if changed := [key for key in inputs if before.get(key) != inputs[key]]:
            raise UserError(f"{work}: was made with other {', '.join(changed)}; delete it, or choose another --workdir NEW")
        return
    work.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(inputs, indent=1) + "\n")
    partial.replace(file)


def make_corpus(folder: Path, facts: list[arc_facts.Fact], stdlib: Path | None) -> None:
    """Writes the demo's text and code, and the text that states the facts."""
    partial = fresh(folder)
    demo_corpus.gather(partial, stdlib)
    arc_facts.write_text(partial, facts, COPIES)
    partial.rename(folder)
    words = sum(fact.kind == "word" for fact in facts)
    say(f"corpus: {len(facts):,} facts, of them {words:,} words with their glosses; and the demo's text and code")


def make_tokenizer(folder: Path, corpus: Path, config: Config) -> None:
    """Writes tokenizer.model, trained on equal parts of the three sources."""
    from tinyllama_jax.data.prepare import vocabulary

    texts = {}
    for path in config.data.sources:
        with (corpus / f"{Path(path).name}.train.jsonl").open(encoding="utf-8") as f:
            texts[path] = [json.loads(line)["text"] for line in f]
        random.Random(0).shuffle(texts[path])
    least, sentences = min(sum(map(len, documents)) for documents in texts.values()), []
    for documents in texts.values():
        used = 0
        for document in documents:
            if used < least:
                sentences.append(document)
                used += len(document)
    partial = fresh(folder)
    (partial / "tokenizer.model").write_bytes(vocabulary.train(sentences, config.model.vocab_size))
    partial.rename(folder)
    say(f"tokenizer: SentencePiece BPE, {config.model.vocab_size:,} pieces")


def make_data(work: Path, config: Config) -> None:
    """Writes the blocks of each source that is not there yet."""
    from tinyllama_jax import prepare

    for path in config.data.sources:
        name = Path(path).name
        if not (Path(path) / "manifest.json").is_file():
            prepare.prepare(
                train=[work / "corpus" / f"{name}.train.jsonl"],
                validation=[work / "corpus" / f"{name}.validation.jsonl"],
                tokenizer=work / "tokenizer",
                output=path,
                seq_len=config.model.seq_len,
            )


def make_chats(folder: Path, taught: list[arc_facts.Fact], asked: list[arc_facts.Fact], pairs: int) -> None:
    """Writes sft.jsonl, and dpo.jsonl with `pairs` pairs."""
    partial = fresh(folder)
    arc_facts.write_conversations(partial / "sft.jsonl", taught, RUN_ON)
    arc_facts.write_pairs(partial / "dpo.jsonl", taught, pairs, WRONG)
    partial.rename(folder)
    say(f"chats: conversations and pairs about {len(taught):,} facts; {len(asked):,} others are for the evaluation alone")


def train(command: str, run: Path, steps: int, arguments: list[str]) -> None:
    """Runs `python -m tinyllama_jax.COMMAND`, unless its run is complete. Leaves with its exit code if that is not 0."""
    from tinyllama_jax import dpo, sft
    from tinyllama_jax import train as train_lib

    if (run / "checkpoints" / str(steps)).exists():
        return
    arguments = [*arguments, f"--workdir={run}"]
    say(f"\n{command}: {shlex.join(['python', '-m', f'tinyllama_jax.{command}', *arguments])}")
    if code := {"train": train_lib, "sft": sft, "dpo": dpo}[command].main(arguments):
        raise SystemExit(code)


def measured(work: Path, stage: str, questions: list[arc_facts.Question]) -> dict[str, list[float]]:
    """What is measured of a stage, kept in `work`/measures."""
    began = time.monotonic()
    values = arc_measures.saved(work / "measures" / f"{stage}.json", work / stage, questions)
    if (seconds := time.monotonic() - began) > 1:
        say(f"{stage}: measured on {len(questions):,} held-out questions in {seconds:.0f} s")
    return values


def export(work: Path) -> None:
    """Exports the final run to `work`/hf for Transformers and to `work`/arc.gguf for llama.cpp."""
    from tinyllama_jax import convert

    if not (work / "hf").is_dir():
        convert.export(work / "dpo", work / "hf")
    if not (work / "arc.gguf").is_file():
        convert.export_gguf(work / "dpo", work / "arc.gguf")


def talk(work: Path, facts: list[arc_facts.Fact]) -> None:
    """Writes `work`/chat.txt: a conversation of two turns with the final model, through the command `chat`."""
    first, second = [fact for fact in facts if fact.kind == "object" and "." in fact.name][:2]
    lines = [f"What does `{first.name}` do?", f"And `{second.name}`?"]
    command = [sys.executable, "-m", "tinyllama_jax.chat", "--checkpoint", str(work / "dpo"), "--greedy"]
    done = subprocess.run([*command, "--max-new-tokens", "64"], input="\n".join(lines) + "\n", capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"chat ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    partial = work / "chat.partial"
    partial.write_text(f"> {lines[0]}\n(and then)\n> {lines[1]}\n{done.stdout}", encoding="utf-8")
    partial.replace(work / "chat.txt")


def conclusion(work: Path, stages: dict[str, dict[str, list[float]]], answers: str, seconds: float) -> tuple[str, int]:
    """(the tables, of which `answers` is one, the claims and how to talk to the model; the exit code)."""
    claims = arc_measures.claims(stages)
    inside = Path(sys.executable).is_relative_to(Path.cwd())
    python = shlex.join([os.path.relpath(sys.executable) if inside else sys.executable, "-m"])
    questions = len(stages["base"]["choice"])
    lines = [
        "",
        (work / "chat.txt").read_text(encoding="utf-8"),
        f"After each stage, on {questions:,} questions about facts that only the text of pre-training states:",
        "",
        arc_measures.table(stages),
        "",
        "Each stage improves what it is for by more than two standard errors:",
        *(f"  {line}" for _, line in claims),
        "",
        "The final model's own answers to the same questions, without and with passages of an index of the facts:",
        "",
        answers,
        "",
        f"made in {seconds:.0f} s; {work / 'hf'} is for Transformers, {work / 'arc.gguf'} for llama.cpp",
        "",
        "Talk to it:",
        f"  {python} tinyllama_jax.chat --checkpoint {work / 'dpo'}",
        f"  {python} tinyllama_jax.chat --checkpoint {work / 'dpo'} --retrieve {work / 'retrieve/index'}",
        f"  {python} tinyllama_jax.serve --checkpoint {work / 'dpo'}",
        f"  {python} tinyllama_jax.generate --checkpoint {work / 'base'} --prompt 'The purpose of'",
        "Score it again, with lm-evaluation-harness:",
        f"  {python} tinyllama_jax.evaluate --checkpoint {work / 'dpo'} --tasks arc_choices --include {work / 'task'}",
    ]
    return "\n".join(lines), 0 if all(holds for holds, _ in claims) else 1


if __name__ == "__main__":
    run_main(main)
