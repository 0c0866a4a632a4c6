"""Options that may stand in front of the command and behind it: --config, --quiet, --verbose, --debug."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lolcats_cli import progress


def with_common_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options that all commands share. They act when they are read, and do not reach it."""
    own = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(**values: Any) -> None:
        command(**{name: value for name, value in values.items() if name in own.parameters})

    common = inspect.signature(common_options, eval_str=True).parameters.values()
    signature = own.replace(parameters=[*own.parameters.values(), *common])
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    del run.__wrapped__  # whose annotations would count
    return run


def _use_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Makes the options of the file the defaults: of all commands, or of the one that --config stands behind."""
    if path is not None:
        commands = ctx.find_root().command.commands  # type: ignore[attr-defined]
        found = _read_config(path, {name: command.params for name, command in commands.items()})
        here = found if ctx.parent is None else found.get(str(ctx.info_name), {})
        ctx.default_map = {**(ctx.default_map or {}), **here}
    return path


def _speak(level: str) -> Callable[[bool], bool]:
    def callback(wanted: bool) -> bool:
        if wanted:
            progress.set_level(level)
        return wanted

    return callback


def common_options(
    config: Annotated[
        Path | None,
        typer.Option(
            callback=_use_config,
            is_eager=True,
            help="A YAML file of options by command, such as `transfer: {window: 32}`. The command line wins.",
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", callback=_speak("quiet"), help="Print errors only, no progress.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            callback=_speak("verbose"),
            help="Print progress every second, and the libraries' messages.",
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """The options that all commands share. `main` looks for --debug itself."""


def _read_config(path: Path, commands: dict[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """The file's options by command. Raises a usage error for an unknown option."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise typer.BadParameter(f"{path} cannot be read: {why}") from error
    if not isinstance(content, dict) or not all(isinstance(values, dict) for values in content.values()):
        raise typer.BadParameter(f"{path} must hold options by command, such as `transfer: {{window: 32}}`.")
    common = inspect.signature(common_options).parameters
    for command, values in content.items():
        known = {param.name: param for param in commands.get(command, []) if param.param_type_name == "option"}
        known = {name: param for name, param in known.items() if name not in common}
        unknown = (
            [command] if command not in commands else [f"{command}.{key}" for key in values if _key(key) not in known]
        )
        if unknown:
            raise typer.BadParameter(f"{path}: {unknown[0]} is not a command's option.")
        for key, value in values.items():
            if isinstance(value, str) and getattr(known[_key(key)], "multiple", False):
                values[key] = [value]
    return {command: {_key(key): value for key, value in values.items()} for command, values in content.items()}


def _key(name: str) -> str:
    return str(name).replace("-", "_")
