"""What `vlaft inspect` says of a converted dataset."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_base import convert_small, write_small_base

from vlaft.checksums import SEAL
from vlaft.cli.main import main
from vlaft.data.store import STATISTICS_CHECKSUM


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    return convert_small(write_small_base(folder / "base"), folder / "data", rich=True, steps=9)


def test_the_words_of_a_conversion_are_those_of_its_source(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(data), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["policy"] == ["policy.chunk=5", "policy.cameras='[main, wrist]'", "policy.state=true"]
    assert main(["inspect", str(data)]) == 0
    shown = capsys.readouterr().out
    assert "policy.chunk=5 policy.cameras='[main, wrist]' policy.state=true (with policy.head=l1;" in shown
    assert "zeros" not in shown


def test_zeros_that_an_earlier_version_wrote_for_the_state_are_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = Path(shutil.copytree(data, tmp_path / "old"))
    statistics = json.loads((old / "dataset_statistics.json").read_text())
    statistics["small"]["proprio"] = {name: [0.0] * 7 for name in statistics["small"]["proprio"]}
    (old / "dataset_statistics.json").write_text(json.dumps(statistics))
    info = json.loads((old / "dataset.json").read_text())
    (old / "dataset.json").write_text(
        json.dumps({key: value for key, value in info.items() if key not in (SEAL, STATISTICS_CHECKSUM)})
    )
    assert main(["inspect", str(old), "--json"]) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert any("zeros as the state's statistics of small; convert the source again" in text for text in warnings)
