"""Compiles train steps for a machine that is not here: `compile_for.py ON CASE ...` -> JSON.

A case is DATA,FSDP,DTYPE of a small model; "overflow": its attention a kernel that no machine has the memory for;
"3t:SEQUENCES,REMAT" (with data=2) or "3t:SEQUENCES,REMAT,ATTENTION,DATA": configs/3t.py; "beside": what its layers send while
they compute; "decoding:ROWS": the engine's decoding program; "scoring:FSDP,TENSOR": that of scores during training; or
"attention:IMPL": that alone, forward and backward, at the 1.1B's shape, with documents and without, and with heads of 128. A
process of its own, since compilers keep what they know of one GPU for the next.
"""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu, triton
from jax.sharding import PartitionSpec as P

from tinyllama_jax.base import cli, sharding
from tinyllama_jax.base import config as c
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core.program import build, shape_of_batch
from tinyllama_jax.kernels import attention
from tinyllama_jax.planning import compiled, targets

# embedding and head 32,000 x 256 x 4 B = 31 MiB each; 2 micro-batches of 2 sequences a device, the loss in 2 chunks of each
MODEL = c.Model(3, 256, 4, 2, 768, 32_000, 256, remat="save_matmuls_and_attention", attention="xla", loss_chunk=256)
SEQUENCES, ACCUMULATION = 2, 2


def small(data: int, fsdp: int, reduce_dtype: str) -> c.Config:
    model = dataclasses.replace(MODEL, reduce_dtype=reduce_dtype)
    train = c.Train(10, ACCUMULATION * SEQUENCES * data * fsdp * model.seq_len, SEQUENCES)
    optim, mesh = c.Optim(1e-3, 1e-4, 2, 0.1, 1.0), c.Mesh(data, fsdp, 1)
    return c.Config("x", model, c.Data({"x": 1}), optim, train, c.Checkpoint(1), mesh)


def config_of(case: str) -> c.Config:
    if case.startswith("3t:"):
        sequences, remat, impl, data = (case[3:] + ",auto,2" * (case.count(",") == 1)).split(",")
        path = str(Path(__file__).parents[1] / "configs/3t.py")
        options = {
            "train.seqs_per_device": sequences,
            "model.remat": remat,
            "model.attention": impl,
            "mesh.data": str(data),
            "mesh.fsdp": "-1",
        }
        return cli.override(cli.read(path), options)
    data, fsdp, reduce_dtype = case.split(",")
    return small(int(data), int(fsdp), reduce_dtype)


def overflowing(on: str):
    """An attention with a kernel in it that wants more memory on the chip than there is."""
    x = jax.ShapeDtypeStruct((512, 512), "float32")

    def multiply(x_ref, out_ref):  # two tiles of 1 MiB, where a block of an A100 has 163 KiB
        out_ref[:] = x_ref[:] @ x_ref[:].T

    def copy(x_ref, out_ref, _):
        out_ref[:] = x_ref[:]

    if on.startswith("v"):
        product = pl.pallas_call(copy, out_shape=x, scratch_shapes=[tpu.VMEM((8_192, 8_192), "float32")])  # 256 MiB of 128
    else:
        product = pl.pallas_call(multiply, out_shape=x, compiler_params=triton.CompilerParams(num_warps=4))
    run = jax.shard_map(lambda: product(jnp.ones(x.shape, x.dtype))[0, 0], in_specs=(), out_specs=P(), check_vma=False)
    return lambda q, k, v, **_: q + lax.stop_gradient(run()).astype(q.dtype)


def attention_alone(impl: str, device: jax.Device) -> dict:
    """Name -> the kernels of forward and backward together, and MiB of temporaries."""
    out, where = {}, jax.sharding.SingleDeviceSharding(device)
    for name, H, documents in (("plain", 64, False), ("documents", 64, True), ("wide", 128, False)):
        shape = lambda heads, H=H: jax.ShapeDtypeStruct((8, 2048, heads, H), jnp.bfloat16, sharding=where)
        ids = jax.ShapeDtypeStruct((8, 2048), jnp.int32, sharding=where)

        def both(q, k, v, do, ids, documents=documents):
            out, vjp = jax.vjp(lambda *qkv: attention.attention(*qkv, ids if documents else None, impl=impl), q, k, v)
            return out, vjp(do)

        program = jax.jit(both).trace(shape(32), shape(4), shape(4), shape(32), ids).lower().compile()
        out[name] = kernels(program.as_text()), program.memory_analysis().temp_size_in_bytes / 2**20
    return out


