"""Quick checks of an encoder without finetuning it: a k-nearest-neighbor vote and a linear classifier.

Both see frozen features of the *sparse* network, from images prepared as in evaluation, no augmentation. Features are
the mean of the patch tokens after the final norm, as the finetuned classifier pools them.
"""

import math

import torch
from lightning_fabric import Fabric
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from sparsemae.card import InputSpec, ModelCard
from sparsemae.data import draws, loader, sampling, sources, transforms
from sparsemae.data.dataset import ImageDataset
from sparsemae.models import patch_side
from sparsemae.options import SourceConfig
from sparsemae.sparsity import hold_masks
from sparsemae.tasks.loading import load_model
from sparsemae.tasks.task import encoder_of
from sparsemae.training.logs import with_progress

BATCH = 256
NEIGHBORS, TEMPERATURE = 20, 0.07  # of the vote (Wu et al., arXiv 1805.01978; DINO, arXiv 2104.14294)
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""L2 penalties that the linear probe tries on a tenth of the training features."""


def probe(kind: str, model: str, data: SourceConfig, fabric: Fabric) -> dict[str, float]:
    """Top-1, top-5 and the standard error of top-1, as fractions, of a probe trained on the training split's features.

    Args:
        kind: knn or linear.
        model: a run folder or its weights, pretrained or finetuned.

    Raises:
        ValueError: if the file is foreign, or the splits differ in their classes.
    """
    return probe_network(kind, *load_model(model), data, fabric)


def probe_network(
    kind: str, network: nn.Module, card: ModelCard, data: SourceConfig, fabric: Fabric
) -> dict[str, float]:
    """As `probe`, of a model in evaluation mode with its card; ``images``, their number, is among the figures."""
    encoder = encoder_of(network).to(fabric.device)
    spec, transform = card.input, transforms.evaluation_transform(card.input)
    features, targets, classes = {}, {}, {}
    splits = sources.find_source(data)
    held_out = splits.held_out_of(card.data)
    for split in ("train", "val"):
        source = splits.open(split, held_out=held_out)
        dataset = ImageDataset(source, transform, smallest=patch_side(encoder), rules=spec)
        classes[split] = source.class_names
        features[split], targets[split] = encode(fabric, encoder, dataset, spec, data.workers)
    if classes["train"] != classes["val"]:
        raise ValueError(f"{data.root}: wanted the same classes in train and val, got {classes}")
    count = len(classes["val"])
    scores = {"knn": knn, "linear": linear}[kind](features["train"], targets["train"], features["val"], count)
    top1, top5 = (
        float(multiclass_accuracy(scores, targets["val"], count, average="micro", top_k=k)) for k in (1, min(5, count))
    )
    error = math.sqrt(top1 * (1 - top1) / len(scores))
    return {"top1": top1, "top5": top5, "standard_error": error, "images": len(scores)}


@torch.no_grad()
def encode(
    fabric: Fabric, encoder: VisionTransformer, dataset: ImageDataset, spec: InputSpec, workers: int
) -> tuple[Tensor, Tensor]:
    """Features ``[N, D]`` float32 and targets ``[N]`` of a whole set, on the device."""
    features, targets = [], []
    found = loader.batches(dataset, sampling.EvaluationSampler(len(dataset), BATCH), workers)
    with hold_masks(encoder):
        for batch in with_progress(found, "encoding", len(dataset)):
            images, target = fabric.to_device((batch["image"], batch["target"]))
            with fabric.autocast():
                tokens = encoder.forward_features(transforms.normalize(images, spec.mean, spec.std)).float()  # B L D
                features.append(encoder.fc_norm(tokens[:, encoder.num_prefix_tokens :].mean(dim=1)).float())
            targets.append(target)
    return torch.cat(features), torch.cat(targets)


def knn(train: Tensor, train_targets: Tensor, val: Tensor, classes: int) -> Tensor:
    """Votes ``[N, C]`` of the nearest training features by cosine, each weighted by ``exp(cosine / temperature)``."""
    train, val = (nn.functional.normalize(features, dim=1) for features in (train, val))
    votes = []
    for chunk in torch.split(val, BATCH):
        similarity, nearest = (chunk @ train.T).topk(min(NEIGHBORS, len(train)), dim=1)
        vote = torch.zeros(len(chunk), classes, device=val.device)
        votes.append(vote.scatter_add_(1, train_targets[nearest], (similarity / TEMPERATURE).exp()))
    return torch.cat(votes)


def linear(train: Tensor, train_targets: Tensor, val: Tensor, classes: int) -> Tensor:
    """Logits ``[N, C]`` of a multinomial logistic regression on standardized features, by L-BFGS.

    The penalty is the best of `PENALTIES` on a held-out tenth of the training features; then all of them are used.
    """
    std, mean = torch.std_mean(train, dim=0)
    train, val = ((features - mean) / (std + 1e-6) for features in (train, val))
    order = torch.from_numpy(draws.stream(0, draws.HOLDOUT).permutation(len(train))).to(train.device)
    held, rest = order[: len(order) // 10], order[len(order) // 10 :]

    def accuracy(penalty: float) -> float:
        layer = _regression(train[rest], train_targets[rest], classes, penalty)
        return float((layer(train[held]).argmax(dim=1) == train_targets[held]).float().mean())

    logits: Tensor = _regression(train, train_targets, classes, max(PENALTIES, key=accuracy))(val)
    return logits


def _regression(features: Tensor, targets: Tensor, classes: int, penalty: float) -> nn.Linear:
    layer = nn.Linear(features.shape[1], classes, device=features.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(layer(features), targets) + penalty / 2 * layer.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[arg-type, no-untyped-call]
    return layer.requires_grad_(False)
