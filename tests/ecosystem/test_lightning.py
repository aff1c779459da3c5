"""Lightning: what it ends with is what a loop in plain PyTorch ends with."""

from __future__ import annotations

import copy

import pytest
import torch
from ecosystem.common import LAMB, assert_same, make_batches, make_model
from torch import nn
from torch.nn.functional import cross_entropy

import torchlamb

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),  # workers, loggers and epochs that are too short
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch's pytree, as Lightning calls it
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(lightning|torchmetrics|lightning_utilities)"),
]
EPOCHS, STEPS = 2, 12


def module(fused=None):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def training_step(self, batch, _):
            x, y = batch
            loss = cross_entropy(self.net(x), y)
            return loss * float("inf") if self.overflows(batch) else loss

        def overflows(self, _) -> bool:
            return False

        def configure_optimizers(self):
            optimizer = torchlamb.Lamb(self.parameters(), fused=fused, **LAMB)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=EPOCHS * STEPS)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return Module()


def loader():
    return torch.utils.data.DataLoader(make_batches(STEPS), batch_size=None)


def fit(folder, model, checkpoint=None, **options):
    import lightning

    trainer = lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": EPOCHS, **options},
    )
    trainer.fit(model, loader(), ckpt_path=checkpoint)
    return trainer


def plain_loop(scaler=None, clip=None):
    """The same, by hand."""
    model = make_model()
    optimizer = torchlamb.Lamb(model.parameters(), **LAMB)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=EPOCHS * STEPS)
    for x, y in make_batches(STEPS) * EPOCHS:
        with torch.autocast("cpu", torch.float16, enabled=scaler is not None):
            loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        scheduler.step()
    return model


def test_one_cycle(tmp_path):
    """OneCycleLR cycles the first beta, too."""
    model = module()
    trainer = fit(tmp_path, model, gradient_clip_val=0.5)
    assert trainer.optimizers[0].param_groups[0]["betas"][0] != 0.9
    assert_same(model.net, plain_loop(clip=0.5))


def test_resume(tmp_path):
    whole = module()
    fit(tmp_path / "whole", whole)
    first = fit(tmp_path / "first", module(), max_epochs=1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = module()
    fit(tmp_path / "second", resumed, checkpoint=tmp_path / "half.ckpt")
    assert_same(resumed.net, whole.net)


def mixed():
    """Lightning takes 16-mixed for bf16-mixed on a CPU, unless it is handed the plugin."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))


def test_16_mixed_with_clipping(tmp_path):
    model = module()
    fit(tmp_path, model, plugins=[mixed()], gradient_clip_val=0.5)
    assert_same(model.net, plain_loop(torch.amp.GradScaler("cpu", init_scale=2.0**10), clip=0.5))


def test_16_mixed_with_clipping_and_fused_by_name(tmp_path):
    """Lightning does not clip for optimizers that unscale gradients themselves; by default Lamb leaves that to the scaler."""
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(tmp_path, module(fused=True), plugins=[mixed()], gradient_clip_val=0.5)


def test_an_overflow_is_skipped(tmp_path):
    model = module()
    steps = iter(range(100))
    model.overflows = lambda _: next(steps) == 5
    plugin = mixed()
    trainer = fit(tmp_path, model, plugins=[plugin])
    assert plugin.scaler.get_scale() == 2.0**9
    assert all(state["step"] == EPOCHS * STEPS - 1 for state in trainer.optimizers[0].state.values())
    assert all(bool(p.isfinite().all()) for p in copy.deepcopy(model.net).parameters())
