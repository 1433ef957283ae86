"""A run's loaded parts on one bench: model, data, feature store, and the probes that measure them together.

Here the rooms meet: probes get models and batches, shared among the processes of a job. What is measured in which order
is `assessment`'s business; nothing here trains.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from beholder.config import GenerateConfig, RunConfig
from beholder.data import Data, build_data
from beholder.data.chat import EncodeError
from beholder.data.images import ImageError, content_hash
from beholder.data.sources import Reject
from beholder.evidence import Condition, Measurement
from beholder.model.build import build_vlm
from beholder.model.plan import frozen_fingerprint
from beholder.model.vlm import VisionLanguageModel
from beholder.probes import audit, golden, hallucination, loss, strata, written, wrong_images
from beholder.runs import RunDir, to_json
from beholder.store.features import FeatureStore, FillReport, store_dir
from beholder.train import restore
from beholder.train.distributed import Dist
from beholder.train.reporter import Reporter, duration
from beholder.types import Batch, Example, ImageRef, UserError

T = TypeVar("T")

NUM_GOLDEN_SHOWN = 64
"""Golden samples with pictures in the report: the seed's whole set."""
NUM_SHOWN = 24
"""Samples with pictures when there is no golden set."""
NUM_TRIED = 16
"""Training samples that are laid out before anything is trained: a template that fits none of them is told now."""


class HasId(Protocol):
    @property
    def id(self) -> str: ...


Identified = TypeVar("Identified", bound=HasId)


