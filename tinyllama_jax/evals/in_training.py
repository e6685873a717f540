"""Scores the weights of a run between its steps: the held-out loss, a sample of text, tasks of lm-evaluation-harness."""

import contextlib
import dataclasses
import io
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from tinyllama_jax.base.config import Config
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core.program import Program
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.evals import score
from tinyllama_jax.evals import tasks as task_lib
from tinyllama_jax.inference import samples, weights
from tinyllama_jax.inference.weights import Loaded
from tinyllama_jax.run import cluster, metrics
from tinyllama_jax.run.evaluation import evaluate
from tinyllama_jax.run.log import Log


def harness(option: str) -> ModuleType:
    """The module `evals.harness`, which needs lm-eval. Raises UserError, which names `option`, if that is not installed."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        from tinyllama_jax.evals import harness
    except ImportError as error:
        raise UserError(f"{option} needs lm-eval ({error}): pip install '.[eval]'") from None
    return harness


class Tasks(NamedTuple):
    """The tasks of `eval.tasks`, with their data."""

    wanted: list  # of lm-evaluation-harness
    loaded: Loaded  # the model that answers them, without weights; in the precision of `evaluate`


def find_tasks(config: Config, sources: list[Blocks]) -> Tasks | None:
    """The tasks of a run, or None. Each runs once without weights, so that missing data are found before the first step.

    Call it under the run's mesh. Raises UserError.
    """
    settings = config.eval
    if not settings.every:
        return None
    folders = {name: Path(path) for name in ("include", "data") if (path := getattr(settings, name))}
    for name, path in folders.items():
        if not path.is_dir():
            raise UserError(f"--eval.{name}={path}: no such folder")
    with contextlib.redirect_stdout(sys.stderr):
        lib, names = harness("--eval.tasks"), task_lib.named(settings.tasks, "eval.")
        wanted = lib.tasks(names, folders.get("include"), folders.get("data"), "eval.")
    tokenizer, bos = tokenizer_lib.load(sources[0].tokenizer), any(source.manifest["bos"] for source in sources)
    model = weights.for_inference(dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size))
    tasks = Tasks(wanted, Loaded(None, model, tokenizer, bos, config.folder, jax.sharding.get_mesh()))
    answers = lib.HarnessModel(tasks.loaded, bos, quiet=True)
    answers.scorer = lambda texts, done: [score.Scores(np.zeros(text.n), np.zeros(text.n, bool)) for text in texts]
    try:
        _run(answers, tasks, config)
    except UserError as error:
        raise UserError(f"--eval.tasks={settings.tasks}: {error}") from None
    return tasks


def _run(answers: Any, tasks: Tasks, config: Config) -> dict[str, dict]:
    """Task -> its results, as of `harness.run`."""
    unread = io.StringIO()  # lm-eval draws bars of its own
    with contextlib.redirect_stdout(unread), contextlib.redirect_stderr(unread):
        return harness("--eval.tasks").run(answers, tasks.wanted, config.eval.limit or None)["tasks"]


class _Stopped(Exception):
    """A signal came while tasks were scored."""


class Scores:
    """Knows when the weights of a run are scored, and on what, and records the scores. All processes call it alike."""

    def __init__(
        self,
        config: Config,
        program: Program,
        held_out: dict[str, Blocks],
        tasks: Tasks | None,
        log: Log,
        agreement: cluster.Agreement,
    ):
        """`tasks`: from `find_tasks`."""
        self._config, self._program, self._held_out, self._tasks = config, program, held_out, tasks
        self._log, self._agreement = log, agreement

    def before(self, start: int, params: dict, came: bool) -> None:
        """Scores weights that came from another run or file, and what a stop left unscored at the step `start`."""
        if self._agreement.signal():
            return
        if came and self._held_out:
            self._validate(start, params)
        if self._tasks and (came or (start and self._due(start) and self._unscored(start))):
            self._score(start, params)

    def after(self, step: int, params: dict) -> None:
        """Measures what is due after `step`. A signal cuts the tasks short, but not the held-out loss."""
        if self._held_out and (step == self._config.train.steps or step % self._config.log.eval_every == 0):
            self._validate(step, params)
        if self._tasks and self._due(step):
            self._score(step, params)

    def _due(self, step: int) -> bool:
        return step == self._config.train.steps or step % self._config.eval.every == 0

    def _unscored(self, step: int) -> bool:
        """Whether metrics.jsonl lacks a task at `step`; what process 0 reads there holds for all."""
        keys = {key for row in metrics.tail(self._config.folder) if row["step"] == step for key in row}
        known = all(any(key.startswith(f"eval/{task.task_name}/") for key in keys) for task in self._tasks.wanted)
        return not multihost_utils.broadcast_one_to_all(np.int32(known))

    def _validate(self, step: int, params: dict) -> None:
        """Records the held-out loss, and how `log.sample` continues."""
        self._log.record_pending(always=True)
        with self._log.timed("evaluating"):
            scores = evaluate(self._program, self._config, params, self._held_out, step)
        perplexity = scores.get("val_perplexity")
        more = f"accuracy {scores['val_accuracy']:.3f}" if perplexity is None else f"perplexity {perplexity:.2f}"
        self._log.scores(step, scores, f"validation loss {scores['val_loss']:.4f}, {more}")
        if self._config.log.sample:
            with self._log.timed("evaluating"):
                self._log.sample(step, samples.continued(self._config, params, step))

    def _score(self, step: int, params: dict) -> None:
        """Records the scores of the tasks."""
        loaded = self._tasks.loaded._replace(weights=weights.of_trainer(params, self._config.lora))

        def between() -> None:
            cluster.heartbeat(step, "scoring")
            if self._agreement.signal():
                raise _Stopped

        model = harness("--eval.tasks").HarnessModel(loaded, loaded.begin_with_bos, quiet=True, between=between)
        self._log.record_pending(always=True)
        try:
            with self._log.timed("evaluating"):
                between()
                results = _run(model, self._tasks, self._config)
        except _Stopped:
            self._log.say(f"step {step:,}: a signal cut the tasks short; they are scored when the run resumes")
            return
        values, line = {}, []
        for task, row in results.items():
            known = {metric: number for metric, number in row["metrics"].items() if number["value"] is not None}
            error = {metric: f" +- {n['stderr']:.4f}" if n["stderr"] is not None else "" for metric, n in known.items()}
            line.append(f"{task}: " + ", ".join(f"{metric} {n['value']:.4f}{error[metric]}" for metric, n in known.items()))
            values |= {f"eval/{task}/{metric}": n["value"] for metric, n in known.items()}
            values |= {f"eval/{task}/{metric}_stderr": n["stderr"] for metric, n in known.items() if error[metric]}
        self._log.scores(step, values, "; ".join(line))
