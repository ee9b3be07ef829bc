"""One image from its bytes to the pixels that are trained on. Needs Pillow.

All sets of image files come through here, whatever they are stored in. Pixels are taken as they are
stored: colour profiles are not applied.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".tif", ".tiff", ".webp", ".bmp")

# Named, for Pillow has others that run programs or fetch files.
_FORMATS = ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP")
_SIXTEEN = ("I;16", "I;16B", "I;16L", "I;16N")
# Of several samples a pixel Pillow keeps eight bits.
_HIGH_BYTE = ("LA;16", "RGB;16", "RGBA;16", "RGBX;16", "RGBa;16", "CMYK;16")
# Pillow spreads grey levels of few bits over 0..255, but not the level that is transparent.
_SPREAD = {"L;2": 85, "L;4": 17}
_WIDTH, _HEIGHT, _PHOTOMETRIC, _SAMPLE_FORMAT = 256, 257, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2


class Item(NamedTuple):
    """An image of a set.

    Attributes:
        name: as a message calls it, in one line.
        part: "train" or "test", None where the set does not say.
        open: gives the bytes as a stream; what it raises says why the image cannot be read.
    """

    name: str
    part: str | None
    open: Callable[[], BinaryIO]


class Decoded(NamedTuple):
    """What became of an item.

    Attributes:
        pixels: uint8 ``[C, size, size]``, None for what cannot be read.
        reason: why not, as a clause that follows the name.
        scale: how the stored values became 0..255.
        frames: whether the file has more than this image.
    """

    pixels: np.ndarray | None
    reason: str = ""
    scale: str = ""
    frames: bool = False


def require_pillow() -> None:
    """Raise RuntimeError where Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise RuntimeError('decoding images needs Pillow: pip install "fastsfvae[data]"') from error


@contextmanager
def strict() -> Iterator[None]:
    """Let Pillow refuse what is cut short, whatever it was told, and warn of nothing by itself."""
    from PIL import ImageFile

    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def decode(item: Item, channels: int, size: int, crop: int) -> Decoded:
    """The centre square of an image, upright, resized by area-aware bicubic.

    Args:
        item: an image of any kind that Pillow reads, of which the first frame is taken.
        channels: 1 (grey) or 3 (RGB); transparency is laid on white.
        size: side of the result in pixels.
        crop: side of the centre square in the image's pixels; 0 takes the largest.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with item.open() as stream, Image.open(stream, formats=_FORMATS) as file:
            frames = bool(getattr(file, "is_animated", False))
            image, scale = _eight_bits(file)
            # By way of RGB, for other modes have no grey.
            image = image.convert("RGB").convert("RGB" if channels == 3 else "L")
            side = crop or min(image.size)
            if side > min(image.size):
                width, height = image.size
                reason = f"is {width}x{height}, smaller than crop={crop} (lower --crop)"
                return Decoded(None, reason)
            left, top = ((extent - side) // 2 for extent in image.size)
            box = (left, top, left + side, top + side)
            image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
            pixels = np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)
            return Decoded(pixels, "", scale, frames)
    except UnidentifiedImageError:
        return _unread("it is no PNG, JPEG, GIF, TIFF, WebP or BMP image, or cut short")
    except OSError as error:
        return _unread(error.strerror or str(error))
    # Pillow raises SyntaxError, MemoryError and others of its own for broken files.
    except Exception as error:
        return _unread(str(error) or type(error).__name__)


def _unread(reason: str) -> Decoded:
    return Decoded(None, f"cannot be decoded ({' '.join(reason.split()).rstrip('.')})")


def _eight_bits(file) -> tuple[Image.Image, str]:
    """An opened image upright, opaque and in eight bits, and how it came to them.

    Raises:
        ValueError: for values whose range is not known.
    """
    from PIL import Image, ImageOps

    # Loading forgets how samples are stored.
    stored = _raw_mode(file)
    tags = getattr(file, "tag_v2", {})
    signed = _SIGNED in np.atleast_1d(tags.get(_SAMPLE_FORMAT, ()))
    inverted = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    if file.format == "TIFF":
        # Pillow leaves black what no strip covers. Its size is that of the upright image.
        covered = np.max([part[1][2:] for part in file.tile], axis=0)
        if (covered < (tags[_WIDTH], tags[_HEIGHT])).any():
            raise ValueError("it has fewer pixels than it announces")
    file.load()
    image = ImageOps.exif_transpose(file)
    transparent = image.info.get("transparency")
    sixteen = image.mode in _SIXTEEN or (image.mode == "I" and file.format == "PNG")
    if signed or (image.mode == "I" and not sixteen):
        raise ValueError("its integers have a range that is not known: store it in 8 or 16 bits")
    if sixteen:
        top = 4095 if stored.startswith("I;12") else 65535
        values = np.asarray(image)
        grey = _bytes((top - values if inverted else values) / top)
        if transparent is not None:
            grey[values == transparent] = 255
        return Image.fromarray(grey), f"{16 if top == 65535 else 12} bits by {top}"
    if image.mode == "F":
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if inverted or not (low >= 0 and high <= 1):
            raise ValueError(f"its floats lie in [{low:.9g}, {high:.9g}]: scale them to [0, 1]")
        return Image.fromarray(_bytes(values)), "floats by 1"
    if transparent is not None and stored in _SPREAD:
        image.info["transparency"] = transparent * _SPREAD[stored]
    high_byte = stored.startswith(_HIGH_BYTE)
    if high_byte and isinstance(transparent, tuple):
        # Pillow keeps the high bytes of such colours, which other colours share.
        raise ValueError("its transparent colour is of 16 bits: store transparency as alpha")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image, "16 bits by their high byte" if high_byte else "8 bits as stored"


def _raw_mode(file) -> str:
    """How Pillow calls the samples of a file that is not loaded, e.g. ``RGB;16B``."""
    arguments = file.tile[0][3] if file.tile else ""
    mode = arguments[0] if isinstance(arguments, tuple) else arguments
    return mode if isinstance(mode, str) else ""


def _bytes(values: np.ndarray) -> np.ndarray:
    """From [0, 1] to the nearest of 0..255."""
    return np.rint(255 * values.astype(np.float64)).astype(np.uint8)
