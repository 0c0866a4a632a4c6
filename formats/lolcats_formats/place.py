"""Whether an artifact can be written into a directory, as far as can be told before any work."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Literal

from .errors import FormatError, NotAnArtifact
from .limits import MANIFEST, PROGRESS

Resume = Literal["auto", "required", "never"]


def check_place(path: Path, resume: Resume, force: bool) -> None:
    """Raises, before any work, what `ArtifactWriter.create` would raise of this directory whatever the settings.

    Raises NotAnArtifact, FormatError, or PermissionError where nothing can be written.
    """
    if path.exists() and not path.is_dir():
        raise NotAnArtifact(f"{path} is a file; give a directory to write the artifact into")
    if os.path.lexists(path / MANIFEST):
        return  # finished, or of something else: `create` looks into it
    unfinished = (path / PROGRESS).exists()
    if not unfinished and path.is_dir() and any(not n.startswith(".") for n in os.listdir(path)):
        raise NotAnArtifact(f"{path} holds other files and no artifact; choose another output directory")
    if not unfinished and resume == "required" and not force:
        raise NotAnArtifact(f"{path} holds no artifact, so there is nothing to resume; leave --resume away to begin")
    if unfinished and resume == "never" and not force:
        raise FormatError(f"{path} is unfinished; leave --resume away to continue it, or begin anew with --force")
    place = path.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
