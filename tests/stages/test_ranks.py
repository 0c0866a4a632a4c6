"""lora on two ranks gives what one process gives, with the teacher copied or spread over them, and after stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lolcats_formats import Artifact

from lolcats_cli import ranks
from lolcats_cli.errors import UsageError
from lolcats_cli.stages.capture import capture
from lolcats_cli.stages.lora import lora
from lolcats_cli.stages.lora_options import LoraOptions
from lolcats_cli.stages.lora_training import Order
from lolcats_cli.teacher.load import LoadOptions
from lolcats_cli.teacher.records import DataOptions

ROOT = Path(__file__).parents[2]
ENV = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "formats")]),
    "OMP_NUM_THREADS": "1",
}
PATIENCE = 300  # seconds; a machine that is busy is slow, not wrong
# 23 training rows of unequal length in steps of 6: the last step has 5, which 2 ranks cannot share evenly.
TEXT = ["--epochs", "1", "--grad-accum", "2", "--batch-size", "3", "--eval-steps", "2", "--lr", "1e-2"]
TEACHER = [*TEXT, "--match", "teacher", "--schedule", "linear", "--freeze-maps"]

Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def command(pipeline: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """`command("name", *options)`: arguments for lora, to a directory of that name."""
    root = tmp_path_factory.mktemp("ranks")
    text = "two men saw a whale at home, then one white sail"
    rows = (json.dumps({"text": text[i % 4 : i % 4 + 5 + 7 * i % 39]}) for i in range(24))
    (root / "rows.jsonl").write_text("\n".join(rows))
    options, load = DataOptions(seq_len=48, pack=False), LoadOptions(device="cpu")
    capture(str(pipeline.teacher), str(root / "rows.jsonl"), root / "cap", options=options, load=load)

    def arguments(name: str, *options: str) -> list[str]:
        given = ["lora", str(pipeline.transfer), "-o", str(root / name), "--data", str(root / "cap"), *options]
        return [*given, "--device", "cpu"]

    return arguments


def opened(arguments: list[str]) -> Artifact:
    return Artifact.open(arguments[3], "lora")


@pytest.fixture(scope="module")
def runs(command: Command, new_teacher, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """Runs of two ranks by name, [exit code, stdout, stderr] of each rank."""
    other = new_teacher(tmp_path_factory.mktemp("other") / "teacher", seed=1)
    wanted: dict[str, tuple] = {
        "stopped": ("copied", TEXT, ["signal", 1, 1]),
        "resumed": ("copied", TEXT, None),
        "finished": ("copied", TEXT, None),
        "other settings": ("copied", [*TEXT, "--rank", "4"], None),
        "other teacher": ("other", [*TEXT, "--teacher", str(other)], None),
        "spread, killed": ("spread", [*TEXT, "--shard"], ["kill", 1, 3]),
        "spread, resumed": ("spread", [*TEXT, "--shard", "--gradient-checkpointing"], ["check", 1, 3]),
        "teacher": ("teacher", TEACHER, None),
        "left": ("left", TEXT, ["signal", 0, 2]),
        "error": ("error", TEXT, ["error", 1, 1]),
        "uneven": ("uneven", [*TEXT, "--batch-size", "1", "--grad-accum", "3"], None),
    }
    given = [{"args": command(name, *options), "mishap": mishap} for name, options, mishap in wanted.values()]
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "stages" / "start_ranks.py"],
        input=json.dumps(given),
        env=ENV,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(wanted, json.loads(done.stdout), strict=True))


def close(found: Artifact, wanted: Artifact) -> None:
    """The same artifact but for rounding."""
    assert sorted(found.files) == sorted(wanted.files)
    assert found.config == wanted.config
    for name in wanted.files:
        if name.endswith(".safetensors"):
            torch.testing.assert_close(found.load(name), wanted.load(name), rtol=0, atol=1e-5)
    for one, other in zip(found.metrics(), wanted.metrics(), strict=True):
        assert one == {**other, "loss": pytest.approx(other["loss"], rel=1e-5)}


def test_two_ranks_are_one_process(runs: dict[str, list], command: Command, invoke_quietly: Callable) -> None:
    for name, options in (("one", TEXT), ("one teacher", TEACHER), ("left", TEXT)):
        assert invoke_quietly(command(name, *options)) == 0
    assert opened(command("one")).summary["steps"] == 4
    for name in ("copied", "spread", "left"):  # the last was begun by two and finished by one
        close(opened(command(name)), opened(command("one")))
    close(opened(command("teacher")), opened(command("one teacher")))


def test_a_signal_or_an_end_of_one_rank_ends_all(runs: dict[str, list], command: Command) -> None:
    for name in ("stopped", "left"):
        assert [code for code, _, _ in runs[name]] == [75, 75]
    assert [code for code, _, _ in runs["spread, killed"]] == [75, -9]
    assert "Stopped by the loss of another rank. The same command resumes: " in runs["spread, killed"][0][2]
    assert [code for code, _, _ in runs["error"]] == [3, 3]
    assert "Rank 1: Error: The disk of this rank is made of cheese." in runs["error"][1][2]
    for name in ("stopped", "left", "error"):
        said = [line for _, _, err in runs[name] for line in err.splitlines() if "Error" in line or "Stopped" in line]
        assert len(said) == 1, said
    assert not Path(command("error")[3], "manifest.json").exists()


def test_the_result_is_said_once(runs: dict[str, list], command: Command) -> None:
    for name in ("resumed", "finished", "spread, resumed", "teacher"):
        output = command({"teacher": "teacher", "spread, resumed": "spread"}.get(name, "copied"))[3]
        assert [(code, out) for code, out, _ in runs[name]] == [(0, f"{output}\n"), (0, "")]


def test_what_does_not_fit_is_told_once_before_the_model_is_loaded(runs: dict[str, list], command: Command) -> None:
    assert f"{command('copied')[3]} is finished already" in runs["finished"][0][2]
    for name, message in (
        ("other settings", "--rank is 8 there and 4 here"),
        ("other teacher", "differs in its weights"),
    ):
        assert [code for code, _, _ in runs[name]] == [4, 4]
        said = [line for _, _, err in runs[name] for line in err.splitlines()]
        assert len(said) == 1 and message in said[0], said
    for name in ("finished", "other settings", "other teacher"):
        assert not [err for _, _, err in runs[name] if "loading " in err]


def test_rows_that_ranks_cannot_share(runs: dict[str, list], command: Command) -> None:
    assert [code for code, _, _ in runs["uneven"]] == [2, 2]
    assert "3 rows" in runs["uneven"][0][2] and "--grad-accum 4" in runs["uneven"][0][2]
    assert not Path(command("uneven")[3]).exists()


@pytest.mark.parametrize(
    ("batch_size", "grad_accum", "processes", "expected"),
    [(1, 8, 1, (1, 8)), (1, 8, 8, (1, 1)), (4, 2, 8, (1, 1)), (3, 2, 2, (3, 1)), (4, 3, 2, (3, 2)), (1, 2, 4, None)],
)
def test_the_ranks_share_the_rows_of_a_step(
    batch_size: int, grad_accum: int, processes: int, expected: tuple[int, int] | None
) -> None:
    options = LoraOptions(batch_size=batch_size, grad_accum=grad_accum)
    if expected is None:
        with pytest.raises(UsageError, match="4 processes cannot share evenly"):
            options.share(processes)
    else:
        assert options.share(processes) == expected
        assert expected[0] * expected[1] * processes == batch_size * grad_accum


def test_accelerate_does_not_spread_the_model_by_its_own_ways(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=r"set up for FSDP.*--shard"):
        lora(pipeline.transfer, tmp_path / "l")
    assert not (tmp_path / "l").exists()


def test_blank_rows_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [list(Order(7, 2, seed)) for seed in (None, 3)]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ranks.size() == 4
    assert [list(Order(7, 2, seed)) for seed in (None, 3)] == [[*order, 7] for order in alone]
    assert sorted(alone[1]) == alone[0] == list(range(7))


@pytest.fixture(scope="module")
def invoke_quietly() -> Callable[[list[str]], int]:
    from lolcats_cli.main import run

    return run
