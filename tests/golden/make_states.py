"""Makes runs of other optimizers, saved half-way: `python tests/golden/make_states.py timm adamw`, with those installed.

Each file has, in float64, the state dict and the parameters after the first half, and what the second half's gradients made of
them. Apex and DeepSpeed need a GPU and builds of their own: theirs are laid out as their sources say
(apex/optimizers/fused_lamb.py and fused_mixed_precision_lamb.py, deepspeed/ops/lamb/fused_lamb.py of 0.19.8), with numbers of
the rules as docs/variants.md has them. MindSpore 2.10, which has no Lamb for CPUs, saves a checkpoint of its own with moments
that are set by hand.
"""

import importlib
import importlib.metadata
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent / "states"
SHAPES = {"a": (4, 3), "b": (2, 2, 3), "c": (5,), "dead": (3,)}
LR, DECAY, BETA1, BETA2 = 0.02, 0.01, 0.9, 0.999
HALF = 5


def inputs():
    generator = np.random.default_rng(1)
    params = {name: generator.normal(size=shape) for name, shape in SHAPES.items()}
    params["c"] *= 0  # a parameter of norm 0
    grads = [{name: generator.normal(size=shape) for name, shape in SHAPES.items() if name != "dead"} for _ in range(2 * HALF)]
    return params, grads


def run_real(make, decays=(DECAY, 0.0)):
    import torch

    start, grads = inputs()
    params = {name: torch.nn.Parameter(torch.tensor(p, dtype=torch.float64)) for name, p in start.items()}
    optimizer = make(
        [
            {"params": [params["a"], params["b"]], "weight_decay": decays[0]},
            {"params": [params["c"], params["dead"]], "weight_decay": decays[1]},
        ]
    )
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # it adds to the groups, as schedulers do
    for t, grad in enumerate(grads):
        if t == HALF:
            halfway = [p.detach().clone() for p in params.values()]
            state_dict = torch.load(to_file(optimizer.state_dict()), weights_only=True)
        for name, g in grad.items():
            params[name].grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    return state_dict, halfway, [p.detach() for p in params.values()]


def run_documented(rule, decays=(DECAY, 0.0)):
    """Return moments, the parameters half-way, and at the end."""
    import torch

    w, grads = inputs()
    decay = {"a": decays[0], "b": decays[0], "c": decays[1]}
    m, v = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
    as_tensors = lambda arrays: [torch.tensor(array, dtype=torch.float64) for array in arrays.values()]  # noqa: E731
    for t, grad in enumerate(grads, start=1):
        if t == HALF + 1:
            halfway, moments = as_tensors(w), (as_tensors(m), as_tensors(v))
        norm = np.sqrt(sum(np.square(g).sum() for g in grad.values()))
        for name, g in grad.items():
            w[name], m[name], v[name] = rule(w[name], m[name], v[name], g, norm, t, decay[name])
    return moments, halfway, as_tensors(w)


def apex_rule(w, m, v, g, norm, t, decay):
    g = g / max(1.0, norm)
    m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g**2
    u = m / (1 - BETA1**t) / (np.sqrt(v / (1 - BETA2**t)) + 1e-6) + decay * w
    p_norm, u_norm = np.linalg.norm(w), np.linalg.norm(u)
    ratio = p_norm / u_norm if decay != 0 and p_norm > 0 and u_norm > 0 else 1.0
    return w - LR * ratio * u, m, v


def deepspeed_rule(w, m, v, g, _norm, t, decay):
    m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g**2
    u = m / (np.sqrt(v) + 1e-8) + decay * w
    p_norm, u_norm = np.linalg.norm(w), np.linalg.norm(u)
    ratio = np.clip(p_norm / u_norm, 0.01, 10.0) if p_norm > 0 and u_norm > 0 else 1.0
    return w - LR * np.sqrt(1 - BETA2**t) / (1 - BETA1**t) * ratio * u, m, v


def laid_out(moments, options, step_in, step, lr):
    """Return a state dict of the parameters that had gradients, with the step in its groups or its states."""
    group = {"lr": lr, "betas": (BETA1, BETA2), **options, **({"step": step} if step_in == "group" else {})}
    own = {"step": step} if step_in == "state" else {}
    state = {i: {**own, "exp_avg": moments[0][i], "exp_avg_sq": moments[1][i]} for i in range(3)}
    groups = [{**group, "weight_decay": DECAY, "params": [0, 1]}, {**group, "weight_decay": 0.0, "params": [2, 3]}]
    return {"state": state, "param_groups": groups}


