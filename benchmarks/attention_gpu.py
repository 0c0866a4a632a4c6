"""Hybrid attention on a GPU, in the shape of Llama 3 8B: `attention.py --device cuda`.

Peers of the same run: causal scaled_dot_product_attention (FlashAttention); and the parts done by others, whose times
are to be added: a sliding window by flex attention, and fla's chunk_linear_attn where it is installed.
"""

import csv
import statistics
from collections.abc import Callable
from functools import partial

import torch
from lolcats_kernels import HybridConfig, HybridMaps, KVState, hybrid_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

DEVICE = "cuda"
HEADS, KEY_HEADS, DIM, WINDOW = 32, 8, 128, 64
DECODE_BATCHES = (1, 8, 64, 128)
KINDS = {
    "sliding": HybridConfig(window=WINDOW),
    "sliding exp": HybridConfig(window=WINDOW, linear_factor="exp"),
    "terraced": HybridConfig(window=WINDOW, layout="terraced"),
    "linear": HybridConfig(window=0),
}


def inputs(kind: str, batch: int, length: int) -> tuple[HybridMaps, list[Tensor]]:
    torch.manual_seed(0)
    maps = HybridMaps(KINDS[kind], HEADS, DIM).to(DEVICE)
    options = {"device": DEVICE, "dtype": torch.bfloat16}
    return maps, [torch.randn(batch, heads, length, DIM, **options) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]


def gate(kind: str) -> None:
    """Outputs, gradients of q, k and v, and a decoding step: the error against fp64 is at most twice the reference's in
    bf16. The gradients of the maps: it is at most 2% of them, as the reference computes these in fp32."""
    maps, qkv = inputs(kind, 1, 300)

    def results(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [
            *(x.to(dtype).requires_grad_() for x in qkv),
            *maps.to(torch.promote_types(dtype, torch.float32)).parameters(),
        ]
        run = partial(hybrid_attention, maps=maps, scaling=DIM**-0.5, backend=backend)
        out = run(*leaves[:3])
        grads = torch.autograd.grad(out.float().sin().sum(), leaves, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            _, state = run(*(x[:, :, :-1] for x in leaves[:3]), return_state=True)
            last, _ = run(*(x[:, :, -1:] for x in leaves[:3]), initial_state=state, return_state=True)
        return [x.double() for x in (out, *grads, last)]

    exact = results("reference", torch.float64)
    worst = results("reference", torch.bfloat16)
    found = results("triton", torch.bfloat16)
    for number, (x, y, z) in enumerate(zip(found, worst, exact, strict=True)):
        error, plain = (float((a - z).norm()) for a in (x, y))
        of_maps = 3 < number < len(exact) - 1
        allowed = (0.02 if of_maps else 1e-3) * float(z.norm()) + 2 * plain
        assert error <= allowed, f"{kind}, tensor {number}: {error} against {allowed}"


def milliseconds(run: Callable[[], object], rounds: int) -> list[float]:
    times = []
    for turn in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(start.elapsed_time(end))
    return times


def with_backward(run: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    def both() -> object:
        out = run()
        return torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    return both


def paths(kind: str, length: int) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """What to time at this length: name -> (forward, the tensors that backward is for)."""
    maps, (q, k, v) = inputs(kind, 1, length)
    for x in (q, k, v):
        x.requires_grad_()
    found = {}
    for backend in ("triton", "chunked"):
        run = partial(hybrid_attention, q, k, v, maps, scaling=DIM**-0.5, backend=backend)
        found[backend] = (run, [q, k, v, *maps.parameters()])
    if kind != "sliding":
        return found
    found["sdpa"] = (partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True), [q, k, v])
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, n, i: (i <= n) & (n - i < WINDOW), None, None, length, length)
    flex = torch.compile(flex_attention)
    found["flex window"] = (partial(flex, q, k, v, block_mask=mask, enable_gqa=True), [q, k, v])
    try:
        from fla.ops.linear_attn import chunk_linear_attn
    except ImportError:
        return found
    # Features as fla wants them, [B, T, H, F'], at hand: the parts do not compute them.
    phi_q, phi_k = (x.detach().transpose(1, 2).bfloat16() for x in (maps.q_features(q), maps.k_features(k)))
    values = v.detach().repeat_interleave(HEADS // KEY_HEADS, 1).transpose(1, 2).contiguous()
    for x in (phi_q, phi_k, values):
        x.requires_grad_()
    found["fla linear"] = (lambda: chunk_linear_attn(phi_q, phi_k, values)[0], [phi_q, phi_k, values])
    return found


def decoding(kind: str, batch: int) -> tuple[Callable[[], None], int]:
    """(a step as a CUDA graph, bytes of the state)."""
    maps, (q, k, v) = inputs(kind, batch, 1)
    state = KVState.empty(maps, batch, KEY_HEADS, dtype=torch.bfloat16, device=DEVICE)
    options = {"scaling": DIM**-0.5, "initial_state": state, "return_state": True, "backend": "triton"}
    step = partial(hybrid_attention, q, k, v, maps, **options)
    with torch.no_grad():
        for _ in range(3):
            step(consume_state=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(consume_state=True)

    def replay(held: object = step) -> None:  # the graph does not keep its inputs
        graph.replay()

    return replay, state.nbytes


def main(path: str, lengths: list[int], rounds: int) -> None:
    for kind in KINDS:
        gate(kind)
    machine = [torch.cuda.get_device_name(), torch.__version__]
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        # The length of a decoding step is its batch, its memory that of its state.
        table.writerow(
            ["machine", "torch", "kind", "pass", "length", "path", "median_ms", "min_ms", "max_ms", "peak_mib"]
        )

        def write(kind: str, name: str, size: int, path: str, times: list[float], mib: float) -> None:
            row = [kind, name, size, path, *(f"{x:.4f}" for x in (statistics.median(times), min(times), max(times)))]
            table.writerow([*machine, *row, f"{mib:.1f}"])
            print(*row, f"{mib:.1f}", flush=True)
            file.flush()

        for kind in KINDS:
            for length in lengths:
                for path_name, (run, leaves) in paths(kind, length).items():
                    actions = {"forward": torch.no_grad()(run), "forward+backward": with_backward(run, leaves)}
                    for name, action in actions.items():
                        torch.cuda.reset_peak_memory_stats()
                        before = torch.cuda.memory_allocated()
                        times = milliseconds(action, rounds)
                        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
                        write(kind, name, length, path_name, times, peak)
            for batch in DECODE_BATCHES:
                run_step, size = decoding(kind, batch)
                write(kind, "decoding step", batch, "triton", milliseconds(run_step, 10 * rounds), size / 2**20)
