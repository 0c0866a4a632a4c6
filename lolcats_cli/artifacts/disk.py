"""Checks whether the disk has room for what a stage will write."""

from __future__ import annotations

import shutil
from pathlib import Path

from lolcats_cli.errors import NotEnoughSpace


def check_space(needed: int, output: Path | str, advice: str) -> str:
    """Raises `NotEnoughSpace`, with `advice`, if the disk of `output` has less than `needed` bytes free.

    Returns the needed and the free space as a text for people.
    """
    free = free_space(output)
    if needed > free:
        raise NotEnoughSpace(f"{output} needs {human(needed)}, and its disk has {human(free)} free. {advice}")
    return f"{human(needed)} to {output} ({human(free)} free)"


def free_space(output: Path | str) -> int:
    """Bytes that are free on the disk where `output` is, or will be."""
    place = Path(output).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def human(size: float) -> str:
    """Bytes for people: 512 B, 3.4 MB, 1.2 TB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
