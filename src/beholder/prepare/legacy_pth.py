"""Reads the tensors of a ``.pth`` file in torch's oldest format without unpickling anything.

Such a file is five pickles in a row followed by the raw storages. `torch.load` would *execute* the pickles (with
``weights_only`` through a restricted unpickler); here `pickletools.genops`, which only disassembles, feeds a tiny
interpreter that knows the opcodes and the four globals of a plain ``OrderedDict`` of tensors and refuses everything
else. What the tensors mean is the caller's business. See docs/decisions/0005-pth-without-pickle.md.
"""

from __future__ import annotations

import io
import math
import pickletools
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from beholder.types import UserError

_MAGIC: Final = 0x1950A86A20F9469CFC6C
_PROTOCOL: Final = 1001
_MAX_OPCODES: Final = 1_000_000
_STORAGES: Final = {"torch FloatStorage": np.dtype("<f4"), "torch LongStorage": np.dtype("<i8")}
_ORDERED_DICT: Final = "collections OrderedDict"
_REBUILD: Final = "torch._utils _rebuild_tensor_v2"
_GLOBALS: Final = frozenset({_ORDERED_DICT, _REBUILD, *_STORAGES})


class LegacyPthError(UserError):
    """The file is not the plain state dict this reader accepts. Nothing of it was executed."""


