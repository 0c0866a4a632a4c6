"""merge: a student as a Hugging Face model folder that loads wherever torch and transformers are.

The folder is an artifact of kind "student": the teacher's weights with the adapter folded in, the feature maps beside
them (`…self_attn.hybrid.*`, fp32), the code that computes them, configuration, tokenizer, model card, manifest.
"""

from __future__ import annotations

import re
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lolcats_formats import GOLDEN, Artifact, ArtifactWriter, FormatError, TensorInfo
from lolcats_formats.tensors import read_header
from lolcats_formats.writer import Resume
from lolcats_kernels.maps import HybridConfig, HybridMaps
from safetensors import safe_open
from torch import Tensor

from lolcats_cli import __version__, stopping
from lolcats_cli.errors import BadInput, IdentityMismatch, LolcatsError, UsageError, is_out_of_memory
from lolcats_cli.progress import Progress
from lolcats_cli.stages import golden
from lolcats_cli.stages.disk import check_space, human
from lolcats_cli.stages.models import (
    check_finite,
    kept_config,
    kept_layers,
    load_adapter,
    maps_file,
    teacher_folder,
)
from lolcats_cli.student import export
from lolcats_cli.student.build import check_servable, model_heads
from lolcats_cli.student.fold import Adapter
from lolcats_cli.student.mixin import attention_modules
from lolcats_cli.teacher import identity
from lolcats_cli.teacher.load import first_line

MAX_SHARD_BYTES = 5_000_000_000
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
LICENCE_FILES = re.compile(r"(?i)^(licen[cs]e|notice|use_policy)(\.(txt|md))?$")


def merge(
    source: Path | str,
    output: Path | str,
    *,
    teacher: Path | str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    resume: Resume = "auto",
    force: bool = False,
    progress: Progress = Progress(),
) -> Artifact:
    """Write the student of a LoRA or transfer artifact as a model folder. Running it again resumes.

    One output shard is in memory at a time. Weights that the adapter does not touch keep their bytes.

    Args:
        source: the artifact, of kind lora or transfer.
        output: the folder to write.
        teacher: the teacher's folder, if it is not where the artifact says; its identity is checked.
        max_shard_bytes: size of a weights file, but one tensor is never cut.
        resume, force: what to do with an artifact that `output` holds, see `ArtifactWriter.create`.

    Raises:
        BadInput: a teacher, adapter or artifact that cannot be merged, by name.
        IdentityMismatch: another teacher, or maps that do not fit it.
        NotEnoughSpace: the disk lacks the bytes.
        FormatError: `source` is no such artifact, or is damaged; `output` holds something else.
    """
    if max_shard_bytes < 1:
        raise UsageError(f"--max-shard-size is {max_shard_bytes} bytes; it must be at least 1.")
    artifact = Artifact.open(source, kind=("lora", "transfer"))
    plan = _plan(artifact, teacher_folder(artifact, None if teacher is None else str(teacher)))
    progress.note(f"merge will write {len(plan.sizes)} tensors, {human(sum(plan.sizes.values()))}, to {output}")
    with ArtifactWriter.create(
        output,
        "student",
        config={"hybrid": asdict(plan.hybrid), "max_shard_bytes": max_shard_bytes, **kept_config(artifact)},
        teacher={**artifact.teacher, "path": str(plan.teacher)},
        data=artifact.data,
        parents=[artifact],
        tool=f"lolcats {__version__}",
        resume=resume,
        force=force,
    ) as writer:
        if writer.finished:
            progress.note(f"{output} is finished already")
            return writer.finished
        shards = plan_shards(plan.sizes, max_shard_bytes)
        needed = sum(plan.sizes[name] for file in shards if not writer.has(file) for name in shards[file])
        check_space(needed, output, "Free some, or merge to another disk.")
        with progress.task("merge", len(shards), "files") as advance:
            for file, names in shards.items():
                if not writer.has(file):
                    with stopping.deferred():
                        writer.save(file, plan.load(names), {"format": "pt"})
                    stopping.check()
                advance(1)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(plan.sizes.values())},
                "weight_map": {name: file for file, names in shards.items() for name in names},
            }
            writer.write_json("model.safetensors.index.json", index)
        _write_model_files(writer, plan, artifact)
        if not writer.has(GOLDEN):
            progress.note("merge runs the student over two prompts, for its golden logits")
            writer.save(GOLDEN, golden.golden(writer.path, writer.scratch / "golden"))
        return writer.finish(
            {
                "tensors": len(plan.sizes),
                "bytes": sum(plan.sizes.values()),
                "shards": len(shards),
                "folded": len(plan.adapter.modules) if plan.adapter else 0,
            }
        )


