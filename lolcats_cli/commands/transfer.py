"""lolcats transfer"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import typer
from lolcats_formats import Artifact

from lolcats_cli.commands import _checks as checks
from lolcats_cli.commands import _options as o
from lolcats_cli.errors import UsageError
from lolcats_cli.stages.asked import Asked


def transfer(
    capture: o.ArtifactIn,
    output: o.Output,
    recipe: Annotated[
        Literal["best", "lolcats"],
        typer.Option(
            help="Defaults of --feature-dim, --linear-factor, --decay, --gamma, --grad-accum, --lr and --eval-steps; "
            "lolcats: the paper's."
        ),
    ] = "best",
    feature_map: Annotated[Literal["hedgehog", "t2r", "elu"], typer.Option(help="The feature map.")] = "hedgehog",
    feature_dim: Annotated[
        int | None,
        typer.Option(min=1, help="Its size; Hedgehog gives twice as many features: 64, or half a head's (lolcats)."),
    ] = None,
    feature_dims: Annotated[
        str | None,
        typer.Option(
            help="A size for every layer, such as 32,64,32; auto: half of --feature-dim for layers that need little "
            "beyond any window. auto needs the teacher."
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=0, help="Keys seen by softmax; 0 is pure linear attention.")] = 64,
    windows: Annotated[
        str | None,
        typer.Option(
            help="A window for every layer, such as 16,128,16; auto: longer ones for layers that need them, which "
            "together take the memory of --window and --feature-dim in every layer. auto needs the teacher."
        ),
    ] = None,
    layout: Annotated[Literal["sliding", "terraced"], typer.Option(help="How the window moves.")] = "sliding",
    linear_factor: Annotated[
        Literal["one", "affine", "exp"] | None,
        typer.Option(help="Weight of the linear term: 1; 1 - gamma; or learned on the softmax's scale (best)."),
    ] = None,
    decay: Annotated[
        bool | None,
        typer.Option(
            "--decay/--no-decay",
            help="Let the linear term forget, as it learns to from each key: off; on if --window is 0 (best).",
        ),
    ] = None,
    gamma: Annotated[
        float | None,
        typer.Option(help="Initial weight of the window, between 0 and 1: 0.5, or 0.1 (lolcats); 1 with exp."),
    ] = None,
    mse_factor: Annotated[float, typer.Option(min=0, help="Weight of the outputs' squared error.")] = 1000.0,
    xent_factor: Annotated[
        float,
        typer.Option(min=0, help="Weight of the attention weights' cross-entropy (memory quadratic in --seq-len)."),
    ] = 0.0,
    window_dropout: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Probability, falling to 0, that a batch is trained with the linear term alone."
        ),
    ] = 0.0,
    layers: Annotated[str | None, typer.Option(help="Train these layers only, such as 0-3,7.")] = None,
    keep_softmax: Annotated[
        str | None,
        typer.Option(
            help="Leave these layers softmax, such as 0,31; 2.0: key head 0 of layer 2; sliding: the layers with a "
            "sliding window; auto:2: the two layers whose conversion costs the teacher's predictions most; heads:2: "
            "the two such key heads. auto and heads need the teacher."
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="From a capture of tokens, train this many layers at a time, with one block's weights in memory and "
            "the hidden states before it on disk.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 1,
    grad_accum: Annotated[
        int | None, typer.Option(min=1, help="Forward passes per optimizer step: 2, or 8 (lolcats).")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the rows.")] = 2,
    steps: Annotated[
        str | None,
        typer.Option(
            help="Optimizer steps, instead of --epochs; 0 trains nothing. Or a number for every layer, such as "
            "100,400,100; auto: as many in all as --epochs gives, more of them for layers whose conversion costs most. "
            "auto needs the teacher."
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(min=0, max=1e6, help="AdamW's learning rate, reduced on plateau: 0.02, or 0.01 (lolcats)."),
    ] = None,
    eval_steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps between validations: 400, or 100 (lolcats).")
    ] = None,
    patience: Annotated[
        int,
        typer.Option(
            min=0, help="Validations without improvement before --lr falls; a layer stops after twice as many."
        ),
    ] = 10,
    teacher: o.Teacher = None,
    trust_remote_code: o.TrustRemoteCode = False,
    device: o.Device = "auto",
    devices: o.Devices = None,
    log_to: Annotated[
        Literal["tensorboard"] | None,
        typer.Option(
            help="Show the curves of every layer there too. Its files go to OUTPUT-runs, or TENSORBOARD_LOGGING_DIR."
        ),
    ] = None,
    seed: o.Seed = 0,
    resume: o.Resume = "auto",
    force: o.Force = False,
) -> Artifact:
    """Train feature maps and mixing factors, layer by layer, from a capture.

    The teacher is needed if the capture holds hidden states or tokens, and for `auto` and `heads`.
    """
    asked = locals()
    given, parts, kept = o.artifact_path(capture), o.parse_layers(layers), o.parse_kept(keep_softmax)
    parsed = {
        "windows": o.parse_by_layer("--windows", windows, 0),
        "feature_dims": o.parse_by_layer("--feature-dims", feature_dims, 1),
        "steps": o.parse_by_layer("--steps", None if steps is None else str(steps), 0),  # in Python also a number
    }
    auto = [name for name in parsed if parsed[name][1]]
    by_layer: dict[str, Any] = {name: sizes for name, (sizes, _) in parsed.items()}
    if by_layer["steps"] and len(by_layer["steps"]) == 1:
        by_layer["steps"] = by_layer["steps"][0]
    if gamma is not None and not 0 < gamma < 1:
        raise UsageError(f"--gamma {gamma} must lie between 0 and 1.")
    if not mse_factor and not xent_factor:
        raise UsageError(
            "--mse-factor and --xent-factor are both 0, so there is nothing to train on. Raise one of them."
        )
    opened = checks.artifact(given, "capture", teacher, needs_teacher=bool(kept.auto or kept.heads or auto))
    lists = {name: sizes for name, sizes in by_layer.items() if isinstance(sizes, tuple)}
    choices: dict[str, Any] = {"layers": parts, "keep_softmax": kept.named, "keep_auto": kept.auto}
    choices |= {"keep_heads": kept.heads, "auto": auto}
    o.chosen(Asked(), asked | choices | {"by_layer": lists}).check(opened)
    checks.output(output, "transfer", resume, force, (given,))
    checks.tracker(log_to)
    o.launch_on(devices, given)

    from lolcats_cli.stages.transfer import transfer as run
    from lolcats_cli.stages.transfer_options import recipe_for
    from lolcats_cli.teacher.load import LoadOptions

    base = recipe_for(recipe, next(x["head_dim"] for x in opened.teacher["layers"] if x["num_heads"]), window)
    return run(
        given,
        output,
        options=o.chosen(replace(base, hybrid=o.chosen(base.hybrid, asked)), asked | by_layer),
        **choices,
        block_size=block_size,
        teacher=teacher,
        load=o.chosen(LoadOptions(), asked),
        log_to=log_to,
        resume=resume,
        force=force,
        progress=o.progress(),
    )
