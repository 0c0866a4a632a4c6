"""The artifact that a stage makes. Every stage creates or continues it here, does its work unless that is already done,
and finishes it.

If several ranks run a stage, rank 0 has the artifact's writer. Every other rank writes a part, which rank 0 takes over.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lolcats_formats as formats
from lolcats_formats import Artifact, ArtifactWriter
from lolcats_formats.limits import PART_PREFIX
from lolcats_formats.place import Resume

from lolcats_cli import __version__, ranks
from lolcats_cli.progress import Progress
from lolcats_cli.stages.differing import say


@dataclass(frozen=True)
class Making:
    """An unfinished artifact, for one of the ranks that make it.

    Attributes:
        kind, fields: the arguments of `make_artifact`.
        main: the artifact's writer on rank 0, None on the others.
    """

    kind: str
    fields: dict[str, Any]
    main: ArtifactWriter | None

    @property
    def writer(self) -> ArtifactWriter:
        """The artifact's writer, on rank 0."""
        assert self.main is not None, "rank 0 has the artifact's writer"
        return self.main

    @contextmanager
    def part(self) -> Iterator[tuple[ArtifactWriter, Path]]:
        """This rank's writer, and the directory of the whole artifact.

        When every rank has left the block, the files of all are in the artifact.
        """
        whole = Path(ranks.share(lambda: str(self.writer.path)))
        if self.main is not None:
            yield self.main, whole
        else:
            part = whole / f"{PART_PREFIX}{ranks.rank()}"
            with ArtifactWriter.create(part, self.kind, **self.fields, tool=tool()) as writer:
                yield writer, whole
        ranks.barrier()
        self.completed_files()

    def completed_files(self) -> set[str]:
        """The names of the artifact's files that are complete, on every rank. Rank 0 takes in all parts first, also
        those of an earlier run."""
        return ranks.share(self._absorb_parts)

    def _absorb_parts(self) -> set[str]:
        for part in self.writer.parts():
            self.writer.absorb(part)
        return set(self.writer.files)


def check_config(
    output: Path | str, kind: str, config: Mapping[str, Any], *, force: bool, unknown: Collection[str] = ()
) -> bool:
    """Whether `make_artifact` would find a finished artifact in `output`. Raises ConfigMismatch for an artifact with
    another configuration, before there is all that `make_artifact` needs.

    unknown: the entries of `config`, such as "lr" and "hybrid.window", that are not known yet. They are not compared.
    """
    return ranks.share(
        lambda: formats.check_config(output, kind, config, force=force, unknown=unknown, say=partial(say, kind))
    )


def make_artifact(
    output: Path | str,
    kind: str,
    fields: dict[str, Any],
    work: Callable[[Making], Mapping[str, Any]],
    *,
    resume: Resume,
    force: bool,
    progress: Progress,
) -> Artifact:
    """The finished artifact in `output`. `work` writes its files and returns its summary; it is not called if the
    artifact is finished already.

    fields: the artifact's `config`, `teacher`, `data`, and `parents` if it has any, which its id is made of.
    resume, force: what to do with an artifact that `output` holds. These and the errors are of `ArtifactWriter.create`.
    """
    with ExitStack() as stack:
        main = None
        if ranks.rank() == 0:
            how: dict[str, Any] = {"tool": tool(), "resume": resume, "force": force, "say": partial(say, kind)}
            main = stack.enter_context(ArtifactWriter.create(output, kind, **fields, **how))
        making = Making(kind, fields, main)
        if ranks.share(lambda: making.writer.finished is not None):
            progress.note(f"{output} is finished already")
        else:
            summary = work(making)
            if main is not None:
                main.finish(summary)
    ranks.barrier()
    return Artifact.open(output)


def tool() -> str:
    """This program and its version, as artifacts record them."""
    return f"lolcats {__version__}"
