"""Scores a checkpoint: tasks of lm-evaluation-harness, or perplexity and bits per byte on a prepared data set.

python -m tinyllama_jax.evaluate --checkpoint PATH --tasks commonsense
python -m tinyllama_jax.evaluate --checkpoint PATH --data-set DIR
python -m tinyllama_jax.evaluate --checkpoint PATH --questions FILE --retrieve INDEX
python -m tinyllama_jax.evaluate --checkpoint PATH --passkey 20
python -m tinyllama_jax.evaluate --checkpoint PATH --tasks piqa --against DIR
"""

import argparse
import contextlib
import json
import re
import sys
from pathlib import Path

from tinyllama_jax.base import files, store
from tinyllama_jax.base.config import Data
from tinyllama_jax.base.errors import UserError, run_main
from tinyllama_jax.data import chat, feed
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.evals import held_out, in_training, passkey, questions
from tinyllama_jax.evals import tasks as task_lib
from tinyllama_jax.evals.contamination import COMMON
from tinyllama_jax.evals.score import Scorer
from tinyllama_jax.inference import options, weights
from tinyllama_jax.inference.retrieval import Index
from tinyllama_jax.inference.weights import Loaded
from tinyllama_jax.run.checkpoint import load_config
from tinyllama_jax.run.seals import find_step


def main(argv: list[str]) -> int:
    """Prints scores, and writes them to --output; returns the exit code."""
    args = _arguments(argv)
    step = find_step(args.checkpoint, args.step) if (Path(args.checkpoint) / "checkpoints").is_dir() else None
    rows = questions.read(args.questions)[: args.limit] if args.questions else []
    index = options.index(args)
    with contextlib.redirect_stdout(sys.stderr):
        # before the weights, which can take minutes: a wrong name or a missing file is known at once
        names = [] if args.tasks is None else task_lib.named(args.tasks)
        wanted = in_training.harness("--tasks").tasks(names, args.include, args.data) if names else []
        loaded = weights.load(args.checkpoint, args.step, args.weights)
    print(options.introduced(args.checkpoint, args, loaded), file=sys.stderr, flush=True)
    record = {
        "checkpoint": str(args.checkpoint),
        "step": step,
        "precision": loaded.model.compute_dtype,
        "weights": args.weights,
    }
    if wanted:
        record |= _tasks(args, loaded, wanted, index, f"{args.checkpoint}" + ("" if step is None else f", step {step:,}"))
    if rows:
        record |= {"questions": _questions(args, loaded, rows, index)}
    if args.data_set:
        record |= {"data_set": _held_out(args, loaded, step)}
    if args.passkey:
        record |= {"passkey": _passkey(args, loaded)}
    if args.longer and args.data_set:
        record |= {"by_position": _by_position(args, loaded)}
    record["results"] = _results(record)
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    if args.output:
        files.write(args.output, text)
    if step is not None and args.limit is None and record["results"]:
        name = re.sub("[/ ]", "_", f"{step}-{'-'.join(record['results'])[:100]}.json")
        _keep(Path(args.checkpoint) / "evals" / name, text)
    return 0


def _results(record: dict) -> dict[str, dict[str, float | None]]:
    """Task or data set -> metric -> score, and its standard error: what `report` draws."""
    end = " with passages" if "retrieve" in record else ""  # else they would pass for the same scores in a report
    metrics = {f"{task}{end}": row["metrics"] for task, row in record.get("tasks", {}).items()}
    if prepared := record.get("data_set"):
        loss = {"value": prepared["loss"], "stderr": prepared["loss_stderr"]}
        per_byte = {"value": prepared["bits_per_byte"], "stderr": None}
        metrics[f"{Path(prepared['path']).name} {prepared['split']}"] = {"loss": loss, "bits_per_byte": per_byte}
    if asked := record.get("questions"):
        metrics |= {f"{Path(asked['path']).name}{end}": scores for end, scores in asked["scores"].items()}
    if passkeys := record.get("passkey"):
        rows = {"accuracy": passkeys} | {f"accuracy at {row['depth']:.0%}": row for row in passkeys["depths"]}
        scaled = "" if passkeys["rope_scaling"] == 1 else f" {passkeys['rope_type'].split(',')[0]}"
        by_depth = {metric: {"value": row["accuracy"], "stderr": row["stderr"]} for metric, row in rows.items()}
        metrics[f"passkey {passkeys['context']}{scaled}, {passkeys['tries']} tries"] = by_depth
    ends = {"": "value", "_stderr": "stderr"}
    named = lambda scores: {f"{metric}{end}": score[key] for metric, score in scores.items() for end, key in ends.items()}
    return {task: named(scores) for task, scores in metrics.items()}


