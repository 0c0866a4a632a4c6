"""The command line's form of a command's function: it prints what the function returns."""

from __future__ import annotations

import functools
import inspect
import json as json_module
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from lolcats_formats import Artifact

from lolcats_cli import ranks
from lolcats_cli.progress import printable

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def printing(function: Callable[..., Any], show: Callable[[Any, bool], None]) -> Callable[..., None]:
    """The function with an option --json more, which passes its result to `show`, with whether JSON is asked for.

    One of several ranks prints, rank 0.
    """

    def command(*, json: bool, **given: Any) -> None:
        result = function(**given)
        if ranks.rank() == 0:
            show(result, json)

    functools.update_wrapper(command, function)
    asked = inspect.Parameter("json", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=False, annotation=Json)
    own = inspect.signature(function, eval_str=True).parameters.values()
    command.__signature__ = inspect.Signature([*own, asked])  # type: ignore[attr-defined]  # which Typer reads
    return command


def show_artifact(artifact: Artifact, as_json: bool) -> None:
    """The artifact's path alone, or with its id and summary."""
    show_path({"path": str(artifact.path), "id": artifact.id, **artifact.summary}, as_json)


def show_file(path: Path, as_json: bool) -> None:
    """The path of a file."""
    show_path({"path": str(path)}, as_json)


def show_path(found: dict[str, Any], as_json: bool) -> None:
    """The entry `path` alone, or everything."""
    path = found["path"]
    shown = printable(path) if sys.stdout.isatty() else path
    print(json_module.dumps(found) if as_json else shown, flush=True)
