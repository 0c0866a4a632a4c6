"""Checks before any work whether an artifact can be written into a directory."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Literal

from .artifact import recorded_kind
from .errors import ConfigMismatch, FormatError, NotAnArtifact
from .limits import MANIFEST, PROGRESS

Resume = Literal["auto", "required", "never"]


def holds_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether the directory `path` holds an artifact, finished or not."""
    return any((Path(path) / name).is_file() for name in (MANIFEST, PROGRESS))


def check_kind(path: Path, found: str, kind: str) -> None:
    """Raises ConfigMismatch if the artifact in `path` is of another kind than the one that is to be written there."""
    if found != kind:
        raise ConfigMismatch(
            f"{path} holds a {found} artifact, and a {kind} would be written there. Choose another output "
            "directory, or replace it with --force.",
            ["kind"],
        )


def check_place(path: Path, kind: str, resume: Resume, force: bool) -> None:
    """Raises the errors of `ArtifactWriter.create` that depend on the directory and not on the settings.

    Raises NotAnArtifact, ConfigMismatch or FormatError for what lies there, and PermissionError where nothing can be
    written.
    """
    if path.exists() and not path.is_dir():
        raise NotAnArtifact(f"{path} is a file. Give a directory to write the artifact into.")
    there = None if force else recorded_kind(path)
    if there is not None:
        check_kind(path, there, kind)
    if os.path.lexists(path / MANIFEST):
        return  # `create` looks into it
    unfinished = (path / PROGRESS).exists()
    if not unfinished and path.is_dir() and any(not n.startswith(".") for n in os.listdir(path)):
        raise NotAnArtifact(f"{path} holds other files and no artifact. Choose another output directory.")
    if not unfinished and resume == "required" and not force:
        raise NotAnArtifact(f"{path} holds no artifact, so there is nothing to resume. To begin, leave out --resume.")
    if unfinished and resume == "never" and not force:
        raise FormatError(
            f"{path} is unfinished. Leave out --resume to continue it, or use --force to start from the beginning."
        )
    place = path.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
