"""What `vlaft predict` takes and prints: several cameras, a state, chunks; and what it says where something lacks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from small_base import INSTRUCTION, convert_small, write_small_base
from small_run import Small, run

from vlaft.cli.main import main
from vlaft.data.codec import decode_image, encode_image
from vlaft.policy import load

FILES = {"main": "a.png", "wrist": "b.png"}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, runs of a policy of two cameras and of one, and frames."""
    folder = tmp_path_factory.mktemp("predict")
    base = write_small_base(folder / "base", "fused")
    small = Small(base, convert_small(base, folder / "data", rich=True))
    run(small.recipe("oft-state", "policy.chunk=3", "train.steps=1"), folder / "two")
    run(small.recipe("oft", "policy.chunk=2", "train.steps=1"), folder / "one")
    generator = np.random.default_rng(0)
    for name in ("a", "b", "c=d"):
        (folder / f"{name}.png").write_bytes(encode_image(generator.integers(0, 256, (64, 64, 3), np.uint8), "png"))
    return folder


@pytest.fixture(autouse=True)
def inside(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(job)


def predict(*words: str) -> int:
    images = [part for word in words if not word.startswith("-") for part in ("--image", word)]
    options = [word for word in words if word.startswith("-")]
    return main(["predict", options.pop(0).removeprefix("-"), *images, *options, "--instruction", INSTRUCTION])


def expected(job: Path) -> np.ndarray:
    images = {camera: decode_image((job / name).read_bytes(), name) for camera, name in FILES.items()}
    return load(job / "two", device="cpu").predict(images, INSTRUCTION, state=[-0.5, 0.1, 0.5]).actions


def test_a_chunk_of_two_cameras_and_a_state(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chunk = expected(job)
    assert predict("-two", "main=a.png", "wrist=b.png", "--state=-0.5,0.1, 0.5") == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["step", *map(str, range(7))]
    assert [line.split() for line in lines] == [[str(k), *(f"{v:+.5f}" for v in row)] for k, row in enumerate(chunk)]
    assert predict("-two", "wrist=b.png", "main=a.png", "--state=-0.5 0.1 0.5", "--json") == 0
    row = json.loads(capsys.readouterr().out)
    assert list(row) == ["action", "actions", "action_token_ids", "unnorm_key"]
    assert np.array_equal(row["actions"], chunk) and row["action"] == row["actions"][0]


def test_several_moments_of_one_camera(capsys: pytest.CaptureFixture[str]) -> None:
    assert predict("-one", "a.png", "./c=d.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[4]] == ["a.png  (small)", "./c=d.png  (small)"]
    assert len(lines) == 8 and lines[3] != lines[7]
    assert predict("-one", "main=./c=d.png") == 0
    assert capsys.readouterr().out.splitlines() == lines[5:]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("-two", "a.png", "--state=0,0,0"), 1, "2 cameras: give --image main=FILE --image wrist=FILE"),
        (("-two", "main=a.png", "--state=0,0,0"), 1, "lacks the camera 'wrist'"),
        (("-two", "main=a.png", "wirst=b.png", "--state=0,0,0"), 1, "no camera 'wirst'; did you mean 'wrist'?"),
        (("-two", "main=a.png", "wrist=b.png"), 1, "reads the robot's state: give its 3 numbers"),
        (("-two", "main=a.png", "wrist=b.png", "--state=1,2"), 1, "states of 3 numbers"),
        (("-two", "main=a.png", "wrist=b.png", "--state=nan,0,0"), 1, "not finite"),
        (("-two", "main=a.png", "wrist=b.png", "--state=1e99,0,0"), 1, "too large for a float32"),
        (("-two", "main=a.png", "wrist=b.png", "--state=1,x,2"), 2, "--state: could not convert string to float: 'x'"),
        (("-two", "main=a.png", "b.png"), 2, "--image b.png: others say which camera they are from"),
        (("-two", "main=a.png", "main=b.png"), 2, "--image main=... is given twice"),
        (("-two", "a.png", "b.png", "--state=1,2,3"), 2, "--state is of one moment, and 2 are given"),
        (("-two", "main=none.png", "wrist=b.png"), 1, "none.png: cannot be read"),
        (("-one", "a.png", "--state=1,2,3"), 1, "the policy reads no state; leave --state out"),
        (("-one", "c=d.png"), 1, "d.png: cannot be read"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    words: tuple[str, ...], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(*words) == code
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
