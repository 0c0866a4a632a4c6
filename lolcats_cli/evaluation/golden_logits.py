"""Golden logits: the logits of a merged student for a few prompts. They lie beside its weights, and `verify` computes
them again.

Hashes show that the bytes of a folder are right. Golden logits show that the software and the machine compute the same
model from them. Weights are read module by module from the folder, so a model need not fit into memory.

Shapes: P prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from lolcats_formats import GOLDEN, Artifact
from lolcats_kernels.hf_student import attention_modules
from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.utils.logging import disable_progress_bar

from lolcats_cli.artifacts.disk import check_space
from lolcats_cli.errors import BadInput, LolcatsError
from lolcats_cli.loading.merged import student_class
from lolcats_cli.teacher import identity
from lolcats_cli.teacher.load import first_line, load_tokenizer, model_limit

PROMPTS = (
    "The sea was calm that morning, and nobody on board had slept. The captain counted the boats twice, then again",
    "To linearize a model, replace the softmax of each attention by a product of feature maps, and train these so that",
)
BEYOND = 8  # tokens more than the window holds, so that the linear term has an effect
# The largest accepted error, relative to the standard deviation of the golden logits, by the dtype of the computation.
# Machines round differently, and the differences grow from layer to layer.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}


def golden(folder: Path, scratch: Path) -> dict[str, Tensor]:
    """The golden logits of the student in `folder`: `input_ids` [P, T] and the `logits` [P, V] after the last of them.

    scratch: a folder for converted weights, for models whose modules hold them in another form than their files do.
    Raises BadInput if the logits are NaN or infinite.
    """
    kind = student_class(folder)
    config = kind.config_class.from_pretrained(folder)
    hybrid = config.lolcats["hybrid"]
    length = max(hybrid.get("windows", [hybrid["window"]])) + BEYOND
    length = min(length, model_limit(config) or length)
    prompts = _tokens(folder, config.get_text_config().vocab_size)
    input_ids = torch.tensor([(ids * length)[:length] for ids in prompts])
    logits = _logits(kind, folder, input_ids, scratch)[0]
    if not logits.isfinite().all():
        raise BadInput(
            f"The student in {folder} is not finished, because its logits for two prompts are NaN or infinite. Its "
            "weights overflow, or the training diverged. Train again with a lower --lr."
        )
    return {"input_ids": input_ids, "logits": logits}


def try_one_block(folder: Path, scratch: Path) -> None:
    """Computes logits of the student in `folder` as `golden` does, without the layers behind the first attention.

    Raises BadInput, with the reason, if that cannot be done.
    """
    whole: Any = student_class(folder)

    class FirstBlock(whole):
        config_class, __module__ = whole.config_class, whole.__module__

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            stack, number = _place(self)
            del self.get_submodule(stack)[number + 1 :]
            # The files also hold the weights of the other layers, which is no cause for a warning.
            self._keys_to_ignore_on_load_unexpected |= {r"\.\d+\."}

    length = whole.config_class.from_pretrained(folder).lolcats["hybrid"]["window"] + BEYOND
    try:
        logits, _ = _logits(FirstBlock, folder, torch.ones(1, length, dtype=torch.int64), scratch)
    except Exception as error:
        raise BadInput(f"A student of this teacher cannot be run: {first_line(error)}") from error
    if not logits.isfinite().all():
        raise BadInput("A student of this teacher gives logits that are NaN or infinite after its first layers.")


def check_saved_again(folder: Path) -> dict[str, Any]:
    """What `verify` tells of a student that was saved again. Such a student has no manifest to be compared with.

    Raises BadInput if weights are missing, or if its logits are NaN or infinite.
    """
    files = identity.weight_files(folder)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            golden(folder, Path(scratch))
        except LolcatsError:
            raise
        except Exception as problem:
            raise BadInput(f"The student in {folder} cannot be run here: {first_line(problem)}") from problem
    return {"kind": "student", "files": len(files), "bytes": sum(file.stat().st_size for file in files)}


def check(artifact: Artifact) -> float:
    """The error of the logits that a student computes here, relative to the standard deviation of its golden ones.

    Raises BadInput if rounding does not explain the error, or if the golden file does not hold golden logits.
    """
    found = artifact.load(GOLDEN)
    where = artifact.path / GOLDEN
    input_ids, expected = _checked(found, where)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            logits, dtype = _logits(student_class(artifact.path), artifact.path, input_ids, Path(scratch))
    except Exception as problem:
        if isinstance(problem, LolcatsError):
            raise
        raise BadInput(f"The student in {artifact.path} cannot be run here: {first_line(problem)}") from problem
    if logits.shape != expected.shape:
        raise BadInput(
            f"{where} is for a vocabulary of {expected.shape[1]} tokens, and the student has {logits.shape[1]}. Copy "
            "the artifact again, or merge it again."
        )
    error = ((logits - expected).square().mean().sqrt() / expected.std()).item()
    tolerance = TOLERANCE[dtype]
    if not error <= tolerance:  # NaN is an error too
        import transformers

        raise BadInput(
            f"The student in {artifact.path} computes other logits than when it was merged. They differ from those in "
            f"{GOLDEN} by {error:.2g} of their standard deviation, and rounding explains at most {tolerance:g}. Its "
            f"files are intact, so torch {torch.__version__}, transformers {transformers.__version__} or this machine "
            f"computes something else than {artifact.manifest['created']['tool']} did. Try the versions it was merged "
            "with."
        )
    return error


def _tokens(folder: Path, vocabulary: int) -> list[list[int]]:
    """The tokens of the prompts: those of the student's tokenizer, or bytes if it has none."""
    if not (folder / "tokenizer_config.json").is_file():
        return [[byte % vocabulary for byte in prompt.encode()] for prompt in PROMPTS]
    tokenizer = load_tokenizer(folder)
    return [tokenizer(prompt)["input_ids"] or [0] for prompt in PROMPTS]


