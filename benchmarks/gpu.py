"""All that is measured on a GPU, in one command of less than eight minutes: `make benchmarks-gpu`.

    python benchmarks/gpu.py [--minutes 7.5] [--parts layer step model] [--results benchmarks/results] [--pictures docs]
    python benchmarks/gpu.py --tiny --results DIR --pictures DIR     on a CPU: shows that it works, and nothing else

layer   one attention layer of Llama 3 8B: forward, and with backward to all, or to the maps and gamma alone
step    its decoding step, as a CUDA graph
model   8 layers of Llama 3 8B beside the softmax model: reading a prompt, decoding with static caches, a LoRA step

Correctness comes first. A part has its share of the time, and what others left of theirs. What there is no time or
memory for is named at the end. Writes RESULTS/gpu.csv and, by `gpu_plot`, two pictures; all name the card.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), str(ROOT / "kernels"), str(ROOT / "formats")]

import gpu_layer  # noqa: E402
import gpu_model  # noqa: E402
import gpu_plot  # noqa: E402
import torch  # noqa: E402
from attention import machine  # noqa: E402

COLUMNS = (
    *("card", "torch", "triton", "part", "kind", "what", "path", "batch", "tokens"),
    *("median_ms", "least_ms", "most_ms", "peak_mib"),
)
# What a part measures, and its share of the time.
PARTS = {"layer": (gpu_layer.layer, 0.45), "step": (gpu_layer.step, 0.1), "model": (gpu_model.model, 0.45)}


@dataclass(frozen=True)
class Clock:
    """Times on a device."""

    device: torch.device
    seconds: float = 0.3  # for one figure, after two runs that compile
    most: int = 50

    def milliseconds(self, run: Callable[[], object]) -> list[float]:
        for _ in range(2):
            run()
        times: list[float] = []
        began = time.monotonic()
        while len(times) < 3 or (len(times) < self.most and time.monotonic() - began < self.seconds):
            times.append(self._once(run))
        return times

    def _once(self, run: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            started = time.perf_counter()
            run()
            return 1000 * (time.perf_counter() - started)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def peak_mib(self, run: Callable[[], object]) -> float:
        """What a run adds to the device's memory; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


class Report:
    """The table, and what is not in it."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.clock = clock
        self.left_out: list[str] = []
        self.failed = False
        self._file = path.open("w", newline="", encoding="utf-8")
        self._table = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        self._table.writeheader()
        card = torch.cuda.get_device_name() if clock.device.type == "cuda" else f"{machine()} (no GPU)"
        self._fixed = {"card": card, "torch": torch.__version__, "triton": _version("triton")}

    def part(self, name: str, tasks: Iterable[gpu_layer.Task], until: float) -> None:
        """Measure task after task as long as there is time."""
        for task in tasks:
            label = " ".join(map(str, task.labels.values()))
            if time.monotonic() >= until:
                self.left_out.append(f"{name}: {label} (no time)")
                continue
            try:
                self._measure(name, task)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                self.left_out.append(f"{name}: {label} (out of memory)")
            except Exception as error:  # the others are measured all the same
                self.failed = True
                self.left_out.append(f"{name}: {label} ({type(error).__name__}: {str(error).partition(chr(10))[0]})")

    def _measure(self, part: str, task: gpu_layer.Task) -> None:
        """Measure and write a row. When it is done, nothing holds the task's tensors."""
        with torch.set_grad_enabled(task.gradients):
            run, more = task.prepare()
            times, peak = self.clock.milliseconds(run), self.clock.peak_mib(run)
        labels = task.labels | more
        figures = {"median_ms": statistics.median(times), "least_ms": min(times), "most_ms": max(times)}
        cells = {name: f"{value:.4f}" for name, value in figures.items()} | {"peak_mib": f"{peak:.1f}"}
        self._table.writerow({**self._fixed, "part": part, **labels, **cells})
        self._file.flush()
        print(f"{part:6}", *labels.values(), f"{figures['median_ms']:.4f} ms", flush=True)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def deadlines(parts: Sequence[str], start: float, minutes: float) -> Iterator[tuple[str, float]]:
    """When each part must end. Whatever one leaves is the next one's."""
    whole, end = sum(PARTS[part][1] for part in parts), 0.0
    for part in parts:
        end += PARTS[part][1] / whole
        yield part, start + 60 * minutes * end


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--results", type=Path, default=None)
    parser.add_argument("--pictures", type=Path, default=None)
    parser.add_argument("--picture-format", default="svg")
    parser.add_argument("--tiny", action="store_true", help="small sizes on a CPU")
    args = parser.parse_args(arguments)
    if args.tiny and not (args.results and args.pictures):
        parser.error("With --tiny, name the folders of --results and --pictures: these are no figures of a GPU.")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("There is no GPU here. --tiny shows on a CPU that the command works.")
    results, pictures = args.results or ROOT / "benchmarks" / "results", args.pictures or ROOT / "docs"
    device = torch.device("cpu" if args.tiny else "cuda")
    setup = gpu_layer.TINY if args.tiny else gpu_layer.FULL
    gpu_layer.gate(setup, device)
    gpu_layer.gate_sparse(setup, device)
    print(f"The kernels are correct, {time.monotonic() - started:.0f} s.", flush=True)
    report = Report(results / "gpu.csv", Clock(device, 0.01, 3) if args.tiny else Clock(device))
    for part, until in deadlines(args.parts, started, args.minutes):
        report.part(part, PARTS[part][0](setup, device), until)
    gpu_plot.draw(results / "gpu.csv", pictures, args.picture_format)
    print(f"{time.monotonic() - started:.0f} s.", *(f"Left out: {line}." for line in report.left_out), sep="\n")
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
