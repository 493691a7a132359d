"""Work split into jobs: every unit is done by one of them, once, whole or not at all; together they equal one call."""

import multiprocessing
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scsae_utils import attribute, embed
from scsae_utils.files import write
from scsae_utils.screening import ScreeningConfig, attribute_all
from scsae_utils.shards import Part, Shards

SCREENED = {"screening": ScreeningConfig(0.01, 2), "n_prototypes": 8, "progress": False}


def units(folder: Path) -> list[str]:
    """Names of the units that were computed, in order, each as often as that happened."""
    return [line.split("\t")[0] for line in (folder / "work.log").read_text().splitlines()]


@pytest.fixture
def cells(few_cells):
    """Not embedded yet."""
    return ad.AnnData(few_cells.X, few_cells.obs, few_cells.var)


def slow_unit(folder, started):
    def compute():
        started.put(1)
        time.sleep(0.5)
        return pd.DataFrame({"x": [1.0]})

    Shards(folder, {}).get("unit", compute)


class TestUnits:
    @pytest.mark.parametrize("of", [1, 2, 3, 7])
    def test_each_belongs_to_one_part(self, tmp_path, of):
        parts = [Shards(tmp_path, {}, Part("screen", k, of)) for k in range(of)]
        taken = [number for part in parts for number, _ in part.mine("screen", enumerate("abcde"))]
        assert sorted(taken) == [0, 1, 2, 3, 4]
        assert not list(parts[0].mine("confirm", enumerate("abcde")))

    def test_two_processes_at_once_compute_a_unit_once(self, tmp_path):
        context = multiprocessing.get_context("fork")
        started = context.Queue()
        running = [context.Process(target=slow_unit, args=(tmp_path, started)) for _ in range(2)]
        for process in running:
            process.start()
        for process in running:
            process.join()
        assert [process.exitcode for process in running] == [0, 0]
        assert units(tmp_path) == ["unit"] and started.get() and started.empty()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["settings.json", "unit.parquet", "work.log"]

    def test_a_killed_process_leaves_no_lock_and_no_unit(self, tmp_path):
        context = multiprocessing.get_context("fork")
        started = context.Queue()
        process = context.Process(target=slow_unit, args=(tmp_path, started))
        process.start()
        started.get()
        process.kill()
        process.join()
        assert not list(tmp_path.glob("*.parquet"))
        known, _ = Shards(tmp_path, {}).get("unit", lambda: pd.DataFrame({"x": [1.0]}))
        assert not known and units(tmp_path) == ["unit"]

    def test_parts_that_cannot_be(self, tmp_path):
        with pytest.raises(ValueError, match="of 4 parts there is none 4: they count from 0 to 3"):
            Part("screen", 4, 4)
        with pytest.raises(ValueError, match="needs a folder"):
            Shards(None, {}, Part("screen", 0, 4))


class TestEmbedding:
    def test_parts_from_a_file_equal_one_call(self, tmp_path, cells, tiny_model):
        whole = embed(cells.copy(), tiny_model, block_cells=7, progress=False)
        write(cells, tmp_path / "cells.h5ad")
        for k in (2, 0, 1):
            backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
            part = Part("block", k, 3)
            embed(backed, tiny_model, block_cells=7, folder=tmp_path / "work", part=part, progress=False)
            assert "X_scGPT" not in backed.obsm
        (folder,) = (tmp_path / "work").iterdir()
        n = -(-cells.n_obs // 7)
        assert sorted(units(folder)) == [f"block-{i:05d}" for i in range(n)]
        collected = embed(cells.copy(), tiny_model, block_cells=7, folder=tmp_path / "work", progress=False)
        assert len(units(folder)) == n
        np.testing.assert_array_equal(collected.obsm["X_scGPT"], whole.obsm["X_scGPT"])
        assert (collected.layers["bins"] != whole.layers["bins"]).nnz == 0
        assert collected.uns["scgpt"] == whole.uns["scgpt"]

    def test_other_settings_or_cells_are_other_work(self, tmp_path, cells, tiny_model):
        for some, settings in ((cells, {}), (cells, {"precision": "bfloat16"}), (cells[1:], {})):
            embed(some.copy(), tiny_model, folder=tmp_path, progress=False, **settings)
        assert len(list(tmp_path.iterdir())) == 3

    def test_a_part_needs_a_folder(self, cells, tiny_model):
        with pytest.raises(ValueError, match="needs a folder"):
            embed(cells.copy(), tiny_model, part=Part("block", 0, 2), progress=False)


class TestAttribution:
    def test_screened_in_parts_equals_one_call(self, tmp_path, fed, tiny_model, relu_sae):
        whole = attribute_all(fed, tiny_model, relu_sae, range(12), **SCREENED)
        for stage in ("screen", "confirm"):
            for k in range(3):
                part = Part(stage, k, 3)
                done = attribute_all(fed, tiny_model, relu_sae, range(12), folder=tmp_path, part=part, **SCREENED)
                assert done is None
        before = units(tmp_path)
        assert len(before) == len(set(before)) and {name.split("-")[0] for name in before} == {"screen", "confirm"}
        table = attribute_all(fed, tiny_model, relu_sae, range(12), folder=tmp_path, **SCREENED)
        assert units(tmp_path) == before
        pd.testing.assert_frame_equal(table, whole)
        assert table.attrs == whole.attrs

    def test_nothing_is_confirmed_before_all_is_screened(self, tmp_path, fed, tiny_model, relu_sae):
        settings = {"folder": tmp_path, **SCREENED}
        attribute_all(fed, tiny_model, relu_sae, range(12), part=Part("screen", 0, 3), **settings)
        with pytest.raises(ValueError, match=r"holds \d of \d units screen-\*: do the missing ones first"):
            attribute_all(fed, tiny_model, relu_sae, range(12), part=Part("confirm", 0, 3), **settings)

    def test_exact_in_parts_equals_one_call(self, tmp_path, fed, tiny_model, relu_sae):
        settings = {"n_prototypes": 20, "progress": False}
        whole = attribute(fed, tiny_model, relu_sae, [4, 7], **settings)
        for k in range(2):
            attribute(fed, tiny_model, relu_sae, [4, 7], folder=tmp_path, part=Part("exact", k, 2), **settings)
        assert len(units(tmp_path)) > 1
        pd.testing.assert_frame_equal(attribute(fed, tiny_model, relu_sae, [4, 7], folder=tmp_path, **settings), whole)
