"""Scaling laws: the model size and tokens that reach a loss with the least training, or training plus inference.

Sizes are parameters (N in the papers), `tokens` are training tokens (D), losses are nats a token. Sources:
Hoffmann et al. 2022 (arXiv 2203.15556, "Chinchilla"), Besiroglu et al. 2024 (arXiv 2404.10102), Sardana et al. 2024 (arXiv
2401.00448v3, "Beyond Chinchilla-Optimal", and the constants in github.com/nikhilsardana/beyond-chinchilla).

Among runs of the same loss, one number identifies a run: `odds` = (A/N^alpha) / (B/D^beta). Larger odds mean a smaller N and a
larger D. 6 N D is smallest at odds = beta/alpha; call its D there D'. With T inference tokens, 6 N D + 2 N T is smallest where
odds = (1 + T/(3 D)) beta/alpha. D grows with the odds, so exactly one run meets this, and D >= D' bounds its odds from above.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tinyllama_jax.base.errors import UserError


class Run(NamedTuple):
    """A model of `size` parameters trained on `tokens` tokens. A law gives fractions."""

    size: float
    tokens: float

    def flops(self, inference_tokens: float = 0.0) -> float:
        """Returns the FLOPs of training (6 a parameter and token) plus inference (2 a parameter and token)."""
        return self.size * (6 * self.tokens + 2 * inference_tokens)


TINYLLAMA = Run(1_100_048_384, 1_430_512 * 2_097_152)


@dataclass(frozen=True)
class Law:
    """The loss (nats a token) of N parameters after D tokens: E + A / N^alpha + B / D^beta. Hoffmann et al., equation 2."""

    E: float  # the entropy of the text, a lower bound for any model
    A: float
    B: float
    alpha: float
    beta: float
    source: str

    def loss(self, size: float, tokens: float) -> float:
        """Nats a token."""
        return self.E + self.A / size**self.alpha + self.B / tokens**self.beta

    def tokens_for(self, loss: float, sizes: np.ndarray) -> np.ndarray:
        """Returns the tokens with which models of `sizes` parameters reach the loss; inf for models that are too small."""
        left_to_data = _reducible(self, loss) - self.A / np.asarray(sizes, float) ** self.alpha
        with np.errstate(divide="ignore"):
            return (self.B / np.maximum(left_to_data, 0.0)) ** (1 / self.beta)


# HOFFMANN has the exponents that Sardana et al. take from De Vries 2023 ("Go smol or go home"). With the rounded exponents that
# Hoffmann et al. print, the best model for Gopher's compute has 32B parameters, not the 40B of their figure 4. According to
# Besiroglu et al. their TeX source has 0.33917084, 0.2849083 and E = 1.6934, which gives 40.4B; HOFFMANN gives 41.7B.
HOFFMANN = Law(1.69, 406.4, 410.7, 0.336, 0.283, "Hoffmann et al. 2022, approach 3; exponents of Sardana et al., appendix A")
HOFFMANN_ROUNDED = Law(1.69, 406.4, 410.7, 0.34, 0.28, "Hoffmann et al. 2022, appendix D, equation 10")
BESIROGLU = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658, "Besiroglu et al. 2024, section 3: a new fit of the same runs")
LAWS = {"hoffmann": HOFFMANN, "hoffmann-rounded": HOFFMANN_ROUNDED, "besiroglu": BESIROGLU}


@dataclass(frozen=True)
class Prices:
    """The costs of training and inference. Defaults: Sardana et al., section 6, figure 6, and NVIDIA's A100 datasheet (dense).

    With them neither we nor the authors' code reproduce the paper's example exactly: see tests/planning/test_laws.py.
    """

    train_peak: float = 312e12  # FLOP/s: A100, bfloat16
    train_price: float = 1.50  # dollars an hour: A100 of 80 GB
    train_mfu: float = 0.5
    inference_peak: float = 624e12  # operations/s: A100, int8, quantised after training
    inference_price: float = 1.10  # dollars an hour: A100 of 40 GB
    input_mfu: float = 0.5  # of prefill: tokens are read many at once
    output_mfu: float = 0.01  # of decoding: tokens are written one after another
    input_share: float = 70 / 285  # of inference tokens; a request of LMSYS-Chat-1M reads 70 and writes 215 on average

    def __post_init__(self):
        for name, value in vars(self).items():
            most = 1.0 if name.endswith(("mfu", "share")) else 1e30
            if not 0 < value <= most:
                raise UserError(f"{name}={value:g}: must be above 0 and at most {most:g}")

    @property
    def weight(self) -> float:
        """Returns the price of a FLOP of inference, relative to one of training."""
        train = self.train_price / (self.train_peak * self.train_mfu)
        time = self.input_share / self.input_mfu + (1 - self.input_share) / self.output_mfu
        return self.inference_price / self.inference_peak * time / train

    def dollars(self, run: Run, inference_tokens: float) -> float:
        """Returns the dollars for training and for `inference_tokens`. Sardana et al., section 6."""
        return run.flops(self.weight * inference_tokens) / (self.train_peak * self.train_mfu) * self.train_price / 3600


def compute_optimal(law: Law, flops: float) -> Run:
    """Returns the run of lowest loss that takes `flops` to train. Hoffmann et al., equation 4."""
    if not 0 < flops < math.inf:
        raise UserError(f"{flops:g} FLOPs: must be a positive number")
    both = law.alpha + law.beta
    size = (law.alpha * law.A / (law.beta * law.B)) ** (1 / both) * (flops / 6) ** (law.beta / both)
    return Run(size, flops / 6 / size)


def compute_optimal_for(law: Law, loss: float) -> Run:
    """Returns the run that reaches the loss with the fewest training FLOPs."""
    return _at(law, loss, law.beta / law.alpha)


def inference_optimal(law: Law, loss: float, inference_tokens: float) -> Run:
    """Returns the run that reaches the loss with the fewest FLOPs of training and inference. Sardana et al., section 2.

    `inference_tokens`: all tokens that the model will ever read or write. Raises UserError for a loss at or below the law's E.
    """
    if not 0 <= inference_tokens <= 1e30:
        raise UserError(f"{inference_tokens:g} inference tokens: must be 0 to 1e30")
    scale = law.beta / law.alpha
    low, high = math.log(scale), math.log(scale) + math.log1p(inference_tokens / (3 * compute_optimal_for(law, loss).tokens))
    for _ in range(60):  # each halves the interval; a double has 53 bits
        middle = (low + high) / 2
        if math.exp(middle) / scale < 1 + inference_tokens / (3 * _at(law, loss, math.exp(middle)).tokens):
            low = middle
        else:
            high = middle
    return _at(law, loss, math.exp(high))


def money_optimal(law: Law, loss: float, inference_tokens: float, prices: Prices | None = None) -> Run:
    """Returns the run that reaches the loss for the fewest dollars of training and inference. Sardana et al., section 6.

    Prices only multiply the inference tokens, by `Prices.weight`: 13.9 by default.
    """
    return inference_optimal(law, loss, (prices or Prices()).weight * inference_tokens)


class Overtrained(NamedTuple):
    """The result of `overtrained`."""

    loss: float  # nats a token, by the law
    cheapest: Run  # the run of that loss that is cheapest to train
    factor: float  # training FLOPs over those of `cheapest`
    inference_tokens: float | None  # the number at which the run itself is `inference_optimal`; None if there is none


def overtrained(law: Law, size: float, tokens: float) -> Overtrained:
    """Compares a run with the cheapest run of the same loss, and returns how much inference makes up for the difference.

    TinyLlama (1,100,048,384 parameters, 3e12 tokens) takes 3.7 times the training FLOPs (BESIROGLU: 6.7 times) of the cheapest
    run with the same predicted loss, 4.9B parameters on 181B tokens (4.8B on 102B). With inference it needs the fewest FLOPs
    if it serves 24e12 (43e12) tokens, and costs the least, with the default `Prices`, at 1.7e12 (3.1e12). But 2,727 tokens a
    parameter lie far outside both fits, and fits at usual ratios overestimate what further tokens gain (Sardana et al., section
    5), so the true figures are larger. The laws were fitted to tokens seen once, to another text and another tokenizer, and do
    not count memory or latency.
    """
    loss = law.loss(size, tokens)
    cheapest = compute_optimal_for(law, loss)
    excess = law.alpha * law.A / size**law.alpha / (law.beta * law.B / tokens**law.beta) - 1  # T / (3 D) at the optimum
    inference_tokens = None if excess < -1e-9 else max(0.0, 3 * tokens * excess)
    return Overtrained(loss, cheapest, Run(size, tokens).flops() / cheapest.flops(), inference_tokens)


class Tradeoff(NamedTuple):
    """A curve to draw, and its lowest point. A run with this loss lies on it, at `Run(size, tokens).flops(T)`."""

    sizes: np.ndarray  # parameters
    tokens: np.ndarray  # to reach the loss; inf for a model that is too small
    flops: np.ndarray  # of training and inference
    optimum: Run


def tradeoff(law: Law, loss: float, inference_tokens: float, sizes: np.ndarray) -> Tradeoff:
    """Returns what models of `sizes` parameters take to reach the loss and then serve `inference_tokens`."""
    curve = Run(np.asarray(sizes, float), law.tokens_for(loss, sizes))
    return Tradeoff(*curve, curve.flops(inference_tokens), inference_optimal(law, loss, inference_tokens))


def _reducible(law: Law, loss: float) -> float:
    if not law.E < loss < math.inf:
        raise UserError(f"loss {loss:g}: must be above {law.E:g}: by this law ({law.source}) no model gets below it")
    return loss - law.E


def _at(law: Law, loss: float, odds: float) -> Run:
    """Returns the run of the loss whose A/N^alpha is `odds` times B/D^beta."""
    data_term = _reducible(law, loss) / (1 + odds)
    return Run((law.A / (data_term * odds)) ** (1 / law.alpha), (law.B / data_term) ** (1 / law.beta))
