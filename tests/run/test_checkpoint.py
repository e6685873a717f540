"""The run folder: what is kept, what comes back, what is refused."""

import dataclasses
import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax.base import cli, files, sharding
from tinyllama_jax.base import config as c
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core.losses import Batch
from tinyllama_jax.core.program import build
from tinyllama_jax.data import feed
from tinyllama_jax.data.export import litpkds as export_litpkds
from tinyllama_jax.run import checkpoint, initialize, metrics, seals
from tinyllama_jax.run import folder as run_folder

XY, XZ = ([{"manifest_sha256": h, "bos": False, "sha256": None} for h in names] for names in ("xy", "xz"))


@pytest.fixture
def config(tmp_path):
    return c.Config(
        workdir=str(tmp_path / "run"),
        model=c.Model(2, 32, 4, 2, 64, 104, 16),
        data=c.Data({"data/a": 0.7, "data/b": 0.3}),
        optim=c.Optim(4e-4, 4e-5, 10, 0.1, 1.0),
        train=c.Train(100, 128, 1),
        checkpoint=c.Checkpoint(10, keep=2, keep_every=40),
    )


@pytest.fixture
def tokenizer(tmp_path, tiny_data):
    (tmp_path / "tok").mkdir()
    shutil.copy(tiny_data / "512.model", tmp_path / "tok" / "tokenizer.model")
    return tmp_path / "tok"


def state_of(config, **mesh):
    mesh = sharding.make_mesh(c.Mesh(**mesh))
    program = build(config, mesh)
    state = program.init()
    noise = jax.tree.map(lambda a: a + jnp.arange(a.size, dtype=a.dtype).reshape(a.shape), state.opt_state)
    return program, jax.device_put(
        dataclasses.replace(state, step=jnp.int32(7), opt_state=noise), jax.tree.map(lambda s: s.sharding, program.state)
    )


def saved(config):
    write_checkpoint(checkpoint.Path(config.workdir), 5)


def write_checkpoint(run, step, files=("params/p", "train/t")):
    """A sealed checkpoint of some bytes."""
    partial = run / "checkpoints" / f"{step}{seals.PARTIAL}"
    for name in files:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(b"bytes of " + name.encode())
    seals.seal(run / "checkpoints", "")
    partial.rename(run / "checkpoints" / str(step))
    seals.remember(run, step)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])  # with fp16 the state holds a loss scale
def test_a_state_comes_back_bit_for_bit_on_another_mesh(config, compute):
    config = cli.override(config, {"model.precision": f"params=float32,compute={compute},output=float32"})
    _, state = state_of(config, data=1, fsdp=8)
    checkpoints = checkpoint.Checkpoints(config)
    assert checkpoints.latest() is None
    checkpoints.save(7, state)
    checkpoints.close()
    program, _ = state_of(config, data=2, fsdp=2, tensor=2)
    checkpoints = checkpoint.Checkpoints(config)
    restored = checkpoints.restore(checkpoints.latest(), program.state)
    checkpoints.close()
    same(state, restored)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(program.state), strict=True):
        assert leaf.sharding == wanted.sharding


def test_rotation_keeps_the_newest_every_fortieth_and_the_named(config):
    config = dataclasses.replace(config, checkpoint=c.Checkpoint(10, keep=2, keep_every=40, keep_steps="20,9_000"))
    _, state = state_of(config)
    checkpoints = checkpoint.Checkpoints(config)
    for step in (10, 20, 40, 50, 60, 70, 70):
        checkpoints.save(step, state)
    checkpoints.close()
    names = sorted(int(p.name) for p in (checkpoint.Path(config.workdir) / "checkpoints").iterdir())
    assert names == [20, 40, 60, 70]


def test_the_state_may_be_overwritten_once_save_returns(config):
    program, state = state_of(config)
    wanted = jax.device_get(state)
    checkpoints = checkpoint.Checkpoints(config)
    checkpoints.save(1, state)
    program.train(state, Batch(np.zeros((*program.shape, 17), np.uint16), np.full(program.shape, 17, np.int32)))  # donates it
    checkpoints.close()
    checkpoints = checkpoint.Checkpoints(config)
    same(wanted, checkpoints.restore(1, program.state))
    checkpoints.close()


