"""The benchmarks at a tiny size: their rows, what they call right and wrong, and what they do when memory or time is out."""

import importlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax.base import config as c
from tinyllama_jax.base import sharding
from tinyllama_jax.inference import engine, quantize
from tinyllama_jax.kernels import attention as kernels
from tinyllama_jax.kernels import cross_entropy

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
names = "bench_bucket bench_common bench_generate bench_gpu bench_kernels bench_loading bench_static bench_train profile_step"
bench_bucket, common, bench_generate, bench_gpu, bench_kernels, bench_loading, bench_static, bench_train, profile_step = map(
    importlib.import_module, names.split()
)
generate_rows, generate_model, generate_server = map(
    importlib.import_module, ("bench_generate_rows", "bench_generate_model", "bench_generate_server")
)
MUCH = 10**12  # sequences
ONE_DEVICE = "--xla_backend_optimization_level=0"


def tool(name: str, *args, **env: str) -> str:
    command = [sys.executable, ROOT / "tools" / name, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bench_train(tmp_path):
    path, rows = tmp_path / "train.json", "jax,torch.chunk.remat"
    said = tool("bench_train.py", "--model", "tiny", "--seq-len", 32, "--seqs", f"{MUCH},2", "--rows", rows, "--steps", 4,
                "--json", path)  # fmt: skip
    report = json.loads(path.read_text())
    assert report["whole"] and report["device"]["matmul_flops"] > 0
    by_name = {(row["row"], row["seqs"]): row for row in report["rows"]}
    assert set(by_name) == {(name, n) for name in rows.split(",") for n in (MUCH, 2)}
    for name in rows.split(","):
        why = (
            "out of memory" if name != "jax" else "tinyllama_jax.base.errors.UserError: --train.tokens_per_step="
        )  # of too many
        assert by_name[name, MUCH]["left_out"].startswith(why), "and the rows after it are there"
        row = by_name[name, 2]
        assert row["ok"] and row["wrong"] == [] and row["token_loss_error"] < 1e-3
        assert row["losses"][0] == pytest.approx(np.log(256) + 0.2, abs=0.35) and row["losses"][-1] < row["losses"][0]
        assert set(row["tflops"]) == {"palm", "matmul", "palm_causal", "matmul_causal"} == set(row["percent_of_matmul"])
        assert same_losses(row, by_name["jax", 2])
        assert row["tflops"]["palm"] * 1e12 == pytest.approx(row["tokens_per_second"] * report["flops_per_token"]["palm"])
    assert report["compared"]["2, torch"]["of"] == ["jax", 2, "torch.chunk.remat", 2]
    assert "0 rows are wrong" in said
    np.save(tmp_path / "reference.npy", np.zeros(32))
    cell = {"row": "transformers", "model": "tiny", "seq_len": 32, "seqs": 2, "steps": 4, "seconds": 9}
    row = bench_train.run(cell | {"reference": str(tmp_path / "reference.npy")}, 100)
    assert same_losses(row, by_name["jax", 2])


def same_losses(row, other):
    """Of the steps that both did: a busy machine does fewer in the time there is."""
    pairs = list(zip(row["losses"], other["losses"], strict=False))
    return len(pairs) >= 2 and all(one == pytest.approx(two, abs=1e-4) for one, two in pairs)


def test_a_wrong_row_is_named():
    args = type("", (), {"model": "tiny", "seq_len": 32})
    device = {"dtype": "float32", "peak_flops": 1e12, "matmul_flops": 1e11}
    right = {"row": "jax", "seqs": 8, "losses": [5.75, 5.5], "token_loss_error": 1e-5, "grad_norm": 2.0, "seconds": [1.0]}
    ours = bench_train.judge(dict(right), None, args, device)
    assert ours["ok"] and ours["percent_of_peak"]["palm"] == pytest.approx(100 * ours["tflops"]["palm"])
    for changed, wrong in (
        ({"token_loss_error": 0.1}, ["token losses"]),
        ({"token_loss_error": float("nan")}, ["token losses"]),
        ({"losses": [5.75, 5.76]}, ["loss falls", "losses as jax"]),
        ({"losses": [7.0, 5.5]}, ["first loss", "losses as jax"]),
        ({"losses": [5.75, float("nan")]}, ["loss falls", "losses as jax"]),
        ({"grad_norm": 2.1}, ["gradient as jax"]),
    ):
        assert bench_train.judge(right | changed, ours, args, device)["wrong"] == wrong


def test_bench_kernels(tmp_path):
    said = tool("bench_kernels.py", "--size", "tiny", "--json", tmp_path / "kernels.json")
    report = json.loads((tmp_path / "kernels.json").read_text())
    rows = report["rows"]
    assert report["whole"] and not [row for row in rows if row["ok"] is False] and "0 rows are wrong" in said
    first = bench_kernels.shapes("tiny")[0]
    here = {row["impl"]: row for row in rows if row["kind"] == "attention" and row["shape"] == first}
    assert set(here) >= set(c.ATTENTION) - {"auto"} | {"torch flash"}
    assert here["reference"]["ok"] and here["xla"]["ok"] and "GPU" in here["cudnn"]["left_out"]
    assert set(here["xla"]["errors"]) == {"out", "dq", "dk", "dv"} and here["xla"]["bytes"] > 0
    assert here["torch flash"]["ok"] and report["matmul_flops"] > 0
    assert sorted(row["tokens"] for row in rows if row["kind"] == "loss" and row["ok"]) == [0, 2, 4, 8, 16, 32]
    assert [row["name"] for row in rows if row["kind"] == "memory" and row["ok"]] == ["rms_norm", "swiglu"]


@pytest.fixture
def at_once(monkeypatch):
    """Times are not what is tested here."""
    monkeypatch.setattr(bench_kernels, "seconds_of", lambda *_: 1.0)


@pytest.mark.parametrize("fault", ["none", "one position ahead", "scores a tenth too large", "a key head too far"])
def test_wrong_attention_is_noticed(at_once, monkeypatch, fault):
    right = kernels.attention

    def planted(q, k, v, *segments, impl):
        if fault == "one position ahead":
            return right(q, jnp.roll(k, -1, 1), jnp.roll(v, -1, 1), *segments, impl=impl)
        if fault == "a key head too far":
            return right(q, jnp.roll(k, 1, 2), v, *segments, impl=impl)
        return right(q * (1.1 if fault == "scores a tenth too large" else 1.0), k, v, *segments, impl=impl)

    monkeypatch.setattr(kernels, "attention", planted)
    row = bench_kernels.attention("reference", bench_kernels.shapes("tiny")[0])
    assert row["ok"] == (fault == "none")
    assert all((error["relative"] < 1e-5) == row["ok"] for error in row["errors"].values())


def test_tuning_times_the_kernel_as_it_is_cut(at_once, monkeypatch):
    """In interpret mode, which is the kernel itself: the cut reaches it, its errors are checked, and it is put back."""
    from tinyllama_jax.kernels.attention import triton

    seen, right, as_it_is = [], kernels.attention, triton.TUNINGS
    monkeypatch.setattr(kernels, "choose", lambda *_, **__: ("pallas_triton", ""))

    def interpreted(*arrays, impl):
        seen.append(triton.TUNINGS[64]["dkv"])
        return right(*arrays, impl=impl, interpret=True)

    monkeypatch.setattr(kernels, "attention", interpreted)
    row = bench_kernels.tune("", "dkv", [32, 16, 4, 1], bench_kernels.shapes("tiny")[0])
    assert row["ok"] and set(seen) == {(32, 16, 4, 1)} and triton.TUNINGS is as_it_is
    assert len(bench_kernels.cells("1b", ["tune"])) == 3 * len(bench_kernels.CUTS)


@pytest.mark.parametrize("tokens", [0, 8])
def test_a_wrong_loss_is_noticed(at_once, monkeypatch, tokens):
    assert bench_kernels.loss(tokens, 2, 16, 8, 32)["ok"]
    right = cross_entropy._of_labels
    monkeypatch.setattr(cross_entropy, "_of_labels", lambda *args: 1.01 * right(*args))
    assert not bench_kernels.loss(tokens, 2, 16, 8, 32)["ok"]


def test_flops_of_attention_are_those_of_what_is_seen():
    shape = {"B": 2, "S": 4, "N": 3, "K": 1, "H": 5, "documents": 0}
    assert common.visible_pairs(shape) == 2 * (1 + 2 + 3 + 4)
    row = {"kind": "attention", "shape": shape, "forward_seconds": 1.0, "forward_backward_seconds": 2.0}
    row = bench_kernels.derive(row, {}, 1e3)
    assert row["forward_tflops"] * 1e12 == pytest.approx(2 * 2 * 20 * 3 * 5)  # two matmuls of 2 FLOPs a pair, head and H
    assert row["tflops"] * 1e12 == pytest.approx(3.5 * 1_200 / 2) and row["percent_of_matmul"] == pytest.approx(210)
    packed = shape | {"S": 8, "documents": 3}
    ids = common.segments(packed)
    assert common.visible_pairs(packed) == sum((a == b) for row in ids for i, a in enumerate(row) for b in row[: i + 1])
    assert [list(np.unique(row)) for row in ids] == [[1, 2, 3]] * 2


def test_a_cell_without_memory_leaves_the_others():
    todo = [(0, "matmul", {"M": 10**8, "K": 10**8, "N": 8}), (1, "matmul", {"M": 8, "K": 8, "N": 8}), (2, "loss", {})]
    device, *rows = bench_kernels.rows(todo, time.monotonic() + 60)
    assert device["device"]["platform"] == "cpu"
    assert rows[0]["left_out"].startswith("out of memory") and rows[1]["ok"] and rows[2]["left_out"].startswith("TypeError")


def test_rows_without_time_are_named():
    rows = list(bench_kernels.rows([(0, "matmul", {"M": 8, "K": 8, "N": 8})], time.monotonic()))
    assert [row["left_out"] for row in rows] == ["no time left"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("raise SystemExit('no such thing')", "no such thing"),
        ("raise RuntimeError('RESOURCE_EXHAUSTED: 5 GiB')", "out of memory (RuntimeError: RESOURCE_EXHAUSTED: 5 GiB)"),
        ("import os; os.kill(os.getpid(), 9)", "out of memory (ended with -9)"),
        ("import time; time.sleep(600)", "not done in time"),
    ],
)
def test_a_worker_that_ends_badly_keeps_its_rows(script, reason):
    path = f"print('noise'); print('{{\"a\": 1}}', flush=True); {script}"
    rows = []
    with pytest.raises(common.Ended) as ended:
        for row in common.stream(["-c", path], 60, quiet=2):
            rows.append(row)
    assert str(ended.value) == reason and rows == [{"a": 1}]


