"""Fine-tuning as a person runs it: from a run, a Hugging Face folder and a GGUF, killed, resumed, and used afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cluster import PATIENCE
from test_train import curve, curve_so_far, exact
from tiny import train_tokenizer

from tinyllama_jax import convert, evaluate, sft
from tinyllama_jax.base import cli, dims
from tinyllama_jax.base import config as c
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import model
from tinyllama_jax.data import chat, control, feed
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.inference import weights
from tinyllama_jax.inference.engine import Engine, Request
from tinyllama_jax.inference.sampling import Sampling
from tinyllama_jax.run import checkpoint

FACTS = {"Where is Bern?": "in Switzerland", "What is 2 + 2?": "four", "Who wrote Faust?": "Goethe"}
CONFIG = '''"""Fine-tuning of a tiny model."""

from tinyllama_jax.base.config import *

config = Config(
    workdir="unused",
    model=Model(n_layers=22, d_model=2_048, n_heads=32, n_kv_heads=4, d_ff=5_632, vocab_size=32_000, seq_len=64,
                precision="params=float32,compute=float32,output=float32", residual="float32"),
    data=Data(sources={"DATA": 1.0}, template="zephyr", document_mask=True),
    optim=Optim(peak_lr=1e-2, min_lr=1e-3, warmup_steps=1, weight_decay=0.0, clip_norm=1.0),
    train=Train(steps=10, tokens_per_step=8 * 64, seqs_per_device=1, epochs=24),
    checkpoint=Checkpoint(every=5, keep=3),
    log=Log(eval_every=20),
)
'''


def rows():
    """Questions in several orders, with a system message now and then."""
    facts = list(FACTS.items())
    for i in range(48):
        asked = [facts[(i + k * (1 + i % 2)) % 3] for k in range(1 + i % 3)]
        turns = [{"role": r, "content": t} for pair in asked for r, t in zip(("user", "assistant"), pair, strict=True)]
        yield {"messages": [*([{"role": "system", "content": f"Talk {i}."}] if i % 4 == 0 else []), *turns]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base, hf and base.gguf: the same random weights as a run, a Hugging Face folder and a GGUF; talks.jsonl, sft.py."""
    folder = tmp_path_factory.mktemp("sft")
    lines = list(rows())
    texts = [m["content"] for row in lines for m in row["messages"]] + [chr(n) for n in range(32, 127)] * 4
    (folder / "base/tokenizer").mkdir(parents=True)
    train_tokenizer(folder / "base/tokenizer/tokenizer.model", texts, 400)
    (folder / "base/tokenizer/tokenizer_config.json").write_text('{"add_bos_token": true}')
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "sft.py").write_text(CONFIG.replace("DATA", str(folder / "talks.jsonl")))
    fp32 = {"precision": "params=float32,compute=float32,output=float32", "residual": "float32"}
    cfg = c.Model(2, 64, 4, 2, 128, 400, 64, **fp32)
    rng = np.random.default_rng(0)
    params = {p.name: np.ones(dims.shape(p, cfg), np.float32) for p in dims.PARAMETERS}
    params |= {n: rng.normal(0, 0.05, a.shape).astype(np.float32) for n, a in params.items() if not n.endswith("scale")}
    config = c.Config("base", cfg, c.Data({"x": 1}), c.Optim(1e-3, 1e-4, 1, 0.1, 1.0), c.Train(1, 64, 1), c.Checkpoint(1))
    checkpoint.save_import(folder / "base", config, model.unflatten(params))
    convert.export(folder / "base", folder / "hf")
    convert.export_gguf(folder / "base", folder / "base.gguf", "f32")
    return folder


def command(folder, workdir, origin="base", **keys):
    keys = {"workdir": folder / workdir, "init__from": folder / origin, **keys}
    return ["--config", str(folder / "sft.py"), *(f"--{key.replace('__', '.')}={value}" for key, value in keys.items())]


def start(*arguments, **keys):
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    argv = [sys.executable, "-W", "error", "-m", "tinyllama_jax.sft", *command(*arguments, **keys)]
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def tuned(folder):
    """(the finished run, what it printed)."""
    process = start(folder, "runs/quiet")
    out = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, out
    return folder / "runs/quiet", out


