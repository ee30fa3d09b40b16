"""Windows, scales and mirrors."""

import numpy as np
import pytest
import torch
from conftest import SceneRun

from sparsemae.card import InputSpec
from sparsemae.options.model import InferenceConfig
from sparsemae.sparsity import hold_masks
from sparsemae.tasks.loading import load_model
from sparsemae.tasks.segmentation import of_one_size
from sparsemae.tasks.sliding_window import predict_scores, slide, window_starts

SIZES = [(300, 500), (512, 512), (512, 683), (683, 512), (513, 1024), (1024, 683), (200, 1000)]


@pytest.mark.holds("ade20k.4")
@pytest.mark.parametrize("size", SIZES)
def test_the_weights_of_overlapping_windows_sum_to_one(size: tuple[int, int]) -> None:
    seen = torch.zeros(size)
    positions = torch.arange(size[0] * size[1], dtype=torch.float64).view(1, 1, *size)

    def forward(images: torch.Tensor) -> torch.Tensor:
        assert images.shape[-2:] == (min(512, size[0]), min(512, size[1]))
        seen.view(-1)[images.long().flatten()] += 1
        return torch.ones_like(images)

    assert torch.equal(slide(forward, positions, 512, 341), torch.ones(1, 1, *size, dtype=torch.float64))
    assert seen.min() >= 1
    # by hand: the mean of what each window says, here the number of the window
    starts = [window_starts(side, 512, 341) for side in size]
    numbers = iter(range(100))
    mean = slide(lambda x: torch.full_like(x, float(next(numbers))), positions, 512, 341)[0, 0]
    y, x = size[0] // 2, size[1] // 2
    windows = [(t, left) for t in starts[0] for left in starts[1]]
    over = [i for i, (t, left) in enumerate(windows) if t <= y < t + 512 and left <= x < left + 512]
    assert float(mean[y, x]) == pytest.approx(np.mean(over))


@pytest.mark.holds("ade20k.4")
@pytest.mark.parametrize("size", [(64, 64), (64, 40), (23, 64), (30, 50)])
def test_a_window_over_the_whole_image_is_the_whole_image(scene_run: SceneRun, size: tuple[int, int]) -> None:
    model, _ = load_model(scene_run.folder)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), hold_masks(model):
        whole = model(images).logits
        assert torch.equal(slide(lambda x: model(x).logits, images, 64, 43), whole)
        larger = torch.randn(1, 3, 100, 150)
        assert not torch.allclose(slide(lambda x: model(x).logits, larger, 64, 43), model(larger).logits, atol=1e-3)


def test_scales_and_mirrors_are_averaged_at_the_images_size() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 40, 60), generator=generator, dtype=torch.uint8)
    spec = InputSpec(32, (0.5,) * 3, (0.5,) * 3, short_side=32, long_side=128)
    seen: list[tuple[int, ...]] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape[-2:]))
        return x * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)

    inference = InferenceConfig("whole", scales=[0.5, 1.0], flip=True)
    scores = predict_scores(forward, images, spec, inference)
    assert seen == [(16, 24), (16, 24), (32, 48), (32, 48)]
    assert scores.shape == (1, 3, 40, 60)
    assert torch.allclose(scores.sum(1), torch.ones(1, 40, 60))
    mirrored = predict_scores(forward, images.flip(-1), spec, inference)
    assert torch.allclose(mirrored.flip(-1), scores, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "short_side", "scales", "wanted"),
    [
        ([(28, 28)] * 700, 28, [1.0], [334, 334, 32]),  # 334 * 28 * 28 <= 512 * 512 < 335 * 28 * 28
        ([(28, 28)] * 700, 28, [1.0, 2.0], [83] * 8 + [36]),
        ([(28, 28)] * 3, 512, [1.0], [1, 1, 1]),  # as large as the network sees them
        ([(600, 600)] * 2, 28, [1.0], [1, 1]),  # as large as their masks are
        ([(28, 28), (28, 28), (28, 30), (30, 28), (30, 28), (28, 28)], 28, [1.0], [2, 1, 2, 1]),
        ([], 28, [1.0], []),
    ],
)
def test_small_images_of_one_size_that_follow_on_one_another_are_evaluated_together(
    sizes: list[tuple[int, int]], short_side: int, scales: list[float], wanted: list[int]
) -> None:
    single = [
        {"image": torch.zeros(1, 3, *size, dtype=torch.uint8), "index": torch.tensor([number])}
        for number, size in enumerate(sizes)
    ]
    spec = InputSpec(28, (0.5,) * 3, (0.5,) * 3, short_side=short_side, long_side=4 * short_side)  # type: ignore[arg-type]
    batches = list(of_one_size(single, spec, InferenceConfig("whole", scales=scales)))
    assert [len(batch["image"]) for batch in batches] == wanted
    assert [index for batch in batches for index in batch["index"].tolist()] == [*range(len(sizes))]
