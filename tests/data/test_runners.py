"""Dask's workers and an object store: the same bytes as this machine's, whoever is killed on the way."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import fsspec
import pytest
from test_prepare import ROOT, children, command, digests, finished, gone, lines, listening, wait_until

from tinyllama_jax import prepare as prepare_lib
from tinyllama_jax.base import store
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data.blocks import Blocks, read_manifest
from tinyllama_jax.data.prepare import pipeline, runners
from tinyllama_jax.data.prepare.pipeline import prepare

SHARD = 1 << 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, texts) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.jsonl").write_bytes(lines(texts * 8))
    (folder / "b.jsonl").write_bytes(lines(texts))
    return folder


def arguments(corpus, model, out, *more):
    return ["--train", corpus / "a.jsonl", "--tokenizer", model, "--output", out, "--seq-len", 128, "--held-out", 0, *more]


@pytest.fixture(scope="module")
def expected(tmp_path_factory, corpus, model) -> dict[str, str]:
    """Digests of what one process on this machine (`--runner direct`) makes of `corpus`."""
    out = tmp_path_factory.mktemp("expected") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "SHARD", (SHARD, 1 << 30))
        prepare_lib.main([*map(str, arguments(corpus, model, out, "--runner", "direct", "--workers", 1))])
    return digests(out)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def process(log: Path, *words, **env):
    """A program in the background, killed at the end."""
    with open(log, "wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", *map(str, words)],
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            stdout=output,
            stderr=output,
        )
    try:
        yield child
    finally:
        child.kill()
        child.wait()


# -- Dask ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory) -> str:
    """Address of Dask's scheduler."""
    pytest.importorskip("distributed")
    folder = tmp_path_factory.mktemp("scheduler")
    file = folder / "scheduler.json"
    words = "--host", "127.0.0.1", "--port", 0, "--no-dashboard", "--scheduler-file", file
    with process(folder / "log", "distributed.cli.dask_scheduler", *words) as child:
        wait_until(file.is_file, child)
        yield json.loads(file.read_text())["address"]


@pytest.fixture
def start(scheduler, tmp_path):
    """Starts a worker of one thread and gives its process."""
    with contextlib.ExitStack() as stack:

        def start():
            log = tmp_path / f"worker{time.monotonic_ns()}.log"
            words = scheduler, "--host", "127.0.0.1", "--nthreads", 1, "--no-nanny", "--no-dashboard"
            worker = stack.enter_context(process(log, "distributed.cli.dask_worker", *words))
            wait_until(lambda: "Registered to" in log.read_text(), worker)
            return worker

        yield start


def writes(worker: subprocess.Popen, partial: Path) -> bool:
    """Whether a worker has an unfinished output file open."""
    with contextlib.suppress(OSError):
        files = [os.readlink(link) for link in Path(f"/proc/{worker.pid}/fd").iterdir()]
        return any(file.startswith(f"{partial}/blocks-") for file in files)
    return False


def test_dask_with_a_worker_that_is_killed(scheduler, start, corpus, model, tmp_path, expected):
    workers, out, partial = [start(), start()], tmp_path / "out", tmp_path / "out.partial"
    main = command(*arguments(corpus, model, out, "--runner", "dask", "--dask_client_address", scheduler), shard=SHARD)
    wait_until(lambda: len(store.names(partial / "done")) >= 2 and writes(workers[0], partial), main)
    workers[0].send_signal(signal.SIGKILL)
    made = len(store.names(partial / "done"))
    total = len([name for name in expected if name.startswith("blocks-")])
    assert 2 <= made < total
    code, printed, err = finished(main)
    assert code == 0 and re.fullmatch(r"Beam's output goes to \S+\n", err), err
    assert f"out: {total} shards in " in printed and digests(out) == expected and not partial.exists()


def test_dask_without_any_worker_left(scheduler, start, corpus, model, tmp_path, expected):
    worker, out, partial = start(), tmp_path / "out", tmp_path / "out.partial"
    options = arguments(corpus, model, out, "--runner=dask", f"--dask_client_address={scheduler}")
    main = command(*options, shard=SHARD, first="from tinyllama_jax.data.prepare import runners; runners.ALONE = 0.5")
    wait_until(lambda: len(store.names(partial / "done")) >= 2, main)
    worker.send_signal(signal.SIGKILL)
    below = children(main.pid)
    code, _, err = finished(main)
    assert code == 2 and gone(below) and not out.exists()
    last = err.splitlines()[-1]
    assert last.startswith("error: --runner dask: ") and "no worker for 0.5 s: start some" in last and err.count("\n") == 2
    kept = {
        f.name: f.stat().st_mtime_ns
        for f in partial.glob("whole/blocks-*")
        if f"{f.name}.json" in store.names(partial / "done")
    }
    assert len(kept) >= 2
    start()
    code, printed, _ = finished(command(*options, shard=SHARD))
    assert code == 0 and f"({len(kept)} before)" in printed and digests(out) == expected
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept  # not made again


