from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image as PillowImage

from vlaft.data.codec import decode_image
from vlaft.data.convert import shards as convert_shards
from vlaft.data.convert.plan import plan_shards, split_episodes
from vlaft.data.convert.run import ConvertRequest, SourceRequest, convert
from vlaft.data.readers.reader import EpisodeRef
from vlaft.data.store import ConvertedDataset
from vlaft.errors import ConfigError, DataError, VlaftError
from vlaft.files import locked


def request(demos: Path, base: str, out: Path, **changes: Any) -> ConvertRequest:
    source = SourceRequest(path=demos, layout={"instruction": "open it"}, name="toy")
    settings: dict[str, Any] = {"workers": 1, "shard_rows": 12, "val_fraction": 0.2} | changes
    return ConvertRequest(sources=[source], base=base, out=out, **settings)


def spoil_action(demos: Path, number: int) -> None:
    with h5py.File(demos / f"episode_{number}.hdf5", "r+") as file:
        file["action"][2, 3] = np.nan


def spoil_frame(demos: Path, number: int) -> None:
    with h5py.File(demos / f"episode_{number}.hdf5", "r+") as file:
        file["observations/images/cam_high"][4, 100:] = 0


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_is_written(demos: Path, base: str, tmp_path: Path) -> None:
    phases: list[tuple[str, int, int]] = []
    done = convert(request(demos, base, tmp_path / "out"), progress=lambda *event: phases.append(event))
    assert done.rows == {"train": 48, "val": 12} and done.episodes == {"train": 8, "val": 2}
    assert done.shards == 5 and done.reused == 0 and done.skipped == ()
    assert phases[0] == ("reading actions", 0, 10) and phases[-1] == ("writing examples", 60, 60)
    dataset = ConvertedDataset(tmp_path / "out")
    dataset.verify()
    assert dataset.cameras == ("image", "image_cam_left_wrist")
    assert dataset.statistics["toy"]["num_trajectories"] == 10
    row = dataset.row("train", 0)
    assert row["prompt_token_ids"][0] == 1 and len(row["action_token_ids"]) == 14 and len(row["state"]) == 14
    assert (row["dataset"], row["instruction"], row["frame_index"]) == ("toy", "open it", 0)
    image = decode_image(row["image"]["bytes"], "x")
    assert image.shape == (32, 32, 3)
    assert abs(int(image.mean()) - 20 * row["episode_index"]) <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "demos", "out"]


