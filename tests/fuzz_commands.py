"""The commands that `fuzz.py` runs, and good files for each, made by the commands themselves."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import safetensors.numpy
import torch
import zstandard
from tiny import TINY, make_tiny_data

from tinyllama_jax import audit, chat, convert, generate, plan, prepare, replay, report, train
from tinyllama_jax.base import errors
from tinyllama_jax.data import chat as templates
from tinyllama_jax.data.export import litpkds as export_litpkds
from tinyllama_jax.hub import litgpt
from tinyllama_jax.run import checkpoint, supervise


class Target(NamedTuple):
    """A command on good files."""

    kind: str
    arguments: str
    folders: str  # of the stage, which it needs
    files: str  # patterns of what it reads, which are damaged
    result: Callable[[Path], str]  # what it made
    codes: tuple[int, ...] = (2,)  # that say in words that something is wrong
    share: float = 1.0  # of the cases, in proportion


def digest(*patterns: str) -> Callable[[Path], str]:
    """The result is the bytes of the files of `patterns`."""

    def of(folder: Path) -> str:
        files = sorted(f for pattern in patterns for f in folder.glob(pattern) if f.is_file())
        return hashlib.sha256(b"\0".join(f.name.encode() + f.read_bytes() for f in files)).hexdigest()

    return of


def printed(folder: Path) -> str:
    """The result is what was printed, without times."""
    return re.sub(r"[\d.,]+ (s|a second|seconds|min)\b", "", (folder / "stdout").read_text(errors="replace"))


def losses(folder: Path) -> str:
    """The result is the last step's numbers."""
    last = json.loads((folder / "run/metrics.jsonl").read_text(errors="replace").splitlines()[-1])
    return str([last.get(key) for key in ("step", "loss", "grad_norm", "checksum")])


def validation(folder: Path) -> str:
    """The result is the validation loss of the weights that a new run starts from, and its first losses."""
    rows = [json.loads(line) for line in (folder / "new/metrics.jsonl").read_text().splitlines()]
    return str([{key: row.get(key) for key in ("step", "val_loss", "loss", "grad_norm", "checksum")} for row in rows[:2]])


def weights(folder: Path) -> str:
    """The result is the weights of the run folder `out`."""
    params, _, _ = checkpoint.load_params(folder / "out")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return hashlib.sha256(b"".join(str(path).encode() + np.asarray(leaf).tobytes() for path, leaf in leaves)).hexdigest()


def tool(name: str) -> Callable[[list[str]], int]:
    """The `main` of tools/NAME.py."""
    return runpy.run_path(str(Path(__file__).parents[1] / f"tools/{name}.py"))["main"]


