"""What the teacher loses with narrowed attentions, and how windows are shared out by it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lolcats_cli.evaluation import importance
from lolcats_cli.evaluation.importance import divergences, loss_at, measured_windows, share_out
from lolcats_cli.progress import Progress
from lolcats_cli.teacher.data import Rows
from lolcats_cli.teacher.load import LoadOptions, load_model
from lolcats_cli.teacher.record import Narrowing

CPU = torch.device("cpu")
CHANGES = [Narrowing(layer, window, head) for layer in range(3) for window in (4, 40) for head in (None, 0, 1)]


@pytest.fixture(scope="module")
def model(new_teacher, tmp_path_factory: pytest.TempPathFactory):
    return load_model(new_teacher(tmp_path_factory.mktemp("deep") / "teacher", num_hidden_layers=3), LoadOptions())


def some_rows(padded: bool = False) -> Rows:
    ids = torch.randint(3, 260, (2, 32), generator=torch.Generator().manual_seed(0)).int()
    return Rows(ids, (torch.arange(32) >= torch.tensor([[0], [9]])) if padded else None)


@pytest.mark.parametrize("padded", [False, True])
def test_a_divergence_is_that_of_the_predictions(model, padded: bool) -> None:
    rows = some_rows(padded)
    found = dict(zip(CHANGES, divergences(model, rows, CHANGES, CPU, Progress()), strict=True))
    mask = None if rows.valid is None else rows.valid.long()
    real = torch.ones_like(rows.input_ids, dtype=torch.bool) if rows.valid is None else rows.valid
    expected = model(rows.input_ids.long(), attention_mask=mask).logits[real].log_softmax(-1)
    # Layer 1 alone with a window of 4: transformers' own sliding window.
    model.set_attn_implementation("eager")
    own = model.model.layers[1].self_attn

    def narrow(module, args, kwargs):
        age = torch.arange(32)[:, None] - torch.arange(32)
        seen = (age >= 0) & (age < 4) & (real[:, None, None] if padded else True)
        return args, kwargs | {"attention_mask": torch.where(seen, 0.0, -1e9).expand(2, 1, 32, 32)}

    handle = own.register_forward_pre_hook(narrow, with_kwargs=True)
    changed = model(rows.input_ids.long(), attention_mask=mask).logits[real].log_softmax(-1)
    handle.remove()
    kl = (expected.exp() * (expected - changed)).sum(-1).mean().item()
    assert found[Narrowing(1, 4)] == pytest.approx(kl, rel=0.02) and kl > 1e-4
    assert found[Narrowing(1, 40)] < 1e-6  # it sees all keys
    assert 0 < found[Narrowing(1, 4, 0)] != found[Narrowing(1, 4, 1)] > 0


def test_blocks_of_layers_make_no_difference(model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = divergences(model, some_rows(), CHANGES, CPU, Progress())
    monkeypatch.setattr(importance, "BLOCK", 1)
    assert divergences(model, some_rows(), CHANGES, CPU, Progress()) == pytest.approx(whole, rel=1e-2, abs=1e-6)


def test_windows_that_rows_can_tell_of() -> None:
    assert [measured_windows(length) for length in (512, 64, 12)] == [[16, 64, 256], [16], [6]]


def test_a_loss_between_measured_windows() -> None:
    curve = {16: 1.0, 64: 0.25, 256: 0.0625}
    assert loss_at(curve, 64) == pytest.approx(0.25)
    assert loss_at(curve, 32) == pytest.approx(0.5)
    assert (loss_at(curve, 8), loss_at(curve, 512)) == (pytest.approx(2.0), pytest.approx(0.03125))


def test_what_needs_most_gets_most() -> None:
    losses = {0: {16: 0.1, 64: 0.01}, 1: {16: 1.0, 64: 0.4}, 2: {16: 0.1, 64: 0.01}}
    found = share_out(losses, dict.fromkeys(losses, 8), 64, 512)
    assert found[1] > 100 > 64 > found[0] == found[2]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.floats(1e-6, 2), st.floats(0.01, 1), st.integers(1, 9)), min_size=1, max_size=6),
    st.integers(1, 100),
    st.integers(4, 600),
)
def test_windows_take_no_more_than_they_may(layers: list, window: int, most: int) -> None:
    losses = {i: {16: loss, 64: loss * falls} for i, (loss, falls, _) in enumerate(layers)}
    costs = {i: cost for i, (*_, cost) in enumerate(layers)}
    found = share_out(losses, costs, window, most)
    assert found.keys() == losses.keys()
    assert all(1 <= size <= most for size in found.values())
    assert sum(costs[i] * size for i, size in found.items()) <= window * sum(costs.values())
