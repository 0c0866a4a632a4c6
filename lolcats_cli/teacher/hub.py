"""Fetching from the Hugging Face hub, with errors for people."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lolcats_cli.errors import BadInput


def fetch(teacher: str, get: Callable[[], str]) -> Path:
    """Where `get` has put what it fetched of a teacher that is no local folder.

    Raises `BadInput` if `teacher` cannot be a hub id, or cannot be fetched.
    """
    if teacher.startswith((".", "/", "~")) or teacher.count("/") > 1 or Path(teacher).exists():
        raise BadInput(f"The teacher {teacher} is not a folder. Pass a model folder, or a hub id such as org/name.")
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(get())
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(
            f"The teacher {teacher} is neither a local folder nor could it be fetched from the hub "
            f"({type(error).__name__}). Check the name, --revision, your access, and the network."
        ) from error
