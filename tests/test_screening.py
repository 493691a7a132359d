"""Screened occlusion: the same gene sets as occluding everything, a check that notices when it is not so, resuming."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import perturbed
from scipy.stats import binom

from scsae_utils import embed, screening
from scsae_utils.attribution import AttributionConfig, attribute, gene_summary, make_plan
from scsae_utils.encoder import PlantedConcept, PlantedEncoder
from scsae_utils.files import write
from scsae_utils.sae import SAE, SAEConfig, make_sae, save_sae
from scsae_utils.scgpt import ScGPTConfig, save_model
from scsae_utils.screening import ScreeningConfig, attribute_all, audit, choose_genes, largest_total, silent_below
from scsae_utils.trajectory import Trajectories

RULE = ScreeningConfig(threshold=0.08, min_prototypes=3)
KEYS = ["concept", "cell", "gene"]


@pytest.fixture(scope="module")
def exact(fed, tiny_model, relu_sae):
    return attribute_all(fed, tiny_model, relu_sae, range(12), method="exact", n_prototypes=8, progress=False)


@pytest.fixture(scope="module")
def screened(fed, tiny_model, relu_sae):
    return attribute_all(fed, tiny_model, relu_sae, range(12), screening=RULE, n_prototypes=8, progress=False)


def selected(table) -> set:
    summary = gene_summary(table, RULE.threshold, RULE.min_prototypes)
    return set(summary.index[summary["selected"]])


class TestTrajectories:
    @pytest.fixture(scope="class", params=[False, True], ids=["post_norm", "pre_norm"])
    def cell(self, request):
        """A cell of 12 genes in a network of 3 layers, in double precision; and what is exact for it."""
        model = perturbed(ScGPTConfig(16, 2, 24, 3, pre_norm=request.param), [f"g{i}" for i in range(20)]).double()
        ids, values = torch.arange(1, 14), torch.linspace(-2, 40, 13)
        x = model.tokens(ids[None], values[None])[0]
        direction = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.double)

        def projected(x):
            return torch.nn.functional.normalize(model.encode(x[None])[0], dim=0) @ direction

        return model, x, direction, projected

    def test_small_changes_are_exact(self, cell):
        """The derivative along any change of a token is that of finite differences; also in another order."""
        model, x, direction, projected = cell
        trajectories, step = Trajectories(model, x), 1e-6
        change = torch.randn(12, 16, generator=torch.Generator().manual_seed(1), dtype=torch.double)
        positions = torch.arange(1, 13)
        expected = torch.zeros(12, dtype=torch.double)
        for i in positions:
            moved = x.clone()
            moved[i] += step * change[i - 1]
            expected[i - 1] = (projected(moved) - projected(x)) / step
        gradients, remove = trajectories.gradients(direction), torch.zeros(12, dtype=torch.bool)
        for order in (torch.arange(12), torch.randperm(12, generator=torch.Generator().manual_seed(2))):
            new = x[positions[order]] + step * change[order]
            effects = trajectories.effects(gradients, new, positions[order], remove) / step
            torch.testing.assert_close(effects, expected[order], rtol=1e-3, atol=1e-4)

    def test_large_changes_removal_and_insertion_are_close(self, cell):
        model, x, direction, projected = cell
        trajectories = Trajectories(model, x)
        gradients, each = trajectories.gradients(direction), torch.arange(1, 13)
        new = model.tokens(torch.arange(2, 14)[None], torch.full((1, 12), 5.0))[0]
        far = model.tokens(torch.arange(14, 22)[None], torch.linspace(1, 50, 8)[None])[0]
        no, yes = torch.zeros(12, dtype=torch.bool), torch.ones(12, dtype=torch.bool)
        estimates = [
            trajectories.effects(gradients, new, each, no),
            trajectories.effects(gradients, new, each, yes),
            trajectories.effects(gradients, far, None, no[:8]),
        ]
        cells = [
            [torch.cat([x[:i], new[i - 1 : i], x[i + 1 :]]) for i in each],
            [torch.cat([x[:i], x[i + 1 :]]) for i in each],
            [torch.cat([x, token[None]]) for token in far],
        ]
        for estimate, changed in zip(estimates, cells):
            true = torch.stack([projected(y) for y in changed]) - projected(x)
            assert np.corrcoef(estimate, true)[0, 1] > 0.8
        baseline = trajectories.embedding.detach() @ direction
        torch.testing.assert_close(baseline, projected(x))


class TestScreened:
    def test_the_same_gene_sets(self, screened, exact):
        assert 20 < len(selected(exact)) < 0.5 * len(exact.groupby(["concept", "gene"]))
        assert selected(screened) == selected(exact)

    def test_what_is_called_exact_is(self, screened, exact):
        both = screened.merge(exact, on=KEYS, suffixes=("", "_exact"))
        assert len(both) == len(screened) == len(exact)
        confirmed = both["method"] == "exact"
        assert 0.05 < confirmed.mean() < 0.95 and set(both["method"]) == {"exact", "screened"}
        for column in ("occluded", "attribution"):
            difference = (both[column] - both[f"{column}_exact"]).abs()
            assert difference[confirmed].max() < 1e-4
        estimated = both[~confirmed]
        np.testing.assert_allclose(estimated["attribution"], estimated["estimate"], atol=1e-5)
        assert estimated["estimate"].clip(-1, 1).corr(estimated["attribution_exact"].clip(-1, 1)) > 0.8
        for column in ("bin", "counterfactual", "change", "activation"):
            assert (both[column] == both[f"{column}_exact"]).all()

    def test_genes_of_the_set_are_exact_in_all_prototypes(self, screened):
        of_set = screened.set_index(["concept", "gene"]).loc[sorted(selected(screened))]
        assert (of_set["method"] == "exact").all()

    def test_fewer_passes(self, screened, exact):
        assert screened.attrs["n_passes"] < exact.attrs["n_passes"]
        pairs = len(screened[["concept", "cell"]].drop_duplicates())
        assert screened.attrs["n_screen_passes"] == screened["cell"].nunique() + 3 * pairs

    def test_insertion_matching_and_matched_means(self, fed, tiny_model, relu_sae):
        settings = {
            "n_prototypes": 4, "insertion": True, "counterfactual_mean": "matched", "counterfactual_match": "study",
            "n_counterfactuals": 5, "progress": False,
        }  # fmt: skip
        exact = attribute(fed, tiny_model, relu_sae, [3, 4], **settings)
        screened = attribute_all(fed, tiny_model, relu_sae, [3, 4], screening=RULE, **settings)
        both = screened.merge(exact, on=[*KEYS, "change", "counterfactual"], suffixes=("", "_exact"))
        assert len(both) == len(screened) == len(exact) and {"insert", "value"} <= set(both["change"])
        confirmed = both["method"] == "exact"
        assert (both["occluded"] - both["occluded_exact"]).abs()[confirmed].max() < 1e-5
        assert selected(exact) == selected(screened)

    def test_estimates_know_where_a_concept_falls_silent(self):
        u = torch.tensor([[0.1, 0.5, 0.3, 0.9]])
        sae = SAE(SAEConfig(n_concepts=4), 4)
        assert silent_below(sae, u[0]).tolist() == [0, 0, 0, 0]
        sae.threshold.fill_(0.2)
        assert silent_below(sae, u[0]) == pytest.approx([0.2] * 4)
        topk = make_sae(SAEConfig(sae="topk", n_concepts=4, k=2), 4)
        with torch.no_grad():
            topk.W_e.copy_(torch.eye(4))
        assert silent_below(topk, u[0]) == pytest.approx([0.3] * 4)  # the first that is left out
        jump = make_sae(SAEConfig(sae="jumprelu", n_concepts=4, k=2, bandwidth=0.25), 4)
        assert silent_below(jump, u[0]) == pytest.approx([0.25] * 4)


class TestAudit:
    def test_a_bad_screen_is_noticed(self, fed, tiny_model, relu_sae, exact, monkeypatch):
        """A screen that says nothing matters: the sample finds genes that pass the rule, and so does the report."""
        monkeypatch.setattr(screening, "screen", lambda plan, row, changes: changes["activation"].to_numpy())
        blind = ScreeningConfig(threshold=0.08, min_prototypes=3, audit=0.1)
        with pytest.warns(UserWarning, match="the screen finds about"):
            table = attribute_all(
                fed, tiny_model, relu_sae, range(12), screening=blind, n_prototypes=8, progress=False
            )  # fmt: skip
        report, true = table.attrs["screening"], selected(exact)
        found = selected(table)
        assert report["n_missed"] == report["n_selected"] == len(found) > 0 and found < true
        assert report["recall_low"] < report["recall"] < report["recall_high"]
        assert report["recall_low"] < len(found) / len(true) < 0.9  # what the interval has to hold

    def test_a_good_screen_is_not_blamed(self, screened):
        report = screened.attrs["screening"]
        assert report["recall"] > 0.99 and report["recall_low"] < report["recall"] <= report["recall_high"] <= 1
        assert report["n_selected"] == len(selected(screened))
        assert report["share_exact"] == pytest.approx((screened["method"] == "exact").mean())

    def test_by_hand(self):
        """One concept, 2 prototypes, threshold 0.5 in both. Gene 0 is a candidate and passes; gene 1 was left out,
        passes, and the audit drew one of its rows; gene 2 was left out and does not pass."""
        table = pd.DataFrame({"concept": 0, "gene": [0, 0, 1, 1, 2, 2], "activation": 1.0})
        table["exact"], table["sample"] = [0.1, 0.1, 0.2, 0.2, 0.9, np.nan], [0, 0, 2, 0, 2, 0]
        choice = {"pair": table["gene"].to_numpy(), "candidate": table["gene"].to_numpy() == 0}
        config = ScreeningConfig(threshold=0.5, min_prototypes=2, audit=0.5)
        report = audit(table, choice, config, 3)
        assert (report["n_selected"], report["n_missed"], report["n_audited"]) == (2, 1, 2)
        assert report["recall"] == pytest.approx(2 / (2 + 1 / 0.75 - 1))  # found with probability 1 - 0.5^2
        most = largest_total(1, 0.75, 0.025)
        assert report["recall_low"] == pytest.approx(2 / (2 + most - 1)) and report["recall_high"] == 1

    def test_largest_total_by_hand(self):
        """None of M found, each with probability 1/2: 1/32 for M = 5 is not rarer than 0.025, 1/64 for 6 is."""
        assert largest_total(0, 0.5, 0.025) == 5
        for found in (1, 7):
            m = largest_total(found, 0.05, 0.025)
            assert binom.cdf(found, m, 0.05) >= 0.025 > binom.cdf(found, m + 1, 0.05)

    def test_uncertain_genes_are_candidates(self):
        """3 prototypes, rule of 2: estimates just below the threshold leave a gene a chance where the sample says that
        such estimates are often effects, and none where it says that they never are."""
        config = ScreeningConfig(threshold=0.1, min_prototypes=2)
        sampled = pd.DataFrame({"concept": 1, "gene": 0, "activation": 1.0, "screened": 0.92, "sample": 1}, range(200))
        gene = pd.DataFrame({"concept": 0, "gene": [5] * 3 + [6] * 3, "activation": 1.0, "sample": 0})
        gene["screened"], gene["exact"] = [0.92] * 3 + [0.99] * 3, np.nan
        for exact, expected in ((0.8, True), (0.99, False)):
            table = pd.concat([sampled.assign(exact=exact), gene], ignore_index=True)
            choice = choose_genes(table, config, 10)
            assert choice["candidate"][-6:].tolist() == [expected] * 3 + [False] * 3


class TestResuming:
    def test_killed_and_resumed_equals_uninterrupted(self, tmp_path, fed, tiny_model, relu_sae, screened):
        """SIGKILL while shards are being written; what was whole is not touched again, and the result is the same."""
        write(fed, tmp_path / "cells.h5ad")
        save_model(tiny_model, tmp_path / "model")
        save_sae(relu_sae, tmp_path / "sae.safetensors")
        script = f"""
