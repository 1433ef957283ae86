"""The image decoder: what it refuses, and that every way of storing a picture gives the same pixels."""

from __future__ import annotations

import io
import os
import pickle
import random
import socket
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from beholder.data import images
from beholder.data.images import (
    FORMATS,
    IMAGE_SUFFIXES,
    ImageError,
    ImagePipeline,
    check_exists,
    content_hash,
    decode,
    inspect,
    random_crop_box,
    read_bytes,
)
from beholder.data.sources import _CocoNames
from beholder.types import ImageGeometry, ImageRef, UserError

SQUARE = ImageGeometry(32, 32, 16, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def png_bytes(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def picture(width: int = 40, height: int = 24) -> Image.Image:
    """RGB, not symmetric under any turn or flip."""
    rng = np.random.default_rng(7)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep_png(values: np.ndarray, colour_type: int) -> bytes:
    """A 16-bit PNG written by hand: Pillow cannot write RGB at 16 bits. ``values``: uint16 [H, W] or [H, W, C]."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + values[y].astype(">u2").tobytes() for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _with_valid_header(png: bytes) -> bytes:
    """The PNG with the checksum of its IHDR chunk made right."""
    return png[:29] + struct.pack(">I", zlib.crc32(png[12:29])) + png[33:]


def reason(call: object, *args: object) -> str:
    with pytest.raises(ImageError) as caught:
        call(*args)  # type: ignore[operator]
    return caught.value.reason


# ---------------------------------------------------------------------------------------------------------------
# What is never opened


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A root with one good image and everything that must be refused; a secret lies beside the root."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    picture().save(root / "good.png")
    picture().save(tmp_path / "secret.png")
    (root / "empty.png").write_bytes(b"")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "inside.png").symlink_to(root / "good.png")
    (root / "dangling.png").symlink_to(root / "gone.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "fifo.png")
    return root


REFUSED = {
    "gone.png": "missing_image",
    "gone/gone.png": "missing_image",
    "good.png/x.png": "missing_image",
    "nul\0.png": "missing_image",
    "dangling.png": "missing_image",
    "empty.png": "empty_image",
    "out.png": "outside_root",
    "up/secret.png": "outside_root",
    "../secret.png": "outside_root",
    "sub/../../secret.png": "outside_root",
    "/etc/passwd": "outside_root",
    ".": "outside_root",
    "sub": "not_a_file",
    "fifo.png": "not_a_file",
    "loop.png": "unreadable",
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("path", "expected"), REFUSED.items())
def test_bad_paths_are_refused_with_their_reason_and_the_quick_check_agrees(
    hostile: Path, path: str, expected: str
) -> None:
    ref = ImageRef(str(hostile), path)

    assert reason(read_bytes, ref) == expected
    (error,) = check_exists([ref])
    assert error is not None and error.reason == expected


def test_the_message_names_the_file_and_what_to_do(hostile: Path) -> None:
    with pytest.raises(
        ImageError, match=r"out\.png: resolves to .*secret\.png.*a link that leads out.*more_image_roots"
    ):
        read_bytes(ImageRef(str(hostile), "out.png"))


@pytest.mark.timeout(20)
def test_devices_and_sockets_are_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "s.png"))  # a socket's absolute path may be too long

        assert reason(read_bytes, ImageRef(str(tmp_path), "s.png")) == "not_a_file"
        assert reason(read_bytes, ImageRef("/dev", "zero")) == "not_a_file"


def test_good_files_open_directly_through_inner_symlinks_and_by_absolute_path(hostile: Path, tmp_path: Path) -> None:
    alias = tmp_path / "alias"
    alias.symlink_to(hostile)
    refs = [
        ImageRef(str(hostile), "good.png"),
        ImageRef(str(hostile), "inside.png"),
        ImageRef(str(hostile), "sub/../good.png"),
        ImageRef(str(hostile), str(hostile / "good.png")),
        ImageRef(str(alias), "good.png"),
    ]

    assert len({content_hash(r) for r in refs}) == 1
    assert list(check_exists(refs)) == [None] * len(refs)


def test_a_link_leads_out_of_the_root_only_into_a_folder_that_is_named_too(tmp_path: Path) -> None:
    root, store, other = tmp_path / "data", tmp_path / "store" / "coco", tmp_path / "other"
    for folder in (root, store / "train", other):
        folder.mkdir(parents=True)
    picture().save(store / "train" / "a.png")
    picture().save(other / "b.png")
    (root / "coco").symlink_to(store)
    (root / "b.png").symlink_to(other / "b.png")

    with pytest.raises(ImageError, match=rf"'{root}/coco' is a link that leads out.*more_image_roots: \['{store}'\]"):
        read_bytes(ImageRef(str(root), "coco/train/a.png"))
    with pytest.raises(ImageError, match=rf"more_image_roots: \['{other}'\]"):
        read_bytes(ImageRef(str(root), "b.png"))

    named = [
        ImageRef(str(root), path, more_roots=(str(store),)) for path in ("coco/train/a.png", "b.png", "../other/b.png")
    ]
    assert decode(read_bytes(named[0]), "a", 50).size == (40, 24)
    assert read_bytes(ImageRef(str(root), str(store / "train" / "a.png"), more_roots=(str(store),)))  # absolute
    assert [reason(read_bytes, ref) for ref in named[1:]] == ["outside_root"] * 2
    assert [error and error.reason for error in check_exists(named)] == [None, "outside_root", "outside_root"]


def test_a_root_whose_name_is_a_prefix_of_another_folder_does_not_contain_it(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data2").mkdir()
    picture().save(tmp_path / "data2" / "a.png")

    assert reason(read_bytes, ImageRef(str(tmp_path / "data"), "../data2/a.png")) == "outside_root"


def test_files_over_the_byte_limit_are_refused(hostile: Path) -> None:
    ref = ImageRef(str(hostile), "good.png")
    size = len(read_bytes(ref))

    assert len(read_bytes(ref, max_bytes=size)) == size
    assert reason(read_bytes, ref, size - 1) == "file_too_large"


# ---------------------------------------------------------------------------------------------------------------
# What is never decoded


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_images_are_refused_in_every_format(format: str) -> None:
    data = png_bytes(picture(200, 150), format)

    assert decode(data, "whole", 50).size == (200, 150)
    assert reason(decode, data[: len(data) * 6 // 10], "cut", 50) in ("truncated_image", "undecodable", "not_an_image")


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("at_least", [None, 8])
def test_the_common_formats_say_that_they_are_truncated(format: str, at_least: int | None) -> None:
    data = png_bytes(picture(300, 200), format)

    assert reason(decode, data[: len(data) // 2], "cut", 50, at_least) == "truncated_image"


@pytest.mark.parametrize(
    "data",
    [
        b"not an image",
        b"<html>404</html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"%PDF-1.7\n",
        b"\x89PNG\r\n\x1a\n",
        b"\0" * 600,
    ],
)
def test_what_is_not_an_image_is_refused(data: bytes) -> None:
    assert reason(decode, data, "x", 50) in ("not_an_image", "undecodable")


def test_formats_off_the_allow_list_are_refused_even_when_pillow_knows_them() -> None:
    assert reason(decode, png_bytes(picture(), "ICO"), "x", 50) == "not_an_image"


def test_an_81_megapixel_png_is_refused_before_a_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = png_bytes(Image.new("1", (9000, 9000)))
    assert len(bomb) < 100_000
    loads = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: loads.append(self))

    with pytest.raises(ImageError, match=r"9000 x 9000 = 81\.0 megapixels, the limit data\.max_megapixels is 50"):
        decode(bomb, "bomb.png", 50)

    assert not loads


def test_the_megapixel_cap_is_the_users_and_not_pillows() -> None:
    large = png_bytes(Image.new("1", (9600, 9600)))  # 92 megapixels: Pillow would warn

    assert decode(large, "x", 100).size == (9600, 9600)
    header_only = large.replace(
        struct.pack(">II", 9600, 9600), struct.pack(">II", 20_000, 20_000)
    )  # Pillow would raise
    assert reason(decode, _with_valid_header(header_only), "x", 50) == "too_many_pixels"


def test_tolerance_for_truncated_images_switched_on_elsewhere_is_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)

    with pytest.raises(UserError, match="LOAD_TRUNCATED_IMAGES"):
        decode(png_bytes(picture()), "x", 50)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(0, 2**32))
def test_damaged_bytes_give_an_image_or_an_image_error_and_nothing_else(format: str, seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray(png_bytes(picture(), format))
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    del data[rng.randrange(len(data) // 2, len(data)) :]

    try:
        image = decode(bytes(data), "damaged", 1)
    except ImageError as e:
        assert e.reason and e.detail
    else:
        assert image.mode == "RGB"


# ---------------------------------------------------------------------------------------------------------------
# What stands beside the pixels

BOMB = zlib.compress(bytes(200_000_000), 9)  # 195 kB


def with_chunks(*chunks: bytes, at_end: bool = False) -> bytes:
    """The picture as a PNG with more chunks, before or behind its pixels."""
    png = png_bytes(picture())
    at = len(png) - 12 if at_end else 33
    return png[:at] + b"".join(chunks) + png[at:]


IDLE = {
    "a profile of 5 MB": chunk(b"iCCP", b"printer\0\0" + zlib.compress(random.Random(0).randbytes(5_000_000))),
    "a profile that unpacks to 200 MB": chunk(b"iCCP", b"printer\0\0" + BOMB),
    "100 texts that unpack to 200 MB each": chunk(b"zTXt", b"prompt\0\0" + BOMB) * 100,
    "an international text of that kind": chunk(b"iTXt", b"workflow\0\1\0\0\0" + BOMB),
    "a plain text of 70 MB": chunk(b"tEXt", b"parameters\0" + b"x" * 70_000_000),
    "20,000 texts": chunk(b"tEXt", b"a\0b") * 20_000,
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("what", IDLE)
def test_a_png_is_read_whatever_profile_and_texts_it_has_and_none_is_unpacked(what: str, at_end: bool) -> None:
    data = with_chunks(IDLE[what], at_end=at_end)
    tracemalloc.start()

    image = decode(data, "x", 50)

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(np.asarray(image), np.asarray(picture()))
    assert peak < len(data) + 20_000_000  # the bytes once more, without the chunks; never 200 MB


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("kind", [b"iTXt", b"zTXt"])
def test_an_orientation_in_a_text_too_large_to_unpack_is_refused_and_says_why(kind: bytes, at_end: bool) -> None:
    head = {b"iTXt": b"XML:com.adobe.xmp\0\1\0\0\0", b"zTXt": b"Raw profile type exif\0\0"}[kind]
    data = with_chunks(chunk(kind, head + BOMB), at_end=at_end)

    with pytest.raises(ImageError, match=r"EXIF or XMP text is larger than the 1 MB .*\[too_much_metadata\]"):
        decode(data, "x", 50)


def test_an_orientation_in_xmp_is_followed_beside_a_large_profile() -> None:
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    data = with_chunks(IDLE["a profile of 5 MB"], chunk(b"iTXt", xmp))

    assert decode(data, "x", 50).size == (24, 40)


def test_a_profile_or_text_whose_checksum_is_wrong_is_damage_as_before() -> None:
    for what in (b"iCCP", b"tEXt"):
        broken = chunk(what, b"a\0\0" + zlib.compress(b"x"))[:-1] + b"?"

        assert reason(decode, with_chunks(broken), "x", 50) in ("undecodable", "not_an_image")


# ---------------------------------------------------------------------------------------------------------------
# AVIF

avif = pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow has no AVIF")


@avif
@pytest.mark.parametrize("orientation", [1, 6])
def test_avif_is_read_upright_with_alpha_on_white(orientation: int) -> None:
    blue_on_nothing = Image.new("RGBA", (64, 32), (255, 0, 0, 0))
    blue_on_nothing.paste((0, 0, 255, 255), (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation

    got = decode(png_bytes(blue_on_nothing, "AVIF", exif=exif, quality=95), "x", 50)

    assert got.mode == "RGB" and got.size == ((64, 32) if orientation == 1 else (32, 64))
    right, left = got.getpixel((got.width - 5, 5)), got.getpixel((got.width - 5, got.height - 5))
    assert np.allclose(right, (0, 0, 255) if orientation == 6 else (255,) * 3, atol=12)
    assert np.allclose(left, (255,) * 3, atol=12)


@avif
def test_an_avif_that_is_too_large_or_cut_off_is_refused() -> None:
    data = png_bytes(picture(600, 500), "AVIF")

    assert reason(decode, data, "x", 0.1) == "too_many_pixels"
    assert reason(decode, data[: len(data) // 2], "x", 50) in ("truncated_image", "undecodable", "not_an_image")


def test_avif_is_named_where_pillow_cannot_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FORMATS", tuple(name for name in FORMATS if name != "AVIF"))
    monkeypatch.setattr(images, "_HAS_AVIF", False)

    with pytest.raises(ImageError, match=r"is AVIF, which this Pillow cannot read; install .*\[not_an_image\]"):
        decode(b"\0\0\0 ftypavif" + bytes(100), "x", 50)


def test_every_name_of_a_readable_format_is_a_name_of_images_in_a_shard() -> None:
    assert {"jfif", "jpe", "avif", "jpg", "png", "webp", "tiff"} <= IMAGE_SUFFIXES


# ---------------------------------------------------------------------------------------------------------------
# What comes out


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(1, 256)
    pgm = b"P5 256 1 65535\n" + ramp.astype(">u2").tobytes()

    for data in (deep_png(ramp, 0), pgm, png_bytes(Image.fromarray(ramp), "TIFF")):
        got = np.asarray(decode(data, "x", 50))[0]
        assert got.shape == (256, 3)
        assert np.abs(got.astype(int) - np.arange(256)[:, None]).max() <= 1


def test_16_bit_colour_keeps_its_colours() -> None:
    values = (np.asarray(picture()).astype(np.uint16) * 257).astype(np.uint16)

    assert np.array_equal(np.asarray(decode(deep_png(values, 2), "x", 50)), np.asarray(picture()))


def test_pixels_without_a_known_white_are_refused() -> None:
    for array in (np.zeros((4, 4), np.float32), np.zeros((4, 4), np.int32)):
        assert reason(decode, png_bytes(Image.fromarray(array), "TIFF"), "x", 50) == "unsupported_pixels"


def test_transparency_is_laid_on_white_however_it_is_stored() -> None:
    rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    rgba.paste((0, 0, 255, 255), (0, 0, 4, 8))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.paste(1, (0, 0, 4, 8))
    expected = Image.new("RGB", (8, 8), "white")
    expected.paste((0, 0, 255), (0, 0, 4, 8))

    stored = [
        png_bytes(rgba), png_bytes(rgba, "WEBP", lossless=True), png_bytes(palette, transparency=0),
        png_bytes(palette, "GIF", transparency=0), png_bytes(rgba, "TIFF"),
    ]  # fmt: skip
    for data in stored:
        assert np.array_equal(np.asarray(decode(data, "x", 50)), np.asarray(expected))


def test_half_transparency_is_blended() -> None:
    data = png_bytes(Image.new("LA", (2, 2), (0, 128)))

    assert np.abs(np.asarray(decode(data, "x", 50)).astype(int) - 127).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    red = Image.new("RGB", (16, 16), (250, 10, 10)).convert(mode)
    format = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")

    got = decode(png_bytes(red, format), "x", 50)

    assert got.mode == "RGB"
    assert np.abs(np.asarray(got).astype(int) - np.asarray(red.convert("RGB")).astype(int)).max() <= 3


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ((255, 0, 0), (0, 255, 0))]
    options = {"lossless": True} if format == "WEBP" else {}

    got = decode(png_bytes(frames[0], format, save_all=True, append_images=frames[1:], **options), "x", 50)

    assert np.array_equal(np.asarray(got), np.asarray(frames[0]))


STORED_AS = {  # what a camera stores for each orientation of the same upright picture
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip


@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_undone(orientation: int, format: str) -> None:
    turn = STORED_AS[orientation]
    stored = picture() if turn is None else picture().transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}

    got = decode(png_bytes(stored, format, exif=exif, **options), "x", 50)

    assert np.array_equal(np.asarray(got), np.asarray(picture()))


def test_a_damaged_exif_block_does_not_lose_the_image() -> None:
    data = png_bytes(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")

    assert decode(data, "x", 50).size == (40, 24)


def test_scaled_jpeg_decoding_changes_the_result_by_less_than_a_grey_level() -> None:
    smooth = Image.effect_noise((48, 32), 90).resize((1600, 1200), Image.Resampling.BICUBIC).convert("RGB")
    data = png_bytes(smooth, "JPEG", quality=90)

    full, scaled = (decode(data, "x", 50, at).resize((64, 64), Image.Resampling.BICUBIC) for at in (None, 128))

    assert decode(data, "x", 50, 128).size == (200, 150)
    assert np.abs(np.asarray(full).astype(float) - np.asarray(scaled).astype(float)).mean() < 1.0  # measured 0.2


def test_inspect_tells_size_format_and_digest(tmp_path: Path) -> None:
    picture(400, 300).save(tmp_path / "a.jpg")
    ref = ImageRef(str(tmp_path), "a.jpg")

    facts = inspect(ref, 50)

    assert (facts.width, facts.height, facts.format) == (400, 300, "JPEG")
    assert facts.sha256.hex() == content_hash(ref)


# ---------------------------------------------------------------------------------------------------------------
# Shards and parquet


def test_tar_members_are_read_in_place_and_only_within_the_shard(tmp_path: Path) -> None:
    data = png_bytes(picture())
    (tmp_path / "s.tar").write_bytes(b"x" * 512 + data)
    shard = str(tmp_path / "s.tar")

    assert read_bytes(ImageRef(shard, "a.png", "tar", 512, len(data))) == data
    assert reason(read_bytes, ImageRef(shard, "a.png", "tar", 512, len(data) + 1)) == "truncated_image"
    assert reason(read_bytes, ImageRef(shard, "a.png", "tar", 512, 0)) == "empty_image"
    assert reason(read_bytes, ImageRef(str(tmp_path / "gone.tar"), "a.png", "tar", 0, 1)) == "missing_image"


@pytest.mark.parametrize("shape", ["binary", "struct", "list", "list of structs"])
def test_parquet_cells_of_every_shape_give_their_bytes(tmp_path: Path, shape: str) -> None:
    cells = [f"bytes of row {i}".encode() for i in range(7)]
    wrap = {
        "binary": lambda b: b,
        "struct": lambda b: {"bytes": b, "path": "x"},
        "list": lambda b: [b"first", b],
        "list of structs": lambda b: [{"bytes": b"first"}, {"bytes": b}],
    }[shape]
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [wrap(b) for b in cells], "caption": ["c"] * 7}), path, row_group_size=3)
    item = 1 if shape.startswith("list") else 0

    got = [read_bytes(ImageRef(path, f"row {i}", "parquet", i, 0, item, "image")) for i in (6, 0, 3, 2, 5, 1, 4)]

    assert got == [cells[i] for i in (6, 0, 3, 2, 5, 1, 4)]
    assert reason(read_bytes, ImageRef(path, "row 0", "parquet", 0, 0, 5, "image")) == "missing_image"
    assert reason(read_bytes, ImageRef(path, "row 7", "parquet", 7, 0, item, "image")) == "unreadable"


def test_a_null_parquet_cell_is_a_missing_image(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    pq.write_table(
        pa.table({"image": pa.array([{"bytes": None, "path": "/etc/passwd"}, {"bytes": b"x", "path": ""}])}), path
    )

    assert reason(read_bytes, ImageRef(path, "row 0", "parquet", 0, column="image")) == "missing_image"


# ---------------------------------------------------------------------------------------------------------------
# The pipeline


def test_the_pipeline_gives_uint8_chw_and_the_same_for_file_path_and_pil(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (50, 30), (255, 0, 0, 100))
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba.save(tmp_path / "a.png", exif=exif)
    pipeline = ImagePipeline(SQUARE, 50)

    from_ref = pipeline(ImageRef(str(tmp_path), "a.png"))

    assert from_ref.shape == (3, 32, 32) and from_ref.dtype == torch.uint8 and from_ref.is_contiguous()
    assert torch.equal(from_ref, pipeline.from_file(str(tmp_path / "a.png")))
    with Image.open(tmp_path / "a.png") as image:
        assert torch.equal(from_ref, pipeline.from_pil(image))


@pytest.mark.parametrize("says", ["exif", "xmp"])
def test_a_part_of_an_image_that_was_turned_upright_is_not_turned_again(tmp_path: Path, says: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>')
    data = png_bytes(picture(), exif=exif) if says == "exif" else with_chunks(xmp)
    (tmp_path / "a.png").write_bytes(data)
    pipeline = ImagePipeline(SQUARE, 50)

    whole = pipeline.open(ImageRef(str(tmp_path), "a.png"))

    assert whole.size == (24, 40)
    bare = Image.fromarray(np.asarray(whole))
    assert torch.equal(pipeline.from_pil(whole), pipeline.from_pil(bare))
    box = (2, 3, 20, 30)
    assert torch.equal(pipeline.from_pil(whole.crop(box)), pipeline.from_pil(bare.crop(box)))


def test_from_file_follows_the_path_the_user_typed(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    picture().save(tmp_path / "a.png")
    (tmp_path / "d" / "link.png").symlink_to(tmp_path / "a.png")

    assert ImagePipeline(SQUARE, 50).from_file(str(tmp_path / "d" / "link.png")).shape == (3, 32, 32)
    with pytest.raises(ImageError, match=r"gone\.png.*no such file"):
        ImagePipeline(SQUARE, 50).from_file(str(tmp_path / "gone.png"))


@pytest.mark.parametrize("path", ["a\0b.png", ""])
def test_from_file_refuses_what_is_no_file_name(path: str) -> None:
    with pytest.raises(ImageError, match=r"is not a file name \[missing_image\]"):
        ImagePipeline(SQUARE, 50).from_file(path)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (257, 113), (64, 64)])
def test_shortest_edge_is_resize_then_centre_crop(size: tuple[int, int]) -> None:
    image = Image.effect_noise(size, 80).convert("RGB")
    geometry = ImageGeometry(32, 32, 1, 1, (0, 0, 0), (1, 1, 1), "shortest_edge", 40, "bicubic")
    width, height = size
    whole = (40, int(40 * height / width)) if width <= height else (int(40 * width / height), 40)
    left, top = (whole[0] - 32) // 2, (whole[1] - 32) // 2
    expected = np.asarray(image.resize(whole, Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32)))

    got = ImagePipeline(geometry, 50).from_pil(image).permute(1, 2, 0).numpy()

    assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1  # rounding of the filter's coefficients


def test_an_extremely_long_image_does_not_blow_up_when_its_short_side_is_enlarged() -> None:
    geometry = ImageGeometry(224, 224, 1, 1, (0, 0, 0), (1, 1, 1), "shortest_edge", 256)

    assert ImagePipeline(geometry, 50).from_pil(Image.new("RGB", (1, 1_000_000))).shape == (3, 224, 224)


def test_a_crop_larger_than_the_resized_image_is_refused() -> None:
    with pytest.raises(UserError, match="crop is larger"):
        ImagePipeline(ImageGeometry(224, 224, 1, 1, (0, 0, 0), (1, 1, 1), "shortest_edge", 200), 50)


def test_augmentation_is_a_pure_function_of_the_key(tmp_path: Path) -> None:
    picture(100, 80).save(tmp_path / "a.png")
    ref = ImageRef(str(tmp_path), "a.png")
    augmented, plain = ImagePipeline(SQUARE, 50, "random_crop"), ImagePipeline(SQUARE, 50)

    assert torch.equal(augmented(ref, "42/0/a"), augmented(ref, "42/0/a"))
    assert not torch.equal(augmented(ref, "42/0/a"), augmented(ref, "42/1/a"))
    assert torch.equal(augmented(ref), plain(ref))
    assert torch.equal(plain(ref, "42/0/a"), plain(ref))


@given(st.integers(1, 5000), st.integers(1, 5000), st.text())
def test_a_random_crop_keeps_80_to_100_percent_inside_the_image(width: int, height: int, key: str) -> None:
    left, top, right, bottom = random_crop_box(width, height, key)

    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert 0.8 - 1e-9 <= (right - left) * (bottom - top) / (width * height) <= 1 + 1e-9


def test_the_fingerprint_covers_what_changes_pixels_and_nothing_else() -> None:
    same = ImageGeometry(32, 32, 99, 99, (0, 0, 0), (1, 1, 1))
    other = ImageGeometry(32, 32, 16, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), resample="bilinear")
    base = ImagePipeline(SQUARE, 50).fingerprint

    assert ImagePipeline(same, 10).fingerprint == base
    assert len({base, ImagePipeline(other, 50).fingerprint, ImagePipeline(SQUARE, 50, "random_crop").fingerprint}) == 3


def test_pipeline_and_errors_survive_pickling(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    pipeline = ImagePipeline(SQUARE, 50)
    ref = ImageRef(str(tmp_path), "a.png")
    error = ImageError(ref, "empty_image", "has 0 bytes")

    assert torch.equal(pickle.loads(pickle.dumps(pipeline))(ref), pipeline(ref))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("path", ["a/" * 1_000_000, "a/" * 1_000_000 + "000000000001.jpg", "a\0/000000000001.jpg"])
def test_a_path_that_no_file_can_have_is_missing_at_once(tmp_path: Path, path: str) -> None:
    ref = ImageRef(str(tmp_path), _CocoNames(str(tmp_path)).resolve(path))
    (error,) = check_exists([ref])

    assert error is not None and error.reason == "missing_image" and len(str(error)) < 10_000
    for open_it in (lambda: read_bytes(ref), lambda: ImagePipeline(SQUARE, 1.0).from_file(path)):
        with pytest.raises(ImageError, match="is not a file name"):
            open_it()