def test_the_loss_falls_and_all_is_said(tuned):
    run, out = tuned
    steps, validations = curve(run)
    assert steps[0]["loss"] > 5 and steps[-1]["loss"] < 0.2, out
    assert validations[0]["step"] == 0 and validations[-1]["val_loss"] < validations[0]["val_loss"] / 4
    for words in ("n_layers 2, not 22", "chat template zephyr", "48 conversations (", "written in", "within documents",
                  "train.epochs=24:", "weights only"):  # fmt: skip
        assert words in out, out
    config = checkpoint.load_config(run)
    (source,) = config.data.sources
    n = -(-24 * len(Blocks(source, "train")) // 8)
    assert config.train.steps == steps[-1]["step"] == n != 10 and config.optim.warmup_steps == round(n / 10)
    assert Path(source).parent == run.parent / "prepared"


def test_evaluate_scores_its_conversations_as_training_did(tuned, tmp_path):
    run, _ = tuned
    (source,) = checkpoint.load_config(run).data.sources
    arguments = ["--checkpoint", str(run), "--data-set", source, "--split", "validation", "--output", str(tmp_path / "it.json")]
    assert evaluate.main(arguments) == 0
    scores, last = json.loads((tmp_path / "it.json").read_text())["data_set"], curve(run)[1][-1]
    assert scores["loss"] == pytest.approx(last["val_loss"], rel=1e-4) and scores["tokens"] == last["val_tokens"]


def test_killed_it_goes_on_to_the_same_bits(tuned, folder):
    process, deadline = start(folder, "runs/killed"), time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline and max(curve_so_far(folder / "runs/killed"), default=0) < 13:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    process = start(folder, "runs/killed", origin="gone")  # a run with checkpoints needs its origin no more
    out = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0 and "; kept in " in out and f"of {folder / 'runs/killed'}" in out, out
    assert exact(curve(folder / "runs/killed")[0]) == exact(curve(tuned[0])[0])
    ours, theirs = (checkpoint.load_params(run)[0] for run in (folder / "runs/killed", tuned[0]))
    np.testing.assert_array_equal(ours["embed"]["embedding"], theirs["embed"]["embedding"])


def answers(path):
    """Question -> (what the model answers, whether it stopped itself), by the template that the checkpoint brings."""
    loaded = weights.load(path)
    template, engine = chat.choose(Path(path), loaded.tokenizer), Engine(loaded)
    stops, out = chat.stop_ids(template, loaded.tokenizer), {}
    for question in FACTS:
        ids = chat.encode(
            template, loaded.tokenizer, [{"role": "user", "content": question}], begin_with_bos=loaded.begin_with_bos
        )
        request = Request(ids, 24, Sampling(temperature=0.0), 0, 0, stops)
        engine.submit(request)
        while not request.finish:
            engine.step()
        out[question] = (loaded.tokenizer.decode([t for t in request.tokens if t not in stops]).strip(), request.finish)
    return out


def test_it_answers_and_stops_wherever_it_goes(tuned, folder):
    want = {question: (answer, "stop") for question, answer in FACTS.items()}
    assert answers(tuned[0]) == want
    convert.export(tuned[0], folder / "tuned-hf")
    convert.export_gguf(tuned[0], folder / "tuned.gguf", "f16")
    assert answers(folder / "tuned-hf") == want and answers(folder / "tuned.gguf") == want
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "tuned-hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tuned-hf")
    for question, answer in FACTS.items():
        talk = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        ids = ids.new_tensor([[tokenizer.bos_token_id, *ids[0].tolist()]])
        made = theirs.generate(ids, max_new_tokens=24, do_sample=False, attention_mask=ids.new_ones(ids.shape))[
            0, ids.shape[1] :
        ]
        assert tokenizer.decode(made, skip_special_tokens=True).strip() == answer and made[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("origin", ["hf", "base.gguf"])
def test_it_starts_from_a_hugging_face_folder_and_a_gguf(tuned, folder, origin, capfd):
    keys = {"train__epochs": 0, "train__steps": 2, "optim__warmup_steps": 1}
    assert sft.main(command(folder, f"runs/{origin}", origin, **keys)) == 0
    first = [curve(run)[1][0]["val_loss"] for run in (folder / f"runs/{origin}", tuned[0])]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert f"weights: {folder / origin} (" in capfd.readouterr().out


def test_added_tokens_get_rows_and_go_where_the_weights_go(folder, capfd):
    keys = {"model__added_tokens": "<|im_start|>,<|im_end|>", "data__template": "chatml", "train__epochs": 16}
    run = folder / "runs/chatml"
    assert sft.main(command(folder, "runs/chatml", **keys)) == 0
    assert "with 2 new tokens in 448 rows" in capfd.readouterr().out
    params, config, _ = checkpoint.load_params(run)
    assert config.model.vocab_size == 448 and params["lm_head"]["kernel"].shape == (64, 448)
    want = {question: (answer, "stop") for question, answer in FACTS.items()}
    assert answers(run) == want
    convert.export(run, folder / "chatml-hf")
    convert.export_gguf(run, folder / "chatml.gguf", "f16")
    assert answers(folder / "chatml-hf") == want and answers(folder / "chatml.gguf") == want
    tokens = control.tokens(tokenizer_lib.load(folder / "chatml-hf"))
    assert (tokens["<|im_start|>"], tokens["<|im_end|>"]) == (400, 401)
    # further fine-tuning has the tokens already
    more = {"train__epochs": 0, "train__steps": 1, "optim__warmup_steps": 0} | {k: keys[k] for k in list(keys)[:2]}
    assert sft.main(command(folder, "runs/more", "runs/chatml", **more)) == 0
    assert "new tokens" not in capfd.readouterr().out


def test_steps_that_are_typed_replace_epochs_and_epochs_need_no_schedule(folder):
    assert cli.load(command(folder, "x", train__steps=7)).train.epochs == 0
    config = cli.load(command(folder, "x", train__batch_ramp="1024:1024", optim__cooldown_steps=5))
    longer, (line,) = feed.in_epochs(config, [range(100)])
    assert longer.train.tokens_after(longer.train.steps - 1) < 24 * 100 * 64 <= longer.train.tokens
    assert longer.optim.cooldown_steps == round(5 * longer.train.tokens / config.train.tokens)
    assert line.startswith("train.epochs=24: 2,400 sequences, ")


def test_blocks_of_text_are_refused(folder, tiny_data):
    with pytest.raises(UserError, match="was prepared as text, for `train`; this command learns from chat"):
        sft.main(command(folder, "runs/wrong", data__sources=tiny_data / "a"))


def test_new_rows_are_the_mean_of_the_old(folder):
    from tinyllama_jax.run import initialize

    config = cli.load(command(folder, "x", model__added_tokens="<x>"))
    params, *_ = checkpoint.load_params(folder / "base")
    grown, _ = initialize._with_rows(params, folder / "base", config)
    for old, new in ((params["embed"]["embedding"], grown["embed"]["embedding"]),
                     (params["lm_head"]["kernel"].T, grown["lm_head"]["kernel"].T)):  # fmt: skip
        np.testing.assert_array_equal(new[:400], old)
        np.testing.assert_allclose(new[400:], np.tile(old.mean(0), (48, 1)), rtol=1e-5)


WRONG = [
    ({"init__from": ""}, r"--init.from is empty; name the weights to start from"),
    ({"init__from": "nowhere"}, r"--init.from=nowhere: no such file or folder"),
    ({"init__from": "tests"}, r"--init.from=tests: is neither a run folder, a Hugging Face folder nor a GGUF file"),
    ({"data__sources": "nowhere.jsonl"}, r"--data.sources=nowhere.jsonl: no such file or folder"),
    ({"data__template": "zephir"}, r"--data.template zephir: is none of guanaco, chatml, zephyr"),
    ({"data__template": ""}, r"has no chat template.*: say --data.template NAME"),
    ({"data__document_mask": "false"}, r"--data.document_mask=false: the data are chat"),
    ({"model__n_layers": 3}, r"--model.n_layers=3: .*base is of a model with n_layers=2"),
    ({"model__seq_len": 8, "train__tokens_per_step": 64}, r"no conversation to learn from \(48 whose first turn does not fit"),
    ({"workdir": "a,b/run"}, r"a,b/prepared: has a comma in its path; choose another --workdir"),
    ({"workdir": "talks.jsonl"}, r"^--workdir=.*talks.jsonl: .*talks.jsonl: is a file; name a folder"),
    ({"workdir": "talks.jsonl/run"}, r"^--workdir=.*talks.jsonl/run: .* part of this path is a file, not a folder"),
    ({"workdir": "/proc/run"}, r"^--workdir=/proc/run: /proc/run: no such file or folder; name a folder that can be made"),
    ({"lora__rank": 33}, r"^--lora.rank=33: the matrices k have the sides \(64, 32\); choose at most 32"),
    ({"model__added_tokens": "<x>", "lora__rank": 4}, r"the rows of new tokens are not part of any adapter"),
    ({"model__added_tokens": "a b"}, r"--model.added_tokens=a b: a token has no white space"),
]


@pytest.mark.parametrize(("keys", "words"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_input_is_one_line(folder, keys, words):
    with pytest.raises(UserError, match=words) as raised:
        sft.main(command(folder, **{"workdir": "runs/wrong", **keys}))
    assert "\n" not in str(raised.value)


def data_of(argv):
    return sft.as_training(cli.load(argv), argv)


def test_the_weights_keep_their_template_unless_another_is_typed(tuned, folder, tmp_path, capfd):
    """A config is a recipe for other data: what it says of the template is for weights that bring none."""
    (tmp_path / "sft.py").write_text((folder / "sft.py").read_text().replace("zephyr", "guanaco"))
    argv = command(folder, tmp_path / "run", tuned[0])
    argv[1] = str(tmp_path / "sft.py")
    data_of(argv)
    line = f"chat template zephyr (that of {tuned[0]}, not the config's guanaco, which --data.template=guanaco takes)"
    assert line in capfd.readouterr().out
    data_of([*argv, "--data.template=guanaco"])
    assert "chat template guanaco (--data.template; the weights bring zephyr)" in capfd.readouterr().out
    data_of([word.replace(str(tuned[0]), str(folder / "base")) for word in argv])
    assert "chat template guanaco (the config's data.template)" in capfd.readouterr().out


def test_a_resume_names_the_setting_that_has_changed(tuned, folder):
    for keys, words in (
        ({"data__template": "guanaco"}, "--data.template=guanaco: the run in .*quiet has zephyr; restore it, or use"),
        ({"model__added_tokens": "<x>"}, "--model.added_tokens=<x>: the run in .*quiet has not all of them; restore"),
        ({"model__seq_len": 128, "train__tokens_per_step": 1_024}, "--model.seq_len=128: the run in .*quiet has 64; restore"),
        ({"lora__rank": 4}, "--lora.rank=4: the run in .*quiet has 0; restore"),
    ):
        with pytest.raises(UserError, match=words):
            data_of(command(folder, "runs/quiet", **keys))
    (folder / "more").mkdir()
    (folder / "more/talks.jsonl").write_text((folder / "talks.jsonl").read_text().replace("four", "five"))
    with pytest.raises(UserError, match="and the contents of talks.jsonl have changed .*give it its own data"):
        sft.main(command(folder, "runs/quiet", data__sources=folder / "more/talks.jsonl"))
    with pytest.raises(UserError, match="--data.sources=.*quiet: is the folder of a run or a model; name conversations"):
        sft.main(command(folder, "runs/wrong", data__sources=folder / "runs/quiet"))


def test_a_resume_keeps_what_is_recorded_of_its_origin(tuned, folder, capfd):
    keys = {"train__epochs": 0, "optim__warmup_steps": 0, "model__seq_len": 128, "train__tokens_per_step": 1_024}
    for steps in (1, 2):
        assert sft.main(command(folder, "runs/kept", tuned[0], train__steps=steps, **keys)) == 0
        init = checkpoint.load_config(folder / "runs/kept").init
        assert init.from_ == str(tuned[0]) and init.step == checkpoint.load_config(tuned[0]).train.steps
    line = "was trained at 64 tokens, and positions beyond have yet to be learned; --model.seq_len=64 keeps to its own"
    assert capfd.readouterr().out.count(line) == 1  # a resumed run has them


def test_blocks_that_are_prepared_are_taken_as_they_are(tuned, folder):
    config = checkpoint.load_config(tuned[0])
    (source,) = config.data.sources
    argv = command(folder, "runs/again", data__sources=source)
    assert f"--data.sources={source}" in sft.as_training(cli.load(argv), argv)
    with pytest.raises(UserError, match="was prepared as chat, for `sft`; this command learns from preferences"):
        sft.as_training(cli.load(argv), argv, "preferences")