def test_dask_with_input_that_cannot_be_read(scheduler, start, corpus, model, tmp_path):
    start()
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"text": "x"}\n{}\n')
    options = arguments(corpus, model, tmp_path / "out", "--runner", "dask", "--dask_client_address", scheduler)
    code, _, err = finished(command(*options[:1], bad, *options[2:]))
    assert code == 2 and err.splitlines()[1:] == [
        f"error: {bad}, line 2: has no key 'text'; it has : choose one with --text-key"
    ]


def test_dasks_local_cluster_listens_only_on_loopback(corpus, model, tmp_path):
    pytest.importorskip("distributed")
    main = command(*arguments(corpus, model, tmp_path / "out", "--runner", "dask"), shard=SHARD)
    wait_until(lambda: len(store.names(tmp_path / "out.partial/done")) >= 2, main)
    addresses = {address.partition(":")[0] for address in listening([main.pid, *children(main.pid)])}
    main.send_signal(signal.SIGINT)
    assert finished(main)[0] == 130 and addresses == {"0100007F"}  # 127.0.0.1


def test_finished_work_is_not_repeated(corpus, model, tmp_path, monkeypatch):
    """Dask repeats work that a lost worker had finished."""
    calls, make = [], runners.shards._make
    monkeypatch.setattr(runners.shards, "_make", lambda job, shard: (calls.append(shard.file), make(job, shard)))
    monkeypatch.setattr(pipeline, "SHARD", (SHARD, 1 << 30))
    run = runners.pipeline
    monkeypatch.setattr(runners, "pipeline", lambda job, work, *rest: run(job, work + work[:2], *rest))
    prepare(train=[corpus / "b.jsonl"], tokenizer=model, output=tmp_path / "out", seq_len=64, workers=1)
    assert len(calls) == len(set(calls)) > 2


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--runner", "dusk"], "--runner dusk: no such runner; there are direct, dask, and Beam's own, such as FlinkRunner"),
        (["--runner", "direct", "--direct_num_workers=2"], "--direct_num_workers=2: no such option"),
        (["--runner", "dask", "--dask_client_adress=x"], "--dask_client_adress: no such option of this command, or of Beam"),
        (["--runner", "dask", "--seqlen=3"], "--seqlen: no such option"),
        (["--runner", "dask", "--workers", "2"], "--workers 2: is for --runner direct; with dask the cluster"),
        (["--output", "ftp://there/x"], "--output ftp://there/x: can be a folder, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER"),
        (["--output", "s3:/bucket/x"], "--output s3:/bucket/x: needs two slashes after the colon"),
        (["--runner", "DirectRunner", "--direct_num_workers=2"], "--direct_num_workers=2: no such option"),
        (["--output", "s3://bucket/"], "--output s3://bucket/: must name a folder in a bucket"),
    ],
    ids=str,
)
def test_impossible_options_are_errors(corpus, model, tmp_path, more, says):
    with pytest.raises(UserError, match=f"^{re.escape(says)}"):
        prepare_lib.main([*map(str, arguments(corpus, model, tmp_path / "out", *more))])
    assert not list(tmp_path.iterdir())


def test_a_runner_that_is_not_installed(corpus, model, tmp_path, monkeypatch):
    monkeypatch.setattr(runners, "_installed", lambda module: module != "distributed")
    with pytest.raises(UserError, match="--runner dask: needs `pip install dask distributed`, here and on its workers"):
        prepare_lib.main([*map(str, arguments(corpus, model, tmp_path / "out", "--runner", "dask"))])


def test_the_error_is_beams_last_line(corpus, model, tmp_path):
    """Flink without its job server, whose jar file does not exist."""
    gone_ = tmp_path / "gone.jar"
    options = arguments(corpus, model, tmp_path / "out", "--runner", "FlinkRunner", f"--flink_job_server_jar={gone_}")
    code, _, err = finished(command(*options))
    assert code == 2 and err.splitlines()[-1].startswith("error: --runner FlinkRunner: ") and err.count("\n") == 2
    assert "log; run this again to resume)" in err and (tmp_path / "out.partial/log").read_text()


