"""Which frames of which video belong to which rows, where a LeRobot set is not as it should be."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lerobot_sets import (
    CAMERA,
    LENGTHS,
    columns,
    edit_info,
    info,
    make_v2,
    make_v3,
    read_all,
    refused,
    video,
    warned,
    write_json,
)

from vlaft.data.layout import apply_layout
from vlaft.data.readers.lerobot.source import LeRobotReader
from vlaft.data.readers.lerobot.video import Place
from vlaft.errors import DataError

WRIST = "observation.images.wrist"


def shared_video(
    root: Path,
    lengths: tuple[int, ...],
    starts: list[float],
    stops: list[float] | None = None,
    kept: list[int] | None = None,
    *,
    rate: int = 20,
    fps: float = 20,
    lost: tuple[int, ...] = (),
) -> Path:
    """A v3.0 set whose episodes share a video of `rate` frames per second, frame i of grey level 10 + 4 i.

    Args:
        root: where to write it.
        lengths: rows of each recorded episode.
        starts: from_timestamp of each.
        stops: to_timestamp of each; by default they are right.
        kept: the episodes that the metadata and the rows still have.
        rate: frames per second of the video, and of the rows' timestamps.
        fps: what info.json says.
        lost: frames that the video lacks, though time passes for them.
    """
    kept = list(range(len(lengths))) if kept is None else kept
    stops = stops or [start + length / rate for start, length in zip(starts, lengths, strict=True)]
    write_json(root / "meta/info.json", info("v3.0") | {"fps": fps, "total_episodes": len(kept)})
    pq.write_table(pa.table({"task_index": [0, 1], "task": ["task 0", "task 1"]}), root / "meta/tasks.parquet")
    tables = []
    for number in kept:
        timestamps = pa.array([step / rate for step in range(lengths[number])], pa.float32())
        tables.append(pa.table(columns(number, lengths[number]) | {"timestamp": timestamps}))
    (root / "data/chunk-000").mkdir(parents=True)
    pq.write_table(pa.concat_tables(tables), root / "data/chunk-000/file-000.parquet")
    zeros = [0] * len(kept)
    episodes: dict[str, Any] = {"episode_index": kept, "length": [lengths[number] for number in kept]}
    episodes |= {f"data/{name}": zeros for name in ("chunk_index", "file_index")}
    episodes |= {f"videos/{CAMERA}/{name}": zeros for name in ("chunk_index", "file_index")}
    episodes[f"videos/{CAMERA}/from_timestamp"] = [starts[number] for number in kept]
    episodes[f"videos/{CAMERA}/to_timestamp"] = [stops[number] for number in kept]
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.table(episodes), root / "meta/episodes/chunk-000/file-000.parquet")
    path = root / f"videos/{CAMERA}/chunk-000/file-000.mp4"
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for index in range(sum(lengths)):
            if index not in lost:
                pixels = np.full((32, 32, 3), 10 + 4 * index, np.uint8)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, rate)
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return root


def frame_numbers(episode: Any) -> list[int]:
    """The frame of the video that each row got, by its grey level."""
    frames = episode.cameras["top"].read(range(episode.length))
    return [round((float(frame.mean()) - 10) / 4) for frame in frames]


def in_order(lengths: tuple[int, ...]) -> list[list[int]]:
    ends = np.cumsum(lengths)
    return [list(range(end - length, end)) for length, end in zip(lengths, ends, strict=True)]


# --- several episodes in one video


THREE = (10, 14, 12)
STARTS = [0.0, 0.5, 1.2]


def test_stops_that_name_the_last_frame(tmp_path: Path) -> None:
    stops = [start + (length - 1) / 20 for start, length in zip(STARTS, THREE, strict=True)]
    source, episodes = read_all(shared_video(tmp_path / "a", THREE, STARTS, stops))
    assert [frame_numbers(episode) for episode in episodes] == in_order(THREE)
    assert source.warnings == []
    source, episodes = read_all(shared_video(tmp_path / "b", THREE, STARTS, stops, kept=[0, 2]))
    assert [frame_numbers(episode) for episode in episodes] == [in_order(THREE)[0], in_order(THREE)[2]]
    assert source.warnings == []


@pytest.mark.parametrize("fps", [5, 15, 30, 60])
@pytest.mark.parametrize("kept", [[0, 1, 2], [0, 1], [1, 2], [2]])
def test_a_wrong_rate_leaves_right_start_times_alone(tmp_path: Path, fps: float, kept: list[int]) -> None:
    source, episodes = read_all(shared_video(tmp_path / "a", THREE, STARTS, kept=kept, fps=fps))
    assert [frame_numbers(episode) for episode in episodes] == [in_order(THREE)[number] for number in kept]
    assert all(f"info.json says {fps:g} fps" in text for text in source.warnings)


def test_start_times_of_the_wrong_rate_too(tmp_path: Path) -> None:
    starts = [start * 20 / 30 for start in STARTS]
    stops = [start + length / 30 for start, length in zip(starts, THREE, strict=True)]
    source, episodes = read_all(shared_video(tmp_path / "a", THREE, starts, stops, fps=30))
    assert [frame_numbers(episode) for episode in episodes] == in_order(THREE)
    assert any("start times drifted" in text for text in source.warnings)


ODD_STARTS = [[0.0, 0.0, 0.0], [0.0, 0.45, 1.1]]  # all at the head, or summed from one step less


@pytest.mark.parametrize("starts", ODD_STARTS)
def test_odd_start_times_are_mended_where_the_video_holds_just_these_episodes(
    tmp_path: Path, starts: list[float]
) -> None:
    stops = [start + (length - 1) / 20 for start, length in zip(starts, THREE, strict=True)]
    source, episodes = read_all(shared_video(tmp_path / "a", THREE, starts, stops))
    assert [frame_numbers(episode) for episode in episodes] == in_order(THREE)
    assert any("start times drifted" in text for text in source.warnings)


@pytest.mark.parametrize("starts", ODD_STARTS)
@pytest.mark.parametrize("kept", [[0, 1], [1, 2]])
def test_overlapping_windows_are_refused_where_an_episode_is_missing(
    tmp_path: Path, starts: list[float], kept: list[int]
) -> None:
    stops = [start + (length - 1) / 20 for start, length in zip(starts, THREE, strict=True)]
    refused(
        shared_video(tmp_path / "a", THREE, starts, stops, kept=kept),
        rf"file-000\.mp4: episode_00000{kept[0]}, camera '{CAMERA}': .* overlap",
    )


def test_starts_that_may_be_early_are_refused(tmp_path: Path) -> None:
    """Summed from one step less, but the episode between is missing, so that nothing overlaps."""
    starts = ODD_STARTS[1]
    stops = [start + (length - 1) / 20 for start, length in zip(starts, THREE, strict=True)]
    root = shared_video(tmp_path / "a", THREE, starts, stops, kept=[0, 2])
    refused(root, "episode_000002, .* ending one step early")
    source = LeRobotReader(root)
    first = apply_layout(source.read(source.episodes()[0]), source.layout)
    assert frame_numbers(first) == in_order(THREE)[0]  # the first one starts with the video, however it was counted


@settings(max_examples=300, deadline=None)
@given(
    episodes=st.lists(
        st.tuples(st.floats(0, 1e12), st.none() | st.floats(0, 1e12), st.integers(0, 2**31)), min_size=1, max_size=5
    ),
    frames=st.integers(0, 50),
    rate=st.just(0.0) | st.floats(0.1, 1000),
    data=st.data(),
)
def test_any_windows_end_in_times_or_in_a_sentence(
    episodes: list[tuple[float, float | None, int]], frames: int, rate: float, data: st.DataObject
) -> None:
    starts, stops, lengths = zip(*sorted(episodes, key=lambda episode: episode[0]), strict=True)
    number = data.draw(st.integers(0, len(episodes) - 1))
    try:
        first, last, _ = Place(starts, stops, lengths, number).window(
            stops[number] or starts[number] + 1, frames, rate, lambda: np.arange(frames) / 20, "x"
        )
        assert np.isfinite([first, last]).all()
    except DataError as error:
        assert "cannot be told" in str(error)


def test_episodes_whose_rows_are_lost_still_count(tmp_path: Path) -> None:
    root = shared_video(tmp_path / "a", THREE, [0.0, 0.0, 0.0])
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    place = table.schema.get_field_index("data/file_index")
    pq.write_table(table.set_column(place, "data/file_index", pa.array([0, 7, 0])), path)
    episodes = warned(root, "1 episodes of meta/episodes have no data file")
    assert [frame_numbers(episode) for episode in episodes] == [in_order(THREE)[0], in_order(THREE)[2]]


@pytest.mark.parametrize("kept", [[0, 1, 2], [0, 2]])
def test_a_frame_lost_within_an_episode_moves_no_other(tmp_path: Path, kept: list[int]) -> None:
    source, episodes = read_all(shared_video(tmp_path / "a", THREE, STARTS, kept=kept, lost=(4,)))
    found = [frame_numbers(episode) for episode in episodes]
    assert found[0][:4] == [0, 1, 2, 3] and found[0][4] in (3, 5) and found[0][5:] == [5, 6, 7, 8, 9]
    assert found[1:] == [in_order(THREE)[number] for number in kept[1:]]
    assert len(source.warnings) == 1 and "9 frames for 10 rows" in source.warnings[0]


def test_videos_joined_by_their_durations_keep_each_its_frames(tmp_path: Path) -> None:
    """An episode that lost its last frame, in a video that was made by joining one video per episode."""
    recorded = (9, 14, 12)  # frames
    root = shared_video(tmp_path / "a", recorded, [0.0, 0.45, 1.15])
    path = root / "data/chunk-000/file-000.parquet"
    rows = [pa.table(columns(n, length) | {"timestamp": pa.array(np.arange(length, dtype=np.float32) / 20)})
            for n, length in enumerate(THREE)]  # fmt: skip
    pq.write_table(pa.concat_tables(rows), path)
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).set_column(1, "length", pa.array(THREE)), path)
    source, episodes = read_all(root)
    assert [frame_numbers(episode) for episode in episodes] == [[*range(9), 8], *in_order(recorded)[1:]]
    assert len(source.warnings) == 1 and "9 frames for 10 rows" in source.warnings[0]


# --- cameras


@pytest.mark.parametrize("make", [make_v2, make_v3])
def test_an_episode_without_videos_costs_no_camera(tmp_path: Path, make: Any) -> None:
    root = make(tmp_path / "a")
    edit_info(root, lambda value: value["features"].update({WRIST: {"dtype": "video"}}))
    if make is make_v2:
        video(root / f"videos/chunk-000/{WRIST}/episode_000001.mp4", [200] * 5)
        (root / f"videos/chunk-000/{CAMERA}/episode_000000.mp4").unlink()
    else:
        shutil.copytree(root / f"videos/{CAMERA}", root / f"videos/{WRIST}")
        path = root / "meta/episodes/chunk-000/file-000.parquet"
        rows = pq.read_table(path).to_pylist()
        for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp"):
            rows[1][f"videos/{WRIST}/{name}"] = rows[1][f"videos/{CAMERA}/{name}"]
            rows[0][f"videos/{WRIST}/{name}"] = rows[0][f"videos/{CAMERA}/{name}"] = None
        pq.write_table(pa.Table.from_pylist(rows[::-1]), path)
    source, episodes = read_all(root)
    assert [episode.name for episode in episodes] == ["episode_000001"]
    assert set(episodes[0].cameras) == {"top", "wrist"}
    assert [text for text in source.warnings if "left out" in text] == [
        f"only 1 of 2 episodes have a video of camera '{CAMERA}' and '{WRIST}', and no camera is complete;"
        " the other episodes are left out"
    ]


# --- recordings that were merged as chunk folders


def test_the_same_episode_in_two_chunks_is_refused_with_both_paths(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    shutil.copytree(root / "data/chunk-000", root / "data/chunk-001")
    shutil.copytree(root / "videos/chunk-000", root / "videos/chunk-001")
    refused(root, r"data/chunk-000/episode_000000\.parquet and data/chunk-001/episode_000000\.parquet")


def test_video_and_rows_are_of_one_chunk(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    (root / "data/chunk-000").rename(root / "data/chunk-001")
    shutil.copytree(root / "videos/chunk-000", root / "videos/chunk-001")
    for number, length in enumerate(LENGTHS):
        video(root / f"videos/chunk-001/{CAMERA}/episode_{number:06d}.mp4", [200] * length)
    _, episodes = read_all(root)
    assert [round(float(next(episode.cameras["top"].read([0])).mean()) / 10) for episode in episodes] == [20, 20]
    shutil.rmtree(root / "videos/chunk-001")
    refused(root, r"data/chunk-001/episode_000000\.parquet, .* videos/chunk-000/.*/episode_000000\.mp4")


def test_two_videos_of_one_episode_are_refused_unless_the_template_chooses(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    shutil.copytree(root / "videos", root / "video")
    assert read_all(root)[0].warnings == []  # info.json names one of them
    edit_info(root, lambda value: value.pop("video_path"))
    refused(root, r"videos/chunk-000/.*/episode_000000\.mp4 and video/chunk-000/")


def test_a_template_without_a_number_leads_nowhere(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    edit_info(root, lambda value: value.update(video_path=f"videos/chunk-000/{CAMERA}/episode_000000.mp4"))
    episodes = warned(root, "does not fit")
    assert [round(float(next(episode.cameras["top"].read([0])).mean()) / 10) for episode in episodes] == [2, 12]


def test_the_same_episode_listed_twice_is_refused(tmp_path: Path) -> None:
    root = make_v3(tmp_path / "a")
    (root / "meta/episodes/chunk-001").mkdir()
    shutil.copy(root / "meta/episodes/chunk-000/file-000.parquet", root / "meta/episodes/chunk-001/file-000.parquet")
    refused(root, r"meta/episodes/chunk-000/file-000\.parquet and .*chunk-001/file-000\.parquet both list episode 0")


def test_a_task_number_that_stands_for_two_texts_is_refused(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    with (root / "meta/tasks.jsonl").open("a") as file:
        file.write('{"task_index": 1, "task": "another"}\n')
    refused(root, r"tasks\.jsonl: task_index 1 stands for 'task 1' and for 'another'")
