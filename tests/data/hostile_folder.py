"""A folder of everything that lies among images, each with what it must become.

Expected pixels come from the samples that are written, by numpy; PNG and TIFF samples that Pillow
does not write are packed here.
"""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE = 16
WHITE = 255
# What becomes of a file that gives no image.
SKIPPED, UNREADABLE = "skipped", "unreadable"
_BICUBIC_FREE = (SIDE, SIDE)


class Case(NamedTuple):
    """A file, or something like one.

    Attributes:
        name: below the folder; bytes where it is no text.
        content: its bytes, or what makes it.
        becomes: uint8 ``[SIDE, SIDE, 3]``, SKIPPED or UNREADABLE.
        tolerance: of each value, for what is stored with a loss or mixed with white.
        frames: whether it has several.
        copy_of: the name of an earlier one of equal pixels.
    """

    name: str | bytes
    content: bytes | Callable[[Path], None]
    becomes: np.ndarray | str
    tolerance: int = 0
    frames: bool = False
    copy_of: str = ""


def write(folder: Path) -> list[Case]:
    """Write all cases; return them."""
    cases = [*_png(), *_tiff(), *_others(), *_exif(), *_names(), *_no_images(), *_unreadable()]
    for case in cases:
        path = Path(os.fsdecode(os.path.join(os.fsencode(folder), os.fsencode(case.name))))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(case.content) if isinstance(case.content, bytes) else case.content(path)
    return cases


def _random(name: str, *shape: int, top: int = 255) -> np.ndarray:
    """Samples of a case's own, 0 and `top` among them."""
    samples = np.random.default_rng(zlib.crc32(name.encode())).integers(0, top + 1, shape)
    samples.flat[:2] = 0, top
    return samples


def _rgb(samples: np.ndarray, top: int = 255) -> np.ndarray:
    """Grey or colour samples ``[H, W(, 3)]`` of a range, as eight bits of colour."""
    pixels = np.rint(samples * (255 / top)).astype(np.uint8)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def _on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.rint(pixels * share + WHITE * (1 - share)).astype(np.uint8)


