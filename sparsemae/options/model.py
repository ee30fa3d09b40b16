"""The network: the ViT, what stands around it, and which of its weights are trained sparse."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sparsemae.limits import ABOVE_0, AT_LEAST_0, AT_LEAST_1, BELOW_1, Options, option

DEFAULT_MODEL = "vit_base_patch16_224"


@dataclass
class ModelConfig(Options):
    """The vision transformer."""

    prefix = "model."

    name: str | None = option(None, from_data=True)
    """Any timm VisionTransformer; None: that of the weights to start from, or vit_base_patch16_224 from scratch."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm's constructor that differ, for example {depth: 4, embed_dim: 128}."""
    drop_path: float = option(0.1, BELOW_1, from_data=True)
    """Stochastic depth of the last block, 0 to below 1; linear from 0 at the first."""


@dataclass
class DecoderConfig(Options):
    """MAE's decoder, dense, used in pretraining only."""

    prefix = "decoder."

    embed_dim: int = option(512, AT_LEAST_1, from_data=True)
    """Embedding dimension of the decoder."""
    depth: int = option(8, AT_LEAST_0, from_data=True)
    """Blocks of the decoder."""
    num_heads: int = option(16, AT_LEAST_1, from_data=True)
    """Attention heads of the decoder."""


@dataclass
class HeadConfig(Options):
    """A segmenter's head: UperNet with an auxiliary one, or a light one, which a packed file can hold."""

    prefix = "head."

    width: int = option(512, AT_LEAST_1, from_data=True)
    """Channels of UperNet's maps, or of segformer's fused one; linear has none."""
    auxiliary_width: int = option(256, AT_LEAST_1, from_data=True)
    """Channels of the map of UperNet's auxiliary head."""
    auxiliary_weight: float = option(0.4, AT_LEAST_0)
    """Weight of the auxiliary head's loss; the main one's is 1."""
    kind: Literal["upernet", "linear", "segformer"] = "upernet"
    """upernet: the paper's kin; segformer: the four maps projected, summed and fused, token by token; linear: one
    linear layer on the last map. The last two can be packed."""
    dropout: float = option(0.0, BELOW_1)
    """Probability of dropping a channel before the last layer of each head; mmsegmentation's is 0.1."""


@dataclass
class InferenceChange:
    """How a segmenter is to look at an image, where it is said."""

    mode: Literal["slide", "whole"] | None = None
    """slide: windows of the training's size, averaged where they overlap; whole: the image at once."""
    stride: int | None = None
    """Distance of the windows, px; None: in a training two thirds of their side, later the model's own."""
    scales: list[float] | None = None
    """Scales of the image, whose predictions are averaged; the field's are [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]."""
    flip: bool | None = None
    """Average with the prediction of the mirrored image."""

    def applied_to(self, inference: "InferenceConfig") -> "InferenceConfig":
        """The same with what is given here in place of its own."""
        return replace(inference, **{name: value for name, value in vars(self).items() if value is not None})


@dataclass
class InferenceConfig(InferenceChange):
    """How a segmenter looks at an image."""

    mode: Literal["slide", "whole"] = "slide"
    stride: int | None = option(None, from_data=True)
    scales: list[float] = field(default_factory=lambda: [1.0])
    flip: bool = False

    def of_window(self, window: int) -> "InferenceConfig":
        """The same with its stride. Raises ValueError if it cannot work with a window of that side, px."""
        if self.stride is None:
            return replace(self, stride=max(1, window * 2 // 3)).of_window(window)
        if self.mode == "slide" and not 1 <= self.stride <= window:
            raise ValueError(f"inference.stride: wanted 1 to the window's {window} px, got {self.stride}")
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"inference.scales: wanted scales above 0, got {self.scales}")
        return self


@dataclass
class SparseConfig(Options):
    """N:M sparse training of the encoder."""

    prefix = "sparse."

    pattern: str = "2:32"
    """n kept of every m input features; "dense" trains without sparsity."""
    strength: float = option(2e-4, AT_LEAST_0)
    """SR-STE's lambda: pull of the pruned weights to 0; 0 is plain straight-through."""
    term: Literal["gradient", "decoupled"] = "gradient"
    """Where SR-STE's term acts: inside the gradient (as published), or as a shrink after the step (try 0.5)."""
    init_weights: Literal["full", "sparse"] = "full"
    """full: start from all latent weights; sparse: from the sparse network alone, the pruned weights set to 0."""
    schedule: Literal["constant", "gradual"] = option("constant", from_data=True)
    """gradual: keep m of m at first and halve n in stages, for a start from a dense model."""
    gradual_epochs: float | None = option(None, ABOVE_0)
    """Epochs until a gradual schedule reaches the pattern; None: half of the training."""
    dense_epochs: float = option(0.0, AT_LEAST_0)
    """Epochs of dense warm-up before sparsity starts."""
    decay_epochs: float = option(0.0, AT_LEAST_0)
    """Epochs, after the dense ones, in which the pruned weights fade from the forward, linearly from 1 to 0 times their
    value (mask decay, arXiv 2402.04744); 0: at once."""
    allocation: Literal["uniform", "magnitude"] = "uniform"
    """uniform: every layer has the pattern; magnitude: each has n/2, n, 2n or 4n of m, those of one total that keep the
    largest sum of squared weights (after DominoSearch, NeurIPS 2021)."""
    allocation_epoch: float = option(0.0, AT_LEAST_0)
    """Epoch at which the weights are looked at for that; 0: those the training starts from."""
    freeze_epoch: float | None = option(None, AT_LEAST_0)
    """Epoch from which the mask stays as it is; None: it moves to the end."""
    mask: Literal["dynamic", "fixed"] = "dynamic"
    """dynamic: the mask follows the latent weights; fixed: the mask of the starting weights, frozen (a baseline)."""
    exclude: list[str] = field(default_factory=list)
    """Glob patterns on encoder layers that stay dense, for example blocks.0.*"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradual_epochs is not None and self.schedule != "gradual":
            raise ValueError("sparse.gradual_epochs: wanted sparse.schedule=gradual with it, got constant")
        moves = self.schedule == "gradual" or self.dense_epochs or self.decay_epochs or self.freeze_epoch is not None
        allocated = self.allocation != "uniform"
        if self.mask == "fixed" and (moves or allocated):
            raise ValueError(
                "sparse.mask: wanted dynamic with sparse.schedule=gradual, dense_epochs, decay_epochs, freeze_epoch or "
                "allocation, got fixed"
            )
        if self.freeze_epoch is not None and self.freeze_epoch < self.dense_epochs:
            raise ValueError(
                f"sparse.freeze_epoch: wanted at least sparse.dense_epochs={self.dense_epochs:g}, when there is a "
                f"mask, got {self.freeze_epoch:g}"
            )
        if self.schedule == "gradual" and self.init_weights == "sparse":
            raise ValueError(
                "sparse.schedule: wanted constant with sparse.init_weights=sparse, which has the pattern at once, "
                "got gradual"
            )
        if self.allocation_epoch and not allocated:
            raise ValueError("sparse.allocation_epoch: wanted sparse.allocation=magnitude with it, got uniform")
        if allocated and (self.pattern == "dense" or self.init_weights == "sparse"):
            raise ValueError(
                "sparse.allocation: wanted uniform with sparse.pattern=dense or init_weights=sparse, got magnitude"
            )
