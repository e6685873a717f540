"""Run folder -> Hugging Face folder, and Hugging Face or lit-gpt checkpoint -> run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tinyllama_jax import checkpoint, cli, dims, files, hf, hf_tokenizer, lit, run_folder, tensor_files
from tinyllama_jax import config as config_lib
from tinyllama_jax.config import Config, Model
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.errors import UserError


def export(
    run: str | Path,
    output: str | Path,
    step: int | None = None,
    dtype: str = "float32",
    tokenizer: bool = True,
    allow_non_finite: bool = False,
) -> int:
    """Writes a folder that `AutoModelForCausalLM` and `AutoTokenizer` load, from a run's newest (or given) step; returns it.

    float32, the dtype of the weights, loses nothing. `output` must not exist, or be empty; it appears when it is whole, and its
    tokenizer, loaded as users will, has given the ids of training. `tokenizer=False` copies the run's tokenizer, unchanged and
    unchecked. Raises UserError, also for weights that are NaN or infinite unless `allow_non_finite`.
    """
    run, output = Path(run), Path(output)
    if not (run / "checkpoints").is_dir() and hf.describes(run):
        raise UserError(f"--checkpoint {run}: is a Hugging Face folder already; a run folder is wanted, as `train` makes")
    with _made_whole(output) as folder:
        params, config, step = checkpoint.load_params(run, step)
        for name, tensor in () if allow_non_finite else hf.to_hf(params, config.model):
            tensor_files.check_finite(name, tensor, f"{run}, step {step:,}")
        add_bos = tokenizer and tokenizer_lib.documents_begin_with_bos(run)
        ours = (
            _export_tokenizer(run / "tokenizer", folder, add_bos, config.model.seq_len) if tokenizer else _as_it_is(run, folder)
        )
        bos, eos = (ours.bos_id, ours.eos_id) if ours else (-1, -1)
        hf.save_folder(params, config.model, folder, dtype, *(None if id_ < 0 else id_ for id_ in (bos, eos)))
        if (theirs := run / "tokenizer/generation_config.json").is_file():
            shutil.copyfile(theirs, folder / theirs.name)
        if tokenizer and not hf_tokenizer.check(folder, ours.encode, bos, eos, add_bos):
            print(f"{output}: whether Transformers reads this tokenizer as training did is not checked: it is not installed")
    return step


def _export_tokenizer(source: Path, folder: Path, add_bos: bool, seq_len: int) -> tokenizer_lib.Tokenizer:
    """Writes the tokenizer's files for Transformers; returns the tokenizer of training."""
    if not any((source / f"tokenizer.{end}").is_file() for end in ("model", "json")):
        what = "holds neither tokenizer.model nor tokenizer.json, so there is no tokenizer to export"
        raise UserError(f"{source}: {what}{hf_tokenizer.REMEDY}")
    ours = tokenizer_lib.load(source)
    try:
        ours.export(folder, add_bos, seq_len)
    except UserError as error:
        raise UserError(f"{error}{hf_tokenizer.REMEDY}") from None
    return ours


def _as_it_is(run: Path, folder: Path) -> tokenizer_lib.Tokenizer | None:
    """Copies a run's tokenizer; returns it if it can be read, for the ids of bos and eos."""
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
    """Writes a run folder from a Hugging Face folder (or one file of it), or a lit-gpt .pth; returns a line that says what.

    `config_file`: what the run is to be gone on with. A .pth needs it, since it does not say its model; without it the run
    has no data or schedule of its own, and is for `--init.from` and `generate`. `tokenizer`: a file or folder, if there is
    none beside the weights. Raises UserError, also for weights that are NaN or infinite unless `allow_non_finite`.
    """
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
                f"{source}: a lit-gpt checkpoint does not say its model; add --config FILE, configs/3t.py for the original's"
            )
        config = given
        params, moments, step = lit.read(source, given.model, allow_non_finite)
    else:
        params, model = hf.load_folder(source, allow_non_finite)
        if given and (notes := run_folder.check_same_model(given.model, model, str(source))):
            raise UserError(f"{notes[0]}; change it in {config_file}")
        config = given or _unscheduled(model)
    with _made_whole(output) as folder:
        checkpoint.save_import(folder, dataclasses.replace(config, workdir=str(output)), params, moments, step)
        tokenizer_lib.load(tokenizer or beside).save(folder / "tokenizer")
    what = f"{dims.n_parameters(config.model):,} weights" + (f" and AdamW's moments after step {step:,}" if moments else "")
    return f"{output}: {what} of {source}"


def _unscheduled(model: Model) -> Config:
    """The config of a run of which only the model is known: the other sections are place-holders that nothing reads."""
    return Config(
        workdir="unknown",
        model=model,
        data=config_lib.Data(sources={"unknown": 1.0}),
        optim=config_lib.Optim(peak_lr=4e-4, min_lr=4e-5, warmup_steps=0, weight_decay=0.1, clip_norm=1.0),
        train=config_lib.Train(steps=1, tokens_per_step=model.seq_len, seqs_per_device=1),
        checkpoint=config_lib.Checkpoint(every=1),
    )


@contextlib.contextmanager
def _made_whole(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write into, which takes its name once the block has ended well, and else is removed."""
    files.check_local("--output", output)
    output = Path(os.path.abspath(output))
    mine = output.is_dir() and not output.is_symlink() and not files.listed(output) and output != Path.cwd()
    if os.path.lexists(output) and not mine:
        raise UserError(f"--output {output}: is already there; name a folder that is not, or remove it")
    busy = f"--output {output}: another process is writing it"
    with files.workplace(output.with_name(f".{output.name}.partial"), busy) as place:
        folder = place / "whole"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir()
        yield folder
        for name in os.listdir(output) if output.is_dir() else ():  # files that a file manager left there, see `files.listed`
            os.replace(output / name, folder / name)
        files.settle(folder)
        os.replace(folder, output)
