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

    from lolcats_cli.loading.saved_again import is_saved_again

    path = o.artifact_path(artifact)
    if is_saved_again(path):
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
