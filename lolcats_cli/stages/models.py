"""From whatever a command is given to a model that runs: a teacher, a transfer or LoRA artifact, or a merged folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lolcats_formats import Artifact
from lolcats_kernels import HybridConfig
from torch import Tensor

from lolcats_cli.errors import BadInput
from lolcats_cli.student.build import linearize
from lolcats_cli.teacher import identity
from lolcats_cli.teacher.attention import AttentionSpec
from lolcats_cli.teacher.load import LoadOptions, load_model, load_tokenizer, resolve_folder
from lolcats_cli.teacher.record import LayerInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Loaded:
    """A model that runs.

    Attributes:
        kind: "teacher", "transfer", "lora" or "student".
        layers: a student's softmax attentions, those that its own imitate; None for a teacher.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    kind: str
    layers: list[AttentionSpec] | None = None


def teacher_folder(artifact: Artifact, override: str | None = None) -> Path:
    """The folder of the artifact's teacher, checked to be the one that was captured.

    Raises `BadInput` if it is not there, `IdentityMismatch` if it holds another model.
    """
    recorded = artifact.teacher["path"]
    if override is None and not Path(recorded).is_dir():
        raise BadInput(f"The teacher of {artifact.path} is no longer at {recorded}. Pass its folder with --teacher.")
    folder = resolve_folder(override or recorded)
    identity.check(artifact.teacher, folder)
    return folder


def maps_file(layer: int) -> str:
    """Where an artifact keeps a layer's maps."""
    return f"maps/layer-{layer:03d}.safetensors"


def kept_layers(artifact: Artifact) -> list[int]:
    """The layers that a transfer, and all that is made from it, leaves softmax."""
    return artifact.config.get("keep_softmax", [])


def kept_config(artifact: Artifact) -> dict[str, list[int]]:
    """The entry of a configuration that says so; empty if there are none."""
    kept = kept_layers(artifact)
    return {"keep_softmax": kept} if kept else {}


def check_finite(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise `BadInput`, naming the tensor, for maps with NaN or infinity in them."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise BadInput(f"{file}: {name} holds NaN or infinity. Train the layer again, with a lower --lr.")


def load_student(artifact: Artifact, folder: Path, load: LoadOptions) -> PreTrainedModel:
    """The teacher in `folder` with the artifact's hybrid attentions (and without its adapter, if it has one)."""
    layers = {i: maps_file(i) for i in range(len(artifact.teacher["layers"])) if maps_file(i) in artifact.files}
    maps = {layer: artifact.load(name) for layer, name in layers.items()}
    for layer, tensors in maps.items():
        check_finite(artifact.path / layers[layer], tensors)
    return linearize(load_model(folder, load), HybridConfig(**artifact.config["hybrid"]), maps, kept_layers(artifact))


def load_any(path: str, load: LoadOptions, *, teacher: str | None = None, revision: str | None = None) -> Loaded:
    """Load what `path` is. `teacher` replaces the recorded folder of an artifact's teacher."""
    if not any((Path(path) / name).is_file() for name in ("manifest.json", "progress.json")):
        folder = resolve_folder(path, revision)
        return Loaded(load_model(folder, load), load_tokenizer(folder, load.trust_remote_code), "teacher")
    artifact = Artifact.open(path, ("transfer", "lora", "student"))
    layers = [LayerInfo.from_dict(layer).spec for layer in artifact.teacher["layers"]]
    if artifact.kind == "student":
        from lolcats_cli.student.merged import load_merged

        return Loaded(load_merged(artifact.path, load), load_tokenizer(artifact.path), "student", layers)
    folder = teacher_folder(artifact, teacher)
    model = load_student(artifact, folder, load)
    if artifact.kind == "lora":
        from peft import PeftModel

        artifact.verify()
        model = PeftModel.from_pretrained(model, artifact.path / "adapter").merge_and_unload()
    return Loaded(model, load_tokenizer(folder, load.trust_remote_code), artifact.kind, layers)
