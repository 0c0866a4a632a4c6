"""merge: writes a student as a Hugging Face model folder that loads wherever torch and transformers are installed.

The folder is an artifact of kind "student". It holds the teacher's weights with the adapter folded in, the feature maps
(`…self_attn.hybrid.*`, fp32), the code that computes them, configuration, tokenizer, model card and manifest.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lolcats_formats import GOLDEN, Artifact, ArtifactWriter
from lolcats_formats.place import Resume
from lolcats_kernels import HybridConfig, HybridMaps
from safetensors import safe_open
from torch import Tensor

from lolcats_cli import ranks, stopping
from lolcats_cli.artifacts.disk import check_space, human
from lolcats_cli.artifacts.history import figures, history, layer_figures, transfer_summary
from lolcats_cli.artifacts.maps import hybrid_configs, hybrid_entry, kept_config, kept_layers, maps_file, recorded_heads
from lolcats_cli.errors import IdentityMismatch, UsageError
from lolcats_cli.evaluation import golden_logits
from lolcats_cli.loading.student import check_finite, load_adapter, teacher_folder
from lolcats_cli.progress import Progress
from lolcats_cli.stages.mergeable import TeacherFiles, teacher_files, tokenizer_config
from lolcats_cli.stages.writing import Making, check_config, make_artifact
from lolcats_cli.student import export
from lolcats_cli.student.fold import Adapter
from lolcats_cli.student.memory import cache_bytes, student_bytes
from lolcats_cli.teacher import identity
from lolcats_cli.teacher.load import DTYPES

MAX_SHARD_BYTES = 5_000_000_000
CONTEXT = 32768  # tokens of the memory that the model card tells
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
    """Writes the student of a LoRA or transfer artifact as a model folder. Running it again resumes.

    One output shard is in memory at a time. Weights that the adapter does not change keep their bytes.

    Args:
        source: the artifact, of kind lora or transfer.
        output: the folder to write.
        teacher: the teacher's folder, if it has moved. Its identity is checked.
        max_shard_bytes: the largest size of a weights file. A tensor is never cut, so a file may be larger.
        resume, force: what to do with an artifact that `output` holds, see `ArtifactWriter.create`.

    Raises:
        BadInput: the teacher, the adapter or the artifact cannot be merged. The error names it.
        IdentityMismatch: the teacher is another one, or the maps do not fit it.
        NotEnoughSpace: the disk has too little space.
        FormatError: `source` is no such artifact or is damaged, or `output` holds something else.
    """
    ranks.check_alone("merge")
    if max_shard_bytes < 1:
        raise UsageError(f"--max-shard-size is {max_shard_bytes} bytes. It must be at least 1.")
    artifact = Artifact.open(source, kind=("lora", "transfer"))
    config = {"hybrid": hybrid_entry(artifact), "max_shard_bytes": max_shard_bytes, **kept_config(artifact)}
    check_config(output, "student", config, force=force)
    plan = _plan(artifact, teacher_folder(artifact, None if teacher is None else str(teacher)))
    fields = {
        "config": config,
        "teacher": {**artifact.teacher, "path": str(plan.teacher.folder)},
        "data": artifact.data,
        "parents": [artifact],
    }

    def work(making: Making) -> dict[str, Any]:
        progress.note(f"merge will write {len(plan.sizes)} tensors, {human(sum(plan.sizes.values()))}, to {output}")
        shards = plan_shards(plan.sizes, max_shard_bytes)
        _write_weights(making.writer, plan, shards, progress)
        _write_model_files(making.writer, plan, artifact)
        if not making.writer.has(GOLDEN):
            progress.note("merge computes the student's logits for two prompts, with which verify compares later")
            logits = golden_logits.golden(making.writer.path, making.writer.scratch / "golden")
            making.writer.save(GOLDEN, logits)
        return {
            "tensors": len(plan.sizes),
            "bytes": sum(plan.sizes.values()),
            "shards": len(shards),
            "folded": len(plan.folded),
        }

    return make_artifact(output, "student", fields, work, resume=resume, force=force, progress=progress)


def _write_weights(writer: ArtifactWriter, plan: _Plan, shards: dict[str, list[str]], progress: Progress) -> None:
    """Writes the files of weights that are missing, and their index."""
    needed = sum(plan.sizes[name] for file in shards if not writer.has(file) for name in shards[file])
    check_space(needed, writer.path, "Free some space, or merge to another disk.")
    with progress.task("merge", len(shards), "files") as advance:
        for file, names in shards.items():
            if not writer.has(file):
                with stopping.deferred():
                    writer.save(file, plan.load(names), {"format": "pt"})
                stopping.check()
            advance(1)
    # The index is written for a single file too. Without it, servers take every safetensors file for weights, also the
    # golden logits.
    index = {
        "metadata": {"total_size": sum(plan.sizes.values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    writer.write_json("model.safetensors.index.json", index)


@dataclass(frozen=True)
class _Plan:
    """What a merge will write. It is made before anything is written."""

    teacher: TeacherFiles
    hybrid: dict[str, Any]  # the student's hybrid attention, as `layer_config` takes it
    heads: dict[int, tuple[int, int]]  # of the layers with maps
    adapter: Adapter | None
    folded: dict[str, str]  # a tensor that the adapter changes, as the files and as the model call it
    maps: dict[str, tuple[Artifact, str, str]]  # tensor name -> artifact, file and name there
    sizes: dict[str, int]  # bytes of every output tensor, in the order of writing

    def load(self, names: list[str]) -> dict[str, Tensor]:
        """These tensors of the output, with the adapter folded in."""
        tensors = {}
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            for name in names:
                if name in self.maps:
                    artifact, file, key = self.maps[name]
                    tensors[name] = artifact.load(file, [key])[key].float().contiguous()
                    check_finite(artifact.path / file, {key: tensors[name]})
                    continue
                path = self.teacher.weights[name][0]
                if path not in files:
                    files[path] = stack.enter_context(safe_open(path, framework="pt"))
                tensors[name] = files[path].get_tensor(name)
                if name in self.folded:
                    assert self.adapter is not None
                    tensors[name] = self.adapter.fold(self.folded[name], tensors[name])
        return tensors


def _plan(artifact: Artifact, folder: Path) -> _Plan:
    teacher = teacher_files(folder)
    kept = kept_layers(artifact)
    layers = [layer for layer in teacher.modules if layer not in kept]
    heads = recorded_heads(artifact, layers)
    maps = _map_tensors(artifact, teacher.modules, heads, hybrid_configs(artifact, layers))
    adapter = load_adapter(artifact) if artifact.kind == "lora" else None
    folded = {}
    for name in sorted(adapter.weights if adapter else ()):
        teacher.check_foldable(name)
        folded[teacher.places[name]] = name
    sizes = {name: info.nbytes for name, (_, info) in teacher.weights.items()}
    sizes |= {name: artifact.header(file)[key].nbytes for name, (_, file, key) in maps.items()}
    return _Plan(teacher, hybrid_entry(artifact), heads, adapter, folded, maps, sizes)


def plan_shards(sizes: dict[str, int], max_bytes: int) -> dict[str, list[str]]:
    """By file name, the names of its tensors, in order. A file has at most `max_bytes`, or one larger tensor."""
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


def _map_tensors(
    artifact: Artifact,
    modules: dict[int, str],
    heads: dict[int, tuple[int, int]],
    hybrids: dict[int, HybridConfig],
) -> dict[str, tuple[Artifact, str, str]]:
    """The origin of every tensor of the maps: artifact, file and name.

    Raises IdentityMismatch unless there are maps for the layers of `heads`, and for no others.
    """
    found: dict[str, tuple[Artifact, str, str]] = {}
    for layer in heads:
        module, file = modules[layer], maps_file(layer)
        if file not in artifact.files:
            raise IdentityMismatch(
                f"{artifact.path} has no maps for layer {layer} of {len(modules)}. Transfer the missing layers."
            )
        header = {name: tuple(info.shape) for name, info in artifact.header(file).items()}
        fresh = HybridMaps(hybrids[layer], *heads[layer]).state_dict()
        wanted = {name: tuple(tensor.shape) for name, tensor in fresh.items()}
        if header != wanted:
            raise IdentityMismatch(f"The maps of layer {layer} are {header}. The teacher and options need {wanted}.")
        found |= {f"{module}.hybrid.{name}": (artifact, file, name) for name in wanted}
    extra = {name for name in artifact.files if name.startswith("maps/")} - {maps_file(layer) for layer in heads}
    if extra:
        raise IdentityMismatch(f"{artifact.path} holds {min(extra)}, but its student keeps softmax in that layer.")
    return found


def _write_model_files(writer: ArtifactWriter, plan: _Plan, artifact: Artifact) -> None:
    """Writes all files except the weights."""
    folder = plan.teacher.folder
    config = export.student_config(
        plan.teacher.config,
        plan.hybrid,
        attentions=plan.teacher.modules,
        heads=plan.heads,
        dtype=plan.teacher.dtype(),
    )
    writer.write_json("config.json", config)
    generation = folder / "generation_config.json"
    if generation.is_file():
        writer.write_json("generation_config.json", export.generation_config(identity.read_object(generation)))
    for name, text in export.code_files(*plan.teacher.classes, plan.teacher.config["model_type"]).items():
        writer.write_text(name, text)
    copied = identity.tokenizer_files(folder)
    copied += sorted(path.name for path in folder.iterdir() if LICENCE_FILES.match(path.name) and path.is_file())
    tokenizer = tokenizer_config(folder)
    for name in copied:
        if name == "tokenizer_config.json" and tokenizer is not None:
            writer.write_json(name, tokenizer)
        else:
            writer.copy(name, folder / name)
    writer.write_text("README.md", _card(plan, artifact, "tokenizer_config.json" in copied))


def _card(plan: _Plan, artifact: Artifact, has_tokenizer: bool) -> str:
    """The model card, with the figures of the ancestors that can be found."""
    steps = history(artifact)
    layers, kept = artifact.teacher["layers"], kept_layers(artifact)
    itemsize = DTYPES[plan.teacher.dtype()].itemsize
    return export.model_card(
        teacher=artifact.teacher,
        hybrid=plan.hybrid,
        kept=kept,
        lineage=[(step.kind, step.id) for step in steps],
        figures=[(figure.stage, figure.name, figure.value) for figure in figures(steps)],
        layers=layer_figures(transfer_summary(steps)),
        memory=(
            human(student_bytes(layers, plan.hybrid, kept, CONTEXT, itemsize, on_gpu=True)),
            human(cache_bytes(layers, CONTEXT, itemsize)),
        ),
        has_tokenizer=has_tokenizer,
    )
