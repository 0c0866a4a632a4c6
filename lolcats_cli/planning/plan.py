"""plan: computes the disk space, memory and time of the four stages, for every store, from a teacher's configuration.

Operations are counted from the shapes, and times follow from a machine's rates. The printed commands leave all other
options at their defaults.

Letters: T tokens of a row, H query heads, D head, F feature size, w window, E hidden size, V vocabulary.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

from lolcats_cli.artifacts.disk import human
from lolcats_cli.artifacts.stores import (
    PROCESS,
    STATES,
    STORES,
    TRAINING_TOKEN,
    USABLE,
    Choice,
    Memory,
    Sizes,
    blocks,
    choose,
    fits,
    largest_block,
)
from lolcats_cli.errors import NotEnoughSpace
from lolcats_cli.planning.machine import Machine, calibrate
from lolcats_cli.student.memory import cache_bytes, state_bytes
from lolcats_cli.teacher.shape import Shape, read_shape

# The defaults of the commands (a test compares them).
WINDOW, FEATURES, WAITING = 64, 64, 16
CAPTURE_BATCH, SAMPLE, VALIDATION = 8, 16, 0.05
EPOCHS, GRAD_ACCUM, EVAL_STEPS, RANK = 2, 2, 400, 8
SHARD_OF_MERGE = 5_000_000_000

FORWARD = 0.3  # a forward pass of the hybrid attention takes this part of a training pass (H200: 0.2 to 0.3)
NORMS = 26  # bytes per hidden element and token that a layer's norms and projections keep for the backward pass
MLP = 3  # activations per inner element of the MLP that the layer keeps for it
LOGITS = 12  # bytes per logit in addition to itself: its fp32 copy, its softmax, and its gradient
FINISHING = 2  # passes over the validation rows at the end of a training: with both terms, and with the window alone


@dataclass(frozen=True)
class Step:
    """One stage, with one store if the stage depends on it.

    Attributes:
        disk: the bytes that it writes.
        memory: the peak memory of each device and host.
        operations: the operations of all devices together.
        seconds: the time that it takes.
        problems: why it does not fit, as clauses; empty if it fits.
    """

    stage: str
    store: str | None
    block_size: int | None
    disk: float
    memory: Memory
    operations: float
    seconds: float
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The store as people read it."""
        return f"block {self.block_size}" if self.store == "block" else self.store or ""


@dataclass(frozen=True)
class Plan:
    """The result of `plan`.

    Attributes:
        teacher: the name or folder of the teacher.
        disk: the free bytes of the disk.
        choice: the store to take; None if no store fits. Then `refusal` tells why.
        commands: the shell commands of the four stages.
        state: the bytes that a student keeps of a sequence while it generates, for any length.
        cache: the bytes that the teacher keeps of every token.
        full_attention: the device's bytes that `lora --full-attention` takes.
    """

    teacher: str
    disk: float
    shape: Shape
    machine: Machine
    rows: int
    seq_len: int
    steps: list[Step]
    choice: Choice | None
    refusal: str | None
    commands: list[str]
    state: int
    cache: int
    full_attention: float


def plan(
    teacher: str,
    *,
    tokens: int,
    disk: float,
    machine: Machine | None = None,
    memory: float | None = None,
    seq_len: int = 1024,
    revision: str | None = None,
) -> Plan:
    """Plans the conversion of a teacher.

    Args:
        teacher: a model folder, or a hub id (with `revision`). Only its config.json is read.
        tokens: the number of tokens in the data. Rows have `seq_len` of them.
        disk: the free bytes of the disk.
        machine: the machine that converts the teacher. With None, this computer is measured in up to a minute.
        memory: the bytes of each device, if they differ from the machine's.

    Raises:
        BadInput: the configuration cannot be read, or is not understood.
    """
    shape = read_shape(teacher, revision)
    if machine is None:
        heads = (shape.num_heads, shape.num_key_value_heads, shape.head_dim)
        machine = calibrate(shape.dtype, heads, seq_len, training_operations(shape, seq_len), Path.cwd())
    memory = machine.memory if memory is None else memory
    work = Work(shape, max(2, ceil(tokens / seq_len)), seq_len, machine, disk, memory)
    sizes = work.sizes
    try:
        choice, refusal = choose(sizes, disk, memory, machine.cpu), None
    except NotEnoughSpace as error:
        choice, refusal = None, str(error)
    block_size = largest_block(sizes, memory, machine.cpu) or 1
    sized = {"attention": None, "block": block_size, "tokens": None}
    steps = [work.capture(store, sized[store]) for store in STORES]
    steps += [work.transfer(store, sized[store]) for store in STORES]
    steps += [work.lora(), work.merge()]
    commands = _commands(teacher, work, choice) if choice else []
    keys = shape.num_key_value_heads, shape.head_dim, shape.head_dim
    state = state_bytes(shape.num_heads, 2 * FEATURES, *keys, WINDOW + WAITING, shape.itemsize)
    layer = {"num_key_value_heads": shape.num_key_value_heads, "head_dim": shape.head_dim}
    count = len(shape.layers)
    return Plan(
        teacher,
        disk,
        shape,
        machine,
        work.rows,
        seq_len,
        steps,
        choice,
        refusal,
        commands,
        state=count * state,
        cache=cache_bytes([layer] * count, 1, shape.itemsize),
        full_attention=work.lora_memory(False, work.lora_savings[1], full=True).device,
    )


