"""Every training, whatever its task: open, build, start, make sparse, fit, freeze, save."""

from dataclasses import replace
from pathlib import Path

from sparsemae.data.record import record
from sparsemae.data.sampling import INIT, BatchPlan, seed_all
from sparsemae.models.architecture import architecture_of
from sparsemae.models.start import start_from
from sparsemae.models.weights import save_model
from sparsemae.options import TrainingConfig
from sparsemae.packing.pack import check_blocks
from sparsemae.sparsity import freeze, iter_sparse, summarize
from sparsemae.tasks import task_class
from sparsemae.tasks.sparse import make_sparse, mask_schedule
from sparsemae.tasks.task import encoder_of
from sparsemae.training.fit import fit
from sparsemae.training.run import start, with_pixels_of_before
from sparsemae.training.subject import Subject


def train(config: TrainingConfig) -> Path:
    """Run (or continue) a training; returns the file of its weights, frozen where the task ends in a frozen model."""
    config, notes = with_model_of_source(with_pixels_of_before(config))
    task = task_class(config.task)(config)
    task.open_data()
    card, sparse = task.card(), config.sparse
    seed_all(config.seed, INIT)
    model = task.build(card, config.model.drop_path)
    dataset, _ = task.datasets(model)

    run = start(config)
    images = record(task.sources, config.data.root)
    run.compare_images(images)
    trainer = run.trainer  # device_batch resolved
    plan = BatchPlan.make(len(dataset), trainer.global_batch, trainer.device_batch, run.fabric.world_size)
    if config.init is not None:
        started = start_from(model, config.init)
        card = replace(card, license=started.license)
        run.log.info(f"{config.init}: {started}")
    make_sparse(model, sparse)
    try:
        check_blocks(encoder_of(model))
    except ValueError as error:
        notes.append(f"warning: this model can be trained, not packed: {error}")
    run.log.info("\n".join([str(summarize(encoder_of(model))), *notes, *task.notes(model)]))
    task.prepare(model, run.fabric, plan)
    card = replace(card, patterns={name: str(layer.pattern) for name, layer in iter_sparse(model)})

    masks = mask_schedule(model, sparse, trainer, plan)
    metrics = fit(run, Subject(task, model, task.wrapped(model), dataset, card, masks, plan, images))
    frozen = task.freezes and sparse.pattern != "dense"
    if frozen:
        freeze(model)
    path = run.folder / "model.safetensors"
    if run.fabric.is_global_zero:
        save_model(path, model, replace(card, frozen=frozen, metrics=metrics))
        run.log.info(f"wrote {path}: {task.result(metrics)}")
    return path


def with_model_of_source(config: TrainingConfig) -> tuple[TrainingConfig, list[str]]:
    """The options with the network of the weights to start from, where the user names none, and what to say of it."""
    if config.init is None or config.model.name is not None:
        return config, []
    found = architecture_of(config.init, config.model.args)
    model = replace(config.model, name=found.name, args=found.args)
    return replace(config, model=model), [f"{config.init}: {found} {found.note and f'({found.note})'}".rstrip()]
