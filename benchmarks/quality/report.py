"""Writes the tables of docs/quality.md, and its plots where matplotlib is, from the CSV files in results/.

    python benchmarks/quality/report.py

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, where NAME is a CSV's; `headline: NAME`
compares the recipes in it.
"""

from __future__ import annotations

import csv
import re
import statistics
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS, DOCS = HERE / "results", HERE.parents[1] / "docs"
KEYS = ("window", "row", "seed")
AUTO = "columns, windows and steps auto"
TITLES = ("nats per token over the teacher", "facts recalled after 900 tokens")
MARKED = re.compile(r"(<!-- table: (headline: )?([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Rows = list[dict[str, Any]]


def read(path: Path) -> Rows:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def values(rows: Rows, window: Any, name: str, column: str) -> list[float]:
    """A column's values in the rows of that window and name, one per seed; none of a seed that lacks it."""
    found = (row[column] for row in rows if (str(row["window"]), row["row"]) == (str(window), name))
    return [float(value) for value in found if value != ""]


def windows(rows: Rows) -> list[Any]:
    return list(dict.fromkeys(row["window"] for row in rows))


def markdown(rows: Rows) -> str:
    """Means and standard deviations over the seeds."""
    columns = [column for column in rows[0] if column not in KEYS]
    lines = [f"| window | | seeds | {' | '.join(columns)} |", "| --- " * (len(columns) + 3) + "|"]
    for window in windows(rows):
        for name in names_of([row for row in rows if row["window"] == window]):
            found = [values(rows, window, name, column) for column in columns]
            lines.append(f"| {window} | {name} | {max(map(len, found))} | {' | '.join(map(_mean, found))} |")
    return "\n".join(lines)


def headline(rows: Rows) -> str:
    """`best` beside `lolcats`: quotients of means."""
    lines = [
        "| | target |" + "".join(f" window {window} |" for window in windows(rows)),
        "| --- " * (len(windows(rows)) + 2) + "|",
    ]
    for title, target, name, column in (
        ("attention MSE", "0.5", "best", "attention mse"),
        ("attention MSE relative to the output's power", "0.5", "best", "relative mse"),
        ("gap after transfer", "", "best", "gap after transfer"),
        ("gap after LoRA", "0.6", "best", "gap after LoRA"),
        ("gap after LoRA, `best` with 1/4 of the tokens", "1", "best, 1/4 of the tokens", "gap after LoRA"),
    ):
        quotients = [
            statistics.mean(values(rows, window, name, column))
            / statistics.mean(values(rows, window, "lolcats", column))
            for window in windows(rows)
        ]
        lines.append(f"| {title} | {target} |" + "".join(f" {quotient:.2f} |" for quotient in quotients))
    return "\n".join(lines)


def filled(text: str) -> str:
    """The document with its tables as the CSV files say."""

    def table(match: re.Match[str]) -> str:
        rows = read(RESULTS / f"{match[3]}.csv")
        return f"{match[1]}{headline(rows) if match[2] else markdown(rows)}\n{match[4]}"

    return MARKED.sub(table, text)


def names_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["row"] for row in rows))


