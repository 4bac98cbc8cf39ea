"""What is installed: a wheel that finds its recipes and templates anywhere, and a command that starts fast."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import venv
from pathlib import Path

import h5py
import numpy as np
import pytest
from repository import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `vlaft` command of an environment that has the wheel and, from here, only what it depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(folder.glob("*.whl"))
    environment = folder / "environment"
    venv.create(environment, with_pip=False)
    packages = next((environment / "lib").glob("python*")) / "site-packages"
    # The dependencies are borrowed; a .pth file inside a borrowed folder is not followed, so that the editable
    # installation of this repository stays out.
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    return environment / "bin/vlaft"


def run(command: Path, *words: str, folder: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([command, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_finds_its_recipes(installed: Path, tmp_path: Path) -> None:
    listed = json.loads(run(installed, "recipes", "list", "--json", folder=tmp_path))
    shipped = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert {row["name"] for row in listed} == shipped
    where = run(installed, "recipes", "show", "lora32", folder=tmp_path)
    assert where == (ROOT / "recipes/lora32.yaml").read_text()


def test_the_wheel_reports(installed: Path, tmp_path: Path) -> None:
    words = ("report", "--recipe", "lora32", "--base", "openvla/openvla-v01-7b", "--json")
    (row,) = json.loads(run(installed, *words, folder=tmp_path))["recipes"]
    assert row["trainable_parameters"] == 97_603_968


def test_the_wheel_writes_pages(installed: Path, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "demos.hdf5", "w") as file:
        file["episodes/0/action"] = np.eye(6)
        file["episodes/0/front"] = np.zeros((6, 8, 8, 3), np.uint8)
    words = (
        "episodes=episodes/*",
        "action=[action]",
        "cameras={main: front}",
        "instruction=push",
        "--html",
        "page.html",
    )
    run(installed, "inspect", "demos.hdf5", *words, folder=tmp_path)
    assert "<h2>Frames</h2>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_help_does_not_import_torch() -> None:
    script = (
        "import sys; from vlaft.cli.main import main; main(['--help']);"
        "print(sorted({'torch', 'transformers', 'peft', 'numpy', 'pyarrow'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
