"""The curves of a run, read from a log that may be damaged or still written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlaft.cli.main import main
from vlaft.errors import DataError
from vlaft.pages.curves import CHUNK_PANELS, LOG_FILE, PANELS, draw_curves, read_curves


def write_run(folder: Path, steps: int = 20, scale: float = 1.0, tail: str = "") -> Path:
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        values = {"loss": scale / step, "action_accuracy": step / steps, "action_l1": scale / step}
        lines.append({"step": step, **values, "learning_rate": 5e-4, "grad_norm": scale, "memory_bytes": None})
        if step % 5 == 0:
            held_out = {"val_loss": scale * abs(step - 10), "val_action_accuracy": 0.5, "val_action_l1": abs(step - 10)}
            lines.append({"step": step, **held_out, "best": False})
    (folder / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


def test_the_log_is_read(tmp_path: Path) -> None:
    curves = read_curves(write_run(tmp_path / "run"))
    assert curves.train["step"].tolist() == list(range(1, 21)) and curves.train["loss"][1] == 0.5
    assert curves.held_out["step"].tolist() == [5, 10, 15, 20]
    assert curves.held_out["val_action_l1"].tolist() == [5, 0, 5, 10]
    assert curves.damaged == 0


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    bad = [
        '{"step": 21, "loss": NaN, "grad_norm": "high"}',
        "[1]",
        '{"loss": 1}',
        '{"step": true, "loss": 1}',
        "[" * 9999,
    ]
    bad += ['{"step": 1' + "0" * 400 + ', "loss": 1}', "\x00\x00", '{"step": 22, "lo']
    curves = read_curves(write_run(tmp_path / "run", tail="\n".join(bad)))
    assert curves.damaged == len(bad) - 1
    assert curves.train["step"][-1] == 21 and np.isnan(curves.train["loss"][-1])
    assert np.isnan(curves.train["grad_norm"][-1]) and np.isnan(curves.train["learning_rate"][-1])
    draw_curves([curves])


def test_what_has_no_log(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no log\.jsonl; give a folder that `vlaft train` wrote"):
        read_curves(tmp_path)
    (tmp_path / LOG_FILE).write_text("")
    with pytest.raises(DataError, match="has no logged step yet"):
        read_curves(tmp_path)


def test_every_panel_shows_every_run(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "_$b^{", steps=1, scale=2)]
    figure = draw_curves([read_curves(run) for run in runs])
    assert len(figure.axes) == 6
    for panel, axis in zip(PANELS, figure.axes, strict=False):
        lines = axis.get_lines()
        assert axis.get_title() == panel.title
        assert len(lines) == (4 if panel.held_out else 2)
        assert len({line.get_color() for line in lines}) == 2
        assert lines[0].get_xdata().tolist() == list(range(1, 21))
        assert lines[-1].get_marker() != "None"  # one point alone is drawn as a dot
    assert figure.axes[3].get_ylim()[0] == 0
    texts = [text.get_text() for text in figure.axes[5].get_legend().get_texts()]
    assert texts[:2] == ["training", "held out"] and "best held-out L1 0.0000 at step 10" in texts[2]
    assert texts[3].endswith("_\\$b^{")


def test_runs_with_chunks_have_panels_of_their_own(tmp_path: Path) -> None:
    """And no accuracy where no run wrote tokens; a run of one action at a time has no line in them."""
    chunked, plain = tmp_path / "chunked", write_run(tmp_path / "plain")
    chunked.mkdir()
    values = {"action_accuracy": None, "action_l1": 0.2, "first_action_l1": 0.1, "later_actions_l1": 0.25}
    held_out = {"val_loss": 0.3, "val_action_l1": 0.3, "val_first_action_l1": 0.2, "val_later_actions_l1": 0.4}
    lines = [{"step": 1, "loss": 0.2, **values}, {"step": 1, **held_out}]
    (chunked / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = draw_curves([read_curves(chunked)])
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:4] == ["loss (L1)", "action L1 (normalised units)", *(panel.title for panel in CHUNK_PANELS)]
    assert len(titles) == 7 and titles[-1] == ""  # the legend
    first, dot = figure.axes[2].get_lines()
    assert first.get_ydata().tolist() == [0.1] and dot.get_ydata().tolist() == [0.2]
    both = draw_curves([read_curves(plain), read_curves(chunked)])
    assert both.axes[0].get_title() == "loss (nats per token or L1)" and len(both.axes) == 8
    assert np.isnan(both.axes[3].get_lines()[0].get_ydata()).all()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = str(write_run(tmp_path / "run")), str(write_run(tmp_path / "other"))
    assert main(["plot", run]) == 0
    with Image.open(tmp_path / "run/curves.png") as image:
        assert image.format == "PNG" and image.width > 1000
    assert main(["plot", run]) == 1
    assert "curves.png exists already" in capsys.readouterr().err
    assert main(["plot", run, "--overwrite"]) == 0
    assert main(["plot", run, other]) == 2
    assert "name it with --out" in capsys.readouterr().err
    assert main(["plot", run, other, "--out", str(tmp_path / "new/both.png")]) == 0
    assert (tmp_path / "new/both.png").is_file() and len(list((tmp_path / "new").iterdir())) == 1
    assert main(["plot", run, "--out", str(tmp_path / "both.jpg")]) == 2
    assert main(["plot", run, "--out", str(tmp_path / "run/log.jsonl/both.png")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    (tmp_path / "folder.png").mkdir()
    assert main(["plot", run, "--out", str(tmp_path / "folder.png"), "--overwrite"]) == 1
    assert main(["plot", str(tmp_path / "absent")]) == 1
    (tmp_path / "run" / LOG_FILE).write_text('x\ny\n{"step": 1, "loss": 2}\n')
    assert main(["plot", run, "--overwrite"]) == 0
    assert "2 lines of its log cannot be read" in capsys.readouterr().err
