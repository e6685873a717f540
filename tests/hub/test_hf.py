"""The table between this and Llama in Hugging Face, and what is read and written by it."""

import dataclasses
import json
import math
import re
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tinyllama_jax.base import dims
from tinyllama_jax.base.config import Model
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import model
from tinyllama_jax.hub import llama, tensor_files

GQA = Model(
    n_layers=3,
    d_model=24,
    n_heads=6,
    n_kv_heads=2,
    d_ff=52,
    vocab_size=101,
    seq_len=64,
    precision="params=float32,compute=float32,output=float32",
    residual="float32",
)
MODELS = {
    "gqa": GQA,
    "mqa, scaled": dataclasses.replace(GQA, n_kv_heads=1, rope_scaling=4.0, norm_eps=1e-3),
    "mha": dataclasses.replace(GQA, n_layers=1, n_heads=3, n_kv_heads=3, rope_theta=500_000.0, vocab_size=37),
}


def random_params(cfg: Model, seed: int = 0) -> dict:
    """Every parameter at random and of order 0.3, the norms around 1, so that each of them shows in the logits."""
    rng = np.random.default_rng(seed)
    flat = {p.name: rng.normal(p.kind == "norm", 0.3, dims.shape(p, cfg)).astype(np.float32) for p in dims.PARAMETERS}
    return model.unflatten(flat)


def assert_same(a: dict, b: dict) -> None:
    """The same names and the same bits."""
    a, b = model.flatten(a), model.flatten(b)
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


# -- the table ----------------------------------------------------------------------------------------------------------


def test_names_cover_the_parameters_and_shapes_are_hugging_faces():
    assert list(llama.NAMES) == [p.name for p in dims.PARAMETERS]
    shapes = llama.shapes(GQA)
    assert len(shapes) == 3 + 9 * 3
    assert shapes["model.layers.2.self_attn.q_proj.weight"] == (24, 24)
    assert shapes["model.layers.2.self_attn.k_proj.weight"] == (2 * 4, 24)
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (52, 24)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (24, 52)
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (101, 24)
    assert sum(map(math.prod, shapes.values())) == dims.n_parameters(GQA)


def test_a_row_of_q_proj_is_a_column_of_the_kernel():
    params = random_params(GQA)
    tensors = dict(llama.to_hf(params, GQA))
    head, width, into = 4, 3, 7
    assert (
        tensors["model.layers.1.self_attn.q_proj.weight"][head * 4 + width, into]
        == params["layers"]["q"]["kernel"][1, into, head, width]
    )
    assert (
        tensors["model.layers.1.self_attn.o_proj.weight"][into, head * 4 + width]
        == params["layers"]["o"]["kernel"][1, head, width, into]
    )


@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
def test_import_after_export_is_the_identity(cfg):
    params = random_params(cfg)
    params["final_norm"]["scale"][:4] = [np.nan, np.inf, -0.0, 1e-45]  # bits, not numbers
    assert_same(llama.from_hf(dict(llama.to_hf(params, cfg)), cfg, allow_non_finite=True), params)


def test_export_after_import_is_the_identity():
    rng = np.random.default_rng(1)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in llama.shapes(GQA).items()}
    back = dict(llama.to_hf(llama.from_hf(tensors, GQA), GQA))
    assert list(back) == list(tensors)
    assert all(back[name].tobytes() == tensors[name].tobytes() for name in tensors)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_exactly(dtype):
    params = jax.tree.map(lambda a: a.astype(dtype).astype(np.float32), random_params(GQA))
    halves = {name: tensor.astype(dtype) for name, tensor in llama.to_hf(params, GQA)}
    assert_same(llama.from_hf(halves, GQA), params)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "no tensor model.layers.1.mlp.up_proj.weight;"),
        (lambda t: [t.pop(n) for n in list(t) if ".2." in n], "no tensor model.layers.2.input_layernorm.weight (and 8 more)"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": 0}),
            "unknown tensor model.layers.0.self_attn.q_proj.bias;",
        ),
        (lambda t: t.update({"lm_head.weight": np.zeros((24, 101), "f")}), "lm_head.weight has shape [24, 101], but "),
        (lambda t: t.update({"model.norm.weight": np.zeros(24, np.int8)}), "model.norm.weight is of dtype int8; only float32"),
    ],
)
def test_a_wrong_tensor_is_named(change, says):
    tensors = dict(llama.to_hf(random_params(GQA), GQA))
    change(tensors)
    with pytest.raises(UserError, match=f"^there: .*{re.escape(says)}"):
        llama.from_hf(tensors, GQA, "there")


