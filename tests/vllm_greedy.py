"""vLLM takes an export as it is: the same greedy tokens as Transformers in fp32, and the chat template.

make vllm-venv, then: python tests/vllm_greedy.py [--vllm .venv-vllm/bin/python]      (part of make test-long)
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXTS = ["def f(x):", "import os\n", "  two  spaces", "naïve 日本語 😀", "return the", "a"]
TALK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi 😀\n"}]
NEW = 24
# one process, no threads bound to cores, a cache of 1 GB
SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}


def make_export(folder: Path) -> Path:
    """A small model of random weights, exported from a run as a user does it."""
    import numpy as np
    from test_export_tokenizer import KINDS, train

    from tinyllama_jax import convert
    from tinyllama_jax.base import config as c
    from tinyllama_jax.base import dims
    from tinyllama_jax.core import model
    from tinyllama_jax.data import chat
    from tinyllama_jax.run import checkpoint

    cfg = c.Model(3, 128, 4, 2, 192, 1_000, 256, precision="params=float32,compute=float32,output=float32", residual="float32")
    rng = np.random.default_rng(1)
    flat = {p.name: rng.normal(p.kind == "norm", 0.2, dims.shape(p, cfg)).astype(np.float32) for p in dims.PARAMETERS}
    config = c.Config("run", cfg, c.Data({"a": 1}), c.Optim(1e-3, 0, 0, 0, 1), c.Train(9, 256, 1), c.Checkpoint(1))
    checkpoint.save_import(folder / "run", config, model.unflatten(flat), step=1)
    (folder / "run/tokenizer").mkdir()
    train(folder / "run/tokenizer/tokenizer.model", **KINDS["prefix"])
    (folder / "run/tokenizer/chat_template.jinja").write_text(chat.TEMPLATES["zephyr"].source)
    convert.export(folder / "run", folder / "hf")
    return folder / "hf"


def with_transformers(folder: Path) -> list[list[int]]:
    """Ids of the chat, then the greedy tokens after it and after each text."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    language_model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    talk = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    prompts = [talk, *(tokenizer(text)["input_ids"] for text in TEXTS)]
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [talk, *(language_model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts)]


def with_vllm(folder: Path) -> list[list[int]]:
    """The same. Runs in the environment of vLLM."""
    import vllm

    llm = vllm.LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=256, seed=0)
    greedy = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    (talk,) = llm.chat([TALK], greedy)
    return [list(talk.prompt_token_ids), *(list(each.outputs[0].token_ids) for each in [talk, *llm.generate(TEXTS, greedy)])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--vllm", type=Path, default=ROOT / ".venv-vllm/bin/python", help="vLLM's Python (.venv-vllm/bin/python)"
    )
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        print("\n" + json.dumps(with_vllm(args.inside)))
        return
    if not args.vllm.is_file():
        raise SystemExit(f"{args.vllm} is not there: make vllm-venv, or give the Python of another environment")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests/data"), str(ROOT / "tests")]
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_export(Path(scratch))
        line = [args.vllm, __file__, "--inside", folder]
        done = subprocess.run(line, capture_output=True, text=True, env=os.environ | SETTINGS, timeout=900)
        if done.returncode:
            raise SystemExit(done.stdout[-2_000:] + done.stderr[-4_000:])
        ours, theirs = with_transformers(folder), json.loads(done.stdout.strip().splitlines()[-1])
    for what, want, got in zip(["the chat's ids", "chat", *TEXTS], ours, theirs, strict=True):
        assert want == got, f"{what!r}: Transformers gives {want}, vLLM {got}"
    print(f"vLLM gives Transformers' ids of a chat, and its {NEW} greedy tokens on {len(TEXTS) + 1} prompts")


if __name__ == "__main__":
    main()
