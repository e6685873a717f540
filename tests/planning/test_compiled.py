"""The step as compiled for machines that are not here: what it sends between devices, in what dtype, and what lies where.

Needs the compilers of the extra "plan"; all is skipped without them. `make test-plan` installs them.
"""

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import kept
import pytest

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.planning import hlo, targets

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS.parent / "tools"))
bench_static = importlib.import_module("bench_static")
ENV = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "PYTHONPATH": str(TESTS.parent),
}
# elements of the seven matrices of a layer of compile_for.MODEL, of embedding and head, and of a norm: D=256 F=768 V=32,000
LAYER = sorted([256 * 256] * 2 + [256 * 128] * 2 + [256 * 768] * 3)
TABLE, NORM = 32_000 * 256, 256
LAYERS, ACCUMULATION = 3, 2
LAYERS_MOVES = Counter({n: LAYERS * ACCUMULATION * LAYER.count(n) for n in LAYER})  # in a step, once a micro-batch
MOVES = LAYERS_MOVES + Counter({TABLE: 2 * ACCUMULATION})
# the files that a compiled step depends on
SOURCES = [*(f"tinyllama_jax/{room}/**/*.py" for room in ("base", "kernels", "core", "planning", "inference")), "configs/3t.py"]
SOURCES += ["tests/compile_for.py"]
A100 = ("2,8,float32", "1,16,float32", "2,8,bfloat16")


def installed(on: str) -> bool:
    """Whether there is a compiler for the target."""
    return any(importlib.util.find_spec(p) for p in targets.PLUGINS[targets.TARGETS[on.split(":")[0]].platform])


def compile_for(on: str, *cases: str) -> dict:
    """What compile_for.py says of each case. Two processes may use libtpu at one time."""
    if not installed(on):
        pytest.skip(f"no compiler for {on} here: pip install '.[plan]'")

    def compiled() -> dict:
        command = [sys.executable, TESTS / "compile_for.py", on, *cases]
        done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=600)
        assert done.returncode == 0, done.stderr[-3_000:]
        return json.loads(done.stdout.splitlines()[-1])

    results = kept.result(SOURCES, [on, *cases], compiled)
    for result in results.values():
        if isinstance(result, dict) and "collectives" in result:
            result["collectives"] = [hlo.Collective(**r | {"axes": tuple(r["axes"])}) for r in result["collectives"]]
    return results


@pytest.fixture(scope="module")
def a100():
    return compile_for("a100-40g:2x8", *A100)


@pytest.fixture(scope="module")
def v5e():
    return compile_for("v5e:2x4", "1,8,float32")


@pytest.fixture(scope="module")
def v5e_4x4():
    return compile_for("v5e:4x4", "1,16,float32")


