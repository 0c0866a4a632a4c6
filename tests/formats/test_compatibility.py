"""Artifacts that an earlier lolcats wrote, in fixtures, stay readable: the ids never change again."""

from __future__ import annotations

from pathlib import Path

import pytest
from lolcats_formats import Artifact, artifact_id

FIXTURES = Path(__file__).with_name("fixtures")
IDS = {
    "v1/capture": "1693bc8e05d12ecae0eb64efcb14c48e9ec91cf68a9de8609e0740e0fd7989e2",
    "v1/transfer": "5521ed35a246e4426d43c45d689d9c2e094172f8fc466e049eed30fc4ed9591a",
    "v1/lora": "557c56d682401199d73e77612090f7144d57b0ccf70df71ff1d4344d9688f626",
    "v1/student": "bd6179fad94febd75d23f14fd8bdb84268eb0f567adcdad7915c0daca47bd9cf",
    "v1.2/capture": "448793072e6ecc5fda13930e6cb884e1998d42f88cf76c7df5725ab19844b266",
    "v1.2/transfer": "36280ddbc154d5b0d32de09d5f1fe1bdcf166a0a4872b5a532e8e12f208efdb9",
    "v1.2/lora": "b7dbfc8ebf130d8e87cb3078e4485aa3c3f1fd9189d139331eb35cb0f1c07735",
}


@pytest.mark.parametrize("name", IDS)
def test_an_artifact_of_version_1_is_read(name: str) -> None:
    artifact = Artifact.open(FIXTURES / name, name.rpartition("/")[2])
    artifact.verify()
    assert artifact.id == artifact_id(artifact.manifest) == IDS[name]
    assert all(artifact.load(name) for name in artifact.files if name.endswith(".safetensors"))
    assert all(event["event"] for event in artifact.metrics())


@pytest.mark.parametrize("name", ["v1/student", "v1.2/lora"])
def test_its_lineage_leads_back_to_the_capture(name: str) -> None:
    artifact, version = Artifact.open(FIXTURES / name), name.partition("/")[0]
    for kind in {"lora", "transfer", "capture"} - {artifact.kind}:
        assert artifact.ancestor(kind).id == IDS[f"{version}/{kind}"]
