"""Compiles the train step of a small model for a machine that is not here: `compile_for.py ON DATA,FSDP,DTYPE ...` -> JSON.

A process of its own, since compilers keep what they know of one GPU for the next, and write what the tests read to file
descriptor 2.
"""

import dataclasses
import json
import math
import sys

import jax

from tinyllama_jax import config as c
from tinyllama_jax import sharding, step, targets

# embedding and head 32,000 x 256 x 4 B = 31 MiB each; 2 micro-batches of 2 sequences a device, the loss in 2 chunks of each
MODEL = c.Model(3, 256, 4, 2, 768, 32_000, 256, remat="save_matmuls_and_attention", attention="xla", loss_chunk=256)
SEQUENCES, ACCUMULATION = 2, 2


def compiled(on: str, data: int, fsdp: int, reduce_dtype: str) -> dict:
    """What the tests ask of a program: its collectives, and the elements of each leaf of the state, in all and on a device."""
    mesh = sharding.make_mesh(c.Mesh(data, fsdp, 1), targets.devices(on))
    model = dataclasses.replace(MODEL, reduce_dtype=reduce_dtype)
    train = c.Train(10, ACCUMULATION * SEQUENCES * data * fsdp * model.seq_len, SEQUENCES)
    config = c.Config("x", model, c.Data({"x": 1}), c.Optim(1e-3, 1e-4, 2, 0.1, 1.0), train, c.Checkpoint(1))
    with jax.set_mesh(mesh):
        program = step.build(config, mesh)
        batch = step.Batch(
            jax.ShapeDtypeStruct((*program.shape, model.seq_len + 1), "uint16", sharding=program.batch.tokens),
            jax.ShapeDtypeStruct(program.shape, "int32", sharding=program.batch.length),
        )
        executable = program.train.lower(program.state, batch).compile()
    state = [
        (jax.tree_util.keystr(path), leaf.size, math.prod(leaf.sharding.shard_shape(leaf.shape)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(program.state)
    ]
    return {
        "collectives": [r._asdict() for r in targets.collectives(executable.as_text(), mesh)],
        "state": state,
        "peak": executable.memory_analysis().peak_memory_in_bytes,
    }


if __name__ == "__main__":
    on, *cases = sys.argv[1:]
    results = {}
    for case in cases:
        data, fsdp, reduce_dtype = case.split(",")
        results[case] = compiled(on, int(data), int(fsdp), reduce_dtype)
    print(json.dumps(results))
