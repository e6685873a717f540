"""RoPE's types against Transformers, which computes them from the folders written here, and mistakes in their string."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest

from tinyllama_jax.base import dims, rope
from tinyllama_jax.base.config import Model
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import model
from tinyllama_jax.hub import llama

FP32 = {"precision": "params=float32,compute=float32,output=float32", "residual": "float32"}
PLAIN = Model(1, 24, 6, 2, 52, 101, 96, attention="reference", **FP32)
LENGTH = "original_max_position_embeddings"
LLAMA3 = f"llama3,low_freq_factor=1,high_freq_factor=4,{LENGTH}"
MODELS = {  # S goes beyond the original lengths
    "heads of another width": dataclasses.replace(PLAIN, head_dim=10),
    "linear": dataclasses.replace(PLAIN, rope_scaling=2.3, head_dim=2),
    "ntk": dataclasses.replace(PLAIN, rope_type="ntk", rope_scaling=3.0, head_dim=6),
    "llama3": dataclasses.replace(PLAIN, rope_type=f"{LLAMA3}=24", rope_scaling=4.0, head_dim=14, rope_theta=5e5),
    "yarn": dataclasses.replace(PLAIN, rope_type=f"yarn,{LENGTH}=24", rope_scaling=4.0, head_dim=16, rope_theta=100.0),
    "yarn, every number": dataclasses.replace(
        PLAIN,
        rope_type=f"yarn,{LENGTH}=25,beta_fast=8.5,beta_slow=0.5,mscale=0.7,mscale_all_dim=0.3,truncate=false",
        rope_scaling=2.5,  # x 25 = 62.5: other than S
        rope_theta=50.0,
        head_dim=18,
    ),
    "yarn, attention_factor": dataclasses.replace(
        PLAIN, rope_type=f"yarn,{LENGTH}=24,attention_factor=1.5,mscale=2", rope_scaling=3.0
    ),
}


def written(cfg: Model) -> dict:
    return json.loads(json.dumps(llama.to_hf_config(cfg, 1, 2, "float32")))


def default_precision(cfg: Model) -> Model:
    return dataclasses.replace(cfg, precision=Model.precision, residual=Model.residual, attention=Model.attention)


# -- the string ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("Yarn", "--model.rope_type=Yarn: must be one of linear, ntk, llama3, yarn; did you mean yarn?"),
        ("", "--model.rope_type=: must be one of"),
        ("longrope", "--model.rope_type=longrope: must be one of"),
        ("dynamic", "--model.rope_type=dynamic: its frequencies depend on the text's length, so cached keys would be wrong"),
        ("yarn", f"yarn needs {LENGTH}, as in yarn,{LENGTH}=NUMBER"),
        ("llama3,low_freq_factor=1", f"llama3 needs high_freq_factor, {LENGTH}"),
        ("linear,factor=2", "linear has no number 'factor', only none; the factor is --model.rope_scaling"),
        (f"yarn,{LENGTH}=8,", "yarn has no number ''"),
        (f"yarn,{LENGTH}=8,{LENGTH}=8", f"names {LENGTH} twice"),
        (f"yarn,{LENGTH}=8.5", f"{LENGTH} must be a whole number"),
        (f"yarn,{LENGTH}=nan", f"{LENGTH} must be a whole number"),
        (f"yarn,{LENGTH}=inf", f"{LENGTH} must be a whole number"),
        (f"yarn,{LENGTH}=8,mscale=-1", "mscale must be a positive number"),
        (f"yarn,{LENGTH}=8,beta_fast", "beta_fast must be a positive number"),
        (f"yarn,{LENGTH}=8,beta_fast=0.5", "beta_slow must be at most beta_fast"),
        (f"yarn,{LENGTH}=8,truncate=no", "truncate must be true or false"),
        (f"llama3,low_freq_factor=4,high_freq_factor=4,{LENGTH}=8", "low_freq_factor must be less than high_freq_factor"),
        ({"rope_type": "ntk", "rope_scaling": 1.0}, "--model.rope_scaling=1.0: must be more than 1 for --model.rope_type=ntk"),
        ({"rope_type": "ntk", "head_dim": 2}, "--model.rope_type=ntk: needs heads wider than 2"),
        ({"rope_type": "ntk", "rope_scaling": 1e6, "rope_theta": 1e14}, "--model.rope_scaling=1000000.0: makes theta"),
        ({"rope_type": f"yarn,{LENGTH}=8", "rope_theta": 1.0}, "--model.rope_theta=1.0: must be more than 1"),
        ({"head_dim": 9}, "--model.head_dim=9: gives heads of odd width 9"),
        ({"d_model": 18}, "--model.n_heads=6: gives heads of odd width 3"),
        ({"d_model": 25}, "--model.n_heads=6: must divide model.d_model=25; or set model.head_dim"),
        ({"head_dim": -2}, "--model.head_dim=-2: must be at least 0"),
    ],
)
def test_a_mistake_is_one_line(change, says):
    with pytest.raises(UserError, match=re.escape(says)) as error:
        dataclasses.replace(PLAIN, **{"rope_scaling": 4.0, **(change if isinstance(change, dict) else {"rope_type": change})})
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_equal_types_are_equal_models():
    short, long = f"yarn,{LENGTH}=2048", f"yarn, truncate=true,beta_fast=32.0,{LENGTH}=2_048"
    models = {dataclasses.replace(PLAIN, rope_scaling=4.0, rope_type=text) for text in (short, long)}
    assert [m.rope_type for m in models] == [short]
    assert dataclasses.replace(PLAIN, d_model=25, head_dim=8).d_head == 8


# -- folders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
def test_config_json_and_back_is_the_identity(cfg):
    back = llama.from_hf_config(written(cfg))
    if cfg.rope_type == "ntk":  # which is its base alone
        cfg = dataclasses.replace(cfg, rope_type="linear", rope_scaling=1.0, rope_theta=10_000 * 3 ** (6 / 4))
    assert back == default_precision(cfg)


def test_config_json_is_read_in_the_forms_that_exist():
    """Llama 3.1's folder, the same as Transformers 5 writes it, and yarn with the original length said in three ways."""
    table = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, LENGTH: 8192, "rope_type": "llama3"}
    base = written(PLAIN) | {"rope_theta": 5e5, "max_position_embeddings": 131_072, "rope_scaling": table}
    read = llama.from_hf_config(base)
    assert (read.rope_type, read.rope_scaling, read.seq_len, read.rope_theta) == (f"{LLAMA3}=8192", 8.0, 131_072, 5e5)
    later = base | {"rope_parameters": table | {"rope_theta": 5e5}}
    assert llama.from_hf_config({k: v for k, v in later.items() if k not in ("rope_theta", "rope_scaling")}) == read
    yarn = {"type": "yarn", "factor": 4, "beta_fast": None, "mscale": 0}
    for length, scaling in ((64, {}), (64, {LENGTH: 64}), (256, {LENGTH: 64})):
        read = llama.from_hf_config(base | {"max_position_embeddings": length, "rope_scaling": yarn | scaling})
        assert (read.rope_type, read.seq_len) == (f"yarn,{LENGTH}=64", 256)
    read = llama.from_hf_config(base | {LENGTH: 32, "rope_scaling": yarn, "max_position_embeddings": 128})
    assert (read.rope_type, read.seq_len) == (f"yarn,{LENGTH}=32", 128)
    nothing = llama.from_hf_config(base | {"rope_scaling": table | {"factor": 1.0}})
    assert (nothing.rope_type, nothing.rope_scaling, nothing.seq_len) == ("linear", 1.0, 131_072)
    assert llama.from_hf_config(base | {"head_dim": None, "rope_scaling": None}).head_dim == 0


