"""One style for the messages of errors: whole sentences. They begin with a capital, a name or a value, and end with a
full stop."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / "formats" / "lolcats_formats", ROOT / "kernels" / "lolcats_kernels", ROOT / "lolcats_cli"]
# Names with which a sentence may begin though they have no capital: programs, files, and parameters of functions.
NAMES = (
    *("accelerate ", "config.json ", "lolcats ", "merge ", "vLLM "),
    *("cache_implementation=", "output_attentions=", "position_ids ", "q, k and v ", "sinks ", "softcap "),
    *("sparse_cache_size ", "terms ", "valid ", "window_factor "),
)
# Errors that Python itself words so, or that no user reads.
OWN_WORDS = {"AttributeError", "AssertionError", "KeyError", "OSError"}


def errors() -> set[str]:
    """The names of Python's exceptions and of all that these packages define."""
    found = {name for name, value in vars(builtins).items() if isinstance(value, type)}
    found = {name for name in found if issubclass(getattr(builtins, name), Exception)}
    classes = [node for _, node in nodes() if isinstance(node, ast.ClassDef)]
    grown = True
    while grown:
        new = {c.name for c in classes if any(ast.unparse(base) in found for base in c.bases)}
        grown = not new <= found
        found |= new
    return found - OWN_WORDS


def nodes() -> Iterator[tuple[Path, ast.AST]]:
    for folder in FOLDERS:
        for file in sorted(folder.rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                yield file, node


def messages() -> list[tuple[str, str]]:
    """(where, text) of every error that is made with a text; the values in it are written as `{}`."""
    names = errors()
    return [
        (f"{file.relative_to(ROOT)}:{node.lineno}", text)
        for file, node in nodes()
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names
        for argument in node.args
        if (text := _text(argument)) is not None
    ]


def _text(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp):
        return f"{_text(node.left) or '{}'}{_text(node.right) or '{}'}"
    return None


def is_sentence(text: str) -> bool:
    begins = text[:1].isupper() or text.startswith(("{}", "`", "'", '"', "--", *NAMES))
    return begins and text.endswith((".", "?", "{}")) and "  " not in text


@pytest.mark.parametrize("text", ["the shard is missing.", "The shard is missing", "The shard is  missing."])
def test_other_styles_are_found(text: str) -> None:
    assert not is_sentence(text)


def test_every_message_is_made_of_whole_sentences() -> None:
    found = messages()
    assert len(found) > 300
    assert [f"{where}: {text}" for where, text in found if not is_sentence(text)] == []
