"""The command line: its commands, and the one place where errors become exit codes."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated

import typer

from lolcats_cli import __version__, launch, ranks, stopping
from lolcats_cli.commands._everywhere import with_common_options
from lolcats_cli.commands._help import Command, Group
from lolcats_cli.commands._printing import printing, show_artifact, show_file, show_path
from lolcats_cli.commands.capture import capture
from lolcats_cli.commands.demo import demo
from lolcats_cli.commands.eval import evaluate
from lolcats_cli.commands.eval import show as show_evaluated
from lolcats_cli.commands.generate import generate
from lolcats_cli.commands.import_published import import_published
from lolcats_cli.commands.inspect import inspect
from lolcats_cli.commands.inspect import show as show_inspected
from lolcats_cli.commands.join import join
from lolcats_cli.commands.lora import lora
from lolcats_cli.commands.merge import merge
from lolcats_cli.commands.plan import plan
from lolcats_cli.commands.plan import show as show_plan
from lolcats_cli.commands.rank import rank
from lolcats_cli.commands.rank import show as show_ranked
from lolcats_cli.commands.report import report
from lolcats_cli.commands.transfer import transfer
from lolcats_cli.commands.verify import verify
from lolcats_cli.errors import LolcatsError, NotEnoughSpace, Stopped, shortage
from lolcats_cli.progress import printable, set_level

EXIT_CODES = """Exit codes: 0 done, 1 a bug, 2 wrong usage, 3 bad input, 4 things that do not belong together,
5 not enough disk or memory, 75 stopped by a signal and resumable. docs/glossary.md explains the words."""

BROKEN_PIPE = 128 + 13  # as if SIGPIPE had ended us

app = typer.Typer(
    name="lolcats",
    no_args_is_help=True,
    cls=Group,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=f"Turn a softmax-attention LLM into a linear-attention one: capture, transfer, lora, merge.\n\n{EXIT_CODES}",
)
COMMANDS: dict[str, Callable[..., None]] = {
    "plan": printing(plan, show_plan),
    "capture": printing(capture, show_artifact),
    "transfer": printing(transfer, show_artifact),
    "lora": printing(lora, show_artifact),
    "merge": printing(merge, show_artifact),
    "join": printing(join, show_artifact),
    "rank": printing(rank, show_ranked),
    "inspect": printing(inspect, show_inspected),
    "verify": printing(verify, show_path),
    "report": printing(report, show_file),
    "eval": printing(evaluate, show_evaluated),
    "generate": generate,
    "import": printing(import_published, show_artifact),
    "demo": demo,
}


for name, command in COMMANDS.items():
    app.command(name, cls=Command)(with_common_options(command))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lolcats {__version__}")
        raise typer.Exit


@app.callback()
@with_common_options
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line and exit with a documented code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a path's bytes, whatever they are
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # who read us has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE
    if code == Stopped.exit_code:
        os._exit(code)  # at once: libraries that were stopped half-way may not come to an end
    sys.exit(code)


def run(args: list[str]) -> int:
    """Run one command; its exit code. With `--debug` errors keep their traceback."""
    launch.command_line = args
    debug = "--debug" in args
    set_level("normal")
    if not {"--debug", "--verbose", "-v"}.intersection(args):  # what libraries would say is not for the user
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.filterwarnings("ignore", module=r"(transformers|peft|torch|accelerate|datasets)\b")
    try:
        with stopping.handled():
            app(args, prog_name="lolcats")
    except SystemExit as end:  # how Typer ends: 0, or 2 for wrong usage
        if isinstance(end.__context__, BrokenPipeError):
            return BROKEN_PIPE
        ranks.leave()
        return end.code if isinstance(end.code, int) else 0
    except Stopped as stop:
        return _fail(Stopped.exit_code, stopping.farewell(str(stop), args))
    except Exception as error:
        if debug:
            raise
        code = exit_code(error)
        hint = " This is a bug in lolcats: --debug shows where." if code == 1 else ""
        return _fail(code, f"Error: {_message(error)}{hint}")
    finally:
        launch.command_line = None
    return 0


def _fail(code: int, message: str) -> int:
    """Say why on stderr, and return the code; of several ranks the one that failed first speaks, and sets the code."""
    first = ranks.first_failure(code)
    if first is None:
        print(printable(f"{f'Rank {ranks.rank()}: ' if ranks.rank() else ''}{message}"), file=sys.stderr)
    return code if first is None else first


def _message(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        text += "."
    advice = None if isinstance(error, NotEnoughSpace) else shortage(error)
    return text if advice is None else f"{text.rstrip('. ')}. {advice}, and run the same command again to resume."


def exit_code(error: Exception) -> int:
    """The documented exit code of an error."""
    from lolcats_formats import ConfigMismatch, FormatError

    if shortage(error) is not None:
        return NotEnoughSpace.exit_code
    if isinstance(error, LolcatsError):
        return error.exit_code
    if isinstance(error, ConfigMismatch):
        return 4
    if isinstance(error, FormatError):
        return 3
    # What the system says of a path: no permission, a folder for a file, a loop of links, a name too long …
    return 3 if isinstance(error, OSError) and error.errno is not None else 1
