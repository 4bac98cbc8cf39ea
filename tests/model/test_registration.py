"""`import vlaft` makes transformers' Auto classes know OpenVLA, in any order, and imports neither torch nor them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden_models import MINI
from repository import ROOT
from small_base import write_small_base

from vlaft.cli.main import main

BASE = MINI / "single"
LOAD = "AutoModelForImageTextToText.from_pretrained(sys.argv[1])"


def run(code: str, *words: str) -> str:
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300, env=offline
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "imports",
    [
        "import sys, vlaft\nassert not {'torch', 'transformers'} & set(sys.modules)\n"
        "from transformers import AutoModelForImageTextToText",
        "import sys\nfrom transformers import AutoModelForImageTextToText\nimport vlaft",
    ],
    ids=["vlaft first", "transformers first"],
)
def test_one_import_is_enough(imports: str) -> None:
    code = f"{imports}\nmodel = {LOAD}\nprint(type(model).__module__, type(model).__name__)"
    assert run(code, str(BASE)) == "vlaft.model.openvla OpenVLAForActionPrediction"


@pytest.mark.parametrize(
    "module", ["transformers.pipelines", "transformers.trainer", "transformers.generation", "peft"]
)
def test_whoever_imports_the_auto_classes_is_not_disturbed(module: str) -> None:
    code = f"import sys, vlaft, importlib; importlib.import_module({module!r})\n"
    code += "from transformers import AutoConfig, AutoModelForImageTextToText as auto\n"
    code += "from transformers.models.auto import modeling_auto\n"
    code += "config = AutoConfig.from_pretrained(sys.argv[1])\n"
    code += "import inspect; assert 'AutoModelForImageTextToText' in inspect.getsource(modeling_auto)\n"
    code += "assert type(modeling_auto.__loader__).__module__ != 'vlaft.model.registration'\n"
    code += "print(type(config).__name__, auto._model_mapping[type(config)].__name__)"
    assert run(code, str(BASE)) == "OpenVLAConfig OpenVLAForActionPrediction"


def test_an_export_loads_as_its_documentation_says(tmp_path: Path) -> None:
    """The lines of docs/export.md, on an export in nf4 whose `auto_map` names remote code that is never asked for."""
    pytest.importorskip("bitsandbytes")
    base = write_small_base(tmp_path / "base")
    action = {key: [0.5] * 7 for key in ("mean", "std", "min", "max", "q01", "q99")}
    (base / "dataset_statistics.json").write_text(json.dumps({"mine": {"action": action}}))
    assert main(["export", str(base), "--out", str(tmp_path / "model-nf4"), "--to", "nf4"]) == 0
    text = (ROOT / "docs/export.md").read_text()
    (code,) = [block.partition("```")[0] for block in text.split("```python\n")[1:] if "import vlaft" in block]
    code = code.replace('"model-nf4"', repr(str(tmp_path / "model-nf4")))
    found = run(f"{code}\nprint(type(model).__name__, type(model.projector.fc1).__name__)")
    assert found == "OpenVLAForActionPrediction Linear4bit"
