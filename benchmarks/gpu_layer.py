"""One attention layer on a GPU, for `gpu`: ours beside what others have.

Peers of the same run: FlashAttention, as causal scaled_dot_product_attention; and the parts done by others, whose times
are to be added: a sliding window by flex attention, and fla's chunk_linear_attn where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from lolcats_kernels import HybridConfig, HybridMaps, KVState, hybrid_attention, sparse
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

KINDS = {
    "sliding exp": HybridConfig(linear_factor="exp"),
    "sliding": HybridConfig(),
    "terraced": HybridConfig(layout="terraced"),
    "linear": HybridConfig(window=0),
}
EXACT = 64  # keys of the sparse cache
PASSES = ("forward", "forward+backward", "maps alone")


@dataclass(frozen=True)
class Task:
    """One figure. labels: what it is of; prepare: -> (what is timed, labels that only it knows)."""

    labels: dict[str, Any]
    prepare: Callable[[], tuple[Callable[[], object], dict[str, Any]]]
    gradients: bool = False


@dataclass(frozen=True)
class Setup:
    """The sizes that are measured: of a layer, and of a model."""

    backend: str
    dtype: torch.dtype
    heads: int
    key_heads: int
    dim: int
    window: int
    points: tuple[tuple[int, int], ...]  # batch and tokens of a layer
    peer_points: tuple[tuple[int, int], ...]  # of flex and fla, which compile for some seconds each
    steps: tuple[int, ...]  # batches of a decoding step
    hidden: int
    intermediate: int
    layers: int
    prompts: tuple[int, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]  # of decoding
    lora: tuple[tuple[int, int], ...]  # batch and tokens of a training step


FULL = Setup(
    *("triton", torch.bfloat16, 32, 8, 128, 64),
    points=((1, 1024), (1, 4096), (1, 16384), (1, 32768), (8, 1024), (8, 4096), (64, 1024), (64, 4096)),
    peer_points=((1, 1024), (1, 4096), (1, 16384), (1, 32768), (8, 4096)),
    steps=(1, 8, 64, 128),
    hidden=4096,
    intermediate=14336,
    layers=8,
    prompts=(4096, 16384, 65536, 131072),
    contexts=(1024, 16384, 65536, 131072),
    batches=(1, 16),
    lora=((1, 4096), (8, 4096), (1, 16384)),
)
TINY = replace(
    FULL,
    backend="chunked",
    dtype=torch.float32,
    heads=4,
    key_heads=2,
    dim=16,
    window=16,
    points=((1, 64), (1, 128), (1, 256), (2, 64)),
    peer_points=(),
    steps=(1, 2),
    hidden=64,
    intermediate=96,
    layers=2,
    prompts=(64, 128),
    contexts=(32, 64, 128),
    batches=(1, 2),
    lora=((1, 64), (2, 64)),
)


def config_of(setup: Setup, kind: str) -> HybridConfig:
    config = KINDS[kind]
    return replace(config, window=setup.window if config.window else 0, feature_dim=setup.dim // 2)


def inputs(setup: Setup, kind: str, batch: int, length: int, device: torch.device) -> tuple[HybridMaps, list[Tensor]]:
    torch.manual_seed(0)
    maps = HybridMaps(config_of(setup, kind), setup.heads, setup.dim).to(device)
    options: dict[str, Any] = {"device": device, "dtype": setup.dtype}
    heads = (setup.heads, setup.key_heads, setup.key_heads)
    return maps, [torch.randn(batch, n, length, setup.dim, **options) for n in heads]


def gate(setup: Setup, device: torch.device) -> None:
    """Outputs, gradients of q, k and v, and a decoding step of every kind: the error against fp64 is at most twice the
    reference's in the same dtype. The gradients of the maps: it is at most 2% of them, as the reference computes these
    in fp32."""
    for kind in KINDS:
        maps, qkv = inputs(setup, kind, 1, 300, device)

        def results(backend: str, dtype: torch.dtype, maps: HybridMaps = maps, qkv: list[Tensor] = qkv) -> list[Tensor]:
            leaves = [
                *(x.to(dtype).requires_grad_() for x in qkv),
                *maps.to(torch.promote_types(dtype, torch.float32)).parameters(),
            ]
            run = partial(hybrid_attention, maps=maps, scaling=setup.dim**-0.5, backend=backend)
            out = run(*leaves[:3])
            grads = torch.autograd.grad(out.float().sin().sum(), leaves, allow_unused=True, materialize_grads=True)
            with torch.no_grad():
                _, state = run(*(x[:, :, :-1] for x in leaves[:3]), return_state=True)
                last, _ = run(*(x[:, :, -1:] for x in leaves[:3]), initial_state=state, return_state=True)
            return [x.detach().double() for x in (out, *grads, last)]

        exact = results("reference", torch.float64)
        plain = results("reference", setup.dtype)
        found = results(setup.backend, setup.dtype)
        for number, (x, y, z) in enumerate(zip(found, plain, exact, strict=True)):
            error, plain = (float((a - z).norm()) for a in (x, y))
            of_maps = 3 < number < len(exact) - 1
            allowed = (0.02 if of_maps else 1e-3) * float(z.norm()) + 2 * plain
            if not error <= allowed:
                raise SystemExit(f"{kind}, tensor {number}: the error is {error}, and {allowed} is allowed.")


def gate_sparse(setup: Setup, device: torch.device) -> None:
    """With a sparse cache, in fp32: the choices of one kernel give the outputs of PyTorch's, made block by block."""
    maps, qkv = inputs(setup, "sliding exp", 1, 600, device)
    q, k, v = (x.float() for x in qkv)
    run = partial(sparse.sparse_attention, q, k, v, maps.float(), size=EXACT, scaling=setup.dim**-0.5)
    with torch.no_grad():
        found, _ = run()
        with patch.object(sparse, "TOGETHER", 1):
            wanted, _ = run()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def layer(setup: Setup, device: torch.device) -> Iterator[Task]:
    """The most important first: batch 1, then other batches; the peers, then recipe best's kind, then the others."""

    def task(kind: str, path: str, what: str, batch: int, tokens: int) -> Task:
        prepare = partial(_prepare, setup, device, kind, path, what, batch, tokens)
        labels = {"kind": kind, "what": what, "path": path, "batch": batch, "tokens": tokens}
        return Task(labels, lambda: (prepare(), {}), gradients=what != "forward")

    softmax = "FlashAttention" if device.type == "cuda" else "SDPA"
    for alone in (True, False):
        points = [(batch, tokens) for batch, tokens in setup.points if (batch == 1) == alone]
        for kind in KINDS:
            paths = [softmax, setup.backend] if kind == next(iter(KINDS)) else [setup.backend]
            for batch, tokens in points:
                for path in paths:
                    for what in PASSES if path == setup.backend else PASSES[:2]:
                        yield task(kind if path == setup.backend else "", path, what, batch, tokens)
        others = ["flex window"] + ["fla linear"] * bool(find_spec("fla"))
        for batch, tokens in setup.peer_points:
            for path in others if (batch == 1) == alone else []:
                for what in PASSES[:2]:
                    yield task("", path, what, batch, tokens)


