"""A task that the package does not have, added from outside: it goes through the same commands."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import metrics
from lightning_fabric import Fabric
from PIL import Image
from torch import Tensor, nn

from sparsemae.card import ModelCard
from sparsemae.cli import main
from sparsemae.costs.multiply_adds import Forward, count_forward
from sparsemae.data.dataset import ImageDataset
from sparsemae.data.loader import batches
from sparsemae.data.sampling import EvaluationSampler
from sparsemae.data.sources import open_source
from sparsemae.data.transforms import evaluation_transform, normalize, training_transform
from sparsemae.data.tree import Split
from sparsemae.jobs import JOBS, Job
from sparsemae.models import build_vit
from sparsemae.options.data import ImageDataConfig, SourceConfig
from sparsemae.options.tasks import TrainingConfig
from sparsemae.tasks import TASKS
from sparsemae.tasks.task import Network, Task, blank_images, smallest_side


# the task: at most 80 lines, from here
@dataclass
class BrightnessConfig(TrainingConfig):
    """Regression of an image's mean brightness."""

    task: ClassVar[str] = "brightness"
    data: ImageDataConfig = field(default_factory=ImageDataConfig)


class Brightness(Task[BrightnessConfig]):
    title = "regression"
    best_by = "error"
    higher_is_better = False

    def open_data(self) -> None:
        splits: list[Split] = ["train", "val"]
        self.sources = {split: open_source(self.config.data, split) for split in splits}

    def datasets(self, model: nn.Module) -> tuple[ImageDataset, ImageDataset]:
        data, train, smallest = self.config.data, self.sources["train"], smallest_side(model)
        self.validation, _ = self.evaluation_set(self.card(), data, smallest)
        return ImageDataset(train, training_transform(data), self.config.seed, 0, smallest), self.validation

    def loss(self, forward: nn.Module, batch: dict[str, Any]) -> Tensor:
        target = batch["image"].float().mean(dim=(1, 2, 3)) / 255
        return nn.functional.mse_loss(forward(self.normalized(self.card(), batch["image"])).float().squeeze(1), target)

    def example_batch(self, model: nn.Module, size: int) -> dict[str, Any]:
        return {"image": blank_images(size, self.config.data.img_size)}

    def forwards(self, model: Any) -> list[Forward]:
        image = torch.empty(1, 3, *model.patch_embed.img_size, device="meta")
        return [count_forward("the model", model.patch_embed.num_patches + 1, model.eval(), lambda: model(image))]

    def evaluate(self, fabric: Fabric, model: nn.Module) -> dict[str, float]:
        return self.measure(fabric, model, self.card(), self.validation, 0)

    @staticmethod
    def normalized(card: ModelCard, images: Tensor) -> Tensor:
        return normalize(images, card.input.mean, card.input.std)

    @classmethod
    def build(cls, card: ModelCard, drop_path: float = 0.0) -> nn.Module:
        vit: nn.Module = build_vit(card.architecture, card.model_args, card.input.img_size, 1, drop_path=drop_path)
        return vit

    @classmethod
    def evaluation_set(cls, card: ModelCard, data: SourceConfig, smallest: int, split: Any = None) -> Any:
        return ImageDataset(open_source(data, split or "val"), evaluation_transform(card.input), smallest=smallest), ""

    @classmethod
    def measure(
        cls, fabric: Fabric, network: Network, card: ModelCard, dataset: ImageDataset, workers: int,
        progress: bool = False,
    ) -> dict[str, float]:  # fmt: skip
        errors = []
        for batch in batches(dataset, EvaluationSampler(len(dataset), 8), workers):
            wanted = batch["image"].float().mean(dim=(1, 2, 3)) / 255
            errors.append((network(cls.normalized(card, batch["image"])).squeeze(1) - wanted).abs())
        return {"error": float(torch.cat(errors).mean())}

    @classmethod
    def predict(cls, network: Network, card: ModelCard, images: Sequence[Image.Image], top_k: int) -> list[Any]:
        pixels = torch.stack([evaluation_transform(card.input)(image, 0)[0] for image in images])
        return list(network(cls.normalized(card, pixels)).squeeze(1).tolist())

    @classmethod
    def summary(cls, metrics: dict[str, float]) -> str:
        return f"mean error {metrics['error']:.3f}"


# to here


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JOBS, "brightness", Job("sparsemae.commands.train:train", BrightnessConfig, "brightness"))
    monkeypatch.setitem(TASKS, "brightness", Brightness)


@pytest.mark.slow
@pytest.mark.holds("house.3")
def test_a_task_from_outside_goes_through_all_commands(
    tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, file in enumerate(sorted(image_folder.rglob("*.png"))):
        Image.new("RGB", (40, 40), (40 * (i % 6),) * 3).save(file)
    out, data = tmp_path / "run", ["--data.source", "folder", "--data.root", str(image_folder), "--data.workers", "0"]
    words = [
        "brightness", *data, "--out", str(out), "--data.img_size", "28", "--trainer.global_batch", "8",
        "--model.args", "{patch_size: 7, embed_dim: 32, depth: 2, num_heads: 2}", "--trainer.epochs", "20",
        "--optim.lr", "1e-2", "--optim.warmup_epochs", "1", "--trainer.log_every_steps", "1", "--data.mean",
        "[0.5, 0.5, 0.5]", "--data.std", "[0.5, 0.5, 0.5]",
    ]  # fmt: skip
    main([*words, "--trainer.max_steps", "10"])
    main(words)
    assert "continuing" in capsys.readouterr().err
    logged = [row["error"] for row in metrics(out) if "error" in row]
    assert logged[-1] < logged[0] / 2
    main(["evaluate", str(out), *data])
    assert f"mean error {logged[-1]:.3f} on 6 images" in capsys.readouterr().out
    main(["plan", str(out / "config.yaml"), "--job", "brightness", "--images", "16", "--classes", "2"])
    assert "brightness, vit_base_patch16_224 at 28 px, 2:32" in capsys.readouterr().out
    image = tmp_path / "gray.png"
    Image.fromarray(np.full((40, 40, 3), 120, np.uint8)).save(image)
    main(["predict", str(out), str(image)])
    assert float(capsys.readouterr().out.split(": ")[1]) == pytest.approx(120 / 255, abs=0.15)


def test_an_unknown_task_is_refused_by_name(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["brightness", "--data.source", "folder", "--data.root", str(image_folder), "--data.img_size", "28"]
    model = ["--model.args", "{patch_size: 7, embed_dim: 32, depth: 1, num_heads: 2}", "--trainer.global_batch", "8"]
    short = ["--trainer.max_steps", "1", "--trainer.epochs", "20", "--data.workers", "0"]
    main([*words, *model, *short, "--out", str(tmp_path / "run")])
    monkeypatch.delitem(TASKS, "brightness")
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", str(tmp_path / "run")])
    assert exit_.value.code == 2
    assert "wanted a model for one of the tasks pretrain, classify, segment, got one for 'brightness'" in (
        capsys.readouterr().err
    )


def test_the_task_is_short() -> None:
    lines = Path(__file__).read_text().splitlines()
    first, last = (next(i for i, line in enumerate(lines) if line.startswith(word)) for word in ("# the task", "# to"))
    assert last - first - 1 <= 80
