"""Line charts and heatmaps as inline SVG, coloured by the page's CSS so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 250  # of a chart, in SVG units; about its pixels on a phone
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 40  # margins around what is drawn
MAX_CELL = 26  # the largest height of a heatmap's cell

# Colours along a scale, dark to light, as (red, green, blue). LINES keeps a contrast to white and to black.
HEAT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
LINES = ((112, 88, 214), (36, 132, 200), (22, 158, 128), (140, 165, 40), (226, 140, 30))


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        points: (x, y) pairs; those that are not finite, or not positive on a logarithmic axis, are left out.
        color: a CSS colour.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: str
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """What an axis shows. `unit` is "" for plain numbers, "B" for bytes and "%" for shares of 1."""

    label: str
    log: bool = False
    unit: str = ""


def color_at(share: float, scale: Sequence[tuple[int, int, int]] = LINES) -> str:
    """The colour at a share from 0 to 1 of a scale."""
    place = min(max(share, 0.0), 1.0) * (len(scale) - 1)
    low = min(int(place), len(scale) - 2)
    mixed = (round(a + (b - a) * (place - low)) for a, b in zip(scale[low], scale[low + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def line_chart(title: str, series: Sequence[Series], x: Axis, y: Axis, legend: str = "") -> str:
    """A figure with one line per series; "" if no series has a point that can be drawn.

    legend: HTML that takes the place of the list of names.
    """
    kept = [(one, _drawable(one.points, x, y)) for one in series]
    kept = [(one, points) for one, points in kept if points]
    if not kept:
        return ""
    across = _Scale([px for _, points in kept for px, _ in points], x, LEFT, WIDTH - RIGHT)
    up = _Scale([py for _, points in kept for _, py in points], y, HEIGHT - BOTTOM, TOP)
    parts = [*_frame(across, up, x, y)]
    for one, points in kept:
        place = " ".join(f"{across(px):.1f},{up(py):.1f}" for px, py in points)
        dash = ' stroke-dasharray="5 4"' if one.dashed else ""
        shape = f'<polyline class="line" stroke="{one.color}"{dash} points="{place}">'
        if len(points) == 1:
            px, py = points[0]
            shape = f'<circle fill="{one.color}" r="3" cx="{across(px):.1f}" cy="{up(py):.1f}">'
        last = label(points[-1][1], y.unit)
        parts.append(f"{shape}<title>{escape(one.name)}, last {last}</title></{shape[1:].split(' ')[0]}>")
    names = legend or "".join(_key(one) for one, _ in kept)
    return _figure(title, parts, HEIGHT, names)


def heatmap(title: str, rows: Sequence[tuple[str, Sequence[float]]], x_label: str, y_label: str) -> str:
    """A figure with one cell per value, coloured on a logarithmic scale; "" if there are no positive values.

    rows: of each its name and its values, which are shares of 1. Rows may have different lengths.
    """
    values = [value for _, row in rows for value in row if math.isfinite(value) and value > 0]
    if not values:
        return ""
    low, high = math.log(min(values)), math.log(max(values))
    columns = max(len(row) for _, row in rows)
    cell = min(MAX_CELL, max(4, 420 // len(rows)))
    wide = (WIDTH - LEFT - RIGHT) / columns
    height = TOP + cell * len(rows) + BOTTOM
    parts = []
    for number, (name, row) in enumerate(rows):
        top = TOP + number * cell
        if number % (1 + 12 // cell) == 0:
            parts.append(_tick("end", LEFT - 6, top + cell / 2 + 4, name))
        for column, value in enumerate(row):
            shown = math.isfinite(value) and value > 0
            share = (math.log(value) - low) / (high - low or 1) if shown else 0.0
            fill = color_at(share, HEAT) if shown else "none"
            where = escape(f"{y_label} {name}, {x_label} {column}")
            parts.append(
                f'<rect x="{LEFT + column * wide:.2f}" y="{top}" width="{wide:.2f}" height="{cell}" fill="{fill}">'
                f"<title>{where}: {label(value, '%')}</title></rect>"
            )
    every = max(1, columns // 8)
    for column in range(0, columns, every):
        middle = LEFT + (column + 0.5) * wide
        parts.append(_tick("middle", middle, height - BOTTOM + 15, str(column)))
    parts += _names(x_label, y_label, height)
    scale = gradient(label(math.exp(low), "%"), label(math.exp(high), "%"), HEAT)
    return _figure(title, parts, height, scale)


def gradient(low: str, high: str, scale: Sequence[tuple[int, int, int]] = LINES) -> str:
    """A legend for colours along a scale."""
    stops = ", ".join(color_at(step / 8, scale) for step in range(9))
    bar = f'<span class="scale" style="background: linear-gradient(to right, {stops})"></span>'
    return f"<span>{escape(low)}</span>{bar}<span>{escape(high)}</span>"


def label(value: float, unit: str = "") -> str:
    """A number for people: 0.0042, 1.3e-5, 1,024, 2.4 MB, 3.3%."""
    if not math.isfinite(value):
        return str(value)
    if unit == "%":
        return f"{value * 100:.3g}%"
    if unit == "B":
        for name in ("B", "kB", "MB", "GB", "TB"):
            if value < 1000 or name == "TB":
                return f"{value:.3g} {name}"
            value /= 1000
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    if 0 < abs(value) < 1e-3:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value:.3g}"


def _drawable(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> list[tuple[float, float]]:
    return [
        (px, py)
        for px, py in points
        if math.isfinite(px) and math.isfinite(py) and (px > 0 or not x.log) and (py > 0 or not y.log)
    ]


class _Scale:
    """From values to places between `start` and `stop`, with its ticks."""

    def __init__(self, values: Sequence[float], axis: Axis, start: float, stop: float) -> None:
        self._log, self._start, self._stop = axis.log, start, stop
        low, high = min(values), max(values)
        if high - low <= 1e-6 * abs(high):  # one value: it comes in the middle
            around = max(1.0, abs(high) / 2)
            low, high = (low / 2, high * 2) if axis.log else (low - around, high + around)
        self.ticks = _log_ticks(low, high) if axis.log else _ticks(low, high)
        self._low, self._high = self._value(low), self._value(high)

    def _value(self, value: float) -> float:
        return math.log(value) if self._log else value

    def __call__(self, value: float) -> float:
        share = (self._value(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._stop - self._start)


def _ticks(low: float, high: float) -> list[float]:
    """About five round values in between."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.8)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in between; with few of them, also twice and five times these."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1,) if last - first > 2 else (1, 2, 5)
    every = 1 + (last - first) // 7
    found = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return [tick for tick in found if low <= tick <= high] or [low, high]


def _frame(across: _Scale, up: _Scale, x: Axis, y: Axis) -> list[str]:
    parts = []
    for tick in up.ticks:
        place = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(_tick("end", LEFT - 6, place + 4, label(tick, y.unit)))
    for tick in across.ticks:
        place = across(tick)
        parts.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(_tick("middle", place, HEIGHT - BOTTOM + 15, label(tick, x.unit)))
    return parts + _names(x.label, y.label, HEIGHT)


def _tick(anchor: str, x: float, y: float, text: str) -> str:
    return f'<text text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _names(x: str, y: str, height: float) -> list[str]:
    middle = (TOP + height - BOTTOM) / 2
    return [
        f'<text text-anchor="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 6}">{escape(x)}</text>',
        f'<text text-anchor="middle" transform="translate(11 {middle}) rotate(-90)">{escape(y)}</text>',
    ]


def _key(series: Series) -> str:
    line = "dashed" if series.dashed else "solid"
    return f'<span class="key"><i style="border-top: 3px {line} {series.color}"></i>{escape(series.name)}</span>'


def _figure(title: str, parts: Sequence[str], height: float, legend: str) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg><div class="legend">{legend}</div></figure>'
    )