def test_each_implementation_is_checked_without_being_timed(monkeypatch):
    monkeypatch.setattr(bench_kernels, "seconds_of", None)
    cells = [arguments for kind, arguments in bench_kernels.cells("tiny", ["check"])]
    assert [cell["impl"] for cell in cells[:6]] == ["pallas_triton"] * 5 + ["reference"]
    row = bench_kernels.check(**next(cell for cell in cells if cell["impl"] == "xla"))
    assert row["ok"] and row["same_bits"] and "same bits again" in bench_kernels.line({"kind": "check", "impl": "xla", **row})
    right = kernels.attention
    monkeypatch.setattr(kernels, "attention", lambda q, *a, impl: right(q * 1.1, *a, impl=impl))
    assert not bench_kernels.check(**next(cell for cell in cells if cell["impl"] == "xla"))["ok"]


def test_bench_gpu_names_the_part_that_fails_and_runs_the_others(tmp_path, monkeypatch):
    """Each part's lines are kept as they come; one is killed when its time is up; plan stands beside what was measured."""
    row = {"row": "jax", "seqs": 2, "ok": True, "peak_bytes": 3 << 30, "tokens_per_second": 300.0}
    checked = {"device": {"kind": "NVIDIA H200", "platform": "gpu"}, "rows": [{"ok": True}, {"ok": None}]}
    write = "import json, pathlib; pathlib.Path({!r}).write_text(json.dumps({!r})); print('a line of {}')"
    scripts = {
        "check": write.format(str(tmp_path / "check.json"), checked, "check"),
        "kernels": "import sys; sys.exit('no device')",
        "step": write.format(str(tmp_path / "step.json"), {"rows": [row]}, "step"),
        "trace": "import time; print('before it hangs', flush=True); time.sleep(600)",
    }
    rate = {"low": 200.0, "middle": 250.0, "high": 280.0}
    predicted = lambda report, on, cell, _: report.content["plan"].update(
        {cell["seqs"]: {"peak_bytes_per_device": 2 << 30, "tokens_per_second_per_device": rate}, "on": {"left_out": on}}
    )
    monkeypatch.setattr(bench_gpu, "commands", lambda *_: {name: ["-c", script] for name, script in scripts.items()})
    monkeypatch.setattr(bench_gpu, "plan", predicted)
    monkeypatch.setattr(bench_gpu, "GRACE", 1)
    # nearly all of the time for each part that ends by itself, on however busy a machine
    monkeypatch.setattr(bench_gpu, "SHARE", {"check": 0.97, "kernels": 0.01, "step": 0.01, "trace": 0.01})
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--seqs", "2", "--minutes", "0.5", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        bench_gpu.main()
    report, text = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    assert ended.value.code == 1 and not report["whole"]
    codes = {name: part["rc"] for name, part in report["parts"].items()}
    assert codes == {"check": 0, "kernels": 1, "step": 0, "trace": -9}
    assert "before it hangs" in text and "ended with -9" in text and "no device" in text and "NVIDIA H200" in text
    assert "| 2 | GiB at the peak | 2.00 | 3.00 | 1.50 |" in text and "| on | plan | h200:1x1 | | |" in text
    assert "| 2 | tokens/s | 250 (200 to 280) | 300.00 | 1.20 |" in text