def kernels(text: str) -> list[str]:
    """The names of the attention kernels in a program or a part of it, one for each time that it stands there."""
    calls = [line for line in text.splitlines() if " custom-call(" in line]
    names = (re.search(r"__cudnn\$\w+|attention_(?:forward|dq|dkv)|splash_\w+", line) for line in calls)
    return sorted(name[0] for name in names if name)


def of_layers(text: str, saved: str) -> dict:
    """What the program of a step does in its two loops over layers, forward and backward.

    `products`: matmuls. `moved`: operations that do nothing but copy, cast or turn something: (elements, line). What a compiler
    does for one layer before or after a loop, to send beside the next, is not in it. `filled`: operations that only fill or
    copy a whole array of what all layers save, whose shape begins with `saved`.
    """
    computations = {}
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%(\S+) \(", line):
            name = header[1]
        elif m := re.match(r"\s+(?:ROOT )?%\S+ = \(?\w+\[([\d,]*)\].*? ([\w-]+)\(", line):
            size = math.prod(int(n) for n in m[1].split(",") if n)
            called = re.findall(r"%([\w.-]+)", " ".join(re.findall(r"(?:calls|called_computations)=\{?([^,}\s]+)", line)))
            computations.setdefault(name, []).append((m[2], size, line, called))

    def within(name: str):
        for entry in computations.get(name, ()):
            yield entry
            for callee in entry[3]:
                yield from within(callee)

    moves = {"parameter", "bitcast", "copy", "convert", "transpose", "reshape"}
    products, moved, found = [0, 0], [], []
    own = {
        body: kernels("\n".join(line for *_, line, _ in computations[body])) for body in re.findall(r"body=%([\w.-]+)", text)
    }
    for body, names in own.items():
        loops = [
            inner for op, _, line, _ in computations[body] if op == "while" for inner in re.findall(r"body=%([\w.-]+)", line)
        ]
        if not names or any(own[inner] for inner in loops):  # not a layer's; or around the loop over layers
            continue
        found += names
        dots = [line for op, _, line, _ in within(body) if op in ("dot", "convolution") and "/layers/" in line]
        products["transpose(jvp" in "".join(dots)] += len(dots)
        for op, size, line, called in computations[body]:
            parts = {o for callee in called for o, *_ in within(callee)}
            if op in ("copy", "convert", "transpose") or (op == "fusion" and parts and parts <= moves):
                moved.append((size, line.strip()[:150]))
    fills = {"parameter", "constant", "bitcast", "broadcast", "copy"}
    filled = [
        line.strip()[:150]
        for op, _, line, called in (entry for entries in computations.values() for entry in entries)
        if f"[{saved}," in line.partition(f" {op}(")[0]
        and {o for callee in called for o, *_ in within(callee)} <= fills
        and op in ("copy", "broadcast", "fusion")
    ]
    return {"products": products, "moved": moved, "kernels": sorted(found), "filled": filled}


def state_of(config: c.Config, machine: targets.Machine) -> list:
    """Of each leaf of the state: path, elements in all, elements on a device."""
    mesh = sharding.make_mesh(config.mesh, machine.devices)
    with jax.set_mesh(mesh):
        leaves = jax.tree_util.tree_leaves_with_path(build(config, mesh).state)
    return [(jax.tree_util.keystr(p), leaf.size, math.prod(leaf.sharding.shard_shape(leaf.shape))) for p, leaf in leaves]


def beside(machine: targets.Machine) -> list[list[tuple[str, int, int]]]:
    """configs/3t.py: of each loop over layers that sends anything large, (what, operands' bytes, matmuls before it is done)."""
    config = config_of("3t:8,save_matmuls_and_attention")
    mesh = sharding.make_mesh(config.mesh, machine.devices)
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        batch = shape_of_batch(program, config.model.seq_len)
        text = program.train.lower(program.state, batch).compile().as_text()
    computations = {part.split(" ")[0]: part for part in re.split(r"\n(?:ENTRY )?%(?=\S+ \()", text)}
    types = dict(re.findall(r"^\s+(?:ROOT )?%(\S+) = (.+?) [\w-]+\(", text, re.M))

    def size(kind: str) -> int:
        arrays = re.findall(r"[a-z](\d+)\[([\d,]*)\]", kind)
        return sum(math.prod(int(n) for n in dims.split(",") if n) * int(bits) // 8 for bits, dims in arrays)

    instruction = re.compile(r"^\s+(?:ROOT )?%(\S+) = .+? ([\w-]+)\(([^)]*)\)(.*)$", re.M)
    out = []
    for body in re.findall(r"body=%([\w.-]+)", text):
        running, done = {}, []
        for name, op, operands, rest in instruction.findall(computations[body]):
            called = "".join(computations[c] for c in re.findall(r"calls=%([\w.-]+)", rest))
            names = re.findall(r"%([\w.-]+)", operands)
            if " dot(" in called or "gemm" in called or "fmha" in rest:
                running = {key: (what, n, matmuls + 1) for key, (what, n, matmuls) in running.items()}
            elif op.endswith("-start"):
                running[name] = op.removesuffix("-start"), sum(size(types[n]) for n in names), 0
            elif op.endswith("-done"):
                done.append(running.pop(names[0]))
        if {"all-gather", "reduce-scatter"} & {what for what, n, _ in done if n > 2**20} and "while(" not in computations[body]:
            out.append(done)
    return out


def decoding(machine: targets.Machine, rows: int) -> dict:
    """The engine's decoding program at the 1.1B's shape, in bf16 on one device: what it moves, and its temporaries in MiB.

    `weights`: operations that copy, cast or turn an array as large as the smallest matrix of a layer. `cache`: those that do so
    with a layer's keys or values.
    """
    from tinyllama_jax.inference import device, forward
    from tinyllama_jax.inference.sampling import Settings
    from tinyllama_jax.inference.speculative import Draft
    from tinyllama_jax.inference.weights import Weights

    jax.default_backend = lambda: machine.devices[0].platform  # what a run there would see
    model = dataclasses.replace(cli.read(str(Path(__file__).parents[1] / "configs/3t.py")).model, residual="auto")
    mesh, D, T = sharding.make_mesh(c.Mesh(1, 1, 1), machine.devices[:1]), model.d_model, 512
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype, sharding=jax.NamedSharding(mesh, P()))
    kv = model.n_kv_heads * model.d_head
    matrices = {"q": (D, D), "k": (D, kv), "v": (D, kv), "o": (D, D)}
    matrices |= {"gate": (D, model.d_ff), "up": (D, model.d_ff), "down": (model.d_ff, D)}
    norms = {name: shape(D, dtype=jnp.float32) for name in ("attention_norm", "mlp_norm")}
    layers = tuple({name: shape(*s) for name, s in matrices.items()} | norms for _ in range(model.n_layers))
    weights = Weights(shape(model.vocab_size, D), layers, shape(D, dtype=jnp.float32), shape(D, model.vocab_size))
    number = lambda dtype, *s: shape(rows, *s, dtype=dtype)
    settings = Settings(*(number(jnp.int32 if name == "top_k_B" else jnp.float32) for name in Settings._fields))
    of_rows = device.Rows(*(number(jnp.int32),) * 3, number(jnp.int32, device.STOPS), number(jnp.uint32, 2), settings, None)
    with jax.set_mesh(mesh):
        cache = jax.eval_shape(lambda: forward.init_cache(model, rows, T))
        cache = jax.tree.map(lambda a: shape(*a.shape), cache)
        state = device.State(cache, None, shape(rows, model.vocab_size, dtype=bool))
        arguments = weights, None, state, of_rows, shape(dtype=jnp.int32), shape(dtype=bool)
        program = device.decode.trace(*arguments, model, Draft()).lower().compile()
    moved, text = {"weights": [], "cache": []}, program.as_text()
    fused, inside = set(re.findall(r"calls=%([\w.-]+)", text)), ""  # what a fusion does with its operands stays on the chip
    held = rows * model.n_kv_heads * T * model.d_head
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%(\S+) \(", line):
            inside = "" if header[1] in fused else header[1]
        if not inside:
            continue
        # a fusion by its name, which says what it is made of
        m = re.match(r"\s+(?:ROOT )?%(\S+) = \w+\[([\d,]+)\]\S* (copy|transpose|convert|copy-start|fusion)\(", line)
        size = math.prod(int(n) for n in m[2].split(",")) if m else 0
        if size and (m[3] != "fusion" or re.match(r"(wrapped_)?(copy|transpose|convert|bitcast)", m[1])):
            if size == held:
                moved["cache"].append(f"{inside}: {line.strip()[:150]}")
            elif size in {math.prod(s) for s in matrices.values()} | {D * model.vocab_size}:
                moved["weights"].append(f"{inside}: {line.strip()[:150]}")
    return moved | {"temporaries": program.memory_analysis().temp_size_in_bytes / 2**20}


def scoring(machine: targets.Machine, fsdp: int, tensor: int) -> list[tuple[int, int]]:
    """(bytes of the trainer's weights, temporaries of scoring with them in bf16) on a device, of 4 and of 12 layers."""
    from tinyllama_jax.base import dims
    from tinyllama_jax.core import model as core_model
    from tinyllama_jax.evals import score
    from tinyllama_jax.inference import weights

    jax.default_backend = lambda: machine.devices[0].platform  # what a run there would see
    mesh, out = sharding.make_mesh(c.Mesh(1, fsdp, tensor), machine.devices[: fsdp * tensor]), []
    whole = jax.NamedSharding(mesh, P())
    for n_layers in (4, 12):
        model = c.Model(n_layers, 1_024, 16, 4, 2_816, 4_096, 256)
        shardings = sharding.parameter_shardings(mesh, model)
        like = lambda a, shardings=shardings: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=shardings[a.name])
        params = core_model.unflatten({a.name: like(a) for a in dims.arrays(model, c.Lora())})
        number = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
        stack = weights.of_trainer(params)
        stack = stack._replace(layers=stack.layers._replace(scale=number, one=number))
        rows = score._Rows(*[jax.ShapeDtypeStruct((fsdp, 256), jnp.int32, sharding=whole)] * 4)
        with jax.set_mesh(mesh):
            memory = score._hidden.trace(stack, rows, model).lower().compile().memory_analysis()
        out.append((memory.argument_size_in_bytes, memory.temp_size_in_bytes))
    return out


def main(on: str, cases: list[str]) -> dict:
    """What the tests ask of each case."""
    jax.config.update("jax_enable_compilation_cache", False)
    machine, out, parse = targets.machine(on), {}, compiled.hlo.parse
    for case in cases:
        if case == "beside":
            out[case] = beside(machine)
            continue
        if case == "overflow":
            attention.attention = overflowing(on)
            try:
                compiled.compile_step(small(1, len(machine.devices), "float32"), machine)
                out[case] = None
            except UserError as error:
                out[case] = str(error)
            continue
        if case.startswith("decoding:"):
            out[case] = decoding(machine, int(case.partition(":")[2]))
            continue
        if case.startswith("scoring:"):
            out[case] = scoring(machine, *map(int, case.partition(":")[2].split(",")))
            continue
        if case.startswith("attention:"):
            out[case] = attention_alone(case.partition(":")[2], machine.devices[0])
            continue
        config, texts = config_of(case), []
        compiled.hlo.parse = lambda text, texts=texts: (texts.append(text), parse(text))[1]
        found = compiled.compile_step(config, machine)
        out[case] = {
            "collectives": [r._asdict() for r in found.collectives],
            "state": state_of(config, machine),
            "peak": found.peak,
            "memory": found.memory,
            "expected": found.expected,
            "notes": found.notes,
            "attention": found.attention,
            "asked": found.asked,
            "executed": found.executed,
            "recomputed": found.recomputed,
            "milliseconds": compiled.step_milliseconds(found),
            "layers": of_layers(texts[0], f"{config.model.n_layers},{config.train.seqs_per_device},{config.model.seq_len}"),
        }
    return out


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2:])))
