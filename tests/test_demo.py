"""The demo from end to end on a small library: stopped at each stage and resumed, run twice, run with changed inputs."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import generated
import numpy as np
import pytest
from cluster import PATIENCE

from examples import demo
from tinyllama_jax.base import cli
from tinyllama_jax.base.errors import UserError

ROOT = Path(__file__).parents[1]
STEPS = 1_500
CONFIG = f"""
from tinyllama_jax.base.config import Checkpoint, Config, Data, Log, Model, Optim, Train

config = Config(
    workdir="runs/demo/run",
    model=Model(
        n_layers=1, d_model=32, n_heads=2, n_kv_heads=1, d_ff=64, vocab_size=600, seq_len=32,
        precision="params=float32,compute=float32,output=float32", residual="float32",
    ),
    data=Data(sources={{"runs/demo/data/text": 0.7, "runs/demo/data/code": 0.3}}),
    optim=Optim(peak_lr=1e-2, min_lr=1e-3, warmup_steps=10, weight_decay=0.1, clip_norm=1.0),
    train=Train(steps={STEPS}, tokens_per_step=256, seqs_per_device=8),
    checkpoint=Checkpoint(every=200),
    log=Log(eval_every=500),
)
"""
PROGRAM = """
import signal
import sys
from pathlib import Path
from examples import demo
from tinyllama_jax.base.errors import run_main

