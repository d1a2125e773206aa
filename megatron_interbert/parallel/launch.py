"""Read this process's place among all processes of a run from what the launcher set."""

import os
import re
import socket
from dataclasses import dataclass

from megatron_interbert.errors import UsageError

MEETING_SECONDS = 45  # how long a process waits for the others after its imports
PORTS = range(20000, 30000)  # below those Linux uses for outgoing connections


@dataclass(frozen=True)
class Launch:
    """Hold a process's place in a run.

    `launcher` is deepspeed, torchrun, srun or python, `node` the machine's name; all ranks meet at
    (`master`, `port`).
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
        """Check whether torchrun's agent, not rank 0, hosts the store at (`master`, `port`)."""
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    @property
    def on_one_machine(self) -> bool:
        """Check whether `deepspeed` started all ranks, from one parent process on this machine."""
        return self.launcher == "deepspeed" and self.local_size == self.world_size

    @property
    def attempt(self) -> str:
        """Return what tells this start from earlier ones that used the same store."""
        return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


@dataclass(frozen=True)
class LocalPlace:
    """Hold a process's rank among the `size` processes of its machine, and whether it sees all
    devices there.
    """

    rank: int
    size: int
    sees_all_devices: bool


def local_place() -> LocalPlace:
    """Read this process's place on its machine, without changing the environment.

    deepspeed and torchrun show all devices to each process; srun, mpirun and scripts may show each
    process only one.
    """
    slurm = _by_srun() and "LOCAL_RANK" not in os.environ
    rank = number("SLURM_LOCALID" if slurm else "LOCAL_RANK", 0)
    size = number("LOCAL_WORLD_SIZE", number("LOCAL_SIZE", 1, least=1), least=1)

    return LocalPlace(rank, size, read_launcher() in ("deepspeed", "torchrun"))


def read_launcher() -> str:
    """Return what started this process: torchrun, deepspeed, srun or python."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    if "CROSS_RANK" in os.environ:
        return "deepspeed"
    return "srun" if _by_srun() else "python"


def _by_srun() -> bool:
    """Check whether this is one of several tasks of a Slurm step.

    SLURM_NTASKS would not do: a batch script has it too, and is a single task.
    """
    return number("SLURM_STEP_NUM_TASKS", 1, least=1) > 1


def _set_by_srun(name: str) -> str:
    """Read a Slurm variable; UsageError if it is missing although others are set."""
    if name not in os.environ:
        raise UsageError(
            f"SLURM_STEP_NUM_TASKS is set and {name} is not; start the processes by srun"
        )

    return os.environ[name]


def read_launch() -> Launch:
    """Read the launch of this process, and set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT, which libraries read.

    deepspeed and torchrun set them; under a plain `srun` they come from Slurm; otherwise this is a
    single process. Raises UsageError for variables that make no sense.
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
    """Set the variables that deepspeed and torchrun set, if neither started this process."""
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
    """Read MASTER_ADDR and MASTER_PORT; UsageError if one is missing or the port is invalid."""
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
    """Return this process's environment without the variables that make it one of several."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    meeting = ("MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE", "SLURM_STEP_NUM_TASKS")

    return {
        name: value
        for name, value in os.environ.items()
        if name not in (*ours, *meeting) and not name.startswith("TORCHELASTIC_")
    }


def free_port() -> int:
    """Return a port on this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def node_name() -> str:
    """Return the name of this machine: Slurm's if there is one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def number(name: str, default: int, least: int = 0) -> int:
    """Read an integer of at least `least` from the environment; UsageError for anything else."""
    text = os.environ.get(name) or str(default)
    plain = text.isascii() and text.isdigit() and len(text) < 20
    if not plain or int(text) < least:
        raise UsageError(
            f"{name} is '{text[:40]}', expected a number, {least} or more; see how the job was"
            " started"
        )

    return int(text)


def _first(tasks_per_node: str) -> str:
    """Return the first node's number of tasks: `2(x3),1` -> `2`."""
    return re.split(r"[(,]", tasks_per_node)[0]


def first_host(nodes: str) -> str:
    """Return the first machine of Slurm's node list: `gpu[003-010,12],x1` -> `gpu003`."""
    found = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in found.groups())


def meeting_place() -> tuple[str, str]:
    """Return MASTER_ADDR and MASTER_PORT where set, else the first machine of the Slurm step and a
    port derived from the job id.
    """
    nodes = os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1")
    job = number("SLURM_JOB_ID", 0)

    return os.environ.get("MASTER_ADDR") or first_host(nodes), os.environ.get("MASTER_PORT") or str(
        PORTS[job % len(PORTS)]
    )
