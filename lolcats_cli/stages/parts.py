"""The parts that `join` puts together, as far as their manifests tell whether they belong together. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lolcats_formats import Artifact, differences

from lolcats_cli.errors import IdentityMismatch, UsageError
from lolcats_cli.stages.differing import in_words

# The fields that parts must have in common, the entries that their config must have, and the entry that differs.
COMMON = {"capture": ("teacher", "config"), "transfer": ("teacher", "data", "parents", "config")}
NEEDED = {"capture": ("samples", "dtype", "val_fraction", "seed"), "transfer": ("layers",)}
PART = {"capture": "samples", "transfer": "layers"}


def open_parts(parts: Sequence[Path | str]) -> list[Artifact]:
    """The parts, which are of one kind and made in the same way.

    Raises:
        UsageError: there are fewer than two parts, or parts of different kinds.
        IdentityMismatch: the parts do not belong together.
        FormatError: a part is not a finished artifact or is damaged.
    """
    opened = [Artifact.open(part, tuple(PART)) for part in parts]
    kind = opened[0].kind if opened else ""
    if len(opened) < 2 or any(part.kind != kind for part in opened):
        raise UsageError("`lolcats join` takes two or more parts of one kind: captures, or transfers.")
    for other in opened[1:]:
        if different := differences(_identity(opened[0]), _identity(other)):
            names = ", ".join(dict.fromkeys(in_words(kind, field) for field in different))
            raise IdentityMismatch(
                f"{other.path} does not belong to {opened[0].path}: They differ in {names}. Make them with the same "
                "settings."
            )
    if "select" in opened[0].config:
        raise IdentityMismatch(
            f"The rows of {opened[0].path} were selected from its own part of the data, so they may not be the best of "
            "all rows. Capture without --select, or capture all the data on one machine."
        )
    lacking = [f"config.{key}" for key in NEEDED[kind] if key not in opened[0].config]
    if lacking:
        names = ", ".join(in_words(kind, field) for field in lacking)
        raise IdentityMismatch(f"{opened[0].path} does not state its {names}. Make the parts again.")
    return opened


def _identity(part: Artifact) -> dict[str, Any]:
    found = {field: part.manifest[field] for field in COMMON[part.kind]}
    return {**found, "config": {key: value for key, value in part.config.items() if key != PART[part.kind]}}
