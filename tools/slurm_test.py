"""A run as jobs of a real SLURM on this machine, with a job and then a whole node killed in the middle.

``python tools/slurm_test.py`` (or `make test-slurm`) starts munge, a controller and two nodes of one core from a
configuration of its own, in a temporary folder; runs a profile once on this machine and once through SLURM, sharded;
and checks that the results are the same bytes, that each unit was computed once, and that no unit is missing.

Needs Debian's or Ubuntu's packages slurm-wlm and munge, and the right to start them (root).
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
RESULTS = [
    *("embedded.h5ad", "sae.safetensors", "activations.h5ad", "concepts.h5ad", "drivers.parquet"),
    *("attributions.parquet", "curve_areas.parquet", "curves.parquet", "quadrants.parquet"),
]
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdTimeout=10
MinJobAge=3600
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=1 RealMemory=1000000 Gres=gpu:1
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


class Slurm:
    """Controller, two nodes (each with a GPU in name) and munge, in one folder; stopped at the end of a ``with``."""

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, {}
        port = free_port()
        config = CONFIG.format(host=socket.gethostname(), folder=folder, port=port, first=port + 1, last=port + 2)
        (folder / "slurm.conf").write_text(config)
        (folder / "gres.conf").write_text("NodeName=node[0-1] Name=gpu File=/dev/null\n")
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        for name in ("state", "node0", "node1"):
            (folder / name).mkdir()
        (folder / "bin").mkdir()
        for name in ("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun"):  # jobs lose SLURM_CONF on the way
            command = folder / "bin" / name
            command.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which(name)} "$@"\n')
            command.chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}

    def start(self, name: str, *command) -> None:
        log = open(self.folder / f"{name}.log", "w")
        self.daemons[name] = subprocess.Popen(
            list(map(str, command)), env=self.environment, stdout=log, stderr=subprocess.STDOUT
        )

    def __enter__(self):
        at, conf = self.folder, self.folder / "slurm.conf"
        self.start(
            *("munge", "munged", "--foreground", "--force", "--key-file", at / "munge.key"),
            *("--socket", at / "munge.socket", "--pid-file", at / "munged.pid"),
            *("--log-file", at / "munged.txt", "--seed-file", at / "munged.seed"),
        )
        time.sleep(1)
        self.start("controller", "slurmctld", "-D", "-f", conf)
        for node in ("node0", "node1"):
            self.start(node, "slurmd", "-D", "-N", node, "-f", conf)
        for _ in range(60):
            time.sleep(1)
            states = subprocess.run(
                ["sinfo", "--noheader", "--Node", "--format=%T"], env=self.environment, capture_output=True, text=True
            ).stdout.split()
            if states == ["idle", "idle"]:
                return self
        self.__exit__()
        sys.exit(f"SLURM did not start (nodes: {states}); see the logs in {at}")

    def kill_node(self, node: str) -> None:
        """As when a machine goes down: its daemon, and all that runs there for SLURM."""
        self.daemons[node].kill()
        jobs = subprocess.run(
            ["squeue", "--noheader", f"--nodelist={node}", "--format=%i"],
            env=self.environment, capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command, variables = ((process / name).read_text().split("\0") for name in ("cmdline", "environ"))
                step = any(command[0].startswith(f"slurmstepd: [{job}.") for job in jobs)
                there = f"SLURMD_NODENAME={node}" in variables and str(self.folder) in "".join(variables)
                if step or there:
                    os.kill(int(process.name), signal.SIGKILL)
            except (OSError, UnicodeDecodeError):
                continue

    def __exit__(self, *error) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.environment, timeout=30)
        for daemon in self.daemons.values():
            if daemon.poll() is None:
                daemon.terminate()
                daemon.wait(30)


def slurm_version() -> str:
    return subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=True).stdout.split()[-1]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def copy_project(folder: Path) -> Path:
    """The files of the repository, so that the runs lie outside of it."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def snakemake(project: Path, target: str, *arguments, environment=os.environ) -> subprocess.Popen:
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--quiet", "all", *arguments, "threads=1"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.Popen(
        [*command, "--", target],
        cwd=project,
        env={**environment, "PATH": path, "PYTHONPATH": str(project)},
        stdout=open(project / "snakemake.log", "w"),
        stderr=subprocess.STDOUT,
    )


def units(run: Path) -> Counter:
    """How often each unit of work was computed."""
    logs = [*run.glob("embedding/*/work.log"), *run.glob("attribution/*/work.log")]
    return Counter(line.split("\t")[0] for log in logs for line in log.read_text().splitlines())