def test_bench_generate(tmp_path):
    """Every row runs at a tiny size and is right, in files of its own; a page's table for this device is replaced."""
    page, out = tmp_path / "page.md", tmp_path / "generate.json"
    cpu, gpu = (bench_generate.MARKS[0].format(platform) for platform in ("cpu", "gpu"))
    page.write_text(f"# Figures\n\n{gpu}\nas it was\n<!-- end -->\n{cpu}\nold\n<!-- end -->\nlast\n")
    printed = tool("bench_generate.py", "--size", "tiny", "--output", out, "--page", page, XLA_FLAGS=ONE_DEVICE)
    report, text = json.loads(out.read_text()), out.with_suffix(".md").read_text()
    assert report["whole"] and "0 rows are wrong or failed" in printed
    assert {row["part"] for row in report["rows"]} == set(bench_generate.SHARE)
    rows = {row["row"]: row for row in report["rows"] if "left_out" not in row}
    assert set(rows) == {
        "fp32, ours", "fp32, Transformers", "bfloat16", "int8", "int4", "llama.cpp Q4_0", "draft of one layer, float32",
        "draft of one layer, bfloat16",
        "random, --draft ngram", *(f"random, perplexity, {kind}" for kind in ("float32", "bfloat16", "int8", "int4")),
        "server, 16 at once (random tiny)", "server, first token while 16 decode (random tiny)", "bf16, batch 1",
        "bf16, batch 8", "server of one slot, one after the other (random tiny)",
    }  # fmt: skip
    nothing_to_compare = {"fp32, Transformers", "bf16, batch 1", "server of one slot, one after the other (random tiny)"}
    assert {name for name, row in rows.items() if not row["ok"]} == nothing_to_compare
    assert all(row["low"] <= row["value"] <= row["high"] and len(row["values"]) >= 3 for row in rows.values() if "low" in row)
    assert rows["int8"]["gb"] < 0.6 * rows["bfloat16"]["gb"] and rows["int4"]["gb"] < 0.6 * rows["int8"]["gb"]
    assert rows["draft of one layer, float32"]["tokens_per_pass"] > 1.5 and rows["fp32, ours"]["aim"]["value"] > 0
    assert set(report["machine"]) == {"device", "cores", "load", "versions"} and report["machine"]["versions"]["jax"]
    assert [row["row"] for row in report["rows"] if "left_out" in row] == ["demo, perplexity"]
    assert "| right | fp32, ours | " in text and f"as it was\n<!-- end -->\n{cpu}\n{text}<!-- end -->\nlast" in page.read_text()


