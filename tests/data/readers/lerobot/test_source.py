from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from expected_facts import assert_actions, load_expected, quarters

from vlaft.data.episode import Episode
from vlaft.data.layout import apply_layout
from vlaft.data.readers.lerobot.source import LeRobotReader, download, looks_like_lerobot
from vlaft.errors import DataError

SETS = ["v2.0_gr00t_pick_place", "v2.1_internvla_pick_place", "v2.1_pusht_image", "v3.0_internvla_pick_place"]
OPENVLA_LIKE = ("action.delta_eef_position", "action.delta_eef_rotation", "action.gripper_close")


def opened(samples: Path, name: str) -> tuple[LeRobotReader, list[Episode]]:
    source = LeRobotReader(samples / "lerobot" / name.replace("_", "-", 1))
    layout = source.layout
    if name == "v2.1_internvla_pick_place":
        layout = replace(layout, action=OPENVLA_LIKE)
    return source, [apply_layout(source.read(ref), layout) for ref in source.episodes()]


def expected(samples: Path, name: str) -> dict:
    return load_expected(samples, f"lerobot_{name}")


@pytest.mark.parametrize("name", SETS)
def test_counts_names_instructions_and_rate(samples: Path, name: str) -> None:
    source, episodes = opened(samples, name)
    facts = expected(samples, name)
    assert source.format == f"lerobot-{name[:4]}"
    assert len(episodes) == facts["episodes"]
    assert [episode.length for episode in episodes] == facts["steps_per_episode"]
    assert sum(episode.length for episode in episodes) == facts["steps"]
    stems = [Path(text).stem for text in facts["episode_names"]]
    stems = [f"episode_{int(stem.split()[-1]):06d}" if " " in stem else stem for stem in stems]
    assert [episode.name for episode in episodes] == stems
    assert [episode.instruction for episode in episodes] == facts["instruction_per_episode"]
    assert {episode.fps for episode in episodes} == {facts["fps"]}


@pytest.mark.parametrize("name", SETS)
def test_actions_and_their_statistics(samples: Path, name: str) -> None:
    _, episodes = opened(samples, name)
    assert_actions([episode.action for episode in episodes], expected(samples, name)["action"], ends=0)


@pytest.mark.parametrize("name", SETS)
def test_cameras_and_colours(samples: Path, name: str) -> None:
    source, episodes = opened(samples, name)
    facts = expected(samples, name)
    assert set(source.layout.cameras.values()) == set(facts["cameras"])
    assert next(iter(source.layout.cameras.values())) == facts["main_camera"]
    camera = next(iter(source.layout.cameras))
    first, last = episodes[0].cameras[camera].read([0, episodes[0].length - 1])
    tolerance = 1e-3 if name == "v2.1_pusht_image" else 3.0  # PNG is exact, yuv conversions differ
    for frame, key in ((first, "first_of_first_episode"), (last, "last_of_first_episode")):
        assert list(frame.shape) == facts["cameras"][facts["main_camera"]]
        assert frame.dtype == np.uint8
        for part, colour in quarters(frame).items():
            np.testing.assert_allclose(colour, facts["frames"][key][part], atol=tolerance, err_msg=f"{key} {part}")


def test_both_versions_of_one_set_agree(samples: Path) -> None:
    _, old = opened(samples, SETS[1])
    _, new = opened(samples, SETS[3])
    compared = 0
    for before, after in zip(old, new, strict=True):
        np.testing.assert_array_equal(before.action, after.action)
        steps = range(before.length)
        for one, other in zip(
            before.cameras["ego_view"].read(steps), after.cameras["ego_view"].read(steps), strict=True
        ):
            assert one.tobytes() == other.tobytes()
            compared += 1
    assert compared == 48


