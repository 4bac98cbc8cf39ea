"""Conversion in parts: the same bytes whoever wrote them, however often, and whatever was damaged or killed."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlaft.checksums import checksum, files_hash, sealed
from vlaft.data.convert import mending, planning, reading, run
from vlaft.data.convert import shards as convert_shards
from vlaft.data.convert.plan_folder import read_plan
from vlaft.data.convert.reading import Reading, keeping, kept_readings, merge_told
from vlaft.data.convert.run import ConvertRequest, SourceRequest, convert, convert_part, finish, make_plan
from vlaft.data.convert.shards import convert_shard
from vlaft.data.convert.staging import STATE, finished_shard
from vlaft.data.readers.reader import EpisodeRef
from vlaft.data.sentences import FIRST_SUCH_EPISODE
from vlaft.data.store import ConvertedDataset
from vlaft.errors import ConfigError, DataError, InUse, VlaftError
from vlaft.files import locked


def request(demos: Path, base: str, out: Path, **changes: Any) -> ConvertRequest:
    source = SourceRequest(path=demos, layout={"instruction": "open it"}, name="toy")
    settings: dict[str, Any] = {"workers": 1, "shard_rows": 12, "val_fraction": 0.2} | changes
    return ConvertRequest(sources=[source], base=base, out=out, **settings)


def spoil_frame(demos: Path, number: int) -> None:
    with h5py.File(demos / f"episode_{number}.hdf5", "r+") as file:
        file["observations/images/cam_high"][4, 100:] = 0


def spoil_action(demos: Path, number: int) -> None:
    with h5py.File(demos / f"episode_{number}.hdf5", "r+") as file:
        file["action"][2, 3] = np.nan


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def parquet(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every frame that is encoded."""
    frames: list[int] = []
    encode = convert_shards.encode_image

    def counting(*arguments: Any) -> bytes:
        frames.append(1)
        return encode(*arguments)

    monkeypatch.setattr(convert_shards, "encode_image", counting)
    return frames


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_of_any_count_give_the_same_bytes(
    demos: Path, base: str, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typed as a relative path, and carried on from another folder; seven parts are more than there are shards."""
    monkeypatch.chdir(tmp_path)
    whole = convert(request(Path("demos"), base, Path("whole")))
    planned = make_plan(request(Path("demos"), base, Path("out")), Path("plan"))
    assert planned.rows == whole.rows and planned.shards == whole.shards == 5 and planned.bytes == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    parts = [convert_part(tmp_path / "plan", number, count, workers=1) for number in range(count, 0, -1)]
    assert sum(part.shards for part in parts) == 5 and sum(part.rows for part in parts) == 60
    done = finish(tmp_path / "plan", workers=1)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert replace(done, out=whole.out, statistics=dict(whole.statistics), sources=whole.sources) == whole
    assert json.loads(json.dumps(done.sources)) == json.loads(json.dumps(whole.sources))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "demos", "elsewhere", "out", "plan", "whole"]


def test_a_part_is_done_once_and_missing_ones_are_named(
    demos: Path, base: str, tmp_path: Path, encoded: list[int]
) -> None:
    make_plan(request(demos, base, tmp_path / "out"), tmp_path / "plan")
    with pytest.raises(DataError, match="no part was converted yet"):
        finish(tmp_path / "plan")
    first = convert_part(tmp_path / "plan", 1, 3, workers=1)
    assert (first.shards, first.reused, first.rows) == (2, 0, 24) and len(encoded) == 48
    assert replace(first, reused=2) == convert_part(tmp_path / "plan", 1, 3, workers=1) and len(encoded) == 48
    with pytest.raises(DataError, match=r"the parts 2/3, 3/3 are missing \(3 of 5 files\)"):
        finish(tmp_path / "plan")
    convert_part(tmp_path / "plan", 2, 3, workers=1)
    with pytest.raises(DataError, match=r"part 3/3 is missing \(1 of 5 files\); .*--part 3/3, then finish again"):
        finish(tmp_path / "plan")
    assert convert_part(tmp_path / "plan", 1, 1, workers=1).reused == 4 and len(encoded) == 120
    torn = tmp_path / "out.partial/train-00001-of-00004.parquet"
    torn.write_bytes(torn.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"part 2/3 is missing \(1 of 5 files\)"):
        finish(tmp_path / "plan")
    assert convert_part(tmp_path / "plan", 2, 3, workers=1).reused == 1
    finish(tmp_path / "plan")
    ConvertedDataset(tmp_path / "out").verify()
    for again in (lambda: finish(tmp_path / "plan"), lambda: convert_part(tmp_path / "plan", 1, 3)):
        with pytest.raises(DataError, match=r"out.partial is not there: .*plan was finished"):
            again()


def test_a_plan_is_made_once_and_never_replaced(demos: Path, base: str, tmp_path: Path) -> None:
    asked = request(demos, base, tmp_path / "out")
    first = make_plan(asked, tmp_path / "plan")
    before = content(tmp_path / "plan")
    convert_part(tmp_path / "plan", 1, 2, workers=1)
    assert make_plan(asked, tmp_path / "plan").rows == first.rows
    assert content(tmp_path / "plan") == before and convert_part(tmp_path / "plan", 1, 2, workers=1).reused == 3
    with pytest.raises(DataError, match="holds the plan of another conversion"):
        make_plan(replace(asked, seed=1), tmp_path / "plan")
    assert content(tmp_path / "plan") == before
    for place in (tmp_path / "out/plan", demos / "plan", tmp_path / "out.partial", tmp_path):
        with pytest.raises(DataError, match="lie within each other"):
            make_plan(asked, place)
    # what a plan has begun, the plain command goes on with, and the other way round
    assert convert(asked).reused == 3


@pytest.mark.parametrize("number", [0, 4, 7])
def test_damaged_frames_cost_no_frame_twice_and_no_trace(
    demos: Path, base: str, tmp_path: Path, encoded: list[int], number: int
) -> None:
    """As if the damage had been known from the start: statistics, draw, shards, every byte."""
    spoil_frame(demos, number)
    asked = request(demos, base, tmp_path / "plain", on_error="skip")
    whole = convert(asked)
    assert len(encoded) == 2 * 54 + 4  # of the damaged one, the frames before
    assert [entry.episode for entry in whole.skipped] == [f"episode_{number}.hdf5"]
    make_plan(replace(asked, out=tmp_path / "out"), tmp_path / "plan")
    assert sum(convert_part(tmp_path / "plan", n, 2, workers=1).damaged for n in (1, 2)) == 1
    encoded.clear()
    finish(tmp_path / "plan", workers=1)
    assert encoded == [] and content(tmp_path / "out") == content(tmp_path / "plain")
    assert not (tmp_path / "out.partial").exists()
    spoil_action(demos, number)  # now the plan knows
    convert(request(demos, base, tmp_path / "early", on_error="skip"))
    assert parquet(tmp_path / "early") == parquet(tmp_path / "out")
    assert (tmp_path / "early/dataset_statistics.json").read_bytes() == (
        tmp_path / "out/dataset_statistics.json"
    ).read_bytes()


def test_a_part_may_stop_at_damage(demos: Path, base: str, tmp_path: Path) -> None:
    spoil_frame(demos, 0)
    asked = request(demos, base, tmp_path / "out")
    make_plan(asked, tmp_path / "plan")
    with pytest.raises(DataError, match=r"episode_0.*4"):
        convert_part(tmp_path / "plan", 1, 2, workers=1)
    convert_part(tmp_path / "plan", 2, 2, workers=1)
    with pytest.raises(DataError, match="part 1/2 is missing"):
        finish(tmp_path / "plan")
    make_plan(replace(asked, on_error="skip"), tmp_path / "skipping")
    assert convert_part(tmp_path / "skipping", 1, 1, workers=1).reused == 4  # all but the one with the damage
    assert sum(finish(tmp_path / "skipping", workers=1).rows.values()) == 54


def test_what_fits_without_the_damaged_episode_is_taken_in(demos: Path, base: str, tmp_path: Path) -> None:
    """The first has a state of its own size, so the others do not fit it; of these, one is damaged too."""
    with h5py.File(demos / "episode_0.hdf5", "r+") as file:
        del file["observations/qpos"]
        file["observations/qpos"] = np.zeros((6, 7), np.float32)
    spoil_frame(demos, 0)
    spoil_frame(demos, 5)
    asked = request(demos, base, tmp_path / "out", on_error="skip")
    make_plan(asked, tmp_path / "plan")
    assert convert_part(tmp_path / "plan", 1, 1, workers=1).damaged == 1
    done = finish(tmp_path / "plan", workers=1)
    assert [entry.episode for entry in done.skipped] == ["episode_0.hdf5", "episode_5.hdf5"]
    assert sum(done.rows.values()) == 48
    for number in (0, 5):
        spoil_action(demos, number)
    convert(request(demos, base, tmp_path / "early", on_error="skip"))
    assert parquet(tmp_path / "early") == parquet(tmp_path / "out")


def test_cameras_change_places_where_another_is_the_main_one(demos: Path, base: str, tmp_path: Path) -> None:
    """As where the first episode lacks the camera that comes first elsewhere, and turns out damaged."""
    make_plan(request(demos, base, tmp_path / "out"), tmp_path / "plan")
    plan = read_plan(tmp_path / "plan")
    [source] = plan.survey.sources
    turned = replace(plan.survey, sources=(replace(source, cameras=source.cameras[::-1]),))
    shard = plan.shards[0]
    folders = {name: tmp_path / name for name in ("old", "new", "mended")}
    for folder in folders.values():
        folder.mkdir()
    job = run._job(plan, folders["old"], plan.out)
    old = convert_shard(job.begin(), shard)
    new = convert_shard(replace(job, folder=folders["new"], survey=turned).begin(), shard)
    fields = vars(replace(job, folder=folders["mended"], survey=turned))
    mender = mending.MendJob(**fields, staged=folders["old"], before=plan.survey).begin()
    [work] = mending.mended_shards([shard], [shard], {shard.file: old})
    assert mending.mend_shard(mender, work) == new
    assert turned.columns == ("image", "image_cam_high") != plan.survey.columns


def test_ended_while_damage_is_left_out_and_run_again(
    demos: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[int]
) -> None:
    spoil_frame(demos, 7)
    asked = request(demos, base, tmp_path / "out", on_error="skip")
    make_plan(asked, tmp_path / "plan")
    convert_part(tmp_path / "plan", 1, 1, workers=1)
    encoded.clear()
    normalize, calls = mending.normalize, 0

    def ending(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise KeyboardInterrupt
        return normalize(*arguments)

    monkeypatch.setattr(mending, "normalize", ending)
    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path / "plan", workers=1)
    assert not (tmp_path / "out").exists()
    calls = -100
    finish(tmp_path / "plan", workers=1)
    assert calls == -100 + 9 - 4  # the episodes of the shards that were not there
    assert encoded == []
    monkeypatch.undo()
    convert(replace(asked, out=tmp_path / "plain"))
    assert content(tmp_path / "out") == content(tmp_path / "plain")


def change_a_file(demos: Path, plan: Path) -> None:
    with h5py.File(demos / "episode_3.hdf5", "r+") as file:
        file["action"][0, 0] = 1


def another_version(demos: Path, plan: Path) -> None:
    document = json.loads((plan / "plan.json").read_text())
    (plan / "plan.json").write_text(json.dumps(document | {"vlaft": "0.0.7"}))


def edited(demos: Path, plan: Path) -> None:
    document = json.loads((plan / "plan.json").read_text())
    document["surveyed"][0]["statistics"]["action"]["q01"][0] = -9.0
    (plan / "plan.json").write_text(json.dumps(document))


def cut(demos: Path, plan: Path) -> None:
    (plan / "episodes.parquet").write_bytes((plan / "episodes.parquet").read_bytes()[:-9])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_a_file, "its files are not those that .* was made of"),
        (another_version, r"was made by vlaft 0.0.7, this is vlaft .*use that version everywhere"),
        (edited, "plan.json does not match its checksum"),
        (cut, "episodes.parquet does not match its checksum"),
        (lambda demos, plan: (plan / "plan.json").unlink(), "is no plan"),
        (lambda demos, plan: (plan / "plan.json").write_text("[]"), "must hold a JSON object"),
    ],
    ids=["files", "version", "edited", "cut", "no plan", "no document"],
)
def test_a_part_of_something_else_is_refused(
    demos: Path, base: str, tmp_path: Path, change: Callable[[Path, Path], None], told: str
) -> None:
    make_plan(request(demos, base, tmp_path / "out"), tmp_path / "plan")
    change(demos, tmp_path / "plan")
    with pytest.raises(DataError, match=told) as caught:
        convert_part(tmp_path / "plan", 1, 2, workers=1)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out.partial").glob("*.parquet"))


def test_files_below_a_link_are_looked_at(demos: Path, base: str, tmp_path: Path) -> None:
    """As where videos or rows lie on another disk; a link back up ends in itself."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set/data").symlink_to(demos)
    (tmp_path / "set/again").symlink_to(tmp_path / "set")
    before = files_hash(tmp_path / "set")
    assert files_hash(tmp_path / "set") == before
    change_a_file(demos, tmp_path)
    assert files_hash(tmp_path / "set") != before


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_an_episode_that_changed_after_it_was_planned_is_no_damaged_one(
    demos: Path, base: str, tmp_path: Path, on_error: str
) -> None:
    """Its rows would be normalised with the statistics of what was there before."""
    make_plan(request(demos, base, tmp_path / "out", on_error=on_error), tmp_path / "plan")
    file = demos / "episode_3.hdf5"
    times = file.stat()
    change_a_file(demos, tmp_path)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(VlaftError, match=r"toy: episode 'episode_3.hdf5' changed after its actions were read"):
        convert_part(tmp_path / "plan", 1, 1, workers=1)


