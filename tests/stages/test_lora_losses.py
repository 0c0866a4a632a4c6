"""The losses of lora, against their formulas in fp64."""

from __future__ import annotations

import pytest
import torch

from lolcats_cli.artifacts.logits import likeliest
from lolcats_cli.stages.lora_losses import divergence, divergence_of_likeliest

V = 50


def predictions(seed: int, count: int = 6, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(count, V, generator=torch.Generator().manual_seed(seed))


def grouped(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [N, L + 1] of the tokens `ids`, and of all others."""
    probs = logits.double().softmax(-1)
    likely = probs.gather(-1, ids.long())
    return torch.cat([likely, probs.sum(-1, keepdim=True) - likely.sum(-1, keepdim=True)], -1).log()


@pytest.mark.parametrize("count", [1, 4, V - 1])
def test_all_other_tokens_are_one_class(count: int) -> None:
    teacher, student = predictions(0), predictions(1)
    stored = likeliest(teacher, count, None)
    wanted, found = (grouped(logits, stored["ids"]) for logits in (teacher, student))
    expected = (wanted.exp() * (wanted - found)).sum()
    assert divergence_of_likeliest(student, **stored).item() == pytest.approx(expected.item(), rel=2e-3)


def test_it_is_at_most_the_divergence_over_the_vocabulary_and_reaches_it() -> None:
    teacher, student = predictions(2), predictions(3)
    whole = divergence(student, teacher).item()
    parts = [divergence_of_likeliest(student, **likeliest(teacher, count, None)).item() for count in (1, 5, 20, V)]
    assert parts == sorted(parts)
    assert parts[-1] == pytest.approx(whole, rel=2e-3)


def test_nothing_is_left_to_gain_where_the_predictions_agree() -> None:
    teacher = predictions(4)
    student = teacher.clone().requires_grad_()
    stored = likeliest(teacher, 5, None)
    loss = divergence_of_likeliest(student, **stored)
    loss.backward()
    assert abs(loss.item()) < 1e-3
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-3


def test_gradients_are_finite_where_one_token_has_all_the_mass() -> None:
    teacher, student = predictions(5, scale=200.0), predictions(6, scale=200.0).requires_grad_()
    divergence_of_likeliest(student, **likeliest(teacher, 3, None)).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    everything = predictions(7, scale=5.0).requires_grad_()
    divergence_of_likeliest(everything, **likeliest(predictions(8), V, None)).backward()
    assert everything.grad is not None
    assert everything.grad.isfinite().all()


def test_the_mass_of_all_others_is_learned() -> None:
    """Only the class for them tells a student that is right about the likeliest tokens' order, and too sure."""
    teacher = torch.zeros(1, V)
    teacher[0, 0] = 1.0
    student = teacher.clone()
    student[0, 0] = 6.0
    student.requires_grad_()
    divergence_of_likeliest(student, **likeliest(teacher, 1, None)).backward()
    assert student.grad is not None
    assert student.grad[0, 0] > 0
    assert (student.grad[0, 1:] < 0).all()
