"""Converts weights and data to and from other programs' formats.

python -m tinyllama_jax.convert --checkpoint RUN --format gguf --output FILE       a run, Hugging Face or GGUF -> GGUF
python -m tinyllama_jax.convert --checkpoint RUN --format hf --output DIR          a run or GGUF -> a Hugging Face folder
python -m tinyllama_jax.convert --checkpoint RUN --format peft --output DIR        a run with lora.rank -> a PEFT adapter folder
python -m tinyllama_jax.convert --checkpoint RUN --format web --output DIR         any of these -> a page for a phone's browser
python -m tinyllama_jax.convert to-torch --checkpoint RUN --output DIR             a run or GGUF -> a Hugging Face folder
python -m tinyllama_jax.convert from-torch --checkpoint DIR --output RUN           Hugging Face, lit-gpt or GGUF -> a run folder
python -m tinyllama_jax.convert to-litpkds --input DIR --prefix NAME --output DIR  prepared data -> the original's packed files
"""

import argparse
import dataclasses
import json
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyllama_jax.base import cli, dims, files, schedule
from tinyllama_jax.base import config as config_lib
from tinyllama_jax.base.config import Model
from tinyllama_jax.base.errors import UserError, run_main
from tinyllama_jax.base.mixture_weights import weight_at
from tinyllama_jax.data import chat
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.export import gguf_tokenizer, litpkds
from tinyllama_jax.data.export import tokenizer as export_tokenizer
from tinyllama_jax.hub import card, gguf, litgpt, llama, peft, tensor_files
from tinyllama_jax.inference import web
from tinyllama_jax.run import adapter, checkpoint
from tinyllama_jax.run import folder as run_folder


class _Opened(NamedTuple):
    """A checkpoint whose weights are read."""

    params: dict
    model: Model
    tokenizer: Path  # the folder of its tokenizer
    settings: Path  # the folder that says whether a text begins with bos
    name: str  # for error messages
    step: int | None  # None: not a run


def _open(path: Path, step: int | None, scratch: Path) -> _Opened:
    """Opens a run folder, a Hugging Face folder or a GGUF file, whose tokenizer is written into `scratch`.

    The weights are not checked for NaN and infinity. Raises UserError.
    """
    if (path / "checkpoints").is_dir():
        return _open_run(path, step)
    if step is not None:
        raise UserError(f"--step {step}: {path} is not a run folder, so it has no steps")
    if gguf.is_gguf(path):
        params, model, metadata = gguf.load(path, allow_non_finite=True)
        gguf_tokenizer.from_gguf(metadata, scratch, str(path))
        return _Opened(params, model, scratch, scratch, str(path), None)
    gguf.check_named(path)
    params, model = peft.load_folder(path, allow_non_finite=True)
    folder = path.parent if path.is_file() else peft.with_tokenizer(path)
    return _Opened(params, model, folder, folder, str(path), None)


def _open_run(path: Path, step: int | None) -> _Opened:
    params, config, step = checkpoint.load_params(path, step)
    return _Opened(params, config.model, path / "tokenizer", path, f"{path}, step {step:,}", step)


def _check_finite(opened: _Opened) -> None:
    for name, tensor in llama.to_hf(opened.params, opened.model):
        tensor_files.check_finite(name, tensor, opened.name)


def export(
    run: str | Path,
    output: str | Path,
    step: int | None = None,
    dtype: str = "float32",
    tokenizer: bool = True,
    allow_non_finite: bool = False,
) -> int | None:
    """Writes a folder for `AutoModelForCausalLM` and `AutoTokenizer` from a run's newest (or given) step; returns the step.

    `run` may also be a GGUF file, which has no step. float32, the dtype of the weights, loses nothing. `output` must be absent
    or empty. It appears when it is complete and Transformers, with its tokenizer, gives the ids of training.
    `tokenizer=False` copies the run's tokenizer unchanged and unchecked. Raises UserError, also for weights that are NaN or
    infinite unless `allow_non_finite`.
    """
    files.check_local("--checkpoint", run)
    run, output = Path(run), Path(output)
    if not (run / "checkpoints").is_dir() and llama.describes(run):
        raise UserError(f"--checkpoint {run}: is a Hugging Face folder already; name a run folder, as `train` makes")
    with tempfile.TemporaryDirectory() as scratch, files.new(output) as folder:
        opened = _open(run, step, Path(scratch)) if gguf.is_gguf(run) else _open_run(run, step)
        if not allow_non_finite:
            _check_finite(opened)
        source, model = opened.tokenizer, opened.model
        add_bos = tokenizer and tokenizer_lib.documents_begin_with_bos(opened.settings)
        ours = (
            export_tokenizer.export_from(source, folder, add_bos, model.seq_len)
            if tokenizer
            else export_tokenizer.copy_of(source, folder)
        )
        bos, eos = (ours.bos_id, ours.eos_id) if ours else (-1, -1)
        llama.save_folder(opened.params, model, folder, dtype, *(None if id_ < 0 else id_ for id_ in (bos, eos)))
        if (generation := source / "generation_config.json").is_file():
            shutil.copyfile(generation, folder / generation.name)
        template = _template(run, ours, folder) if tokenizer else None
        talk = template and partial(chat.encode, template, ours, begin_with_bos=False)
        if tokenizer and not export_tokenizer.check(folder, ours.encode, bos, eos, add_bos, talk):
            print(f"{output}: not checked whether Transformers reads this tokenizer as training did: it is not installed")
        history = card.UNKNOWN if opened.step is None else _history(run, opened.step)
        files.write(folder / "README.md", card.text(model, template is not None, add_bos, history))
    return opened.step