def test_rotary_tables_of_old_checkpoints_are_left_out():
    params = random_params(GQA)
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32) for i in range(3)}
    assert_same(llama.from_hf(dict(llama.to_hf(params, GQA)) | old, GQA), params)


# -- config.json --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
def test_config_travels_both_ways(cfg):
    there = json.loads(json.dumps(llama.to_hf_config(cfg, 1, 2, "float32")))
    assert llama.from_hf_config(there) == dataclasses.replace(cfg, precision=Model.precision, residual=Model.residual)


def test_linear_scaling_is_said_as_hugging_face_says_it():
    code_model = dataclasses.replace(GQA, seq_len=8_192, rope_scaling=4.0)
    there = llama.to_hf_config(code_model, 1, 2, "float32")
    assert (there["max_position_embeddings"], there["rope_scaling"]) == (2_048, {"type": "linear", "factor": 4.0})
    del there["rope_theta"]
    there |= {
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    }  # Transformers 5
    assert llama.from_hf_config(there).rope_scaling == 4.0
    assert llama.from_hf_config(there).rope_theta == 1e6
    assert llama.from_hf_config(there).seq_len == 8_192


@pytest.mark.parametrize(
    ("seq_len", "scaling"), [(2_048, 3.0), (2_048, 1.5), (8_192, 4.0), (2_047, 7.3), (4_096, 1.1), (16, 64.0)]
)
def test_the_length_comes_back_whatever_the_scaling(seq_len, scaling):
    cfg = dataclasses.replace(GQA, seq_len=seq_len, rope_scaling=scaling)
    there = json.loads(json.dumps(llama.to_hf_config(cfg, 1, 2, "float32")))
    assert there["max_position_embeddings"] * scaling <= max(seq_len + 0.5, scaling)  # no reader goes beyond what was trained
    assert llama.from_hf_config(there).seq_len == seq_len
    there["seq_len"] = 7_777  # of somebody else, or not true any more
    assert llama.from_hf_config(there).seq_len == round(there["max_position_embeddings"] * scaling)


def test_multi_head_attention_of_before_grouped_queries():
    there = llama.to_hf_config(MODELS["mha"], 1, 2, "float32")
    del there["num_key_value_heads"], there["head_dim"]
    assert llama.from_hf_config(there).n_kv_heads == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"head_dim": 7}, "--model.head_dim=7: gives heads of odd width 7"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3 needs low_freq_factor, high_freq_factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "--model.rope_type=dynamic: its frequencies depend on"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}, "--model.rope_type=longrope: must be one of"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 8.0}}, 'RoPE is {"rope_type": "ntk"'),  # no such type in Transformers
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "truncate": None}}, "`$.rope_scaling.truncate`"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 0}}, "attention_factor must be a positive"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "beta_fast": "32"}}, "`$.rope_scaling.beta_fast`"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "does not say 'factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "on whole heads"),
        ({"num_key_value_heads": 5}, "model.n_kv_heads=5: must divide"),
        ({"rms_norm_eps": None}, "config.json: Expected `float`, got `null` - at `$.rms_norm_eps`"),
        ({"rms_norm_eps": 0}, "`float` > 0.0 - at `$.rms_norm_eps`"),
        ({"rms_norm_eps": True}, "`$.rms_norm_eps`"),
        ({"rope_theta": 1e30}, "`$.rope_theta`"),
        ({"rope_theta": "1e4"}, "`$.rope_theta`"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000, and 4,096 are the most"),
        ({"num_hidden_layers": 10**30}, "`$.num_hidden_layers`"),
        ({"num_hidden_layers": 0}, "`$.num_hidden_layers`"),
        ({"num_hidden_layers": 2.5}, "Expected `int`, got `float` - at `$.num_hidden_layers`"),
        ({"num_hidden_layers": True}, "Expected `int`, got `bool` - at `$.num_hidden_layers`"),
        ({"hidden_size": -24}, "Expected `int` >= 1 - at `$.hidden_size`"),
        ({"hidden_size": "24"}, "Expected `int`, got `str` - at `$.hidden_size`"),
        ({"intermediate_size": 10**12}, "`$.intermediate_size`"),
        ({"vocab_size": [101]}, "Expected `int`, got `array` - at `$.vocab_size`"),
        ({"max_position_embeddings": None}, "`$.max_position_embeddings`"),
        ({"num_attention_heads": 0}, "`$.num_attention_heads`"),
        ({"rope_scaling": 3}, "`$.rope_scaling`"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "`$.rope_scaling.factor`"),
        ({"rope_scaling": {"type": "linear", "factor": 1e300}}, "`$.rope_scaling.factor`"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "model.rope_scaling=0.5: must be at least 1"),
        ({"rope_scaling": {"type": "linear"}}, "does not say 'factor'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, 'RoPE is {"full_attention"'),
        ({"model_type": ["llama"]}, "model_type is ['llama']"),
        ({"attention_bias": "x" * 10**6}, "attention_bias is 'xxx"),
    ],
)
def test_what_is_not_computed_is_refused(change, says):
    with pytest.raises(UserError, match=re.escape(says)) as error:
        llama.from_hf_config(llama.to_hf_config(GQA, 1, 2, "float32") | change)
    assert len(str(error.value)) < 400


