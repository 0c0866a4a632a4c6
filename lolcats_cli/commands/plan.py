"""lolcats plan"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from lolcats_cli.commands import _options as o
from lolcats_cli.commands._tables import table
from lolcats_cli.planning.plan import Plan

WIDTH = 110  # columns of sentences
LOGITS = 32  # next tokens behind a token, whose size is told


def plan(
    teacher: Annotated[str, typer.Argument(help="Model folder or hub id; only config.json is read.")],
    tokens: Annotated[str, typer.Option(help="Tokens of the data, such as 20M.")],
    seq_len: o.SeqLen = 1024,
    gpus: Annotated[str | None, typer.Option(help="Number and kind, such as 8xH100-80GB; else 1xH100-80GB.")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this computer's rates instead, for up to a minute.")
    ] = False,
    disk: o.Disk = None,
    memory: o.Memory = None,
    revision: Annotated[str | None, typer.Option(help="The hub revision of the teacher.")] = None,
) -> Plan:
    """Estimate the disk, memory and time of a conversion, and print its commands, for every store. Reads no weights.

    Without --disk it counts with the free space of this computer's disk.
    """
    number, space = o.parse_size(tokens, "--tokens"), o.parse_size(disk, "--disk")
    given = o.parse_size(memory, "--memory")

    import shutil

    from lolcats_cli.errors import UsageError
    from lolcats_cli.planning.machine import of_gpus
    from lolcats_cli.planning.plan import plan as run

    if gpus is not None and calibrate:
        raise UsageError("--gpus and --calibrate both set the machine's rates. Choose one.")
    if calibrate:
        o.progress().note("measuring this computer: matrix products, a layer's attention, the disk")
    free = space or float(shutil.disk_usage(Path.cwd()).free)
    machine = None if calibrate else of_gpus(gpus or "1xH100-80GB")
    return run(
        teacher,
        tokens=int(number or 0),
        disk=free,
        machine=machine,
        memory=given,
        seq_len=seq_len,
        revision=revision,
    )


def show(found: Plan, as_json: bool) -> None:
    """The plan, as text or as JSON. Raises NotEnoughSpace, with the reason, if no store fits."""
    from lolcats_cli.errors import NotEnoughSpace
    from lolcats_cli.planning.plan import to_dict

    print(json.dumps(to_dict(found)) if as_json else "\n".join(_lines(found)))
    if found.refusal is not None:
        raise NotEnoughSpace(found.refusal)


def _lines(found: Plan) -> list[str]:
    """The plan for people: the teacher and the machine, the table, what does not fit, and the commands."""
    from lolcats_cli.artifacts.disk import human
    from lolcats_cli.artifacts.stores import LOGIT_BYTES

    shape, machine = found.shape, found.machine
    size = human(shape.weights * shape.itemsize)
    lines = [
        f"{found.teacher}: {_count(shape.weights)} parameters, {size} in {shape.dtype}; {len(shape.layers)} layers.",
        f"{found.rows:,} rows of {found.seq_len:,} tokens; transfer and lora take them twice (--epochs 2).",
        f"{machine.count} x {machine.name} of {human(machine.memory)}, at {machine.rate / 1e12:.3g} TFLOP/s "
        f"({machine.source}). {human(found.disk)} of disk, at {machine.disk[0] / 1e9:.2g} GB/s to write and "
        f"{machine.disk[1] / 1e9:.2g} to read.",
        "",
    ]
    rows = [("stage", "store", "disk", "device", "host", "operations", "time", "fits")]
    rows += [
        (
            step.stage,
            step.name,
            human(step.disk),
            human(step.memory.device),
            human(step.memory.host),
            f"{step.operations:.1e}" if step.operations else "-",
            _time(step.seconds),
            "no" if step.problems else "yes",
        )
        for step in found.steps
    ]
    lines += [table(rows, numbers=False), ""]
    problems: dict[str, list[str]] = {}
    for step in found.steps:
        name = f"--store {step.name.replace(' ', ' --block-size ')}" if step.store else step.stage
        problems.setdefault(name, []).extend(step.problems)
    sentences = [f"{name} does not fit: {'; '.join(why)}." for name, why in problems.items() if why]
    if found.choice:
        sentences.append(f"Use --store {found.choice.store}. {found.choice.reason}")
    state, cache = human(found.state), human(found.cache * 1024)
    sentences.append(
        f"A student keeps {state} for a sequence of any length. The teacher keeps {cache} for every 1,024 tokens."
    )
    logits = human(LOGITS * LOGIT_BYTES * found.rows * found.seq_len)
    sentences.append(
        f"--store-logits {LOGITS} would add {logits} to the capture ({LOGITS * LOGIT_BYTES} bytes a token), and run "
        "the teacher over every row."
    )
    trained = sum(layer.attention for layer in shape.layers)
    sentences.append(
        f"lora --full-attention would train {_count(trained)} weights, in {human(found.full_attention)} of each "
        "device's memory."
    )
    for sentence in sentences:
        lines += textwrap.wrap(sentence, WIDTH, break_on_hyphens=False)
    return lines + (["", *found.commands] if found.commands else [])


def _count(weights: int) -> str:
    """Weights for people: 8.03 B, 135 M."""
    return f"{weights / 1e9:.3g} B" if weights >= 1e9 else f"{weights / 1e6:.3g} M"


def _time(seconds: float) -> str:
    """Seconds for people: 40 s, 12 min, 5.3 h, 3.1 days."""
    for unit, length, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < most * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds / 86400:.3g} days"
