"""Several processes as one: start-up from torchrun's environment, sums, and plain-data exchange.

What is summed is decided in `engine`; how samples are shared is `data.collate.TrainStream`'s. Objects travel as
JSON in uint8 tensors, because ``torch.distributed``'s own object collectives unpickle what other processes send.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as c10d

from beholder.types import UserError

_TIMEOUT = timedelta(hours=6)
"""Longest wait for another process: rank 0 alone may evaluate or fill the feature store meanwhile. A process that
dies is noticed at once by torchrun, not by this."""
_BUCKET = 16 << 20
"""Elements per all-reduce of gradients (64 MB of fp32)."""


@dataclass(frozen=True)
class Dist:
    """This process among its peers. ``world_size`` 1 means none, and every method is then a no-op."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Return when every process has come here."""
        if self.world_size > 1:
            self.all_reduce_sum([0.0])  # NCCL's own barrier guesses a device; a sum does not

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over all processes, in fp64, the same bits everywhere. NaN and inf come through."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        c10d.all_reduce(tensor)
        return tensor.tolist()

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every ``.grad`` by its sum over all processes (missing ones count as zero), in place.

        Explicit sums instead of ``DistributedDataParallel``: the trained connector lies below the frozen language
        model, so its gradients come last and there is no backward pass left to overlap with; ranks may have
        different numbers of micro-batches or none (policy ``skip``), which the wrapper answers with a hang; and the
        wrapper regroups its buckets after the first step, so that a resumed run would add in another order.
        """
        if self.world_size == 1:
            return
        bucket: list[torch.Tensor] = []
        size = 0
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            bucket.append(p.grad)
            size += p.grad.numel()
            if size >= _BUCKET:
                _sum_bucket(bucket)
                bucket, size = [], 0
        if bucket:
            _sum_bucket(bucket)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every process's JSON-able ``value``, in rank order, on every process."""
        if self.world_size == 1:
            return [json.loads(json.dumps(value))]
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [int(n) for n in self._gather(torch.tensor([payload.numel()], device=self.device))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        padded[: payload.numel()] = payload
        return [json.loads(bytes(t[:n].tolist())) for t, n in zip(self._gather(padded), sizes, strict=True)]

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        out = [torch.empty_like(tensor) for _ in range(self.world_size)]
        c10d.all_gather(out, tensor)
        return out

    def same_on_all_ranks(self, name: str, value: str) -> None:
        """`UserError` when a fingerprint differs between processes, such as one machine holding other data."""
        values = self.gather_objects(value)
        if len(set(values)) > 1:
            listing = ", ".join(f"process {rank}: {v}" for rank, v in enumerate(values))
            raise UserError(
                f"{name} differs between the processes of this run ({listing}). All of them must see the same "
                "config, weights and data; copy the same files to every machine."
            )

    def on_main(self, function: Callable[[], Any]) -> Any:
        """Run ``function`` on the main process only; every process gets its JSON-able result, or its error.

        The error reaches the others as a `UserError`, so that nobody waits for a process that has given up.
        """
        if self.world_size == 1:
            return function()
        outcome: dict[str, Any] = {}
        error: BaseException | None = None
        if self.is_main:
            try:
                outcome = {"value": function()}
            except Exception as e:  # passed on below
                outcome, error = {"error": f"{type(e).__name__}: {e}"}, e
        outcome = self.gather_objects(outcome)[0]
        if error is not None:
            raise error
        if "error" in outcome:
            raise UserError(f"the main process failed: {outcome['error']}")
        return outcome["value"]

    def raise_together(self, error: BaseException | None) -> None:
        """Stop every process when one has an ``error``: that one raises it, the others a `UserError` that quotes it."""
        if self.world_size == 1:
            if error is not None:
                raise error
            return
        messages = self.gather_objects(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise UserError(f"process {rank} failed: {message}")


def _sum_bucket(gradients: list[torch.Tensor]) -> None:
    flat = torch.cat([g.reshape(-1) for g in gradients])
    c10d.all_reduce(flat)
    offset = 0
    for g in gradients:
        g.copy_(flat[offset : offset + g.numel()].view_as(g))
        offset += g.numel()


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """``auto | cpu | cuda | mps`` as a device; a `UserError` when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device is cuda but this machine has no usable CUDA GPU; set device: auto or cpu")
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU of its own: there are {torch.cuda.device_count()}. "
                "Lower --nproc_per_node to that number."
            )
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device is mps but this machine has none; set device: auto or cpu")
    return torch.device(name)


def init_distributed(device: str = "auto") -> Dist:
    """Join the job torchrun started (gloo on CPU, NCCL on CUDA), or be alone when there is none.

    Reads ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``. Call `shutdown_distributed` at the end.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or "RANK" not in os.environ:
        return Dist(device=pick_device(device))
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    where = pick_device(device, local_rank)
    if where.type == "mps":
        raise UserError("several processes on mps are not possible; set device: cpu or start one process")
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if not c10d.is_initialized():
        c10d.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=_TIMEOUT)
    return Dist(rank=rank, world_size=world_size, local_rank=local_rank, device=where)


def shutdown_distributed() -> None:
    """Leave the process group, if there is one."""
    if c10d.is_available() and c10d.is_initialized():
        c10d.destroy_process_group()
