"""The tables of docs/quality.md: one command each, seed by seed, so that a first look comes early.

    python benchmarks/quality/tables.py recipes WORK [--windows 64 16] [--seeds 3] [--teacher DIR] [--csv FILE]

recipes     `best` beside `lolcats` (the paper's), at the same tokens and at a quarter of them, through both stages
pieces      one piece of `best` taken away at a time: transfer alone
tuning      the same for the LoRA stage, all on the same maps
paper       with and without transfer, before and after LoRA, Hedgehog and T2R, pure and hybrid (its tables 1, 6)
sizes       transfer steps, window, layout, LoRA rank and projections (its tables 11, 12, 13, 16)
terms       perplexity and recall with both terms of the attention, and with each alone
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lab as shared
from lab import LORA_ROWS, TRANSFER_ROWS, Lab, errors
from lolcats_formats import Artifact

from lolcats_cli.stages import layer_training

Row = dict[str, float]

# Name -> recipe, and the part of the tokens that it gets.
RECIPES = {"lolcats": ("lolcats", 1.0), "best": ("best", 1.0), "best, 1/4 of the tokens": ("best", 0.25)}
# Name -> what differs from `best`; "frozen" and "start" are no options.
PIECES: dict[str, dict[str, Any]] = {
    "best": {},
    "without the start from the softmax's mass": {"start": False},
    "without u (query) and w (key)": {"frozen": ("q_slope", "k_slope")},
    "without u (query)": {"frozen": ("q_slope",)},
    "8 rows a step, lr 1e-2": {"grad_accum": 8, "lr": 1e-2},
    "the paper's linear weight": {"linear_factor": "one"},
    "lolcats": {"recipe": "lolcats"},
}

# Name -> what differs from `best` in the LoRA stage, on the maps of `best`.
TUNING: dict[str, dict[str, Any]] = {
    "best": {},
    "trained on the text": {"match": "text"},
    "constant learning rate": {"schedule": "plateau"},
    "maps frozen": {"train_maps": False},
    "8 rows a step": {"grad_accum": 8},
    "lr 2.5e-4": {"lr": 2.5e-4},
    "lr 1e-3": {"lr": 1e-3},
    "lr 2e-3": {"lr": 2e-3},
    "lolcats": {"recipe": "lolcats"},
}


def both_stages(lab: Lab, name: str, window: int, seed: int) -> tuple[Artifact, Artifact]:
    recipe, share = RECIPES[name]
    folder = f"window {window}/{name}"
    maps = lab.transfer(folder, seed, recipe=recipe, rows=int(TRANSFER_ROWS * share), window=window)
    return maps, lab.lora(folder, seed, maps, recipe=recipe, rows=int(LORA_ROWS * share))


def recipes(lab: Lab, name: str, window: int, seed: int) -> Row:
    maps, tuned = both_stages(lab, name, window, seed)
    return {
        **errors(maps),
        "gap after transfer": lab.gap(maps.path),
        "gap after LoRA": lab.gap(tuned.path),
        "perplexity after LoRA": lab.text(tuned.path)["perplexity"],
    }


def pieces(lab: Lab, name: str, window: int, seed: int) -> Row:
    change = dict(PIECES[name])
    start, frozen = change.pop("start", True), change.pop("frozen", ())
    keep = layer_training._start_at_softmax_mass

    def begin(maps: Any, *rest: Any) -> None:
        if start:
            keep(maps, *rest)
        for parameter in frozen:
            getattr(maps, parameter).requires_grad_(False)

    # `recipes` has made the whole ones.
    folder = f"window {window}/" + (name if name in RECIPES else f"pieces/{name}")
    with patch.object(layer_training, "_start_at_softmax_mass", begin):
        return errors(lab.transfer(folder, seed, window=window, **change))


def tuning(lab: Lab, name: str, window: int, seed: int) -> Row:
    maps = lab.transfer(f"window {window}/best", seed, window=window)
    folder = f"window {window}/" + ("best" if name == "best" else f"tuning/{name}")
    tuned = lab.lora(folder, seed, maps, **TUNING[name])
    return {"gap after LoRA": lab.gap(tuned.path), "perplexity": lab.text(tuned.path)["perplexity"]}


def terms(lab: Lab, name: str, window: int, seed: int) -> Row:
    recipe, term = name.split(", ")
    path = lab.teacher if recipe == "teacher" else both_stages(lab, recipe, window, seed)[1].path
    return {"gap": lab.gap(path, term), "perplexity": lab.text(path, term)["perplexity"], **lab.recall(path, term)}


TERMS = [
    "teacher, both",
    *(f"{recipe}, {term}" for recipe in ("lolcats", "best") for term in ("both", "window", "linear")),
]
# Name -> its rows, and what measures one.
TABLES: dict[str, tuple[list[str], Callable[[Lab, str, int, int], Row]]] = {
    "recipes": (list(RECIPES), recipes),
    "pieces": (list(PIECES), pieces),
    "tuning": (list(TUNING), tuning),
    "terms": (TERMS, terms),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("work", type=Path)
    parser.add_argument("--windows", type=int, nargs="+", default=[64, 16])
    parser.add_argument("--rows", nargs="+", help="only these of the table's rows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher", type=Path, default=shared.ASSETS / "teacher")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    lab = Lab(args.work, args.teacher)
    names, measure = TABLES[args.table]
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for window in args.windows:
            for name in args.rows or names:
                rows.append({"window": window, "row": name, "seed": seed, **measure(lab, name, window, seed)})
                print(rows[-1], file=sys.stderr, flush=True)
    rows.sort(key=lambda row: args.windows.index(row["window"]))
    print(markdown(rows))
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Means and spreads over the seeds, as a table."""
    columns = [column for column in rows[0] if column not in ("window", "row", "seed")]
    lines = [f"| window | | {' | '.join(columns)} |", "| --- " * (len(columns) + 2) + "|"]
    for window, name in dict.fromkeys((row["window"], row["row"]) for row in rows):
        found = [row for row in rows if (row["window"], row["row"]) == (window, name)]
        cells = [_mean([float(row[column]) for row in found]) for column in columns]
        lines.append(f"| {window} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3g}"
    return f"{mean} ± {statistics.stdev(values):.1g}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
