"""Recall rows: what they hold, and what the embedded teacher makes of them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from lolcats_cli.evaluation.recall import (
    ANSWERS,
    LEAD,
    NAMES,
    FactTokens,
    RecallRows,
    draw_facts,
    is_evaluation_pair,
    recall_accuracy,
    recall_rows,
    statement,
)

TEACHER = Path(__file__).parents[2] / "lolcats_cli" / "assets" / "teacher"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TEACHER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def filler(tokenizer: Any) -> torch.Tensor:
    path = TEACHER.parent / "text" / "validation.jsonl"
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()[:6]]
    prose = " ".join(re.sub(r" They call \w+ \w+\.", "", text) for text in texts)
    return torch.tensor(tokenizer.encode(prose, add_special_tokens=False))


class Characters:
    """A tokenizer with one token per character: every answer has several tokens."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in text]


class Merging(Characters):
    """Puts the space and the letter after it into one token, and a word's end and its full stop into another."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids, i = [], 0
        while i < len(text):
            pair = text[i : i + 2]
            if len(pair) == 2 and (pair[0] == " " or pair[1] == "."):
                ids.append(1000 + ord(pair[0]) * 256 + ord(pair[1]))
                i += 2
            else:
                ids.append(ord(text[i]))
                i += 1
        return ids


def text_of(ids: torch.Tensor) -> str:
    out = []
    for i in ids.tolist():
        out.append(chr(i) if i < 1000 else chr((i - 1000) // 256) + chr((i - 1000) % 256))
    return "".join(out)


@given(
    distance=st.integers(60, 400),
    seed=st.integers(0, 50),
    facts=st.integers(1, 3),
    tokenizer=st.sampled_from([Characters(), Merging()]),
)
@settings(max_examples=40, deadline=None)
def test_the_asked_fact_ends_exactly_distance_tokens_before_its_question(
    distance: int, seed: int, facts: int, tokenizer: Any
) -> None:
    rows = recall_rows(tokenizer, torch.full((2000,), ord("~")), distance=distance, count=3, seed=seed, facts=facts)
    assert rows.input_ids.shape == rows.answer.shape
    for ids, mask in zip(rows.input_ids, rows.answer, strict=True):
        answer = text_of(ids[mask])
        first = int(mask.nonzero()[0])
        assert mask[first:].all()
        question_text = text_of(ids[:first])
        name = (question_text.rsplit(" They call ", 1)[1] + answer).split()[0]
        word = (question_text.rsplit(" They call ", 1)[1] + answer).split()[1]
        sentence = tokenizer.encode(statement(name, word))
        ends = [i + len(sentence) for i in range(first) if ids[i : i + len(sentence)].tolist() == sentence]
        question = len(FactTokens(tokenizer)(name, word)[1])
        assert [first - question - end for end in ends] == [distance]
        assert text_of(ids).count(" They call ") == facts + 1
        assert (ids[:LEAD] == ord("~")).all()


def test_text_that_gives_the_asked_name_another_answer_is_avoided() -> None:
    tokenizer = Characters()
    contradiction = "".join(statement(name, "nothing") for name in NAMES)  # every name once, in 1.2 K characters
    filler = torch.tensor(tokenizer.encode(contradiction + "~" * 3000))
    rows = recall_rows(tokenizer, filler, distance=300, count=40, seed=0)
    for ids in rows.input_ids:
        name = text_of(ids).rsplit(" They call ", 1)[1].split()[0]
        assert f"They call {name} nothing" not in text_of(ids)
    assert any("nothing" in text_of(ids) for ids in rows.input_ids)


def test_every_row_draws_other_names_and_answers_that_never_occur_in_training() -> None:
    rows = recall_rows(Characters(), torch.full((900,), ord("~")), distance=200, count=64, seed=3)
    asked = [text_of(row).rsplit(" They call ", 1)[1].split() for row in rows.input_ids]
    assert len({name for name, _ in asked}) > 20
    assert len({answer for _, answer in asked}) > 40
    assert all(name in NAMES and answer in ANSWERS and is_evaluation_pair(name, answer) for name, answer in asked)


def test_the_two_sides_of_the_split_share_no_pair() -> None:
    training = {pair for seed in range(200) for pair in draw_facts(random.Random(seed), 3, evaluation=False)}
    measured = {pair for seed in range(200) for pair in draw_facts(random.Random(seed), 3, evaluation=True)}
    assert training and measured and not training & measured


def test_same_seed_same_rows(tokenizer: Any, filler: torch.Tensor) -> None:
    def rows(seed: int) -> torch.Tensor:
        return recall_rows(tokenizer, filler, distance=128, count=4, seed=seed).input_ids

    assert torch.equal(rows(1), rows(1))
    first, second = rows(1), rows(2)
    assert first.shape != second.shape or not torch.equal(first, second)


def test_too_little_text_is_an_error_that_says_how_much_is_needed() -> None:
    with pytest.raises(ValueError, match=r"has 100 tokens, and \d+ are needed"):
        recall_rows(Characters(), torch.zeros(100, dtype=torch.long), distance=128, count=1, seed=0)
    with pytest.raises(ValueError, match="too short for 3 facts"):
        recall_rows(Characters(), torch.zeros(5000, dtype=torch.long), distance=4, count=20, seed=0, facts=3)
    with pytest.raises(ValueError, match="at least one row"):
        recall_rows(Characters(), torch.zeros(5000, dtype=torch.long), distance=64, count=0, seed=0)
    with pytest.raises(ValueError, match="one row of token ids"):
        recall_rows(Characters(), torch.zeros(2, 500, dtype=torch.long), distance=64, count=1, seed=0)


class Oracle(torch.nn.Module):
    """Predicts every next token, except in the rows and places it is told to miss."""

    def __init__(self, rows: RecallRows, missed: list[tuple[int, int]]) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.next = rows.input_ids.roll(-1, dims=1)
        for row, place in missed:
            self.next[row, place - 1] += 1
        self.at = 0

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        piece = self.next[self.at : self.at + len(input_ids)]
        self.at += len(input_ids)
        return type("Output", (), {"logits": torch.nn.functional.one_hot(piece, 256).float()})


def test_a_row_counts_only_when_every_answer_token_is_right() -> None:
    rows = recall_rows(Characters(), torch.full((900,), ord("~")), distance=100, count=5, seed=0)
    last = rows.input_ids.shape[1] - 1
    assert recall_accuracy(Oracle(rows, []), rows, batch_size=2) == 1.0
    assert recall_accuracy(Oracle(rows, [(0, last), (3, last - 2)]), rows, batch_size=2) == pytest.approx(0.6)
    assert recall_accuracy(Oracle(rows, [(0, 5), (1, 30)]), rows, batch_size=3) == 1.0  # not part of an answer


def test_the_teacher_recalls_what_was_said_512_tokens_ago(model: Any, tokenizer: Any, filler: torch.Tensor) -> None:
    rows = recall_rows(tokenizer, filler, distance=512, count=24, seed=7)
    assert recall_accuracy(model, rows) >= 0.8


def test_the_teacher_is_lost_when_another_answer_was_stated(model: Any, tokenizer: Any, filler: torch.Tensor) -> None:
    rows = recall_rows(tokenizer, filler, distance=128, count=24, seed=7)
    answers = rows.input_ids[rows.answer].view(len(rows.input_ids), -1)
    swapped = rows.input_ids.clone()
    for row, answer in enumerate(answers):
        stated = swapped[row] == answer[0]
        stated[-answers.shape[1] :] = False
        swapped[row, stated] = answers[row - 1][0]
    assert recall_accuracy(model, RecallRows(swapped, rows.answer, rows.distance)) <= 0.1
