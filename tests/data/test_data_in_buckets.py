"""A data set in a bucket gives the batches of the same one on a disk; what is not whole is never used."""

import concurrent.futures
import dataclasses
import fcntl
import itertools
import json
import os
import pickle
import re
import shutil
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pytest
from stand_ins import free_port

from tinyllama_jax import evaluate, train
from tinyllama_jax.base import cli, store
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.store import Remote
from tinyllama_jax.data import bucket, feed, riegeli
from tinyllama_jax.data.audit.report import audit
from tinyllama_jax.data.blocks import Blocks, Damaged
from tinyllama_jax.data.export import litpkds as export_litpkds
from tinyllama_jax.data.litpkds import Packed
from tinyllama_jax.data.prepare import pipeline
from tinyllama_jax.run import folder as run_folder

S = 16


@pytest.fixture(scope="module")
def local(tmp_path_factory, texts, model) -> Path:
    """prepared/: a data set of several shards, with a validation split. packed/train_x_*.bin: the same as LITPKDS."""
    folder = tmp_path_factory.mktemp("local")
    for name, documents in {"train": texts, "validation": texts[:3]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "SHARD", (1 << 15, 1 << 30))
        files = {name: [folder / f"{name}.jsonl"] for name in ("train", "validation")}
        pipeline.prepare(**files, tokenizer=model, output=folder / "prepared", seq_len=S, workers=1)
    export_litpkds.export(folder / "prepared", "train", folder / "packed", "train_x", chunk=1_000 * (S + 1) + 5)
    return folder


