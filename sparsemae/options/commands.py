"""The options of the commands that train nothing."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sparsemae.limits import ABOVE_0, AT_LEAST_1, MAX_PIXELS, READ, Options, option
from sparsemae.options.data import SourceConfig
from sparsemae.options.model import InferenceChange
from sparsemae.processors import processors


@dataclass
class DemoConfig:
    """The whole chain on embedded real images."""

    task: Literal["classify", "segment", "heads"] = "classify"
    """What the pretrained encoder is finetuned for; segment has masks that are computed, not drawn by people; heads:
    the same with each of a segmenter's heads."""
    out: str | None = None
    """Folder of the demo's runs, emptied first; None: runs/demo, runs/demo-segment or runs/demo-heads."""
    minutes: float | None = None
    """Time limit: stages that would not end in time are left out; None: 6, or 12 for segment and heads."""
    seed: int = 0
    """Seed of everything random."""


@dataclass
class EvaluateConfig:
    """Accuracy of a finetuned classifier or of a probe on a pretrained model, or mIoU of a segmenter."""

    bare: ClassVar[bool] = True

    model: str = field(metadata=READ)
    """The model: a packed file, a run folder, or its model.safetensors."""
    data: SourceConfig = field(default_factory=SourceConfig)
    """Where the images lie, where not those that the model's run was trained on; their preparation comes from the
    model's file."""
    split: Literal["train", "val", "test", "all"] | None = None
    """What to evaluate on; None: the validation split, or, of a folder without splits, the part that the model's own
    training held out, or all of it if the model was trained on another."""
    probe: Literal["knn", "linear"] | None = None
    """Instead of the model's own head: a k-nearest-neighbor vote, or a linear classifier, on its frozen features."""
    inference: InferenceChange = field(default_factory=InferenceChange)
    """Of a segmenter: how it looks at an image, where not as its recipe says."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to run; packed files run on the CPU."""


@dataclass
class PackConfig:
    """Pack a finetuned model into one small file that runs without torch."""

    checkpoint: str = field(metadata=READ)
    """The model: a run folder, its model.safetensors, or a checkpoint, whose mask is frozen as it is now."""
    out: str
    """The packed file to write."""
    dtype: Literal["bf16", "fp32", "int8"] = "bf16"
    """Type of the kept weights; int8 has one scale per output row."""
    license: str = ""
    """License of the weights, recorded in the file; none: that of the weights the training started from."""
    data: SourceConfig | None = None
    """Images to check the file on, all of its validation part; None: eight random ones."""


@dataclass
class ExportConfig:
    """Write a trained model as timm, transformers or ONNX Runtime open it."""

    model: str = field(metadata=READ)
    """The model: a run folder, its model.safetensors, or a packed file."""
    folder: str
    """New folder to write."""
    to: Literal["timm", "hf", "onnx"] = "timm"
    """timm, hf: one folder of a classifier that timm's and transformers' Auto classes open; hf of a pretrained run: a
    ViTMAEForPreTraining; onnx: the forward of a classifier or a segmenter, with its preprocessing in the metadata."""
    masked: bool = False
    """Of a pretrained run: the kept weights alone, the others 0, in place of all latent ones."""
    license: str = ""
    """License of the weights, as the hub names it; none: that of the weights the training started from."""
    push: str | None = None
    """OWNER/NAME on the hub (huggingface.co, or HF_ENDPOINT) to upload the folder to."""


@dataclass
class WebConfig:
    """Write a static page that classifies photographs in the visitor's browser."""

    bare: ClassVar[bool] = True

    model: str = field(metadata=READ)
    """The model: a packed file."""
    site: str
    """Folder of the page's files, which are replaced."""


@dataclass
class PredictConfig(Options):
    """Classify images, or with a segmenter their pixels."""

    bare: ClassVar[bool] = True

    model: str = field(metadata=READ)
    """The model: a packed file, a run folder, or its model.safetensors."""
    images: list[str] = field(metadata={"must_exist": lambda config: "-" not in config.images})
    """Image files, or folders of them; -: a file's path a line, from standard input."""
    null: bool = False
    """Paths from standard input end with NUL, as `find -print0` writes them."""
    top_k: int = option(3, AT_LEAST_1)
    """Classes to name for each image."""
    format: Literal["text", "csv", "jsonl"] = "text"
    """text: a line an image, for people; csv: a row a class, with file, rank, label, index and probability; jsonl: a
    JSON object an image."""
    out: str | None = None
    """File to write to, which appears when all is done; None: standard output."""
    pictures: str | None = None
    """Of a segmenter: folder for NAME.png, the mask as a palette PNG, and NAME-overlay.png with its legend; None:
    predictions."""
    max_pixels: int = option(MAX_PIXELS, AT_LEAST_1)
    """Of an image; a larger one is not read. Decoding takes up to 16 bytes for each."""