def make_documented(source):
    import torch

    clipped = {"bias_correction": True, "eps": 1e-6, "grad_averaging": True, "max_grad_norm": 1.0}
    bounded = {"bias_correction": True, "eps": 1e-8, "max_grad_norm": 0.0, "max_coeff": 10.0, "min_coeff": 0.01}
    moments, halfway, result = run_documented(deepspeed_rule if source == "deepspeed" else apex_rule)
    layout = {
        "apex": (clipped, "group", HALF, LR),
        "apex_mixed_precision": (clipped, "group", torch.tensor([HALF], dtype=torch.int), torch.tensor(LR)),
        "deepspeed": (bounded, "state", HALF, LR),
    }[source]
    save(source, source, "the documented layout", {}, laid_out(moments, *layout), halfway, result)


def make_real(name, source, distribution, make, arguments=None, decays=(DECAY, 0.0)):
    made_with = f"{distribution} {importlib.metadata.version(distribution)}"
    save(name, source, made_with, arguments or {}, *run_real(make, decays))


def save(name, source, made_with, arguments, state_dict, halfway, result):
    import torch

    grads = [[torch.tensor(g, dtype=torch.float64) for g in grad.values()] for grad in inputs()[1][HALF:]]
    content = {
        "made_with": made_with,
        "source": source,
        "arguments": arguments,
        "state_dict": state_dict,
        "params": halfway,
        "grads": grads,
        "result": result,
    }
    HERE.mkdir(exist_ok=True)
    torch.save(content, HERE / f"{name}.pt")


def to_file(state_dict):
    import io

    import torch

    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return buffer


def make_timm():
    from make import timm_lamb

    make_real("timm", "timm", "timm", lambda groups: timm_lamb()(groups, lr=LR))
    make_real("timm_adapts", "timm", "timm", lambda groups: timm_lamb()(groups, lr=LR, always_adapt=True, trust_clip=True))


def make_torch_optimizer():
    lamb = importlib.import_module("torch_optimizer").Lamb
    make_real("torch_optimizer", "torch_optimizer", "torch_optimizer", lambda groups: lamb(groups, lr=LR))
    debias = {"debias": True, "clamp_value": 1.0}
    make_real("torch_optimizer_debias", "torch_optimizer", "torch_optimizer", lambda g: lamb(g, lr=LR, **debias), debias)


def make_pytorch_optimizer():
    lamb = importlib.import_module("pytorch_optimizer").Lamb
    make_real("pytorch_optimizer", "pytorch_optimizer", "pytorch_optimizer", lambda g: lamb(g, lr=LR, weight_decouple=False))


def make_torch(name):
    import torch

    optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}[name]
    make_real(name, name, "torch", lambda groups: optimizer(groups, lr=LR), decays=(0.0, 0.0))


def make_mindspore():
    import mindspore
    from mindspore import nn

    class Net(nn.Cell):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Dense(3, 4), nn.LayerNorm((4,))

    net = Net()
    optimizer = nn.Lamb(net.trainable_params(), 0.1)
    generator = np.random.default_rng(2)
    for p in optimizer.get_parameters():
        if p.name.startswith(("lamb_m.", "lamb_v.")):
            p.set_data(mindspore.Tensor(generator.uniform(size=p.shape).astype(np.float32)))
        elif p.name == "global_step":
            p.set_data(mindspore.Tensor([7], mindspore.int32))
    HERE.mkdir(exist_ok=True)
    path = HERE / "mindspore.ckpt"
    mindspore.save_checkpoint(nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), optimizer), str(path))
    arrays = {name: p.asnumpy() for name, p in mindspore.load_checkpoint(str(path)).items()}
    np.savez(HERE / "mindspore.npz", **arrays)


def main():
    makers = {
        "timm": make_timm,
        "torch_optimizer": make_torch_optimizer,
        "pytorch_optimizer": make_pytorch_optimizer,
        "mindspore": make_mindspore,
        **{name: lambda name=name: make_torch(name) for name in ("adam", "adamw", "radam")},
        **{name: lambda name=name: make_documented(name) for name in ("apex", "apex_mixed_precision", "deepspeed")},
    }
    if not sys.argv[1:] or set(sys.argv[1:]) - set(makers):
        sys.exit(f"make_states.py takes names of packages: {' '.join(makers)}")
    for package in sys.argv[1:]:
        makers[package]()


if __name__ == "__main__":
    main()
