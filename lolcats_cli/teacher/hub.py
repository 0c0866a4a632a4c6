"""Fetches files from the Hugging Face hub. Its errors are for people."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lolcats_cli.errors import BadInput


def fetch(teacher: str, get: Callable[[], str]) -> Path:
    """The path at which `get` has put the files of a hub model. Raises `BadInput` if they cannot be fetched."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(get())
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(
            f"The teacher {teacher} is not a local folder, and it could not be fetched from the hub "
            f"({type(error).__name__}). Check the name, --revision, your access, and the network."
        ) from error
