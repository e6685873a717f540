"""Scaling laws: how large a model and how many tokens, for the least training, or training and inference, at a given loss.

Sizes are parameters (N in the papers, not this project's N), `tokens` those trained on (D), losses nats a token. Sources:
Hoffmann et al. 2022 (arXiv 2203.15556, "Chinchilla"), Besiroglu et al. 2024 (arXiv 2404.10102), Sardana et al. 2024 (arXiv
2401.00448v3, "Beyond Chinchilla-Optimal", and the constants in github.com/nikhilsardana/beyond-chinchilla).

A run of a given loss is known by one number, `odds`: A/N^alpha over B/D^beta. The larger, the smaller N and the larger D. 6 N D
is least where odds alpha/beta = 1; with T inference tokens, 6 N D + 2 N T is least where it is 1 + T/(3 D). As D grows with the
odds, this falls as they rise: there is one such place, and it lies between the first and 1 + T/(3 D there) times the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tinyllama_jax.base.errors import UserError


class Run(NamedTuple):
    """A model of `size` parameters trained on `tokens` tokens; not whole numbers where a law gives them."""

    size: float
    tokens: float

    def flops(self, inference_tokens: float = 0.0) -> float:
        """FLOPs of training (6 a parameter and token) and of inference (2 a parameter and token, read or written)."""
        return self.size * (6 * self.tokens + 2 * inference_tokens)


TINYLLAMA = Run(1_100_048_384, 1_430_512 * 2_097_152)


@dataclass(frozen=True)
class Law:
    """The loss (nats a token) of N parameters after D tokens: E + A / N^alpha + B / D^beta. Hoffmann et al., equation 2."""

    E: float  # what no model and no data take away: the entropy of the text
    A: float
    B: float
    alpha: float
    beta: float
    source: str

    def loss(self, size: float, tokens: float) -> float:
        """Nats a token."""
        return self.E + self.A / size**self.alpha + self.B / tokens**self.beta

    def tokens_for(self, loss: float, sizes: np.ndarray) -> np.ndarray:
        """With how many tokens models of `sizes` parameters reach the loss; inf for one that is too small to reach it."""
        rest = _reducible(self, loss) - self.A / np.asarray(sizes, float) ** self.alpha
        with np.errstate(divide="ignore"):
            return (self.B / np.maximum(rest, 0.0)) ** (1 / self.beta)


# The first has the exponents that Sardana et al. take from De Vries 2023 ("Go smol or go home"), for those of the second, which
# Hoffmann et al. print, make the best model for Gopher's compute 32B and not the 40B of their figure 4. Their TeX source has
# 0.33917084, 0.2849083 and E = 1.6934 (says Besiroglu et al.); with these it is 40.4B, with the first 41.7B.
HOFFMANN = Law(1.69, 406.4, 410.7, 0.336, 0.283, "Hoffmann et al. 2022, approach 3; exponents of Sardana et al., appendix A")
HOFFMANN_ROUNDED = Law(1.69, 406.4, 410.7, 0.34, 0.28, "Hoffmann et al. 2022, appendix D, equation 10")
BESIROGLU = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658, "Besiroglu et al. 2024, section 3: the same runs fitted anew")
LAWS = {"hoffmann": HOFFMANN, "hoffmann-rounded": HOFFMANN_ROUNDED, "besiroglu": BESIROGLU}


@dataclass(frozen=True)
class Prices:
    """What training and inference cost. Defaults: Sardana et al., section 6, figure 6, and NVIDIA's A100 datasheet, dense.

    By them the paper's example does not come out quite as the paper has it, here or in the authors' code: tests/test_laws.py.
    """

    train_peak: float = 312e12  # FLOP/s: A100, bfloat16
    train_price: float = 1.50  # dollars an hour: A100 of 80 GB
    train_mfu: float = 0.5
    inference_peak: float = 624e12  # operations/s: A100, int8: quantised after training
    inference_price: float = 1.10  # dollars an hour: A100 of 40 GB
    input_mfu: float = 0.5  # tokens that are read, together
    output_mfu: float = 0.01  # tokens that are written, one after the other
    input_share: float = 70 / 285  # of inference tokens: 70 read and 215 written a request, the average of LMSYS-Chat-1M

    def __post_init__(self):
        for name, value in vars(self).items():
            most = 1.0 if name.endswith(("mfu", "share")) else 1e30
            if not 0 < value <= most:
                raise UserError(f"{name}={value:g}: must be above 0 and at most {most:g}")

    @property
    def weight(self) -> float:
        """How much dearer a FLOP of inference is than one of training."""
        train = self.train_price / (self.train_peak * self.train_mfu)
        time = self.input_share / self.input_mfu + (1 - self.input_share) / self.output_mfu
        return self.inference_price / self.inference_peak * time / train

    def dollars(self, run: Run, inference_tokens: float) -> float:
        """Dollars of training, and of reading and writing `inference_tokens`. Sardana et al., section 6."""
        return run.flops(self.weight * inference_tokens) / (self.train_peak * self.train_mfu) * self.train_price / 3600


def compute_optimal(law: Law, flops: float) -> Run:
    """The run of the least loss among those that take `flops` to train. Hoffmann et al., equation 4."""
    if not 0 < flops < math.inf:
        raise UserError(f"{flops:g} FLOPs: must be a positive number")
    both = law.alpha + law.beta
    size = (law.alpha * law.A / (law.beta * law.B)) ** (1 / both) * (flops / 6) ** (law.beta / both)
    return Run(size, flops / 6 / size)


def compute_optimal_for(law: Law, loss: float) -> Run:
    """The run that takes the fewest training FLOPs among those that reach the loss."""
    return _at(law, loss, law.beta / law.alpha)


def inference_optimal(law: Law, loss: float, inference_tokens: float) -> Run:
    """The run that takes the fewest FLOPs, training and inference, among those that reach the loss. Sardana et al., section 2.

    `inference_tokens` are all that the model will ever read or write. Raises UserError for a loss at or below the law's E.
    """
    if not 0 <= inference_tokens <= 1e30:
        raise UserError(f"{inference_tokens:g} inference tokens: must be 0 to 1e30")
    scale = law.beta / law.alpha
    low, high = math.log(scale), math.log(scale) + math.log1p(inference_tokens / (3 * compute_optimal_for(law, loss).tokens))
    for _ in range(60):  # each halves the bracket; a double has 53 bits
        middle = (low + high) / 2
        if math.exp(middle) / scale < 1 + inference_tokens / (3 * _at(law, loss, math.exp(middle)).tokens):
            low = middle
        else:
            high = middle
    return _at(law, loss, math.exp(high))


def money_optimal(law: Law, loss: float, inference_tokens: float, prices: Prices | None = None) -> Run:
    """The run that costs the fewest dollars, training and inference, among those of that loss. Sardana et al., section 6.

    Prices say only how many tokens an inference token counts for: `Prices.weight`, 13.9 by default.
    """
    return inference_optimal(law, loss, (prices or Prices()).weight * inference_tokens)


class Overtrained(NamedTuple):
    """What `overtrained` finds."""

    loss: float  # nats a token, as the law predicts it
    cheapest: Run  # to train, of that loss
    factor: float  # training FLOPs over those of `cheapest`
    inference_tokens: float | None  # with which the run is itself `inference_optimal`; None: with none


def overtrained(law: Law, size: float, tokens: float) -> Overtrained:
    """How far a run is past the cheapest training of its loss, and the inference that it takes to make good on that.

    TinyLlama, 1,100,048,384 parameters and 3e12 tokens, takes 3.7 times the training FLOPs (by BESIROGLU: 6.7 times) of the
    cheapest run with the same predicted loss, 4.9B on 181B tokens (4.8B on 102B). Of all such runs it takes the least in its
    life if it serves 24e12 (43e12) tokens, and costs the least, by the default `Prices`, at 1.7e12 (3.1e12): small and long is
    no waste for a model that many will run. But that is 2,727 tokens a parameter, far outside both fits, and fits at usual
    ratios promise too much of further tokens at such ones (Sardana et al., section 5), so the true figures are rather larger;
    the laws are of tokens seen once, of another text and tokenizer; and they put no value on memory or latency.
    """
    loss = law.loss(size, tokens)
    cheapest = compute_optimal_for(law, loss)
    excess = law.alpha * law.A / size**law.alpha / (law.beta * law.B / tokens**law.beta) - 1  # = T / (3 D) where it is optimal
    inference_tokens = None if excess < -1e-9 else max(0.0, 3 * tokens * excess)
    return Overtrained(loss, cheapest, Run(size, tokens).flops() / cheapest.flops(), inference_tokens)


class Tradeoff(NamedTuple):
    """A curve to draw, and its lowest point. That of a model with this loss is at `Run(size, tokens).flops(T)`."""

    sizes: np.ndarray  # parameters
    tokens: np.ndarray  # to train on for the loss; inf for a model that is too small to reach it
    flops: np.ndarray  # of training and inference
    optimum: Run


def tradeoff(law: Law, loss: float, inference_tokens: float, sizes: np.ndarray) -> Tradeoff:
    """What models of `sizes` parameters take to reach the loss and then to serve `inference_tokens`."""
    curve = Run(np.asarray(sizes, float), law.tokens_for(loss, sizes))
    return Tradeoff(*curve, curve.flops(inference_tokens), inference_optimal(law, loss, inference_tokens))


def _reducible(law: Law, loss: float) -> float:
    if not law.E < loss < math.inf:
        raise UserError(f"loss {loss:g}: must be above {law.E:g}, which no model gets below by this law ({law.source})")
    return loss - law.E


def _at(law: Law, loss: float, odds: float) -> Run:
    """The run of the loss whose A/N^alpha is `odds` times its B/D^beta."""
    rest = _reducible(law, loss) / (1 + odds)
    return Run((law.A / (rest * odds)) ** (1 / law.alpha), (law.B / rest) ** (1 / law.beta))
