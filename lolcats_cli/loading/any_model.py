"""Loads a model that runs from the path that a command is given: a teacher, a transfer or LoRA artifact, or a merged
folder."""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lolcats_formats import Artifact, holds_artifact
from lolcats_kernels.softmax import AttentionSpec

from lolcats_cli.loading.saved_again import is_saved_again
from lolcats_cli.loading.student import check_on_devices, load_adapter, load_student, teacher_folder
from lolcats_cli.teacher.load import LoadOptions, load_model, load_tokenizer, resolve_folder
from lolcats_cli.teacher.record import LayerInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


NO_NUMBERS = (
    "The model predicts NaN or infinity. Its weights are damaged, or they overflow in this --dtype. Check the folder "
    "with `lolcats verify`, or choose --dtype float32."
)


@dataclass(frozen=True)
class Loaded:
    """A model that runs.

    Attributes:
        kind: "teacher", "transfer", "lora" or "student".
        layers: the softmax attentions that a student's attentions imitate; None for a teacher.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    kind: str
    layers: list[AttentionSpec] | None = None


def listed_files(artifact: Artifact) -> tempfile.TemporaryDirectory[str]:
    """A folder with the artifact's files and no others. Every byte is checked.

    Libraries use everything that lies in a model folder: an adapter beside the weights, a template, code.
    """
    artifact.check_all()
    folder = tempfile.TemporaryDirectory(prefix="lolcats-")
    for name in artifact.files:
        link = Path(folder.name) / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((artifact.path / name).absolute())
    return folder


def load_any(path: str, load: LoadOptions, *, teacher: str | None = None, revision: str | None = None) -> Loaded:
    """Loads the model in `path`. `teacher` replaces the recorded folder of an artifact's teacher.

    Of a student, only the files that its manifest lists are used. Code in its folder is not run.
    """
    if not holds_artifact(path):
        if is_saved_again(path):
            from lolcats_cli.loading.merged import load_merged

            return Loaded(load_merged(Path(path), load), load_tokenizer(Path(path)), "student")
        folder = resolve_folder(path, revision)
        return Loaded(load_model(folder, load), load_tokenizer(folder, load.trust_remote_code), "teacher")
    artifact = Artifact.open(path, ("transfer", "lora", "student"))
    layers = [LayerInfo.from_dict(layer).spec for layer in artifact.teacher["layers"]]
    if artifact.kind == "student":
        from lolcats_cli.loading.merged import load_merged

        listed = listed_files(artifact)
        merged = load_merged(Path(listed.name), replace(load, trust_remote_code=False))
        weakref.finalize(merged, listed.cleanup)  # a device map may leave weights on the disk, to be read later
        return Loaded(merged, load_tokenizer(Path(listed.name)), "student", layers)
    folder = teacher_folder(artifact, teacher)
    model = load_student(artifact, folder, load)
    if artifact.kind == "lora":
        check_on_devices(model, "an adapter can only be added to weights on them. Merge it, and use the merged folder")
        load_adapter(artifact).fold_into(model)
    return Loaded(model, load_tokenizer(folder, load.trust_remote_code), artifact.kind, layers)
