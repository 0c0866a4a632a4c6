"""Which store a capture takes: what each needs of the disk and of memory, and the choice between them.

Imports neither torch nor transformers, as `plan` does not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lolcats_cli.artifacts.disk import human
from lolcats_cli.errors import NotEnoughSpace

STORES = ("attention", "block", "tokens")
SHARD_BYTES = 256 * 2**20  # of a file
GROUP_BYTES = 2 * 2**30  # of the q, k and v of one group of rows in all layers: what is held in memory
USABLE = 0.9  # of a device's memory; the rest is lost to fragments
PROCESS = 10**9  # bytes that Python, torch and a CUDA context take
TRAINING_TOKEN = (
    38  # bytes per head and its size that training a layer on one token takes (H200, bf16: 151 MiB / 1,024)
)
STATES = 16  # bytes of a trained parameter: itself, its gradient and AdamW's two moments, in fp32


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak: of the device, and of the host beside it."""

    device: float
    host: float

    def on(self, cpu: bool) -> float:
        """What the device must have: all of it if it is a CPU, where the process is one."""
        return self.device + self.host - PROCESS if cpu else self.device


@dataclass(frozen=True)
class Sizes:
    """What a capture and its transfer are made of, in bytes.

    Attributes:
        rows, seq_len: of the data.
        batch_size: rows of a forward pass.
        attention: of a token's q, k and v, by layer.
        hidden: of a token's hidden state.
        weights: by layer.
        beside: of the weights that every pass needs beside its layers: the embedding.
        width: of what a token takes inside a layer, while it is there.
        heads: the sizes of all query heads of a layer, summed.
        maps: parameters that are trained in a layer.
    """

    rows: int
    seq_len: int
    batch_size: int
    attention: tuple[int, ...]
    hidden: int
    weights: tuple[int, ...]
    beside: int
    width: int
    heads: int
    maps: int

    def disk(self, store: str, block_size: int | None = None) -> int:
        """Of the activations that a capture stores, and its tokens."""
        per_token = {"attention": sum(self.attention), "tokens": 0}
        if store == "block":
            per_token["block"] = self.hidden * (len(blocks(len(self.weights), block_size)) - 1)
        return self.rows * self.seq_len * (per_token[store] + 4)

    def capture_memory(self, store: str, block_size: int | None = None) -> Memory:
        """A block's weights and one batch on the device; the unit that is computed and the one that is written."""
        hidden = min(SHARD_BYTES, self.rows * self.seq_len * self.hidden)
        unit = {"attention": self.group(range(len(self.weights))), "block": hidden, "tokens": 0}[store]
        device = self.block_weights(block_size) + self.batch_size * self.seq_len * self.width + PROCESS
        return Memory(device, 2 * unit + PROCESS)

    def transfer_memory(self, store: str, block_size: int | None = None) -> Memory:
        """The layers that are trained together, and where a teacher computes q, k and v, it and a group of rows, twice
        as its batches are put together."""
        training = self.seq_len * self.heads * TRAINING_TOKEN
        if store == "attention":
            return Memory(training + STATES * self.maps + PROCESS, SHARD_BYTES + PROCESS)
        together = blocks(len(self.weights), block_size)
        rows = 2 * max(map(self.group, together))
        states = STATES * self.maps * max(map(len, together))
        computing = self.batch_size * self.seq_len * self.width
        return Memory(self.block_weights(block_size) + rows + states + max(training, computing) + PROCESS, PROCESS)

    def memory(self, store: str, block_size: int | None, cpu: bool) -> float:
        """What capture and transfer need of the device."""
        both = (self.capture_memory(store, block_size), self.transfer_memory(store, block_size))
        return max(needed.on(cpu) for needed in both)

    def block_weights(self, block_size: int | None) -> int:
        """Of the largest block of layers, and of what every block needs."""
        together = blocks(len(self.weights), block_size)
        return self.beside + max(sum(self.weights[layer] for layer in block) for block in together)

    def group(self, layers: range) -> int:
        """Of a group of rows' q, k and v in these layers."""
        per_row = [self.seq_len * size for size in self.attention]
        rows = min(self.rows, group_rows(per_row, SHARD_BYTES, GROUP_BYTES))
        return rows * sum(per_row[layer] for layer in layers)


