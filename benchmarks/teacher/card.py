"""Measures the embedded teacher and rewrites the table on its card.

    python benchmarks/teacher/card.py [--assets lolcats_cli/assets] [--check]

Everything comes from the committed assets: the model, ``text/validation.jsonl`` and ``teacher/training.json``.
``--check`` leaves the card alone and fails if it says something else. Takes about two minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from train import new_model  # noqa: E402

from lolcats_cli.evaluation.recall import RecallRows, recall_accuracy, recall_hits, recall_rows  # noqa: E402

LENGTH = 1024
WINDOW = 64
ROWS = 256  # recall rows per distance
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"


def packed(tokenizer: Any, texts: list[str], length: int = LENGTH) -> torch.Tensor:
    """The documents with an end-of-text token between them, cut into rows [N, length]; the rest is dropped."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text, add_special_tokens=False, verbose=False), tokenizer.eos_token_id]
    rows = len(ids) // length
    return torch.tensor(ids[: rows * length]).view(rows, length)


def window_mask(length: int, window: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask [1, 1, T, T]: every query sees its last ``window`` keys, its own included."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    seen = (distance >= 0) & (distance < window)
    return torch.zeros(length, length, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


@torch.no_grad()
def nats_per_token(model: Any, rows: torch.Tensor, window: int | None = None, batch_size: int = 4) -> float:
    """Mean next-token cross-entropy over the rows; with ``window``, every attention is cut to that many keys."""
    mask = None if window is None else window_mask(rows.shape[1], window, next(model.parameters()).dtype)
    total = 0.0
    for batch in rows.split(batch_size):
        expanded = None if mask is None else mask.expand(len(batch), -1, -1, -1)
        logits = model(input_ids=batch, attention_mask=expanded, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total / rows[:, 1:].numel()


@torch.no_grad()
def recall_cut(model: Any, rows: RecallRows, window: int = WINDOW) -> float:
    """Recall accuracy with every attention cut to the last ``window`` keys."""
    mask = window_mask(rows.input_ids.shape[1], window, next(model.parameters()).dtype)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, attention_mask=mask.expand(len(ids), -1, -1, -1), use_cache=False).logits

    hits = list(recall_hits(forward, rows))
    return sum(hits) / len(hits)


def without_facts(text: str) -> str:
    """The document without its facts."""
    return re.sub(r" They call \w+ \w+\.", "", text)


def told_answers(text: str) -> int:
    """How many facts of the document are said again, after they were first stated."""
    facts = re.findall(r" They call (\w+) \w+\.", text)
    return len(facts) - len(set(facts))


def read_documents(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def figures(assets: Path) -> dict[str, str]:
    """Every number of the table, by its row's label."""
    teacher = assets / "teacher"
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    training = json.loads((teacher / "training.json").read_text(encoding="utf-8"))
    documents = read_documents(assets / "text" / "validation.jsonl")
    mixed = packed(tokenizer, documents)
    prose = packed(tokenizer, [without_facts(document) for document in documents])
    table = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "tokens trained": f"{training['tokens']:,} ({training['steps']:,} steps of {training['batch_tokens']:,})",
    }
    for label, rows in (("demo text", mixed), ("without facts", prose)):
        full, cut = nats_per_token(model, rows), nats_per_token(model, rows, WINDOW)
        table |= {
            f"{label}: held-out tokens": f"{rows.numel():,}",
            f"{label}: perplexity": f"{math.exp(full):.2f}",
            f"{label}: perplexity, attention cut to the last {WINDOW} tokens": f"{math.exp(cut):.2f}",
            f"{label}: ratio": f"{math.exp(cut - full):.3f}",
        }
    told = sum(map(told_answers, documents)) / mixed.numel()
    table["demo text: answers that were told before, of all tokens"] = f"{told:.1%}"
    for distance in (128, 512, 900):
        rows = recall_rows(tokenizer, prose.flatten(), distance=distance, count=ROWS, seed=0)
        table[f"recall accuracy at {distance} tokens, {ROWS} rows"] = f"{recall_accuracy(model, rows):.1%}"
        if distance == 512:
            untrained = new_model(training["seed"], tokenizer.eos_token_id, tokenizer.pad_token_id).eval()
            table |= {
                f"… attention cut to the last {WINDOW} tokens": f"{recall_cut(model, rows):.1%}",
                "… before training, from the constructed start": f"{recall_accuracy(untrained, rows):.1%}",
            }
    return table


def render(table: dict[str, str]) -> str:
    lines = ["| | |", "| --- | --- |", *(f"| {label} | {value} |" for label, value in table.items())]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ROOT / "lolcats_cli" / "assets")
    parser.add_argument("--check", action="store_true", help="compare with the card instead of rewriting it")
    args = parser.parse_args()
    card = args.assets / "teacher" / "README.md"
    text = card.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    table = render(figures(args.assets))
    new = f"{head}{BEGIN}\n{table}\n{END}{tail}"
    print(table)
    if args.check and new != text:
        sys.exit(f"the table in {card} is not what was measured")
    if not args.check:
        card.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
