"""Hybrid attention on one CPU thread: chunked beside its quadratic definition and causal softmax, in one run.

    python benchmarks/attention.py results.csv [--lengths 1024 4096]

One layer, batch 1, 8 heads of 64, fp32. Before anything is timed, chunked must agree with the reference in fp64, and
the sparse cache (64 exact keys) must not depend on how a row is cut. The gradients are of the maps and gamma, as in
transfer.
On a GPU: `gpu`.
"""

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from lolcats_kernels import HybridConfig, HybridMaps, hybrid_attention
from lolcats_kernels.sparse import sparse_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

HEADS, DIM = 8, 64
KINDS = {
    "sliding": HybridConfig(window=64),
    "terraced": HybridConfig(window=64, layout="terraced"),
    "linear": HybridConfig(window=0),
}
PATHS = ("chunked", "sparse", "reference", "sdpa")
KEPT = 64  # exact keys of the sparse cache
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
QUADRATIC = 4096  # tokens up to which the peers are run


def inputs(kind: str, length: int, dtype: torch.dtype) -> tuple[HybridMaps, list[Tensor]]:
    torch.manual_seed(0)
    maps = HybridMaps(KINDS[kind], num_heads=HEADS, head_dim=DIM).to(dtype)
    return maps, [torch.randn(1, HEADS, length, DIM, dtype=dtype) for _ in range(3)]


def step(kind: str, path: str, length: int, backward: bool) -> Callable[[], None]:
    """One forward, or forward and backward to the maps and gamma (not q, k, v)."""
    maps, (q, k, v) = inputs(kind, length, torch.float32)

    def run() -> None:
        with torch.set_grad_enabled(backward):
            if path == "sdpa":
                scaled_dot_product_attention(q, k, v, is_causal=True)
                return
            if path == "sparse":
                sparse_attention(q, k, v, maps, size=KEPT, scaling=DIM**-0.5)
                return
            out = hybrid_attention(q, k, v, maps, scaling=DIM**-0.5, backend=path)
            if backward:
                maps.zero_grad()
                out.square().sum().backward()

    return run


def gate(kind: str) -> None:
    """Outputs and parameter gradients agree with the reference in fp64, at a length that is no whole block."""
    maps, (q, k, v) = inputs(kind, 300, torch.float64)
    got = []
    for backend in ("reference", "chunked"):
        maps.zero_grad()
        out = hybrid_attention(q, k, v, maps, scaling=DIM**-0.5, backend=backend)
        out.square().sum().backward()
        got.append([out.detach(), *(p.grad.clone() for p in maps.parameters() if p.grad is not None)])
    if maps.config.window:
        outs, state = [], None
        for part in zip(*(x.split([140, 1, 159], 2) for x in (q, k, v)), strict=True):
            out, state = sparse_attention(*part, maps, size=KEPT, scaling=DIM**-0.5, initial_state=state)
            outs.append(out)
        got[0].append(sparse_attention(q, k, v, maps, size=KEPT, scaling=DIM**-0.5)[0])
        got[1].append(torch.cat(outs, 2))
    for expected, actual in zip(*got, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def paths(kind: str, length: int, backward: bool) -> list[str]:
    """What is measured: no gradients of the sparse cache, which needs a window; no quadratic peers of long rows."""
    left_out = {"sdpa", "sparse"} if backward else {"reference"}
    left_out |= {"sparse"} if kind == "linear" else set()
    left_out |= {"sdpa", "reference"} if length > QUADRATIC else set()
    return [path for path in PATHS if path not in left_out]


def paired(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of CPU time; the paths take turns, so that other load meets all of them."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, run in steps.items():
            start = time.process_time()
            run()
            if turn:  # the first is a warm-up
                spent[name].append(1000 * (time.process_time() - start))
    return spent


def peak_mib(kind: str, path: str, length: int, backward: bool) -> float:
    """What the step adds to the peak of a fresh process."""
    spec = [kind, path, str(length), str(int(backward))]
    done = subprocess.run([sys.executable, __file__, "--peak", *spec], check=True, capture_output=True, text=True)
    return float(done.stdout)


def machine() -> str:
    """The processor's name."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def resident_peak_kib() -> int:
    """Not getrusage: its maximum carries over from the process that started this one."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def print_peak(kind: str, path: str, length: str, backward: str) -> None:
    step(kind, path, 128, backward == "1")()  # libraries are loaded
    run = step(kind, path, int(length), backward == "1")
    before = resident_peak_kib()
    run()
    print((resident_peak_kib() - before) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="?")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        print_peak(*args.peak)
        return
    if not args.csv:
        parser.error("name the CSV file to write.")
    for kind in KINDS:
        gate(kind)
    with open(args.csv, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(
            ["machine", "torch", "kind", "pass", "length", "path", "median_ms", "min_ms", "max_ms", "peak_mib"]
        )
        for kind in KINDS:
            for length in args.lengths:
                for backward in (False, True):
                    chosen = paths(kind, length, backward)
                    spent = paired({path: step(kind, path, length, backward) for path in chosen}, args.rounds)
                    for path, ms in spent.items():
                        figures = (statistics.median(ms), min(ms), max(ms), peak_mib(kind, path, length, backward))
                        name = "forward+backward" if backward else "forward"
                        row = [machine(), torch.__version__, kind, name, length, path]
                        table.writerow([*row, *(f"{x:.1f}" for x in figures)])
                        print(*row[2:], *(f"{x:.1f}" for x in figures), flush=True)
                        file.flush()


if __name__ == "__main__":
    main()
