"""Converts weights and data to and from other programs' formats.

python -m tinyllama_jax.convert to-torch --checkpoint RUN --output DIR            a run -> a Hugging Face folder
python -m tinyllama_jax.convert from-torch --checkpoint DIR --output RUN          Hugging Face or lit-gpt -> a run folder
python -m tinyllama_jax.convert to-litpkds --input DIR --prefix NAME --output DIR  prepared data -> the original's packed files
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tinyllama_jax.base import cli, dims, files, schedule
from tinyllama_jax.base import config as config_lib
from tinyllama_jax.base.config import Config, Model
from tinyllama_jax.base.errors import UserError, run_main
from tinyllama_jax.base.mixture_weights import weight_at
from tinyllama_jax.data import chat
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.export import litpkds
from tinyllama_jax.data.export import tokenizer as export_tokenizer
from tinyllama_jax.hub import card, litgpt, llama, tensor_files
from tinyllama_jax.run import checkpoint
from tinyllama_jax.run import folder as run_folder


def export(
    run: str | Path,
    output: str | Path,
    step: int | None = None,
    dtype: str = "float32",
    tokenizer: bool = True,
    allow_non_finite: bool = False,
) -> int:
    """Writes a folder for `AutoModelForCausalLM` and `AutoTokenizer` from a run's newest (or given) step; returns the step.

    float32, the dtype of the weights, loses nothing. `output` must be absent or empty. It appears when it is complete and
    Transformers gives the ids of training with its tokenizer. `tokenizer=False` copies the run's tokenizer unchanged and
    unchecked. Raises UserError, also for weights that are NaN or infinite unless `allow_non_finite`.
    """
    files.check_local("--checkpoint", run)
    run, output = Path(run), Path(output)
    if not (run / "checkpoints").is_dir() and llama.describes(run):
        raise UserError(f"--checkpoint {run}: is a Hugging Face folder already; name a run folder, as `train` makes")
    with _new_folder(output) as folder:
        params, config, step = checkpoint.load_params(run, step)
        for name, tensor in () if allow_non_finite else llama.to_hf(params, config.model):
            tensor_files.check_finite(name, tensor, f"{run}, step {step:,}")
        add_bos = tokenizer and tokenizer_lib.documents_begin_with_bos(run)
        ours = (
            _export_tokenizer(run / "tokenizer", folder, add_bos, config.model.seq_len) if tokenizer else _copy_of(run, folder)
        )
        bos, eos = (ours.bos_id, ours.eos_id) if ours else (-1, -1)
        llama.save_folder(params, config.model, folder, dtype, *(None if id_ < 0 else id_ for id_ in (bos, eos)))
        if (generation := run / "tokenizer/generation_config.json").is_file():
            shutil.copyfile(generation, folder / generation.name)
        template = _template(run, ours, folder) if tokenizer else None
        talk = template and partial(chat.encode, template, ours, begin_with_bos=False)
        if tokenizer and not export_tokenizer.check(folder, ours.encode, bos, eos, add_bos, talk):
            print(f"{output}: not checked whether Transformers reads this tokenizer as training did: it is not installed")
        tokens = schedule.in_steps(config).tokens_after(step)
        readme = card.text(config, step, tokens, _sources(run, tokens), template is not None, add_bos)
        files.write(folder / "README.md", readme)
    return step


def _template(run: Path, tokenizer: tokenizer_lib.Tokenizer, folder: Path) -> chat.Template | None:
    """The chat template that the run's tokenizer brings; what ends its answers goes into `folder`'s generation_config.json."""
    if "default" not in chat.own_sources(tokenizer.folder):
        return None
    template, path = chat.of_folder(run, tokenizer), folder / "generation_config.json"
    stop, generation = list(chat.stop_ids(template, tokenizer)), files.read_json(path, dict)
    if len(stop) > 1 and not isinstance(generation.get("eos_token_id"), list):
        files.write(path, json.dumps(generation | {"eos_token_id": stop}, indent=2) + "\n")
    return template


def _sources(run: Path, tokens: int) -> list[tuple[str, float]] | None:
    """(name of the folder, weight after `tokens`) of each source that a run was trained on; None for an import."""
    sources = run_folder.read_sources(run)
    return sources and [(Path(source["path"]).name, float(weight_at(source["weight"], tokens))) for source in sources]


def _export_tokenizer(source: Path, folder: Path, add_bos: bool, seq_len: int) -> tokenizer_lib.Tokenizer:
    """Writes the tokenizer's files for Transformers; returns the tokenizer of training."""
    if not any((source / f"tokenizer.{end}").is_file() for end in ("model", "json")):
        what = "holds neither tokenizer.model nor tokenizer.json, so there is no tokenizer to export"
        raise UserError(f"{source}: {what}{export_tokenizer.REMEDY}")
    ours = tokenizer_lib.load(source)
    try:
        export_tokenizer.export(ours, folder, add_bos, seq_len)
    except UserError as error:
        raise UserError(f"{error}{export_tokenizer.REMEDY}") from None
    return ours


