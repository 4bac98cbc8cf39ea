from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vlaft.data.episode import Frames
from vlaft.data.readers.lerobot.video import VideoFrames, match_rows
from vlaft.errors import DataError

FPS = 10


def write_video(
    path: Path,
    frames: int,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    size: int = 64,
    options: dict[str, str] | None = None,
    fps: int = FPS,
    skip: tuple[int, ...] = (),
    noise: bool = False,
) -> Path:
    """A video whose frame i has the grey level 10 + 4 i, so that every frame tells its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width = stream.height = size
        stream.pix_fmt = pix_fmt
        stream.options = options or {}
        stream.bit_rate = 4_000_000
        for index in range(frames):
            if index in skip:
                continue
            pixels = np.full((size, size, 3), 10 + 4 * index, np.uint8)
            if noise:
                pixels[8:] = rng.integers(0, 255, (size - 8, size, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def frames_of(path: Path, rows: int, **options: object) -> VideoFrames:
    return VideoFrames(path, "episode_000000, camera 'cam'", np.arange(rows) / FPS, float(FPS), **options)


def numbers(frames: Frames, indices: list[int] | range) -> list[int]:
    """The frame numbers that the grey levels tell."""
    return [round((float(image[:8].mean()) - 10) / 4) for image in frames.read(indices)]


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "options"),
    [
        ("libx264", "yuv420p", {"g": "250", "bf": "3"}),  # reordered frames, one key frame
        ("libx264", "yuv444p", {"g": "2"}),
        ("libx264", "yuvj420p", {"g": "12"}),  # full range
        ("mpeg4", "yuv420p", {"g": "12"}),
    ],
)
def test_every_frame_in_order(tmp_path: Path, codec: str, pix_fmt: str, options: dict[str, str]) -> None:
    frames = frames_of(write_video(tmp_path / "a.mp4", 40, codec, pix_fmt, options=options), 40)
    assert isinstance(frames, Frames)
    assert len(frames) == 40
    assert numbers(frames, range(40)) == list(range(40))
    assert numbers(frames, [0, 7, 7, 39]) == [0, 7, 7, 39]
    assert numbers(frames, []) == []
    assert frames.warnings == []


def test_full_range_is_not_stretched(tmp_path: Path) -> None:
    for pix_fmt in ("yuvj420p", "yuv420p"):
        frames = frames_of(write_video(tmp_path / f"{pix_fmt}.mp4", 3, pix_fmt=pix_fmt, options={"qp": "1"}), 3)
        levels = [float(image.mean()) for image in frames.read(range(3))]
        np.testing.assert_allclose(levels, [10, 14, 18], atol=1.5)


def test_av1(samples: Path) -> None:
    path = samples / "lerobot/v2.1-internvla_pick_place/videos/chunk-000/video.ego_view/episode_000003.mp4"
    frames = VideoFrames(path, "x", np.arange(12) / 30, 30.0)
    assert len(frames) == 12
    assert next(frames.read([0])).shape == (480, 640, 3)


@pytest.mark.parametrize("options", [{"g": "250", "bf": "3"}, {"g": "2"}, {"g": "7", "bf": "2"}])
def test_several_episodes_in_one_file(tmp_path: Path, options: dict[str, str]) -> None:
    path = write_video(tmp_path / "a.mp4", 55, options=options)
    lengths, start = [12, 20, 23], 0
    for length in lengths:
        frames = frames_of(path, length, start=start / FPS + 1e-9, stop=(start + length) / FPS - 1e-9)
        assert len(frames) == length
        assert numbers(frames, range(length)) == list(range(start, start + length))
        open_end = frames_of(path, length, start=start / FPS)
        assert numbers(open_end, [length - 1]) == [start + length - 1]
        assert frames.warnings == []
        start += length


def test_one_frame_more_is_matched_by_time(tmp_path: Path) -> None:
    frames = frames_of(write_video(tmp_path / "a.mp4", 21), 20)
    assert len(frames) == 20
    assert numbers(frames, range(20)) == list(range(20))
    assert len(frames.warnings) == 1
    assert "21 frames for 20 rows" in frames.warnings[0]
    assert "at most" in frames.warnings[0]


def test_rows_that_start_late_keep_their_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 21)
    late = VideoFrames(path, "x", np.arange(20) / FPS + 0.1, float(FPS))  # the first frame has no row
    assert numbers(late, range(20)) == list(range(1, 21))
    same_count = VideoFrames(path, "x", np.arange(21) / FPS + 0.05, float(FPS))  # GR00T: by index, whatever the time
    assert numbers(same_count, range(21)) == list(range(21))
    assert same_count.warnings == []


def test_wall_clock_times_are_ignored_where_counts_agree(tmp_path: Path) -> None:
    times = np.arange(20) / FPS + np.linspace(0, 1.36, 20)
    frames = VideoFrames(write_video(tmp_path / "a.mp4", 20), "x", times, float(FPS))
    assert numbers(frames, range(20)) == list(range(20))


def test_a_dropped_frame_in_the_middle(tmp_path: Path) -> None:
    frames = frames_of(write_video(tmp_path / "a.mp4", 20, skip=(9,)), 20)
    found = numbers(frames, range(20))
    assert found[:9] == list(range(9))
    assert found[10:] == list(range(10, 20))
    assert found[9] in (8, 10)
    assert "at most 0.1 s away" in frames.warnings[0]


def test_missing_last_frames(tmp_path: Path) -> None:
    one = frames_of(write_video(tmp_path / "a.mp4", 19), 20)
    assert numbers(one, range(20)) == [*range(19), 18]
    assert "19 frames for 20 rows" in one.warnings[0]
    with pytest.raises(DataError, match=r"15 frames for 20 rows, and 4 steps from step 16 on have no frame"):
        len(frames_of(write_video(tmp_path / "b.mp4", 15), 20))


def test_a_rate_unlike_the_rows(tmp_path: Path) -> None:
    frames = frames_of(write_video(tmp_path / "a.mp4", 40, fps=20), 20)
    assert numbers(frames, range(20)) == list(range(0, 40, 2))


@pytest.mark.parametrize("rate", [18, 22])
def test_times_of_another_clock_and_one_more_frame(tmp_path: Path, rate: int) -> None:
    path = write_video(tmp_path / "a.mp4", 60, fps=20)
    frames = VideoFrames(path, "x", np.arange(59) / rate, float(rate))
    assert numbers(frames, range(59)) == list(range(59))
    assert "60 frames for 59 rows" in frames.warnings[0]


def test_a_stop_that_names_the_last_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 30)
    for start in (0, 12, 20):
        frames = frames_of(path, 10, start=start / FPS, stop=(start + 9) / FPS)
        assert numbers(frames, range(10)) == list(range(start, start + 10))
        assert frames.warnings == []


def test_empty_missing_and_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video\n" * 100)
    (tmp_path / "folder.mp4").mkdir()
    for name in ("empty.mp4", "text.mp4", "folder.mp4", "absent.mp4"):
        with pytest.raises(DataError, match=rf"{name}: episode_000000, camera 'cam': the video"):
            len(frames_of(tmp_path / name, 5))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("options", [{}, {"movflags": "faststart"}])
def test_truncated(tmp_path: Path, share: float, options: dict[str, str]) -> None:
    path = write_video(tmp_path / "a.mp4", 30, noise=True)
    if options:  # the index in front: the file opens, and frames are missing at its end
        with av.open(str(path)) as source, av.open(str(tmp_path / "b.mp4"), "w", options=options) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(source.streams.video[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
        path = tmp_path / "b.mp4"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    frames = frames_of(path, 30)
    with pytest.raises(DataError, match="episode_000000"):
        list(frames.read(range(len(frames))))


def test_flipped_bits_end_in_a_sentence_or_in_frames(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    refused = 0
    for codec in ("libx264", "mpeg4"):
        data = write_video(tmp_path / "a.mp4", 30, codec, noise=True, options={"g": "5"}).read_bytes()
        for trial in range(40):
            damaged = np.frombuffer(data, np.uint8).copy()
            span = slice(len(damaged) - 2000, None) if trial % 2 else slice(None)  # the index, or anywhere
            where = rng.integers(0, len(damaged[span]), 20)
            damaged[span][where] ^= (1 << rng.integers(0, 8, 20)).astype(np.uint8)
            path = tmp_path / "b.mp4"
            path.write_bytes(damaged.tobytes())
            frames = frames_of(path, 30)
            try:
                images = list(frames.read(range(len(frames))))
                assert len(images) == 30
            except DataError as error:
                refused += 1
                assert "episode_000000" in str(error)
                assert "\n" not in str(error)
    assert refused > 20


def test_depth_and_sound_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "depth.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=FPS)
        stream.width = stream.height = 64
        stream.pix_fmt = "gray12le"
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64), np.uint16), format="gray12le")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DataError, match="depth camera"):
        len(frames_of(path, 1))
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        track = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 8000
        container.mux(track.encode(silence))
        container.mux(track.encode())
    with pytest.raises(DataError, match="no video stream"):
        len(frames_of(sound, 1))


def test_reading_stops_decoding_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlaft.data.readers.lerobot import video

    frames = frames_of(write_video(tmp_path / "a.mp4", 40), 40)
    decoded = []
    original = video._decode

    def counting(*args: object) -> object:
        for item in original(*args):
            decoded.append(item[0])
            yield item

    monkeypatch.setattr(video, "_decode", counting)
    assert numbers(frames, [0, 3]) == [0, 3]
    assert len(decoded) == 4


def grid(count: int, rate: float, start: float = 0.0) -> NDArray[np.float64]:
    return start + np.arange(count) / rate


@pytest.mark.parametrize("rate", [16.0, 18.0, 19.5, 21.0, 22.0, 25.0])
@pytest.mark.parametrize("start", [0.0, 1.7e9])
@pytest.mark.parametrize("frames", [220, 219])
def test_times_of_another_clock_move_no_row(rate: float, start: float, frames: int) -> None:
    found, told = match_rows(grid(frames - 1, rate, start), grid(frames, 20))
    np.testing.assert_array_equal(found, np.arange(frames - 1))
    assert f"{frames} frames for {frames - 1} rows" in told and "by the rows' numbers" in told
    found, _ = match_rows(grid(frames, rate, start), grid(frames - 1, 20))
    np.testing.assert_array_equal(found, [*range(frames - 1), frames - 2])


def test_half_a_frame_moves_no_row() -> None:
    for start in (-0.025, 0.024, 0.025):
        np.testing.assert_array_equal(match_rows(grid(50, 20, start), grid(51, 20))[0], np.arange(50))


def test_a_lost_row_and_a_late_start_are_seen_in_the_times() -> None:
    times = np.delete(grid(50, 20), 17)
    np.testing.assert_array_equal(match_rows(times, grid(50, 20))[0], np.delete(np.arange(50), 17))
    np.testing.assert_array_equal(match_rows(grid(50, 20, 0.05), grid(51, 20))[0], np.arange(1, 51))


def test_jitter_is_no_other_clock() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        times = grid(50, 20, 0.05) + rng.normal(0, 0.005, 50)
        np.testing.assert_array_equal(match_rows(times, grid(51, 20))[0], np.arange(1, 51))


def test_a_video_of_another_rate_is_matched_by_time() -> None:
    np.testing.assert_array_equal(match_rows(grid(50, 10), grid(100, 20))[0], np.arange(0, 100, 2))
    found, told = match_rows(grid(180, 18), grid(200, 20))
    np.testing.assert_array_equal(found, np.rint(np.arange(180) * 20 / 18))
    assert "by time, at most 0.0222 s away" in told and "up to 20 frames from their numbers" in told


def test_what_cannot_be_told_is_refused() -> None:
    for rows, frames in ((180, 170), (180, 190), (180, 100), (100, 180)):
        with pytest.raises(DataError, match=f"{frames} frames for {rows} rows"):
            match_rows(grid(rows, 22), grid(frames, 20))


@settings(max_examples=500, deadline=None)
@given(
    rows=st.integers(1, 300),
    surplus=st.integers(-6, 6) | st.integers(-300, 300),
    row_rate=st.floats(1, 120),
    rate_ratio=st.just(1.0) | st.floats(0.5, 2) | st.sampled_from([0.5, 2.0, 0.9, 1.1, 1 / 3]),
    offset=st.just(0.0) | st.floats(-2, 2) | st.floats(0, 2e9),
    jitter=st.just(0.0) | st.floats(0, 1.5),
    dropped=st.floats(0, 0.3),
    seed=st.integers(0, 2**31),
)
def test_no_row_moves_by_more_than_the_counts_differ(
    rows: int,
    surplus: int,
    row_rate: float,
    rate_ratio: float,
    offset: float,
    jitter: float,
    dropped: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    count = max(rows + surplus, 1)
    times = np.sort(grid(rows, row_rate) + jitter / row_rate * rng.random(rows)) + offset
    # frames lost at random places, while time passes
    numbers = np.flatnonzero(rng.random(3 * count + 20) >= dropped)[:count]
    frames = numbers / (row_rate * rate_ratio)
    count = len(frames)
    try:
        found, _ = match_rows(times, frames)
    except DataError as error:
        assert abs(count - rows) > 1, error  # one more or less never costs an episode
        return
    assert found.shape == (rows,)
    assert found.min() >= 0 and found.max() < count
    assert (np.diff(found) >= 0).all()
    assert np.abs(found - np.arange(rows)).max() <= abs(count - rows)
