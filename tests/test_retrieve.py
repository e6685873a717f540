"""Retrieval as a person uses it: an index, passages in a chat and before tasks, exact match and F1, and what goes wrong."""

import gzip
import json
import math
import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's library

import pytest
from test_chat import HI, make_run, prompt, talk

from tinyllama_jax import evaluate, retrieve
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.evals import questions
from tinyllama_jax.inference import retrieval, weights

pytest.importorskip("bm25s", reason="of the extra dev")
CITIES = {"Rome": "Rome is hot.", "Oslo": "Oslo is cold.", "Bern": "Bern is old. Bern is small."}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Three kinds of file with three cities, the first one twice, and a file of another kind."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"text": CITIES["Rome"], "title": "On\x1b[1m\nRome"}, {"text": None}, {"text": CITIES["Rome"]}]
    with gzip.open(folder / "a.jsonl.gz", "wt") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    (folder / "b.txt").write_text(CITIES["Oslo"])
    (folder / "c.md").write_text(CITIES["Bern"])
    (folder / "d.png").write_bytes(b"\x89")
    return folder


@pytest.fixture(scope="module")
def index(texts, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("index") / "index"  # of its own: a worker may make module fixtures twice
    retrieve.main(["build", str(texts), "--output", str(made)])
    return made


@pytest.fixture(scope="module")
def hi(tmp_path_factory) -> Path:
    """A run with a context of 160 tokens, about as many characters, whose every answer is "hi"."""
    return make_run(tmp_path_factory.mktemp("hi"), HI, 160)


# -- the index ------------------------------------------------------------------------------------------------------------


def test_documents_are_cut_at_the_best_place():
    words = lambda n, end: " ".join(["w"] * n) + end
    cut = lambda text: [passage.split() for passage in retrieval.passages([text])]
    assert [len(p) for p in cut(words(120, "."))] == [120]  # as long as one may be
    assert [len(p) for p in cut(words(60, "\n\n") + words(30, ". ") + words(50, "."))] == [60, 80]  # a paragraph's end first
    assert [len(p) for p in cut(words(40, "\n\n") + words(30, ". ") + words(20, ". ") + words(50, "."))] == [90, 50]
    assert [len(p) for p in cut(words(130, "."))] == [120, 10]
    assert [len(p) for p in retrieval.passages(["日本。" * 70])] == [3 * 60, 3 * 10]  # each sign is a word
    (long,) = {len(p) for p in list(retrieval.passages(["x" * 100_000]))[:-1]}
    assert long == 120 * 64
    assert sum(map(len, retrieval.passages(["- " * 100_000]))) > 199_000  # no word at all
    assert list(retrieval.passages([" \n", ""])) == []


def test_a_text_in_parts_is_cut_as_the_whole():
    text = "".join(f"Sentence {i} has {'some ' * (i % 9)}words.{chr(10) * (i % 7 // 3)} " for i in range(400))
    whole = list(retrieval.passages([text]))
    assert list(retrieval.passages(text[i : i + 37] for i in range(0, len(text), 37))) == whole and len(whole) > 20
    assert " ".join(whole).split() == text.split()  # no word is lost


def test_a_search_names_its_sources_and_scores_as_bm25(texts, index, tmp_path, capsys):
    retrieve.main(["build", str(texts), "--output", str(tmp_path / "index")])
    left = "(left out: 1 copies of passages, 1 rows without text, 1 files of other types)"
    assert f"index: 3 passages of 4 documents in 3 files {left}; 0.0 MB, " in capsys.readouterr().out
    record = json.loads((index / "index.json").read_text())
    assert (record["documents"], record["passages"], record["copies"]) == (4, 3, 1)
    assert (record["without_text"], record["other_files"]) == (1, 1)
    assert record["inputs"].keys() == {"a.jsonl.gz", "b.txt", "c.md"}
    retrieve.main(["search", str(index), "How OLD is bern?"])
    out = capsys.readouterr().out
    assert out.startswith("[1] c.md, document 1, passage 1 (score ") and "Bern is old. Bern is small.\n" in out
    assert "1 of 3 passages; opened in" in out
    retrieve.main(["search", str(index), "cold, or hot: Rome"])
    assert "[1] a.jsonl.gz, document 1, passage 1: On\\x1b[1m Rome (score" in capsys.readouterr().out
    for nothing in ("what is the", "", "zebra", "!?"):
        retrieve.main(["search", str(index), nothing])
        assert capsys.readouterr().out == "no passage has any of these words\n"
    # Lucene's BM25 by hand: 3 passages of 2, 2 and 4 words ("is" does not count)
    (best,) = retrieval.Index(index).search("bern")
    idf, length, tf = math.log(1 + (3 - 1 + 0.5) / (1 + 0.5)), 4 / (8 / 3), 2
    assert best.score == pytest.approx(idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * length)), rel=1e-5)


