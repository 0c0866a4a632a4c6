"""transfer: layers are independent, runs are repeatable and resumable, and every kind of attention learns."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import chain, islice
from math import inf
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lolcats_formats import Artifact, ArtifactWriter, ConfigMismatch, NotAnArtifact, WrongKind
from lolcats_kernels import HybridConfig, HybridMaps, hybrid_attention
from lolcats_kernels.softmax import softmax_attention, softmax_weights

from lolcats_cli.artifacts.maps import maps_file
from lolcats_cli.errors import Stopped, UsageError
from lolcats_cli.stages import checkpoints, layer_training
from lolcats_cli.stages.activations import Batch, StoredActivations
from lolcats_cli.stages.capture import capture
from lolcats_cli.stages.checkpoints import Checkpoints
from lolcats_cli.stages.layer_losses import errors_of, layer_loss, measure
from lolcats_cli.stages.layer_start import OFF
from lolcats_cli.stages.layer_training import Trained, train_layers
from lolcats_cli.stages.transfer import _pieces, transfer
from lolcats_cli.stages.transfer_options import RECIPES, TransferOptions
from lolcats_cli.teacher.records import DataOptions

CPU = torch.device("cpu")
HYBRID = HybridConfig(window=8, feature_dim=16, linear_factor="exp")
OPTIONS = TransferOptions(HYBRID, steps=6, grad_accum=4, lr=2e-2, eval_steps=3)
PAPERS = replace(OPTIONS, hybrid=replace(HYBRID, linear_factor="one"), lr=1e-2)


@pytest.fixture(scope="module")
def padded(pipeline: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture of rows that are padded at the end."""
    root = tmp_path_factory.mktemp("padded")
    words = pipeline.text.read_text().split()
    texts = [" ".join(words[i : i + 4 + i % 7]) for i in range(16)]
    (root / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = DataOptions(seq_len=40, pack=False)
    return capture(str(pipeline.teacher), str(root / "data.jsonl"), root / "capture", options=options).path


def train_layer(source, layer: int, options: TransferOptions, **rest) -> Trained:
    return train_layers(source, [layer], options, device=CPU, **rest)[layer]


def layer_bytes(artifact: Artifact, layer: int) -> bytes:
    return artifact.file(maps_file(layer)).read_bytes()


def events(artifact: Artifact, layer: int) -> list[dict]:
    return [event for event in artifact.metrics() if event["layer"] == layer]


def test_a_layer_does_not_depend_on_the_layers_beside_it(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    whole = Artifact.open(pipeline.transfer)
    for layer in range(2):
        alone = transfer(pipeline.capture, tmp_path / str(layer), options=OPTIONS, layers=[layer])
        assert [name for name in alone.files if name.startswith("maps/")] == [maps_file(layer)]
        assert layer_bytes(alone, layer) == layer_bytes(whole, layer)
        assert events(alone, layer) == events(whole, layer)
        assert alone.summary["layers"] == {str(layer): whole.summary["layers"][str(layer)]}


def test_same_seed_same_artifact_other_seed_other_maps(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    torch.randn(3)  # whatever the process drew before must not count
    again = transfer(pipeline.capture, tmp_path / "again", options=OPTIONS)
    first = Artifact.open(pipeline.transfer)
    assert again.id == first.id
    other = transfer(pipeline.capture, tmp_path / "other", options=replace(OPTIONS, seed=1))
    assert layer_bytes(other, 0) != layer_bytes(first, 0)


@pytest.mark.parametrize("moment", ["between layers", "within a layer"])
def test_resumed_is_the_same_to_the_byte(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    log = ArtifactWriter.log

    def stopped(writer, event, layer, **figures):
        if layer == 1:
            if moment == "within a layer":
                log(writer, event=event, layer=layer, **figures)
            raise Stopped("SIGINT")
        log(writer, event=event, layer=layer, **figures)

    with monkeypatch.context() as patch:
        patch.setattr(ArtifactWriter, "log", stopped)
        with pytest.raises(Stopped):
            transfer(pipeline.capture, tmp_path / "t", options=OPTIONS)
    with pytest.raises(NotAnArtifact, match="is not finished"):
        Artifact.open(tmp_path / "t")
    made = (tmp_path / "t" / maps_file(0)).stat().st_mtime_ns
    resumed = transfer(pipeline.capture, tmp_path / "t", options=OPTIONS)
    assert (tmp_path / "t" / maps_file(0)).stat().st_mtime_ns == made
    whole = Artifact.open(pipeline.transfer)
    assert resumed.id == whole.id
    assert resumed.metrics() == whole.metrics()
    resumed.verify()


@pytest.mark.parametrize(("every", "window_dropout"), [(1, 0.0), (2, 0.0), (5, 0.0), (1, 0.5)])
def test_resumed_at_every_step_is_the_same_to_the_byte(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, window_dropout: float
) -> None:
    whole, options = Artifact.open(pipeline.transfer), replace(OPTIONS, window_dropout=window_dropout)
    if window_dropout:
        whole = transfer(pipeline.capture, tmp_path / "whole", options=options)
    monkeypatch.setattr(checkpoints, "SECONDS", 0)
    monkeypatch.setattr(checkpoints, "COST", inf)
    record, saved = Checkpoints.record, []

    def die(self, folder: Path, since: float) -> None:
        record(self, folder, since)
        saved.append(folder.name)
        if len(saved) % every == 0:
            raise Stopped("SIGKILL")

    monkeypatch.setattr(Checkpoints, "record", die)
    for _ in range(100):
        try:
            resumed = transfer(pipeline.capture, tmp_path / "t", options=options)
            break
        except Stopped:
            assert sorted(folder.name for folder in (tmp_path / "t" / "scratch").iterdir()) == saved[-1:]
    assert saved == [f"layers-{layer:03d}-{layer:03d}-{step:07d}" for layer in range(2) for step in range(1, 7)]
    assert resumed.id == whole.id
    assert resumed.metrics() == whole.metrics()
    assert all(layer_bytes(resumed, layer) == layer_bytes(whole, layer) for layer in range(2))
    resumed.verify()


def test_batches_after_the_first_are_those_of_the_whole_epoch(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lolcats_cli.artifacts.layout.SHARD_BYTES", 2**14)
    artifact = capture(
        str(pipeline.teacher), str(pipeline.text), tmp_path / "c", options=DataOptions(seq_len=32, samples=13)
    )
    assert len([name for name in artifact.files if name.startswith("layers/000/train-")]) > 3
    source = StoredActivations(artifact)
    for size in (1, 3):
        whole = list(source.batches([0], "train", size, torch.Generator().manual_seed(3)))
        for skip in range(len(whole) + 1):
            rest = list(source.batches([0], "train", size, torch.Generator().manual_seed(3), skip))
            assert len(rest) == len(whole) - skip
            assert all(torch.equal(a[0].q, b[0].q) for a, b in zip(rest, whole[skip:], strict=True))


KINDS = {
    "sliding hedgehog": {},
    "terraced": {"layout": "terraced"},
    "affine": {"linear_factor": "affine"},
    "exp": {"linear_factor": "exp"},
    "exp, terraced": {"linear_factor": "exp", "layout": "terraced"},
    "exp, pure linear": {"linear_factor": "exp", "window": 0},
    "pure linear": {"window": 0},
    "pure linear, decay": {"window": 0, "linear_factor": "exp", "decay": True},
    "decay": {"decay": True},
    "t2r": {"feature_map": "t2r"},
    "elu": {"feature_map": "elu"},
    "more features than the head": {"feature_dim": 24},
    "fewer features than the head": {"feature_dim": 5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_lowers_the_validation_error(pipeline: SimpleNamespace, kind: str) -> None:
    source = StoredActivations(Artifact.open(pipeline.capture))
    hybrid = HybridConfig(**({"window": 8, "feature_dim": 16} | KINDS[kind]))
    options = TransferOptions(hybrid, steps=10, grad_accum=2, eval_steps=5)
    maps, figures, _ = train_layer(source, 0, options)
    least = 1.0 if kind == "elu" else 0.97  # elu has nothing to train but gamma
    assert figures["mse"] < least * figures["initial_mse"]
    assert all(torch.isfinite(tensor).all() for tensor in maps.values())
    if hybrid.linear_factor != "exp":
        assert 0 < figures["gamma"]["min"] <= figures["gamma"]["mean"] <= figures["gamma"]["max"] < 1


def test_exp_starts_with_the_mass_that_softmax_gives_the_older_keys(pipeline: SimpleNamespace) -> None:
    source = StoredActivations(Artifact.open(pipeline.capture))
    options = replace(OPTIONS, steps=0)
    states, figures, _ = train_layer(source, 0, options)
    info, batches = source.layers[0], (batch[0] for batch in source.batches([0], "train", 1))
    maps = HybridMaps(options.hybrid, 4, 16)
    maps.load_state_dict(states)
    logs = []
    for batch in islice(batches, 5):  # each has 56 queries with older keys, and 256 are wanted
        position = torch.arange(batch.q.shape[2])
        old = position[:, None] - position >= 8
        k = batch.k.repeat_interleave(2, dim=1)
        with torch.no_grad():
            softmax = (torch.exp(batch.q @ k.transpose(-1, -2) * info.spec.scaling) * old).sum(-1)[:, :, 8:]
            linear = (maps.q_features(batch.q) @ maps.k_features(batch.k).transpose(-1, -2) * old).sum(-1)[:, :, 8:]
            logs.append(((linear * maps.linear_logit.exp()[:, None]).log(), softmax.log()))
    linear, softmax = (torch.cat(parts).mean((0, 2)) for parts in zip(*logs, strict=True))
    torch.testing.assert_close(linear, softmax)
    published = train_layer(source, 0, replace(PAPERS, steps=0)).figures
    assert figures["mse"] < published["mse"]


def test_a_decay_starts_with_the_distance_at_which_softmax_looks(pipeline: SimpleNamespace) -> None:
    source = StoredActivations(Artifact.open(pipeline.capture))
    options = replace(OPTIONS, steps=0, hybrid=replace(HYBRID, decay=True))
    maps = train_layer(source, 0, options).maps
    batch, spec = next(iter(source.batches([0], "train", 1)))[0], source.layers[0].spec
    assert not maps["decay_slope"].any()
    for head in range(4):
        weight = distance = 0.0
        for n in range(batch.q.shape[2]):
            row = (batch.q[0, head, n] @ batch.k[0, head // 2, : n + 1].T * spec.scaling).softmax(0)
            for i in range(n - HYBRID.window + 1):
                weight += row[i].item()
                distance += row[i].item() * (n - HYBRID.window - i)
        g = torch.nn.functional.softplus(maps["decay_bias"][head]).item()
        assert 1 / g == pytest.approx(1 + distance / weight, rel=1e-3)


@pytest.mark.parametrize("lr", [2e-2, 0.2, 5.0])
def test_exp_is_never_worse_than_its_window_alone(pipeline: SimpleNamespace, padded: Path, lr: float) -> None:
    """Whatever training did: the third learning rate breaks every map."""
    for capture_path in (pipeline.capture, padded):
        source = StoredActivations(Artifact.open(capture_path))
        for layer in range(2):
            maps, figures, _ = train_layer(source, layer, replace(OPTIONS, steps=8, lr=lr))
            assert figures["mse"] <= figures["window_mse"]
            assert all(torch.isfinite(tensor).all() for tensor in maps.values())


@pytest.mark.parametrize("sliding", [None, 40])
def test_exp_switches_off_heads_that_are_better_without(
    pipeline: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, sliding: int | None
) -> None:
    """With the window of the training; where the teacher's attention slides, with the layer's own."""
    monkeypatch.setattr("lolcats_cli.stages.transfer_options.TRAINED_WINDOW", 4)
    source = StoredActivations(Artifact.open(pipeline.capture))
    source.layers[0] = replace(source.layers[0], spec=replace(source.layers[0].spec, sliding_window=sliding))
    own = replace(HYBRID, window=20)
    bad = HybridMaps(replace(own, window=4) if sliding is None else own, 4, 16)
    with torch.no_grad():  # two heads see a few keys of no meaning, and hardly their window
        bad.k_slope[::2] = 30 * torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
        bad.linear_logit[::2] = 3
        bad.linear_logit[1::2] = -3
        errors = {}
        for terms in ("both", "window"):
            errors[terms] = torch.zeros(4)
            for batch in (batches[0] for batches in source.batches([0], "validation", 4)):
                scaling = source.layers[0].spec.scaling
                target = softmax_attention(batch.q, batch.k, batch.v, source.layers[0].spec)
                out = hybrid_attention(batch.q, batch.k, batch.v, bad, scaling=scaling, terms=terms)
                errors[terms] += (out - target).square().sum((0, 2, 3))
    worse = errors["both"] > errors["window"]
    assert 0 < worse.sum() < 4
    monkeypatch.setattr(
        layer_training, "start_at_softmax_mass", lambda maps, *_: maps[0].load_state_dict(bad.state_dict())
    )
    maps, figures, _ = train_layer(source, 0, replace(OPTIONS, hybrid=own, steps=0))
    assert torch.equal(maps["linear_logit"] == OFF, worse)
    assert figures["heads_off"] == worse.sum()
    if sliding is not None:
        assert figures["mse"] <= figures["window_mse"]


def test_a_head_without_older_keys_is_switched_off(pipeline: SimpleNamespace) -> None:
    """A teacher's sliding window may be shorter than ours: then nothing lies before the window."""
    source = StoredActivations(Artifact.open(pipeline.capture))
    spec = replace(source.layers[0].spec, sliding_window=5)
    source.layers[0] = replace(source.layers[0], spec=spec)
    _, figures, _ = train_layer(source, 0, replace(OPTIONS, steps=2))
    assert figures["heads_off"] == 4
    assert figures["mse"] == figures["window_mse"]


def cross_entropy(source: StoredActivations, maps: HybridMaps) -> float:
    """Of the attention weights on the validation rows, by hand from features and scores (window 0)."""
    batch = next(source.batches([0], "validation", 8))[0]
    k = batch.k.repeat_interleave(2, dim=1)
    causal = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool).tril()
    wanted = (
        (batch.q @ k.transpose(-1, -2) * source.layers[0].spec.scaling).masked_fill(~causal, -torch.inf).softmax(-1)
    )
    given = (maps.q_features(batch.q) @ maps.k_features(batch.k).transpose(-1, -2)) * causal
    given = given / given.sum(-1, keepdim=True)
    return -(wanted * given.clamp_min(1e-12).log()).sum(-1).mean().item()


def test_cross_entropy_loss_lowers_the_cross_entropy(pipeline: SimpleNamespace) -> None:
    source = StoredActivations(Artifact.open(pipeline.capture))
    hybrid = HybridConfig(window=0, feature_dim=16)
    options = TransferOptions(hybrid, mse_factor=0, xent_factor=1, steps=15, grad_accum=2, eval_steps=15)
    states, _, _ = train_layer(source, 0, options)
    before, after = HybridMaps(hybrid, 4, 16), HybridMaps(hybrid, 4, 16)
    after.load_state_dict(states)
    with torch.no_grad():
        assert cross_entropy(source, after) < 0.97 * cross_entropy(source, before)


def test_window_dropout_trains_the_linear_term_alone_less_and_less(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(batch, maps, info, options, terms):
        seen.append(terms)
        return layer_loss(batch, maps, info, options, terms)

    monkeypatch.setattr(layer_training, "layer_loss", spy)
    source, drawn = StoredActivations(Artifact.open(pipeline.capture)), []
    for seed in range(8):
        train_layer(source, 0, replace(OPTIONS, window_dropout=1.0, seed=seed))
        drawn.append([terms == "linear" for terms in seen])
        seen.clear()
    shares = torch.tensor(drawn, dtype=torch.float).mean(0)  # of the seeds, per batch
    assert shares[0] == 1
    assert shares[:8].mean() > 0.7 > 0.3 > shares[-8:].mean() > 0
    assert len(set(map(tuple, drawn))) == 8

    made = transfer(pipeline.capture, tmp_path / "t", options=replace(OPTIONS, window_dropout=0.5))
    without = Artifact.open(pipeline.transfer)
    assert all(layer_bytes(made, layer) != layer_bytes(without, layer) for layer in range(2))
    assert made.config == {**without.config, "window_dropout": 0.5}


def test_window_dropout_makes_the_linear_term_better_alone(pipeline: SimpleNamespace) -> None:
    source, errors = StoredActivations(Artifact.open(pipeline.capture)), {}
    for share in (0.0, 1.0):
        options = replace(OPTIONS, steps=20, window_dropout=share)
        maps = HybridMaps(HYBRID, 4, 16)
        maps.load_state_dict(train_layer(source, 0, options).maps)
        errors[share] = errors_of(source, {0: maps}, 1, ("linear",), CPU)[0].errors["linear"].sum()
    assert errors[1.0] < errors[0.0]


@pytest.mark.parametrize("hybrid", [{"window": 0}, {"window": 64}, {"window": 32, "layout": "terraced"}])
def test_window_dropout_takes_keys_before_a_window(pipeline: SimpleNamespace, tmp_path: Path, hybrid: dict) -> None:
    """Rows have 64 tokens."""
    options = replace(OPTIONS, window_dropout=0.5, hybrid=HybridConfig(**hybrid))
    with pytest.raises(UsageError, match="--window-dropout trains on the keys before the window"):
        transfer(pipeline.capture, tmp_path / "t", options=options)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("loss", [{}, {"mse_factor": 0.0, "xent_factor": 1.0}])
def test_window_dropout_of_padded_rows(padded: Path, loss: dict) -> None:
    """Some of the rows are shorter than the window."""
    source = StoredActivations(Artifact.open(padded))
    maps, _, _ = train_layer(source, 0, replace(OPTIONS, window_dropout=1.0, **loss))
    assert all(tensor.isfinite().all() for tensor in maps.values())


def test_no_steps_keep_the_initial_maps(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    artifact = transfer(pipeline.capture, tmp_path / "t", options=replace(PAPERS, steps=0, gamma=0.3))
    initial = HybridMaps(PAPERS.hybrid, 4, 16, window_factor=0.3).state_dict()
    for layer in range(2):
        found = artifact.load(maps_file(layer))
        assert found.keys() == initial.keys()
        assert all(torch.equal(found[name], initial[name]) for name in initial)
        figures = artifact.summary["layers"][str(layer)]
        assert figures["steps"] == figures["best_step"] == 0
        assert figures["mse"] == figures["initial_mse"]


@pytest.mark.parametrize("lr", [1e-2, 5.0])
def test_the_best_state_is_kept(pipeline: SimpleNamespace, lr: float) -> None:
    """At the second learning rate training does harm, and what comes out is no worse than what went in."""
    source = StoredActivations(Artifact.open(pipeline.capture))
    options = replace(OPTIONS, lr=lr, steps=8, eval_steps=1)
    maps, figures, seen = train_layer(source, 1, options)
    assert [event["step"] for event in seen if event["event"] == "train"] == list(range(1, 9))
    assert all(event["loss"] > 0 < event["grad_norm"] for event in seen if event["event"] == "train")
    seen = [event for event in seen if event["event"] == "validation"]
    assert [event["step"] for event in seen] == list(range(9))
    best = min(seen, key=lambda event: event["mse"])
    assert (figures["best_step"], figures["mse"]) == (best["step"], pytest.approx(best["mse"], rel=1e-6))
    assert figures["mse"] <= figures["initial_mse"] == seen[0]["mse"]
    if lr > 1:
        assert seen[-1]["mse"] > seen[0]["mse"]
    kept = HybridMaps(HYBRID, 4, 16)
    kept.load_state_dict(maps)
    assert measure(source, {1: kept}, 1, device=CPU)[1]["mse"] == figures["mse"]


def test_a_layer_that_no_longer_improves_stops(pipeline: SimpleNamespace) -> None:
    source = StoredActivations(Artifact.open(pipeline.capture))
    done: list[int] = []
    options = replace(OPTIONS, lr=0.0, steps=50, eval_steps=2, patience=1)
    _, figures, _ = train_layer(source, 0, options, advance=lambda n=1, **_: done.append(n))
    assert figures["steps"] == 6  # the third validation without improvement: after twice the patience
    assert sum(done) == 50  # the progress bar still comes to its end


def test_plateau_lowers_the_learning_rate(pipeline: SimpleNamespace) -> None:
    source = StoredActivations(Artifact.open(pipeline.capture))
    options = replace(OPTIONS, lr=5.0, steps=8, eval_steps=1, patience=2)
    seen = [event["lr"] for event in train_layer(source, 0, options).events if event["event"] == "validation"]
    assert seen[0] == 5.0
    assert seen[-1] < 1.0


def test_batches_and_accumulation_give_the_same_maps(pipeline: SimpleNamespace) -> None:
    source = StoredActivations(Artifact.open(pipeline.capture))
    one, _, _ = train_layer(source, 0, replace(OPTIONS, steps=4, batch_size=1, grad_accum=4))
    two, _, _ = train_layer(source, 0, replace(OPTIONS, steps=4, batch_size=4, grad_accum=1))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=2e-3, atol=2e-4)


def test_epochs_count_every_row() -> None:
    assert TransferOptions(HYBRID, epochs=3, batch_size=2, grad_accum=2).total_steps(0, 9) == 9
    assert TransferOptions(HYBRID, epochs=3, steps=5).total_steps(0, 9) == 5


def test_layers_with_their_own_steps_are_trained_as_alone(pipeline: SimpleNamespace) -> None:
    source, done = StoredActivations(Artifact.open(pipeline.capture)), []
    options = replace(OPTIONS, steps=(2, 7), window_dropout=0.5)
    both = train_layers(source, [0, 1], options, device=CPU, advance=lambda n=1, **_: done.append(n))
    assert sum(done) == 9
    for layer, steps in enumerate((2, 7)):
        alone = train_layer(source, layer, replace(options, steps=steps))
        assert both[layer].figures == alone.figures and both[layer].events == alone.events
        assert all(torch.equal(both[layer].maps[name], alone.maps[name]) for name in alone.maps)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 8))
def test_ranks_share_the_steps(costs: list[int], count: int) -> None:
    found = _pieces(costs, count, costs)
    assert len(found) == count and list(chain(*found)) == costs
    assert max(map(sum, found)) <= sum(costs) / count + max(costs)


def test_every_epoch_sees_every_row_once_in_another_order(pipeline: SimpleNamespace) -> None:
    source = StoredActivations(Artifact.open(pipeline.capture))
    plain = torch.cat([batch[0].q[:, 0, 3] for batch in source.batches([0], "train", 4)])
    orders = []
    for seed in (0, 1, 0):
        generator = torch.Generator().manual_seed(seed)
        shuffled = torch.cat([batch[0].q[:, 0, 3] for batch in source.batches([0], "train", 4, generator)])
        assert sorted(shuffled.tolist()) == sorted(plain.tolist())
        orders.append(shuffled.tolist())
    assert orders[0] == orders[2] != orders[1]


def test_padding_does_not_count(padded: Path) -> None:
    source = StoredActivations(Artifact.open(padded))
    maps = HybridMaps(HYBRID, 4, 16)
    squared = power = count = 0.0
    for batch in (batches[0] for batches in source.batches([0], "validation", 1)):
        n = int(batch.valid.sum())
        assert 0 < n < 40
        q, k, v = (x[:, :, :n] for x in (batch.q, batch.k, batch.v))
        target = softmax_attention(q, k, v, source.layers[0].spec)
        with torch.no_grad():
            error = module_hybrid(q, k, v, maps, source.layers[0].spec.scaling) - target
        squared, power, count = squared + error.square().sum(), power + target.square().sum(), count + error.numel()
    figures = measure(source, {0: maps}, 4, device=CPU)[0]
    assert figures["mse"] == pytest.approx(float(squared / count), rel=1e-4)
    assert figures["relative_mse"] == pytest.approx(float(squared / power), rel=1e-4)


def module_hybrid(q, k, v, maps, scaling):
    from lolcats_kernels import hybrid_attention

    return hybrid_attention(q, k, v, maps, scaling=scaling, backend="reference")


def test_padded_rows_train(padded: Path, tmp_path: Path) -> None:
    artifact = transfer(padded, tmp_path / "t", options=replace(OPTIONS, xent_factor=1.0, steps=8))
    for figures in artifact.summary["layers"].values():
        assert figures["mse"] < figures["initial_mse"]


def test_a_window_over_the_whole_row_is_softmax_attention(pipeline: SimpleNamespace) -> None:
    source = StoredActivations(Artifact.open(pipeline.capture))
    figures = measure(source, {0: HybridMaps(HybridConfig(window=64, feature_dim=16), 4, 16)}, 4, device=CPU)[0]
    assert figures["relative_mse"] < 1e-10
    assert figures["relative_window_mse"] < 1e-10


def test_manifest_holds_what_was_resolved(pipeline: SimpleNamespace) -> None:
    artifact = Artifact.open(pipeline.transfer)
    assert artifact.config["hybrid"] == HYBRID.to_dict()
    assert (artifact.config["layers"], artifact.config["steps"], artifact.config["seed"]) == ([0, 1], 6, 0)
    assert artifact.parents[0]["id"] == Artifact.open(pipeline.capture).id
    for figures in artifact.summary["layers"].values():
        names = {"mse", "relative_mse", "window_mse", "relative_window_mse", "heads_off", "initial_mse"}
        assert names <= figures.keys()
    assert {event["event"] for event in artifact.metrics()} == {"train", "validation", "layer"}


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([2], "--layers 2 names layer 2, and the teacher has 2 layers, counted from 0."),
        ([0, 1, 2, 3, 5, 7], "--layers 0-3,5,7 names layer 2, and"),
        ([-1], "--layers -1 names layer -1, and"),
        ([], "--layers names no layer."),
    ],
)
def test_layers_that_are_not_there(pipeline: SimpleNamespace, tmp_path: Path, layers: list[int], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        transfer(pipeline.capture, tmp_path / "t", options=OPTIONS, layers=layers)
    assert not (tmp_path / "t").exists()


def test_other_kinds_and_other_settings_are_refused(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(WrongKind, match="is a lora artifact, but a capture artifact"):
        transfer(pipeline.lora, tmp_path / "t", options=OPTIONS)
    with pytest.raises(ConfigMismatch) as caught:
        transfer(pipeline.capture, pipeline.transfer, options=replace(OPTIONS, lr=1e-3))
    assert caught.value.fields == ["config.lr"]
    assert not (tmp_path / "t").exists()


def test_a_learning_rate_that_explodes_is_a_usage_error(pipeline: SimpleNamespace) -> None:
    source = StoredActivations(Artifact.open(pipeline.capture))
    with pytest.raises(UsageError, match=r"gradient of layer 0 is nan.* Lower --lr"):
        train_layer(source, 0, replace(OPTIONS, lr=float("inf"), steps=3))


@pytest.fixture
def hard(pipeline: SimpleNamespace) -> SimpleNamespace:
    """Activations in bf16, in rows of which some are padding alone; the first head attends to the first token alone."""
    layers = StoredActivations(Artifact.open(pipeline.capture)).layers
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(6):
        q, k, v = (torch.randn(1, heads, 40, 16, generator=generator) for heads in (4, 2, 2))
        k[:, 0, 0] = q[:, 0].mean(1) + 60
        q[:, 0] = q[:, 0].abs() + 3
        valid = torch.arange(40)[None] < (40, 0, 25, 5, 40, 1)[index]
        rows.append(Batch(q.bfloat16(), k.bfloat16(), v.bfloat16(), valid))

    def batches(layers: list[int], split: str, size: int, generator=None, skip: int = 0):
        yield from ({0: row} for row in (rows[1:] + rows[:1])[skip:])  # padding alone comes first

    return SimpleNamespace(layers=layers, rows={"train": 6, "validation": 6}, batches=batches)


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("recipe", RECIPES)
def test_hard_activations_at_ten_times_the_learning_rate_stay_finite(
    hard: SimpleNamespace, recipe: str, window: int
) -> None:
    given = RECIPES[recipe]
    hybrid = replace(given.hybrid, window=window, feature_dim=16)
    options = replace(given, hybrid=hybrid, steps=12, lr=10 * given.lr, eval_steps=1)
    maps, figures, seen = train_layer(hard, 0, options)
    assert torch.tensor([event["mse"] for event in seen if "mse" in event]).isfinite().all()
    assert all(tensor.isfinite().all() for tensor in maps.values())
    assert figures["mse"] <= figures["initial_mse"]
    if recipe == "best" and window:
        assert figures["mse"] <= figures["window_mse"]
        assert figures["heads_off"] < 4  # the first row is padding alone, others are not


def test_the_head_that_attends_to_one_token_does(hard: SimpleNamespace) -> None:
    batch = next(iter(hard.batches([0], "train", 1, skip=1)))[0]
    weights = softmax_weights(batch.q, batch.k, hard.layers[0].spec, batch.valid)
    assert weights[0, 0, :25, 0].min() > 0.999
