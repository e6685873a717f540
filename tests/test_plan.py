"""The plan's arithmetic, by hand and against programs compiled here for virtual devices; the command as a user runs it."""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tinyllama_jax import plan
from tinyllama_jax.base import cli, dims, sharding
from tinyllama_jax.base import config as c
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.planning import compiled, hlo, laws, report, search, targets, timing

ROOT = Path(__file__).parents[1]
assert len(jax.devices()) == 8  # asked for here, so that a machine of fewer takes some of them
FP32 = "params=float32,compute=float32,output=float32"
# S = 16 is less than one block of queries: attention is two plain matmuls
MODEL = c.Model(3, 64, 4, 2, 96, 128, 16, precision=FP32, residual="float32", attention="xla")


def config_of(remat="none", mesh=(2, 2, 2), seqs=2, accumulation=2):
    train = c.Train(10, accumulation * seqs * mesh[0] * mesh[1] * MODEL.seq_len, seqs)
    model = dataclasses.replace(MODEL, remat=remat)
    return c.Config("x", model, c.Data({"x": 1}), c.Optim(1e-3, 1e-4, 2, 0.1, 1.0), train, c.Checkpoint(1), c.Mesh(*mesh))


def step_of(**how):
    return compiled.compile_step(config_of(**how), targets.machine("cpu:8"))


@pytest.fixture(scope="module", autouse=True)
def no_cache():
    """As the command has it: a program from the cache leaves no record of its memory."""

    def use(cache):
        jax.config.update("jax_enable_compilation_cache", cache)
        compilation_cache.reset_cache()  # else a process that has used the cache continues to

    before = jax.config.jax_enable_compilation_cache
    use(False)
    yield
    use(before)


@pytest.fixture(scope="module")
def none():
    return step_of()


@pytest.fixture(scope="module")
def full():
    return step_of(remat="full", mesh=(1, 8, 1))


