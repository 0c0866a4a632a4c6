"""Limits as numbers, reserved names, and the rule of file names (SPEC.md, "Limits" and "File names")."""

from __future__ import annotations

import re

from .errors import Damaged

FORMAT = "lolcats-artifact"
VERSION = "1.2"
SUPPORTED_MAJOR = 1
KINDS = ("capture", "transfer", "lora", "student")
# The command that makes an artifact of each kind, for messages.
COMMANDS = {
    "capture": "lolcats capture",
    "transfer": "lolcats transfer",
    "lora": "lolcats lora",
    "student": "lolcats merge",
}

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
METRICS = "metrics.jsonl"
GOLDEN = "golden.safetensors"  # of a student
README = "README.md"
SCRATCH = "scratch"
LOCK = ".lock"
TEMPORARY_SUFFIX = ".lolcats-tmp"
PART_PREFIX = ".part-"  # of the directory of a part that another process writes
REPLACEMENT_SUFFIX = ".lolcats-new"

MAX_JSON_BYTES = 32 * 2**20  # manifest.json, progress.json
MAX_JSON_DEPTH = 32  # nested lists and objects
MAX_INTEGER = 2**53 - 1  # what every JSON reader keeps exactly
MAX_FILES = 65_536
MAX_NAME = 240  # characters of a file's name with its folders
MAX_NAME_PARTS = 8
MAX_HEADER_BYTES = 16 * 2**20  # the JSON header of a safetensors file
MAX_METRICS_LINE = 2**20
MAX_RANK = 16  # dimensions of a tensor

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*")
_RESERVED = {MANIFEST, PROGRESS, "path"}


def check_name(name: str) -> str:
    """The name itself if a manifest may list it; raises Damaged otherwise."""
    parts = name.split("/")
    if len(name) > MAX_NAME or len(parts) > MAX_NAME_PARTS or not _NAME.fullmatch(name):
        raise Damaged(
            f"{name[:MAX_NAME]!r} cannot be the name of an artifact's file. Such a name is relative and has at most "
            f"{MAX_NAME_PARTS} parts and {MAX_NAME} characters. The characters are letters, digits and '_.+-', and no "
            "part starts with one of '.+-'."
        )
    if name in _RESERVED or is_ignored(name):
        raise Damaged(f"{name!r} is a reserved name. It cannot be listed as an artifact's file.")
    return name


def is_ignored(name: str) -> bool:
    """True for what may lie in an artifact's directory without belonging to it.

    These are names with a part that starts with a dot (`.git/`, `.gitattributes`, `.cache/`, our own lock), the model
    card README.md at the top, and the progress.json and the scratch folder that a writer left when it was killed after
    it had written its manifest. None of these files is ever read.
    """
    parts = name.split("/")
    return name in (README, PROGRESS) or parts[0] == SCRATCH or any(part.startswith(".") for part in parts)