def _copy_of(run: Path, folder: Path) -> tokenizer_lib.Tokenizer | None:
    """Copies a run's tokenizer unchanged; returns it, for the ids of bos and eos, if it can be read."""
    if (run / "tokenizer").is_dir():
        shutil.copytree(run / "tokenizer", folder, dirs_exist_ok=True)
    try:
        return tokenizer_lib.load(run / "tokenizer")
    except UserError as error:
        print(f"no bos and eos in the model's config.json: {error}")
        return None


def import_checkpoint(
    source: str | Path,
    output: str | Path,
    config_file: str | None = None,
    tokenizer: str | None = None,
    allow_non_finite: bool = False,
) -> str:
    """Writes a run folder from a Hugging Face folder (or one file of it), or a lit-gpt .pth; returns a line about it.

    `config_file`: the config to resume the run with. A .pth needs it, since it does not describe its model. Without it the run
    has no data or schedule of its own, and serves `--init.from` and `generate`. `tokenizer`: a file or folder, if none is
    beside the weights. Raises UserError, also for weights that are NaN or infinite unless `allow_non_finite`.
    """
    for option, path in (("--checkpoint", source), ("--tokenizer", tokenizer or "")):
        files.check_local(option, path)
    source, output = Path(source), Path(output)
    if (source / "checkpoints").is_dir():
        raise UserError(f"--checkpoint {source}: is a run folder already; use it as it is, or with --init.from")
    given = cli.read(config_file) if config_file else None
    beside = source.parent if source.is_file() else source
    if not tokenizer and source.exists() and not any((beside / f"tokenizer.{end}").is_file() for end in ("model", "json")):
        raise UserError(f"{beside}: holds no tokenizer; add --tokenizer FILE_OR_FOLDER: a run folder keeps its own")
    moments, step = None, 0
    if source.is_file() and source.suffix == ".pth":
        if given is None:
            raise UserError(
                f"{source}: a .pth does not describe its model; add --config FILE, configs/3t.py for the original's"
            )
        config = given
        params, moments, step = litgpt.read(source, given.model, allow_non_finite)
    else:
        params, model = llama.load_folder(source, allow_non_finite)
        if given and (notes := run_folder.check_same_model(given.model, model, str(source))):
            raise UserError(f"{notes[0]}; change it in {config_file}")
        config = given or _unscheduled(model)
    with _new_folder(output) as folder:
        checkpoint.save_import(folder, dataclasses.replace(config, workdir=str(output)), params, moments, step)
        tokenizer_lib.load(tokenizer or beside).save(folder / "tokenizer")
    what = f"{dims.n_parameters(config.model):,} weights" + (f" and AdamW's moments after step {step:,}" if moments else "")
    return f"{output}: {what} of {source}"


def _unscheduled(model: Model) -> Config:
    """The config of a run of which only the model is known; the other sections are placeholders that nothing reads."""
    return Config(
        workdir="unknown",
        model=model,
        data=config_lib.Data(sources={"unknown": 1.0}),
        optim=config_lib.Optim(peak_lr=4e-4, min_lr=4e-5, warmup_steps=0, weight_decay=0.1, clip_norm=1.0),
        train=config_lib.Train(steps=1, tokens_per_step=model.seq_len, seqs_per_device=1),
        checkpoint=config_lib.Checkpoint(every=1),
    )


