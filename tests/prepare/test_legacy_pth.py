"""The pickle-free reader gives exactly what torch saved, and executes nothing of what it refuses."""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beholder.prepare.legacy_pth import LegacyPthError, read_legacy_pth


def saved(state: Any) -> bytes:
    """The bytes torch writes in its oldest format."""
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def crafted(state_pickle: bytes, keys: list[str] | None = None, storages: bytes = b"") -> bytes:
    """A legacy file whose state dict is an arbitrary pickle."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    return b"".join(pickle.dumps(h, 2) for h in head) + state_pickle + pickle.dumps(keys or [], 2) + storages


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 4), max_size=4), st.booleans(), st.randoms(use_true_random=False)), max_size=6
    )
)
def test_every_tensor_comes_back_bit_for_bit_in_order(specs: list[Any]) -> None:
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    for number, (shape, integers, random) in enumerate(specs):
        generator = torch.Generator().manual_seed(random.randint(0, 2**31))
        tensor = torch.randn(shape, generator=generator)
        tensor = (tensor * 1e6).long() if integers else tensor
        state[f"layer.{number}.weight"] = tensor.permute(list(reversed(range(tensor.dim()))))  # strides of all kinds
    read = read_legacy_pth(saved(state), "x.pth")
    assert list(read) == list(state)
    for name, tensor in state.items():
        assert read[name].dtype == (np.int64 if tensor.dtype == torch.int64 else np.float32)
        assert read[name].flags.c_contiguous
        np.testing.assert_array_equal(read[name], tensor.numpy())


def test_views_of_one_storage_are_read_apart() -> None:
    whole = torch.arange(12.0)
    read = read_legacy_pth(saved(OrderedDict(a=whole[:6].view(2, 3), b=whole[4:])), "x.pth")
    np.testing.assert_array_equal(read["a"], whole[:6].view(2, 3).numpy())
    np.testing.assert_array_equal(read["b"], whole[4:].numpy())


class Runs:
    """Pickles as a call: the classic attack."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    victim = tmp_path / "executed"
    attack = pickle.dumps(OrderedDict(a=Runs(os.mkdir, str(victim))), protocol)
    with pytest.raises(LegacyPthError, match="refused"):
        read_legacy_pth(crafted(attack), "evil.pth")
    assert not victim.exists()
    pickle.loads(attack)  # the payload is live: unpickling would have run it
    assert victim.exists()


@pytest.mark.parametrize("position", ["magic", "protocol", "system", "keys"])
def test_a_malicious_pickle_anywhere_in_the_file_is_refused(tmp_path: Path, position: str) -> None:
    victim = tmp_path / "executed"
    attack = pickle.dumps(Runs(os.mkdir, str(victim)), 2)
    parts = {
        "magic": pickle.dumps(0x1950A86A20F9469CFC6C, 2),
        "protocol": pickle.dumps(1001, 2),
        "system": pickle.dumps({"little_endian": True}, 2),
        "state": b"\x80\x02ccollections\nOrderedDict\n)R.",
        "keys": pickle.dumps([], 2),
    }
    assert read_legacy_pth(b"".join(parts.values()), "x.pth") == {}
    with pytest.raises(LegacyPthError, match="refused"):
        read_legacy_pth(b"".join({**parts, position: attack}.values()), "evil.pth")
    assert not victim.exists()


