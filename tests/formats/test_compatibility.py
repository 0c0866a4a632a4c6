"""Artifacts that an earlier lolcats wrote, in fixtures/v1, stay readable: the ids never change again."""

from __future__ import annotations

from pathlib import Path

import pytest
from lolcats_formats import Artifact, artifact_id

FIXTURES = Path(__file__).with_name("fixtures")
IDS = {
    "capture": "1693bc8e05d12ecae0eb64efcb14c48e9ec91cf68a9de8609e0740e0fd7989e2",
    "transfer": "5521ed35a246e4426d43c45d689d9c2e094172f8fc466e049eed30fc4ed9591a",
    "lora": "557c56d682401199d73e77612090f7144d57b0ccf70df71ff1d4344d9688f626",
    "student": "bd6179fad94febd75d23f14fd8bdb84268eb0f567adcdad7915c0daca47bd9cf",
}


@pytest.mark.parametrize("kind", IDS)
def test_an_artifact_of_version_1_is_read(kind: str) -> None:
    artifact = Artifact.open(FIXTURES / "v1" / kind, kind)
    artifact.verify()
    assert artifact.id == artifact_id(artifact.manifest) == IDS[kind]
    assert all(artifact.load(name) for name in artifact.files if name.endswith(".safetensors"))
    assert all(event["event"] for event in artifact.metrics())


def test_its_lineage_leads_back_to_the_capture() -> None:
    student = Artifact.open(FIXTURES / "v1" / "student")
    assert [student.ancestor(kind).id for kind in ("lora", "transfer", "capture")] == [
        IDS["lora"],
        IDS["transfer"],
        IDS["capture"],
    ]
