"""Generation: against Transformers, against the distribution asked for, and what a person sees in the terminal."""

import dataclasses
import functools
import inspect
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from tinyllama_jax import generate
from tinyllama_jax.base import config as c
from tinyllama_jax.base import dims
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import model
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.export import tokenizer as export_tokenizer
from tinyllama_jax.generate import Sampling
from tinyllama_jax.hub import llama as hf
from tinyllama_jax.run import checkpoint

FP32 = "params=float32,compute=float32,output=float32"
TINY = c.Model(2, 24, 6, 2, 40, 53, 128, precision=FP32, residual="float32")
GREEDY = Sampling(temperature=0.0)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="the reference is Transformers on PyTorch, which has no wheel here")


@pytest.fixture
def transformers(torch):
    return pytest.importorskip("transformers", reason="the reference is Transformers")


@functools.cache
def some_params(cfg, scale=0.3):
    rng = np.random.default_rng(1)
    arrays = {p.name: rng.normal(p.kind == "norm", scale, dims.shape(p, cfg)) for p in dims.PARAMETERS}
    return model.unflatten({name: jnp.asarray(a, jnp.float32) for name, a in arrays.items()})


def ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, 53, n).tolist()


def answer(prompt, n, sampling=GREEDY, cfg=TINY, params=None, **options):
    return list(generate.stream(params or some_params(cfg), cfg, prompt, max_new_tokens=n, sampling=sampling, **options))


# -- against Transformers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cfg",
    [TINY, dataclasses.replace(TINY, rope_scaling=4.0, n_kv_heads=1), c.Model(3, 20, 2, 2, 24, 53, 101, attention="reference")],
    ids=["GQA", "MQA, RoPE stretched by 4", "MHA, odd sizes, reference"],
)
def test_greedy_is_transformers_greedy(cfg, torch, transformers):
    cfg = dataclasses.replace(cfg, precision=FP32, residual="float32")
    params = some_params(cfg, 0.7)  # with smaller ones a model soon says the same again and again
    rope = {"rope_type": "linear", "factor": cfg.rope_scaling} if cfg.rope_scaling != 1 else {"rope_type": "default"}
    config = transformers.LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.d_ff,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_kv_heads,
        rms_norm_eps=cfg.norm_eps,
        rope_parameters={"rope_theta": cfg.rope_theta, **rope},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.load_state_dict({name: torch.tensor(np.array(a)) for name, a in hf.to_hf(params, cfg)}, strict=True)
    for n in (1, 2, 16, 17):
        prompt = torch.tensor([ids(n, seed=n)])
        options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 70}
        want = llama.generate(prompt, **options)[0, n:].tolist()
        assert answer(ids(n, seed=n), 70, cfg=cfg, params=params) == want
        assert len(set(want)) > 10


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7),
        Sampling(1.5, top_k=5),
        Sampling(1.0, top_k=1),
        Sampling(1.0, top_k=99),  # more than there are
        Sampling(1.0, top_p=0.5),
        Sampling(0.3, top_p=0.9),
        Sampling(1.0, top_p=1e-6),  # the first token alone reaches it
        Sampling(2.0, top_k=20, top_p=0.8),  # of the 20, not of all
        Sampling(0.5, top_k=8, top_p=0.99),
    ],
)
@pytest.mark.parametrize("logits", ["any", "ties"])
def test_filters_are_transformers_warpers(sampling, logits, torch, transformers):
    scores = np.random.default_rng(0).normal(size=40).astype(np.float32) * 3
    if logits == "ties":
        scores = np.round(scores)
    wanted = transformers.TemperatureLogitsWarper(sampling.temperature)(None, torch.tensor(scores[None]))
    if sampling.top_k:
        wanted = transformers.TopKLogitsWarper(sampling.top_k)(None, wanted)
    if sampling.top_p < 1:
        wanted = transformers.TopPLogitsWarper(sampling.top_p)(None, wanted)
    got, wanted = np.asarray(generate.filtered(jnp.asarray(scores), sampling)), wanted[0].numpy()
    if logits == "ties" and sampling.top_p < 1:  # which of equal tokens top-p drops is no one's rule
        got, wanted = np.sort(got), np.sort(wanted)
    np.testing.assert_allclose(jax.nn.softmax(got), jax.nn.softmax(wanted), atol=1e-6)
    np.testing.assert_array_equal(np.isinf(got), np.isinf(wanted))


def test_top_p_keeps_the_token_that_crosses_it():
    logits = jnp.log(jnp.asarray([0.1, 0.4, 0.3, 0.2]))
    kept = lambda p: np.flatnonzero(np.isfinite(generate.filtered(logits, Sampling(top_p=p)))).tolist()
    assert [kept(p) for p in (0.3, 0.45, 0.75, 0.95)] == [[1], [1, 2], [1, 2, 3], [0, 1, 2, 3]]


# -- against the distribution asked for --------------------------------------------------------------------------------

SMALL = c.Model(1, 8, 2, 1, 8, 11, 512, precision=FP32, residual="float32")


