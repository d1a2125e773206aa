"""Where this process stands among all processes of a run, read in one place from whatever started
it.
"""

import os
import re
import socket
from dataclasses import dataclass

from megatron_interbert.errors import UsageError

MEETING_SECONDS = 45  # after its imports a process waits so long for the others
PORTS = range(20000, 30000)  # below the ports that Linux gives to outgoing connections


@dataclass(frozen=True)
class Launch:
    """`launcher` is deepspeed, torchrun, srun or python.

    `node` the machine's name; (`master`, `port`) where all ranks meet.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    node: str
    master: str
    port: int

    @property
    def hosted_by_agent(self) -> bool:
        """Whether torchrun's agent holds the store at (`master`, `port`), and not rank 0."""
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    @property
    def on_one_machine(self) -> bool:
        """Whether `deepspeed` has started all ranks as children of one process of this machine."""
        return self.launcher == "deepspeed" and self.local_size == self.world_size

    @property
    def attempt(self) -> str:
        """Tells the processes of this start from those of one before on the same store."""
        return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


@dataclass(frozen=True)
class LocalPlace:
    """The number of a process among the `size` of its machine, and whether it sees all devices
    there.
    """

    rank: int
    size: int
    sees_all_devices: bool


def local_place() -> LocalPlace:
    """Read where this process stands on its machine; changes nothing.

    deepspeed and torchrun show all devices to each of their processes. srun, mpirun and scripts may
    show one to each.
    """
    slurm = _by_srun() and "LOCAL_RANK" not in os.environ
    rank = number("SLURM_LOCALID" if slurm else "LOCAL_RANK", 0)
    size = number("LOCAL_WORLD_SIZE", number("LOCAL_SIZE", 1, least=1), least=1)

    return LocalPlace(rank, size, read_launcher() in ("deepspeed", "torchrun"))


def read_launcher() -> str:
    """Name what has started this process: torchrun, deepspeed, srun or python."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    if "CROSS_RANK" in os.environ:
        return "deepspeed"
    return "srun" if _by_srun() else "python"


def _by_srun() -> bool:
    """Tell whether this is one of several tasks of a step.

    A batch script has SLURM_NTASKS, and is one.
    """
    return number("SLURM_STEP_NUM_TASKS", 1, least=1) > 1


def _set_by_srun(name: str) -> str:
    """Read a variable of Slurm's; UsageError where it is missing beside those that are there."""
    if name not in os.environ:
        raise UsageError(
            f"SLURM_STEP_NUM_TASKS is set and {name} is not; start the processes by srun"
        )

    return os.environ[name]


def read_launch() -> Launch:
    """Read the launch of this process, and set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT, which libraries look at.

    deepspeed and torchrun set them; under a plain `srun` they come from Slurm; otherwise this is a
    single process. UsageError for variables that make no sense.
    """
    launcher = read_launcher()
    set_variables(launcher)

    rank = number("RANK", 0)
    ranks = number("WORLD_SIZE", 1, least=1)
    if rank >= ranks:
        raise UsageError(
            f"RANK is {rank} and WORLD_SIZE {ranks}, expected a rank from 0 to {ranks - 1}; see how"
            " the job was started"
        )

    address, port = read_meeting_place(ranks)
    place = local_place()

    return Launch(launcher, rank, ranks, place.rank, place.size, node_name(), address, port)


def set_variables(launcher: str) -> None:
    """Set the variables that deepspeed and torchrun set, where neither has started this process."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return

    if launcher == "srun":
        env.update(
            RANK=_set_by_srun("SLURM_PROCID"),
            WORLD_SIZE=_set_by_srun("SLURM_STEP_NUM_TASKS"),
            LOCAL_RANK=_set_by_srun("SLURM_LOCALID"),
        )
        env.setdefault("LOCAL_WORLD_SIZE", _first(env.get("SLURM_STEP_TASKS_PER_NODE", "1")))
        env["MASTER_ADDR"], env["MASTER_PORT"] = meeting_place()
    else:
        env.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
        )


def read_meeting_place(ranks: int) -> tuple[str, int]:
    """Read MASTER_ADDR and MASTER_PORT; UsageError where one is missing or no port."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UsageError(
                f"{name} is not set, so {ranks} processes cannot meet; start them by deepspeed,"
                " torchrun or sbatch"
            )

    port = number("MASTER_PORT", 0, least=1)
    if port >= 1 << 16:
        raise UsageError(f"MASTER_PORT is {port}, expected 1 to 65535")

    return os.environ["MASTER_ADDR"], port


def environment_of_one_process() -> dict[str, str]:
    """Give this process's environment without what says that it is one of several."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    meeting = ("MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE", "SLURM_STEP_NUM_TASKS")

    return {
        name: value
        for name, value in os.environ.items()
        if name not in (*ours, *meeting) and not name.startswith("TORCHELASTIC_")
    }


def free_port() -> int:
    """Give a port of this machine at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def node_name() -> str:
    """Give the name of this machine: Slurm's where there is one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def number(name: str, default: int, least: int = 0) -> int:
    """Read a whole number from the environment; UsageError for anything else."""
    text = os.environ.get(name) or str(default)
    plain = text.isascii() and text.isdigit() and len(text) < 20
    if not plain or int(text) < least:
        raise UsageError(
            f"{name} is '{text[:40]}', expected a number, {least} or more; see how the job was"
            " started"
        )

    return int(text)


def _first(tasks_per_node: str) -> str:
    """`2(x3),1` -> `2`."""
    return re.split(r"[(,]", tasks_per_node)[0]


def first_host(nodes: str) -> str:
    """Give the first machine of Slurm's list: `gpu[003-010,12],x1` -> `gpu003`."""
    found = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in found.groups())


def meeting_place() -> tuple[str, str]:
    """Give (address, port) of MASTER_ADDR and MASTER_PORT, else the first machine of the Slurm step
    and a port that only this job has.
    """
    nodes = os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1")
    job = number("SLURM_JOB_ID", 0)

    return os.environ.get("MASTER_ADDR") or first_host(nodes), os.environ.get("MASTER_PORT") or str(
        PORTS[job % len(PORTS)]
    )
