"""`vlaft doctor`: whether this machine has what vlaft needs, and whether files are as they were written."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from vlaft.cli.arguments import AsJson

BASE_BYTES = 15.2e9  # openvla-7b on the Hub, in bfloat16
_EXTRAS = {"bitsandbytes": ("qlora32 and 8-bit AdamW", "pip install 'vlaft[qlora]'")}
_PYTHON = (3, 11)
_MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[red]problem[/]"}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was looked at.
        state: `ok`, `note` (works, with something missing that some commands need), or `problem`.
        found: what is there.
        advice: what to do, or empty.
    """

    subject: str
    state: Literal["ok", "note", "problem"]
    found: str
    advice: str = ""


def doctor(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Converted datasets, runs and checkpoints to read through.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what this machine has and lacks: Python, torch, GPU, extras, disk space for a base.

    Folders that are named are read through instead: every file that has a checksum is held against it, and a run's base
    as well. The exit code is 3 where something is missing that every command needs, or a checksum does not hold.
    """
    from rich.table import Table

    from vlaft.cli.console import print_json, show
    from vlaft.errors import CheckFailed

    if folders:
        findings = [finding for folder in folders for finding in _readings(folder)]
    else:
        findings = [_python(), *_torch_and_gpu(), *_extras(), _trackers(), _disk()]
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column()
        for one in findings:
            from rich.text import Text

            text = f"{one.found}; {one.advice}" if one.advice else one.found
            table.add_row(Text.from_markup(_MARKS[one.state]), one.subject, Text(text))
        show(table)
    problems = [one for one in findings if one.state == "problem"]
    if problems:
        told = (one.found if folders else f"{one.subject}: {one.advice or one.found}" for one in problems)
        raise CheckFailed("; ".join(told))


def _readings(folder: Path) -> list[Finding]:
    from vlaft.inspection.integrity import check_folder

    states: dict[bool | None, Literal["ok", "note", "problem"]] = {True: "ok", None: "note", False: "problem"}
    return [Finding(str(one.subject), states[one.intact], one.told) for one in check_folder(folder)]


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < _PYTHON:
        return Finding("Python", "problem", found, "vlaft needs Python 3.11 or newer")
    return Finding("Python", "ok", found)


def _torch_and_gpu() -> list[Finding]:
    try:
        import torch
    except ImportError as error:
        return [Finding("torch", "problem", f"cannot be imported ({error})", "pip install torch")]
    findings = [Finding("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")]
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        advice = (
            "with an NVIDIA GPU here, check its driver with nvidia-smi"
            if built
            else "with an NVIDIA GPU here, install torch's CUDA build (pytorch.org)"
        )
        return [*findings, Finding("GPU", "note", "none that torch can use: training a 7B base needs one", advice)]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        found = (
            f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor},"
            f" {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        )
        if (major, minor) < (8, 0):
            advice = "no bfloat16 in hardware: train with precision.frozen=float32 precision.compute=float32"
            findings.append(Finding(f"GPU {index}", "note", found, advice))
        elif free < 0.9 * total:
            advice = "another process holds part of its memory; nvidia-smi names it"
            findings.append(Finding(f"GPU {index}", "note", found, advice))
        else:
            findings.append(Finding(f"GPU {index}", "ok", found))
    return findings


def _extras() -> list[Finding]:
    findings = []
    for package, (purpose, advice) in _EXTRAS.items():
        if importlib.util.find_spec(package) is None:
            findings.append(Finding(package, "note", f"not installed; needed for {purpose}", advice))
            continue
        version = importlib.metadata.version(package)
        state, kernels = _bitsandbytes_kernels()
        findings.append(Finding(package, state, f"{version}, {kernels}"))
    return findings


def _bitsandbytes_kernels() -> tuple[Literal["ok", "note"], str]:
    """Say whether bitsandbytes works on this machine's GPU, by quantising one small matrix on it."""
    import torch

    if not torch.cuda.is_available():
        return "note", "no GPU to run its kernels on; quantised bases are slow on a CPU"
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(torch.ones(64, 64, device="cuda", dtype=torch.bfloat16), quant_type="nf4")
        dequantize_4bit(packed, state)
        torch.cuda.synchronize()
    except (
        Exception
    ) as error:  # a missing library, no kernel for this GPU, a driver too old: each has a kind of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return "note", f"its kernels do not run on this GPU ({reason})"
    return "ok", "its kernels run on this GPU"


def _trackers() -> Finding:
    from vlaft.recipe.checks import TRACKERS

    there = [name for name in TRACKERS if importlib.util.find_spec(name) is not None]
    missing = [name for name in TRACKERS if name not in there]
    if not missing:
        return Finding("trackers", "ok", ", ".join(there))
    found = f"{', '.join(there) or 'none'} (log.jsonl is always written)"
    return Finding("trackers", "ok", found, f"for train.trackers: pip install {' or '.join(missing)}")


def _disk() -> Finding:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    found = f"{free / 1e9:.0f} GB free for the Hub cache in {folder}"
    if free < BASE_BYTES:
        advice = f"openvla-7b takes {BASE_BYTES / 1e9:.0f} GB: free some, or point HF_HOME at a larger disk"
        return Finding("disk", "note", found, advice)
    return Finding("disk", "ok", found)
