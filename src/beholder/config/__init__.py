"""The one config schema: every setting of every stage, its type, default, unit and meaning, and how it is read.

    section           what every group of settings has in common
    parts data run    the settings themselves
    stages            what tells the stages apart
    studies           several runs as one question
    file              YAML -> `RunConfig`, overrides, the dump that loads back, hash, difference, JSON schema
    tree validate     YAML -> plain data with places -> config, or everything that is wrong, as ``file:line:col``
    inert wording     settings without effect; what a setting takes and which name was meant

The field docstrings become the JSON schema's descriptions (``beholder schema``), so an editor shows them.
"""

from beholder.config.data import (
    CAPTION_SPAM,
    DataConfig,
    FeaturesConfig,
    HygieneConfig,
    HygieneLimits,
    PromptingConfig,
    SourceConfig,
)  # fmt: skip
from beholder.config.parts import (
    ConnectorConfig,
    LlmConfig,
    LoraConfig,
    ModelConfig,
    ProjectorConfig,
    ResamplerConfig,
    VisionConfig,
)  # fmt: skip
from beholder.config.run import (
    AblationConfig,
    EvalConfig,
    GenerateConfig,
    LearningRates,
    PerGroup,
    RunConfig,
    TrainConfig,
    WeightDecays,
)  # fmt: skip
from beholder.config.section import Cadence, Decided, Fraction, Positive, Section, decided_by, settings
from beholder.config.stages import STAGES, BestRule, GateConfig, Stage, StageName, usual_gate
from beholder.config.studies import SCALES, SweepConfig
from beholder.types import DatasetKind

__all__ = [
    "CAPTION_SPAM", "SCALES", "STAGES", "AblationConfig", "BestRule", "Cadence", "ConnectorConfig", "DataConfig",
    "DatasetKind", "Decided", "EvalConfig", "FeaturesConfig", "Fraction", "GateConfig", "GenerateConfig",
    "HygieneConfig", "HygieneLimits", "LearningRates", "LlmConfig", "LoraConfig", "ModelConfig", "PerGroup",
    "Positive", "ProjectorConfig", "PromptingConfig", "ResamplerConfig", "RunConfig", "Section", "SourceConfig",
    "Stage", "StageName", "SweepConfig", "TrainConfig", "VisionConfig", "WeightDecays", "decided_by", "settings",
    "usual_gate",
]  # fmt: skip
