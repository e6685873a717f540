"""Programs that were compiled otherwise, profiles that are asked for, memory in use, and what processes agree on."""

import contextlib
import json
import re
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tinyllama_jax import train
from tinyllama_jax.base import cli, sharding
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import program, xla
from tinyllama_jax.run import cluster, profiler, programs

OPTIONS = ("--optim.schedule=constant", "--train.deterministic=true", "--checkpoint.every=2", "--log.eval_every=1000")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Whose program is compiled in a third of the time."""
    real = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda mesh: real(mesh, jax.devices()[:1]))


def command(config_file, run, *more):
    return ["--config", str(config_file), f"--workdir={run}", *OPTIONS, *more]


def known(run):
    return json.loads((run / "programs.json").read_text())


def test_a_resumed_run_says_whether_it_is_compiled_as_before(tiny_config_file, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    for steps in (2, 3):
        assert train.main(command(tiny_config_file, run, f"--train.steps={steps}")) == 0
    ((step, first),) = [(one["step"], one["program"]) for one in known(run)]
    assert (
        step == 1 and f"step 3: the compiled step ({first}) is the one that trained from step 1 on\n" in capsys.readouterr().out
    )
    monkeypatch.setattr(xla, "compiler_options", lambda config, mesh: {"xla_disable_hlo_passes": "algsimp"})
    assert train.main(command(tiny_config_file, run, "--train.steps=4")) == 0
    new = known(run)[1]
    line = f"step 4: XLA made another program of the same step ({new['program']}) than the one that trained from step 1 on "
    assert f"{line}({first}): RUN/compiled was deleted or is not whole" in capsys.readouterr().out
    (event,) = (e for e in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if e["event"] == "program")
    assert event["step"] == new["step"] == 4 and event["text"].startswith(line)


def test_when_a_program_is_said_to_be_another(tiny_config, tmp_path, monkeypatch):
    config = cli.override(tiny_config, {"workdir": str(tmp_path), "train.batch_ramp": "256:256", "train.seqs_per_device": "1"})
    exact = cli.override(config, {"train.deterministic": "true"})
    two = [jax.jit(operation).lower(np.ones(8, np.float32)).compile() for operation in (jax.numpy.sin, jax.numpy.cos)]
    sin, cos = (program.CompiledStep(compiled, "a") for compiled in two)
    assert programs.record(config, 1, False, sin) == ("", False)
    assert programs.record(config, 3, False, cos) == ("", False)  # of the first step of 256 tokens
    assert [(one["step"], one["tokens"]) for one in known(tmp_path)] == [(1, 128), (3, 256)]
    assert programs.record(config, 5, True, cos) == ("", False) and len(known(tmp_path)) == 2
    line, otherwise = programs.record(exact, 5, True, cos)
    assert line.endswith(") is the one that trained from step 3 on") and not otherwise
    line, otherwise = programs.record(exact, 5, True, cos._replace(source="b"))
    assert line == "step 5: the step is not the one that trained from step 3 on: settings, devices, versions or code changed"
    assert not otherwise and programs.record(config, 5, True, cos._replace(source="b")) == ("", False)
    mute = program.CompiledStep(SimpleNamespace(as_text=lambda: None), "a")  # as of some backends
    assert programs.record(exact, 5, True, mute)[0].startswith("step 5: it is not known whether the compiled step is the one")
    programs.record(exact, 5, True, cos._replace(source="b"))
    line, otherwise = programs.record(config, 4, True, sin)  # what trained from step 5 on was thrown away
    assert "XLA made another program of the same step" in line and otherwise
    assert [one["step"] for one in known(tmp_path)] == [1, 3, 4]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # without train.deterministic its bits differ anyway
    assert programs.record(config, 6, True, cos) == ("", True) and programs.record(exact, 7, True, sin)[0]
    (tmp_path / "programs.json").write_text("[{")
    with pytest.raises(UserError, match=r"programs.json.*; delete it: it only tells whether the program changes"):
        programs.record(config, 8, True, sin)


def test_the_places_in_the_source_are_no_part_of_a_program():
    def compiled(reduce):
        inputs = [np.ones((8, n), np.float32) for n in (8, 4)]
        return jax.jit(lambda x, w: reduce(x.T @ w)).lower(*inputs).compile()

    one = compiled(jax.numpy.sum)
    text = one.as_text()  # another text would need another line here, and no cache, whose key leaves these places out, too
    moved = re.sub(r'op_name="[^"]*"', 'op_name="x"', text).replace("test_watching.py", "other.py")
    assert "test_watching.py" in text and 'op_name="x"' in moved
    assert xla.fingerprint(SimpleNamespace(as_text=lambda: moved)) == xla.fingerprint(one)
    assert xla.fingerprint(one) != xla.fingerprint(compiled(jax.numpy.max))


# -- profiles, memory --------------------------------------------------------------------------------------------------------


def test_steps_are_profiled_when_a_file_asks_for_it(tiny_config_file, tmp_path, capsys, monkeypatch):
    """Also: a run that ends within the profile, and the memory of devices that tell it."""
    run = tmp_path / "run"
    monkeypatch.setattr(xla, "memory", lambda: (3 << 30, 8 << 30))
    monkeypatch.setattr(profiler, "EVERY", 0.0)
    real, asked = cluster.Agreement.after, []

    def after(self, step_saved):
        if step_saved is not None and not asked:
            asked.append((run / "profile").write_text(""))
        return real(self, step_saved)

    monkeypatch.setattr(cluster.Agreement, "after", after)
    assert train.main(command(tiny_config_file, run, "--train.steps=4", "--log.profile=4:4")) == 0
    out = capsys.readouterr().out
    assert "steps 2-4 are profiled" in out and not (run / "profile").exists()
    assert [path.name for path in (run / "tensorboard/plugins/profile").iterdir()] == ["steps_2-4"]
    assert "memory: 3.00 GiB of 8.00 in use at most so far; the compiler counted 0.0" in out
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["memory_peak_gib"] == 3.0 for row in rows)


@pytest.mark.parametrize(
    ("profile", "start", "words"),
    [
        ("5:7", 10, "log.profile=5:7: these steps are past, and are not profiled: the run goes on from step 10"),
        ("5:12", 10, "log.profile=5:12: profiled from step 11 on, the first of this start, with its compilation"),
        ("1:2", 0, "log.profile=1:2: profiled from step 1 on, the first of this start, with its compilation"),
        ("12:13", 10, None),
        ("30:31", 0, "log.profile=30:31: nothing will be profiled: the run ends at step 24"),
    ],
)
def test_what_is_not_profiled_is_said(tiny_config, tmp_path, profile, start, words):
    lines = []
    config = cli.override(tiny_config, {"log.profile": profile, "workdir": str(tmp_path), "train.epochs": "1"})
    profiler.Profiler(config, start, lines.append, lambda: None, None)
    assert lines == ([words] if words else [])


def test_a_profile_that_cannot_begin_or_be_written_is_said_and_the_run_goes_on(tiny_config, tmp_path):
    lines = []
    config = cli.override(tiny_config, {"log.profile": "2:3", "workdir": str(tmp_path)})
    own = profiler.Profiler(config, 0, lines.append, lambda: None, lambda what: contextlib.nullcontext())
    with jax.profiler.trace(tmp_path / "other"):  # only one can be made at a time
        for step in (2, 3):
            with own.step(step):
                pass
    own.next_steps(2)
    (tmp_path / "tensorboard").write_text("")  # where the folder should be
    for step in range(3, 8):
        with own.step(step):
            pass
    assert [line.partition(": ")[0] for line in lines] == ["steps 2 to 3 cannot be profiled", "steps_3-7"]
    assert "cannot be written: " in lines[1] and [p.name for p in tmp_path.glob("*profile*")] == []


def test_the_most_memory_of_any_device(monkeypatch):
    stats = [{"peak_bytes_in_use": 5, "bytes_limit": 9}, {"peak_bytes_in_use": 7, "bytes_limit": 9}]
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda of=of: of) for of in stats])
    assert xla.memory() == (7, 9)
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: None)])
    assert xla.memory() == (0, 0)


# -- agreement ---------------------------------------------------------------------------------------------------------------


def test_a_wish_is_granted_once(monkeypatch):
    """Of several processes a wish is known one call later, and is still there in that call."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    due, asked, stop = [False], [False], []
    checkpoints = SimpleNamespace(due=lambda: due[0], fits=lambda: len(stop) < 2)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    agreement = cluster.Agreement(mesh, stop, checkpoints, lambda: asked[0])

    def calls(n):
        return [(a.stopping, a.save, a.profile) for a in (agreement.after(False) for _ in range(n))]

    assert calls(2) == [(None, False, False)] * 2
    due[0] = True
    assert calls(2) == [(None, False, False), (None, True, False)]
    due[0] = False  # the save has begun
    assert calls(2) == [(None, False, False)] * 2
    asked[0] = True
    assert calls(2) == [(None, False, False), (None, False, True)]
    asked[0] = False
    assert calls(2) == [(None, False, False)] * 2
    asked[0], _ = True, stop.append(signal.SIGHUP)  # 1, the smallest number
    assert agreement.signal() is None and calls(1) == [(signal.SIGHUP, True, False)]
