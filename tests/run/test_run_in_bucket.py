"""A run folder on s3:// and gs://: the bits of a local run, also killed and with its disk gone; one line for mistakes."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import stand_ins

from tinyllama_jax import train
from tinyllama_jax.base import cli, store
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.run import bucket, lock, metrics, seals

pytestmark = pytest.mark.xdist_group("bucket")  # one pair of servers
ROOT = Path(__file__).parents[2]
# conftest.py makes eight devices
SHORT = ["--train.steps=12", "--checkpoint.every=4", "--log.eval_every=100", "--train.seqs_per_device=1"]
EXACT = ("step", "loss", "grad_norm", "checksum", "lr")


@pytest.fixture(scope="module", autouse=True)
def stores(tmp_path_factory):
    """Stand-ins for both stores; a cache folder of our own; a short wait for dead machines."""
    with stand_ins.servers(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(lock, "STALE", 2.0)
        patch.setattr(lock, "BEAT", 0.2)
        yield


@pytest.fixture(scope="module")
def run(tiny_config_file):
    """run(workdir) trains; returns the run folder here."""

    def run(workdir):
        assert train.main(["--config", str(tiny_config_file), f"--workdir={workdir}", *SHORT]) == 0
        return store.working_copy(str(workdir))

    return run


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    """The lines of metrics of a local run."""
    return exact(run(tmp_path_factory.mktemp("local") / "run"))


def exact(folder):
    return [[row[name] for name in EXACT] for row in metrics.read(folder) if "checksum" in row]


def lose_disk(url):
    shutil.rmtree(store.working_copy(url))


def flip(scheme, pattern):
    (path,) = stand_ins.names(f"{scheme}://{pattern}")
    system = fsspec.filesystem(scheme)
    content = bytearray(system.cat_file(path))
    content[len(content) // 2] ^= 1
    system.pipe_file(path, bytes(content))


def test_killed_with_the_disk_gone_it_goes_on_with_the_same_bits(run, undisturbed, tiny_config_file, capsys):
    url = "s3://bucket/deep/killed"
    argv = ["--config", str(tiny_config_file), "--workdir", url, *SHORT]
    command = [sys.executable, str(ROOT / "tests" / "chaos_train.py"), *argv]
    env = os.environ | {"PYTHONPATH": str(ROOT), "CHAOS_SEAL_SECONDS": "1"}  # it cannot have ended when it is killed
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env) as process:
        end = time.monotonic() + 300
        while not stand_ins.names(f"{url}/checkpoints/*/seal.json") and time.monotonic() < end and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -9
    lose_disk(url)
    folder = run(url)
    assert "weights: step " in capsys.readouterr().out
    assert exact(folder) == undisturbed
    on_bucket = b"".join(map(fsspec.filesystem("s3").cat_file, sorted(stand_ins.names(f"{url}/metrics.jsonl.parts/*"))))
    assert on_bucket == (folder / "metrics.jsonl").read_bytes()


def test_a_damaged_checkpoint_is_passed_over_and_kept(run, undisturbed, capsys):
    url = "gs://bucket/damaged"
    run(url)
    assert "no conditional writes" in capsys.readouterr().out  # of the stand-in; the real store has them
    assert [f"{url}/checkpoints/{step}/seal.json"[5:] for step in (12, 4, 8)] == sorted(
        stand_ins.names(f"{url}/checkpoints/*/seal.json")
    )
    flip("gs", "bucket/damaged/checkpoints/12/params/ocdbt.process_0/manifest.ocdbt")
    lose_disk(url)
    folder = run(url)
    out = capsys.readouterr().out
    assert "weights: step 8 of" in out and "checkpoint 12 is not used (params/ocdbt.process_0/manifest.ocdbt is not" in out
    assert exact(folder) == undisturbed
    kept = {name.split("/")[3] for name in stand_ins.names(f"{url}/set_aside/*/seal.json")}
    assert len(kept) == 1 and next(iter(kept)).startswith("12-")
    assert {int(name.split("/")[3]) for name in stand_ins.names(f"{url}/checkpoints/*/seal.json")} == {4, 8, 12}


@pytest.fixture
def config(tiny_config_file, request):
    """A config with a run folder of its own on S3."""
    name = request.node.name.translate(str.maketrans("[]", "__"))
    return replace(cli.read(str(tiny_config_file)), workdir=f"s3://bucket/{name}")


def opened(config, monkeypatch, machine=""):
    """The open bucket of a machine."""
    if machine:
        monkeypatch.setenv("XDG_CACHE_HOME", os.environ["XDG_CACHE_HOME"] + machine)
    out = bucket._Bucket(config)
    try:
        out.begin()
    except UserError:
        out.end()
        raise
    return out


def test_two_runs_in_one_bucket(config, monkeypatch):
    first = opened(config, monkeypatch, "a")
    with pytest.raises(UserError, match=f"{config.workdir}: another process is training in this folder"):
        opened(config, monkeypatch)
    with pytest.raises(UserError, match=rf"another process is training in this folder; .* \(.*, pid {os.getpid()}\)"):
        opened(config, monkeypatch, "b")
    first._lock.hold = lambda ended=False: None  # it stops without a word, as a machine that hangs
    second = opened(config, monkeypatch, "c")
    with pytest.raises(UserError, match=rf"pid {os.getpid()}, has taken over this run; this process ends"):
        first.push()
    second.end()
    opened(config, monkeypatch, "d").end()  # at once: the last one has said that it ended


def test_a_sending_that_takes_long_gives_signs_of_life(config, monkeypatch):
    copy, said = opened(config, monkeypatch, "slow"), []
    (config.folder / "config.json").write_text("{}")
    write, put = store.write, store.put
    monkeypatch.setattr(store, "write", lambda file, text: [said.append(file.name), write(file, text)])

    def slowly(*args, **options):
        said.clear()
        end = time.monotonic() + 20
        while "1.json" not in said and time.monotonic() < end:
            time.sleep(0.01)
        put(*args, **options)
        said.append("arrived")

    monkeypatch.setattr(store, "put", slowly)
    copy.push()
    copy.end()
    assert said.index("1.json") < said.index("arrived")


def test_killed_while_the_first_files_are_sent_a_run_can_be_started_again(config, monkeypatch):
    copy, put = opened(config, monkeypatch, "first"), store.put

    def fails(path, *more, **options):
        if path.name == "config.json":
            time.sleep(0.5)  # so that others, sent at the same time, would arrive
            raise UserError("the network is gone")
        put(path, *more, **options)

    for name in ("config.json", "data.json"):
        (config.folder / name).write_text("{}")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="the network is gone"):
        patch.setattr(store, "put", fails)
        copy.push()
    copy.end()
    fsspec.filesystem("s3").pipe_file(f"{config.workdir}/.preflight-host-1", b"")  # of a `plan --here` that was killed
    opened(config, monkeypatch, "second").end()


def test_an_object_whose_name_leads_elsewhere_is_refused(config, monkeypatch):
    copy = opened(config, monkeypatch, "named")
    (config.folder / "config.json").write_text("{}")
    copy.push()
    copy.end()
    fsspec.filesystem("s3").pipe_file(f"{config.workdir}/tokenizer/../../escaped", b"x")
    with pytest.raises(UserError, match=r"/tokenizer/\.\./\.\./escaped: has an empty part or \.\. in its name, .*; remove it"):
        opened(config, monkeypatch, "other")
    assert not [*Path(os.environ["XDG_CACHE_HOME"]).rglob("escaped")]


def test_the_bucket_follows_lines_that_come_and_go(config, monkeypatch):
    monkeypatch.setattr(bucket, "PART", 300)
    monkeypatch.setattr(bucket, "PIECE", 700)
    rng, copy = random.Random(0), opened(config, monkeypatch, "e")
    (config.folder / "config.json").write_text("{}")
    file, lines = config.folder / "metrics.jsonl", []
    for i in range(8):
        keep = rng.randrange(len(lines) + 1) if i % 3 == 2 else len(lines)
        lines = lines[:keep] + [json.dumps({"step": i, "x": "x" * rng.randrange(90)}) + "\n" for _ in range(rng.randrange(30))]
        if keep < len(lines):
            file.write_text("".join(lines[:keep]))
            copy.push()
        file.write_text("".join(lines) + "a line that is cut sho")
        copy.push()
        parts = sorted(stand_ins.names(f"{config.workdir}/metrics.jsonl.parts/*"))
        assert b"".join(map(fsspec.filesystem("s3").cat_file, parts)).decode() == "".join(lines)
        assert all(fsspec.filesystem("s3").size(part) >= 300 for part in parts[:-1])
    copy.end()
    opened(config, monkeypatch, "f").end()
    assert (config.folder / "metrics.jsonl").read_text() == "".join(lines)
    fsspec.filesystem("s3").rm_file(parts[1])
    with pytest.raises(UserError, match=r"metrics.jsonl.parts: the bytes \d+ to [\d,]+ are missing; restore them"):
        opened(config, monkeypatch, "g")


def test_what_was_not_sent_yet_is_kept_and_what_a_person_removed_is_not(config, monkeypatch):
    def checkpoint(step):
        folder = config.folder / "checkpoints" / f"{step}{seals.PARTIAL}"
        folder.mkdir(parents=True)
        (folder / "weights").write_text(f"of {step}")
        seals.seal(folder.parent, "")
        folder.rename(folder.with_name(str(step)))

    copy = opened(config, monkeypatch, "h")
    (config.folder / "config.json").write_text("{}")
    for step in (5, 10):
        checkpoint(step)
    copy.push()
    copy.end()
    checkpoint(15)

    def fails(path, *more, **options):
        if path.name == "weights":
            raise UserError("the network is gone")
        put(path, *more, **options)

    put, copy = store.put, opened(config, monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="the network is gone"):
        patch.setattr(store, "put", fails)
        copy.push()
    copy.end()
    assert len(stand_ins.names(f"{config.workdir}/checkpoints/*/seal.json")) == 2
    copy = opened(config, monkeypatch)
    assert seals.steps_in(config.folder) == [5, 10, 15] and "checkpoint 15 was not on the bucket yet" in copy.notes[1]
    copy.push()
    copy.end()
    assert len(stand_ins.names(f"{config.workdir}/checkpoints/*/seal.json")) == 3
    fsspec.filesystem("s3").rm(f"{config.workdir}/checkpoints/15", recursive=True)
    fsspec.filesystem("s3").rm_file(f"{config.workdir}/checkpoints/10/seal.json")  # as of one that is half sent
    copy = opened(config, monkeypatch)
    copy.end()
    gone = [line.partition(",")[0] for line in copy.notes[1:]]
    assert sorted(gone) == ["checkpoint 10 is no longer on the bucket", "checkpoint 15 is no longer on the bucket"]
    assert len(os.listdir(config.folder / "set_aside")) == 2
    assert seals.steps_in(config.folder) == [5] and not stand_ins.names(f"{config.workdir}/checkpoints/10/*")
    for times in (2, 0):  # files that were set aside are sent, once
        copy, sent = opened(config, monkeypatch), []
        noted = lambda path, *more, sent=sent, **options: [sent.append(path), put(path, *more, **options)]
        monkeypatch.setattr(store, "put", noted)
        copy.push()
        copy.end()
        assert sum(path.name == "weights" for path in sent) == times
    fsspec.filesystem("s3").rm(config.workdir, recursive=True)
    with pytest.raises(UserError, match="is empty, and its working copy .* holds checkpoints of it; send them back"):
        opened(config, monkeypatch)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_bucket_that_cannot_be_used(tiny_config_file, monkeypatch, scheme):
    def refused(workdir):
        with pytest.raises(UserError) as error:
            train.main(["--config", str(tiny_config_file), "--workdir", f"{scheme}://{workdir}"])
        return str(error.value)

    store.write(store.Remote(f"{scheme}://bucket/other/file"), b"of somebody")
    assert "holds file, and no config.json of a run; name a new folder" in refused("bucket/other")
    assert f"{scheme}://no-such-bucket/run: cannot be read: no such bucket" in refused("no-such-bucket/run")
    assert "must name a folder in a bucket" in refused("bucket")
    for name in ("bucket/a*", "bucket/../x", "bucket//x"):
        assert "must not contain * ? [ ] { } # \\, an empty part" in refused(name)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    with pytest.raises(UserError, match="is on one machine, and `sft` and `dpo` use it from one process; mount the bucket"):
        bucket._process_index(replace(cli.read(str(tiny_config_file)), workdir=f"{scheme}://bucket/x"))
    with monkeypatch.context() as patch:
        patch.setattr("jax.distributed.is_initialized", lambda: True)
        patch.setattr("jax.process_count", lambda: 2)
        with pytest.raises(UserError, match="is on one machine, and this run has 2 processes on several; mount the bucket"):
            bucket._process_index(replace(cli.read(str(tiny_config_file)), workdir=f"{scheme}://bucket/x"))


@pytest.mark.parametrize(("missing", "says"), [("s3fs", "needs `pip install s3fs`"), ("credentials", "Unable to locate cred")])
def test_a_machine_that_is_not_set_up(config, monkeypatch, missing, says):
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    if missing == "s3fs":
        monkeypatch.setitem(sys.modules, "s3fs", None)
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3")
    else:
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
    with pytest.raises(UserError, match=f"{config.workdir}: .*{says}"):
        opened(config, monkeypatch)
    fsspec.get_filesystem_class("s3").clear_instance_cache() if missing != "s3fs" else None


def test_a_copy_of_a_bucket_says_how_to_join_its_metrics(tmp_path):
    (tmp_path / "metrics.jsonl.parts").mkdir()
    for read in (metrics.read, metrics.tail):
        with pytest.raises(UserError, match="metrics.jsonl: is in parts, as a bucket holds it; first run: cat "):
            read(tmp_path)
