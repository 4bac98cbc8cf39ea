"""One flipped bit, anywhere in what vlaft wrote or trained on, ends every verb that reads it in a sentence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image
from small_base import INSTRUCTION, convert_small, write_small_base

from vlaft.cli.main import main
from vlaft.weights.layout import tensor_table

METHODS = ("lora8", "last-layer")
SHARD = "train-00000-of-00001.parquet"
HELD_OUT = "val-00000-of-00001.parquet"


@dataclass(frozen=True)
class Job:
    """A base, data, and one finished run of each method with two checkpoints, to be copied before they are spoiled."""

    folder: Path

    def copy(self, name: str, target: Path) -> Path:
        shutil.copytree(self.folder / name, target)
        return target


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    convert_small(write_small_base(folder / "base"), folder / "data")
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(folder / "frame.png")
    for method in METHODS:
        assert main([*train_words(folder, method), "train.steps=4"]) == 0
    return Job(folder)


def train_words(folder: Path, method: str) -> list[str]:
    """Return the command that trains, all paths below `folder`."""
    words = ["train", "--recipe", method, "--data", str(folder / "data"), "--base", str(folder / "base")]
    words += ["--out", str(folder / method), "train.batch_size=2", "train.accumulation=1", "data.workers=0"]
    return [*words, "train.save_every=2", "train.evaluate_every=0", "train.keep_checkpoints=3", "train.log_every=1"]


def flip(path: Path, place: float) -> None:
    """Flip one bit at a share of the file's length; the times stay as they were, as on a failing disk."""
    content = bytearray(path.read_bytes())
    content[min(int(place * len(content)), len(content) - 1)] ^= 1
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def refused(capsys: pytest.CaptureFixture[str], words: list[str], *needed: str) -> None:
    """Run a command, which has to end with code 1 and one sentence that has all words `needed`."""
    capsys.readouterr()
    assert main(words) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    for word in needed:
        assert word in errors[0]


def reading_data(folder: Path) -> dict[str, list[str]]:
    """Return the commands that read `folder/data`."""
    data = str(folder / "data")
    return {
        "train": [*train_words(folder, "lora8")[:-5], "--out", str(folder / "new"), "train.steps=1"],
        "evaluate": ["evaluate", str(folder / "lora8"), "--data", data, "--limit", "2", "--device", "cpu"],
        "inspect": ["inspect", data],
        "doctor": ["doctor", data],
    }


def reading_run(folder: Path, run: Path) -> dict[str, list[str]]:
    """Return the commands that read trained weights in `run`."""
    image = ["--image", str(folder / "frame.png"), "--instruction", INSTRUCTION]
    return {
        "merge": ["merge", str(run), "--out", str(run.parent / "merged"), "--no-verify"],
        "predict": ["predict", str(run), *image, "--device", "cpu"],
        "serve": ["serve", str(run), "--port", "0", "--device", "cpu"],
        "evaluate": ["evaluate", str(run), "--data", str(folder / "data"), "--limit", "1", "--device", "cpu"],
    }


def resume_words(folder: Path, run: Path, method: str) -> list[str]:
    words = train_words(folder, method)
    words[words.index("--out") + 1] = str(run)
    return [*words, "--resume", "train.steps=4"]


