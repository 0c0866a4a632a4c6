"""Recall: can a model repeat a fact that was stated ``distance`` tokens ago?

A fact is one sentence, ``They call Anna river.`` The question is the same sentence up to the name. Names and answers
are drawn at random, so that only the row itself tells the answer. Chance is about ``1 / len(ANSWERS)``.

Shapes: N rows, T tokens per row.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lolcats_kernels.hf_student import execution_device

_NAMES = """
Alma Boris Clara Dora Edgar Felix Greta Hugo Irma Jonas Karin Leon Mabel Nora Oscar Petra Quinn Rosa Tessa Ulrich
Vera Xenia Yvonne Zelda Anton Bella Cyril Daphne Elmer Gustav Hilda Ivan Jasper Klara Lorna Milo Nadia Otto Paula
Rufus Selma Tobias Ursula Viktor Wanda Bruno Celia Derek
"""
NAMES = tuple(_NAMES.split())
_ANSWERS = """
river stone lamp bridge garden window table candle mirror basket hammer ladder bottle button pillow blanket kettle
spoon barrel anchor rope sail harbour island mountain valley forest meadow desert canyon glacier storm thunder
rainbow cloud snow frost wind flame ember smoke ash iron copper silver gold marble crystal diamond pearl amber coral
ivory leather velvet silk cotton wool linen paper ribbon needle thread feather wing claw horn shell tiger lion wolf
fox bear rabbit squirrel badger otter beaver eagle falcon raven sparrow swallow pigeon goose duck salmon trout shark
turtle lizard snake spider beetle butterfly apple cherry lemon orange peach plum grape melon berry walnut almond
pepper ginger garlic onion carrot potato cabbage pumpkin bread butter cheese honey sugar salt coffee violin trumpet
drum flute piano bell whistle clock compass map lantern telescope wheel engine wagon carriage saddle castle tower
temple palace cottage cellar kitchen attic tunnel market harvest winter summer autumn spring morning evening
midnight shadow sunset planet comet rocket circle square triangle arrow sword shield helmet crown throne banner flag
letter pencil novel poem riddle secret promise journey shepherd sailor soldier doctor painter farmer hunter baker
miller tailor pilot dancer singer
"""
ANSWERS = tuple(_ANSWERS.split())
LEAD = 16  # tokens of ordinary text before the first fact, at least


@dataclass
class RecallRows:
    """Rows of one length that each end with a question and its answer."""

    input_ids: torch.Tensor  # [N, T] int64
    answer: torch.Tensor  # [N, T] bool: the tokens of the answer, to be predicted from those before them
    distance: int  # tokens between the end of the asked fact and the start of its question


def statement(name: str, answer: str) -> str:
    """The sentence that states a fact. It starts with a space, so that it can follow any sentence."""
    return f" They call {name} {answer}."


def is_evaluation_pair(name: str, answer: str) -> bool:
    """Whether a pair is kept for measuring. About one in eight is. The embedded teacher's training text has none."""
    return hashlib.sha256(f"{name}/{answer}".encode()).digest()[0] % 8 == 0


def draw_facts(rng: random.Random, count: int, *, evaluation: bool) -> list[tuple[str, str]]:
    """``count`` (name, answer) pairs with different names and different answers.

    evaluation: whether all pairs are among those kept for measuring; otherwise none is.
    """
    facts: list[tuple[str, str]] = []
    for name in rng.sample(NAMES, count):
        while True:
            answer = rng.choice(ANSWERS)
            if is_evaluation_pair(name, answer) == evaluation and all(answer != other for _, other in facts):
                break
        facts.append((name, answer))
    return facts


