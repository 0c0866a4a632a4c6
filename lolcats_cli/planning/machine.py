"""What a plan counts with: rates and memory of GPUs from a table, or of this computer, measured.

torch is imported only to measure.
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

# Name -> dense bf16 TFLOP/s with fp32 sums, without sparsity, and GB of memory, from NVIDIA's data sheets: A100, H100
# (SXM), H200, L4, L40S, A10, the Blackwell architecture's technical brief (B200), and the Ada GPU architecture's
# whitepaper (RTX 4090, RTX 3090).
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
EFFICIENCY = 0.55  # of the vendor's rate that a model reaches (docs/planning.md)
# A layer's hybrid attention is many small kernels: what a pass takes to launch them, in seconds, and the part of the
# vendor's rate that they reach (H200, forward and backward, 1,024 to 32,768 tokens).
LAUNCH, ATTENTION = 0.0025, 0.012
DISK = 2e9  # bytes a second that one NVMe disk writes and reads
PER_NODE = 8  # GPUs of a computer, at most
PRODUCT_TO_MODEL = 0.75  # what a model reaches of the rate of a large matrix product
SECONDS, CHUNK = 6.0, 2**28  # that each measurement takes, about; bytes that are written at a time


@dataclass(frozen=True)
class Machine:
    """Where a plan is carried out.

    Attributes:
        name, count: of the GPUs; "CPU" and 1 without any.
        memory: bytes of one of them.
        rate: operations a second that a model's layers reach on one.
        launch, attention: seconds that every pass of a layer's hybrid attention takes, and the operations a second
            that it reaches beside them.
        source: where these rates come from, for people.
        disk: bytes a second, to write and to read.
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
        """Computers, and the GPUs of each."""
        each = max(size for size in range(1, min(self.count, PER_NODE) + 1) if self.count % size == 0)
        return self.count // each, each


def of_gpus(text: str) -> Machine:
    """ "8xH100-80GB" or "A100-40GB" as a machine. Raises `UsageError` for others than those of the table."""
    found = re.fullmatch(r"(?:([1-9]\d{0,4})\s*[xX×]\s*)?([A-Za-z0-9-]+)", text.strip())
    names = {name.lower(): name for name in GPUS}
    name = names.get(found[2].lower()) if found else None
    if found is None or name is None:
        raise UsageError(
            f"--gpus {text} is not a number and a GPU, such as 8xH100-80GB. Those known are {', '.join(GPUS)}; "
            "--calibrate measures the one that is here."
        )
    tera, memory = GPUS[name]
    peak, source = tera * 1e12, f"{EFFICIENCY:.0%} of the vendor's"
    return Machine(name, int(found[1] or 1), memory * 1e9, EFFICIENCY * peak, LAUNCH, ATTENTION * peak, source)


def calibrate(dtype: str, heads: tuple[int, int, int], seq_len: int, operations: float, folder: Path) -> Machine:
    """Measure this computer, in up to a minute.

    Args:
        dtype: of the teacher's weights.
        heads: query heads, key heads, and their size.
        seq_len: tokens of a row, of which one layer's hybrid attention is trained.
        operations: of such a pass over one row.
        folder: on the disk to measure.
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
    """What `work` takes, at its fastest, after a first time."""
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
    """Seconds of a pass forward and backward of a layer's hybrid attention over one row, and of its softmax target."""
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
    """Bytes a second that a file is written with, fsync included, and that it is read with from the disk."""
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
