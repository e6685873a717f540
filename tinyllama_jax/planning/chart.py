"""Draws curves as SVG, for a page without scripts or pictures from elsewhere."""

import html
import math
import typing

import numpy as np

from tinyllama_jax.planning.history import Points

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 342, 22, 184  # of the frame, in units of the picture
NEAR = 1e-9  # two numbers this near, as a share of their size, are one


class Curve(typing.NamedTuple):
    """A named curve in color number `color` of run number `run`; `dots`: each point counts, as a validation does."""

    name: str
    run: int
    color: int
    points: Points
    dots: bool = False


class Scale(typing.NamedTuple):
    """Maps values to positions, linearly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False  # only whole numbers have a tick

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """The positions of `values`; those outside the scale lie on its ends."""
        low, high = (math.log10(v) if self.log else v for v in (self.low, self.high))
        values = np.log10(np.maximum(values, self.low)) if self.log else np.asarray(values, float)
        return self.start + np.clip((values - low) / (high - low), 0, 1) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers on the scale."""
        if self.log and self.high / self.low >= 10:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1, 2, 5) if self.high / self.low < 1e3 else (1,)
            values = [factor * 10.0**e for e in exponents[:: max(1, len(exponents) // 5)] for factor in factors]
            return [value for value in values if self.low <= value <= self.high]
        rough = (self.high - self.low) / 4
        rough = max(rough, 1.0) if self.whole else rough
        size = 10.0 ** math.floor(math.log10(rough))
        each = size * next(k for k in (1, 2, 5, 10) if k * size >= rough * 0.999)
        first = math.ceil(self.low / each - 1e-9)
        return [i * each for i in range(first, math.floor(self.high / each + 1e-9) + 1)]


def short(value: float) -> str:
    """A number in few characters: 12,345 is 12.3k, 3e12 is 3T."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size * 0.9999995:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}" if abs(value) < 1e16 else f"{value:.3g}"
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.3g}".replace("e-0", "e-")


def y_scale(curves: list[Curve], levels: list[float], log: bool, zero: bool, cut: bool) -> tuple[Scale, float]:
    """The vertical scale, and the highest value. `zero`: begin at 0. `cut`: end below a few values that are far higher."""
    lows, highs = (np.concatenate([getattr(c.points, name) for c in curves]) for name in ("low", "high"))
    low, high = min([*lows, *levels]), max([*highs, *levels])
    top = high
    if cut and len(lows) >= 20:
        ends = np.quantile(lows, 0.02), np.quantile(highs, 0.98), low, high
        small, large, least, most = (np.log(v) if log else v for v in ends)
        limit = max([large + (large - small) / 2, *(np.log(level) if log else level for level in levels)])
        if small < large and most - least > 1.5 * (limit - least) > 0:
            top = float(np.exp(limit) if log else limit)
    low = min(low, 0.0) if zero else low
    if log:
        low, top = (low, top) if top > low * (1 + NEAR) else (low / 2, low * 2)
    else:
        margin = (top - low) * 0.04
        low, top = _apart(low - (0 if zero and low == 0 else margin), top + margin, 0.1)
    return Scale(low, top, BOTTOM, TOP, log), high


def _apart(low: float, high: float, least: float) -> tuple[float, float]:
    """(low, high); if they are too near to divide by their distance, moved apart by a tenth of their size, or `least` at 0."""
    size = max(abs(low), abs(high))
    room = size * 0.1 if size > 1e-30 else least
    return (low, high) if high - low > max(size * NEAR, 1e-30) else (low - room, high + room)


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))


def _draw(curve: Curve, x: np.ndarray, y: Scale) -> str:
    """A curve: its means as a line, and lowest to highest as a band; or dots, each with a bar for its error."""
    points, out = curve.points, ""
    kind, name = f'class="{{}} r{curve.run} c{curve.color % 8} d{curve.color // 8 % 2}"', html.escape(curve.name)
    low, high, mean = y(points.low), y(points.high), y(points.mean)
    if np.any(low - high > 0.5):
        if curve.dots:
            d = "".join(f"M{a:.1f} {b:.1f}V{c:.1f}" for a, b, c in zip(x, low, high, strict=True))
            out += f'<path {kind.format("error")} d="{d}"/>'
        else:
            d = _path(np.concatenate([x, x[::-1]]), np.concatenate([high, low[::-1]])) + "Z"
            out += f'<path {kind.format("band")} d="{d}"/>'
    out += f'<path {kind.format("line dashed" if curve.dots else "line")} d="{_path(x, mean)}"><title>{name}</title></path>'
    if curve.dots or len(x) < 12:
        d = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x, mean, strict=True))
        out += f'<path {kind.format("dots")} d="{d}"/>'
    return out


def svg(
    curves: list[tuple[Curve, np.ndarray]],
    y: Scale,
    x_name: str,
    unit: str,
    levels: dict[str, float],
    marks: list[tuple[int, str, np.ndarray]],
    text: str,
) -> str:
    """A picture of curves with their x values. `levels`: name -> value of horizontal lines. `marks`: (run, class, x values)."""
    ends = [v for _, values in curves for v in (values[0], values[-1])]
    low, high = _apart(min(ends), max(ends), 1)
    x = Scale(0 if 0 <= low < 0.1 * high else low, high, LEFT, RIGHT, whole=True)
    parts = [
        f'<svg class="{x_name}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(text)}" '
        f'data-x="{x.low} {x.high}" data-y="{y.low} {y.high} {int(y.log)}">'
    ]
    for value in y.ticks():
        at = float(y(np.array(value)))
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 4}" y="{at + 4:.1f}">{short(value)}</text>')
    for value in x.ticks():
        at = float(x(np.array(value)))
        parts.append(
            f'<path class="grid" d="M{at:.1f} {BOTTOM}v4"/><text class="x" x="{at:.1f}" y="{BOTTOM + 16}">{short(value)}</text>'
        )
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>')
    parts.append(f'<text x="4" y="12">{html.escape(unit)}{", log scale" if y.log else ""}</text>')
    parts.append(f'<text class="x" x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 5}">{x_name}</text>')
    for name, value in levels.items():
        at = float(y(np.array(value)))
        parts.append(f'<path class="level" d="M{LEFT} {at:.1f}H{RIGHT}"/>')
        parts.append(f'<text class="y" x="{RIGHT}" y="{at - 3:.1f}">{html.escape(name)}</text>')
    parts += [_draw(curve, x(values), y) for curve, values in curves]
    for run, kind, values in marks:
        at = sorted(set(np.round(x(values), 1).tolist()))
        d = "".join(f"M{a} {TOP}V{BOTTOM}" if kind == "start" else f"M{a} {BOTTOM - 8}v8" for a in at)
        parts.append(f'<path class="{kind} r{run}" d="{d}"/>')
    return "".join([*parts, "</svg>"])
