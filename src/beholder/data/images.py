"""The one image decoder, for training and serving: `ImageRef` → bytes, decoded safely, resized to uint8 [3, H, W].

Everything hostile or odd about an image is met here: paths that leave their root, FIFOs, decompression bombs, truncated
files, EXIF orientation, alpha, 16-bit, CMYK, palettes, animations. Normalisation (mean, std) is not done here: the
vision tower does it, so that a feature store and a live tower see the same integers.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import orjson
import PIL
from PIL import Image, ImageFile

from beholder.data import index
from beholder.types import ImageGeometry, ImageInput, ImageProcessor, ImageRef, UserError, printable

if TYPE_CHECKING:  # checking files needs neither
    import pyarrow
    import torch

try:
    from PIL.AvifImagePlugin import SUPPORTED as _HAS_AVIF
except ImportError:  # Pillow before 11.3
    _HAS_AVIF = False

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *(("AVIF",) if _HAS_AVIF else ()))
"""The only decoders that are ever tried. None that needs an interpreter or another program (EPS, PDF, …).

AVIF alone may hold a larger picture than its header says, which is decoded and then shrunk: there libavif's own limit
of 268 megapixels is what bounds memory (64 megapixels behind a header of 40 x 40 took 137 MB and 0.2 s).
"""
IMAGE_SUFFIXES = frozenset((
    "jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "tif", "tiff", "pbm", "pgm", "pnm", "ppm",
    "avif",
))  # fmt: skip
"""How names of files that hold one of `FORMATS` end; what is inside decides."""

MAX_PATH = 4096
"""Characters; Linux opens no longer one."""
MAX_FILE_BYTES = 256 * 1000 * 1000
MAX_GROUP_BYTES = 64 * 1000 * 1000
"""Row groups of parquet with more image bytes are not held, but copied once into a file of random access."""
_PIXEL_VERSION = 1
"""Raise when the same bytes and geometry start to give other pixels: stored features are keyed by it."""

_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → the operation that undoes it."""


class ImageError(UserError):
    """One image cannot be used. ``reason`` is a short stable slug (a reject log counts by it), ``detail`` a sentence.

    Reasons: missing_image, outside_root, not_a_file, unreadable, empty_image, file_too_large, not_an_image,
    too_many_pixels, too_much_metadata, truncated_image, unsupported_pixels, undecodable.
    """

    def __init__(self, ref: ImageRef | str, reason: str = "undecodable", detail: str = "") -> None:
        super().__init__(ref, reason, detail)  # the arguments, so that the error survives pickling between processes
        self.ref = ref
        self.reason = reason
        self.detail = detail

    def needed_by(self, where: str) -> ImageError:
        """The same, naming the record as well."""
        return ImageError(self.ref, self.reason, f"{self.detail}; needed by {where}")

    def __str__(self) -> str:
        name = printable(str(self.ref)[:MAX_PATH], one_line=True)
        return f"image {name}: {self.detail} [{self.reason}]" if self.detail else name


# ---------------------------------------------------------------------------------------------------------------
# Bytes