def _keep(path: Path, text: str) -> None:
    """Writes scores into the run folder, for `report`; says so if it cannot."""
    try:
        path.parent.mkdir(exist_ok=True)
        files.write(path, text)
    except OSError as error:
        print(f"the scores are not kept in the run folder: {error}", file=sys.stderr)


def _bos(args: argparse.Namespace, loaded: Loaded) -> bool:
    """Whether each text begins with bos."""
    return loaded.begin_with_bos if args.bos == "auto" else args.bos == "yes"


def _tasks(args: argparse.Namespace, loaded: Loaded, wanted: list, index: Index | None, name: str) -> dict:
    """Runs tasks and prints their scores; returns what is recorded."""
    harness = in_training.harness("--tasks")
    bos = _bos(args, loaded)
    with contextlib.redirect_stdout(sys.stderr):
        results = harness.run(harness.HarnessModel(loaded, bos, args.batch, index=index), wanted, args.limit, args.run_code)
    samples = results.pop("samples")
    for task, row in results["tasks"].items():
        for metric, score in row["metrics"].items():
            value = "none" if score["value"] is None else f"{score['value']:.4f}"
            error = "" if score["stderr"] is None else f" +- {score['stderr']:.4f}"
            print(f"{task}: {metric} {value}{error}, {row['items']:,} of {row['of']:,} items")
    metrics = {task: results["tasks"][task]["metrics"] for task in task_lib.COMMONSENSE if task in results["tasks"]}
    scores = {task: metrics[task][task_lib.METRIC[task]] for task in metrics}
    if scores:
        name += ", with passages" if index else ""
        print("\n" + task_lib.table(name, {task: (score["value"], score["stderr"]) for task, score in scores.items()}))
        print("\nThe other rows: EVAL.md of github.com/jzhang38/TinyLlama, and the card of TinyLlama_v1.1: 0-shot, fp32, most")
        print(f"likely without bos. Ours: {loaded.model.compute_dtype}, {'with' if bos else 'without'} bos.")
    if args.against:
        results |= {"contamination": _contamination(wanted, samples, args.against)}
    average = (
        sum(score["value"] for score in scores.values()) / len(scores) if len(scores) == len(task_lib.COMMONSENSE) else None
    )
    return {"bos": {"asked": args.bos, "used": bos}, "limit": args.limit, "commonsense_average": average, **results}


def _questions(args: argparse.Namespace, loaded: Loaded, rows: list, index: Index | None) -> dict:
    """Asks questions, with passages too if there is an index, and prints exact match and F1; returns what is recorded."""
    template = chat.of_folder(Path(args.checkpoint).absolute(), loaded.tokenizer)
    ask = lambda index: questions.summary(questions.answered(loaded, rows, template, index, args.batch or 8))
    scores = {"": ask(None)} | ({" with passages": ask(index)} if index else {})
    print(f"{args.questions}: {len(rows):,} questions, {f'template {template.name}' if template else 'as plain text'}")
    print(questions.table({end.strip() or "without passages": columns for end, columns in scores.items()}))
    made = {"path": str(args.questions), "sha256": files.sha256(args.questions), "items": len(rows)}
    used = index and index.settings(loaded.model.seq_len)
    return {**made, "template": template and template.name, "retrieve": used, "scores": scores}


