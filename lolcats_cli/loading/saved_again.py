"""Recognises students that were saved again. Imports neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path

from lolcats_formats import holds_artifact

from lolcats_cli.student.types import is_student
from lolcats_cli.teacher import identity


def is_saved_again(folder: Path | str) -> bool:
    """Whether a folder holds a student that was saved by `save_pretrained`: it is no artifact, but its configuration is
    a student's."""
    folder = Path(folder)
    return (
        not holds_artifact(folder) and (folder / "config.json").is_file() and is_student(identity.read_config(folder))
    )