@dataclass
class CheckConfig(Options):
    """Read every image of a data set; exit status 2 if something would break a run."""

    data: SourceConfig = field(default_factory=lambda: SourceConfig(workers=processors()))
    """The data set; workers: processes that read, 0 for none but this one."""
    task: Literal["pretrain", "classify", "segment"] | None = None
    """What the images are for; pretrain: one class is enough; None: segment where `images` lies beside `masks`,
    `annotations` or `labels`, else classify."""
    smallest: int | None = option(None, AT_LEAST_1)
    """Shortest side that an image may have: the model's patch, px; None: 16, or 1 for segment, which enlarges."""
    write_exclude: str | None = None
    """File to write the paths to leave out to, for data.exclude: what cannot be used, and all but one of each group of
    duplicates (a validation image stays rather than a training image)."""


@dataclass
class PlanConfig(Options):
    """What a recipe of pretraining, finetuning or segmentation costs, before it runs."""

    recipe: str
    """A recipe's name, a YAML file, or the config.yaml of a run; or pretrain, finetune or segment, and after it the
    words of such a training."""
    job: str | None = None
    """pretrain, finetune or segment; None: the one whose options the recipe has, or that its name says."""
    devices: int | None = option(None, AT_LEAST_1)
    """Devices per machine; None: the recipe's."""
    device_batch: int | None = option(None, AT_LEAST_1)
    """Images per device and forward; None: the recipe's."""
    images: int | None = option(None, AT_LEAST_1)
    """Training images, of which a recipe's data.train_images may use fewer; None: ImageNet-1K's, SceneParse150's, or
    the embedded ones if they are the recipe's data.source."""
    classes: int | None = option(None, AT_LEAST_1)
    """Classes of a finetuned model, which a recipe does not say; None: those of the same."""
    images_per_second: float | None = option(None, ABOVE_0)
    """Rate of training, over all devices together; without it no hours are given."""
    measure: bool = False
    """Take the rate on this machine, in about 20 seconds, of training steps with their images."""
    words: list[str] | None = None
    """The words of a training, in place of a recipe; filled in from what follows its name."""


@dataclass
class ReportConfig:
    """One page of curves, moving masks and settings of one or more runs."""

    runs: list[str] = field(metadata=READ)
    """Run folders; several are laid over one another."""
    out: str | None = None
    """The page; None: report.html in the first run's folder."""


@dataclass
class BenchmarkConfig:
    """Measure packed models against dense ones in other engines, training against timm's, or what saving costs."""

    section: Literal["packed", "segmentation", "training", "saving", "kernels"] = "packed"
    """packed: latency, throughput, memory and cold start of packed files and their rivals; segmentation: a
    photograph through packed segmenters, and through a dense ViT-B in OpenVINO; training: images per second
    of the input pipeline and of optimizer steps, beside timm's loader and its dense ViT-B; saving: what a checkpoint of
    ViT-B with AdamW's state costs the loop, beside a save that blocks it; kernels: every instruction set's linear
    layers, attention and norm, one by one, on one thread."""
    quick: bool = False
    """Packed models against torch alone at ViT-B's size, the first two batches, one run each: under two minutes."""
    files: list[str] = field(default_factory=list, metadata=READ)
    """Packed files; none: SparseMAE-T and -S at ViT-B/16 size with random weights, bf16 and int8."""
    engines: list[str] = field(
        default_factory=lambda: [
            "torch fp32", "torch bf16", "torch compiled bf16", "onnxruntime fp32", "onnxruntime int8",
            "openvino fp32", "openvino bf16", "openvino int8",
        ]
    )  # fmt: skip
    """Rivals of packed files to run."""
    dense: list[str] = field(default_factory=lambda: ["B", "S", "T"])
    """Dense models for them: B, S, T."""
    batches: list[int] = field(default_factory=lambda: [1, 8, 32])
    """Images per call of a packed model."""
    images: str | None = option(None, must_exist=True)
    """Folder of JPEGs for the training section, as for data.source=folder; none: its steps alone are measured."""
    step_batch: int = 8
    """Images per optimizer step of the training and saving sections; 0: the input pipeline alone is measured."""
    threads: int = 2
    """Threads of every engine, and of a step."""
    runs: int = 5
    """Timed runs of each subject, in turn with the others, of which the median counts; of kernels the shortest."""
    artifacts: str = ""
    """Folder that keeps exported models for the next time, or on whose disk checkpoints are written; none: a temporary
    one."""
    readme: str = ""
    """Markdown file with a table of the kernels section, in which this processor's rows are replaced."""
    json: str = ""
    """File to write all figures to."""