@pytest.mark.parametrize(
    ("what", "state"),
    [
        ("global 'builtins eval'", b"\x80\x02cbuiltins\neval\n."),
        ("global 'torch.serialization load'", b"\x80\x02ctorch.serialization\nload\n."),
        ("opcode INST", b"\x80\x02(ios\nsystem\n."),
        ("opcode SHORT_BINUNICODE", b"\x80\x02\x8c\x02os\x8c\x06system\x93."),
        ("opcode EXT1", b"\x80\x02\x82\x01."),
        ("a call other than", b"\x80\x02ctorch\nFloatStorage\n)R."),
        ("unknown storage", b"\x80\x02X\x01\x00\x00\x00aQ."),
        ("attributes set on", b"\x80\x02K\x01}b."),
        ("malformed pickle", b"\x80\x02t."),
        ("malformed pickle", b"\x80\x02h\x07."),
        ("malformed pickle", b"\x80\x02X\xff\xff\xff\x7fab."),
        ("refused", b"\x80\x02}X\x01\x00\x00\x00a"),
    ],
)
def test_everything_outside_the_tiny_language_is_refused(what: str, state: bytes) -> None:
    with pytest.raises(LegacyPthError, match=what):
        read_legacy_pth(crafted(state), "x.pth")


def tensor_pickle(size: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A state dict with one tensor of freely chosen geometry over a storage ``k`` of ``size`` floats."""

    def number(n: int) -> bytes:
        return b"J" + struct.pack("<i", n)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("k") + text("cpu") + number(size) + b"NtQ"
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + numbers(shape) + numbers(stride)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip
    return b"\x80\x02ccollections\nOrderedDict\n)R" + text("w") + tensor + b"s."


@pytest.mark.parametrize(
    ("offset", "shape", "stride", "match"),
    [
        (0, (5,), (1,), "reach outside"),
        (1, (4,), (1,), "reach outside"),
        (0, (2, 2), (3, 1), "reach outside"),
        (0, (1_000_000,), (0,), "reach outside"),  # a view that expands four numbers to a million
        (-1, (1,), (1,), "a call other than"),
        (0, (2,), (-1,), "a call other than"),
        (0, (2,), (1, 1), "a call other than"),
    ],
)
def test_a_tensor_cannot_reach_outside_its_storage(
    offset: int, shape: tuple[int, ...], stride: tuple[int, ...], match: str
) -> None:
    storages = struct.pack("<q4f", 4, 1, 2, 3, 4)
    good = read_legacy_pth(crafted(tensor_pickle(4, 0, (2, 2), (1, 2)), ["k"], storages), "x.pth")
    np.testing.assert_array_equal(good["w"], [[1, 3], [2, 4]])
    with pytest.raises(LegacyPthError, match=match):
        read_legacy_pth(crafted(tensor_pickle(4, offset, shape, stride), ["k"], storages), "x.pth")


def test_other_and_damaged_files_are_named_as_such() -> None:
    good = saved(OrderedDict(a=torch.arange(3.0)))
    newer = io.BytesIO()
    torch.save(OrderedDict(a=torch.arange(3.0)), newer)
    for data, match in [
        (newer.getvalue(), "refused|not a legacy"),
        (b"", "malformed"),
        (b"GIF89a", "malformed|refused"),
        (good[:-1], "cut or damaged file"),
        (good + b"\0", "bytes left over"),
        (saved({"a": 1}), "flat dictionary"),
        (saved(OrderedDict(a=torch.zeros(2, dtype=torch.float64))), "global 'torch DoubleStorage'"),
        (crafted(tensor_pickle(4, 0, (4,), (1,)), [], b""), "list of storages"),
        (crafted(tensor_pickle(4, 0, (4,), (1,)), ["k"], struct.pack("<q3f", 3, 1, 2, 3)), "should hold 4 numbers"),
    ]:
        with pytest.raises(LegacyPthError, match=match):
            read_legacy_pth(data, "x.pth")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_flipped_byte_is_refused_or_stays_inside_the_tensors(data: st.DataObject) -> None:
    good = bytearray(saved(OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.arange(4))))
    at = data.draw(st.integers(0, len(good) - 1))
    good[at] ^= data.draw(st.integers(1, 255))
    try:
        read = read_legacy_pth(bytes(good), "x.pth")
    except LegacyPthError:
        return
    assert all(isinstance(v, np.ndarray) and v.size <= 6 for v in read.values())
