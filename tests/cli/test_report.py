"""`vlaft report`, run as a user runs it."""

import json
import subprocess
import sys

import pytest

from vlaft.cli.main import main

FUSED = {"trainable_parameters": 110_828_288, "total_parameters": 7_652_065_472, "reached_by_gradient": 109_126_400}


@pytest.fixture
def mini(golden_folder):
    return str(golden_folder / "mini" / "fused")


def run(capsys, *words):
    code = main(["report", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_json_of_the_default_base(capsys):
    code, out, _ = run(capsys, "--recipe", "lora32", "--gpu-memory", "80GB", "--json")
    assert code == 0
    answer = json.loads(out)
    assert answer["base"] == "openvla/openvla-7b"
    (row,) = answer["recipes"]
    assert {key: row[key] for key in FUSED} == FUSED
    assert row["name"] == "lora32" and row["batch_size"] == 16
    assert sum(row["memory"].values()) == row["peak_memory"]
    assert 50e9 < row["peak_memory"] < 65e9
    assert row["smallest_card"] == 80 and row["largest_batch"] >= 16
    assert set(row["parts"]) == {"vision", "projector", "language model", "head"}


def test_all_recipes_are_the_default(capsys, mini):
    from vlaft.recipe.resolve import recipe_names

    code, out, _ = run(capsys, "--base", mini, "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)["recipes"]] == recipe_names()


def test_settings_and_batch_size_reach_the_prediction(capsys, mini):
    def peak(*words):
        return json.loads(run(capsys, "--base", mini, "--recipe", "lora8", "--json", *words)[1])["recipes"][0]

    plain, small = peak(), peak("--batch-size", "2")
    assert small["batch_size"] == 2 and small["memory"]["activations"] < plain["memory"]["activations"]
    recomputed = peak("train.gradient_checkpointing=all")
    assert recomputed["memory"]["activations"] < plain["memory"]["activations"]
    assert peak("--gpus", "4")["memory"]["optimizer state"] < plain["memory"]["optimizer state"]


def test_an_automatic_batch_size_is_the_largest_that_fits(capsys, mini):
    words = ("--base", mini, "--recipe", "lora8", "--json", "--gpu-memory", "1GB", "train.batch_size=auto")
    row = json.loads(run(capsys, *words)[1])["recipes"][0]
    assert row["batch_size"] == row["largest_batch"] > 1
    assert row["peak_memory"] <= 10**9


def test_tables_and_picture(capsys, mini, tmp_path):
    picture = tmp_path / "costs.png"
    code, out, _ = run(capsys, "--base", mini, "--recipe", "lora8", "--recipe", "full", "--plot", str(picture))
    assert code == 0
    assert "reached by gradient" in out and "smallest card" in out and "trained in" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(capsys, "--base", mini, "--explain", "lora8")
    assert code == 0
    assert "optimizer state" in out and "layers.N.mlp.up_proj" in out and "The peak comes in" in out


def test_the_papers_figures_stand_beside_the_base_that_they_describe(capsys):
    words = ("--recipe", "last-layer", "--base", "openvla/openvla-v01-7b", "--gpu-memory", "80GB")
    assert "51.4" in run(capsys, *words)[1]


def test_measured_steps_stand_beside_the_prediction(capsys, mini):
    words = ("--base", mini, "--recipe", "lora8", "--batch-size", "2", "--measure")
    measured = json.loads(run(capsys, *words, "--json")[1])["recipes"][0]["measured"]
    assert abs(measured["error"]) < 0.02
    assert "error" in run(capsys, *words)[1]


@pytest.mark.parametrize(
    "words, code, sentence",
    [
        (["--recipe", "lora33"], 1, "did you mean"),
        (["--gpu-memory", "much"], 2, "no memory size"),
        (["--base", "/nowhere/base"], 1, "no such folder"),
        (["train.batchsize=4"], 1, "did you mean"),
        (["--batch-size", "0"], 2, "--batch-size"),
        (["--explain", "lora8", "--recipe", "lora16"], 2, "--explain"),
        (["--recipe", "lora8", "adapt.lora.targets=[nothing]"], 1, "nothing"),
    ],
)
def test_mistakes_are_sentences(words, code, sentence, capsys, mini):
    words = words if "--base" in words else ["--base", mini, *words]
    found, out, err = run(capsys, *words)
    assert found == code
    assert sentence in err and "Traceback" not in err and out == ""


def test_a_picture_that_cannot_be_written_is_a_sentence(capsys, mini, tmp_path):
    for name in ("costs.xyz", "nowhere/costs.png"):
        code, _, err = run(capsys, "--base", mini, "--recipe", "lora8", "--plot", str(tmp_path / name))
        assert code == 1 and name in err


@pytest.mark.slow
def test_all_recipes_take_little_time_and_memory():
    """Under 30 s of processor time and 2 GB of memory for ten recipes on the 7B base."""
    program = (
        "import resource, sys; from vlaft.cli.main import main; code = main(['report', '--recipe', 'all', '--json']);"
        " used = resource.getrusage(resource.RUSAGE_SELF);"
        " print(used.ru_utime, used.ru_maxrss, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, kilobytes = map(float, done.stderr.splitlines()[-1].split())
    assert seconds < 30 and kilobytes < 2e6
