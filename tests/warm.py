"""Start processes of the package's modules and tools at once instead of in seconds.

They are forked by Python's fork server, which has imported everything that a run imports; they have
their own pid, session, pipes, signals and exit code, as after `python -m MODULE` and `python
SCRIPT`. What users type is tested cold: tests/test_launch.py, test_slurm.py, test_hostfile.py,
tools/test_help.py.
"""

import atexit
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
from multiprocessing import forkserver
from multiprocessing.reduction import DupFd
from pathlib import Path
from unittest import mock

from megatron_interbert.signals import signal_at_parents_death

ROOT = Path(__file__).resolve().parents[1]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.warm_imports"])


def start_server():
    """Start the fork server unless it runs, with settings that libraries read when imported.

    PYTHONPATH is set because the first test to call this may have changed its folder: a server that
    cannot import its modules does not report it, and each of its processes then imports torch
    itself.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with mock.patch.dict(os.environ, settings):
        forkserver.ensure_running()


class WarmProcess:
    """Run `python SCRIPT ..` or `python -m MODULE ..`, with stdout and stderr captured.

    It offers the part of subprocess.Popen that tests use.
    """

    def __init__(self, arguments, environment, folder, files=None):
        self.lines = {"stdout": [], "stderr": []}  # what has been printed so far
        ends = {name: os.pipe() for name in self.lines}
        theirs = {name: end for name, (_, end) in ends.items()}
        here = _Start(arguments, environment, folder, files, theirs)
        self._process = _context.Process(target=here)
        start_server()
        self._process.start()
        atexit.register(self.kill)  # a failing test must not leave an endless run
        self.pid = self._process.pid
        self.args = ["python", *arguments]
        self._readers = []

        for name, (ours, theirs) in ends.items():
            os.close(theirs)
            reader = threading.Thread(target=self._read, args=(ours, self.lines[name]), daemon=True)
            reader.start()
            self._readers.append(reader)

    @staticmethod
    def _read(end, text):
        with open(end, errors="replace") as lines:
            text.extend(lines)

    @property
    def returncode(self):
        """Return None while it runs, a negative number if a signal killed it."""
        return self._process.exitcode

    def so_far(self):
        """Return what it has printed to stdout."""
        return "".join(self.lines["stdout"])

    def poll(self):
        """Work as Popen.poll does."""
        return self.returncode

    def wait(self, timeout=None):
        """Work as Popen.wait does."""
        self._process.join(timeout)

        if self.returncode is None:
            raise subprocess.TimeoutExpired(
                self.args, timeout, self.so_far(), "".join(self.lines["stderr"])
            )

        # otherwise this object and its pipes would live to the end of all tests
        atexit.unregister(self.kill)

        return self.returncode

    def communicate(self, timeout=None):
        """Work as Popen.communicate does, but do not wait for children that hold the pipes open."""
        self.wait(timeout)
        for reader in self._readers:
            reader.join(5)
        return self.so_far(), "".join(self.lines["stderr"])

    def send_signal(self, number):
        """Work as Popen.send_signal does."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self):
        """Work as Popen.terminate does."""
        self.send_signal(signal.SIGTERM)

    def kill(self):
        """Work as Popen.kill does."""
        self.send_signal(signal.SIGKILL)


class _Start:
    """Turn the new process into what `python` would have started."""

    def __init__(self, arguments, environment, folder, files, ends):
        self.arguments = arguments
        self.environment = environment
        self.folder = folder
        self.files = files
        self.ends = ends

    def __getstate__(self):
        return {**self.__dict__, "ends": {name: DupFd(end) for name, end in self.ends.items()}}

    def __call__(self):
        assert "tests.warm_imports" in sys.modules, (
            "the fork server has not imported what runs need"
        )
        os.setsid()
        # The fork server ends with the tests, however they end, unless another process keeps this
        # pipe to it open; and this process ends with the server.
        os.close(forkserver._forkserver._forkserver_alive_fd)
        signal_at_parents_death(signal.SIGKILL)
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environment)
        for number, name in enumerate(("stdout", "stderr"), 1):
            os.dup2(self.ends[name].detach(), number)

        sys.stdout = open(1, "w", closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        if self.files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (self.files, self.files))

        signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the package sets it when a command starts
        atexit._clear()  # of the server; forked processes skip their own at the end

        try:
            if self.arguments[0] == "-m":
                self.run_module(*self.arguments[1:])
            else:
                self.run_script(*self.arguments)
        finally:
            atexit._run_exitfuncs()

    @staticmethod
    def run_module(module, *arguments):
        """Run a module as `python -m` does."""
        sys.modules.pop(module, None)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    @staticmethod
    def run_script(script, *arguments):
        """Run a script as `python SCRIPT` does."""
        sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
