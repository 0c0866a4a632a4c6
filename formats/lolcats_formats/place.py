"""Checks before any work whether an artifact can be written into a directory."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from .artifact import read_small, recorded_kind
from .canonical import canonical, differences, parse, plain
from .errors import ConfigMismatch, FormatError, NotAnArtifact
from .limits import MANIFEST, PROGRESS, REPLACEMENT_SUFFIX

Resume = Literal["auto", "required", "never"]
Say = Callable[[Mapping[str, tuple[Any, Any]]], str]  # puts what `differences` finds into words


def by_field(found: Mapping[str, tuple[Any, Any]]) -> str:
    """Differences by the names of their fields."""
    shown = "; ".join(f"{n} is {_short(a)} there and {_short(b)} here" for n, (a, b) in list(found.items())[:5])
    return shown + (f"; and {len(found) - 5} more" if len(found) > 5 else "")


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
    if path.is_symlink() and not path.exists():
        raise NotAnArtifact(
            f"{path} is a link to a directory that does not exist. Make that one, or choose another output directory."
        )
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


def begun_config(path: str | os.PathLike[str], force: bool = False) -> dict[str, Any] | None:
    """The configuration of the artifact that `ArtifactWriter.create` would find finished or continue in `path`.

    With `force` that is the unfinished artifact which is to replace another. None if there is no artifact that can be
    read.
    """
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.name}{REPLACEMENT_SUFFIX}")
    for file in (beside / PROGRESS, target / PROGRESS) if force else (target / MANIFEST, target / PROGRESS):
        with contextlib.suppress(OSError, FormatError):
            config = parse(read_small(file), str(file)).get("config")
            if isinstance(config, dict):
                return config
    return None


def check_config(
    path: str | os.PathLike[str],
    kind: str,
    config: Mapping[str, Any],
    *,
    force: bool = False,
    unknown: Collection[str] = (),
    say: Say = by_field,
) -> bool:
    """Whether `ArtifactWriter.create` would find a finished artifact in `path`.

    unknown: the entries of the configuration, such as "lr" and "hybrid.window", that are not known yet. They are not
        compared.
    say: as for `create`.
    Raises ConfigMismatch, as `create` would, for an artifact with another configuration. So this is told before there
    is all that `create` needs.
    """
    begun, finished = None if force else begun_config(path), os.path.lexists(Path(path) / MANIFEST)
    if begun is not None:
        check_kind(Path(path), str(recorded_kind(Path(path))), kind)
        state = "a finished" if finished else "an unfinished"
        there, here = {"config": begun}, {"config": plain(config, "config")}
        check_same(Path(path), state, kind, there, here, say, [f"config.{entry}" for entry in unknown])
    return begun is not None and finished


def check_same(
    path: Path,
    state: str,
    kind: str,
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    say: Say,
    unknown: Collection[str] = (),
) -> None:
    """Raises ConfigMismatch if the settings of the artifact in `path` are not those that it is to be made with.

    state: "a finished" or "an unfinished". unknown: the fields that are not compared, with all that is in them.
    """
    found = differences(there, here)
    fields = {name: x for name, x in found.items() if not any(f"{name}.".startswith(f"{u}.") for u in unknown)}
    if fields:
        raise ConfigMismatch(
            f"{path} holds {state} {kind} artifact with other settings: {say(fields)}. "
            f"Choose another output directory, give the settings it was made with, or replace it with --force.",
            list(fields),
        )


def _short(value: Any) -> str:
    text = canonical(value).decode()
    return text if len(text) <= 60 else text[:57] + "..."
