"""lolcats verify"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lolcats_cli.commands import _options as o


def verify(artifact: o.ArtifactIn) -> dict[str, Any]:
    """Check every size and SHA-256 of an artifact; of a student, also that its logits are those it gave when merged.

    A student that was fine-tuned and saved again has no manifest: that its weights are all there, and that it answers
    with numbers, is checked.
    """
    from lolcats_formats import GOLDEN, Artifact

    path = o.artifact_path(artifact)
    if _is_student(path):
        from lolcats_cli.evaluation.golden_logits import check_saved_again

        return {"path": path, **check_saved_again(Path(path))}
    opened = Artifact.open(path)
    total = sum(entry["size"] for entry in opened.files.values())
    with o.progress().task("verify", total, "bytes") as advance:
        opened.verify(advance)
    found = {
        "path": str(opened.path),
        "id": opened.id,
        "kind": opened.kind,
        "files": len(opened.files),
        "bytes": total,
    }
    if opened.kind == "student" and GOLDEN in opened.files:
        from lolcats_cli.evaluation import golden_logits

        found["golden_error"] = golden_logits.check(opened)
    return found


def _is_student(path: str) -> bool:
    """Whether it is a student's folder without a manifest; asked before anything heavy is imported."""
    config = Path(path) / "config.json"
    return not (Path(path) / "manifest.json").exists() and config.is_file() and '"lolcats"' in config.read_text("utf-8")