def test_of_equal_passages_the_first_is_taken(tmp_path):
    rows = [{"text": f"apple {('pear', 'plum', 'fig', 'kiwi')[i % 4]} {i}"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    retrieval.build([tmp_path / "a.jsonl"], tmp_path / "index")
    documents = [p.source.split()[2] for p in retrieval.Index(tmp_path / "index", 4).search("kiwi")]
    assert documents == ["4,", "8,", "12,", "16,"]
    again = retrieval.build([tmp_path / "a.jsonl"], tmp_path / "again")
    assert again == json.loads((tmp_path / "index/index.json").read_text())  # the same text gives the same index


def test_chinese_is_found_by_its_signs(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "东京是日本的首都。"}\n{"text": "北京是中国的首都。"}\n')
    retrieval.build([tmp_path / "a.jsonl"], tmp_path / "index")
    assert retrieval.Index(tmp_path / "index", 1).search("中国")[0].text.startswith("北京")


def test_what_is_no_text_or_no_index_is_one_line(texts, index, tmp_path, monkeypatch):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"title": "no text"}\n')
    (tmp_path / "empty.txt").write_text(" ...\n")
    build = lambda *words: retrieve.main(["build", *map(str, words), "--output", str(tmp_path / "new")])
    for words, error in (
        ([tmp_path / "nowhere"], "DIR .*nowhere: no such file or folder"),
        ([texts / "d.png"], "d.png: is of no known type; known are .* .md"),
        ([tmp_path / "bad.jsonl"], r"bad.jsonl, line 2: has no key 'text'; it has 'title': choose one with --text-key"),
        ([tmp_path / "empty.txt"], "DIR .*empty.txt: holds no words to look for"),
    ):
        with pytest.raises(UserError, match=error):
            build(*words)
        assert not list(tmp_path.glob("*new*"))  # nothing half made stays
    with pytest.raises(UserError, match="--output .*: exists already"):
        retrieve.main(["build", str(texts), "--output", str(index)])
    for folder, error in ((texts, "is no index; make one with"), (tmp_path / "nowhere", "is no index"), ("", "is empty")):
        with pytest.raises(UserError, match=error):
            retrieval.Index(folder)
    with pytest.raises(UserError, match="--passages 0: must lie between 1 and 1,000,000"):
        retrieval.Index(index, 0)
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UserError, match=r"retrieval needs bm25s .*: pip install '.\[retrieve\]'"):
        retrieval.Index(index)


def test_every_damage_is_one_line(index, tmp_path):
    for i, (path, how) in enumerate((path, how) for path in sorted(index.iterdir()) for how in ("short", "zeros", "gone")):
        copy = shutil.copytree(index, tmp_path / str(i)) / path.name
        content = copy.read_bytes()
        copy.write_bytes(content[:-2] if how == "short" else b"\0" * len(content))
        if how == "gone":
            copy.unlink()
        with pytest.raises(UserError, match="is damaged|is no index") as raised:
            opened = retrieval.Index(copy.parent)
            assert how == "zeros", path  # a file of another size is noticed at once
            opened.search("bern is cold")
        assert "\n" not in str(raised.value) and str(copy.parent) in str(raised.value)
    foreign = shutil.copytree(index, tmp_path / "foreign") / "index.json"
    foreign.write_text(foreign.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="has the format 2, and 1 is read; build it again"):
        retrieval.Index(foreign.parent)