# -- an object store ----------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """s3://bucket on a server of its own."""
    for library in ("s3fs", "moto"):
        pytest.importorskip(library)
    port = free_port()
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # of another test's server
    with process(tmp_path / "s3.log", "moto.server", "-p", port) as server:

        def made():
            with contextlib.suppress(OSError):
                request = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
                return urllib.request.urlopen(request, timeout=10).status == 200

        wait_until(made, server)
        yield "s3://bucket"


def fetched(url: str, folder: Path) -> dict[str, str]:
    with store.local_copy(store.place(url, "")) as whole, store.local_copy(store.place(f"{url}/tokenizer", "")) as inner:
        shutil.copytree(whole, folder)
        shutil.copytree(inner, folder / "tokenizer")
    return digests(folder)


def test_an_object_store_and_a_job_killed_half_way(bucket, corpus, model, tmp_path, expected, capsys):
    url = f"{bucket}/deep/out"
    out, partial = store.place(url, ""), store.place(f"{url}.partial", "")
    options = arguments(corpus, model, url, "--workers", 2)
    first = command(*options, shard=SHARD)
    wait_until(lambda: len(store.names(partial / "done")) >= 3, first)
    below = children(first.pid)
    first.send_signal(signal.SIGKILL)
    finished(first)
    while not gone(below):  # the workers notice
        time.sleep(0.1)
    kept = {name.removesuffix(".json") for name in store.names(partial / "done")}
    total = len([name for name in expected if name.startswith("blocks-")])
    assert 3 <= len(kept) < total and "manifest.json" not in store.names(out)
    times = {name: store.modified_ns(out / name) for name in kept}
    cut = sorted(kept)[0]
    store.write(out / cut, b"half")
    store.write(out / "blocks-train.array_record-00000-of-00999", b"of another plan")

    code, printed, err = finished(command(*options, shard=SHARD))
    assert (code, err) == (0, "") and f"({len(kept) - 1} before)" in printed
    assert fetched(url, tmp_path / "copy") == expected
    assert {name: store.modified_ns(out / name) for name in kept - {cut}} == {n: t for n, t in times.items() if n != cut}
    assert not store.holds_something(partial)

    prepare_lib.main([*map(str, options)])
    assert capsys.readouterr().out == f"{url}: complete already, nothing to do\n"
    for change, says in (
        (["--seq-len", 64], "s3://bucket/deep/out: was made with other settings: seq_len was 128, now 64"),
        (["--output", f"{bucket}/deep"], "s3://bucket/deep: holds something that this command did not make"),
        (["--output", "s3://nowhere/out"], "s3://nowhere/out.*: cannot be .*bucket does not exist"),
    ):
        with pytest.raises(UserError, match=says) as error:
            prepare_lib.main([*map(str, options), *map(str, change)])
        assert "\n" not in str(error.value)
    for folder in (url, Path(url)):  # pathlib turns two slashes into one
        blocks, here = Blocks(folder, "train", str(tmp_path / "cache")), Blocks(tmp_path / "copy", "train")
        assert (blocks.read(range(len(here)))[0] == here.read(range(len(here)))[0]).all() and blocks.shards.range_blocks
    with pytest.raises(UserError, match="^s3://bucket/deep/out: must be a local folder here: copy it first"):
        read_manifest(url)


# -- how far it is ------------------------------------------------------------------------------------------------------


def test_lines_of_progress_without_a_terminal(corpus, model, tmp_path):
    first = "from tinyllama_jax.data.prepare import runners; runners.LINES = (0.1, 0.1)"
    code, _, err = finished(command(*arguments(corpus, model, tmp_path / "out", "--workers", 1), shard=SHARD, first=first))
    assert code == 0 and err
    for line in err.splitlines():
        assert re.fullmatch(
            r"tokenising: \d of 2 MB \(\d+%\), (no shard finished yet|\d+\.\d MB/s, (\d+ min|under a minute) left)", line
        )


def test_a_line_of_progress_says_how_much_time_is_left():
    mb = 10**6
    assert runners._line(30 * mb, 3_000 * mb, 0, 10) == "tokenising: 30 of 3,000 MB (1%), 3.0 MB/s, 16 min left"
    assert runners._line(30 * mb, 300 * mb, 20 * mb, 1_000) == "tokenising: 30 of 300 MB (10%), 0.0 MB/s, 7.5 h left"
    assert runners._line(7 * mb, 9 * mb, 7 * mb, 50) == "tokenising: 7 of 9 MB (77%), no shard finished yet"


def test_no_message_of_a_worker_is_lost():
    assert "Traceback" in str(runners._failure(None, "Traceback", 1, []))
