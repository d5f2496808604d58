"""A Slurm of one node, on this machine, without systemd or root's files."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")

_CONF = """\
ClusterName=test
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=20
MinJobAge=3600
NodeName=localhost CPUs=2 State=UNKNOWN
PartitionName=test Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""

# without slurmdbd there is no accounting, from which submitit learns of cancelled tasks
_SACCT = """\
#!/bin/sh
ids=""
while [ $# -gt 0 ]; do
  case "$1" in -j) ids="$ids,$2"; shift ;; esac
  shift
done
echo "JobID|State|NodeList"
exec squeue -h -r -t all -j "${ids#,}" -o "%i|%T|%N"
"""


@dataclass(frozen=True)
class Cluster:
    """A running Slurm."""

    env: dict[str, str]  # for commands that talk to it

    def tasks(self) -> dict[str, str]:
        """Array task, such as `3_1` -> state, ended ones included."""
        lines = self._run("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T").splitlines()
        return dict(line.split("|") for line in lines)

    def cancel(self, task: str) -> None:
        """Cancel a task, as a user does."""
        self._run("scancel", task)

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.env, check=True, capture_output=True, text=True, timeout=30
        )
        return done.stdout


def missing() -> str:
    """Why no Slurm can be started here; empty if one can."""
    lacking = [name for name in PROGRAMS if _which(name) is None]
    if lacking:
        return f"Slurm is not installed ({', '.join(lacking)}): apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "only root can start slurmd"
    return ""


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """A Slurm whose files all lie in `folder`."""
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    conf = folder / "slurm.conf"
    ports = _free_ports(2)
    conf.write_text(_CONF.format(folder=folder, controller_port=ports[0], node_port=ports[1]))
    sacct = folder / "bin" / "sacct"
    sacct.write_text(_SACCT)
    sacct.chmod(0o755)
    env = {
        **os.environ,
        "SLURM_CONF": str(conf),
        "PATH": f"{sacct.parent}{os.pathsep}{os.environ['PATH']}{os.pathsep}/usr/sbin",
    }
    env.pop("SLURM_JOB_ID", None)
    _start_munge(folder)
    try:
        for command in (["slurmctld", "-c"], ["slurmd", "-N", "localhost"]):
            program = _which(command[0])
            assert program is not None
            subprocess.run([program, *command[1:]], env=env, check=True, timeout=30)
        _wait_for_node(env)
        yield Cluster(env)
    finally:
        for name in ("slurmd", "slurmctld", "munged"):
            _stop(folder / f"{name}.pid")


def _start_munge(folder: Path) -> None:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    program = _which("munged")
    assert program is not None
    subprocess.run(
        [
            program,
            "--force",  # the folder's owner is not munge's user
            f"--key-file={key}",
            f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/munged.seed",
        ],
        check=True,
        capture_output=True,
        timeout=30,
    )


def _wait_for_node(env: dict[str, str]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        done = subprocess.run(
            ["sinfo", "-h", "-o", "%T"], env=env, capture_output=True, text=True, timeout=30
        )
        if done.stdout.strip() == "idle":
            return
        time.sleep(0.2)
    raise TimeoutError("the node did not become idle in 30 s; see slurmctld.log and slurmd.log")


def _stop(pid_file: Path) -> None:
    with suppress(FileNotFoundError, ProcessLookupError, ValueError):
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        for _ in range(50):
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
