"""How this process was started among several, from the environment that launchers leave; and mistakes in that.

torchrun and `accelerate launch` say all in RANK, WORLD_SIZE and their like. `srun` with one task per GPU says the same
in words of its own, which are translated. Everything here is said before anything is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from vlaft.errors import ConfigError

_PORTS = range(10_000, 30_000)  # below those that systems hand out
_FOREIGN = {"FSDP": "--use_fsdp", "DEEPSPEED": "--use_deepspeed", "MEGATRON_LM": "--use_megatron_lm"}


def settle_launch(environment: MutableMapping[str, str] = os.environ) -> None:
    """Refuse a launch that cannot work, and let tasks of `srun` find each other as torchrun's processes do.

    Args:
        environment: read, and completed where `srun` started one task per GPU.

    Raises:
        ConfigError: several tasks of a node have started torchrun, there are more processes than GPUs, or accelerate is
            to shard as well.
    """
    for name, option in _FOREIGN.items():
        if environment.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise ConfigError(
                f"`accelerate launch` was told {option}, and vlaft shares a model between processes by itself: leave"
                " that out (or give --config_file another), and see docs/many-gpus.md"
            )
    if "WORLD_SIZE" in environment:
        _check_tasks(environment)
    elif _number(environment, "SLURM_STEP_NUM_TASKS") > 1:
        _adopt_tasks(environment)
    _check_gpus(environment)


def _check_tasks(environment: MutableMapping[str, str]) -> None:
    """Refuse a torchrun in every one of several tasks of a node: each would start a process per GPU."""
    tasks, processes = _tasks_here(environment), _number(environment, "LOCAL_WORLD_SIZE")
    if tasks > 1 and processes > 1:
        raise ConfigError(
            f"SLURM started {tasks} tasks on this node, and the launcher in each of them {processes} processes, so"
            f" {tasks * processes} where {processes} are meant: let srun start one launcher per node"
            " (#SBATCH --ntasks-per-node=1, as in examples/train.sbatch), or one task per GPU without a launcher"
        )


def _tasks_here(environment: MutableMapping[str, str]) -> int:
    """Return how many tasks `srun` started on this node; 1 where none of them runs this."""
    listed = environment.get("SLURM_STEP_TASKS_PER_NODE")
    if listed is None:
        return _number(environment, "SLURM_NTASKS_PER_NODE") if "SLURM_STEP_ID" in environment else 1
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", listed):  # 8(x2),4: three nodes
        counts += [int(count)] * min(int(times or 1), 2**16)
    node = _number(environment, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else max(counts, default=1)


def _adopt_tasks(environment: MutableMapping[str, str]) -> None:
    """Say in torchrun's words what `srun` said in its own."""
    wanted = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
    if missing := [name for name in wanted if not environment.get(name)]:
        raise ConfigError(f"srun started several tasks and did not say {missing[0]}; start them with torchrun instead")
    step = _number(environment, "SLURM_JOB_ID", 0) * 7 + _number(environment, "SLURM_STEP_ID", 0)
    said = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(_tasks_here(environment)),
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(_PORTS[step % len(_PORTS)]),
    }
    alone = _number(environment, "SLURM_GPUS_ON_NODE", 0) == 1  # they would all share it
    if _gpus() == 1 and environment["SLURM_LOCALID"] != "0" and not alone:
        said["LOCAL_RANK"] = "0"  # --gpus-per-task=1 shows each task its own, which is then the first
    for name, value in said.items():
        environment.setdefault(name, value)


def first_host(nodes: str) -> str:
    """Return the first of the machines that SLURM lists.

    >>> first_host("gpu[003-010,017],login1"), first_host("a1,a2"), first_host("r[1-2]n[07,09]")
    ('gpu003', 'a1', 'r1n07')
    """
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).partition(",")[0]


def _check_gpus(environment: MutableMapping[str, str]) -> None:
    processes, local = _number(environment, "LOCAL_WORLD_SIZE"), _number(environment, "LOCAL_RANK", 0)
    if processes > 1 and 0 < (gpus := _gpus()) <= local:
        raise ConfigError(
            f"{processes} processes were started on this machine, and there are GPUs for {gpus}: give the launcher"
            f" --nproc-per-node={gpus} (accelerate: --num_processes; srun: --ntasks-per-node)"
        )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _number(environment: MutableMapping[str, str], name: str, default: int = 1) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else default
