"""An optimizer step of transfer, with the attention by its quadratic definition and by the chunked path, in one run.

    python benchmarks/transfer_step.py [--lengths 512 1024 4096] [--rounds 3]

One layer of the embedded teacher's shape (8 query and 4 key heads of 32), recipe best: two rows a step, forward,
backward to the maps, AdamW. Activations are random, one thread, CPU seconds. The softmax attention's outputs, which a
step compares with, are computed in both; the column beside them says how long that takes by itself.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import repeat
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "formats")]

from lolcats_kernels import HybridMaps, hybrid_attention  # noqa: E402
from lolcats_kernels.softmax import AttentionSpec, softmax_attention  # noqa: E402

from lolcats_cli.stages import layer_losses, layer_training  # noqa: E402
from lolcats_cli.stages.activations import Batch  # noqa: E402
from lolcats_cli.stages.transfer_options import TransferOptions  # noqa: E402
from lolcats_cli.teacher.record import LayerInfo  # noqa: E402

HEADS, KEY_HEADS, DIM = 8, 4, 32
BACKENDS = ("reference", "chunked")


def seconds(action: Callable[[], object], rounds: int) -> float:
    """Median CPU seconds, after a warm-up."""
    times = []
    for _ in range(rounds + 1):
        started = time.process_time()
        action()
        times.append(time.process_time() - started)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    options = TransferOptions()
    hybrid = options.hybrid
    info = LayerInfo(HEADS, KEY_HEADS, DIM, AttentionSpec(scaling=DIM**-0.5))
    print("| tokens | reference, s | chunked, s | times faster | softmax outputs alone, s |\n" + "| --- " * 5 + "|")
    for length in args.lengths:
        torch.manual_seed(0)
        batch = Batch(*(torch.randn(1, heads, length, DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS)), None)
        found, losses = {}, {}
        for backend in BACKENDS:
            run = layer_training.LayerRun(HybridMaps(hybrid, HEADS, DIM), options)

            def step(run: layer_training.LayerRun = run, batch: Batch = batch) -> None:
                layer_training.accumulate({0: run}, repeat({0: batch}), [info], options, 1, torch.device("cpu"))
                run.optimizer.step()

            with patch.object(layer_losses, "hybrid_attention", partial(hybrid_attention, backend=backend)):
                losses[backend] = layer_losses.layer_loss(batch, run.maps, info, options).item()
                found[backend] = seconds(step, args.rounds)
        assert abs(losses["reference"] - losses["chunked"]) <= 1e-4 * abs(losses["reference"]), losses
        target = partial(softmax_attention, batch.q, batch.k, batch.v, info.spec, None)
        softmax = options.grad_accum * seconds(target, args.rounds)
        reference, chunked = (found[backend] for backend in BACKENDS)
        print(f"| {length} | {reference:.3f} | {chunked:.3f} | {reference / chunked:.1f} | {softmax:.3f} |", flush=True)


if __name__ == "__main__":
    main()
