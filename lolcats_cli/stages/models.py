"""From whatever a command is given to a model that runs: a teacher, a transfer or LoRA artifact, or a merged folder."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lolcats_formats import Artifact
from lolcats_kernels import HybridConfig
from lolcats_kernels.softmax import AttentionSpec
from torch import Tensor

from lolcats_cli.errors import BadInput, UsageError
from lolcats_cli.student.build import linearize
from lolcats_cli.student.fold import CONFIG_FILE, WEIGHTS_FILE, Adapter
from lolcats_cli.teacher import identity
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
    folder = resolve_folder(override or str(identity.recorded_folder(artifact.teacher, artifact.path)))
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


def load_adapter(artifact: Artifact) -> Adapter:
    """The adapter of a LoRA artifact, its bytes checked. Raises `BadInput` if it cannot be folded."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        artifact.check(f"adapter/{name}")
    return Adapter(artifact.path / "adapter")


def listed_files(artifact: Artifact) -> tempfile.TemporaryDirectory:
    """A folder with the artifact's files and no others, every byte checked.

    Libraries use what lies in a model folder: an adapter beside the weights, a template, code.
    """
    artifact.check_all()
    folder = tempfile.TemporaryDirectory(prefix="lolcats-")
    for name in artifact.files:
        link = Path(folder.name) / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((artifact.path / name).absolute())
    return folder


def load_student(artifact: Artifact, folder: Path, load: LoadOptions) -> PreTrainedModel:
    """The teacher in `folder` with the artifact's hybrid attentions (and without its adapter, if it has one)."""
    layers = {i: maps_file(i) for i in range(len(artifact.teacher["layers"])) if maps_file(i) in artifact.files}
    maps = {layer: artifact.load(name) for layer, name in layers.items()}
    for layer, tensors in maps.items():
        check_finite(artifact.path / layers[layer], tensors)
    return linearize(load_model(folder, load), HybridConfig(**artifact.config["hybrid"]), maps, kept_layers(artifact))


def check_on_devices(model: PreTrainedModel, reason: str) -> None:
    """Raise `UsageError`, with the reason, if a device map leaves weights on the CPU or disk until they are used."""
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise UsageError(f"--device-map leaves {name} off the devices that compute, and {reason}.")


def load_any(path: str, load: LoadOptions, *, teacher: str | None = None, revision: str | None = None) -> Loaded:
    """Load what `path` is. `teacher` replaces the recorded folder of an artifact's teacher.

    Of a student, only the files that its manifest lists are used, and no code that it brings along is run.
    """
    if not any((Path(path) / name).is_file() for name in ("manifest.json", "progress.json")):
        folder = resolve_folder(path, revision)
        return Loaded(load_model(folder, load), load_tokenizer(folder, load.trust_remote_code), "teacher")
    artifact = Artifact.open(path, ("transfer", "lora", "student"))
    layers = [LayerInfo.from_dict(layer).spec for layer in artifact.teacher["layers"]]
    if artifact.kind == "student":
        from lolcats_cli.student.merged import load_merged

        listed = listed_files(artifact)
        merged = load_merged(Path(listed.name), replace(load, trust_remote_code=False))
        weakref.finalize(merged, listed.cleanup)  # a device map may leave weights on the disk, to be read later
        return Loaded(merged, load_tokenizer(Path(listed.name)), "student", layers)
    folder = teacher_folder(artifact, teacher)
    model = load_student(artifact, folder, load)
    if artifact.kind == "lora":
        check_on_devices(model, "an adapter is added to weights that stay. Merge it, and take the merged folder")
        load_adapter(artifact).fold_into(model)
    return Loaded(model, load_tokenizer(folder, load.trust_remote_code), artifact.kind, layers)
