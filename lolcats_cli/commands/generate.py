"""lolcats generate"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lolcats_cli.commands import _checks as checks
from lolcats_cli.commands import _options as o
from lolcats_cli.errors import UsageError
from lolcats_cli.progress import printable


def generate(
    model: Annotated[
        str,
        typer.Argument(
            help="A teacher, a transfer or LoRA artifact, a merged folder, or - to read its path from stdin."
        ),
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token every time.")] = 0.0,
    teacher: o.Teacher = None,
    trust_remote_code: o.TrustRemoteCode = False,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    seed: o.Seed = 0,
) -> None:
    """Continue a prompt; the text streams to stdout."""
    if 0 < temperature < 1e-3:
        raise UsageError(f"--temperature {temperature} divides by next to nothing; give 0, or at least 0.001.")
    given = o.artifact_path(model)
    checks.model(given, teacher)

    from lolcats_cli.evaluation.generate import generate as run
    from lolcats_cli.loading.any_model import load_any
    from lolcats_cli.teacher.load import LoadOptions

    def write(text: str) -> None:
        sys.stdout.write(printable(text, keep="\n\t") if sys.stdout.isatty() else text)
        sys.stdout.flush()

    loaded = load_any(given, LoadOptions(dtype, device, trust_remote_code), teacher=teacher)
    run(loaded, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, write=write)
    write("\n")