def test_processes_write_the_same_bytes(demos: Path, base: str, tmp_path: Path) -> None:
    convert(request(demos, base, tmp_path / "one"))
    convert(request(demos, base, tmp_path / "two", workers=2))
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_killed_and_run_again_is_as_if_undisturbed(demos: Path, base: str, tmp_path: Path) -> None:
    """SIGKILL once two shards are finished; the frames are slowed down so that there is something left to do."""
    out = tmp_path / "out"
    script = f"""
import time
from pathlib import Path
from vlaft.data.convert import shards as convert_shards
from vlaft.data.convert.run import ConvertRequest, SourceRequest, convert
encode = convert_shards.encode_image
def slowly(*arguments):
    time.sleep(0.01)
    return encode(*arguments)
convert_shards.encode_image = slowly
source = SourceRequest(path=Path({str(demos)!r}), layout={{"instruction": "open it"}}, name="toy")
out = Path({str(out)!r})
convert(ConvertRequest(sources=[source], base={base!r}, out=out, workers=1, shard_rows=12, val_fraction=0.2))
"""
    staging = tmp_path / "out.partial"
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 300  # a busy machine takes long to start workers
    while len(list(staging.glob(".conversion/*.parquet.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    before = {path.name: path.stat().st_mtime_ns for path in staging.glob("*.parquet")}
    done = convert(request(demos, base, out))
    assert 2 <= done.reused < 5
    kept = [name for name, stamp in before.items() if (out / name).stat().st_mtime_ns == stamp]
    assert len(kept) == done.reused
    convert(request(demos, base, tmp_path / "undisturbed"))
    assert content(out) == content(tmp_path / "undisturbed")


def test_another_request_starts_over(demos: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 30)
    with pytest.raises(KeyboardInterrupt):
        convert(request(demos, base, tmp_path / "out"))
    monkeypatch.undo()
    assert list((tmp_path / "out.partial").glob("*.parquet"))
    assert convert(request(demos, base, tmp_path / "out", codec="png")).reused == 0
    assert ConvertedDataset(tmp_path / "out").info["image"]["codec"] == "png"


def stop_after(
    monkeypatch: pytest.MonkeyPatch, frames: int, error: type[BaseException] | OSError = KeyboardInterrupt
) -> None:
    """Let the conversion break after so many encoded frames."""
    encode, count = convert_shards.encode_image, 0

    def counting(*arguments: Any) -> bytes:
        nonlocal count
        count += 1
        if count > frames:
            raise error
        return encode(*arguments)

    monkeypatch.setattr(convert_shards, "encode_image", counting)


def test_a_full_disk_is_one_sentence_and_keeps_what_is_done(
    demos: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 30, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(DataError, match="the disk is full while writing"):
        convert(request(demos, base, tmp_path / "out"))
    monkeypatch.undo()
    assert convert(request(demos, base, tmp_path / "out")).reused == 1


def test_an_output_that_is_there_is_refused_and_replaced_only_at_the_end(
    demos: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    convert(request(demos, base, out, limit=3))
    old = content(out)
    with pytest.raises(VlaftError, match="is not empty"):
        convert(request(demos, base, out))
    stop_after(monkeypatch, 30)
    with pytest.raises(KeyboardInterrupt):
        convert(request(demos, base, out, overwrite=True))
    monkeypatch.undo()
    assert content(out) == old
    convert(request(demos, base, out, overwrite=True))
    assert ConvertedDataset(out).rows("train") == 48
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "demos", "out"]


def test_only_a_converted_dataset_is_overwritten(demos: Path, base: str, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="it is not overwritten"):
        convert(request(demos, base, tmp_path / "home", overwrite=True))
    for out in (demos / "out", tmp_path):
        with pytest.raises(DataError, match=r"within each other|not overwritten"):
            convert(request(demos, base, out, overwrite=True))


def test_an_output_in_use_is_refused(demos: Path, base: str, tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(VlaftError, match=r"out: process .* is writing there"):
        convert(request(demos, base, tmp_path / "out"))
    assert not (tmp_path / "out.partial").exists()
    assert convert(request(demos, base, tmp_path / "out")).rows["train"] == 48


def test_a_folder_of_the_users_is_not_taken_for_an_unfinished_conversion(
    demos: Path, base: str, tmp_path: Path
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="holds something that is no unfinished conversion"):
        convert(request(demos, base, tmp_path / "out"))
    assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "years of work"


def test_actions_that_are_not_numbers(demos: Path, base: str, tmp_path: Path) -> None:
    spoil_action(demos, 4)
    with pytest.raises(DataError, match=r"episode_4.*step 2: the action is not finite"):
        convert(request(demos, base, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    done = convert(request(demos, base, tmp_path / "out", on_error="skip"))
    assert [(entry.dataset, entry.episode) for entry in done.skipped] == [("toy", "episode_4.hdf5")]
    assert sum(done.rows.values()) == 54 and done.statistics["toy"]["num_trajectories"] == 9
    listed = json.loads((tmp_path / "out/dataset.json").read_text())["skipped"]
    assert "not finite" in listed[0]["why"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_frame(demos: Path, base: str, tmp_path: Path, workers: int) -> None:
    spoil_frame(demos, 7)
    with pytest.raises(DataError, match=r"episode_7.*4") as caught:
        convert(request(demos, base, tmp_path / "out", workers=workers))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    done = convert(request(demos, base, tmp_path / "out", workers=workers, on_error="skip"))
    assert [entry.episode for entry in done.skipped] == ["episode_7.hdf5"]
    assert sum(done.rows.values()) == 54 and sum(done.episodes.values()) == 9
    assert 7 not in ConvertedDataset(tmp_path / "out").table("train")["episode_index"].to_pylist()
    assert done.statistics["toy"]["num_trajectories"] == 9
    assert any("computed anew without them" in warning for warning in done.warnings)
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.parquet")}
    # as if the episode had never been there (but for the held-out draw, which knows it by its number either way)
    assert sum(pq.read_metadata(tmp_path / "out" / name).num_rows for name in written) == 54
    with h5py.File(demos / "episode_7.hdf5", "r+") as file:
        file["action"][2, 3] = np.nan  # now the first pass finds it
    convert(request(demos, base, tmp_path / "early", on_error="skip"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "early").glob("*.parquet")} == written


def test_dry_run_writes_nothing(demos: Path, base: str, tmp_path: Path) -> None:
    done = convert(request(demos, base, tmp_path / "out"), dry_run=True)
    assert done.rows == {"train": 48, "val": 12} and done.bytes == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "demos"]


def test_two_sources_keep_their_statistics_and_weights(demos: Path, base: str, tmp_path: Path) -> None:
    whole = request(demos, base, tmp_path / "out", limit=4)
    first = whole.sources[0]
    with pytest.raises(DataError, match="two sources are called 'toy'"):
        convert(replace(whole, sources=[first, first]))
    convert(replace(whole, sources=[first, replace(first, name="other", weight=0.5)]))
    dataset = ConvertedDataset(tmp_path / "out")
    assert [(entry["name"], entry["weight"]) for entry in dataset.info["sources"]] == [("toy", 1.0), ("other", 0.5)]
    assert set(dataset.statistics) == {"toy", "other"}
    table = dataset.table("train")
    episodes = set(zip(table["dataset"].to_pylist(), table["episode_index"].to_pylist(), strict=True))
    assert len(episodes) == len({index for _, index in episodes}) == 6


def test_what_is_missing_is_told(demos: Path, base: str, tmp_path: Path) -> None:
    plain = request(demos, base, tmp_path / "out")
    with pytest.raises(DataError, match=r"none of the 10 episodes says .* such as instruction='open the drawer'"):
        convert(replace(plain, sources=[SourceRequest(path=demos)]))
    with pytest.raises(ConfigError, match="did you mean 'instruction'"):
        convert(replace(plain, sources=[SourceRequest(path=demos, layout={"instuction": "x"})]))
    with pytest.raises(ConfigError) as caught:
        convert(replace(plain, val_fraction=2, image_size=1, limit=0))
    assert len(caught.value.problems) == 3
    for number in range(10):
        spoil_action(demos, number)
    with pytest.raises(DataError, match="has no usable episode; the first: "):
        convert(replace(plain, on_error="skip"))


def refs(count: int, splits: dict[int, str] | None = None) -> list[EpisodeRef]:
    return [EpisodeRef(index, f"demo_{index}", (splits or {}).get(index), ()) for index in range(count)]


def test_splits() -> None:
    assert split_episodes(refs(4, {1: "valid", 3: "test"}), "d", 0.5, 0) == ["train", "val", "train", "val"]
    drawn = split_episodes(refs(40), "d", 0.1, 0)
    assert drawn.count("val") == 4 and drawn != split_episodes(refs(40), "d", 0.1, 1)
    assert split_episodes(refs(1), "d", 0.1, 0) == ["train"]
    assert split_episodes(refs(2), "d", 0.01, 0).count("val") == 1
    assert split_episodes(refs(9), "d", 0.0, 0).count("val") == 0
    assert plan_shards([], 10) == []


def test_golden_bridge(samples: Path, golden_folder: Path, tiny: Path, tmp_path: Path) -> None:
    source = SourceRequest(path=samples / "rlds/bridge_dataset", preset="bridge")
    checkpoint = str(tiny / "checkpoint")
    done = convert(ConvertRequest(sources=[source], base=checkpoint, out=tmp_path / "out", workers=1))
    assert done.rows == {"train": 200, "val": 200} and done.episodes == {"train": 25, "val": 25}
    dataset = ConvertedDataset(tmp_path / "out")
    golden = json.loads((golden_folder / "bridge/dataset_statistics.json").read_text())
    statistics = dataset.statistics["bridge_dataset"]
    assert set(dataset.statistics) == {"bridge_dataset"} and list(statistics) == list(golden)
    for name, values in golden["action"].items():
        np.testing.assert_allclose(statistics["action"][name], values, atol=1e-6, rtol=0)
        assert len(statistics["action"][name]) == len(values) == 7
    # upstream's fine-tuning loads no state and writes zeros; ours are the state's own, in the same layout
    assert [(name, len(values)) for name, values in statistics["proprio"].items()] == [
        (name, len(values)) for name, values in golden["proprio"].items()
    ]
    assert list(statistics["action"]) == list(golden["action"])
    assert statistics["action"]["mask"] == golden["action"]["mask"]
    assert (statistics["num_transitions"], statistics["num_trajectories"]) == (400, 50)
    assert (golden["num_transitions"], golden["num_trajectories"]) == (400, 50)
    state = statistics["proprio"]
    assert min(state["std"]) >= 0 and max(state["std"]) > 0.01
    examples = [json.loads(line) for line in (golden_folder / "bridge/examples.jsonl").read_text().splitlines()]
    rows = dataset.table("train").to_pylist()
    assert Counter(
        (row["instruction"], *row["prompt_token_ids"], *row["action_token_ids"], 2, -1, *row["action_token_ids"])
        for row in rows
    ) == Counter((row["instruction"], *row["input_ids"], -1, *row["action_token_ids"]) for row in examples)
    # the first frame of each trajectory, found by its actions
    by_actions = {tuple(row["action_token_ids"]): index for index, row in enumerate(rows) if row["frame_index"] == 0}
    first = {row["trajectory"]: tuple(row["action_token_ids"]) for row in examples if row["step"] == 0}
    differences = []
    for trajectory, actions in first.items():
        row = dataset.row("train", by_actions[actions])
        ours = decode_image(row["image"]["bytes"], "x", accurate_dct=True).astype(int)
        shown = golden_folder / f"bridge/frames224/{trajectory:02d}.png"
        if not shown.is_file():  # not of all trajectories
            continue
        frame = PillowImage.open(shown).convert("RGB")
        differences.append(np.abs(ours - np.asarray(frame)).mean())
    assert len(differences) == 8 and np.mean(differences) < 1.5  # 0.23 before the JPEG of the store, 0.84 with it
