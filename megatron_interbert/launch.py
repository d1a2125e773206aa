"""Start the ranks of one machine with torchrun: `interbert launch pretrain FLAGS`, or under Slurm
one task on each node.

    interbert launch pretrain --data-path STORE ..          # a rank for each GPU, or one on the CPU
    interbert launch --processes 2 finetune retrieval ..
    srun --ntasks-per-node=1 python launchers/node.py -m megatron_interbert.pretrain FLAGS

torchrun exits with code 1 whatever the exit codes of its ranks, and ends them 30 s after a SIGTERM.
This command exits with the code of the first rank that failed, so that Slurm can tell a preempted
run (75) from a failed one (1) and from wrong use (2). It passes SIGTERM, SIGUSR1 and Ctrl-C on to
the ranks, which save and end by themselves. They get SIGHUP if the process that started this one
(slurmstepd) dies, because Slurm would not notice.

The environment variable PROCESSES_PER_NODE sets the number of ranks too. They use the GPUs in
CUDA_VISIBLE_DEVICES, which `deepspeed --num_gpus` ignores.
"""

import contextlib
import logging
import os
import signal
import sys

import psutil

from megatron_interbert.config.options import nearest
from megatron_interbert.errors import UsageError, end_at_once, run_entry
from megatron_interbert.parallel.launch import (
    MEETING_SECONDS,
    free_port,
    meeting_place,
    node_name,
    number,
)
from megatron_interbert.signals import (
    STOPPING,
    handle_signals,
    killed_by,
    signal_at_parents_death,
)

BY_TORCHRUN = ("auto", "cpu", "gpu")  # numbers of processes that torchrun works out itself
# commands whose ranks share the work without messages between them
SHARED = ("build-features", "extract-features", "mine-negatives", "mine-neighbours")
ENTRIES = ("pretrain", "pretrain-chinese", "finetune", "evaluate", "preflight", *SHARED)


def arguments_of(words: list[str]) -> list[str]:
    """Return torchrun's arguments for what the user typed; torchrun's own flags, a module or
    a script stay as they are.

    Raises UsageError for an unknown command, and SystemExit after printing --help.
    """
    words = take_processes(words)
    if not words:
        raise UsageError(f"launch: a command is missing; expected one of {', '.join(ENTRIES)}")

    name = words[0]
    if name in ("-h", "--help"):
        print(__doc__, end="")
        raise SystemExit

    if name in SHARED:
        return ["-m", "megatron_interbert", *words]
    if name in ENTRIES:
        return ["-m", f"megatron_interbert.{name.replace('-', '_')}", *words[1:]]
    if not name.startswith("-") and not os.path.isfile(name):
        raise UsageError(
            f"launch: no command or script '{name}'{nearest(name, ENTRIES)}; expected one of"
            f" {', '.join(ENTRIES)}, -m MODULE, or a script"
        )

    return words


def take_processes(words: list[str]) -> list[str]:
    """Set PROCESSES_PER_NODE from --processes, if that comes first, and return the other words."""
    flag, equals, value = words[0].partition("=") if words else ("", "", "")
    if flag != "--processes":
        return words

    rest = words[1:]
    if not equals:
        value = rest[0] if rest else ""
        rest = rest[1:]
    if value not in BY_TORCHRUN and not (value.isascii() and value.isdigit() and int(value)):
        raise UsageError(
            f"--processes is '{value}', expected 1 or more, or one of {', '.join(BY_TORCHRUN)}"
        )

    os.environ["PROCESSES_PER_NODE"] = value

    return rest


def command(arguments: list[str]) -> list[str]:
    """Build torchrun's command line for this node of the job."""
    from megatron_interbert.parallel.device import gpus  # importing torch takes seconds

    env = os.environ
    nodes = number("SLURM_STEP_NUM_NODES", 1, least=1)
    node = number("SLURM_NODEID", 0)
    if nodes == 1:
        env.setdefault("MASTER_PORT", str(free_port()))

    master, port = meeting_place()
    ranks = env.get("PROCESSES_PER_NODE", "")
    if ranks not in BY_TORCHRUN:
        ranks = str(number("PROCESSES_PER_NODE", gpus() or 1, least=1))
        # by default torchrun gives each of several ranks one thread
        share = len(os.sched_getaffinity(0)) // int(ranks)
        env.setdefault("OMP_NUM_THREADS", str(max(share, 1)))

    layout = ("--nnodes", str(nodes), "--node-rank", str(node), "--nproc-per-node", ranks)
    place = ("--master-addr", master, "--master-port", port)
    patience = ("--rdzv-conf", f"timeout={MEETING_SECONDS}")

    return [*layout, *place, *patience, *arguments]


passed_on: set[int] = set()  # signals


def pass_on(signal_number: int, frame: object) -> None:
    """Pass a signal on to all ranks of this node; before there are any, end."""
    passed_on.add(signal_number)
    ranks = psutil.Process().children()
    if not ranks:
        end_at_once(signal_number)
    for rank in ranks:
        with contextlib.suppress(psutil.Error):
            rank.send_signal(signal_number)


def run() -> None:
    """Start the ranks and wait for them."""
    handle_signals((*STOPPING, signal.SIGINT), end_at_once)
    arguments = arguments_of(sys.argv[1:])
    from torch.distributed import DistError  # takes seconds: only once signals are handled
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser
    from torch.distributed.run import run as torchrun

    words = command(arguments)
    several = number("SLURM_STEP_NUM_NODES", 1, least=1) > 1
    if several and os.environ.get("SLURM_NODEID", "0") == "0":
        print(f"on each node: torchrun {' '.join(words)}", flush=True)

    options = get_args_parser().parse_args(words)
    options.signals_to_handle = "SIGQUIT"
    handle_signals((*STOPPING, signal.SIGINT), pass_on)
    signal_at_parents_death(signal.SIGHUP)
    # the ranks report themselves why they end
    logging.getLogger("torch.distributed.elastic.multiprocessing").setLevel(logging.CRITICAL)

    try:
        torchrun(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if -failure.exitcode in passed_on:  # before the rank handled signals
            end_at_once(-failure.exitcode)
        if failure.exitcode < 0:  # unless a signal has killed them
            how = killed_by(-failure.exitcode)
            print(
                f"error: rank {rank} on {node_name()} (pid {failure.pid}) was {how}",
                file=sys.stderr,
                flush=True,
            )

        os._exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except (DistError, TimeoutError) as error:
        text = str(error).strip().splitlines()[0]
        raise UsageError(
            f"node {options.node_rank} of {options.nnodes}: the nodes cannot meet at"
            f" {options.master_addr}:{options.master_port} within {MEETING_SECONDS} s"
            f" ({text[:160]}); are all nodes up, is the port free on the first, and open between"
            " them?"
        ) from error


def main() -> None:
    """Run the entry point."""
    run_entry(run)


if __name__ == "__main__":
    main()