def test_bench_generate_names_the_part_that_fails_and_runs_the_others(tmp_path, monkeypatch):
    """A worker that dies takes the parts that it did not get to with it, and no others; one that hangs is killed."""
    row = {"row": "first", "ok": True, "value": 2.0, "low": 1.0, "high": 3.0, "unit": "tokens/s"}
    put = lambda *rows: "import sys, time; " + "; ".join(f"print({json.dumps(r)!r}, flush=True)" for r in rows) + "; "
    scripts = {
        "decode": put({"part": "decode", "machine": {}}, {"part": "decode", **row}) + "sys.exit('a fault')",
        "int8": put({"part": "int8", "machine": {}}, {"part": "int8", **row}),
        "int4": put({"part": "int4", "machine": {}}, {"part": "int4", **row, "ok": False, "wrong": ["log-probabilities"]}),
        "gpu": put({"part": "gpu", "machine": {}}) + "time.sleep(600)",
    }
    monkeypatch.setattr(bench_generate, "command", lambda names, _: ["-c", scripts[names[0]]])
    monkeypatch.setattr(bench_generate, "SHARE", dict(zip(scripts, (0.3, 0.3, 0.3, 0.1), strict=True)))
    options = ["--output", str(tmp_path / "x.json"), "--only", ",".join(scripts), "--minutes", "0.2"]
    monkeypatch.setattr(sys, "argv", ["bench_generate.py", *options])
    monkeypatch.setattr(common, "end_on_sigterm", lambda: None)  # it would outlast the test
    with pytest.raises(SystemExit) as ended:
        bench_generate.main()
    report = json.loads((tmp_path / "x.json").read_text())
    assert ended.value.code == 1 and not report["whole"]
    seen = [(row["part"], bench_generate.verdict(row), row.get("wrong")) for row in report["rows"]]
    assert seen == [
        ("decode", "right", None), ("decode", "FAILED", ["a fault"]), ("int8", "right", None),
        ("int4", "WRONG", ["log-probabilities"]), ("gpu", "FAILED", ["not done in time"]),
    ]  # fmt: skip
    assert "| FAILED | decode | " in (tmp_path / "x.md").read_text()


