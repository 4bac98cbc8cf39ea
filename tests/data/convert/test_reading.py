"""What a conversion reads of a source, and what it does not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import h5py
import pytest

from vlaft.data.convert.plan import PlannedEpisode, plan_shards
from vlaft.data.convert.run import ConvertRequest, SourceRequest, convert
from vlaft.data.readers.hdf5 import episode as hdf5_episode
from vlaft.data.readers.opening import open_reader
from vlaft.data.readers.reader import EpisodeRef
from vlaft.data.store import ConvertedDataset
from vlaft.errors import DataError


def request(path: Path, base: str, out: Path, layout: dict[str, Any] | None = None, **changes: Any) -> ConvertRequest:
    source = SourceRequest(path=path, layout={"instruction": "open it", **(layout or {})})
    return ConvertRequest(sources=[source], base=base, out=out, workers=1, **changes)


def test_only_the_cameras_of_the_layout_are_decoded(
    demos: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    decode = hdf5_episode.decode_image

    def counting(data: bytes, where: str, **options: Any) -> Any:
        decoded.append(where)
        return decode(data, where, **options)

    monkeypatch.setattr(hdf5_episode, "decode_image", counting)
    convert(request(demos, base, tmp_path / "both"))
    assert len(decoded) == 120 and sum("wrist" in where for where in decoded) == 60
    decoded.clear()
    convert(request(demos, base, tmp_path / "one", {"cameras": {"primary": "observations/images/cam_high"}}))
    assert len(decoded) == 60 and not any("wrist" in where for where in decoded)
    assert ConvertedDataset(tmp_path / "one").cameras == ("image",)
    decoded.clear()
    convert(request(demos, base, tmp_path / "none"), dry_run=True)
    assert decoded == []


def test_folders_train_and_val_are_splits_in_every_hdf5_dialect(samples: Path, demos: Path, tmp_path: Path) -> None:
    (demos / "train").mkdir()
    (demos / "val").mkdir()
    for number in range(10):
        (demos / f"episode_{number}.hdf5").rename(demos / ("val" if number < 3 else "train") / f"episode_{number}.hdf5")
    assert [ref.split for ref in open_reader(demos).episodes()] == ["train"] * 7 + ["valid"] * 3
    mapped = open_reader(
        demos, {"episodes": "file", "action": "action", "cameras": {"a": "observations/images/cam_high"}}
    )
    assert [ref.split for ref in mapped.episodes()] == ["train"] * 7 + ["valid"] * 3
    for folder in ("train", "val"):
        (tmp_path / "robomimic" / folder).mkdir(parents=True)
        target = tmp_path / "robomimic" / folder / "demo.hdf5"
        shutil.copy(samples / "hdf5/robomimic_image.hdf5", target)
        target.chmod(0o644)
        with h5py.File(target, "r+") as file:
            del file["mask"]
    refs = open_reader(tmp_path / "robomimic").episodes()
    assert [ref.split for ref in refs] == ["train"] * 8 + ["valid"] * 8
    assert len({ref.name for ref in refs}) == 16


def test_the_folders_decide_what_is_held_out(demos: Path, base: str, tmp_path: Path) -> None:
    (demos / "val").mkdir()
    for number in (2, 5):
        (demos / f"episode_{number}.hdf5").rename(demos / f"val/episode_{number}.hdf5")
    done = convert(request(demos, base, tmp_path / "out"))
    assert done.episodes == {"train": 8, "val": 2}
    held_out = ConvertedDataset(tmp_path / "out").table("val")["source"].to_pylist()
    assert set(held_out) == {"val/episode_2.hdf5", "val/episode_5.hdf5"}


def test_a_hub_id_is_fetched_once_and_its_copy_converted(
    samples: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[str] = []

    def fetch(repo_id: str, **options: Any) -> str:
        asked.append(repo_id)
        assert options["repo_type"] == "dataset" and "meta/*.pkl" not in options["allow_patterns"]
        return str(samples / "lerobot/v2.1-pusht_image")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    done = convert(request(Path("somebody/pusht"), base, tmp_path / "out"))
    assert asked == ["somebody/pusht"] and sum(done.rows.values()) == 161
    assert ConvertedDataset(tmp_path / "out").info["sources"][0]["path"] == "somebody/pusht"


def test_a_demonstration_that_is_too_short_is_told_or_skipped(demos: Path, base: str, tmp_path: Path) -> None:
    with h5py.File(demos / "episode_4.hdf5", "r+") as file:
        for name in (
            "action",
            "observations/qpos",
            "observations/images/cam_high",
            "observations/images/cam_left_wrist",
        ):
            values = file[name][:1]
            del file[name]
            file[name] = values
    assert sum(convert(request(demos, base, tmp_path / "whole")).rows.values()) == 9 * 6 + 1
    with pytest.raises(DataError, match=r"'episode_4.hdf5' has no steps left after 'drop_first' \(it had 1\)"):
        convert(request(demos, base, tmp_path / "out", {"steps": ["drop_first"]}))
    done = convert(request(demos, base, tmp_path / "out", {"steps": ["drop_first"]}, on_error="skip"))
    assert [entry.episode for entry in done.skipped] == ["episode_4.hdf5"] and sum(done.rows.values()) == 9 * 5


def test_shards_depend_on_the_data_alone() -> None:
    """About 64 of them, of at least 100 rows; whole episodes, each once."""

    def planned(episodes: int, rows: int) -> list[list[int]]:
        refs = [EpisodeRef(number, str(number), None, ()) for number in range(episodes)]
        plans = plan_shards([PlannedEpisode(0, ref, ref.index, "train", rows, (0.0, 0.0)) for ref in refs])
        assert [episode.index for plan in plans for episode in plan.episodes] == list(range(episodes))
        return [[episode.rows for episode in plan.episodes] for plan in plans]

    assert planned(10, 60) == [[60, 60]] * 5
    assert len(planned(150, 200)) == 50 and len(planned(3, 500)) == 3
    assert {sum(shard) for shard in planned(60_000, 40)[:-1]} == {4000}
