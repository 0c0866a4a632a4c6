"""The choice of a capture's store, from the disk space and the memory that each store needs.

Imports neither torch nor transformers, because `plan` does not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lolcats_cli.artifacts.disk import human
from lolcats_cli.errors import NotEnoughSpace

STORES = ("attention", "block", "tokens")
SHARD_BYTES = 256 * 2**20  # the size of a file
GROUP_BYTES = 2 * 2**30  # the size of q, k and v of one group of rows in all layers, which are held in memory
USABLE = 0.9  # the part of a device's memory that can be used; the rest is lost to fragmentation
PROCESS = 10**9  # bytes that Python, torch and a CUDA context take
# Bytes that training a layer takes per token, head and element of a head (H200, bf16: 151 MiB / 1,024).
TRAINING_TOKEN = 38
LOGIT_BYTES = 6  # of one of the likeliest next tokens: its id and its log-probability (`logits.DTYPES`)
STATES = 16  # bytes per trained parameter: the parameter, its gradient and AdamW's two moments, in fp32


@dataclass(frozen=True)
class Memory:
    """The peak memory in bytes, of the device and of the host."""

    device: float
    host: float

    def on(self, cpu: bool) -> float:
        """The memory that the device must have. On a CPU that is the sum, with the process counted once."""
        return self.device + self.host - PROCESS if cpu else self.device


@dataclass(frozen=True)
class Sizes:
    """The sizes that decide what a capture and its transfer need. Sizes are in bytes unless the text says otherwise.

    Attributes:
        rows, seq_len: the number of rows of the data, and their tokens.
        batch_size: rows of a forward pass.
        attention: the size of a token's q, k and v, by layer.
        hidden: the size of a token's hidden state.
        weights: the size of the weights, by layer.
        beside: the size of the weights that every pass needs in addition to its layers: the embedding.
        width: the size of a token's activations inside a layer.
        heads: the number of query heads of a layer times the elements of a head.
        maps: the number of parameters that are trained in a layer.
        logits: the size of a token's likeliest next tokens, if they are stored.
        predicting: the size of the head, and of a batch's logits, if likeliest next tokens are stored.
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
    logits: int = 0
    predicting: int = 0

    def disk(self, store: str, block_size: int | None = None) -> int:
        """Bytes of the activations that a capture stores, of its tokens, and of the likeliest next tokens."""
        per_token = {"attention": sum(self.attention), "tokens": 0}
        if store == "block":
            per_token["block"] = self.hidden * (len(blocks(len(self.weights), block_size)) - 1)
        return self.rows * self.seq_len * (per_token[store] + 4 + self.logits)

    def capture_memory(self, store: str, block_size: int | None = None) -> Memory:
        """The memory of a capture: a block's weights and one batch on the device, and two units on the host.

        One unit is computed while the other is written.
        """
        hidden = min(SHARD_BYTES, self.rows * self.seq_len * self.hidden)
        unit = {"attention": self.group(range(len(self.weights))), "block": hidden, "tokens": 0}[store]
        computing = self.batch_size * self.seq_len * self.width + self.predicting
        return Memory(self.block_weights(block_size) + computing + PROCESS, 2 * unit + PROCESS)

    def transfer_memory(self, store: str, block_size: int | None = None) -> Memory:
        """The memory of a transfer: the training of the layers that are trained together.

        Where the teacher computes q, k and v, its weights and a group of rows are added. The group counts twice,
        because its batches are put together into one tensor.
        """
        training = self.seq_len * self.heads * TRAINING_TOKEN
        if store == "attention":
            return Memory(training + STATES * self.maps + PROCESS, SHARD_BYTES + PROCESS)
        together = blocks(len(self.weights), block_size)
        rows = 2 * max(map(self.group, together))
        states = STATES * self.maps * max(map(len, together))
        computing = self.batch_size * self.seq_len * self.width
        return Memory(self.block_weights(block_size) + rows + states + max(training, computing) + PROCESS, PROCESS)

    def memory(self, store: str, block_size: int | None, cpu: bool) -> float:
        """Bytes that the device needs for both the capture and the transfer."""
        both = (self.capture_memory(store, block_size), self.transfer_memory(store, block_size))
        return max(needed.on(cpu) for needed in both)

    def block_weights(self, block_size: int | None) -> int:
        """Bytes of the weights of the largest block of layers, and of the weights that every block needs."""
        together = blocks(len(self.weights), block_size)
        return self.beside + max(sum(self.weights[layer] for layer in block) for block in together)

    def group(self, layers: range) -> int:
        """Bytes of q, k and v of one group of rows in these layers."""
        per_row = [self.seq_len * size for size in self.attention]
        rows = min(self.rows, group_rows(per_row, SHARD_BYTES, GROUP_BYTES))
        return rows * sum(per_row[layer] for layer in layers)