@contextlib.contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which is renamed to `output` if the `with` block succeeds, and removed otherwise."""
    files.check_local("--output", output)
    output = Path(os.path.abspath(output))
    usable = output.is_dir() and not output.is_symlink() and not files.listed(output) and output != Path.cwd()
    if os.path.lexists(output) and not usable:
        raise UserError(f"--output {output}: exists already; name a new folder, or remove it")
    busy = f"--output {output}: another process is writing it"
    with files.workplace(output.with_name(f".{output.name}.partial"), busy) as place:
        folder = place / "whole"
        shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
        folder.mkdir()
        yield folder
        for name in os.listdir(output) if output.is_dir() else ():  # files of a file manager: see `files.listed`
            os.replace(output / name, folder / name)
        files.settle(folder)
        os.replace(folder, output)


# -- the command ----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tinyllama_jax.convert", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    kinds = parser.add_subparsers(required=True, dest="kind", metavar="to-torch|from-torch|to-litpkds")
    add = lambda name, text: kinds.add_parser(name, help=text, description=text, allow_abbrev=False)
    to_torch = add("to-torch", "write a run as a Hugging Face folder")
    to_torch.add_argument("--checkpoint", required=True, metavar="RUN", help="a run folder")
    to_torch.add_argument("--step", type=int, metavar="N", help="which checkpoint of the run (the newest)")
    to_torch.add_argument(
        "--output", required=True, metavar="DIR", help="the folder to make: safetensors, configuration, tokenizer"
    )
    to_torch.add_argument(
        "--dtype", choices=list(llama.DTYPES), default="float32", help="of the written weights; all but float32 round (float32)"
    )
    to_torch.add_argument(
        "--tokenizer",
        choices=["checked", "none"],
        default="checked",
        help="none: copy the run's tokenizer unchanged, without a tokenizer.json (checked)",
    )
    from_torch = add("from-torch", "write published weights as a run folder")
    from_torch.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="a Hugging Face folder, a file of one, or a lit-gpt .pth"
    )
    from_torch.add_argument("--output", required=True, metavar="RUN", help="the run folder to make")
    from_torch.add_argument(
        "--config", metavar="FILE", help="the config to train on with, such as configs/3t.py; a .pth needs it (none)"
    )
    from_torch.add_argument(
        "--tokenizer", metavar="PATH", help="a SentencePiece model or a folder (the one beside the weights)"
    )
    for command in (to_torch, from_torch):
        command.add_argument("--allow-non-finite", action="store_true", help="accept weights that are NaN or infinite (no)")
    to_litpkds = add("to-litpkds", "write prepared data as packed files, byte for byte as the original's builder")
    to_litpkds.add_argument("--input", required=True, type=Path, metavar="DIR", help="a data set made by tinyllama_jax.prepare")
    to_litpkds.add_argument("--split", default="train", metavar="NAME", help="which split of the input (train)")
    to_litpkds.add_argument("--prefix", required=True, metavar="NAME", help="how the files' names begin, such as train_slim")
    to_litpkds.add_argument("--output", required=True, type=Path, metavar="DIR", help="the folder for the files")
    to_litpkds.add_argument(
        "--chunk-size", type=int, default=litpkds.CHUNK, metavar="N", help=f"tokens in a file ({litpkds.CHUNK} = 2049 x 1024)"
    )
    to_litpkds.add_argument(
        "--tail", choices=("fill", "drop"), default="fill", help="the last file: fill it up with bos, or drop it (fill)"
    )
    return parser


def main(argv: list[str]) -> int:
    """Runs one conversion; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.kind == "to-torch":
        checked = args.tokenizer == "checked"
        step = export(args.checkpoint, args.output, args.step, args.dtype, checked, args.allow_non_finite)
        print(f"{args.output}: step {step:,} of {args.checkpoint} in {args.dtype}")
    elif args.kind == "from-torch":
        print(import_checkpoint(args.checkpoint, args.output, args.config, args.tokenizer, args.allow_non_finite))
    else:
        litpkds.export(args.input, args.split, args.output, args.prefix, args.chunk_size, args.tail)
    return 0


if __name__ == "__main__":
    run_main(main)
