"""The rates and the memory that a plan is computed from: those of GPUs in a table, or those of this computer, measured.

torch is imported only for measuring.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lolcats_cli.artifacts.stores import available_memory
from lolcats_cli.errors import UsageError

if TYPE_CHECKING:
    import torch

# By name: dense bf16 TFLOP/s with fp32 sums and without sparsity, and GB of memory. The figures are from NVIDIA's data
# sheets (A100, H100 SXM, H200, L4, L40S, A10), the technical brief of the Blackwell architecture (B200), and the
# whitepaper of the Ada GPU architecture (RTX 4090, RTX 3090).
GPUS = {
    "A10-24GB": (125, 24),
    "A100-40GB": (312, 40),
    "A100-80GB": (312, 80),
    "B200-180GB": (2250, 180),
    "H100-80GB": (989, 80),
    "H200-141GB": (989, 141),
    "L4-24GB": (121, 24),
    "L40S-48GB": (362, 48),
    "RTX3090-24GB": (71, 24),
    "RTX4090-24GB": (165, 24),
}
EFFICIENCY = 0.55  # the part of the vendor's rate that a model reaches (docs/planning.md)
# A layer's hybrid attention consists of many small kernels. These are the seconds that a pass takes to launch them, and
# the part of the vendor's rate that they reach (H200, forward and backward, 1,024 to 32,768 tokens).
LAUNCH, ATTENTION = 0.0025, 0.012
DISK = 2e9  # bytes per second that one NVMe disk writes and reads
PER_NODE = 8  # the largest number of GPUs in a computer
PRODUCT_TO_MODEL = 0.75  # the part of a large matrix product's rate that a model reaches
SECONDS = 6.0  # the time that each measurement takes, roughly
CHUNK = 2**28  # bytes that are written at a time


@dataclass(frozen=True)
class Machine:
    """The machine for which a plan is made.

    Attributes:
        name, count: the name and the number of the GPUs; "CPU" and 1 if there is none.
        memory: the bytes of one of them.
        rate: the operations per second that a model's layers reach on one of them.
        launch, attention: the seconds that every pass of a layer's hybrid attention takes to start, and the operations
            per second that it then reaches.
        source: the origin of these rates, for people.
        disk: the bytes per second that the disk writes, and those that it reads.
    """

    name: str
    count: int
    memory: float
    rate: float
    launch: float
    attention: float
    source: str
    disk: tuple[float, float] = (DISK, DISK)

    @property
    def cpu(self) -> bool:
        return self.name == "CPU"

    @property
    def nodes(self) -> tuple[int, int]:
        """The number of computers, and the number of GPUs in each."""
        each = max(size for size in range(1, min(self.count, PER_NODE) + 1) if self.count % size == 0)
        return self.count // each, each


def of_gpus(text: str) -> Machine:
    """ "8xH100-80GB" or "A100-40GB" as a machine. Raises `UsageError` for a GPU that is not in the table."""
    found = re.fullmatch(r"(?:([1-9]\d{0,4})\s*[xX×]\s*)?([A-Za-z0-9-]+)", text.strip())
    names = {name.lower(): name for name in GPUS}
    name = names.get(found[2].lower()) if found else None
    if found is None or name is None:
        raise UsageError(
            f"--gpus {text} is not a number and a GPU, such as 8xH100-80GB. The known GPUs are {', '.join(GPUS)}. For "
            "another one, run `lolcats plan --calibrate` on its computer."
        )
    tera, memory = GPUS[name]
    peak, source = tera * 1e12, f"{EFFICIENCY:.0%} of the vendor's"
    return Machine(name, int(found[1] or 1), memory * 1e9, EFFICIENCY * peak, LAUNCH, ATTENTION * peak, source)


def calibrate(dtype: str, heads: tuple[int, int, int], seq_len: int, operations: float, folder: Path) -> Machine:
    """Measures this computer. This takes up to a minute.

    Args:
        dtype: the dtype of the teacher's weights.
        heads: the number of query heads, the number of key heads, and the size of a head.
        seq_len: the tokens of a row. One layer's hybrid attention is trained on one row.
        operations: the operations of such a training pass.
        folder: a folder on the disk that is measured.
    """
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name().replace("NVIDIA ", "") if cuda else "CPU"
    memory = float(torch.cuda.get_device_properties(device).total_memory) if cuda else available_memory()
    size = 8192 if cuda else 2048
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    product = 2 * size**3 / _seconds(lambda: a @ a, device)
    seconds = _training_pass(heads, seq_len, getattr(torch, dtype), device)
    return Machine(
        name,
        torch.cuda.device_count() if cuda else 1,
        memory,
        PRODUCT_TO_MODEL * product,
        0.0,
        operations / seconds,
        "measured here",
        _disk(folder),
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest time that `work` takes, in seconds. A first run is not counted."""
    import torch

    def once() -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    once()
    found, stop = [once()], time.perf_counter() + SECONDS
    while len(found) < 20 and time.perf_counter() + min(found) < stop:
        found.append(once())
    return min(found)


def _training_pass(heads: tuple[int, int, int], seq_len: int, dtype: torch.dtype, device: torch.device) -> float:
    """The seconds of a training pass of a layer's hybrid attention over one row, with its softmax target."""
    import torch
    from lolcats_kernels import HybridConfig, HybridMaps, hybrid_attention

    query_heads, key_heads, size = heads
    maps = HybridMaps(HybridConfig(linear_factor="exp"), query_heads, size).to(device)
    q = torch.randn(1, query_heads, seq_len, size, device=device, dtype=dtype)
    k, v = (torch.randn(1, key_heads, seq_len, size, device=device, dtype=dtype) for _ in range(2))

    def train() -> None:
        with torch.no_grad():
            target = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        (hybrid_attention(q, k, v, maps, scaling=size**-0.5) - target).float().square().sum().backward()

    return _seconds(train, device)


def _disk(folder: Path) -> tuple[float, float]:
    """The bytes per second that the disk writes, with fsync, and those that it reads."""
    chunk, written = os.urandom(CHUNK), 0
    status = os.statvfs(folder)
    most = min(2**33, status.f_bavail * status.f_frsize // 2)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        started = time.perf_counter()
        while written + len(chunk) <= most and time.perf_counter() < started + SECONDS:
            file.write(chunk)
            os.fsync(file.fileno())
            written += len(chunk)
        write = written / (time.perf_counter() - started)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
        file.seek(0)
        started, count = time.perf_counter(), 0
        while time.perf_counter() < started + SECONDS and (block := file.read(CHUNK)):
            count += len(block)
        return write, count / (time.perf_counter() - started)