@torch.no_grad()
def _logits(kind: Any, folder: Path, input_ids: Tensor, scratch: Path) -> tuple[Tensor, torch.dtype]:
    """The logits after the last token [P, V], in fp32, computed on the CPU; and the dtype of the computation.

    Weights are mapped from their files. Where modules hold them in another form, as experts do, the layers are
    converted on the disk, and stay there until they are run.
    """
    disable_progress_bar()
    steps = get_checkpoint_conversion_mapping(kind.config_class.model_type) or ()
    if any(isinstance(step, WeightConverter) for step in steps):
        model = _offloaded(kind, folder, scratch)
    else:
        model = kind.from_pretrained(folder, dtype="auto")
    out = model.eval()(input_ids, use_cache=False).logits[:, -1]
    return out.float().contiguous(), out.dtype


def _offloaded(kind: Any, folder: Path, scratch: Path) -> Any:
    """A student whose layers lie on the disk. The modules around them are loaded, because the code of some models asks
    for the device of the embeddings."""
    with torch.device("meta"):
        stack, _ = _place(skeleton := kind(kind.config_class.from_pretrained(folder)))
    size = sum(file.stat().st_size for file in identity.weight_files(folder))
    check_space(size, scratch, "The weights of experts are converted there for a while. Set TMPDIR to a larger disk.")
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)  # weights stay on the disk on purpose
    try:
        return kind.from_pretrained(folder, dtype="auto", device_map=_devices(skeleton, stack), offload_folder=scratch)
    finally:
        logger.setLevel(level)


def _place(model: nn.Module) -> tuple[str, int]:
    """The place of a model's first attention: the name of the list of layers, and the number of the layer in it."""
    first = attention_modules(model)[0]
    name = next(name for name, module in model.named_modules() if module is first)
    parts = name.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[:number]), int(parts[number])


def _devices(model: nn.Module, stack: str) -> dict[str, str]:
    """The device map of a model: the layers in `stack` stay on the disk, the others in memory."""
    found = {f"{stack}.{name}": "disk" for name, _ in model.get_submodule(stack).named_children()}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, _ in tensors:
        if not name.startswith(f"{stack}."):
            part = name.rpartition(".")[0]
            found[name if f"{stack}.".startswith(f"{part}.") or not part else part] = "cpu"
    return found


def _checked(found: dict[str, Tensor], where: Path) -> tuple[Tensor, Tensor]:
    """(input_ids, logits). Raises BadInput unless they have the form that `golden` gives them."""
    message = (
        f"{where} does not hold input_ids [prompts, tokens] and logits [prompts, vocabulary]. Copy the artifact again, "
        "or merge it again."
    )
    if set(found) != {"input_ids", "logits"}:
        raise BadInput(message)
    input_ids, logits = found["input_ids"], found["logits"]
    if (
        (input_ids.dtype, logits.dtype) != (torch.int64, torch.float32)
        or not input_ids.ndim == logits.ndim == 2
        or len(input_ids) != len(logits)
        or 0 in (*input_ids.shape, *logits.shape)
        or not 0 <= input_ids.min() <= input_ids.max() < logits.shape[1]
    ):
        raise BadInput(message)
    return input_ids, logits
