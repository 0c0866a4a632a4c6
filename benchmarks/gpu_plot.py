"""Two pictures of RESULTS/gpu.csv, which `gpu` writes: time against length, and tokens a second against context.

python benchmarks/gpu_plot.py benchmarks/results/gpu.csv docs
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.figure import Figure

Lines = dict[str, dict[int, float]]
PARTS_OF_OTHERS = ("flex window", "fla linear")
PEERS = ("FlashAttention", "SDPA", "flex window", "fla linear", "softmax")


def layer_lines(rows: list[dict[str, str]], what: str) -> Lines:
    """Name -> milliseconds by tokens, at batch 1. The parts that others do are added up, if both are there."""
    lines: Lines = defaultdict(dict)
    for row in rows:
        if (row["part"], row["what"], row["batch"]) == ("layer", what, "1"):
            lines[row["kind"] or row["path"]][int(row["tokens"])] = float(row["median_ms"])
    flex, fla = (lines.pop(part, {}) for part in PARTS_OF_OTHERS)
    if flex and fla:
        lines["flex window + fla linear"] = {count: flex[count] + fla[count] for count in flex.keys() & fla.keys()}
    return dict(lines)


def decoding_lines(rows: list[dict[str, str]]) -> Lines:
    """Name -> tokens a second by context."""
    lines: Lines = defaultdict(dict)
    for row in rows:
        if row["part"] == "model" and row["what"] == "decoding step" and "static" in row["path"]:
            batch = int(row["batch"])
            lines[f"{row['path']}, batch {batch}"][int(row["tokens"])] = 1000 * batch / float(row["median_ms"])
    return dict(lines)


def _panel(panel: Any, lines: Lines, title: str) -> None:
    for name, points in lines.items():
        style = "--" if name.startswith(PEERS) else "-"
        panel.plot(*zip(*sorted(points.items()), strict=True), marker="o", linestyle=style, label=name)
    counts = sorted({count for points in lines.values() for count in points})
    panel.set(xscale="log", yscale="log", title=title)
    panel.set_xticks(counts, labels=[f"{count:,}" for count in counts])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    if lines:
        panel.legend(fontsize="small")


def draw(table: Path, folder: Path, kind: str = "svg") -> None:
    """gpu-layer and gpu-decoding, as files of that kind, where there are figures for them."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return
    rcParams["svg.hashsalt"] = "lolcats"  # the same picture from the same figures
    card = f"{rows[0]['card']}, torch {rows[0]['torch']}"
    figures = {}
    if any(row["part"] == "layer" for row in rows):
        figures["gpu-layer"] = figure = Figure(figsize=(9, 4), layout="constrained")
        for panel, what in zip(figure.subplots(1, 2), ("forward", "forward+backward"), strict=True):
            _panel(panel, layer_lines(rows, what), what)
            panel.set(xlabel="tokens", ylabel="milliseconds")
        figure.suptitle(f"One attention layer: {card}")
    if decoding_lines(rows):
        figures["gpu-decoding"] = figure = Figure(figsize=(6.5, 4), layout="constrained")
        panel = figure.subplots()
        for row in rows:
            if row["path"] == "reading the weights":
                rate = 1000 / float(row["median_ms"])
                panel.axhline(rate, color="grey", linestyle=":", label="the weights read once, batch 1")
        _panel(panel, decoding_lines(rows), f"Decoding: {card}")
        panel.set(xlabel="tokens of context", ylabel="tokens a second")
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.{kind}", metadata={"Date": None} if kind == "svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    draw(args.csv, args.folder)


if __name__ == "__main__":
    main()
