"""Dataset presets and mixes: every file loads, says what OpenVLA's transform does, and wrong ones are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from array_frames import ArrayFrames

from vlaft.data.episode import Episode
from vlaft.data.layout import Layout, apply_layout
from vlaft.data.mixes import load_mix
from vlaft.data.presets import load_preset, preset_names, preset_of_dataset
from vlaft.data.readers.opening import open_reader
from vlaft.data.standardize.steps import standardize
from vlaft.errors import ConfigError
from vlaft.recipe.resolve import recipes_folder

WIDTHS = {  # columns of the arrays that presets name without a slice; every other array has 15
    "action/world_vector": 3,
    "action/rotation_delta": 3,
    "action/gripper_closedness_action": 1,
    "action/open_gripper": 1,
    "action_dict/gripper_position": 1,
}
WHOLE_ACTION = {"language_table": 2, "berkeley_fanuc": 6, "aloha": 14, "ucsd_kitchen": 8, "cmu_stretch": 8}


def source_episode(preset: str, layout: Layout, steps: int = 6) -> Episode:
    """An episode with random arrays of the shapes that the dataset has."""
    random = np.random.default_rng(0)
    arrays = {}
    for reference in (*layout.action, *layout.state):
        path = reference.partition("[")[0]
        width = WHOLE_ACTION.get(preset, 7) if reference in ("action", "actions") else WIDTHS.get(path, 15)
        if path == "action":
            width = {"nyu_franka_play": 15, "furniture_bench": 8, "iamlab_cmu_pickup_insert": 8}.get(
                preset, WHOLE_ACTION.get(preset, 7)
            )
        if layout.state_names and reference in layout.state:
            width = len(layout.state_names)
        arrays[path] = random.uniform(-1, 1, (steps, width)).astype(np.float32)
    frames = ArrayFrames(np.zeros((steps, 2, 2, 3), np.uint8))
    cameras = dict.fromkeys(layout.cameras.values() or ["observations/images/cam_high"], frames)
    return Episode(index=0, name="demo", length=steps, arrays=arrays, cameras=cameras)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_gives_an_action_that_its_mask_and_names_describe(name: str) -> None:
    layout = load_preset(name)
    episode = standardize(apply_layout(source_episode(name, layout), layout), layout.steps)
    assert episode.action is not None
    assert (episode.state is not None) == bool(layout.state)
    assert episode.action.shape == (episode.length, len(layout.action_mask))
    assert len(episode.action_names) == episode.action.shape[1]
    if name != "aloha":  # whose cameras have no agreed names: the reader's stay
        assert next(iter(layout.cameras)) == "primary"
        assert layout.action_mask == (True,) * 6 + (False,)
        assert episode.action_names[-1] == "gripper"
        assert len(episode.action_names) == 7


@pytest.mark.parametrize("path", sorted(recipes_folder().glob("datasets/*.yaml")), ids=lambda path: path.stem)
def test_every_preset_opens_with_two_comment_lines(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") and lines[1].startswith("# Convention: ")
    assert not lines[2].startswith("#")
    assert max(map(len, lines)) <= 120


def test_bridge_is_upstreams_transform_on_a_hand_made_episode() -> None:
    layout = load_preset("bridge_orig")
    assert layout == load_preset("bridge") == load_preset("bridge_dataset")
    action = np.full((5, 7), 9.0)
    action[:, 6] = [0, 1, 0.5, 0.5, 0]
    state = np.cumsum(np.ones((5, 7)), axis=0) ** 2
    cameras = {f"observation/image_{i}": ArrayFrames(np.zeros((5, 2, 2, 3), np.uint8)) for i in range(2)}
    arrays = {"action": action, "observation/state": state}
    episode = Episode(index=0, name="demo", length=5, arrays=arrays, cameras=cameras)
    changed = standardize(apply_layout(episode, layout), layout.steps)
    assert changed.action is not None and changed.state is not None
    assert changed.action[:, 0].tolist() == [5, 7, 9]  # squares 4, 9, 16, 25
    assert changed.action[:, 6].tolist() == [1, 0, 0]  # the dropped last step still says what is reached next
    assert changed.state[:, 0].tolist() == [4, 9, 16]
    assert changed.fps == 5


def test_libero_from_rlds_and_from_hdf5_agree_on_the_action() -> None:
    action = np.full((3, 7), 0.5, np.float32)
    action[:, 6] = [-1, 1, -1]
    frames = np.zeros((3, 2, 2, 3), np.uint8)
    frames[:, 0, 0] = 255
    turned = ArrayFrames(frames[:, ::-1, ::-1])
    ee_states, gripper_states = np.ones((3, 6)), np.ones((3, 2))
    rlds = Episode(
        index=0, name="a", length=3, cameras={f"observation/{name}": turned for name in ("image", "wrist_image")},
        arrays={"action": action, "observation/state": np.ones((3, 8))},
    )  # fmt: skip
    hdf5 = Episode(
        index=0, name="a", length=3,
        cameras={f"obs/{name}": ArrayFrames(frames) for name in ("agentview_rgb", "eye_in_hand_rgb")},
        arrays={"actions": action, "obs/ee_states": ee_states, "obs/gripper_states": gripper_states},
    )  # fmt: skip
    results = []
    for preset, episode in (("libero_10_no_noops", rlds), ("libero_hdf5", hdf5)):
        layout = load_preset(preset)
        results.append(standardize(apply_layout(episode, layout), layout.steps))
    one, other = results
    assert one.action is not None and one.action[:, 6].tolist() == [1, 0, 1]
    np.testing.assert_array_equal(one.action, other.action)
    np.testing.assert_array_equal(one.state, other.state)
    for camera in ("primary", "wrist"):
        seen = [list(result.cameras[camera].read([0, 1, 2])) for result in results]
        np.testing.assert_array_equal(seen[0], seen[1])


def test_a_preset_replaces_only_the_fields_it_names(tmp_path: Path) -> None:
    named = {"action_names": ("x",), "state_names": ("y",)}
    base = Layout(action=("a",), state=("s",), fps=10.0, action_mask=(True,), steps=("drop_last",), **named)
    file = tmp_path / "mine.yaml"
    file.write_text("fps: 5\ninstruction: push the button\n")
    layout = load_preset(file, base)
    assert (layout.fps, layout.instruction) == (5.0, "push the button")
    assert (layout.action, layout.state, layout.action_names, layout.steps) == (("a",), ("s",), ("x",), ("drop_last",))
    file.write_text("action: [b]\nsteps: []\n")
    layout = load_preset(str(file), base)
    assert (layout.action, layout.state, layout.steps) == (("b",), ("s",), ())
    assert (layout.action_names, layout.action_mask) == ((), ())  # they described the other action
    assert layout.state_names == ("y",)
    file.write_text("state: [t]\n")
    assert load_preset(file, base).state_names == ()


def test_all_problems_of_a_preset_are_told_together(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "acton: [a]\naction: []\nstate: x\nsteps: [drop_frist, {resample: {}}]\naction_mask: [1]\nfps: -1\n"
        "cameras: [a]\ninstruction: 3\noptions: 4\ndatasets: x\naction_names: [1]\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_preset(file)
    assert [problem.removeprefix(f"{file}: ") for problem in caught.value.problems] == [
        "unknown key 'acton'; did you mean 'action'?",
        "'state' has to be a list of texts, such as [a, b]",
        "step 1: unknown standardizing step 'drop_frist'; did you mean 'drop_first'?",
        "step 2 (resample): the argument 'fps' is missing",
        "'action_mask' has to be a list of (true or false)",
        "'fps' has to be a positive number (Hz)",
        "'cameras' has to map our camera names to the source's",
        "'instruction' has to be a text or null",
        "'options' has to be a mapping",
        "'datasets' has to be a list of names",
        "'action_names' has to be a list of texts, such as [a, b]",
    ]
    file.write_text("action: []\n")
    with pytest.raises(ConfigError, match="at least one array"):
        load_preset(file)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a: [\n", "not valid YAML"),
        ("- a\n", "a preset is a mapping of keys to values"),
        ("a: !!python/object/apply:os.system [x]\n", "not valid YAML"),
        ("a: &x [b]\nc: *x\n", "aliases"),
        ("[" * 5000, "not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
)
def test_what_is_no_preset_file_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        load_preset(file)


def test_unknown_names_are_told_with_the_nearest_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown preset 'bridge_origin'; did you mean 'bridge_orig'"):
        load_preset("bridge_origin")
    with pytest.raises(ConfigError, match=r"unknown preset '\?' \(known: aloha, "):
        load_preset("?")
    with pytest.raises(ConfigError, match="there is no preset file"):
        load_preset(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="did you mean 'oxe_magic_soup'"):
        load_mix("oxe_magic_soups")


def test_published_names_lead_to_their_preset() -> None:
    assert preset_of_dataset("fractal20220817_data") == "fractal"
    assert preset_of_dataset("my_own_robot") is None
    assert preset_of_dataset("tdroid_carrot_in_bowl") == "tdroid"


@pytest.mark.parametrize(
    ("folder", "preset", "episodes"),
    [
        ("rlds/bridge_dataset/1.0.0", "bridge", 50),
        ("hdf5/libero_raw", "libero_hdf5", 6),
        ("hdf5/libero_regenerated", "libero_hdf5", 3),
        ("hdf5/robomimic_image.hdf5", "robomimic", 8),
        ("hdf5/aloha_compressed", "aloha", 3),
        ("hdf5/aloha_raw", "aloha", 2),
    ],
)
def test_presets_fit_real_files(samples: Path, folder: str, preset: str, episodes: int) -> None:
    source = open_reader(samples / folder)
    layout = load_preset(preset, source.layout)
    assert len(source.episodes()) == episodes
    for ref in source.episodes():
        episode = standardize(apply_layout(source.read(ref), layout), layout.steps)
        assert episode.action is not None and episode.state is not None
        assert episode.action.shape == (episode.length, len(layout.action_mask))
        assert all(len(frames) == episode.length for frames in episode.cameras.values())
        if preset != "aloha":
            assert set(np.unique(episode.action[:, -1])) <= {0.0, 1.0}
        (first,) = next(iter(episode.cameras.values())).read([0])
        assert first.std() > 1


def test_recipes_lie_in_the_package_of_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlaft.recipe.resolve.__file__", str(tmp_path / "vlaft" / "recipe" / "resolve.py"))
    with pytest.raises(ConfigError, match="install vlaft again"):
        recipes_folder()
    (tmp_path / "vlaft" / "recipes" / "datasets").mkdir(parents=True)
    assert recipes_folder() == tmp_path / "vlaft" / "recipes"
