from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage
from safetensors.torch import load_file

from vlaft.errors import CheckpointError
from vlaft.observation.augmentation import center_crop, pixel_values
from vlaft.observation.images import ImagePipeline, is_finetune, recorded

EVALUATION_FRAMES = Path(__file__).parents[1] / "golden/oft-tiny/data/evaluation_images"
KEPT_ROWS = 56  # of upstream's pixel values every so many rows are kept
PIPELINE = ImagePipeline(
    size=32,
    resize="bicubic",
    strategy="resize-naive",
    letterbox_fill=(127, 127, 127),
    center_crop=False,
    means=((0.5, 0.5, 0.5),),
    stds=((0.5, 0.5, 0.5),),
)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_golden_pixel_values(tiny: Path) -> None:
    pipeline = ImagePipeline.from_checkpoint(
        load(tiny / "checkpoint/config.json"), load(tiny / "checkpoint/preprocessor_config.json")
    )
    tensors = load_file(tiny / "tensors.safetensors")
    cases = load(tiny / "cases.json")["predict"]
    shapes = set()
    for index, case in enumerate(cases):
        frame = np.asarray(PillowImage.open(tiny / case["frame"]).convert("RGB"))
        shapes.add(frame.shape)
        images = torch.from_numpy(pipeline.prepare(frame))[None]
        values = pixel_values(images, pipeline.means, pipeline.stds)[:, :, ::KEPT_ROWS]
        torch.testing.assert_close(values, tensors[f"predict.{index}.pixel_values"], atol=1e-5, rtol=0)
    assert any(height != width for height, width, _ in shapes)


def test_constants_by_backbone_are_those_of_the_preprocessor(tiny: Path) -> None:
    folder = tiny / "checkpoint"
    config = load(folder / "config.json")
    named = ImagePipeline.from_checkpoint(config)
    assert named == ImagePipeline.from_checkpoint(config, load(folder / "preprocessor_config.json"))


def test_training_resizes_with_lanczos_and_a_checkpoint_of_ours_keeps_its_own() -> None:
    config: dict[str, Any] = {"vision_backbone_id": "siglip-vit-so400m", "image_sizes": [224]}
    assert ImagePipeline.from_checkpoint(config).strategy == "letterbox"
    training = ImagePipeline.for_training(config)
    assert (training.resize, training.strategy, training.size) == ("lanczos", "resize-naive", 224)
    config["image_pipeline"] = PIPELINE.to_json()
    assert ImagePipeline.for_training(config) == ImagePipeline.from_checkpoint(config) == PIPELINE


FINETUNE = {"vision_backbone_id": "siglip-vit-so400m", "image_sizes": [224], "norm_stats": {"bridge_orig": {}}}
LIBERO = {**FINETUNE, "norm_stats": {"libero_goal_no_noops": {}}}


@pytest.mark.parametrize(("frame", "expected"), [("0", "0.resized_cropped"), ("1", "1.policy")])
def test_a_finetunes_frames_are_those_of_upstreams_evaluation(frame: str, expected: str) -> None:
    """Of 256 and of 224 pixels; JPEG's and Lanczos' rounding differs by one level on average, and bicubic by twelve."""
    pipeline = ImagePipeline.for_acting(LIBERO, None, ["libero_goal_no_noops"])
    assert pipeline.center_crop
    prepared = pipeline.prepare(np.array(PillowImage.open(EVALUATION_FRAMES / f"{frame}.png")))
    ours = center_crop(torch.from_numpy(prepared)[None])[0].numpy()
    golden = np.asarray(PillowImage.open(EVALUATION_FRAMES / f"{expected}.png"))
    difference = np.abs(ours.astype(int) - golden)
    assert difference.mean() < 1 and difference.max() <= 20
    as_released = ImagePipeline.from_checkpoint(LIBERO).prepare(
        np.array(PillowImage.open(EVALUATION_FRAMES / f"{frame}.png"))
    )
    assert np.abs(as_released.astype(int) - golden).mean() > 10


def test_a_frame_of_the_models_size_is_not_coded_again_where_only_resized_ones_are() -> None:
    """OpenVLA-OFT passes frames of 224 pixels on as they are, and others through JPEG and Lanczos."""
    pipeline = replace(ImagePipeline.for_acting(LIBERO, None, ["libero_goal_no_noops"]), jpeg="resized")
    frames = [np.array(PillowImage.open(EVALUATION_FRAMES / f"{name}.png")) for name in ("0", "1")]
    assert [frame.shape[0] for frame in frames] == [256, 224]
    np.testing.assert_array_equal(pipeline.prepare(frames[1]), frames[1])
    np.testing.assert_array_equal(pipeline.prepare(frames[0]), replace(pipeline, jpeg=True).prepare(frames[0]))
    assert (pipeline.prepare(frames[0]) != replace(pipeline, jpeg=False).prepare(frames[0])).any()
    assert ImagePipeline.from_json(json.loads(json.dumps(pipeline.to_json()))) == pipeline


