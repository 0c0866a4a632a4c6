"""Options that several commands share, and what they mean."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import typer

from lolcats_cli import launch, ranks
from lolcats_cli.errors import UsageError
from lolcats_cli.progress import Progress, for_people

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MAX_LAYERS = 65536
MAX_PATH = 65536  # bytes of the line on stdin


ArtifactIn = Annotated[str, typer.Argument(help="The artifact's directory, or - to read its path from stdin.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The directory to write. The same command resumes it.")]
Seed = Annotated[
    int,
    typer.Option(min=0, help="Seed of everything random; the same seed gives the same bytes on a CPU."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; auto takes a CUDA GPU if there is one.")]
DeviceMap = Annotated[
    Literal["auto"] | None, typer.Option(help="auto: spread the weights over all GPUs, and put the rest on the CPU.")
]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto is the checkpoint's own.")]
Devices = Annotated[
    str | None,
    typer.Option(help="GPUs to use at once, such as 0-7, by one process each. With --device cpu: CPU processes."),
]
Teacher = Annotated[str | None, typer.Option(help="The teacher's folder, if it is not where it was captured.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code from the teacher's folder.")]
Resume = Annotated[
    Literal["auto", "required", "never"],
    typer.Option(help="required: there must be something to resume. never: there must be nothing unfinished."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace the artifact that --output holds; a finished one stays until the end.")
]
Format = Annotated[
    Literal["auto", "text", "json", "csv", "tsv", "parquet"],
    typer.Option(
        help="The data's format (json: lines, or a list); auto tells it from the file name, or else the first line."
    ),
]
Template = Annotated[
    Literal["auto", "tokens", "text", "chat", "sharegpt", "completion", "alpaca"],
    typer.Option(help="How a record becomes text; auto tells it from the columns (input_ids are taken as tokens)."),
]
OnBadRow = Annotated[
    Literal["error", "skip"], typer.Option(help="skip: leave out rows that cannot be used, and say how many.")
]
Pack = Annotated[bool, typer.Option(help="Fill rows with documents one after the other; otherwise each row holds one.")]
TextField = Annotated[str, typer.Option(help="The column that holds the text.")]
Subset = Annotated[str | None, typer.Option(help="The subset (configuration) of a hub dataset.")]
Split = Annotated[str, typer.Option(help="The split of a hub dataset.")]
Disk = Annotated[str | None, typer.Option(help="The most to write, such as 500GB; by default all free space.")]
Memory = Annotated[str | None, typer.Option(help="A device's memory, such as 80GB; by default as measured.")]
SeqLen = Annotated[int, typer.Option(min=2, help="Tokens per row.")]


T = TypeVar("T", bound="DataclassInstance")


def chosen(options: T, asked: dict[str, Any]) -> T:
    """The options, an instance of a dataclass, with the values that were asked for. A value of None changes nothing.

    asked: a command's parameters by name. Parameters that the dataclass does not have are ignored.
    """
    names = {field.name for field in fields(options)}
    return replace(options, **{name: asked[name] for name in names if asked.get(name) is not None})


def positive(value: float | None) -> float | None:
    """Checks that the number of an option is more than 0 and finite."""
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not a positive number.")
    return value


def artifact_path(given: str, data: Sequence[str] | None = None) -> str:
    """The artifact's path: `given`, or the line on stdin if it is "-", where `data` cannot come from too."""
    if given != "-":
        return given
    if ranks.size() > 1:
        raise UsageError("Several processes cannot all read an artifact's path from stdin. Name the artifact.")
    if "-" in (data or ()):
        raise UsageError("The artifact's path and --data cannot both come from stdin. Name one of them.")
    path = _line_of_stdin()
    if not path:
        raise UsageError(
            "An artifact's path was expected on stdin, and nothing came. Did the command before this one fail?"
        )
    return path


def _line_of_stdin() -> str:
    """The first line of stdin. Its bytes need not be text, because a path need not be. Empty if there is no stdin."""
    line = sys.stdin.buffer.readline(MAX_PATH) if sys.stdin is not None else b""
    if b"\0" in line:
        raise UsageError("An artifact's path was expected on stdin, and a line with a zero byte came.")
    return os.fsdecode(line).strip()