def test_parameters_alone_for_those_who_want_the_weights(config, tokenizer):
    program, state = state_of(config)
    run_folder.open_run(config, XY, tokenizer)
    checkpoints = checkpoint.Checkpoints(config)
    checkpoints.save(7, state)
    checkpoints.close()
    params, read, step = checkpoint.load_params(config.workdir)
    assert step == 7 and read == config and all(isinstance(a, np.ndarray) for a in jax.tree.leaves(params))
    same(jax.device_get(state.params), params)
    restored = checkpoint.restore_params(config.workdir, checkpoint.find_step(config.workdir), program.state.params)
    same(state.params, restored)


def three(config):
    """A run folder with checkpoints of the steps 10, 20 and 30."""
    program, state = state_of(config)
    checkpoints = checkpoint.Checkpoints(config)
    for step in (10, 20, 30):
        checkpoints.save(step, state)
    checkpoints.close()
    files.write(checkpoint.Path(config.workdir) / "config.json", c.to_json(config))
    return program, checkpoint.Path(config.workdir)


def flip(file, at=None):
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    file.write_bytes(content)


def files_of(folder):
    return sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in seals.UNSEALED)


@pytest.fixture
def all_kept(config):
    return dataclasses.replace(config, checkpoint=c.Checkpoint(10, keep=5))


def test_any_file_that_changed_on_disk_is_noticed(all_kept):
    _, run = three(all_kept)
    newest = run / "checkpoints" / "30"
    files = files_of(newest)
    assert len(files) > 5 and {f.relative_to(newest).parts[0] for f in files} == {"params", "train"}
    assert seals.recover(all_kept) == []
    for file in files:
        before = file.read_bytes()
        if before:
            flip(file)
            assert str(file.relative_to(newest)) in checkpoint.damage(newest)
            file.write_bytes(before[:-1])
            assert str(file.relative_to(newest)) in checkpoint.damage(newest)
        file.unlink()
        assert str(file.relative_to(newest)) in checkpoint.damage(newest)
        file.write_bytes(before)
    assert checkpoint.damage(newest) is None
    for name in (".DS_Store", "params/extra", "train/.nfs01", "lost+found/x", "Thumbs.db"):
        (newest / name).parent.mkdir(exist_ok=True)
        (newest / name).write_text("left here")
    assert checkpoint.damage(newest) is None and seals.recover(all_kept) == []


@pytest.mark.parametrize("how", ["empty", "gone"])
def test_what_the_seal_leaves_out_is_not_needed(all_kept, how):
    program, run = three(all_kept)
    files = [f for f in (run / "checkpoints" / "30").rglob("*") if f.name in seals.UNSEALED and f.name != seals.SEAL]
    assert len(files) == 4
    for file in files:
        file.write_bytes(b"") if how == "empty" else file.unlink()
    assert seals.recover(all_kept) == []
    with checkpoint.Checkpoints(all_kept) as checkpoints:
        assert checkpoints.latest() == 30
        same(state_of(all_kept)[1], checkpoints.restore(30, program.state))


