"""Stands in for `tinyllama_jax.train` under a scheduler with GPUs that do not exist: which of them would this process take?

JAX's own detection of the cluster runs as in `jax.distributed.initialize`, up to the driver. Prints a line of
JSON a process: its node, the GPUs by their numbers on the node, and those that JAX would take without our list.
"""

import json
import os

from jax._src import clusters

from tinyllama_jax.base.errors import run_main
from tinyllama_jax.run import addresses, cluster


def main(argv: list[str]) -> None:
    process, processes = cluster.identity()
    given = addresses.arguments(process, processes, 10)
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    _, count, index, ids = detect(None, None, None, given["local_device_ids"], None, 10)
    assert (count, index) == (processes, process), (count, index)
    alone = detect(None, None, None, None, None, 10)[3]
    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    takes = lambda chosen: [visible[i] for i in chosen] if chosen else visible  # as JAX: an empty list means all visible ones
    addresses.check_gpus("gpu" if visible else "cpu", len(takes(ids)) if visible else 1)
    line = {"node": os.environ["SLURMD_NODENAME"], "promised": addresses.promised(), "takes": takes(ids)}
    os.write(1, (json.dumps(line | {"alone": [gpu for i, gpu in enumerate(visible) if i in alone]}) + "\n").encode())


run_main(main)