@pytest.fixture(scope="module")
def uploaded(local, stores) -> Path:
    """`local`, which is also in the bucket of each store."""
    for scheme in ("s3", "gs"):
        for name in ("prepared", "packed"):
            fsspec.filesystem(scheme).put(f"{local / name}/", f"bucket/sets/{name}/", recursive=True)
    return local


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a new process: nothing is known of a bucket or a cache, and no data set is held. No waiting."""

    def forget():
        bucket.listing.cache_clear()
        bucket.cache.cache_clear()
        while bucket._HELD:
            os.close(bucket._HELD.popitem()[1])

    monkeypatch.setattr(bucket, "WAITS", (0, 0))
    forget()
    yield forget
    forget()


def opened(url: str, cache: Path | str, split: str = "train") -> Blocks:
    return feed.open_source(url, split, S, str(cache))


def same(blocks: Blocks, other: Blocks, indices) -> bool:
    return all((a == b).all() for a, b in zip(blocks.read(indices), other.read(indices), strict=True))


def changed(url: str, at: int) -> bytes:
    """Flips a bit of an object, whose size stays the same. Returns what it was."""
    system = fsspec.filesystem(url.partition(":")[0])
    before = system.cat_file(url)
    system.pipe_file(url, before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
    return before


# -- the same batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["s3", "gs"])
@pytest.mark.parametrize("name", ["prepared", "packed/train_x"])
def test_blocks_by_range_and_from_whole_shards_are_those_of_a_disk(uploaded, tmp_path, scheme, name, monkeypatch):
    far, near = opened(f"{scheme}://bucket/sets/{name}", tmp_path), opened(str(uploaded / name), "")
    assert len(far) == len(near) and len(far.files()) > 4
    assert (far.manifest_sha256, far.manifest, far.tokenizer_sha256) == (
        near.manifest_sha256,
        near.manifest,
        near.tokenizer_sha256,
    )
    order = np.random.default_rng(0).permutation(len(near))
    assert same(far, near, order) and far.shards.range_blocks >= len(order) and not far.shards.whole_blocks
    far.hold(0, far.files()[1][2])
    assert [far.shards.whole(i) for i in range(3)] == [True, True, False]
    assert same(far, near, order) and far.shards.whole_blocks == far.files()[1][2]
    again = pickle.loads(pickle.dumps(far))
    again.hold(0, len(again))
    assert same(again, near, order) and not again.shards.range_blocks
    config = cli.override(cli.read("configs/demo.py"), {"data.verify": "true"})
    near.verify(lambda: None)
    monkeypatch.setattr(store, "bytes_of", None)  # a request for each file
    [line] = feed.verify(config, [again])
    size = sum(file.stat().st_size for file, _, _ in near.files()) / 1e9
    assert again.sha256 == near.sha256 and line.startswith(f"data.verify: {len(near.files())} files, {size:.3f} GB, read in ")
    for i, (file, _, _) in enumerate(near.files()):
        assert again.shards.path(i).read_bytes() == file.read_bytes()
    assert not [*tmp_path.rglob("*.partial")]


def test_the_batches_of_a_run_and_what_it_fetches_first(uploaded, tmp_path, tiny_config):
    """Also while shards arrive, for two processes of a host, and in the middle of a run."""

    def config(where: str, cache: str) -> object:
        sources = {f"{where}/prepared": 0.7, f"{where}/packed/train_x": 0.3}
        data = dataclasses.replace(tiny_config.data, sources=sources, cache=cache)
        return dataclasses.replace(tiny_config, data=data, model=dataclasses.replace(tiny_config.model, vocab_size=700))

    near, far = config(str(uploaded), ""), config("s3://bucket/sets", str(tmp_path))
    sources = feed.open_sources(far)
    assert feed.eos_id(far, sources) == feed.eos_id(near, feed.open_sources(near))
    for start, rows in ((0, np.arange(8)), (5, np.arange(3)), (5, np.arange(3, 8))):
        ours, theirs = (list(feed.training(c, feed.open_sources(c), 8, rows, start)) for c in (far, near))
        assert len(ours) == len(theirs) == 24 - start
        for a, b in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
            np.testing.assert_array_equal(a, b)
    data_order, rows = feed.order(far, sources), np.arange(2)
    needed = [(shards.source.name, i) for shards, i in feed._needed(sources, data_order, 24, 8, rows, 3)]
    used = [
        (sources[s].shards.source.name, int(sources[s].files_of(b)))
        for step in range(4, 25)
        for s, b in zip(*(a.tolist() for a in data_order.at(step, rows)), strict=True)
    ]
    assert set(needed) == set(used) and len(needed) == len(set(needed))
    by_source = lambda pairs, name: [pair for pair in dict.fromkeys(pairs) if pair[0] == name]
    assert all(by_source(needed, name) == by_source(used, name) for name in ("prepared", "train_x"))
    held_out = feed.open_held_out(far, sources)["s3://bucket/sets/prepared"]
    ours, theirs = (
        list(feed.validation(b, 20, 8, np.arange(8))) for b in (held_out, Blocks(uploaded / "prepared", "validation"))
    )
    assert all((a[0] == b[0]).all() for a, b in zip(ours, theirs, strict=True)) and not held_out.shards.range_blocks


def test_a_run_from_a_bucket_is_the_run_from_a_disk(tiny_data, tiny_config_file, stores, tmp_path, capsys, monkeypatch):
    """The whole command, and what it prints."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "default"))
    for name in "ab":
        fsspec.filesystem("s3").put(f"{tiny_data / name}/", f"bucket/tiny/{name}/", recursive=True)
    curves, exact = [], ("step", "loss", "checksum", "grad_norm", "val_loss")
    for where in (str(tiny_data), "s3://bucket/tiny"):
        run, sources = tmp_path / str(len(curves)), f"--data.sources={where}/a:0.7,{where}/b:0.3"
        argv = [f"--workdir={run}", sources, f"--data.cache={tmp_path / 'cache'}:1", "--train.steps=2"]
        assert train.main(["--config", str(tiny_config_file), *argv, "--train.seqs_per_device=1"]) == 0
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        curves.append([[line.get(key) for key in exact] for line in lines])
        out = capsys.readouterr().out
        lines = re.findall(r"data.cache: s3://bucket/tiny/a: [01] of 1 shards, 0.000 of 0.000 GB, are in /.*", out)
        assert len(lines) == 2 * ("s3:" in where)  # at the start and at the end
    assert "0 of 1 shards" in lines[0] and re.search(r"MB/s; of \d+ blocks [\d.]+% were on the disk", lines[1])
    assert curves[0] == curves[1] and len(curves[0]) >= 3
    config = cli.read(str(run / "config.json"))
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, cache=str(tmp_path / "elsewhere")))
    assert run_folder.changed(config, moved, "then") == []
    assert evaluate.main(["--checkpoint", str(run), "--data-set", "s3://bucket/tiny/a", "--limit", "1"]) == 0
    assert "s3://bucket/tiny/a, validation: loss " in capsys.readouterr().out