def plot_gaps(rows: Rows, target: Path) -> None:
    """Gap to the teacher after both stages: a bar is the mean, a dot one seed."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(windows(rows)), figsize=(8, 3), sharey=True, squeeze=False)
    names = names_of(rows)
    for ax, window in zip(axes[0], windows(rows), strict=True):
        for shift, column, colour in ((-0.2, "gap after transfer", "#b8c4d6"), (0.2, "gap after LoRA", "#33588f")):
            for place, name in enumerate(names):
                found = values(rows, window, name, column)
                ax.bar(place + shift, statistics.mean(found), 0.38, color=colour, label=None if place else column)
                ax.plot([place + shift] * len(found), found, "k.", markersize=4)
        ax.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=8)
        ax.set_title(f"window {window}", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("nats per token over the teacher")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


def plot_pieces(rows: Rows, target: Path) -> None:
    """Attention error of `best` with one thing changed, beside its own: a bar is the mean, a dot one seed."""
    import matplotlib.pyplot as plt

    names = names_of(rows)[1:]
    figure, axes = plt.subplots(1, len(windows(rows)), figsize=(8, 0.27 * len(names) + 0.8), sharey=True, squeeze=False)
    for ax, window in zip(axes[0], windows(rows), strict=True):
        best = statistics.mean(values(rows, window, "best", "relative mse"))
        for place, name in enumerate(names):
            found = [value / best for value in values(rows, window, name, "relative mse")]
            ax.barh(place, statistics.mean(found) - 1, 0.7, left=1, color="#33588f")
            ax.plot(found, [place] * len(found), "k.", markersize=3)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.set_title(f"window {window}", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlabel("times the error of best", fontsize=8)
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


def share_of_cache(window: int, *, exact: int = 0, kept_heads: int = 0) -> float:
    """What a student of the first teacher with 64 columns takes, in parts of the softmax cache of 4,096 tokens.

    exact: keys of a sparse cache; kept_heads: key heads that keep softmax attention. Students with other columns or
    windows by layer take as much, as they are made for.
    """
    layers, heads, key, tokens = 6, 4, 2 * 32, 4096
    state = 2 * 64 * 33 * 2 + window * key  # of a key head, which has two query heads
    if exact:
        state += exact * (key + 1) + 64 * (key + 1) + window  # and a block that waits
    return ((layers * heads - kept_heads) * state + kept_heads * tokens * key) / (layers * heads * tokens * key)


def plot_memory(target: Path) -> None:
    """Gap and recall after both stages against the memory of a student; means over the seeds."""
    import matplotlib.pyplot as plt

    state, cache, kept, pure = (read(RESULTS / f"{name}.csv") for name in ("state", "cache", "importance", "pure"))
    taken = {window: share_of_cache(window) for window in (16, 64)}
    heads = {"heads:1": 1, "heads:2": 2, "auto:1": 4}
    exact = {window: share_of_cache(window, exact=64) for window in map(int, windows(cache))}
    options: list[tuple[str, str, Rows, list[tuple[int, str, float]]]] = [
        ("64 columns, the same window everywhere", "o", state, [(w, "64 columns", x) for w, x in taken.items()]),
        ("32 columns, longer window", "s", state, [(w, "32 columns", x) for w, x in taken.items()]),
        ("columns, windows and steps auto", "*", state, [(w, AUTO, x) for w, x in taken.items()]),
        ("64 columns and 64 sparse exact keys", "D", cache, [(w, "64 keys", x) for w, x in exact.items()]),
        (
            "one key head, two, one layer kept softmax",
            "^",
            kept,
            [(64, name, share_of_cache(64, kept_heads=count)) for name, count in heads.items()],
        ),
        ("pure linear, with a decay", "v", pure, [(0, "best", share_of_cache(0))]),
    ]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for ax, columns, title in zip(axes, (("gap after LoRA", "gap"), ("recall@900",)), TITLES, strict=True):
        for label, marker, rows, points in options:
            column = next(c for c in columns if c in rows[0])
            y = [statistics.mean(values(rows, window, name, column)) for window, name, _ in points]
            size = 11 if marker == "*" else 6
            ax.plot([100 * x for *_, x in points], y, marker + ":", markersize=size, linewidth=0.8, label=label)
        ax.set_xscale("log")
        ax.set_xticks([3, 5, 10, 20], ["3%", "5%", "10%", "20%"])
        ax.set_xticks([], minor=True)
        ax.set_xlabel("memory at 4,096 tokens, of the softmax cache", fontsize=9)
        ax.set_title(title, fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].axhline(0, color="black", linewidth=0.6)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, ncols=2, loc="lower center")
    figure.tight_layout(rect=(0, 0.2, 1, 1))
    figure.savefig(target, metadata={"Date": None})


def _mean(found: list[float]) -> str:
    if not found:
        return ""
    mean = f"{statistics.mean(found):.3g}"
    return f"{mean} ± {statistics.stdev(found):.1g}" if len(found) > 1 else mean


def main() -> None:
    path = DOCS / "quality.md"
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    try:
        import matplotlib
    except ImportError:
        print("The plots were left as they are: they need matplotlib.")
        return
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lolcats"
    plot_gaps(read(RESULTS / "recipes.csv"), DOCS / "quality.svg")
    plot_pieces(read(RESULTS / "pieces.csv"), DOCS / "quality-pieces.svg")
    plot_memory(DOCS / "quality-memory.svg")


if __name__ == "__main__":
    main()
