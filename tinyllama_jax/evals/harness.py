"""Runs our models in EleutherAI's lm-evaluation-harness (`lm_eval`): answers its three kinds of request."""

import copy
import difflib
import importlib.metadata
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import lm_eval
from lm_eval import evaluator, utils
from lm_eval.api import metrics as metric_lib
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import metric_registry
from lm_eval.api.task import Task
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import control
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.evals import contamination
from tinyllama_jax.evals import tasks as task_lib
from tinyllama_jax.evals.score import Scorer, Text
from tinyllama_jax.inference import retrieval
from tinyllama_jax.inference import text as text_lib
from tinyllama_jax.inference.engine import Engine, Request
from tinyllama_jax.inference.sampling import Sampling
from tinyllama_jax.inference.weights import Loaded

MOST_NEW_TOKENS = 256  # of an answer, where a task does not say; the harness's own default
SEED = 1_234  # of sampled answers; the harness's own default seed
# a task's setting for sampling -> our name for it
SAMPLING = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
SAMPLING |= {"repetition_penalty": "repetition_penalty"}
# folders of the harness's own tasks
FOLDERS = {name: name for name in ("hellaswag", "openbookqa", "winogrande", "piqa", "wikitext", *task_lib.SUITES["knowledge"])}
FOLDERS |= {"arc_easy": "arc", "arc_challenge": "arc", "boolq": "super_glue/boolq", "lambada_openai": "lambada"}
PACKAGED = ("json", "csv", "parquet", "arrow", "text")  # values of a task's dataset_path that read local files
IGNORED = ("do_sample", "until", "max_gen_toks", "num_return_sequences")


