"""Finds what merge needs from a teacher's folder, without loading its weights. capture checks this before any work."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lolcats_formats import TensorInfo
from lolcats_formats.tensors import read_header
from lolcats_kernels import HybridConfig, HybridMaps
from lolcats_kernels.hf_student import attention_modules, layer_index
from safetensors.torch import save_file
from transformers import PreTrainedModel

from lolcats_cli.errors import BadInput, is_out_of_memory
from lolcats_cli.evaluation import golden_logits
from lolcats_cli.student import export
from lolcats_cli.student.build import check_servable, projections, stated_heads
from lolcats_cli.teacher import identity
from lolcats_cli.teacher.load import auto_class, first_line

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
TRIED = HybridConfig(window=4, feature_dim=2)


@dataclass(frozen=True)
class TeacherFiles:
    """What merge needs from a teacher's folder.

    Attributes:
        classes: the configuration class and the causal-LM class in transformers.
        weights: the tensors by their names in the files.
        places: by the name of a parameter in the model, the name of the tensor in the files that holds it unchanged.
        modules: the names of the attention modules, by layer.
        projections: the names of the attentions' linear layers.
        first_heads: the number of query heads of the first attention, and the size of their queries.
        tied: the parameters that share their values with others.
    """

    folder: Path
    config: dict[str, Any]
    classes: tuple[str, str]
    weights: dict[str, tuple[Path, TensorInfo]]
    places: dict[str, str]
    modules: dict[int, str]
    projections: list[str]
    first_heads: tuple[int, int]
    tied: set[str]

    def dtype(self) -> str:
        """The float dtype that holds most bytes, as torch names it."""
        total = dict.fromkeys(FLOATS.values(), 0)
        for _, info in self.weights.values():
            if info.dtype in FLOATS:
                total[FLOATS[info.dtype]] += info.nbytes
        return max(total, key=lambda name: total[name])

    def check_foldable(self, parameter: str) -> None:
        """Raises BadInput, with the reason, unless an adapter can be folded into that parameter of the model."""
        place = self.places.get(parameter)
        if place is None:
            raise BadInput(
                f"An adapter cannot be folded into {parameter}: the files in {self.folder} lack it, or hold it in "
                f"another layout than {self.classes[1]}."
            )
        if self.weights[place][1].dtype not in FLOATS:
            raise BadInput(
                f"{place} in {self.folder} is stored as {self.weights[place][1].dtype}. An adapter can be folded into "
                "fp32, bf16 or fp16 weights only."
            )
        if parameter in self.tied:
            raise BadInput(f"{parameter} is tied to another weight. Folding an adapter into it would change both.")


def teacher_files(folder: Path) -> TeacherFiles:
    """The files of a teacher's folder. Raises BadInput, with the reason, if the teacher cannot become a student."""
    config = identity.read_config(folder)
    classes = export.teacher_classes(config, str(folder))
    weights = _weights(folder)
    model = _build(folder)
    check_servable(model)
    names = {id(module): name for name, module in model.named_modules()}
    tied = model.all_tied_weights_keys if getattr(model.config.get_text_config(), "tie_word_embeddings", False) else {}
    return TeacherFiles(
        folder,
        config,
        classes,
        weights,
        _places(model, weights),
        {layer_index(module): names[id(module)] for module in attention_modules(model)},
        list(projections(model)),
        stated_heads(model, attention_modules(model)[0]),
        set(tied) | set(tied.values()),
    )


def check_mergeable(folder: Path) -> None:
    """Tries everything that merge will need from a teacher: its classes, an adapter on its projections, its tokenizer,
    and the golden logits with its first block. Reads the weights of that block, the embeddings and the head.

    Raises BadInput with the reason.
    """
    files = teacher_files(folder)
    for name in files.projections:
        files.check_foldable(f"{name}.weight")
    tokenizer_config(folder)
    with tempfile.TemporaryDirectory() as scratch:
        student = Path(scratch) / "student"
        _write_student(files, student)
        golden_logits.try_one_block(student, Path(scratch) / "offloaded")


def tokenizer_config(teacher: Path) -> dict[str, Any] | None:
    """tokenizer_config.json with the class that transformers takes for the teacher; None to leave it as it is.

    transformers finds that class by the model type too, which the student does not share.
    Raises BadInput for a tokenizer that needs code of its own.
    """
    from transformers import AutoTokenizer

    path = teacher / "tokenizer_config.json"
    if not path.is_file():
        return None
    config = identity.read_object(path)
    own = "auto_map" in config
    try:
        name = type(AutoTokenizer.from_pretrained(teacher, trust_remote_code=False)).__name__
    except Exception as error:
        if own:
            raise BadInput(
                f"{path} needs code of its own (auto_map), which a merged folder cannot hold. Save the tokenizer with "
                "one of transformers' own classes first, for instance PreTrainedTokenizerFast."
            ) from error
        return None  # a tokenizer that does not load is copied unchanged
    stated = {key: value for key, value in config.items() if key != "auto_map"}
    return None if not own and config.get("tokenizer_class") == name else {**stated, "tokenizer_class": name}


def _weights(folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """The tensors of a model folder by name, from the files' headers alone."""
    found: dict[str, tuple[Path, TensorInfo]] = {}
    for file in identity.weight_files(folder):
        for name, info in read_header(file, str(file)).items():
            if name in found:
                raise BadInput(
                    f"{file} and {found[name][0]} both hold {name}, so {folder} mixes two models. Download or save the "
                    "model again."
                )
            found[name] = (file, info)
    return found


def _build(folder: Path) -> PreTrainedModel:
    """The teacher without weights."""
    from transformers import AutoConfig

    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model: PreTrainedModel = auto_class(folder).from_config(config, trust_remote_code=False)
            return model
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise BadInput(f"The model in {folder} cannot be built by transformers: {first_line(error)}") from error


def _places(model: PreTrainedModel, weights: dict[str, tuple[Path, TensorInfo]]) -> dict[str, str]:
    """Where the model's parameters lie, those alone that lie there as they are: transformers renames some when it loads
    them, adds the name of the base model before others, and joins or cuts the rest (experts, mostly)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    steps: list[Any] = get_model_conversion_mapping(model)
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    renamings = [step for step in steps if not isinstance(step, WeightConverter)]
    parameters = model.state_dict()
    places = {}
    for name, (_, info) in weights.items():
        parameter, joined = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if parameter not in parameters and name in parameters:
            parameter, joined = name, None
        if joined is None and parameter in parameters and list(parameters[parameter].shape) == list(info.shape):
            places[parameter] = name
    return places


def _write_student(files: TeacherFiles, folder: Path) -> None:
    """A student's folder whose first softmax attention alone has maps, with links to the teacher's weights."""
    folder.mkdir()
    config = export.student_config(
        files.config,
        TRIED.to_dict(),
        attentions=files.modules,
        heads={min(files.modules): files.first_heads},
        dtype=files.dtype(),
    )
    (folder / "config.json").write_text(json.dumps(config))
    first = f"{files.modules[min(files.modules)]}.hybrid."
    maps = {f"{first}{name}": tensor for name, tensor in HybridMaps(TRIED, *files.first_heads).state_dict().items()}
    save_file(maps, folder / "maps.safetensors")
    links = {
        path: f"teacher-{number}.safetensors"
        for number, path in enumerate({path for path, _ in files.weights.values()})
    }
    for path, name in links.items():
        os.symlink(path.resolve(), folder / name)
    places = dict.fromkeys(maps, "maps.safetensors") | {name: links[path] for name, (path, _) in files.weights.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