def chi_square(tokens, p):
    """Pearson's statistic in standard deviations above its mean, over the tokens that can be drawn."""
    counts, possible = np.bincount(tokens, minlength=len(p)), p > 0
    assert not counts[~possible].any()
    expected = len(tokens) * p[possible]
    freedom = possible.sum() - 1
    return (((counts[possible] - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.6, top_k=7, top_p=0.95)])
def test_samples_have_the_distribution(sampling):
    params, prompt = some_params(SMALL), [3, 1, 4]
    logits = model.logits(params, jnp.asarray([prompt]), SMALL)[0, -1]
    p = np.asarray(jax.nn.softmax(generate.filtered(logits, sampling)), np.float64)
    tokens = [answer(prompt, 1, sampling, SMALL, sample=i)[0] for i in range(2_000)]
    assert chi_square(tokens, p / p.sum()) < 4
    assert chi_square(tokens, np.roll(p / p.sum(), 0)[::-1] + 1e-3) > 20  # it can tell


def test_tokens_of_one_answer_are_independent():
    flat = model.flatten(some_params(SMALL))
    params = model.unflatten(flat | {"lm_head/kernel": flat["lm_head/kernel"] * 0})  # every token as likely as another
    tokens = np.asarray(answer([0], 500, Sampling(), SMALL, params))
    assert chi_square(tokens, np.full(11, 1 / 11)) < 4
    assert chi_square((tokens[:-1] - tokens[1:]) % 11, np.full(11, 1 / 11)) < 4


def test_seed_and_sample_decide():
    draw = lambda n=30, **which: answer(ids(5), n, Sampling(1.5), **which)
    first = draw(seed=7)
    assert draw(seed=7, sample=0) == first
    assert draw(12, seed=7) == first[:12]  # however much is asked for
    assert len({tuple(a) for a in (first, draw(seed=8), draw(seed=7, sample=1), draw(seed=7, sample=2))}) == 4


# -- how it runs -------------------------------------------------------------------------------------------------------


def test_nothing_is_compiled_again_for_a_token_or_a_prompt():
    cfg = dataclasses.replace(TINY, norm_eps=2e-5)  # no other test's program
    decode, prefill = (f._cache_size() for f in (generate._next_token, generate._prefill))
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 9):
        answer(ids(n), 20, Sampling(1.1, 9), cfg, sample=n)
    assert generate._next_token._cache_size() == decode + 1
    assert generate._prefill._cache_size() == prefill + 4  # prompts of 1, 2, 4 and 8 tokens but the last


def test_the_head_is_not_computed_for_the_prompt():
    cache = jax.eval_shape(lambda: model.init_cache(TINY, 1, TINY.seq_len))
    tokens = jax.ShapeDtypeStruct((64,), np.int32)
    text = generate._prefill.lower(some_params(TINY), tokens, cache, cfg=TINY).compile().as_text()
    assert "64,40]" in text and "64,53]" not in text  # the MLP is, the logits are not


def test_it_stops_at_eos_which_it_gives():
    whole = answer(ids(3), 100)
    eos = next(token for i, token in enumerate(whole) if i > 10 and token not in whole[:i])
    assert answer(ids(3), 100, eos_id=eos) == whole[: whole.index(eos) + 1]


@pytest.mark.parametrize(("prompt", "n"), [(127, 1), (128 - 20, 20), (1, 127)])
def test_it_stops_where_the_context_is_full(prompt, n):
    assert len(answer(ids(prompt), 1_000)) == n


@pytest.mark.parametrize(
    ("prompt", "message"),
    [(128, "the prompt has 128 tokens, and the model's context is 128; shorten it to 127 or fewer"), (0, "has no tokens")],
)
def test_a_prompt_that_cannot_be(prompt, message):
    with pytest.raises(UserError, match=message):
        generate.stream(some_params(TINY), TINY, ids(prompt), max_new_tokens=1, sampling=GREEDY)  # before a token is asked for


# -- text --------------------------------------------------------------------------------------------------------------