def times(found: list[hlo.Collective]) -> dict[int, int]:
    """Elements -> how often a step sends an array of as many. Pipelining takes rounds out of loops: only the sums are known."""
    out = Counter()
    for r in found:
        out[r.bytes // {"bf16": 2, "f32": 4}[r.dtype]] += r.trips
    return out


def elements(found: list[hlo.Collective]) -> list[int]:
    """How many elements each has, in all devices' order of size."""
    return sorted(r.bytes // {"bf16": 2, "f32": 4}[r.dtype] for r in found)


def weights(result: dict, kind: str, **more) -> list[hlo.Collective]:
    """The collectives of a kind that move whole weights or their gradients: whatever is larger than a norm's scale."""
    found = [r for r in result["collectives"] if r.kind == kind and r.bytes > 4 * NORM]
    return [r for r in found if all(getattr(r, name) == value for name, value in more.items())]


def gathered_in_bf16(result: dict) -> bool:
    """Whether weights come to a layer in the compute dtype, at once or shard by shard around a ring."""
    kinds = ("all-gather", "collective-permute")
    return any(r.layers and r.kind in kinds and r.dtype == "bf16" and r.bytes > 4 * NORM for r in result["collectives"])


def no_leaf_is_whole(result: dict, fsdp: int) -> None:
    large = [(path, n, here) for path, n, here in result["state"] if 4 * n > 64 * 1024]
    assert len(large) == 3 * (len(LAYER) + 2)  # weights and two moments
    assert all(here == n // fsdp for _, n, here in large), large


@pytest.mark.xdist_group("a100")
@pytest.mark.parametrize("case", A100)
def test_a100_gathers_a_layer_at_a_time_and_scatters_its_gradient(a100, case):
    """And embedding and head once a micro-batch, not in each of the 2 chunks of the loss."""
    result, (_, fsdp, reduce_dtype) = a100[case], case.split(",")
    gathers, scatters = weights(result, "all-gather"), weights(result, "reduce-scatter")
    assert times(gathers) == MOVES + LAYERS_MOVES  # the layers' forward and backward
    assert times(scatters) == MOVES
    assert {r.dtype for r in gathers} == {"bf16"}  # the compute dtype, not the parameters' fp32
    assert {r.dtype for r in scatters} == {{"float32": "f32", "bfloat16": "bf16"}[reduce_dtype]}
    assert {(r.axes, r.size) for r in gathers + scatters} == {(("fsdp",), int(fsdp))}


@pytest.mark.xdist_group("a100")
@pytest.mark.parametrize("case", A100)
def test_a100_all_reduces_no_whole_gradient(a100, case):
    result, (data, fsdp, reduce_dtype) = a100[case], case.split(",")
    all_reduces = weights(result, "all-reduce")
    assert all(r.axes == ("data",) for r in all_reduces)  # within fsdp only norms, the loss, the gradients' norm
    if data == "1":
        assert not all_reduces
        return
    assert {r.dtype for r in all_reduces} == {{"float32": "f32", "bfloat16": "bf16"}[reduce_dtype]}
    sent, shard = sum(n * trips for n, trips in times(all_reduces).items()), sum(LAYER) // int(fsdp)
    assert sent == pytest.approx(LAYERS * ACCUMULATION * shard + 2 * TABLE // int(fsdp), rel=0.01)


@pytest.mark.xdist_group("a100")
@pytest.mark.parametrize("case", A100)
def test_a100_replicates_no_large_array(a100, case):
    result = a100[case]
    no_leaf_is_whole(result, int(case.split(",")[1]))
    kinds = {r.kind for r in result["collectives"] if r.bytes > 4 * NORM}
    assert kinds <= {"all-gather", "reduce-scatter", "all-reduce"}  # no activation changes hands
    assert all(r.dtype in ("bf16", "f32") for r in result["collectives"] if r.kind == "all-gather")  # no tokens
    # the embedding's gradient and the head's copy, gradient and its conversion in fp32, the head in bf16, gathered while
    # something else is computed, and less than that for all else
    assert result["peak"] < 5.75 * 4 * TABLE


@pytest.mark.xdist_group("a100")
def test_a100_nothing_is_rematerialised_to_change_its_layout(a100):
    assert [result["notes"] for result in a100.values()] == [[]] * len(A100)
    for result in a100.values():  # nor computed again; one of the matmuls is cuBLAS's
        assert result["executed"]["flops"] == pytest.approx(result["asked"]["flops"], rel=1e-3)


@pytest.mark.xdist_group("v5e")
def test_v5e_gathers_a_layer_at_a_time_and_scatters_gradients(v5e):
    """8 chips. Next to a matmul its compiler makes rings of permutes; it scatters after the accumulation where it can."""
    (result,) = v5e.values()
    assert result["notes"] == []
    no_leaf_is_whole(result, 8)
    assert [
        r for r in result["collectives"] if r.layers and r.kind in ("all-gather", "collective-permute") and r.dtype == "bf16"
    ]
    assert not weights(result, "all-reduce")
    assert elements(weights(result, "all-gather", layers=False)) == [TABLE, TABLE]
    scatters = weights(result, "reduce-scatter")
    assert elements(scatters)[-2:] == [TABLE, TABLE]
    assert {r.dtype for r in scatters} == {"f32"}
    assert elements([r for r in scatters if r.layers]) == LAYER


@pytest.mark.xdist_group("v5e")
def test_v5e_4x4_all_reduces_what_it_is_told_to_scatter_but_moves_nothing_else(v5e_4x4):
    """On a 4x4 torus this libtpu makes an all-reduce and a slice even of a lone `psum_scatter` (docs/log.md)."""
    (result,) = v5e_4x4.values()
    assert all("whole gradient" in note for note in result["notes"])
    no_leaf_is_whole(result, 16)
    assert elements(weights(result, "all-gather", layers=False)) == [TABLE, TABLE]
    assert [
        r for r in result["collectives"] if r.layers and r.kind in ("all-gather", "collective-permute") and r.dtype == "bf16"
    ]
    reduced = weights(result, "all-reduce") + weights(result, "reduce-scatter")
    assert elements([r for r in reduced if not r.layers]) in ([TABLE, TABLE], sorted([*LAYER, TABLE, TABLE]))
    assert {r.axes for r in reduced} == {("fsdp",)}


# -- what it needs ---------------------------------------------------------------------------------------------------------

PEAKS = {  # of configs/3t.py on a100-40g:2x8, bytes of a device: as compiled on 2026-11-29, which it may not exceed by 2%
    "8,none": 36_658_320_977,
    "8,save_matmuls_and_attention": 18_839_381_453,
    "8,save_matmuls": 17_383_957_961,
    "8,full": 6_227_955_153,
    "16,none": 69_684_737_229,
    "16,save_matmuls_and_attention": 34_522_277_389,
    "16,save_matmuls": 31_611_407_885,
    "16,full": 9_280_939_533,
    "8,save_matmuls_and_attention,pallas_triton,1": 17_776_282_057,  # data=1, fsdp=16
    "16,save_matmuls_and_attention,pallas_triton,1": 33_391_938_057,
    "8,save_matmuls_and_attention,cudnn,2": 18_906_490_313,
    "16,save_matmuls_and_attention,cudnn,2": 34_656_472_589,
}
ELEMENTS = 8 * 2048 * 5632  # of [B, S, F] with 8 sequences a device


@pytest.fixture(scope="module")
def on_a100():
    return {case.removeprefix("3t:"): r for case, r in compile_for("a100-40g:2x8", *(f"3t:{c}" for c in PEAKS)).items()}


@pytest.fixture(scope="module")
def on_v5e():
    return compile_for("v5e:2x4", "3t:4,save_matmuls_and_attention,auto,1")["3t:4,save_matmuls_and_attention,auto,1"]


@pytest.mark.xdist_group("3t")
def test_3t_on_a100_needs_no_more_memory_than_it_did(on_a100):
    for case, before in PEAKS.items():
        result = on_a100[case]
        assert result["peak"] <= 1.02 * before, (case, result["peak"])
        assert result["attention"] == ("cudnn" if "cudnn" in case else "pallas_triton")
        assert sum(result["memory"].values()) == result["peak"] and result["notes"] == []
        kept, expected = result["memory"]["activations"], result["expected"]["activations"]
        assert kept == pytest.approx(expected, rel=0.04 if "none" in case else 1e-6), case


@pytest.mark.xdist_group("3t")
def test_3t_on_a100_overlaps_sends_with_matmuls():
    """By xla.options, a layer has two gathers of weights, and one reduce-scatter and one all-reduce of gradients."""
    found = compile_for("a100-40g:2x8", "beside")["beside"]
    forward, backward = sorted(found, key=len)
    matmuls = lambda kind, body: [n for what, size, n in body if what == kind and size > 2**20]
    assert [len(matmuls("all-gather", body)) for body in (forward, backward)] == [2, 2]
    assert sum(size for what, size, _ in forward if what == "all-gather") == pytest.approx(88.1e6 / 8, rel=0.01)  # a shard
    assert matmuls("all-gather", forward)[1] >= 2
    (scattered,), (reduced,) = matmuls("reduce-scatter", backward), matmuls("all-reduce", backward)
    assert scattered >= 3 and reduced >= 5


TRITON = {"full": 2, "save_matmuls": 2, "save_matmuls_and_attention": 1, "none": 1}  # forward kernels of a layer, by policy


@pytest.mark.xdist_group("3t")
@pytest.mark.parametrize("remat", TRITON)
def test_a_layer_on_a100_computes_no_more_than_its_policy_says(on_a100, remat):
    """As compiled: 7 matmuls forward and 14 backward, and the kernels of attention. XLA may split one up, but not save any.

    Also with 16 sequences, where it is 9 forward if XLA assumes less memory than a run has.
    """
    for sequences in (8, 16):
        layers = on_a100[f"{sequences},{remat}"]["layers"]
        assert layers["kernels"] == ["attention_dkv", "attention_dq"] + ["attention_forward"] * TRITON[remat]
        again = 6 if remat == "full" else 0  # q k v o gate up, but not down, the last one
        if remat != "none":
            assert layers["products"] == [7, 14 + again]


# cases of PEAKS in which XLA recomputes matmuls to save memory: a layer's matmuls, and the share of the step's FLOPs
AGAIN = {
    "16,none": (10, 14, 0.162),  # it does not fit
}


@pytest.mark.xdist_group("3t")
@pytest.mark.parametrize("case", PEAKS)
def test_matmuls_that_xla_recomputes_are_counted(on_a100, case):
    result, backward = on_a100[case], 14 + 6 * (",full" in case)
    ran, wanted = result["executed"], result["asked"]
    assert (wanted["forward"], wanted["backward"]) == (7, backward)
    forward, backward, part = AGAIN.get(case, (7, backward, 0))
    assert (round(ran["forward"]), round(ran["backward"])) == (forward, backward)
    assert result["recomputed"] == pytest.approx(part, abs=0.001)
    assert ran["flops"] == pytest.approx((1 + part) * wanted["flops"], rel=1e-3)


@pytest.mark.xdist_group("3t")
def test_the_parts_of_a_step_of_3t_on_a100(on_a100):
    """The prediction of 2026-11-29: copies, elementwise work, sends and gaps may exceed it by at most 2%."""
    parts = {name: part["middle"] for name, part in on_a100["8,save_matmuls_and_attention"]["milliseconds"].items()}
    assert parts["matmuls"] == pytest.approx(813.5e12 / (0.77 * 312e12) * 1e3, rel=1e-3)
    for name, most in {"elementwise": 656, "copies": 253, "exposed": 138, "gaps": 20}.items():
        assert 0 < parts[name] < 1.02 * most, (name, parts[name])
    hundred_and_nine = 9 * 2 * 8 * 2048 * 2048 / 2 * 2048 * 22 * 8 / 1e12  # TFLOP of attention's nine matmuls
    assert 1e3 * hundred_and_nine / parts["attention"] == pytest.approx(201, rel=0.3)  # TFLOP/s of the three kernels together


@pytest.mark.xdist_group("3t")
def test_with_cudnn_a_layer_on_a100_recomputes_nothing(on_a100):
    cudnn = on_a100["8,save_matmuls_and_attention,cudnn,2"]["layers"]
    assert (cudnn["products"], cudnn["kernels"]) == ([7, 14], ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"])
    # 2 of [B, S, V] and 6 of every weight for each token; a kernel's dq and dk, dv both compute scores and dp
    tokens = 2_097_152
    expected = tokens * (6 * 1_034_420_224 + (2 + 5) * 22 * 2048 * 2048)
    for of in ("asked", "executed"):
        assert on_a100["8,save_matmuls_and_attention,cudnn,2"][of]["flops"] == pytest.approx(expected, rel=1e-3)
        more = tokens * 2 * 22 * 2048 * 2048
        assert on_a100["8,save_matmuls_and_attention"][of]["flops"] == pytest.approx(expected + more, rel=1e-3)


@pytest.mark.xdist_group("3t")
def test_norms_rope_and_swiglu_are_fused_on_a100(on_a100):
    """No kernel of a layer only copies, casts or transposes an array of [B, S, F]."""
    moved = on_a100["8,save_matmuls_and_attention"]["layers"]["moved"]
    assert not [line for n, line in moved if n >= ELEMENTS]


@pytest.mark.xdist_group("3t")
@pytest.mark.parametrize("case", PEAKS)
def test_what_layers_save_on_a100_is_written_once(on_a100, case):
    """No array that 22 layers save is first filled with zeros (13.4 GiB per micro-batch) or copied from zeros (6.9)."""
    assert on_a100[case]["layers"]["filled"] == []


@pytest.mark.xdist_group("v5e")
def test_3t_on_v5e_has_splash_attention_and_recomputes_nothing(on_v5e):
    assert on_v5e["attention"] == "pallas_tpu"
    names = ["splash_mha_dkv_no_residuals", "splash_mha_dq_no_residuals", "splash_mha_fwd_residuals"]
    assert on_v5e["layers"]["kernels"] == names
    assert on_v5e["executed"]["flops"] == pytest.approx(on_v5e["asked"]["flops"], rel=1e-4)  # though split up for rings
    assert on_v5e["recomputed"] == 0 and min(part["high"] for part in on_v5e["milliseconds"].values()) >= 0
    # one is turned round for the ring of permutes that a matmul beside a reduce-scatter becomes
    assert len([line for n, line in on_v5e["layers"]["moved"] if n >= ELEMENTS // 2]) <= 1


ALONE = {  # kernels by what runs: one forward, and its backward
    "pallas_triton": ["attention_dkv", "attention_dq", "attention_forward"],
    "cudnn": ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"],
    "pallas_tpu": ["splash_mha_dkv_no_residuals", "splash_mha_dq_no_residuals", "splash_mha_fwd_residuals"],
}


@pytest.mark.parametrize(
    ("on", "impl"),
    [
        pytest.param("a100-40g:1x1", "pallas_triton", marks=pytest.mark.xdist_group("a100")),
        pytest.param("a100-40g:1x1", "cudnn", marks=pytest.mark.xdist_group("a100")),
        pytest.param("rtx3090:1x1", "pallas_triton", marks=pytest.mark.xdist_group("a100")),
        pytest.param("h100:1x1", "pallas_triton", marks=pytest.mark.xdist_group("h100")),
        pytest.param("h100:1x1", "cudnn", marks=pytest.mark.xdist_group("h100")),
        pytest.param("v5e:2x2", "pallas_tpu", marks=pytest.mark.xdist_group("v5e")),
    ],
)
def test_attention_compiles_at_the_1b_shape(on, impl):
    """With documents and without, heads of 64 and 128; no [S, S] of scores in memory (a mask of documents is, for cuDNN)."""
    found = compile_for(on, f"attention:{impl}")[f"attention:{impl}"]
    assert found["plain"][0] == found["wide"][0] == ALONE[impl]
    assert len(found["documents"][0]) == len(ALONE[impl])
    a_mask = 8 * 2048 * 2048 * 2 / 2**20
    if on[0] != "v":  # TPUs turn q, k and v round first
        assert found["plain"][1] < 5 and found["documents"][1] < (5 if impl == "pallas_triton" else 2.1 * a_mask)


# compiled for an A100: instructions per HMMA of the loop off the diagonal, which may grow by 2%, and bytes that ptxas spills
LOOPS = {
    ("plain", "forward"): (4.94, 0),
    ("plain", "dq"): (3.14, 0),
    ("plain", "dkv"): (3.25, 88),
    ("documents", "forward"): (6.17, 0),
    ("documents", "dq"): (4.17, 0),
    ("documents", "dkv"): (3.64, 100),
    ("fp16", "forward"): (4.94, 0),
    ("fp16", "dq"): (3.14, 0),
    ("fp16", "dkv"): (3.25, 88),
    ("wide", "forward"): (3.66, 0),
    ("wide", "dq"): (2.60, 0),
    ("wide", "dkv"): (2.70, 88),
}


@pytest.mark.xdist_group("a100")
def test_the_loops_of_our_attention_kernels_execute_no_more_than_they_did(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # conftest.py turns LLVM's optimizations off
    if reason := bench_static.lacks("a100-40g"):
        pytest.skip(reason)
    cases = list(dict.fromkeys(case for case, _ in LOOPS))
    compiled = lambda: bench_static.compiled("a100-40g", cases)
    rows = {(row["case"], row["kernel"]): row for row in kept.result([*SOURCES, "tools/bench_static.py"], cases, compiled)}
    assert rows.keys() == LOOPS.keys()
    for name, (instructions, spilled) in LOOPS.items():
        row, loop = rows[name], rows[name]["loops"][0]
        assert row["arch"] == "sm_80" and row["blocks_an_sm"] == (1 if name == ("wide", "forward") else 2)
        assert loop["instructions"] / loop["tensor"] <= 1.02 * instructions, name
        assert row["spilled"] <= spilled + 8 and not any(part["spills"] for part in row["loops"]), name
        if name[0] == "plain":  # one ex2 a pair, and 4 of forward's maxima; XLA's exp2 would compare each pair too
            assert loop["mufu"] == {"forward": 64 + 4, "dq": 32, "dkv": 32}[name[1]] and loop["mask"] < 16, name


@pytest.mark.xdist_group("3t")
def test_the_command_for_3t_on_a100(tmp_path):
    if not installed("a100-40g"):
        pytest.skip("no compiler for a100-40g here: pip install '.[plan]'")
    argv = ["--config", str(TESTS.parent / "configs/3t.py"), "--on", "a100-40g:2x8", "--json"]
    command = [sys.executable, "-m", "tinyllama_jax.plan", *argv]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=ENV, timeout=600)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["fits"] and out["largest_seqs_per_device"] == 16 and out["budget_bytes"] == int(0.92 * 42_298_834_944)
    rates, parts = out["tokens_per_second_per_device"], out["milliseconds"]
    assert 20_000 < rates["low"] < 24_000 < rates["middle"] < rates["high"] < 30_000  # the original's 24,000 are in the range
    for level, opposite in (("low", "high"), ("middle", "middle"), ("high", "low")):
        assert rates[opposite] == pytest.approx(131_072 / sum(part[level] for part in parts.values()) * 1e3)
        assert out["days"][level] == pytest.approx(1_430_512 * 2_097_152 / 16 / rates[opposite] / 86_400)
        assert out["cost"][level] == pytest.approx(out["days"][level] * 24 * 16 * 2.745)
    assert "exposed communication" in done.stderr and "at most 268 of 312 TFLOP/s" in done.stderr
    (largest,) = out["sizes"]
    assert out["recommended_seqs_per_device"] == largest["seqs_per_device"] == 16
    assert largest["matmuls_per_layer"] == {"forward": 7, "backward": 14} and largest["recomputed"] == 0
    assert rates["middle"] < largest["tokens_per_second_per_device"]["middle"] and "warning" not in done.stderr
    assert "24,000 tokens/s a GPU" in done.stderr


@pytest.mark.xdist_group("h100")
def test_h100_gathers_and_scatters_within_its_node():
    (result,) = compile_for("h100:1x8", "1,8,float32").values()
    assert times(weights(result, "all-gather")) == MOVES + LAYERS_MOVES
    assert times(weights(result, "reduce-scatter")) == MOVES
    assert not weights(result, "all-reduce") and result["notes"] == []


@pytest.mark.parametrize(
    ("on", "words"),
    [
        pytest.param("a100-40g:1x2", "Shared memory size limit exceeded: requested", marks=pytest.mark.xdist_group("a100")),
        pytest.param("v5e:2x2", "would exceed memory (size=134217728)", marks=pytest.mark.xdist_group("v5e")),
    ],
)
def test_a_kernel_too_large_for_the_chip_is_an_error_of_plan(on, words):
    said = compile_for(on, "overflow")["overflow"]
    assert said.startswith(f"--on={on}: its compiler refuses the step: ") and words in said


@pytest.mark.parametrize(
    ("on", "entry", "most"),
    [  # copies once a chunk of tokens, outside the loop: (of weights, of the cache); MiB of temporaries
        pytest.param("a100-40g:1x1", {1: (0, 0), 8: (0, 0)}, 10, marks=pytest.mark.xdist_group("a100")),
        # a TPU's compiler turns the cache, and with 8 rows three matrices a layer, once a chunk: docs/log.md
        pytest.param("v5e:1x1", {1: (0, 88), 8: (66, 88)}, 500, marks=pytest.mark.xdist_group("v5e")),
    ],
)
def test_decoding_copies_neither_weights_nor_the_cache_for_a_token(on, entry, most):
    """At the 1.1B's shape in bf16: 22 layers, a cache of 512 positions."""
    for case, result in compile_for(on, "decoding:1", "decoding:8").items():
        weights_copied, cache_copied = entry[int(case.partition(":")[2])]
        in_loop = lambda lines: [line for line in lines if not line.startswith("main")]
        assert not in_loop(result["weights"]) and not in_loop(result["cache"]), result
        assert len(result["weights"]) <= weights_copied and len(result["cache"]) <= cache_copied
        assert result["temporaries"] < most


def python(on: str, code: str) -> str:
    """What a process of its own prints that executes `code` with `m`, the machine `on`."""
    if not installed(on):
        pytest.skip(f"no compiler for {on} here: pip install '.[plan]'")
    code = f"m = targets.machine({on!r}); {code}"
    code = f"from tinyllama_jax.base import sharding, config as c; from tinyllama_jax.planning import targets; {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.xdist_group("v5e")
@pytest.mark.parametrize(
    ("on", "n"), [("v4:2x2x4", 16), ("v5p:2x2x4", 16), ("v6e:4x4", 16), ("v5e:1x1", 1), ("tpu7x:2x2x1", 8)]
)
def test_every_kind_of_slice_has_its_devices(on, n):
    kind = targets.TARGETS[on.split(":")[0]].kind
    assert python(on, "print(len(m.devices), m.devices[0].device_kind)") == f"{n} {kind}"


@pytest.mark.xdist_group("v5e")
@pytest.mark.parametrize(
    ("on", "mesh", "shape"),
    [("v4:4x4x4", (-1, 8, 1), (8, 8, 1)), ("v4:4x4", (2, 8, 1), (2, 8, 1)), ("v6e:4x8", (4, 8, 1), (4, 8, 1))],
)
def test_a_mesh_whose_axes_are_not_the_slices_own(on, mesh, shape):
    made = python(
        on, f"mesh = sharding.make_mesh(c.Mesh{mesh}, m.devices); print(mesh.devices.shape, len(set(mesh.devices.flat)))"
    )
    assert made == f"{shape} {math.prod(shape)}"


@pytest.mark.parametrize("on", ["v5e:3x5", "v6e:1x3"])
def test_a_slice_that_does_not_exist_is_a_mistake(on):
    if not installed(on):
        pytest.skip(f"no compiler for {on} here: pip install '.[plan]'")
    with pytest.raises(UserError, match=f"--on={on}: no such machine, says the compiler"):
        targets.machine(on)


@pytest.mark.parametrize(
    ("on", "case"),
    [
        pytest.param("a100-40g:1x8", "scoring:4,2", marks=pytest.mark.xdist_group("a100")),
        pytest.param("v5e:2x4", "scoring:1,1", marks=pytest.mark.xdist_group("v5e")),
    ],
)
def test_scoring_in_training_casts_and_turns_no_stack_of_layers(on, case):
    """Else XLA for GPUs transposes a third of the stack of fp32 weights before the loop, and XLA for TPUs casts all of it."""
    (less, few), (most, many) = compile_for(on, case)[case]
    assert many - few < 0.02 * (most - less) and many < 0.3 * most, (few, many, most)