@pytest.mark.parametrize("how", ["flip", "truncate", "no seal", "empty seal"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(all_kept, how):
    program, run = three(all_kept)
    newest = run / "checkpoints" / "30"
    file = max(files_of(newest), key=lambda f: f.stat().st_size) if how in ("flip", "truncate") else newest / seals.SEAL
    if how == "flip":
        flip(file)
    elif how == "no seal":
        file.unlink()
    else:
        file.write_bytes(b"" if how == "empty seal" else file.read_bytes()[:100])
    for reads in (
        checkpoint.load_params,
        lambda run: checkpoint.restore_params(run, checkpoint.find_step(run), program.state.params),
    ):
        if how == "no seal":  # passed over
            assert checkpoint.load_params(run)[2] == 20
        if "params" in file.parts or how == "empty seal":
            with pytest.raises(UserError, match="30: is damaged: .*; step 20 is whole"):
                reads(run)
    (note,) = seals.recover(all_kept)
    assert note.startswith("checkpoint 30 is not used (") and str(run / "set_aside" / "30-") in note
    assert checkpoint.steps_in(run) == [10, 20] and len(list((run / "set_aside").iterdir())) == 1
    checkpoints = checkpoint.Checkpoints(all_kept)
    assert checkpoints.latest() == 20
    _, state = state_of(all_kept)
    checkpoints.save(30, state)  # and the run comes there again
    checkpoints.close()
    assert seals.recover(all_kept) == [] and checkpoint.steps_in(run) == [10, 20, 30]


def test_if_all_are_damaged_nothing_is_moved_and_nothing_starts_from_scratch(all_kept):
    _, run = three(all_kept)
    for step in (10, 20, 30):
        (run / "checkpoints" / str(step) / seals.SEAL).unlink()
    with pytest.raises(UserError, match=r"has no checkpoint to resume from \(30: seal.json is missing"):
        seals.recover(all_kept)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["10", "20", "30"]


def test_a_new_skip_rewinds_to_before_it_and_an_old_one_does_not(all_kept):
    _, run = three(all_kept)
    late = cli.override(all_kept, {"data.skip": "31:40"})
    assert seals.recover(late) == []
    skipping = cli.override(all_kept, {"data.skip": "12:13"})
    notes = seals.recover(skipping)
    assert checkpoint.steps_in(run) == [10] and len(notes) == 2 and "trained on other batches" in notes[0]
    _, state = state_of(skipping)
    checkpoints = checkpoint.Checkpoints(skipping)
    checkpoints.save(20, state)
    checkpoints.close()
    assert seals.recover(skipping) == [] and checkpoint.steps_in(run) == [10, 20]
    with pytest.raises(UserError, match=r"\(20: trained on other batches"):
        seals.recover(cli.override(all_kept, {"data.skip": "12:13,3:4"}))
    assert checkpoint.steps_in(run) == [10, 20]


@pytest.mark.parametrize("skip", ["", "3:4", "12:14", "3:4,12:13"])
def test_a_skip_that_is_forgotten_is_a_mistake_and_no_wish_to_go_back(all_kept, skip):
    skipping = cli.override(all_kept, {"data.skip": "12:13"})
    _, run = three(skipping)
    with pytest.raises(UserError, match=f"--data.skip={skip}: checkpoint 30 was trained with --data.skip=12:13; give that"):
        seals.recover(cli.override(all_kept, {"data.skip": skip}))
    assert checkpoint.steps_in(run) == [10, 20, 30]
    for step in (20, 30):
        (run / "checkpoints" / str(step)).rename(run / str(step))
    assert seals.recover(all_kept) == []


STRAYS = ("0019", "²", "১৭", "15.old", "17 copy", "notes.txt", "+18", "1e1")


def test_what_is_no_checkpoint_is_passed_over_and_named(config, capsys):
    run = checkpoint.Path(config.workdir)
    for step in (10, 15):
        write_checkpoint(run, step)
    folder = run / "checkpoints"
    for name in ("17", *STRAYS[:5], "16.orbax-checkpoint-tmp"):
        (folder / name).mkdir()
    for name in ("18", *STRAYS[5:], ".DS_Store", f"5{seals.OLD}"):
        (folder / name).write_text("x")
    assert checkpoint.steps_in(run) == [10, 15]
    files.write(run / "config.json", c.to_json(config))
    assert checkpoint.find_step(run) == 15
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(name in said for name in ("17", "18", *STRAYS)) and "-tmp" not in said
    with pytest.raises(UserError, match="has checkpoints of the steps 10, 15 "):
        checkpoint.find_step(run, 17)
    notes = seals.recover(config)
    assert len(notes) == 3 and all(name in notes[2] for name in STRAYS) and "17" in notes[1] and "18" in notes[0]
    assert {name for name in os.listdir(folder) if name.isascii() and name.isdigit()} == {"10", "15", "0019"}
    assert len(os.listdir(run / "set_aside")) == 2


def test_a_save_is_not_hindered_by_what_lies_there(config):
    _, state = state_of(config)
    folder = checkpoint.Path(config.workdir) / "checkpoints"
    with checkpoint.Checkpoints(config) as checkpoints:
        for name in ("²", "0010", "30", "10.old", "lost+found"):
            (folder / name).mkdir()
        (folder / "20").write_text("not a checkpoint")
        for step in (10, 20, 30):
            checkpoints.save(step, state)
        checkpoints.save(30, state)
    assert checkpoint.steps_in(config.workdir) == [20, 30] and seals.last_saved(folder.parent) == 30
    assert {p.name for p in folder.iterdir()} == {"20", "30", "²", "0010", "10.old", "lost+found"}
    assert {p.name[:3] for p in (folder.parent / "set_aside").iterdir()} == {"20-", "30-"}


def altered(**changes):
    return lambda seal: json.dumps(json.loads(seal) | changes)


@pytest.mark.parametrize(
    "damaged",
    [
        altered(files=[]),
        altered(files=None),
        altered(files={}),
        altered(skip=5),
        altered(skip="3:4"),
        altered(step=14),
        altered(sha256="0" * 64),
        lambda seal: "null",
        lambda seal: "[" * 100_000,
        lambda seal: "{}",
        lambda seal: seal[:-10],
        lambda seal: seal.replace("params/p", "params/../../../../etc/hostname"),
        lambda seal: "\udcff",
    ],
)
def test_a_damaged_seal_condemns_its_checkpoint_alone(config, damaged):
    run = checkpoint.Path(config.workdir)
    for step in (10, 15):
        write_checkpoint(run, step)
    seal = run / "checkpoints" / "15" / seals.SEAL
    seal.write_text(damaged(seal.read_text()), errors="surrogateescape")
    files.write(run / "config.json", c.to_json(config))
    with pytest.raises(UserError, match=r"15: is damaged: seal.json is damaged; step 10 is whole"):
        checkpoint.load_params(run)
    assert seals.has_state(run, 15)
    (note,) = seals.recover(config)
    assert note.startswith("checkpoint 15 is not used (seal.json is damaged)") and checkpoint.steps_in(run) == [10]


def test_a_checkpoint_of_another_step_is_not_that_of_its_name(config):
    run = checkpoint.Path(config.workdir)
    write_checkpoint(run, 15)
    shutil.copytree(run / "checkpoints" / "15", run / "checkpoints" / "100")
    (note,) = seals.recover(config)
    assert note.startswith("checkpoint 100 is not used (is of step 15)")


@pytest.mark.parametrize("name", [seals.SEAL, "params/p"])
def test_what_cannot_be_read_is_not_damaged(config, monkeypatch, name):
    run = checkpoint.Path(config.workdir)
    for step in (10, 15):
        write_checkpoint(run, step)
    opened, unreadable = os.open, run / "checkpoints" / "15" / name
    for number in (errno.EACCES, errno.ESTALE, errno.EIO):

        def refuses(path, *args, number=number, **more):
            if str(path) == str(unreadable):
                raise OSError(number, os.strerror(number), str(path))
            return opened(path, *args, **more)

        monkeypatch.setattr(os, "open", refuses)
        with pytest.raises(OSError, match=os.strerror(number)):
            seals.recover(config)
        monkeypatch.undo()
    unreadable.unlink()
    unreadable.symlink_to(unreadable)
    with pytest.raises(OSError, match="symbolic links"):
        seals.recover(config)
    assert sorted(os.listdir(run / "checkpoints")) == ["10", "15"]


def past_of(config, tokenizer):
    """A run folder that has trained to step 15, without its checkpoints."""
    run = checkpoint.Path(config.workdir)
    run_folder.open_run(config, XY, tokenizer)
    for step in (10, 15):
        write_checkpoint(run, step)
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {i}}}\n' for i in range(1, 18)))
    (run / "checkpoints").rename(run.with_name("elsewhere"))
    return run