@dataclass(frozen=True)
class _Plan:
    """What a merge will write, worked out before anything is written."""

    teacher: Path
    config: dict[str, Any]
    classes: tuple[str, str]
    hybrid: HybridConfig
    num_heads: int
    head_dim: int
    layers: list[int]  # with maps
    weights: dict[str, tuple[Path, TensorInfo]]  # the teacher's tensors, file by file
    adapter: Adapter | None
    maps: dict[str, tuple[Artifact, str, str]]  # tensor name -> artifact, file and name there
    sizes: dict[str, int]  # bytes of every output tensor, in the order of writing

    def load(self, names: list[str]) -> dict[str, Tensor]:
        """These tensors of the output, the adapter folded in."""
        tensors = {}
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            for name in names:
                if name in self.maps:
                    artifact, file, key = self.maps[name]
                    tensors[name] = artifact.load(file, [key])[key].float().contiguous()
                    check_finite(artifact.path / file, {key: tensors[name]})
                    continue
                path = self.weights[name][0]
                if path not in files:
                    files[path] = stack.enter_context(safe_open(path, framework="pt"))
                tensors[name] = files[path].get_tensor(name)
                if self.adapter and name in self.adapter.weights:
                    tensors[name] = self.adapter.fold(name, tensors[name])
        return tensors


def _plan(artifact: Artifact, folder: Path) -> _Plan:
    config = identity.read_config(folder)
    classes = export.teacher_classes(config, str(folder))
    hybrid = HybridConfig(**artifact.config["hybrid"])
    weights = _weights(folder)
    modules, num_heads, head_dim, tied = _structure(folder)
    kept = kept_layers(artifact)
    layers = [layer for layer in range(len(modules)) if layer not in kept]
    maps = _map_tensors(artifact, modules, layers, HybridMaps(hybrid, num_heads, head_dim))
    adapter = load_adapter(artifact) if artifact.kind == "lora" else None
    for name in sorted(adapter.weights if adapter else ()):
        if name not in weights:
            raise BadInput(f"The adapter changes {name}, which the teacher's weights in {folder} do not hold.")
        if name in tied:
            raise BadInput(f"The adapter changes {name}, which is tied to another weight; folding would change both.")
    elements = HybridMaps(hybrid, num_heads, head_dim).state_dict()
    sizes = {name: info.nbytes for name, (_, info) in weights.items()}
    sizes |= {name: elements[key].numel() * 4 for name, (_, _, key) in maps.items()}
    return _Plan(folder, config, classes, hybrid, num_heads, head_dim, layers, weights, adapter, maps, sizes)


