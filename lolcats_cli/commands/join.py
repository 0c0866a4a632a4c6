"""lolcats join"""

from __future__ import annotations

from typing import Annotated

import typer
from lolcats_formats import Artifact

from lolcats_cli.commands import _checks as checks
from lolcats_cli.commands import _options as o
from lolcats_cli.stages.parts import open_parts


def join(
    parts: Annotated[list[str], typer.Argument(help="Captures of --samples A-B, or transfers of --layers A-B.")],
    output: o.Output,
    resume: o.Resume = "auto",
    force: o.Force = False,
) -> Artifact:
    """Join the parts that several machines made into one artifact: captures by rows, transfers by layers."""
    checks.output(output, open_parts(parts)[0].kind, resume, force, parts)

    from lolcats_cli.stages.join import join as run

    return run(parts, output, resume=resume, force=force, progress=o.progress())