def _contamination(wanted: list, samples: dict, against: list[Blocks]) -> dict:
    """Looks for the tasks' items in prepared sets and prints how many stand there; returns what is recorded."""
    out = in_training.harness("--against").contaminated(wanted, samples, against)
    print(f"\nlooked for the items in {', '.join(row['path'] for row in out['against'])}: {out['tokens']:,} tokens, "
          f"{out['text_mb']:,.1f} MB of text, {out['text_mb'] / out['seconds']:.1f} MB/s")  # fmt: skip
    for task, row in out["tasks"].items():
        common = f"; {len(row['common']):,} more share only n-grams of over {COMMON} documents" if row["common"] else ""
        print(f"{task}: n-grams of {row['n']} words of {row['dirty']:,} of {row['items']:,} items ({row['share']:.1%}) "
              f"stand there{common}")  # fmt: skip
        for metric, scores in row["scores"].items():
            named = {group: score["value"] for group, score in scores.items() if score and score["value"] is not None}
            print(f"{task}: {metric} " + ", ".join(f"{value:.4f} on {group} items" for group, value in named.items()))
    return out


def _held_out(args: argparse.Namespace, loaded: Loaded, step: int | None) -> dict:
    """Scores a prepared data set and prints the scores; returns what is recorded."""
    blocks = feed.open_source(args.data_set, args.split, loaded.model.seq_len)
    config = None if step is None else load_config(args.checkpoint)
    data = config.data if config else Data({str(args.data_set): 1})  # only a run says how documents were masked
    edge = feed.eos_id(config, [blocks]) if config and blocks.kind == "text" else -1
    scores = held_out.scores(Scorer(loaded, args.batch), loaded.tokenizer, blocks, data, edge, args.limit)
    error = "" if scores["loss_stderr"] is None else f" +- {scores['loss_stderr']:.4f}"
    print(f"{args.data_set}, {args.split}: loss {scores['loss']:.4f}{error}, perplexity {scores['perplexity']:.3f}, "
          f"accuracy {scores['accuracy']:.4f}; {scores['tokens']:,} tokens of {scores['blocks']:,} blocks")  # fmt: skip
    if scores["bits_per_byte"] is None:
        print(f"bits per byte: not known: {scores.get('no_bytes', 'no token stands for a byte')}")
    else:
        print(f"bits per byte: {scores['bits_per_byte']:.4f} over {scores['bytes']:,} bytes")
    where = {"path": str(args.data_set), "split": args.split, "manifest": blocks.manifest_sha256}
    return where | {"document_mask": data.document_mask, "eod_mask_loss": data.eod_mask_loss} | scores


def _by_position(args: argparse.Namespace, loaded: Loaded) -> dict:
    """Scores a prepared data set by position in a longer context and prints the scores; returns what is recorded."""
    model = held_out.lengthened(loaded.model, args.longer, args.rope)
    blocks = feed.open_source(args.data_set, args.split, model.seq_len)
    parts = held_out.by_position(Scorer(loaded._replace(model=model), args.batch), loaded.tokenizer, blocks, args.limit)
    print(f"context {model.seq_len:,}, {args.longer:g} times the trained one; RoPE {model.rope_type} x {model.rope_scaling:g}")
    for part in parts:
        print(f"positions {part['from']:,} to {part['to'] - 1:,}: perplexity {part['perplexity']:.3f}")
    return {"context": model.seq_len, "rope_type": model.rope_type, "rope_scaling": model.rope_scaling, "parts": parts}


