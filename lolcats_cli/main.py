"""The command line: its commands, and the one place where errors become exit codes."""

from __future__ import annotations

import errno
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from lolcats_cli import __version__, stopping
from lolcats_cli.commands.capture import capture
from lolcats_cli.commands.demo import demo
from lolcats_cli.commands.eval import evaluate
from lolcats_cli.commands.generate import generate
from lolcats_cli.commands.inspect import inspect
from lolcats_cli.commands.join import join
from lolcats_cli.commands.lora import lora
from lolcats_cli.commands.merge import merge
from lolcats_cli.commands.published import import_published
from lolcats_cli.commands.transfer import transfer
from lolcats_cli.commands.verify import verify
from lolcats_cli.errors import LolcatsError, Stopped, is_out_of_memory

EXIT_CODES = """Exit codes: 0 done, 1 a bug, 2 wrong usage, 3 bad input, 4 things that do not belong together,
5 not enough disk or memory, 75 stopped by a signal and resumable."""

BROKEN_PIPE = 128 + 13  # as if SIGPIPE had ended us

app = typer.Typer(
    name="lolcats",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=f"Turn a softmax-attention LLM into a linear-attention one: capture, transfer, lora, merge.\n\n{EXIT_CODES}",
)
COMMANDS: dict[str, Callable[..., None]] = {
    "capture": capture,
    "transfer": transfer,
    "lora": lora,
    "merge": merge,
    "join": join,
    "inspect": inspect,
    "verify": verify,
    "eval": evaluate,
    "generate": generate,
    "import": import_published,
    "demo": demo,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lolcats {__version__}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A YAML file of options by command, such as `transfer: {window: 32}`; the command line wins."
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if config is not None:
        ctx.default_map = _read_config(config, {name: c.params for name, c in ctx.command.commands.items()})  # type: ignore[attr-defined]


def _read_config(path: Path, commands: dict[str, list]) -> dict:
    """The file's options by command. Raises a usage error for what is not a command's option."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"--config {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(values, dict) for values in content.values()):
        raise typer.BadParameter(f"--config {path} must hold options by command, such as `transfer: {{window: 32}}`.")
    for command, values in content.items():
        known = {param.name: param for param in commands.get(command, []) if param.param_type_name == "option"}
        unknown = (
            [command] if command not in commands else [f"{command}.{key}" for key in values if _key(key) not in known]
        )
        if unknown:
            raise typer.BadParameter(f"--config {path}: {unknown[0]} is not a command's option.")
        for key, value in values.items():
            if isinstance(value, str) and getattr(known[_key(key)], "multiple", False):
                values[key] = [value]
    return {command: {_key(key): value for key, value in values.items()} for command, values in content.items()}


def _key(name: str) -> str:
    return str(name).replace("-", "_")


def main() -> None:
    """Run the command line and exit with a documented code."""
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # who read us has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE
    sys.exit(code)


def run(args: list[str]) -> int:
    """Run one command; its exit code. With `--debug` errors keep their traceback."""
    debug = "--debug" in args
    if not debug:  # what libraries would say is not for the user
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.filterwarnings("ignore", module=r"(transformers|peft|torch|accelerate|datasets)\b")
    try:
        with stopping.handled():
            app(args, prog_name="lolcats")
    except SystemExit as end:  # how Typer ends: 0, or 2 for wrong usage
        if isinstance(end.__context__, BrokenPipeError):
            return BROKEN_PIPE
        return end.code if isinstance(end.code, int) else 0
    except Stopped as stop:
        print(f"Stopped by {stop}. The same command resumes: {shlex.join(['lolcats', *args])}", file=sys.stderr)
        return Stopped.exit_code
    except Exception as error:
        if debug:
            raise
        code = exit_code(error)
        hint = " This is a bug in lolcats: --debug before the command shows where." if code == 1 else ""
        print(f"Error: {_message(error)}{hint}", file=sys.stderr)
        return code
    return 0


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        advice = " Free some, and run the same command again to resume." if exit_code(error) == 5 else ""
        return f"{where}{error.strerror}.{advice}"
    return str(error) or type(error).__name__


def exit_code(error: Exception) -> int:
    """The documented exit code of an error."""
    from lolcats_formats import ConfigMismatch, FormatError

    if isinstance(error, LolcatsError):
        return error.exit_code
    if isinstance(error, ConfigMismatch):
        return 4
    if isinstance(error, FormatError):
        return 3
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return 5
    if is_out_of_memory(error):
        return 5
    if isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError) or (
        isinstance(error, OSError) and error.errno == errno.EROFS
    ):
        return 3
    return 1


if __name__ == "__main__":
    main()
