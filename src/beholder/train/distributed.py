"""Several processes as one: start-up from torchrun's environment, sums, and plain-data exchange.

What is summed is decided in `engine`; how samples are shared is `data.collate.TrainStream`'s. Objects travel as
JSON in uint8 tensors, because ``torch.distributed``'s own object collectives unpickle what other processes send.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as c10d
from torch.distributed.rendezvous import rendezvous

from beholder.train.peers import Peers, describe, error_of, kind_of
from beholder.types import ProcessError, UserError

_BACKSTOP = timedelta(hours=6)
"""torch's own limit, after which it ends the process. Waits end earlier, in `Peers.wait`."""
_BUCKET = 16 << 20
"""Elements per all-reduce of gradients (64 MB of fp32)."""


@dataclass(frozen=True)
class Dist:
    """This process among its peers. ``world_size`` 1 means none, and every method is then a no-op."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    peers: Peers | None = None
    """None when alone."""

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
        self._wait(c10d.all_reduce(tensor, async_op=True))
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
                self._sum_bucket(bucket)
                bucket, size = [], 0
        if bucket:
            self._sum_bucket(bucket)

    def _sum_bucket(self, gradients: list[torch.Tensor]) -> None:
        flat = torch.cat([g.reshape(-1) for g in gradients])
        self._wait(c10d.all_reduce(flat, async_op=True))
        offset = 0
        for g in gradients:
            g.copy_(flat[offset : offset + g.numel()].view_as(g))
            offset += g.numel()

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
        self._wait(c10d.all_gather(out, tensor, async_op=True))
        return out

    def _wait(self, work: c10d.Work | None) -> None:
        assert self.peers is not None and work is not None
        self.peers.wait(work)

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

        The error reaches the others as `raise_together` says, so that nobody waits for a process that has given up.
        """
        if self.world_size == 1:
            return function()
        outcome: dict[str, Any] = {}
        error: BaseException | None = None
        if self.is_main:
            try:
                outcome = {"value": function()}
            except Exception as e:  # passed on below
                outcome, error = {"error": [kind_of(e), describe(e)]}, e
        outcome = self.gather_objects(outcome)[0]
        if error is not None:
            raise error
        if "error" in outcome:
            raise error_of(0, *outcome["error"])
        return outcome["value"]

    def raise_together(self, error: BaseException | None) -> None:
        """Stop every process when one has an ``error``: that one raises it, the others one that quotes it, a
        `UserError` for a `UserError`, a `ProcessError` for a fault (`peers.error_of`)."""
        if self.world_size == 1:
            if error is not None:
                raise error
            return
        told = self.gather_objects(None if error is None else [kind_of(error), describe(error)])
        if error is not None:
            raise error
        for rank, what in enumerate(told):
            if what is not None:
                raise error_of(rank, *what)

    # -- processes that fail

    def alive(self) -> None:
        """A sign of life during long work of one's own, for those that wait for this process."""
        if self.peers is not None:
            self.peers.alive()

    def stopping(self) -> None:
        """A signal asked this process to stop: it waits for the others no longer than leaves time to end in order."""
        if self.peers is not None:
            self.peers.stopping()

    def cause(self, error: BaseException) -> BaseException:
        """What is behind an ``error`` of this process: the failure of another one that it follows from, else itself."""
        if self.peers is None or isinstance(error, UserError | ProcessError):
            return error
        return self.peers.cause() or error


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


@contextmanager
def joined(device: str = "auto", timeout_s: float = 600.0) -> Iterator[Dist]:
    """This process among those of its job, left at the end; what ends it early is told to the others."""
    dist = init_distributed(device, timeout_s)
    try:
        yield dist
    except BaseException as e:
        if dist.peers is not None:
            dist.peers.tell(e)
        raise
    finally:
        shutdown_distributed()


def init_distributed(device: str = "auto", timeout_s: float = 600.0) -> Dist:
    """Join the job torchrun started (gloo on CPU, NCCL on CUDA), or be alone when there is none.

    Reads ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``. ``timeout_s``: longest wait for another process without a sign of
    life. Call `shutdown_distributed` at the end, or use `joined`.
    """
    global _peers
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
        store, _, _ = next(rendezvous("env://", rank, world_size))
        c10d.init_process_group(
            "nccl" if where.type == "cuda" else "gloo", store=store, rank=rank, world_size=world_size, timeout=_BACKSTOP
        )
        _peers = Peers(rank, world_size, store, timeout_s)
    assert _peers is not None, "the process group was made elsewhere"
    _peers.timeout_s = timeout_s
    return Dist(rank=rank, world_size=world_size, local_rank=local_rank, device=where, peers=_peers)


_peers: Peers | None = None
"""One for the process group, however often it is asked for."""


def shutdown_distributed() -> None:
    """Leave the process group, if there is one."""
    global _peers
    if _peers is not None:
        _peers.leave()
    if c10d.is_available() and c10d.is_initialized():
        if _peers is None or _peers.in_use:
            c10d.destroy_process_group()
        else:
            # An exchange that never ends is under way, and torch waits for it when the group is taken apart, at the end
            # of the process at the latest. One reference more than there is keeps it from being taken apart.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(c10d.group.WORLD))
    _peers = None