@dataclass(frozen=True)
class Choice:
    """The store that is taken, and why, as a sentence."""

    store: str
    block_size: int | None
    reason: str


def blocks(layers: int, block_size: int | None) -> list[range]:
    """The layers of every block: all in one without a size."""
    size = block_size or layers
    return [range(first, min(first + size, layers)) for first in range(0, layers, size)]


def group_rows(per_row: Sequence[int], shard_bytes: int, group_bytes: int) -> int:
    """The rows of a group, from the bytes of a row's q, k and v in every layer."""
    return max(1, min(shard_bytes // max(per_row), group_bytes // sum(per_row)))


def choose(sizes: Sizes, disk: float, memory: float, cpu: bool) -> Choice:
    """The store for a disk of `disk` free bytes and a device of `memory` bytes, which is a CPU or not.

    Weights count in full on a CPU too, which could read them anew for every batch: that would take days.
    Raises `NotEnoughSpace`, saying what would help, if no store fits.
    """
    wanted, has = sizes.disk("attention"), f"{human(memory)} of memory"
    if wanted <= disk and fits(sizes.memory("attention", None, cpu), memory):
        return Choice("attention", None, f"q, k and v take {human(wanted)}, and the disk has {human(disk)}.")
    whole = sizes.memory("tokens", None, cpu)
    why = f"q, k and v would take {human(wanted)}, and the disk has {human(disk)}"
    if fits(whole, memory) and sizes.disk("tokens") <= disk:
        return Choice(
            "tokens", None, f"{why}; the whole teacher and the training take {human(whole)} of the {human(memory)}."
        )
    if wanted <= disk:
        why = f"the whole teacher takes {human(sizes.memory('attention', None, cpu))} of the device's {has}"
    else:
        why += f"; the whole teacher and the training take {human(whole)} of the device's {has}"
    block_size = largest_block(sizes, memory, cpu)
    if block_size is None:
        least = sizes.memory("block", 1, cpu)
        raise NotEnoughSpace(
            f"No store fits: {why}, and a single layer takes {human(least)}. It takes a device of "
            f"{human(least / USABLE)}, or shorter rows (--seq-len)."
        )
    stored, needed = sizes.disk("block", block_size), sizes.memory("block", block_size, cpu)
    layers = "1 layer" if block_size == 1 else f"{block_size} layers"
    if stored > disk:
        raise NotEnoughSpace(
            f"No store fits: {why}; the hidden states of blocks of {layers}, the largest that fit in memory, take "
            f"{human(stored)}, and the disk has {human(disk)}. Take fewer --samples, or a larger disk."
        )
    return Choice("block", block_size, f"{why}; blocks of {layers} take {human(needed)}, and {human(stored)} of disk.")


def largest_block(sizes: Sizes, memory: float, cpu: bool) -> int | None:
    """The layers of the largest blocks that fit, evened out; None if one layer does not fit."""
    count = len(sizes.weights)
    fitting = [size for size in range(1, count) if fits(sizes.memory("block", size, cpu), memory)]
    return -(-count // len(blocks(count, max(fitting)))) if fitting else None


def fits(needed: float, memory: float) -> bool:
    """Whether a device of so much memory has what is needed."""
    return needed <= USABLE * memory


def available_memory() -> float:
    """Bytes of this computer's memory that a new process may take: what is free, within the limit of its cgroup."""
    found = [float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(1024.0 * int(fields["MemAvailable"].split()[0]))
    groups = Path("/proc/self/cgroup")
    lines = groups.read_text().splitlines() if groups.exists() else []
    own = next((line[len("0::/") :] for line in lines if line.startswith("0::/")), None)
    if own is not None:
        root = Path("/sys/fs/cgroup")
        for folder in (root / own, *(root / own).parents):
            limit = folder / "memory.max"
            if folder.is_relative_to(root) and limit.exists() and (text := limit.read_text().strip()) != "max":
                found.append(float(text))
    return min(found)
