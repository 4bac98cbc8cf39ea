"""Compare a source with the facts in `tests/data/expected`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlaft.data.layout import apply_layout
from vlaft.data.readers.reader import Reader
from vlaft.observation.images import Image


def load_expected(samples: Path, name: str) -> dict[str, Any]:
    return json.loads((samples / "expected" / f"{name}.json").read_text())


def quarters(image: Image) -> dict[str, Any]:
    """Mean colours of a frame and of its quarters."""
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


def assert_actions(actions: Sequence[Any], facts: dict[str, Any], ends: float = 1e-6) -> None:
    """First and last actions, and the statistics of all.

    Args:
        actions: `[T, A]` of each episode.
        facts: what is expected of them.
        ends: by how much the first and last ones may differ in float32.
    """
    for key, row in {
        "first_of_first_episode": actions[0][0],
        "last_of_first_episode": actions[0][-1],
        "first_of_last_episode": actions[-1][0],
        "last_of_last_episode": actions[-1][-1],
    }.items():
        np.testing.assert_allclose(np.float32(row), np.float32(facts[key]), rtol=0, atol=ends, err_msg=key)
    joined, statistics = np.concatenate(actions).astype(np.float64), facts["stats"]
    assert joined.shape == (statistics["count"], facts["dim"])
    measured = {
        "mean": joined.mean(0),
        "std": joined.std(0),
        "min": joined.min(0),
        "max": joined.max(0),
        "q01": np.quantile(joined, 0.01, axis=0),
        "q99": np.quantile(joined, 0.99, axis=0),
    }
    for name, values in measured.items():
        np.testing.assert_allclose(values, statistics[name], atol=1e-5, err_msg=name)


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

    assert sum(episode.length for episode in episodes) == expected["steps"]
    assert_actions([episode.action for episode in episodes], expected["action"])
