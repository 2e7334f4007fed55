"""Images that lie: sizes, counts and offsets that are not true, other formats under their names, and spoilt good ones.

What is wrong begins with "claims" where the image must be refused.
"""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
from PIL import Image

SUFFIXES = ("png", "jpg", "webp", "tif", "bmp", "gif", "ppm", "pgm", "jp2", "jpeg", "tiff")


def good() -> list[tuple[str, bytes]]:
    """Suffix and content of images that are all right."""
    generator = np.random.default_rng(0)
    rgb = Image.fromarray(generator.integers(0, 255, (24, 31, 3), dtype=np.uint8))
    grey, wide = rgb.convert("L"), Image.fromarray(generator.integers(0, 65535, (24, 31), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = [
        *(("png", _saved(image, "PNG")) for image in (rgb, grey, rgb.convert("RGBA"), rgb.convert("P"), wide)),
        ("png", _saved(grey.convert("1"), "PNG")),
        ("jpg", _saved(rgb, "JPEG", exif=exif)),
        ("jpg", _saved(rgb, "JPEG", progressive=True)),
        ("jpg", _saved(rgb.convert("CMYK"), "JPEG")),
        *(("tif", _saved(i, "TIFF", compression=c)) for i in (rgb, wide) for c in ("raw", "tiff_lzw", "tiff_deflate")),
        ("tif", _saved(rgb, "TIFF", compression="jpeg")),
        ("bmp", _saved(rgb, "BMP")),
        ("bmp", _saved(rgb.convert("P"), "BMP")),
        ("gif", _saved(rgb, "GIF", save_all=True, append_images=[rgb, rgb])),
        ("ppm", _saved(rgb, "PPM")),
        ("pgm", _saved(grey, "PPM")),
        ("pgm", _saved(wide, "PPM")),
    ]
    for suffix, name in (("webp", "WEBP"), ("jp2", "JPEG2000")):
        try:
            found.append((suffix, _saved(rgb, name)))
        except (OSError, KeyError):  # this Pillow was built without it
            continue
    return found


def _saved(image: Image.Image, name: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def _chunk(name: bytes, data: bytes, *, length: int | None = None, crc: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return struct.pack(">I", size) + name + data + struct.pack(">I", zlib.crc32(name + data) if crc is None else crc)


def _png(width: int, height: int, depth: int = 8, colour: int = 2, *chunks: bytes, interlace: int = 0) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))
    pixels = chunks or (_chunk(b"IDAT", zlib.compress(bytes(1000))),)
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(pixels) + _chunk(b"IEND", b"")


def _tiff(tags: dict[int, tuple[int, int, int]], tail: bytes = b"", offset: int = 8, order: str = "<") -> bytes:
    """One directory of entries ``tag: (type, count, value or offset)``."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", offset)
    entries = b"".join(struct.pack(f"{order}HHII", tag, *entry) for tag, entry in sorted(tags.items()))
    return head + struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0) + tail


def _plain_tiff(**changed: int) -> bytes:
    values = {
        **{"width": 16, "height": 16, "bits": 8, "compression": 1, "photometric": 1, "strip": 150, "samples": 1},
        **{"rows": 16, "bytes": 256, "strips": 1, "format": 1, **changed},
    }
    names = {
        **{"width": 256, "height": 257, "bits": 258, "compression": 259, "photometric": 262, "samples": 277},
        **{"rows": 278, "bytes": 279, "format": 339},
    }
    tags = {tag: (4, 1, values[name] & 0xFFFFFFFF) for name, tag in names.items()}
    tags[273] = (4, values["strips"] & 0xFFFFFFFF, values["strip"] & 0xFFFFFFFF)
    return _tiff(tags, bytes(300))


def liars() -> list[tuple[str, bytes, str]]:
    """Suffix, content, and what is wrong."""
    return [*_png_liars(), *_tiff_liars(), *_other_liars(), *_under_another_name()]


def _png_liars() -> list[tuple[str, bytes, str]]:
    bomb = zlib.compress(bytes(50_000_000), 9)
    pixels = _chunk(b"IDAT", zlib.compress(bytes(99)))
    sizes = ((2**31 - 1, 2**31 - 1), (100_000, 100_000), (1, 2**31 - 1), (2**31 - 1, 1), (0, 5), (5, 0), (2**32 - 1, 7))
    chunks = [
        (_chunk(b"IDAT", b"no zlib"), "claims pixels that are no zlib"),
        (_chunk(b"IDAT", b"", length=2**31 - 1), "claims a chunk of 2 GB that is not there"),
        (_chunk(b"IDAT", zlib.compress(bytes(999)), crc=1), "wrong checksum"),
        (_chunk(b"IDAT", bomb), "pixels of 50 MB for 9 x 9"),
        (_chunk(b"zTXt", b"a\0\0" + bomb), "text that inflates to 50 MB"),
        (_chunk(b"iCCP", b"a\0\0" + bomb), "profile that inflates to 50 MB"),
        (_chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"), "EXIF that points nowhere"),
        (_chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), "two billion frames"),
    ]
    found = [
        *((_png(w, h), f"claims {w} x {h}") for w, h in sizes),
        *(
            (_png(9, 9, depth, colour), f"depth {depth}, colour {colour}")
            for depth, colour in ((3, 2), (8, 7), (16, 3))
        ),
        (_png(40_000, 40_000, 16, 6), "claims 12 GB of pixels"),
        (_png(9, 9, interlace=9), "unknown interlace"),
        (_png(9, 9, 8, 3), "palette image without palette"),
        (_png(9, 9, 8, 3, _chunk(b"PLTE", b"ab"), pixels), "palette of 2 bytes"),
        *((_png(9, 9, 8, 2, chunk), what) for chunk, what in chunks),
        (b"\x89PNG\r\n\x1a\n", "signature only"),
    ]
    return [("png", data, what) for data, what in found]


def _tiff_liars() -> list[tuple[str, bytes, str]]:
    changes: dict[str, tuple[int, ...]] = {
        **{"height": (100_000, 2**31 - 1, 0), "width": (100_000, 2**31 - 1, 0), "strips": (0, 2, 2**31 - 1, 2**32 - 1)},
        **{"bytes": (0, 1, 2**31 - 1, 2**32 - 1), "strip": (0, 10**6, 2**32 - 1), "bits": (0, 3, 12, 64, 2**31)},
        **{"samples": (0, 2, 7, 65535), "compression": (0, 5, 7, 8, 32773, 34712, 65000), "rows": (0, 1, 2**32 - 1)},
        **{"photometric": (99,), "format": (2, 3, 6)},
    }
    found = []
    for name, numbers in changes.items():
        word = "claims" if name in ("height", "width") else "has"  # of the others some change no pixel
        found += [(_plain_tiff(**{name: n}), f"{word} {name} {n}") for n in numbers]
    found += [(_plain_tiff(format=n, bits=32), f"sample format {n} of 32 bits") for n in (2, 3, 6)]
    found += [
        (_tiff({}), "no entries"),
        (_tiff({256: (4, 1, 5)}, offset=2**32 - 1), "directory behind the end"),
        (_tiff({256: (2, 2**31, 8), 257: (12, 2**31, 8)}), "values of 16 GB"),
        (b"II*\0\x08\0\0\0" + b"\0\0" + struct.pack("<I", 8), "directory that follows itself"),
    ]
    return [("tif", data, what) for data, what in found]


def _other_liars() -> list[tuple[str, bytes, str]]:
    def bmp(width: int, height: int, bits: int, compression: int) -> bytes:
        fields = (70, 0, 54, 40, width, height, 1, bits, compression, 0, 1, 1, 0, 0)
        return b"BM" + struct.pack("<IIIIiiHHIIiiII", *fields) + bytes(16)

    def gif(width: int, height: int) -> bytes:
        frame = struct.pack("<HHHH", 0, 0, width, height)
        return b"GIF89a" + struct.pack("<HH", width, height) + b"\0\0\0," + frame + b"\0\x08\x02ab\0;"

    def jpg(width: int, height: int) -> bytes:
        size = struct.pack(">HH", height, width)
        return b"\xff\xd8\xff\xc0\0\x11\x08" + size + b"\x03\x01\x11\0\x02\x11\0\x03\x11\0\xff\xd9"

    big, half = 2**31 - 1, 90_000
    bmps = ((big, big, 24, 0), (5, -(2**31), 8, 1), (half, half, 32, 3), (5, 5, 7, 0), (5, 5, 24, 9))
    headers = [
        *(b"P6 99999999 99999999 255\n", b"P6 -1 5 255\n", b"P5\n5 5 99999999\nabc", b"P6\n5 5\n255", b"P9 5 5 255\n"),
        *(b"P6 " + b"#x\n" * 50_000, b"P6 " + b"1" * 10_000, b"P7\nWIDTH 3\nENDHDR\n", b"P1\n3 3\n1 0 2"),
        *(b"Pf\n5 5\n-1.0\n" + bytes(100), b"P2\n2 2\n9\n1 2 3 x"),
    ]
    sizes = struct.pack(">8I", *(big,) * 8)
    noisy = Image.effect_noise((200, 256), 60).convert("RGB")
    cut = [
        data[: len(data) // 2] + b"\xff\xd9" for p in (False, True) for data in [_saved(noisy, "JPEG", progressive=p)]
    ]
    high = bytearray(_saved(noisy, "JPEG"))
    frame = high.find(b"\xff\xc0")
    high[frame + 5 : frame + 7] = struct.pack(">H", 20_000)
    return [
        *(("bmp", bmp(w, h, bits, c), f"{w} x {h}, {bits} bits, compression {c}") for w, h, bits, c in bmps),
        *(("gif", gif(w, h), f"{w} x {h}") for w, h in ((65535, 65535), (0, 0), (1, 65535))),
        *(("ppm", text, f"header {text[:24]!r}") for text in headers),
        *(("jpg", jpg(w, h), f"claims {w} x {h}") for w, h in ((65535, 65535), (0, 0), (65535, 1))),
        *(("jpg", data, "claims rows behind the end of its data") for data in (*cut, bytes(high))),
        ("jpg", b"\xff\xd8" + b"\xff\xe1\xff\xff" + bytes(100), "EXIF longer than the file"),
        ("webp", b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff", "claims lengths of 4 GB"),
        ("webp", b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xff\xff\xff\x1f" + bytes(8), "claims 16384 x 16384"),
        ("jp2", b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\0jp2h", "box of length 0"),
        ("jp2", b"\xff\x4f\xff\x51\0\x29\0\0" + sizes + b"\0\x01\x07\x01\x01", "claims 2**31 x 2**31"),
        *((suffix, b"", "claims to be an image, is empty") for suffix in SUFFIXES),
    ]


def _under_another_name() -> list[tuple[str, bytes, str]]:
    """Formats that nobody asked for; Pillow would open most of them, some with the help of other programs."""
    noisy = Image.effect_noise((10, 10), 9)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(ran) print\nshowpage\n"
    texts = {
        **{"an SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='10' height='10'></svg>", "a PDF": b"%PDF-1.4\n"},
        **{
            "a PSD": b"8BPS\0\1" + bytes(40),
            "text": b"just text\n",
            "zeros": bytes(10_000),
            "an XCF": b"GIMP xcf file\0",
        },
        **{"a gzip": b"\x1f\x8b\x08" + bytes(50), "a zip": b"PK\3\4" + bytes(50), "a script": b"#!/bin/sh\necho x\n"},
        **{name: _saved(noisy, name) for name in ("ICO", "PCX", "TGA", "IM", "SGI", "PDF", "EPS", "DDS")},
    }
    return [
        *((suffix, eps, "claims to be an image, is an EPS") for suffix in ("png", "jpg", "tif")),
        *(("png", data, f"claims to be a PNG, is {name}") for name, data in texts.items()),
    ]


def spoilt(number: int, generator: random.Random, samples: list[tuple[str, bytes]]) -> tuple[str, bytes, str]:
    """A good image that was spoilt: suffix, content, what was done."""
    from chaos.mutate import spoil

    suffix, data = samples[number % len(samples)]
    data, what = spoil(data, generator)
    return suffix, data, f"{suffix}, {what}"