@pytest.fixture
def quick(monkeypatch):
    """Times are not what is tested here."""
    one_device = lambda _: sharding.make_mesh(c.Mesh(1, 1, 1), jax.devices()[:1])
    monkeypatch.setattr(generate_model, "REPEATS", 1)
    monkeypatch.setattr(generate_model.weights_lib, "make_mesh", one_device)
    return type("Args", (), {"size": "tiny", "demo": None})


def test_small_weights_that_do_not_multiply_as_they_should_are_noticed(quick, monkeypatch):
    right = quantize._halves
    monkeypatch.setattr(quantize, "_halves", lambda *args: right(*args)[::-1])
    jax.clear_caches()
    (row,) = generate_rows.PARTS["int4"](quick)
    jax.clear_caches()
    assert not row["ok"] and row["wrong"][0].startswith("log-probabilities")


def test_a_draft_that_changes_the_tokens_is_noticed(quick, monkeypatch):
    right = engine.Engine._take
    changed = lambda self, slot, out: right(self, slot, out._replace(tokens=out.tokens ^ bool(self.draft_tokens)))
    monkeypatch.setattr(engine.Engine, "_take", changed)
    row = next(generate_rows.PARTS["speculative"](quick))
    assert row["wrong"] == ["tokens as without a draft"]