def main(argv):
    code = demo.demo(Path(argv[0]), "config.py", Path("library"))
    print("imported jax:", "jax" in sys.modules)
    print("Ctrl-C ends it:", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    return code

if __name__ == "__main__":  # the workers that prepare the data import this file too
    run_main(main)
"""


# -- the unigram model -----------------------------------------------------------------------------------------------------


def test_unigram_loss_by_hand():
    # frequencies 0.75 x (1/2, 1/2, 0) + 0.25 x (0, 0, 1) = (3/8, 3/8, 2/8) of n = 8 tokens; plus one each: (4, 4, 3) / 11
    train = [np.array([2, 2, 0]), np.array([0, 0, 4])]
    validation = np.array([1, 0, 2])
    expected = -(math.log(4 / 11) + 2 * math.log(3 / 11)) / 3
    assert demo.unigram_cross_entropy(train, [3.0, 1.0], validation) == pytest.approx(expected, rel=1e-12)
    # a token that training never showed costs log(n + V), not infinity
    assert demo.unigram_cross_entropy([np.array([8, 0])], [1.0], np.array([0, 5])) == pytest.approx(math.log(10), rel=1e-12)


class Blocks:
    """Two blocks of S + 1 = 4 tokens, the second with one token of padding."""

    def __len__(self):
        return 2

    def read(self, indices):
        assert indices.tolist() == [0, 1]
        return np.array([[5, 1, 1, 2], [3, 4, 1, 0]], np.uint16), np.array([4, 3], np.int32)


def test_only_predicted_tokens_are_counted():
    # neither the first of a block, which nothing predicts, nor padding
    assert demo.label_counts(Blocks(), 6).tolist() == [0, 3, 1, 0, 1, 0]


# -- the stages --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A folder with a config and a library of a dozen modules."""
    (tmp_path / "library").mkdir()
    for i in range(12):
        (tmp_path / "library" / f"module_{i}.py").write_text(generated.module(i))
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def start(folder, work="work"):
    """The demo in a process of its own, on one device."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "program.py", work]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run(folder, work="work"):
    """(exit code, output) of the demo."""
    process = start(folder, work)
    output = process.communicate()[0]
    return process.returncode, output


def rows(folder, work="work"):
    return [json.loads(line) for line in (folder / work / "run" / "metrics.jsonl").read_text().splitlines()]


def losses(folder, work="work"):
    """What must not depend on interruptions, in full."""
    keys = ("step", "loss", "checksum", "val_loss", "val_loss/text", "val_loss/code", "val_tokens")
    return [{k: row[k] for k in keys if k in row} for row in rows(folder, work)]


def listing(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


def test_an_interrupted_demo_ends_with_the_same_losses(small):
    code, output = run(small, "whole")
    assert code == 0, output
    assert "Ctrl-C ends it: True" in output  # also after training, which saves first
    made = small / "whole"
    for name in ("corpus/text.train.jsonl", "tokenizer/tokenizer.model", "data/code/manifest.json", "hf/model.safetensors"):
        assert (made / name).stat().st_size > 0
    assert list((made / "run" / "tensorboard").iterdir()) and (made / "run" / "loss.png").stat().st_size > 10_000
    assert "<svg" in (made / "run" / "report.html").read_text()
    assert output.count("--- ") == len(demo.PROMPTS) and all(prompt in output for prompt in demo.PROMPTS)
    final = [row["val_loss"] for row in rows(small, "whole") if "val_loss" in row][-1]
    baseline = json.loads((made / "run" / "unigram.json").read_text())["val_loss"]
    assert f"validation loss {final:.3f}" in output and f"a unigram model's {baseline:.3f}" in output
    assert 0 < final < baseline < math.log(600)

    # nothing is done twice, and nothing heavy is imported to find that out
    before = listing(made)
    code, output = run(small, "whole")
    assert code == 0 and "imported jax: False" in output
    assert f"validation loss {final:.3f}" in output and "corpus:" not in output
    assert listing(made) == before

    # killed once the tokenizer is there (whether or not that was written down), stopped with Ctrl-C while it trains
    process = start(small)
    with contextlib.closing(process.stdout) as lines:
        for line in lines:
            if line.startswith("tokenizer:"):
                break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process = start(small)
    metrics, deadline = small / "work" / "run" / "metrics.jsonl", time.monotonic() + PATIENCE
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode == 130, output
    assert "corpus:" not in output and "data/text: train" in output
    assert "is saved" in output and rows(small)[-1]["step"] < STEPS
    code, output = run(small)
    assert code == 0, output
    assert "data/text" not in output.split("training:")[0]
    assert losses(small)[-1] == losses(small, "whole")[-1]
    trained = [[row for row in losses(small, work) if "loss" in row] for work in ("work", "whole")]
    assert trained[0] == trained[1] and len(trained[0]) == STEPS


def test_stale_outputs_are_not_reused(small, monkeypatch, capsys):
    monkeypatch.chdir(small)
    config, _ = demo.placed(cli.read("config.py"), Path("work"))

    def stages():
        return demo.Stages(Path("work"), config, Path("library"))

    def corpus_and_tokenizer():
        stages_ = stages()
        if stages_.todo("corpus", Path("work/corpus")):
            demo.make_corpus(Path("work/corpus"), Path("library"))
            stages_.done("corpus")
        if stages_.todo("tokenizer", Path("work/tokenizer")):
            demo.make_tokenizer(Path("work/tokenizer"), Path("work/corpus"), config)
            stages_.done("tokenizer")
        return capsys.readouterr().out

    assert "corpus:" in corpus_and_tokenizer()
    assert corpus_and_tokenizer() == ""
    shutil.rmtree("work/tokenizer")
    assert corpus_and_tokenizer().startswith("tokenizer:")
    (small / "library" / "another.py").write_text('"""Another."""\nx = 1\n')
    output = corpus_and_tokenizer()
    assert "work was made with modules=" in output and "corpus:" in output and "tokenizer:" in output
    assert "another" in Path("work/corpus/text.train.jsonl").read_text()

    stages().done("run")
    Path("work/run").mkdir()
    assert stages().todo("run", Path("work/run")) is False
    (small / "config.py").write_text(CONFIG.replace("n_layers=1", "n_layers=2"))
    config, _ = demo.placed(cli.read("config.py"), Path("work"))
    with pytest.raises(UserError, match=r"^work was made with model\.n_layers=1, and it is now 2; delete work to"):
        stages()
    (small / "config.py").write_text(CONFIG)
    config, _ = demo.placed(cli.read("config.py"), Path("work"))
    (small / "library" / "another.py").unlink()
    before = listing(small / "work")
    code, output = run(small)
    assert code == 2 and output.startswith("error: work was made with modules=") and output.count("\n") == 1
    assert listing(small / "work") == before


def test_other_sources_are_an_error_of_one_line(small):
    (small / "config.py").write_text(CONFIG.replace("data/code", "data/poetry"))
    code, output = run(small)
    assert code == 2 and output.startswith("error: data.sources:") and output.count("\n") == 1


def test_options_for_train():
    config = cli.read(str(ROOT / "configs" / "demo.py"))
    assert demo.placed(config, Path("runs/demo")) == (config, [])  # the command in the config's first lines trains the same run
    moved, arguments = demo.placed(config, Path("elsewhere"))
    assert cli.load(["--config", str(ROOT / "configs" / "demo.py"), *arguments]) == moved
    assert moved.workdir == "elsewhere/run" and moved.data.sources == {"elsewhere/data/text": 0.7, "elsewhere/data/code": 0.3}
