"""A run with adapters from start to end: resume, merging wherever its weights are read, exports, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax import convert, train
from tinyllama_jax.base import cli, sharding
from tinyllama_jax.base import config as c
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import lora, model
from tinyllama_jax.core.losses import Batch
from tinyllama_jax.core.program import build
from tinyllama_jax.hub import llama, peft
from tinyllama_jax.inference import weights
from tinyllama_jax.run import checkpoint, metrics, stages


@pytest.fixture(scope="module")
def runs(tiny_config_file, tmp_path_factory):
    """A folder with `base`, a run of imported weights; `hf`, the same for Hugging Face; `run`, 6 steps of adapters on `hf`."""
    folder = tmp_path_factory.mktemp("lora")
    config = cli.read(str(tiny_config_file))
    params = jax.tree.map(lambda w: np.asarray(3 * w), model.init(jax.random.key(3), config.model))
    checkpoint.save_import(folder / "base", dataclasses.replace(config, workdir=str(folder / "base")), params)
    source = next(iter(config.data.sources))
    convert.tokenizer_lib.load(f"{source}/tokenizer").save(folder / "base" / "tokenizer")
    convert.export(folder / "base", folder / "hf")
    assert train.main(argv(tiny_config_file, folder / "run", folder / "hf", "--train.steps=6")) == 0
    return folder


def argv(file, workdir, origin, *options):
    return ["--config", str(file), f"--workdir={workdir}", f"--init.from={origin}", "--train.seqs_per_device=1",
            "--checkpoint.every=3", "--lora.rank=4", "--lora.alpha=8", "--lora.base=bfloat16", "--lora.targets=q,o,up,down",
            "--train.steps=6", "--log.every=1", "--optim.warmup_steps=1", *options]  # fmt: skip


def losses(run):
    return [row["loss"] for row in metrics.read(run) if "loss" in row]


def same(tree, other):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), tree, other)


def raw(run, step=None):
    return checkpoint.load_params(run, step, merge=False)[0]


def test_it_resumes_bit_for_bit(runs, tiny_config_file, tmp_path):
    """Stopped after 3 of 6 steps, from the run of the imported weights instead of their Hugging Face folder."""
    line = argv(tiny_config_file, tmp_path / "run", runs / "base")
    assert train.main([*line, "--train.steps=3", "--optim.decay_steps=6"]) == 0
    assert train.main([*line, "--optim.decay_steps=6"]) == 0
    assert losses(tmp_path / "run") == losses(runs / "run") and losses(runs / "run")[-1] < losses(runs / "run")[0]
    same(raw(tmp_path / "run"), raw(runs / "run"))
    with pytest.raises(UserError, match="--lora.rank=8: the run in .* has 4; restore that value, or start another run"):
        train.main([*line, "--lora.rank=8", "--train.steps=9"])
    with pytest.raises(UserError, match="--lora.base=nf4|--model.d_model=32"):
        train.main([*line, "--lora.base=nf4", "--train.steps=9"])


def test_only_adapters_have_changed_and_moments(runs):
    before, after = (raw(runs / "run", step) for step in (3, 6))
    base = checkpoint.load_params(runs / "base")[0]
    for name, array in model.flatten(after).items():
        if "lora" in name:
            assert not np.array_equal(array, model.flatten(before)[name])
        else:
            kept = model.flatten(base)[name]
            np.testing.assert_array_equal(array, kept if name.endswith("scale") else kept.astype(jnp.bfloat16), err_msg=name)
    assert not any("norm" in path.name or ".k." in path.name for path in (runs / "run/checkpoints/6/train").glob("*mu*"))


def test_every_reader_has_the_merged_weights(runs, tmp_path):
    """Training's own evaluation, the engine's weights, an export, a GGUF and the next run."""
    merged, config, step = checkpoint.load_params(runs / "run")
    assert step == 6 and config.lora.rank == 4
    q = raw(runs / "run")["layers"]["q"]
    by_hand = np.float32(q["kernel"]) + 2 * np.einsum("ldr,lrnh->ldnh", q["lora_a"], q["lora_b"])
    np.testing.assert_allclose(merged["layers"]["q"]["kernel"], by_hand, rtol=1e-5, atol=1e-7)
    assert np.abs(merged["layers"]["q"]["kernel"] - np.float32(q["kernel"])).max() > 1e-3
    loaded = weights.load(runs / "run")
    np.testing.assert_allclose(loaded.weights.layers[1]["q"], merged["layers"]["q"]["kernel"][1].reshape(32, -1), rtol=1e-6)
    sampled = weights.of_params(raw(runs / "run"), loaded.model, loaded.mesh, config.lora)
    np.testing.assert_allclose(sampled.layers[1]["down"], loaded.weights.layers[1]["down"], rtol=1e-5, atol=1e-7)
    convert.export(runs / "run", tmp_path / "hf")
    same(llama.load_folder(tmp_path / "hf")[0], merged)
    abstract = model.unflatten({name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.sharding.SingleDeviceSharding(
        jax.devices()[0])) for name, a in model.flatten(merged).items()})  # fmt: skip
    same(checkpoint.restore_params(runs / "run", 6, abstract), merged)


def test_the_adapter_folder_is_the_run_merged(runs, tmp_path, capsys):
    """Its base is the fp32 folder, which the run rounded to bf16."""
    assert convert.main(["--checkpoint", str(runs / "run"), "--format", "peft", "--output", str(tmp_path / "adapter")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'adapter'}: the adapters of step 6 of {runs / 'run'}\n"
    params, _ = peft.load_folder(tmp_path / "adapter")
    merged, base = checkpoint.load_params(runs / "run")[0], llama.load_folder(runs / "hf")[0]
    for name, array in model.flatten(params).items():
        kept = model.flatten(base)[name]
        rounded = kept if name.endswith("scale") else kept.astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_allclose(array - kept, model.flatten(merged)[name] - rounded, rtol=1e-4, atol=1e-6)
    loaded = weights.load(tmp_path / "adapter")  # generate, chat and serve use it
    np.testing.assert_allclose(loaded.weights.layers[0]["o"], params["layers"]["o"]["kernel"][0].reshape(-1, 32), rtol=1e-6)
    (tmp_path / "adapter" / "tokenizer.model").unlink()
    assert weights.load(tmp_path / "adapter").folder == runs / "hf"
    convert.import_checkpoint(tmp_path / "adapter", tmp_path / "imported")
    same(checkpoint.load_params(tmp_path / "imported")[0], params)


def test_what_cannot_be_is_refused(runs, tiny_config_file, tmp_path, capsys):
    with pytest.raises(UserError, match="--lora.rank=4: adapters need trained weights; add --init.from=RUN_OR_FOLDER"):
        train.main([o for o in argv(tiny_config_file, tmp_path / "a", "") if not o.startswith("--init")])
    with pytest.raises(UserError, match="--init.state=moments: .* so AdamW's moments are of other arrays; use"):
        train.main(argv(tiny_config_file, tmp_path / "b", runs / "run", "--init.state=moments", "--lora.rank=2"))
    with pytest.raises(UserError, match="base: is no run with adapters .lora.rank.; --format hf writes all weights"):
        convert.main(["--checkpoint", str(runs / "base"), "--format", "peft", "--output", str(tmp_path / "c")])
    with pytest.raises(UserError, match="--dtype bfloat16: has no meaning with --format peft"):
        convert.main(["--checkpoint", str(runs / "run"), "--format", "peft", "--output", "c", "--dtype", "bfloat16"])
    file = tmp_path / "lora.json"
    file.write_text(c.to_json(dataclasses.replace(cli.read(str(tiny_config_file)), lora=c.Lora(4))))
    with pytest.raises(UserError, match="--config .*lora.json: trains adapters; import without it, and train with "):
        convert.import_checkpoint(runs / "hf", tmp_path / "d", str(file))
    assert not (tmp_path / "c").exists()


def test_a_run_on_adapters_starts_from_their_merged_weights(runs, tiny_config_file, tmp_path, capsys):
    """Of the base run: PEFT cannot read it, and the export says so."""
    assert train.main(argv(tiny_config_file, tmp_path / "run", runs / "run", "--train.steps=1", "--lora.rank=2")) == 0
    assert "lora: rank 2, alpha 8, on q,o,up,down: 1,280 parameters train; the weights are frozen in bfloat16" in (
        capsys.readouterr().out
    )
    merged, own = checkpoint.load_params(runs / "run")[0], raw(tmp_path / "run")
    np.testing.assert_array_equal(own["layers"]["q"]["kernel"], merged["layers"]["q"]["kernel"].astype(jnp.bfloat16))
    line = convert.export_adapter(tmp_path / "run", tmp_path / "adapter")
    assert line.endswith(f"its base model {runs / 'run'} is no Hugging Face folder: export it, and write its place into "
                         "adapter_config.json")  # fmt: skip


def test_a_4_bit_state_is_saved_and_restored(tiny_config, tmp_path):
    """The next step after it is that of the state itself, bit for bit; readers get expanded and merged weights."""
    shape = dataclasses.replace(tiny_config.model, d_model=64)
    config = dataclasses.replace(tiny_config, workdir=str(tmp_path), model=shape, lora=c.Lora(4, base="nf4"),
                                 data=c.Data({"x": 1}), train=c.Train(9, 8 * 16, 8))  # fmt: skip
    assert stages.adapters(config)[0].endswith("frozen in nf4 (4.127 bits a number; embedding and head in bfloat16)")
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    tokens = np.random.default_rng(0).integers(0, 512, (1, 8, 17)).astype(np.uint16)
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        batch = Batch(*map(jax.device_put, (tokens, np.full((1, 8), 17, np.int32)), program.batch))
        state, _ = program.train(program.init(), batch)
        (tmp_path / "config.json").write_text(c.to_json(config))
        with checkpoint.Checkpoints(config) as checkpoints:
            checkpoints.save(1, state)
            checkpoints.check(wait=True)
            restored = checkpoints.restore(1, program.state)
        merged = jax.device_get(lora.merge(state.params, shape, config.lora))
        same(restored.params, jax.device_get(state.params))
        same(jax.device_get(program.train(restored, batch)), jax.device_get(program.train(state, batch)))
    same(checkpoint.load_params(tmp_path)[0], merged)
