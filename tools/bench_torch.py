"""PyTorch's side of the benchmarks: a worker of bench_train.py and bench_kernels.py. Imports no jax.

    python tools/bench_torch.py CELL       CELL: a JSON object; prints rows, one JSON object a line

A row's name says what it is: `torch` (eager) or `transformers`, then any of `.compile`, `.max` (torch.compile's
max-autotune-no-cudagraphs), `.chunk` (the loss head by chunks that backward computes again), `.remat` (each layer again).
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time

import bench_common as common
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from tinyllama_jax.hub import llama

CUDA = torch.cuda.is_available()
DEVICE, COMPUTE = ("cuda", "bfloat16") if CUDA else ("cpu", "float32")
CHUNK = 2_048  # tokens whose logits exist at one time with .chunk, as in `config.Model.loss_chunk`


def sync() -> None:
    """Waits for the device."""
    if CUDA:
        torch.cuda.synchronize()


class Block(nn.Module):
    """One layer; q, k, v in one matmul, and gate and up in another."""

    def __init__(self, m):
        super().__init__()
        self.sizes = [m.n_heads * m.d_head] + [m.n_kv_heads * m.d_head] * 2
        self.head, self.eps = m.d_head, m.norm_eps
        self.norm1, self.norm2 = nn.Parameter(torch.ones(m.d_model)), nn.Parameter(torch.ones(m.d_model))
        self.qkv = nn.Linear(m.d_model, sum(self.sizes), bias=False)
        self.o = nn.Linear(self.sizes[0], m.d_model, bias=False)
        self.gate_up = nn.Linear(m.d_model, 2 * m.d_ff, bias=False)
        self.down = nn.Linear(m.d_ff, m.d_model, bias=False)

    def forward(self, x, cos, sin):
        B, S, _ = x.shape
        h = norm(x, self.norm1, self.eps)
        q, k, v = (t.view(B, S, -1, self.head).transpose(1, 2) for t in self.qkv(h).split(self.sizes, -1))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.sizes[0] != self.sizes[1])
        x = x + self.o(a.transpose(1, 2).reshape(B, S, -1))
        gate, up = self.gate_up(norm(x, self.norm2, self.eps)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def norm(x, scale, eps):
    """RMSNorm in x's dtype (its sum is in fp32)."""
    return F.rms_norm(x, scale.shape, scale.to(x.dtype), eps).to(x.dtype)


def rotate(x, cos, sin):
    """RoPE, half-split, in fp32."""
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Llama(nn.Module):
    """The model of `tinyllama_jax.core.model`, with its residual stream in the compute dtype as there."""

    def __init__(self, m, chunk: bool, remat: bool):
        super().__init__()
        self.eps, self.chunk, self.remat = m.norm_eps, chunk, remat
        self.embed, self.head = nn.Embedding(m.vocab_size, m.d_model), nn.Linear(m.d_model, m.vocab_size, bias=False)
        self.blocks, self.norm = nn.ModuleList(Block(m) for _ in range(m.n_layers)), nn.Parameter(torch.ones(m.d_model))
        angles = torch.arange(m.seq_len)[:, None] / m.rope_theta ** (torch.arange(0, m.d_head, 2) / m.d_head)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def load(self, tensors: dict[str, np.ndarray]) -> None:
        """Takes over the tensors of a Hugging Face Llama."""
        copy = lambda to, *names: to.copy_(torch.cat([torch.from_numpy(np.asarray(tensors[name])) for name in names]))
        with torch.no_grad():
            copy(self.embed.weight, "model.embed_tokens.weight")
            copy(self.norm, "model.norm.weight")
            copy(self.head.weight, "lm_head.weight")
            for i, block in enumerate(self.blocks):
                at = f"model.layers.{i}."
                copy(block.norm1, at + "input_layernorm.weight")
                copy(block.norm2, at + "post_attention_layernorm.weight")
                copy(block.qkv.weight, *(f"{at}self_attn.{x}_proj.weight" for x in "qkv"))
                copy(block.o.weight, at + "self_attn.o_proj.weight")
                copy(block.gate_up.weight, at + "mlp.gate_proj.weight", at + "mlp.up_proj.weight")
                copy(block.down.weight, at + "mlp.down_proj.weight")

    def forward(self, tokens, reduction: str = "mean"):
        x = self.embed(tokens[:, :-1]).to(getattr(torch, COMPUTE))
        for block in self.blocks:
            again = self.remat and self.training
            x = checkpoint(block, x, self.cos, self.sin, use_reentrant=False) if again else block(x, self.cos, self.sin)
        x, labels = norm(x, self.norm, self.eps).flatten(0, 1), tokens[:, 1:].flatten()
        if not self.chunk or reduction == "none":
            return F.cross_entropy(self.head(x).float(), labels, reduction=reduction)
        part = lambda x, labels: F.cross_entropy(self.head(x).float(), labels, reduction="sum")
        pieces = zip(x.split(CHUNK), labels.split(CHUNK), strict=True)
        return sum(checkpoint(part, *piece, use_reentrant=False) for piece in pieces) / len(labels)


