"""Every training, whatever its task: open, build, start, make sparse, fit, freeze, save."""

from dataclasses import replace
from pathlib import Path

from sparsemae.commands.result import measured, tested
from sparsemae.data.draws import INIT
from sparsemae.data.loader import UnreadableImages
from sparsemae.data.record import record
from sparsemae.data.sampling import BatchPlan, seed_all
from sparsemae.data.survey import unusable
from sparsemae.models.start import start_from
from sparsemae.models.weights import save_model
from sparsemae.options import TrainingConfig
from sparsemae.packing.pack import check_blocks
from sparsemae.report.collect import collect
from sparsemae.sparsity import freeze, summarize
from sparsemae.tasks import task_class
from sparsemae.tasks.derived import settle
from sparsemae.tasks.sparse import make_sparse, mask_schedule
from sparsemae.tasks.task import encoder_of
from sparsemae.training.fit import fit
from sparsemae.training.group import Group
from sparsemae.training.run import start, with_rules_of_before
from sparsemae.training.subject import Subject


def train(config: TrainingConfig) -> Path:
    """Run (or continue) a training; returns the file of its weights, frozen where the task ends in a frozen model."""
    with Group(config.trainer) as group:
        return _train(config, group)


def _train(config: TrainingConfig, group: Group) -> Path:
    config = with_rules_of_before(config)
    task = task_class(config.task)(config)
    task.open_data()
    config, notes = settle(config, task)
    task.settle(config)
    card, sparse = task.card(), config.sparse
    seed_all(config.seed, INIT)
    model = task.build(card, config.model.drop_path)
    dataset, held_out = task.datasets(model)

    run = start(config, group)
    images = record(task.sources, config.data.root)
    run.compare_images(images)
    if held_out is not None:  # each is to count
        unreadable = UnreadableImages(len(held_out), 0.0, at_end=True)
        unreadable.add(list(unusable(held_out.source, held_out.smallest)) if run.fabric.is_global_zero else [])
        unreadable.synchronize()
    trainer = run.trainer  # device_batch resolved
    plan = BatchPlan.make(len(dataset), trainer.global_batch, trainer.device_batch, run.fabric.world_size)
    if config.init is not None:
        started = start_from(model, config.init, sparse.init_weights == "sparse")
        card = replace(card, license=started.license)
        run.log.info(f"{config.init}: {started}")
    make_sparse(model, sparse)
    masks = mask_schedule(model, sparse, trainer, plan)
    try:
        check_blocks(encoder_of(model))
    except ValueError as error:
        notes.append(f"warning: this model can be trained, not packed: {error}")
    run.log.info(summarize(encoder_of(model)).line(), *notes, *task.notes(model))
    task.prepare(model, run.fabric, plan)

    subject = Subject(task, model, task.wrapped(model), dataset, card, masks, plan, images)
    fitted = fit(run, subject)
    frozen = task.freezes and sparse.pattern != "dense"
    if frozen:
        freeze(model)
    result = measured(run, task, model, fitted)
    card, path = (
        replace(card, patterns=masks.patterns, frozen=frozen, metrics=result.metrics),
        run.folder / "model.safetensors",
    )
    if run.fabric.is_global_zero:
        save_model(path, model, card, masks.fixed)
    result = tested(run, task, model, card, result)
    if run.fabric.is_global_zero:
        result.write(run)
        of = f"epoch {result.kept:g} of {result.epochs:g}, the best: " if result.kept == result.best else ""
        run.log.info(f"wrote {path}: {of}{task.result(result.metrics)}", *result.notes)
    collect(run, subject)
    return path