def watch(argv: list[str]) -> int:
    """The parent of process 1 of two; process 0 never comes."""
    os.environ |= {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:9", "JAX_PROCESS_ID": "1", "JAX_NUM_PROCESSES": "2"}
    return supervise._supervised("tinyllama_jax.train", argv)


MAIN = {m.__name__.rpartition(".")[2]: m.main for m in (train, replay, report, plan, generate, chat, prepare, audit, convert)}
MAIN |= {"export": tool("convert_to_torch"), "import": tool("convert_from_torch"), "watch": watch}
AUDIT = "--config tiny.py --processes 2 --train.seqs_per_device=4"
LIT = "--config tiny.py --tokenizer tok.model"
MADE = digest("out/manifest.json")
TRAIN = "--config tiny.py --workdir run"
DONE = f"{TRAIN} --train.steps=10"  # opens and restores everything, and has nothing to do
NEW = "--config tiny.py --workdir new --init.from=run --train.steps=2"
PREPARE = "--tokenizer tok.model --output out --seq-len 16 --workers 1"
ALLOW = "--allow duplicate,overlap,filling"
CHECKPOINT = "run/checkpoints/10/seal.json run/checkpoints/10/* run/checkpoints/10/*/* run/checkpoints/10/*/*/d/*"
RUN = f"run/config.json run/data.json run/versions.json run/tokenizer/* {CHECKPOINT}"
DATA = "data/a/manifest.json data/a/*.array_record* data/a/tokenizer data/a/tokenizer/* data/a"
HF = "hf/config.json hf/tokenizer.json hf/tokenizer_config.json hf/generation_config.json hf/special_tokens_map.json"
PACKED = "packed/*_0000000000.bin packed/train_a_000000002?.bin packed/tokenizer packed/tokenizer/*"
TARGETS = [
    Target(
        "train", f"{DONE} --train.spike=5", "data run", f"{RUN} run/metrics.jsonl run/lock run/checkpoints", losses, (2, 3), 3
    ),
    Target("train", DONE, "data run", f"{DATA} tiny.py run/tensorboard run/processes run", losses, (2, 3), 2),
    Target("train", TRAIN, "data run", f"run/metrics.jsonl {DATA}", losses, (2, 3), 0.5),
    Target("train", "--config run/config.json --workdir run", "data run", "run/config.json", losses, (2, 3)),
    Target("train", NEW, "data run", RUN, validation, (2, 3), 0.5),
    Target("train", f"{DONE} --data.sources=packed/train_a --workdir new", "packed", PACKED, lambda f: "", (2, 3), 0.3),
    Target("replay", "--run run --step 9", "data run", f"run/metrics.jsonl {RUN} data/a/manifest.json", printed, (2, 1), 0.7),
    Target("report", "run --png", "run", "run/metrics.jsonl run/unigram.json", digest("run/loss.png")),
    # the page lists what is damaged, so that any page is right
    Target("report", "run", "run", "run/metrics.jsonl run/events.jsonl run/config.json run/versions.json", lambda f: ""),
    Target("audit", f"data/a data/b {ALLOW}", "data", DATA, printed, (2, 4)),
    Target("audit", f"{ALLOW} {AUDIT}", "data", "tiny.py data/a/manifest.json data/a/*.array_record*", printed, (2, 4)),
    Target("audit", f"packed/train_a --seq-len 16 {ALLOW}", "packed", PACKED, printed, (2, 4)),
    Target(
        "convert", "to-litpkds --input data/a --prefix train_x --output out --chunk-size 500", "data", DATA, digest("out/*.bin")
    ),
    Target("prepare", f"--train text.jsonl {PREPARE}", "", "text.jsonl tok.model", MADE),
    Target("prepare", f"--train texts {PREPARE}", "texts", "texts/*", MADE),
    Target("prepare", f"--train texts/c.parquet {PREPARE}", "texts", "texts/c.parquet", MADE),
    Target("prepare", f"--train halves --dedup minhash {PREPARE}", "halves out.partial", "out.partial/* out.partial/*/*", MADE),
    Target("prepare", f"--train text.jsonl {PREPARE}".replace("tok.model", "hf"), "hf", HF, MADE),
    # not README.md, which repeats what data.json says of the training
    Target("export", "--checkpoint run --output out", "run", RUN, digest("out/[!R]*")),
    Target("import", "--checkpoint hf --output out", "hf", f"{HF} hf/*.safetensors", weights),
    Target("import", "--checkpoint sharded --output out", "sharded", "sharded/*", weights),
    Target("import", f"--checkpoint lit.pth --output out {LIT}", "", "lit.pth tok.model", weights),
    Target("import", "--checkpoint it.gguf --output out", "", "it.gguf", weights),
    Target("import", "--checkpoint parts/parts-00001-of-00002.gguf --output out", "parts", "parts/*", weights, (2,), 0.5),
    Target("convert", "--checkpoint hf --format gguf --output out.gguf", "hf", HF, digest("out.gguf"), (2,), 0.5),
    Target("generate", "--checkpoint run --prompt x --max-new-tokens 2 --greedy", "run", RUN, printed, (2,), 0.5),
    Target("generate", "--checkpoint hf --prompt x --max-new-tokens 2 --greedy", "hf", f"{HF} hf/*.safetensors", printed),
    # nobody says anything, so this is what it reads before the first message
    Target("chat", "--checkpoint talk --greedy", "talk", f"talk/chat_template.jinja {HF.replace('hf/', 'talk/')}", printed),
    Target("plan", "--config tiny.py --on cpu:1", "data", "tiny.py", printed, (2, 3), 0.5),
    Target("plan", "--law inference --inference-tokens 1e12", "", "", printed, (2, 3)),
    Target(
        "watch", f"{TRAIN} --train.wait=0.5", "data run", "run/processes/*.json run/config.json", lambda f: "", (75, 2), 0.5
    ),
]


# -- good files -----------------------------------------------------------------------------------------------------------


def make_stage(stage: Path) -> None:
    """Writes, with the commands themselves, one good file of each kind. Runs in a process of its own."""
    os.chdir(stage)
    make_tiny_data(stage)
    (stage / "data").mkdir()
    for name in "ab":
        (stage / name).rename(stage / "data" / name)
    (stage / "512.model").rename("tok.model")
    (stage / "a.train.jsonl").rename("text.jsonl")
    (stage / "tiny.py").write_text(TINY.replace("DATA", "data").replace("steps=24", "steps=12"))
    lines = Path("text.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    Path("texts").mkdir()
    Path("texts/a.txt").write_text(texts[0])
    Path("texts/b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:4]).encode(), mtime=0))
    Path("texts/d.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines[4:8]).encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[8:12]}), "texts/c.parquet", compression="zstd")
    Path("halves").mkdir()
    Path("halves/a.jsonl").write_text("\n".join(lines[:8]))
    Path("halves/b.jsonl").write_text("{")
    half = f"--train halves --dedup minhash {PREPARE}".split()
    try:
        prepare.main(half)
    except errors.UserError:
        Path("halves/b.jsonl").write_text("\n".join(lines[8:]))
    export_litpkds.export(Path("data/a"), "train", Path("packed"), "train_a", 500)
    train.main(["--config", "tiny.py", "--workdir", "run", "--train.steps=10"])
    Path("run/unigram.json").write_text('{"val_loss": 5.5}')
    Path("run/processes").mkdir(exist_ok=True)
    there = {"process": 0, "processes": 2, "moves": 3, "step": 1, "doing": "training", "ended": None}
    Path("run/processes/0.json").write_text(json.dumps(there | {"host": "a", "beats": 4, "stopped": False, "why": ""}))
    convert.export("run", "hf")
    shutil.copytree("hf", "talk")
    Path("talk/chat_template.jinja").write_text(templates.TEMPLATES["zephyr"].source)
    convert.export_gguf("run", "it.gguf", "q8_0")
    convert.export_gguf("run", "parts", "f16", shard_bytes=170_000)
    tensors = safetensors.numpy.load_file("hf/model.safetensors")
    shutil.copytree("hf", "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        safetensors.numpy.save_file({n: tensors[n] for n in names if names[n] == file}, Path("sharded") / file)
    Path("sharded/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    torch.save({"model": _as_lit(tensors), "iter_num": 3, "step_count": 3}, "lit.pth")
    for path in Path().glob("*"):
        if path.name in ("one", "other", "400.model") or path.name.startswith(("a.", "b.", "one.", "other.")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _as_lit(tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    out, K = {}, 2
    for theirs, ours in litgpt.NAMES.items():
        for i in range(2) if "{}" in theirs else [0]:
            out[theirs.format(i)] = torch.from_numpy(tensors[ours.format(i)].copy())
    for i in range(2):
        parts = [tensors[f"model.layers.{i}.self_attn.{n}_proj.weight"].reshape(K, -1, 8, 32) for n in "qkv"]
        out[litgpt.FUSED.format(i)] = torch.from_numpy(np.concatenate(parts, 1).reshape(-1, 32).copy())
    return out
