"""The one config schema: every setting of every stage, its type, default, unit and meaning, and how it is read.

    section           what every group of settings has in common
    parts             the model's settings
    data              the data's, the feature store's, and how a sample is laid out
    monitors          what a run is watched with: one record each
    distill           what a student learns from a teacher
    run               training, evaluation, ablation, and `RunConfig`, which holds every section
    stages            here a stage is added: one record each, with its gates
    studies           several runs as one question
    file              the door: a config file and overrides in, and out again; hash, difference, JSON schema
    tree validate     what is behind it: YAML -> data with places -> config, or everything wrong as ``file:line:col``
    others_names      settings as the stage-4 plan and ms-swift call them, put where they are said here
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
from beholder.config.distill import DistillConfig, TeacherConfig
from beholder.config.monitors import (
    MONITORED,
    MONITORS,
    RETAINED,
    SHARES,
    STRENGTH_LINE,
    WATCHED,
    Monitor,
    Watched,
    folded,
    in_script,
)
from beholder.config.parts import (
    ConnectorConfig,
    Layers,
    LlmConfig,
    LoraConfig,
    ModelConfig,
    ProjectorConfig,
    ResamplerConfig,
    StudentConfig,
    VisionConfig,
    names_modules,
    no_layers,
)  # fmt: skip
from beholder.config.run import (
    GREEDY,
    NEGATION,
    AblationConfig,
    EvalConfig,
    GenerateConfig,
    IrrelevantConfig,
    LearningRates,
    OodConfig,
    RunConfig,
    TrainConfig,
    WeightDecays,
)  # fmt: skip
from beholder.config.section import Cadence, Decided, Fraction, Positive, Section, decided_by, no_pattern, settings
from beholder.config.stages import (
    GUARDRAILS,
    STAGES,
    BestRule,
    GateConfig,
    GuardrailConfig,
    Stage,
    StageName,
    usual_gate,
)
from beholder.config.studies import SCALES, DistillationConfig, FootprintConfig, PointSetting, StudyConfig, SweepConfig
from beholder.types import DatasetKind

__all__ = [
    "CAPTION_SPAM", "GREEDY", "GUARDRAILS", "MONITORED", "MONITORS", "NEGATION", "RETAINED", "SCALES", "SHARES",
    "STAGES", "STRENGTH_LINE", "WATCHED", "AblationConfig", "BestRule", "Cadence", "ConnectorConfig", "DataConfig",
    "DatasetKind", "Decided", "DistillConfig", "DistillationConfig", "EvalConfig", "FeaturesConfig", "FootprintConfig",
    "Fraction", "GateConfig", "GenerateConfig", "GuardrailConfig", "HygieneConfig", "HygieneLimits", "IrrelevantConfig",
    "Layers", "LearningRates", "LlmConfig", "LoraConfig", "ModelConfig", "Monitor", "OodConfig", "PointSetting",
    "Positive", "ProjectorConfig", "PromptingConfig", "ResamplerConfig", "RunConfig", "Section", "SourceConfig",
    "Stage", "StageName", "StudentConfig", "StudyConfig", "SweepConfig", "TeacherConfig", "TrainConfig", "VisionConfig",
    "Watched", "WeightDecays", "decided_by", "folded", "in_script", "names_modules", "no_layers", "no_pattern",
    "settings", "usual_gate",
]  # fmt: skip
