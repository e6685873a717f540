"""DPO as a person runs it: reference computed once and kept, planted preferences learned, killed and resumed, wrong input."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cluster import PATIENCE
from test_sft import command, folder  # noqa: F401  a fixture
from test_train import curve, exact

from tinyllama_jax import dpo, sft, train
from tinyllama_jax.base import cli
from tinyllama_jax.base.dims import FIRST, LEARNED
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import chat, conversations
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.data.prepare import chats
from tinyllama_jax.run import checkpoint, seals

KEYS = {"optim__peak_lr": 1e-3, "optim__min_lr": 1e-4, "model__seq_len": 128, "train__tokens_per_step": 8 * 128}
KEYS |= {"train__dpo_beta": 0.1, "train__epochs": 6, "log__eval_every": 1_000}


def pairs(n=60):
    """The better answer to every question is "yes."; the worse one says no, and goes on."""
    for i in range(n):
        asked = [{"role": "user", "content": f"Is {i} a number?"}]
        said = [[*asked, {"role": "assistant", "content": text}] for text in ("yes.", f"no, {i % 7} is not")]
        yield {"prompt": asked[0]["content"], "chosen": said[0], "rejected": said[1]}


@pytest.fixture(scope="module")
def prepared(folder):  # noqa: F811
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs()))
    return folder


def start(*arguments):
    env = os.environ | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", ""), "JAX_PLATFORMS": "cpu"}
    argv = [sys.executable, "-W", "error", "-m", "tinyllama_jax.dpo", *arguments]
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def arguments(prepared, workdir, **keys):
    return command(prepared, workdir, **{"data__sources": prepared / "pairs.jsonl"} | KEYS | keys)


@pytest.fixture(scope="module")
def tuned(prepared):
    assert dpo.main(arguments(prepared, "dpo/quiet")) == 0
    return prepared / "dpo/quiet"


def test_planted_preferences_are_learned(tuned, capsys):
    steps, validations = curve(tuned)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # the weights are the reference
    assert steps[0]["margin"] == pytest.approx(0, abs=1e-4)
    last = validations[-1]
    assert last["val_accuracy"] > 0.9 and last["val_loss"] < 0.3 and "val_perplexity" not in last
    assert steps[-1]["margin"] == pytest.approx(steps[-1]["chosen_reward"] - steps[-1]["rejected_reward"], abs=1e-3)
    assert 0 < steps[-1]["chosen_tokens"] < steps[-1]["rejected_tokens"]  # of a pair's answers, on average


def test_the_reference_is_computed_once_and_a_killed_run_resumes(prepared, tuned, capsys):
    process = start(*arguments(prepared, "dpo/killed"))
    while not seals.steps_in(prepared / "dpo/killed"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    capsys.readouterr()
    assert dpo.main(arguments(prepared, "dpo/killed")) == 0
    out = capsys.readouterr().out
    assert "kept in" in out and "reference log-probabilities" not in out
    assert exact(curve(prepared / "dpo/killed")[0]) == exact(curve(tuned)[0])


@pytest.mark.parametrize("base", ["", "nf4"])
def test_adapters_begin_at_the_reference_too(prepared, tuned, base):
    keys = {"lora__rank": 4, "lora__base": base, "train__epochs": 0, "train__steps": 3, "optim__warmup_steps": 0}
    assert dpo.main(arguments(prepared, f"dpo/lora{base}", **keys)) == 0
    steps, _ = curve(prepared / f"dpo/lora{base}")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and steps[-1]["loss"] < math.log(2)


def test_the_reference_is_the_log_probability_of_each_answer_s_token(prepared, tuned):
    path = Path(next(iter(checkpoint.load_config(tuned).data.sources)))
    blocks = Blocks(path, "train")
    read = blocks.sequences(np.arange(len(blocks)))
    learned = read.marks & LEARNED > 0
    assert (read.reference[~learned] == 0).all() and (read.reference[learned] < 0).all()
    assert ((read.marks & FIRST > 0).sum(1) % 2 == 0).all()
    with pytest.raises(UserError, match="have no reference log-probabilities; use `python -m tinyllama_jax.dpo`"):
        pairs_alone = path.with_name(path.name.rsplit("-", 1)[0])
        argv = arguments(prepared, "dpo/wrong", data__sources=pairs_alone)
        train.main(sft.as_training(cli.load(argv), argv, "preferences"))


# -- pairs of every shape, and too long ones ------------------------------------------------------------------------------

USER, GOOD, BAD = ({"role": r, "content": t} for r, t in (("user", "Q"), ("assistant", "A"), ("assistant", "B")))
SHAPES = {
    "ultrafeedback_binarized": {"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "TRL, messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "TRL, texts": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "hh-rlhf": {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
}


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
def test_pairs_of_every_shape(row):
    assert conversations.pair_of(row) == ([USER, GOOD], [USER, BAD])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "Q", "chosen": "A"}, "is no pair: it needs 'chosen' and 'rejected', and has"),
        ({"chosen": "A", "rejected": "B"}, "where chosen and rejected hold only answers, add a 'prompt'; see docs/dpo.md"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "'chosen' begins with no question; where chosen and rejected hold only"),
        ({"prompt": 3, "chosen": "A", "rejected": "B"}, "'prompt' is not a text, but 3"),
        ([1], "is no pair"),
    ],
)
def test_a_row_that_is_no_pair_is_named(row, words, prepared, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps(next(pairs())) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: ") as caught:
        dpo.main(arguments(prepared, "dpo/bad", data__sources=tmp_path / "bad.jsonl"))
    assert words in str(caught.value)


@pytest.fixture(scope="module")
def encoder(prepared):
    tokenizer = tokenizer_lib.load(prepared / "base/tokenizer")
    return chats.Encoder(chat.TEMPLATES["zephyr"], tokenizer, True, 129, "preferences")


def sides(encoder, prompt, chosen, rejected):
    asked = {"role": "user", "content": prompt}
    tokens, note, _ = encoder.encode(tuple([asked, {"role": "assistant", "content": text}] for text in (chosen, rejected)))
    second = np.flatnonzero(tokens >> 24 & FIRST)[1]
    return tokens[:second], tokens[second:], note


def test_a_long_prompt_loses_its_beginning_and_an_answer_is_never_cut_to_nothing(encoder):
    spm = encoder.tokenizer
    text = lambda side, learned: spm.decode((side & 0xFFFFFF)[(side >> 24 & LEARNED > 0) == learned].tolist())
    chosen, rejected, note = sides(encoder, "Where is Bern?", "in Switzerland", "four")
    assert note == "" and text(chosen, True) == "in Switzerland" and text(rejected, True) == "four"
    assert (chosen & 0xFFFFFF)[-1] == spm.eos_id == (rejected & 0xFFFFFF)[-1]  # the end of an answer is learned
    long = "Bern? " * 100 + "Where is Bern?"
    chosen, rejected, note = sides(encoder, long, "in Switzerland", "four")
    assert note == chats.SHORT_PROMPT and max(len(chosen), len(rejected)) == 64
    for side, answer in ((chosen, "in Switzerland"), (rejected, "four")):
        assert text(side, True) == answer and "Where is Bern?" in text(side, False)
        assert (side & 0xFFFFFF)[0] == spm.bos_id and len(side) <= 64
    chosen, rejected, note = sides(encoder, long, "in Switzerland " * 100, "four")
    assert note == chats.SHORT_ANSWER and len(chosen) == 64 and (chosen >> 24 & LEARNED > 0).sum() == 32
    assert text(rejected, True) == "four"


@pytest.mark.parametrize(
    ("chosen", "rejected", "why"), [("A", "A", chats.ALIKE), ("", "", chats.ALIKE), ("", "B", chats.EMPTY)]
)
def test_a_pair_that_teaches_nothing_is_counted(encoder, chosen, rejected, why):
    with pytest.raises(chats._LeftOut) as caught:
        sides(encoder, "Q", chosen, rejected)
    assert caught.value.reason == why
