"""What can be wrong with an artifact.

Every message is for people. It consists of whole sentences: what is wrong, where, and what to do next.
"""

from __future__ import annotations

from collections.abc import Sequence


class FormatError(ValueError):
    """The base of all errors of this package. Errors of the system (disk full, no permission) stay OSError."""


class NotAnArtifact(FormatError):
    """The path does not hold an artifact."""


class Unfinished(NotAnArtifact):
    """The directory holds an artifact that is still being written, or whose writer was interrupted."""


class WrongKind(FormatError):
    """The artifact is not of the kind that was asked for."""


class UnsupportedVersion(FormatError):
    """The artifact has a format version that this reader does not know."""


class Damaged(FormatError):
    """The artifact's bytes are not what its manifest says, or the manifest breaks the rules of SPEC.md."""


class Locked(FormatError):
    """Another process is writing into the directory."""


class ConfigMismatch(FormatError):
    """Two things that must agree do not; `fields` names what differs, such as `config.hybrid.window`."""

    def __init__(self, message: str, fields: Sequence[str]) -> None:
        super().__init__(message)
        self.fields = list(fields)
