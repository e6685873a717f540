"""Run folders to Hugging Face and back, lit-gpt checkpoints with their optimizer, and the two commands."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from cluster import PATIENCE
from test_export_tokenizer import KINDS, train
from test_hf import GQA, MODELS, Malicious, assert_same, random_params

from tinyllama_jax import convert, generate, replay, report
from tinyllama_jax.base import config as config_lib
from tinyllama_jax.base import dims, files, sharding
from tinyllama_jax.base.config import Config
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import model, optim
from tinyllama_jax.core.program import build
from tinyllama_jax.data import chat
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.export import tokenizer as export_tokenizer
from tinyllama_jax.hub import litgpt, llama, tensor_files
from tinyllama_jax.inference import engine, sampling, weights
from tinyllama_jax.inference.text import first_tokens
from tinyllama_jax.run import checkpoint

ROOT = Path(__file__).parents[1]
SMALL = dataclasses.replace(GQA, vocab_size=1_003)  # three rows more than the tokenizer has pieces
SOURCE = {"path": "/data/somewhere", "weight": 1.0, "manifest_sha256": "0" * 64, "bos": True, "sha256": None}


def config_for(cfg: config_lib.Model, workdir: Path) -> Config:
    return Config(
        workdir=str(workdir),
        model=cfg,
        data=config_lib.Data(sources={"somewhere": 1.0}),
        optim=config_lib.Optim(peak_lr=1e-3, min_lr=1e-4, warmup_steps=5, weight_decay=0.1, clip_norm=float("inf")),
        train=config_lib.Train(steps=100, tokens_per_step=2 * cfg.seq_len, seqs_per_device=1),
        checkpoint=config_lib.Checkpoint(every=10),
        mesh=config_lib.Mesh(data=2, fsdp=1),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with two checkpoints and the demo's kind of tokenizer."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    for step in (7, 12):
        checkpoint.save_import(folder, config_for(SMALL, folder), random_params(SMALL, seed=step), step=step)
    (folder / "tokenizer").mkdir()
    train(folder / "tokenizer/tokenizer.model", **KINDS["demo"])
    return folder


def command(tool: str, *arguments, **environment) -> subprocess.CompletedProcess:
    """One of the tools as a user runs it, from somewhere else and without the package installed."""
    line = [sys.executable, "-W", "error", str(ROOT / "tools" / tool), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd="/", env={**os.environ, "PYTHONPATH": "", **environment})


# -- export -------------------------------------------------------------------------------------------------------------


def test_the_command_exports_the_newest_step_and_another(run, tmp_path):
    done = command("convert_to_torch.py", "--checkpoint", run, "--output", tmp_path / "hf")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'hf'}: step 12 of {run} in float32\n"
    names = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"]
    assert sorted(path.name for path in tmp_path.joinpath("hf").iterdir()) == sorted([*names, "tokenizer_config.json"])
    assert_same(llama.load_folder(tmp_path / "hf")[0], random_params(SMALL, seed=12))
    assert convert.export(run, tmp_path / "old", step=7) == 7
    assert_same(llama.load_folder(tmp_path / "old")[0], random_params(SMALL, seed=7))


def test_export_needs_neither_torch_nor_transformers(run, tmp_path):
    code = "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'tokenizers', 'huggingface_hub')))\n"
    code += f"sys.path.insert(0, {str(ROOT)!r})\nfrom tinyllama_jax import convert; convert.export({str(run)!r}, 'hf')"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "hf/model.safetensors").is_file()


@pytest.mark.parametrize("dtype", llama.DTYPES)
def test_transformers_loads_it_without_a_warning(run, tmp_path, dtype):
    torch = pytest.importorskip("torch", reason="Transformers' models need it")
    transformers = pytest.importorskip("transformers", reason="the reader of what is exported")
    convert.export(run, tmp_path / "hf", dtype=dtype)
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            language_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
            tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
            ids = language_model.generate(**tokenizer("def f(", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert [record.getMessage() for record in records] == []
    assert type(tokenizer) is transformers.PreTrainedTokenizerFast  # config.json beside it changes nothing
    ours = sentencepiece.SentencePieceProcessor(model_file=str(run / "tokenizer/tokenizer.model"))
    assert all(tokenizer(text)["input_ids"] == ours.encode(text) for text in ("  def f(x):\n", "", " \tä\0", "你好"))
    assert language_model.dtype == getattr(torch, dtype) and ids.shape[1] > 4
    assert (language_model.generation_config.bos_token_id, language_model.config.eos_token_id) == (1, 2)


def test_the_card_is_one_that_hugging_face_reads(run, tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="the reader of model cards")
    shutil.copytree(run, tmp_path / "run")
    sources = [SOURCE, SOURCE | {"path": "/home/me/code", "weight": ((0, 0.5), (48, 2.5))}]
    for kind in ("imported", "trained"):
        if kind == "trained":
            (tmp_path / "run/data.json").write_text(json.dumps(sources))
            (tmp_path / "run/tokenizer/chat_template.jinja").write_text(chat.TEMPLATES["zephyr"].source)
        convert.export(tmp_path / "run", tmp_path / kind)
        card = hub.ModelCard.load(tmp_path / kind / "README.md", ignore_metadata_errors=False)
        tags = ["llama", "jax", *(["conversational"] if kind == "trained" else [])]
        assert card.data.to_dict() == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
        assert hub.repocard.metadata_load(tmp_path / kind / "README.md") == card.data.to_dict()
        assert "FILL IN: the licence" in card.text and "\n# license: FILL IN" in (tmp_path / kind / "README.md").read_text()
        assert f"# A Llama of {dims.n_parameters(SMALL):,} parameters" in card.text and "| vocabulary | 1,003 |" in card.text
    facts = f"for 12 steps on {12 * 2 * SMALL.seq_len:,} tokens"
    assert facts in card.text and "- `somewhere`: weight 1\n- `code`: weight 2.5\n" in card.text and "/home/me" not in card.text
    assert "| each text begins with bos | yes |" in card.text and '"role": "user"' in card.text
    imported = (tmp_path / "imported/README.md").read_text()
    assert facts not in imported and "were trained on is not known here" in imported and "Once upon" in imported


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_the_chat_template_goes_with_it(name, run, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="the reader of chat templates")
    shutil.copytree(run, tmp_path / "run")
    symbols = {"control_symbols": ["<|im_start|>", "<|im_end|>"]} if name == "chatml" else {}
    train(tmp_path / "run/tokenizer/tokenizer.model", **KINDS["prefix"], **symbols)
    (tmp_path / "run/tokenizer/chat_template.jinja").write_text(chat.TEMPLATES[name].source)
    convert.export(tmp_path / "run", tmp_path / "hf")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = tokenizer_lib.load(tmp_path / "run/tokenizer")
    talk = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user", "assistant")]
    got = loaded.apply_chat_template(talk, return_assistant_tokens_mask=True)
    ids, mask = chat.encode_with_mask(chat.TEMPLATES[name], ours, talk, begin_with_bos=False)
    assert (got["input_ids"], got["assistant_masks"]) == (ids, list(map(int, mask))) and 0 < sum(mask) < len(mask)
    eos = json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"]
    assert eos == ([2, loaded.convert_tokens_to_ids("<|im_end|>")] if name == "chatml" else 2)
    monkeypatch.setattr(chat, "encode", lambda *_, **__: [7])
    with pytest.raises(
        UserError, match=r"Transformers .* gives the chat .* the ids .* and here it has \[7\]; --tokenizer none"
    ):
        convert.export(tmp_path / "run", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("template", [None, "zephyr"])
def test_the_pipeline_of_transformers_takes_it(template, run, tmp_path):
    pytest.importorskip("torch", reason="Transformers' models need it")
    transformers = pytest.importorskip("transformers", reason="the reader of what is exported")
    shutil.copytree(run, tmp_path / "run")
    if template:
        (tmp_path / "run/tokenizer/chat_template.jinja").write_text(chat.TEMPLATES[template].source)
    convert.export(tmp_path / "run", tmp_path / "hf")
    generator = transformers.pipeline("text-generation", model=str(tmp_path / "hf"), device="cpu")
    loaded = weights.load(tmp_path / "run")
    if template:
        talk = [{"role": "user", "content": "Hi there"}]
        prompt = chat.encode(chat.TEMPLATES[template], loaded.tokenizer, talk, begin_with_bos=False)
    else:
        talk, prompt = "def f(", loaded.tokenizer.encode("def f(")
    request = engine.Request(prompt, 9, sampling.Sampling(0.0), stop_ids=(2,))
    ours = [token for new in engine.Engine(loaded).stream(request) for token in new]
    (answer,) = generator(talk, max_new_tokens=9, do_sample=False, return_full_text=False)
    assert answer["generated_text"] == loaded.tokenizer.decode(ours) and len(ours) == 9


@pytest.mark.parametrize("bos", [False, True, None])
def test_the_tokenizer_puts_bos_in_front_if_the_data_had_it(run, tmp_path, bos):
    manifest = run / "data.json"
    if bos is not None:
        manifest.write_text(json.dumps([SOURCE | {"bos": bos}]))
    try:
        convert.export(run, tmp_path / "hf")
    finally:
        manifest.unlink(missing_ok=True)
    assert json.loads((tmp_path / "hf/tokenizer_config.json").read_text())["add_bos_token"] is bool(bos)


def test_what_is_there_is_not_overwritten(run, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/precious").touch()
    done = command("convert_to_torch.py", "--checkpoint", run, "--output", tmp_path / "hf")
    assert done.returncode == 2 and done.stderr.startswith(f"error: --output {tmp_path / 'hf'}: exists already")
    assert [path.name for path in tmp_path.joinpath("hf").iterdir()] == ["precious"]
    (tmp_path / "hf/precious").rename(tmp_path / "hf/.DS_Store")
    assert convert.export(run, tmp_path / "hf") == 12  # a folder with nothing of a person's is no loss
    assert (tmp_path / "hf/.DS_Store").is_file() and llama.load_folder(tmp_path / "hf")[1].n_layers == 3
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with pytest.raises(UserError, match="link: exists already"):
        convert.export(run, tmp_path / "link")


@pytest.mark.parametrize("write", ["export", "import"])
def test_nothing_is_removed_that_another_made_and_of_two_writers_one_is_refused(run, tmp_path, write):
    partial = tmp_path / ".out.partial"
    convert.export(run, tmp_path / "hf")
    make = lambda: (
        convert.export(run, tmp_path / "out")
        if write == "export"
        else convert.import_checkpoint(tmp_path / "hf", tmp_path / "out")
    )
    partial.mkdir()
    (partial / "precious").touch()
    with pytest.raises(UserError, match=r"\.out\.partial: is needed as a scratch folder, and holds other files; move it away"):
        make()
    assert [path.name for path in partial.iterdir()] == ["precious"]
    (partial / "precious").unlink()
    with files.workplace(partial, ""), pytest.raises(UserError, match=r"--output .*out: another process is writing it"):
        make()
    make()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_a_run_of_weights_that_are_not_finite_is_refused_unless_it_is_asked_for(run, tmp_path):
    ruined = random_params(SMALL)
    ruined["layers"]["o"]["kernel"][2, 1, 0, 3] = np.nan
    checkpoint.save_import(tmp_path / "run", config_for(SMALL, tmp_path / "run"), ruined, step=4)
    shutil.copytree(run / "tokenizer", tmp_path / "run/tokenizer")
    where = r"model\.layers\.2\.self_attn\.o_proj\.weight has 1 numbers that are NaN or infinite"
    with pytest.raises(UserError, match=f"run, step 4: {where}.*--allow-non-finite"):
        convert.export(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    arguments = ("--checkpoint", tmp_path / "run", "--output", tmp_path / "hf")
    assert command("convert_to_torch.py", *arguments, "--allow-non-finite").returncode == 0
    done = command("convert_from_torch.py", "--checkpoint", tmp_path / "hf", "--output", tmp_path / "back")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "o_proj.weight has 1 numbers" in done.stderr
    convert.import_checkpoint(tmp_path / "hf", tmp_path / "back", allow_non_finite=True)
    assert_same(checkpoint.load_params(tmp_path / "back")[0], ruined)


def test_a_url_is_no_folder(run):
    with pytest.raises(UserError, match="^--output=s3://bucket/hf: is a URL, and must be a local path"):
        convert.export(run, "s3://bucket/hf")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (convert, "to-torch --checkpoint gs://b/run --output out"),
        (convert, "from-torch --checkpoint gs://b/hf --output out"),
        (convert, "from-torch --checkpoint hf --output out --tokenizer gs://b/hf"),
        (generate, "--checkpoint gs://b/run --prompt x"),
        (report, "gs://b/run"),
        (replay, "--run gs://b/run --step 3"),
    ],
)
def test_a_url_is_no_run_folder(command, arguments):
    with pytest.raises(UserError, match=r"gs://b/\w+: is a URL, and must be a local path; mount it, or copy it to a disk"):
        command.main(arguments.split())


def test_a_failed_export_leaves_nothing(run, tmp_path):
    broken = random_params(SMALL)
    broken["lm_head"]["kernel"][0, 0] = 1e6
    checkpoint.save_import(tmp_path / "run", config_for(SMALL, tmp_path / "run"), broken)
    shutil.copytree(run / "tokenizer", tmp_path / "run/tokenizer")
    with pytest.raises(UserError, match=r"--dtype=float16: lm_head.weight holds 1e\+06"):
        convert.export(tmp_path / "run", tmp_path / "hf", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_killed_export_leaves_no_folder_of_that_name_and_the_next_one_cleans_up(run, tmp_path):
    hang = "import time; from tinyllama_jax import convert; from tinyllama_jax.hub import llama\n"
    hang += "llama._cast = lambda *a: time.sleep(60)\n"
    hang += f"convert.export({str(run)!r}, {str(tmp_path / 'hf')!r})"
    process = subprocess.Popen([sys.executable, "-c", hang], cwd=ROOT)
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / ".hf.partial/whole/tokenizer.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".hf.partial"]
    convert.export(run, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--checkpoint", "{tmp}/none"), "none: is not a run folder"),
        (("--checkpoint", "{run}", "--step", "8"), "--step 8: "),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, arguments, says):
    words = [word.format(tmp=tmp_path, run=run) for word in arguments]
    done = command("convert_to_torch.py", *words, "--output", tmp_path / "hf")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr
    assert not (tmp_path / "hf").exists()


# -- import -------------------------------------------------------------------------------------------------------------


def test_there_and_back_is_the_identity(run, tmp_path):
    convert.export(run, tmp_path / "hf")
    done = command("convert_from_torch.py", "--checkpoint", tmp_path / "hf", "--output", tmp_path / "back")
    assert (done.returncode, done.stderr, done.stdout) == (
        0,
        "",
        f"{tmp_path / 'back'}: {dims.n_parameters(SMALL):,} weights of {tmp_path / 'hf'}\n",
    )
    params, config, step = checkpoint.load_params(tmp_path / "back")
    assert_same(params, random_params(SMALL, seed=12))
    assert step == 0 and config.workdir == str(tmp_path / "back")
    assert dataclasses.replace(config.model, precision=SMALL.precision, residual=SMALL.residual) == SMALL
    convert.export(tmp_path / "back", tmp_path / "again")
    for path in (tmp_path / "hf").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_an_import_takes_its_schedule_from_a_config(run, tmp_path):
    convert.export(run, tmp_path / "hf")
    given = config_for(SMALL, tmp_path / "elsewhere")
    (tmp_path / "config.py").write_text(config_source(given))
    convert.import_checkpoint(tmp_path / "hf", tmp_path / "back", str(tmp_path / "config.py"))
    assert checkpoint.load_config(tmp_path / "back") == dataclasses.replace(given, workdir=str(tmp_path / "back"))
    (tmp_path / "config.py").write_text(config_source(config_for(MODELS["mha"], tmp_path)))
    with pytest.raises(UserError, match=r"--model\.n_layers=1: .* is of a model with n_layers=3"):
        convert.import_checkpoint(tmp_path / "hf", tmp_path / "other", str(tmp_path / "config.py"))
    assert not (tmp_path / "other").exists()


def config_source(config: Config) -> str:
    return f"from tinyllama_jax.base.config import *\ninf = float('inf')\nconfig = {config!r}\n"


def test_a_folder_without_tokenizer_needs_one(run, tmp_path):
    (tmp_path / "hf").mkdir()
    llama.save_folder(random_params(SMALL), SMALL, tmp_path / "hf", "float32", 1, 2)
    with pytest.raises(UserError, match=r"hf: holds no tokenizer; add --tokenizer"):
        convert.import_checkpoint(tmp_path / "hf", tmp_path / "imported")
    given = str(run / "tokenizer/tokenizer.model")
    convert.import_checkpoint(tmp_path / "hf", tmp_path / "imported", tokenizer=given)
    assert convert.export(tmp_path / "imported", tmp_path / "out") == 0
    assert (tmp_path / "out/tokenizer.model").read_bytes() == Path(given).read_bytes()
    (tmp_path / "imported/tokenizer/tokenizer.model").unlink()
    with pytest.raises(UserError, match="there is no tokenizer to export"):
        convert.export(tmp_path / "imported", tmp_path / "again")


def theirs_as(folder: Path, add_bos: bool, **settings) -> None:
    """Makes an exported folder as many are: of the Prepend kind, for `LlamaTokenizer`, without a tokenizer.model."""
    (folder / "tokenizer.model").unlink()
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = export_tokenizer._bos_template("<s>", 1) if add_bos else None
    content["normalizer"]["normalizers"].insert(0, {"type": "Prepend", "prepend": "▁"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": add_bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": True} | settings))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": [2, 5]}')


@pytest.mark.parametrize("theirs", [False, True])
@pytest.mark.parametrize("data", [None, False, True])
def test_an_exported_tokenizer_begins_texts_as_the_data_did(run, tmp_path, theirs, data):
    transformers = pytest.importorskip("transformers", reason="the reader of what is exported")
    convert.export(run, tmp_path / "hf")
    theirs_as(tmp_path / "hf", theirs)
    convert.import_checkpoint(tmp_path / "hf", tmp_path / "imported")
    if data is not None:
        (tmp_path / "imported/data.json").write_text(json.dumps([SOURCE | {"bos": data}]))
    convert.export(tmp_path / "imported", tmp_path / "out")
    ours, bos_of = tokenizer_lib.load(tmp_path / "imported/tokenizer"), tokenizer_lib.documents_begin_with_bos
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    first = [1] if (theirs if data is None else data) else []
    for text in ("def f(x):", " \n\n  x", "", "▁ 👩‍👩‍👧"):
        assert tokenizer(text)["input_ids"] == first + ours.encode(text)
        if text:
            assert first_tokens(ours, bos_of(tmp_path / "imported"), text) == first + ours.encode(text)
            out = tokenizer_lib.load(tmp_path / "out")
            assert first_tokens(out, bos_of(tmp_path / "out"), text) == first + ours.encode(text)
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["add_bos_token"] is bool(first)
    assert out.sha256 == ours.sha256  # so that data prepared with the one go on from weights with the other
    for name in ("chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_an_export_that_transformers_reads_otherwise_is_an_error(run, tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="the reader of what is exported")
    monkeypatch.setattr(export_tokenizer, "AS_WRITTEN", "LlamaTokenizer")  # which makes a normalizer of its own
    with pytest.raises(UserError, match=r"Transformers 5.* gives .* the ids .*, and training gave it .*; --tokenizer none"):
        convert.export(run, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_weights_can_be_exported_without_a_tokenizer_json(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    train(tmp_path / "run/tokenizer/tokenizer.model", treat_whitespace_as_suffix=True)
    with pytest.raises(UserError, match="puts the space after a word.*--tokenizer none"):
        convert.export(tmp_path / "run", tmp_path / "hf")
    arguments = ("--checkpoint", tmp_path / "run", "--output", tmp_path / "hf", "--tokenizer", "none")
    done = command("convert_to_torch.py", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    model = (tmp_path / "run/tokenizer/tokenizer.model").read_bytes()
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == model and not (tmp_path / "hf/tokenizer.json").exists()
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == 2
    shutil.rmtree(tmp_path / "run/tokenizer")
    assert convert.export(tmp_path / "run", tmp_path / "bare", tokenizer=False) == 12


def test_a_hugging_face_tokenizer_goes_back_as_it_came(run, tmp_path):
    convert.export(run, tmp_path / "hf")
    (tmp_path / "hf/tokenizer.model").unlink()
    theirs = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    theirs |= {"eos_token": {"__type": "AddedToken", "content": "</s>"}, "bos_token": None, "chat_template": "{{ messages }}"}
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps(theirs))
    convert.import_checkpoint(tmp_path / "hf", tmp_path / "imported")
    convert.export(tmp_path / "imported", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, 2)


# -- lit-gpt ------------------------------------------------------------------------------------------------------------


def lit_module(torch, cfg: config_lib.Model):
    """The original's modules in the original's order (lit_gpt/model.py:28-37), each a bare weight."""
    nn = torch.nn

    def weight(*shape):
        holder = nn.Module()
        holder.weight = nn.Parameter(torch.randn(*shape) * 0.3)
        return holder

    def group(**children):
        module = nn.Module()
        for name, child in children.items():
            module.add_module(name, child)
        return module

    d, h, f = cfg.d_model, cfg.d_head, cfg.d_ff
    swiglu = lambda: group(w1=weight(f, d), w2=weight(f, d), w3=weight(d, f))
    block = lambda: group(
        norm_1=weight(d),
        attn=group(attn=weight((cfg.n_heads + 2 * cfg.n_kv_heads) * h, d), proj=weight(d, d)),
        norm_2=weight(d),
        mlp=group(swiglu=swiglu()),
    )
    blocks = nn.ModuleList(block() for _ in range(cfg.n_layers))
    transformer = group(wte=weight(cfg.vocab_size, d), h=blocks, ln_f=weight(d))
    return group(lm_head=weight(cfg.vocab_size, d), transformer=transformer)


def lit_value(table: dict, name: str, cfg: config_lib.Model, layer: int) -> np.ndarray:
    """Our parameter `name` of one layer out of lit-gpt's table, by hand: row by row, head by head."""
    h, per_group = cfg.d_head, cfg.n_heads // cfg.n_kv_heads + 2
    fused = table[f"transformer.h.{layer}.attn.attn.weight"].numpy()
    rows = lambda group, slot: fused[(group * per_group + slot) * h : (group * per_group + slot + 1) * h].T  # [D, H]
    if name == "q":
        return np.stack([rows(n // (per_group - 2), n % (per_group - 2)) for n in range(cfg.n_heads)], axis=1)
    if name in "kv":
        return np.stack([rows(k, per_group - 2 + "kv".index(name)) for k in range(cfg.n_kv_heads)], axis=1)
    if name == "o":
        return table[f"transformer.h.{layer}.attn.proj.weight"].numpy().T.reshape(cfg.n_heads, h, cfg.d_model)
    if name in ("gate", "up", "down"):
        number = {"gate": 1, "up": 2, "down": 3}[name]
        return table[f"transformer.h.{layer}.mlp.swiglu.w{number}.weight"].numpy().T
    return table[f"transformer.h.{layer}.norm_{1 if name == 'attention_norm' else 2}.weight"].numpy()


def assert_is_lit(params: dict, table: dict, cfg: config_lib.Model) -> None:
    for name, leaves in params["layers"].items():
        (array,) = leaves.values()
        for layer in range(cfg.n_layers):
            assert np.array_equal(array[layer], lit_value(table, name, cfg, layer)), (name, layer)
    assert np.array_equal(params["embed"]["embedding"], table["transformer.wte.weight"].numpy())
    assert np.array_equal(params["final_norm"]["scale"], table["transformer.ln_f.weight"].numpy())
    assert np.array_equal(params["lm_head"]["kernel"], table["lm_head.weight"].numpy().T)


def lit_checkpoint(torch, cfg: config_lib.Model, steps: int, optimizer_keys: str | None) -> tuple[dict, object, object]:
    """({"model": ..., "optimizer": ..., ...}, module, AdamW) after `steps` real AdamW steps on random gradients."""
    torch.manual_seed(0)
    module = lit_module(torch, cfg)
    adamw = torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, foreach=False)
    for _ in range(steps):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        adamw.step()
    held = {"model": module.state_dict(), "hparams": {"model_name": "tiny_LLaMA_1b", "devices": 8}, "iter_num": 8 * steps}
    if optimizer_keys:
        held |= {"optimizer": adamw.state_dict(), "step_count": steps}
    if optimizer_keys == "names":  # as FSDP gathers it: torch.distributed.fsdp, optim_state_dict
        names = [name for name, _ in module.named_parameters()]
        state = {names[i]: entry for i, entry in held["optimizer"]["state"].items()}
        groups = [{**held["optimizer"]["param_groups"][0], "params": names}]
        held["optimizer"] = {"state": state, "param_groups": groups}
    return held, module, adamw


def lit_tree(tensors: dict, cfg: config_lib.Model, origin: str) -> dict:
    return litgpt._tree(tensor_files.to_arrays(tensors, origin), cfg, origin)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="the original's checkpoints are pickles")


@pytest.fixture
def config_file(tmp_path) -> Path:
    (tmp_path / "config.py").write_text(config_source(config_for(SMALL, tmp_path / "run")))
    return tmp_path / "config.py"


@pytest.mark.parametrize("keys", ["numbers", "names"])
def test_a_lit_checkpoint_is_gone_on_with(torch, run, tmp_path, config_file, keys):
    held, module, adamw = lit_checkpoint(torch, SMALL, steps=3, optimizer_keys=keys)
    torch.save(held, tmp_path / "iter-000024-ckpt.pth")
    arguments = ("--checkpoint", tmp_path / "iter-000024-ckpt.pth", "--output", tmp_path / "run", "--config", config_file)
    done = command("convert_from_torch.py", *arguments, "--tokenizer", run / "tokenizer")
    assert (done.returncode, done.stderr) == (0, "")
    what = f"{dims.n_parameters(SMALL):,} weights and AdamW's moments after step 3 of {tmp_path / 'iter-000024-ckpt.pth'}"
    assert done.stdout == f"{tmp_path / 'run'}: {what}\n"

    config = checkpoint.load_config(tmp_path / "run")
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:2])
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        checkpoints = checkpoint.Checkpoints(config)
        state = checkpoints.restore(checkpoints.latest(), program.state)
        checkpoints.close()
    assert (checkpoints.latest(), int(state.step), int(state.skipped)) == (3, 3, 0)
    assert_is_lit(jax.device_get(state.params), held["model"], SMALL)
    adam = state.opt_state[0]
    assert int(adam.count) == 3
    numbers = {name: i for i, (name, _) in enumerate(module.named_parameters())}
    for ours, theirs in ((adam.mu, "exp_avg"), (adam.nu, "exp_avg_sq")):
        by_name = {name: adamw.state_dict()["state"][i][theirs] for name, i in numbers.items()}
        assert_is_lit(jax.device_get(ours), by_name, SMALL)

    # one more step on both sides, from the same gradient: AdamW's next weights are the same
    gradient = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    adamw.param_groups[0]["lr"] = float(optim.schedule(config.optim, config.train)(4))
    for name, parameter in module.named_parameters():
        parameter.grad = gradient[name]
    adamw.step()
    tree = lit_tree(gradient, SMALL, "gradient")
    params, opt_state = jax.device_get((state.params, state.opt_state))
    params, _, _ = optim.update(jax.tree.map(jnp.asarray, tree), opt_state, params, jnp.int32(4), config)
    after = lit_tree({name: p.detach() for name, p in module.named_parameters()}, SMALL, "after")
    for name, array in model.flatten(after).items():
        np.testing.assert_allclose(model.flatten(params)[name], array, rtol=2e-6, atol=2e-7, err_msg=name)


