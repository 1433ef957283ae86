"""``beholder check``: a config and a record file are each held to their own rules."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.conftest import MakeConfig, TinyParts

from beholder.config.file import dump_config
from beholder.prepare.check import check
from beholder.types import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEHOLDER_CACHE", str(tmp_path / "cache"))


def test_a_config_says_its_data_its_rules_and_its_tokenizer(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(dump_config(tiny_config(tmp_path)))

    report = check(config)
    strict = check(config, overrides=["data.hygiene.min_tokens=50"])

    assert report.unit == "tokens" and report.accepted == report.records == 72 and not report.chat
    assert strict.accepted == 0


def test_a_record_file_is_held_to_the_stage_it_is_asked_for(tiny_parts: TinyParts, tmp_path: Path) -> None:
    guessed = check(tiny_parts.records, image_root=tiny_parts.images)
    asked = check(tiny_parts.records, image_root=tiny_parts.images, stage="instruct", rejects=tmp_path / "r.jsonl")

    assert guessed.unit == "words" and (guessed.chat, asked.chat) == (False, True)
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == len(asked.rejects)
    with pytest.raises(UserError, match="no such file"):
        check(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match="expected a file in an existing folder"):
        check(tiny_parts.records, rejects=tmp_path)
    with pytest.raises(UserError, match="DATA is a record file"):
        check(tiny_parts.records, overrides=["seed=1"])
