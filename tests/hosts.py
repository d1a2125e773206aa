"""Simulate two machines with network namespaces, each with its own address and sshd, on one cable
that can be pulled.
"""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

from tests.launching import ENVIRONMENT, ROOT, environment, free_ports, until

PROGRAMS = ("ip", "pdsh", "ssh", "ssh-keygen", "/usr/sbin/sshd")
SSHD = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile {folder}/sshd-{name}.pid
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
"""
SSH = """
Host *
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


def missing():
    """Return why such machines are not possible here; empty if they are."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"needs {', '.join(absent)}"

    probe = f"probe-{os.getpid()}"
    if (
        os.geteuid()
        or subprocess.run(
            ["ip", "netns", "add", probe], capture_output=True, check=False
        ).returncode
    ):
        return "this machine allows no network namespaces"

    subprocess.run(["ip", "netns", "del", probe], check=True)

    return ""


class Hosts:
    """Run two machines: `with Hosts(folder) as hosts`: hosts.addresses, hosts.deepspeed(flags) on
    the first, hosts.pull_the_cable().
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.names = [f"t{os.getpid()}{letter}" for letter in "ab"]
        self.addresses = ["10.213.7.1", "10.213.7.2"]
        self.daemons = []
        (self.folder / "bin").mkdir()
        wrapper = self.folder / "bin" / "ssh"
        wrapper.write_text(
            f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.folder}/ssh_config "$@"\n'
        )
        wrapper.chmod(0o755)
        (self.folder / "ssh_config").write_text(SSH.format(folder=self.folder))
        # Variables that the launcher passes on to the other machines; host names do not resolve
        # here, so gloo is told to use the cable.
        wanted = {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "cable",
            "PATH": ENVIRONMENT["PATH"],
        }
        (self.folder / "deepspeed_env").write_text(
            "".join(f"{name}={value}\n" for name, value in wanted.items())
        )
        (self.folder / "hostfile").write_text(
            "".join(f"{address} slots=1\n" for address in self.addresses)
        )
        self.environment = {
            **ENVIRONMENT,
            **wanted,
            "PATH": f"{self.folder}/bin:{ENVIRONMENT['PATH']}",
            "DS_ENV_FILE": f"{self.folder}/deepspeed_env",
        }

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            stack.push(self)
            self._begin()
            stack.pop_all()

        return self

    def _begin(self):
        for key in ("host_key", "key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key)
        for name in self.names:
            _run("ip", "netns", "add", name)

        a, b = self.names
        _run(
            "ip",
            "link",
            "add",
            "cable",
            "netns",
            a,
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            b,
        )
        Path("/run/sshd").mkdir(exist_ok=True)

        for name, address in zip(self.names, self.addresses, strict=True):
            for words in (
                ("addr", "add", f"{address}/24", "dev", "cable"),
                ("link", "set", "cable", "up"),
                ("link", "set", "lo", "up"),
            ):
                _run("ip", "-n", name, *words)

            (self.folder / f"sshd-{name}").write_text(SSHD.format(folder=self.folder, name=name))
            command = [
                "ip",
                "netns",
                "exec",
                name,
                "/usr/sbin/sshd",
                "-D",
                "-f",
                str(self.folder / f"sshd-{name}"),
            ]
            self.daemons.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))

        until(
            lambda: all(self.reaches(address) for address in self.addresses),
            "both answer by ssh",
            seconds=20,
        )

    def reaches(self, address):
        command = [
            "ip",
            "netns",
            "exec",
            self.names[0],
            str(self.folder / "bin" / "ssh"),
            address,
            "true",
        ]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def start(self, *command):
        """Start a process on the first machine; its output and its children's are in `log()`."""
        words = ["ip", "netns", "exec", self.names[0], *map(str, command)]

        with open(self.folder / "log", "w") as log:
            return subprocess.Popen(
                words,
                cwd=ROOT,
                env=self.environment,
                start_new_session=True,
                stdout=log,
                stderr=log,
            )

    def log(self):
        """Return what the latest process has printed."""
        return (self.folder / "log").read_text()

    def deepspeed(self, *flags):
        """Start the launcher on the first machine, with a hostfile of both."""
        return self.start(
            "deepspeed",
            "--log_level",
            "error",
            "--hostfile",
            self.folder / "hostfile",
            "--master_addr",
            self.addresses[0],
            "--master_port",
            free_ports(1)[0],
            "launchers/pretrain.sh",
            *flags,
        )

    def ranks(self):
        """Return the process ids of the ranks on both machines."""
        pids = [
            p
            for n in self.names
            for p in subprocess.run(
                ["ip", "netns", "pids", n], capture_output=True, text=True, check=True
            ).stdout.split()
        ]
        return [pid for pid in pids if "RANK" in environment(pid)]

    def pull_the_cable(self):
        """Cut the connection, without an error on either side."""
        _run("ip", "-n", self.names[1], "link", "set", "cable", "down")

    def __exit__(self, *_):
        for name in self.names:
            for pid in subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
            ).stdout.split():
                subprocess.run(["kill", "-9", pid], capture_output=True, check=False)

            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

        for daemon in self.daemons:
            daemon.wait(10)


def _run(*command):
    subprocess.run([str(c) for c in command], check=True, capture_output=True)