def _prepare(
    setup: Setup, device: torch.device, kind: str, path: str, what: str, batch: int, tokens: int
) -> Callable[[], object]:
    maps, qkv = inputs(setup, kind or "sliding", batch, tokens, device)
    run: Callable[..., Tensor]
    if path == setup.backend:
        run = partial(hybrid_attention, maps=maps, scaling=setup.dim**-0.5, backend=path)
    elif path == "SDPA":
        run = _softmax
    elif path == "FlashAttention":
        run = sdpa_kernel(SDPBackend.FLASH_ATTENTION)(_softmax)
    elif path == "flex window":
        run = _flex(setup.window, tokens)
    else:
        from fla.ops.linear_attn import chunk_linear_attn

        # Features as fla wants them, [B, T, H, F'], at hand: the parts do not compute them.
        phi_q, phi_k = (
            x.detach().transpose(1, 2).to(setup.dtype) for x in (maps.q_features(qkv[0]), maps.k_features(qkv[1]))
        )
        values = qkv[2].repeat_interleave(setup.heads // setup.key_heads, 1).transpose(1, 2).contiguous()
        qkv, run = [phi_q, phi_k, values], lambda q, k, v: chunk_linear_attn(q, k, v)[0]
    if what == "forward":
        return partial(run, *qkv)
    leaves = list(maps.parameters()) if path == setup.backend else []
    if what == "forward+backward":
        leaves += [x.requires_grad_() for x in qkv]

    def both() -> object:
        out = run(*qkv)
        return torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    return both


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _flex(window: int, tokens: int) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, n, i: (i <= n) & (n - i < window), None, None, tokens, tokens)
    return partial(torch.compile(flex_attention), block_mask=mask, enable_gqa=True)


def step(setup: Setup, device: torch.device) -> Iterator[Task]:
    """A decoding step, and the sums of its state read once: what it takes at least."""
    for kind in KINDS:
        for batch in setup.steps:
            for path in (setup.backend, "reading S"):
                labels = {"kind": kind, "what": "decoding step", "path": path, "batch": batch, "tokens": 1}
                yield Task(labels, partial(_step, setup, device, kind, batch, path))


def _step(
    setup: Setup, device: torch.device, kind: str, batch: int, path: str
) -> tuple[Callable[[], object], dict[str, Any]]:
    maps, (q, k, v) = inputs(setup, kind, batch, 1, device)
    state = KVState.empty(maps, batch, setup.key_heads, waiting=maps.config.waiting, dtype=setup.dtype, device=device)
    run: Callable[[], object]
    if path == setup.backend:
        options = {"scaling": setup.dim**-0.5, "initial_state": state, "return_state": True, "consume_state": True}
        run = partial(hybrid_attention, q, k, v, maps, backend=path, **options)
    else:
        run = state.sums.sum
    return as_graph(run, device), {}


def as_graph(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The same as a CUDA graph; as it is on a CPU."""
    if device.type != "cuda":
        return run
    for _ in range(3):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(held: object = run) -> None:  # the graph does not keep its inputs
        graph.replay()

    return replay
