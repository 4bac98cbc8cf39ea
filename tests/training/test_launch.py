"""Started by torchrun, accelerate or SLURM, on one machine or on two: what works, and what is explained."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from repository import ROOT
from small_run import Small, log_lines, run

from vlaft.cli.main import main
from vlaft.errors import ConfigError
from vlaft.recipe.resolve import resolve
from vlaft.training import launch
from vlaft.training.launch import settle_launch

WORDS = ["data.augment=false", "train.batch_size=2", "train.save_every=2", "train.evaluate_every=0"]
BIN = Path(sys.executable).parent
SENTENCE = "SLURM started 2 tasks on this node, and the launcher in each of them 2 processes, so 4 where 2 are meant"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def train_words(small: Small, out: Path, *words: str) -> list[str]:
    return ["train", "--recipe", "lora8", "--out", str(out), *small.words(), *WORDS, *words]


def environment(**more: str) -> dict[str, str]:
    here = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return here | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"} | more


def task(number: int, tasks: int, **more: str) -> dict[str, str]:
    """What SLURM tells a task of several on one node."""
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_TASKS_PER_NODE": str(tasks)}
    own = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "SLURM_STEP_NODELIST": "localhost"}
    return step | own | {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NODEID": "0"} | more


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (task(0, 2) | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, SENTENCE),
        (
            {"SLURM_STEP_ID": "1", "SLURM_NTASKS_PER_NODE": "2", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
            SENTENCE,
        ),
        (
            task(8, 12) | {"SLURM_STEP_TASKS_PER_NODE": "4(x2),2", "SLURM_NODEID": "2"} | {"WORLD_SIZE": "6"},
            None,  # one process per launcher: each task is a node of its own
        ),
        (
            task(8, 12, SLURM_STEP_TASKS_PER_NODE="4(x2),2", SLURM_NODEID="2", WORLD_SIZE="6", LOCAL_WORLD_SIZE="2"),
            SENTENCE,
        ),
        (task(0, 1) | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, None),
        # in the batch script itself, without srun, torchrun runs once whatever the job has asked for
        ({"SLURM_NTASKS_PER_NODE": "8", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, None),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"}, "was told --use_deepspeed, and vlaft shares"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "did not say SLURM_PROCID"),
        ({}, None),
    ],
)
def test_mistakes_are_explained(given: dict[str, str], sentence: str | None) -> None:
    if sentence is None:
        settle_launch(given)
    else:
        with pytest.raises(ConfigError, match=sentence):
            settle_launch(given)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_gpus", lambda: 2)
    given = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    settle_launch(given)
    with pytest.raises(ConfigError, match="4 processes were started on this machine, and there are GPUs for 2"):
        settle_launch(given | {"LOCAL_RANK": "2"})


def test_tasks_of_srun_are_told_in_torchruns_words(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = {"SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1"}
    given = task(6, 8) | nodes | {"SLURM_LOCALID": "2", "SLURM_JOB_ID": "4711"}
    settle_launch(given)
    told = {name: given[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")}
    assert told == {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu07"}
    assert 10_000 <= int(given["MASTER_PORT"]) < 30_000
    monkeypatch.setattr(launch, "_gpus", lambda: 1)  # --gpus-per-task=1
    bound = task(1, 2)
    settle_launch(bound)
    assert bound["LOCAL_RANK"] == "0" and bound["RANK"] == "1"
    with pytest.raises(ConfigError, match="2 processes were started on this machine, and there are GPUs for 1"):
        settle_launch(task(1, 2) | {"SLURM_GPUS_ON_NODE": "1"})  # one card for both of them


def follows(out: Path, expected: Path) -> None:
    """Two runs with the same examples in a step go the same way, to rounding."""
    ours, theirs = (log_lines(place) for place in (out, expected))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-5)


@pytest.fixture
def one(small: Small, tmp_path: Path) -> Path:
    """What one process makes of it."""
    run(small.recipe("lora8", *WORDS, "train.batch_size=4"), tmp_path / "one")
    return tmp_path / "one"


@pytest.mark.slow
def test_srun_with_a_task_per_process(small: Small, tmp_path: Path, one: Path) -> None:
    words = [sys.executable, "-m", "vlaft", *train_words(small, tmp_path / "run")]
    tasks = [subprocess.Popen(words, env=environment(**task(number, 2))) for number in range(2)]
    assert [each.wait(240) for each in tasks] == [0, 0]
    follows(tmp_path / "run", one)


@pytest.mark.slow
def test_accelerate_launch(small: Small, tmp_path: Path, one: Path) -> None:
    words = ["accelerate", "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    words += [f"--main_process_port={free_port()}", "-m", "vlaft", *train_words(small, tmp_path / "run")]
    done = subprocess.run(words, env=environment(), text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    follows(tmp_path / "run", one)


@pytest.fixture
def cluster(tmp_path: Path) -> Mapping[str, str]:
    """Stand-ins for srun, which starts a job's tasks on this machine, and for scontrol, as a job script meets them."""
    (tmp_path / "bin").mkdir()
    for name, text in {
        "scontrol": '[ "$*" = "show hostnames node[1-2]" ] && echo 127.0.0.1',
        "srun": """
            [ "$1" = --cpus-per-task=8 ] && shift
            for task in 0 1; do SLURM_NODEID=$task SLURM_PROCID=$task "$@" & started+=($!); done
            for each in ${started[@]}; do wait $each || failed=$?; done
            exit ${failed:-0}""",
    }.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0"}
    job |= {"SLURM_CPUS_PER_TASK": "8"}
    return environment(PATH=f"{tmp_path / 'bin'}:{BIN}:{os.environ['PATH']}", **job)


