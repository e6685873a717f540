"""What comes from an object store or a TensorFlow data set becomes the same bytes as from this machine's files."""

import json
import os
import socket
from pathlib import Path

import fsspec
import numpy as np
import pytest
import stand_ins
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from test_prepare import digests, expected, lines, make_corpus, stream

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data.prepare import documents, inputs, pipeline
from tinyllama_jax.data.prepare.pipeline import prepare

# -- object stores ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory, stores, texts) -> Path:
    """A local folder that is also at corpus/ in the bucket of each store."""
    folder = make_corpus(tmp_path_factory.mktemp("stores") / "corpus", texts)
    (folder / "readme.md").write_bytes(b"not data")
    for scheme in ("s3", "gs"):
        fsspec.filesystem(scheme).put(f"{folder}/", "bucket/corpus/", recursive=True)
    return folder


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_store_gives_the_bytes_that_a_folder_gives(uploaded, model, tmp_path, monkeypatch, scheme):
    monkeypatch.setattr(pipeline, "SHARD", (1 << 15, 1 << 30))
    monkeypatch.setattr(inputs, "FETCH", 1 << 14)  # several to a file
    options = {"tokenizer": model, "seq_len": 64, "held_out": 0.1}
    prepare(train=[uploaded], output=tmp_path / "here", workers=1, **options)
    for i, (path, workers) in enumerate([("corpus/", 2), ("corp*/**", 1)]):
        prepare(train=[f"{scheme}://bucket/{path}"], output=tmp_path / f"{i}", workers=workers, **options)
        assert digests(tmp_path / f"{i}") == digests(tmp_path / "here"), path


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_errors_of_a_store(uploaded, model, tmp_path, monkeypatch, scheme):
    options = {"tokenizer": model, "seq_len": 64, "workers": 1, "bad_files": "skip", "output": tmp_path / "out"}
    for path, says in (
        ("bucket/gone", "no such file or folder"),
        ("no-such-bucket/x", "no such file or folder"),
        ("bucket/*.csv", "no file or folder matches"),
        ("bucket/corpus/readme.md", "is of no known type"),
    ):
        with pytest.raises(UserError, match=f"--train {scheme}://{path.replace('*', '.')}: {says}"):
            prepare(train=[f"{scheme}://{path}"], **options)
    store = fsspec.filesystem(scheme)
    store.pipe("bucket/other/a.txt", b"x")
    store.pipe("bucket/other/b.jsonl", lines(["good"]) + b"bad")
    read = documents.read

    def meanwhile(piece, *more):
        store.pipe("bucket/other/a.txt", b"y")  # of the same size
        return read(piece, *more)

    with monkeypatch.context() as patch:
        patch.setattr(documents, "read", meanwhile)
        with pytest.raises(UserError, match=f"{scheme}://bucket/other/a.txt: changed while it was read"):
            prepare(train=[f"{scheme}://bucket/other/a.txt"], **options)
    manifest = prepare(train=[f"{scheme}://bucket/other"], held_out=0, **{**options, "output": tmp_path / "new"})
    (bad,) = manifest["splits"]["train"]["bad_files"]
    assert bad["file"] == "b.jsonl" and bad["reason"].startswith("b.jsonl, line 2: is not JSON")
    assert stream(tmp_path / "new") == expected(["y"], model)


def test_a_store_that_does_not_answer_does_not_make_a_file_bad(uploaded, model, tmp_path, monkeypatch):
    """Whatever goes wrong in reaching an object, the next try may succeed: the object is never left out."""
    options = {"train": ["s3://bucket/corpus/b.jsonl.zst"], "tokenizer": model, "seq_len": 64, "workers": 1}

    def fails(*arguments, **more):
        raise ConnectionResetError(104, "Connection reset by peer")

    for kind in ("b.jsonl.zst", "c.parquet"):
        with monkeypatch.context() as patch:
            patch.setattr("s3fs.core._fetch_range", fails)  # of an open file
            with pytest.raises(UserError, match=f"s3://bucket/corpus/{kind}: cannot be read: .*reset"):
                prepare(**{**options, "train": [f"s3://bucket/corpus/{kind}"]}, bad_files="skip", output=tmp_path / "out")
        assert not (tmp_path / "out").exists()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{stand_ins.free_port()}")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(UserError, match="s3://bucket/corpus/b.jsonl.zst: cannot be read: Could not connect"):
        prepare(**options, output=tmp_path / "out")
    fsspec.filesystem("s3").clear_instance_cache()


# -- TensorFlow data sets -----------------------------------------------------------------------------------------------