@dataclass(frozen=True)
class Choice:
    """The store that is taken, and a sentence that tells why."""

    store: str
    block_size: int | None
    reason: str


def blocks(layers: int, block_size: int | None) -> list[range]:
    """The layers of every block. Without a size there is one block."""
    size = block_size or layers
    return [range(first, min(first + size, layers)) for first in range(0, layers, size)]


def group_rows(per_row: Sequence[int], shard_bytes: int, group_bytes: int) -> int:
    """The number of rows in a group. `per_row` has the bytes of a row's q, k and v in every layer."""
    return max(1, min(shard_bytes // max(per_row), group_bytes // sum(per_row)))


def choose(sizes: Sizes, disk: float, memory: float, cpu: bool) -> Choice:
    """The store for a disk with `disk` free bytes and a device with `memory` bytes.

    All weights are counted on a CPU too. It could read them again for every batch, but that would take days.
    Raises `NotEnoughSpace`, which says what would help, if no store fits.
    """
    wanted, has = sizes.disk("attention"), f"{human(memory)} of memory"
    if wanted <= disk and fits(sizes.memory("attention", None, cpu), memory):
        return Choice(
            "attention", None, f"The queries, keys and values take {human(wanted)}, and the disk has {human(disk)}."
        )
    whole = sizes.memory("tokens", None, cpu)
    why = f"The queries, keys and values would take {human(wanted)}, and the disk has {human(disk)}."
    training = f"The whole teacher and the training take {human(whole)} of the device's {has}."
    if fits(whole, memory) and sizes.disk("tokens") <= disk:
        return Choice("tokens", None, f"{why} {training}")
    if wanted <= disk:
        why = f"The whole teacher takes {human(sizes.memory('attention', None, cpu))} of the device's {has}."
    else:
        why += f" {training}"
    block_size = largest_block(sizes, memory, cpu)
    if block_size is None:
        least = sizes.memory("block", 1, cpu)
        raise NotEnoughSpace(
            f"No store fits. {why} A single layer takes {human(least)}. Use a device with {human(least / USABLE)}, or "
            "shorter rows (--seq-len)."
        )
    stored, needed = sizes.disk("block", block_size), sizes.memory("block", block_size, cpu)
    layers = "1 layer" if block_size == 1 else f"{block_size} layers"
    if stored > disk:
        raise NotEnoughSpace(
            f"No store fits. {why} The largest blocks that fit in memory have {layers}. Their hidden states take "
            f"{human(stored)}, and the disk has {human(disk)}. Use fewer --samples, or a larger disk."
        )
    reason = f"{why} Blocks of {layers} take {human(needed)} of memory and {human(stored)} of disk."
    return Choice("block", block_size, reason)


def largest_block(sizes: Sizes, memory: float, cpu: bool) -> int | None:
    """The number of layers of the largest blocks that fit, made even; None if one layer does not fit."""
    count = len(sizes.weights)
    fitting = [size for size in range(1, count) if fits(sizes.memory("block", size, cpu), memory)]
    return -(-count // len(blocks(count, max(fitting)))) if fitting else None


def fits(needed: float, memory: float) -> bool:
    """Whether a device with `memory` bytes has the `needed` bytes."""
    return needed <= USABLE * memory


def available_memory() -> float:
    """Bytes of this computer's memory that a new process can use: the free memory, within the limit of its cgroup."""
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
