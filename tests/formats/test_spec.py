"""SPEC.md is normative, so what it shows and counts is run and compared here."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lolcats_formats import KINDS, VERSION, limits

SPEC = (Path(__file__).parents[2] / "formats" / "SPEC.md").read_text("utf-8")
SCHEMAS = Path(limits.__file__).parent / "schema"


def recipe(language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)```", SPEC, re.DOTALL)
    return block


@pytest.fixture
def mixed(create, kit):
    """An artifact whose manifest holds every sort of value."""
    config = kit.CONFIG | {
        "text": 'é "\\\n\t\x01\U0001f600',
        "numbers": [0.0, -0.0, 1e-5, 1000.0, 0.1, -7, 1 / 3],
        "no": None,
    }
    with create(config=config) as writer:
        return kit.write_layers(writer)


@pytest.mark.skipif(not (shutil.which("jq") and shutil.which("sha256sum")), reason="jq or sha256sum is not installed")
def test_the_shell_recipe_reads_verifies_and_computes_the_id(mixed, kit):
    def run() -> subprocess.CompletedProcess[str]:
        script = "set -eo pipefail\n" + recipe("sh")
        return subprocess.run(["bash", "-c", script], cwd=mixed.path, capture_output=True, text=True)

    result = run()
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == mixed.id
    for name, entry in mixed.files.items():
        assert f"{entry['size']}\t{name}\n" in result.stdout
    mixed.file(kit.LAYERS[1]).write_bytes(b"x")
    result = run()
    assert result.returncode != 0 and kit.LAYERS[1] in result.stdout


def test_the_python_recipe_computes_the_id(mixed):
    out = subprocess.run(
        [sys.executable, "-c", recipe("python")], cwd=mixed.path, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == mixed.id


def test_the_limits_are_those_of_the_code():
    table = SPEC.split("## 10. Limits")[1].split("## 11.")[0]
    assert [int(n) for n in re.findall(r"\| (\d+) \|", table)] == [
        limits.MAX_JSON_BYTES,
        limits.MAX_JSON_DEPTH,
        limits.MAX_INTEGER,
        limits.MAX_FILES,
        limits.MAX_NAME,
        limits.MAX_NAME_PARTS,
        limits.MAX_HEADER_BYTES,
        limits.MAX_RANK,
        limits.MAX_METRICS_LINE,
    ]


def test_version_kinds_names_and_dtypes_are_those_of_the_code():
    from lolcats_formats.tensors import ITEM_BYTES

    assert SPEC.startswith(f"# The artifact directory, version {VERSION}\n") and f"- **{VERSION}**:" in SPEC
    assert re.findall(r"^\| `(\w+)` \| `lolcats \w+` \|", SPEC, re.MULTILINE) == list(KINDS)
    assert f"`{limits._NAME.pattern}`" in SPEC
    assert ", ".join(ITEM_BYTES) in " ".join(SPEC.split())


def test_schemas_agree_with_the_code_and_the_table_of_fields():
    schemas = {file.name.removesuffix(".schema.json"): json.loads(file.read_text()) for file in SCHEMAS.iterdir()}
    assert set(schemas) == {"manifest", "progress", *KINDS}
    manifest = schemas["manifest"]
    table = SPEC.split("## 3. The manifest")[1].split("## 4.")[0]
    assert (
        sorted(manifest["required"])
        == sorted(manifest["properties"])
        == sorted(re.findall(r"^\| `(\w+)`", table, re.M))
    )
    assert manifest["$defs"]["kind"]["enum"] == list(KINDS)
    files = manifest["$defs"]["files"]
    assert files["maxProperties"] == limits.MAX_FILES
    assert files["propertyNames"] == {"maxLength": limits.MAX_NAME, "pattern": f"^{limits._NAME.pattern}$"}
    assert manifest["$defs"]["file"]["properties"]["size"]["maximum"] == limits.MAX_INTEGER