def test_executed_flops_by_hand(none, full):
    """Forward once, backward twice, and attention's scores once more; with remat "full" the layers' forward too, but for the
    last matmul of each."""
    tokens = none.config.train.tokens_per_step
    layers = sum(dims.n_elements(p, MODEL) for p in dims.PARAMETERS if p.fan_in and p.dims[0] == "L")
    attention = 4 * MODEL.n_layers * MODEL.n_heads * MODEL.d_head * MODEL.seq_len  # a single block sees all of S x S
    forward = 2 * layers + attention
    head = 3 * 2 * 64 * 128
    assert none.asked["flops"] == none.executed["flops"] == tokens * (3 * forward + attention // 2 + head)
    down = 2 * MODEL.n_layers * MODEL.d_ff * MODEL.d_model
    tokens = full.config.train.tokens_per_step
    assert full.asked["flops"] == tokens * (4 * forward + attention // 2 - down + head)
    assert full.executed["flops"] == full.asked["flops"] - tokens * attention // 2  # XLA finds q k' there twice


def test_matmuls_of_a_layer_are_counted(none, full):
    """q k v o gate up down forward, two for each backward, and with remat "full" six again; attention's own are not counted."""
    for found, backward in ((none, 14), (full, 20)):
        for of in (found.asked, found.executed):
            assert (of["forward"], of["backward"]) == (7, backward)
        assert found.recomputed == 0
    again = none._replace(executed=none.asked + none.asked)
    assert again.recomputed == pytest.approx(1)


def test_a_step_that_does_not_fit_has_no_predicted_time(none):
    out = report.prediction(none._replace(peak=2**60), argparse.Namespace(mfu=None, price=None))
    assert out["no_prediction"] == "the step does not fit a device's memory"
    assert {value for key, value in out.items() if key != "no_prediction"} == {None}


def test_a_step_whose_attention_has_other_rates_is_named():
    config = cli.read(str(ROOT / "configs/3t.py"))
    assert report._caveats(config) == []
    for key, value in {"data.document_mask": "true", "model.seq_len": "4096", "model.n_heads": "16"}.items():
        assert len(report._caveats(cli.override(config, {key: value}))) == 1, key


def test_memory_by_kind_is_what_the_program_holds(none, full):
    n = dims.n_parameters(MODEL)
    for found, parts in ((none, 4), (full, 8)):
        split = sum(dims.n_elements(p, MODEL) for p in dims.PARAMETERS if "D" in p.dims and len(p.dims) > 2)
        assert n / parts <= found.memory["params"] / 4 < (n - split) + split / parts
        assert found.memory["optimizer"] == 2 * found.memory["params"] + 4  # and a counter
        assert found.memory["params"] < found.memory["gradients"] < 2.5 * found.memory["params"]
        assert found.expected["gradients"] == 2 * found.memory["params"]
        assert sum(found.memory.values()) == found.peak
    assert full.expected["activations"] == 3 * 2 * 16 * 64 * 4  # a layer's input alone, [L, b, S, D]
    assert full.memory["activations"] == full.expected["activations"]
    assert none.memory["activations"] > 8 * full.memory["activations"]  # on a quarter of the devices' batch, half of it split


def test_no_rate_where_nothing_is_known(none):
    a100 = none.machine._replace(target=targets.TARGETS["a100-40g"])
    model = dataclasses.replace(MODEL, precision="params=float32,compute=bfloat16,output=float32")
    bf16 = dataclasses.replace(none.config, model=model)
    known = none._replace(machine=a100, config=bf16)
    kernel = timing.Kernel("attention", "attention_of_tomorrow", 1, 1e9)
    for step, why in (
        (none._replace(config=bf16), "nothing is known of this computer's speed"),
        (none._replace(machine=a100), "the table has no rates for fp32"),
        (known._replace(run=[]), "the compiler refused this step"),
        (known._replace(run=[*none.run, kernel]), "the table lacks the speed of attention_of_tomorrow"),
        (known._replace(run=[*none.run, kernel._replace(kind="unknown", name="mosaic_gpu_v2")]), "the speed of mosaic_gpu_v2"),
    ):
        assert why in compiled.no_prediction(step)
        assert compiled.step_milliseconds(step) is compiled.tokens_per_second(step) is None
    assert compiled.no_prediction(known) == ""
    parts, rates = compiled.step_milliseconds(known), compiled.tokens_per_second(known)
    for level, opposite in (("low", "high"), ("middle", "middle"), ("high", "low")):
        total = sum(part[level] for part in parts.values())
        assert rates[opposite] == pytest.approx(none.config.train.tokens_per_step / 8 / total * 1e3)
    assert rates["low"] < rates["middle"] < rates["high"]
    assert len(set(compiled.step_milliseconds(known, 0.5)["matmuls"].values())) == 3  # these are so small that memory decides


def test_wire_time_by_hand():
    """8 bytes over 4 devices of one node, and over 2 of two; two nodes of four."""
    devices = jax.devices()
    target = targets.TARGETS["a100-40g"]._replace(link=100.0, between=10.0)
    machine = targets.Machine("a100-40g", target, devices, 4)
    mesh = sharding.make_mesh(c.Mesh(2, 4, 1), devices)
    one = lambda kind, axes, size: hlo.Collective(kind, "f32", 8, axes, size, 3, False, "")
    seconds = lambda *found: timing.wire_seconds(list(found), mesh, machine)
    assert seconds(one("all-gather", ("fsdp",), 4)) == pytest.approx(3 * 8 * 3 / 4 / 100)
    assert seconds(one("all-reduce", ("fsdp",), 4)) == pytest.approx(3 * 2 * 8 * 3 / 4 / 100)
    # of two nodes: 4 groups of one device on each send 8 x 1/2 twice, through one way out
    assert seconds(one("all-reduce", ("data",), 2)) == pytest.approx(3 * 2 * 8 / 2 * 4 / 10)
    assert seconds(one("reduce-scatter", ("data", "fsdp"), 8)) == pytest.approx(3 * 8 * 7 / 8 / 10)  # one group of all
    assert seconds(one("collective-permute", ("fsdp",), 4), one("all-reduce", (), 1)) == pytest.approx(3 * 8 / 100)


def test_what_a_step_should_not_send_is_named():
    mesh = sharding.make_mesh(c.Mesh(2, 4, 1))
    one = lambda kind, dtype, axes, n=2 * compiled.LARGE: hlo.Collective(kind, dtype, n, axes, 4, 1, False, "")
    good = [one("all-reduce", "f32", ("data",)), one("all-gather", "bf16", ("fsdp",)), one("reduce-scatter", "f32", ("fsdp",)),
            one("all-reduce", "f32", ("fsdp",), 4)]  # fmt: skip
    assert compiled.unwanted(good, mesh) == []
    bad = [
        one("all-reduce", "f32", ("data", "fsdp")),
        one("all-to-all", "bf16", ("fsdp",)),
        one("all-gather", "u16", ("fsdp",)),
    ]
    assert [line.split(":")[0] for line in compiled.unwanted(bad + good, mesh)] == [
        "all-reduce of f32 over data x fsdp", "all-to-all of bf16 over fsdp", "all-gather of u16 over fsdp"]  # fmt: skip


KNOWN = {}


def compile_once(config, machine):
    if repr(config) not in KNOWN:
        KNOWN[repr(config)] = compiled.compile_step(config, machine)
    return KNOWN[repr(config)]


def test_the_largest_that_fits_and_the_nearest_change_are_those_of_trying_all(monkeypatch):
    monkeypatch.setattr(search, "compile_step", compile_once)
    machine, wide = targets.machine("cpu:8"), config_of(mesh=(1, 8, 1), seqs=4, accumulation=2)
    peaks = {n: compile_once(search._with(wide, train__seqs_per_device=n), machine).peak for n in (1, 2, 4, 8)}
    now = compile_once(wide, machine)
    assert sorted(peaks.values()) == list(peaks.values())
    for limit in (peaks[2], peaks[8] - 1, 2 * peaks[8]):
        monkeypatch.setattr(targets.Machine, "budget", limit)
        fit = [n for n, peak in peaks.items() if peak <= limit]
        assert [one.config.train.seqs_per_device for one in search.sizes(now)] == [fit[-1]]
        if not now.fits:
            change, other = search.nearest(now)
            assert change == {"train.seqs_per_device": fit[-1]} and other.peak == peaks[fit[-1]]
    monkeypatch.setattr(targets.Machine, "budget", peaks[1] - 1)
    change, other = search.nearest(now)
    assert change["model.remat"] != "none" and other.peak < peaks[1]
    assert other.config.train.seqs_per_device == change.get("train.seqs_per_device", 4)
    monkeypatch.setattr(targets.Machine, "budget", 1_000)
    assert search.nearest(now) is None and search.sizes(now) == []


def test_the_largest_at_which_nothing_is_computed_again_is_recommended(monkeypatch):
    """Where XLA computes nothing again with at most 2 sequences, with any number, and with none."""
    number = lambda one: one.config.train.seqs_per_device
    for limit, offered, best in ((2, [8, 4, 2], 2), (8, [8], 8), (0, [8, 4, 2, 1], 8)):

        def changed(config, machine, limit=limit):
            one = compile_once(config, machine)
            return one._replace(executed=one.asked + one.asked) if number(one) > limit else one

        monkeypatch.setattr(search, "compile_step", changed)
        first = search.sizes(changed(config_of(mesh=(1, 8, 1), seqs=4), targets.machine("cpu:8")))
        assert [number(one) for one in first] == offered and number(search.recommended(first)) == best
        lines, rows = [], [report.offer(one, None) for one in first]
        out = {"sizes": rows, "largest_seqs_per_device": 8, "recommended_seqs_per_device": best}
        report._say_sizes(out, lines.append)
        text = "\n".join(line for line in lines if isinstance(line, str))
        if limit == 8:
            assert text == "the largest train.seqs_per_device that fits: 8"
        else:
            assert "warning: 8 is the largest train.seqs_per_device that fits, but XLA then recomputes matmuls" in text
            assert "100.0% of the step's FLOPs" in text and f"recommended: --train.seqs_per_device={best}, " in text
        assert rows[0]["matmuls_per_layer_asked"] == {"forward": 7, "backward": 14}
        assert rows[0]["matmuls_per_layer"]["forward"] == (7 if limit == 8 else 14)


def test_a_refusal_for_memory_is_told_from_another():
    of = lambda text: compiled._refused_memory(text, 2**20)
    assert of("Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded") == int(17.5 * 2**30)
    assert (
        of("Ran out of memory on HBM, the total memory required for HLO temporaries (512.00M) exceeds available HBM")
        == 513 * 2**20
    )
    assert of("Ran out of memory in memory space vmem. Used 17.50M of 16.00M vmem.") == 0


def command(tmp_path, *argv):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tinyllama_jax.plan", *argv], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


KEYS = """config target mesh parameters peak_bytes_per_device budget_bytes fits seqs_per_device accumulation flops_per_token
collectives tokens_per_second_per_device days cost milliseconds"""


def test_the_command_on_virtual_devices(tiny_config_file, tmp_path):
    argv = "--config", str(tiny_config_file), "--on", "cpu:4", "--mesh.fsdp=-1", "--train.seqs_per_device=1", "--json"
    code, out, err = command(tmp_path, *argv)
    assert code == 0, err
    out = json.loads(out)
    assert list(out)[:15] == KEYS.split()
    assert out["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1} and (out["seqs_per_device"], out["accumulation"]) == (1, 2)
    assert out["fits"] and out["peak_bytes_per_device"] < 2**24 < out["budget_bytes"] and out["largest_seqs_per_device"] == 2
    assert out["recommended_seqs_per_device"] == 2 and [row["recomputed"] for row in out["sizes"]] == [0]
    assert (
        out["tokens_per_second_per_device"] is out["cost"] is out["milliseconds"] is None
    )  # what a CPU will do is nobody's published fact
    assert {r["kind"] for r in out["collectives"]} >= {"all-gather", "all-reduce"} and out["config"]["model.d_model"] == 32
    assert "memory of a device" in err and "fits: " in err and "Cloud TPU" not in err
    out["target"]["on"], lines = "v5p:2x2x4", []
    report.show(out, lines.append)
    assert "Cloud TPU calls this slice TYPE=v5p-32 (launch/tpu_pod.sh)" in lines


def test_sweep_is_best_first_and_drawn(tiny_config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search, "REMAT", ("none", "full"))
    monkeypatch.setattr(report, "REMAT", ("none", "full"))
    monkeypatch.chdir(tmp_path)
    argv = (
        "--config",
        str(tiny_config_file),
        "--on",
        "cpu:2",
        "--mesh.fsdp=2",
        "--train.tokens_per_step=64",
        "--sweep",
        "--json",
    )
    assert plan.main(list(argv)) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(r["mesh"]["fsdp"], r["remat"], r["seqs_per_device"]) for r in rows} == {
        (fsdp, remat, n) for fsdp in (1, 2) for remat in ("none", "full") for n in (1, 2)}  # fmt: skip
    assert [r["peak_bytes_per_device"] for r in rows] == sorted(r["peak_bytes_per_device"] for r in rows)
    assert (tmp_path / "plan-cpu-2.png").stat().st_size > 10_000


def test_scaling_laws_of_the_command(tmp_path):
    code, out, err = command(tmp_path, "--law", "inference", "--inference-tokens", "1e12", "--json", "--picture", "curve.png")
    assert code == 0, err
    out = json.loads(out)
    assert out["model"]["size"] == 1_100_048_384 and out["model"]["tokens"] == 1_430_512 * 2_097_152
    assert out["model"]["over_training"] == pytest.approx(3.73, abs=0.01)
    loss, best = out["model"]["loss"], out["same_loss_optimum"]
    assert laws.HOFFMANN.loss(**best) == pytest.approx(loss) and best["size"] < out["same_loss_cheapest"]["size"]
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    code, out, _ = command(tmp_path, "--law", "chinchilla", "--flops", "5.76e23", "--fit", "besiroglu")
    assert code == 0 and "loss for 5.76e+23 training FLOPs: 72.25B parameters on 1,329B tokens" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--on", "cpu:2"], "--config FILE and --on TARGET are needed"),
        (["--config", "CONFIG"], "--config FILE and --on TARGET are needed"),
        (["--config", "CONFIG", "--on", "cpu:2", "--mesh.data=4"],
         "needs a multiple of 4 devices, and 2 are here; set one axis to -1 for the rest, such as --mesh.data=1 --mesh.fsdp"),
        (["--config", "CONFIG", "--on", "cpu:2", "--train.seqs_per_device=3"], "--train.seqs_per_device=3: 8 sequences a step"),
        (["--config", "CONFIG", "--on", "cpu:2", "--model.attention=cudnn"], "--model.attention=cudnn: needs"),
        (["--config", "nowhere.py", "--on", "cpu:2"], "nowhere.py: no such file"),
        (["--config", "CONFIG", "--on", "cpu:2", "--mfu", "52"], "argument --mfu: 52: must be a fraction above 0, at most 1"),
        (["--config", "CONFIG", "--on", "cpu:2", "--price", "abc"], "argument --price: abc: must be a number above 0"),
        (["--config", "CONFIG", "--on", "cpu:8", "--sweep", "--train.tokens_per_step=48"], "3 sequences a step do not"),
        (["--config", "CONFIG", "--on", "cpu:1000000000"], "--on=cpu:1000000000: 1,000,000,000 devices; at most 1,024"),
        (["--config", "CONFIG", "--on", "cpu:2", "--mfu", "1e-300"], "argument --mfu: 1e-300: must be a number above 0"),
        (["--law", "chinchilla", "--flops", "1e300"], "argument --flops: 1e300: must be a number above 0, from 1e-30 to 1e30"),
        (["--law", "inference", "--train-price", "1e-30"], "--inference-tokens=1e+12: at these prices each counts for 2.09"),
        (["--law", "chinchilla", "--train-price", "nan"], "argument --train-price: nan: must be a number above 0"),
        (["--law", "chinchilla", "--train.steps=3"], "--train.steps=3: is not an option of --law"),
        (["--law", "chinchilla", "--mfu", "0.3"], "--mfu: is not an option of --law; its prices are --train-price"),
        (["--law", "chinchilla", "--picture", "a.xyz"], "a.xyz: must be a .png, .svg or .pdf"),
        (["--law", "chinchilla", "--picture", "no/a.png"], "no/a.png: must be a .png, .svg or .pdf in a folder that exists"),
        (["--law", "chinchilla", "--flops", "-1"], "argument --flops: -1: must be a number above 0"),
    ],
)  # fmt: skip
def test_mistakes(argv, words, tiny_config_file):
    with pytest.raises(UserError, match=re.escape(words)):
        plan.main([str(tiny_config_file) if word == "CONFIG" else word for word in argv])
