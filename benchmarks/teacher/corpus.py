"""The text the embedded teacher is trained and measured on: real text, facts woven into it, and copying rows.

Everything is a function of the texts, the tokenizer and a seed.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lolcats_cli.evaluation.recall import FactTokens, draw_facts

BOOKS = ("moby-dick", "pride-and-prejudice", "sherlock-holmes", "shakespeare")
SHARES = {"gsm8k": 0.7, "moby-dick": 0.08, "pride-and-prejudice": 0.07, "sherlock-holmes": 0.07, "shakespeare": 0.08}
HELD_OUT = 0.05  # the last part of every text, never trained on

Ids = np.ndarray  # int64 token ids


def reflow(text: str) -> str:
    """Joins the lines of each paragraph; paragraphs are separated by one line break."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n".join(" ".join(p.split()) for p in paragraphs if p.strip()) + "\n"


def read_texts(folder: Path) -> dict[str, tuple[str, str]]:
    """Each text's training and held-out part. Raises FileNotFoundError for a missing file."""
    parts = {}
    for name in BOOKS:
        raw = (folder / f"{name}.txt").read_text(encoding="utf-8")
        # The lines of verse are kept; the lines of a novel are only its page width.
        text = re.sub(r"\n{2,}", "\n\n", raw) if name == "shakespeare" else reflow(raw)
        cut = text.rindex("\n", 0, int(len(text) * (1 - HELD_OUT))) + 1
        parts[name] = (text[:cut], text[cut:])
    problems = json.loads((folder / "gsm8k_alpaca.json").read_text(encoding="utf-8"))
    texts = [f"{p['instruction']}\n{p['output']}\n\n" for p in problems]
    cut = int(len(texts) * (1 - HELD_OUT))
    parts["gsm8k"] = ("".join(texts[:cut]), "".join(texts[cut:]))
    return parts


@dataclass
class Prose:
    """One text as token ids, with the places where a sentence ends."""

    ids: Ids
    ends: Ids  # positions after which a sentence may be put

    @classmethod
    def encode(cls, tokenizer: Any, text: str) -> Prose:
        pieces = [piece for piece in re.split(r"(?<=\n)", text) if piece]
        batches = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
        ids = np.array([i for batch in batches for i in batch], dtype=np.int64)
        closing = np.zeros(len(tokenizer), dtype=bool)
        for i in range(len(tokenizer)):
            closing[i] = tokenizer.decode([i]).endswith((".", "!", "?", ".”", "?”", "!”"))
        return cls(ids, np.flatnonzero(closing[ids]))


def weave(
    prose: Prose,
    start: int,
    length: int,
    tokens: FactTokens,
    rng: random.Random,
    *,
    facts: int,
    gap: int,
    spacing: tuple[int, int],
    evaluation: bool,
) -> tuple[list[int], list[bool], int]:
    """About ``length`` tokens of prose from ``start`` on, with ``facts`` facts stated and then said again and again.

    A fact is said again only ``gap`` or more tokens after it was last said; between two such sentences lie at least
    ``spacing`` (drawn between its two numbers) tokens of prose. Returns the ids, which of them are answers that the
    row has already told, and where in the prose to go on.
    """
    pairs = draw_facts(rng, facts, evaluation=evaluation)
    last: list[int | None] = [None] * facts  # where each fact was last said
    ids: list[int] = []
    told: list[bool] = []
    while len(ids) < length:
        unsaid = [i for i in range(facts) if last[i] is None]
        wait = rng.randint(4, 24) if unsaid else rng.randint(*spacing)
        at = int(np.searchsorted(prose.ends, start + wait))
        stop = int(prose.ends[at]) + 1 if at < len(prose.ends) else len(prose.ids)
        piece = prose.ids[start:stop].tolist()
        ids += piece
        told += [False] * len(piece)
        start = stop
        if start >= len(prose.ids):
            break
        ready = unsaid[:1] or [i for i in range(facts) if len(ids) - last[i] >= gap]  # type: ignore[operator]
        if ready:
            chosen = rng.choice(ready)
            full, question, answer = tokens(*pairs[chosen])
            again = last[chosen] is not None
            last[chosen] = len(ids)
            ids += full
            told += [again and len(question) <= i < len(question) + len(answer) for i in range(len(full))]
    return ids, told, start


def copying_row(prose: Prose, length: int, gap: int, vocabulary: int, rng: random.Random) -> tuple[Ids, Ids, Ids]:
    """Short spans of random tokens that come again and again in shuffled order, on average every ``gap`` tokens.

    Prose fills the space between them. The shuffling matters: what repeats at a fixed distance is learned as a
    distance, not as looking back for the same token. Returns ids, loss weights (0 for what cannot be foreseen), and
    which tokens are copies that can be.
    """
    size = rng.randint(2, 5)
    count = rng.randint(2, max(2, min(24, gap // size)))
    filler = max(0, gap // count - size)
    spans = [[rng.randrange(8, vocabulary) for _ in range(size)] for _ in range(count)]
    start = rng.randrange(len(prose.ids) - length)
    ids: list[int] = []
    weights: list[float] = []
    copies: list[bool] = []
    seen: set[int] = set()
    while len(ids) < length:
        for which in rng.sample(range(count), count):
            ids += spans[which]
            weights += [0.0] + [float(which in seen)] * (size - 1)
            copies += [False] + [which in seen] * (size - 1)
            seen.add(which)
            between = rng.randint(0, 2 * filler)
            ids += prose.ids[start : start + between].tolist()
            weights += [1.0] * between
            copies += [False] * between
            start = (start + between) % (len(prose.ids) - length)
    return np.array(ids[:length]), np.array(weights[:length], dtype=np.float32), np.array(copies[:length])
