"""What benchmarks/quality measures beside the product: joint training, and attentions that were tried."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from lolcats_formats import Artifact
from lolcats_kernels import HybridConfig, HybridMaps, hybrid_attention
from lolcats_kernels.softmax import softmax_attention

from lolcats_cli.stages.activations import StoredActivations
from lolcats_cli.stages.layer_training import train_layers
from lolcats_cli.stages.transfer_options import TransferOptions

CPU = torch.device("cpu")
HYBRID = HybridConfig(window=8, feature_dim=16, linear_factor="exp")
OPTIONS = TransferOptions(HYBRID, steps=3, grad_accum=2, eval_steps=3, clip=1e9)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch):
    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "quality"))
        return importlib.import_module(name)

    return load


def test_joint_training_differs_by_what_the_layers_share(pipeline: SimpleNamespace, lab) -> None:
    """Without a clip, and where every layer is best after the last step, they share nothing."""
    source = StoredActivations(Artifact.open(pipeline.capture))
    for clip in (1e9, 1e-3):
        options, jointly = replace(OPTIONS, clip=clip), lab("joint").Jointly()
        for layer in range(2):
            joint, figures, _ = jointly(source, [layer], options, device=CPU)[layer]
            alone, expected, _ = train_layers(source, [layer], options, device=CPU)[layer]
            assert expected["best_step"] == 3
            same = all(torch.equal(joint[name], alone[name]) for name in alone)
            assert same == (clip == 1e9)
            assert figures.keys() == expected.keys()
            assert (figures == expected) == same


def attention(x: SimpleNamespace, maps: HybridMaps, backend: str) -> torch.Tensor:
    with torch.no_grad():
        return hybrid_attention(x.q, x.k, x.v, maps, scaling=x.scaling, backend=backend)


@pytest.fixture
def activations(pipeline: SimpleNamespace) -> SimpleNamespace:
    source = StoredActivations(Artifact.open(pipeline.capture))
    batch, spec = next(iter(source.batches([0], "train", 1)))[0], source.layers[0].spec
    return SimpleNamespace(q=batch.q, k=batch.k, v=batch.v, spec=spec, scaling=spec.scaling)


def test_features_keep_the_norm_whatever_computes_them(activations: SimpleNamespace, lab) -> None:
    maps = HybridMaps(HYBRID, 4, 16)
    plain = attention(activations, maps, "chunked")
    with lab("tried").norms_kept():
        torch.testing.assert_close(maps.q_features(activations.q).norm(dim=-1), activations.q.norm(dim=-1))
        kept = attention(activations, maps, "chunked")
        torch.testing.assert_close(kept, attention(activations, maps, "reference"), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(kept, plain, atol=1e-3)
    assert torch.equal(attention(activations, maps, "chunked"), plain)


def test_the_first_tokens_are_exact(activations: SimpleNamespace, lab) -> None:
    """A row that the window and the first four tokens cover is softmax attention."""
    x, maps = activations, HybridMaps(HYBRID, 4, 16)
    with lab("tried").first_tokens_exact():
        out = attention(x, maps, "chunked")
    softmax = softmax_attention(x.q, x.k, x.v, x.spec)
    torch.testing.assert_close(out[:, :, :12], softmax[:, :, :12])
    assert not torch.allclose(out[:, :, 12], softmax[:, :, 12], atol=1e-4)
    assert not torch.allclose(attention(x, maps, "chunked")[:, :, 11], softmax[:, :, 11], atol=1e-4)
