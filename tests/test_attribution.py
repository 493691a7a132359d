"""Which genes drive a concept: against naive loops over the model, and where the drivers are known."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import naive, perturbed

from scsae_utils import embed, occlusion
from scsae_utils.attribution import (
    AttributionConfig,
    Plan,
    attribute,
    check_embedded,
    choose_counterfactuals,
    choose_prototypes,
    gene_summary,
    strongest_genes,
)
from scsae_utils.embedding import cell_tokens, token_ids
from scsae_utils.encoder import PlantedConcept, PlantedEncoder
from scsae_utils.occlusion import insert, occlude, rebinned
from scsae_utils.sae import SAE, SAEConfig
from scsae_utils.scgpt import ScGPTConfig, bin_values


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model


@pytest.fixture(scope="module")
def cell(fed, model):
    """Tokens and log values of one cell."""
    row = int(fed.X.getnnz(axis=1).argmax())
    ids, values = cell_tokens(fed.layers["bins"][row], token_ids(fed.var_names, model), model)[0]
    log_values = fed.X[row].toarray().ravel()
    return ids, values, log_values[log_values > 0]


class TestOccludingOneCell:
    def test_a_genes_own_value_changes_nothing(self, model, cell):
        ids, values, _ = cell
        positions = np.arange(1, len(ids))
        same = occlude(model, ids, values, positions, values[1:], np.zeros(len(positions), bool))
        np.testing.assert_allclose(same, np.tile(naive(model, ids, values), (len(positions), 1)), atol=1e-6)

    @pytest.mark.parametrize("batch_tokens", [1, 100, 8192])
    def test_equals_a_naive_loop(self, model, cell, batch_tokens):
        """Half of the genes get a new value, the other half lose their token; whatever the size of a batch."""
        ids, values, _ = cell
        positions = np.arange(1, len(ids))
        new, remove = np.linspace(0, 50, len(positions)), positions % 2 == 0
        out = occlude(model, ids, values, positions, new, remove, batch_tokens)
        for i, position in enumerate(positions):
            if remove[i]:
                expected = naive(model, np.delete(ids, position), np.delete(values, position))
            else:
                changed = values.copy()
                changed[position] = new[i]
                expected = naive(model, ids, changed)
            np.testing.assert_allclose(out[i], expected, atol=1e-5)

    def test_positions_may_be_some_and_in_any_order(self, model, cell):
        ids, values, _ = cell
        every = occlude(model, ids, values, [1, 2, 3, 4], [9, 9, 9, 9], [True, False, True, False])
        some = occlude(model, ids, values, [4, 1], [9, 9], [False, True])
        np.testing.assert_allclose(some, every[[3, 0]], atol=1e-6)

    def test_a_cell_of_one_gene_can_lose_it(self, model):
        ids, values = np.array([model.vocab["<cls>"], 7]), np.array([-2.0, 25.5], np.float32)
        out = occlude(model, ids, values, [1], [0], [True])
        np.testing.assert_allclose(out[0], naive(model, ids[:1], values[:1]), atol=1e-6)

    @pytest.mark.parametrize("pre_norm", [False, True])
    def test_sharing_the_first_layer_changes_nothing(self, few_cells, cell, pre_norm, monkeypatch):
        """The same with the first layer of each pass on its own, also where the norm comes first."""
        ids, values, _ = cell
        model = perturbed(ScGPTConfig(16, 2, 24, 3, pre_norm=pre_norm), few_cells.var_names)
        ids = np.r_[model.vocab["<cls>"], np.arange(3, len(ids) + 2)]
        positions = np.arange(1, len(ids))
        for remove in (False, True):
            changes = positions, np.linspace(0, 50, len(positions)), np.full(len(positions), remove)
            monkeypatch.setattr(occlusion, "UNSTABLE", 1.1)
            shared = occlude(model, ids, values, *changes)
            monkeypatch.setattr(occlusion, "UNSTABLE", 0.0)
            np.testing.assert_allclose(shared, occlude(model, ids, values, *changes), atol=1e-5)

    def test_attention_to_one_token_alone(self, few_cells, cell):
        """Where a token has nearly all attention, what the others get cannot be told from what it leaves."""
        ids, values, _ = cell
        model = perturbed(ScGPTConfig(16, 2, 24, 3), few_cells.var_names)
        ids = np.r_[model.vocab["<cls>"], np.arange(3, len(ids) + 2)]
        model.transformer_encoder["layers"][0].self_attn.in_proj_weight[:32] *= 30
        x = model.tokens(torch.as_tensor(ids)[None], torch.as_tensor(values)[None])[0]
        first = occlusion.FirstLayer(model, x)
        assert (~first.stable).any() and first.p.max() > 1 - 1e-6
        every = np.arange(1, len(ids))
        out = occlude(model, ids, values, every, np.zeros(len(every)), np.ones(len(every), bool))
        for i in every:
            np.testing.assert_allclose(out[i - 1], naive(model, np.delete(ids, i), np.delete(values, i)), atol=1e-4)

    @pytest.mark.parametrize("batch_tokens", [1, 8192])
    def test_insertion_equals_the_cell_with_the_gene(self, model, cell, batch_tokens):
        ids, values, _ = cell
        new = np.setdiff1d(np.arange(3, len(model.vocab)), ids)[:5]
        out = insert(model, ids, values, new, np.arange(5) + 10, batch_tokens)
        for i in range(5):
            np.testing.assert_allclose(out[i], naive(model, np.r_[ids, new[i]], np.r_[values, 10 + i]), atol=1e-5)
        assert insert(model, ids, values, new[:0], [], batch_tokens).shape == (0, 16)

    def test_rebinning_equals_binning_by_hand(self, model, cell):
        """Lowering the highest gene moves it to the lowest bin, and the bins of other genes too."""
        ids, values, log_values = cell
        top = int(log_values.argmax())
        changed = log_values.copy()
        changed[top] = 0.01
        bins = bin_values(changed)
        assert bins[top] == 1 and (np.delete(bins, top) != np.delete(values[1:], top)).any()
        out = rebinned(model, ids, log_values, [top + 1, 1, 2], [0.01, log_values[0], 0.0])
        np.testing.assert_allclose(out[0], naive(model, ids, np.r_[-2, bins]), atol=1e-5)
        np.testing.assert_allclose(out[1], naive(model, ids, values), atol=1e-5)  # its own value
        without = naive(model, np.delete(ids, 2), np.r_[-2, bin_values(np.delete(log_values, 1))])
        np.testing.assert_allclose(out[2], without, atol=1e-5)


class TestPrototypesAndCounterfactuals:
    def test_prototypes_by_hand(self):
        activations = np.array([0, 3, 1, 0, 3, 2.0])
        assert choose_prototypes(activations, 3).tolist() == [1, 4, 5]  # of equal ones the first
        assert choose_prototypes(activations, 20).tolist() == [1, 4, 5, 2]  # never a silent cell
        with pytest.raises(ValueError, match="none of these cells"):
            choose_prototypes(np.zeros(4))

    def test_counterfactuals_by_hand(self):
        """On a line at 0, 1, 2, 10, 11; active are 0 and 10."""
        x = np.array([[0.0], [1], [2], [10], [11]])
        activations = np.array([5.0, 0, 0, 4, 0])
        chosen = choose_counterfactuals(x, activations, np.array([0, 3]), 2)
        assert [c.tolist() for c in chosen] == [[1, 2], [4, 2]]
        (all_there_are,) = choose_counterfactuals(x, activations, np.array([0]), 9)
        assert all_there_are.tolist() == [1, 2, 4]
        with pytest.raises(ValueError, match="every cell activates the concept"):
            choose_counterfactuals(x, np.ones(5), np.array([0]), 2)

    def test_matched_counterfactuals_by_hand(self):
        """Cell 0 is of study a, with one silent cell; cell 3 of study c, with none: it has the nearest of all."""
        x = np.array([[0.0], [1], [2], [10], [11]])
        groups = ["a", "b", "a", "c", "b"]
        chosen = choose_counterfactuals(x, np.array([5.0, 0, 0, 4, 0]), np.array([0, 3]), 2, groups)
        assert [c.tolist() for c in chosen] == [[2], [4, 2]]


class TestAttribute:
    @pytest.mark.parametrize("absent", ["remove", "value"])
    @pytest.mark.parametrize("mean", ["pooled", "matched"])
    def test_equals_equation_one_done_naively(self, fed, model, relu_sae, mean, absent):
        table = attribute(
            fed, model, relu_sae, 4, n_prototypes=2, n_counterfactuals=3,
            counterfactual_mean=mean, absent=absent, progress=False,
        )  # fmt: skip
        a = fed.obsm["X_scGPT"]
        u = relu_sae.activations(a)[:, 4].toarray().ravel()
        bins = fed.layers["bins"].toarray()
        prototypes = np.argsort(-u)[:2]
        silent = np.flatnonzero(u == 0)
        nearest = [silent[np.linalg.norm(a[silent] - a[p], axis=1).argsort()[:3]] for p in prototypes]
        assert table["cell"].unique().tolist() == fed.obs_names[prototypes].tolist()
        for p, own in zip(prototypes, nearest):
            means = bins[np.unique(nearest) if mean == "pooled" else own].mean(0)
            part = table[table["cell"] == fed.obs_names[p]].set_index("gene")
            assert set(part.index) == set(fed.var_names[bins[p] > 0])
            for gene in part.index[::7]:
                column = fed.var_names.get_loc(gene)
                changed = bins[p].copy()
                removed = means[column] < 1 and absent == "remove"
                changed[column] = 0 if removed else means[column]
                there = (bins[p] > 0) & ~(removed & (np.arange(len(changed)) == column))
                ids = np.r_[model.vocab["<cls>"], token_ids(fed.var_names[there], model)]
                after = relu_sae.encode(torch.from_numpy(naive(model, ids, np.r_[-2, changed[there]]))[None])[
                    0, 4
                ].item()
                row = part.loc[gene]
                assert row["change"] == ("remove" if removed else "value")
                assert row["bin"] == bins[p, column] and row["counterfactual"] == pytest.approx(means[column], rel=1e-5)
                assert row["activation"] == pytest.approx(u[p]) and row["occluded"] == pytest.approx(after, abs=1e-5)
                assert row["attribution"] == pytest.approx((u[p] - after) / u[p], abs=1e-4)

    def test_does_not_depend_on_the_size_of_batches(self, fed, model, relu_sae):
        settings = {"n_prototypes": 2, "insertion": True, "progress": False}
        one, other = (attribute(fed, model, relu_sae, 4, batch_tokens=n, **settings) for n in (8192, 60))
        pd.testing.assert_frame_equal(one, other, atol=1e-4, check_exact=False)

    def test_does_not_depend_on_the_order_of_genes(self, fed, few_cells, model, relu_sae):
        shuffled = few_cells[:, np.random.default_rng(0).permutation(few_cells.n_vars)].copy()
        embed(shuffled, model, progress=False)
        for binning in ("frozen", "rebinned"):
            one, other = (
                attribute(x, model, relu_sae, 4, n_prototypes=2, binning=binning, progress=False)
                .set_index(["cell", "gene"])["attribution"]
                .sort_index()
                for x in (fed, shuffled)
            )
            pd.testing.assert_series_equal(one, other, atol=1e-4, check_exact=False)

    def test_insertion_adds_genes_that_only_counterfactuals_express(self, fed, model, relu_sae):
        settings = {"n_prototypes": 1, "progress": False}
        without = attribute(fed, model, relu_sae, 4, **settings)
        table = attribute(fed, model, relu_sae, 4, insertion=True, **settings)
        added = table[table["change"] == "insert"]
        pd.testing.assert_frame_equal(table[table["change"] != "insert"], without, check_dtype=False)
        assert len(added) and (added["bin"] == 0).all() and (added["counterfactual"] >= 1).all()
        assert not set(added["gene"]) & set(without["gene"])

    def test_rebinned_uses_log_values_and_all_genes(self, fed, model, relu_sae):
        table = attribute(fed, model, relu_sae, 4, n_prototypes=1, binning="rebinned", progress=False)
        u = relu_sae.activations(fed.obsm["X_scGPT"])[:, 4].toarray().ravel()
        p, silent = u.argmax(), np.flatnonzero(u == 0)
        a, X = fed.obsm["X_scGPT"], fed.X.toarray()
        means = X[silent[np.linalg.norm(a[silent] - a[p], axis=1).argsort()[:5]]].mean(0)
        for _, row in table.iloc[::9].iterrows():
            changed = X[p].copy()
            changed[fed.var_names.get_loc(row["gene"])] = means[fed.var_names.get_loc(row["gene"])]
            there = changed > 0
            ids = np.r_[model.vocab["<cls>"], token_ids(fed.var_names[there], model)]
            after = relu_sae.encode(torch.from_numpy(naive(model, ids, np.r_[-2, bin_values(changed[there])]))[None])
            assert row["occluded"] == pytest.approx(after[0, 4].item(), abs=1e-5)
            assert row["change"] == ("value" if (changed > 0).sum() == (X[p] > 0).sum() else "remove")

    def test_rebinned_of_a_truncated_cell_bins_its_whole_expression(self, few_cells):
        """The bins of a long cell are those of all its genes, also of those that the model has no room for: with an
        unchanged value the embedding has to be that of the cell."""
        short = perturbed(ScGPTConfig(16, 2, 24, 2, max_seq_len=15), few_cells.var_names)
        fed = embed(few_cells.copy(), short, progress=False)
        row = int(fed.X.getnnz(axis=1).argmax())
        assert fed.X[row].getnnz() > 14
        sae = SAE(SAEConfig(n_concepts=1), 16).requires_grad_(False)
        plan = Plan(fed, short, sae, [0], AttributionConfig(binning="rebinned"), "X_scGPT")
        changes = pd.DataFrame({"concept": 0, "gene": plan.tokens(row)[2], "change": "value"})
        changes["counterfactual"] = fed.X[row].toarray().ravel()[changes["gene"]]
        after, n_passes = plan.occluded(row, changes, 8192)
        assert n_passes == len(changes) == 14
        before = sae.activations(fed.obsm["X_scGPT"][[row]])[0, 0]
        np.testing.assert_allclose(after, before, atol=1e-6)

    def test_expression_may_be_dense(self, fed, model, relu_sae):
        dense = fed.copy()
        dense.X = fed.X.toarray()
        for binning in ("frozen", "rebinned"):
            one, other = (
                attribute(x, model, relu_sae, 4, n_prototypes=1, binning=binning, progress=False) for x in (fed, dense)
            )
            pd.testing.assert_frame_equal(one, other, atol=1e-5, check_exact=False)

    def test_several_concepts_and_the_settings(self, fed, model, relu_sae):
        table = attribute(fed, model, relu_sae, [4, 7], n_prototypes=1, progress=False)
        alone = attribute(fed, model, relu_sae, 7, n_prototypes=1, progress=False)
        assert table["concept"].unique().tolist() == [4, 7]
        pd.testing.assert_frame_equal(table[table["concept"] == 7].reset_index(drop=True), alone)
        assert table.attrs["n_prototypes"] == 1 and table.attrs["binning"] == "frozen"
        assert table.attrs["model"] == model.fingerprint() and table.attrs["n_genes_panel"] == fed.n_vars

    def test_known_drivers_are_found(self, fed):
        """A planted model reads two genes: u = (driver - brake) / 50. The attribution of each is known by hand."""
        detected = np.asarray((fed.X > 0).mean(0)).ravel()
        driver, brake = fed.var_names[abs(detected - 0.7).argmin()], fed.var_names[abs(detected - 0.4).argmin()]
        planted = PlantedEncoder(fed.var_names, [PlantedConcept((driver,), inhibitors=(brake,))])
        known = embed(fed.copy(), planted, progress=False)
        sae = SAE(SAEConfig(n_concepts=1), 2).requires_grad_(False)
        sae.W_e.zero_()[0, 0] = 1
        table = attribute(known, planted, sae, 0, n_prototypes=8, absent="value", insertion=True, progress=False)
        value = known.layers["bins"].toarray()[known.obs_names.get_indexer(table["cell"])]
        value = pd.DataFrame(value, columns=known.var_names)
        u, mean = (value[driver] - value[brake]) / 50, table["counterfactual"]
        lost = np.where(table["gene"] == driver, value[driver] - mean, 0)
        lost = np.where(table["gene"] == brake, mean - value[brake], lost) / 50
        np.testing.assert_allclose(table["attribution"], np.minimum(lost, u) / u, atol=1e-5)
        summary = gene_summary(table, min_prototypes=3).loc[0]
        assert summary.index[summary["selected"]].tolist()[0] == driver
        assert (
            set(summary.index[summary["selected"]]) == {driver, brake} == set(summary.index[summary["mean"].abs() > 0])
        )

    def test_concepts_share_the_passes_of_a_cell(self, fed, model, relu_sae):
        """With ``absent_below`` above all means every change is a removal: the same for all concepts."""
        settings = {"n_prototypes": 20, "absent_below": 99, "progress": False}
        every = attribute(fed, model, relu_sae, range(4), **settings)
        alone = [attribute(fed, model, relu_sae, j, **settings) for j in range(4)]
        assert every.attrs["n_passes"] == len(every[["cell", "gene"]].drop_duplicates()) < len(every)
        pd.testing.assert_frame_equal(every, pd.concat(alone, ignore_index=True), atol=1e-4, check_exact=False)

    def test_counterfactuals_of_the_prototypes_own_study(self, fed, model, relu_sae):
        settings = {"n_prototypes": 2, "n_counterfactuals": 3, "counterfactual_mean": "matched", "progress": False}
        table = attribute(fed, model, relu_sae, 4, counterfactual_match="study", **settings)
        u = relu_sae.activations(fed.obsm["X_scGPT"])[:, 4].toarray().ravel()
        for cell, part in table.groupby("cell"):
            same = np.flatnonzero((u == 0) & (fed.obs["study"] == fed.obs.loc[cell, "study"]))
            own = fed.obsm["X_scGPT"][fed.obs_names.get_loc(cell)]
            nearest = same[np.linalg.norm(fed.obsm["X_scGPT"][same] - own, axis=1).argsort()[:3]]
            means = pd.Series(fed.layers["bins"][nearest].toarray().mean(0), fed.var_names)
            np.testing.assert_allclose(part["counterfactual"], means[part["gene"]], rtol=1e-5)
        assert table.attrs["n_unmatched"] == 0

    def test_rounding_of_embeddings_is_no_effect_of_genes(self, fed, model, relu_sae):
        """Cells that were embedded in half precision have the attributions of single precision."""
        half = embed(fed.copy(), model, precision="bfloat16", progress=False)
        rounded = attribute(half, model, relu_sae, 1, n_prototypes=3, progress=False).set_index(["cell", "gene"])
        exact = attribute(fed, model, relu_sae, 1, n_prototypes=8, progress=False).set_index(["cell", "gene"])
        both = rounded.join(exact, how="inner", rsuffix="_exact")
        assert len(both) > 20
        np.testing.assert_allclose(both["activation"], both["activation_exact"], rtol=1e-4)
        U = relu_sae.activations(half.obsm["X_scGPT"]).toarray()[:, 1]
        rows = half.obs_names.get_indexer(both.index.get_level_values("cell"))
        assert abs(U[rows] - both["activation_exact"]).max() > 1e-3  # which would have been taken for an effect

    def test_prototypes_without_a_match_are_counted(self, fed, model, relu_sae):
        alone = fed.copy()
        alone.obs["cell"] = alone.obs_names
        with pytest.warns(UserWarning, match="2 prototypes have no silent cell with their cell"):
            table = attribute(alone, model, relu_sae, 4, counterfactual_match="cell", n_prototypes=2, progress=False)
        assert table.attrs["n_unmatched"] == 2
        with pytest.raises(ValueError, match="obs has no column 'donor'"):
            attribute(fed, model, relu_sae, 4, counterfactual_match="donor", progress=False)


class TestRefusals:
    def test_cells_of_another_model(self, fed, model, relu_sae):
        with pytest.raises(ValueError, match="embedded with another model"):
            attribute(fed, model.random_like(), relu_sae, 4, progress=False)

    def test_cells_that_are_not_embedded(self, few_cells, model, relu_sae):
        bare = few_cells.copy()
        for key in list(bare.layers):
            del bare.layers[key]
        with pytest.raises(ValueError, match="run scsae_utils.embed"):
            attribute(bare, model, relu_sae, 4, progress=False)

    def test_genes_left_out_since(self, fed, model):
        """The embedding would be that of more genes than are occluded."""
        with pytest.raises(ValueError, match="genes were left out after the cells were embedded"):
            check_embedded(fed[:, :40].copy(), model)

    @pytest.mark.parametrize("concept", [-1, 12, [4, 99]])
    def test_concepts_that_are_not_there(self, fed, model, relu_sae, concept):
        with pytest.raises(ValueError, match="concepts must be 0 to 11"):
            attribute(fed, model, relu_sae, concept, progress=False)

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"binning": "loose"}, "binning must be one of frozen, rebinned"),
            ({"absent": "keep"}, "absent must be one of"),
            ({"counterfactual_mean": "all"}, "counterfactual_mean must be one of"),
            ({"n_prototypes": 0}, "at least 1"),
            ({"insertion": True, "binning": "rebinned"}, "insertion needs binning='frozen'"),
        ],
    )
    def test_settings_that_cannot_be(self, settings, message):
        with pytest.raises(ValueError, match=message):
            AttributionConfig(**settings)

    def test_config_and_fields_together(self, fed, model, relu_sae):
        with pytest.raises(ValueError, match="not both"):
            attribute(fed, model, relu_sae, 4, AttributionConfig(), absent="value")

    def test_defaults_are_the_papers(self):
        config = AttributionConfig()
        assert (config.n_prototypes, config.counterfactual_mean, config.binning) == (20, "pooled", "frozen")


class TestSummary:
    def test_by_hand(self):
        """Gene A in 2 of 4 prototypes: 0.2 and 0.4. Its mean over the four is 0.15, of squares 0.05."""
        table = pd.DataFrame(
            {"concept": 3, "cell": list("wxyz") + list("wx"), "gene": list("BBBBAA"),
             "attribution": [0.0, 0.04, -0.06, 0.02, 0.2, 0.4]}
        )  # fmt: skip
        out = gene_summary(table, threshold=0.05, min_prototypes=2)
        assert out.index.tolist() == [(3, "A"), (3, "B")]  # most positive first
        a, b = out.loc[(3, "A")], out.loc[(3, "B")]
        assert (a["mean"], a["std"]) == pytest.approx((0.15, (0.05 - 0.15**2) ** 0.5))
        assert (a["n_prototypes"], a["n_above"], a["selected"]) == (2, 2, True)
        assert b["mean"] == pytest.approx(0) and (b["n_prototypes"], b["n_above"], b["selected"]) == (4, 1, False)

    def test_the_papers_rule(self):
        """|l| > 0.05 in at least 5 of 20 prototypes: either sign, and 0.05 itself does not count."""
        rows = []
        for gene, hits, value in [("five", 5, -0.051), ("four", 4, 0.9), ("equal", 20, 0.05)]:
            rows += [("c", f"cell{i}", gene, value if i < hits else 0.0) for i in range(20)]
        table = pd.DataFrame(rows, columns=["concept", "cell", "gene", "attribution"])
        selected = gene_summary(table)["selected"]
        assert selected[("c", "five")] and not selected[("c", "four")] and not selected[("c", "equal")]

    def test_concepts_do_not_mix(self, fed, model, relu_sae):
        both = attribute(fed, model, relu_sae, [4, 7], n_prototypes=2, progress=False)
        pd.testing.assert_frame_equal(
            gene_summary(both).loc[[7]], gene_summary(both[both["concept"] == 7]), check_exact=False
        )

    def test_strongest_genes(self):
        """Two for each concept by size, of either sign, each named once."""
        means = {(1, "A"): 0.5, (1, "B"): -0.6, (1, "C"): 0.1, (2, "A"): 0.3, (2, "D"): 0.01, (2, "C"): -0.02}
        summary = pd.DataFrame({"mean": pd.Series(means)}).rename_axis(["concept", "gene"])
        assert strongest_genes(summary, 2) == ["B", "A", "C"]
