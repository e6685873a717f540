"""What a person sees in the terminal, and what a folder loads as. tests/inference has the engine, sampling and text."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import models
import numpy as np
import pytest
from models import TINY, some_params

from tinyllama_jax import generate
from tinyllama_jax.base import config as c
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.export import tokenizer as export_tokenizer
from tinyllama_jax.hub import llama as hf
from tinyllama_jax.inference import weights
from tinyllama_jax.inference.engine import Engine, Request
from tinyllama_jax.inference.sampling import Sampling
from tinyllama_jax.inference.text import first_tokens
from tinyllama_jax.run import checkpoint

ROOT = Path(__file__).parents[1]


MODEL = dataclasses.replace(
    TINY, vocab_size=448, seq_len=64, precision=c.Model.precision, attention="cudnn"
)  # 28 without piece


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A run with two checkpoints, trained in bf16 with cuDNN attention, and its newest one for Hugging Face."""
    run, hugging_face = (tmp_path_factory.mktemp("folders") / name for name in ("run", "hf"))
    spm = models.train_tokenizer(tmp_path_factory.mktemp("spm") / "tokenizer.model")
    config = c.Config(str(run), MODEL, c.Data({"a": 1}), c.Optim(1e-3, 0, 0, 0, 1), c.Train(9, 64, 1), c.Checkpoint(1))
    other = jax.tree.map(lambda a: -a, some_params(MODEL))
    checkpoint.save_import(run, config, other, step=3)
    checkpoint.save_import(run, config, some_params(MODEL), step=5)
    shutil.copytree(spm.parent, run / "tokenizer")
    hugging_face.mkdir()
    export_tokenizer.write(spm, hugging_face, add_bos=False, seq_len=64)
    hf.save_folder(some_params(MODEL), MODEL, hugging_face, "float32", 1, 2)
    return {"run": run, "hf": hugging_face}


def test_a_run_and_its_export_generate_the_same(folders, capsys):
    def said(*more):
        assert generate.main(["--prompt", "def f(x", "--max-new-tokens", "40", "--temperature", "1.3", *more]) == 0
        return capsys.readouterr()

    ours, theirs = said("--checkpoint", str(folders["run"])), said("--checkpoint", str(folders["hf"]))
    assert ours.out == theirs.out and ours.out.startswith("def f(x") and len(ours.out) > 40
    assert "float32 on cpu" in ours.err and "temperature 1.3, top-k 0, top-p 1, seed 0" in ours.err
    assert said("--checkpoint", str(folders["run"]), "--step", "5").out == ours.out
    assert said("--checkpoint", str(folders["run"]), "--step", "3").out != ours.out
    assert said("--checkpoint", str(folders["run"]), "--seed", "1").out != ours.out


def test_loaded_for_the_cpu_and_without_padding(folders):
    loaded = weights.load(folders["run"])
    cfg, params = loaded.model, loaded.weights
    assert (cfg.compute_dtype, cfg.residual, cfg.attention, cfg.vocab_size) == ("float32", "float32", "auto", 420)
    assert params.embed_VD.shape == (420, 24) and params.head_DV.shape == (24, 420) and len(params.layers) == MODEL.n_layers
    np.testing.assert_array_equal(params.head_DV, some_params(MODEL)["lm_head"]["kernel"][:, :420])
    (request,) = models.run(Engine(loaded), Request([0], 63, Sampling(50.0)))  # any token there is
    assert len(request.tokens) == 63 and loaded.tokenizer.decode(request.tokens)


def test_all_devices_are_used_as_the_heads_allow(folders):
    """Of eight devices two share the 2 key heads, and four copies the rows."""
    loaded = weights.load(folders["hf"])
    assert dict(loaded.mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2} and len(jax.devices()) == 8
    q = loaded.weights.layers[0]["q"]
    assert q.sharding.shard_shape(q.shape) == (24, 12)


def test_a_stop_string_ends_the_text(folders, capsys):
    line = ["--checkpoint", str(folders["run"]), "--prompt", "import os", "--greedy", "--max-new-tokens", "30"]
    assert generate.main(line) == 0
    whole = capsys.readouterr().out.removesuffix("\n")
    stop = whole[len("import os") :][8:11]
    assert generate.main([*line, "--stop", "never in it", "--stop", stop]) == 0
    out, err = capsys.readouterr()
    assert out == whole[: whole.index(stop, len("import os"))] + "\n" and "[end of text: a stop string; " in err