import sys, time, anndata
from scsae_utils import screening, load_model
from scsae_utils.sae import load_sae
one = screening.screen_cells
def slowly(*args):
    time.sleep(float(sys.argv[1]))
    return one(*args)
screening.screen_cells = slowly
screening.attribute_all(
    anndata.read_h5ad("cells.h5ad"), load_model("model"), load_sae("sae.safetensors"), range(12), n_prototypes=8,
    screening=screening.ScreeningConfig(threshold={RULE.threshold}, min_prototypes={RULE.min_prototypes}),
    folder="work", progress=False).to_parquet("table.parquet")
"""
        folder = tmp_path / "work"
        first = subprocess.Popen([sys.executable, "-c", script, "0.4"], cwd=tmp_path, env=os.environ)
        for _ in range(1200):
            if len(list(folder.glob("screen-*.parquet"))) >= 2:
                break
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
        before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.parquet")}
        assert 2 <= len(before) < 4
        subprocess.run([sys.executable, "-c", script, "0"], cwd=tmp_path, check=True)
        after = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.parquet")}
        assert before.items() <= after.items() and len(after) > len(before)
        table = pd.read_parquet(tmp_path / "table.parquet")
        pd.testing.assert_frame_equal(table, screened)
        assert table.attrs == screened.attrs

    def test_exact_work_is_kept_too(self, tmp_path, fed, tiny_model, relu_sae):
        settings = {"n_prototypes": 2, "progress": False, "folder": tmp_path / "work"}
        one = attribute(fed, tiny_model, relu_sae, [4, 7], **settings)
        shard = next((tmp_path / "work").glob("exact-*.parquet"))
        other = pd.read_parquet(shard)
        other["occluded"] = 0.0
        other.to_parquet(shard)
        again = attribute(fed, tiny_model, relu_sae, [4, 7], **settings)
        assert (again["attribution"] == 1).all() and not (one["attribution"] == 1).all()  # it was read, not computed

    def test_work_of_other_settings_is_refused(self, tmp_path, fed, tiny_model, relu_sae):
        settings = {"progress": False, "folder": tmp_path / "work"}
        attribute(fed, tiny_model, relu_sae, 4, n_prototypes=1, **settings)
        with pytest.raises(ValueError, match=r"holds work of other settings \(n_prototypes\)"):
            attribute(fed, tiny_model, relu_sae, 4, n_prototypes=2, **settings)
        with pytest.raises(ValueError, match=r"other settings \(inputs\)"):
            attribute(fed, tiny_model, relu_sae, 5, n_prototypes=1, **settings)
        (tmp_path / "else").mkdir()
        (tmp_path / "else" / "table.parquet").write_bytes(b"")
        with pytest.raises(ValueError, match="of unknown origin"):
            attribute(fed, tiny_model, relu_sae, 4, folder=tmp_path / "else", progress=False)


class TestRefusals:
    def test_another_encoder_is_occluded_exactly(self, fed):
        planted = PlantedEncoder(fed.var_names, [PlantedConcept((fed.var_names[0],))])
        known = embed(fed.copy(), planted, progress=False)
        sae = SAE(SAEConfig(n_concepts=1), 2).requires_grad_(False)
        sae.W_e.zero_()[0, 0] = 1
        with pytest.raises(ValueError, match="layers of scGPT, not of PlantedEncoder: use method='exact'"):
            attribute_all(known, planted, sae, 0, progress=False)
        table = attribute_all(known, planted, sae, 0, method="exact", progress=False)
        assert set(table.loc[table["attribution"] != 0, "gene"]) == {fed.var_names[0]}

    def test_settings_that_cannot_be(self, fed, tiny_model, relu_sae):
        with pytest.raises(ValueError, match="for binning='rebinned' use method='exact'"):
            attribute_all(fed, tiny_model, relu_sae, 4, binning="rebinned", progress=False)
        with pytest.raises(ValueError, match="method must be"):
            attribute_all(fed, tiny_model, relu_sae, 4, method="guess", progress=False)
        for settings, message in (({"audit": 0}, "audit must be"), ({"threshold": 0}, "threshold must be positive")):
            with pytest.raises(ValueError, match=message):
                ScreeningConfig(**settings)
        with pytest.raises(ValueError, match="a concept is named twice"):
            make_plan(fed, tiny_model, relu_sae, [4, 4], AttributionConfig(), "X_scGPT", {})