def train_tokenizer(path, **options):
    """The demo's kind of tokenizer, of 420 pieces, from a source of Python's library."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(inspect.getsource(json.decoder).splitlines()),
        model_writer=written,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        **{"add_dummy_prefix": False, "minloglevel": 2, **options},
    )
    path.write_bytes(written.getvalue())
    return path


@pytest.fixture(scope="module")
def spm(tmp_path_factory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("spm") / "tokenizer.model")


@pytest.fixture(params=["SentencePiece", "SentencePiece as Llama's", "Hugging Face"])
def tokenizer(request, spm, tmp_path):
    if request.param == "SentencePiece as Llama's":  # each text with a space put before it
        return tokenizer_lib.load(train_tokenizer(tmp_path / "tokenizer.model", add_dummy_prefix=True))
    if request.param == "Hugging Face":
        pytest.importorskip("tokenizers")
        export_tokenizer.write(spm, tmp_path, add_bos=False, seq_len=64)
        (tmp_path / "tokenizer.model").unlink()
        return tokenizer_lib.load(tmp_path)
    return tokenizer_lib.load(spm)


TEXTS = [
    "def  f(x):\n    return  x",
    " leading",
    "naïve café — 你好, мир 😀👩‍👩‍👧!",
    "ends in the middle: 😀",
    "\ufffd a real one \ufffd",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_printed_adds_up_and_is_never_taken_back(tokenizer, text):
    tokens = tokenizer.encode(text)
    seen = generate.Text(tokenizer)
    parts = [seen.add([token]) for token in tokens]
    assert "".join(parts) == text.rstrip("\ufffd")
    assert "".join(parts) + seen.add([], last=True) == text == tokenizer.decode(tokens)
    assert len([part for part in parts if part]) >= len(text) / 8  # not kept back to the end
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


def test_half_a_character_is_shown_at_the_end(tokenizer):
    tokens = tokenizer.encode("a😀")
    assert len(tokens) >= 5  # four of them bytes
    seen = generate.Text(tokenizer)
    assert "".join(seen.add([token]) for token in tokens[:-1]) == "a"
    assert set(seen.add([], last=True)) == {"\ufffd"}
    never_ending = generate.Text(tokenizer)
    assert len("".join(never_ending.add(tokens[-1:]) for _ in range(9))) == 6  # bytes that begin nothing wait no longer


# -- folders and the command line --------------------------------------------------------------------------------------

MODEL = dataclasses.replace(
    TINY, vocab_size=448, seq_len=64, precision=c.Model.precision, attention="cudnn"
)  # 28 without piece


@pytest.fixture(scope="module")
def folders(spm, tmp_path_factory) -> dict[str, Path]:
    """A run with two checkpoints, trained in bf16 with cuDNN attention, and its newest one for Hugging Face."""
    run, hugging_face = (tmp_path_factory.mktemp("folders") / name for name in ("run", "hf"))
    config = c.Config(str(run), MODEL, c.Data({"a": 1}), c.Optim(1e-3, 0, 0, 0, 1), c.Train(9, 64, 1), c.Checkpoint(1))
    other = jax.tree.map(lambda a: -a, some_params(MODEL))
    checkpoint.save_import(run, config, other, step=3)
    checkpoint.save_import(run, config, some_params(MODEL), step=5)
    shutil.copytree(spm.parent, run / "tokenizer")
    hugging_face.mkdir()
    export_tokenizer.write(spm, hugging_face, add_bos=False, seq_len=64)
    hf.save_folder(some_params(MODEL), MODEL, hugging_face, "float32", 1, 2)
    return {"run": run, "hf": hugging_face}


def test_a_run_and_its_export_say_the_same(folders, capsys):
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
    params, cfg, tokenizer = generate.load(folders["run"])
    assert (cfg.compute_dtype, cfg.residual, cfg.attention, cfg.vocab_size) == ("float32", "float32", "auto", 420)
    assert params["embed"]["embedding"].shape == (420, 24) and params["lm_head"]["kernel"].shape == (24, 420)
    np.testing.assert_array_equal(params["lm_head"]["kernel"], some_params(MODEL)["lm_head"]["kernel"][:, :420])
    tokens = list(generate.stream(params, cfg, [0], max_new_tokens=63, sampling=Sampling(50.0)))  # any token there is
    assert len(tokens) == 63 and tokenizer.decode(tokens)


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
    (tmp_path / "data.json").write_text(json.dumps([{"path": "a", "weight": 1, "bos": bos}]))
    first = [1] if bos else []
    assert generate.first_tokens(tmp_path, tokenizer, "x = 1") == first + tokenizer.encode("x = 1")
    assert generate.first_tokens(tmp_path, tokenizer, "") == (first or [2])  # eos came before a document
    (tmp_path / "data.json").unlink()
    # Transformers' LlamaTokenizer puts bos in front unless it is told not to
    for settings in ({"add_bos_token": bos}, {"tokenizer_class": "LlamaTokenizer" if bos else "PreTrainedTokenizerFast"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        assert generate.first_tokens(tmp_path, tokenizer, "x = 1") == first + tokenizer.encode("x = 1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere: no such folder; give a run folder"),
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
        (["--checkpoint", "HF", "--prompt", "def " * 99], "the prompt has .* tokens, and the model's context is 64"),
    ],
)
def test_mistakes_are_told_in_a_line(folders, arguments, message):
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
        generate.load(tmp_path / "run")


def test_the_command(folders):
    def command(*arguments):
        line = [sys.executable, "-W", "error", "-m", "tinyllama_jax.generate", *arguments]
        return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""})

    good = command("--checkpoint", str(folders["run"]), "--prompt", "for i in", "--max-new-tokens", "8", "--greedy")
    assert good.returncode == 0 and good.stdout.startswith("for i in") and good.stderr.count("\n") == 3
    bad = command("--checkpoint", str(folders["run"]), "--prompt", "x", "--top-p", "0")
    assert (bad.returncode, bad.stdout, bad.stderr) == (2, "", "error: --top-p 0.0: must lie in (0, 1]\n")
