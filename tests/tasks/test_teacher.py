"""Learning from a teacher: the losses in closed form, what the teacher sees, and runs that resume exactly."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from conftest import metrics, tiny
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from sparsemae.card import InputSpec
from sparsemae.cli import main
from sparsemae.data.sampling import BatchPlan
from sparsemae.data.transforms import normalize
from sparsemae.models import start
from sparsemae.models.weights import read_weights
from sparsemae.options import FinetuneConfig
from sparsemae.tasks import teacher
from sparsemae.tasks.classification import Classification
from sparsemae.tasks.pretraining import feature_loss
from sparsemae.tasks.teacher import Teacher, distillation_loss

Refused = Callable[..., str]


@pytest.mark.holds("better.4")
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_and_its_gradient_in_closed_form(temperature: float) -> None:
    """d/ds T^2 KL(p || q) = T (q - p) / B."""
    torch.manual_seed(0)
    student, wanted = (4 * torch.randn(5, 7, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    loss = distillation_loss(student, wanted, temperature)
    p, q = (torch.softmax(values / temperature, dim=1) for values in (wanted, student.detach()))
    torch.testing.assert_close(loss.detach(), temperature**2 * (p * (p.log() - q.log())).sum() / 5)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, temperature * (q - p) / 5)


@pytest.mark.holds("better.4")
def test_the_features_loss_in_closed_form() -> None:
    """With x = s - (t - mean) / std: x^2 / 4 where |x| < 2, else |x| - 1; its gradient x / 2, or the sign of x."""
    torch.manual_seed(0)
    student, wanted = (3 * torch.randn(2, 5, 12, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    loss = feature_loss(student, wanted)
    mean, variance = wanted.mean(dim=2, keepdim=True), wanted.var(dim=2, correction=0, keepdim=True)
    x = student.detach() - (wanted - mean) / (variance + 1e-6).sqrt()
    small = x.abs() < 2
    assert small.any()
    assert not small.all()
    torch.testing.assert_close(loss.detach(), torch.where(small, x**2 / 4, x.abs() - 1).mean())
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, torch.where(small, x / 2, x.sign()) / x.numel())


class Seen(nn.Module):
    """Keeps what it is shown; answers with zeros for ten classes."""

    images: Tensor

    def forward(self, images: Tensor) -> Tensor:
        self.images = images
        return images.new_zeros(len(images), 10)


@pytest.mark.parametrize("size", [28, 42])
def test_a_teacher_sees_its_own_mean_std_and_size(size: int) -> None:
    torch.manual_seed(0)
    model, pixels = Seen(), torch.rand(2, 3, 28, 28)
    own, theirs = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    mean, std, their_mean, their_std = (torch.tensor(values).view(3, 1, 1) for values in (*own, *theirs))
    Teacher(model, InputSpec(size, *theirs)).logits((pixels - mean) / std, *own)
    wanted = (pixels - their_mean) / their_std
    if size != 28:
        wanted = F.interpolate(wanted, (size, size), mode="bicubic", antialias=True)
    torch.testing.assert_close(model.images, wanted)
    images = torch.randn(2, 3, 28, 28)
    Teacher(model, InputSpec(28, *own)).logits(images, *own)
    assert model.images is images


def test_a_teacher_sees_the_mixed_images_and_has_its_share_of_the_loss() -> None:
    config = FinetuneConfig(mixup=0.8, cutmix=1.0, erasing=0.9, teacher_weight=0.3, teacher_temperature=2.0)
    task, model = Classification(config), Seen()
    task.class_names = [str(number) for number in range(10)]
    task.teacher = Teacher(model, InputSpec(28, config.data.mean, config.data.std))
    task.prepare(model, Fabric(accelerator="cpu", devices=1), BatchPlan.make(8, 8, 8, 1))
    batch = {"image": torch.randint(256, (8, 3, 28, 28), dtype=torch.uint8), "target": torch.arange(8)}
    student = Seen()
    loss = task.loss(student, batch)
    assert model.images is student.images
    assert not torch.equal(student.images, normalize(batch["image"], config.data.mean, config.data.std))
    torch.testing.assert_close(loss, torch.tensor(0.7 * math.log(10)))  # zeros of both: uniform, and equal


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a dense pretraining of one step."""
    folder = tmp_path_factory.mktemp("dense") / "run"
    main(tiny("pretrain", folder, "--sparse.pattern", "dense", "--trainer.max_steps", "1"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("job", ["pretrain", "finetune"])
def test_a_run_with_a_teacher_resumes_exactly_and_holds_none_of_it(
    tmp_path: Path, runs: Path, dense: Path, job: str
) -> None:
    source = dense if job == "pretrain" else runs / "finetune"
    options = ["--teacher", str(source), "--teacher_weight", "0.7"]
    main(tiny(job, tmp_path / "whole", *options))
    main(tiny(job, tmp_path / "parts", *options, "--trainer.max_steps", "3"))
    main(tiny(job, tmp_path / "parts", *options))
    base = tmp_path / "base" if job == "finetune" else runs / "pretrain"
    if job == "finetune":
        main(tiny(job, base))
    whole, parts, alone = (read_weights(out)[0] for out in (tmp_path / "whole", tmp_path / "parts", base))
    assert whole.keys() == parts.keys() == alone.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert not torch.equal(whole["blocks.0.attn.qkv.weight"], alone["blocks.0.attn.qkv.weight"])
    training = [
        read_weights(next((out / "checkpoints").glob("step-00000006")) / "training.safetensors")[0]
        for out in (tmp_path / "whole", base)
    ]
    assert training[0].keys() == training[1].keys()
    assert metrics(tmp_path / "whole")[0]["loss"] != metrics(base)[0]["loss"]


def test_teachers_of_something_else_are_refused(
    tmp_path: Path, runs: Path, dense: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, image_folder: Path
) -> None:
    finetune, pretrain = (tiny(job, tmp_path / "run", "--trainer.max_steps", "1") for job in ("finetune", "pretrain"))
    source = str(runs / "finetune")
    folder = ["--data.source", "folder", "--data.root", str(image_folder), "--trainer.global_batch", "8"]
    assert "class 0: wanted 'cat', got 'T-shirt/top'" in refused(*finetune, *folder, "--teacher", source)
    assert "wanted a model for classify, got one for pretrain" in refused(*finetune, "--teacher", str(dense))
    assert "no such" in refused(*finetune, "--teacher", str(tmp_path / "nothing"))
    network = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=1000)
    monkeypatch.setattr(teacher, "pretrained", lambda *_: network)
    said = refused(*finetune, "--teacher", "timm:vit_tiny_patch16_224")
    assert "--teacher timm:vit_tiny_patch16_224: wanted a classifier of 10 classes, got one of 1000" in said
    said = refused(*pretrain, "--teacher", str(runs / "pretrain"))
    assert "wanted a dense network, got one with N:M sparse layers" in said
    wider = "{patch_size: 7, embed_dim: 64, depth: 2, num_heads: 2}"
    said = refused(*pretrain, "--model.args", wider, "--teacher", str(dense))
    assert "wanted at least 90% of the encoder's parameters, matched 0.0%" in said
    said = refused(*pretrain, "--data.mean", "[0.5, 0.5, 0.5]", "--teacher", str(dense))
    assert "wanted images of mean (0.5, 0.5, 0.5)" in said
    augreg = "vit_tiny_patch16_224.augreg_in21k"
    monkeypatch.setattr(start, "pretrained", lambda *_: timm.create_model(augreg))
    whole = ["--model.name", "vit_tiny_patch16_224", "--model.args", "{}", "--data.img_size", "224"]
    said = refused(*pretrain, *whole, "--teacher", f"timm:{augreg}")
    assert "wanted images of mean (0.286, 0.286, 0.286)" in said
    assert "got (0.5, 0.5, 0.5)" in said