def test_passages_keep_their_budget(tmp_path):
    rows = [" ".join(["kiwi"] * n + [f"w{n}{i}" for i in range(20 - n)]) for n in (2, 1)]  # 20 words; the first fits better
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    retrieval.build([tmp_path / "a.jsonl"], tmp_path / "index")
    count = lambda passages: 5 + len(retrieval.block(passages).split())  # a question of 5 words; "Context:", "[1]", "[2]"

    def texts(tokens: int | None, room: int = 1_000) -> list[str]:
        passages = retrieval.Index(tmp_path / "index", 3, tokens).before("kiwi", count, room, 168)
        assert count(passages) <= max(min(room, 5 + (tokens or 42)), 5)
        return [passage.text for passage in passages]

    assert texts(43) == rows  # 1 + 2 x 21 words
    assert texts(None) == texts(42) == [rows[0], " ".join(rows[1].split()[:18]) + " ..."]  # 42: a quarter of the context
    assert texts(31) == [rows[0]]  # 7 words of the second one would stay
    assert texts(21) == [" ".join(rows[0].split()[:18]) + " ..."]
    assert texts(1_000, room=5 + 22) == [rows[0]]  # the room of the prompt counts too
    assert texts(1_000, room=6) == texts(1_000, room=2) == []


# -- in a chat ------------------------------------------------------------------------------------------------------------


def test_a_chat_puts_passages_before_the_turn_alone(hi, index, tmp_path, capsys, monkeypatch):
    asked = lambda text, passage: ("user", f"Context:\n[1] {passage}\n\nQuestion: {text}")
    lines = ["rome?", "oslo?", "what?", f"/save {tmp_path}/talk.jsonl"]
    out, err, prompts = talk(capsys, monkeypatch, hi, lines, "--retrieve", str(index), "--max-new-tokens", "9")
    assert out == "hi\n" * 3
    answer = ("assistant", "hi")
    assert prompts == [
        prompt(hi, asked("rome?", CITIES["Rome"])),
        prompt(hi, ("user", "rome?"), answer, asked("oslo?", CITIES["Oslo"])),
        prompt(hi, ("user", "rome?"), answer, ("user", "oslo?"), answer, ("user", "what?")),
    ]
    places = [err.index(text) for text in ("[1] a.jsonl.gz, document 1", "[1] b.txt, document 1", "[no passage matches")]
    assert places == sorted(places) and "full" not in err
    saved = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert [message["content"] for message in saved] == ["rome?", "hi", "oslo?", "hi", "what?", "hi"]


def test_history_gives_way_to_passages_and_passages_to_the_question(hi, index, capsys, monkeypatch):
    options = ["--retrieve", str(index), "--max-new-tokens", "9", "--retrieve-tokens"]
    first, long, longer = "b" * 50, "bern" + "b" * 60, "c" * 75
    _, err, prompts = talk(capsys, monkeypatch, hi, [first, "bern?", long + " bern", longer + " bern"], *options, "60")
    context = lambda passage, text: ("user", f"Context:\n[1] {passage}\n\nQuestion: {text}")
    assert prompts[1] == prompt(hi, context(CITIES["Bern"], "bern?"))  # without passages the first turn would fit
    assert len(prompt(hi, ("user", first), ("assistant", "hi"), ("user", "bern?"))) < 160 - 9
    assert "the context of 160 tokens is full: the oldest 1 turns are left out" in err
    alone = len(prompt(hi, ("user", long + " bern")))
    assert prompts[2] == prompt(hi, context(CITIES["Bern"], long + " bern")) and alone < len(prompts[2]) <= 160 - 9
    assert 160 - 9 < len(prompt(hi, context(CITIES["Bern"], longer + " bern"))) <= 160  # no room for the answer
    assert prompts[3] == prompt(hi, ("user", longer + " bern")) and "[no passage" in err
    _, err, prompts = talk(capsys, monkeypatch, hi, ["bern"], *options, "12")
    assert prompts == [prompt(hi, ("user", "bern"))] and "[no passage" in err
    with pytest.raises(UserError, match="--passages 2: needs --retrieve INDEX"):
        talk(capsys, monkeypatch, hi, [], "--passages", "2")


# -- questions ------------------------------------------------------------------------------------------------------------


