"""plan: what the four stages would take of disk, memory and time, for every store, from a teacher's configuration.

Operations are counted from the shapes, and times follow from a machine's rates. All options are the defaults of the
commands that it prints.

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
from lolcats_cli.teacher.shape import Shape, read_shape

# The defaults of the commands (a test compares them).
WINDOW, FEATURES = 64, 64
CAPTURE_BATCH, SAMPLE, VALIDATION = 8, 16, 0.05
EPOCHS, GRAD_ACCUM, EVAL_STEPS, RANK = 2, 2, 400, 8
SHARD_OF_MERGE = 5_000_000_000

FORWARD = 0.3  # of the time of a training pass of the hybrid attention, for one forward alone (H200: 0.2 to 0.3)
NORMS = 26  # bytes per hidden size and token that a layer's norms and projections keep for the backward pass
MLP = 3  # inner activations of the MLP that it keeps
LOGITS = 12  # bytes per logit beside it: in fp32, its softmax, and the gradient
FINISHING = 2  # passes over the validation rows when a training is finished, by both terms and by the window


@dataclass(frozen=True)
class Step:
    """One stage, with one store where it matters.

    Attributes:
        disk: bytes that it writes.
        memory: of each device and host.
        operations: of all devices together.
        seconds: that it takes.
        problems: why it does not fit, clause by clause; empty if it does.
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
    """What `plan` found.

    Attributes:
        teacher, disk: what it was asked for, and the bytes of disk that it went by.
        choice: the store to take; None if none fits, for the reason `refusal`.
        commands: the shell commands of the four stages.
        state: bytes that a student keeps of a sequence while it generates, however long that is.
        cache: bytes that the teacher keeps of each of its tokens.
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
    """What converting a teacher takes.

    Args:
        teacher: a model folder, or a hub id (with `revision`), of which config.json alone is read.
        tokens: of the data, in rows of `seq_len`.
        disk: free bytes.
        machine: what it is converted on; None measures this computer, in up to a minute.
        memory: bytes of each device, if not the machine's.

    Raises:
        BadInput: a configuration that is not to be had, or not understood.
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
    cache = 2 * shape.num_key_value_heads * shape.head_dim * shape.itemsize
    state = shape.num_heads * 2 * FEATURES * (shape.head_dim + 1) * 4 + WINDOW * cache
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
        cache=count * cache,
    )


def hybrid_operations(shape: Shape, seq_len: int) -> float:
    """Of a row's forward pass through one layer's hybrid attention: φ of q and k, the state's update and reading with
    2F features, the window."""
    return seq_len * shape.num_heads * shape.head_dim * (4.0 * FEATURES + 8 * FEATURES + 4 * WINDOW)


def training_operations(shape: Shape, seq_len: int) -> float:
    """Of a row's training pass in transfer: the hybrid attention forward and backward, and its softmax target."""
    target = seq_len * shape.num_heads * shape.head_dim * 2.0 * seq_len
    return 3 * hybrid_operations(shape, seq_len) + target


@dataclass(frozen=True)
class Work:
    """The stages' work on one machine."""

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
        """Parameters of a layer's feature maps."""
        return 2 * self.heads * FEATURES

    @property
    def validation(self) -> int:
        """Rows."""
        return min(max(1, round(VALIDATION * self.rows)), self.rows - 1)

    @property
    def training(self) -> int:
        """Rows."""
        return self.rows - self.validation

    # --- operations -------------------------------------------------------------------------------------------------

    def forward(self, layer: int) -> float:
        """Operations of a row's forward pass through one layer: two per weight, and causal softmax attention."""
        found = self.shape.layers[layer]
        return self.seq_len * 2.0 * (found.attention + found.active + self.heads * self.seq_len)

    def forwards(self) -> float:
        """Those of all layers."""
        return sum(self.forward(layer) for layer in range(len(self.shape.layers)))

    # --- stages -----------------------------------------------------------------------------------------------------

    def capture(self, store: str, block_size: int | None) -> Step:
        """The teacher's layers once over all rows; where nothing is stored behind them, over the measured rows."""
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
        """Every layer's training, the validations on the way, and before them what gives it q, k and v."""
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
        """Forward and backward through frozen weights: four operations per weight; the validations on the way."""
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
        """Rows of an optimizer step, which the processes share evenly."""
        return GRAD_ACCUM if self.machine.count == 1 else ceil(GRAD_ACCUM / self.machine.count) * self.machine.count

    @property
    def lora_savings(self) -> tuple[bool, bool]:
        """Whether the weights are spread over the devices, and whether activations are computed again: the least of
        these that fits in memory, or both."""
        several = self.machine.count > 1
        savings = [(False, False), *[(True, False)] * several, (False, True), (several, True)]
        fitting = (both for both in savings if fits(self.lora_memory(*both).on(self.machine.cpu), self.memory))
        return next(fitting, savings[-1])

    def lora_memory(self, spread: bool, again: bool) -> Memory:
        """Weights, what a row's layers keep for the backward pass, its logits, and what is trained with AdamW's states.

        spread: each device holds its part of the weights, and two layers that it fetches.
        again: layers keep their input alone, and one at a time computes the rest again.
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
        trained = len(layers) * (self.maps + RANK * 4 * (shape.hidden_size + self.heads)) * STATES
        return Memory(weights + activations + logits + trained + PROCESS, PROCESS)

    def merge(self) -> Step:
        """Every weight is read and written once, and read again for the golden logits."""
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
    """Of the whole that the busiest of `count` does, of equal parts."""
    return ceil(parts / count) / parts


def _commands(teacher: str, work: Work, choice: Choice) -> list[str]:
    """The four stages with this store, over all devices."""
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
    """The plan as one JSON document: bytes, operations, hours."""
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
        "store": found.choice and found.choice.store,
        "block_size": found.choice and found.choice.block_size,
        "reason": found.choice.reason if found.choice else found.refusal,
        "commands": found.commands,
    }
