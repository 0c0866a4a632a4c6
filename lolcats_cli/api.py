"""The commands from Python: the functions of the command line, with its checks of what they are given."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import typer

from lolcats_cli import main
from lolcats_cli.commands.capture import capture
from lolcats_cli.commands.eval import evaluate
from lolcats_cli.commands.import_published import import_published
from lolcats_cli.commands.inspect import inspect as inspect_artifact
from lolcats_cli.commands.join import join
from lolcats_cli.commands.lora import lora
from lolcats_cli.commands.merge import merge
from lolcats_cli.commands.plan import plan
from lolcats_cli.commands.rank import rank
from lolcats_cli.commands.report import report
from lolcats_cli.commands.transfer import transfer
from lolcats_cli.commands.verify import verify
from lolcats_cli.errors import UsageError


def _command(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which first has the command line read its arguments. Raises UsageError for those it refuses."""
    signature = inspect.signature(function, eval_str=True)

    @functools.wraps(function)
    def call(*args: Any, **given: Any) -> Any:
        values = signature.bind(*args, **given).arguments
        for key, value in values.items():
            kind = (*get_args(signature.parameters[key].annotation), None)[0]
            if Path in (kind, *get_args(kind)) and isinstance(value, str):
                values[key] = Path(value)
            elif isinstance(value, str | os.PathLike) and list[str] in (kind, *get_args(kind)):
                values[key] = [str(value)]
        _check(name, values)
        return function(**values)

    return call


def _check(name: str, values: dict[str, Any]) -> None:
    """Raise UsageError for arguments that the command line refuses."""
    command = typer.main.get_command(main.app).commands[name]  # type: ignore[attr-defined]
    options, arguments = [], []
    for param in command.params:
        value = values.get(param.name)
        for part in value if isinstance(value, list) else [value]:
            if param.param_type_name == "argument":
                arguments.append(str(part))
            elif isinstance(part, bool):
                options += (param.opts if part else param.secondary_opts)[:1]
            elif part is not None:
                options.append(f"{param.opts[0]}={part}")
    try:
        command.check_numbers(command.make_context(name, [*options, "--", *arguments]))
    except Exception as error:
        if not hasattr(error, "format_message"):  # of click, of which Typer may have its own
            raise
        raise UsageError(error.format_message()) from error


FUNCTIONS = {
    "plan": _command("plan", plan),
    "capture": _command("capture", capture),
    "transfer": _command("transfer", transfer),
    "lora": _command("lora", lora),
    "merge": _command("merge", merge),
    "join": _command("join", join),
    "inspect": _command("inspect", inspect_artifact),
    "rank": _command("rank", rank),
    "report": _command("report", report),
    "verify": _command("verify", verify),
    "eval": _command("eval", evaluate),
    "import_published": _command("import", import_published),
}
