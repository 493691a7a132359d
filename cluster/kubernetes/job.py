"""Jobs of Snakemake as Jobs of Kubernetes, made, asked about and deleted with kubectl; see config.yaml."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path


def manifest(args: argparse.Namespace) -> dict:
    """The Job: one pod that runs Snakemake's script once; Snakemake itself tries again."""
    need = {"cpu": args.cpus, "memory": f"{args.memory_mb}M"} | ({args.gpu_type: args.gpus} if args.gpus else {})
    need = {name: str(amount) for name, amount in need.items()}
    container = {
        "name": "job",
        "image": args.image,
        "command": ["sh", str(Path(args.script).resolve())],
        "workingDir": os.getcwd(),
        "env": [{"name": "PATH", "value": os.environ["PATH"]}, {"name": "HOME", "value": "/tmp"}],
        "resources": {"requests": need, "limits": {name: n for name, n in need.items() if name != "cpu"}},
        "volumeMounts": [{"name": "shared", "mountPath": args.mount}],
    }
    pod = {
        "restartPolicy": "Never",
        "securityContext": {"runAsUser": os.getuid(), "runAsGroup": os.getgid()},
        "containers": [container],
        "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": args.claim}}],
    }
    life = {"backoffLimit": 0, "activeDeadlineSeconds": 60 * args.minutes, "ttlSecondsAfterFinished": 86400}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"generateName": "scsae-", "labels": {"app": "scsae"}},
        "spec": {**life, "template": {"spec": pod}},
    }


def kubectl(*words: str, given: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(["kubectl", *words], input=given, capture_output=True, text=True)


def status(name: str) -> str:
    """``success``, ``failed`` or ``running``, in Snakemake's words; a cluster that does not answer may still run it."""
    answer = kubectl("get", name, "--output=json")
    if answer.returncode:
        return "failed" if "NotFound" in answer.stderr else "running"
    known = json.loads(answer.stdout).get("status", {})
    return "success" if known.get("succeeded") else "failed" if known.get("failed") else "running"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("submit")
    for name in ("cpus", "memory-mb", "minutes", "gpus"):
        p.add_argument(f"--{name}", type=int, required=True)
    for name in ("gpu-type", "image", "claim", "mount"):
        p.add_argument(f"--{name}", required=True)
    p.add_argument("script")
    commands.add_parser("status").add_argument("name")
    commands.add_parser("cancel").add_argument("names", nargs="+")
    args = parser.parse_args()
    if args.command == "submit":
        made = kubectl("create", "--filename=-", "--output=name", given=json.dumps(manifest(args)))
        if made.returncode:
            sys.exit(f"kubectl could not create the job: {made.stderr.strip()}")
        sys.stdout.write(made.stdout)
    elif args.command == "status":
        sys.stdout.write(status(args.name) + "\n")
    else:
        kubectl("delete", "--wait=false", "--ignore-not-found", *args.names)


if __name__ == "__main__":
    main()
