"""Finds the Triton kernels' chunks and warps for the GPU at hand, and prints its entry of `triton_launches.BF16_TILES`.

    python benchmarks/tune_triton.py [--heads 64 128 256] [--length 4096] [--rounds 20]

32 query and 8 key heads, batch 1, bf16, recipe best. Forward and backward have chunks and
warps of their own. What does not compile, or does
not fit into the GPU, is left out. Every choice must first give the same output and gradients as the table's own. Under
TRITON_INTERPRET=1 it runs without a GPU, which shows that it works and nothing else.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels")]

import triton  # noqa: E402
from lolcats_kernels import HybridConfig, HybridMaps, hybrid_attention, triton_launches  # noqa: E402
from lolcats_kernels.spec import NoRoom  # noqa: E402
from lolcats_kernels.triton_launches import Tile  # noqa: E402
from lolcats_kernels.triton_parts import INTERPRETED  # noqa: E402
from torch import Tensor  # noqa: E402

CHUNKS, WARPS = (16, 32, 64, 128), (4, 8)
HEADS, KEY_HEADS = 32, 8
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# What is raised where the GPU or the compiler has no room for a choice.
NO_ROOM = (NoRoom, triton.runtime.errors.PTXASError, triton.CompilationError)


def milliseconds(run: Callable[[], object], rounds: int) -> float:
    """Median, after a first call that compiles."""
    run()
    times = []
    for _ in range(rounds):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def tune(head: int, length: int, rounds: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The best (chunk, warps) forward and backward, for heads of that size."""
    torch.manual_seed(0)
    maps = HybridMaps(HybridConfig(linear_factor="exp"), HEADS, head).to(DEVICE)
    leaves = [
        torch.randn(1, heads, length, head, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    call = partial(hybrid_attention, *leaves, maps, scaling=head**-0.5, backend="triton")
    capability = triton_launches.capability(DEVICE)

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        wanted = [*leaves, *(p for p in maps.parameters() if p.requires_grad)]
        return torch.autograd.grad(out, wanted, torch.ones_like(out), retain_graph=True)

    out = call()
    expected = [x.float() for x in (out, *gradients(out))]
    best: list[tuple[int, int]] = []
    for backward in (False, True):
        found: dict[tuple[int, int], float] = {}
        for choice in itertools.product(CHUNKS, WARPS):
            # The other direction takes the smallest chunk: it only has to run.
            tiles = (Tile(16, 4), Tile(*choice)) if backward else (Tile(*choice), Tile(16, 4))
            try:
                with (
                    patch.dict(triton_launches.BF16_TILES, {capability: {256: tiles}}, clear=True),
                    patch.object(triton_launches, "LEAST", max(CHUNKS)),  # what does not fit is not cut smaller
                ):
                    out = call()
                    for value, wanted in zip((out, *gradients(out)), expected, strict=True):
                        assert (value.float() - wanted).norm() <= 0.02 * wanted.norm() + 1e-6, f"{tiles} is wrong"
                    found[choice] = milliseconds(partial(gradients, out) if backward else torch.no_grad()(call), rounds)
            except NO_ROOM as error:
                print(f"head {head}, {tiles}: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            print(f"head {head}, {'backward' if backward else 'forward'} {choice}: {found[choice]:.3f} ms", flush=True)
        if not found:
            sys.exit(f"Nothing runs for heads of {head}.")
        best.append(min(found, key=lambda choice: found[choice]))
    return best[0], best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    entry = {head: tune(head, args.length, args.rounds) for head in args.heads}
    print(f"{triton_launches.capability(DEVICE)}: {entry},")


if __name__ == "__main__":
    main()
