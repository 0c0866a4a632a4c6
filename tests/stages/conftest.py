"""A deeper teacher than the pipeline's, students of it that keep some softmax attention, and a check of merged
folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def captured(pipeline: SimpleNamespace, new_teacher, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Three layers of two key heads: paths `text`, `teacher`, `capture`. Read only."""
    from lolcats_cli.stages.capture import capture
    from lolcats_cli.teacher.records import DataOptions

    root = tmp_path_factory.mktemp("deep")
    made = SimpleNamespace(text=pipeline.text, teacher=new_teacher(root / "teacher", num_hidden_layers=3))
    data = DataOptions(seq_len=48, samples=10)
    made.capture = capture(str(made.teacher), str(made.text), root / "capture", options=data).path
    return made


@pytest.fixture(scope="session")
def through_all_stages(
    captured: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., SimpleNamespace]:
    """`through_all_stages(options, keep_softmax)`: paths `transfer`, `lora` and `student` more. Read only."""
    from lolcats_cli.stages.lora import lora
    from lolcats_cli.stages.lora_options import LoraOptions
    from lolcats_cli.stages.merge import merge
    from lolcats_cli.stages.transfer import transfer

    def make(options: Any, keep_softmax: list) -> SimpleNamespace:
        root, made = tmp_path_factory.mktemp("kept"), SimpleNamespace(**vars(captured))
        made.transfer = transfer(made.capture, root / "transfer", options=options, keep_softmax=keep_softmax).path
        tuned = LoraOptions(steps=2, grad_accum=1, lr=1e-2, train_maps=True)
        made.lora = lora(made.transfer, root / "lora", options=tuned).path
        made.student = merge(made.lora, root / "student").path
        return made

    return make


@pytest.fixture(scope="session")
def merged() -> Callable[..., Any]:
    """`merged(student, lora)`: the model in a merged folder, which computes what the student that it was merged from
    does, with and without its cache. `teacher`: of the latter, if it has moved."""
    from transformers import AutoModelForCausalLM

    from lolcats_cli.loading.any_model import load_any
    from lolcats_cli.teacher.load import LoadOptions

    def load(student: Path, lora: Path, teacher: str | None = None) -> Any:
        unmerged = load_any(str(lora), LoadOptions(dtype="float32"), teacher=teacher).model
        model = AutoModelForCausalLM.from_pretrained(student, trust_remote_code=True, dtype=torch.float32)
        length = min(40, model.config.max_position_embeddings - 8)
        tokens = torch.randint(3, 260, (2, length), generator=torch.Generator().manual_seed(0))
        expected = unmerged(tokens, use_cache=False).logits
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-4, rtol=1e-4)
        common = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(tokens, **common), model.generate(tokens, use_cache=False, **common))
        return model

    return load