class HarnessModel(TemplateLM):
    """A loaded model for `lm_eval.simple_evaluate`.

    Results are those of the harness's own `hf` model on the same weights, with two differences on purpose: a text of which
    every token is scored (`loglikelihood_rolling`) has one bos in front, where `hf` puts two if the tokenizer adds bos itself;
    and the first word of an answer keeps the space before it, which `hf` loses with SentencePiece.
    """

    def __init__(
        self,
        loaded: Loaded,
        bos: bool,
        batch: int | None = None,
        quiet: bool = False,
        between: Callable[[], None] = lambda: None,
        index: retrieval.Index | None = None,
    ):
        """`bos`: whether each text begins with bos. `batch`: rows scored and answers generated at a time. Raises UserError.

        `between`: called after each batch of rows. `index`: its passages stand before each context, which is also what they
        are looked up by.
        """
        super().__init__()
        self._loaded, self._bos, self._quiet, self._between, self.index = loaded, bos, quiet, between, index
        if bos and loaded.tokenizer.bos_id < 0:
            raise UserError("--bos yes: the tokenizer has no bos; say --bos no")
        if loaded.tokenizer.bos_id < 0 and loaded.tokenizer.eos_id < 0:
            raise UserError(f"{loaded.tokenizer.path}: has neither bos nor eos, and a text without context needs one before it")
        self.scorer, self._engine = Scorer(loaded, batch), None
        self._slots = batch or 8

    @property
    def eot_token_id(self) -> int:
        """eos, or -1."""
        return self._loaded.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context: bos, or eos where there is no bos, whatever `bos` says; as `hf`."""
        tokenizer = self._loaded.tokenizer
        return tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id

    @property
    def max_length(self) -> int:
        """The model's context."""
        return self._loaded.model.seq_len

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Ids, with one bos in front as `bos` says unless `add_special_tokens` says otherwise.

        A control token written out in `string`, such as "</s>" after a question, becomes that token, as with `hf`.
        """
        bos_id, (ids, _) = self._loaded.tokenizer.bos_id, control.encode(self._loaded.tokenizer, string)
        bos = self._bos if add_special_tokens is None else add_special_tokens and bos_id >= 0
        return [bos_id, *ids] if bos and ids[:1] != [bos_id] else ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As the harness's own, with passages before the contexts."""
        length = lambda continuation: len(self.tok_encode(continuation, add_special_tokens=False))
        return super().loglikelihood(self._with_passages(requests, length), disable_tqdm)

    def _with_passages(self, requests: list[Instance], length: Callable[[object], int]) -> list[Instance]:
        """`requests` with passages before the contexts. `length`: the tokens that what follows a context may take.

        The same context gets the same passages: so many that the longest of what follows it fits too.
        """
        if self.index is None:
            return requests
        longest: dict[str, int] = {}
        for context, follows in (request.args for request in requests):
            longest[context] = max(longest.get(context, 0), length(follows))
        before = {}
        for context, n in longest.items():
            count = lambda passages, context=context: len(self.tok_encode(retrieval.block(passages) + context))
            before[context] = self.index.before(context, count, self.max_length - n, self.max_length)
        out = [copy.copy(request) for request in requests]
        for request, (context, follows) in zip(out, [request.args for request in requests], strict=True):
            request.arguments = (retrieval.block(before[context]) + context, follows)
        return out

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        """(sum of the continuation's log-probabilities, whether each of its tokens is the most likely one) of each request.

        A text that is too long loses its beginning, as with `hf`. Raises UserError for a continuation that is too long.
        """
        most, texts = self.max_length, []
        for _pair, context, continuation in requests:
            if not 1 <= len(continuation) <= most:
                raise UserError(f"a continuation has {len(continuation):,} tokens, and must have 1 to {most:,}, the context")
            texts.append(Text((context + continuation)[-(most + 1) :], len(continuation)))
        with tqdm(total=len(texts), disable=disable_tqdm or self._quiet, desc="scoring") as bar:
            scores = self.scorer(texts, lambda n: (bar.update(n), self._between()))
        out = [(float(s.logprobs.sum(dtype="float64")), bool(s.greedy.all())) for s in scores]
        for (pair, *_tokens), answer in zip(requests, out, strict=True):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, answer)
        return out

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text: in windows of the model's context, each token scored once."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            rolling = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(None, *window) for window in map(utils.make_disjoint_window, rolling)]
            owners += [i] * (len(windows) - len(owners))
        out = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            out[i] += logprob
        for request, total in zip(requests, out, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return out

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """An answer to each context; it ends before a stop string, at eos, or at the task's number of tokens.

        A context that leaves no room for these loses its beginning, as with `hf`. Raises UserError for a setting we lack.
        """
        self._engine = self._engine or Engine(self._loaded, self._slots)
        length = lambda settings: normalize_gen_kwargs(settings, MOST_NEW_TOKENS)["max_gen_toks"]
        requests = self._with_passages(requests, length)
        running, out = {}, [""] * len(requests)
        stops = text_lib.eos_ids(self._loaded.tokenizer)
        with tqdm(total=len(requests), disable=disable_tqdm or self._quiet, desc="writing") as bar:
            for i, (context, settings) in enumerate(request.args for request in requests):
                settings = normalize_gen_kwargs(settings, MOST_NEW_TOKENS)
                new = settings["max_gen_toks"]
                if not 1 <= new < self.max_length:
                    raise UserError(f"max_gen_toks {new}: must lie between 1 and the model's context of {self.max_length:,}")
                prompt = (self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - new) :]
                request = Request(prompt, new, _sampling(settings), SEED, i, stops)
                until = handle_stop_sequences(settings.get("until"), None)
                running[request] = i, text_lib.Text(self._loaded.tokenizer, until, before=prompt), 0
                self._engine.submit(request)
            while running:
                for request in self._engine.step():
                    if request not in running:  # cancelled below
                        continue
                    i, text, given = running[request]
                    new = [token for token in request.tokens[given:] if token not in stops]
                    out[i] += text.add(new, last=request.finish is not None)
                    running[request] = i, text, len(request.tokens)
                    if text.stopped or request.finish:
                        self._engine.cancel(request)
                        del running[request]
                        self.cache_hook.add_partial("generate_until", requests[i].args, out[i])
                        bar.update()
        return out


