"""`make benchmarks-gpu` at a tiny size: every figure is measured and written, or named."""

from __future__ import annotations

import csv
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("matplotlib")


@pytest.fixture
def gpu_benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/gpu.py, which is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


def run(benchmark: ModuleType, folder: Path, *options: str) -> int:
    return benchmark.main(["--tiny", "--results", str(folder), "--pictures", str(folder), *options])


def test_all_of_it_in_a_small_size(gpu_benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(gpu_benchmark, tmp_path) == 0
    assert "Left out" not in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "gpu.csv").open()))
    assert {row["card"].endswith("(no GPU)") for row in rows} == {True}
    assert all(0 < float(row["least_ms"]) <= float(row["median_ms"]) <= float(row["most_ms"]) for row in rows)
    measured = {(row["part"], row["what"]) for row in rows}
    assert measured == {
        *(("layer", name) for name in ("forward", "forward+backward", "maps alone")),
        ("step", "decoding step"),
        *(("model", name) for name in ("prompt", "decoding step", "LoRA step")),
    }
    for what, others in (("prompt", {"student, 64 exact keys"}), ("LoRA step", set())):
        assert {row["path"] for row in rows if row["what"] == what} == {"student", "softmax"} | others
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-decoding.svg", "gpu-layer.svg", "gpu.csv"]
    assert "no GPU" in (tmp_path / "gpu-layer.svg").read_text()


def test_what_there_is_no_time_or_memory_for_is_named(
    gpu_benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    assert run(gpu_benchmark, tmp_path, "--minutes", "0") == 0
    out = capsys.readouterr().out
    assert "Left out: layer: sliding exp forward chunked 1 64 (no time)." in out
    assert "Left out: model: sliding exp LoRA step softmax 2 64 (no time)." in out
    assert len((tmp_path / "gpu.csv").read_text().splitlines()) == 1

    def fail(error: Exception):
        def attention(*args: object, **options: object) -> None:
            raise error

        monkeypatch.setattr(gpu_benchmark.gpu_layer, "_softmax", attention)

    monkeypatch.setattr(gpu_benchmark.gpu_layer, "TINY", tiny_of(gpu_benchmark))
    for error, words, code in (
        (torch.OutOfMemoryError("too much"), "out of memory", 0),
        (RuntimeError("no kernel\nmore"), "RuntimeError: no kernel", 1),
    ):
        fail(error)
        assert run(gpu_benchmark, tmp_path, "--parts", "layer") == code
        out = capsys.readouterr().out
        assert f"Left out: layer:  forward SDPA 1 64 ({words})." in out
        assert "layer  sliding exp forward chunked 1 64" in out  # the others are measured


def tiny_of(benchmark: ModuleType):
    from dataclasses import replace

    return replace(benchmark.gpu_layer.TINY, points=((1, 64),))


@pytest.mark.parametrize(("options", "words"), [(["--tiny"], "no figures of a GPU"), ([], "There is no GPU here")])
def test_it_writes_no_figures_of_a_gpu_that_is_not_there(
    gpu_benchmark: ModuleType, options: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_benchmark.main(options)
    assert stopped.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())
