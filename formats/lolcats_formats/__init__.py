"""The artifact directories that the stages of lolcats hand each other, as defined in formats/SPEC.md.

Needs the standard library, safetensors and jsonschema; torch only where tensors are read or written.
"""

from .artifact import Artifact
from .canonical import artifact_id, canonical, differences
from .errors import (
    ConfigMismatch,
    Damaged,
    FormatError,
    Locked,
    NotAnArtifact,
    Unfinished,
    UnsupportedVersion,
    WrongKind,
)
from .limits import GOLDEN, KINDS, VERSION
from .place import begun_config, check_config, check_place, holds_artifact
from .tensors import TensorInfo
from .writer import ArtifactWriter

__all__ = [
    "GOLDEN",
    "KINDS",
    "VERSION",
    "Artifact",
    "ArtifactWriter",
    "ConfigMismatch",
    "Damaged",
    "FormatError",
    "Locked",
    "NotAnArtifact",
    "TensorInfo",
    "Unfinished",
    "UnsupportedVersion",
    "WrongKind",
    "artifact_id",
    "begun_config",
    "canonical",
    "check_config",
    "check_place",
    "differences",
    "holds_artifact",
]