def read_bytes(ref: ImageRef, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The encoded bytes of one image. Opens nothing outside ``ref.root`` and ``ref.more_roots``, only regular files.

    Raises `ImageError` for a path that leaves them (by ``..``, as an absolute path or through a symlink), for a
    missing, empty, oversized or unreadable file, and for directories, FIFOs, sockets and devices.
    """
    match ref.kind:
        case "file":
            return _read_regular_file(ref, _contained_path(ref), max_bytes)
        case "tar":
            _check_size(ref, ref.size, max_bytes)
            return _read_range(ref, ref.offset, ref.size)
        case "parquet" | "arrow" | "inline":
            data = _inline_item(ref) if ref.kind == "inline" else _cell_item(ref)
            _check_size(ref, len(data), max_bytes)
            return data


def content_hash(ref: ImageRef) -> str:
    """sha256 (hex) of the encoded bytes: what the feature store and the duplicate check call "the same image"."""
    return hashlib.sha256(read_bytes(ref)).hexdigest()


def _contained_path(ref: ImageRef) -> str:
    """Absolute path with every symlink resolved; raises when that is below none of the roots."""
    if not _may_exist(ref.path):
        raise ImageError(ref, "missing_image", f"{ref.path[:80]!r} is not a file name")
    root = os.path.realpath(ref.root)
    real = os.path.realpath(os.path.join(root, ref.path))
    if not any(_is_below(real, allowed) for allowed in (root, *map(os.path.realpath, ref.more_roots))):
        roots = " or ".join(map(repr, (root, *ref.more_roots)))
        raise ImageError(ref, "outside_root", f"resolves to {real!r}, which is not below {roots}; {_way_in(ref, root)}")
    return real


def _may_exist(path: str) -> bool:
    """Whether a path could be one: resolving one of a million parts takes minutes."""
    return path != "" and "\0" not in path and len(path) <= MAX_PATH


def _is_below(real: str, root: str) -> bool:
    return real.startswith(root.rstrip(os.sep) + os.sep)


def _way_in(ref: ImageRef, root: str) -> str:
    """What to do about a path that leaves ``root``: where a link of the person's own leads out, name its target."""
    parts = ref.path.split(os.sep)
    own = [] if os.path.isabs(ref.path) or os.pardir in parts else range(len(parts))
    links = (os.path.join(root, *parts[: k + 1]) for k in own)
    link = next((path for path in links if os.path.islink(path) and not _is_below(os.path.realpath(path), root)), None)
    if link is None:
        return "record files may name images below image_root and more_image_roots only"
    target = os.path.realpath(link)
    folder = target if os.path.isdir(target) else os.path.dirname(target)
    return (
        f"{link!r} is a link that leads out. To allow what lies there, name that folder too: more_image_roots: "
        f"[{folder!r}] beside image_root in the config, a second --image-root {folder!r} on the command line"
    )


def _open_regular(ref: ImageRef, real: str) -> tuple[int, int]:
    """(file descriptor, size in bytes). Non-blocking, so that a FIFO cannot hang the run; refused right after."""
    flags = os.O_RDONLY
    for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)  # real has no symlink left: O_NOFOLLOW catches one that was put there since
    try:
        fd = os.open(real, flags)
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError(ref, "missing_image", "no such file") from None
    except OSError as e:
        special = os.path.exists(real) and not os.path.isfile(real)  # a socket cannot even be opened
        raise ImageError(ref, "not_a_file" if special else "unreadable", e.strerror or str(e)) from None
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        os.close(fd)
        kind = "a folder" if stat.S_ISDIR(info.st_mode) else "a FIFO, socket or device"
        raise ImageError(ref, "not_a_file", f"is {kind}, expected a regular file")
    return fd, info.st_size


def _read_regular_file(ref: ImageRef, real: str, max_bytes: int) -> bytes:
    fd, size = _open_regular(ref, real)
    with os.fdopen(fd, "rb") as file:
        _check_size(ref, size, max_bytes)
        try:
            return file.read(max_bytes)
        except OSError as e:
            raise ImageError(ref, "unreadable", e.strerror or str(e)) from None


def _read_range(ref: ImageRef, offset: int, size: int) -> bytes:
    """``size`` bytes of a shard: members are read in place and never extracted."""
    fd, shard_size = _open_regular(ref, os.path.realpath(ref.root))
    with os.fdopen(fd, "rb") as file:
        if offset < 0 or size < 0 or offset + size > shard_size:
            detail = f"the shard has {shard_size:,} bytes, the member ends at {offset + size:,}"
            raise ImageError(ref, "truncated_image", detail)
        file.seek(offset)
        return file.read(size)


