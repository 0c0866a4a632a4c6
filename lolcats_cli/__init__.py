"""lolcats: turn a softmax-attention LLM into a linear-attention one.

From Python, the commands have the names and the options of the command line:

    import lolcats_cli as lolcats

    lolcats.capture("teacher", "data.jsonl", "cap", seq_len=512)
    lolcats.transfer("cap", "maps", window=32)

They return what they made (`lolcats_formats.Artifact`) or found, and raise the errors of `lolcats_cli.errors`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lolcats_cli.commands.capture import capture
    from lolcats_cli.commands.eval import evaluate as eval
    from lolcats_cli.commands.import_published import import_published
    from lolcats_cli.commands.inspect import inspect
    from lolcats_cli.commands.join import join
    from lolcats_cli.commands.lora import lora
    from lolcats_cli.commands.merge import merge
    from lolcats_cli.commands.plan import plan
    from lolcats_cli.commands.rank import rank
    from lolcats_cli.commands.report import report
    from lolcats_cli.commands.transfer import transfer
    from lolcats_cli.commands.verify import verify

__version__ = "0.1.0"
__all__ = [
    "capture",
    "eval",
    "import_published",
    "inspect",
    "join",
    "lora",
    "merge",
    "plan",
    "rank",
    "report",
    "transfer",
    "verify",
]


def __getattr__(name: str) -> Any:
    """The commands, imported when they are first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lolcats_cli.api import FUNCTIONS

    return FUNCTIONS[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
