"""Loads a merged folder with the installed code. Code in the folder is not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from lolcats_kernels.hf_student import MergedStudent, share_layout
from transformers import PreTrainedModel

from lolcats_cli.errors import BadInput
from lolcats_cli.student.export import student_type, teacher_classes
from lolcats_cli.teacher import identity
from lolcats_cli.teacher.load import LoadOptions, load_model


def load_merged(folder: Path, load: LoadOptions) -> PreTrainedModel:
    """The student in a merged folder. Raises `BadInput` if its configuration is not one that merge writes."""
    return load_model(folder, load, loader=student_class(folder))


def is_saved_again(folder: Path | str) -> bool:
    """Whether a folder holds a student that was saved by `save_pretrained`: it has no manifest, but its configuration
    is a student's."""
    folder = Path(folder)
    if (folder / "manifest.json").exists() or not (folder / "config.json").is_file():
        return False
    config = identity.read_config(folder)
    return "lolcats" in config and str(config.get("model_type")).startswith(student_type(""))


def student_class(folder: Path) -> Any:
    """The class of the student in a merged folder, as the folder's own code would define it. Raises `BadInput`."""
    config = identity.read_config(folder)
    model_type = str(config.get("model_type")).removeprefix(student_type(""))
    if "lolcats" not in config or config["model_type"] != student_type(model_type):
        raise BadInput(f"{folder}/config.json does not describe a merged student. Merge it again.")
    names = teacher_classes(config | {"model_type": model_type}, str(folder))
    config_class, model_class = (getattr(transformers, name) for name in names)
    # transformers makes a dataclass of a configuration.
    own_config = type("LolcatsConfig", (config_class,), {"model_type": config["model_type"], "lolcats": None})
    body: dict[str, Any] = {"config_class": own_config, "__module__": model_class.__module__}
    own_model = type("LolcatsForCausalLM", (MergedStudent, model_class), body)
    share_layout(config["model_type"], model_class, model_type)
    return own_model