def workers(project: Path, stage: str) -> dict[int, tuple[int, str]]:
    """Process ids of the jobs of a stage that run now: (part, node)."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
            if words[1:3] == ["-m", "scsae_utils.jobs"] and stage in words and (process / "cwd").resolve() == project:
                environment = dict(e.split("=", 1) for e in (process / "environ").read_text().split("\0") if "=" in e)
                found[int(process.name)] = int(words[words.index("--part") + 1]), environment["SLURMD_NODENAME"]
        except (OSError, ValueError, KeyError):
            continue
    return found


def in_the_middle(running: subprocess.Popen, project: Path, run: Path, stage: str, expected: list, of: int, node=None):
    """Wait for a job that has finished some of its units, but not all; its process id, part and node."""
    while running.poll() is None:
        for process, (part, where) in workers(project, stage).items():
            mine = {f"{stage}-{i:05d}" for i in range(part, len(expected), of)}
            done = len(mine & set(units(run)))
            if 0 < done < len(mine) and node in (None, where):
                return process, part, where
        time.sleep(0.02)
    sys.exit(f"no job of stage {stage} was met in the middle: too few units, or they were too quick")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", type=Path, default=ROOT / "tests" / "tiny.yaml")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--keep", action="store_true", help="keep the result in benchmarks/results")
    args = parser.parse_args()
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        sys.exit(f"missing: {', '.join(missing) or 'the rights of root'} (apt-get install slurm-wlm munge; sudo)")

    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        base = Path(name).resolve()
        base.chmod(0o755)  # munge's socket must be within reach
        (base / "slurm").mkdir()
        profile = yaml.safe_load(args.profile.read_text())
        profile["embedding"]["device"] = "auto"  # so that jobs ask for a GPU; without one, auto is the CPU
        if args.profile.stem == "tiny":  # more units than one for each job
            profile["embedding"]["block_cells"] = 64
            profile["drivers"] |= {"n_concepts": 8, "n_prototypes": 20}
        (base / "test.yaml").write_text(yaml.safe_dump(profile, sort_keys=False))
        config, target = f"profile={base / 'test.yaml'}", "runs/test/drivers.parquet"
        here, there = copy_project(base / "local"), copy_project(base / "cluster")

        say("on this machine, without shards")
        start = time.perf_counter()
        if snakemake(here, target, "--workflow-profile", "cluster/local", "--config", config).wait():
            sys.exit((here / "snakemake.log").read_text()[-4000:])
        local = units(here / "runs" / "test")
        rows = [{"run": "on one machine", "seconds": round(time.perf_counter() - start), "units": sum(local.values())}]
        say(f"done in {rows[0]['seconds']} s: {sum(local.values())} units")

        with Slurm(base / "slurm") as slurm:
            say(f"through SLURM, {args.shards} shards on two nodes")
            start, run = time.perf_counter(), there / "runs" / "test"
            running = snakemake(
                there, target, "--workflow-profile", "cluster/slurm",
                *("--slurm-init-seconds-before-status-checks", "1", "--seconds-between-status-checks", "2"),
                *("--slurm-status-command", "squeue", "--slurm-no-account", "--latency-wait", "5"),
                *("--config", config, f"shards={args.shards}"),
                environment=slurm.environment,
            )  # fmt: skip
            blocks, screens = ([u for u in local if u.startswith(s)] for s in ("block", "screen"))
            process, part, node = in_the_middle(running, there, run, "block", blocks, args.shards)
            os.kill(process, signal.SIGKILL)
            say(f"killed the job of part {part} of the embedding on {node}")
            process, part, node = in_the_middle(running, there, run, "screen", screens, args.shards, "node1")
            slurm.kill_node(node)
            say(f"killed {node}, daemon and all, which was at part {part} of the attributions")
            failed = running.wait()
            said = (there / "snakemake.log").read_text()
            if failed:
                sys.exit(said[-6000:])
            seconds = round(time.perf_counter() - start)
            rows.append({"run": f"SLURM, {args.shards} shards, two nodes", "seconds": seconds})
            say(f"done in {seconds} s")
            history = subprocess.run(
                ["squeue", "--states=all", "--noheader", "--Format=JobID:9,State:15,NodeList:9,tres-per-job:30"],
                env=slurm.environment, capture_output=True, text=True, check=True,
            ).stdout.splitlines()  # fmt: skip
        states = Counter(line.split()[1] for line in history)
        asked = sum("gpu" in line for line in history)
        jobs = ", ".join(f"{n} {state}" for state, n in states.items())
        say(f"{len(history)} jobs of SLURM ({jobs}), {asked} of which asked for a GPU")

        sharded = units(run)
        different = [r for r in RESULTS if not filecmp.cmp(here / "runs/test" / r, run / r, shallow=False)]
        problems = [
            *(f"{name} differs from the local run" for name in different),
            *(f"{unit} was computed {n} times" for unit, n in sharded.items() if n > 1),
            *(f"{unit} was computed in one of the runs only" for unit in set(local) ^ set(sharded)),
            *(["the node's failure was not noticed"] if "NODE_FAIL" not in states else []),
        ]
        if problems:
            kept = Path(tempfile.mkdtemp(prefix="slurm-failed-"))
            shutil.copytree(
                base, kept, dirs_exist_ok=True, ignore=lambda folder, names: [n for n in names if "socket" in n]
            )
            sys.exit("\n".join([*problems, f"all files: {kept}"]))
        say(
            f"{len(RESULTS)} result files are those of the local run, byte for byte; "
            f"{len(sharded)} units, each computed once"
        )
        if args.keep:
            sys.path.insert(0, str(ROOT / "benchmarks"))
            from record import keep, versions

            rows[1] |= {"units": sum(sharded.values()), "jobs": jobs, "jobs that asked for a GPU": asked}
            twice = sum(n > 1 for n in sharded.values())
            figures = {"files_compared": len(RESULTS), "files_that_differ": len(different), "units_done_twice": twice}
            profile = {"profile": args.profile.stem, "killed": "a job of the embedding, a node in the attributions"}
            about = versions("snakemake", "snakemake-executor-plugin-slurm") | {"slurm": slurm_version()}
            keep("slurm", rows, profile | figures, about)


if __name__ == "__main__":
    main()