def _passkey(args: argparse.Namespace, loaded: Loaded) -> dict:
    """Asks for hidden numbers and prints the accuracy by their depth; returns what is recorded."""
    model = held_out.lengthened(loaded.model, args.longer or 1, args.rope)
    bos = _bos(args, loaded)
    print(f"passkey: context {model.seq_len:,}; RoPE {model.rope_type} x {model.rope_scaling:g}")
    mean, scored = passkey.scores(Scorer(loaded._replace(model=model), args.batch), loaded.tokenizer, bos, args.passkey)
    for depth, row in scored.items():
        error = "" if row.stderr is None else f" +- {row.stderr:.3f}"
        print(f"passkey at {depth:.0%} of the text: accuracy {row.accuracy:.3f}{error}, {row.tries:,} tries")
    scaling = {"context": model.seq_len, "rope_type": model.rope_type, "rope_scaling": model.rope_scaling}
    depths = [{"depth": depth, **row._asdict()} for depth, row in scored.items()]
    return {**scaling, "bos": bos, "seed": passkey.SEED, **mean._asdict(), "depths": depths}


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tinyllama_jax.evaluate", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    options.add_checkpoint(parser, draft=False)
    add = parser.add_argument
    add("--tasks", help=f"{', '.join(task_lib.SUITES)}, or names of tasks of lm-evaluation-harness, separated by commas (none)")
    add("--bos", choices=("auto", "yes", "no"), default="auto", help="begin each text with bos; auto: as in training (auto)")
    add("--limit", type=int, metavar="N", help="the first N items of each task, or blocks (all)")
    add("--batch", type=int, metavar="N", help="rows computed at a time (as many as 1,024 tokens on a CPU, 16,384 elsewhere)")
    add("--data", type=Path, metavar="DIR", help="local files DIR/TASK in place of the hub's, for the commonsense tasks (none)")
    add("--data-set", metavar="DIR", help="what `prepare` wrote, or LITPKDS files: loss, perplexity, bits per byte (none)")
    add("--split", default="validation", help="which split of --data-set (validation)")
    add("--against", metavar="DIR", help="prepared sets, with commas between: which items of --tasks stand there (none)")
    add("--passkey", type=int, metavar="N", help="N tries at each of five depths to repeat a number hidden in filler (none)")
    add("--longer", type=float, metavar="F", help="--passkey, and perplexity by position, in F times the context (1)")
    add("--rope", choices=("linear", "ntk", "yarn"), help="scale RoPE for --longer (as the model has it)")
    add("--include", type=Path, metavar="DIR", help="a folder with your own tasks' YAML files (none)")
    add("--run-code", action="store_true", help="let humaneval run the programs that the model writes (off)")
    add("--questions", type=Path, metavar="FILE", help="exact match and F1 of answers; rows with question and answer (none)")
    options.add_retrieval(parser)
    add("--output", type=Path, metavar="FILE", help="write the scores there as JSON (none)")
    args = parser.parse_args(argv)
    if args.tasks is None and args.data_set is None and args.questions is None and args.passkey is None:
        raise UserError("nothing to score: say --tasks commonsense, --data-set DIR, --questions FILE or --passkey 20")
    if args.retrieve is not None and args.tasks is None and args.questions is None:
        raise UserError(f"--retrieve {args.retrieve}: needs --tasks or --questions")
    if args.data_set is not None and not isinstance(store.place(args.data_set, "--data-set"), store.Remote):
        files.check_local("--data-set", args.data_set)
    if args.longer is not None and not ((args.data_set or args.passkey) and 1 / 64 <= args.longer <= 64):
        raise UserError(f"--longer {args.longer:g}: must lie between 1/64 and 64, and needs --data-set or --passkey")
    if args.rope and (args.longer is None or args.longer < 1):
        raise UserError(f"--rope {args.rope}: needs --longer of at least 1, such as --longer 2")
    for name in ("limit", "batch", "passkey"):
        if (value := getattr(args, name)) is not None and not 1 <= value < 2**31:
            raise UserError(f"--{name} {value}: must be at least 1, and less than 2^31")
    for name in ("data", "include"):
        if (path := getattr(args, name)) is not None:
            files.check_local(f"--{name}", path)
            if not path.is_dir():
                raise UserError(f"--{name} {path}: no such folder")
    args.against = _opened(args) if args.against is not None else []
    if args.output:
        files.check_local("--output", args.output)
        if args.output.is_dir() or not args.output.parent.is_dir():
            raise UserError(f"--output {args.output}: must be a file in a folder that exists")
    return args


def _opened(args: argparse.Namespace) -> list[Blocks]:
    """The sets of --against. Raises UserError if one is no prepared set, or there are no tasks to look for."""
    if args.tasks is None:
        raise UserError(f"--against {args.against}: looks for the items of tasks; name them with --tasks")
    paths = list(dict.fromkeys(path.strip() for path in args.against.split(",")))
    for path in paths:
        files.check_local("--against", path)
    return [feed.open_source(path, "train", 2_048) for path in paths]  # LITPKDS files have blocks of any length


if __name__ == "__main__":
    run_main(main)
