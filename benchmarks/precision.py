"""What each way of storing things costs in memory and in accuracy, as the tables of docs/precision.md.

    python benchmarks/precision.py

Memory is counted in the tensors themselves: parameter, gradient and everything in the optimizer's state. Accuracy is that of
the network of examples/digits.py, trained at two learning rates: the one that the example carries to this batch size, and a
small one, whose changes are mostly below what bfloat16 can see.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchlamb

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import digits

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
STORAGE: dict[str, dict[str, Any]] = {
    "defaults": {},
    "state_dtype=torch.bfloat16": {"state_dtype": BF16},
    "stochastic_rounding=True": {"stochastic_rounding": True},
    "stochastic_rounding=True, state_dtype=torch.bfloat16": {"stochastic_rounding": True, "state_dtype": BF16},
    "master_weights=True": {"master_weights": True},
    "master_weights=True, state_dtype=torch.bfloat16": {"master_weights": True, "state_dtype": BF16},
}
FLOAT32 = ["defaults", "state_dtype=torch.bfloat16"]  # what changes something for float32 parameters
BATCH_SIZE, EPOCHS = 64, 30
LRS = [0.032, 0.001]


def bytes_per_parameter(dtype: torch.dtype, grad_dtype: torch.dtype, storage: dict[str, Any]) -> tuple[float, float, float]:
    """Return those of parameter, gradient and state."""
    p = nn.Parameter(torch.ones(1024, 1024, dtype=dtype))
    p.grad_dtype = grad_dtype
    p.grad = torch.ones(1024, 1024, dtype=grad_dtype)
    optimizer = torchlamb.Lamb([p], **storage)
    optimizer.step()
    state = sum(value.untyped_storage().nbytes() for value in optimizer.state[p].values())
    return tuple(size / p.numel() for size in (p.untyped_storage().nbytes(), p.grad.untyped_storage().nbytes(), state))


def accuracy(dtype: torch.dtype, storage: dict[str, Any], lr: float, seed: int) -> float:
    """Train as examples/digits.py does, the loss in float32, and return the test accuracy in %."""
    parts = digits.load_parts()
    images, labels = parts["train"]
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    model = digits.build_model().to(dtype)
    groups = torchlamb.param_groups(model, weight_decay=digits.WEIGHT_DECAY, adapt_excluded=False)
    optimizer = torchlamb.Lamb(groups, lr=lr, **storage)
    job = digits.Job("Lamb", BATCH_SIZE, lr, seed, EPOCHS, "test")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, digits.warmup_then_decay(job.steps))
    for _ in range(EPOCHS):
        for batch in digits.batches(len(images), BATCH_SIZE, order):
            optimizer.zero_grad()
            digits.LOSS(model(images[batch].to(dtype)).float(), labels[batch]).backward()
            optimizer.step()
            scheduler.step()
    images, labels = parts["test"]
    with torch.no_grad():
        return 100 * (model(images.to(dtype)).argmax(dim=1) == labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--memory-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    fp16 = [name for name in STORAGE if "stochastic" not in name]
    runs = [(FP32, name) for name in FLOAT32] + [(BF16, name) for name in STORAGE]
    sizes_of = [(d, g, n) for g in (FP32, BF16) for d, n in runs] + [(FP16, g, n) for g in (FP32, FP16) for n in fp16]
    print("| parameters | options | parameter | gradient | state | in all |\n|---|---|---|---|---|---|")
    for dtype, grad_dtype, name in sizes_of:
        sizes = bytes_per_parameter(dtype, grad_dtype, STORAGE[name])
        print(row(dtype, name, [f"{size:.5g}" for size in (*sizes, sum(sizes))]))
    if args.memory_only:
        return
    print(f"\n| parameters | options | {' | '.join(f'lr {lr}' for lr in LRS)} |\n|---|---|{'---|' * len(LRS)}")
    for dtype, name in runs:
        cells = []
        for lr in LRS:
            found = [accuracy(dtype, STORAGE[name], lr, seed) for seed in range(args.seeds)]
            cells.append(f"{statistics.mean(found):.2f} +- {statistics.stdev(found):.2f}")
        print(row(dtype, name, cells), flush=True)


def row(dtype: torch.dtype, name: str, cells: list[str]) -> str:
    return f"| {' | '.join([str(dtype).removeprefix('torch.'), name, *cells])} |"


if __name__ == "__main__":
    main()
