"""Adapter folders: against PEFT where it is installed, and by themselves."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from tinyllama_jax.base import config as c
from tinyllama_jax.base import sharding
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import lora, model
from tinyllama_jax.core.losses import Batch
from tinyllama_jax.core.program import build
from tinyllama_jax.hub import llama, peft

MODEL = c.Model(2, 64, 4, 2, 96, 104, 16, precision="params=float32,compute=float32,output=float32", residual="float32")
CONFIG = c.Config("x", MODEL, c.Data({"x": 1}), c.Optim(1e-2, 1e-2, 0, 0.1, 0.5), c.Train(9, 4 * 16, 4), c.Checkpoint(1),
                  lora=c.Lora(4, 12.0, "q,v,o,down"))  # fmt: skip
DEPRECATED = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # which PEFT reads
TOKENS = np.random.default_rng(0).integers(0, 104, (3, 4, 17))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Hugging Face folder, and its parameters."""
    params = jax.tree.map(lambda w: np.asarray(3 * w), model.init(jax.random.key(7), MODEL))
    folder = tmp_path_factory.mktemp("base")
    llama.save_folder(params, MODEL, folder, "float32", 1, 2)
    return folder, params


@pytest.fixture(scope="module")
def trained(base):
    """(the parameters that training starts with, those after 3 steps, the losses)."""
    mesh, losses = sharding.make_mesh(c.Mesh(), jax.devices()[:1]), []
    with jax.set_mesh(mesh):
        program = build(CONFIG, mesh)
        state = program.start(jax.device_put(base[1], jax.tree.map(lambda a: a.sharding, program.weights)))
        before = jax.device_get(state.params)
        for tokens in TOKENS:
            batch = Batch(tokens[None].astype(np.uint16), np.full((1, 4), 17, np.int32))
            state, metrics = program.train(state, Batch(*map(jax.device_put, batch, program.batch)))
            losses.append(float(metrics["loss"]))
    return before, jax.device_get(state.params), losses


@pytest.fixture(scope="module")
def adapter(base, trained, tmp_path_factory):
    """The adapter folder of `trained`."""
    folder = tmp_path_factory.mktemp("adapter")
    peft.save_folder(trained[1], MODEL, CONFIG.lora, str(base[0]), folder)
    return folder


@pytest.fixture(scope="module")
def library():
    """PEFT and torch."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    return pytest.importorskip("peft", reason="tests/install_torch.py installs peft"), torch, transformers


def test_a_folder_is_read_as_the_merged_weights(trained, adapter):
    params, shape = peft.load_folder(adapter)
    assert shape == peft.load_model(adapter) == dataclasses.replace(llama.load_model(peft.base_of(adapter)))
    merged = model.flatten(jax.device_get(lora.merge(trained[1], MODEL, CONFIG.lora)))
    for name, array in model.flatten(params).items():
        np.testing.assert_allclose(array, merged[name], rtol=1e-6, atol=1e-6, err_msg=name)
    assert not np.array_equal(merged["layers/q/kernel"], trained[1]["layers"]["q"]["kernel"])


def test_names_and_shapes(adapter):
    tensors = safetensors.numpy.load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 2 * 4 * 2
    assert tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (4, 64)
    assert tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"].shape == (32, 4)
    assert tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape == (4, 96)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj", "o_proj", "down_proj"]
    assert (config["r"], config["lora_alpha"], config["peft_type"], config["task_type"]) == (4, 12.0, "LORA", "CAUSAL_LM")


@DEPRECATED
def test_peft_loads_the_folder_and_has_the_merged_models_logits(library, base, trained, adapter):
    peft_library, torch, transformers = library
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base[0], attn_implementation="eager")
    theirs = peft_library.PeftModel.from_pretrained(theirs, adapter)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(TOKENS[0][:, :16])).logits.numpy()
    ours = model.logits(lora.merge(trained[1], MODEL, CONFIG.lora), TOKENS[0][:, :16], MODEL)
    np.testing.assert_allclose(np.asarray(ours), logits, rtol=1e-3, atol=1e-4)


@DEPRECATED
def test_training_is_pefts_with_torchs_adamw(library, base, trained, tmp_path):
    """From our first adapters, 3 steps; then the folder that PEFT writes is read."""
    peft_library, torch, transformers = library
    before, after, losses = trained
    peft.save_folder(before, MODEL, CONFIG.lora, str(base[0]), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base[0], attn_implementation="eager")
    theirs = peft_library.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for tokens, loss in zip(torch.from_numpy(TOKENS), losses, strict=True):
        optimizer.zero_grad()
        logits = theirs(tokens[:, :-1]).logits
        value = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        assert loss == pytest.approx(float(value.detach()), rel=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    params = model.flatten(peft.load_folder(tmp_path / "theirs")[0])
    for name, array in model.flatten(jax.device_get(lora.merge(after, MODEL, CONFIG.lora))).items():
        np.testing.assert_allclose(params[name], array, rtol=1e-3, atol=1e-4, err_msg=name)


A_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def _config(**changes):
    def write(folder):
        config = json.loads((folder / peft.CONFIG).read_text())
        (folder / peft.CONFIG).write_text(json.dumps(config | changes))

    return write


def _tensors(change):
    def write(folder):
        tensors = safetensors.numpy.load_file(folder / peft.WEIGHTS)
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / peft.WEIGHTS)

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_config(peft_type="LOHA"), "adapter_config.json: peft_type is 'LOHA'; only 'LORA' can be read"),
        (_config(use_dora=True), "adapter_config.json: use_dora is True, which is not computed"),
        (_config(modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\], which is not computed"),
        (_config(r=0), "adapter_config.json: is damaged"),
        (_config(r=8), r"q_proj.lora_A.weight has shape \[4, 64\], but the model's description says \[8, 64\]"),
        (_config(base_model_name_or_path="TinyLlama/TinyLlama_v1.1"),
         "names the base model TinyLlama/TinyLlama_v1.1, which is no Hugging Face folder on this machine; write the folder"),
        (_config(base_model_name_or_path=None), r"names the base model \(none\), which is no"),
        (_tensors(lambda t: t.pop(A_KEY)), f"adapter_model.safetensors: no tensor {A_KEY}"),
        (_tensors(lambda t: t.update(x=np.zeros(2, np.float32))), "unknown tensor x"),
        (_tensors(lambda t: [t.pop(key) for key in list(t)] and t.update(x=np.zeros(2, np.float32))), "holds no adapter of"),
        (lambda folder: (folder / peft.WEIGHTS).write_bytes(b"no"), "adapter_model.safetensors"),
        (lambda folder: (folder / peft.WEIGHTS).unlink(), "adapter_model.safetensors"),
    ],
)  # fmt: skip
def test_damaged_and_foreign_folders_are_refused(adapter, tmp_path, damage, message):
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        peft.load_folder(tmp_path)


def test_rank_stabilised_adapters_have_another_scale(base, adapter, tmp_path):
    """alpha / sqrt(rank), PEFT's use_rslora."""
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    _config(use_rslora=True)(tmp_path)
    q = lambda folder: peft.load_folder(folder)[0]["layers"]["q"]["kernel"]
    np.testing.assert_allclose(q(tmp_path) - base[1]["layers"]["q"]["kernel"],
                               2 * (q(adapter) - base[1]["layers"]["q"]["kernel"]), rtol=1e-3, atol=1e-6)  # fmt: skip
