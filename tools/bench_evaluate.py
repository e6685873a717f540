"""Items of a task per second: ours, and lm-evaluation-harness's own `hf` model at batch 1, 8 and 32, by turns, on one model.

python tools/bench_evaluate.py --checkpoint model.gguf --data DIR

Prints a JSON line for each: items per second of time, and of processor time, which other work on the machine changes less.
Needs the extra eval, torch, transformers and accelerate. All of a run's log-probabilities must agree to 1e-3.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench_common as common
import torch
import transformers
from lm_eval.models.huggingface import HFLM

from tinyllama_jax.evals import harness
from tinyllama_jax.inference import weights

logging.getLogger("lm_eval").setLevel(logging.ERROR)


def main() -> None:
    """Prints a line for each kind and batch, and one with the ratio of the best."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="a Hugging Face folder or a GGUF file")
    parser.add_argument("--data", type=Path, required=True, help="a folder with DIR/TASK, as for evaluate --data")
    parser.add_argument("--task", default="piqa", help="(piqa)")
    parser.add_argument("--items", type=int, default=60, help="of the task (60)")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median counts (3)")
    args = parser.parse_args()
    file = args.checkpoint
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name} if file.is_file() else {
        "pretrained_model_name_or_path": str(file)}  # fmt: skip
    reference = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    loaded = weights.load(file, weights="float32")
    bos = loaded.begin_with_bos
    scored = {"ours": harness.HarnessModel(loaded, bos, quiet=True)}
    for batch in (1, 8, 32):
        scored[f"hf, batch {batch}"] = HFLM(pretrained=reference, tokenizer=tokenizer, batch_size=batch, add_bos_token=bos)
    (task,) = harness.tasks([args.task], None, args.data)
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=args.items, rank=0, world_size=1)
    requests = task.instances
    wall, cpu, answers = ({name: [] for name in scored} for _ in range(3))
    scored["ours"].loglikelihood(requests, disable_tqdm=True)  # compiles
    for _ in range(args.repeats):
        for name, model in scored.items():
            began, spent = time.perf_counter(), time.process_time()
            answers[name] = model.loglikelihood(requests, disable_tqdm=True)
            wall[name].append(args.items / (time.perf_counter() - began))
            cpu[name].append(args.items / (time.process_time() - spent))
    for name in scored:
        pairs = zip(answers["ours"], answers[name], strict=True)
        off = max(abs(a[0] - b[0]) for a, b in pairs)
        print(json.dumps({"model": name, "items_per_second": common.median(wall[name]), "low": min(wall[name]),
                          "high": max(wall[name]), "items_per_cpu_second": common.median(cpu[name]),
                          "off_by": off, "ok": off <= 1e-3}))  # fmt: skip
    ratio = lambda of: common.median(of["ours"]) / max(common.median(of[name]) for name in scored if name != "ours")
    print(json.dumps({"aim": "items/s against the best of hf, at least 1.0", "ratio": ratio(wall), "cpu_ratio": ratio(cpu),
                      "load": os.getloadavg()[0], "items": args.items, "task": args.task}))  # fmt: skip


if __name__ == "__main__":
    main()