@pytest.mark.parametrize("place", [0.02, 0.2, 0.4, 0.6, 0.8, 0.99])
@pytest.mark.parametrize(("file", "verbs"), [(SHARD, ("train", "inspect", "doctor")), (HELD_OUT, ("evaluate",))])
def test_shards(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, verbs: tuple[str, ...], place: float
) -> None:
    for name in ("base", "data", "lora8"):
        job.copy(name, tmp_path / name)
    flip(tmp_path / "data" / file, place)
    for verb in verbs:
        if verb == "doctor":
            capsys.readouterr()
            assert main(["doctor", str(tmp_path / "data")]) == 3
            assert file in capsys.readouterr().err
            continue
        refused(capsys, reading_data(tmp_path)[verb], file, "convert the source again")
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("verb", ["train", "evaluate", "inspect"])
def test_a_digit_in_the_datasets_documents(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    job.copy("base", tmp_path / "base")
    job.copy("lora8", tmp_path / "lora8")
    for file in ("dataset.json", "dataset_statistics.json"):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        data = job.copy("data", tmp_path / "data")
        change_digits(data / file)
        refused(capsys, reading_data(tmp_path)[verb], file, "checksum")


def change_digits(path: Path) -> None:
    """Change the first digit after a decimal point or, without one, in a number that does not name a version."""
    text = path.read_text()
    start = text.index(".", text.index(": 0.") if ": 0." in text else 0) + 1
    while not text[start].isdigit():
        start = text.index(".", start) + 1
    path.write_text(text[:start] + str((int(text[start]) + 1) % 10) + text[start + 1 :])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", [0.001, 0.3, 0.5, 0.7, 0.9999])
def test_trained_weights(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, place: float
) -> None:
    run = job.copy(method, tmp_path / "run")
    file = "adapter_model.safetensors" if method == "lora8" else "trained.safetensors"
    flip(run / "checkpoints/step-000004" / file, place)
    for words in reading_run(job.folder, run).values():
        refused(capsys, words, f"step-000004/{file}", "--checkpoint step-000002")
    if method == "lora8":
        words = ["export", str(run), "--out", str(tmp_path / "exported"), "--to", "adapter"]
        refused(capsys, words, f"step-000004/{file}", "--checkpoint step-000002")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert main([*reading_run(job.folder, run)["predict"], "--checkpoint", "step-000002"]) == 0
    refused(capsys, reading_run(job.folder, run / "checkpoints/step-000004")["predict"], file)


def test_a_digit_in_the_adapters_settings(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = job.copy("lora8", tmp_path / "run")
    file = run / "checkpoints/step-000004/adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    for words in reading_run(job.folder, run).values():
        refused(capsys, words, "step-000004/adapter_config.json", "--checkpoint step-000002")


@pytest.mark.parametrize("file", ["run.json", "dataset_statistics.json", "environment.json"])
def test_a_digit_in_the_runs_documents(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str) -> None:
    run = job.copy("lora8", tmp_path / "run")
    change_digits(run / file)
    for words in reading_run(job.folder, run).values():
        refused(capsys, words, f"run/{file}", "checksum")


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_digit_in_the_state_resumes_from_the_checkpoint_before(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: float
) -> None:
    run = job.copy("lora8", tmp_path / "run")
    path = run / "checkpoints/step-000004/state.json"
    text = path.read_text()
    at = next(n for n in range(int(place * len(text)), len(text)) if text[n].isdigit())
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
    assert main(resume_words(job.folder, run, "lora8")) == 0
    told = capsys.readouterr().err
    assert "step-000004" in told and "falling back to the one before" in told
    assert json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"] == 4


@pytest.mark.parametrize(
    ("file", "place"),
    [("optimizer.safetensors", 0.001), ("adapter_model.safetensors", 0.65), ("adapter_config.json", 0.35)],
)
def test_a_flip_in_a_checkpoint_resumes_from_the_one_before(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, place: float
) -> None:
    run = job.copy("lora8", tmp_path / "run")
    flip(run / "checkpoints/step-000004" / file, place)
    assert main(resume_words(job.folder, run, "lora8")) == 0
    told = capsys.readouterr().err
    assert f"step-000004/{file}" in told and "falling back to the one before" in told


def test_a_digit_in_the_recipe_is_not_resumed(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = job.copy("lora8", tmp_path / "run")
    path = run / "recipe.yaml"
    before = path.read_text()
    path.write_text(before.replace("seed: 7", "seed: 6").replace("seed: 0", "seed: 1"))
    assert path.read_text() != before
    refused(capsys, ["train", "--out", str(run), "--resume"], "run/recipe.yaml", "checksum")


@pytest.mark.parametrize("verb", ["merge", "predict", "serve", "evaluate", "resume"])
def test_a_flip_inside_a_tensor_of_the_base(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    base, run = job.copy("base", tmp_path / "base"), job.copy("lora8", tmp_path / "run")
    table = tensor_table(base)
    large = [name for name, entry in table.items() if entry.end - entry.begin > 3 * 4096]
    assert len(large) > 3
    for name in (large[0], large[len(large) // 2], large[-1]):
        entry = table[name]
        path = base / entry.file
        before = path.read_bytes()
        flip(path, ((entry.begin + entry.end) // 2 + 0.5) / len(before))
        if verb == "resume":
            words = resume_words(job.folder, run, "lora8")
            words[words.index("--base") + 1] = str(base)
            recipe = run / "recipe.yaml"
            recipe.write_text(_moved(recipe.read_text(), job.folder / "base", base))
        else:
            words = [*reading_run(job.folder, run)[verb], "--base", str(base)]
        refused(capsys, words, entry.file, f"'{name}'", "download or copy the base again")
        path.write_bytes(before)
    assert not (tmp_path / "merged").exists()


def _moved(recipe: str, old: Path, new: Path) -> str:
    """Return a recipe, without its checksum, with another place of the base."""
    lines = [line for line in recipe.splitlines() if not line.startswith("# crc32c")]
    return "\n".join(lines).replace(str(old), str(new)) + "\n"


def test_what_an_earlier_version_wrote_is_read_and_said_once(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = job.copy("lora8", tmp_path / "run")
    for path in [run / "run.json", run / "environment.json", *run.glob("checkpoints/*/state.json")]:
        content = json.loads(path.read_text())
        for key in ("crc32c", "base_checksums", "statistics_crc32c"):
            content.pop(key, None)
        if "files" in content:
            content["files"] = {name: crc32((path.parent / name).read_bytes()) for name in content["files"]}
        path.write_text(json.dumps(content))
    capsys.readouterr()
    assert main(reading_run(job.folder, run)["evaluate"]) == 0  # finds the weights twice
    assert capsys.readouterr().err.count("an earlier vlaft") == 1
    flip(run / "checkpoints/step-000004/adapter_model.safetensors", 0.5)  # these sums were there before
    refused(capsys, reading_run(job.folder, run)["predict"], "step-000004/adapter_model.safetensors")
    capsys.readouterr()
    assert main(resume_words(job.folder, run, "lora8")) == 0
    assert "an earlier vlaft" in capsys.readouterr().err
