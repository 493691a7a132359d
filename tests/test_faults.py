"""Faults on the way: a full disk, a folder that cannot be written, a kill at each stage, two processes at once.

What may crash or be killed runs in a child process. Each fault ends in a clear error, what was there before is whole,
and work that goes on gives what it gives without a fault.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from safetensors import SafetensorError
from server import serving

from scsae_utils import embed, embedding, training
from scsae_utils.attribution import AttributionConfig, attribute
from scsae_utils.book import execute
from scsae_utils.download import local_file
from scsae_utils.files import read, read_table, write, write_table
from scsae_utils.sae import SAEConfig, save_sae, write_tensors
from scsae_utils.scgpt import save_model
from scsae_utils.shards import Shards
from scsae_utils.training import train_sae

ROOT = Path(__file__).parents[1]
LARGE = np.random.default_rng(0).random((300, 100)).astype(np.float32)


def start(work) -> tuple[int, int]:
    """Run ``work`` in a child process; its id, and where the error that it ends with can be read."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(100)  # a child that hangs ends, and fails the test
        try:
            work()
            os._exit(0)  # not through the clean-up of libraries: HDF5's crashes after a failed write
        except BaseException as error:
            os.write(into, f"{type(error).__name__}: {error}".encode()[:4000])
        finally:
            os._exit(1)
    os.close(into)
    return child, out


def outcome(started) -> tuple[int, str]:
    """Exit status of a child (-9 if it was killed) and the error that it ended with."""
    child, out = started
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(out) as file:
        return status, file.read()


def kill_at(monkeypatch, module, name, calls):
    """Kill the process with signal 9 when a function is called for so many times."""
    real, seen = getattr(module, name), []

    def counted(*args, **kwargs):
        seen.append(name)
        if len(seen) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)


def same_table(a: pd.DataFrame, b: pd.DataFrame) -> bool:
    pd.testing.assert_frame_equal(a.reset_index(drop=True), b.reset_index(drop=True))
    return True


WRITERS = {  # what is written, where, with a size in rows
    "cells": ("cells.h5ad", lambda path, n: write(AnnData(LARGE[:n]), path)),
    "a table": ("table.parquet", lambda path, n: write_table(pd.DataFrame(LARGE[:n]).rename(columns=str), path)),
    "a dictionary": ("sae.safetensors", lambda path, n: write_tensors(path, {"x": torch.tensor(LARGE[:n])}, {})),
    "a unit of long work": (
        "work/unit.parquet",
        lambda path, n: Shards(path.parent, {}).get("unit", lambda: pd.DataFrame(LARGE[:n])),
    ),
}


