from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vlaft.data.mixes import load_mix, mix_names, mix_requests
from vlaft.data.presets import load_preset
from vlaft.data.source import open_request
from vlaft.errors import ConfigError, DataError


def test_mixes_have_upstreams_sizes_and_weights() -> None:
    sizes = {name: len(load_mix(name)) for name in mix_names()}
    assert {name: sizes[name] for name in sizes if name.startswith("oxe")} == {
        "oxe_magic_soup": 23,
        "oxe_magic_soup_plus": 27,
        "oxe_magic_soup_plus_minus": 25,
    }
    assert (sizes["bridge_rt_1"], sizes["libero_mix"], sizes["libero_spatial_no_noops"]) == (2, 4, 1)
    plus = {dataset.name: dataset.weight for dataset in load_mix("oxe_magic_soup_plus")}
    minus = {dataset.name: dataset.weight for dataset in load_mix("oxe_magic_soup_plus_minus")}
    assert plus["fractal20220817_data"] == 0.54087122203 and minus["fractal20220817_data"] == 1.0
    assert set(plus) - set(minus) == {"language_table", "droid"}
    assert all(load_preset(name).action for name in plus)


def test_a_mix_with_unknown_datasets_and_wrong_weights_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("datasets: {bridg: 1, viola: 0, toto: .nan, kuka: 2}\nweight: 3\n")
    with pytest.raises(ConfigError) as caught:
        load_mix(file)
    assert [problem.removeprefix(f"{file}: ") for problem in caught.value.problems] == [
        "unknown key 'weight'",
        "no preset for dataset 'bridg'; did you mean 'bridge'?",
        "the weight of 'viola' is 0; it has to be a positive number",
        "the weight of 'toto' is nan; it has to be a positive number",
    ]
    file.write_text("datasets: []\n")
    with pytest.raises(ConfigError, match="has to map names of datasets to weights"):
        load_mix(file)
    file.write_text("datasets: {a: {path: 3, weight: true, fps: -1, instuction: x, preset: []}}\n")
    with pytest.raises(ConfigError) as caught:
        load_mix(file)
    assert [problem.removeprefix(f"{file}: ") for problem in caught.value.problems] == [
        "the weight of 'a' is True; it has to be a positive number",
        "'preset' of 'a' is []; it has to be a text",
        "'path' of 'a' is 3; it has to be a text",
        "a: 'fps' has to be a positive number (Hz)",
        "a: unknown key 'instuction'; did you mean 'instruction'?",
    ]


def test_a_mix_of_ones_own_names_paths_presets_weights_and_settings(samples: Path, tmp_path: Path) -> None:
    shutil.copytree(samples / "hdf5/aloha_raw", tmp_path / "demos/aloha")
    file = tmp_path / "mine.yaml"
    file.write_text(
        "datasets:\n"
        "  bridge_dataset: 0.5\n"
        "  arms: {path: demos/aloha, preset: aloha, weight: 2, instruction: insert it, shift_action: true}\n"
        "  hub: {path: user/dataset}\n"
        "  mapped: {path: gone.hdf5, preset: mapping.yaml}\n"
    )
    bridge, arms, hub, mapped = mix_requests(file, samples / "rlds", {"fps": 7})
    assert (bridge.path, bridge.preset, bridge.weight) == (samples / "rlds/bridge_dataset", "bridge", 0.5)
    assert (arms.path, arms.preset, arms.weight, arms.name) == (tmp_path / "demos/aloha", "aloha", 2.0, "arms")
    opened = open_request(arms)
    assert (opened.layout.instruction, opened.layout.fps, opened.reader.options.shift) == ("insert it", 7.0, -1)  # type: ignore[attr-defined]
    assert hub.path == Path("user/dataset") and mapped.path == tmp_path / "gone.hdf5"
    assert mapped.preset == str(tmp_path / "mapping.yaml")


def test_where_the_datasets_of_a_mix_lie_has_to_be_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'bridge_rt_1' does not say where 'bridge_orig' lies"):
        mix_requests("bridge_rt_1")
    (tmp_path / "bridge_orig").mkdir()
    with pytest.raises(DataError, match=r"1 of the datasets of the mix 'bridge_rt_1' are not in .*: fractal2022"):
        mix_requests("bridge_rt_1", tmp_path)
    (tmp_path / "fractal20220817_data").mkdir()
    assert [request.preset for request in mix_requests("bridge_rt_1", tmp_path)] == ["bridge", "fractal"]