class FactTokens:
    """The token ids of facts by one tokenizer: ``full`` (the sentence), and its question and answer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[tuple[str, str], tuple[list[int], list[int], list[int]]] = {}

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def __call__(self, name: str, answer: str) -> tuple[list[int], list[int], list[int]]:
        """(full, question, answer) ids; question + answer is a prefix of full wherever the tokenizer allows it."""
        key = (name, answer)
        if key not in self._cache:
            full = self._encode(statement(name, answer))
            asked = self._encode(statement(name, answer)[:-1])
            question = self._encode(statement(name, answer)[: -len(answer) - 2])
            # A tokenizer may merge across the border: the answer is all that follows the common beginning.
            split = 0
            while split < len(question) and question[split] == asked[split]:
                split += 1
            self._cache[key] = (full, asked[:split], asked[split:])
        return self._cache[key]


def _contains(ids: list[int], part: list[int]) -> bool:
    return any(ids[i : i + len(part)] == part for i in range(len(ids) - len(part) + 1))


def recall_rows(
    tokenizer: Any,
    filler: torch.Tensor,
    *,
    distance: int,
    count: int,
    seed: int,
    facts: int = 2,
    evaluation: bool = True,
) -> RecallRows:
    """Rows ``lead · facts · filler · question · answer`` with ``distance`` tokens from the asked fact to its question.

    ``tokenizer``: any Hugging Face tokenizer. ``filler``: 1-D token ids of ordinary text; every row takes a random
    contiguous piece of it. ``facts`` is the number of facts that are stated one after the other. One of them is asked,
    so it does not help to repeat any answer word of the row. The facts that follow the asked one count in ``distance``.
    ``evaluation``: see ``draw_facts``.

    Returns rows of equal length. The same arguments give the same rows. Raises ValueError if the filler or the distance
    is too short, or a count is not positive.
    """
    if count < 1 or not 1 <= facts <= len(NAMES):
        raise ValueError(
            f"Recall needs at least one row and 1 to {len(NAMES)} facts. It got {count} rows and {facts} facts."
        )
    if filler.dim() != 1:
        raise ValueError(f"The filler must be one row of token ids. It has the shape {list(filler.shape)}.")
    rng = random.Random(f"recall {seed} {distance} {facts}")
    tokens = FactTokens(tokenizer)
    plans = []  # for every row: the facts' ids in order, the index of the asked one, its question and its answer
    for _ in range(count):
        drawn = draw_facts(rng, facts, evaluation=evaluation)
        asked = rng.randrange(facts)
        plans.append(([tokens(*fact)[0] for fact in drawn], asked, *tokens(*drawn[asked])[1:]))
    # The facts and the question of rows differ in length by some tokens. The lead makes up for the difference.
    before = [sum(map(len, stated[: asked + 1])) for stated, asked, _, _ in plans]
    after = [sum(map(len, stated[asked + 1 :])) for stated, asked, _, _ in plans]
    ending = [len(question) + len(answer) for _, _, question, answer in plans]
    if distance < max(after):
        raise ValueError(
            f"A distance of {distance} tokens is too short for {facts} facts, which need {max(after)} tokens."
        )
    length = LEAD + distance + max(b + e for b, e in zip(before, ending, strict=True))
    if len(filler) < length:
        raise ValueError(f"The text has {len(filler)} tokens, and {length} are needed. Give a longer text.")
    input_ids = torch.empty(count, length, dtype=torch.long)
    answer_mask = torch.zeros(count, length, dtype=torch.bool)
    for row, (stated, _, question, answer) in enumerate(plans):
        lead = length - distance - before[row] - ending[row]
        # Text that itself calls the asked name something would be a later fact. Then another piece is taken.
        for _ in range(100):
            start = rng.randrange(len(filler) - length + 1)
            text = filler[start : start + lead + distance - after[row]].tolist()
            if not _contains(text, question):
                break
        ids = text[:lead] + [i for fact in stated for i in fact] + text[lead:] + question + answer
        input_ids[row] = torch.tensor(ids)
        answer_mask[row, length - len(answer) :] = True
    return RecallRows(input_ids, answer_mask, distance)


def recall_hits(
    forward: Callable[[torch.Tensor], torch.Tensor], rows: RecallRows, batch_size: int = 8
) -> Iterator[bool]:
    """For every row, whether each token of the answer is the likeliest. ``forward``: ids [B, T] -> logits [B, T, V]."""
    for start in range(0, len(rows.input_ids), batch_size):
        ids = rows.input_ids[start : start + batch_size]
        mask = rows.answer[start : start + batch_size]
        predicted = forward(ids)[:, :-1].argmax(-1).to(ids.device)
        wrong = (predicted != ids[:, 1:]) & mask[:, 1:]
        yield from (not row for row in wrong.any(dim=1).tolist())


@torch.no_grad()
def recall_accuracy(model: Any, rows: RecallRows, batch_size: int = 8) -> float:
    """The share of rows in which every token of the answer is the model's first choice, given the true tokens before.

    ``model``: a causal language model of transformers. If it has dropout, it must be in evaluation mode.
    """
    device = execution_device(model)
    hits = list(recall_hits(lambda ids: model(input_ids=ids.to(device), use_cache=False).logits, rows, batch_size))
    return sum(hits) / len(hits)