@pytest.mark.parametrize("left", ["nothing", "empty", "strays", "a link"])
def test_a_run_whose_checkpoints_are_gone_is_refused_until_told_to_start_over(config, tokenizer, left):
    run = past_of(config, tokenizer)
    if left == "a link":
        (run / "checkpoints").symlink_to("/nowhere/at/all")
    elif left != "nothing":
        (run / "checkpoints" / ("17" if left == "strays" else "")).mkdir(parents=True)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for given in ("0", "10", "16"):
        with pytest.raises(UserError, match=r"gone, the newest of step 15; .*start again with --init.start_over=15"):
            run_folder.open_run(cli.override(config, {"init.start_over": given}), XY, tokenizer)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    again = cli.override(config, {"init.start_over": "15", "train.seed": "7"})
    assert run_folder.open_run(again, XY, tokenizer) == [] and seals.recover(again) == []
    aside = {path.name.partition("-")[0]: path for path in (run / "set_aside").iterdir()}
    assert aside["metrics.jsonl"].read_bytes() == before[run / "metrics.jsonl"] and not (run / "metrics.jsonl").exists()
    assert aside["config.json"].read_bytes() == before[run / "config.json"]
    assert {"tokenizer", "data.json", "versions.json", "newest.json"} <= aside.keys() and seals.last_saved(run) == 0
    assert checkpoint.load_config(run) == again
    run_folder.open_run(again, XY, tokenizer)  # killed before its first checkpoint: the same command goes on
    assert len(list((run / "set_aside").iterdir())) == len(aside)
    write_checkpoint(run, 20)
    run_folder.open_run(again, XY, tokenizer)
    assert checkpoint.steps_in(run) == [20]
    shutil.rmtree(run / "checkpoints")  # and the word was for the other past
    with pytest.raises(UserError, match="--init.start_over=15: .* the newest of step 20"):
        run_folder.open_run(again, XY, tokenizer)


