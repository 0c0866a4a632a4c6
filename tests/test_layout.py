"""The arrows between the packages, parsed from the imports, and the rules that keep them importable."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lolcats_cli import __version__

ROOT = Path(__file__).parents[1]
ROOTS = {"lolcats_cli": ROOT, "lolcats_kernels": ROOT / "kernels", "lolcats_formats": ROOT / "formats"}
MAX_LINES = 600
SPEAKS_TO_TRANSFORMERS = re.compile(r"^hf_|_lolcats\.py$")  # of the kernels' files
ANYWHERE = {"lolcats_cli", "lolcats_cli.errors", "lolcats_cli.progress", "lolcats_cli.ranks"}  # within lolcats_cli
# What a part may import besides itself and ANYWHERE.
ARROWS: dict[str, set[str]] = {
    "lolcats_cli": {"lolcats_cli.api", "lolcats_cli.commands"},  # lolcats_cli/__init__.py
    "lolcats_cli.api": {"lolcats_cli.main", "lolcats_cli.commands"},
    "lolcats_cli.__main__": {"lolcats_cli.main"},
    "lolcats_cli.main": {"lolcats_cli.commands", "lolcats_formats"},
    "lolcats_cli.commands": {
        "lolcats_cli.stages",
        "lolcats_cli.evaluation",
        "lolcats_cli.planning",
        "lolcats_cli.reporting",
        "lolcats_cli.loading",
        "lolcats_cli.artifacts",
        "lolcats_cli.teacher.identity",  # for mistakes that are told at once
        "lolcats_cli.teacher.records",  # options that the command line fills in
        "lolcats_cli.teacher.load",
        "lolcats_kernels",
        "lolcats_formats",
    },
    "lolcats_cli.stages": {
        "lolcats_cli.evaluation.golden_logits",
        "lolcats_cli.loading",
        "lolcats_cli.artifacts",
        "lolcats_cli.teacher",
        "lolcats_cli.student",
        "lolcats_kernels",
        "lolcats_formats",
    },
    "lolcats_cli.evaluation": {
        "lolcats_cli.loading",
        "lolcats_cli.artifacts",
        "lolcats_cli.teacher",
        "lolcats_cli.student",
        "lolcats_kernels",
        "lolcats_formats",
    },
    "lolcats_cli.reporting": {
        "lolcats_cli.evaluation",
        "lolcats_cli.loading",
        "lolcats_cli.artifacts",
        "lolcats_cli.teacher.data",
        "lolcats_cli.teacher.load",
        "lolcats_cli.teacher.records",
        "lolcats_cli.student",
        "lolcats_kernels",
        "lolcats_formats",
    },
    "lolcats_cli.planning": {
        "lolcats_cli.artifacts",
        "lolcats_cli.teacher",
        "lolcats_cli.student.memory",
        "lolcats_kernels",
    },
    "lolcats_cli.loading": {
        "lolcats_cli.artifacts",
        "lolcats_cli.teacher",
        "lolcats_cli.student",
        "lolcats_kernels",
        "lolcats_formats",
    },
    "lolcats_cli.artifacts": {
        "lolcats_cli.teacher.data",
        "lolcats_cli.teacher.record",
        "lolcats_kernels.spec",
        "lolcats_formats",
    },
    "lolcats_cli.teacher": {"lolcats_kernels"},
    "lolcats_cli.student": {"lolcats_cli.teacher.load", "lolcats_cli.teacher.identity", "lolcats_kernels"},
    "lolcats_cli.serving": {"lolcats_cli.student.types", "lolcats_kernels"},
    "lolcats_cli.assets": set(),
    "lolcats_cli.errors": set(),
    "lolcats_cli.progress": set(),
    "lolcats_kernels": set(),
    "lolcats_formats": set(),
}
FILES = sorted(file for name, root in ROOTS.items() for file in (root / name).rglob("*.py"))


def module_name(file: Path) -> str:
    root = next(root for name, root in ROOTS.items() if file.is_relative_to(root / name))
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(module: str, source: str, is_package: bool = False) -> Iterator[tuple[str, int]]:
    """Absolute names of all that is imported anywhere in the source, with line numbers; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".") if is_package else module.split(".")[:-1]
                kept = here[: len(here) - node.level + 1]
                base = ".".join([*kept, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def part_of(module: str) -> str:
    return max((part for part in ARROWS if within(module, part)), key=len)


def wrong_arrows(module: str, source: str, is_package: bool = False) -> list[str]:
    part = part_of(module)
    wrong = []
    for name, line in imports(module, source, is_package):
        if not any(within(name, package) for package in ROOTS):
            continue
        target = part_of(name)
        allowed = target == part or any(within(name, other) for other in ARROWS[part])
        if within(module, "lolcats_cli"):
            allowed |= target in ANYWHERE
        if not allowed:
            wrong.append(f"{module}, line {line}: {part} must not import {name}")
    return wrong


def test_arrows() -> None:
    wrong = [
        arrow
        for file in FILES
        for arrow in wrong_arrows(module_name(file), file.read_text(), file.name == "__init__.py")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source", "ok"),
    [
        ("lolcats_kernels.maps", "import lolcats_formats", False),
        ("lolcats_kernels.maps", "from .state import KVState", True),
        ("lolcats_kernels.maps", "def f():\n    from lolcats_cli.errors import BadInput", False),
        ("lolcats_formats.writer", "from lolcats_kernels import HybridMaps", False),
        ("lolcats_cli.teacher.load", "from lolcats_cli.stages.capture import capture", False),
        ("lolcats_cli.teacher.load", "from ..student import build", False),
        ("lolcats_cli.student.build", "from lolcats_cli.teacher.load import load_model", True),
        ("lolcats_cli.student.build", "from lolcats_cli.teacher.record import probe", False),
        ("lolcats_cli.stages.lora", "from lolcats_cli.commands import lora", False),
        ("lolcats_cli.stages.lora", "from lolcats_cli.errors import BadInput", True),
        ("lolcats_cli.errors", "from lolcats_cli.stages import lora", False),
        ("lolcats_cli.commands.lora", "import lolcats_cli.main", False),
        ("lolcats_cli.commands.lora", "import torch", True),
    ],
)
def test_the_check_itself(module: str, source: str, ok: bool) -> None:
    assert (not wrong_arrows(module, source)) == ok


def test_folders_of_packages_are_not_packages() -> None:
    """A package `kernels` would hide Hugging Face's, which transformers imports."""
    assert FILES
    for folder in ("kernels", "formats"):
        assert not (ROOT / folder / "__init__.py").exists()
        assert (ROOT / folder / f"lolcats_{folder}" / "__init__.py").exists()


def at_import(source: str) -> set[str]:
    """Top-level packages that are imported when the module is: not in functions, nor for type checkers alone."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
        todo += list(ast.iter_child_nodes(node))
    return found


LIGHT_MODULES = {
    "lolcats_cli",
    "lolcats_cli.errors",
    "lolcats_cli.progress",
    "lolcats_cli.artifacts.disk",
    "lolcats_cli.artifacts.describe",
    "lolcats_cli.artifacts.history",
    "lolcats_cli.planning.machine",
    "lolcats_cli.planning.plan",
    "lolcats_cli.artifacts.stores",
    "lolcats_cli.teacher.hub",
    "lolcats_cli.teacher.identity",
    "lolcats_cli.teacher.records",
    "lolcats_cli.teacher.shape",
}
LIGHT = [
    file
    for file in FILES
    if module_name(file).startswith(("lolcats_formats", "lolcats_cli.commands", "lolcats_cli.main"))
    or module_name(file) in LIGHT_MODULES
]


@pytest.mark.parametrize("file", LIGHT, ids=module_name)
def test_light_modules_import_nothing_heavy(file: Path) -> None:
    heavy = {"torch", "transformers", "peft", "datasets", "numpy", "safetensors", "huggingface_hub", "lolcats_kernels"}
    assert not at_import(file.read_text()) & heavy


@pytest.mark.parametrize("package", ["lolcats_kernels", "lolcats_formats"])
def test_libraries_need_few_others(package: str) -> None:
    """Kernels serve models that have torch alone, but for the files that speak to transformers; formats serve tools
    that have no transformers."""
    import sys

    allowed = {
        "lolcats_kernels": {"torch", "triton"},
        "lolcats_formats": {"torch", "safetensors", "jsonschema", "referencing"},  # the last is jsonschema's own
    }[package]
    for file in (ROOTS[package] / package).rglob("*.py"):
        name = module_name(file)
        for imported, line in imports(name, file.read_text(), file.name == "__init__.py"):
            top = imported.split(".")[0]
            ours = allowed | {package} | ({"transformers"} if SPEAKS_TO_TRANSFORMERS.search(file.name) else set())
            assert top in sys.stdlib_module_names | ours, f"{name}, line {line} imports {imported}"


def test_files_stay_readable() -> None:
    tests = (ROOT / "tests").rglob("*.py")
    long = {
        str(file.relative_to(ROOT)): lines
        for file in [*FILES, *tests]
        if (lines := len(file.read_text().splitlines())) > MAX_LINES
    }
    assert not long, f"split these files: {long}"


def test_functions_stay_readable() -> None:
    """Outside the kernels no function is over 60 lines, its docstring aside. ruff counts branches."""
    long = []
    for file in (file for file in FILES if "kernels" not in file.parts):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                first = node.body[min(1, len(node.body) - 1)] if ast.get_docstring(node) else node.body[0]
                if (node.end_lineno or 0) - first.lineno + 1 > 60:
                    long.append(f"{file}: {node.name}")
    assert not long, "\n".join(long)


def test_the_version_is_the_same_everywhere() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest, date = re.findall(r"^## (\d\S*) - (\S+)$", changelog, re.MULTILINE)[0]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert newest == __version__
    assert f"\nversion: {newest}\n" in citation and f'\ndate-released: "{date}"\n' in citation