def test_the_agreement_of_a_draft_is_that_of_its_tokens_a_pass():
    draft = importlib.import_module("bench_generate_draft")
    assert draft.implied_agreement(1 + 0.7 + 0.7**2 + 0.7**3 + 0.7**4, 4) == pytest.approx(0.7)
    assert draft.implied_agreement(1.0, 4) == 0 and draft.implied_agreement(5.0, 4) == 1


def test_answers_of_the_server_that_depend_on_the_others_are_noticed():
    class Server:
        asked = 0

        def complete(self, prompt, n):
            Server.asked += 1
            return ("x" if Server.asked > 40 and "salt" in prompt else prompt), n

    with ThreadPoolExecutor(4) as pool:
        (row,) = generate_server.measured(Server(), pool, "planted", 4, 1, 2)
    assert not row["ok"] and row["wrong"] == ["1 answers differ from those alone"]


def test_profile_step(tmp_path):
    said = tool("profile_step.py", "--model", "tiny", "--seq-len", 64, "--seqs", 2, "--steps", 3, "--out", tmp_path)
    table = json.loads((tmp_path / "table.json").read_text())
    matmuls = [row for row in table["rows"] if row["kind"] == "matmul"]
    assert any("bsd,df->bsf" in row["scope"] for row in matmuls), "the model's MLP"
    assert any(row["scope"].startswith("backward ") for row in matmuls)
    assert sum(row["percent"] for row in table["rows"]) == pytest.approx(100) == sum(table["kinds"].values())
    looped = [row for row in matmuls if "bsd,df->bsf" in row["scope"] and not row["scope"].startswith("backward")]
    assert {row["times"] for row in looped} == {2}, "once a layer"
    assert Path(table["trace"]).is_file() and "HloModule" in (tmp_path / "step.hlo.txt").read_text()
    assert "matmul" in said


def test_own_times_and_union():
    events = [(0, 10, "while"), (1, 4, "a"), (2, 3, "b"), (5, 9, "a"), (12, 13, "c")]
    assert profile_step.own_times(events) == [("while", 3), ("a", 2), ("b", 1), ("a", 4), ("c", 1)]
    assert profile_step.union([(0, 2), (1, 3), (5, 6), (5, 6)]) == 4


LISTING = """
        /*0000*/                   LDL R5, [R1+0x8] ;
.L_x_0:
        /*0010*/                   MUFU.EX2 R5, R5 ;
.L_x_1:
        /*0020*/                   LDSM.16.M88.4 R4, [R0] ;
        /*0030*/              @!P0 STL [R1+0x8], R6                     (*"SpillRefill"*);
        /*0040*/                   HMMA.16816.F32.BF16 R4, R4, R8, RZ ;
        /*0050*/                   FFMA R4, R4, R5, R6 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/               @P2 BRA `(.L_x_0) ;
.L_x_2:
        /*0080*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0090*/                   ISETP.NE.AND P0, PT, R4, R5, PT ;
        /*00a0*/                   BRA `(.L_x_2) ;
.L_x_3:
        /*00b0*/                   FADD R4, R4, R5 ;
        /*00c0*/                   BRA `(.L_x_3) ;
        /*00d0*/                   BRA `(.L_x_4) ;
.L_x_4:
        /*00e0*/                   EXIT ;
"""


