"""The JSON Schemas of manifest.json and progress.json, shipped with the package and used by the reader."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

from .errors import Damaged, NotAnArtifact, UnsupportedVersion
from .limits import FORMAT, KINDS, SUPPORTED_MAJOR, VERSION

_BASE = "urn:lolcats:artifact:1:"


def check_version(document: dict[str, Any], where: str) -> None:
    """Raises NotAnArtifact for another format's document, UnsupportedVersion for an unknown major version."""
    if document.get("format") != FORMAT:
        raise NotAnArtifact(f'{where} does not belong to a lolcats artifact: its "format" is not "{FORMAT}".')
    version = document.get("version")
    major, dot, minor = version.partition(".") if isinstance(version, str) else ("", "", "")
    if not (dot and all(x.isascii() and x.isdigit() and len(x) <= 6 for x in (major, minor))):
        raise Damaged(f'{where}: The "version" is not of the form MAJOR.MINOR.')
    if int(major) != SUPPORTED_MAJOR:
        raise UnsupportedVersion(
            f"{where} has the format version {version}. This program reads {SUPPORTED_MAJOR}.x and writes {VERSION}. "
            "Install a newer lolcats to read it."
        )


def check(document: dict[str, Any], name: str, where: str) -> None:
    """Validates against the schema `name`: a kind, or "progress". Raises Damaged with the place and the reason."""
    from jsonschema.exceptions import best_match

    error = best_match(_validator(name).iter_errors(document))
    if error is None:
        return
    place = ".".join(str(part) for part in error.absolute_path)[:200] or "the top level"
    said = error.message
    if error.validator == "pattern" and "description" in error.schema:
        said = f"{error.instance!r} {error.schema['description']}"
    raise Damaged(f"{where}: {place}: {said[:300].rstrip('.')}.")


@functools.cache
def _validator(name: str) -> Any:
    from jsonschema import Draft202012Validator
    from referencing import Registry, Resource

    folder = resources.files(__package__) / "schema"
    documents = {
        key: json.loads((folder / f"{key}.schema.json").read_text("utf-8")) for key in ("manifest", "progress", *KINDS)
    }
    registry: Any = Registry().with_resources((_BASE + k, Resource.from_contents(v)) for k, v in documents.items())
    return Draft202012Validator(documents[name], registry=registry)