def _template(run: Path, tokenizer: tokenizer_lib.Tokenizer, folder: Path) -> chat.Template | None:
    """The chat template that the run's tokenizer brings; what ends its answers goes into `folder`'s generation_config.json."""
    if "default" not in chat.own_sources(tokenizer.folder):
        return None
    template, path = chat.of_folder(run, tokenizer), folder / "generation_config.json"
    stop, generation = list(chat.stop_ids(template, tokenizer)), files.read_json(path, dict)
    if len(stop) > 1 and not isinstance(generation.get("eos_token_id"), list):
        files.write(path, json.dumps(generation | {"eos_token_id": stop}, indent=2) + "\n")
    return template


def _history(run: Path, step: int) -> str:
    """What the card says about the training of a run up to `step`."""
    config, sources = checkpoint.load_config(run), run_folder.read_sources(run)
    if sources is None:  # an import
        return card.UNKNOWN
    config_lib.Data({source["path"]: source["weight"] for source in sources})  # refuses weights that no run can have
    tokens = schedule.in_steps(config).tokens_after(step)
    weights = [(Path(source["path"]).name, float(weight_at(source["weight"], tokens))) for source in sources]
    return card.training(config, step, tokens, weights)


def export_adapter(run: str | Path, output: str | Path, step: int | None = None, allow_non_finite: bool = False) -> str:
    """Writes the adapters of a run, without its weights, as a folder for PEFT; returns a line about it. Raises UserError."""
    files.check_local("--checkpoint", run)
    with files.new(Path(output)) as folder:
        return f"{output}: {adapter.write(Path(run), folder, step, allow_non_finite)}"


def export_gguf(
    source: str | Path,
    output: str | Path,
    quantize: str = "f16",
    step: int | None = None,
    shard_bytes: int | None = None,
    allow_non_finite: bool = False,
) -> list[Path]:
    """Writes a run, a Hugging Face folder or a GGUF as GGUF, with its tokenizer and chat template; returns the files.

    `output`: a new file NAME.gguf; with `shard_bytes` a new folder NAME of files of at most this size. It appears when it is
    complete. Rows of the vocabulary without a token are left out, and so is a head that equals the embedding. Raises UserError.
    """
    files.check_local("--checkpoint", source)
    source, output = Path(source), Path(output)
    if shard_bytes is None and output.suffix != ".gguf":
        raise UserError(f"--output {output}: name a file that ends in .gguf, or add --shard-size for a folder of files")
    if shard_bytes is not None and output.suffix == ".gguf":
        raise UserError(f"--output {output}: with --shard-size it is a folder of files; leave out .gguf")
    gguf.package()  # refuses at once if it is not installed
    with tempfile.TemporaryDirectory() as scratch, files.new(output, is_file=shard_bytes is None) as place:
        opened = _open(source, step, Path(scratch))
        if not allow_non_finite:
            _check_finite(opened)
        if not any((opened.tokenizer / f"tokenizer.{end}").is_file() for end in ("model", "json")):
            raise UserError(f"{opened.tokenizer}: holds neither tokenizer.model nor tokenizer.json, and a GGUF needs one")
        vocabulary = gguf_tokenizer.to_gguf(
            tokenizer_lib.load(opened.tokenizer),
            opened.model.vocab_size,
            tokenizer_lib.documents_begin_with_bos(opened.settings),
            chat.own_sources(opened.tokenizer).get("default"),
        )
        tied = np.array_equal(opened.params["embed"]["embedding"], opened.params["lm_head"]["kernel"].T)
        path = place / f"{output.name}.gguf" if shard_bytes else place
        name = Path(os.path.abspath(source)).name.removesuffix(".gguf")
        tensors = llama.to_hf(opened.params, opened.model)
        made = gguf.write(path, tensors, opened.model, vocabulary, quantize, name, tied, shard_bytes)
    return [output / path.name for path in made] if shard_bytes else [output]