@dataclass
class Workbench:
    """Everything a stage works with. Probe methods give the same result on every process."""

    cfg: RunConfig
    run: RunDir
    dist: Dist
    model: VisionLanguageModel
    tokenizer: Any
    data: Data
    reporter: Reporter
    frozen: dict[str, str]
    """sha256 of each frozen part, as loaded."""
    store: FeatureStore | None = None
    fill: FillReport | None = None
    phases_s: dict[str, float] = field(default_factory=dict)
    gaps: list[str] = field(default_factory=list)
    resumed: bool = False
    """Training went on from a checkpoint of an earlier process, or ended there."""
    remeasured: bool = False
    """A run that was trained earlier is measured again."""
    started: float = field(default_factory=time.perf_counter)
    """`time.perf_counter` when the work began."""
    _content: dict[ImageRef, str] = field(default_factory=dict)
    _inner_s: list[float] = field(default_factory=lambda: [0.0])
    """Seconds of the phases inside each open phase, outermost first."""

    @property
    def fingerprints(self) -> dict[str, str]:
        """What must not have changed when a run is resumed."""
        return {
            # not the connector: it has its weights only once a checkpoint is loaded
            **{part: digest for part, digest in self.frozen.items() if part != "connector"},
            "data": self.data.train.fingerprint,
            "encoder": self.data.encoder.fingerprint,
        }

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to ``phases_s[name]``, without those of phases within."""
        started = time.perf_counter()
        self._inner_s.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.phases_s[name] = self.phases_s.get(name, 0.0) + spent - self._inner_s.pop()
            self._inner_s[-1] += spent

    # -- features

    def fill_features(self, start: int, stop: int) -> None:
        """Stores the tower's features of every image that training positions ``[start, stop)`` and evaluation need.

        Switched off, with a line that says so, under augmentation: stored features would undo it.
        """
        cfg, g = self.cfg, self.model.geometry
        if not cfg.features.enabled:
            return
        if cfg.data.augment != "none":
            self.reporter.line("features", f"off: data.augment is {cfg.data.augment}, every pass needs fresh features")
            self.gaps.append("Feature store: switched off, because data.augment changes every image at every pass.")
            return
        vision = self.model.vision
        assert vision is not None
        store = FeatureStore(
            store_dir(cfg.features),
            tower_fingerprint=vision.fingerprint(),
            pipeline_fingerprint=self.data.pipeline.fingerprint,
            num_patches=g.num_patches,
            d_vision=g.d_vision,
            max_bytes=int(cfg.features.max_gb * 1e9),
        )
        stop = min(stop, start + len(self.data.train))  # later epochs show the same images again
        refs = dict.fromkeys([*self.data.train_refs(start, stop), *self.data.eval_refs()])
        with self.phase("features"), progress(self.reporter, "features") as tick:
            report = store.fill(
                refs,
                lambda pixels: vision(pixels.to(self.model.device)),
                self.data.pipeline,
                batch_size=32,
                progress=tick,
                on_bad_image=cfg.data.on_bad_image,
                rank=self.dist.rank,
                world_size=self.dist.world_size,
            )
            self.dist.barrier()
        self.reporter.line("features", report.summary)
        self.store, self.fill = store, report
        over = int(self.dist.all_reduce_sum([float(report.over_cap)])[0])
        if over:
            self.gaps.append(
                f"Feature store: {over} images did not fit into features.max_gb = {cfg.features.max_gb:g} GB; "
                "the tower saw them at every pass."
            )

    def load(self, where: Path) -> None:
        """Put a checkpoint's connector in place, and its adapters when this run and the checkpoint have some.

        A run with adapters that starts from an alignment keeps its own fresh ones.
        """
        restore.load_connector(where, self.model.connector, self.model.connector_info())
        if restore.has_adapter(where):
            restore.load_adapter(where, self.model.language if self.model.adapters else None)

    def drop_unusable_eval(self) -> None:
        """Held-out samples that cannot be laid out leave now, counted and named; under policy ``skip`` also those whose
        image cannot be had.

        Otherwise the probes would each have to lose them on their own, the shuffle after hours of training. Raises
        `UserError` when none is left, and when none of the first training samples can be laid out.
        """
        data, kept = self.data, []
        for i, example in enumerate(data.eval_examples):
            try:
                data.encoder.encode(example)
                for ref in example.images if self.cfg.data.on_bad_image == "skip" else ():
                    data.pipeline(ref)
                kept.append(i)
            except (EncodeError, ImageError) as e:
                data.rejects.append(Reject(example.id, example.row, example.file, e.reason, str(e)))
                data.counts["rejects"][e.reason] = data.counts["rejects"].get(e.reason, 0) + 1
        if not kept:
            first = data.rejects[-1]
            raise UserError(f"no held-out sample can be used; the last of {len(data.eval_examples)}: {first.detail}")
        refused: list[EncodeError] = []
        for position in range(min(NUM_TRIED, len(data.train))):
            try:
                data.encoder.encode(data.train.example_at(position))
                break
            except EncodeError as e:
                refused.append(e)
        else:
            raise UserError(f"none of the first {len(refused)} training samples can be laid out: {refused[0]}")
        data.eval_examples = [data.eval_examples[i] for i in kept]
        data.eval_buckets = [data.eval_buckets[i] for i in kept]
        data.eval_label_len = [data.eval_label_len[i] for i in kept]
        data.counts["eval"] = len(kept)
        data.counts["eval_buckets"] = dict(Counter(data.eval_buckets))

    # -- probes, shared among processes

    def _mine(self, items: Sequence[T]) -> Sequence[T]:
        return items[self.dist.rank :: self.dist.world_size]

    def _gather(self, mine: Sequence[Any], kind: Callable[..., T]) -> list[T]:
        """Every process's records in the order of the items they were strided from."""
        parts = self.dist.gather_objects([asdict(m) for m in mine])
        total = sum(len(p) for p in parts)
        if _strided(parts):
            rows = [parts[i % len(parts)][i // len(parts)] for i in range(total)]
        else:  # policy skip: some process had a sample less; the order then says nothing
            rows = [row for part in parts for row in part]
        return [kind(**row) for row in rows]

    def batches(self, examples: Sequence[Example]) -> Iterator[Batch]:
        """This process's share of the examples as held-out batches."""
        return self.data.eval_batches(self._mine(examples), self.store, self.cfg)

    def _gather_all(
        self, mine: Sequence[Any], kind: Callable[..., Identified], examples: Sequence[Example]
    ) -> list[Identified]:
        """As `_gather`, one record for each of the examples: what was readable at the start must still be."""
        found = self._gather(mine, kind)
        if len(found) != len(examples):
            known = {f.id for f in found}
            lost = [e.id for e in examples if e.id not in known]
            raise UserError(
                f"images of {len(examples) - len(found)} held-out samples could be read when the run started and "
                f"cannot be read now ({', '.join(map(repr, lost[:5]))}); the numbers would be about other samples"
            )
        return found

    def losses(self, examples: Sequence[Example]) -> list[loss.SampleLoss]:
        """Loss of every sample in the order of ``examples``, whichever process measured it."""
        mine = loss.sample_losses(self.model, self.batches(examples))
        return self._gather_all(mine, loss.SampleLoss, examples)

    def eval_losses(self) -> list[loss.SampleLoss]:
        """Loss of every held-out sample."""
        with self.phase("evaluation"):
            return self.losses(self.data.eval_examples)

    def text_losses(self) -> list[loss.SampleLoss]:
        """Loss of every held-out target by the language model alone: no image, no connector."""
        with self.phase("evaluation"):
            mine = audit.text_losses(
                self.model, self.data.encoder, self.data.layout, self._mine(self.data.eval_examples),
                batch_size=self.cfg.eval.batch_size,
            )  # fmt: skip
        return self._gather_all(mine, loss.SampleLoss, self.data.eval_examples)

    # -- which held-out samples are measured: always balanced over length buckets, the same in every run

    @cached_property
    def sighted(self) -> list[int]:
        """Held-out samples with an image: without one, every condition is the same."""
        return [i for i, e in enumerate(self.data.eval_examples) if e.images]

    @cached_property
    def describable(self) -> list[int]:
        """Those whose last answer can be written and compared: it is there, and the turns before it fit."""
        fits: list[int] = []
        for i in self.sighted:
            if not self.data.eval_examples[i].answer_text:  # a question that nobody has answered
                continue
            try:
                self.data.encoder.encode_prompt(self.data.eval_examples[i])
                fits.append(i)
            except EncodeError:
                continue
        return fits

    @property
    def quick_sample(self) -> list[int]:
        return self.data.eval_sample(self.cfg.train.quick_eval_size, self.cfg.measure_seed)

    @property
    def ablation_sample(self) -> list[int]:
        """Of ``ablation.num_samples``."""
        return self.data.eval_sample(self.cfg.ablation.num_samples, self.cfg.measure_seed, self.sighted)

    @property
    def caption_sample(self) -> list[int]:
        """Of ``eval.caption_samples``; the golden set comes first, so that its pictures are shown under every image."""
        n = min(self.cfg.eval.caption_samples, len(self.describable))
        balanced = self.data.eval_sample(n, self.cfg.measure_seed, self.describable)
        return sorted(list(dict.fromkeys([*(i for i, _ in self.golden_items), *balanced]))[:n])

    @property
    def shown_sample(self) -> list[int]:
        """Whose pictures are in the report: the golden set, at most `NUM_GOLDEN_SHOWN` of it, else a few."""
        golden_set = [i for i, _ in self.golden_items][:NUM_GOLDEN_SHOWN]
        return golden_set or self.data.eval_sample(NUM_SHOWN, self.cfg.measure_seed, self.sighted)

    def examples(self, indices: Sequence[int]) -> list[Example]:
        return [self.data.eval_examples[i] for i in indices]

    def groups(self, indices: Sequence[int]) -> loss.Groups:
        """Strata of these held-out samples; what is rare is rare among them."""
        return strata.groups_of(self.examples(indices), [self.data.eval_buckets[i] for i in indices])

    @cached_property
    def objects(self) -> hallucination.ObjectList:
        """What CHAIR and the questions know by name."""
        return hallucination.load_objects(self.cfg.eval.object_list)

    def eval_summary(self, losses: Sequence[loss.SampleLoss]) -> list[Measurement]:
        """Token-weighted held-out loss, perplexity and accuracy, overall and by stratum."""
        seed, groups = self.cfg.measure_seed, self.groups(range(len(losses)))
        return [
            *loss.summarize(losses, "eval", seed=seed),
            *loss.summarize_groups(losses, groups, "eval", seed=seed),
        ]

    def ablation_losses(
        self,
        indices: Sequence[int],
        conditions: Sequence[Condition],
        known: Mapping[Condition, Sequence[loss.SampleLoss]] | None = None,
    ) -> dict[Condition, list[loss.SampleLoss]]:
        """Losses of the held-out samples ``indices`` under each condition; those in ``known`` are taken from there."""
        known = known or {}
        with self.phase("ablation"):
            mine = wrong_images.ablation_losses(
                self.model, self.examples(indices), self.batches,
                [c for c in conditions if c not in known],
                content_key=self.content_key, seed=self.cfg.measure_seed,
            )  # fmt: skip
            examples = self.examples(indices)
            found = {c: self._gather_all(losses, loss.SampleLoss, examples) for c, losses in mine.items()}
        return {c: list(known[c]) if c in known else found[c] for c in conditions}

    def ablation(
        self, correct: Sequence[loss.SampleLoss]
    ) -> tuple[list[Measurement], dict[Condition, list[loss.SampleLoss]]]:
        """Loss with the right and the wrong images on ``ablation.num_samples`` held-out samples, compared and as it is.

        ``correct``: the losses of `eval_losses`, so that what was just measured is not measured again.
        """
        indices = self.ablation_sample
        losses = self.ablation_losses(
            indices, ("correct", *self.cfg.ablation.conditions), {"correct": [correct[i] for i in indices]}
        )
        return loss.compare_conditions(losses, self.groups(indices), seed=self.cfg.measure_seed), losses

    def captions(
        self,
        examples: Sequence[Example],
        settings: GenerateConfig,
        condition: Condition,
        batch_size: int,
        label: str = "captions",
    ) -> list[written.Written]:
        """What the model writes for each example under ``condition``; ``label`` names the work in its progress."""
        assert condition != "noise", "nothing is written under noise"
        seen: Literal["correct", "zero", "none"] = condition if condition in ("zero", "none") else "correct"
        shown = list(examples)
        if condition == "shuffled":
            shown = wrong_images.shuffle_images(examples, self.content_key, self.cfg.measure_seed)
        builder = self.data.builder(self.store, train=False, cfg=self.cfg)
        with progress(self.reporter, f"{label} ({condition} image)") as tick:
            mine = written.write(
                self.model,
                self.data.encoder,
                builder,
                self._mine(shown),
                settings,
                seen,
                batch_size=batch_size,
                seed=self.cfg.seed,
                progress=tick,
            )
        return self._gather_all([replace(r, condition=condition) for r in mine], written.Written, examples)

    def content_key(self, ref: ImageRef) -> str:
        """Tells images apart by their bytes; each is read once."""
        if ref not in self._content:
            self._content[ref] = content_hash(ref)
        return self._content[ref]

    @cached_property
    def held_out_sha256(self) -> str:
        """Over every held-out sample: its id, its text, its pictures' bytes."""
        digest = hashlib.sha256()
        for e in self.data.eval_examples:
            digest.update(to_json([e.id, [t.text for t in e.turns], [self.content_key(r) for r in e.images]]).encode())
        return digest.hexdigest()

    @cached_property
    def golden_items(self) -> list[tuple[int, golden.GoldenItem]]:
        """The fixed set as (index into ``eval_examples``, item); made and stored by all processes at once."""
        e = self.cfg.eval
        if not self.cfg.golden_size or e.run_golden_every == "never" or not self.describable:
            return []
        path = self.run.path / "golden.jsonl" if e.golden_set_path is None else Path(e.golden_set_path)

        def make() -> list[int]:
            among = self.describable
            chosen = golden.golden_set(
                path,
                self.examples(among),
                buckets=[self.data.eval_buckets[i] for i in among],
                label_len=[self.data.eval_label_len[i] for i in among],
                size=self.cfg.golden_size,
                seed=e.golden_seed,
                by_category=self.cfg.stage_name == "instruct",
            )
            wanted = min(self.cfg.golden_size, len(among))
            if len(chosen) != wanted:
                raise UserError(
                    f"{path} holds {len(chosen)} samples, eval.golden_size asks for {wanted}; change the setting, or "
                    "give another eval.golden_set_path"
                )
            return [among[index] for index, _ in chosen]

        indices: list[int] = self.dist.on_main(make)
        return list(zip(indices, golden.load(path), strict=True))


def _strided(parts: Sequence[Sequence[Any]]) -> bool:
    """Whether the parts are what striding one list gives: lengths non-increasing and at most one apart."""
    lengths = [len(p) for p in parts]
    return lengths == sorted(lengths, reverse=True) and lengths[0] - lengths[-1] <= 1


def open_bench(cfg: RunConfig, run: RunDir, dist: Dist, *, split_file: Path) -> Workbench:
    """Loads the parts and opens the data. Nothing is trained or measured yet."""
    if cfg.train.num_threads:
        torch.set_num_threads(cfg.train.num_threads)
    started = time.perf_counter()
    model, tokenizer = build_vlm(cfg.model, compute_precision=cfg.train.precision, device=dist.device, seed=cfg.seed)
    frozen = frozen_fingerprint(model)
    loaded = time.perf_counter()
    early = Reporter(
        total_steps=1, steps_per_epoch=1, samples_per_step=1, live=False if cfg.train.tqdm_disable else None,
        enabled=dist.is_main,
    )  # fmt: skip

    def open_data() -> Data:
        return build_data(
            cfg, tokenizer, model.geometry, model.num_visual_tokens, split_file=split_file, write_split=dist.is_main
        )

    # The main process writes the split; the others read it.
    data = open_data() if dist.is_main else None
    dist.barrier()
    data = data or open_data()
    dist.same_on_all_ranks("the training data", data.train.fingerprint)
    reporter = Reporter(
        total_steps=data.total_steps(cfg),
        steps_per_epoch=len(data.train) / cfg.effective_batch,
        samples_per_step=cfg.effective_batch,
        full_train_samples=max(len(data.train), len(data.hygiene.accepted) - len(data.split.eval)),
        log_every=cfg.train.log_every,
        progress_percent=cfg.train.progress_percent,
        live=early.live,
        enabled=dist.is_main,
    )
    reporter.data(
        full_len=data.counts["records"],
        subset_train=len(data.train),
        subset_eval=len(data.eval_examples),
        full_train=len(data.hygiene.accepted) - len(data.split.eval),
    )
    rejects = data.counts["rejects"]
    if rejects:
        reporter.line("data", "rejected " + " ".join(f"{reason}={n}" for reason, n in sorted(rejects.items())))
    bench = Workbench(cfg, run, dist, model, tokenizer, data, reporter, frozen, started=started)
    bench.gaps += [f"Split: {note}" for note in data.counts["split_notes"]]
    bench.drop_unusable_eval()
    bench.phases_s |= {"load": loaded - started, "data": time.perf_counter() - loaded}
    return bench


@contextmanager
def progress(reporter: Reporter, label: str) -> Iterator[Callable[[int, int], None]]:
    """A ``tick(done, total)`` for long work: a bar with ETA on a terminal, a line every tenth otherwise."""
    if reporter.live:
        bar = Progress(
            TextColumn(f"[bold]{label}"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
            console=reporter.console, transient=True,
        )  # fmt: skip
        with bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    started, last = time.perf_counter(), [0]

    def tick(done: int, total: int) -> None:
        tenth = 10 * done // max(total, 1)
        if tenth != last[0] and time.perf_counter() - started > 2:
            last[0] = tenth
            eta = (time.perf_counter() - started) * (total - done) / max(done, 1)
            reporter.line("progress", f"{label} {done}/{total} ({100 * done // max(total, 1)}%) ETA {duration(eta)}")

    yield tick
