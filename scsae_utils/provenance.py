"""How a run was made: with which code, packages, inputs and machine, each chapter and the whole."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import tomllib
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pooch.utils import unique_file_name

from .book import NAMED
from .files import checksum, files_of, whole

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ("*.h5ad", "*.safetensors", "*.parquet")


def machine() -> dict:
    """Processor, cores, threads, memory (GB), system and Python; the GPU, if there is one."""
    import torch

    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.M) if info.is_file() else []
    about = {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        about["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    return about | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def versions() -> dict[str, str]:
    """Installed versions of the packages that this project names."""
    project = ROOT / "pyproject.toml"
    named = tomllib.loads(project.read_text())["project"]["dependencies"] if project.is_file() else []
    found = {}
    for package in ["scsae-utils", *(re.match(r"[\w.-]+", text)[0] for text in named)]:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git(*words: str) -> str:
    """What git says of the repository; nothing where there is none."""
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def code_version() -> dict:
    """``commit`` of the repository, and the files that differ from it (``changed``)."""
    return {"commit": git("rev-parse", "HEAD"), "changed": git("diff", "--name-only", "HEAD").splitlines()}


def inputs(values: dict) -> dict[str, str]:
    """Checksums of the files, model folders and downloads that a chapter's parameters name.

    Cells and texts that travel in packages have none: their versions are those of the packages.
    """
    from .download import cache_folder

    found = {}
    for value in (values.get(name) for name in NAMED):
        if value == "scgpt-mini":
            value = "scsae_utils/data/scgpt-mini"
        if not isinstance(value, str):
            continue
        url = value.partition("#")[0] if "://" in value else None
        path = cache_folder() / unique_file_name(url) if url else ROOT / value
        files = files_of(path) if path.exists() else []
        found |= {value if file == path else f"{value}/{file.name}": checksum(file) for file in files}
    return found


def made_with(values: dict) -> dict:
    """What is kept in the metadata of an executed chapter with these parameters."""
    return {**code_version(), "machine": machine(), "versions": versions(), "inputs": inputs(values)}


def write_provenance(run: Path, chapters: list[Path]) -> Path:
    """Collect how the ``chapters`` (executed notebooks) of a run were made in its ``provenance.json``.

    Returns
    -------
    The file: ``date``, ``commit``, ``changed``, ``machine`` and ``versions`` of the moment; ``results``: SHA-256 of the
    run's files; ``chapters``: of each one ``parameters``, ``start``, ``seconds``, and its own ``commit``, ``changed``,
    ``machine``, ``versions`` and ``inputs`` (SHA-256).
    """
    about = {}
    for path in chapters:
        metadata = json.loads(path.read_text())["metadata"]
        job = metadata["papermill"]
        about[path.stem] = {
            "parameters": job["parameters"], "start": job["start_time"][:19], "seconds": round(job["duration"], 1),
            **metadata.get("provenance", {}),
        }  # fmt: skip
    results = sorted(p for pattern in RESULTS for p in run.glob(pattern))
    content = {
        "run": run.name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **code_version(),
        "machine": machine(),
        "versions": versions(),
        "results": {p.name: checksum(p) for p in results},
        "chapters": about,
    }
    path = run / "provenance.json"
    with whole(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")
    return path


def provenance_page(path: Path) -> str:
    """``provenance.json`` as a page of the book, in Markdown."""
    about = json.loads(path.read_text())

    def commit(known: dict) -> str:
        changed = f" and {len(known['changed'])} changed files" if known.get("changed") else ""
        return f"`{known['commit'][:12]}`{changed}" if known.get("commit") else "unknown"

    def hashes(known: dict) -> list[str]:
        return [
            "| file | SHA-256 |",
            "|---|---|",
            *(f"| `{name}` | `{digest[:16]}` |" for name, digest in known.items()),
        ]

    chapters = about["chapters"]
    others = sorted(
        f"{name} {number}"
        for name in chapters
        for name, number in chapters[name].get("versions", {}).items()
        if about["versions"].get(name) != number
    )
    lines = [
        "# How this book was made",
        "",
        f"From the run `{about['run']}`, on {about['date'][:10]}. All of this page, in full, and every parameter are",
        "in `provenance.json` in the folder of the run. Runs of the same parameters, code and packages on the same",
        "machine give the same files, byte for byte; a test of the project holds them to it. Another processor or",
        "number of threads may change the last digits, which training then carries further.",
        "",
        "| chapter | begun (UTC) | took (s) | code | machine |",
        "|---|---|---|---|---|",
    ]
    for name, known in chapters.items():
        of = known.get("machine", {})
        hardware = f"{of.get('gpu', of['processor'])}, {of['threads']} of {of['cores']} cores" if of else "unknown"
        start = known["start"].replace("T", " ")
        lines.append(f"| {name} | {start} | {known['seconds']:,.0f} | {commit(known)} | {hardware} |")
    used = {file: digest for known in chapters.values() for file, digest in known.get("inputs", {}).items()}
    of = about["machine"]
    hardware = f"{of['processor']}, {of['cores']} cores, {of.get('memory_gb', '?')} GB, {of['system']}"
    lines += [
        "",
        f"The book itself: {commit(about)}; {hardware}.",
        "",
        "## What went in",
        "",
        "Cells and texts that travel in packages are those of the packages' versions, below.",
        "",
        *hashes(used),
        "",
        "## What came out",
        "",
        *hashes(about["results"]),
        "",
        "## Packages",
        "",
        f"Python {of['python']}, " + ", ".join(f"{name} {number}" for name, number in about["versions"].items()) + ".",
    ]
    if others:
        lines.append(f"Some chapters were made with other versions: {', '.join(dict.fromkeys(others))}.")
    return "\n".join(lines) + "\n"