@pytest.mark.parametrize(
    ("config", "statistics", "finetune"),
    [
        (FINETUNE, ["bridge_orig"], False),  # a base, or a copy that writes its statistics beside the weights too
        (FINETUNE, ["my_robot"], True),
        ({**FINETUNE, "norm_stats": {"bridge_orig": {}, "kuka": {}}}, ["bridge_orig"], True),
        ({key: value for key, value in FINETUNE.items() if key != "norm_stats"}, ["my_robot"], True),
        (LIBERO, ["libero_goal_no_noops"], True),
        (FINETUNE, [], False),
        ({**LIBERO, "image_pipeline": PIPELINE.to_json()}, ["libero_goal_no_noops"], False),
    ],
)
def test_finetunes_are_known_by_their_statistics(config: dict[str, Any], statistics: list[str], finetune: bool) -> None:
    assert is_finetune(config, statistics) is finetune
    pipeline = ImagePipeline.for_acting(config, None, statistics)
    if not finetune:
        assert pipeline == ImagePipeline.from_checkpoint(config)
        assert recorded(config, None, statistics) == config
        return
    assert (pipeline.resize, pipeline.strategy, pipeline.center_crop, pipeline.jpeg) == (
        "lanczos",
        "resize-naive",
        True,
        True,
    )
    kept = recorded(config, None, statistics)  # a copy acts as the checkpoint that it was made of
    assert ImagePipeline.for_acting(kept, None, kept.get("norm_stats", ())) == pipeline
    assert not ImagePipeline.for_training(kept).jpeg


def test_what_is_said_of_frames_wins() -> None:
    base, tuned = (partial(ImagePipeline.for_acting, FINETUNE, None, [name]) for name in ("bridge_orig", "mine"))
    released = ImagePipeline.from_checkpoint(FINETUNE)
    assert base(center_crop=True) == replace(released, center_crop=True)
    assert tuned(center_crop=False, resize="bicubic") == base() == released
    assert tuned(center_crop=False) == base(resize="lanczos") == replace(tuned(), center_crop=False)
    own = partial(ImagePipeline.for_acting, {"image_pipeline": PIPELINE.to_json()}, None, ["mine"])
    assert own() == PIPELINE and "jpeg" not in PIPELINE.to_json()
    assert own(resize="lanczos", center_crop=True) == replace(PIPELINE, resize="lanczos", center_crop=True)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    strategy=st.sampled_from(["resize-naive", "letterbox"]),
    resize=st.sampled_from(["bicubic", "lanczos"]),
)
def test_every_frame_becomes_a_square(height: int, width: int, strategy: Any, resize: Any) -> None:
    pipeline = ImagePipeline(32, resize, strategy, (127, 127, 127), False, PIPELINE.means, PIPELINE.stds)
    image = np.full((height, width, 3), 127, dtype=np.uint8)
    assert np.array_equal(pipeline.prepare(image), np.full((32, 32, 3), 127, dtype=np.uint8))


def test_a_frame_of_the_right_size_is_left_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(PIPELINE.prepare(image), image)


def test_letterbox_keeps_the_aspect_ratio() -> None:
    pipeline = ImagePipeline(32, "bicubic", "letterbox", (9, 8, 7), False, PIPELINE.means, PIPELINE.stds)
    image = pipeline.prepare(np.full((32, 64, 3), 200, dtype=np.uint8))
    assert image[0, 0].tolist() == [9, 8, 7] and image[31, 31].tolist() == [9, 8, 7]
    assert image[16, 0].tolist() == [200, 200, 200]


def test_json_round_trip() -> None:
    assert ImagePipeline.from_json(json.loads(json.dumps(PIPELINE.to_json()))) == PIPELINE


@pytest.mark.parametrize(
    "change",
    [
        {"size": 0},
        {"resize": "nearest"},
        {"strategy": "stretch"},
        {"stds": [[0, 1, 1]]},
        {"means": [[1, 2]]},
        {"more": 1},
    ],
)
def test_a_damaged_pipeline_is_one_sentence(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        ImagePipeline.from_json(PIPELINE.to_json() | change)
    assert "\n" not in str(caught.value)


def test_an_unknown_backbone_needs_its_preprocessor() -> None:
    with pytest.raises(CheckpointError, match="'resnet' are not known"):
        ImagePipeline.from_checkpoint({"vision_backbone_id": "resnet"})
