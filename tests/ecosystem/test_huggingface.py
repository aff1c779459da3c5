"""Hugging Face's Trainer and accelerate: what they end with is what a loop in plain PyTorch ends with."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from ecosystem.common import LAMB, assert_same, make_batches, make_model, run_processes, train
from torch import nn
from torch.nn.functional import cross_entropy

import torchlamb

pytestmark = pytest.mark.slow


# The Trainer


class Sentences(torch.utils.data.Dataset):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(0, 50, (64, 10), generator=generator)
        self.labels = torch.randint(0, 2, (64,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def fit(folder: Path, resume: bool = False):
    """Train for 2 epochs of 8 batches, saving half-way, and return the model, and the batches that it saw."""
    from transformers import Trainer, TrainingArguments

    model, seen = bert(), []
    model.register_forward_pre_hook(lambda _, __, batch: seen.append(batch), with_kwargs=True)
    arguments = TrainingArguments(
        str(folder), num_train_epochs=2, save_steps=8, weight_decay=0.01, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(
        model, arguments, train_dataset=Sentences(), optimizer_cls_and_kwargs=(torchlamb.Lamb, {"lr": 0.01, "eps": 1e-6})
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-8") if resume else None)
    assert isinstance(trainer.optimizer.optimizer, torchlamb.Lamb)
    return model, seen


def test_trainer(tmp_path):
    """Its defaults: decay for weights only, a linear schedule, gradients clipped to 1."""
    from transformers import get_linear_schedule_with_warmup

    trained, seen = fit(tmp_path)
    assert len(seen) == 16
    plain = bert()
    spared = [p for name, p in plain.named_parameters() if "LayerNorm" in name or name.endswith("bias")]
    decayed = [p for name, p in plain.named_parameters() if not ("LayerNorm" in name or name.endswith("bias"))]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torchlamb.Lamb(groups, lr=0.01, eps=1e-6)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, 16)
    for batch in seen:
        plain(**batch).loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert_same(trained, plain)
    assert (trained.classifier.weight - bert().classifier.weight).norm() > 0.001


def test_trainer_resumes(tmp_path):
    whole, seen = fit(tmp_path)
    resumed, rest = fit(tmp_path, resume=True)
    assert len(rest) == 8
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(seen[8:], rest, strict=True))
    assert_same(resumed, whole)


# accelerate


def loader():
    x, y = (torch.cat(parts) for parts in zip(*make_batches(), strict=True))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)


def prepared(model: nn.Module, **options):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, **options)
    optimizer = torchlamb.Lamb(model.parameters(), **LAMB)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    return accelerator, accelerator.prepare(model, optimizer, loader(), scheduler)


def test_accelerate():
    """Accumulation, clipping and a scheduler, as its documents have them."""
    model = make_model()
    wanted = copy.deepcopy(model)
    accelerator, (model, optimizer, batches, scheduler) = prepared(model, gradient_accumulation_steps=3)
    for x, y in batches:
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    plain = torchlamb.Lamb(wanted.parameters(), **LAMB)
    schedule = torch.optim.lr_scheduler.StepLR(plain, 2, 0.5)
    for i, (x, y) in enumerate(make_batches()):
        (cross_entropy(wanted(x), y) / 3).backward()
        if i % 3 == 2:
            nn.utils.clip_grad_norm_(wanted.parameters(), 0.5)
            plain.step()
            schedule.step()
            plain.zero_grad()
    assert plain.param_groups[0]["lr"] < 0.01
    assert_same(model, wanted)


def test_accelerate_saves_and_loads(tmp_path):
    model = make_model()
    wanted = train(model, make_batches())
    accelerator, (first, optimizer, batches, _) = prepared(copy.deepcopy(model))

    def step(model, optimizer, x, y):
        accelerator.backward(cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()

    for i, (x, y) in enumerate(batches):
        if i == 6:
            accelerator.save_state(str(tmp_path))
        if i < 6:
            step(first, optimizer, x, y)
    accelerator, (second, optimizer, batches, _) = prepared(copy.deepcopy(model))
    accelerator.load_state(str(tmp_path))
    assert_same(second, first)
    for x, y in list(batches)[6:]:
        step(second, optimizer, x, y)
    assert_same(second, wanted)


@pytest.mark.parametrize("how", ["fsdp1", "fsdp2", "deepspeed"])
def test_accelerate_shards_the_model(how):
    run_processes(Path(__file__).with_name("two_processes.py"), 2, f"accelerate_{how}")
