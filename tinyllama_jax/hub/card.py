"""The model card of an exported folder: its README.md, with the metadata that huggingface.co reads."""

from collections.abc import Sequence

from tinyllama_jax.base import dims
from tinyllama_jax.base.config import Config, Model

UNKNOWN = "What these weights were trained on is not known here. FILL IN."


def text(model: Model, template: bool, bos: bool, history: str) -> str:
    """The card of a model.

    `template`: whether its folder has a chat template. `bos`: whether each text began with bos. `history`: a paragraph on its
    training, from `training`, or UNKNOWN.
    """
    tags = ["llama", "jax", *(["conversational"] if template else [])]
    stretched = f", context stretched {model.rope_scaling:g} times ({model.rope_type})" if model.rope_scaling != 1 else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
# license: FILL IN, such as apache-2.0; without this line nobody may use the model
tags: [{", ".join(tags)}]
---

# A Llama of {dims.n_parameters(model):,} parameters

{_use(template)}

## Architecture

| | |
|---|---|
| layers x width | {model.n_layers} x {model.d_model:,} |
| query heads, key-value heads, width of a head | {model.n_heads}, {model.n_kv_heads}, {model.d_head} |
| hidden width of an MLP (SwiGLU) | {model.d_ff:,} |
| vocabulary | {model.vocab_size:,} |
| context, in tokens | {model.seq_len:,} |
| RoPE | theta {model.rope_theta:g}{stretched} |
| each text begins with bos | {"yes" if bos else "no"} |

## Training

{history}

## License

FILL IN: the licence of the weights, here and in the metadata above.
"""


def _use(template: bool) -> str:
    given = '[{"role": "user", "content": "Hello!"}]' if template else '"Once upon a time"'
    kind = (
        "The chat template is in the tokenizer." if template else "A base model without a chat template: it continues a text."
    )
    return f"""```python
from transformers import pipeline

generate = pipeline("text-generation", model="THIS_FOLDER")
print(generate({given}, max_new_tokens=64)[0]["generated_text"])
```

{kind}"""


def training(config: Config, step: int, tokens: int, sources: Sequence[tuple[str, float]]) -> str:
    """A paragraph on a run's training up to `step`, after `tokens` tokens. `sources`: name and weight of each data source."""
    optim, rows = config.optim, [f"- `{name}`: weight {weight:g}" for name, weight in sources]
    start = " The weights at the start were another run's: FILL IN which." if config.init.from_ else ""
    return f"""Trained with tinyllama_jax for {step:,} steps on {tokens:,} tokens.{start}
AdamW: peak learning rate {optim.peak_lr:g}, {optim.warmup_steps:,} steps of warm-up, weight decay {optim.weight_decay:g}.
Computed in {config.model.compute_dtype}, with weights in float32.

Data, with the weight of each source in the mixture at the end:

""" + "\n".join(rows)
