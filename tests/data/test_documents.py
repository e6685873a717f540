"""However files are cut into pieces, each document is read once and whole; what cannot be read is named, with its line."""

import gzip
import json
import os
import random
import tracemalloc
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data.prepare import documents, inputs


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
    kinds = [pyarrow.string_view(), pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view(), pyarrow.json_()]
    for i, kind in enumerate(kinds):
        parquet(tmp_path / f"{i}.parquet", pyarrow.array(texts, pyarrow.string()).cast(kind))
        assert read(tmp_path / f"{i}.parquet")[0] == texts, kind
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
    os.mkfifo(tmp_path / "here/b/pipe")  # nobody will ever write to it
    sources, others = inputs.find([tmp_path / "here"], "--train")
    assert [s.name for s in sources] == ["a.jsonl", "b/10.txt", "b/2.txt", "b/c/x.parquet"]
    assert others == [str(tmp_path / "here/b" / name) for name in ("pipe", "readme.md")]
    deep = tmp_path / "there/deep"
    again, _ = inputs.find([deep / "b", deep / "a.jsonl"], "--train")
    assert [s.name for s in again] == [s.name for s in sources]
    (tmp_path / "links").mkdir()
    (tmp_path / "links/link").symlink_to(deep)
    linked, _ = inputs.find([tmp_path / "links"], "--train")
    assert [s.name for s in linked] == [s.name for s in sources]


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("in", ["a.txt", "caf\\xe9.txt", "x/b.txt", "x/deep/c.txt", "y/d.txt"]),
        ("in/**", ["a.txt", "caf\\xe9.txt", "x/b.txt", "x/deep/c.txt", "y/d.txt"]),
        ("**/?.txt", ["a.txt", "x/b.txt", "x/deep/c.txt", "y/d.txt"]),
        ("./in/**/deep/*", ["c.txt"]),
        ("in/x**/**.txt", ["b.txt"]),
        ("in/**/deep", ["c.txt"]),
        ("in/*/*.txt", ["x/b.txt", "y/d.txt"]),
    ],
)
def test_circular_links(tmp_path, monkeypatch, path, names):
    monkeypatch.chdir(tmp_path)
    for name in (b"in/a.txt", b"in/caf\xe9.txt", b"in/x/b.txt", b"in/x/deep/c.txt", b"in/y/d.txt"):
        os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(name, "wb") as file:
            file.write(b"x")
    for link, to in {"in/up": "..", "in/x/up": "..", "in/y/up": "..", "in/y/same": "../y", "in/x/deep/up": "../.."}.items():
        os.symlink(to, link)
    os.mkfifo("in/y/pipe")
    sources, _ = inputs.find([path], "--train")
    assert [source.name for source in sources] == names
    for source in sources:
        with source.open() as file:
            assert file.read() == b"x"


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    for path in (tmp_path / "a.txt", "/dev/null"):
        with pytest.raises(UserError, match=f"--train {path}: is not a regular file; read a pipe into one first"):
            inputs.find([path], "--train")
    (tmp_path / "b.txt").write_bytes(b"x")
    (source,), _ = inputs.find([tmp_path / "b.txt"], "--train")
    (tmp_path / "b.txt").unlink()
    os.mkfifo(tmp_path / "b.txt")
    with pytest.raises(UserError, match="b.txt: is not a regular file"):
        source.open()


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
LONG = b'{"x": "' + b"y" * (1 << 19) + b'", "text": %s}'
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
        ("a.jsonl", b'{\n  "text": "x"\n}\n', "line 1: is not JSON: .*write one object a line"),
        ("a.jsonl", GOOD + b'{"text": %s}' % (b"9" * 9_999), "line 2: is not JSON with a text at 'text': Number out"),
        ("a.jsonl", GOOD + b" " * (1 << 20) + b"x", "line 2: is longer than 1,048,576 bytes: cut it into several documents"),
        ("a.jsonl.gz", gzip.compress(GOOD + b"{" * (1 << 21)), "line 2: is longer than 1,048,576 bytes"),
        ("a.jsonl", GOOD + LONG % b'["x"]', "line 2: is not JSON with a text at 'text': Expected `str | null`, got `array`"),
        ("a.jsonl", GOOD + LONG[:-1] % b'"x"', "line 2: is not JSON with a text at 'text': "),
        ("a.jsonl", GOOD + b'{"body": "%s"}' % (b"x" * (1 << 19)), "line 2: has no key 'text'"),
        ("a.jsonl", b'{"text":%s1%s}' % (b"[" * (1 << 18), b"]" * (1 << 18)), "line 1: is not JSON with a text at"),
        ("a.jsonl.zst", ZSTD[:-9], "line [0-9]{6}: Truncated compressed stream"),
        ("a.jsonl.gz", gzip.compress(GOOD * 9)[:-9], "line 1: Truncated compressed stream"),
        ("a.jsonl.zst", b"", "is empty, and so is not a whole zstd file"),
        ("a.jsonl.gz", b"", "is empty, and so is not a whole gzip file"),
        ("a.jsonl.zst", GOOD, "line 1: ZSTD decompress failed"),
        ("a.jsonl.gz", GOOD, "line 1: "),
        ("a.txt", b"\xef\xbb\xbfone\ntwo\nthr\xffee", "line 3: is not UTF-8 .byte 0xff"),
        ("a.txt", b"one\n" * 300_000 + b"\xf0\x9f", "line 300001: is not UTF-8 .byte 0xf0"),
        ("a.parquet", b"PAR1 not really PAR1", "is not a whole parquet file"),
        ("a.parquet", b"", "is not a whole parquet file"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value.split(":")[0],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, monkeypatch, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    monkeypatch.setattr(documents, "LONGEST", 1 << 20)
    monkeypatch.setattr(documents, "ANY_JSON", 1 << 18)
    for target in (1 << 40, 10):
        with pytest.raises(UserError, match=f"{path}(, |: ){says}") as error:
            read(path, target)
        assert "\n" not in str(error.value)


def test_a_number_of_any_length_beside_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a", "n": %s}' % (b"9" * 9_999))
    assert read(tmp_path / "a.jsonl", 10)[0] == ["a"]


def test_damage_that_a_library_tells_in_two_lines_is_one(tmp_path):
    table = pyarrow.table({"text": [f"hello {i}" for i in range(300)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[start : start + 8] = bytes(range(0xF8, 0x100))
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match="is not a whole parquet file: Couldn't deserialize thrift") as error:
        read(tmp_path / "a.parquet", 10)
    assert "\n" not in str(error.value)


def test_of_a_long_line_only_the_text_becomes_an_object(tmp_path, monkeypatch):
    """Empty lists take twenty times the memory of their JSON."""
    monkeypatch.setattr(documents, "ANY_JSON", 1 << 10)
    lists = b",".join([b"[]"] * 300_000)
    rows = (b'{"lists": [%s], "meta": {"of": "web"}, "text": "a%s"}\n' % (lists, b"\\n"),)
    rows += (b'{"meta": {"of": "code"}, "lists": [%s], "text": "b"}\n' % lists, b'{"lists": [%s], "text": null}\n' % lists)
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows))
    (source,), _ = inputs.find([tmp_path / "a.jsonl"], "--train")
    (piece,) = documents.pieces(source, documents.units(source, "text"), 1 << 40)
    with pytest.raises(UserError, match="line 3: has no meta.of"):
        list(documents.read(piece, "text", {"meta.of": "code"}, Counter()))
    tracemalloc.start()
    dropped = Counter()
    assert ["".join(parts) for parts in documents.read(piece, "text", {}, dropped)] == ["a\n", "b"]
    assert tracemalloc.get_traced_memory()[1] < 8 << 20 and dropped == {"text=null": 1}
    tracemalloc.stop()


@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_BYTE_ARRAY", "RLE_DICTIONARY"])
def test_one_text_of_many_is_held_at_a_time(tmp_path, monkeypatch, encoding):
    """A small file of 200 rows of 2 MB; 64 of them would be 128 MB."""
    text = "x" * (2 << 20)
    how = {} if encoding == "RLE_DICTIONARY" else {"use_dictionary": False, "column_encoding": {"text": encoding}}
    table = pyarrow.table({"text": pyarrow.array([text]).dictionary_encode().take(pyarrow.array([0] * 200)).cast("string")})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", write_batch_size=4, **how)
    del table
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    (source,), _ = inputs.find([tmp_path / "a.parquet"], "--train")
    (piece,) = documents.pieces(source, documents.units(source, "text"), 1 << 40)
    before = pyarrow.total_allocated_bytes()
    pool, n, most = pyarrow.default_memory_pool(), 0, 0
    for parts in documents.read(piece, "text", {}, Counter()):
        n, most = n + (parts == (text,)), max(most, pool.bytes_allocated() - before)
    assert n == 200 and most < 48 << 20
    monkeypatch.setattr(documents, "LONGEST", 1 << 20)
    with pytest.raises(UserError, match="a.parquet, row 1: 'text' is longer than 1,048,576 bytes: cut it into several"):
        list(documents.read(piece, "text", {}, Counter()))


def test_a_window_that_takes_too_much_memory_says_what_to_do(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    # a frame whose header asks for a window of 2 GiB (RFC 8878, 3.1.1.1), and one raw block
    path.write_bytes(bytes.fromhex("28b52ffd 00 a8") + (1 | len(GOOD) << 3).to_bytes(3, "little") + GOOD)
    with pytest.raises(UserError, match="a.jsonl.zst, line 1: was compressed with a window of .* with `zstd -d --long=31`: "):
        read(path)


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
    parquet(path, [{"text": "x"}])
    with pytest.raises(UserError, match="column 'text' holds struct<text: string>, not text"):
        read(path)
    parquet(path, ["x"])
    pyarrow.parquet.write_table(pyarrow.table([["x"], ["y"]], names=["text", "text"]), path)
    with pytest.raises(UserError, match="has 2 columns 'text'; it has text, text: rename one"):
        read(path)
    dropped = Counter()
    parquet(path, pyarrow.nulls(3))
    assert read(path, dropped=dropped)[0] == [] and dropped == {"text=null": 3}
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
