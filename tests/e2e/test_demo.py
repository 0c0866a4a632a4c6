"""The demo, shorter: every stage on the embedded teacher and text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lolcats_cli.commands import demo as demo_module
from lolcats_cli.main import run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("demo")]

WITHOUT_LOLCATS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(name.startswith("lolcats") for name in sys.modules)
try:
    import lolcats_cli
    sys.exit("lolcats is importable: this test would prove nothing")
except ImportError:
    pass
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = tokenizer(sys.argv[2], return_tensors="pt").input_ids
print(json.dumps(model(ids).logits[0, -1].tolist()))
"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The kept folder and what the demo printed."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("demo")
    for name, value in {"SAMPLES": 16, "TRANSFER_STEPS": 8, "LORA_STEPS": 6, "EVAL_ROWS": 16, "RECALL_ROWS": 4}.items():
        patch.setattr(demo_module, name, value)
    out = folder / "stdout.txt"
    with out.open("w") as stream:
        patch.setattr(sys, "stdout", stream)
        code = run(["demo", "--keep", str(folder / "kept")])
    patch.undo()
    assert code == 0
    return folder / "kept", out.read_text()


def _perplexities(printed: str) -> dict[str, float]:
    rows = {}
    for line in printed.splitlines():
        for name in ("teacher (softmax)", "swapped, no transfer", "after transfer", "after LoRA"):
            if line.startswith(f"{name}  "):
                rows[name] = float(line.removeprefix(name).split()[0])
    return rows


def test_transfer_and_lora_each_lower_the_perplexity(kept):
    found = _perplexities(kept[1])
    assert found["teacher (softmax)"] < found["after LoRA"] < found["after transfer"] < found["swapped, no transfer"]


def test_the_printed_commands_are_resumable_and_find_everything_done(kept, capsys):
    folder, printed = kept
    commands = [line.split()[1:] for line in printed.splitlines() if line.startswith("  lolcats ")]
    assert [command[0] for command in commands] == ["capture", "transfer", "lora", "merge"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run(commands[-1]) == 0
    assert capsys.readouterr().out == f"{folder / 'student'}\n"
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_student_loads_without_lolcats_and_gives_the_unmerged_logits(kept, tmp_path):
    from lolcats_cli.loading.any_model import load_any
    from lolcats_cli.teacher.load import LoadOptions

    folder, _ = kept
    prompt = "It was a dark and stormy night"
    # -S and -P would also hide site-packages: lolcats is installed in editable mode, through a finder in them.
    script = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    script += f"sys.path = [p for p in sys.path if not p.startswith({str(Path.cwd())!r}) or 'site-packages' in p]\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", script + WITHOUT_LOLCATS, str(folder / "student"), prompt],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    merged = torch.tensor(json.loads(done.stdout))
    loaded = load_any(str(folder / "lora"), LoadOptions(dtype="float32"))
    ids = loaded.tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        unmerged = loaded.model(ids).logits[0, -1]
    # The merged weights are the teacher's bf16: each is rounded once.
    assert (merged - unmerged).abs().max() < 0.02 * unmerged.abs().max()
    assert merged.argmax() == unmerged.argmax()
