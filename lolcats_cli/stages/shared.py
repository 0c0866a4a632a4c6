"""One artifact that several ranks write: rank 0 has its writer, each other rank a part that rank 0 takes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lolcats_formats import ArtifactWriter
from lolcats_formats.limits import PART_PREFIX

from lolcats_cli import ranks


@contextmanager
def part_writer(
    main: ArtifactWriter | None, kind: str, fields: dict[str, Any]
) -> Iterator[tuple[ArtifactWriter, Path]]:
    """This rank's writer, and the directory of the whole artifact, whose writer `main` rank 0 passes.

    When every rank has left the block, the files of all are in the artifact.
    """
    whole = Path(ranks.share(lambda: str(_main(main).path)))
    if ranks.rank() == 0:
        yield _main(main), whole
    else:
        with ArtifactWriter.create(whole / f"{PART_PREFIX}{ranks.rank()}", kind, **fields) as part:
            yield part, whole
    ranks.barrier()
    completed_files(main)


def completed_files(main: ArtifactWriter | None) -> set[str]:
    """The names of the artifact's files that are complete, on every rank. Rank 0, which passes the artifact's writer,
    takes in all parts first, also those of an earlier run."""
    return ranks.share(lambda: _absorb_parts(_main(main)))


def _absorb_parts(main: ArtifactWriter) -> set[str]:
    for part in main.parts():
        main.absorb(part)
    return set(main.files)


def _main(writer: ArtifactWriter | None) -> ArtifactWriter:
    assert writer is not None, "rank 0 has the artifact's writer"
    return writer