@dataclass(frozen=True, slots=True)
class _Global:
    """A global by name. It is compared, never imported."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: np.dtype[Any]
    size: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


_MARK: Final = object()


def read_legacy_pth(data: bytes, name: str) -> dict[str, np.ndarray]:
    """The tensors of a legacy ``.pth`` state dict, in the order of the file, as contiguous fp32 / int64 arrays.

    ``name`` is what errors call the file. Raises `LegacyPthError` for every other format, opcode, global, storage type,
    and for tensors that reach outside their storage.
    """
    stream = io.BytesIO(data)
    if _read(stream, name) != _MAGIC:
        raise LegacyPthError(f"{name}: not a legacy .pth file: its first pickle is not torch's magic number")
    if _read(stream, name) != _PROTOCOL:
        raise LegacyPthError(f"{name}: unknown protocol version, expected {_PROTOCOL}")
    system = _read(stream, name)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise LegacyPthError(f"{name}: written on a big-endian machine or damaged; only little-endian files are read")
    state = _read(stream, name)
    keys = _read(stream, name)
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, _Tensor) for k, v in state.items()):
        raise LegacyPthError(f"{name}: expected a flat dictionary from names to tensors")
    declared: dict[str, _Storage] = {}
    for tensor in state.values():
        if declared.setdefault(tensor.storage.key, tensor.storage) != tensor.storage:
            raise LegacyPthError(f"{name}: storage {tensor.storage.key!r} is declared with two types or sizes")
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys) or sorted(keys) != sorted(declared):
        raise LegacyPthError(f"{name}: the list of storages does not match the tensors")

    storages: dict[str, np.ndarray] = {}
    for key in keys:
        storage = declared[key]
        size = int.from_bytes(stream.read(8), "little")
        raw = stream.read(size * storage.dtype.itemsize) if size == storage.size else b""
        if size != storage.size or len(raw) != size * storage.dtype.itemsize:
            raise LegacyPthError(f"{name}: storage {key!r} should hold {storage.size} numbers; cut or damaged file")
        storages[key] = np.frombuffer(raw, storage.dtype)
    if stream.read(1):
        raise LegacyPthError(f"{name}: bytes left over after the last storage")
    return {key: _view(storages[t.storage.key], t, f"{name}: {key}") for key, t in state.items()}


def _view(storage: np.ndarray, tensor: _Tensor, where: str) -> np.ndarray:
    count = math.prod(tensor.shape)
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride, strict=True))
    # count <= size also refuses stride-0 views that would expand a small storage into a huge array.
    if count > storage.size or (count and last >= storage.size):
        raise LegacyPthError(f"{where}: shape {tensor.shape} and stride {tensor.stride} reach outside the storage")
    strides = tuple(s * storage.itemsize for s in tensor.stride)
    view = np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides, writeable=False)
    return np.array(view, order="C")


def _read(stream: io.BytesIO, name: str) -> Any:
    """Interpret one pickle of ``stream`` with the few opcodes a state dict is made of."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def refuse(what: str) -> LegacyPthError:
        return LegacyPthError(
            f"{name}: refused: {what} at byte {position}. Only plain tensor dictionaries are read and nothing is "
            "executed; convert the file to .safetensors where you trust it"
        )

    def pop_to_mark() -> list[Any]:
        at = max(i for i, item in enumerate(stack) if item is _MARK)
        items = stack[at + 1 :]
        del stack[at:]
        return items

    position = stream.tell()
    try:
        for count, (op, arg, at) in enumerate(pickletools.genops(stream)):
            position = at or position
            if count >= _MAX_OPCODES:
                raise refuse(f"more than {_MAX_OPCODES} opcodes")
            match op.name:
                case "PROTO":
                    if arg != 2:
                        raise refuse(f"pickle protocol {arg}")
                case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                    stack.append(arg)
                case "NONE":
                    stack.append(None)
                case "NEWTRUE":
                    stack.append(True)
                case "NEWFALSE":
                    stack.append(False)
                case "MARK":
                    stack.append(_MARK)
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE":
                    stack.append(tuple(pop_to_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    n = int(op.name[-1])
                    stack[-n:] = [tuple(stack[-n:])]
                case "BINPUT" | "LONG_BINPUT":
                    memo[int(str(arg))] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[int(str(arg))])
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _set(stack[-1], [key, value])
                case "SETITEMS":
                    items = pop_to_mark()
                    _set(stack[-1], items)
                case "APPEND" | "APPENDS":
                    items = pop_to_mark() if op.name == "APPENDS" else [stack.pop()]
                    if type(stack[-1]) is not list:
                        raise refuse("appending to something that is not a list")
                    stack[-1].extend(items)
                case "GLOBAL":
                    if arg not in _GLOBALS:
                        raise refuse(f"global {arg!r}")
                    stack.append(_Global(str(arg)))
                case "BINPERSID":
                    stack.append(_storage(stack.pop()))
                case "REDUCE":
                    args, function = stack.pop(), stack.pop()
                    stack.append(_reduce(function, args))
                case "BUILD":  # the state dict's `_metadata` attribute: version numbers of modules, not needed
                    stack.pop()
                    if type(stack[-1]) is not dict:
                        raise refuse("attributes set on something that is not the state dict")
                case "STOP":
                    if len(stack) != 1:
                        raise refuse("a pickle that does not end with one object")
                    return stack[0]
                case other:
                    raise refuse(f"opcode {other}")
    except LegacyPthError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise refuse(f"malformed pickle ({error})") from None
    raise refuse("a pickle without end")


def _set(target: Any, items: list[Any]) -> None:
    if type(target) is not dict or len(items) % 2:
        raise TypeError("items set on something that is not a dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:
            raise TypeError("a dictionary key that is not a string")
        if key in target:
            raise TypeError(f"dictionary key {key!r} twice")
        target[key] = value


def _storage(identity: Any) -> _Storage:
    match identity:
        case ("storage", _Global(name), str(key), str(), int(size), None) if name in _STORAGES and size >= 0:
            return _Storage(key, _STORAGES[name], size)
    raise TypeError("unknown storage")


def _reduce(function: Any, args: Any) -> Any:
    match function, args:
        case _Global(name), () if name == _ORDERED_DICT:
            return {}
        case _Global(name), (_Storage() as storage, int(offset), tuple(shape), tuple(stride), bool(), {**hooks}) if (
            name == _REBUILD
            and not hooks
            and len(shape) == len(stride) <= 8
            and offset >= 0
            and all(type(n) is int and n >= 0 for n in (*shape, *stride))
        ):
            return _Tensor(storage, offset, shape, stride)
    raise TypeError("a call other than OrderedDict() or _rebuild_tensor_v2(storage, offset, size, stride, …)")