def hybrid_operations(shape: Shape, seq_len: int) -> float:
    """The operations of a row's forward pass through one layer's hybrid attention.

    They compute φ of q and k, update and read the state with its 2F features, and attend to the window.
    """
    return seq_len * shape.num_heads * shape.head_dim * (4.0 * FEATURES + 8 * FEATURES + 4 * WINDOW)


def training_operations(shape: Shape, seq_len: int) -> float:
    """The operations of a row's training pass in transfer: the hybrid attention forward and backward, and its softmax
    target."""
    target = seq_len * shape.num_heads * shape.head_dim * 2.0 * seq_len
    return 3 * hybrid_operations(shape, seq_len) + target


@dataclass(frozen=True)
class Work:
    """The work of the stages on one machine."""

    shape: Shape
    rows: int
    seq_len: int
    machine: Machine
    disk: float
    memory: float

    @property
    def sizes(self) -> Sizes:
        shape = self.shape
        return Sizes(
            rows=self.rows,
            seq_len=self.seq_len,
            batch_size=CAPTURE_BATCH,
            attention=(shape.attention_token,) * len(shape.layers),
            hidden=shape.hidden_token,
            weights=tuple((layer.attention + layer.mlp) * shape.itemsize for layer in shape.layers),
            beside=shape.embedding * shape.itemsize,
            width=(3 * max(layer.width for layer in shape.layers) + 4 * shape.hidden_size) * shape.itemsize,
            heads=self.heads,
            maps=self.maps,
        )

    @property
    def heads(self) -> int:
        """H · D."""
        return self.shape.num_heads * self.shape.head_dim

    @property
    def maps(self) -> int:
        """The number of parameters of a layer's feature maps."""
        return 2 * self.heads * FEATURES

    @property
    def validation(self) -> int:
        """The number of rows for validation."""
        return min(max(1, round(VALIDATION * self.rows)), self.rows - 1)

    @property
    def training(self) -> int:
        """The number of rows for training."""
        return self.rows - self.validation

    # --- operations -------------------------------------------------------------------------------------------------

    def forward(self, layer: int) -> float:
        """The operations of a row's forward pass through one layer: two per weight, and causal softmax attention."""
        found = self.shape.layers[layer]
        return self.seq_len * 2.0 * (found.attention + found.active + self.heads * self.seq_len)

    def forwards(self) -> float:
        """The operations of a row's forward pass through all layers."""
        return sum(self.forward(layer) for layer in range(len(self.shape.layers)))

    # --- stages -----------------------------------------------------------------------------------------------------

    def capture(self, store: str, block_size: int | None) -> Step:
        """Runs the teacher's layers once over all rows; where no output is stored, only over the measured rows."""
        sizes, machine = self.sizes, self.machine
        together = blocks(len(self.shape.layers), block_size)
        operations = 0.0
        for number, block in enumerate(together):
            stored = store == "attention" or number < len(together) - 1
            operations += sum(map(self.forward, block)) * (self.rows if stored else self.rows / SAMPLE)
        written, weights = sizes.disk(store, block_size), sum(sizes.weights) + sizes.beside
        read = weights + (written if store == "block" else 0)
        computing = operations / machine.rate / machine.count
        writing = written / machine.disk[0]
        seconds = max(computing, writing) + read / machine.disk[1]
        return self._step(
            "capture", store, block_size, written, sizes.capture_memory(store, block_size), operations, seconds
        )

    def transfer(self, store: str, block_size: int | None) -> Step:
        """Trains and validates every layer. Before that, q, k and v are read or computed."""
        sizes, machine, layers = self.sizes, self.machine, len(self.shape.layers)
        steps = EPOCHS * ceil(self.training / GRAD_ACCUM)
        passes = EPOCHS * self.training
        validated = self.validation * (steps // EVAL_STEPS + 1 + FINISHING)
        training = training_operations(self.shape, self.seq_len)
        one_pass = machine.launch + training / machine.attention
        weight = layers * (passes + FORWARD * validated)
        computing = 0.0 if store == "attention" else (passes + validated) * self.forwards()
        # Ranks share the groups of layers that are computed together; where there are more ranks, they share the
        # layers of a group, and each computes it.
        together = layers if store == "attention" else len(blocks(layers, block_size))
        parts = max(together, min(machine.count, layers))
        seconds = weight * one_pass * _share(parts, machine.count)
        seconds += computing / machine.rate * _share(together, machine.count)
        operations = weight * training + computing * max(1, machine.count // together)
        stored = sizes.disk(store, block_size) / self.rows
        # A layer's validation rows, read again and again, stay in the page cache.
        read = stored * (EPOCHS * self.training + self.validation)
        read += 0 if store == "attention" else sum(sizes.weights) + sizes.beside
        written = layers * (self.maps + 2 * self.shape.num_heads) * 4
        return self._step(
            "transfer",
            store,
            block_size,
            written,
            sizes.transfer_memory(store, block_size),
            operations,
            seconds + read / machine.disk[1],
        )

    def lora(self) -> Step:
        """Runs forward and backward through frozen weights, with four operations per weight, and validates."""
        shape, machine, layers = self.shape, self.machine, len(self.shape.layers)
        weights = sum(layer.attention + layer.active for layer in shape.layers) + shape.embedding
        steps = EPOCHS * ceil(self.training / self.grad_accum)
        passes, validated = EPOCHS * self.training, self.validation * (steps // EVAL_STEPS + 1)
        spread, again = self.lora_savings
        products = self.seq_len * 2.0 * weights * ((2 + again) * passes + validated)
        attention = layers * ((1 + again * FORWARD) * passes + FORWARD * validated)
        hybrid = 3 * hybrid_operations(shape, self.seq_len)
        one_pass = machine.launch + hybrid / machine.attention
        seconds = (products / machine.rate + attention * one_pass) / machine.count
        read = sum(self.sizes.weights) + self.sizes.beside
        adapter = layers * RANK * 4 * (2 * shape.hidden_size + self.heads + shape.num_key_value_heads * shape.head_dim)
        return self._step(
            "lora",
            None,
            None,
            adapter + layers * self.maps * 4,
            self.lora_memory(spread, again),
            products + attention * hybrid,
            seconds + read / machine.disk[1],
        )

    @property
    def grad_accum(self) -> int:
        """The rows of an optimizer step. The processes share them evenly."""
        return GRAD_ACCUM if self.machine.count == 1 else ceil(GRAD_ACCUM / self.machine.count) * self.machine.count

    @property
    def lora_savings(self) -> tuple[bool, bool]:
        """Whether the weights are spread over the devices, and whether activations are computed again.

        The first choice that fits in memory is taken: neither, spread weights, activations computed again, both.
        """
        several = self.machine.count > 1
        savings = [(False, False), *[(True, False)] * several, (False, True), (several, True)]
        fitting = (both for both in savings if fits(self.lora_memory(*both).on(self.machine.cpu), self.memory))
        return next(fitting, savings[-1])

    def lora_memory(self, spread: bool, again: bool, full: bool = False) -> Memory:
        """The memory of LoRA: the weights, the activations that a row's layers keep for the backward pass, the row's
        logits, and the trained parameters with AdamW's states.

        spread: each device holds its part of the weights, and two layers that it fetches.
        again: a layer keeps its input alone. It computes its other activations again, one layer at a time.
        full: the projections of the attentions are trained, and no adapter.
        """
        shape, layers = self.shape, self.shape.layers
        weights = float(shape.weights * shape.itemsize)
        if spread:
            weights = weights / self.machine.count + 2 * max(*self.sizes.weights, self.sizes.beside)
        kept = NORMS * shape.hidden_size + TRAINING_TOKEN * self.heads
        per_layer = [self.seq_len * (kept + MLP * layer.width * shape.itemsize) for layer in layers]
        activations = sum(per_layer)
        if again:
            activations = len(layers) * self.seq_len * shape.hidden_token + max(per_layer)
        logits = self.seq_len * shape.vocab_size * (shape.itemsize + LOGITS)
        adapter = len(layers) * RANK * 4 * (shape.hidden_size + self.heads)
        trained = len(layers) * self.maps + (sum(layer.attention for layer in layers) if full else adapter)
        return Memory(weights + activations + logits + trained * STATES + PROCESS, PROCESS)

    def merge(self) -> Step:
        """Reads and writes every weight once, and reads it again for the golden logits."""
        shape = self.shape
        size = shape.weights * shape.itemsize + len(shape.layers) * self.maps * 4
        tensor = shape.embedding * shape.itemsize
        seconds = size / self.machine.disk[0] + 2 * size / self.machine.disk[1]
        memory = Memory(0, min(size, SHARD_OF_MERGE) + 2 * tensor + PROCESS)
        return self._step("merge", None, None, size, memory, 0, seconds)

    def _step(
        self,
        stage: str,
        store: str | None,
        block_size: int | None,
        disk: float,
        memory: Memory,
        operations: float,
        seconds: float,
    ) -> Step:
        problems = []
        if disk > self.disk:
            problems.append(f"{stage} writes {human(disk)}, and the disk has {human(self.disk)}")
        needed = memory.on(self.machine.cpu)
        if not fits(needed, self.memory):
            problems.append(
                f"{stage} takes {human(needed)} of memory, and the device gives {human(USABLE * self.memory)}"
            )
        return Step(stage, store, block_size, disk, memory, operations, seconds, problems)


def _share(parts: int, count: int) -> float:
    """The share of the whole that the busiest of `count` workers does, when the whole consists of equal parts."""
    return ceil(parts / count) / parts


def _commands(teacher: str, work: Work, choice: Choice) -> list[str]:
    """The shell commands of the four stages with this store, on all devices."""
    nodes, each = work.machine.nodes
    single, many = "lolcats", "lolcats"
    if work.machine.count > 1:
        several = f"--nnodes {nodes} " if nodes > 1 else ""
        many = f"torchrun {several}--nproc-per-node {each} -m lolcats_cli"
    store = f"--store {choice.store}" + (f" --block-size {choice.block_size}" if choice.block_size else "")
    length = "" if work.seq_len == 1024 else f" --seq-len {work.seq_len}"
    lora = "" if work.grad_accum == GRAD_ACCUM else f" --grad-accum {work.grad_accum}"
    spread, again = work.lora_savings
    lora += (" --shard" if spread else "") + (" --gradient-checkpointing" if again else "")
    return [
        f"{many} capture {shlex.quote(teacher)} DATA -o cap --samples {work.rows}{length} {store}",
        f"{many} transfer cap -o maps",
        f"{many} lora maps -o lora{lora}",
        f"{single} merge lora -o student",
    ]


def to_dict(found: Plan) -> dict[str, Any]:
    """The plan as one JSON document. Its units are bytes, operations and hours."""
    shape, machine = found.shape, found.machine
    return {
        "teacher": {
            "parameters": shape.weights,
            "dtype": shape.dtype,
            "bytes": shape.weights * shape.itemsize,
            "layers": len(shape.layers),
        },
        "machine": {
            "name": machine.name,
            "count": machine.count,
            "memory": machine.memory,
            "operations_per_second": machine.rate,
            "disk_write_per_second": machine.disk[0],
            "disk_read_per_second": machine.disk[1],
        },
        "rows": found.rows,
        "seq_len": found.seq_len,
        "stages": [
            {
                "stage": step.stage,
                **({"store": step.store} if step.store else {}),
                **({"block_size": step.block_size} if step.block_size else {}),
                "disk": step.disk,
                "device_memory": step.memory.device,
                "host_memory": step.memory.host,
                "operations": step.operations,
                "hours": step.seconds / 3600,
                "problems": step.problems,
            }
            for step in found.steps
        ],
        "student_state": found.state,
        "teacher_cache_per_token": found.cache,
        "full_attention_device_memory": found.full_attention,
        "store": found.choice and found.choice.store,
        "block_size": found.choice and found.choice.block_size,
        "reason": found.choice.reason if found.choice else found.refusal,
        "commands": found.commands,
    }
