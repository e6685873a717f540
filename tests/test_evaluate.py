"""What a person sees of `evaluate`: scores, the original's table, JSON, and errors of one line. tests/evals has the numbers."""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's library

import pytest
from test_generate import folders  # noqa: F401

from tinyllama_jax import evaluate
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.evals import tasks
from tinyllama_jax.planning import history

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("harness")]  # lm-eval and its libraries warn
ASKED = {"stem": "Which is an animal?", "choices": [{"text": t, "label": a} for t, a in (("cat", "A"), ("cup", "B"))]}
HUB = {"text": ["cat", "cup"], "label": ["A", "B"]}
ROWS = {  # of each task, as on the hub and as its authors publish it
    "hellaswag/hellaswag_val.jsonl": [
        {"ctx_a": "A man sits.", "ctx_b": "he", "activity_label": "Sitting", "endings": ["gets up.", "eats."], "label": label}
        for label in (0, "1")
    ],
    "openbookqa/test.jsonl": [
        {"question": ASKED, "answerKey": "A"},
        {"question_stem": "Which is an animal?", "choices": HUB, "answerKey": "A "},
    ],
    "winogrande/dev.jsonl": [
        {"sentence": "The cup fell off the bed as _ was old.", "option1": "the cup", "option2": "the bed", "answer": a}
        for a in "12"
    ],
    "arc_challenge/ARC-Challenge-Test.jsonl": [{"question": ASKED, "answerKey": "B"}],
    "arc_easy/test-00000-of-00001.parquet": [{"question": "Which is an animal?", "choices": HUB, "answerKey": "A"}] * 2,
    "boolq/val.jsonl": [
        {"passage": "A cup is made of clay.", "question": "is a cup made of clay", "label": True},
        {"passage": "A cup is made of clay.", "question": "is a cup an animal", "answer": False, "title": "Cup"},
        {"passage": "A cup is made of clay.", "question": "is a cup an animal", "label": 0},
    ],
    "piqa/valid.jsonl": [{"goal": "drink", "sol1": "take a cup", "sol2": "take a bed"}] * 2,
    "piqa/valid-labels.lst": "0\n1\n",
}


def write(folder: Path, rows: dict) -> Path:
    for name, content in rows.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), file)
        else:
            text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
            file.write_text(text)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data"), ROWS)