def _check_size(ref: ImageRef, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ImageError(ref, "file_too_large", f"{size:,} bytes, the limit is {max_bytes:,}")
    if size == 0:
        raise ImageError(ref, "empty_image", "has 0 bytes")


# ---------------------------------------------------------------------------------------------------------------
# Cells of parquet and Arrow files; data: URIs


def _cell_item(ref: ImageRef) -> bytes:
    import pyarrow as pa

    try:
        if ref.kind == "arrow":
            cell = arrow_table(ref.root, (ref.column,)).column(ref.column)[ref.offset]
        else:
            info = os.stat(ref.root)
            ends, most_bytes = _parquet_groups(ref.root, ref.column, info.st_mtime_ns)
            if most_bytes > MAX_GROUP_BYTES:
                cell = arrow_table(_arrow_copy(ref.root, ref.column, info), (ref.column,)).column(ref.column)[
                    ref.offset
                ]
            else:
                group = int(np.searchsorted(ends, ref.offset, side="right"))
                start = int(ends[group - 1]) if group else 0
                cells = _parquet_row_group(ref.root, ref.column, group, info.st_mtime_ns, os.getpid())
                cell = cells[ref.offset - start]
        data = next(islice(_all_bytes(cell.as_py()), ref.item, None), None)
    except UserError:  # no room for a copy: not this image's fault
        raise
    except (OSError, pa.ArrowException, LookupError, ValueError) as e:
        raise ImageError(ref, "unreadable", f"row {ref.offset}: {e}") from None
    if data is None:
        raise ImageError(ref, "missing_image", f"row {ref.offset} has no image bytes number {ref.item} in {ref.column}")
    return data


def _all_bytes(value: object) -> Iterator[bytes]:
    """Every bytes of a cell, in order, whatever it is: bytes, ``{bytes, path}``, messages, lists of them."""
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _all_bytes(item)


@functools.lru_cache(maxsize=2)
def _parquet_row_group(path: str, column: str, group: int, mtime_ns: int, pid: int) -> pyarrow.ChunkedArray:
    """One column of one row group. Parquet has no smaller unit of access, so the last two are kept.

    ``pid`` is part of the key because pyarrow's files must not be shared over a fork.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False) as file:
        return file.read_row_group(group, columns=[column], use_threads=False).column(0)


@functools.lru_cache(maxsize=256)
def _parquet_groups(path: str, column: str, mtime_ns: int) -> tuple[np.ndarray, int]:
    """(row behind each row group, bytes of the column in the largest)."""
    import pyarrow.parquet as pq

    meta = pq.read_metadata(path)
    groups = [meta.row_group(g) for g in range(meta.num_row_groups)]
    sizes = [
        sum(leaf.total_uncompressed_size for leaf in map(group.column, range(meta.num_columns))
            if leaf.path_in_schema.split(".")[0] == column)
        for group in groups
    ]  # fmt: skip
    return np.cumsum([group.num_rows for group in groups], dtype=np.int64), max(sizes, default=0)


def _arrow_copy(path: str, column: str, info: os.stat_result) -> str:
    """A column of a parquet file whose row groups are too large to be held, once and for all in the cache."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def fill(out: BinaryIO) -> None:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            schema = pa.schema([file.schema_arrow.field(column)])
            with pa.ipc.new_stream(out, schema) as stream:
                for batch in file.iter_batches(64, columns=[column], use_threads=False):
                    stream.write_batch(batch)

    key = index.cache_key("arrow", os.path.realpath(path), column, info.st_size, info.st_mtime_ns)
    return index.made_once(key, "column.arrow", fill, path)


def arrow_table(path: str, columns: tuple[str, ...]) -> pyarrow.Table:
    """Columns of an Arrow stream or file, mapped into memory and not read; of the others nothing is unpacked."""
    return _arrow_table(path, columns, os.stat(path).st_mtime_ns, os.getpid())


@functools.lru_cache(maxsize=256)
def _arrow_table(path: str, columns: tuple[str, ...], mtime_ns: int, pid: int) -> pyarrow.Table:
    import pyarrow as pa

    there = arrow_reader(path).schema.names
    wanted = [k for k, name in enumerate(there) if name in columns]
    return arrow_reader(path, pa.ipc.IpcReadOptions(included_fields=wanted)).read_all()


def arrow_reader(path: str, options: Any = None) -> Any:
    import pyarrow as pa

    mapped = pa.memory_map(path)
    is_file = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(mapped, options=options)


def data_uris(value: object) -> Iterator[str]:
    """The ``data:`` URIs of a JSON value, in the order in which they stand."""
    if isinstance(value, str):
        if value.startswith("data:"):
            yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from data_uris(item)


def _inline_item(ref: ImageRef) -> bytes:
    try:
        uri = next(islice(data_uris(orjson.loads(_read_range(ref, ref.offset, ref.size))), ref.item, None))
    except (orjson.JSONDecodeError, StopIteration):
        raise ImageError(ref, "unreadable", "the record changed since it was indexed") from None
    head, comma, text = uri.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError(f"it begins with {head[:40]!r}")
        return base64.b64decode(text, validate=True)
    except ValueError as e:
        raise ImageError(ref, "undecodable", f"expected data:image/…;base64,… and its base64: {e}") from None


# ---------------------------------------------------------------------------------------------------------------
# Existence and equality of many images


def check_exists(refs: Iterable[ImageRef]) -> Iterator[ImageError | None]:
    """For each image None, or why it could not be read: missing, empty, not regular, outside its roots.

    Lists each folder once instead of resolving each path (558,000 images in seconds); whatever is not plainly a regular
    file below the root takes `read_bytes`' own checks. Tar members were checked while indexing; what lies in cells
    and records is only known when it is read.
    """
    plain_size = _plain_sizes()
    for ref in refs:
        if ref.kind != "file":
            yield ImageError(ref, "empty_image", "has 0 bytes") if ref.kind == "tar" and ref.size == 0 else None
            continue
        if plain_size(ref):
            yield None
            continue
        try:
            fd, size = _open_regular(ref, _contained_path(ref))
            os.close(fd)
            yield None if size else ImageError(ref, "empty_image", "has 0 bytes")
        except ImageError as e:
            yield e


class SameContent:
    """Finds the images that are byte for byte one of ``wanted``, under whatever name and in whatever kind of file.

    Equal bytes need equal sizes, and a size is known without reading (folders are listed, tar members are indexed),
    so only images as large as one of the wanted are read and hashed. Tables do not tell the size of a cell: their
    cells are read, row group by row group when they come in order. What cannot be read equals nothing: whether that
    is an error is the image check's business, not this one's.
    """

    def __init__(self, wanted: Iterable[ImageRef]) -> None:
        self._plain_size = _plain_sizes()
        self._digests: dict[int, set[bytes]] = {}
        self._known: dict[ImageRef, bool] = {}
        self.hashed = 0
        """Images read so far."""
        for ref in dict.fromkeys(wanted):
            if (data := self._read(ref)) is not None:
                self._digests.setdefault(len(data), set()).add(hashlib.sha256(data).digest())

    def __contains__(self, ref: ImageRef) -> bool:
        size = self._size(ref)
        if size is not None and size not in self._digests:
            return False
        known = self._known.get(ref)
        if known is None:
            data = self._read(ref)
            digests = self._digests.get(len(data)) if data is not None else None
            known = data is not None and digests is not None and hashlib.sha256(data).digest() in digests
            if ref.kind in ("file", "tar"):  # each row has cells of its own, and there may be millions
                self._known[ref] = known
        return known

    def _size(self, ref: ImageRef) -> int | None:
        """Bytes, or None where only reading tells."""
        match ref.kind:
            case "file":
                return self._plain_size(ref) or None  # 0: a symlink, perhaps
            case "tar":
                return ref.size
            case _:
                return None

    def _read(self, ref: ImageRef) -> bytes | None:
        self.hashed += 1
        try:
            return read_bytes(ref)
        except ImageError:
            return None


def _plain_sizes() -> Callable[[ImageRef], int]:
    """Bytes of a file that is plainly regular and below its root; 0 when it is not, or is empty.

    Each folder is listed once: resolving 558,000 paths one by one takes a minute.
    """
    listed = functools.cache(_regular_files)

    def size(ref: ImageRef) -> int:
        folder, name = os.path.split(ref.path)
        return listed(ref.root, folder, ref.more_roots).get(name, 0)

    return size


def _regular_files(root: str, folder: str, more_roots: tuple[str, ...]) -> dict[str, int]:
    """Name → size of the regular files (no symlinks) of a folder that itself lies below a root; else empty."""
    if folder and not _may_exist(folder):
        return {}
    real = os.path.realpath(os.path.join(os.path.realpath(root), folder))
    if not any(real == allowed or _is_below(real, allowed) for allowed in map(os.path.realpath, (root, *more_roots))):
        return {}
    try:
        with os.scandir(real) as entries:
            return {e.name: e.stat(follow_symlinks=False).st_size for e in entries if e.is_file(follow_symlinks=False)}
    except OSError:
        return {}


# ---------------------------------------------------------------------------------------------------------------
# Pixels


def decode(data: bytes, name: ImageRef | str, max_megapixels: float, at_least: int | None = None) -> Image.Image:
    """The image as upright 8-bit RGB, alpha on white, first frame of an animation.

    ``max_megapixels`` (1e6 pixels) is compared with the header before any pixel is decoded: an 81-megapixel PNG can be
    236 kB. ``at_least``: a JPEG may be decoded at a half, quarter or eighth as long as both sides stay at least this
    many pixels (libjpeg's scaled decoding: 3 times faster at 12 megapixels, mean difference after resizing < 1/255).

    Raises `ImageError`. Not found: corruption inside a JPEG's entropy-coded data, which libjpeg decodes with a warning
    that Pillow does not pass on.
    """
    with _quiet(), _open_checked(data, name, max_megapixels) as image:
        _draft(image, at_least)
        return _upright_rgb(image, name)


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What decoding one image told."""

    ref: ImageRef
    width: int
    """Pixels as stored, before EXIF turns the image."""
    height: int
    format: str
    sha256: bytes
    """Digest of the encoded bytes."""


def inspect(ref: ImageRef, max_megapixels: float) -> ImageFacts:
    """Read and decode one image for its facts. Raises `ImageError` exactly when `decode` would."""
    data = read_bytes(ref)
    with _quiet(), _open_checked(data, ref, max_megapixels) as image:
        width, height = image.size
        _draft(image, 1)  # scaled JPEG decoding still reads every bit of the file
        _upright_rgb(image, ref)
        return ImageFacts(ref, width, height, image.format or "?", hashlib.sha256(data).digest())


def format_of(data: bytes, name: ImageRef | str, max_megapixels: float) -> str:
    """One of `FORMATS`, by the header alone. Raises `ImageError`."""
    with _quiet(), _open_checked(data, name, max_megapixels) as image:
        return image.format or "?"


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow's warnings (size above 89 megapixels, damaged EXIF) neither print nor decide, whatever the filters are.

    Filters are per process, not per thread: the worst that threads can do to each other here is to leave Pillow quiet.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        yield


def _open_checked(data: bytes, name: ImageRef | str, max_megapixels: float) -> Image.Image:
    """The image with its header read and its size accepted, no pixel decoded."""
    try:
        image = Image.open(io.BytesIO(_without_idle_chunks(data)), formats=FORMATS)
    except Image.DecompressionBombError as e:
        raise ImageError(name, "too_many_pixels", str(e)) from None
    except MemoryError:
        raise
    except PIL.UnidentifiedImageError:
        raise ImageError(name, "not_an_image", _not_an_image(data)) from None
    except Exception as e:
        raise _undecodable(e, name) from None
    _check_megapixels(image, name, max_megapixels)
    return image


def _not_an_image(data: bytes) -> str:
    if data[4:12] in (b"ftypavif", b"ftypavis") and not _HAS_AVIF:
        return "is AVIF, which this Pillow cannot read; install one that can (pip install 'pillow>=11.3')"
    return f"is not one of {', '.join(FORMATS)}"


def _undecodable(e: Exception, name: ImageRef | str) -> ImageError:
    """Pillow reports damage as OSError, SyntaxError, struct.error, zlib.error, … depending on the plugin."""
    text = str(e)
    if "MAX_TEXT_" in text:
        detail = (
            "its EXIF or XMP text is larger than the 1 MB (64 MB in all) that is unpacked; save it without metadata"
        )
        return ImageError(name, "too_much_metadata", detail)
    cut = any(word in text.lower() for word in ("truncat", "unexpected end", "incomplete", "not enough", "eof"))
    return ImageError(name, "truncated_image" if cut else "undecodable", f"{type(e).__name__}: {text}")


_PNG = b"\x89PNG\r\n\x1a\n"
_SAYS_WHICH_WAY_UP = (b"exif", b"Raw profile type exif", b"XML:com.adobe.xmp", b"xmp")
"""Keywords of the PNG texts that Pillow looks for an orientation in."""


def _without_idle_chunks(data: bytes) -> bytes:
    """A PNG without colour profile and texts, which decide no pixel here; anything else, and what is damaged, as it is.

    Pillow unpacks each of them and refuses the picture where one is larger than 1 MB (profiles of printers, prompts and
    workflows of image generators). What is not unpacked needs no limit and cannot be a bomb.
    """
    if not data.startswith(_PNG):
        return data
    kept, at, kept_to = [], len(_PNG), 0
    while at + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + size
        if end > len(data) or kind == b"IEND":
            break
        if kind in (b"iCCP", b"tEXt", b"zTXt", b"iTXt"):
            body = memoryview(data)[at + 8 : end - 4]
            idle = kind == b"iCCP" or bytes(body[:80]).partition(b"\0")[0] not in _SAYS_WHICH_WAY_UP
            if idle and zlib.crc32(body, zlib.crc32(kind)) == int.from_bytes(data[end - 4 : end]):
                kept.append(data[kept_to:at])
                kept_to = end
        at = end
    return b"".join((*kept, data[kept_to:])) if kept else data


def _draft(image: Image.Image, at_least: int | None) -> None:
    if at_least and image.format in ("JPEG", "MPO"):
        image.draft(None, (at_least, at_least))  # pyright: ignore[reportArgumentType]


def _check_megapixels(image: Image.Image, name: ImageRef | str, max_megapixels: float) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(name, "undecodable", f"has {width} x {height} pixels")
    if width * height > max_megapixels * 1e6:
        raise ImageError(
            name, "too_many_pixels", f"has {width} x {height} = {width * height / 1e6:.1f} megapixels, the limit "
            f"data.max_megapixels is {max_megapixels:g}; raise it or shrink the image",
        )  # fmt: skip


def _upright_rgb(image: Image.Image, name: ImageRef | str) -> Image.Image:
    """Load, turn upright, and bring any mode to RGB."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UserError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, so images that are cut off would come out half "
                        "grey without notice; set it to False")  # fmt: skip
    try:
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        image = _to_rgb(image, name)
    except (ImageError, MemoryError):
        raise
    except Exception as e:
        raise _undecodable(e, name) from None
    if turn is not None:
        image = image.transpose(turn)
        for key in _SAYS_WHICH_WAY_UP:  # or a part of it, given to `from_pil`, would be turned once more
            image.info.pop(key.decode(), None)
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1-8, read after loading (TIFF turns itself upright then). A broken block says nothing."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # a damaged EXIF block is common on the web and tells nothing about the pixels
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image, name: ImageRef | str) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # convert("RGB") clips at 255, so a 16-bit image would come out almost white.
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        detail = f"has 32-bit pixels (mode {image.mode}) whose white point is unknown; convert it to 8 or 16 bits"
        raise ImageError(name, "unsupported_pixels", detail)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