def _sampling(settings: dict) -> Sampling:
    """A task's settings for sampling as ours. Raises UserError for one that we do not have."""
    if wrong := [name for name in settings if name not in (*SAMPLING, *IGNORED)]:
        raise UserError(f"generation_kwargs of a task: {wrong[0]!r} is none of {', '.join((*SAMPLING, *IGNORED))}")
    values = {SAMPLING[name]: settings[name] for name in SAMPLING if settings.get(name) is not None}
    if not settings.get("do_sample") or values.get("temperature") == 0:
        values = {name: value for name, value in values.items() if name == "repetition_penalty"} | {"temperature": 0.0}
    return Sampling(**{"temperature": 1.0, **values})


def tasks(names: list[str], include: Path | None, data: Path | None, section: str = "") -> list[Task]:
    """The tasks `names`. `include`: a folder with more YAML files. `data`: a folder with local files for `tasks.LOCAL`.

    `section`: "eval." in training, whose keys error messages then name, and which takes no task that generates text or runs it.
    Raises UserError for a name that is not known, and for data that are neither on this machine nor on the hub.
    """
    own = {name: task_lib.local_rows(data, name, section) for name in names if data and name in task_lib.LOCAL}
    # reading all of the harness's 13,000 YAML files takes seconds, so only those of the tasks' folders if we know these
    folders = [Path(lm_eval.tasks.__file__).parent / FOLDERS[name] for name in names if name in FOLDERS]
    more = [include] if include else []
    manager = TaskManager(include_path=folders + more, include_defaults=False)
    if any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=more)
    out = []
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, [*manager.all_tasks, *task_lib.SUITES], 1)
            held = TaskManager(include_path=more, include_defaults=False).all_tasks
            yours = f"{include} holds {', '.join(held) or 'none'}" if include else f"your own go into --{section}include DIR"
            remedy = f"did you mean {near[0]}?" if near else f"its README lists them; {yours}"
            raise UserError(f"--{section}tasks {name}: is no task of lm-evaluation-harness {version()}; {remedy}")
        if section:  # before a task's own Python is imported
            _check_only_scores(name, manager.task_index[name].cfg or {})
        spec: str | dict = name
        if name in own:
            split, rows = own[name]
            read = lambda rows=rows, split=split, **_: datasets.DatasetDict({split: datasets.Dataset.from_list(rows)})
            only = {"custom_dataset": read, "training_split": None, "validation_split": None, "test_split": None}
            spec = {"group": "local", "task": [{"task": name, **only, f"{split}_split": split}]}
        try:
            out += manager.load([spec])["tasks"].values()
        except Exception as error:  # of a wrong YAML file it raises many types
            entry = manager.task_index[name]
            what = _wrong(error, name, entry.cfg or {}, entry.yaml_path, section)
            raise UserError(f"--{section}tasks {name}: {what}") from None
    for task in out:
        functions = {} if task.config.process_results else getattr(task, "_metric_fn_list", {})
        if unknown := [metric for metric, function in functions.items() if not function]:
            raise UserError(f"--{section}tasks {task.task_name}: its metric {_unknown(unknown[0])}")
        if len(task.eval_docs) and not task_lib.has_right_answer(task, task.eval_docs[0]):
            what = "the right answer of its first item is none of its choices; correct doc_to_target or doc_to_choice"
            raise UserError(f"--{section}tasks {task.task_name}: {what}")
    for task in out if section else ():  # those of a group too
        _check_only_scores(task.task_name, {"unsafe_code": task.config.unsafe_code, "output_type": task.OUTPUT_TYPE})
    return out


