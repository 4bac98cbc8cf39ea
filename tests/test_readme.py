"""Every command of the README runs, on a small base and small demonstrations in place of the large ones."""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path

import h5py
import numpy as np
import pytest
from repository import ROOT
from small_base import write_demonstrations, write_small_base

from vlaft.cli.main import main
from vlaft.data.codec import encode_image

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("vlaft ")]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the README's commands were run, in their order."""
    folder = tmp_path_factory.mktemp("readme")
    write_small_base(folder / "base", "fused")
    write_demonstrations(folder / "demos.hdf5")
    with h5py.File(folder / "demos.hdf5", "a") as file:  # the state and the camera that the preset reads
        for demo in file["data"].values():
            for name, width in (("robot0_eef_pos", 3), ("robot0_eef_quat", 4), ("robot0_gripper_qpos", 2)):
                demo[f"obs/{name}"] = np.ones((len(demo["actions"]), width), np.float32)
            demo["obs/robot0_eye_in_hand_image"] = demo["obs/agentview_image"][:]
    for name in ("frame", "wrist"):
        (folder / f"{name}.png").write_bytes(encode_image(np.full((64, 64, 3), 90, np.uint8), "png"))
    return folder


def run(command: str, folder: Path) -> int:
    command = re.sub(r"train\.steps=\d+", "train.steps=2", command.replace("openvla/openvla-7b", str(folder / "base")))
    words = shlex.split(command)[1:]
    if words[0] == "report":  # on the small base: counting the large one is tested elsewhere
        words += ["--base", str(folder / "base"), "--recipe", "lora32"]
    return main(words)


@pytest.fixture(scope="module")
def done(job: Path) -> dict[str, int]:
    """Exit codes of the README's commands, run in its order."""
    with contextlib.chdir(job):
        # `serve` runs until it is stopped, `demo` for minutes: test_serve.py, cli/test_cli_demo.py
        return {told: run(told, job) for told in commands() if not told.startswith(("vlaft serve", "vlaft demo"))}


def test_the_commands_of_the_job(job: Path, done: dict[str, int]) -> None:
    assert len(done) >= 8
    assert set(done.values()) == {0}, done
    assert (job / "model/config.json").is_file()


@pytest.mark.usefixtures("done")
def test_the_python_example(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(job)
    (code,) = blocks("python")
    names: dict = {"image": np.zeros((64, 64, 3), np.uint8)}
    exec(code, names)
    assert names["prediction"].action.shape == (7,)


def test_single_commands_in_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("recipes", "recipes copy lora32", "doctor"):
        assert f"`vlaft {command}`" in README
        assert main(command.split()) == 0
    assert (tmp_path / "lora32.yaml").is_file()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_the_makefile_has_the_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("bash")), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