def test_wrong_metadata_are_told(samples: Path) -> None:
    gr00t = LeRobotReader(samples / "lerobot/v2.0-gr00t_pick_place").warnings
    assert any("data/chunk-{episode_index" in text and "does not fit" in text for text in gr00t)
    assert any("observation.images.egoview" in text and "left out" in text for text in gr00t)
    internvla = LeRobotReader(samples / "lerobot/v2.1-internvla_pick_place").warnings
    assert any("'video.base_view' has a video for only 1 of 4 episodes" in text for text in internvla)
    assert any(
        "action='[action.delta_eef_position, action.delta_eef_rotation, action.gripper_close]'" in t for t in internvla
    )
    assert LeRobotReader(samples / "lerobot/v2.1-pusht_image").warnings == []
    assert LeRobotReader(samples / "lerobot/v3.0-internvla_pick_place").warnings == []


def test_pickles_and_binary_columns_are_not_loaded(samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("unpickled something"))
    monkeypatch.setattr(pickle, "load", lambda *_: pytest.fail("unpickled something"))
    source = LeRobotReader(samples / "lerobot/v2.1-internvla_pick_place")
    episode = source.read(source.episodes()[0])
    assert "action.joints" in episode.arrays
    assert not [name for name in episode.arrays if name.startswith("annotation.")]
    assert all(values.dtype.kind in "biuf" for values in episode.arrays.values())


def test_gr00t_slices_are_arrays(samples: Path) -> None:
    source = LeRobotReader(samples / "lerobot/v2.0-gr00t_pick_place")
    episode = source.read(source.episodes()[0])
    np.testing.assert_array_equal(episode.arrays["action.right_arm"], episode.arrays["action"][:, 22:29])
    np.testing.assert_array_equal(episode.arrays["state.waist"], episode.arrays["observation.state"][:, 41:44])


def test_missing_action_names_what_there_is(samples: Path) -> None:
    source = LeRobotReader(samples / "lerobot/v2.1-internvla_pick_place")
    with pytest.raises(DataError, match=r"has no array 'action'.*action\.delta_eef_position"):
        apply_layout(source.read(source.episodes()[0]), source.layout)


def test_source_and_frames_survive_pickling(samples: Path) -> None:
    source = LeRobotReader(samples / "lerobot/v3.0-internvla_pick_place")
    ref = source.episodes()[1]
    before = source.read(ref)
    after = pickle.loads(pickle.dumps(source)).read(pickle.loads(pickle.dumps(ref)))
    np.testing.assert_array_equal(before.arrays["action"], after.arrays["action"])
    key = "observation.images.ego_view"
    frames = pickle.loads(pickle.dumps(after.cameras[key]))
    np.testing.assert_array_equal(next(frames.read([3])), next(before.cameras[key].read([3])))


def test_opening_reads_no_rows(samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlaft.data.readers.lerobot.rows import RowReader

    monkeypatch.setattr(RowReader, "read", lambda *_, **__: pytest.fail("rows were read"))
    assert len(LeRobotReader(samples / "lerobot/v3.0-internvla_pick_place").episodes()) == 4


def test_looks_like_lerobot(samples: Path) -> None:
    assert looks_like_lerobot(samples / "lerobot/v3.0-internvla_pick_place")
    assert looks_like_lerobot(samples / "broken/lerobot_malformed_info")
    assert not looks_like_lerobot(samples / "rlds/bridge_dataset/1.0.0")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ConnectionError("no route"), "check the connection"),
        (ValueError("odd"), "could not be fetched"),
    ],
)
def test_download_tells_what_went_wrong(error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DataError, match=sentence):
        download("owner/name")


def test_download_of_a_wrong_id_and_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    with pytest.raises(DataError, match="neither a folder"):
        download("no such/dataset/id")
    original = huggingface_hub.snapshot_download

    def offline(*args: object, **options: object) -> str:
        return original(*args, cache_dir=tmp_path, local_files_only=True, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(DataError, match="could not be fetched from the Hub"):
        download("owner/name")


def test_name_in_the_hub_cache(samples: Path, tmp_path: Path) -> None:
    folder = tmp_path / "datasets--owner--pusht" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    for path in (samples / "lerobot/v2.1-pusht_image").iterdir():
        (folder / path.name).mkdir()
        for file in path.rglob("*.*"):
            target = folder / file.relative_to(path.parent)
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(file)  # as in the Hub's cache
    source = LeRobotReader(folder)
    assert source.name == "pusht"
    assert source.read(source.episodes()[2]).length == 53
