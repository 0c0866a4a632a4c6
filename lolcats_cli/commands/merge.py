"""lolcats merge"""

from __future__ import annotations

from typing import Annotated

import typer
from lolcats_formats import Artifact

from lolcats_cli.commands import _checks as checks
from lolcats_cli.commands import _options as o


def merge(
    source: o.ArtifactIn,
    output: o.Output,
    teacher: o.Teacher = None,
    max_shard_size: Annotated[float, typer.Option(min=0.001, help="Largest weights file, in GB.")] = 5.0,
    resume: o.Resume = "auto",
    force: o.Force = False,
) -> Artifact:
    """Fold a LoRA (or a bare transfer) into the weights: a Hugging Face model folder that loads anywhere."""
    given = o.artifact_path(source)
    checks.artifact(given, ("lora", "transfer"), teacher)
    checks.output(output, "student", resume, force, (given, teacher))

    from lolcats_cli.stages.merge import merge as run

    return run(
        given,
        output,
        teacher=teacher,
        max_shard_bytes=int(max_shard_size * 1e9),
        resume=resume,
        force=force,
        progress=o.progress(),
    )