@pytest.mark.parametrize("to", ["nowhere", "itself"])
@pytest.mark.parametrize("name", ["newest.json", "data.json", "versions.json", "metrics.jsonl", "config.json"])
def test_a_file_that_exists_but_cannot_be_read_is_not_taken_for_absent(config, tokenizer, name, to):
    """A dangling link or a loop, as a disk that is not mounted leaves them."""
    run = past_of(config, tokenizer)
    if name != "newest.json":
        run.with_name("elsewhere").rename(run / "checkpoints")
    (run / name).unlink()
    (run / name).symlink_to(name if to == "itself" else "/nowhere/at/all")
    with pytest.raises(OSError, match=f"{name}|No such file|symbolic links"):
        run_folder.open_run(config, XY, tokenizer)
        seals.recover(config)
        metrics.truncate_after(run / "metrics.jsonl", 15)
    assert (run / name).is_symlink()


def test_a_run_that_goes_back_keeps_its_metrics(config, tokenizer):
    run = past_of(config, tokenizer)
    run.with_name("elsewhere").rename(run / "checkpoints")
    (run / "checkpoints" / "15").rename(run / "15")
    (note,) = seals.recover(config)
    assert note.startswith("step 15 was saved once, and the run resumes from 10;")
    (kept,) = (run / "set_aside").iterdir()
    assert kept.read_bytes() == (run / "metrics.jsonl").read_bytes() and str(kept) in note
    assert seals.last_saved(run) == 10 and seals.recover(config) == []


def test_a_batch_ramp_that_the_run_did_not_have_is_refused(config):
    later = cli.override(config, {"train.batch_ramp": f"{config.train.tokens_per_step}:{2 * config.train.tokens_per_step}"})
    with pytest.raises(UserError, match=r"^--train.batch_ramp=\d+:\d+: the run in .* has none; restore that value"):
        run_folder._compare(config, later, 20)


def test_a_run_that_has_forgotten_its_checkpoints_keeps_its_metrics(config, tokenizer):
    run = past_of(config, tokenizer)
    (run / "newest.json").unlink()  # or of a version that did not write it
    before = (run / "metrics.jsonl").read_bytes()
    (note,) = seals.recover(config)
    (kept,) = (run / "set_aside").iterdir()
    assert note == f"the run has no checkpoint; its metrics so far are now in {kept}" and kept.read_bytes() == before


def test_other_versions_are_said_and_the_old_ones_kept(config, tokenizer):
    run_folder.open_run(config, XY, tokenizer)
    run = checkpoint.Path(config.workdir)
    write_checkpoint(run, 5)
    assert run_folder.open_run(config, XY, tokenizer) == []
    now = json.loads((run / "versions.json").read_text())
    then = now | {"packages": now["packages"] | {"jax": "0.0.1"}, "devices": "8 x abacus"}
    del then["before"]
    (run / "versions.json").write_text(json.dumps(then))
    (note,) = run_folder.open_run(config, XY, tokenizer)
    assert f"jax 0.0.1 then, {jax.__version__} now" in note and "devices 8 x abacus then" in note and "numpy" not in note
    assert json.loads((run / "versions.json").read_text()) == now | {"before": [{"until_step": 5, **then}]}
    assert run_folder.open_run(config, XY, tokenizer) == []
    assert json.loads((run / "versions.json").read_text())["before"] == [{"until_step": 5, **then}]