def test_records_of_any_size_lie_where_the_library_says(tmp_path):
    """Against the C++ reader, with records across the format's blocks of 64 KiB."""
    from array_record.python import array_record_module

    rng, file = np.random.default_rng(0), str(tmp_path / "x")
    records = [rng.bytes(int(n)) for n in [1, *rng.integers(1, 200_000, 60), *rng.integers(1, 300, 500)]]
    writer = array_record_module.ArrayRecordWriter(file, "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    content = Path(file).read_bytes()
    start = riegeli.tail(len(content), len(records))
    at = riegeli.offsets(content[start:], start, len(records))
    assert [riegeli.record(content[a:b], int(a)) for a, b in itertools.pairwise(at.tolist())] == records
    for damage in range(start, len(content), 997):
        bad = content[start:damage] + bytes([content[damage] ^ 0xFF]) + content[damage + 1 :]
        try:
            assert (riegeli.offsets(bad, start, len(records)) == at).all()  # in the padding
        except ValueError:
            continue
    for n, inside in ((0, b"\0\0"), (1, b"\0\1\1\x08")):  # at the end, no record or one of a single number
        head = bytes(24) + riegeli.CHUNK.pack(0, len(inside), 0, ord("r") | n << 8) + inside
        with pytest.raises(ValueError, match="its footer is at -1|do not add up"):
            riegeli.offsets(content[start:-65_536] + head.ljust(65_536, b"\0"), start, len(records))
    for bad in (b"", b"\xff" * 100, content[int(at[0]) : int(at[0]) + 50]):
        with pytest.raises(ValueError, match="chunk at 64: "):
            riegeli.record(bad, 64)


def test_the_end_that_is_read_has_the_whole_footer():
    """Sizes as of 60,000 blocks of S = 2048, whose footer takes 7.4 bytes a record."""
    sizes = np.random.default_rng(0).integers(2_000, 4_000, 60_000)
    places = 64 + np.cumsum(sizes)
    varint = lambda n: bytes([n >> 7 * k & 127 | 128 * (n >> 7 * k > 127) for k in range(-(-int(n).bit_length() // 7))])
    pairs = zip(places.tolist(), sizes.tolist(), strict=True)
    entries = b"".join(b"\x08" + varint(at) + b"\x10" + varint(size) + b"\x18\1" for at, size in pairs)
    footer, whole = pyarrow.compress(entries, "zstd", asbytes=True), int(places[-1])
    assert riegeli._varints(entries)[1::6].tolist() == places.tolist()
    assert whole - riegeli.tail(whole, len(sizes)) >= len(footer) + 2 * riegeli.BLOCK  # and padding, and the last 64 KiB


# -- what goes wrong ----------------------------------------------------------------------------------------------------------


def test_a_shard_that_has_changed_in_the_bucket(uploaded, tmp_path, tiny_config):
    url, file = "s3://bucket/changed", "blocks-train.array_record-00002-of-"
    system = fsspec.filesystem("s3")
    system.put(f"{uploaded / 'prepared'}/", f"{url}/", recursive=True)
    (name,) = [name for name in bucket.listing(Remote(url)) if name.startswith(file)]
    blocks = opened(url, tmp_path)
    before = changed(f"{url}/{name}", 72)  # the length of the first record's chunk
    first, last = blocks.files()[2][1:]
    with pytest.raises(
        Damaged, match=f"{url}/{name}: is not as it was prepared .its sha256 is .*; copy or prepare the data again"
    ):
        blocks.hold(first, last)
    with pytest.raises(Damaged, match=f"{url}/{name}, record 0: is damaged; copy or prepare"):
        blocks.read([first])
    assert not [*tmp_path.rglob(f"{name}*")]
    bucket.ahead(iter([(blocks.shards, 2)]))  # in the background: raised where blocks are read
    for _ in range(500):
        if blocks.shards.error:
            break
        time.sleep(0.01)
    with pytest.raises(Damaged, match=f"{url}/{name}: is not as it was prepared"):
        blocks.read([0])
    system.pipe_file(f"{url}/{name}", before[:-1])
    blocks = opened(url, tmp_path)  # the list of files is the old one
    with pytest.raises(Damaged, match=f"{url}/{name}: has changed: bytes 0 to "):
        blocks.hold(first, last)
    system.rm_file(f"{url}/{name}")
    for call in (lambda: blocks.read([first]), lambda: blocks.hold(first, last)):
        with pytest.raises(Damaged, match=f"{url}/{name}: is not there any more; put it back"):
            call()
    bucket.listing.cache_clear()
    with pytest.raises(Damaged, match=f"{url}/{name}: is missing, and should have {len(before):,}"):
        opened(url, tmp_path)


def test_litpkds_files_that_are_not_alike(uploaded, tmp_path):
    url, system = "s3://bucket/unlike", fsspec.filesystem("s3")
    system.put(f"{uploaded / 'packed'}/", f"{url}/", recursive=True)
    blocks = opened(f"{url}/train_x", tmp_path)
    changed(f"{url}/train_x_0000000001.bin", 8)  # the version, in the header
    for call in (lambda: blocks.hold(0, len(blocks)), lambda: blocks.read([blocks.files()[1][1]])):
        with pytest.raises(Damaged, match=f"{url}/train_x_0000000001.bin: does not begin as {url}/train_x_0000000000.bin does"):
            call()
    system.pipe_file(f"{url}/train_x_0000000001.bin", b"LITPKDS")
    bucket.listing.cache_clear()
    with pytest.raises(Damaged, match=f"{url}/train_x_0000000001.bin: has 7 bytes, and its header says"):
        opened(f"{url}/train_x", tmp_path)
    system.rm(f"{url}/tokenizer", recursive=True)
    bucket.listing.cache_clear()
    system.rm_file(f"{url}/train_x_0000000001.bin")
    with pytest.raises(UserError, match=f"{url}: has no tokenizer beside its LITPKDS files; copy it to"):
        opened(f"{url}/train_x", tmp_path)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_sources_that_are_not_there(uploaded, tmp_path, scheme, monkeypatch):
    for path, says in (
        ("bucket/sets/gone", "/sets/gone: no such bucket or folder; `python -m tinyllama_jax.prepare` makes it"),
        ("no-such-bucket/x", "no-such-bucket/x: no such bucket or folder"),
        ("bucket/sets/packed", "/sets/packed: holds .bin files: give the start of their names, such as .*/sets/packed/train_x"),
        ("bucket/sets/prepared/tokenizer", "has no manifest.json; it was not made by"),
        ("bucket/sets/prepared/manifest.json", "no such bucket or folder"),
        ("bucket", "must name a folder in a bucket"),
    ):
        with pytest.raises(UserError, match=says) as error:
            opened(f"{scheme}://{path}", tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="hdfs://b/x: can be a folder, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER"):
        opened("hdfs://b/x", tmp_path)
    with pytest.raises(UserError, match=f"{scheme}://bucket/sets/prepared: must be a local folder here: copy it first"):
        audit([f"{scheme}://bucket/sets/prepared"], tmp_path / "page.html")
    if scheme == "s3":
        with monkeypatch.context() as patch:
            for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                patch.delenv(key)
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
            fsspec.filesystem("s3").clear_instance_cache()
            bucket.listing.cache_clear()
            with pytest.raises(UserError, match="^s3://bucket/sets/prepared: cannot be read: .*credentials"):
                opened("s3://bucket/sets/prepared", tmp_path)
        fsspec.filesystem("s3").clear_instance_cache()
        bucket.listing.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, store.SCHEMES[scheme], None)
        patch.setattr(fsspec, "filesystem", lambda *_, **__: __import__(store.SCHEMES[scheme]))
        with pytest.raises(UserError, match=f"needs `pip install {store.SCHEMES[scheme]}`"):
            opened(f"{scheme}://bucket/sets/prepared", tmp_path)


def test_a_network_that_stops(uploaded, tmp_path, monkeypatch):
    """What fails for a time is tried again; then the reason is said. In the background it is only a warning."""
    blocks, url = opened("s3://bucket/sets/prepared", tmp_path), "s3://bucket/sets/prepared"
    want, calls = Blocks(uploaded / "prepared", "train").read(np.arange(40))[0], itertools.count()
    reaching = store.reaching

    def fails(at, *more):
        if next(calls) < 2:
            raise UserError(f"{at}: cannot be read: Connection reset by peer")
        return reaching(at, *more)

    with monkeypatch.context() as patch:
        patch.setattr(store, "reaching", fails)
        assert (blocks.read(np.arange(40))[0] == want).all() and next(calls) > 3
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(
        UserError, match=rf"{url}.*: cannot be read: Could not connect .*tried 3 times in 0 s.; is the network up"
    ):
        blocks.read([0])
    with monkeypatch.context() as patch:
        patch.setattr(bucket, "OUTAGES", 1)
        bucket.ahead(iter([(blocks.shards, 1)]))
        for _ in range(1_000):
            if blocks.shards.error:
                break
            time.sleep(0.01)
    with pytest.raises(UserError, match="is the network up"):
        blocks.read([0])
    monkeypatch.undo()
    fsspec.filesystem("s3").clear_instance_cache()


# -- the cache ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, says",
    [
        ("200", "must be FOLDER or FOLDER:GB, such as /mnt/ssd/cache:500"),
        ("500GB", "must be FOLDER or FOLDER:GB"),
        ("/mnt/x:500GB", "must be FOLDER or FOLDER:GB"),
        ("/mnt/x:-1", "must be FOLDER or FOLDER:GB"),
        ("/mnt/x:nan", "must be FOLDER or FOLDER:GB"),
        ("gs://bucket/x", "is a URL, and must be a local path"),
        ("/proc/none", "/proc/none: .*; name a folder that can be made"),
    ],
)
def test_wrong_values_of_the_key(uploaded, tiny_config, text, says):
    data = dataclasses.replace(tiny_config.data, sources={"s3://bucket/sets/prepared": 1.0}, cache=text)
    with pytest.raises(UserError, match=f"^--data.cache={text}: {says}"):
        feed.open_sources(dataclasses.replace(tiny_config, data=data))


def test_urls_need_no_weight(tiny_config):
    assert cli.override(tiny_config, {"data.sources": "gs://b/x"}).data.sources == {"gs://b/x": 1.0}
    both = cli.override(tiny_config, {"data.sources": "gs://b/x:0.25,s3://b/y:0.75"}).data.sources
    assert both == {"gs://b/x": 0.25, "s3://b/y": 0.75}


def test_a_cache_that_is_too_small_reads_the_others_from_the_bucket(uploaded, tmp_path):
    near = Blocks(uploaded / "prepared", "train")
    sizes = [file.stat().st_size for file, _, _ in near.files()]
    far = opened("s3://bucket/sets/prepared", f"{tmp_path}:{(sum(sizes[:2]) + 10) / 1e9:.9f}")
    (line,) = far.shards.news()
    share = 1 - far.shards.cache.limit / sum(sizes)
    assert f"0 of {len(sizes)} shards" in line and f"they do not all fit: {share:.0%} of the blocks will always" in line
    bucket.ahead(iter([(far.shards, i) for i in range(len(sizes))]))
    for _ in range(500):
        if far.shards.full and len([*tmp_path.rglob("*.cached")]) == 2:
            break
        time.sleep(0.01)
    assert far.shards.full == "the cache is full"
    assert sum(f.stat().st_size for f in tmp_path.rglob("*.cached")) <= sum(sizes[:2])
    assert same(far, near, np.arange(len(near))) and 0 < far.shards.whole_blocks < far.shards.range_blocks
    first, line = far.shards.news(last=True)
    assert first.endswith("prepared: the cache is full; blocks of the other shards are read one by one")
    assert "GB of single blocks" in line


def test_what_is_removed_and_what_never(uploaded, tmp_path, fresh):
    size = sum(file.stat().st_size for file, _, _ in Blocks(uploaded / "prepared", "train").files())
    cache = f"{tmp_path}:{1.5 * size / 1e9:.9f}"
    own = [tmp_path / name for name in ("mine.cached", "folder/mine.cached", "folder/x.partial")]
    for file in own:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(size))
    one = opened("s3://bucket/sets/prepared", cache)
    one.hold(0, len(one))
    (one.shards.folder / "notes").write_text("mine")
    other = opened("gs://bucket/sets/prepared", cache)
    other.hold(0, len(other))
    assert other.shards.full and all(map(one.shards.whole, range(len(one.files()))))  # a process reads them: not removed
    half = [other.shards.whole(i) for i in range(len(other.files()))]
    assert 0 < sum(half) < len(half)
    oldest = one.shards.path(int(np.argmax(one.shards.sizes)))
    os.utime(oldest, (1, 1))
    fresh()  # the process that read `one` has ended
    other = opened("gs://bucket/sets/prepared", cache)
    other.shards.fetch(half.index(False))
    assert (
        not oldest.exists() and len([*one.shards.folder.glob("*.cached")]) == len(half) - 1
    )  # the least recently opened, and no more than needed
    other.hold(0, len(other))
    assert all(map(other.shards.whole, range(len(half)))) and not other.shards.full
    fresh()
    opened("s3://bucket/sets/packed/train_x", f"{tmp_path}:0")  # a lower limit
    assert [*tmp_path.rglob("*.cached")] == sorted(own[:2], reverse=True) or {*tmp_path.rglob("*.cached")} == {*own[:2]}
    assert all(file.exists() for file in own) and (one.shards.folder / "notes").exists()


def test_a_fetch_that_was_killed_and_one_that_goes_on(uploaded, tmp_path):
    near, far = Blocks(uploaded / "prepared", "train"), opened("s3://bucket/sets/prepared", tmp_path)
    partial = far.shards.path(0).with_suffix(".partial")
    partial.write_bytes(b"half of it")
    with partial.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another process is at it
        assert not far.shards.fetch(0) and partial.read_bytes() == b"half of it" and same(far, near, [0])
        bucket.ahead(iter([(far.shards, 0), (far.shards, 1)]))
        for _ in range(500):
            if far.shards.whole(1):
                break
            time.sleep(0.01)
        assert not far.shards.whole(0)
    for _ in range(500):  # it was killed
        if far.shards.whole(0):
            break
        time.sleep(0.01)
    assert far.shards.path(0).read_bytes() == near.files()[0][0].read_bytes() and not partial.exists()
    others = [pickle.loads(pickle.dumps(far)).shards for _ in range(3)]  # a lock is of an open file: as good as processes
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert all(pool.map(lambda shards: shards.fetch(2, wait=60), others))
    assert sorted(shards.whole_bytes for shards in others) == [0, 0, far.shards.sizes[2]]  # one fetched it


def test_a_cached_shard_that_is_damaged(uploaded, tmp_path):
    near, far = Blocks(uploaded / "prepared", "train"), opened("s3://bucket/sets/prepared", tmp_path)
    far.hold(0, len(far))
    path = far.shards.path(1)
    content = path.read_bytes()
    path.write_bytes(content[:64] + bytes(50) + content[114:])
    with pytest.raises(Damaged, match=f"record 0: is damaged; remove {path}, and it is downloaded again"):
        far.read([far.files()[1][1]])
    far.verify(lambda: None)
    assert path.read_bytes() == content and "was damaged on this disk, and is downloaded again" in far.shards.news()[0]
    path.write_bytes(content[:-5])  # the machine crashed
    again = opened("s3://bucket/sets/prepared", tmp_path)
    assert not path.exists() and same(again, near, np.arange(len(near)))


def test_a_full_disk_is_said_and_training_goes_on(uploaded, tmp_path, monkeypatch):
    near, far = Blocks(uploaded / "prepared", "train"), opened("s3://bucket/sets/prepared", tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    assert not far.shards.fetch(0) and not [*tmp_path.rglob("*.partial")]
    assert (
        far.shards.news()[0]
        == f"warning: --data.cache={tmp_path}: the disk is full; free some room and run the same command again"
    )
    assert same(far, near, np.arange(len(near))) and not far.shards.whole_blocks
    shutil.rmtree(tmp_path)


def test_litpkds_split_and_names(uploaded, tmp_path):
    assert Packed("s3://bucket/sets/packed/train_x*", "train", S, str(tmp_path)).files()[0][0].name == "train_x_0000000000.bin"
    with pytest.raises(UserError, match="s3://bucket/sets/packed/train_x: has no split 'validation'"):
        Packed("s3://bucket/sets/packed/train_x", "validation", S, str(tmp_path))
