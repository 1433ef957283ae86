"""A run's use of the feature store: filled before the loop with what training and measuring will ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from beholder.config import RunConfig
from beholder.data.images import ImagePipeline
from beholder.store.features import FeatureStore, FillReport, store_dir
from beholder.train.distributed import Dist
from beholder.train.reporter import Reporter
from beholder.types import ImageGeometry, ImageRef


class StoredFeatures:
    """The store of a run, None until it is filled; it stays None where the config switches it off."""

    def __init__(self) -> None:
        self.store: FeatureStore | None = None
        self.report: FillReport | None = None

    def fill(
        self,
        refs: Iterable[ImageRef],
        *,
        cfg: RunConfig,
        tower: Callable[[torch.Tensor], torch.Tensor],
        tower_fingerprint: str,
        geometry: ImageGeometry,
        pipeline: ImagePipeline,
        dist: Dist,
        reporter: Reporter,
    ) -> list[str]:
        """Store the tower's features of every image of ``refs``; gives what a reader of the report must know of it."""
        store = FeatureStore(
            store_dir(cfg.features),
            tower_fingerprint=tower_fingerprint,
            pipeline_fingerprint=pipeline.fingerprint,
            num_patches=geometry.num_patches,
            d_vision=geometry.d_vision,
            max_bytes=int(cfg.features.max_gb * 1e9),
        )
        with reporter.progress("features") as tick:
            report = store.fill(
                refs, tower, pipeline, batch_size=32, progress=tick, on_bad_image=cfg.data.on_bad_image,
                rank=dist.rank, world_size=dist.world_size,
            )  # fmt: skip
            dist.barrier()
        reporter.line("features", report.summary)
        self.store, self.report = store, report
        over = int(dist.all_reduce_sum([float(report.over_cap)])[0])
        if not over:
            return []
        return [
            f"Feature store: {over} images did not fit into features.max_gb = {cfg.features.max_gb:g} GB; the tower "
            "saw them at every pass."
        ]