def test_a_changed_preset_is_refused(demos: Path, base: str, tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("instruction: open it\n")
    source = SourceRequest(path=demos, preset=str(preset), name="toy")
    make_plan(replace(request(demos, base, tmp_path / "out"), sources=[source]), tmp_path / "plan")
    preset.write_text("instruction: open it\nfps: 7\n")
    with pytest.raises(DataError, match="its preset has changed since"):
        convert_part(tmp_path / "plan", 1, 1, workers=1)


def test_who_may_write_at_the_same_time(demos: Path, base: str, tmp_path: Path) -> None:
    """Parts beside each other, shard by shard; nobody else."""
    asked = request(demos, base, tmp_path / "out")
    make_plan(asked, tmp_path / "plan")
    with locked(tmp_path / "out"), pytest.raises(InUse):
        convert_part(tmp_path / "plan", 1, 1, workers=1)
    shard = tmp_path / "out.partial/train-00002-of-00004.parquet"
    with locked(shard):
        other = threading.Thread(target=convert_part, args=(tmp_path / "plan", 1, 1), kwargs={"workers": 1})
        other.start()
        while len(list(shard.parent.glob("*.parquet"))) < 2:
            assert other.is_alive()
        for refused in (lambda: convert(asked), lambda: finish(tmp_path / "plan")):
            with pytest.raises(InUse, match=r"process \d+ on .* is writing there"):
                refused()
        assert not shard.exists()
    other.join()
    assert shard.exists()
    finish(tmp_path / "plan")
    with pytest.raises(ConfigError, match="there is no part 3/2"):
        convert_part(tmp_path / "plan", 3, 2)


def test_processes_read_actions_as_one_does(
    demos: Path, base: str, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second episode on: in their order, with the same warnings, and the first damaged one is told."""
    bridge = SourceRequest(path=samples / "rlds/bridge_dataset", preset="bridge")
    toy = request(demos, base, tmp_path / "out").sources[0]
    serial, parallel = (
        planning.plan_conversion(
            planning.prepare(
                ConvertRequest(sources=[bridge], base=base, out=tmp_path / "out", workers=workers, limit=9)
            ),
            None,
            lambda *event: None,
        )
        for workers in (1, 2)
        if monkeypatch.setattr(reading, "PATIENCE", 0.0) is None
    )
    assert serial == parallel
    for number in (8, 3, 5):
        spoil_action(demos, number)
    with pytest.raises(DataError, match=r"episode_3.*step 2: the action is not finite"):
        convert(replace(request(demos, base, tmp_path / "out", workers=2), sources=[toy]), dry_run=True)


def test_what_readers_said_is_merged_as_if_one_had_read() -> None:
    told = ["at opening"]
    first = f"features.json describes 'a', but episode 'train[3]' holds none of it {FIRST_SUCH_EPISODE}"
    again = f"features.json describes 'a', but episode 'train[9]' holds none of it {FIRST_SUCH_EPISODE}"
    other = f"features.json describes 'b', but episode 'train[9]' holds none of it {FIRST_SUCH_EPISODE}"
    merge_told(told, ["train[3]: odd", first])
    merge_told(told, ["train[9]: odd", again, other, "at opening"])
    assert told == ["at opening", "train[3]: odd", first, "train[9]: odd", other]


def test_readings_are_kept_as_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = Reading(
        action=rng.normal(size=(5, 7)).astype(np.float32),
        state=rng.normal(size=(5, 3)).astype(np.float32),
        opening=rng.normal(size=5),
        cameras=("main", "wrist"),
        texts=("open it", "close it"),
        action_names=("x", "y"),
        fps=5.0,
    )
    written = [
        (0, EpisodeRef(0, "a\udcff", "train", ("a.hdf5", 3)), whole),
        (0, EpisodeRef(4, "b", None, ()), replace(whole, state=None, opening=None, fps=None, action_names=())),
        (1, EpisodeRef(0, "c", "val", (1, 2)), Reading(damage="cut off", silent=True)),
    ] * 50
    with keeping(tmp_path / "readings.parquet") as keep:
        for entry in written:
            keep(*entry)
    found = list(kept_readings(tmp_path / "readings.parquet"))
    assert [(number, ref) for number, ref, _ in found] == [(number, ref) for number, ref, _ in written]
    for (*_, ours), (*_, theirs) in zip(found, written, strict=True):
        for name, value in vars(theirs).items():
            assert np.array_equal(getattr(ours, name), value) if isinstance(value, np.ndarray) else True
            assert isinstance(value, np.ndarray) or getattr(ours, name) == value
    (tmp_path / "readings.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read"):
        list(kept_readings(tmp_path / "readings.parquet"))


def test_a_part_holds_its_own_episodes_alone(demos: Path, base: str, tmp_path: Path) -> None:
    make_plan(request(demos, base, tmp_path / "out"), tmp_path / "plan")
    whole, part = read_plan(tmp_path / "plan"), read_plan(tmp_path / "plan", (2, 3))
    assert [shard.file for shard in part.shards] == [shard.file for shard in whole.shards[1::3]]
    assert part.shards == whole.shards[1::3] and part.shard_count == 5
    assert read_plan(tmp_path / "plan", (7, 7)).shards == ()


def test_a_record_that_was_cut_off_is_none(demos: Path, base: str, tmp_path: Path) -> None:
    make_plan(request(demos, base, tmp_path / "out"), tmp_path / "plan")
    convert_part(tmp_path / "plan", 1, 1, workers=1)
    staging = tmp_path / "out.partial"
    record = staging / STATE / "val-00000-of-00001.parquet.json"
    key = json.loads(record.read_text())["plan"]
    assert finished_shard(staging, "val-00000-of-00001.parquet", key, "stop") is not None
    for text in ("", "{}", record.read_text().replace('"rows": 12', '"rows": -1')):
        record.write_text(text)
        assert finished_shard(staging, "val-00000-of-00001.parquet", key, "stop") is None


def test_a_plan_that_says_something_else_is_a_sentence(demos: Path, base: str, tmp_path: Path) -> None:
    """Each value of its document replaced by others, with a checksum that holds: read, or refused in one sentence."""
    make_plan(request(demos, base, tmp_path / "out"), tmp_path / "plan")
    file = tmp_path / "plan/plan.json"
    document = json.loads(file.read_text())
    refused = 0
    places = [(document, key) for key in document]
    places += [
        (inner, key) for name in ("requests", "surveyed", "sources") for inner in document[name] for key in inner
    ]
    places += [(document[name], key) for name in ("rules", "dataset", "tables") for key in document[name]]
    for inside, key in places:
        before = inside[key]
        for value in (None, -1, "x", [], {}, ["x"], {"x": 1}):
            inside[key] = value
            file.write_text(json.dumps(sealed(document)))
            try:
                read_plan(tmp_path / "plan", (1, 2))
            except DataError as error:
                refused += 1
                assert "\n" not in str(error) and "plan" in str(error)
        inside[key] = before
    assert refused > 200
    file.write_text(json.dumps(sealed(document)))
    episodes = tmp_path / "plan/episodes.parquet"
    table = pq.read_table(episodes)
    for column, value in (("file", "../../x.parquet"), ("dataset", 7), ("ref", "x"), ("rows", -3)):
        at = table.schema.get_field_index(column)
        values = pa.array([value] * len(table), table.schema.field(column).type)
        pq.write_table(table.set_column(at, column, values), episodes)
        document["tables"]["episodes.parquet"] = checksum(episodes)
        file.write_text(json.dumps(sealed(document)))
        with pytest.raises(DataError, match="the plan cannot be read"):
            read_plan(tmp_path / "plan")
