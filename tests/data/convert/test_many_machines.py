"""What docs/converting.md says of conversions in parts, as it is written there, with two parts for sixteen."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

from vlaft.cli.main import main
from vlaft.data.store import ConvertedDataset

TEXT = (ROOT / "docs/converting.md").read_text().partition("## In parts, on many machines")[2].partition("\n## ")[0]
BLOCKS = dict(re.findall(r"([^\n]+):\n\n```(?:bash|python)\n(.*?)```", TEXT, re.DOTALL))


def block(name: str, plan: Path) -> str:
    """Return the block that follows a sentence which begins so, for this plan."""
    [text] = [text for title, text in BLOCKS.items() if title.startswith(name)]
    assert "/shared/plan" in text and "16" in text
    text = text.replace("/shared/plan", str(plan)).replace("/16", "/2").replace("17)", "3)").replace("seq 16", "seq 2")
    return text.replace('"--workers", "2"', '"--workers", "1"').replace("num_cpus=2", "num_cpus=1")


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan made by the command of the page, and `vlaft` on the path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    [line] = re.findall(r"^vlaft (convert tests/data/.*--plan.*)$", TEXT, re.MULTILINE)
    assert main([*shlex.split(line), "--limit", "4"]) == 0
    return tmp_path / "data/plan"


def check_finished(plan: Path) -> None:
    assert main(["convert", "--plan", str(plan), "--finish"]) == 0
    dataset = ConvertedDataset(plan.parent / "parts")
    dataset.verify()
    assert dataset.rows("train") == dataset.rows("val") == 32


def test_the_commands_of_the_page(plan: Path) -> None:
    found = re.findall(r"^vlaft (convert --plan data/plan .*)$", TEXT, re.MULTILINE)
    assert len(found) == 3
    for line in found:
        assert main(shlex.split(line)) == 0
    ConvertedDataset(plan.parent / "parts").verify()


def test_a_slurm_array(plan: Path, tmp_path: Path) -> None:
    """Its script, as each task of the array runs it."""
    script = tmp_path / "convert.sbatch"
    script.write_text(block("An array of SLURM", plan))
    for number in ("1", "2"):
        environment = os.environ | {"SLURM_ARRAY_TASK_ID": number}
        subprocess.run(["bash", str(script)], check=True, env=environment, capture_output=True)
    check_finished(plan)


@pytest.mark.slow
def test_gnu_parallel(plan: Path) -> None:
    if shutil.which("parallel") is None:
        pytest.skip("GNU parallel is not installed")
    subprocess.run(["bash", "-c", block("GNU parallel", plan)], check=True, capture_output=True)
    check_finished(plan)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "package"), [("Ray", "ray"), ("Dask", "distributed")])
def test_a_scheduler_of_python_functions(
    plan: Path, tmp_path: Path, name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two workers on this machine."""
    pytest.importorskip(package)
    text = block(name, plan).replace("ray.init()", "ray.init(num_cpus=2)")
    text = text.replace("Client()", "Client(n_workers=2, threads_per_worker=1)")
    script = tmp_path / "convert.py"
    script.write_text(text)
    for setting, value in (
        ("USAGE_STATS_ENABLED", "0"),
        ("AUTH_MODE", "disabled"),
        ("raylet_start_wait_time_s", "400"),
    ):
        monkeypatch.setenv(f"RAY_{setting}", value)  # it writes nothing at home, and a busy machine starts it slowly
    subprocess.run([sys.executable, str(script)], check=True, timeout=500)
    assert [path.name for path in (tmp_path / "data/parts.partial/.conversion").glob("parts-of-*")] == ["parts-of-2"]
    check_finished(plan)
