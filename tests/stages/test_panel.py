"""What the stages' records name is there."""

from __future__ import annotations

import inspect

from beholder import probes
from beholder.config import STAGES, DatasetKind, RunConfig
from beholder.data.containers import CONTAINERS
from beholder.data.formats import DATASETS, SHAPES
from beholder.stages.panel import PANEL
from beholder.train.objectives import OBJECTIVES
from beholder.types import ShapeName


def test_every_measurement_and_objective_of_a_stage_exists_and_every_row_is_used() -> None:
    for stage in STAGES.values():
        assert set(stage.measures) <= PANEL.keys() and stage.objective in OBJECTIVES
        assert stage.template in stage.templates and len(set(stage.measures)) == len(stage.measures)
    assert {name for stage in STAGES.values() for name in stage.measures} == PANEL.keys()


def test_a_stage_that_names_none_is_the_first_it_may_be_meant_as_and_there_is_always_one() -> None:
    from beholder.config import LlmConfig, LoraConfig, ModelConfig, VisionConfig
    from beholder.config.stages import stage_of

    def model(enable: bool) -> ModelConfig:
        return ModelConfig(
            llm=LlmConfig(name_or_path="x"), vision=VisionConfig(name_or_path="y"), lora=LoraConfig(enable=enable)
        )

    assert stage_of(None, model(True)) is STAGES["instruct"] and stage_of(None, model(False)) is STAGES["align"]
    assert stage_of("instruct", model(False)) is STAGES["instruct"]
    assert stage_of("unheard of", object()) is STAGES["align"]  # a config in error, for its other mistakes


def test_what_the_settings_know_of_layouts_is_what_the_layouts_say() -> None:
    from typing import get_args

    assert tuple(DATASETS) == get_args(DatasetKind) and tuple(SHAPES) == get_args(ShapeName)
    for kind in DATASETS.values():
        assert set(kind.containers) <= set(CONTAINERS) and set(kind.shapes) <= set(SHAPES)


def test_no_file_but_the_stages_knows_a_stages_name() -> None:
    """Beside the quickstart, whose parts are called after what they teach. One stage is called as the section that says
    what it learns from."""
    import re
    from pathlib import Path

    root = Path(inspect.getfile(probes)).parents[1]
    named = re.compile(rf"""["'](?:{"|".join(map(re.escape, STAGES.keys() - RunConfig.model_fields.keys()))})["']""")
    found = {str(p.relative_to(root)) for p in root.rglob("*.py") if named.search(p.read_text(encoding="utf-8"))}
    assert found <= {"config/stages.py", "prepare/quickstart.py"}