def _wrong(error: Exception, name: str, settings: dict, file: Path, section: str) -> str:
    """What is wrong with a task that cannot be loaded, and the remedy. `settings`: those of its YAML `file`."""
    why = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, ConnectionError | FileNotFoundError):
        if settings.get("dataset_path") in PACKAGED:
            return f"{why}; correct data_files in {file}"
        local = f"give --{section}data DIR with DIR/{name}, or " if name in task_lib.LOCAL else ""
        return f"its data are not here and cannot be downloaded ({why}); {local}run it once where the hub can be reached"
    for metric in settings.get("metric_list") or []:
        if isinstance(named := metric.get("metric"), str) and named not in metric_registry:
            return f"the metric {_unknown(named)} ({file})"
    return f"{file} is wrong ({type(error).__name__}: {why}); see the harness's guide to tasks"


def _unknown(metric: str) -> str:
    near = difflib.get_close_matches(metric, metric_registry, 1)
    return f"{metric!r} is unknown to the harness" + (f"; did you mean {near[0]}?" if near else "; its docs list them")


def _check_only_scores(name: str, settings: dict) -> None:
    """Raises UserError for a task that a training run does not take. `settings`: of its YAML file."""
    remedy = "score the run's checkpoints with `evaluate"
    if settings.get("unsafe_code"):
        what = "runs programs that the model writes, and training runs none"
        raise UserError(f"--eval.tasks {name}: {what}; {remedy} --run-code`")
    if settings.get("output_type") == "generate_until":
        what = "has the model write answers, for which the weights would be copied"
        raise UserError(f"--eval.tasks {name}: {what}; training only takes tasks that score given texts; {remedy}`")


def version() -> str:
    """The harness's version."""
    return importlib.metadata.version("lm_eval")


def run(model: HarnessModel, wanted: list[Task], limit: int | None, run_code: bool = False) -> dict:
    """Runs tasks; returns {"harness", "tasks": {name: {"metrics", "items", "version", "hash", "n_shot", ...}}, "samples"}.

    `limit`: items of each task; None: all. `hash`: of all items, prompts and targets, as the harness's own `task_hashes`.
    A metric is {"value", "stderr"}; the standard error is None where the harness knows none.
    """
    if unsafe := [task.task_name for task in wanted if getattr(task, "UNSAFE_CODE", False) and not run_code]:
        raise UserError(f"--tasks {unsafe[0]}: runs programs that the model writes; say --run-code where they can do no harm")
    whole = [task.task_name for task in wanted if getattr(task, "OUTPUT_TYPE", "") == "loglikelihood_rolling"]
    if getattr(model, "index", None) and whole:
        raise UserError(
            f"--retrieve: {whole[0]} scores whole texts, which have no context to put passages before; leave it out"
        )
    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # asked for by the package evaluate
    os.environ["DISABLE_MULTIPROC"] = "1"  # else standard errors are resampled by forks of this process, which has threads
    manager = TaskManager(include_defaults=False)  # else it reads all YAML files again
    options = {"limit": limit, "confirm_run_unsafe_code": run_code, "bootstrap_iters": 1_000, "task_manager": manager}
    evaluator.get_git_commit_hash = lambda: None  # else git complains where the current folder is no checkout
    results = evaluator.simple_evaluate(model, tasks=wanted, **options)
    out = {}
    for name, samples in results["samples"].items():
        values = {key.removesuffix(",none"): value for key, value in results["results"][name].items() if "," in key}
        errors = {key.replace("_stderr", "", 1): value for key, value in values.items() if "_stderr" in key}
        out[name] = {
            "metrics": {
                key: {"value": _number(value), "stderr": _number(errors.get(key))}
                for key, value in values.items()
                if "_stderr" not in key
            },
            "items": results["n-samples"][name]["effective"],
            "of": results["n-samples"][name]["original"],
            "version": results["versions"].get(name),
            "n_shot": results["n-shot"].get(name),
            "hash": utils.hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples)),
        }
    used = {"retrieve": model.index.settings(model.max_length)} if getattr(model, "index", None) else {}
    return {"harness": f"lm-evaluation-harness {version()}", **used, "tasks": out, "samples": results["samples"]}


