"""Mixture weights of data sources: one number, or a piecewise linear function of the tokens seen; read, written, evaluated."""

import itertools
from fractions import Fraction

Weight = float | tuple[tuple[float, float], ...]  # constant, or knots (tokens, weight): linear between them, constant outside


def exact(text: str) -> Fraction:
    """Parses a number such as 1.5e12 or 7/10. Raises OverflowError if it is too long or large, ValueError if no number."""
    if len(text) > 100 or len(text.lower().partition("e")[2]) > 4:  # Fraction("1e999999999") would never end
        raise OverflowError(f"the number {text[:40]} is too long")
    number = Fraction(text)
    if abs(number) > 1e300:
        raise OverflowError(f"the number {text} is too large")
    return number


def parse(text: str) -> Weight:
    """Parses 0.7 or WEIGHT@TOKENS..WEIGHT@TOKENS. Raises ValueError or ArithmeticError as `exact` does."""
    if "@" not in text:
        return float(exact(text))
    knots = [knot.split("@") for knot in text.split("..")]
    return tuple((float(exact(tokens)), float(exact(weight))) for weight, tokens in knots)


def text(weight: Weight) -> str:
    """Inverse of `parse`."""
    short = lambda x: f"{x:.6g}" if float(f"{x:.6g}") == x else repr(float(x))
    return "..".join(f"{short(w)}@{short(t)}" for t, w in weight) if isinstance(weight, tuple) else short(weight)


def sources_text(sources: dict[str, Weight]) -> str:
    """`data.sources` as it is written on the command line: DIR:WEIGHT,DIR:WEIGHT."""
    return ",".join(f"{path}:{text(weight)}" for path, weight in sources.items())


def knots_of(weight: Weight) -> tuple[tuple[float, float], ...]:
    """The knots (tokens, weight); a constant has one, at 0 tokens."""
    return weight if isinstance(weight, tuple) else ((0, weight),)


def weight_at(weight: Weight, tokens: float) -> Fraction:
    """The weight after `tokens` tokens, in exact arithmetic: 0.7 means 7/10, not the nearest binary fraction."""
    knots = [(Fraction(str(t)), Fraction(str(w))) for t, w in knots_of(weight)]
    at = min(max(Fraction(tokens), knots[0][0]), knots[-1][0])
    for (t0, w0), (t1, w1) in itertools.pairwise(knots):
        if at <= t1:
            return w0 + (w1 - w0) * (at - t0) / (t1 - t0)
    return knots[-1][1]
