"""lolcats generate"""

from __future__ import annotations

import sys
from collections.abc import Iterator
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
    prompt: Annotated[
        str | None, typer.Option(help="The text to continue. Without it, or with -, it is read from stdin.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Talk: every line of stdin is a turn, put into the tokenizer's chat template with those before.",
        ),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token every time.")] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Draw among the likeliest tokens that together have this probability; 1 means all. By default the "
            "model's generation_config.json decides.",
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Draw among this many of the likeliest tokens; 0 means all.")
    ] = None,
    teacher: o.Teacher = None,
    trust_remote_code: o.TrustRemoteCode = False,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    seed: o.Seed = 0,
) -> None:
    """Continue a prompt, or hold a conversation. The text streams to stdout."""
    if 0 < temperature < 1e-3:
        raise UsageError(f"--temperature {temperature} is too close to 0. Give 0, or at least 0.001.")
    if not temperature and (top_p, top_k) != (None, None):
        raise UsageError(
            "--top-p and --top-k need a --temperature above 0. With 0, the likeliest token is always taken."
        )
    if top_p == 0:
        raise UsageError("--top-p 0 leaves no token to draw. Give a probability above 0.")
    if model == "-" and prompt in (None, "-"):
        raise UsageError("The model's path and the prompt cannot both come from stdin. Give --prompt.")
    given = o.artifact_path(model)
    checks.model(given, teacher)
    text = None if chat and prompt is None else _prompt(prompt)

    from lolcats_cli.evaluation.generate import Sampling
    from lolcats_cli.evaluation.generate import generate as run
    from lolcats_cli.loading.any_model import load_any
    from lolcats_cli.teacher.load import LoadOptions

    def write(piece: str) -> None:
        sys.stdout.write(printable(piece, keep="\n\t") if sys.stdout.isatty() else piece)
        sys.stdout.flush()

    sampling = Sampling(temperature, top_p, top_k, seed)
    o.progress().note(f"loading {given}")
    loaded = load_any(given, LoadOptions(dtype, device, trust_remote_code), teacher=teacher)
    turns: list[dict[str, str]] = []
    for said in _turns() if text is None else [text]:
        turns.append({"role": "user", "content": said})
        answer = run(loaded, turns if chat else said, max_new_tokens=max_new_tokens, sampling=sampling, write=write)
        turns.append({"role": "assistant", "content": answer})
        write("\n")


def _prompt(given: str | None) -> str:
    """The prompt, from stdin unless it is given. A last line end is not part of it."""
    if given not in (None, "-"):
        return str(given)
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("There is no text to continue. Give it with --prompt, or on stdin.")
    text = sys.stdin.buffer.read().decode("utf-8", errors="replace")
    return text.removesuffix("\n")


def _turns() -> Iterator[str]:
    """The lines of stdin that are not blank. On a terminal, each line is asked for."""
    while True:
        if sys.stdin is not None and sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline() if sys.stdin is not None else ""
        if not line:
            return
        if line.strip():
            yield line.strip()