def _weights(folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """The tensors of a model folder by name, from the files' headers alone."""
    found: dict[str, tuple[Path, TensorInfo]] = {}
    for file in identity.weight_files(folder):
        for name, info in read_header(file, str(file)).items():
            if name in found:
                raise BadInput(f"{file} and {found[name][0]} both hold {name}: {folder} mixes two models.")
            found[name] = (file, info)
    return found


def _main_dtype(weights: dict[str, tuple[Path, TensorInfo]]) -> str:
    """The float dtype that holds most bytes, as torch names it."""
    total: Counter[str] = Counter()
    for _, info in weights.values():
        if info.dtype in FLOATS:
            total[FLOATS[info.dtype]] += info.nbytes
    return total.most_common(1)[0][0] if total else "float32"


def plan_shards(sizes: dict[str, int], max_bytes: int) -> dict[str, list[str]]:
    """File name -> tensor names, in order, each file of at most `max_bytes` unless one tensor alone is larger."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _structure(folder: Path) -> tuple[list[str], int, int, set[str]]:
    """(attention modules' names by layer, query heads, head size, names of tied weights); no weights are loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        check_servable(model)
        names = {id(module): name for name, module in model.named_modules()}
        modules = [names[id(module)] for module in attention_modules(model)]
    except Exception as error:
        if isinstance(error, LolcatsError) or is_out_of_memory(error):
            raise
        raise BadInput(f"transformers cannot build the model in {folder}: {first_line(error)}") from error
    tied = model.all_tied_weights_keys if model.config.get_text_config().tie_word_embeddings else {}
    return modules, *model_heads(model), set(tied) | set(tied.values())


def _map_tensors(
    artifact: Artifact, modules: list[str], layers: list[int], like: HybridMaps
) -> dict[str, tuple[Artifact, str, str]]:
    """Where every tensor of the maps comes from. Raises IdentityMismatch unless they are there for `layers` alone."""
    found: dict[str, tuple[Artifact, str, str]] = {}
    for layer in layers:
        module, file = modules[layer], maps_file(layer)
        if file not in artifact.files:
            raise IdentityMismatch(
                f"{artifact.path} has no maps for layer {layer} of {len(modules)}: transfer the missing layers."
            )
        header = {name: tuple(info.shape) for name, info in artifact.header(file).items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in like.state_dict().items()}
        if header != wanted:
            raise IdentityMismatch(f"The maps of layer {layer} are {header}; the teacher and options need {wanted}.")
        found |= {f"{module}.hybrid.{name}": (artifact, file, name) for name in wanted}
    extra = {name for name in artifact.files if name.startswith("maps/")} - {maps_file(layer) for layer in layers}
    if extra:
        raise IdentityMismatch(f"{artifact.path} holds {min(extra)}, of a layer that the student has no maps for.")
    return found


def _write_model_files(writer: ArtifactWriter, plan: _Plan, artifact: Artifact) -> None:
    """Everything but the weights."""
    config = export.student_config(
        plan.config,
        asdict(plan.hybrid),
        layers=plan.layers,
        num_heads=plan.num_heads,
        head_dim=plan.head_dim,
        dtype=_main_dtype(plan.weights),
    )
    writer.write_json("config.json", config)
    generation = plan.teacher / "generation_config.json"
    if generation.is_file():
        writer.write_json("generation_config.json", export.generation_config(identity.read_object(generation)))
    for name, text in export.code_files(*plan.classes, plan.config["model_type"]).items():
        writer.write_text(name, text)
    copied = identity.tokenizer_files(plan.teacher)
    copied += sorted(path.name for path in plan.teacher.iterdir() if LICENCE_FILES.match(path.name) and path.is_file())
    tokenizer = _tokenizer_config(plan.teacher)
    for name in copied:
        if name == "tokenizer_config.json" and tokenizer is not None:
            writer.write_json(name, tokenizer)
        else:
            writer.copy(name, plan.teacher / name)
    card = export.model_card(
        teacher=artifact.teacher,
        hybrid=plan.hybrid,
        kept=kept_layers(artifact),
        lineage=_lineage(artifact),
        has_tokenizer="tokenizer_config.json" in copied,
    )
    writer.write_text("README.md", card)


def _tokenizer_config(teacher: Path) -> dict[str, Any] | None:
    """tokenizer_config.json with the class that transformers takes for the teacher; None to leave it as it is.

    transformers finds that class by the model type too, which the student does not share.
    """
    from transformers import AutoTokenizer

    path = teacher / "tokenizer_config.json"
    if not path.is_file():
        return None
    config = identity.read_object(path)
    if "auto_map" in config:
        raise BadInput(f"{path} brings code of its own (auto_map), which a merged folder cannot carry yet.")
    try:
        name = type(AutoTokenizer.from_pretrained(teacher)).__name__
    except Exception:  # a broken tokenizer is the teacher's own matter, and is copied as it is
        return None
    return None if config.get("tokenizer_class") == name else {**config, "tokenizer_class": name}


def _lineage(artifact: Artifact) -> list[dict[str, Any]]:
    """The source and all it was made from, nearest first; figures of those that still lie where they were."""
    steps = [{"kind": artifact.kind, "id": artifact.id, "summary": artifact.summary}]
    todo = list(artifact.parents)
    while todo:
        parent = todo.pop(0)
        step = {"kind": parent["kind"], "id": parent["id"]}
        with suppress(FormatError):
            ancestor = artifact.ancestor(parent["kind"])
            if ancestor.id == parent["id"]:
                step["summary"] = ancestor.summary
        steps.append(step)
        todo += parent["parents"]
    return steps
