"""DPO's loss and gradient against TRL's own trainer, on the same tokens, weights and reference."""

import jax
import numpy as np
import pytest
import test_preferences
from models import transformers_model
from test_preferences import BETA, PAIRS, config, params  # noqa: F401  fixtures

from tinyllama_jax.base.dims import LEARNED
from tinyllama_jax.core import model
from tinyllama_jax.core.losses import Answers, Preferences
from tinyllama_jax.hub import llama

batch = test_preferences.batch
WHY = "pip install --no-deps trl"


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Builds TRL's DPOTrainer for two models."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason=WHY)
    trl, transformers = pytest.importorskip("trl", reason=WHY), pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(104)}, unk_token="0"))
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")
    arguments = {"use_cpu": True, "report_to": [], "max_length": None, "bf16": False, "gradient_checkpointing": False}
    data = datasets.Dataset.from_list([{"prompt": "1 2", "chosen": " 3", "rejected": " 4"}])  # it wants some; we give batches

    def build(policy, reference):
        options = trl.DPOConfig(output_dir=str(tmp_path), beta=BETA, **arguments)
        return trl.DPOTrainer(model=policy, ref_model=reference, args=options, train_dataset=data, processing_class=words)

    return build


@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_loss_and_gradient_are_trl_s(trainer, config, params, batch):  # noqa: F811
    import torch

    reference = jax.tree.map(lambda w: 5 * w, model.init(jax.random.key(1), config.model))
    theirs = transformers_model(config.model, params, attn_implementation="eager").train()
    trained = trainer(theirs, transformers_model(config.model, reference, attn_implementation="eager"))

    losses = np.pad(np.asarray(Answers().token_losses(reference, batch, config)), ((0, 0), (1, 0)))
    batch = batch._replace(reference=np.where(batch.marks & LEARNED > 0, -losses, 0).astype(np.float32))
    n = int(Preferences().predicted(batch, config).sum())
    mean = lambda params: Preferences().sums(params, batch, config).loss / n
    loss, gradient = jax.jit(jax.value_and_grad(mean))(params)

    sequences = []  # (prompt, answer) of each side
    for row, pairs in enumerate(PAIRS):
        ends = np.cumsum(pairs)
        parts = np.split(batch.tokens[row], ends)[:-1]
        sequences += zip(parts[::2], parts[1::2], strict=True)
    inputs = {name: np.zeros((2 * n, 16), np.int64) for name in ("input_ids", "attention_mask", "completion_mask")}
    for i, (prompt, answer) in enumerate([*sequences[::2], *sequences[1::2]]):  # all chosen ones, then all rejected ones
        size = len(prompt) + len(answer)
        inputs["input_ids"][i, :size] = np.concatenate([prompt, answer])
        inputs["attention_mask"][i, :size] = 1
        inputs["completion_mask"][i, len(prompt) : size] = 1
    want = trained.compute_loss(theirs, {name: torch.tensor(a) for name, a in inputs.items()})
    want.backward()
    np.testing.assert_allclose(loss, want.item(), rtol=1e-5)
    assert abs(loss - np.log(2)) > 0.1  # the two models differ
    wanted = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    for name, ours in llama.to_hf(gradient, config.model):
        assert np.linalg.norm(ours - wanted[name]) <= 1e-3 * np.linalg.norm(wanted[name]), name