def test_the_prompt_is_shown_as_ids(folders, capsys):
    tokenizer = tokenizer_lib.load(folders["run"] / "tokenizer")
    assert (
        generate.main(["--checkpoint", str(folders["run"]), "--prompt", "x = 1", "--show-prompt", "--max-new-tokens", "1"]) == 0
    )
    assert f"prompt: {tokenizer.encode('x = 1')}\n" in capsys.readouterr().err


def test_the_form_of_the_weights_and_the_draft_are_named(folders, capsys):
    run = str(folders["run"])
    more = ["--weights", "bfloat16", "--draft", "ngram", "--draft-tokens", "1", "--max-new-tokens", "1"]
    assert generate.main(["--checkpoint", run, "--prompt", "import", *more]) == 0
    assert "parameters, float32 on cpu, weights in bfloat16, draft ngram\n" in capsys.readouterr().err


def test_samples_are_headed_and_end_with_a_reason(folders, capsys):
    line = ["--checkpoint", str(folders["run"]), "--prompt", "import os"]
    assert generate.main([*line, "--samples", "3", "--max-new-tokens", "5", "--temperature", "2"]) == 0
    three = capsys.readouterr()
    heads = [f"--- sample {i} of 3 ---" for i in (1, 2, 3)]
    assert [part for part in three.out.split("\n") if part in heads] == heads
    assert three.err.count("[stopped: --max-new-tokens; 5 tokens: the first after") == 3
    assert generate.main([*line, "--samples", "1", "--max-new-tokens", "5", "--temperature", "2"]) == 0
    assert three.out.split(heads[0] + "\n")[1].split(heads[1])[0] == capsys.readouterr().out  # alone as among others
    assert generate.main([*line, "--greedy", "--max-new-tokens", "999"]) == 0
    assert "greedy, seed 0" in (err := capsys.readouterr().err)
    assert "[stopped: the context of 64 tokens is full; " in err or "[end of text; " in err


