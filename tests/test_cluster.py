"""Snakemake's profiles for clusters: they are understood, and jobs ask for what they need.

A real SLURM is tested by tools/slurm_test.py. Of Kubernetes there is a stand-in for kubectl only, which runs each Job's
command on this machine.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scsae_utils.book import ROOT

KUBECTL = """#!{python}
import json, subprocess, sys
from pathlib import Path
here = Path(__file__).parent
if sys.argv[1] == "create":
    name = f"job.batch/scsae-{{len(list(here.glob('*.json')))}}"
    job = json.load(sys.stdin)
    (here / (name.split("/")[1] + ".json")).write_text(json.dumps(job))
    done = subprocess.run(job["spec"]["template"]["spec"]["containers"][0]["command"]).returncode
    (here / name.split("/")[1]).write_text("failed" if done else "succeeded")
    print(name)
elif sys.argv[1] == "get":
    path = here / sys.argv[2].split("/")[1]
    if not path.is_file():
        sys.exit("Error from server (NotFound)")
    print(json.dumps({{"status": {{path.read_text(): 1}}}}))
"""
SNAKEFILE = """
rule gpu:
    output: "gpu.txt"
    threads: workflow.cores
    resources: gpu=1, mem_mb=lambda wildcards, attempt: 500 * attempt
    shell: "test -e again || {{ touch again; exit 1; }}; echo {threads} > {output}"
"""


def snakemake(folder, *arguments, **environment):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "2", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, **environment},
    )


def installed(cluster):
    package = {"slurm": "slurm", "kubernetes": "cluster_generic"}.get(cluster)
    return package is None or importlib.util.find_spec(f"snakemake_executor_plugin_{package}")


@pytest.mark.parametrize("cluster", ["local", "slurm", "kubernetes"])
def test_the_run_is_planned_in_parts_that_ask_for_a_gpu(tmp_path, cluster):
    if not installed(cluster):
        pytest.skip(f"the plugin for {cluster} is not installed (the extra 'cluster')")
    profile = yaml.safe_load((ROOT / "tests" / "tiny.yaml").read_text())
    profile["embedding"]["device"] = "auto"
    (tmp_path / "parts.yaml").write_text(yaml.safe_dump(profile, sort_keys=False))
    config = ["--config", f"profile={tmp_path / 'parts.yaml'}", "shards=3"]
    result = snakemake(ROOT, "--dry-run", *config, "--workflow-profile", f"cluster/{cluster}", "--", "book")
    assert result.returncode == 0, result.stderr
    jobs = [block for block in (result.stdout + result.stderr).split("\nrule ")[1:]]
    names = [block.split(":")[0] for block in jobs]
    assert names.count("shard_cells") == 1 and names.count("shard_embedding") == 3
    assert names.count("shard_attribution") == 6  # screened, then confirmed
    asks = {name for name, block in zip(names, jobs) if "gpu=1" in block.split("resources:")[1].split("\n")[0]}
    assert set(names) - asks == {"ten_cells", "shard_cells", "atlas", "book"}


def test_without_shards_there_are_no_such_jobs():
    result = snakemake(ROOT, "--dry-run", "--quiet", "rules", "--config", "profile=tests/tiny.yaml", "--", "book")
    assert result.returncode == 0 and "shard_" not in result.stdout + result.stderr


@pytest.mark.skipif(not installed("kubernetes"), reason="the extra 'cluster' is not installed")
def test_jobs_of_kubernetes(tmp_path):
    """Each rule is a Job that asks for what the rule does; one that fails is made again, with more."""
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    (tmp_path / "cluster").symlink_to(ROOT / "cluster")
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "kubectl").write_text(KUBECTL.format(python=sys.executable))
    (bin / "kubectl").chmod(0o755)
    path = f"{bin}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quick = ["--seconds-between-status-checks", "0", "--latency-wait", "1"]
    result = snakemake(tmp_path, "--workflow-profile", "cluster/kubernetes", *quick, PATH=path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "gpu.txt").read_text() == "2\n"
    first, again = [json.loads((bin / f"scsae-{i}.json").read_text())["spec"] for i in range(2)]
    assert not (bin / "scsae-2.json").exists()
    for job, memory, minutes in ((first, 500, 480), (again, 1000, 960)):
        pod = job["template"]["spec"]
        assert pod["containers"][0]["resources"]["limits"] == {"memory": f"{memory}M", "nvidia.com/gpu": "1"}
        assert pod["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "scsae"}}]
        assert pod["securityContext"]["runAsUser"] == os.getuid() and job["activeDeadlineSeconds"] == 60 * minutes