def export_web(
    source: str | Path,
    output: str | Path,
    quantize: str = "q4_0",
    step: int | None = None,
    shard_bytes: int = 250_000_000,
    allow_non_finite: bool = False,
    wllama: str | Path | None = None,
) -> list[Path]:
    """Writes a folder for a web server, whose page runs the model in the browser; returns all its files.

    `wllama`: a folder with wllama's packages; by default npm fetches them. The rest is as in `export_gguf`. Raises UserError.
    """
    with files.new(Path(output)) as folder:
        packages = web.packages(wllama)
        made = export_gguf(source, folder / "model", quantize, step, shard_bytes, allow_non_finite)
        web.write(folder, made, Path(os.path.abspath(source)), packages)
    return sorted(path for path in Path(output).rglob("*") if path.is_file())


def import_checkpoint(
    source: str | Path,
    output: str | Path,
    config_file: str | None = None,
    tokenizer: str | None = None,
    allow_non_finite: bool = False,
) -> str:
    """Writes a run folder from a Hugging Face folder (or one file of it), a GGUF or a lit-gpt .pth; returns a line about it.

    `config_file`: the config to resume the run with. A .pth needs it, since it does not describe its model. Without it the run
    has no data or schedule of its own; it is for `--init.from` and inference. `tokenizer`: a file or folder, if none is beside
    the weights. Raises UserError, also for weights that are NaN or infinite unless `allow_non_finite`.
    """
    files.check_local("--checkpoint", source)
    if tokenizer is not None:
        files.check_local("--tokenizer", tokenizer)
    source, output = Path(source), Path(output)
    if (source / "checkpoints").is_dir():
        raise UserError(f"--checkpoint {source}: is a run folder already; use it as it is, or with --init.from")
    gguf.check_named(source)
    given = cli.read(config_file) if config_file else None
    if given and given.lora.rank:
        raise UserError(f"--config {config_file}: trains adapters; import without it, and train with --init.from={output}")
    beside = source.parent if source.is_file() else peft.with_tokenizer(source)
    is_gguf = gguf.is_gguf(source)
    has_own = is_gguf or any((beside / f"tokenizer.{end}").is_file() for end in ("model", "json"))
    if source.exists() and not (tokenizer or has_own):
        raise UserError(f"{beside}: holds no tokenizer; add --tokenizer FILE_OR_FOLDER: a run folder keeps its own")
    moments, step, metadata = None, 0, None
    if source.is_file() and source.suffix == ".pth":
        if given is None:
            raise UserError(f"{source}: a .pth does not describe its model; add --config FILE (the original's: configs/3t.py)")
        config = given
        params, moments, step = litgpt.read(source, given.model, allow_non_finite)
    else:
        if is_gguf:
            params, model, metadata = gguf.load(source, allow_non_finite)
        else:
            params, model = peft.load_folder(source, allow_non_finite)
        if given and (notes := run_folder.check_same_model(given.model, model, str(source))):
            raise UserError(f"{notes[0]}; change it in {config_file}")
        config = given or checkpoint.unscheduled(model)
    with tempfile.TemporaryDirectory() as scratch, files.new(output) as folder:
        if metadata and not tokenizer:
            gguf_tokenizer.from_gguf(metadata, Path(scratch), str(source))
            tokenizer = scratch
        checkpoint.save_import(folder, dataclasses.replace(config, workdir=str(output)), params, moments, step)
        tokenizer_lib.load(tokenizer or beside).save(folder / "tokenizer")
    what = f"{dims.n_parameters(config.model):,} weights" + (f" and AdamW's moments after step {step:,}" if moments else "")
    return f"{output}: {what} of {source}"


# -- the command ----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tinyllama_jax.convert", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--checkpoint", metavar="PATH", help="a run folder, a Hugging Face folder or a GGUF file (needed)")
    what = "what to write: GGUF for llama.cpp, a folder for Hugging Face or PEFT, or a page for a browser (needed)"
    parser.add_argument("--format", choices=["gguf", "hf", "peft", "web"], help=what)
    parser.add_argument(
        "--output", metavar="PATH", help="the file NAME.gguf to make; a folder with --shard-size, hf or web (needed)"
    )
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint of the run (the newest)")
    parser.add_argument("--quantize", choices=list(gguf.TYPES), help="the type of the matrices (gguf: f16, web: q4_0)")
    parser.add_argument(
        "--shard-size",
        type=float,
        nargs="?",
        const=250.0,
        metavar="MB",
        help="write a folder of files of at most that many megabytes (gguf: one file; web, or without a number: 250)",
    )
    parser.add_argument("--wllama", metavar="DIR", help="web: a folder with wllama's packages (npm fetches them)")
    parser.add_argument("--dtype", choices=list(llama.DTYPES), help="hf: of the written weights (float32)")
    parser.add_argument("--allow-non-finite", action="store_true", help="accept weights that are NaN or infinite (no)")
    _add_named(parser.add_subparsers(dest="kind", metavar="to-torch|from-torch|to-litpkds"))
    return parser


