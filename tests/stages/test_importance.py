"""What the teacher loses with converted attentions, and how windows are shared out by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lolcats_kernels import HybridConfig
from lolcats_kernels.hf_attention import HybridAttention

from lolcats_cli.progress import Progress
from lolcats_cli.stages import divergence
from lolcats_cli.stages.activations import Batch
from lolcats_cli.stages.divergence import Trained, Untrained, divergences
from lolcats_cli.stages.importance import Importance, loss_at, measured_windows, share_out, share_steps
from lolcats_cli.stages.layer_start import start_at_softmax_mass
from lolcats_cli.student.build import linearize
from lolcats_cli.teacher.data import Rows
from lolcats_cli.teacher.load import LoadOptions, load_model
from lolcats_cli.teacher.record import LayerInfo, recording

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(new_teacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_teacher(tmp_path_factory.mktemp("deep") / "teacher", num_hidden_layers=3)


def some_rows(padded: bool = False) -> Rows:
    ids = torch.randint(3, 260, (2, 32), generator=torch.Generator().manual_seed(0)).int()
    return Rows(ids, (torch.arange(32) >= torch.tensor([[0], [9]])) if padded else None)


def trained(layer: int) -> HybridAttention:
    torch.manual_seed(layer)
    hybrid = HybridAttention(HybridConfig(window=4, linear_factor="exp", feature_dim=8), 4, 16, layer)
    for parameter in hybrid.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return hybrid.requires_grad_(False)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layers", [(1,), (0, 2)])
def test_a_divergence_is_that_of_a_students_predictions(teacher: Path, padded: bool, layers: tuple[int, ...]) -> None:
    rows, hybrids = some_rows(padded), {layer: trained(layer) for layer in layers}
    model = load_model(teacher, LoadOptions(dtype="float32"))
    (found,) = divergences(model, rows, [Trained(hybrids)], CPU, Progress())
    mask = None if rows.valid is None else rows.valid.long()
    real = torch.ones_like(rows.input_ids, dtype=torch.bool) if rows.valid is None else rows.valid
    expected = model(rows.input_ids.long(), attention_mask=mask).logits[real].log_softmax(-1)
    kept = [layer for layer in range(3) if layer not in layers]
    student = linearize(model, {i: hybrid.config for i, hybrid in hybrids.items()}, hybrids, kept)
    changed = student(rows.input_ids.long(), attention_mask=mask, use_cache=False).logits[real].log_softmax(-1)
    kl = (expected.exp() * (expected - changed)).sum(-1).mean().item()
    assert found == pytest.approx(kl, rel=0.02) and kl > 1e-4


def test_untrained_maps_start_as_a_training_does(teacher: Path) -> None:
    rows, model, seen = some_rows(), load_model(teacher, LoadOptions(dtype="float32")), []
    with recording(model, lambda layer, q, k, v, spec: seen.append((layer, Batch(q, k, v, None), spec))):
        model(rows.input_ids[:1].long())
    _, batch, spec = seen[1]
    maps = HybridAttention(HybridConfig(window=8, linear_factor="exp"), 4, 16, 1)
    start_at_softmax_mass({0: maps}, [{0: batch}], [LayerInfo(4, 2, 16, spec)])
    of_maps, of_layer, *of_heads, sees_all = divergences(
        model,
        rows,
        [Trained({1: maps}), Untrained(1, 8), Untrained(1, 8, 0), Untrained(1, 8, 1), Untrained(1, 40)],
        CPU,
        Progress(),
    )
    assert of_layer == of_maps > 1e-6
    assert 0 < of_heads[0] != of_heads[1] > 0
    assert sees_all < 1e-6  # the window holds all keys


def test_blocks_of_layers_make_no_difference(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(teacher, LoadOptions(dtype="float32"))

    def changes() -> list:
        return [Untrained(layer, window, head) for layer in range(3) for window in (4, 40) for head in (None, 0)]

    whole = divergences(model, some_rows(), changes(), CPU, Progress())
    monkeypatch.setattr(divergence, "BLOCK", 1)
    assert divergences(model, some_rows(), changes(), CPU, Progress()) == pytest.approx(whole, rel=1e-2, abs=1e-6)


def test_windows_that_rows_can_tell_of() -> None:
    assert [measured_windows(length) for length in (512, 64, 12)] == [[16, 64, 256], [16], [6]]


def test_a_loss_between_measured_windows() -> None:
    curve = {16: 1.0, 64: 0.25, 256: 0.0625}
    assert loss_at(curve, 64) == pytest.approx(0.25)
    assert loss_at(curve, 32) == pytest.approx(0.5)
    assert (loss_at(curve, 8), loss_at(curve, 512)) == (pytest.approx(2.0), pytest.approx(0.03125))


def test_a_layer_without_its_kept_heads_loses_their_part_less() -> None:
    found = Importance((16, 64), {0: (1.0, 0.4)}, 10, 16, {0: (0.6, 0.1, 0.1)})
    assert found.curve(0) == {16: 1.0, 64: 0.4}
    assert found.curve(0, [0]) == pytest.approx({16: 0.25, 64: 0.1})
    assert Importance((16,), {0: (0.0,)}, 10, 16, {0: (0.0, 0.0)}).curve(0, [1]) == {16: 0.0}


def test_what_needs_most_gets_most() -> None:
    losses = {0: {16: 0.1, 64: 0.01}, 1: {16: 1.0, 64: 0.4}, 2: {16: 0.1, 64: 0.01}}
    found = share_out(losses, dict.fromkeys(losses, 8), 64, dict.fromkeys(losses, 512))
    assert found[1] > 100 > 64 > found[0] == found[2]
    assert share_out(losses, dict.fromkeys(losses, 8), 64, {0: 512, 1: 70, 2: 512})[1] == 64  # in steps of 16, up to 70


@settings(deadline=None)
@given(st.lists(st.floats(0, 2), min_size=1, max_size=40), st.integers(0, 10_000))
def test_half_of_the_steps_go_where_the_loss_is(losses: list[float], steps: int) -> None:
    found = share_steps(dict(enumerate(losses)), steps * len(losses))
    assert abs(sum(found.values()) - steps * len(losses)) <= len(losses) / 2
    assert all(given >= steps // 2 for given in found.values())
    by_loss = [found[i] for i in sorted(found, key=lambda i: losses[i])]
    assert by_loss == sorted(by_loss)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.floats(1e-6, 2), st.floats(0.01, 1), st.integers(1, 9)), min_size=1, max_size=6),
    st.integers(1, 100),
    st.integers(4, 600),
)
def test_windows_take_no_more_than_they_may(layers: list, window: int, most: int) -> None:
    losses = {i: {16: loss, 64: loss * falls} for i, (loss, falls, _) in enumerate(layers)}
    costs = {i: cost for i, (*_, cost) in enumerate(layers)}
    found = share_out(losses, costs, window, dict.fromkeys(losses, most))
    assert found.keys() == losses.keys()
    assert all(1 <= size <= most for size in found.values())
    assert sum(costs[i] * size for i, size in found.items()) <= window * sum(costs.values())
