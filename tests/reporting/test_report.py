"""The report: one page that says what the artifacts say, also in a real browser."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lolcats_formats import Artifact
from PIL import Image

from lolcats_cli.artifacts.history import figures, history
from lolcats_cli.main import run
from lolcats_cli.reporting.page import page
from lolcats_cli.student.memory import cache_bytes, student_bytes

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def report(pipeline: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the merged student, measured on its own text."""
    file = tmp_path_factory.mktemp("report") / "report.html"
    args = ["report", str(pipeline.student), "-o", str(file), "--data", str(pipeline.text)]
    assert run([*args, "--seq-len", "64", "--samples", "8", "--recall", "2"]) == 0
    return file


def test_the_page_is_one_file_without_scripts_and_links(report: Path) -> None:
    text = report.read_text()
    for word in ("<script", "http://", "https://", "src=", "href=", "url(", "@import"):
        assert word not in text
    assert "default-src 'none'" in text


def test_it_says_what_the_artifacts_say(report: Path, pipeline: SimpleNamespace) -> None:
    text = report.read_text()
    lora, transfer = Artifact.open(pipeline.lora), Artifact.open(pipeline.transfer)
    assert f"{math.exp(lora.summary['initial_loss']):.4g} → {math.exp(lora.summary['loss']):.4g}" in text
    for artifact in (lora, transfer, Artifact.open(pipeline.capture), Artifact.open(pipeline.student)):
        assert artifact.id[:12] in text
    worst = max(layer["relative_mse"] for layer in transfer.summary["layers"].values())
    assert f"(worst {worst:.1%})" in text
    for title in ("Validation error of every layer", "Loss", "Error of every head", "Bytes of one sequence"):
        assert f"<figcaption>{title}</figcaption>" in text
    assert text.count("<rect") == sum(len(layer["head_relative_mse"]) for layer in transfer.summary["layers"].values())


def test_with_data_it_compares_student_and_teacher(report: Path, pipeline: SimpleNamespace, capsys) -> None:
    text = report.read_text()
    capsys.readouterr()
    args = ["--data", str(pipeline.text), "--seq-len", "64", "--samples", "8", "--recall", "0", "--json"]
    for model in (pipeline.student, pipeline.teacher):
        assert run(["eval", str(model), *args]) == 0
        figure = json.loads(capsys.readouterr().out)["results"]["both"]["nats_per_token"]
        assert f"{figure:.4f}" in text
    assert "tokens/s" in text and "student, window zeroed" in text


def test_without_data_it_runs_no_model(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    code = f"""
import sys
from lolcats_cli.main import run
code = run(["report", {str(pipeline.student)!r}, "-o", {str(tmp_path / "r.html")!r}])
assert "transformers" not in sys.modules
sys.exit(code)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
    assert "Add <code>--data FILE</code>" in (tmp_path / "r.html").read_text()


def test_it_says_what_is_gone(pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = tmp_path / "alone" / "student"
    shutil.copytree(pipeline.student, moved)
    monkeypatch.setattr(Artifact, "open", _only(moved))
    text = page(Artifact.open(moved))
    assert "Not found where it lay, nor beside this artifact: lora, transfer, capture." in text
    assert "<figcaption>Bytes of one sequence</figcaption>" in text  # needs the manifest alone
    assert "Error of every head" not in text


def _only(path: Path):
    """`Artifact.open`, for which nothing is where it was but `path`."""
    opened = Artifact.open

    def open_(place, kind=None):
        if Path(place) != path:
            raise FileNotFoundError(place)
        return opened(place, kind)

    return open_


def test_names_of_artifacts_are_text(pipeline: SimpleNamespace) -> None:
    artifact = Artifact.open(pipeline.lora)
    artifact.manifest["teacher"]["path"] = "/x/<b>\x1b[31m"
    text = page(artifact)
    assert "<b>\x1b" not in text and "&lt;b&gt;\\x1b[31m" in text


def test_figures_are_for_people(pipeline: SimpleNamespace) -> None:
    found = {(figure.stage, figure.name): figure.value for figure in figures(history(Artifact.open(pipeline.student)))}
    assert "→" in found["lora", "validation perplexity"]
    assert "%" in found["transfer", "attention error, mean of the layers"]


def test_the_state_is_as_large_as_it_says(pipeline: SimpleNamespace) -> None:

    from lolcats_cli.loading.any_model import load_any
    from lolcats_cli.teacher.load import LoadOptions

    artifact = Artifact.open(pipeline.student)
    layers = artifact.teacher["layers"]
    hybrid = artifact.config["hybrid"]
    model = load_any(str(pipeline.student), LoadOptions(dtype="float32")).model
    with torch.no_grad():
        cache = model(input_ids=torch.zeros(1, 20, dtype=torch.long), use_cache=True).past_key_values
    held = 0
    for layer in cache.layers:
        state = next(value for value in vars(layer).values() if type(value).__name__ == "KVState")
        held += sum(t.numel() * t.element_size() for t in vars(state).values() if isinstance(t, torch.Tensor))
    assert student_bytes(layers, hybrid, (), 20, 4) == held == student_bytes(layers, hybrid, (), 10**6, 4)
    kept = student_bytes(layers, hybrid, (1,), 20, 4)
    assert kept == held // 2 + 2 * 2 * 16 * 4 * 20
    assert cache_bytes([layers[0] | {"sliding_window": 8}], 20, 2) == 2 * 2 * 16 * 2 * 8


def test_mistakes_are_told(pipeline: SimpleNamespace, tmp_path: Path, capsys) -> None:
    file = str(tmp_path / "r.html")
    assert run(["report", str(pipeline.capture), "-o", file]) == 3
    assert run(["report", str(pipeline.student), "-o", str(tmp_path / "no" / "r.html")]) == 2
    assert run(["report", str(pipeline.student), "-o", file, "--data", "-"]) == 2
    assert not Path(file).exists()
    assert run(["report", str(pipeline.student), "-o", str(tmp_path)]) == 2
    assert "is a folder. Give the path of a file" in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (1100, "dark"), (390, "light")])
def test_a_browser_shows_it(report: Path, tmp_path: Path, width: int, scheme: str) -> None:
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2400", f"--screenshot={picture}"]
    if scheme == "dark":
        options.append("--blink-settings=preferredColorScheme=0")
    subprocess.run([str(BROWSER), *options, report.as_uri()], check=True, capture_output=True, timeout=120)
    shown = Image.open(picture).convert("RGB")
    assert shown.width == width
    pixels = shown.resize((width // 2, 1200)).get_flattened_data()
    back = shown.getpixel((2, 2))
    assert (sum(back) > 600) == (scheme == "light")
    marked = sum(sum(abs(a - b) for a, b in zip(pixel, back, strict=True)) > 150 for pixel in pixels)
    assert 0.01 < marked / len(pixels) < 0.5  # text and drawings, on a background
    colors = {tuple(part // 32 for part in pixel) for pixel in pixels}
    assert len(colors) > 20  # the heatmap's and the lines'