def test_measures_by_hand():
    assert questions.normalised("The U.S.-based  cat, an 'A'!") == ["usbased", "cat"]
    compared = questions.compared
    assert compared("the Cat.", ["dog", "a cat"]) == (1, 1)
    # 2 words of 3 and 2 of 4 in common: precision 2/3, recall 1/2, F1 4/7
    assert compared("black cat sat", ["a black cat ran far"]) == (0, pytest.approx(4 / 7))
    assert compared("cat cat", ["cat cat sat"]) == (0, pytest.approx(4 / 5))  # a word counts as often as both have it
    assert compared("", ["cat"]) == (0, 0) and compared("the", ["a"]) == (1, 1)
    passage = [retrieval.Passage("It is the Black, cat.", "x")]
    assert questions.held(passage, ["dog", "black cat"]) == 1 and questions.held(passage, ["lack cat"]) == 0
    answers = [questions.Answered("", em, f1, None, []) for em, f1 in ((1, 1), (0, 0.5), (0, 0), (1, 0.5))]
    scores = questions.summary(answers)
    assert scores.keys() == {"exact_match", "f1"}
    assert scores["exact_match"] == {"value": 0.5, "stderr": pytest.approx(math.sqrt(1 / 3) / 2)}
    assert scores["f1"] == {"value": 0.5, "stderr": pytest.approx(math.sqrt(1 / 6) / 2)}
    assert questions.summary(answers[:1])["f1"] == {"value": 1, "stderr": None}


ROWS = [
    {"question": "rome?", "answer": ["bye", "Hi!"]},
    {"question": "oslo?", "answers": {"text": ["hi there"], "answer_start": [0]}},
    {"prompt": "bern?", "completion": "bern is old"},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"},
                  {"role": "assistant", "content": "hi"}]},
]  # fmt: skip


def test_evaluate_asks_with_and_without_passages(hi, index, tmp_path, capsys, monkeypatch):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    asked, encode = [], questions._encoded
    monkeypatch.setattr(questions, "_encoded", lambda *args: asked.append(encode(*args)) or asked[-1])
    line = [
        "--checkpoint",
        str(hi),
        "--questions",
        str(tmp_path / "q.jsonl"),
        "--retrieve",
        str(index),
        "--retrieve-tokens",
        "80",
    ]
    assert evaluate.main([*line, "--output", str(tmp_path / "out.json")]) == 0
    out, record = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    f1 = (1 + 2 / 3 + 0 + 1) / 4
    for column in record["questions"]["scores"].values():
        assert column["exact_match"]["value"] == 0.5 and column["f1"]["value"] == pytest.approx(f1)
    assert record["questions"]["scores"][" with passages"]["in_passages"]["value"] == 0.25  # "bern is old"
    assert [" ".join(row.split()) for row in out.splitlines()[-4:]] == [
        "without passages with passages",
        "exact match, % 50.0 +- 28.9 50.0 +- 28.9",
        "F1, % 66.7 +- 23.6 66.7 +- 23.6",
        "a right answer is in the passages, % - 25.0 +- 25.0",
    ]
    used = record["questions"]["retrieve"]
    assert (used["passages"], used["tokens"], len(used["sha256"])) == (3, 80, 64)
    assert record["results"]["q.jsonl with passages"]["f1"] == pytest.approx(f1)
    assert (
        prompt(hi, ("user", "rome?")) in asked
        and prompt(hi, *((m["role"], m["content"]) for m in ROWS[3]["messages"][:3])) in asked
    )
    assert prompt(hi, ("user", f"Context:\n[1] {CITIES['Rome']}\n\nQuestion: rome?")) in asked


