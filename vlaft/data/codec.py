"""Encoded images to pixels and back.

JPEG is decoded as TensorFlow does by default (the fast integer DCT, no fast chroma upsampling), because OpenVLA
was trained on frames decoded that way; Pillow's accurate DCT differs by about two levels on low-quality frames.
"""

from __future__ import annotations

import io
from typing import Literal, get_args

import numpy as np

from vlaft.errors import DataError
from vlaft.observation.images import Image

ImageCodec = Literal["jpeg", "png", "webp-lossless"]
CODECS: tuple[ImageCodec, ...] = get_args(ImageCodec)

MAX_PIXELS = 2**26  # a frame of 8192 x 8192; more is a damaged header or an attack, not a robot's camera
_JPEG_MAGIC = b"\xff\xd8\xff"
_FORMATS = ("PNG", "WEBP", "JPEG", "BMP", "GIF")
SMALL = 2**26  # bytes that anything may unfold to: a million steps of 16 float32
_LARGEST_RATIO = 100


def decode_image(data: bytes, where: str, accurate_dct: bool = False, swap_rb: bool = False) -> Image:
    """Return the pixels of an encoded image: uint8 `[H, W, 3]` RGB.

    Grey and palette images become RGB, alpha is dropped and 16-bit samples keep their high byte, as in
    `tf.io.decode_image(channels=3)`. The EXIF orientation is ignored, as there.

    Args:
        data: a JPEG, PNG, WebP, BMP or GIF; zeros behind the end are allowed.
        where: names the frame in errors: file, episode and step.
        accurate_dct: decode JPEG with the accurate integer DCT instead: half the error (47 instead of 41.5 dB)
            on the frames that vlaft itself stores, whose originals are known.
        swap_rb: exchange red and blue, which costs nothing where the decoder does it.

    Raises:
        DataError: the data are empty, damaged, too large or of no known kind.
    """
    if not data:
        raise DataError(f"{where}: the image is empty (0 bytes)")
    pixels = _decode_jpeg(data, where, accurate_dct, swap_rb) if data[:3] == _JPEG_MAGIC else None
    if pixels is not None:
        return pixels
    pixels = _decode_other(data, where)
    return pixels[..., ::-1] if swap_rb else pixels


def encode_image(image: Image, codec: ImageCodec) -> bytes:
    """Return the image (uint8 `[H, W, 3]` RGB) as encoded bytes; the same pixels always give the same bytes.

    `"jpeg"` is quality 95 with full chroma resolution (4:4:4), about 20 kB for 224 x 224; the others are exact.
    """
    import simplejpeg
    from PIL import Image as PillowImage

    image = np.ascontiguousarray(image)
    if codec == "jpeg":
        return bytes(simplejpeg.encode_jpeg(image, quality=95, colorspace="RGB", colorsubsampling="444", fastdct=False))
    buffer = io.BytesIO()
    if codec == "png":
        PillowImage.fromarray(image).save(buffer, format="PNG", compress_level=6)
    else:
        # method 0 is seven times faster than the default and costs few bytes
        PillowImage.fromarray(image).save(buffer, format="WEBP", lossless=True, method=0, quality=50)
    return buffer.getvalue()


def _decode_jpeg(data: bytes, where: str, accurate_dct: bool, swap_rb: bool) -> Image | None:
    """Return the pixels, or None for the colour spaces that only Pillow converts (CMYK)."""
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(height, width, where)
        if colorspace in ("CMYK", "YCCK"):
            return None
        order = "BGR" if swap_rb else "RGB"
        return np.asarray(simplejpeg.decode_jpeg(data, colorspace=order, fastdct=not accurate_dct, fastupsample=False))
    except (ValueError, RuntimeError) as error:
        raise DataError(f"{where}: the JPEG image is damaged ({_reason(error)})") from error


def _decode_other(data: bytes, where: str) -> Image:
    from PIL import Image as PillowImage
    from PIL import UnidentifiedImageError

    try:
        with PillowImage.open(io.BytesIO(data), formats=_FORMATS) as picture:
            _check_size(picture.height, picture.width, where)
            if picture.mode.startswith("I"):  # 16-bit grey, where Pillow would clip instead of scale
                grey = (np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            return np.asarray(picture.convert("RGB"))
    except UnidentifiedImageError as error:
        raise DataError(
            f"{where}: these {len(data)} bytes are no image that can be read (known: {', '.join(_FORMATS)})"
        ) from error
    except (OSError, ValueError, SyntaxError, EOFError, PillowImage.DecompressionBombError) as error:
        raise DataError(f"{where}: the image is damaged ({_reason(error)})") from error


def _check_size(height: int, width: int, where: str) -> None:
    if not 0 < height * width <= MAX_PIXELS:
        raise DataError(f"{where}: the image claims {height} x {width} pixels, outside of what is read ({MAX_PIXELS})")


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def largest_unfolded(stored: int) -> int:
    """Return how many bytes `stored` bytes of numbers or texts may unfold to.

    >>> largest_unfolded(1000) == SMALL, largest_unfolded(10**7)
    (True, 1000000000)
    """
    return max(SMALL, _LARGEST_RATIO * stored)