class Transformers(nn.Module):
    """Transformers' Llama as it comes: `attn_implementation="sdpa"`."""

    def __init__(self, m, chunk: bool, remat: bool):
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        config = llama.to_hf_config(m, None, None, "float32") | {"use_cache": False, "attn_implementation": "sdpa"}
        self.llama = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k != "architectures"}))
        if chunk:
            raise SystemExit("Transformers' Llama has no chunked loss")
        if remat:
            self.llama.gradient_checkpointing_enable()

    def load(self, tensors: dict[str, np.ndarray]) -> None:
        """Takes over the tensors."""
        self.llama.load_state_dict({name: torch.from_numpy(np.asarray(array)) for name, array in tensors.items()})

    def forward(self, tokens, reduction: str = "mean"):
        logits = self.llama(input_ids=tokens[:, :-1]).logits
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction)


def step(cell: dict) -> None:
    """The train step: fp32 weights and moments, autocast to bf16 on a GPU, fused AdamW, clipped; one row."""
    tokens = torch.from_numpy(common.tokens(cell).astype(np.int64)).to(DEVICE)
    m, (family, *options) = common.model_of(cell, COMPUTE), cell["row"].split(".")
    with torch.device(DEVICE):
        model = (Transformers if family == "transformers" else Llama)(m, "chunk" in options, "remat" in options)
    model.to(torch.float32).load(dict(llama.to_hf(common.weights(m), m)))
    autocast = lambda: torch.autocast(DEVICE, torch.bfloat16, enabled=CUDA)
    with torch.no_grad(), autocast():
        model.eval()
        measured = model(tokens[:1], "none").float().cpu().numpy()
        model.train()
    optim = common.OPTIM
    optimizer = torch.optim.AdamW(
        model.parameters(), 0.0, (optim.b1, optim.b2), optim.eps, weight_decay=optim.weight_decay, fused=True
    )
    mode = "max-autotune-no-cudagraphs" if "max" in options else "default"
    forward = torch.compile(model, mode=mode) if "compile" in options or "max" in options else model
    losses, norms = [], []

    def run() -> None:
        for group in optimizer.param_groups:
            group["lr"] = optim.peak_lr * min(1.0, (len(losses) + 1) / optim.warmup_steps)
        with autocast():
            loss = forward(tokens)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    began = time.perf_counter()
    run()
    sync()
    compile_seconds = time.perf_counter() - began
    for _ in range(common.WARM_UP - 1):
        last = common.windows(run, sync, 1, 1)[0]
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    seconds = common.windows(run, sync, common.steps_of(cell, last))
    row = {
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "compile_seconds": compile_seconds,
        "losses": [x.item() for x in losses],
        "grad_norm": norms[0].item(),
        "seconds": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if CUDA else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "reserved_bytes": torch.cuda.max_memory_reserved() if CUDA else None,
    }
    if family == "transformers":
        import transformers

        row["versions"]["transformers"] = transformers.__version__
    print(json.dumps(row | common.against_reference(measured, cell)), flush=True)


def attention(cell: dict) -> None:
    """SDPA by each backend at each shape; rows as `bench_kernels.attention` makes them."""
    dtype = getattr(torch, COMPUTE)
    for shape in cell["shapes"]:
        q, k, v, do = (torch.from_numpy(a).to(DEVICE, dtype).transpose(1, 2) for a in common.qkv(shape))
        for x in (q, k, v):
            x.requires_grad_()
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
            row = {"kind": "attention", "impl": "torch " + name.lower().removesuffix("_attention"), "shape": shape}
            try:
                print(json.dumps(row | one_attention(getattr(SDPBackend, name), q, k, v, do, shape)), flush=True)
            except (RuntimeError, AttributeError) as e:  # of memory too
                print(json.dumps(row | {"ok": None, "left_out": common.why(e)}), flush=True)


def one_attention(backend: SDPBackend, q, k, v, do, shape: dict) -> dict:
    """Errors, times and memory of one backend."""
    if shape.get("documents"):
        raise RuntimeError("SDPA's fused kernels take no segments")
    gqa = q.shape[1] != k.shape[1]

    def forward():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

    def both(do=do):
        out = forward()
        return out, *torch.autograd.grad(out, (q, k, v), do)

    with sdpa_kernel([backend]), contextlib.ExitStack() as stack:
        heads = torch.from_numpy(common.few_heads(shape)).to(do)[:, None, None]
        masked = torch.cat([torch.zeros_like(do[:-1]), do[-1:] * heads])
        measured = [x.detach().float().transpose(1, 2)[-1:].cpu().numpy() for x in both(masked)]
        row = common.attention_errors(measured, shape, COMPUTE)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        both()
        row["bytes"] = torch.cuda.max_memory_allocated() - before if CUDA else None
        row["forward_backward_seconds"] = common.seconds_of(both, sync)
        stack.enter_context(torch.no_grad())
        row["forward_seconds"] = common.seconds_of(forward, sync)
    return row | {"versions": {"torch": torch.__version__, "cuda": torch.version.cuda}}


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    what = json.loads(sys.argv[1])
    fused = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION])  # an error where neither can, not all scores
    with contextlib.nullcontext() if what.get("row", "").startswith("transformers") else fused:
        {"step": step, "attention": attention}[what.get("what", "step")](what)
