"""What the quality tables share: students of a teacher, each made once and kept, and their figures on held-out text.

Everything lies in one folder, by name: the same command again continues where it stopped, and does nothing twice.
Figures are of text that none of the stages saw; a gap is between losses on the same rows.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "formats")]

from lolcats_formats import Artifact  # noqa: E402
from lolcats_kernels import HybridConfig  # noqa: E402

from lolcats_cli.evaluation.evaluate import evaluate  # noqa: E402
from lolcats_cli.loading.any_model import load_any  # noqa: E402
from lolcats_cli.stages.capture import capture  # noqa: E402
from lolcats_cli.stages.lora import lora  # noqa: E402
from lolcats_cli.stages.lora_options import RECIPES as LORA_RECIPES  # noqa: E402
from lolcats_cli.stages.transfer import transfer  # noqa: E402
from lolcats_cli.stages.transfer_options import RECIPES  # noqa: E402
from lolcats_cli.student.build import hybrid_modules  # noqa: E402
from lolcats_cli.teacher.data import DataOptions  # noqa: E402
from lolcats_cli.teacher.load import LoadOptions  # noqa: E402

ASSETS = ROOT / "lolcats_cli" / "assets"
TRAIN, VALIDATION = ASSETS / "text" / "train.jsonl", ASSETS / "text" / "validation.jsonl"
LOAD = LoadOptions(dtype="float32", device="cpu")
SEQ_LEN, SAMPLES = 512, 240  # the captured rows; 5% of them are validation
TRANSFER_ROWS, LORA_ROWS = 240, 160  # rows that the two stages train on
TEXT_ROWS, RECALL_ROWS = 48, 32  # rows that figures are of: held-out text; questions, per distance
HYBRID = {field.name for field in fields(HybridConfig)}
# The paper's LoRA rate of 1e-4 is for 20 M tokens: with so few, 1e-3 gives its recipe a better student.
CHANGES = {"lolcats": {"lr": 1e-3}, "best": {}}


class Lab:
    """A folder of students of one teacher."""

    def __init__(self, work: Path, teacher: Path = ASSETS / "teacher") -> None:
        self.work = work.absolute()
        self.work.mkdir(parents=True, exist_ok=True)
        self.teacher = teacher
        options = DataOptions(SEQ_LEN, samples=SAMPLES)
        self.capture = capture(str(teacher), str(TRAIN), self.work / "capture", options=options, load=LOAD)

    def transfer(
        self, name: str, seed: int, *, recipe: str = "best", rows: int = TRANSFER_ROWS, **changes: Any
    ) -> Artifact:
        """A transfer of `rows` rows; `changes` are of `TransferOptions`, `HybridConfig` and which layers to keep."""
        base = RECIPES[recipe]
        chosen = ("keep_softmax", "keep_auto", "keep_heads", "auto")
        kept = {key: changes.pop(key) for key in chosen if key in changes}
        hybrid = replace(base.hybrid, **{key: changes.pop(key) for key in HYBRID & changes.keys()})
        options = replace(base, hybrid=hybrid, seed=seed, **changes)
        steps = rows // options.grad_accum
        options = replace(options, steps=steps, eval_steps=max(1, steps // 4))
        return transfer(self.capture.path, self._folder(name, "transfer", seed), options=options, **kept)

    def lora(
        self, name: str, seed: int, maps: Artifact, *, recipe: str = "best", rows: int = LORA_ROWS, **changes: Any
    ) -> Artifact:
        """LoRA of `rows` rows on `maps`; `changes` are of `LoraOptions`."""
        options = replace(LORA_RECIPES[recipe], seed=seed, **CHANGES[recipe] | changes)
        steps = rows // options.grad_accum
        options = replace(options, steps=steps, eval_steps=steps)
        return lora(maps.path, self._folder(name, "lora", seed), options=options, load=LOAD)

    def gap(self, student: Path, term: str = "both", exact_keys: int = 0) -> float:
        """Nats per token that a student loses against the teacher on held-out text. It may keep so many exact keys
        beside its window."""
        return self.text(student, term, exact_keys)["nats_per_token"] - self.text(self.teacher)["nats_per_token"]

    def text(self, path: Path, term: str = "both", exact_keys: int = 0) -> dict[str, Any]:
        """A model's figures on held-out text, with one term of its attention or both."""
        return self._evaluated(path, term, "text", 0, exact_keys)

    def recall(self, path: Path, term: str = "both") -> dict[str, float]:
        """The share of facts that a model recalls, by distance."""
        return _by_distance(self._evaluated(path, term, "recall", recall_count=RECALL_ROWS))

    def recall_with(self, path: Path, exact_keys: int) -> dict[str, float]:
        """The same of a student that keeps so many exact keys beside its window; and the seconds that it took."""
        found = self._evaluated(path, "both", "recall", RECALL_ROWS, exact_keys)
        return {**_by_distance(found), "CPU seconds": found["seconds"]}

    def _evaluated(self, path: Path, term: str, kind: str, recall_count: int, exact_keys: int = 0) -> dict[str, Any]:
        name = "teacher" if path == self.teacher else str(path.relative_to(self.work)).replace("/", "-")
        keys = f"-{exact_keys}-keys" if exact_keys else ""
        kept = self.work / "figures" / f"{name}-{term}-{kind}{keys}.json"
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            # Recall takes its filler from the text: some rows will do.
            options = DataOptions(SEQ_LEN, samples=TEXT_ROWS if kind == "text" else 4)
            loaded = load_any(str(path), LOAD)
            for hybrid in hybrid_modules(loaded.model) if exact_keys else ():
                hybrid.sparse_cache_size = exact_keys
            started = time.process_time()
            found = evaluate(loaded, str(VALIDATION), options=options, terms=(term,), recall_count=recall_count)
            figures = found["results"][term] | {"seconds": time.process_time() - started}
            kept.write_text(json.dumps(figures), encoding="utf-8")
        return json.loads(kept.read_text(encoding="utf-8"))

    def _folder(self, name: str, stage: str, seed: int) -> Path:
        folder = self.work / re.sub(r"[^\w.]+", "-", name) / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / stage


def errors(maps: Artifact) -> dict[str, float]:
    """Validation error of the attention outputs, mean over the layers; relative: to the output's power."""
    layers = maps.summary["layers"].values()
    return {
        "attention mse": statistics.mean(figures["mse"] for figures in layers),
        "relative mse": statistics.mean(figures["relative_mse"] for figures in layers),
        "relative mse, window alone": statistics.mean(figures["relative_window_mse"] for figures in layers),
    }


def _by_distance(figures: dict[str, Any]) -> dict[str, float]:
    return {f"recall@{distance}": share for distance, share in figures["recall"].items()}