def test_without_a_template_questions_are_plain_text(hi, index):
    loaded = weights.load(hi)
    rows = [questions.Row("a", ([{"role": "user", "content": "rome?"}], ["hi"]))]
    (passage,) = retrieval.Index(index).search("rome")
    text = tokenizer_lib.load(hi / "tokenizer").decode(questions._encoded(loaded, None, rows[0].messages[0], [passage]))
    assert text == f"Context:\n[1] {CITIES['Rome']}\n\nQuestion: rome?\nAnswer:"
    (answer,) = questions.answered(loaded, rows, None)
    assert answer.text == "a" * 40 and answer.passages == []  # after ":" this model writes "a" for ever: a quarter of 160
    rows = [questions.Row("f.jsonl, line 7", ([{"role": "user", "content": "x" * 130}], ["hi"]))]
    with pytest.raises(UserError, match="f.jsonl, line 7: the question has .* tokens, and there is room for 120; shorten it"):
        questions.answered(loaded, rows, None)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "--questions .*q.jsonl: is empty"),
        ('{"question": "a"}\n', "q.jsonl, line 1: has 'question', and fits no known shape"),
        ('{"question": "a", "answer": "b"}\n{"question": "a", "answer": [1]}\n', "line 2: 'answer' is not a text, but 1"),
        ('{"question": "a", "answer": []}\n', "line 1: has an empty list of answers"),
        ('{"question": "a", "answer": " "}\n', "line 1: has an empty answer"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "line 1: must end with a question and its answer"),
    ],
)
def test_a_wrong_question_is_named(content, error, tmp_path):
    (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(UserError, match=error):
        questions.read(tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--questions", "nowhere"], "--questions nowhere: no such file"),
        (["--data-set", "x", "--retrieve", "y"], "--retrieve y: needs --tasks or --questions"),
        (["--tasks", "piqa", "--retrieve", "nowhere"], "--retrieve nowhere: is no index"),
        (["--tasks", "piqa", "--retrieve-tokens", "9"], "--retrieve-tokens 9: needs --retrieve INDEX"),
    ],
)
def test_wrong_options_are_named(more, error):
    with pytest.raises(UserError, match=error):
        evaluate.main(["--checkpoint", "never read", *more])


# -- tasks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # lm-eval and its libraries warn
@pytest.mark.xdist_group("harness")
def test_a_task_has_passages_before_its_contexts(hi, index, monkeypatch):
    pytest.importorskip("lm_eval", reason="of the extra dev")
    from lm_eval.api.instance import Instance

    from tinyllama_jax.evals import harness

    seen = []
    model = harness.HarnessModel(weights.load(hi), False, quiet=True, index=retrieval.Index(index, 1, 1_000))
    score = model._loglikelihood_tokens
    monkeypatch.setattr(model, "_loglikelihood_tokens", lambda asked, **more: seen.extend(asked) or score(asked, **more))
    ask = lambda context, *follows: [Instance("loglikelihood", {}, (context, text), 0) for text in follows]
    long = "bern " + "c" * 90
    requests = [
        *ask("rome?", " hot"),
        *ask("what?", " it"),
        *ask("", "x"),
        *ask(long, " a", " b" * 30),
        *ask("oslo " * 31, " c"),
    ]
    assert len(model.loglikelihood(requests, disable_tqdm=True)) == 6
    before = f"Context:\n[1] {CITIES['Rome']}\n\n"
    assert seen[0][0] == (before + "rome?", " hot") and seen[0][1] == model.tok_encode(before + "rome?")
    assert [pair[0] for pair, *_ in seen[1:3]] == ["what?", ""]
    # both answers to one context come after the same passage, which the longer one leaves no room for
    assert [pair[0] for pair, *_ in seen[3:]] == [long, long, "oslo " * 31]
    assert requests[0].args == ("rome?", " hot")  # what the harness hashes and reports stays as it was
    prompts, check = [], harness.Request
    monkeypatch.setattr(harness, "Request", lambda ids, *more: prompts.append(ids) or check(ids, *more))
    model.generate_until([Instance("generate_until", {}, ("rome?", {"max_gen_toks": 4, "until": []}), 0)], disable_tqdm=True)
    assert prompts == [model.tok_encode(before + "rome?")]
    scored = {"tasks": {"piqa": {"metrics": {"acc": {"value": 1.0, "stderr": None}}}}}
    assert evaluate._results(scored | {"retrieve": {}}).keys() == {"piqa with passages"}  # a report draws them apart
    assert evaluate._results(scored).keys() == {"piqa"}
    (whole,) = [type("Task", (), {"task_name": "wikitext", "OUTPUT_TYPE": "loglikelihood_rolling"})]
    with pytest.raises(UserError, match="--retrieve: wikitext scores whole texts, which have no context"):
        harness.run(model, [whole], None)
