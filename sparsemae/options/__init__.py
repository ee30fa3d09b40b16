"""Every option with its default, its limits and its help: the dataclasses that the command line is made of.

Nothing here imports torch, timm or numpy, so that ``--help``, a misspelled option or a missing folder are answered at
once.
"""

from sparsemae.options.commands import (
    BenchmarkConfig,
    CheckConfig,
    DemoConfig,
    EvaluateConfig,
    ExportConfig,
    PackConfig,
    PlanConfig,
    PredictConfig,
    ReportConfig,
    WebConfig,
)
from sparsemae.options.data import DataConfig, ImageDataConfig, MaskDataConfig, SourceConfig
from sparsemae.options.model import (
    DEFAULT_MODEL,
    DecoderConfig,
    HeadConfig,
    InferenceChange,
    InferenceConfig,
    ModelConfig,
    SparseConfig,
)
from sparsemae.options.study import ArmConfig, SettingConfig, StudyConfig
from sparsemae.options.tasks import FinetuneConfig, PretrainConfig, SegmentConfig, TrainingConfig
from sparsemae.options.training import OptimConfig, TrainerConfig

__all__ = [
    "DEFAULT_MODEL", "ArmConfig", "BenchmarkConfig", "CheckConfig", "DataConfig", "DecoderConfig", "DemoConfig",
    "EvaluateConfig", "ExportConfig", "FinetuneConfig", "HeadConfig", "ImageDataConfig", "InferenceChange",
    "InferenceConfig", "MaskDataConfig", "ModelConfig", "OptimConfig", "PackConfig", "PlanConfig", "PredictConfig",
    "PretrainConfig", "ReportConfig", "SegmentConfig", "SettingConfig", "SourceConfig", "SparseConfig", "StudyConfig",
    "TrainerConfig", "TrainingConfig", "WebConfig",
]  # fmt: skip