def room_for(size: int) -> None:
    """From now on this process writes no file beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("name, write_rows", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_told_and_the_last_file_stays(name, write_rows, tmp_path):
    path = tmp_path / name
    write_rows(path, 3)
    before = path.read_bytes()

    def work():
        room_for(20_000)
        if path.parent.name == "work":
            path.unlink()  # units are written once
        write_rows(path, 300)

    status, error = outcome(start(work))
    assert status == 1 and "too large" in error.lower()
    assert not list(tmp_path.rglob("*.part"))
    assert path.read_bytes() == before if path.is_file() else path.parent.name == "work"


def test_a_full_disk_of_memory(tmp_path):
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", tmp_path], capture_output=True).returncode
    ):
        pytest.skip("mounting a small disk is not permitted here; the test above does without")
    try:
        write_table(pd.DataFrame({"a": [1]}), tmp_path / "a.parquet")
        path = tmp_path / "cells.h5ad"
        write(AnnData(LARGE[:3]), path)
        status, error = outcome(start(lambda: write(AnnData(LARGE.repeat(5, 0)), path)))
        assert status == 1 and "space" in error.lower()
        assert read(path, "").n_obs == 3 and sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet", "cells.h5ad"]
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.parametrize("folder", ["a file", "a folder of the system"])
@pytest.mark.parametrize("name, write_rows", WRITERS.values(), ids=WRITERS)
def test_a_folder_that_cannot_be_written(name, write_rows, folder, tmp_path):
    """Not by permissions: these do not hold for root."""
    (tmp_path / "a file").write_text("mine")
    with pytest.raises((OSError, SafetensorError), match="a file|/proc"):
        write_rows((tmp_path / "a file" if folder == "a file" else Path("/proc")) / name, 3)
    assert (tmp_path / "a file").read_text() == "mine"


class TestKill:
    """Signal 9 in the middle; then the same call again."""

    def test_while_cells_are_embedded(self, embedded, tiny_model, tmp_path, monkeypatch):
        monkeypatch.setattr(embedding, "BLOCK_CELLS", 40)
        out = tmp_path / "x.npy"
        with monkeypatch.context() as patch:
            kill_at(patch, embedding, "fill_store", 3)
            assert outcome(start(lambda: embed(embedded.copy(), tiny_model, out=out, progress=False)))[0] == -9
        assert not out.exists()
        whole = embed(embedded.copy(), tiny_model, progress=False)
        again = embed(embedded.copy(), tiny_model, out=out, progress=False)
        np.testing.assert_array_equal(again.obsm["X_scGPT"], whole.obsm["X_scGPT"])

    @pytest.mark.parametrize("where", [(training, "train_epoch"), (training, "save_checkpoint")])
    def test_while_a_dictionary_is_trained(self, embedded, tmp_path, monkeypatch, where):
        config = SAEConfig(sae="batchtopk", n_concepts=12, k=3, batch_size=64, epochs=6)
        monkeypatch.setattr(training.time, "monotonic", iter(range(0, 10**6, 100)).__next__)  # a minute is soon over
        whole = train_sae(embedded, config, progress=False)
        with monkeypatch.context() as patch:
            kill_at(patch, *where, calls=4)
            work = start(lambda: train_sae(embedded, config, checkpoint=tmp_path / "c", progress=False))
            assert outcome(work)[0] == -9
        assert (tmp_path / "c").is_file()
        again = train_sae(embedded, config, checkpoint=tmp_path / "c", progress=False)
        assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
        assert same_table(whole.history, again.history) and not (tmp_path / "c").exists()

    def test_while_genes_are_attributed(self, fed, tiny_model, relu_sae, tmp_path, monkeypatch):
        config = AttributionConfig(n_prototypes=3, n_counterfactuals=3)
        whole = attribute(fed, tiny_model, relu_sae, [0, 1, 2], config, progress=False)
        arguments = (fed, tiny_model, relu_sae, [0, 1, 2], config)
        with monkeypatch.context() as patch:
            kill_at(patch, pd.DataFrame, "to_parquet", 1)
            assert outcome(start(lambda: attribute(*arguments, folder=tmp_path / "w", progress=False)))[0] == -9
        again = attribute(*arguments, folder=tmp_path / "w", progress=False)
        assert same_table(whole, again)


class TestTwoProcesses:
    @pytest.mark.parametrize("name, write_rows", WRITERS.values(), ids=WRITERS)
    def test_that_write_one_file(self, name, write_rows, tmp_path):
        path = tmp_path / name

        def work(n):
            for _ in range(15):
                write_rows(path, n)

        assert [outcome(child) for child in [start(lambda n=n: work(n)) for n in (3, 50)]] == [(0, ""), (0, "")]
        assert not list(tmp_path.rglob("*.part"))
        if path.suffix == ".parquet":
            assert len(read_table(path, "")) in (3, 50)
        if path.suffix == ".h5ad":
            assert read(path, "").n_obs in (3, 50)

    def test_that_embed_into_one_folder(self, embedded, tiny_model, tmp_path):
        def work():
            embed(embedded.copy(), tiny_model, folder=tmp_path, block_cells=40, progress=False)

        assert [outcome(child) for child in [start(work), start(work)]] == [(0, ""), (0, "")]
        units = [line.split("\t")[0] for log in tmp_path.rglob("work.log") for line in log.read_text().splitlines()]
        assert sorted(units) == [f"block-{i:05d}" for i in range(4)]  # each once

    def test_two_runs_in_one_folder(self, tmp_path):
        """The second is refused by Snakemake's lock, and harms nothing; the lock of a killed run can be lifted."""
        for name in ("Snakefile", "notebooks", "profiles", "scsae_utils"):
            (tmp_path / name).symlink_to(ROOT / name)
        shutil.copy(ROOT / "tests" / "tiny.yaml", tmp_path)
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "python").write_text("#!/bin/sh\ntouch started\nexec sleep 60\n")  # instead of the work
        (tmp_path / "bin" / "python").chmod(0o755)
        environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        command = [sys.executable, "-m", "snakemake", "--cores", "1", "--config", "profile=tiny.yaml"]
        command += ["--", "runs/tiny/notebooks/00_ten_cells.ipynb"]
        options = {"cwd": tmp_path, "env": environment, "text": True, "stderr": subprocess.PIPE}
        first = subprocess.Popen(command, start_new_session=True, **options)
        try:
            for _ in range(300):
                if (tmp_path / "started").exists() or first.poll() is not None:
                    break
                time.sleep(0.1)
            assert (tmp_path / "started").exists(), first.stderr.read()
            second = subprocess.run(command, **options)
            assert second.returncode and "cannot be locked" in second.stderr
            assert first.poll() is None
        finally:
            os.killpg(first.pid, signal.SIGKILL)
            first.communicate()
        subprocess.run([*command[:-2], "--unlock"], check=True, **options)  # as `make unlock` does
        assert not list((tmp_path / ".snakemake" / "locks").glob("*"))


