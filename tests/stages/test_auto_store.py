"""--store auto: what fits here, but what a capture was begun with when it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lolcats_formats import Artifact, begun_config
from transformers import AutoModelForCausalLM

from lolcats_cli import stopping
from lolcats_cli.artifacts import stores
from lolcats_cli.errors import NotEnoughSpace, Stopped
from lolcats_cli.planning import plan
from lolcats_cli.planning.machine import of_gpus
from lolcats_cli.progress import Progress
from lolcats_cli.stages import auto_store
from lolcats_cli.stages.capture import capture
from lolcats_cli.stages.units import UnitRecord
from lolcats_cli.teacher.record import probe
from lolcats_cli.teacher.records import DataOptions
from lolcats_cli.teacher.shape import read_shape

LAYERS = 5
DATA = DataOptions(seq_len=32, samples=22)
ATTENTION = 22 * 32 * (4 + LAYERS * (4 + 2 * 2) * 16 * 4)  # bytes
HUGE = 1e15


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture(scope="module")
def deep(new_teacher: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_teacher(tmp_path_factory.mktemp("deep") / "teacher", num_hidden_layers=LAYERS)


@pytest.fixture
def run(deep: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Artifact]:
    """A capture with --store auto, of a process that takes no memory."""
    monkeypatch.setattr(stores, "PROCESS", 0)

    def call(folder: Path, disk: float = HUGE, memory: float = HUGE, **options: object) -> Artifact:
        given = {"options": DATA, "batch_size": 2, "store": "auto", **options}
        return capture(str(deep), str(tiny_text), folder, disk=disk, memory=memory, **given)  # type: ignore[arg-type]

    return call


def sizes(deep: Path) -> stores.Sizes:
    model = AutoModelForCausalLM.from_pretrained(deep)
    return auto_store.sizes_of(model, probe(model), 22, 32, 2)


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """A signal comes in so many batches."""
    add, left = UnitRecord.add, [batches]

    def once(*args: object) -> None:
        add(*args)  # type: ignore[arg-type]
        left[0] -= 1
        if not left[0]:
            stopping._requested = "SIGTERM"

    monkeypatch.setattr(UnitRecord, "add", once)


def test_what_fits_is_taken_and_told(deep: Path, run: Callable[..., Artifact], tmp_path: Path) -> None:
    found = sizes(deep)
    whole = found.memory("tokens", None, True) / stores.USABLE
    two = found.memory("block", 2, True) / stores.USABLE
    assert found.disk("attention") == ATTENTION
    for name, disk, memory, store, block_size in (
        ("plenty", ATTENTION, HUGE, "attention", None),
        ("little disk", ATTENTION - 1, whole, "tokens", None),
        ("little memory", ATTENTION, two, "block", 2),
    ):
        told = Notes()
        made = run(tmp_path / name, disk, memory, progress=told)
        assert (made.config.get("store", "attention"), made.config.get("block_size")) == (store, block_size)
        assert [note for note in told.notes if note.startswith(f"--store auto takes {store}. ")]


def test_nothing_fits(run: Callable[..., Artifact], tmp_path: Path) -> None:
    with pytest.raises(NotEnoughSpace, match="No store fits"):
        run(tmp_path / "c", 100.0, 100.0)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(("first", "store"), [(HUGE, "attention"), (10_000.0, "tokens")])
def test_a_capture_goes_on_with_what_it_began_with(
    run: Callable[..., Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: float, store: str
) -> None:
    """Whatever the disk has free by then; a finished one is found finished."""
    whole = run(tmp_path / "whole", first)
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(Stopped):
            run(tmp_path / "parts", first)
    stopping._requested = None
    later = 10_000.0 if first == HUGE else HUGE
    resumed = run(tmp_path / "parts", later)
    assert resumed.config.get("store", "attention") == store
    assert resumed.id == whole.id
    told = Notes()
    assert run(tmp_path / "parts", 1.0, 1.0, progress=told).id == whole.id
    assert f"{tmp_path / 'parts'} is finished already" in told.notes


def test_force_continues_its_own_and_begins_others_anew(
    run: Callable[..., Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "c", HUGE)
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(Stopped):
            run(tmp_path / "c", 10_000.0, force=True)
    stopping._requested = None
    assert "store" not in Artifact.open(tmp_path / "c").config  # until the new one is finished
    assert begun_config(tmp_path / "c", force=True)["store"] == "tokens"  # type: ignore[index]
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(Stopped):  # other settings: chosen anew
            run(tmp_path / "c", HUGE, force=True, seed=1)
    stopping._requested = None
    begun = begun_config(tmp_path / "c", force=True)
    assert begun is not None
    assert (begun["seed"], begun.get("store")) == (1, None)
    assert "store" not in run(tmp_path / "c", 10_000.0, force=True, seed=1).config


def test_what_was_begun(tmp_path: Path) -> None:
    assert begun_config(tmp_path / "nothing") is None
    for name, text in (("broken", "{"), ("other", "[1]"), ("none", '{"config": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "progress.json").write_text(text)
        assert begun_config(tmp_path / name) is None
    (tmp_path / "none" / "manifest.json").write_text(json.dumps({"config": {"seed": 3}}))
    assert begun_config(tmp_path / "none") == {"seed": 3}
    assert begun_config(tmp_path / "none", force=True) is None


def test_plan_and_capture_count_alike(deep: Path) -> None:
    """plan from the configuration, capture from the loaded teacher; norms aside."""
    counted = plan.Work(read_shape(str(deep)), 22, 32, of_gpus("H100-80GB"), 1, 1).sizes
    found = sizes(deep)
    for name in ("rows", "seq_len", "attention", "hidden", "heads", "maps", "width"):
        assert getattr(found, name) == getattr(counted, name), name
    assert found.beside == pytest.approx(counted.beside, rel=0.01)
    assert sum(found.weights) == pytest.approx(sum(counted.weights), rel=0.01)


def test_memory_here() -> None:
    available = stores.available_memory()
    assert 1e8 < available < 1e14
    assert auto_store.device_memory(torch.device("cpu")) == pytest.approx(available, rel=0.5)
