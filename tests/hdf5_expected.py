"""Compare a source with the facts in `tests/data/expected`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vlaft.data.layout import apply_layout
from vlaft.data.readers.reader import Reader
from vlaft.observation.images import Image


def load_expected(samples: Path, name: str) -> dict[str, Any]:
    return json.loads((samples / "expected" / f"{name}.json").read_text())


def quarters(image: Image) -> dict[str, Any]:
    h, w = image.shape[0] // 2, image.shape[1] // 2
    parts = {
        "mean": image,
        "top_left": image[:h, :w],
        "top_right": image[:h, w:],
        "bottom_left": image[h:, :w],
        "bottom_right": image[h:, w:],
    }
    return {name: part.mean(axis=(0, 1)) for name, part in parts.items()}


def assert_frames(source: Reader, camera: str, expected: dict[str, Any], tolerance: float = 3.0) -> None:
    """First and last frame of the first episode, as stored, quarter by quarter."""
    episode = source.read(source.episodes()[0])
    first, last = list(episode.cameras[camera].read([0, episode.length - 1]))
    for image, key in ((first, "first_of_first_episode"), (last, "last_of_first_episode")):
        assert image.dtype == np.uint8
        for part, colour in quarters(image).items():
            np.testing.assert_allclose(colour, expected[key][part], atol=tolerance, err_msg=f"{key} {part}")


def assert_as_expected(source: Reader, expected: dict[str, Any]) -> None:
    """Counts, names, instructions, rate, cameras, and the unchanged action with its statistics."""
    refs = source.episodes()
    episodes = [apply_layout(source.read(ref), source.layout) for ref in refs]
    assert [ref.name.rsplit("/", 1)[-1] for ref in refs] == expected["episode_names"]
    assert [ref.index for ref in refs] == list(range(expected["episodes"]))
    assert [episode.length for episode in episodes] == expected["steps_per_episode"]
    assert [episode.instruction or None for episode in episodes] == expected["instruction_per_episode"]
    assert {episode.fps for episode in episodes} == {expected["fps"]}
    sizes = {}
    for path in source.layout.cameras.values():
        (frame,) = source.read(refs[0]).cameras[path].read([0])
        sizes[path] = list(frame.shape)
    assert {path.split("/", 1)[-1]: size for path, size in sizes.items()} == {
        path.split("/", 1)[-1]: size for path, size in expected["cameras"].items()
    } or {path.rsplit("/", 1)[-1]: size for path, size in sizes.items()} == expected["cameras"]
    assert next(iter(sizes)).endswith(expected["main_camera"])

    facts = expected["action"]
    actions = [np.asarray(episode.action, np.float64) for episode in episodes]
    assert actions[0].shape[1] == facts["dim"]
    np.testing.assert_allclose(actions[0][0], facts["first_of_first_episode"], atol=1e-6)
    np.testing.assert_allclose(actions[0][-1], facts["last_of_first_episode"], atol=1e-6)
    np.testing.assert_allclose(actions[-1][0], facts["first_of_last_episode"], atol=1e-6)
    np.testing.assert_allclose(actions[-1][-1], facts["last_of_last_episode"], atol=1e-6)
    joined, stats = np.concatenate(actions), facts["stats"]
    assert len(joined) == stats["count"] == expected["steps"]
    measured = {
        "mean": joined.mean(0),
        "std": joined.std(0),
        "min": joined.min(0),
        "max": joined.max(0),
        "q01": np.quantile(joined, 0.01, axis=0),
        "q99": np.quantile(joined, 0.99, axis=0),
    }
    for name, values in measured.items():
        np.testing.assert_allclose(values, stats[name], atol=1e-5, err_msg=name)