class TestDownloads:
    def test_one_that_stops_half_way_goes_on(self, tmp_path):
        content = bytes(range(256)) * 99
        with serving({"/a.h5ad": content}, stop_after=9_000) as (url, asked):
            assert local_file(f"{url}/a.h5ad", tmp_path, progress=False).read_bytes() == content
        assert asked == ["/a.h5ad", "/a.h5ad@9000", "/a.h5ad@18000"]

    def test_another_checksum_is_refused_and_the_last_file_stays(self, tmp_path):
        pages = {"/a.gmt": b"one"}
        with serving(pages) as (url, _):
            path = local_file(f"{url}/a.gmt", tmp_path, progress=False)
            pages["/a.gmt"] = b"other"
            with pytest.raises(ValueError, match="not the file with the checksum 0000"):
                local_file(f"{url}/a.gmt#sha256={'0' * 64}", tmp_path, progress=False)
        assert path.read_bytes() == b"one"


NOTEBOOK = """
run = "runs/mini"
---
from scsae_utils.files import run_folder, write_table
from scsae_utils.runs import load_run

opened = load_run(run)
write_table(opened.concepts.var, run_folder(run) / "concepts ü.parquet")
"""


def test_a_notebook_runs_on_a_path_with_spaces_and_other_letters(tmp_path, embedded, sae, concepts, tiny_model):
    run, notebook = tmp_path / "mein Lauf — 細胞 'x' #1", tmp_path / "ein Heft ü.ipynb"
    cells = embedded.copy()
    save_model(tiny_model, run / "modèle")
    cells.uns["scgpt"] = dict(cells.uns["scgpt"], name=str(run / "modèle"))
    write(cells, run / "embedded.h5ad")
    write(concepts, run / "concepts.h5ad")
    save_sae(sae, run / "sae.safetensors")
    content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in NOTEBOOK.split("---")])
    content.cells[0].metadata["tags"] = ["parameters"]
    content.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(content, notebook)
    execute(notebook, run / "notebooks" / "out ü.ipynb", {"run": str(run)})
    assert [path.name for path in (run / "notebooks").iterdir()] == ["out ü.ipynb"]
    assert list(read_table(run / "concepts ü.parquet", "").index) == list(concepts.var_names)