def _add_named(kinds: argparse._SubParsersAction) -> None:
    """The commands that have a name."""
    add = lambda name, text: kinds.add_parser(name, help=text, description=text, allow_abbrev=False)
    to_torch = add("to-torch", "write a run as a Hugging Face folder")
    to_torch.add_argument("--checkpoint", required=True, metavar="RUN", help="a run folder, or a GGUF file")
    to_torch.add_argument("--step", type=int, metavar="N", help="which checkpoint of the run (the newest)")
    to_torch.add_argument("--output", required=True, metavar="DIR", help="the folder to make: weights, config, tokenizer, card")
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
        "--checkpoint", required=True, metavar="PATH", help="a Hugging Face folder, a file of one, a GGUF, or a lit-gpt .pth"
    )
    from_torch.add_argument("--output", required=True, metavar="RUN", help="the run folder to make")
    from_torch.add_argument("--config", metavar="FILE", help="the config to train on with; a .pth needs it (none)")
    from_torch.add_argument("--tokenizer", metavar="PATH", help="a file or folder (the one beside the weights)")
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


def _convert(args: argparse.Namespace) -> str:
    """The command without a name: `--format` says what to write. Returns a line about it."""
    no_gguf = ("quantize", "shard_size", "wllama")
    others = {"gguf": ("dtype", "wllama"), "hf": no_gguf, "peft": (*no_gguf, "dtype"), "web": ("dtype",)}
    for option in ("checkpoint", "format", "output"):
        if getattr(args, option) is None:
            command = f"--checkpoint PATH --format {'|'.join(others)} --output PATH"
            raise UserError(f"--{option} is missing; the command needs {command}")
    for option in (name for name in others[args.format] if getattr(args, name) is not None):
        raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)}: has no meaning with --format {args.format}")
    if args.format == "hf":
        dtype = args.dtype or "float32"
        step = export(args.checkpoint, args.output, args.step, dtype, allow_non_finite=args.allow_non_finite)
        return f"{args.output}: {'' if step is None else f'step {step:,} of '}{args.checkpoint} in {dtype}"
    if args.format == "peft":
        return export_adapter(args.checkpoint, args.output, args.step, args.allow_non_finite)
    if args.shard_size is not None and not 1 <= args.shard_size <= 1e6:
        raise UserError(f"--shard-size {args.shard_size:g}: must lie between 1 and 1,000,000 megabytes")
    is_web = args.format == "web"
    shard_bytes = int((args.shard_size or 250) * 1e6) if is_web or args.shard_size else None
    quantize = args.quantize or ("q4_0" if is_web else "f16")
    arguments = (args.checkpoint, args.output, quantize, args.step, shard_bytes, args.allow_non_finite)
    made = export_web(*arguments, args.wllama) if is_web else export_gguf(*arguments)
    size = sum(path.stat().st_size for path in made)
    hint = f"; try it: python -m http.server --bind 127.0.0.1 -d {args.output}" * is_web
    return f"{args.output}: {args.checkpoint} in {quantize}, {size:,} bytes in {len(made)} file{'s' * (len(made) > 1)}{hint}"


def main(argv: list[str]) -> int:
    """Runs one conversion; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.kind is not None and argv[0] != args.kind:
        raise UserError(f"{argv[0]}: options come after {args.kind}, whose own they are; see {args.kind} --help")
    if args.kind is None:
        print(_convert(args))
    elif args.kind == "to-torch":
        checked = args.tokenizer == "checked"
        step = export(args.checkpoint, args.output, args.step, args.dtype, checked, args.allow_non_finite)
        print(f"{args.output}: {'' if step is None else f'step {step:,} of '}{args.checkpoint} in {args.dtype}")
    elif args.kind == "from-torch":
        print(import_checkpoint(args.checkpoint, args.output, args.config, args.tokenizer, args.allow_non_finite))
    else:
        litpkds.export(args.input, args.split, args.output, args.prefix, args.chunk_size, args.tail)
    return 0


if __name__ == "__main__":
    run_main(main)
