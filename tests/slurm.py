"""Run a real Slurm of two nodes on this machine, from Debian's packages, with its own munge, ports
and folders.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.launching import ENVIRONMENT, ROOT, environment, free_ports, until

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
KillWait=20
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SchedulerParameters=sched_interval=1,batch_sched_delay=1
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Run a cluster: `with Slurm(folder) as slurm`: slurm.submit(..), slurm.wait(..)."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.daemons = []
        self.environment = {
            **ENVIRONMENT,
            "SLURM_CONF": f"{folder}/slurm.conf",
            "VENV": str(Path(sys.executable).parents[1]),
            "MASTER_ADDR": "127.0.0.1",  # only Slurm knows the names n0 and n1
            "MASTER_PORT": str(free_ports(1)[0]),
        }

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            stack.push(self)
            self._begin()
            stack.pop_all()

        return self

    def _begin(self):
        for name in ("state", "spool-n0", "spool-n1"):
            (self.folder / name).mkdir()

        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)
        host = socket.gethostname()
        (self.folder / "slurm.conf").write_text(
            CONF.format(folder=self.folder, host=host, ports=free_ports(3))
        )
        files = {
            "socket": "socket",
            "key-file": "key",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }

        self._start(
            "munged",
            "--foreground",
            "--force",
            *(f"--{name}={self.folder}/munge.{end}" for name, end in files.items()),
        )
        self._start("slurmctld", "-D")
        for node in ("n0", "n1"):
            self._start("slurmd", "-D", "-N", node)

        until(
            lambda: self.run("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"],
            "both nodes are idle",
        )

    def _start(self, *command):
        self.daemons.append(
            subprocess.Popen(
                command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        )

    def __exit__(self, *_):
        for pid in self.processes():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

        for daemon in self.daemons:
            daemon.wait(20)

    def processes(self, job=None):
        """Return {pid: environment} of all processes of this cluster, daemons too, or of those that
        a job has started.
        """
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        ours = {
            pid: env
            for pid in pids
            if (env := environment(pid)).get("SLURM_CONF") == self.environment["SLURM_CONF"]
        }

        return (
            ours
            if job is None
            else {pid: env for pid, env in ours.items() if env.get("SLURM_JOB_ID") == job}
        )

    def run(self, *command, check=True):
        ended = subprocess.run(
            [str(c) for c in command],
            env=self.environment,
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=False,
        )
        assert ended.returncode == 0 or not check, f"{command}: {ended.stdout}{ended.stderr}"
        return ended.stdout

    def submit(self, *words, **changes):
        """Run `sbatch WORDS`; return the job's number."""
        before = dict(self.environment)
        self.environment |= changes

        try:
            return self.run(
                "sbatch", "--parsable", f"--output={self.folder}/%j.log", *words
            ).strip()
        finally:
            self.environment = before

    def log(self, job):
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def job(self, number):
        """Return the fields of `scontrol show job`."""
        text = self.run("scontrol", "show", "job", number, check=False)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, number, seconds=120):
        """Wait until the job has ended; return its fields."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return until(
            lambda: (j := self.job(number)).get("JobState") in ended and j,
            f"job {number} ends",
            seconds,
        )
