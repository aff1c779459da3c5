"""Makes mindspore/scripts.json and functions.json: `python tests/golden/make_mindspore.py`, with MindSpore 2.10 installed.

It wants numpy 1 and an environment of its own. The scripts are those of tests/mindspore_front/scripts: their import lines are
turned back into MindSpore's, and torch's layers into MindSpore's; all other lines are run as they are. Its Lamb has no kernel
for CPUs, nor is there a register of overflows: the rule of the paper and a look at the gradients are put in, in the cells that
hold them.
"""

import json
import re
import sys
import tempfile
import types
from pathlib import Path

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import operations

HERE = Path(__file__).parent
SCRIPTS = HERE.parent / "mindspore_front" / "scripts"
NAMES = ("bert_pretrain", "classifier", "gpt", "vision", "functional")
LAYERS = [
    (r"^import torch\n", ""),
    (r"torchlamb\.mindspore", "mindspore"),
    (r"torch\.nn\.Linear\(", "nn.Dense("),
    (r"torch\.nn\.Embedding\(", "nn.Embedding("),
    (r"torch\.nn\.LayerNorm\((\w+)\)", r"nn.LayerNorm((\1,), epsilon=1e-5)"),
    (r"torch\.nn\.Conv2d\((.*)bias=False, padding=1\)", r"nn.Conv2d(\1pad_mode='pad', padding=1, has_bias=False)"),
    (r"torch\.nn\.BatchNorm2d\((\w+)\)", r"nn.BatchNorm2d(\1, eps=1e-5, momentum=0.9)"),
    (r"torch\.nn\.PReLU\(\)", "nn.PReLU()"),
]


class Lamb(nn.Lamb):
    """MindSpore's own but for the kernel: its groups, schedules, counts and moments."""

    def construct(self, gradients):
        decay, lr = self.get_weight_decay(), self.get_lr()
        self.assignadd(self.global_step, self.global_step_increase_tensor)
        step = int(self.global_step.asnumpy()[0])
        gradients = self.gradients_centralization(gradients)
        for i, (p, m, v, g) in enumerate(zip(self.params, self.moments1, self.moments2, gradients, strict=True)):
            own_decay = decay[i] if isinstance(decay, tuple) else decay
            own_lr = lr[i] if isinstance(lr, tuple) else lr
            ops.assign(m, self.beta1 * m + (1 - self.beta1) * g)
            ops.assign(v, self.beta2 * v + (1 - self.beta2) * g * g)
            update = (m / (1 - self.beta1**step)) / (ops.sqrt(v / (1 - self.beta2**step)) + self.eps)
            if self.decay_flags[i]:
                update = update + own_decay * p
            norms = [float(np.linalg.norm(x.asnumpy().astype(np.float64))) for x in (p, update)]
            ratio = norms[0] / norms[1] if all(norms) else 1.0
            ops.assign(p, p - own_lr * ratio * update)
        return (True,) * len(self.params)


class NoStatus:
    """What the machine's register of overflows says where there is none."""

    def __call__(self, *_):
        return Tensor(np.zeros(8), mindspore.float32)


def overflow_status(_self, _status, gradients):
    return Tensor(not all(np.isfinite(x.asnumpy()).all() for x in gradients))


def put_in():
    for module in (mindspore.nn, mindspore.nn.optim, mindspore.nn.optim.lamb):
        module.Lamb = Lamb
    nn.TrainOneStepWithLossScaleCell.get_overflow_status = overflow_status
    mindspore.amp.all_finite = lambda gradients: Tensor(all(np.isfinite(x.asnumpy()).all() for x in gradients))
    for name in ("NPUAllocFloatStatus", "NPUGetFloatStatus", "NPUClearFloatStatus"):
        setattr(operations, name, NoStatus)


def run(name):
    source = (SCRIPTS / f"{name}.py").read_text()
    for pattern, replacement in LAYERS:
        source = re.sub(pattern, replacement, source, flags=re.M)
    module = types.ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
    with tempfile.TemporaryDirectory() as folder:
        return module.main(folder)


def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, (list, tuple)):
        return [rounded(x) for x in value]
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    return value


DECAY = {"learning_rate": 0.1, "decay_rate": 0.9, "total_step": 12, "step_per_epoch": 2, "decay_epoch": 2}
POLYNOMIAL = {"learning_rate": 0.1, "end_learning_rate": 0.01, "total_step": 12, "step_per_epoch": 2, "decay_epoch": 2}
LISTS = [
    ("piecewise_constant_lr", {"milestone": [2, 5, 10], "learning_rates": [0.1, 0.05, 0.01]}),
    *[
        (name, {**DECAY, "is_stair": is_stair})
        for name in ("exponential_decay_lr", "natural_exp_decay_lr", "inverse_decay_lr")
        for is_stair in (False, True)
    ],
    ("cosine_decay_lr", {"min_lr": 0.01, "max_lr": 0.1, "total_step": 12, "step_per_epoch": 2, "decay_epoch": 4}),
    ("polynomial_decay_lr", {**POLYNOMIAL, "power": 0.5, "update_decay_epoch": False}),
    ("polynomial_decay_lr", {**POLYNOMIAL, "power": 2.0, "update_decay_epoch": True}),
    ("warmup_lr", {"learning_rate": 0.1, "total_step": 12, "step_per_epoch": 2, "warmup_epoch": 4}),
]
TENSORS = ([3.0, 4.0], [0.3, -0.4], [[1.0, 2.0], [-2.0, 0.5]])


def functions():
    """Lists of learning rates, and what clips and metrics return."""
    tensors = [Tensor(np.array(x, np.float32)) for x in TENSORS]
    one = Tensor([1.0], mindspore.float32)
    clips = {
        "ClipByNorm": [nn.ClipByNorm()(x, one) for x in tensors],
        "clip_by_norm": [ops.clip_by_norm(x, 1.0) for x in tensors],
        "clip_by_norm of all": list(ops.clip_by_norm(tensors, 1.0)),
        "clip_by_global_norm": list(ops.clip_by_global_norm(tensors, 2.0)),
        "clip_by_value": [ops.clip_by_value(x, -1.0, 2.0) for x in tensors],
    }
    outputs = Tensor(np.array([[0.1, 0.5, 0.4], [0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], np.float32))
    labels = Tensor([2, 0, 1])
    metrics = {
        "Accuracy": nn.Accuracy()(outputs, labels),
        "TopKCategoricalAccuracy": nn.TopKCategoricalAccuracy(2)(outputs, labels),
        "MAE": nn.MAE()(tensors[0], tensors[1]),
        "MSE": nn.MSE()(tensors[2], tensors[2] * 2),
        "Loss": nn.Loss()(tensors[0]),
    }
    return {
        "lists": [[name, words, [float(x) for x in getattr(nn, name)(**words)]] for name, words in LISTS],
        "clips": {key: [x.asnumpy().tolist() for x in found] for key, found in clips.items()},
        "metrics": {key: float(value) for key, value in metrics.items()},
    }


def write(file, results):
    text = ",\n".join(f" {json.dumps(key)}: {json.dumps(rounded(value))}" for key, value in results.items())
    (HERE / "mindspore" / file).write_text("{\n" + text + "\n}\n")


if __name__ == "__main__":
    sys.path.insert(0, str(SCRIPTS))
    put_in()
    version = {"mindspore": mindspore.__version__}
    write("functions.json", {**version, **functions()})
    write("scripts.json", {**version, **{name: run(name) for name in NAMES}})