@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("bare", [True, False])
def test_lit_weights_alone(torch, run, tmp_path, cfg, bare):
    held, _, _ = lit_checkpoint(torch, cfg, steps=0, optimizer_keys=None)
    torch.save(held["model"] if bare else held, tmp_path / "lit_model.pth")
    (tmp_path / "config.py").write_text(config_source(config_for(cfg, tmp_path / "run")))
    (tmp_path / "tokenizer.model").write_bytes((run / "tokenizer/tokenizer.model").read_bytes())  # beside the weights
    said = convert.import_checkpoint(tmp_path / "lit_model.pth", tmp_path / "run", str(tmp_path / "config.py"))
    assert said == f"{tmp_path / 'run'}: {dims.n_parameters(cfg):,} weights of {tmp_path / 'lit_model.pth'}"
    params, config, _ = checkpoint.load_params(tmp_path / "run")
    assert_is_lit(params, held["model"], cfg)
    assert config.model == cfg


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h: h["model"].pop("transformer.h.1.attn.attn.weight"), "no tensor transformer.h.1.attn.attn.weight;"),
        (lambda h: h["model"].update(extra=h["model"]["lm_head.weight"]), "unknown tensor extra;"),
        (
            lambda h: h["model"].update({"transformer.h.0.attn.attn.weight": h["model"]["lm_head.weight"]}),
            "transformer.h.0.attn.attn.weight has shape [1003, 24], but the model's description says [40, 24]",
        ),
        (lambda h: h["optimizer"]["state"].pop(0), "exp_avg: no tensor lm_head.weight"),
        (lambda h: h["optimizer"]["state"][4].update(step=9), "AdamW's parameters are not at the same step: [3, 9]"),
        (lambda h: h["optimizer"]["state"][4].pop("exp_avg_sq"), "has no 'exp_avg_sq' for every parameter"),
        (lambda h: h["optimizer"]["param_groups"][0]["params"].pop(), "AdamW knows 23 parameters, but the model has 24"),
        (lambda h: h.update(step_count=4), "step_count is 4, but AdamW has made 3 steps"),
        (lambda h: h.update(step_count=True), "Expected `int`, got `bool` - at `$.step_count`"),
        (lambda h: h.update(step_count=-3), "Expected `int` >= 0 - at `$.step_count`"),
        (lambda h: h.update(step_count=3.0), "Expected `int`, got `float` - at `$.step_count`"),
        (lambda h: h.update(optimizer=None, step_count=2**40), "is at step 1,099,511,627,776; steps are counted up to"),
        (lambda h: h.update(optimizer=[1]), "Expected `object | null`, got `array` - at `$.optimizer`"),
        (lambda h: h["optimizer"].update(state=[1]), "Expected `object`, got `array` - at `$.optimizer.state`"),
        (
            lambda h: h["optimizer"].update(state={True: {}}),
            "Expected `int | str`, got `bool` - at `key` in `$.optimizer.state`",
        ),
        (lambda h: h["optimizer"]["state"].update({4: 3}), "Expected `object`, got `int` - at `$.optimizer.state[...]`"),
        (lambda h: h["optimizer"].update(param_groups={}), "Expected `array`, got `object` - at `$.optimizer.param_groups`"),
        (lambda h: h["optimizer"].update(param_groups=[{}]), "Expected `array`, got `null`"),
        (lambda h: h["optimizer"].pop("param_groups"), "AdamW knows 0 parameters, but the model has 24"),
        (
            lambda h: [h["optimizer"]["state"].pop(3), h["optimizer"]["param_groups"][0]["params"].__setitem__(3, 4)],
            "param_groups have a parameter twice",
        ),
        (lambda h: h["optimizer"]["state"].update({99: h["optimizer"]["state"][0]}), "or its state has one that they do not"),
        (lambda h: h["optimizer"]["state"].update(a=h["optimizer"]["state"].pop(0)), "exp_avg: is not a table of tensors"),
        (lambda h: h["optimizer"]["state"][4].update(step=True), "AdamW's step of transformer.h.0.attn.proj.weight is True"),
        (lambda h: h["optimizer"]["state"][4].update(step=-1), "is -1, and should be a whole number from 0 up"),
        (lambda h: h["optimizer"]["state"][4].update(step=2.5), "is 2.5, and should"),
        (lambda h: h["optimizer"]["state"][4].update(step=1e300), "is 1e+300, and should"),
        (lambda h: h["optimizer"]["state"][4].update(step=float("nan")), "is nan, and should"),
        (lambda h: h["optimizer"]["state"][4].update(step="3"), "is '3', and should"),
        (
            lambda h: h["optimizer"]["state"][4].update(step=h["model"]["lm_head.weight"]),
            "has the shape [1003, 24], and should",
        ),
        (lambda h: h["optimizer"]["state"][4]["step"].fill_(float("inf")), "is inf, and should"),
        (lambda h: h["optimizer"]["state"][4].update(step=h["optimizer"]["state"][4]["step"].to("meta")), "is a meta tensor"),
        (
            lambda h: h["optimizer"]["state"][4]["exp_avg_sq"].view(-1)[5:6].fill_(-1e-9),
            "exp_avg_sq: transformer.h.0.attn.proj.weight is negative",
        ),
        (
            lambda h: h["optimizer"]["state"][4]["exp_avg_sq"].view(-1)[5:6].fill_(float("nan")),
            "exp_avg_sq: transformer.h.0.attn.proj.weight has 1 numbers",
        ),
        (
            lambda h: h["optimizer"]["state"][4]["exp_avg"].view(-1)[5:6].fill_(float("inf")),
            "exp_avg: transformer.h.0.attn.proj.weight has 1 numbers",
        ),
        (lambda h: h["optimizer"]["state"][4].update(exp_avg=7), "transformer.h.0.attn.proj.weight is of type int"),
        (lambda h: h["model"]["lm_head.weight"].view(-1)[:2].fill_(float("nan")), "lm_head.weight has 2 numbers that are NaN"),
        (lambda h: h["model"].update({3: h["model"].pop("lm_head.weight")}), "3 is no name"),
        (lambda h: h.update(model=[h["model"]]), "is not a table of tensors by name"),
        (lambda h: h.pop("model"), "is not a table of tensors by name: hparams is of type dict"),
        (lambda h: h.update(model=7), "is not a table of tensors by name"),
    ],
)
def test_a_wrong_lit_checkpoint_is_refused(torch, run, tmp_path, config_file, change, says):
    held, _, _ = lit_checkpoint(torch, SMALL, steps=3, optimizer_keys="numbers")
    held["model"] = dict(held["model"])
    change(held)
    torch.save(held, tmp_path / "a.pth")
    with pytest.raises(UserError) as refused:
        convert.import_checkpoint(tmp_path / "a.pth", tmp_path / "run", str(config_file), str(run / "tokenizer"))
    assert says in str(refused.value)
    assert not (tmp_path / "run").exists() and not (tmp_path / ".run.partial").exists()


