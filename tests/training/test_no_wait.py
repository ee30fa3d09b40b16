"""A step leaves the host nothing to wait for: on fake CUDA tensors, and with backward on a CPU."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsemae.data.crops import Crop, Crops
from sparsemae.data.sampling import BatchPlan
from sparsemae.options import DecoderConfig, HeadConfig, InferenceConfig, ModelConfig, SparseConfig
from sparsemae.options.data import ImageDataConfig, MaskDataConfig
from sparsemae.options.tasks import FinetuneConfig, PretrainConfig, SegmentConfig, TrainingConfig
from sparsemae.sparsity import MaskSchedule, freeze, iter_sparse
from sparsemae.tasks import task_class
from sparsemae.tasks.sparse import make_sparse
from sparsemae.tasks.task import Task
from sparsemae.training.optim import make_optimizer
from sparsemae.training.step import optimizer_step

ARGS = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
MODEL = ModelConfig(args=ARGS, drop_path=0.1)
JOBS: dict[str, TrainingConfig] = {
    "pretrain": PretrainConfig(
        model=MODEL, decoder=DecoderConfig(32, 1, 2), data=ImageDataConfig(img_size=32), dense_loss_weight=0.1
    ),
    "finetune": FinetuneConfig(model=MODEL, data=ImageDataConfig(img_size=32), mixup=0.8, cutmix=1.0, erasing=1.0),
    "segment": SegmentConfig(
        model=MODEL, head=HeadConfig(width=8, auxiliary_width=8), out_indices=[0, 1, 2, 3],
        data=MaskDataConfig(img_size=32), inference=InferenceConfig(stride=16),
    ),
}  # fmt: skip
BATCH = 4


class OnDevice(TorchDispatchMode):
    """Refuses what computes with a tensor of the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
        assert devices <= {"cuda"}, f"{func}: wanted tensors of the device alone, got {devices}"
        return result


class NoWait(TorchDispatchMode):
    """Refuses what reads a number of the device, has a size that it must tell, or copies to or from it."""

    WAITING = (
        torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select, torch.ops.aten.equal,
        torch.ops.aten._unique2, torch.ops.aten.lift_fresh, torch.ops.aten.is_nonzero,
    )  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in self.WAITING, f"{func} waits for the device"
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_):
            kinds = {index.dtype for index in tree_leaves(args[1]) if isinstance(index, Tensor)}
            assert torch.bool not in kinds, f"{func} by a mask waits for the device"
        assert "device" not in (kwargs or {}) or func.overloadpacket is not torch.ops.aten._to_copy, f"{func} copies"
        return func(*args, **(kwargs or {}))


def prepared(job: str, state: str, device: str) -> tuple[Task[Any], nn.Module]:
    """A task that is ready for that device, and its model in one of the `STATES`, on the CPU."""
    sparse, change = STATES[state]
    config = copy.deepcopy(JOBS[job])
    config.sparse = sparse
    task = task_class(config.task)(config)
    task.class_names = [f"class {number}" for number in range(5)]
    model = task.build(task.card(), config.model.drop_path)
    make_sparse(model, sparse)
    batches = BatchPlan.make(images=16, global_batch=BATCH, device_batch=None, world=1)
    fabric: Any = SimpleNamespace(device=torch.device(device), world_size=1, autocast=nullcontext)
    task.prepare(model, fabric, batches)
    change(model.train())
    return task, model


def taken(model: nn.Module) -> None:
    """Weights as a file has them."""
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})


STATES: dict[str, tuple[SparseConfig, Callable[[nn.Module], object]]] = {
    "new": (SparseConfig(), lambda model: None),
    "loaded": (SparseConfig(term="decoupled", strength=1e-2), taken),
    "frozen": (SparseConfig(), freeze),
    "fixed": (SparseConfig(mask="fixed"), lambda model: None),
}  # fmt: skip
"""Options, and what is done to the model before the step."""


def step(task: Task[Any], model: nn.Module, backward: Callable[[], object], schedule: MaskSchedule) -> None:
    """Two optimizer steps as the loop takes them: the first one makes the optimizer's state."""
    optimizer, optim = make_optimizer(model, task.config.optim), task.config.optim
    optim.clip_grad = 1.0
    for _ in range(2):
        assert optimizer_step(model, optimizer, schedule.step(0.5), backward, task.config.sparse, optim)


@pytest.mark.slow
@pytest.mark.holds("fast.7")
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("job", JOBS)
def test_a_step_on_a_fake_device_has_no_tensor_of_the_cpu(job: str, state: str) -> None:
    """Forward, loss, optimizer and after-step; autograd of fake CUDA tensors needs a real device."""
    task, model = prepared(job, state, "cuda")
    example = task.example_batch(model, BATCH)
    with FakeTensorMode() as mode, torch.no_grad():

        def to_device(tensor: Tensor) -> Tensor:
            return mode.from_tensor(tensor).to("cuda")

        model._apply(to_device)  # type: ignore[no-untyped-call]
        batch = {name: to_device(tensor) for name, tensor in example.items()}
        schedule, forward = MaskSchedule(model, decay_epochs=1.0 * (state == "new")), task.wrapped(model)

        def backward() -> None:
            loss = task.loss(forward, batch)
            assert isinstance(loss, FakeTensor)
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)

        with OnDevice():
            step(task, model, backward, schedule)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}


@pytest.mark.slow
@pytest.mark.holds("fast.7")
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("job", JOBS)
def test_a_step_waits_for_nothing(job: str, state: str) -> None:
    task, model = prepared(job, state, "cpu")
    batch, forward = task.example_batch(model, BATCH), task.wrapped(model)
    schedule = MaskSchedule(model, decay_epochs=1.0 * (state == "new"), freeze_epoch=0.5 if state == "loaded" else None)
    average = ModelEmaV3(model, decay=0.9)
    with NoWait():
        step(task, model, lambda: task.loss(forward, batch).backward(), schedule)  # type: ignore[no-untyped-call]
        average.update(model)
    for name, layer in iter_sparse(model):
        assert layer.weight.isfinite().all(), name


@pytest.mark.holds("fast.7")
def test_crops_come_to_the_device_without_a_wait() -> None:
    crops = Crops.of([Crop(torch.zeros(40 + number, 50, 3, dtype=torch.uint8), number == 1, 32, "bicubic")
                      for number in range(3)])  # fmt: skip
    with NoWait():
        assert crops.to("cpu").shape == (3, 3, 32, 32)
    with FakeTensorMode() as mode:
        there = replace(crops, pixels=mode.from_tensor(crops.pixels).to("cuda"))
        with OnDevice():
            assert there.to("cuda").device.type == "cuda"


@pytest.mark.holds("fast.7")
def test_what_waits_is_noticed() -> None:
    ones = torch.ones(3)
    with NoWait():
        for waiting in (lambda: ones.sum().item(), lambda: ones[ones > 0], lambda: torch.tensor([1.0, 2.0])):
            with pytest.raises(AssertionError, match=r"waits|copies"):
                waiting()
    with FakeTensorMode() as mode, OnDevice(), pytest.raises(AssertionError, match="device alone"):
        mode.from_tensor(ones) + 1