@pytest.mark.parametrize("bos", [False, True])
def test_prompts_begin_as_the_data_did(folders, bos, tmp_path):
    tokenizer = tokenizer_lib.load(folders["run"] / "tokenizer")
    tokens = lambda text: first_tokens(tokenizer, tokenizer_lib.documents_begin_with_bos(tmp_path), text)
    (tmp_path / "data.json").write_text(json.dumps([{"path": "a", "weight": 1, "bos": bos}]))
    first = [1] if bos else []
    assert tokens("x = 1") == first + tokenizer.encode("x = 1")
    assert tokens("") == (first or [2])  # eos came before a document
    (tmp_path / "data.json").unlink()
    # Transformers' LlamaTokenizer puts bos in front unless it is told not to
    for settings in ({"add_bos_token": bos}, {"tokenizer_class": "LlamaTokenizer" if bos else "PreTrainedTokenizerFast"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        assert tokens("x = 1") == first + tokenizer.encode("x = 1")


@pytest.mark.parametrize("bos", [False, True])
def test_a_loaded_folder_knows_how_prompts_begin(folders, bos, tmp_path):
    shutil.copytree(folders["run"], tmp_path / "run")
    (tmp_path / "run/data.json").write_text(json.dumps([{"path": "a", "weight": 1, "bos": bos}]))
    assert weights.load(tmp_path / "run").begin_with_bos is bos
    shutil.copytree(folders["hf"], tmp_path / "hf")
    settings = json.loads((tmp_path / "hf/tokenizer_config.json").read_text()) | {"add_bos_token": bos}
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copy(folders["run"] / "tokenizer/tokenizer.model", tmp_path / "hf")
    (tmp_path / "hf/tokenizer.json").unlink()  # whose post-processor would overrule it
    assert weights.load(tmp_path / "hf").begin_with_bos is bos


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", ""], "--checkpoint is empty; give a path"),
        (["--checkpoint", "nowhere"], "nowhere: no such file or folder; give a run folder"),
        (["--checkpoint", "RUN", "--step", "4"], "--step 4: RUN has checkpoints of the steps 3, 5"),
        (["--checkpoint", "HF", "--step", "4"], "--step 4: HF is not a run folder"),
        (["--checkpoint", "HF", "--temperature", "0"], "--temperature 0.0: must lie between .* --greedy"),
        (["--checkpoint", "HF", "--temperature", "inf"], "--temperature inf: must lie between"),
        (["--checkpoint", "HF", "--temperature", "nan"], "--temperature nan: must lie between"),
        (["--checkpoint", "HF", "--temperature", "1e-320"], "--temperature 1e-320: must lie between"),
        (["--checkpoint", "HF", "--top-p", "nan"], "--top-p nan: must lie in"),
        (["--checkpoint", "HF", "--top-k", "9" * 30], "--top-k 9+: must be 0"),
        (["--checkpoint", "HF", "--max-new-tokens", "9" * 30], "--max-new-tokens 9+: must be at least 1"),
        (["--checkpoint", "HF", "--samples", "20000000"], "--samples 20000000: must lie between 1 and 10,000"),
        (["--checkpoint", "HF", "--top-p", "1.5"], "--top-p 1.5: must lie in"),
        (["--checkpoint", "HF", "--top-k", "-1"], "--top-k -1: must be 0"),
        (["--checkpoint", "HF", "--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
        (["--checkpoint", "HF", "--samples", "0"], "--samples 0: must lie between 1 and 10,000"),
        (["--checkpoint", "HF", "--seed", "-1"], "--seed -1: must lie in"),
        (["--checkpoint", "HF", "--min-p", "1.5"], "--min-p 1.5: must lie in"),
        (["--checkpoint", "HF", "--repetition-penalty", "0"], "--repetition-penalty 0.0: must lie between"),
        (["--checkpoint", "HF", "--stop", ""], '--stop "": is empty'),
        (["--checkpoint", "HF", "--stop", "\udcff"], r"--stop '.udcff': is not UTF-8"),
        (["--checkpoint", "HF", "--prompt", "def " * 99], "the prompt has .* tokens, and the model's context is 64"),
    ],
)
def test_mistakes_are_one_line(folders, arguments, message):
    names = {"RUN": str(folders["run"]), "HF": str(folders["hf"])}
    for short, path in names.items():
        message = message.replace(short, path)
    with pytest.raises(UserError, match=message) as error:
        generate.main(["--prompt", "x", *(names.get(a, a) for a in arguments)])
    assert "\n" not in str(error.value)


def test_a_tokenizer_with_more_pieces_than_the_model_is_refused(folders, tmp_path):
    small = dataclasses.replace(MODEL, vocab_size=400)
    config = c.Config("none", small, c.Data({"a": 1}), c.Optim(1e-3, 0, 0, 0, 1), c.Train(9, 64, 1), c.Checkpoint(1))
    checkpoint.save_import(tmp_path / "run", config, some_params(small))
    shutil.copytree(folders["run"] / "tokenizer", tmp_path / "run/tokenizer")
    with pytest.raises(UserError, match="its tokenizer has 420 pieces, and its model only 400"):
        weights.load(tmp_path / "run")


def test_the_command(folders):
    def command(*arguments):
        line = [sys.executable, "-W", "error", "-m", "tinyllama_jax.generate", *arguments]
        return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""})

    good = command("--checkpoint", str(folders["run"]), "--prompt", "for i in", "--max-new-tokens", "8", "--greedy")
    assert good.returncode == 0 and good.stdout.startswith("for i in") and good.stderr.count("\n") == 3
    bad = command("--checkpoint", str(folders["run"]), "--prompt", "x", "--top-p", "0")
    assert (bad.returncode, bad.stdout, bad.stderr) == (2, "", "error: --top-p 0.0: must lie in (0, 1]\n")


def test_the_space_between_prompt_and_answer_is_printed(folders, tmp_path, capsys):
    """SentencePiece drops the space before the first word of what it decodes; an answer is no first word."""
    shutil.copytree(folders["run"], tmp_path / "run", ignore=shutil.ignore_patterns("tokenizer"))
    (tmp_path / "run/tokenizer").mkdir()
    models.train_tokenizer(tmp_path / "run/tokenizer/tokenizer.model", add_dummy_prefix=True)
    loaded, spaced = weights.load(tmp_path / "run"), 0
    prompt = first_tokens(loaded.tokenizer, loaded.begin_with_bos, "def f(x")
    for seed in range(6):
        line = ["--checkpoint", str(tmp_path / "run"), "--prompt", "def f(x", "--max-new-tokens", "12", "--seed", str(seed)]
        assert generate.main([*line, "--temperature", "5"]) == 0
        request = Request(prompt, 12, Sampling(5.0), seed, stop_ids=(loaded.tokenizer.eos_id,))
        assert list(Engine(loaded).stream(request))
        assert capsys.readouterr().out == loaded.tokenizer.decode(prompt + request.tokens) + "\n"
        spaced += loaded.tokenizer.pieces()[request.tokens[0]].startswith("▁")
    assert spaced