def test_wrappers_are_taken_off_a_lit_checkpoint_and_its_moments(torch, run, tmp_path, config_file, capsys):
    held, module, _ = lit_checkpoint(torch, SMALL, steps=3, optimizer_keys="names")
    put_on = lambda table: {f"_forward_module._orig_mod.{name}": value for name, value in table.items()}
    held["model"], held["optimizer"]["state"] = put_on(held["model"]), put_on(held["optimizer"]["state"])
    torch.save(held, tmp_path / "a.pth")
    convert.import_checkpoint(tmp_path / "a.pth", tmp_path / "run", str(config_file), str(run / "tokenizer"))
    assert "took _forward_module., _orig_mod. out of the names of its tensors" in capsys.readouterr().out
    assert_is_lit(checkpoint.load_params(tmp_path / "run")[0], dict(module.state_dict()), SMALL)


def test_a_lit_checkpoint_needs_a_config(torch, run, tmp_path):
    torch.save({}, tmp_path / "a.pth")
    arguments = ("--checkpoint", tmp_path / "a.pth", "--output", tmp_path / "run", "--tokenizer", run / "tokenizer")
    done = command("convert_from_torch.py", *arguments)
    assert done.returncode == 2 and "does not describe its model; add --config FILE" in done.stderr


def test_a_malicious_lit_checkpoint_is_one_line_and_does_nothing(torch, run, tmp_path, config_file):
    target = tmp_path / "owned"
    held, _, _ = lit_checkpoint(torch, SMALL, steps=0, optimizer_keys=None)
    torch.save({**held, "hparams": Malicious(target)}, tmp_path / "a.pth")
    arguments = ("--checkpoint", tmp_path / "a.pth", "--output", tmp_path / "run", "--config", config_file)
    done = command("convert_from_torch.py", *arguments, "--tokenizer", run / "tokenizer")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "a pickle can run any code" in done.stderr
    assert not target.exists() and not (tmp_path / "run").exists()