def test_the_seven_tasks_from_local_files(folders, data, tmp_path, capsys):  # noqa: F811
    pytest.importorskip("lm_eval", reason="of the extra dev")
    output = tmp_path / "scores.json"
    line = ["--checkpoint", str(folders["run"]), "--step", "5", "--tasks", "commonsense", "--data", str(data)]
    assert evaluate.main([*line, "--output", str(output), "--bos", "no"]) == 0
    out = capsys.readouterr().out
    record = json.loads(output.read_text())
    assert record["tasks"].keys() == set(tasks.COMMONSENSE)
    assert [record["tasks"][task]["items"] for task in tasks.COMMONSENSE] == [2, 2, 2, 1, 2, 3, 2]
    assert (record["step"], record["precision"], record["weights"]) == (5, "float32", "auto")
    assert record["bos"] == {"asked": "no", "used": False} and record["harness"].startswith("lm-evaluation-harness 0.4.")
    for task, row in record["tasks"].items():
        assert set(row) == {"metrics", "items", "of", "version", "n_shot", "hash"} and len(row["hash"]) == 64
        assert tasks.METRIC[task] in row["metrics"] and row["n_shot"] == 0 and row["version"] in (1.0, 2.0)
    ours = [record["tasks"][task]["metrics"][tasks.METRIC[task]]["value"] for task in tasks.COMMONSENSE]
    assert record["commonsense_average"] == pytest.approx(sum(ours) / 7)
    table = [row for row in out.splitlines() if row.startswith(f"{folders['run']}, step 5")]
    assert len(table) == 1 and table[0].split()[-8:] == [f"{100 * x:.2f}" for x in [*ours, sum(ours) / 7]]
    (kept,) = (folders["run"] / "evals").iterdir()
    assert kept.name.startswith("5-") and kept.read_text() == output.read_text()
    (metrics := folders["run"] / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    drawn = history.read(folders["run"]).scores
    metrics.unlink()
    piqa = record["tasks"]["piqa"]["metrics"]["acc_norm"]
    assert drawn["piqa", "acc_norm"] == [(5, piqa["value"], piqa["stderr"])]
    assert "Pythia-1.0B, 300B tokens" in out and "TinyLlama v1.1 chinese" in out and "EVAL.md" in out


def test_an_items_text_is_its_prompt_and_right_answer(data):
    """What is looked for in training data."""
    harness = pytest.importorskip("tinyllama_jax.evals.harness", reason="needs lm_eval, of the extra dev")
    texts = {}
    for task in harness.tasks(list(tasks.COMMONSENSE), None, data):
        texts[task.task_name] = [harness._text(task, doc) for doc in task.eval_docs]
    assert texts["hellaswag"] == ["Sitting: A man sits. He gets up.", "Sitting: A man sits. He eats."]
    assert texts["openbookqa"] == ["Which is an animal? cat"] * 2
    assert texts["winogrande"] == [f"The cup fell off the bed as the {thing} was old." for thing in ("cup", "bed")]
    assert texts["arc_challenge"] == ["Question: Which is an animal?\nAnswer: cup"]
    assert texts["boolq"][0] == "A cup is made of clay.\nQuestion: is a cup made of clay?\nAnswer: yes"
    assert texts["piqa"] == [f"Question: drink\nAnswer: take a {thing}" for thing in ("cup", "bed")]


def test_the_published_averages_are_the_means_of_their_rows():
    """A wrong digit would show; the original rounds some averages down."""
    for name, row in tasks.PUBLISHED.items():
        assert row[-1] == pytest.approx(sum(row[:7]) / 7, abs=0.02), name


@pytest.mark.parametrize(
    ("rows", "task", "error"),
    [
        ({}, "piqa", "piqa: no such folder; --data needs .*/piqa/validation.jsonl .*, whose rows hold goal, sol1, sol2, label"),
        ({"piqa/train.jsonl": []}, "piqa", "holds no file of the split validation; --data needs"),
        ({"arc_easy/dev.jsonl": []}, "arc_easy", "holds no file of the split test; --data needs"),
        ({"piqa/valid.jsonl": [], "piqa/dev.jsonl": []}, "piqa", "holds dev.jsonl, valid.jsonl; keep one file"),
        ({"piqa/valid.jsonl": []}, "piqa", "valid.jsonl: is empty; it must hold rows with goal"),
        ({"piqa/valid.jsonl": "{"}, "piqa", "valid.jsonl, line 1: is no JSON object"),
        ({"piqa/valid.jsonl": "[1]"}, "piqa", "valid.jsonl, line 1: is no JSON object"),
        ({}, "piqa", None),
        ({"piqa/valid.jsonl": [{"goal": "a", "sol1": "b", "sol2": "c"}]}, "piqa", "row 1: .*missing required field `label`"),
        ({"piqa/valid.jsonl": [{"goal": "a", "sol1": "b", "sol2": "c", "label": 2}]}, "piqa", "its answer 2 is none of 0, 1"),
        ({"piqa/valid.jsonl": [{"goal": 1, "sol1": "b", "sol2": "c", "label": 1}]}, "piqa", "Expected `str`, got `int`"),
        (
            {"piqa/valid.jsonl": ROWS["piqa/valid.jsonl"], "piqa/valid-labels.lst": "0\n"},
            "piqa",
            "row 2: .*index out of range",
        ),
        (
            {"piqa/valid.jsonl": ROWS["piqa/valid.jsonl"], "piqa/valid-labels.lst": "0\n1\n1\n"},
            "piqa",
            "has 2 rows, and its labels are 3",
        ),
        ({"piqa/valid.jsonl": [], "piqa/valid-labels.lst": "x\n"}, "piqa", "holds .*x.*; each line must be a number"),
        ({"arc_easy/test.jsonl": [{"question": ASKED, "answerKey": "C"}]}, "arc_easy", "its answer 'C' is none of A, B"),
        ({"arc_easy/test.jsonl": [{"question": {"stem": "a", "choices": [1]}}]}, "arc_easy", "Expected `str`, got `null`"),
        ({"winogrande/dev.jsonl": [{"sentence": "a", "option1": "b", "option2": "c", "answer": "1"}]}, "winogrande", "'_'"),
        (
            {"hellaswag/val.jsonl": [{"ctx_a": "", "ctx_b": "", "activity_label": "", "endings": ["a"], "label": "x"}]},
            "hellaswag",
            "invalid literal",
        ),
    ],
)
def test_a_wrong_file_is_named(rows, task, error, tmp_path):
    write(tmp_path, {name: content for name, content in rows.items() if not name.endswith(".parquet")})
    if error is None:
        (tmp_path / "piqa").mkdir()
        (tmp_path / "piqa" / "valid.parquet").write_bytes(b"PAR1 is damaged PAR1")
        error = "valid.parquet: cannot be read as parquet"
    with pytest.raises(UserError, match=error) as raised:
        tasks.local_rows(tmp_path, task)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ([], "nothing to score: say --tasks commonsense, --data-set DIR"),
        (["--tasks", ""], "--tasks '': names no task; choose of commonsense, knowledge, language"),
        (["--tasks", ",,"], "names no task"),
        (["--tasks", "piqa", "--limit", "0"], "--limit 0: must be at least 1"),
        (["--tasks", "piqa", "--batch", "-1"], "--batch -1: must be at least 1"),
        (["--tasks", "piqa", "--data", "nowhere"], "--data nowhere: no such folder"),
        (["--tasks", "piqa", "--include", "s3://x/y"], "--include=s3://x/y: is a URL"),
        (["--tasks", "piqa", "--output", "no/such/x.json"], "--output no/such/x.json: must be a file in a folder that exists"),
        (["--tasks", "piqa", "--longer", "2"], "--longer 2: must lie between 1/64 and 64, and needs --data-set or"),
        (["--data-set", "x", "--longer", "nan"], "--longer nan: must lie between 1/64 and 64"),
        (["--passkey", "1", "--longer", "65"], "--longer 65: must lie between 1/64 and 64"),
        (["--data-set", "x", "--rope", "ntk"], "--rope ntk: needs --longer"),
        (["--passkey", "1", "--rope", "ntk", "--longer", "0.5"], "--rope ntk: needs --longer of at least 1"),
        (["--passkey", "0"], "--passkey 0: must be at least 1"),
        (
            ["--passkey", "1"],
            "--passkey: needs [0-9]{3} tokens, and the context has 64; .*--longer, must be [4-9].* times as long as this",
        ),
        (["--data-set", ""], "--data-set is empty; give a path"),
        (["--data-set", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_wrong_options_are_named(folders, more, error):  # noqa: F811
    with pytest.raises(UserError, match=error):
        evaluate.main(["--checkpoint", str(folders["hf"]), *more])


def test_without_lm_eval_the_extra_is_named(folders, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "tinyllama_jax.evals.harness", raising=False)
    monkeypatch.delattr("tinyllama_jax.evals.harness", raising=False)
    with pytest.raises(UserError, match=r"--tasks needs lm-eval .*: pip install '.\[eval\]'"):
        evaluate.main(["--checkpoint", str(folders["hf"]), "--tasks", "piqa"])


def test_data_of_another_tokenizer_are_refused(folders, tiny_data):  # noqa: F811
    with pytest.raises(UserError, match="/a: was prepared with another tokenizer than the model's"):
        evaluate.main(["--checkpoint", str(folders["hf"]), "--data-set", str(tiny_data / "a")])


def test_an_export_scores_data_as_its_run(folders, tmp_path, capsys):  # noqa: F811
    from tinyllama_jax.data.prepare.pipeline import prepare

    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "def scan(string): return string  # é"}) + "\n")
    where = {"tokenizer": folders["run"] / "tokenizer", "output": tmp_path / "data"}
    prepare(train=[tmp_path / "a.jsonl"], **where, seq_len=100, workers=1)
    records = []
    for name in ("run", "hf"):
        line = ["--checkpoint", str(folders[name]), "--data-set", str(tmp_path / "data"), "--split", "train"]
        assert evaluate.main([*line, "--output", str(tmp_path / "out.json")]) == 0
        records.append(json.loads((tmp_path / "out.json").read_text())["data_set"])
    assert records[0] == records[1] and records[0]["bytes"] > 20 and records[0]["loss_stderr"] is None
    assert "bits per byte: " in capsys.readouterr().out


def test_hidden_numbers_are_scored_and_kept(folders, tmp_path, capsys):  # noqa: F811
    line = ["--checkpoint", str(folders["run"]), "--step", "5", "--output", str(tmp_path / "out.json")]
    assert evaluate.main([*line, "--passkey", "2", "--longer", "8", "--rope", "yarn"]) == 0
    record, out = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    scored = record["passkey"]
    assert (scored["context"], scored["rope_scaling"], scored["tries"], scored["seed"], scored["bos"]) == (512, 8, 10, 0, False)
    assert scored["rope_type"].startswith("yarn,") and [row["depth"] for row in scored["depths"]] == [0, 0.25, 0.5, 0.75, 1]
    results = record["results"]["passkey 512 yarn, 10 tries"]
    assert results["accuracy"] == scored["accuracy"] == 0 and results["accuracy at 25%_stderr"] == 0  # random weights
    assert "passkey at 75% of the text: accuracy 0.000 +- 0.000, 2 tries" in out
    (folders["run"] / "evals" / "5-passkey_512_yarn,_10_tries.json").unlink()
