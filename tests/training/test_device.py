"""How a device computes: its switches, what is compiled, and channels last as on a GPU."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import metrics, tiny
from torch import nn

from sparsemae.cli import main
from sparsemae.data.sampling import BatchPlan, seed_all
from sparsemae.models import build_vit
from sparsemae.options import TrainerConfig
from sparsemae.options.model import HeadConfig, InferenceConfig, ModelConfig
from sparsemae.options.tasks import SegmentConfig
from sparsemae.sparsity import MaskSchedule, Topology, add_srste_gradient, hold_masks, iter_sparse, sparsify
from sparsemae.tasks.segmentation import Segmentation
from sparsemae.tasks.sparse import make_sparse
from sparsemae.training.checkpoint import save_checkpoint
from sparsemae.training.device import check_precision, set_switches, training_forward
from sparsemae.training.optim import make_optimizer, srste_pull
from sparsemae.training.state import TrainingState
from sparsemae.training.step import optimizer_step

VIT = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}


@pytest.fixture(autouse=True)
def _switches_as_before(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    set_switches(TrainerConfig())
    torch.backends.cudnn.benchmark = False


def test_switches_are_those_of_the_settings() -> None:
    set_switches(TrainerConfig(precision="fp32"))
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    assert not matmul.allow_tf32, "fp32 is fp32"
    assert not conv.allow_tf32, "in convolutions as well"
    assert not torch.are_deterministic_algorithms_enabled()
    set_switches(TrainerConfig(precision="tf32", deterministic=True))
    assert matmul.allow_tf32
    assert conv.allow_tf32
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_tf32_without_a_cuda_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer\.precision: tf32 .* CUDA"):
        check_precision(TrainerConfig(precision="tf32", accelerator="cpu"), "tf32")


@pytest.mark.slow
def test_a_run_keeps_whether_it_is_compiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(tiny("pretrain", tmp_path / "run", "--trainer.max_steps", "1"))
    with pytest.raises(SystemExit) as status:
        main(tiny("pretrain", tmp_path / "run", "--trainer.compile", "true"))
    assert status.value.code == 2
    assert "trainer.compile was False, is True" in capsys.readouterr().err
    main(tiny("pretrain", tmp_path / "run", "--trainer.compile", "false", "--trainer.max_steps", "2"))
    assert metrics(tmp_path / "run")[-1]["step"] == 2


def test_blocks_alone_are_compiled_beside_a_synchronized_batch_norm() -> None:
    model = nn.ModuleDict({"encoder": build_vit("vit_base_patch16_224", VIT, 32), "norm": nn.SyncBatchNorm(4)})
    trainer = TrainerConfig(compile=True, precision="fp32")
    cuda = torch.device("cuda")
    assert training_forward(model, trainer, cuda) is model
    assert all(block._compiled_call_impl is not None for block in model["encoder"].blocks)
    whole = training_forward(nn.Linear(2, 2), trainer, cuda)
    assert isinstance(whole, torch._dynamo.OptimizedModule)


@pytest.mark.slow
def test_a_step_continues_exactly_with_channels_last(tmp_path: Path) -> None:
    config = SegmentConfig(
        model=ModelConfig(args=VIT), head=HeadConfig(width=8, auxiliary_width=8), out_indices=[0, 1, 2, 3],
        inference=InferenceConfig(stride=16),
    )  # fmt: skip
    config.data.img_size = 32
    task = Segmentation(config)
    task.class_names = ["a", "b", "c"]
    batch = task.example_batch(nn.Identity(), 2)

    def make() -> TrainingState:
        torch.manual_seed(0)
        model = task.build(task.card()).train()
        make_sparse(model, config.sparse)
        fabric: Any = SimpleNamespace(device=torch.device("cuda"), world_size=1)
        task.prepare(model, fabric, BatchPlan.make(4, 2, None, 1))
        assert torch.backends.cudnn.benchmark
        assert not model.encoder.patch_embed.proj.weight.is_contiguous()
        return TrainingState(
            model, make_optimizer(model, config.optim), None, MaskSchedule(model), Topology(model),
            origin={"config": {}, "packages": {}, "images": None},
        )  # fmt: skip

    def steps(state: TrainingState, count: int) -> None:
        for _ in range(count):
            seed_all(0, state.done)
            for group in state.optimizer.param_groups:
                group["lr"] = 1e-3
            optimizer_step(
                state.model, state.optimizer, state.masks.step(0.0),
                lambda: task.loss(state.model, batch).backward(), config.sparse, config.optim,
            )  # fmt: skip
            state.done += 1

    whole, half, resumed = make(), make(), make()
    steps(whole, 4)
    steps(half, 2)
    save_checkpoint(tmp_path / "step-00000002", *half.to_save(task.card()))
    resumed.restore(tmp_path / "step-00000002")
    steps(resumed, 2)
    for (name, wanted), got in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(wanted, got), name
        assert resumed.optimizer.state[got]["exp_avg"].stride() == got.stride(), name


def test_deterministic_segmentation_on_cuda_is_refused() -> None:
    config = SegmentConfig()
    config.trainer.deterministic = True
    fabric: Any = SimpleNamespace(device=torch.device("cuda"), world_size=1)
    with pytest.raises(ValueError, match=r"trainer\.deterministic"):
        Segmentation(config).prepare(nn.Conv2d(1, 1, 1), fabric, BatchPlan.make(4, 4, None, 1))


def test_the_pull_is_what_the_term_takes_of_a_pruned_weight_in_a_step() -> None:
    strength, lr, gradient = 1e-3, 1e-2, 0.05
    model = nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(64, 8))}).double()
    sparsify(model, "2:32")
    ((name, layer),) = iter_sparse(model)
    optimizer = torch.optim.AdamW([layer.weight], lr=0.0, betas=(0.0, 0.999), eps=0.0, weight_decay=0.0)
    assert srste_pull(optimizer, model, strength) == {}, "no second moment yet"
    for _ in range(3):
        layer.weight.grad = torch.full_like(layer.weight, gradient)
        optimizer.step()
    pull = srste_pull(optimizer, model, strength)[name]
    assert pull == pytest.approx(strength / gradient)
    before, pruned = layer.weight.detach().clone(), ~layer.current_mask()
    layer.weight.grad = torch.zeros_like(layer.weight)
    with hold_masks(model):
        add_srste_gradient(model, strength)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    taken = ((before - layer.weight.detach()) / before)[pruned]
    moved = 0.999 * (1 - 0.999**3) / (1 - 0.999**4)  # of v, by the step itself
    torch.testing.assert_close(taken, torch.full_like(taken, lr * pull / moved**0.5), rtol=1e-4, atol=0)
