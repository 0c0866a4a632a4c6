"""The embedded teacher and its text are what the card says."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lolcats_cli.evaluation.recall import is_evaluation_pair

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "lolcats_cli" / "assets"
TEACHER = ASSETS / "teacher"


@pytest.fixture(scope="module")
def card() -> Any:
    """benchmarks/teacher/card.py, which is no package."""
    spec = importlib.util.spec_from_file_location("teacher_card", ROOT / "benchmarks" / "teacher" / "card.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TEACHER)


def test_the_assets_take_at_most_12_mb() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 12e6


def test_the_teacher_is_a_tied_bf16_llama_with_grouped_queries(model: Any) -> None:
    config = model.config
    assert type(model).__name__ == "LlamaForCausalLM"
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings == 1024
    assert config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with safe_open(TEACHER / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "lm_head.weight" not in names


def test_the_tokenizer_fits_the_model_and_loses_nothing(model: Any, tokenizer: Any) -> None:
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    for text in ("They call Anna river.\n\n  Tabs\tand   spaces", "naïve – 東京 🐱", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_no_fact_of_the_validation_text_is_in_the_training_text() -> None:
    def facts(name: str) -> set[tuple[str, str]]:
        text = (ASSETS / "text" / name).read_text(encoding="utf-8")
        return set(re.findall(r"They call ([A-Z]\w+) (\w+)\.", text))

    training, validation = facts("train.jsonl"), facts("validation.jsonl")
    assert len(training) > 500 and len(validation) > 100
    assert all(is_evaluation_pair(*fact) for fact in validation)
    assert not training & validation


def test_what_lies_outside_64_tokens_matters(card: Any, model: Any, tokenizer: Any) -> None:
    documents = card.read_documents(ASSETS / "text" / "validation.jsonl")
    rows = card.packed(tokenizer, documents[:5])[:4]
    full = card.nats_per_token(model, rows)
    cut = card.nats_per_token(model, rows, card.WINDOW)
    assert math.exp(full) < 15
    assert math.exp(cut - full) >= 1.15


def test_a_window_as_long_as_the_row_changes_nothing(card: Any, model: Any, tokenizer: Any) -> None:
    rows = card.packed(tokenizer, card.read_documents(ASSETS / "text" / "validation.jsonl")[:2], 256)[:2]
    assert card.nats_per_token(model, rows, 256) == pytest.approx(card.nats_per_token(model, rows), abs=1e-4)
    assert card.nats_per_token(model, rows, 64) != pytest.approx(card.nats_per_token(model, rows), abs=1e-3)


def test_the_card_names_the_tokens_of_the_training_record() -> None:
    record = json.loads((TEACHER / "training.json").read_text(encoding="utf-8"))
    assert record["tokens"] == record["steps"] * record["batch_tokens"]
    assert f"| tokens trained | {record['tokens']:,} " in (TEACHER / "README.md").read_text(encoding="utf-8")