def make_tfds(folder: Path, splits: dict[str, list[str]], shards: int) -> Path:
    """A text data set as TFDS stores it as ArrayRecord, with another text and a number beside each text."""
    folder.mkdir(parents=True)
    text, number = tfds.features.Text(), tfds.features.Scalar(np.int64)
    features = tfds.features.FeaturesDict({"text": text, "title": text, "id": number})
    infos = []
    for split, texts in splits.items():
        parts = [texts[i * len(texts) // shards : (i + 1) * len(texts) // shards] for i in range(shards)]
        for i, part in enumerate(parts):
            path = folder / f"tales-{split}.array_record-{i:05d}-of-{shards:05d}"
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for each in part:
                writer.write(features.serialize_example({"text": each, "title": "title of it", "id": 7}))
            writer.close()
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name="tales", split=split, filetype_suffix="array_record"
        )
        infos.append(
            tfds.core.SplitInfo(name=split, shard_lengths=list(map(len, parts)), num_bytes=0, filename_template=template)
        )
    tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=infos, check_data=False)
    return folder


TALES = [f"tale {i}: once upon a time " * (i % 7) for i in range(500)]


@pytest.fixture
def tales(tmp_path) -> Path:
    make_tfds(tmp_path / "tfds/tales/en/1.0.0", {"train": ["old"], "test": ["old"]}, 1)
    make_tfds(tmp_path / "tfds/tales/en/1.2.0", {"train": TALES, "test": ["test"]}, 3)
    return tmp_path / "tfds"


@pytest.mark.filterwarnings("ignore:label.. is deprecated:DeprecationWarning")  # protobuf's, of what TFDS calls
def test_a_tensorflow_data_set(tales, model, tmp_path, monkeypatch):
    options = {"tokenizer": model, "seq_len": 64, "workers": 1, "data_dir": tales}
    manifest = prepare(train=["tfds:tales/en"], validation=["tfds:tales/en:test"], output=tmp_path / "out", **options)
    assert stream(tmp_path / "out") == expected(TALES, model)
    assert stream(tmp_path / "out", "validation") == expected(["test"], model)
    assert [s["file"] for s in manifest["splits"]["train"]["sources"]] == [
        f"tales-train.array_record-{i:05d}-of-00003" for i in range(3)
    ]
    monkeypatch.setattr(pipeline, "SHARD", (1 << 12, 1 << 30))
    manifest = prepare(train=["tfds:tales/en"], held_out=0, output=tmp_path / "cut", **options)
    assert len(manifest["splits"]["train"]["shards"]) > 5 and stream(tmp_path / "cut") == expected(TALES, model)
    prepare(train=["tfds:tales/en:1.0.0:test"], held_out=0, text_key="title", output=tmp_path / "title", **options)
    assert stream(tmp_path / "title") == expected(["title of it"], model)


@pytest.mark.filterwarnings("ignore:label.. is deprecated:DeprecationWarning")
def test_tensorflow_data_sets_that_cannot_be_read(tales, model, tmp_path):
    options = {"tokenizer": model, "seq_len": 64, "output": tmp_path / "out", "workers": 1, "data_dir": tales}
    folder = tales / "tales/en/1.0.0"
    for path, key, says in (
        ("tfds:fables", "", f"tfds:fables: no such data set, .* is prepared in {tales}; say where with --data-dir"),
        ("tfds:tales", "", "tfds:tales: no such data set, configuration or version"),
        ("tfds:tales/en:9.9.9", "", "tfds:tales/en:9.9.9: no such data set, configuration or version"),
        ("tfds:tales/en:dev", "", "tfds:tales/en:dev: has no split 'dev'; it has t"),
        ("tfds:tales/en:train[:10%]", "", r"en:train\[:10%\]: has no split 'train\[:10%\]'"),
        ("tfds:tales/en", "id", "1.2.0: has no text feature 'id'; it has text, title: choose one with --text-key"),
        ("tfds:tales/en", "body", "1.2.0: has no text feature 'body'"),
    ):
        with pytest.raises(UserError, match=says):
            prepare(train=[path], text_key=key, **options)
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(
        UserError, match="tfds:tales/en:1.0.0: is not stored as ArrayRecord; convert it with `tfds convert_format "
    ):
        prepare(train=["tfds:tales/en:1.0.0"], **options)
    file = tales / "tales/en/1.2.0/tales-train.array_record-00001-of-00003"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=f"{file}: is not a whole ArrayRecord file: it has 0 records of"):
        prepare(train=["tfds:tales/en"], **options)
    manifest = prepare(train=["tfds:tales/en"], bad_files="skip", **options)
    assert [bad["file"] for bad in manifest["splits"]["train"]["bad_files"]] == [os.path.basename(file)]


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl.gz", "b.parquet"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_a_special_file_with_an_inputs_name_is_refused(tmp_path, monkeypatch, kind, name):
    """Left out silently, its text would be missing from the data."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("text")
    monkeypatch.chdir(tmp_path / "texts")
    if kind == "pipe":
        os.mkfifo(name)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(name)
    else:
        Path(name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=rf"^--train .*{name}: is not a regular file"):
        inputs.find([tmp_path / "texts"], "--train")
    Path(name).rename("b.other")
    sources, others = inputs.find([tmp_path / "texts"], "--train")
    assert [source.name for source in sources] == ["a.txt"] and others == [str(tmp_path / "texts/b.other")]
