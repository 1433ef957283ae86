"""``beholder check DATA``: `data.check` on a config's data, by its rules, or on a file that options describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beholder.config import STAGES, LlmConfig
from beholder.config.file import load_config
from beholder.data.check import CheckReport, check_data
from beholder.data.hygiene import Progress
from beholder.data.sources import guess_source
from beholder.types import DatasetKind, ShapeName, UserError


def check(
    data: str | Path,
    *,
    dataset: DatasetKind | None = None,
    shape: ShapeName | None = None,
    columns: Mapping[str, str] | None = None,
    annotations: str | Path | None = None,
    stage: str | None = None,
    image_root: str | Path | None = None,
    more_image_roots: Sequence[str | Path] = (),
    tokenizer: str | None = None,
    decode: bool = False,
    rejects: Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> CheckReport:
    """Count, measure and vet ``data``: a config's (``.yaml`` / ``.yml``), or a record file, folder or glob.

    A config says itself what its data are (held-out ones included) and by which rules; for records ``dataset``,
    ``shape``, ``columns``, ``annotations``, ``stage``, ``image_root`` and ``more_image_roots`` do. ``tokenizer`` counts
    the tokens, by default the config's. ``rejects``: file for every reject, a line of JSON each. Raises `UserError` for
    a config whose samples may be longer than its language model's table of positions.
    """
    if rejects is not None and (rejects.is_dir() or not rejects.parent.is_dir()):
        raise UserError(f"--rejects {rejects}: expected a file in an existing folder")
    if stage is not None and stage not in STAGES:
        raise UserError(f"--stage {stage}: no such stage; expected one of {', '.join(STAGES)}")
    llm = LlmConfig(name_or_path=tokenizer) if tokenizer else None
    cfg = None
    if str(data).endswith((".yaml", ".yml")):
        if dataset or shape or columns or annotations or image_root or stage:
            raise UserError(
                "--dataset, --as, --column, --annotations, --stage and --image-root describe a record file; DATA is a "
                "config file, which says these itself; remove them"
            )
        cfg = load_config(data, overrides)
        sources, llm = (*cfg.data.train_sources, *cfg.data.eval_sources), llm or cfg.model.llm
        rules: dict[str, Any] = {
            "stage": cfg.stage_record, "hygiene": cfg.hygiene, "image_token": cfg.prompting.image_token,
            "max_images": cfg.max_images, "max_megapixels": cfg.data.max_megapixels,
        }  # fmt: skip
    elif overrides:
        raise UserError("--set overrides settings of a config file, but DATA is a record file; remove it")
    else:
        root, answers = (None if path is None else str(path) for path in (image_root, annotations))
        sources = (
            guess_source(
                str(data), dataset=dataset, shape=shape, columns=columns, image_root=root, annotations=answers,
                more_image_roots=[str(path) for path in more_image_roots],
            ),
        )  # fmt: skip
        rules = {"stage": None if stage is None else STAGES[stage]}
    counter = None
    if llm is not None:
        from beholder.model.language import load_tokenizer  # torch and transformers: only where tokens are counted

        counter = load_tokenizer(llm)
    if (
        cfg is not None and not tokenizer and cfg.model.native is None
    ):  # with a tokenizer of its own, the language model need not be at hand
        from beholder.model.families import check_limits, limits_of
        from beholder.model.student import empty_of

        check_limits(limits_of(empty_of(cfg.model)), cfg)
    report = check_data(sources, counter, verify_images="decode" if decode else "exists", progress=progress, **rules)
    if rejects is not None:
        report.write_rejects(rejects)
    return report
