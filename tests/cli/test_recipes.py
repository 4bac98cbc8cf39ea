"""The shipped recipes themselves, and `vlaft recipes`."""

from __future__ import annotations

import json
from pathlib import Path

import faults
import pytest

from vlaft.cli.main import main
from vlaft.recipe.resolve import find_recipe, recipe_names, resolve, to_yaml

# Trainable parameters on openvla-7b and openvla-v01-7b (docs: reference counts on the meta device); of policies with a
# head of their own, on openvla-7b.
COUNTS = {
    "full": ("7,541,237,184", "7,188,124,608"),
    "frozen-vision": ("6,810,325,504", "6,760,443,904"),
    "last-layer": ("465,051,648", "465,051,648"),
    "sandwich": ("1,267,348,928", "914,236,352"),
    "lora8": ("27,707,072", "24,400,992"),
    "lora16": ("55,414,144", "48,801,984"),
    "lora32": ("110,828,288", "97,603,968"),
    "lora64": ("221,656,576", "195,207,936"),
    "rslora64": ("221,656,576", "195,207,936"),
    "qlora32": ("110,828,288", "97,603,968"),
    "oft": ("261,946,119",),
    "oft-state": ("278,764,295",),
    "oft-film": ("852,557,326",),
    "qoft": ("278,764,295",),
}


def test_the_recipes_are_those_promised() -> None:
    assert sorted(recipe_names()) == sorted(COUNTS)
    names = recipe_names()
    assert names.index("lora8") < names.index("lora16") < names.index("lora64")


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_a_shipped_recipe_is_short_explained_and_sound(name: str, tmp_path: Path) -> None:
    text = find_recipe(name).read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 30
    assert all(line.startswith("# ") for line in lines[:2]) and not lines[2].startswith("#")
    assert all(count in lines[1] for count in COUNTS[name])
    config = resolve(name)
    assert config.name == name and config.description == lines[0][2:]
    copy = tmp_path / "recipe.yaml"
    copy.write_text(to_yaml(config), encoding="utf-8")
    assert resolve(copy) == config


@pytest.mark.parametrize("name", ["full", "frozen-vision", "last-layer", "sandwich"])
def test_whole_weights_are_trained_with_upstreams_settings(name: str) -> None:
    config = resolve(name)
    assert config.adapt.method == name
    assert (config.train.learning_rate, config.train.weight_decay, config.train.max_grad_norm) == (2e-5, 0.0, 1.0)


def test_adapters_are_what_their_names_say() -> None:
    for rank in (8, 16, 32, 64):
        adapt = resolve(f"lora{rank}").adapt
        assert (adapt.method, adapt.lora.rank, adapt.quantize, adapt.lora.rslora) == ("lora", rank, "none", False)
    qlora = resolve("qlora32")
    assert (qlora.adapt.quantize, qlora.adapt.double_quant, qlora.adapt.lora.rank) == ("nf4", True, 32)
    assert (qlora.train.optimizer, qlora.train.gradient_checkpointing) == ("paged-adamw-8bit", "all")
    assert qlora.train.batch_size == 1 and qlora.train.accumulation == resolve("lora32").train.batch_size
    rslora = resolve("rslora64").adapt.lora
    assert rslora.rslora and rslora.rank == 64


@pytest.mark.parametrize("words", [["recipes"], ["recipes", "list"]])
def test_list_prints_a_table(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert set(rows) == set(COUNTS)
    assert all(COUNTS[name][0] in row for name, row in rows.items())
    assert err == ""


@pytest.mark.parametrize("words", [["recipes", "--json"], ["recipes", "list", "--json"]])
def test_list_as_json(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == recipe_names()
    assert all(set(row) == {"name", "purpose", "cost"} and row["purpose"] and row["cost"] for row in rows)


def test_show_prints_the_file_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "qlora32"]) == 0
    assert capsys.readouterr().out == find_recipe("qlora32").read_text(encoding="utf-8")
    assert main(["recipes", "show", "qlora32", "--resolved"]) == 0
    assert capsys.readouterr().out == to_yaml(resolve("qlora32"))


def test_an_unknown_recipe_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "loar32"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: unknown recipe 'loar32'; did you mean 'lora32'? (there are: ")


def test_a_copy_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    def work() -> None:
        assert main(["recipes", "copy", "lora8", str(tmp_path / "mine.yaml")]) == 0

    def look(at: int, code: int) -> None:
        if (tmp_path / "mine.yaml").exists():
            assert (tmp_path / "mine.yaml").read_bytes() == find_recipe("lora8").read_bytes(), at
        else:
            work()  # what the kill left is in nobody's way
        assert not (tmp_path / ".mine.yaml.partial").exists(), at
        (tmp_path / "mine.yaml").unlink()

    assert faults.at_each_moment(tmp_path, "kill", work, look) > 5


def test_copy_refuses_to_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "copy", "lora8", str(tmp_path)]) == 0
    copied = tmp_path / "lora8.yaml"
    assert copied.read_bytes() == find_recipe("lora8").read_bytes()
    copied.write_text("mine", encoding="utf-8")
    capsys.readouterr()
    assert main(["recipes", "copy", "lora8", str(copied)]) == 1
    assert capsys.readouterr().err == f"error: {copied} exists already; name another file\n"
    assert copied.read_text(encoding="utf-8") == "mine"
    assert main(["recipes", "copy", "lora8", str(tmp_path / "absent" / "x.yaml")]) == 1
    assert "cannot be written" in capsys.readouterr().err