def test_a_model_that_its_files_do_not_hold_is_refused_before_it_is_made(tmp_path):
    folder(tmp_path)
    wide = llama.to_hf_config(GQA, 1, 2, "float32") | {"intermediate_size": 2**20, "num_hidden_layers": 1_024}
    for change, says in (
        ({}, "no tensor model.layers.3"),
        ({"num_hidden_layers": 3}, "gate_proj.weight has shape [52, 24], but "),
    ):
        (tmp_path / "config.json").write_text(json.dumps(wide | change))  # 8 x 10^10 weights
        with pytest.raises(UserError, match=re.escape(says)):
            llama.load_folder(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "", "{", '{"model_type": "llama"', "\xff", '{"a": ' + "[" * 10**5, '{"a": 1e999}'])
def test_a_config_that_is_none_is_one_line(tmp_path, text):
    (folder(tmp_path) / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.json: is damaged \([^\n]*$"):
        llama.load_folder(tmp_path)


def test_what_is_not_said_is_refused():
    there = llama.to_hf_config(GQA, 1, 2, "float32")
    del there["intermediate_size"]
    with pytest.raises(UserError, match="does not say 'intermediate_size'"):
        llama.from_hf_config(there)


# -- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", llama.DTYPES)
def test_the_library_reads_what_is_written(tmp_path, dtype):
    params = random_params(GQA)
    llama.save_folder(params, GQA, tmp_path, dtype, 1, 2)
    read = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    for name, tensor in llama.to_hf(params, GQA):
        assert read[name].dtype == llama.DTYPES[dtype] and np.array_equal(read[name], tensor.astype(llama.DTYPES[dtype])), name
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0  # tensors stay aligned in a memory map
    modes = {(tmp_path / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1  # whoever can read one can read the other


def test_shards_are_filled_in_order_and_found_by_the_index(tmp_path):
    params = random_params(GQA)
    llama.save_folder(params, GQA, tmp_path, "float32", 1, 2, shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    sizes = [sum(t.nbytes for t in safetensors.numpy.load_file(tmp_path / f).values()) for f in files]
    assert len(files) >= 4 and max(sizes) <= 20_000
    assert index["metadata"]["total_size"] == 4 * dims.n_parameters(GQA)
    held = {name: file for file in files for name in safetensors.numpy.load_file(tmp_path / file)}
    assert index["weight_map"] == held and list(index["weight_map"]) == list(llama.shapes(GQA))
    read, cfg = llama.load_folder(tmp_path)
    assert_same(read, params)
    assert cfg.n_kv_heads == 2


@pytest.mark.parametrize("dtype", llama.DTYPES)
def test_writing_needs_the_memory_of_one_shard(tmp_path, dtype):
    cfg = dataclasses.replace(GQA, d_model=192, d_ff=256, n_layers=16)  # 4 M weights
    params = random_params(cfg)
    tracemalloc.start()
    llama.save_folder(params, cfg, tmp_path, dtype, 1, 2, shard_bytes=2_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(list(tmp_path.glob("*.safetensors"))) > 3 and peak < 2_600_000


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    llama.save_folder(random_params(GQA), GQA, tmp_path, "float32", 1, 2, shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(llama.shapes(GQA))


@pytest.mark.parametrize(("dtype", "number"), [("float16", 70_000.0), ("bfloat16", 3.4e38)])
def test_overflow_is_refused_and_named(tmp_path, dtype, number):
    params = random_params(GQA)
    params["layers"]["o"]["kernel"][1, 0, 0, 0] = number
    with pytest.raises(
        UserError, match=re.escape(f"--dtype={dtype}: model.layers.1.self_attn.o_proj.weight holds {number:g},")
    ):
        llama.save_folder(params, GQA, tmp_path, dtype, 1, 2)
    params["layers"]["o"]["kernel"][1, 0, 0, 0] = np.inf  # as it was in the run: not the cast's doing
    llama.save_folder(params, GQA, tmp_path, dtype, 1, 2)


def folder(tmp_path, **options):
    llama.save_folder(random_params(GQA), GQA, tmp_path, "float32", 1, 2, **options)
    return tmp_path


def test_a_cut_file_is_named(tmp_path):
    path = folder(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors: is not a whole safetensors file"):
        llama.load_folder(tmp_path)


def test_a_lost_shard_is_named(tmp_path):
    (folder(tmp_path, shard_bytes=20_000) / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(UserError, match=r"its index names model-00002-of-00005\.safetensors, which is not in it"):
        llama.load_folder(tmp_path)


def test_a_tensor_that_only_the_index_has_is_named(tmp_path):
    index = folder(tmp_path, shard_bytes=20_000) / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"]["ghost.weight"] = "model-00001-of-00005.safetensors"
    index.write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"index\.json: no tensor ghost\.weight"):
        llama.load_folder(tmp_path)
    told["weight_map"]["ghost.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"its index names \.\./elsewhere"):
        llama.load_folder(tmp_path)


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("config.json", r"config\.json: no such file"),
        ("model.safetensors", "holds neither model.safetensors nor pytorch_model"),
    ],
)
def test_a_lost_file_is_named(tmp_path, lost, says):
    (folder(tmp_path) / lost).unlink()
    with pytest.raises(UserError, match=says):
        llama.load_folder(tmp_path)


def test_no_folder_and_no_json(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        llama.load_folder(tmp_path / "nowhere")
    (folder(tmp_path) / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: is damaged"):
        llama.load_folder(tmp_path)


@pytest.mark.parametrize("head", ["absent", "equal", "different"])
def test_tied_embeddings_become_two_tables(tmp_path, capsys, head):
    params = random_params(GQA)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in llama.to_hf(params, GQA)}
    if head == "absent":
        del tensors["lm_head.weight"]
    elif head == "equal":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    there = llama.to_hf_config(GQA, 1, 2, "float32") | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(there))
    if head == "different":
        with pytest.raises(UserError, match=r"tie_word_embeddings is true, but lm_head\.weight and .* differ"):
            llama.load_folder(tmp_path)
        return
    read, _ = llama.load_folder(tmp_path)
    assert np.array_equal(read["lm_head"]["kernel"].T, params["embed"]["embedding"])
    assert "tie_word_embeddings" in capsys.readouterr().out


# -- against Transformers -----------------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    pytest.importorskip("transformers", reason="the independent implementation")
    return pytest.importorskip("torch", reason="the independent implementation")


def their_logits(torch, reference, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.tensor(tokens)).logits.numpy()


def tokens_for(cfg: Model) -> np.ndarray:
    return np.random.default_rng(2).integers(0, cfg.vocab_size, (2, cfg.seq_len))


def as_tested(cfg: Model) -> Model:
    return dataclasses.replace(cfg, precision=GQA.precision, residual="float32")


@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
def test_exported_logits_equal_transformers(torch, tmp_path, cfg):
    from transformers import AutoModelForCausalLM

    params = random_params(cfg)
    llama.save_folder(params, cfg, tmp_path, "float32", 1, 2, shard_bytes=20_000)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = np.asarray(model.logits(params, tokens_for(cfg), cfg))
    np.testing.assert_allclose(ours, their_logits(torch, reference, tokens_for(cfg)), atol=1e-4, rtol=0)
    assert ours.std() > 0.5  # that there is something to agree on


@pytest.mark.parametrize("written", ["safetensors", "safetensors in shards", "bin", "bin in shards", "old bin", "bf16 bin"])
@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
def test_imported_logits_equal_transformers(torch, tmp_path, cfg, written):
    from transformers import LlamaConfig, LlamaForCausalLM

    linear = {"rope_type": "linear", "factor": cfg.rope_scaling}
    torch.manual_seed(0)
    reference = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=cfg.d_model,
            num_hidden_layers=cfg.n_layers,
            num_attention_heads=cfg.n_heads,
            num_key_value_heads=cfg.n_kv_heads,
            intermediate_size=cfg.d_ff,
            vocab_size=cfg.vocab_size,
            max_position_embeddings=int(cfg.seq_len / cfg.rope_scaling),
            rms_norm_eps=cfg.norm_eps,
            rope_parameters={**(linear if cfg.rope_scaling > 1 else {"rope_type": "default"}), "rope_theta": cfg.rope_theta},
            initializer_range=0.3,
        )
    )
    if written == "bf16 bin":
        for weight in reference.parameters():
            weight.data = weight.data.bfloat16().float()
    reference.save_pretrained(tmp_path, max_shard_size="20KB" if "shards" in written else "1GB")
    if "bin" in written:
        for file in tmp_path.glob("*.safetensors*"):
            file.unlink()
        state = {n: w.bfloat16() if written == "bf16 bin" else w for n, w in reference.state_dict().items()}
        parts = [{name: state[name] for name in list(state)[i::3]} for i in range(3)] if "shards" in written else [state]
        files = [f"pytorch_model-{i}.bin" for i in range(3)] if "shards" in written else ["pytorch_model.bin"]
        for file, part in zip(files, parts, strict=True):
            torch.save(part, tmp_path / file, _use_new_zipfile_serialization=written != "old bin")
        if "shards" in written:
            weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert ("shards" in written) == bool(list(tmp_path.glob("*.index.json")))
    params, read = llama.load_folder(tmp_path)
    assert read == dataclasses.replace(cfg, precision=read.precision, residual=read.residual)
    ours = np.asarray(model.logits(params, tokens_for(cfg), as_tested(read)))
    np.testing.assert_allclose(ours, their_logits(torch, reference, tokens_for(cfg)), atol=1e-4, rtol=0)
    assert ours.std() > 0.5


def test_tied_embeddings_of_transformers(torch, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 6, "intermediate_size": 20, "vocab_size": 37}
    reference = LlamaForCausalLM(LlamaConfig(**small, max_position_embeddings=16, tie_word_embeddings=True))
    reference.save_pretrained(tmp_path)
    params, read = llama.load_folder(tmp_path)
    ours = np.asarray(model.logits(params, tokens_for(read), as_tested(read)))
    np.testing.assert_allclose(ours, their_logits(torch, reference, tokens_for(read)), atol=1e-4, rtol=0)


class Malicious:
    """Unpickled, it writes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_does_nothing(torch, tmp_path, zipped):
    import pickle

    file, target = folder(tmp_path) / "pytorch_model.bin", tmp_path / "owned"
    torch.save({"lm_head.weight": Malicious(target)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: was not loaded: it holds (_?io|builtins)\.open,") as refused:
        llama.load_folder(file)
    assert not target.exists() and "\n" not in str(refused.value)
    with pytest.raises(UserError, match="is not a table of tensors by name"):
        torch.save([torch.ones(2)], file)
        llama.load_folder(file)
    pickle.loads(pickle.dumps(Malicious(target))).close()  # that it would have
    assert target.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_broken_pickle_is_one_clear_line(torch, tmp_path, content):
    file = folder(tmp_path) / "pytorch_model.bin"
    torch.save({"a": torch.ones(1_000)}, file)
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: is not a whole PyTorch file") as refused:
        llama.load_folder(file)
    assert "\n" not in str(refused.value)


def test_without_torch_a_pickle_is_an_error_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match="needs PyTorch to read: pip install torch"):
        tensor_files.read_pickle(tmp_path / "pytorch_model.bin")