def test_the_loops_of_machine_code():
    """The innermost with tensor core instructions: not the loop around one, nor one that only adds, nor a jump ahead."""
    none = dict.fromkeys(("ldsm", "fp32", "mufu", "mask", "spills"), 0)
    assert bench_static.loops(LISTING) == [
        none | {"instructions": 3, "tensor": 1, "tensor_clocks": 16, "mask": 1},
        none | {"instructions": 5, "tensor": 1, "tensor_clocks": 8, "ldsm": 1, "spills": 1, "fp32": 1},
    ]
    assert bench_static.loops("") == []


def test_what_is_compiled_is_left_out_without_its_tools(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_static.shutil, "which", lambda name: None)
    monkeypatch.setattr(bench_static.importlib.util, "find_spec", lambda name: None)
    bench_static.report(tmp_path / "static.json", {"time": "now"})
    report = json.loads((tmp_path / "static.json").read_text())
    assert report["rows"] == [] and [row["on"] for row in report["left_out"]] == ["a100-40g", "h100"]
    assert "a100-40g left out: no compiler for a100-40g here: pip install '.[plan]'" in capsys.readouterr().out
    monkeypatch.setattr(bench_static.importlib.util, "find_spec", lambda name: None if name == "nvidia" else True)
    assert bench_static.lacks("h100") == (
        "no ptxas here: pip install nvidia-cuda-nvcc-cu12; no nvdisasm here: pip install nvidia-cuda-nvdisasm"
    )


@pytest.mark.parametrize(
    ("kind", "text", "kernel"),
    [
        ("matmul", '  %custom-call.3 = (bf16[8]) custom-call(%a), custom_call_target="__cublas$lt$matmul"', "nvjet_hsh_128"),
        ("attention", '  %custom-call.9 = (bf16[8]) custom-call(%a), custom_call_target="__cudnn$fmhaSoftmax"', "cudnn_sm90"),
        (
            "attention",
            '  %c = bf16[8] custom-call(%a), custom_call_target="mosaic_gpu", metadata={op_name="x/attention/k"}',
            "",
        ),
        ("kernel", '  %c = bf16[8] custom-call(%a), custom_call_target="mosaic_gpu", metadata={op_name="x/norm/k"}', ""),
        ("collective", "  %all-reduce.1 = f32[8] all-reduce(%x)", "ncclDevKernel_AllReduce"),
        ("copy", "", "MemcpyD2D"),
        ("copy", "  %f = f32[8] fusion(%x), calls=%g\n  ROOT %t = f32[8] transpose(%p)", "f"),
        ("fusion", "  %f = f32[8] fusion(%x), calls=%g\n  ROOT %t = f32[8] exponential(%p)", "f"),
        ("matmul", "  %f = f32[8] fusion(%x), calls=%g\n  %d = f32[8] dot(%p, %q)", "gemm_fusion_dot_1"),
    ],
)
def test_kinds_of_operations(kind, text, kernel):
    assert profile_step.kind_of(text, kernel) == kind