def _saved(pixels: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# --- PNG


def _chunk(name: bytes, content: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + crc


def png(samples: np.ndarray, depth: int, colour: int, *chunks: bytes) -> bytes:
    """Pack samples ``[H, W(, C)]`` of a depth in bits; `colour` is the format's number for it."""
    height, width = samples.shape[:2]
    flat = samples.reshape(height, -1)
    if depth == 16:
        rows = flat.astype(">u2").view(np.uint8).reshape(height, -1)
    else:
        bits = np.unpackbits(flat.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(height, -1), axis=1)
    content = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [_chunk(b"IHDR", header), *chunks, _chunk(b"IDAT", zlib.compress(content))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + _chunk(b"IEND", b"")


_GREY, _COLOUR, _PALETTE, _GREY_ALPHA, _COLOUR_ALPHA = 0, 2, 3, 4, 6


def _png() -> list[Case]:
    cases = []
    for depth in (1, 2, 4, 8, 16):
        top = 2**depth - 1
        grey = _random(f"grey{depth}", SIDE, SIDE, top=top)
        cases.append(Case(f"png/grey{depth}.png", png(grey, depth, _GREY), _rgb(grey, top)))
        # One level is transparent.
        level = int(grey[3, 3])
        clear = _rgb(grey + 0, top)
        clear[grey == level] = WHITE
        content = png(grey, depth, _GREY, _chunk(b"tRNS", struct.pack(">H", level)))
        if depth > 1:
            cases.append(Case(f"png/grey{depth}-clear.png", content, clear))
    grey = _random("grey1-clear", SIDE, SIDE, top=1)
    content = png(grey, 1, _GREY, _chunk(b"tRNS", struct.pack(">H", 0)))
    # Black is what is transparent: white is left.
    cases.append(Case("png/grey1-clear.png", content, np.full((SIDE, SIDE, 3), WHITE, np.uint8)))
    for depth in (8, 16):
        top = 2**depth - 1
        colour = _random(f"colour{depth}", SIDE, SIDE, 3, top=top)
        # Of 16 bits Pillow keeps the high byte.
        loss = int(depth == 16)
        cases.append(
            Case(f"png/colour{depth}.png", png(colour, depth, _COLOUR), _rgb(colour, top), loss)
        )
        alpha = _random(f"alpha{depth}", SIDE, SIDE, 4, top=top)
        eight = np.rint(alpha * (255 / top))
        mixed = _on_white(eight[..., :3], eight[..., 3])
        cases.append(
            Case(f"png/alpha{depth}.png", png(alpha, depth, _COLOUR_ALPHA), mixed, 1 + 2 * loss)
        )
        alpha = _random(f"grey-alpha{depth}", SIDE, SIDE, 2, top=top)
        eight = np.rint(alpha * (255 / top))
        mixed = _on_white(_rgb(eight[..., 0]), eight[..., 1])
        cases.append(
            Case(f"png/grey-alpha{depth}.png", png(alpha, depth, _GREY_ALPHA), mixed, 1 + 2 * loss)
        )
    colour = _random("colour8-clear", SIDE, SIDE, 3)
    clear = _rgb(colour)
    clear[5, 5] = WHITE
    mark = _chunk(b"tRNS", struct.pack(">3H", *colour[5, 5]))
    cases.append(Case("png/colour8-clear.png", png(colour, 8, _COLOUR, mark), clear))
    # Its transparent colour cannot be told from its neighbours once the low bytes are gone.
    colour = _random("colour16-clear", SIDE, SIDE, 3, top=65535)
    mark = _chunk(b"tRNS", struct.pack(">3H", *colour[5, 5]))
    cases.append(Case("png/colour16-clear.png", png(colour, 16, _COLOUR, mark), UNREADABLE))
    for depth in (1, 2, 4, 8):
        size = 2**depth
        palette = _random(f"palette{depth}", size, 3)
        index = _random(f"index{depth}", SIDE, SIDE, top=size - 1)
        chunk = _chunk(b"PLTE", palette.astype(np.uint8).tobytes())
        cases.append(
            Case(
                f"png/palette{depth}.png",
                png(index, depth, _PALETTE, chunk),
                palette[index].astype(np.uint8),
            )
        )
    alpha = _random("palette alpha", 256)
    mixed = _on_white(palette[index], alpha[index])
    clear = _chunk(b"tRNS", alpha.astype(np.uint8).tobytes())
    cases.append(
        Case("png/palette-alpha.png", png(255 - (255 - index), 8, _PALETTE, chunk, clear), mixed, 1)
    )
    first, second = (_random(name, SIDE, SIDE, 3) for name in ("apng", "apng 2"))
    frames = [Image.fromarray(x.astype(np.uint8)) for x in (first, second)]
    content = _saved(frames[0], "PNG", save_all=True, append_images=frames[1:])
    cases.append(Case("png/animated.png", content, _rgb(first), frames=True))
    return cases


# --- TIFF


def tiff(
    samples: np.ndarray,
    bits: int,
    *,
    photometric: int = 1,
    kind: int = 1,
    order: str = "<",
    **tags: int,
) -> bytes:
    """Store samples ``[H, W(, C)]`` uncompressed, in one strip; `kind` is 2 signed, 3 floats."""
    height, width = samples.shape[:2]
    channels = samples.shape[2] if samples.ndim == 3 else 1
    if bits == 12:
        # Two samples in three bytes.
        halves = np.unpackbits(samples.astype(">u2").view(np.uint8)).reshape(-1, 16)[:, 4:]
        data = np.packbits(halves).tobytes()
    else:
        code = {1: "u", 2: "i", 3: "f"}[kind] + str(bits // 8)
        data = samples.astype(np.dtype(code).newbyteorder(order)).tobytes()
    values = {256: width, 257: height, 258: bits, 259: 1, 262: photometric}
    values |= {273: 8, 277: channels, 278: height, 279: len(data), 339: kind}
    values |= {int(name.removeprefix("tag")): value for name, value in tags.items()}
    entries, beside = b"", b""
    start = 8 + len(data) + 2 + 12 * len(values) + 4
    for tag, value in sorted(values.items()):
        if tag in (258, 339) and channels > 2:
            entries += struct.pack(f"{order}HHII", tag, 3, channels, start + len(beside))
            beside += struct.pack(f"{order}{channels}H", *[value] * channels)
        else:
            entries += struct.pack(f"{order}HHII", tag, 4, 1, value)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(f"{order}I", 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(values)) + entries + bytes(4) + beside


def _tiff() -> list[Case]:
    cases = []
    for order, name in (("<", "little"), (">", "big")):
        grey = _random(f"tiff {name}", SIDE, SIDE, top=65535)
        cases.append(
            Case(f"tiff/grey16-{name}.tif", tiff(grey, 16, order=order), _rgb(grey, 65535))
        )
    for bits in (8, 16):
        top = 2**bits - 1
        grey = _random(f"inverted{bits}", SIDE, SIDE, top=top)
        content = tiff(grey, bits, photometric=0)
        cases.append(Case(f"tiff/white-is-zero{bits}.tif", content, _rgb(top - grey, top)))
    colour = _random("tiff colour16", SIDE, SIDE, 3, top=65535)
    cases.append(
        Case("tiff/colour16.tiff", tiff(colour, 16, photometric=2), _rgb(colour, 65535), 1)
    )
    grey = _random("tiff grey12", SIDE, SIDE, top=4095)
    cases.append(Case("tiff/grey12.tif", tiff(grey, 12), _rgb(grey, 4095)))
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate"):
        colour = _random(f"tiff {compression}", SIDE, SIDE, 3)
        content = _saved(colour.astype(np.uint8), "TIFF", compression=compression)
        cases.append(Case(f"tiff/{compression}.TIFF", content, _rgb(colour)))
    floats = _random("floats", SIDE, SIDE) / 255
    cases.append(Case("tiff/floats.tif", tiff(floats, 32, kind=3), _rgb(floats, 1)))
    refused = {
        "floats-to-255": tiff(255 * floats, 32, kind=3),
        "floats-with-nan": tiff(np.where(floats > 0.9, np.nan, floats), 32, kind=3),
        "integers32": tiff(_random("i32", SIDE, SIDE, top=9), 32, kind=2),
        "signed16": tiff(_random("s16", SIDE, SIDE, top=9), 16, kind=2),
        "signed8": tiff(_random("s8", SIDE, SIDE, top=9), 8, kind=2),
        "few-rows": tiff(_random("few", SIDE, SIDE), 8, tag257=4 * SIDE),
        "five-bands": tiff(_random("five", SIDE, SIDE, 5), 8),
    }
    cases += [Case(f"tiff/{name}.tif", content, UNREADABLE) for name, content in refused.items()]
    pages = [_random(f"page {i}", SIDE, SIDE, 3).astype(np.uint8) for i in range(3)]
    rest = [Image.fromarray(page) for page in pages[1:]]
    content = _saved(pages[0], "TIFF", save_all=True, append_images=rest)
    cases.append(Case("tiff/pages.tif", content, pages[0], frames=True))
    ink = _random("cmyk", SIDE, SIDE, 4).astype(np.uint8)
    light = 255.0 - ink
    mixed = np.rint(light[..., :3] * light[..., 3:] / 255).astype(np.uint8)
    content = _saved(Image.frombytes("CMYK", _BICUBIC_FREE, ink.tobytes()), "TIFF")
    cases.append(Case("tiff/cmyk.tif", content, mixed, 1))
    return cases


# --- other formats


def _flat(*colours: int) -> np.ndarray:
    """Four squares of 8 x 8 of the grey levels, which JPEG keeps to a few levels."""
    squares = np.array(colours, np.uint8).reshape(2, 2)
    return np.repeat(np.kron(squares, np.ones((8, 8), np.uint8))[..., None], 3, axis=2)


def _others() -> list[Case]:
    cases = []
    colour = _random("bmp", SIDE, SIDE, 3).astype(np.uint8)
    cases.append(Case("other/colour.bmp", _saved(colour, "BMP"), colour))
    grey = _random("bmp grey", SIDE, SIDE).astype(np.uint8)
    cases.append(Case("other/grey.BMP", _saved(grey, "BMP"), _rgb(grey)))
    grey = _random("gif", SIDE, SIDE).astype(np.uint8)
    cases.append(Case("other/still.gif", _saved(grey, "GIF"), _rgb(grey)))
    frames = [_random(f"gif {i}", SIDE, SIDE).astype(np.uint8) for i in range(2)]
    rest = [Image.fromarray(frames[1])]
    moving = _saved(frames[0], "GIF", save_all=True, append_images=rest)
    cases.append(Case("other/moving.Gif", moving, _rgb(frames[0]), frames=True))
    index = _random("gif clear", SIDE, SIDE, top=7).astype(np.uint8)
    palette = _random("gif palette", 8, 3).astype(np.uint8)
    image = Image.fromarray(index, "L").convert("P")
    image.frombytes(index.tobytes())
    image.putpalette(palette.tobytes())
    clear = palette[index]
    clear[index == 3] = WHITE
    cases.append(Case("other/clear.gif", _saved(image, "GIF", transparency=3), clear))
    colour = _random("webp", SIDE, SIDE, 3).astype(np.uint8)
    cases.append(Case("other/still.webp", _saved(colour, "WEBP", lossless=True), colour))
    frames = [_random(f"webp {i}", SIDE, SIDE, 3).astype(np.uint8) for i in range(2)]
    rest = [Image.fromarray(frames[1])]
    moving = _saved(frames[0], "WEBP", lossless=True, save_all=True, append_images=rest)
    cases.append(Case("other/moving.webp", moving, frames[0], frames=True))
    flat = _flat(10, 90, 170, 250)
    cases.append(Case("other/flat.jpg", _saved(flat, "JPEG", quality=95), flat, 3))
    flat = _flat(250, 170, 90, 11)
    progressive = _saved(flat, "JPEG", quality=95, progressive=True)
    cases.append(Case("other/progressive.JPEG", progressive, flat, 3))
    flat = _flat(33, 66, 99, 222)
    cases.append(Case("other/grey.jpe", _saved(flat[..., 0], "JPEG", quality=95), flat, 3))
    # Ink of 0 in three channels and 255 - grey in black is grey.
    flat = _flat(44, 88, 132, 176)
    ink = np.concatenate([np.zeros_like(flat), 255 - flat[..., :1]], axis=2)
    image = Image.frombytes("CMYK", _BICUBIC_FREE, ink.tobytes())
    cases.append(Case("other/cmyk.jpg", _saved(image, "JPEG", quality=95), flat, 3))
    flat = _flat(200, 20, 130, 70)
    second = [Image.fromarray(_flat(1, 2, 3, 4))]
    both = _saved(flat, "MPO", quality=95, save_all=True, append_images=second)
    cases.append(Case("other/stereo.jpg", both, flat, 3, frames=True))
    return cases


# The transpositions that set an image of orientation 1 to 8 upright.
_UPRIGHT = (
    lambda x: x,
    lambda x: x[:, ::-1],
    lambda x: x[::-1, ::-1],
    lambda x: x[::-1],
    lambda x: x.swapaxes(0, 1),
    lambda x: np.rot90(x, -1),
    lambda x: x[::-1, ::-1].swapaxes(0, 1),
    lambda x: np.rot90(x),
)


def _exif() -> list[Case]:
    cases = []
    for orientation, upright in enumerate(_UPRIGHT, start=1):
        exif = Image.Exif()
        exif[274] = orientation
        colour = _random(f"exif {orientation}", SIDE, SIDE, 3).astype(np.uint8)
        content = _saved(colour, "PNG", exif=exif)
        cases.append(Case(f"exif/{orientation}.png", content, upright(colour)))
        colour = _random(f"exif tiff {orientation}", SIDE, SIDE, 3).astype(np.uint8)
        content = tiff(colour, 8, photometric=2, tag274=orientation)
        cases.append(Case(f"exif/{orientation}.tif", content, upright(colour)))
        flat = _flat(10 + orientation, 90, 170, 250 - orientation)
        content = _saved(flat, "JPEG", quality=95, exif=exif)
        cases.append(Case(f"exif/{orientation}.jpg", content, upright(flat), 3))
    exif[274] = 6
    colour = _random("exif webp", SIDE, SIDE, 3).astype(np.uint8)
    content = _saved(colour, "WEBP", lossless=True, exif=exif)
    cases.append(Case("exif/6.webp", content, _UPRIGHT[5](colour)))
    colour = _random("exif wide tiff", SIDE, SIDE + 8, 3).astype(np.uint8)
    content = tiff(colour, 8, photometric=2, tag274=8)
    cases.append(Case("exif/8-wide.tif", content, _UPRIGHT[7](colour)[4:-4]))
    grey = _random("exif grey16", SIDE, SIDE, top=65535).astype(np.uint16)
    content = _saved(grey, "PNG", exif=exif)
    cases.append(Case("exif/6-grey16.png", content, _UPRIGHT[5](_rgb(grey, 65535))))
    # Wider than high once it is upright: what is cut off differs.
    colour = _random("exif wide", SIDE + 8, SIDE, 3).astype(np.uint8)
    content = _saved(colour, "PNG", exif=exif)
    cases.append(Case("exif/6-wide.png", content, _UPRIGHT[5](colour)[:, 4:-4]))
    flat = _flat(15, 95, 175, 255)
    content = _saved(flat, "JPEG", quality=95)
    broken = b"Exif\0\0II*\0\xff\xff\xff\x7f" + bytes(4)
    segment = b"\xff\xe1" + struct.pack(">H", len(broken) + 2) + broken
    cases.append(Case("exif/broken.jpg", content[:2] + segment + content[2:], flat, 3))
    return cases


def _names() -> list[Case]:
    cases = []
    names = ("a b.png", "line\nbreak.png", "100%.png", "[1].png", "ä.png", "two.dots.png", "-x.png")
    for name in (*names, b"latin\xe4.png", "kind.jpg", "B.PnG"):
        colour = _random(repr(name), SIDE, SIDE, 3).astype(np.uint8)
        where = b"names/" + name if isinstance(name, bytes) else f"names/{name}"
        # The content tells the format, not the name.
        cases.append(Case(where, _saved(colour, "PNG"), colour))
    colour = _random("twice", SIDE, SIDE, 3).astype(np.uint8)
    content = _saved(colour, "PNG") + b"behind its end"
    cases.append(Case("twice/a.png", content, colour))
    copies = {"b.png": content, "c.bmp": _saved(colour, "BMP")}
    for name, same in copies.items():
        cases.append(Case(f"twice/{name}", same, colour, copy_of="twice/a.png"))
    link = Case("twice/link.png", lambda p: p.symlink_to("a.png"), colour, copy_of="twice/a.png")
    inside = _random("inside", SIDE, SIDE, 3).astype(np.uint8)
    return [
        *cases,
        link,
        Case("folder.png/inside.png", _saved(inside, "PNG"), inside),
        Case("loop/again", lambda p: p.symlink_to(".."), SKIPPED),
        Case("aliases", lambda p: p.symlink_to("names"), SKIPPED),
    ]


def _no_images() -> list[Case]:
    picture = _saved(_random("hidden", SIDE, SIDE, 3).astype(np.uint8), "PNG")
    contents = {
        ".ipynb_checkpoints/a-checkpoint.png": picture,
        "names/._a.png": b"Mac OS X",
        "names/.hidden.png": picture,
        "__MACOSX/names/b.png": picture,
        "deep/__MACOSX/b.png": picture,
        ".DS_Store": b"",
        "notes.txt": b"no image",
        "labels.json": b"{}",
        "deep/Thumbs.db": b"",
        "LICENSE": b"",
        "drawing.svg": b"<svg/>",
    }
    return [Case(name, content, SKIPPED) for name, content in contents.items()]


def _unreadable() -> list[Case]:
    colour = _random("bad", 64, 64, 3).astype(np.uint8)
    page = b"<!DOCTYPE html><html><body>404</body></html>"
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header)
    bomb += _chunk(b"IDAT", zlib.compress(bytes(1000))) + _chunk(b"IEND", b"")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EOF\n"
    contents: dict[str, bytes | Callable[[Path], None]] = {
        "empty.png": b"",
        "page.jpg": page,
        "bomb.png": bomb,
        "postscript.png": postscript,
        "no-header.png": b"\x89PNG\r\n\x1a\n" + _chunk(b"IEND", b""),
        "flipped-size.png": (whole := _saved(colour, "PNG"))[:19] + b"\1" + whole[20:],
        "flipped-pixel.png": whole[:500] + bytes([whole[500] ^ 1]) + whole[501:],
        "no-size.gif": b"GIF89a" + bytes(7) + b";",
        "signature.png": b"\x89PNG\r\n\x1a\n",
        "small.png": _saved(colour[:8, :40], "PNG"),
        "broken-link.png": lambda path: path.symlink_to("nowhere.png"),
        "own-link.png": lambda path: path.symlink_to("own-link.png"),
        "pipe.png": os.mkfifo,
    }
    for kind, ending in (("PNG", "png"), ("JPEG", "jpg"), ("BMP", "bmp"), ("TIFF", "tif")):
        content = _saved(colour, kind)
        contents[f"cut.{ending}"] = content[: len(content) // 2]
    for kind in ("GIF", "WEBP"):
        content = _saved(colour, kind)
        contents[f"cut.{kind.lower()}"] = content[: len(content) // 2]
    return [Case(f"bad/{name}", content, UNREADABLE) for name, content in contents.items()]