def test_litpkds_files_are_held_to_what_the_run_saw_first(tiny_config, tiny_data, tmp_path):
    export_litpkds.export(tiny_data / "a", "train", tmp_path / "data", "train_a", 10 * 17)
    keys = {"data.sources": str(tmp_path / "data" / "train_a"), "workdir": str(tmp_path / "run")}

    def opened(verify):
        config = cli.override(tiny_config, keys | {"data.verify": verify})
        sources = feed.open_sources(config)
        assert len(feed.verify(config, sources)) == (verify == "true")
        return run_folder.open_run(config, initialize.described(sources), sources[0].tokenizer)

    checksum = lambda: json.loads((tmp_path / "run" / "data.json").read_text())[0].get("sha256")
    assert opened("false") == [] and checksum() is None
    write_checkpoint(tmp_path / "run", 5)
    assert opened("true") == [] and (first := checksum())
    assert opened("false") == [] and checksum() == first
    flip(next((tmp_path / "data").glob("*.bin")), at=-1)
    assert opened("false") == []  # its header is as it was
    with pytest.raises(UserError, match=r"train_a: its files are not those that the run has trained on; restore the old files"):
        opened("true")
    assert checksum() == first


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.ESTALE])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_save_that_fails_is_an_error_of_the_disk_and_the_one_before_is_kept(config, monkeypatch, number, as_text):
    _, state = state_of(config)
    checkpoints = checkpoint.Checkpoints(config)
    checkpoints.save(10, state)
    checkpoints.check(wait=True)

    def fails(folder, skip):  # in a thread of Orbax's
        error = OSError(number, os.strerror(number), "the file")
        raise ValueError(f"INTERNAL: Error writing file: {os.strerror(number)}") if as_text else error

    monkeypatch.setattr(seals, "seal", fails)
    checkpoints.save(20, state)
    with pytest.raises(OSError, match=os.strerror(number)) as error:
        while True:  # each step looks
            checkpoints.check()
    assert error.value.errno == number and checkpoint.steps_in(config.workdir) == [10]
    assert seals.last_saved(checkpoint.Path(config.workdir)) == 10
    checkpoints.__exit__(OSError)  # and does not wait


@pytest.mark.parametrize("with_moments", [True, False])
def test_an_import_can_be_gone_on_with_if_it_has_moments(config, tokenizer, with_moments):
    program, state = state_of(config)
    params = jax.device_get(state.params)
    moments = (jax.tree.map(lambda a: a * 2, params), jax.tree.map(np.abs, params)) if with_moments else None
    checkpoint.save_import(checkpoint.Path(config.workdir), config, params, moments, step=50)
    same(params, checkpoint.load_params(config.workdir, 50)[0])
    checkpoints = checkpoint.Checkpoints(config)
    if with_moments:
        restored = checkpoints.restore(50, program.state)
        assert int(restored.step) == 50 and int(restored.opt_state[0].count) == 50
        same(moments, (restored.opt_state[0].mu, restored.opt_state[0].nu))
    else:
        with pytest.raises(UserError, match="holds weights only; start from it with --workdir=NEW --init.from"):
            run_folder.open_run(cli.override(config, {"model.d_ff": "32"}), XY, tokenizer)
    checkpoints.close()


def test_the_run_describes_itself(config, tokenizer):
    assert run_folder.open_run(config, XY, tokenizer) == []
    run = checkpoint.Path(config.workdir)
    assert checkpoint.load_config(run) == config
    assert json.loads((run / "data.json").read_text())[1] == {
        "path": "data/b",
        "weight": 0.3,
        "manifest_sha256": "y",
        "bos": False,
        "sha256": None,
    }
    assert (run / "tokenizer" / "tokenizer.model").read_bytes() == (tokenizer / "tokenizer.model").read_bytes()
    assert set(run_folder.PACKAGES) == set(json.loads((run / "versions.json").read_text())["packages"])
    assert run_folder.open_run(config, XY, tokenizer / "tokenizer.model") == []  # a file, as LITPKDS files have it
    assert (run / "tokenizer" / "tokenizer.model").read_bytes() == (tokenizer / "tokenizer.model").read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.d_ff": "32"}, r"--model.d_ff=32: the run in .* has 64"),
        ({"train.seed": "1"}, r"--train.seed=1: the run in .* has 0"),
        ({"train.tokens_per_step": "256"}, "--train.tokens_per_step=256"),
        (
            {"data.sources": "data/a:0.6,data/b:0.4"},
            r"trained on data/a:0.7,data/b:0.3, and these are other mixture weights",
        ),
    ],
)
def test_a_run_is_not_gone_on_with_as_another(config, tokenizer, change, words):
    run_folder.open_run(config, XY, tokenizer)
    assert run_folder.open_run(cli.override(config, {"train.steps": "90"}), XY, tokenizer) == []  # no checkpoint, no past
    run_folder.open_run(config, XY, tokenizer)
    saved(config)
    with pytest.raises(UserError, match=words):
        run_folder.open_run(cli.override(config, change), XY, tokenizer)
    assert checkpoint.load_config(config.workdir) == config


