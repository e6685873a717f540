"""Fine-tuning on conversations: `python -m tinyllama_jax.sft --config configs/sft_guanaco.py --init.from=RUN`.

The conversations of `data.sources` are written as blocks beside the run folder, and `train` learns from those.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends at once, without a traceback

from tinyllama_jax.run import supervise

if __name__ == "__main__":
    supervise.supervise("tinyllama_jax.sft")  # of several processes; before the imports, which take seconds

import dataclasses
import tempfile
from pathlib import Path

from tinyllama_jax import train
from tinyllama_jax.base import cli, mixture_weights
from tinyllama_jax.base.config import Config
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import make_folder
from tinyllama_jax.data import chat
from tinyllama_jax.data.blocks import MANIFEST, read_manifest
from tinyllama_jax.data.prepare import chats
from tinyllama_jax.run import bucket, cluster, initialize, seals
from tinyllama_jax.run import folder as run_folder


def main(argv: list[str]) -> int:
    """Writes the conversations as blocks, unless they are kept from an earlier run, and trains. Returns the exit code."""
    config = cli.load(argv, __doc__)
    with bucket.opened(config):
        return train.main(as_training(config, argv))


def as_training(config: Config, argv: list[str], kind: str = "chat") -> list[str]:
    """`argv` as arguments of `train`: with the model of the weights, and folders of blocks in place of conversations."""
    origin = _origin(config)
    with tempfile.TemporaryDirectory() as scratch:
        base = initialize.read_origin(origin, Path(scratch), config.model.added_tokens)
        model = _model_of(base, config, origin)
        config = cli.load([*model, *argv])  # before the data are written, so that wrong settings are refused at once
        run_folder.check_same_model(config.model, base.model, str(origin))
        if (resumed := bool(seals.steps_in(config.folder))) and base.tokenizer.vocab_size > base.rows:
            what = f"the run in {origin} has not all of them; restore that value, or use --workdir=NEW"
            raise UserError(f"--model.added_tokens={config.model.added_tokens}: {what}")
        if resumed:
            run_folder.check_settings(config)
        if all(_is_prepared(path, kind) for path in config.data.sources):  # as in RUN/config.json
            return [*model, *argv]
        template = _template(base, config, origin, "data.template" in cli.pairs(argv))
        own = chat.own_sources(base.tokenizer.folder).get("default", template.source)
        if resumed and own != template.source:
            what = f"the run in {origin} has {chat.name_of(own, 'another')}; restore it, or use --workdir=NEW"
            raise UserError(f"--data.template={config.data.template}: {what}")
        chat.check_ends(template, base.tokenizer)
        encoder = chats.Encoder(template, base.tokenizer, base.begin_with_bos, config.model.seq_len + 1, kind)
        _say(f"chat template {template.name} ({template.why})")
        place, sources = config.folder.parent / "prepared", {}
        for folder in (config.folder, place):
            make_folder("--workdir", config.workdir, folder)
        for path, weight in config.data.sources.items():
            ready = _is_prepared(path, kind)
            if "," in str(folder := Path(path) if ready else place):  # it becomes an argument of `train`
                raise UserError(f"{folder}: has a comma in its path; choose another --workdir, or rename the folder")
            if not ready:
                folder, line = chats.prepared(path, encoder, place, config.train.wait)
                _say(line)
            if str(folder) in sources:
                raise UserError(f"--data.sources: {path} holds the same conversations as another source; name it once")
            sources[str(folder)] = weight
    return [*model, *argv, f"--data.sources={mixture_weights.sources_text(sources)}"]


def _template(base: initialize.Origin, config: Config, origin: Path, typed: bool) -> chat.Template:
    """The template of the command line, if it was `typed`; else that which the weights bring; else the config's.

    Raises UserError if there is none. One of the weights that does not mark the answers is passed over for the config's.
    """
    name, option = config.data.template or None, "--data.template"
    if name and not typed and "default" in chat.own_sources(base.tokenizer.folder):
        own = chat.of_folder(origin.absolute(), base.tokenizer)
        if chat.marks_answers(own):
            same = chat.choose(origin.absolute(), base.tokenizer, name, option).source == own.source
            other = "" if same else f", not the config's {name}, which {option}={name} takes"
            return own._replace(why=f"that of {origin}{other}")
    template = chat.choose(origin.absolute(), base.tokenizer, name, option)
    return template if typed else template._replace(why=template.why.replace(option, "the config's data.template"))


def _is_prepared(path: str, kind: str) -> bool:
    """Whether `path` is a folder of blocks already. Raises UserError if its data are not of the kind `kind`."""
    if not (Path(path) / MANIFEST).is_file():
        return False
    if (written := read_manifest(path)[0].get("kind", "text")) != kind:
        use = {"text": "train", "chat": "sft", "preferences": "dpo"}[written]
        raise UserError(f"--data.sources={path}: was prepared as {written}, for `{use}`; this command learns from {kind}")
    return True


def _say(line: str) -> None:
    if cluster.identity()[0] in (0, -1):
        print(line, flush=True)


def _origin(config: Config) -> Path:
    """Where the tokenizer and the shape of the weights are: the run itself once it has a checkpoint, else `init.from`."""
    if seals.steps_in(config.folder):
        return config.folder
    if not config.init.from_:
        raise UserError("--init.from is empty; name the weights to start from: a run, a Hugging Face folder or a GGUF file")
    if not Path(config.init.from_).exists():
        raise UserError(f"--init.from={config.init.from_}: no such file or folder")
    return Path(config.init.from_)


def _model_of(base: initialize.Origin, config: Config, origin: Path) -> list[str]:
    """The arguments that replace what the config says of the model, where the weights differ; not length and precision."""
    names = [key.removeprefix("model.") for key in run_folder.FIXED if key.startswith("model.")]
    own, wanted = dataclasses.asdict(config.model), dataclasses.asdict(base.model)
    other = [name for name in names if name not in ("seq_len", "precision") and own[name] != wanted[name]]
    if other:
        _say(f"the model is that of {origin}: " + ", ".join(f"{name} {wanted[name]}, not {own[name]}" for name in other))
    return [f"--model.{name}={wanted[name]}" for name in other]


if __name__ == "__main__":
    supervise.run(main)