# -- contamination ------------------------------------------------------------------------------------------------------


def contaminated(wanted: list[Task], samples: dict[str, list[dict]], against: list[Blocks]) -> dict:
    """Which items of each task stand in the prepared sets `against`, and the scores with and without these.

    `samples`: as `run` returns. Returns {"against", "tokens", "text_mb", "seconds", "tasks": {name: {"n", "items", "dirty",
    "share", "common", "scores": {metric: {"all", "clean", "dirty"}}, "dirty_items"}}}. `common`: items of which only n-grams
    stand in the data that are in more than `contamination.COMMON` documents; they count as clean. Raises UserError.
    """
    by_name = {task.task_name: task for task in wanted}
    items = {
        name: contamination.Items({s["doc_id"]: _text(by_name[name], s["doc"]) for s in samples[name]}) for name in samples
    }
    tokens, started = sum(len(blocks) * (blocks.seq_len + 1) for blocks in against), time.perf_counter()
    with tqdm(total=tokens, desc="contamination", unit=" tokens", unit_scale=True, mininterval=1) as bar:

        def progress(more: int, speed: str) -> None:
            bar.set_postfix_str(speed, refresh=False)
            bar.update(more)

        scanned = contamination.scan(against, list(items.values()), progress)
    out = {}
    for name, task in items.items():
        dirty, common = task.dirty(scanned.places)
        groups = {"all": task.each.keys(), "clean": task.each.keys() - dirty.keys(), "dirty": dirty.keys()}
        some = lambda ids, name=name: [s for s in samples[name] if s["doc_id"] in ids]
        scores = {group: _scores(by_name[name], some(ids)) for group, ids in groups.items()}
        out[name] = {
            "n": task.n,
            "items": len(task.each),
            "dirty": len(dirty),
            "share": len(dirty) / len(task.each),
            "common": common,
            "scores": {metric: {group: scores[group].get(metric) for group in groups} for metric in scores["all"]},
            "dirty_items": [contamination.described(item, gram, place, against) for item, (gram, place) in dirty.items()],
        }
    sets = [{"path": str(b.directory), "split": b.split, "manifest": b.manifest_sha256} for b in against]
    seconds = time.perf_counter() - started
    return {"against": sets, "tokens": tokens, "text_mb": scanned.n_bytes / 1e6, "seconds": seconds, "tasks": out}


def _text(task: Task, doc: dict) -> str:
    """An item's prompt, without examples, and its (first) right answer."""
    prompt, answer = task.doc_to_text(doc), task.doc_to_target(doc)
    answer = answer[0] if isinstance(answer, list) and answer else answer
    if isinstance(prompt, int):  # winogrande: the choices are the prompts
        prompt = task.doc_to_choice(doc)[prompt]
    if isinstance(answer, int) and task.OUTPUT_TYPE == "multiple_choice":
        answer = task.doc_to_choice(doc)[answer]
    return f"{prompt} {answer}"


def _scores(task: Task, samples: list[dict]) -> dict[str, dict[str, float | None]]:
    """The task's metrics over some of its items, named as in `run`: {metric: {"value", "stderr"}}."""
    out = {}
    for kind, metric in dict.fromkeys((s["filter"], metric) for s in samples for metric in s["metrics"]):
        values, aggregate = [s[metric] for s in samples if s["filter"] == kind], task.aggregation()[metric]
        error = metric_lib.stderr_for_metric(aggregate, 1_000) if len(values) > 1 else None
        score = {"value": _number(aggregate(values)), "stderr": _number(error(values)) if error else None}
        out[metric if kind == "none" else f"{metric},{kind}"] = score
    return out


def _number(value: object) -> float | None:
    """`value` for JSON, which has no nan."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
