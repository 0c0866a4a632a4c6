"""lolcats verify"""

from __future__ import annotations

from typing import Any

from lolcats_cli.commands import _options as o


def verify(artifact: o.ArtifactIn) -> dict[str, Any]:
    """Check every size and SHA-256 of an artifact; of a student, also that it computes what it did when merged."""
    from lolcats_formats import GOLDEN, Artifact

    opened = Artifact.open(o.artifact_path(artifact))
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
