"""What `vlaft inspect` shows first: what lies there, damaged or unknown as it may be, and which folder was meant."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlaft.cli.main import main
from vlaft.data.source import SourceRequest, open_request
from vlaft.errors import DataError

FPS = 10
STEPS = 6


def write_video(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for index in range(STEPS):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 40 * index, np.uint8), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_lerobot(root: Path, episodes: int = 3) -> Path:
    (root / "meta").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    camera = "observation.images.front"
    features: dict[str, Any] = {
        "action": {"dtype": "float32", "shape": [7]},
        camera: {"dtype": "video", "shape": [32, 32, 3]},
    }
    info = {"codebase_version": "v2.0", "fps": FPS, "total_episodes": episodes, "features": features}
    (root / "meta/info.json").write_text(json.dumps(info))
    rows = [{"episode_index": n, "tasks": ["open the drawer"], "length": STEPS} for n in range(episodes)]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "open the drawer"}))
    for number in range(episodes):
        action = np.random.default_rng(number).normal(size=(STEPS, 7)).astype(np.float32)
        table = {
            "action": pa.array(list(action), pa.list_(pa.float32(), 7)),
            "timestamp": pa.array([step / FPS for step in range(STEPS)], pa.float32()),
            "frame_index": pa.array(range(STEPS), pa.int64()),
            "episode_index": pa.array([number] * STEPS, pa.int64()),
            "task_index": pa.array([0] * STEPS, pa.int64()),
        }
        pq.write_table(pa.table(table), root / f"data/chunk-000/episode_{number:06d}.parquet")
        write_video(root / f"videos/chunk-000/{camera}/episode_{number:06d}.mp4")
    return root


def videos(root: Path) -> list[Path]:
    return sorted(root.glob("videos/*/*/*.mp4"))


def write_free(path: Path, more: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.attrs["lab"] = "north"
        for number in range(3):
            group = file.create_group(f"episodes/traj_{number}")
            group["cmd/ee_delta"] = np.random.default_rng(number).normal(size=(STEPS, 6))
            group["cmd/gripper"] = np.zeros(STEPS)
            group["cam/front"] = np.full((STEPS + more, 16, 16, 3), 9, np.uint8)
    return path


def test_what_lies_in_an_unknown_file_is_shown_before_what_to_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_free(tmp_path / "free.h5")
    assert main(["inspect", str(path)]) == 1
    told = capsys.readouterr()
    lines = {line.split()[0]: line for line in told.out.splitlines()}
    assert lines["@lab"].endswith("= north")
    assert "one of 3 named alike, to traj_2" in lines["traj_0/"]
    assert "[6, 6]" in lines["ee_delta"] and "[6]" in lines["gripper"] and "[6, 16, 16, 3]  uint8" in lines["front"]
    assert lines["front"].startswith(" " * 8) and lines["traj_0/"].startswith("    t")
    assert told.err.startswith("error: ") and "action='[cmd/ee_delta, cmd/gripper]'" in told.err


def test_what_lies_in_a_readable_source_comes_before_the_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_lerobot(tmp_path / "set")
    assert main(["inspect", str(root)]) == 0
    out = capsys.readouterr().out
    at = [out.index(text) for text in ("dataset  ", "in episode episode_000000:", "[6, 32, 32, 3]  uint8", "warnings")]
    assert at == sorted(at)
    assert main(["inspect", str(root), "--json"]) == 0
    contents = json.loads(capsys.readouterr().out)["contents"]
    assert {"path": "action", "shape": [STEPS, 7], "kind": "float32", "note": ""} in contents["entries"]


def test_damaged_and_linked_parts_of_a_file_are_shown_as_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "free.h5"
    with h5py.File(path, "w") as file:
        file["away"] = h5py.ExternalLink("other.h5", "/x")
        file["nowhere"] = h5py.SoftLink("/not/there")
        file["round"] = file["/"]
        file["said"] = "text"
    assert main(["inspect", str(path)]) == 1
    told = capsys.readouterr()
    assert "another file" in told.out and "leads nowhere" in told.out and "said" in told.out
    assert told.err.count("\n") == 1 and len(told.out.splitlines()) < 250


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("content", [b"", b"no video at all", None], ids=["empty", "garbage", "truncated"])
def test_one_damaged_video_is_a_row_of_the_table(
    number: int, content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_lerobot(tmp_path / "set")
    video = videos(root)[number]
    video.write_bytes(video.read_bytes()[:700] if content is None else content)
    assert main(["inspect", str(root)]) == 0
    out = capsys.readouterr().out
    [row] = [line for line in out.splitlines() if line.startswith("damaged ")]
    assert f"episode_{number:06d}" in row
    assert "observation.images.front 32x32x3 as front" in out and "episodes      3" in out
    assert out.count("frames cannot be decoded in") == 1 and "would be refused" not in out


def test_videos_that_are_all_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_lerobot(tmp_path / "set")
    for video in videos(root):
        video.write_bytes(b"")
    assert main(["inspect", str(root), "--html", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    assert "observation.images.front (no frame can be read)" in out and out.count("episode_00000") >= 3


def test_missing_videos_are_said_to_be_why_there_is_no_camera(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_lerobot(tmp_path / "set")
    for video in videos(root):
        video.unlink()
    assert main(["inspect", str(root)]) == 0
    assert "there are no images at all" in capsys.readouterr().out
    for layout in ({}, {"cameras": {"front": "observation.images.front"}}):
        opened = open_request(SourceRequest(path=root, layout=layout))
        with pytest.raises(DataError, match=r"examples need images: camera 'observation.images.front' has no video"):
            opened.read(opened.reader.episodes()[0])


def test_a_camera_that_the_reader_left_out_is_said_why(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "set")
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["observation.images.wrist"] = {"dtype": "video", "shape": [32, 32, 3]}
    (root / "meta/info.json").write_text(json.dumps(info))
    layout = {"cameras": {"wrist": "observation.images.wrist"}}
    opened = open_request(SourceRequest(path=root, layout=layout))
    with pytest.raises(DataError, match=r"lacks a camera that is asked for: .*wrist' has no video"):
        opened.read(opened.reader.episodes()[0])


def test_warnings_that_say_the_same_are_one_with_a_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_lerobot(tmp_path / "set", episodes=5)
    rows = [{"episode_index": n, "tasks": ["open the drawer"], "length": STEPS + 1} for n in range(5)]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["inspect", str(root)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "the metadata say 7 steps" in line]
    assert len(told) == 1 and "episode_000000" in told[0] and "4 more such warnings" in told[0]


def test_recordings_below_several_folders_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_free(tmp_path / "lab/2024/may/first/a.h5")
    words = ["episodes=episodes/traj_*", "action=[cmd/ee_delta]", "cameras={front: cam/front}", "instruction=go"]
    assert main(["inspect", str(tmp_path / "lab"), *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 3


def test_a_folder_above_datasets_points_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_lerobot(tmp_path / "home/ann/first", episodes=1)
    write_free(tmp_path / "home/raw/a.h5")
    for folder in ("home", "home/ann"):
        assert main(["inspect", str(tmp_path / folder)]) == 1
        told = capsys.readouterr()
        assert f"give one of those below it: {first}" in told.err and told.err.count("\n") == 1


def test_lerobot_of_version_1_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("meta_data", "train", "videos"):
        (tmp_path / "old" / name).mkdir(parents=True)
    (tmp_path / "old/meta_data/info.json").write_text('{"codebase_version": "v1.6", "fps": 10}')
    (tmp_path / "old/train/data-00000-of-00001.arrow").write_bytes(b"ARROW1")
    assert main(["inspect", str(tmp_path / "old")]) == 1
    told = capsys.readouterr()
    assert "LeRobot dataset of version 1" in told.err and "convert_dataset_v1_to_v2" in told.err
    assert "train/data-00000-of-00001.arrow" in told.out


def test_the_files_own_attribute_is_proposed_where_the_format_names_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with h5py.File(tmp_path / "episode_0.hdf5", "w") as file:
        file.attrs["task_goal"] = "insert the peg"
        file["action"] = np.random.default_rng(0).normal(size=(STEPS, 14))
        file["observations/images/top"] = np.full((STEPS, 16, 16, 3), 9, np.uint8)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "type instruction='{attribute: task_goal}'" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "instruction={attribute: task_goal}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["instructions"] == ["insert the peg"]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_narrow_terminal_gets_fewer_columns_and_whole_numbers(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    from vlaft.cli import console
    from vlaft.cli.inspect import _action_table

    written = io.StringIO()
    monkeypatch.setattr(console, "stdout_console", lambda: Console(file=written, width=width))
    values = [-0.12345678, 12345.678]
    stats = dict.fromkeys(("mean", "std", "min", "q01", "q99", "max"), values)
    counts = [{"counts": list(range(40))}] * 2
    action = {"dim": 2, "names": ["x", "gripper"], "stats": stats, "histograms": counts}
    table = _action_table({**action, "clipped": [0.5, 0.0], "mask": [True, False]})
    console.stdout_console().print(table)
    lines = written.getvalue().splitlines()
    assert len(lines) == 3 and "…" not in lines[0] and "…" not in lines[1]
    assert "-0.1235" in lines[1] and "1.235e+04" in lines[2] and "max" in lines[0]
    assert ("min to max" in lines[0]) == (width == 120)
