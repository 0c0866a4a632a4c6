"""Checks of a command's arguments. They run before torch and transformers are imported, so mistakes are told at once.

The stages check again what they use, so nothing here is needed for safety.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from os.path import realpath
from pathlib import Path
from typing import Literal

from lolcats_formats import Artifact, check_place, holds_artifact

from lolcats_cli.errors import UsageError
from lolcats_cli.teacher.identity import local_folder, recorded_folder
from lolcats_cli.teacher.records import find_files


def artifact(
    path: str | Path, kind: str | tuple[str, ...], teacher: str | None = None, needs_teacher: bool = False
) -> Artifact:
    """The artifact of a kind in `path`. Raises if it is not there, or its teacher not where it was or `teacher` says.

    Students, and captures of queries, keys and values, are used without their teacher, unless one is needed.
    """
    opened = Artifact.open(path, kind)
    if teacher is not None:
        local_folder(teacher)
    elif needs_teacher or opened.kind in ("transfer", "lora") or opened.config.get("store", "attention") != "attention":
        recorded_folder(opened.teacher, opened.path)
    return opened


def model(path: str, teacher: str | None = None) -> None:
    """Raises if `path` does not exist as something that `load_any` can load."""
    if holds_artifact(path):
        artifact(path, ("transfer", "lora", "student"), teacher)
    else:
        local_folder(path)


def data(sources: Iterable[str] | None, captures: bool = False) -> None:
    """Raises for a source of data that is no file and no id of a hub dataset. With `captures` it may be a capture."""
    for source in sources or ():
        if captures and (Path(source) / "manifest.json").is_file():
            Artifact.open(source, "capture")
        else:
            find_files(source)


def output(
    path: Path,
    kind: str,
    resume: Literal["auto", "required", "never"],
    force: bool,
    inputs: Iterable[str | None] = (),
) -> None:
    """Raises if no artifact of this kind can be written there, or if it is one of the command's `inputs`."""
    for given in inputs:
        if given is not None and realpath(given) == realpath(path):
            raise UsageError(f"--output {path} is the directory that the command reads. Name another one.")
    check_place(path, kind, resume, force)


def tracker(log_to: str | None) -> None:
    """Raises UsageError if the library that --log-to names is not installed."""
    if log_to is None:
        return
    try:
        metadata.distribution(log_to)
    except metadata.PackageNotFoundError as error:
        wanted = "'lolcats[log]'" if log_to == "tensorboard" else log_to
        raise UsageError(f"--log-to {log_to} needs {log_to}. Install it with: pip install {wanted}.") from error
