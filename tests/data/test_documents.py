"""However files are cut into pieces, each document is read once and whole; what cannot be read is named, with its line."""

import gzip
import json
import os
import random
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from tinyllama_jax.data import documents, inputs
from tinyllama_jax.errors import UserError


def jsonl(texts, key="text"):
    return "".join(json.dumps({"id": i, key: t}, ensure_ascii=i % 2 == 0) + "\n" for i, t in enumerate(texts)).encode()


def compressed(data: bytes, kind: str) -> bytes:
    return pyarrow.compress(data, codec=kind, asbytes=True)


def parquet(path, texts, rows=7, **columns):
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts, **columns})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)


def read(path, target=1 << 40, key="text", dropped=None):
    """All documents of all pieces."""
    (source,), _ = inputs.find([path], "--train")
    pieces = documents.pieces(source, documents.units(source, key), target)
    return [
        "".join(parts)
        for piece in pieces
        for parts in documents.read(piece, key, {}, Counter() if dropped is None else dropped)
    ], pieces


def test_every_type_gives_the_same_documents(tmp_path, texts):
    data = jsonl(texts)
    for name, content in {
        "a.jsonl": data,
        "a.json": data,
        "b.jsonl.zst": compressed(data, "zstd"),
        "two frames.json.zst": compressed(data[:5_000], "zstd") + compressed(data[5_000:], "zstd"),
        "c.jsonl.gz": gzip.compress(data[:5_000]) + gzip.compress(data[5_000:]),
        "D.JSONL.GZ": gzip.compress(b"\xef\xbb\xbf" + data),  # with a byte order mark
    }.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name)[0] == texts, name
    parquet(tmp_path / "e.parquet", texts)
    parquet(tmp_path / "f.parquet", pyarrow.array(texts, pyarrow.large_string()))
    parquet(tmp_path / "g.parquet", pyarrow.array(texts).dictionary_encode())
    for name in "efg":
        assert read(tmp_path / f"{name}.parquet")[0] == texts, name
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
        assert read(tmp_path / f"{i}.txt")[0] == [text.removeprefix("\ufeff")]  # at the start of a file it is a byte order mark


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_lines_are_read_once_wherever_the_file_is_cut(tmp_path, monkeypatch, end):
    monkeypatch.setattr(documents, "READ", 50)  # bytes of a line at once
    rng = random.Random(end)
    lines = [json.dumps({"text": "x" * rng.choice([0, 1, 30, 400])}) for _ in range(60)]
    lines = [line + "\n" * rng.choice([1, 1, 1, 3]) for line in lines[:-1]] + [lines[-1] + end]
    path = tmp_path / "a.jsonl"
    path.write_bytes("".join(lines).encode())
    whole = [json.loads(line)["text"] for line in lines]
    for target in [*range(1, 60), 100, 1_000, 10_000]:
        found, pieces = read(path, target)
        assert found == whole
        assert len(pieces) == max(1, -(-path.stat().st_size // target))


def test_row_groups_are_read_once_however_they_are_grouped(tmp_path):
    texts = [str(i) * (i % 90) for i in range(300)]
    parquet(tmp_path / "a.parquet", texts, other=[f"{i:05000}" for i in range(300)])
    for target in (1, 50, 500, 2_000, 50_000):
        found, pieces = read(tmp_path / "a.parquet", target)
        assert found == texts
        assert [p.start for p in pieces] == [0, *(p.end for p in pieces[:-1])] and pieces[-1].end == -(-300 // 7)
    assert len(read(tmp_path / "a.parquet", 1)[1]) == -(-300 // 7)
    assert len(read(tmp_path / "a.parquet", 50_000)[1]) == 1  # the other column is not counted
    pyarrow.parquet.ParquetWriter(tmp_path / "b.parquet", pyarrow.schema([("text", pyarrow.string())])).close()
    found, pieces = read(tmp_path / "b.parquet")
    assert found == [] and len(pieces) == 1  # somebody has to compute its checksum


def test_spans_weigh_about_the_target():
    rng = random.Random(0)
    for _ in range(50):
        weights = [rng.randrange(100) for _ in range(rng.randrange(1, 200))]
        spans = documents.spans(weights, 300)
        assert [s for s, _ in spans] == [0, *(e for _, e in spans[:-1])] and spans[-1][1] == len(weights)
        assert max(sum(weights[slice(*span)]) for span in spans) <= 300 * 1.5 + 100
        assert len(spans) <= max(1, round(sum(weights) / 300))
    assert documents.spans([0, 0], 10) == [(0, 2)] and documents.spans([5, 1_000, 5], 10) == [(0, 1), (1, 2), (2, 3)]


def test_folders_are_searched_and_sorted_and_names_do_not_depend_on_the_place(tmp_path):
    for place in ("here", "there/deep"):
        for name in ("b/2.txt", "b/10.txt", "a.jsonl", "b/c/x.parquet", ".git/x.txt", "b/.hidden.txt", "b/readme.md"):
            (tmp_path / place / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place / name).write_bytes(b"")
    os.mkfifo(tmp_path / "here/b/pipe.jsonl")  # nobody will ever write to it
    sources, others = inputs.find([tmp_path / "here"], "--train")
    assert [s.name for s in sources] == ["a.jsonl", "b/10.txt", "b/2.txt", "b/c/x.parquet"]
    assert others == [str(tmp_path / "here/b/readme.md")]
    deep = tmp_path / "there/deep"
    again, _ = inputs.find([deep / "b", deep / "a.jsonl"], "--train")
    assert [s.name for s in again] == [s.name for s in sources]
    (tmp_path / "links").mkdir()
    (tmp_path / "links/link").symlink_to(deep)
    linked, _ = inputs.find([tmp_path / "links"], "--train")
    assert [s.name for s in linked] == [s.name for s in sources]


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        (["gone.txt"], "--train .*gone.txt: no such file or folder"),
        (["empty"], "empty: there is no file of a known type"),
        (["a.csv"], r"a.csv: is of no known type; known are .txt .jsonl"),
        (["a.txt", "a.txt"], "a.txt is given 2 times"),
        ([".", "a.txt"], "a.txt is given 2 times"),
    ],
)
def test_paths_that_cannot_be(tmp_path, monkeypatch, paths, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("a.csv", "a.txt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=says):
        inputs.find(paths, "--train")


GOOD = b'{"text": "good"}\n'
LATIN = '{"text": "é"}'.encode("latin-1")
ZSTD = compressed(b"".join(b'{"text": "%d"}\n' % i for i in range(200_000)), "zstd")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", GOOD * 2 + b'{"text": "x"\n' + GOOD, "line 3: is not JSON: "),
        (
            "a.jsonl",
            GOOD + b"\n\n" + b'{"body": "x", "n": 1}\n',
            "line 4: has no key 'text'; it has 'body', 'n': choose one with --text-key",
        ),
        ("a.jsonl", GOOD + b'{"text": 7}', "line 2: 'text' is not a text, but 7"),
        ("a.jsonl", GOOD + b'{"text": ["%s"]}' % (b"x" * 99), r"line 2: 'text' is not a text, but \[\"x+\.\.\."),
        ("a.json", b'[{"text": "x"}]', "line 1: is not an object with the key 'text', but "),
        ("a.jsonl", GOOD + LATIN, "line 2: is not UTF-8 .byte 0xe9 at 10"),
        ("a.jsonl", GOOD + rb'{"text": "ab\ud800"}', "line 2: 'text' holds half of a surrogate pair at 2"),
        ("a.jsonl", GOOD + b"[" * 100_000, "line 2: is not JSON: "),
        ("a.jsonl.zst", ZSTD[:-9], "line [0-9]{6}: Truncated compressed stream"),
        ("a.jsonl.gz", gzip.compress(GOOD * 9)[:-9], "line 1: Truncated compressed stream"),
        ("a.jsonl.zst", b"", "is empty, which no whole zstd file is"),
        ("a.jsonl.gz", b"", "is empty, which no whole gzip file is"),
        ("a.jsonl.zst", GOOD, "line 1: ZSTD decompress failed"),
        ("a.jsonl.gz", GOOD, "line 1: "),
        ("a.txt", b"\xef\xbb\xbfone\ntwo\nthr\xffee", "line 3: is not UTF-8 .byte 0xff"),
        ("a.txt", b"one\n" * 300_000 + b"\xf0\x9f", "line 300001: is not UTF-8 .byte 0xf0"),
        ("a.parquet", b"PAR1 not really PAR1", "is not a whole parquet file"),
        ("a.parquet", b"", "is not a whole parquet file"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value.split(":")[0],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    for target in (1 << 40, 10):
        with pytest.raises(UserError, match=f"{path}(, |: ){says}") as error:
            read(path, target)
        assert "\n" not in str(error.value)


def test_a_null_for_a_text_is_left_out_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b'{"text": null}\n' + GOOD)
    parquet(tmp_path / "a.parquet", ["x", None, "y"] + [None] * 70)
    for name, n in ("a.jsonl", 1), ("a.parquet", 71):
        dropped = Counter()
        assert len(read(tmp_path / name, 1, dropped=dropped)[0]) == 2
        assert dropped == {"text=null": n}


def test_parquet_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.parquet"
    parquet(path, ["x"])
    with pytest.raises(UserError, match="has no column 'body'; it has id, text: choose one with --text-key"):
        read(path, key="body")
    with pytest.raises(UserError, match="column 'id' holds int64, not text"):
        read(path, key="id")
    binary = pyarrow.array([b"ok", b"\xe9"], pyarrow.binary())
    parquet(path, pyarrow.StringArray.from_buffers(2, binary.buffers()[1], binary.buffers()[2]))
    with pytest.raises(UserError, match=f"{path}, row 2: 'text' is not UTF-8"):
        read(path)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 99] * 9}), path, compression="none", write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[data.index(b"xx") + 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path}, row [0-9]+: what follows is damaged: "):
        read(path)
