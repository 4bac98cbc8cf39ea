from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage

from vlaft.data.codec import decode_image, encode_image
from vlaft.errors import DataError


def picture(seed: int = 0, height: int = 40, width: int = 56) -> np.ndarray:
    """A smooth picture with some noise: JPEG is not made for pure noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], axis=-1)
    return np.clip(base + rng.normal(0, 1, base.shape), 0, 255).astype(np.uint8)


def saved(image: PillowImage.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    height=st.integers(1, 48),
    width=st.integers(1, 48),
    codec=st.sampled_from(["png", "webp-lossless"]),
)
def test_exact_codecs_give_the_pixels_back(seed: int, height: int, width: int, codec: str) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(encode_image(image, codec), "x"), image)  # type: ignore[arg-type]


def test_jpeg_is_close_and_the_same_every_time() -> None:
    image = picture()
    data = encode_image(image, "jpeg")
    assert data == encode_image(image.copy(), "jpeg")
    fast = np.abs(decode_image(data, "x").astype(int) - image).mean()
    accurate = np.abs(decode_image(data, "x", accurate_dct=True).astype(int) - image).mean()
    assert accurate < fast < 2.5
    assert accurate < 1.5


def test_jpeg_has_full_chroma_resolution() -> None:
    import simplejpeg

    assert simplejpeg.decode_jpeg_header(encode_image(picture(), "jpeg"))[3] == "444"


def test_jpeg_with_zeros_behind_its_end() -> None:
    data = encode_image(picture(), "jpeg")
    assert np.array_equal(decode_image(data + bytes(500), "x"), decode_image(data, "x"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey_becomes_rgb(kind: str) -> None:
    grey = PillowImage.fromarray(picture()[:, :, 0])
    image = decode_image(saved(grey, kind), "x")
    assert image.shape == (40, 56, 3)
    assert np.array_equal(image[:, :, 0], image[:, :, 2])


def test_alpha_and_palette_become_rgb() -> None:
    colour = picture()
    alpha = np.concatenate([colour, np.zeros((40, 56, 1), np.uint8)], axis=2)
    assert np.array_equal(decode_image(saved(PillowImage.fromarray(alpha), "PNG"), "x"), colour)
    palette = PillowImage.fromarray(colour).quantize(16)
    assert np.array_equal(decode_image(saved(palette, "PNG"), "x"), np.asarray(palette.convert("RGB")))


def test_sixteen_bit_grey_keeps_its_high_byte() -> None:
    depth = (np.arange(600, dtype=np.uint16) * 109).reshape(20, 30)
    image = decode_image(saved(PillowImage.fromarray(depth), "PNG"), "x")
    assert np.array_equal(image[:, :, 1], (depth >> 8).astype(np.uint8))


def test_cmyk_jpeg() -> None:
    data = saved(PillowImage.fromarray(picture()).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decode_image(data, "x").astype(int) - picture()).mean() < 12


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        encode_image(picture(), "jpeg")[:300],
        encode_image(picture(), "png")[:300],
        b"\xff\xd8\xff\xe0",
    ],
    ids=["empty", "text", "cut jpeg", "cut png", "jpeg head"],
)
def test_damage_is_told_in_one_sentence_that_names_the_frame(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^demo_3, step 7: ") as caught:
        decode_image(data, "demo_3, step 7")
    assert "\n" not in str(caught.value)


def test_an_image_that_claims_to_be_huge_is_refused_before_it_is_decoded() -> None:
    data = bytearray(encode_image(picture(), "jpeg"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = b"\x40\x00\x40\x00"  # height and width 16384
    with pytest.raises(DataError, match="16384 x 16384"):
        decode_image(bytes(data), "demo_0, step 0")


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x00\x00\x00\x00WEBP", b"GIF89a", b"BM"]),
)
def test_any_bytes_give_an_image_or_a_data_error(data: bytes, head: bytes) -> None:
    try:
        image = decode_image(head + data, "x")
    except DataError:
        return
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


def test_jpegs_are_decoded_exactly_as_tensorflow_does(samples: Path) -> None:
    """TensorFlow's pixels are in `expected/`; the JPEGs are cut out of the records by their markers."""
    values = np.load(samples / "expected/rlds_encodings_values.npz", allow_pickle=False)
    frames = {values[key][0].tobytes() for key in values.files if key.endswith("/steps/observation/image")}
    found = set()
    for shard in (samples / "rlds/encodings/1.0.0").glob("*.tfrecord-*"):
        data = shard.read_bytes()
        starts = [match.start() for match in re.finditer(rb"\xff\xd8\xff", data)]
        found |= {decode_image(data[start : data.index(b"\xff\xd9", start) + 2], "x").tobytes() for start in starts}
    assert len(frames) == 4
    assert frames <= found
