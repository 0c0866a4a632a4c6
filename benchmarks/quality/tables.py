"""The tables of docs/quality.md: one command each, seed by seed, so that a first look comes early.

    python benchmarks/quality/tables.py recipes WORK [--windows 64 16] [--seeds 3] [--teacher DIR] [--csv FILE]

WORK keeps what was made; all tables may share it. Window 0 is pure linear attention.

recipes     `best` beside `lolcats` (the paper's), at the same tokens and at a quarter of them, through both stages
pieces      one piece of `best` taken away at a time: transfer alone
tuning      the same for the LoRA stage, all on the same maps
paper       with and without transfer, before and after LoRA, Hedgehog and T2R, pure and hybrid (its tables 1, 6)
sizes       transfer steps, window, layout, LoRA rank and projections (its tables 11, 12, 13, 16)
terms       perplexity and recall with both terms of the attention, and with each alone
dropout     `best` with scheduled window dropout, through both stages: each term alone too
joint       the recipes trained layer by layer, as here, and jointly, as in the paper (its table 3)
kept        layers left softmax: transfer alone
state       fewer columns and longer windows, in the memory that the state of `best` takes: through both stages
pure        pure linear attention with and without a decay, through both stages (--windows 0)
importance  windows by layer, a layer and key heads left softmax, chosen by what the loss needs: through both stages
cache       gap and recall with a sparse exact cache beside the window (LoLA), after LoRA
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import delta_rule
import lab as shared
import starts
import tried
from joint import Jointly
from lab import LORA_ROWS, TRANSFER_ROWS, Lab, errors
from lolcats_formats import Artifact
from report import markdown, write
from starts import Batches, Maps

from lolcats_cli.stages import layer_training
from lolcats_cli.stages import transfer as transfer_stage
from lolcats_cli.teacher.record import LayerInfo

Row = dict[str, float]

# Name -> recipe, and the part of the tokens that it gets.
RECIPES = {"lolcats": ("lolcats", 1.0), "best": ("best", 1.0), "best, 1/4 of the tokens": ("best", 0.25)}
# Name -> what differs from `best`; "frozen", "start" and "tried" are no options.
PIECES: dict[str, dict[str, Any]] = {
    "best": {},
    "without the start from the softmax's mass": {"start": starts.at_zero},
    "without u (query) and w (key)": {"frozen": ("q_slope", "k_slope")},
    "without u (query)": {"frozen": ("q_slope",)},
    "8 rows a step, lr 1e-2": {"grad_accum": 8, "lr": 1e-2},
    "the paper's linear weight": {"linear_factor": "one"},
    "lolcats": {"recipe": "lolcats"},
    # What was tried instead.
    "1 row a step": {"grad_accum": 1},
    "lr 4e-2": {"lr": 4e-2},
    "start from least squares": {"start": starts.least_squares},
    "start from twice the identity": {"start": starts.twice_the_identity},
    "without the gradient clip": {"clip": 1e9},
    "window dropout 0.5": {"window_dropout": 0.5},
    "the loss on attention weights too": {"xent_factor": 1.0},
    "features with the norm of q and k": {"tried": tried.norms_kept},
    "exact attention for the first 4 tokens": {"tried": tried.first_tokens_exact},
    "delta rule": {"start": delta_rule.at_older_mass, "tried": delta_rule.delta_rule},
    "gated delta rule": {"start": delta_rule.at_older_mass, "tried": delta_rule.delta_rule, "decay": True},
    "decay": {"decay": True},
}
# Name -> what differs from `best` in the LoRA stage, on the maps of `best`.
TUNING: dict[str, dict[str, Any]] = {
    "best": {},
    "maps frozen": {"train_maps": False},
    "8 rows a step": {"grad_accum": 8},
    # What was tried instead.
    "lr 1e-3": {"lr": 1e-3},
    "falling learning rate": {"schedule": "linear"},
    "matching the teacher, falling rate": {"match": "teacher", "schedule": "linear"},
    "matching the teacher, falling rate, lr 1e-3": {"match": "teacher", "schedule": "linear", "lr": 1e-3},
    "half of the loss matches the teacher": {"match": "teacher", "match_weight": 0.5},
    "all of the projections, lr 1e-4": {"full_attention": True, "lr": 1e-4},
}
# Name -> options of the paper's transfer; without any rows the maps stay as they start.
PAPER: dict[str, dict[str, Any]] = {
    "hedgehog, swapped": {"rows": 0},
    "hedgehog, transferred": {},
    "t2r, swapped": {"feature_map": "t2r", "rows": 0},
    "t2r, transferred": {"feature_map": "t2r"},
}
# Name -> what differs from `best` in transfer, and in LoRA.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "best": ({}, {}),
    "transfer of 60 rows": ({"rows": 60}, {}),
    "transfer of 480 rows": ({"rows": 480}, {}),
    "terraced": ({"layout": "terraced"}, {}),
    "rank 4": ({}, {"rank": 4}),
    "rank 16": ({}, {"rank": 16}),
    "v and o alone": ({}, {"targets": ("v_proj", "o_proj")}),
    "q and k alone": ({}, {"targets": ("q_proj", "k_proj")}),
}
# Name -> the probability that it starts with.
DROPOUT = {"best": 0.0, "window dropout 0.5": 0.5}
# Name -> which layers stay softmax.
KEPT: dict[str, dict[str, Any]] = {
    "nothing": {},
    "auto:1": {"keep_auto": 1},
    "auto:3": {"keep_auto": 3},
    "every second": {"keep_softmax": (1, 3, 5)},
}
# Name -> how the transfer chooses by importance. `windows auto` takes the bytes of state that `best` takes.
IMPORTANCE: dict[str, dict[str, Any]] = {
    "best": {},
    "windows auto": {"auto": ["windows"]},
    "steps auto": {"auto": ["steps"]},
    "auto:1": {"keep_auto": 1},
    "heads:1": {"keep_heads": 1},
    "heads:2": {"keep_heads": 2},
    "heads:4": {"keep_heads": 4},
}
# Name -> what differs from `best`; the window is what the columns leave of the memory that the state of `best` takes.
STATE: dict[str, dict[str, Any]] = {
    "64 columns": {},
    "64 columns, windows auto": {"auto": ["windows"]},
    "32 columns": {"feature_dim": 32},
    "32 columns, windows auto": {"feature_dim": 32, "auto": ["windows"]},
    "16 columns": {"feature_dim": 16},
    "columns and windows auto": {"auto": ["feature_dims", "windows"]},
    "columns, windows and steps auto": {"auto": ["feature_dims", "windows", "steps"]},
    "64 columns, terraced": {"layout": "terraced"},
}
KEYS_A_COLUMN, UNIT = 2.0625, 16  # a column of 8 heads takes 528 numbers; a key of 4 heads, and its value, 256
# Name -> recipe, and whether there is a decay.
PURE = {"lolcats": ("lolcats", False), "best, no decay": ("best", False), "best": ("best", True)}
# Name -> exact keys of a layer and key head.
CACHE = {"none": 0, "64 keys": 64}


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
    start, frozen = change.pop("start", starts.at_softmax_mass), change.pop("frozen", ())
    attention = change.pop("tried", nullcontext)

    def begin(maps: Maps, batches: Batches, layers: Sequence[LayerInfo]) -> None:
        start(maps, batches, layers)
        for layer_maps in maps.values():
            for parameter in frozen:
                getattr(layer_maps, parameter).requires_grad_(False)

    # `recipes` has made the whole ones.
    folder = f"window {window}/" + (name if name in RECIPES else f"pieces/{name}")
    with patch.object(layer_training, "start_at_softmax_mass", begin), attention():
        return errors(lab.transfer(folder, seed, window=window, **change))


def tuning(lab: Lab, name: str, window: int, seed: int) -> Row:
    maps = lab.transfer(f"window {window}/best", seed, window=window)
    folder = f"window {window}/" + ("best" if name == "best" else f"tuning/{name}")
    tuned = lab.lora(folder, seed, maps, **TUNING[name])
    return {"gap after LoRA": lab.gap(tuned.path), **lab.recall(tuned.path)}


def paper(lab: Lab, name: str, window: int, seed: int) -> Row:
    folder = f"window {window}/" + ("lolcats" if name == "hedgehog, transferred" else f"paper/{name}")
    maps = lab.transfer(folder, seed, recipe="lolcats", window=window, **PAPER[name])
    tuned = lab.lora(folder, seed, maps, recipe="lolcats")
    return {
        "perplexity before LoRA": lab.text(maps.path)["perplexity"],
        "perplexity after LoRA": lab.text(tuned.path)["perplexity"],
    }


def sizes(lab: Lab, name: str, window: int, seed: int) -> Row:
    transferred, tuned = SIZES[name]
    best, other = f"window {window}/best", f"window {window}/sizes/{name}"
    maps = lab.transfer(other if transferred else best, seed, window=window, **transferred)
    student = lab.lora(best if name == "best" else other, seed, maps, **tuned)
    return {**errors(maps), "gap after transfer": lab.gap(maps.path), "gap after LoRA": lab.gap(student.path)}


def terms(lab: Lab, name: str, window: int, seed: int) -> Row:
    recipe, term = name.split(", ")
    path = lab.teacher if recipe == "teacher" else both_stages(lab, recipe, window, seed)[1].path
    return {"gap": lab.gap(path, term), "perplexity": lab.text(path, term)["perplexity"], **lab.recall(path, term)}


def dropout(lab: Lab, name: str, window: int, seed: int) -> Row:
    # `pieces` has made the transfers.
    folder = f"window {window}/" + (name if name in RECIPES else f"pieces/{name}")
    maps = lab.transfer(folder, seed, window=window, window_dropout=DROPOUT[name])
    tuned = lab.lora(folder, seed, maps)
    return {
        "attention mse": errors(maps)["attention mse"],
        "gap after transfer": lab.gap(maps.path),
        "linear alone": lab.gap(maps.path, "linear"),
        "gap after LoRA": lab.gap(tuned.path),
        "linear alone, after LoRA": lab.gap(tuned.path, "linear"),
        **lab.recall(tuned.path),
    }


def joint(lab: Lab, name: str, window: int, seed: int) -> Row:
    recipe, how = name.split(", ")
    folder = f"window {window}/" + (recipe if how == "layer by layer" else f"joint/{name}")
    train = layer_training.train_layers if how == "layer by layer" else Jointly()
    with patch.object(transfer_stage, "train_layers", train):
        maps = lab.transfer(folder, seed, recipe=recipe, window=window)
    tuned = lab.lora(folder, seed, maps, recipe=recipe)
    return {**errors(maps), "gap after transfer": lab.gap(maps.path), "gap after LoRA": lab.gap(tuned.path)}


def kept(lab: Lab, name: str, window: int, seed: int) -> Row:
    folder = f"window {window}/" + ("best" if name == "nothing" else f"kept/{name}")
    maps = lab.transfer(folder, seed, window=window, **KEPT[name])
    return {"gap": lab.gap(maps.path), "perplexity": lab.text(maps.path)["perplexity"]}


def importance(lab: Lab, name: str, window: int, seed: int) -> Row:
    folder = f"window {window}/" + ("best" if name == "best" else f"importance/{name}")
    maps = lab.transfer(folder, seed, window=window, **IMPORTANCE[name])
    return _gaps(lab, maps, lab.lora(folder, seed, maps))


def state(lab: Lab, name: str, window: int, seed: int) -> Row:
    keys = window + int((64 - STATE[name].get("feature_dim", 64)) * KEYS_A_COLUMN // UNIT * UNIT)
    if "layout" in STATE[name]:
        keys //= 2  # a terraced window of w keys has a ring of 2 w
    known = {"64 columns": "best", "64 columns, windows auto": "importance/windows auto"}
    folder = f"window {window}/" + known.get(name, f"state/{name}")
    maps = lab.transfer(folder, seed, window=keys, **STATE[name])
    windows = maps.config["hybrid"].get("windows", [keys])
    return {"keys": sum(windows) / len(windows), **_gaps(lab, maps, lab.lora(folder, seed, maps))}


def pure(lab: Lab, name: str, window: int, seed: int) -> Row:
    recipe, decay = PURE[name]
    folder = f"window {window}/" + ("lolcats" if name == "lolcats" else f"pure/{name}")
    maps = lab.transfer(folder, seed, recipe=recipe, window=window, decay=decay)
    return {
        "relative mse": errors(maps)["relative mse"],
        **_gaps(lab, maps, lab.lora(folder, seed, maps, recipe=recipe)),
    }


def _gaps(lab: Lab, maps: Artifact, tuned: Artifact) -> Row:
    """The figures behind both stages."""
    return {"gap after transfer": lab.gap(maps.path), "gap after LoRA": lab.gap(tuned.path), **lab.recall(tuned.path)}


def cache(lab: Lab, name: str, window: int, seed: int) -> Row:
    path, keys = both_stages(lab, "best", window, seed)[1].path, CACHE[name]
    return {"gap": lab.gap(path, exact_keys=keys), **lab.recall_with(path, keys)}


TERMS = [
    "teacher, both",
    *(f"{recipe}, {term}" for recipe in ("lolcats", "best") for term in ("both", "window", "linear")),
]
# Name -> its rows, and what measures one.
TABLES: dict[str, tuple[list[str], Callable[[Lab, str, int, int], Row]]] = {
    "recipes": (list(RECIPES), recipes),
    "pieces": (list(PIECES), pieces),
    "tuning": (list(TUNING), tuning),
    "paper": (list(PAPER), paper),
    "sizes": (list(SIZES), sizes),
    "terms": (TERMS, terms),
    "dropout": (list(DROPOUT), dropout),
    "joint": ([f"{recipe}, {how}" for recipe in ("lolcats", "best") for how in ("layer by layer", "jointly")], joint),
    "kept": (list(KEPT), kept),
    "state": (list(STATE), state),
    "pure": (list(PURE), pure),
    "importance": (list(IMPORTANCE), importance),
    "cache": (list(CACHE), cache),
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
                if args.csv:
                    write(args.csv, rows)
    print(markdown(rows))


if __name__ == "__main__":
    main()