def test_a_yarn_factor_is_also_the_ratio_of_the_lengths():
    """Transformers 4 takes the factor from this ratio. The trained length has a key of its own."""
    there = written(MODELS["yarn, every number"])
    assert (there["max_position_embeddings"], there["seq_len"], there["rope_scaling"][LENGTH]) == (62, 96, 25)
    assert "seq_len" not in written(MODELS["yarn"])


# -- against Transformers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="the independent implementation")
    return pytest.importorskip("transformers", reason="the independent implementation")


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_frequencies_are_those_of_transformers(kind, transformers):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    tables = {
        "linear": [{}],
        "llama3": [
            {"low_freq_factor": 1.0, "high_freq_factor": 4.0, LENGTH: 8192},
            {"low_freq_factor": 1.5, "high_freq_factor": 4.7, LENGTH: 37},
        ],
        "yarn": [
            {LENGTH: 2048},
            {LENGTH: 33, "truncate": False},
            {LENGTH: 4096, "beta_fast": 20.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.7},
            {LENGTH: 10**6, "beta_fast": 2.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 1.2},
        ],
    }[kind]
    same = []
    for H, base, factor, n in itertools.product((4, 10, 64, 128), (500.0, 1e4, 5e5), (1.5, 8.0, 32.0), tables):
        table = {"rope_type": kind, "factor": factor, "rope_theta": base, **n}
        config = transformers.LlamaConfig(hidden_size=2 * H, num_attention_heads=2, rope_parameters=table)
        theirs = LlamaRotaryEmbedding(config)
        text = rope.text_of(kind, n)
        cfg = dataclasses.replace(PLAIN, head_dim=H, rope_theta=base, rope_scaling=factor, rope_type=text)
        ours, scale = rope.frequencies(cfg)
        assert scale == theirs.attention_scaling and ours.dtype == np.float32 and ours.shape == (H // 2,)
        np.testing.assert_allclose(ours, theirs.inv_freq.numpy(), rtol=2.5e-7, err_msg=str(table))
        same.extend(ours == theirs.inv_freq.numpy())
    assert np.mean(same) > 0.98  # the others are off by 1 or 2 ulp, in the power


@pytest.mark.parametrize("cfg", list(MODELS.values())[:5], ids=list(MODELS)[:5])  # yarn's other numbers: in the test above
def test_logits_and_greedy_tokens_are_those_of_transformers(cfg, transformers, tmp_path):
    import torch

    rng = np.random.default_rng(0)
    flat = {p.name: rng.normal(p.kind == "norm", 0.4, dims.shape(p, cfg)).astype(np.float32) for p in dims.PARAMETERS}
    params = model.unflatten(flat)
    llama.save_folder(params, cfg, tmp_path, "float32", None, None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.tensor(rng.integers(0, cfg.vocab_size, (2, 71)))
    with torch.no_grad():
        mask = torch.ones_like(tokens)
        text = theirs.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=25, pad_token_id=0)
        want = theirs(text).logits.numpy()
    got = np.asarray(model.logits(params, text.numpy(), cfg))
    assert text.shape == (2, 96) and want.std() > 0.5 and len(set(text[0, 71:].tolist())) > 5
    np.testing.assert_allclose(got, want, atol=2e-4, rtol=0)
    np.testing.assert_array_equal(got[:, 70:-1].argmax(-1), text[:, 71:])
    read = model.flatten(llama.load_folder(tmp_path)[0])
    assert all((read[name] == flat[name]).all() for name in flat)


def test_a_tied_llama3_folder_of_transformers_is_read(transformers, tmp_path):
    """As Llama 3.2: tied, an odd vocabulary, heads of another width, rope_parameters."""
    import torch

    table = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, LENGTH: 16}
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
    config = transformers.LlamaConfig(
        **shape, intermediate_size=20, vocab_size=37, max_position_embeddings=64, tie_word_embeddings=True,
        rope_parameters=table | {"rope_theta": 500.0}, initializer_range=0.3,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    params, read = llama.load_folder(tmp_path)
    assert (read.head_dim, read.rope_type, read.seq_len) == (8, f"{LLAMA3}=16", 64)
    tokens = np.random.default_rng(2).integers(0, 37, (2, 64))
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)).logits.numpy()
    ours = model.logits(params, tokens, dataclasses.replace(read, **FP32))
    np.testing.assert_allclose(ours, want, atol=1e-4, rtol=0)


def test_a_table_takes_positions_of_any_shape():
    positions, cfg = np.asarray([[0, 5, 90], [7, 1, 2]]), MODELS["yarn"]
    for whole, first in zip(model.rope_table(positions, cfg), model.rope_table(positions[0], cfg), strict=True):
        assert whole.shape == (2, 3, 8)
        np.testing.assert_array_equal(whole[0], first)