# ---------------------------------------------------------------------------------------------------------------
# Geometry


@dataclass(eq=False)
class ImagePipeline:
    """`ImageRef` → uint8 [3, H, W] as the tower wants it. Picklable; the same for training, evaluation and serving.

    ``augment`` random_crop takes 80-100 % of the area, same aspect ratio; where is a pure function of ``key``.
    """

    geometry: ImageGeometry
    max_megapixels: float
    augment: Literal["none", "random_crop"] = "none"

    def __post_init__(self) -> None:
        g = self.geometry
        if g.resize == "shortest_edge" and g.resize_to < max(g.height, g.width):
            raise UserError(f"the vision tower resizes the short side to {g.resize_to} and then crops {g.height} x "
                            f"{g.width}: the crop is larger than the image")  # fmt: skip
        self._at_least = 2 * max(g.height, g.width, g.resize_to)
        pixels = asdict(g)
        for belongs_to_tower in ("mean", "std", "num_patches", "d_vision"):
            del pixels[belongs_to_tower]
        facts = {**pixels, "augment": self.augment, "version": _PIXEL_VERSION, "pillow": PIL.__version__}
        self.fingerprint: str = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        """sha256 over everything that decides which pixels the same bytes give (not the tower's mean and std)."""

    def __call__(self, ref: ImageRef, key: str | None = None) -> torch.Tensor:
        """uint8 [3, H, W]. ``key`` (seed, epoch and sample as a string) seeds the augmentation; None: none."""
        return self._fit(decode(read_bytes(ref), ref, self.max_megapixels, self._at_least), key)

    def open(self, ref: ImageRef) -> Image.Image:
        """The decoded image at full size, for reports."""
        return decode(read_bytes(ref), ref, self.max_megapixels)

    def from_pil(self, image: Image.Image) -> torch.Tensor:
        """uint8 [3, H, W] of an image that is already open; orientation, alpha and depth are treated as for a file."""
        _check_megapixels(image, "<PIL image>", self.max_megapixels)
        with _quiet():
            return self._fit(_upright_rgb(image, "<PIL image>"), None)

    def from_file(self, path: str) -> torch.Tensor:
        """uint8 [3, H, W] of a path that the user typed: the path itself is the permission to open it."""
        return self(typed(path))

    def _fit(self, image: Image.Image, key: str | None) -> torch.Tensor:
        import torch

        box = (0.0, 0.0, float(image.width), float(image.height))
        if self.augment == "random_crop" and key is not None:
            box = random_crop_box(image.width, image.height, key)
        resized = image.resize(
            (self.geometry.width, self.geometry.height), _RESAMPLE[self.geometry.resample], box=self._crop_box(box)
        )
        return torch.from_numpy(np.array(resized, dtype=np.uint8)).permute(2, 0, 1).contiguous()

    def _crop_box(self, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """The part of ``box`` that fills the output.

        For shortest_edge, resizing this part is resizing everything and cropping the centre, without ever holding the
        resized whole: a 1 x 1,000,000 image would otherwise blow up to 224 x 224,000,000.
        """
        g = self.geometry
        if g.resize == "stretch":
            return box
        left, top, right, bottom = box
        width, height = right - left, bottom - top
        # The integer rounding of Hugging Face image processors, so that both see the same crop.
        if width <= height:
            whole_w, whole_h = g.resize_to, int(g.resize_to * height / width)
        else:
            whole_w, whole_h = int(g.resize_to * width / height), g.resize_to
        x, y = (whole_w - g.width) // 2, (whole_h - g.height) // 2
        sx, sy = width / whole_w, height / whole_h
        return (
            left + x * sx, top + y * sy, min(left + (x + g.width) * sx, right), min(top + (y + g.height) * sy, bottom)
        )  # fmt: skip


@dataclass(eq=False)
class NativePipeline:
    """`ImageRef` → what a native model's own processor makes of it. Picklable, and as safe as `ImagePipeline`."""

    processor: ImageProcessor
    max_megapixels: float

    def __post_init__(self) -> None:
        facts = {"processor": self.processor.fingerprint, "version": _PIXEL_VERSION, "pillow": PIL.__version__}
        self.fingerprint: str = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        """sha256 over everything that decides which inputs the same bytes give."""
        self._sizes: dict[ImageRef, tuple[int, int]] = {}

    def __call__(self, ref: ImageRef, key: str | None = None) -> ImageInput:
        """The image's inputs. There is no augmentation: a sample is laid out by its images' own sizes."""
        assert key is None, key
        return self._process(self.open(ref), ref)

    def open(self, ref: ImageRef) -> Image.Image:
        """The decoded image at full size."""
        return decode(read_bytes(ref), ref, self.max_megapixels)

    def from_pil(self, image: Image.Image) -> ImageInput:
        """The inputs of an image that is already open; orientation, alpha and depth are treated as for a file."""
        _check_megapixels(image, "<PIL image>", self.max_megapixels)
        with _quiet():
            return self._process(_upright_rgb(image, "<PIL image>"), "<PIL image>")

    def from_file(self, path: str) -> ImageInput:
        """The inputs of a path that the user typed: the path itself is the permission to open it."""
        return self(typed(path))

    def size(self, ref: ImageRef) -> tuple[int, int]:
        """(height, width) of the upright image; no pixel is decoded where its header says it."""
        known = self._sizes.get(ref)
        if known is None:
            known = _upright_size(read_bytes(ref), ref, self.max_megapixels)
            if len(self._sizes) < 1_000_000:
                self._sizes[ref] = known
        return known

    def _process(self, image: Image.Image, name: ImageRef | str) -> ImageInput:
        try:
            return self.processor.process(image)
        except ValueError as e:  # such as an aspect ratio beyond 200
            raise ImageError(name, "unsupported_pixels", f"the model's own processor refuses it: {e}") from e


def as_input(made: torch.Tensor | ImageInput) -> ImageInput:
    """What a pipeline gives, as the model takes it."""
    return made if isinstance(made, ImageInput) else ImageInput(pixels=made)


def typed(path: str) -> ImageRef:
    """The image at a path that the user typed."""
    if not _may_exist(path):
        raise ImageError(repr(path[:80]), "missing_image", "is not a file name")
    real = os.path.realpath(path)
    return ImageRef(root=os.path.dirname(real), path=os.path.basename(real))


def _upright_size(data: bytes, name: ImageRef | str, max_megapixels: float) -> tuple[int, int]:
    with _quiet(), _open_checked(data, name, max_megapixels) as image:
        if image.format in ("TIFF", "AVIF"):  # which turn themselves, or are another size than they say, when loaded
            image = _upright_rgb(image, name)
            return image.height, image.width
        turned = _orientation(image) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)


def random_crop_box(width: int, height: int, key: str) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a crop with 80-100 % of the area, drawn from sha256(key) alone."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big"))
    side = float(rng.uniform(0.8, 1.0)) ** 0.5
    left, top = float(rng.random()) * (1 - side) * width, float(rng.random()) * (1 - side) * height
    return left, top, min(left + side * width, width), min(top + side * height, height)