def script(tmp_path: Path) -> str:
    """Return the job's script, with a port that is free here and a thread per process."""
    text = (ROOT / "examples" / "train.sbatch").read_text(encoding="utf-8")
    path = tmp_path / "train.sbatch"
    path.write_text(text.replace(":29500", f":{free_port()}").replace("OMP_NUM_THREADS=8", "OMP_NUM_THREADS=1"))
    return str(path)


@pytest.mark.slow
def test_the_job_script_trains_on_two_nodes(
    small: Small, tmp_path: Path, one: Path, cluster: Mapping[str, str]
) -> None:
    words = ["bash", script(tmp_path), *train_words(small, tmp_path / "run")[1:]]
    slurm = {"SLURM_GPUS_ON_NODE": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    done = subprocess.run(words, env=cluster | slurm, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    follows(tmp_path / "run", one)


@pytest.mark.slow
def test_the_job_script_with_many_tasks_per_node_is_explained(
    small: Small, tmp_path: Path, cluster: Mapping[str, str]
) -> None:
    words = ["bash", script(tmp_path), *train_words(small, tmp_path / "run")[1:]]
    slurm = {"SLURM_GPUS_ON_NODE": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_JOB_NUM_NODES": "2"}
    done = subprocess.run(words, env=cluster | slurm, text=True, capture_output=True, timeout=240)
    assert done.returncode != 0 and SENTENCE in done.stderr
    assert not (tmp_path / "run").exists()


Start = Callable[[int, list[str]], "subprocess.Popen[bytes]"]


@pytest.fixture
def nodes() -> Iterator[Start]:
    """Start torchrun on one of two nodes: network namespaces with a cable between them."""
    names = [f"vlaft{os.getpid()}{letter}" for letter in "ab"]
    ends = [f"v{os.getpid()}{letter}" for letter in "ab"]

    def ip(*words: str) -> bool:
        return shutil.which("ip") is not None and not subprocess.run(["ip", *words], capture_output=True).returncode

    started: list[subprocess.Popen[bytes]] = []
    try:
        ready = all(ip("netns", "add", name) for name in names)
        ready = ready and ip(
            "link", "add", ends[0], "netns", names[0], "type", "veth", "peer", ends[1], "netns", names[1]
        )
        for number, (name, end) in enumerate(zip(names, ends, strict=True)):
            ready = ready and ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", end)
            ready = ready and ip("-n", name, "link", "set", end, "up") and ip("-n", name, "link", "set", "lo", "up")
        if not ready:
            pytest.skip("network namespaces cannot be made here (they need root and iproute2)")

        def start(number: int, words: list[str]) -> subprocess.Popen[bytes]:
            torchrun = ["torchrun", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
            torchrun += ["--rdzv-endpoint=10.77.0.1:29500", "--rdzv-id=17", f"--local-addr=10.77.0.{number + 1}"]
            # both ends have this machine's name, so neither could tell that it is the one where they meet
            torchrun += [f"--rdzv-conf=is_host={int(number == 0)},keep_alive_interval=1,keep_alive_max_attempt=2"]
            here = environment(GLOO_SOCKET_IFNAME=ends[number], TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
            inside = ["ip", "netns", "exec", names[number], *torchrun, "-m", "vlaft", *words]
            started.append(subprocess.Popen(inside, env=here, start_new_session=True))
            return started[-1]

        yield start
    finally:
        for name in names:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in map(int, pids):
                os.kill(pid, signal.SIGKILL)
            ip("netns", "del", name)
        for each in started:
            each.wait()


@pytest.mark.slow
def test_two_nodes_are_one_run(small: Small, tmp_path: Path, one: Path, nodes: Start) -> None:
    words = train_words(small, tmp_path / "run")
    agents = [nodes(number, words) for number in range(2)]
    assert [agent.wait(300) for agent in agents] == [0, 0]
    follows(tmp_path / "run", one)


@pytest.mark.slow
def test_a_node_that_is_lost_and_comes_back_goes_on_from_the_last_checkpoint(
    small: Small, tmp_path: Path, nodes: Start
) -> None:
    out = tmp_path / "run"
    words = train_words(small, out, "train.steps=120", "train.save_every=20")
    agents = [nodes(number, [*words, "--resume"]) for number in range(2)]
    until = time.monotonic() + 240
    while not (out / "checkpoints" / "step-000020").exists():
        assert agents[0].poll() is None and time.monotonic() < until
        time.sleep(0.05)
    lost = f"vlaft{os.getpid()}b"
    pids = subprocess.run(["ip", "netns", "pids", lost], capture_output=True, text=True).stdout.split()
    for pid in map(int, pids):  # the agent and its process: the node is gone
        os.kill(pid, signal.SIGKILL)
    agents[1].wait()
    time.sleep(3)
    assert agents[0].poll() is None  # it waits for the other one
    agents[1] = nodes(1, [*words, "--resume"])
    assert [agent.wait(400) for agent in agents] == [0, 0]
    steps = [line["step"] for line in log_lines(out)]
    assert steps == list(range(1, 121))  # each once: what came after the checkpoint was done again, and replaced
    whole = tmp_path / "whole"
    run(small.recipe("lora8", *WORDS, "train.batch_size=4", "train.steps=40"), whole)
    expected = {line["step"]: line["loss"] for line in log_lines(whole)}
    found = {line["step"]: line["loss"] for line in log_lines(out)}
    assert [found[step] for step in range(1, 41)] == pytest.approx([expected[step] for step in range(1, 41)], rel=1e-3)


PAGE = (ROOT / "docs" / "many-gpus.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Return the commands of docs/many-gpus.md, as words."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def test_the_commands_of_the_page_are_understood() -> None:
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    launchers = {"torchrun": get_args_parser(), "accelerate": launch_command_parser()}
    started = set()
    for words in commands():
        started.add(words[0])
        if words[0] == "export":
            continue
        if words[0] in launchers:
            launcher = launchers[words[0]].parse_args(words[(words[0] == "accelerate" and 2) or 1 :])
            assert launcher.training_script == "vlaft" and launcher.module
            words = ["vlaft", *launcher.training_script_args]
        elif words[0] == "sbatch":
            assert (ROOT / words[1]).is_file()
            words = ["vlaft", "train", *words[2:]]
        elif words[0] == "srun":
            words = words[words.index("vlaft") :]
        assert words[0] == "vlaft"
        if words[1] == "train":
            options = {"--recipe", "--data", "--base", "--out", "--resume"}
            assert {word for word in words if word.startswith("--")} <= options
            resolve(words[words.index("--recipe") + 1], [], [word for word in words if "=" in word])
    assert started == {"export", "vlaft", "torchrun", "accelerate", "sbatch", "srun"}
    with pytest.raises(ConfigError) as told:
        settle_launch(task(0, 8, WORLD_SIZE="64", LOCAL_WORLD_SIZE="8"))
    assert str(told.value) in PAGE


@pytest.mark.slow
def test_the_pages_report_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [words] = [words[1:] for words in commands() if words[:2] == ["vlaft", "report"]]
    assert main(words) == 0
    assert "lora32" in capsys.readouterr().out
