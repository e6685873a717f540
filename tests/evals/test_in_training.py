"""Scores during training: those of `evaluate` on the same weights, at the same steps after a stop, and nothing else changes."""

import json
import os
import random
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's library

import pytest
from cluster import Cluster

from tinyllama_jax import evaluate, train
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.evals import in_training
from tinyllama_jax.planning import history
from tinyllama_jax.run import cluster

for name in ("lm_eval", "datasets"):
    pytest.importorskip(name, reason="of the extra dev")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("harness")]  # the harness and its libraries warn
WORDS = ["the", "decoder", "scans", "a", "string", "returns", "its", "value", "with", "index", "raises", "error"]
YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {file}}}
validation_split: validation
output_type: {kind}
doc_to_text: q
doc_to_target: {target}
"""
STEPS = [3, 6, 8]  # eval.every=3, and the last one


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """PIQA's files; a task of one's own, `words`; and two that training refuses, `written` and `run`."""
    out, rng = tmp_path_factory.mktemp("tasks"), random.Random(5)
    some = lambda low, high: " ".join(rng.choices(WORDS, k=rng.randint(low, high)))
    (out / "piqa").mkdir()
    rows = [{"goal": some(1, 2), "sol1": some(1, 2), "sol2": some(1, 2)} for _ in range(40)]
    (out / "piqa/valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "piqa/valid-labels.lst").write_text("".join(f"{rng.randint(0, 1)}\n" for _ in rows))
    rows = [{"q": some(1, 2), "choices": [some(1, 2) for _ in range(4)], "gold": rng.randint(0, 3)} for _ in range(40)]
    (out / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write = lambda name, kind, target, more: (out / f"{name}.yaml").write_text(
        YAML.format(name=name, kind=kind, target=target, file=out / "words.jsonl") + more
    )
    write("long", "multiple_choice", "gold", 'doc_to_choice: "{{[q * 30, q, q, q]}}"\n')
    write("words", "multiple_choice", "gold", "doc_to_choice: choices\n")
    write("written", "generate_until", "q", "generation_kwargs: {until: [x]}\n")
    write("run", "multiple_choice", "gold", "doc_to_choice: choices\nunsafe_code: true\n")
    return out


def keys(folder: Path, **more: object) -> dict[str, object]:
    """Options, on eight devices: weights sharded over fsdp and tensor."""
    own = {"eval__every": 3, "eval__tasks": "piqa,words", "eval__data": folder, "eval__include": folder, "eval__limit": 30}
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "train__seqs_per_device": 2}
    return own | mesh | {"train__steps": 8, "checkpoint__every": 2, "checkpoint__keep": 9, "log__eval_every": 5} | more


def command(config_file: Path, workdir: Path, **keys: object) -> list[str]:
    return ["--config", str(config_file), f"--workdir={workdir}", *(f"--{k.replace('__', '.')}={v}" for k, v in keys.items())]


def lines(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl, without the clocks that each has."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("time", "goodput") and not k.startswith("seconds/")} for row in rows]


def scores(workdir: Path) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in lines(workdir) if "eval/piqa/acc" in row}


@pytest.fixture(scope="module")
def scored(tiny_config_file, folder, tmp_path_factory) -> tuple[Path, list]:
    """The folder of a run that is scored, and its heartbeats."""
    workdir, beats = tmp_path_factory.mktemp("scored") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "heartbeat", lambda step, what: beats.append((step, what)))
        assert train.main(command(tiny_config_file, workdir, **keys(folder, checkpoint__every=1))) == 0
    return workdir, beats


def as_evaluated(workdir: Path, step: int, folder: Path, output: Path) -> None:
    """Asserts that `evaluate` gives the checkpoint of `step` the scores that the run recorded."""
    given = ["--checkpoint", str(workdir), "--step", str(step), "--tasks", "piqa,words", "--limit", "30"]
    assert evaluate.main([*given, "--data", str(folder), "--include", str(folder), "--output", str(output)]) == 0
    expected = {
        f"eval/{task}/{metric}": value
        for task, row in json.loads(output.read_text())["results"].items()
        for metric, value in row.items()
    }
    row = scores(workdir)[step]
    assert {key: row[key] for key in row if key.startswith("eval/")} == pytest.approx(expected)
    assert {"eval/piqa/acc_norm", "eval/piqa/acc_norm_stderr", "eval/words/acc"} <= row.keys()


def test_scores_are_those_of_evaluate_and_change_nothing_else(scored, folder, tiny_config_file, tmp_path, capsys):
    workdir, beats = scored
    assert list(scores(workdir)) == STEPS
    for step in (3, 8):
        as_evaluated(workdir, step, folder, tmp_path / "scores.json")
    assert len({str(scores(workdir)[step]) for step in STEPS}) == 3  # the weights of that moment
    assert sum(step == 3 and what == "scoring" for step, what in beats) >= 3  # also between batches of rows
    (run,) = [history.read(workdir)]
    drawn, row = run.scores["piqa, during training", "acc_norm"], scores(workdir)[6]
    assert [step for step, *_ in drawn] == STEPS
    assert drawn[1] == pytest.approx((6, row["eval/piqa/acc_norm"], row["eval/piqa/acc_norm_stderr"]))
    assert not any(key.startswith("eval/") for key in run.points)

    plain = keys(folder, eval__every=0, eval__tasks="", eval__data="", eval__include="", eval__limit=0, checkpoint__every=1)
    assert train.main(command(tiny_config_file, tmp_path / "plain", **plain)) == 0
    numbers = lambda run: [[row.get(key) for key in ("step", "loss", "grad_norm", "val_loss")] for row in lines(run)
                           if "eval/piqa/acc" not in row]  # fmt: skip
    assert numbers(tmp_path / "plain") == numbers(workdir)
    assert "eval/" not in str(lines(tmp_path / "plain"))


def test_a_signal_cuts_scoring_short_and_the_resumed_run_scores_that_step(
    scored, folder, tiny_config_file, tmp_path, monkeypatch, capsys
):
    words, run = command(tiny_config_file, tmp_path / "run", **keys(folder)), in_training.harness("").run
    calls = []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 2:  # the first one is without weights
            os.kill(os.getpid(), signal.SIGTERM)
        return run(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(in_training.harness(""), "run", stopped)
        assert train.main(words) == 143
    out = capsys.readouterr().out
    assert "step 3: a signal cut the tasks short" in out and "stopped by SIGTERM after step 3, which is saved" in out
    assert list(scores(tmp_path / "run")) == []
    assert train.main(words) == 0
    assert "step 3: piqa: acc 0." in capsys.readouterr().out
    assert scores(tmp_path / "run") == scores(scored[0])
    assert train.main(words) == 0 and scores(tmp_path / "run") == scores(scored[0])  # it is at its end, and scored there
    more = [word.replace("piqa,words", "words") for word in words]  # other tasks are no other run
    assert train.main([*more, "--train.steps=9"]) == 0
    assert "eval." not in capsys.readouterr().out
    assert [row["step"] for row in lines(tmp_path / "run") if "eval/words/acc" in row] == [*STEPS, 9]


def test_two_processes_score_alike_and_one_writes(tiny_config_file, folder, tmp_path):
    run = Cluster(tiny_config_file, tmp_path / "run", 2, 4, **keys(folder, train__steps=3))
    assert run.wait() == [0, 0], run.output(0) + run.output(1)
    assert list(scores(tmp_path / "run")) == [3]
    as_evaluated(tmp_path / "run", 3, folder, tmp_path / "scores.json")
    assert "step 3: piqa: acc 0." in run.output(0) and "piqa: acc" not in run.output(1)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"eval__tasks": ""}, "--eval.every=3: needs tasks, such as --eval.tasks=piqa,hellaswag"),
        ({"eval__every": 0}, "--eval.tasks=piqa,words: needs --eval.every=STEPS; without it, must be empty"),
        ({"eval__every": -1}, "--eval.every=-1: must be at least 0"),
        ({"eval__limit": -5}, "--eval.limit=-5: must be at least 0"),
        ({"eval__tasks": "piqa,wordz"}, "--eval.tasks wordz: is no task of .*; did you mean words?"),
        ({"eval__tasks": ","}, "--eval.tasks ',': names no task"),
        ({"eval__tasks": "words,written"}, "--eval.tasks written: has the model write answers, .* copied; .*`evaluate`"),
        ({"eval__tasks": "run"}, "--eval.tasks run: runs programs that the model writes, .*`evaluate --run-code`"),
        ({"eval__tasks": "long"}, "--eval.tasks=long: a continuation has .* tokens, and must have 1 to 16, the context"),
        ({"eval__tasks": "humaneval"}, "--eval.tasks humaneval: runs programs that the model writes"),
        ({"eval__tasks": "boolq"}, "boolq: no such folder; --eval.data needs .*boolq/validation.jsonl"),
        ({"eval__data": "", "eval__tasks": "piqa"}, "--eval.tasks piqa: its data .*give --eval.data DIR with DIR/piqa"),
        ({"eval__data": "nowhere"}, "--eval.data=nowhere: no such folder"),
        ({"eval__include": "nowhere"}, "--eval.include=nowhere: no such folder"),
        ({"eval__data": "gs://bucket/x"}, "--eval.data.*gs://bucket/x"),
    ],
)
def test_what_is_wrong_is_known_before_the_first_step(change, error, tiny_config_file, folder, tmp_path):
    with pytest.raises(UserError, match=error):
        train.main(command(tiny_config_file, tmp_path / "run", **keys(folder, **change)))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_what_is_missing_is_named(tiny_config_file, folder, tmp_path, monkeypatch):
    tokenizer = SimpleNamespace(bos_id=-1, eos_id=-1, path="x.model")
    with pytest.raises(UserError, match="x.model: has neither bos nor eos"):
        in_training.harness("").HarnessModel(SimpleNamespace(tokenizer=tokenizer), False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "tinyllama_jax.evals.harness")
    monkeypatch.delattr("tinyllama_jax.evals.harness")
    with pytest.raises(UserError, match=r"--eval.tasks needs lm-eval .*: pip install '.\[eval\]'"):
        train.main(command(tiny_config_file, tmp_path / "run", **keys(folder)))
