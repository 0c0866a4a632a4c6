"""lolcats plan: its output in docs/sizes.md, its errors, and that it starts without torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lolcats_cli.commands._options import parse_size
from lolcats_cli.errors import UsageError

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "planning" / "configs"
README = ROOT / "docs" / "sizes.md"
BLOCK = re.compile(r"```\n\$ lolcats (plan [^\n]*)\n(.*?)```", re.DOTALL)


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The configuration of Llama 3.1 8B, in a folder called as it is on the hub."""
    name = "meta-llama/Llama-3.1-8B"
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "config.json").write_text((CONFIGS / "llama-3.1-8b.json").read_text())
    monkeypatch.chdir(tmp_path)
    return name


def test_the_readme_shows_what_it_prints(teacher: str, invoke) -> None:
    """RENEW_DOCS=1 python -m pytest tests/cli/test_plan.py     writes it anew"""
    found = BLOCK.search(README.read_text())
    assert found is not None
    assert teacher in found[1]
    result = invoke(*found[1].split())
    assert (result.code, result.err) == (0, "")
    if os.environ.get("RENEW_DOCS"):
        README.write_text(README.read_text().replace(found[2], result.out))
    assert f"```\n$ lolcats {found[1]}\n{result.out}```" in README.read_text()
    lines = result.out.splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 120


def test_json_holds_the_same(teacher: str, invoke) -> None:
    given = ("plan", teacher, "--tokens", "20M", "--gpus", "8xH100-80GB", "--disk", "300GB")
    document = json.loads(invoke(*given, "--json").out)
    text = invoke(*given).out
    assert [(step["stage"], step.get("store")) for step in document["stages"]] == [
        *[("capture", store) for store in ("attention", "block", "tokens")],
        *[("transfer", store) for store in ("attention", "block", "tokens")],
        ("lora", None),
        ("merge", None),
    ]
    assert document["store"] == "tokens"
    assert f"Use --store tokens. {document['reason']}"[:60] in text
    assert text.endswith("\n".join(document["commands"]) + "\n")
    assert document["commands"][0].startswith("torchrun --nproc-per-node 8 -m lolcats_cli capture meta-llama/")
    assert document["stages"][0]["problems"] == ["capture writes 7.865 TB, and the disk has 300 GB"]
    assert document["teacher"]["bytes"] == pytest.approx(16.06e9, rel=1e-3)
    assert (document["rows"], document["seq_len"]) == (19532, 1024)


def test_what_fits_nowhere_ends_with_5_and_says_what_would_help(teacher: str, invoke) -> None:
    result = invoke("plan", teacher, "--tokens", "20M", "--disk", "50GB", "--memory", "12GB")
    assert result.code == 5
    assert "No store fits" in result.err
    assert "Use fewer --samples, or a larger disk" in result.err
    assert "--store tokens does not fit: capture takes 17 GB of memory" in result.out
    assert "lolcats capture" not in result.out


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        (("--tokens", "many"), 2, "many is not a size"),
        (("--tokens", "20M", "--disk", "0"), 2, "0 is not a size"),
        (("--tokens", "20M", "--gpus", "8xV100"), 2, "A100-40GB"),
        (("--tokens", "20M", "--gpus", "H100-80GB", "--calibrate"), 2, "Choose one"),
        (("--tokens", "20M", "--memory", "lots"), 2, "lots is not a size"),
        ((), 2, "--tokens"),
    ],
)
def test_wrong_usage(teacher: str, invoke, options: tuple, code: int, named: str) -> None:
    result = invoke("plan", teacher, *options)
    assert (result.code, result.out) == (code, "")
    assert named in " ".join(result.err.split())


def test_a_teacher_that_is_not_understood(teacher: str, invoke) -> None:
    Path(teacher, "config.json").write_text('{"model_type": "mamba2"}')
    result = invoke("plan", teacher, "--tokens", "20M")
    assert (result.code, result.out) == (3, "")
    assert "meta-llama/Llama-3.1-8B has the model_type 'mamba2'" in result.err


def test_capture_takes_the_store_that_fits_and_says_why(pipeline: SimpleNamespace, invoke, tmp_path: Path) -> None:
    given = ("capture", pipeline.teacher, pipeline.text, "-o", tmp_path / "c", "--seq-len", "64", "--samples", "20")
    result = invoke(*given, "--disk", "100kB", "--memory", "100GB")
    assert (result.code, result.out) == (0, f"{tmp_path / 'c'}\n")
    assert (
        "--store auto takes tokens. The queries, keys and values would take 1.32 MB, and the disk has 100 kB"
        in result.err
    )
    again = invoke(*given)
    assert (again.code, again.out) == (0, result.out)
    assert "finished already" in again.err
    assert invoke(*given[:4], tmp_path / "d", *given[5:], "--disk", "1kB").code == 5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--block-size", "4"), "--block-size is for --store block"),
        (("--store", "tokens", "--disk", "2TB"), "--disk and --memory are for --store auto"),
        (("--store", "block", "--memory", "2TB"), "--disk and --memory are for --store auto"),
        (("--disk", "much"), "--disk much is not a size"),
    ],
)
def test_options_of_a_store(pipeline: SimpleNamespace, invoke, tmp_path: Path, options: tuple, named: str) -> None:
    result = invoke("capture", pipeline.teacher, pipeline.text, "-o", tmp_path / "c", *options)
    assert (result.code, result.out) == (2, "")
    assert named in result.err


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500GB", 500e9), ("2TB", 2e12), ("1.5TiB", 1.5 * 2**40), ("20M", 20e6), ("80 GB", 80e9), ("512", 512.0),
        ("1.6k", 1600.0), ("3 KiB", 3072.0), ("7B", 7.0),
    ],
)  # fmt: skip
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text, "--disk") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0GB", "1e9", "1 000", "5 apples", "nan", "1.GB", "20m", "1" * 30])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"--disk .*is not a size"):
        parse_size(text, "--disk")


def test_neither_torch_nor_transformers_is_imported(teacher: str) -> None:
    code = (
        "import sys; from lolcats_cli.main import run; "
        f"code = run(['plan', {teacher!r}, '--tokens', '20M', '--disk', '2TB']); "
        "print(code, sorted({'torch', 'transformers', 'safetensors', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "formats")])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stderr.splitlines()[-1] == "0 []"
    assert "lolcats lora maps -o lora" in done.stdout