def test_benchmarks_need_neither_grain_nor_tfds_nor_beam(tmp_path):
    script = """
import sys; sys.path.insert(0, "tools")
import bench_common, bench_kernels, bench_train, profile_step, numpy
bench_kernels.attention("xla", bench_kernels.shapes("tiny")[0])
cell = {"model": "tiny", "seq_len": 8, "seqs": 1, "remat": "full", "attention": "auto", "loss_chunk": 8, "steps": 1,
        "seconds": 1, "row": "jax", "reference": sys.argv[1]}
numpy.save(sys.argv[1], numpy.zeros(8))
assert bench_train.time_jax(cell)["losses"]
bad = [m for m in ("grain", "tensorflow_datasets", "apache_beam", "array_record", "tensorboard", "orbax") if m in sys.modules]
assert not bad, bad
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "x.npy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            ["bench_kernels.py", "--only", "attention,los"],
            "no such one: 'los'; choose of matmul, attention, loss, memory, tune",
        ),
        (["bench_kernels.py", "--minutes", "-1"], "must be above 0"),
        (["bench_kernels.py", "--json", "tools"], "cannot write a file tools"),
        (["bench_train.py", "--rows", "jaxx,jax"], "no such one: 'jaxx'; choose of jax, torch, torch.remat"),
        (["bench_train.py", "--attention", "cudn"], "no such one: 'cudn'"),
        (["bench_train.py", "--remat", ""], "choose of none, save_matmuls_and_attention"),
        (["bench_train.py", "--seqs", "0"], "whole numbers above 0"),
        (["bench_generate.py", "--only", "decode,int2"], "no such one: 'int2'; choose of decode, bfloat16, int8"),
        (["bench_generate.py", "--demo", "docs"], "--demo docs: not a run folder"),
        (["bench_generate.py", "--page", "README.md"], "without the marks of a table"),
        (["profile_step.py", "--steps", "0"], "whole numbers above 0"),
        (["profile_step.py", "--out", "/proc/x"], "cannot write a file"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(command, words):
    done = subprocess.run([sys.executable, ROOT / "tools" / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1]


def test_bench_loading(tmp_path, tiny_data, monkeypatch):
    """Both formats hold as many tokens, and what stands for the original's loader reads the blocks that ours does."""
    monkeypatch.setattr(bench_loading, "SECONDS", 0.05)
    monkeypatch.setattr(bench_loading, "BATCH", 16)
    monkeypatch.setattr(bench_loading, "WINDOW", 4)
    paths = bench_loading.make(tmp_path, 8, 6, tiny_data / "512.model")
    for name, path in paths.items():
        for what in (*bench_loading.in_cache(path).values(), bench_loading.cold(path)):
            assert what["tokens/s"] > 0 and what["tokens/cpu s"] > 0
        opened = bench_loading.many(path)
        assert opened["files"] == 8 and opened["first batch, s"] > opened["open, s"] > 0, name
    (source,) = bench_loading.feed.open_sources(bench_loading.config_of(paths["LITPKDS"]))
    theirs = bench_loading.window([str(file) for file, _, _ in source.files()])
    windows = [{next(theirs).tobytes() for _ in range(24)} for _ in range(3)]
    ours = [row.astype(np.int64).tobytes() for row in source.read(np.arange(48))[0]]
    assert windows[0] == windows[2] == set(ours[:24]) and windows[1] == set(ours[24:])
    assert bench_loading.as_the_original(paths["LITPKDS"], None)["tokens/s"] > 0


def test_bench_finetune(monkeypatch, tmp_path, capsys):
    bench_finetune = importlib.import_module("bench_finetune")
    command = ["x", "--model", "tiny", "--seq-len", "256", "--repeats", "1", "--output", str(tmp_path / "it.json")]
    monkeypatch.setattr(sys, "argv", command)
    assert bench_finetune.main() == 0 and capsys.readouterr().out.startswith("right\ntext ")
    assert json.loads((tmp_path / "it.json").read_text())["rows"].keys() == {"text", "chat", "preferences"}


def test_bench_bucket(tmp_path, tiny_data, monkeypatch):
    """Its server in place of S3, too."""
    for module in (bench_loading, bench_bucket):
        monkeypatch.setattr(module, "BATCH", 16)
    monkeypatch.setattr(bench_loading, "SECONDS", 0.02)
    monkeypatch.setattr(bench_bucket, "TURNS", 2)
    monkeypatch.setattr(bench_bucket, "STEP", 0.01)
    for name in ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "FOLDER"):
        monkeypatch.setenv(name, "")  # put back at the end
    paths = bench_loading.make(tmp_path / "data", 3, 16, tiny_data / "512.model")
    with bench_bucket.server(tmp_path):
        for path in paths.values():
            out = bench_bucket.measure(path, f"s3://{Path(path).relative_to(tmp_path)}", f"{tmp_path / 'cache'}:1")
            assert out["files"] == 3 and out["first batch, s"] > 0 and out["bucket over local, tokens/s"] > 0
