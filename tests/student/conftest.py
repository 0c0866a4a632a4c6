"""A tiny GQA teacher and trained-looking maps, from seeds."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pytest
import torch
from lolcats_kernels import HybridConfig, HybridMaps
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lolcats_cli.student.build import linearize

LAYERS, HEADS, HEAD_DIM, VOCAB = 2, 4, 16, 128


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_teacher(**changes: object) -> LlamaForCausalLM:
    """Seeded, with weights large enough that logits differ clearly between tokens."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()


def tiny_maps(
    config: HybridConfig, layers: int = LAYERS, heads: int = HEADS, head_dim: int = HEAD_DIM
) -> dict[int, HybridMaps]:
    generator = torch.Generator().manual_seed(1)
    maps = {layer: HybridMaps(config, heads, head_dim) for layer in range(layers)}
    for layer in maps.values():
        for parameter in layer.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return maps


def tiny_student(
    config: HybridConfig | None = None, keep_softmax: Collection[int] = (), **changes: object
) -> PreTrainedModel:
    config = config or HybridConfig(window=6, feature_dim=8)
    heads = config.mapped_heads(HEADS, 2)
    maps = {layer: value for layer, value in tiny_maps(config, heads=heads).items() if layer not in keep_softmax}
    return linearize(tiny_teacher(**changes), config, maps, keep_softmax)


@pytest.fixture(scope="session")
def make_teacher() -> Callable[..., LlamaForCausalLM]:
    return tiny_teacher


@pytest.fixture(scope="session")
def make_maps() -> Callable[..., dict[int, HybridMaps]]:
    return tiny_maps


@pytest.fixture(scope="session")
def make_student() -> Callable[..., PreTrainedModel]:
    return tiny_student


@pytest.fixture(scope="session")
def student() -> PreTrainedModel:
    """Shared: tests that change a student make their own."""
    return tiny_student()


@pytest.fixture
def tokens() -> torch.Tensor:
    """[2, 23], no special tokens among them."""
    return torch.randint(3, VOCAB, (2, 23), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def sizes() -> dict[str, object]:
    """The configuration that the tiny models share."""
    return SIZES
