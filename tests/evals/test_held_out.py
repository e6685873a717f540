"""Scores on prepared data: against the trainer's own, and bytes against those of the text."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import models
import numpy as np
import pytest
from tokenizers_for_tests import make

from tinyllama_jax import evaluate, train
from tinyllama_jax.base import cli
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.data.prepare.pipeline import prepare
from tinyllama_jax.evals import held_out
from tinyllama_jax.evals.score import Scorer
from tinyllama_jax.hub import llama
from tinyllama_jax.run import metrics

DOCUMENTS = ["x = '日本 😀é'\n  return x", "decode the string", " with a space in front", "é"]


@pytest.fixture(scope="module", params=[False, True], ids=["across documents", "within"])
def run(request, tiny_data, tiny_config_file, tmp_path_factory):
    """(run folder, its last metrics of validation) of 4 steps."""
    out = tmp_path_factory.mktemp("runs") / "run"
    mask = [f"--data.{name}={str(request.param).lower()}" for name in ("document_mask", "eod_mask_loss")]
    short = ["--train.steps=4", "--log.eval_every=4", "--train.seqs_per_device=1"]
    arguments = ["--config", str(tiny_config_file), f"--workdir={out}", *short, *mask]
    train.main(arguments)
    return out, [row for row in metrics.read(out) if "val_loss" in row][-1]


def test_scores_are_those_of_the_trainer(run, tiny_data, tmp_path, capsys):
    (folder, row), tokens = run, 0
    for source in ("a", "b"):
        line = ["--checkpoint", str(folder), "--data-set", str(tiny_data / source), "--output", str(tmp_path / "out.json")]
        assert evaluate.main(line) == 0
        record = json.loads((tmp_path / "out.json").read_text())
        assert record["data_set"]["loss"] == pytest.approx(row[f"val_loss/{source}"], rel=2e-5)
        tokens += record["data_set"]["tokens"]
        assert record["step"] == 4 and record["precision"] == "float32"
        assert f"loss {record['data_set']['loss']:.4f} +- " in capsys.readouterr().out
    assert tokens == row["val_tokens"]


@pytest.mark.parametrize("kind", ["SentencePiece", "SentencePiece as Llama's", "Hugging Face", "byte-level BPE"])
def test_bytes_are_those_of_the_text(kind, tmp_path):
    """Of all tokens but a block's first, whose bytes are taken off by hand."""
    (tmp_path / "tokenizer").mkdir()
    tokenizer = make(kind, tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    source = tokenizer.folder or tokenizer.path
    prepare(train=[tmp_path / "a.jsonl"], tokenizer=source, output=tmp_path / "data", seq_len=200, workers=1, bos=True)
    blocks = Blocks(tmp_path / "data", "train")
    assert len(blocks) == 1
    config = dataclasses.replace(models.TINY, vocab_size=tokenizer.vocab_size, seq_len=200)
    data = dataclasses.replace(cli.read(str(Path(__file__).parents[2] / "configs" / "demo.py")).data, document_mask=False)
    scores = held_out.scores(Scorer(models.loaded(config)), tokenizer, blocks, data, -1)
    assert scores["bytes"] == sum(len(text.encode()) for text in DOCUMENTS)  # the first token is bos
    _, (length,) = blocks.read(np.array([0]))
    assert scores["tokens"] == length - 1
    half = held_out.bytes_of(tokenizer)[0]
    emoji = np.array(tokenizer.encode("a😀")[1:])
    assert half(emoji, emoji).sum() == 4 and half(emoji, emoji).max() < 4  # a token that is no whole character counts its bytes
    assert scores["bits_per_byte"] < scores["loss"] / np.log(2) * scores["tokens"] / scores["bytes"]  # eos and bos left out


class FiveBlocks:
    """Blocks of 25 random tokens."""

    directory, split, tokenizer_sha256, kind = "data", "validation", "x", "text"

    def __len__(self) -> int:
        return 5

    def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.array([models.ids(25, int(i)) for i in index]), np.full(len(index), 25)

    def hold(self, first: int, last: int) -> None:
        """They are here."""


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("kind", [None, "linear", "ntk", "yarn"])
def test_longer_contexts_are_those_of_transformers(kind, factor, tmp_path):
    """The loss by position at 2 and 4 times the trained length, of the model as it is exported with RoPE so scaled."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    trained = dataclasses.replace(models.TINY, d_model=48, seq_len=24)  # H = 8
    model = held_out.lengthened(trained, factor, kind)
    S = 24 * factor
    assert (model.seq_len, model.rope_scaling) == (S, factor if kind else 1.0)
    blocks, tokenizer, params = FiveBlocks(), SimpleNamespace(sha256="x"), models.some_params(trained)
    parts = held_out.by_position(Scorer(models.loaded(model, params)), tokenizer, blocks)
    n = 125 // (S + 1)  # texts; the rest of the tokens fill none
    stream = torch.tensor([models.ids(25, i) for i in range(5)]).ravel()[: n * (S + 1)].reshape(n, S + 1)
    llama.save_folder(params, model, tmp_path, "float32", None, None)
    with torch.no_grad():
        logits = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()(stream[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), stream[:, 1:], reduction="none").numpy()
    assert [(part["from"], part["to"]) for part in parts] == [(i, i + S // 8) for i in range(0, S, S // 8)]
    for part in parts:
        assert part["loss"] == pytest.approx(losses[:, part["from"] : part["to"]].mean(), abs=1e-3)
    with pytest.raises(UserError, match="has fewer than the 1,537 tokens of one text"):
        longest = models.loaded(held_out.lengthened(trained, 64, None), params)
        held_out.by_position(Scorer(longest), tokenizer, blocks)


def test_rope_that_is_scaled_already_is_left_alone():
    model = dataclasses.replace(models.TINY, rope_scaling=4.0)
    assert held_out.lengthened(model, 1, "ntk").rope_scaling == 4
    with pytest.raises(UserError, match=r"--rope yarn: the model's RoPE is scaled by 4 already \(linear\)"):
        held_out.lengthened(model, 2, "yarn")
