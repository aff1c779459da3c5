"""The example of the documentation that `torchlamb.mindspore` follows, as the README has it."""

from __future__ import annotations

from pathlib import Path

import torch

README = (Path(__file__).parents[2] / "README.md").read_text()

# What follows the import lines, without prompts.
EXAMPLE = """\
net = Net()
#1) All parameters use the same learning rate and weight decay
optim = nn.Lamb(params=net.trainable_params(), learning_rate=0.1)

#2) Use parameter groups and set different values
poly_decay_lr = learning_rate_schedule.PolynomialDecayLR(learning_rate=0.1, end_learning_rate=0.01,
                                                   decay_steps=4, power = 0.5)
conv_params = list(filter(lambda x: 'conv' in x.name, net.trainable_params()))
no_conv_params = list(filter(lambda x: 'conv' not in x.name, net.trainable_params()))
group_params = [{'params': conv_params, 'weight_decay': 0.01, 'grad_centralization':True},
                {'params': no_conv_params, 'lr': poly_decay_lr},
                {'order_params': net.trainable_params(0.01)}]
optim = nn.Lamb(group_params, learning_rate=0.1, weight_decay=0.0)
# The conv_params's parameters will use default learning rate of 0.1 and weight decay of 0.01 and grad
# centralization of True.
# The no_conv_params's parameters will use dynamic learning rate of poly decay learning rate and default
# weight decay of 0.0 and grad centralization of False.
# The final parameters order in which the optimizer will be followed is the value of 'order_params'.

loss = nn.SoftmaxCrossEntropyWithLogits()
model = Model(net, loss_fn=loss, optimizer=optim)
"""


def test_the_example_stands_in_the_readme_and_trains(capsys):
    blocks = [block.partition("\n```")[0] for block in README.split("```python\n")[1:]]
    (block,) = [block for block in blocks if "learning_rate_schedule" in block]
    assert EXAMPLE in block + "\n"
    before, after = block.split(EXAMPLE)
    names: dict[str, object] = {}
    exec(before, names)
    exec(EXAMPLE, names)
    optimizer, poly_decay_lr = names["optim"], names["poly_decay_lr"]
    conv, rest = optimizer.param_groups
    assert conv["param_names"] == ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"]
    assert (conv["lr"], conv["weight_decay"], conv["grad_centralization"]) == (0.1, 0.01, True)
    assert (rest["lr"], rest["weight_decay"], rest["grad_centralization"]) == (poly_decay_lr(0), 0.0, False)
    assert [x.name for x in optimizer.parameters] == [name for name, _ in names["net"].named_parameters()]
    exec(after, names)
    assert optimizer.global_step == 30 * 12
    assert rest["lr"] == 0.01
    assert names["accuracy"] >= 0.95
    shown = capsys.readouterr()
    assert shown.out == f"test accuracy {names['accuracy']:.1%}\n"
    assert "epoch 30/30: 100%" in shown.err
    assert all(ratio.isfinite() for ratio in map(torch.as_tensor, optimizer.trust_ratios().values()))
