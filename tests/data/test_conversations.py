"""Conversations from every shape of row and kind of file; rows and folders that are none, named in one line."""

import gzip
import json
import random
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import conversations

TALK = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
SYSTEM = [{"role": "system", "content": "S"}]
TWO = [*TALK, {"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}]
SHAPES = {
    "messages": ({"messages": SYSTEM + TALK, "prompt": "not this", "prompt_id": 1}, SYSTEM + TALK),
    "messages with parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, TALK[1]]}, TALK),
    "ShareGPT": ({"id": 1, "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, TALK),
    "ShareGPT with a system message": (
        {"conversations": [{"from": f, "value": v} for f, v in (("system", "S"), ("user", "Q"), ("assistant", "A"))]},
        SYSTEM + TALK,
    ),
    "ShareGPT by column": ({"conversations": {"from": ["human", "gpt"], "value": ["Q", "A"]}}, TALK),
    "ShareGPT, in capitals": ({"conversations": [{"from": "Human", "value": "Q"}, {"from": "GPT", "value": "A"}]}, TALK),
    "conversation, role and content": ({"conversation": TALK}, TALK),
    "guanaco": ({"text": "### Human: Q### Assistant: A### Human: Q2### Assistant: A2"}, TWO),
    "guanaco on lines": ({"text": "S\n### Human: Q\n### Assistant: A\n"}, SYSTEM + TALK),
    "oasst_top1": (
        {"text": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n"
                 "<|im_start|>assistant\nA2<|im_end|>"},
        TWO,
    ),
    "Alpaca": ({"instruction": "Q", "input": "", "output": "A"}, TALK),
    "Alpaca with an input": ({"instruction": "Q", "input": "I", "output": "A", "text": "Below is"},
                             [{"role": "user", "content": "Q\n\nI"}, TALK[1]]),
    "Alpaca with a system message": ({"system": "S", "instruction": "Q", "output": "A"}, SYSTEM + TALK),
    "Dolly": ({"instruction": "Q", "context": "I", "response": "A"}, [{"role": "user", "content": "Q\n\nI"}, TALK[1]]),
    "prompt and completion": ({"prompt": "Q", "completion": "A"}, TALK),
    "lists of messages": ({"prompt": SYSTEM + TALK[:1], "completion": TALK[1:]}, SYSTEM + TALK),
    "question and answer": ({"question": "Q", "answer": "A"}, TALK),
    "the original's": ({"input": "Q", "output": "A"}, TALK),
    "null columns": ({"messages": None, "prompt": "Q", "completion": "A", "text": None}, TALK),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_of_row(name, tmp_path):
    row, want = SHAPES[name]
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (read,) = conversations.read([tmp_path / "a.jsonl"])
    assert read == (f"{tmp_path / 'a.jsonl'}, line 1", want)


ROWS = [{"prompt": f"Q{i}", "completion": "é"} for i in range(600)]


def write_dataset(folder, rows):
    """As `datasets` saves one."""
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    file = str(folder / "data-00000-of-00001.arrow")
    with pyarrow.OSFile(file, "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("state.json", "dataset_info.json"):
        (folder / name).write_text("{}")


def write_all(folder):
    lines = "".join(json.dumps(row) + "\n\n" for row in ROWS).encode()
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    with pyarrow.CompressedOutputStream(str(folder / "a.jsonl.zst"), "zstd") as f:
        f.write(lines)
    (folder / "lines.json").write_bytes(lines)
    (folder / "list.json").write_text(json.dumps(ROWS, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "a.parquet", row_group_size=100)
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(folder / "a.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    write_dataset(folder / "saved", ROWS)


def test_each_kind_of_file(tmp_path):
    write_all(tmp_path)
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "lines.json", "list.json", "a.parquet", "a.arrow", "saved"):
        read = list(conversations.read(conversations.files_of(str(tmp_path / name))))
        want = [[{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": "é"}] for i in range(600)]
        assert [row.messages for row in read] == want, name
        unit = "line" if name.startswith(("a.jsonl", "lines")) else "row"
        assert read[-1].where.endswith(f"{unit} {1_199 if unit == 'line' else 600}"), name


def test_folders_and_patterns(tmp_path):
    for name in ("b.jsonl", "a.parquet", "notes.txt", ".hidden.jsonl", "more/c.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = lambda source: [str(file.relative_to(tmp_path)) for file in conversations.files_of(str(source))]
    assert names(tmp_path) == ["a.parquet", "b.jsonl", "more/c.json"]
    assert names(tmp_path / "*.jsonl") == ["b.jsonl"]


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"], "train*"),
        (["data/train_sft-00000-of-00001-ab.parquet", "data/test_sft-00000-of-00001-cd.parquet"], "data/train_sft*"),
        (["train.jsonl", "validation.jsonl"], "train*"),
        (["train", "test"], "train"),
    ],
)
def test_a_test_set_is_not_trained_on_by_mistake(files, advice, tmp_path):
    for name in files:
        if "." in name:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        else:
            write_dataset(tmp_path / name, ROWS[:2])
    with pytest.raises(UserError, match="holds several splits") as raised:
        conversations.files_of(str(tmp_path))
    assert str(raised.value).endswith(f"name one, such as {tmp_path / advice}")
    assert len(conversations.files_of(str(tmp_path / advice))) == sum(name.startswith(advice.rstrip("*")) for name in files)


BAD = {
    '{"query": "Q", "reply": "A"}': "line 2: has 'query', 'reply', and fits no known shape (messages; conversations; ",
    '{"messages": "hello"}': "line 2: 'messages' is a text, and must be a list of turns",
    '{"messages": {"role": ["user"], "content": []}}': "line 2: messages[0] needs role and content",
    '{"messages": []}': "line 2: 'messages' is an empty list",
    '{"messages": [{"role": "user"}]}': "line 2: messages[0] needs role and content",
    '{"messages": [{"role": "user", "content": null}]}': "line 2: messages[0] needs role and content",
    '{"messages": [{"role": "user", "content": 3}]}': "line 2: 'messages[0].content' is not a text, but 3",
    '{"conversations": [{"from": "narrator", "value": "x"}]}': 'line 2: conversations[0].from is "narrator"; known are human, ',
    '{"conversations": [{"from": "gpt", "value": "x"}, {"from": "usr", "value": "x"}]}': '[1].from is "usr"; known are ',
    '{"messages": [{"role": "assistent", "content": "x"}]}': 'line 2: messages[0].role is "assistent"; known are human, user, ',
    '{"messages": [{"role": ["user"], "content": "x"}]}': "line 2: 'messages[0].role' is not a text",
    '{"messages": [{"role": "assistant", "content": null, "tool_calls": [{}]}]}': "line 2: messages[0] is of a tool call, ",
    '{"messages": [{"role": "assistant", "content": "x", "function_call": {"a": 1}}]}': "messages[0] is of a tool call",
    '{"messages": [{"role": "tool", "content": "x"}]}': "leave the row out, or write the call as text",
    '{"conversations": [{"from": "observation", "value": "x"}]}': "line 2: conversations[0] is of a tool call",
    '{"data": [{"prompt": "Q"}]}': "line 2: is one object with the list 'data'; write this list alone, as jq '.data' FILE does",
    '{"dialog": [{"speaker": "a", "line": "x"}]}': "line 2: has 'dialog', and fits no known shape",
    '{"data": [': "one object a line, or one list alone in a .json file",
    '{"prompt": "Q", "completion": ["A"]}': "line 2: 'prompt' is a text, and must be a list of turns",
    '{"text": "Once upon a time"}': "line 2: 'text' has no turns: none of '### Human:', ",
    '{"prompt": "\\ud800", "completion": "x"}': "line 2: 'prompt' holds half of a surrogate pair at 0",
    "[1]": "line 2: is no object with keys, but [1]",
    "{": "line 2: is not JSON: Expecting property name enclosed in double quotes",
    "{}": "line 2: has no keys, and fits no known shape",
    b"\xff{}": "line 2: is not UTF-8 (byte 0xff at 0); convert the file, for example with `iconv -f latin1 -t utf-8`",
    "[" * 100_000: "line 2: is not JSON: is nested too deeply",
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: str(line)[:40])
def test_a_row_that_fits_none_is_named(line, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"prompt": "Q", "completion": "A"}\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(UserError) as raised:
        list(conversations.read([file]))
    message = str(raised.value)
    assert BAD[line] in message and message.startswith(f"{file}, ") and "\n" not in message


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_a_file_cut_short_is_named(name, tmp_path):
    write_all(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / name}, after")) as raised:
        list(conversations.read([tmp_path / name]))
    assert "\n" not in str(raised.value)


def test_sources_that_are_none(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    for name, words in {
        "absent": "no such file or folder; name a file, a folder or a pattern",
        "notes.txt": "is no .jsonl, .ndjson, .json, .parquet, .arrow file",
        "empty": "holds no .jsonl",
        "run": "is the folder of a run or a model; name conversations",
    }.items():
        with pytest.raises(UserError, match=re.escape(f"--data.sources={tmp_path / name}: {words}")):
            conversations.files_of(str(tmp_path / name))
    with pytest.raises(UserError, match="is a URL"):
        conversations.files_of("https://huggingface.co/datasets/x")


def test_a_damaged_file_is_named_and_never_ends_the_process(tmp_path):
    write_all(tmp_path)
    rng = random.Random(1)
    for name in ("a.arrow", "saved/data-00000-of-00001.arrow", "a.parquet", "a.jsonl.gz", "list.json") * 40:
        data = bytearray((tmp_path / name).read_bytes())
        for _ in range(rng.choice((1, 3))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        file = tmp_path / f"damaged-{Path(name).name}"
        file.write_bytes(data)
        try:
            list(conversations.read([file]))  # some damage is within a text
        except UserError as error:
            assert str(error).startswith(str(file)) and "\n" not in str(error)