def parse_size(text: str | None, option: str) -> float | None:
    """ "500GB", "2TB" or "1.5 GiB" as bytes, and "20M" as a number. Raises `UsageError` on anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?|\d{1,18}) ?(?:([kKMGTP])(i?))?B?", text.strip())
    size = 0.0
    if found:
        number, prefix, binary = found.groups()
        size = float(number) * (1024 if binary else 1000) ** " KMGTP".index((prefix or " ").upper())
    if not size:
        raise UsageError(f"{option} {text} is not a size such as 500GB, 1.5TB or 20M.")
    return size


def parse_layers(text: str | None, option: str = "--layers", like: str = "0-3,7") -> list[int] | None:
    """ "0-3,7" as [0, 1, 2, 3, 7]. Raises `UsageError` on anything else."""
    if text is None:
        return None
    layers: set[int] = set()
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            if int(last or first) >= MAX_LAYERS:
                raise ValueError(f"No model has layer {last or first}.")
            found = range(int(first), int(last or first) + 1)
            if not found:
                raise ValueError(f"{part} ends before it begins.")
            layers.update(found)
    except ValueError as error:
        raise UsageError(f"{option} {text} is not a list like {like}.") from error
    return sorted(layers)


def launch_on(devices: str | None, artifact: str | None = None) -> None:
    """Runs this command in one process for each of the devices, and ends with their exit code.

    artifact: the path that was read from stdin, if the command line has a "-" for it.
    """
    if devices is None or ranks.size() > 1:
        return
    if launch.command_line is None:
        raise UsageError("--devices works on the command line only. Start Python once per device, as torchrun does.")
    numbers = parse_layers(devices, "--devices") or []
    command = [artifact if artifact and part == "-" else part for part in launch.command_line]
    raise typer.Exit(launch.launch(numbers, command))


KEPT = "0-3,7,2.0,sliding,auto:2,heads:2"  # what --keep-softmax takes


class KeptOption(NamedTuple):
    """What --keep-softmax asks for: layers, "sliding" and pairs of a layer and a key head; and how many other layers
    and key heads are chosen."""

    named: list[int | str | tuple[int, int]]
    auto: int
    heads: int


def parse_kept(text: str | None) -> KeptOption:
    """ "0,2.1,sliding,auto:2,heads:3" as ([0, (2, 1), "sliding"], 2, 3). Raises `UsageError` on anything but layers,
    layers with a key head behind a dot, and these words."""
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    counts = {"auto": 0, "heads": 0}
    named: list[int | str | tuple[int, int]] = []
    layers = []
    for part in parts:
        if chosen := re.fullmatch(r"(auto|heads):([1-9]\d{0,5})", part):
            if counts[chosen[1]]:
                raise UsageError(f"--keep-softmax {text} has {chosen[1]} more than once. Give it once.")
            counts[chosen[1]] = int(chosen[2])
        elif head := re.fullmatch(r"(\d{1,5})\.(\d{1,5})", part):
            named.append((int(head[1]), int(head[2])))
        elif part == "sliding":
            named.append(part)
        else:
            layers.append(part)
    found = parse_layers(",".join(layers), "--keep-softmax", KEPT) if layers else None
    return KeptOption([*(found or []), *named], **counts)


def parse_by_layer(option: str, text: str | None, least: int) -> tuple[tuple[int, ...] | None, bool]:
    """ "16,64,16" as ((16, 64, 16), False) and "auto" as (None, True). Raises `UsageError` on anything else, and on
    numbers below `least`."""
    if text is None or text == "auto":
        return None, text is not None
    sizes = tuple(map(int, text.split(","))) if re.fullmatch(r"\d{1,9}(,\d{1,9})*", text) else ()
    if not sizes or min(sizes) < least:
        raise UsageError(
            f"{option} {text} is neither auto nor a number of at least {least} for every layer, such as 16,64,16."
        )
    return sizes, False


def parse_samples(text: str | None) -> tuple[int, int | None]:
    """ "20" as (0, 20) and "1000-1999" as (1000, 1000): the first row and their number."""
    if text is None:
        return 0, None
    first, dash, last = text.partition("-")
    try:
        start, count = (int(first), int(last) - int(first) + 1) if dash else (0, int(first))
    except ValueError:
        start, count = 0, 0
    if start < 0 or count < 2:
        raise UsageError(f"--samples {text} is neither a number of rows, at least 2, nor a range like 1000-1999.")
    return start, count


def progress() -> Progress:
    """Progress on stderr, told once if there are several ranks."""
    return for_people() if ranks.rank() == 0 else Progress()