def test_what_may_change_is_said_or_free(config, tokenizer, tiny_data):
    run_folder.open_run(config, XY, tokenizer)
    saved(config)
    moved = cli.override(
        config, {"data.sources": "elsewhere/a:0.7,elsewhere/b:0.3", "mesh.data": "2", "train.seqs_per_device": "2"}
    )
    assert run_folder.open_run(moved, XY, tokenizer) == []
    longer = cli.override(moved, {"train.steps": "200"})
    assert run_folder.open_run(longer, XY, tokenizer) == [
        "changed since this run was last started: train.steps from 100 to 200"
    ]
    with pytest.raises(UserError, match="and elsewhere/b has other contents"):
        run_folder.open_run(longer, XZ, tokenizer)
    shutil.copy(tiny_data / "400.model", tokenizer / "tokenizer.model")
    with pytest.raises(UserError, match="were not prepared with the tokenizer of the run"):
        run_folder.open_run(longer, XY, tokenizer)


def test_find_step_names_what_there_is(config, tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        checkpoint.load_params(tmp_path / "nowhere")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(c.to_json(config))
    with pytest.raises(UserError, match="has no checkpoint yet"):
        checkpoint.load_params(tmp_path / "run")
    for step in (10, 9, 1000000, 960000):
        write_checkpoint(tmp_path / "run", step)
    (tmp_path / "run" / "checkpoints" / "1000001.orbax-checkpoint-tmp-0").mkdir()
    assert checkpoint.find_step(tmp_path / "run") == 1000000  # by number: the original's sort picked 960000
    with pytest.raises(UserError, match="steps 9, 10, 960000, 1000000"):
        checkpoint.find_step(tmp_path / "run", 11)


def test_another_model_is_named(config):
    theirs = dataclasses.replace(config.model, n_layers=3)
    with pytest.raises(UserError, match="--model.n_layers=2: X is of a model with n_layers=3"):
        run_folder.check_same_model(config.model, theirs, "X")
    assert not run_folder.check_same_model(config.model, dataclasses.replace(config.model, seq_len=64, remat="full"), "X")
    longer = dataclasses.replace(config.model, rope_scaling=4.0)  # the same weights, made to reach further
    assert run_folder.check_same_model(longer, config.model, "X") == [
        "X was trained with model.rope_scaling=1.0; here it is 4.0"
    ]
    stretched = dataclasses.replace(longer, rope_type="ntk")
    assert run_folder.check_same_model(stretched, longer, "X") == ["X was trained with model.rope_type=linear; here it is ntk"]
    same, wide = (dataclasses.replace(config.model, head_dim=factor * config.model.d_head) for factor in (1, 2))
    assert not run_folder.check_same_model(same, config.model, "X")
    with pytest.raises(UserError, match=r"--model.head_dim=\d+: X is of a model with head_dim=0"):
        run_folder.check_same_model(wide, config.model, "X")


def test_the_folder_of_init_from_is_not_the_run(config, tokenizer):
    foreign = checkpoint.Path(config.workdir)
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "llama"}')
    for changes, words in (({"init.from": config.workdir}, "is also --init.from"), ({}, "is not a config of this version")):
        with pytest.raises(UserError, match=words):
            run_folder.open_run(cli.override(config, changes), XY, tokenizer)
    assert [p.name for p in foreign.iterdir()] == ["config.json"]


def test_a_folder_of_something_else_is_left_alone(config, tokenizer):
    (checkpoint.Path(config.workdir) / "tokenizer").mkdir(parents=True)
    (checkpoint.Path(config.workdir) / "tokenizer" / "precious").touch()
    with pytest.raises(UserError, match="is not a run folder, and holds other folders; name a new one"):
        run_folder.open_run(config, XY, tokenizer)
    assert (checkpoint.Path(config.workdir) / "tokenizer" / "precious").is_file()


def test_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write(path, "old")
    monkeypatch.setattr(files.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        files.write(path, "new")
    assert path.read_text() == "old"
