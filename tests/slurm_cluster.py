"""A real Slurm cluster on this machine, as root: munged, slurmctld, four slurmd with four fake GPUs each.

    with SlurmCluster() as cluster:
        job = cluster.submit("--nodes=2", "--wrap", "srun hostname")
        cluster.wait_for(job, "COMPLETED")

Everything has its own ports, keys and files in a temporary folder, and ends with the test process however that ends:
see `slurm_keeper.py`. Daemons are Debian's (22.05); a missing one is an error, never a skip.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from slurm_conf import NODES, SETTINGS, free_ports, write_files

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
WAVEFLEET = [sys.executable, "-m", "launch.cli"]
ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 300.0  # a loaded machine; a free one needs half a second to start, and seconds for a job
_NOISE = r"mpi/|MPI:|Unauthorized credential|Node configuration differs"
_UNUSABLE = ("DOWN", "DRAIN", "FAIL")
_SAVE_S = 6.0  # slurmctld saves what has changed within 5 s


class SlurmCluster:
    """Four nodes, two partitions (`urgent` preempts `batch`, the default); a context manager.

    `proctrack` says whom a signal reaches: "linuxproc" the whole process tree of a task; "pgid" its process group, so
    that a child in a session of its own never sees it, as on a site with cgroups. Those are no choice here: clusters
    that run at the same time would share them. `accounting` adds slurmdbd on a MariaDB, for sacct. `grace_s` is
    `batch`'s GraceTime. Other settings replace lines of slurm.conf.
    """

    def __init__(self, *, proctrack: str = "linuxproc", accounting: bool = False, grace_s: int = 0, **settings: str):
        self.accounting, self.grace_s = accounting, grace_s
        self.settings = {**SETTINGS, "ProctrackType": f"proctrack/{proctrack}", **settings}
        self.environ: dict[str, str] = {}
        self.folder: Path = Path()

    # Life

    def __enter__(self) -> "SlurmCluster":
        self._check_programs()
        # munged wants a short path, in folders that nobody else can write
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self._file("home").mkdir()  # where what is learned of a cluster is kept, unless a profile says otherwise
        self.environ = {
            **outside,
            "HOME": str(self._file("home")),
            "PATH": f"{outside.get('PATH', '')}:{PATH}",
            "SLURM_CONF": str(self._file("slurm.conf")),
        }
        self._keeper = subprocess.Popen(
            [sys.executable, "-S", Path(__file__).with_name("slurm_keeper.py"), self.folder, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        with contextlib.suppress(BrokenPipeError), self._keeper as keeper:  # it is gone where somebody killed it
            keeper.stdin.write(b'{"verb": "end"}\n')
            keeper.stdin.flush()
        shutil.rmtree(self.folder, ignore_errors=True)  # as the keeper did, unless it was killed

    def _start(self) -> None:
        names = ("slurmctld", "slurmdbd", *NODES)
        self._ports = dict(zip(names, free_ports(len(names)), strict=True))
        self._write_files()
        munge_socket = self._file("munge/socket")
        self._order(
            "start", "munged", "munged", "--foreground", "--num-threads=4", f"--socket={munge_socket}",
            *(f"--{name}-file={self._file('munge', name)}" for name in ("key", "log", "pid", "seed")),
        )  # fmt: skip
        self._until(munge_socket.exists, "munged has no socket")
        if self.accounting:
            self._start_accounting()
        self._start_controller()
        for node in NODES:
            self._start_node(node)
        self._until(lambda: self.node_states() == dict.fromkeys(NODES, "IDLE"), "the nodes are not idle")
        self._num_daemons = len(self.processes())

    def _start_accounting(self) -> None:
        data = self._file("mariadb")
        data.mkdir()
        shutil.chown(data, "nobody", "nogroup")
        options = ["--no-defaults", "--user=nobody", f"--datadir={data}", "--innodb-log-file-size=8M"]
        tables = Path("/usr/share/mysql/mysql_system_tables.sql").read_text(encoding="utf-8")
        self._checked("mariadbd", *options, "--bootstrap", text=f"CREATE DATABASE mysql;\nUSE mysql;\n{tables}")
        self._order(
            "start", "mariadbd", "mariadbd", *options, f"--socket={data}/socket", "--skip-networking",
            "--skip-grant-tables", "--innodb-flush-log-at-trx-commit=0",
        )  # fmt: skip
        self._until((data / "socket").exists, "mariadbd has no socket")
        self._order("start", "slurmdbd", "slurmdbd", "-D", MYSQL_UNIX_PORT=f"{data}/socket")
        self._until(
            lambda: self._call("sacctmgr", "-n", "show", "cluster").returncode == 0,
            lambda: f"slurmdbd does not answer: {self._call('sacctmgr', '-n', 'show', 'cluster').stderr}",
        )
        self.run("sacctmgr", "-i", "add", "cluster", self.settings["ClusterName"])
        self.run("sacctmgr", "-i", "add", "account", "speech")
        self.run("sacctmgr", "-i", "add", "user", "root", "account=speech", "AdminLevel=Admin")

    # Use

    def run(self, *command: str, timeout: float = WAIT_S) -> str:
        """The output of a Slurm command; `CommandError` with its message when it fails."""
        return self._checked(*command, timeout=timeout)

    def wavefleet(
        self, *arguments: object, code: int = 0, cwd: Path = ROOT, environ: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess:
        """What our own command prints and says on this cluster; fails where it ends with another code."""
        environ = {**self.environ, "PYTHONPATH": str(ROOT), **(environ or {})}
        done = subprocess.run(
            [*WAVEFLEET, *map(str, arguments)], env=environ, cwd=cwd, capture_output=True, text=True, timeout=WAIT_S,
            check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done

    def submit(self, *arguments: str) -> str:
        """The id of a new batch job; output goes to `output(job)` unless the arguments name another."""
        jobs = self._file("jobs")
        where = (f"--chdir={jobs}", f"--output={jobs}/%j.out", "--open-mode=append")
        return self.run("sbatch", "--parsable", *where, *arguments).strip()

    def output(self, job: str) -> str:
        """What a job of `submit` has printed; nothing before it starts."""
        path = self._file("jobs", f"{job}.out")
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def jobs(self) -> dict[str, dict[str, str]]:
        """Each known job's fields as `scontrol show job` names them: JobState, Reason, NodeList, Restarts, ..."""
        lines = self.run("scontrol", "--oneliner", "show", "job").splitlines()
        jobs = (dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines if line.startswith("JobId="))
        return {job["JobId"]: job for job in jobs}

    def job(self, job: str) -> dict[str, str]:
        """One job's fields."""
        return self.jobs()[job]

    def wait_for(self, job: str, state: str, *, restarts: int = 0, timeout: float = WAIT_S) -> dict[str, str]:
        """The job's fields once it is in that state, and was requeued that often at least."""

        def there() -> bool:
            fields.update(self.jobs().get(job, {}))
            return fields.get("JobState") == state and int(fields["Restarts"]) >= restarts

        fields: dict[str, str] = {}
        self._until(there, lambda: f"job {job} is not {state} but {fields}", timeout)
        return fields

    def wait_for_output(self, job: str, text: str, *, timeout: float = WAIT_S) -> str:
        """The job's output once it contains a text."""
        self._until(lambda: text in self.output(job), lambda: f"no {text!r} in {self.output(job)!r}", timeout)
        return self.output(job)

    def cancel_all(self) -> None:
        """Cancel every job, and wait until the nodes are free."""
        self.run("scancel", "--user=root")
        self._until(lambda: not self.run("squeue", "--noheader").strip(), lambda: self.run("squeue"))

    # Harm

    def node_states(self) -> dict[str, str]:
        """Each node's state as sinfo writes it: IDLE, MIXED, ALLOCATED, DOWN, DOWN*, DRAINED, ..."""
        done = self._call("sinfo", "--Node", "--noheader", "--format=%N %T")
        return {name: state.upper() for name, state in map(str.split, sorted(set(done.stdout.splitlines())))}

    def node_down(self, node: str) -> None:
        """Switch a node off: all its processes end at once, and the controller is told."""
        self.cut_node(node)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def cut_node(self, node: str) -> None:
        """Switch a node off and tell nobody: the controller notices after SlurmdTimeout."""
        self._order("stop", node)

    def node_up(self, node: str) -> None:
        """Switch a node on again, and wait until it takes jobs."""
        self._order("stop", node)
        self._start_node(node)
        if self.node_states()[node].startswith(_UNUSABLE):
            try:
                self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
            except CommandError as error:  # it is back in service by itself already
                if "Invalid node state" not in str(error):
                    raise
        self._until(lambda: self.node_states()[node] == "IDLE", lambda: f"{node} is {self.node_states()[node]}")

    def kill_controller(self) -> None:
        """SIGKILL slurmctld, once it has saved what happened until now; jobs go on."""
        time.sleep(_SAVE_S)
        self._order("stop", "slurmctld")

    def start_controller(self) -> None:
        """Start slurmctld with the state that it last saved, and wait until it knows of the nodes."""
        self._start_controller()
        self._until(lambda: "UNKNOWN" not in self.node_states().values(), lambda: f"nodes: {self.node_states()}")

    def end_soon(self, job: str, seconds: int) -> None:
        """Let a running job's time limit be in so many seconds; the check comes up to 30 s later."""
        end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))
        self.run("scontrol", "update", f"JobId={job}", f"EndTime={end}")

    def restore(self) -> None:
        """What the next test needs: the controller and all nodes up, none excluded, no jobs, and no process of them."""
        shutil.rmtree(self._file("home", ".wavefleet"), ignore_errors=True)
        if "UP" not in self._call("scontrol", "ping").stdout:
            self.start_controller()
        self.run("scancel", "--user=root")
        for node, state in self.node_states().items():
            if state.startswith(_UNUSABLE):
                self.node_up(node)
        self.cancel_all()
        with contextlib.suppress(TimeoutError):  # the last steps' own ends
            self._until(lambda: len(self.processes()) <= self._num_daemons, "", timeout=2)
            return
        for node in NODES:  # somebody escaped, in a session of its own or orphaned
            self.node_up(node)

    def reconfigure(self, *, grace_s: int | None = None, **settings: str) -> None:
        """Replace lines of slurm.conf in the running cluster; not all take effect so (see `man slurm.conf`).

        What `scontrol update` has changed goes back to what slurm.conf says.
        """
        self.settings.update(settings)
        self.grace_s = self.grace_s if grace_s is None else grace_s
        self._write_files()
        self.run("scontrol", "reconfigure")

    def processes(self) -> list[int]:
        """All living processes of the cluster: daemons, and what jobs have started."""
        return self._order("list")

    # Inside

    def _file(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def _write_files(self) -> None:
        write_files(self.folder, self._ports, self.settings, grace_s=self.grace_s, accounting=self.accounting)

    def _start_controller(self) -> None:
        self._order("start", "slurmctld", "slurmctld", "-D")
        self._until(lambda: "UP" in self._call("scontrol", "ping").stdout, "slurmctld does not answer")

    def _start_node(self, node: str) -> None:
        self._order("start", node, "slurmd", "-D", "-N", node)

    def _order(self, verb: str, name: str = "", *argv: str, **environ: str) -> list[int]:
        order = {"verb": verb, "name": name}
        if verb == "start":
            # Nothing of a test's environment may reach jobs through the daemons.
            environ = {"PATH": PATH, "SLURM_CONF": self.environ["SLURM_CONF"], "LANG": "C.UTF-8", **environ}
            order |= {"argv": argv, "environ": environ, "log": str(self._file("logs", f"{name}.log"))}
        self._keeper.stdin.write(json.dumps(order).encode() + b"\n")
        self._keeper.stdin.flush()
        return json.loads(self._keeper.stdout.readline())["processes"]

    def _call(self, *command: str, text: str | None = None, timeout: float = WAIT_S) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, env=self.environ, input=text, capture_output=True, text=True, timeout=timeout, check=False
        )

    def _checked(self, *command: str, text: str | None = None, timeout: float = WAIT_S) -> str:
        done = self._call(*command, text=text, timeout=timeout)
        if done.returncode != 0:
            raise CommandError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def _until(self, condition, complaint, timeout: float = WAIT_S) -> None:
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                text = complaint() if callable(complaint) else complaint
                raise TimeoutError(f"after {timeout:g} s {text}\n{self._logs()}")
            time.sleep(0.1)

    def _logs(self) -> str:
        """The ends of all daemons' logs, without what they always say."""
        ends = []
        for path in sorted(self._file("logs").iterdir()):
            lines = path.read_text(errors="replace").splitlines()
            ends += [f"--- {path.stem}", *[line for line in lines if not re.search(_NOISE, line)][-15:]]
        return "\n".join(ends)

    def _check_programs(self) -> None:
        programs = ["munged", "slurmctld", "slurmd", "sbatch"] + ["slurmdbd", "mariadbd"] * self.accounting
        missing = [program for program in programs if shutil.which(program, path=PATH) is None]
        if missing:
            raise FileNotFoundError(f"{', '.join(missing)}: run `make test`, which installs the Debian packages")
        if os.getuid() != 0:
            raise PermissionError("a cluster for tests is started by root")


class CommandError(Exception):
    """A Slurm command that ended with an error; the text is its message."""
