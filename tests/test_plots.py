"""Every figure, drawn from small data: what is on it, and that its axes say what they show."""

import inspect

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from matplotlib.colors import to_hex, to_rgb

from scsae_utils import plots
from scsae_utils.attribution import (
    AttributionConfig,
    attribute,
    gene_summary,
    prototypes_and_counterfactuals,
)
from scsae_utils.cells import LEVELS, UNASSIGNED, paper_types
from scsae_utils.concepts import KINDS, kept, number, type_shares
from scsae_utils.curves import deletion_curves
from scsae_utils.plots import taxonomy
from scsae_utils.plots.style import distinct, point_size


@pytest.fixture(autouse=True)
def close():
    """No figure of one test is left for the next; each is drawn in full, as in a notebook."""
    yield
    for n in plt.get_fignums():
        plt.figure(n).canvas.draw()
    plt.close("all")


@pytest.fixture(scope="module")
def concept(concepts):
    """The kept concept that is active in most cells, but silent in some."""
    n = kept(concepts).var["n_cells"]
    return number(n[n < 0.8 * concepts.n_obs].idxmax())


@pytest.fixture(scope="module")
def attributions(embedded, tiny_model, sae, concept):
    return attribute(embedded, tiny_model, sae, concept, n_prototypes=3, progress=False)


def points(ax) -> int:
    """Points of all the scatter plots of an axis."""
    return sum(len(c.get_offsets()) for c in ax.collections)


def legend(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def labels(fig) -> list[str]:
    return [text for ax in fig.axes for text in (ax.get_xlabel(), ax.get_ylabel())]


def test_every_figure_function_has_a_test_and_names_what_it_shows():
    tests = "".join(inspect.getsource(obj) for name, obj in globals().items() if name.lower().startswith("test"))
    for name, function in vars(plots).items():
        if inspect.isfunction(function) and function.__module__ == plots.__name__:
            assert function.__doc__, name
            if inspect.signature(function).return_annotation == "Figure":
                assert f"plots.{name}(" in tests, name


class TestPalette:
    @pytest.mark.parametrize("level", LEVELS)
    def test_each_type_has_its_own_colour_and_unassigned_is_grey(self, mini_cells, level):
        colors = plots.palette(mini_cells, level)
        assert set(mini_cells.obs[LEVELS[level]]) <= set(colors)
        assert len({to_hex(c) for c in colors.values()}) == len(colors)
        assert colors[UNASSIGNED] == plots.GREY and list(colors)[-1] == UNASSIGNED

    @pytest.mark.parametrize("level", LEVELS)
    def test_labels_of_other_people(self, level):
        """Unknown types, types without a higher label, and one study where only the low level is given."""
        obs = pd.DataFrame(
            {"cell_type": ["x", "y", "z", UNASSIGNED, "w"], "cell_type_mid": ["xy", "xy", UNASSIGNED, UNASSIGNED, "w"],
             "cell_type_high": ["Fish", "Fish", UNASSIGNED, UNASSIGNED, "Bird"]}
        )  # fmt: skip
        colors = plots.palette(AnnData(np.zeros((5, 1)), obs=obs.set_index(obs.index.astype(str))), level)
        assert set(obs[LEVELS[level]]) <= set(colors) and all(to_rgb(c) for c in colors.values())

    def test_types_of_one_branch_are_shades_of_its_colour(self, mini_cells):
        low, high = plots.palette(mini_cells, "low"), plots.palette(mini_cells, "high")
        assert high["T"] == plots.HIGH_COLORS["T"]
        near = [np.abs(np.subtract(to_rgb(low["T cells"]), to_rgb(high[t]))).sum() for t in ("T", "Myeloid", "B")]
        assert near[0] == min(near)

    def test_the_ten_high_level_types_of_the_paper_differ(self):
        obs = paper_types().reset_index().astype(str)
        obs = obs.rename(columns={"mid": "cell_type_mid", "high": "cell_type_high"}).rename(str, axis="index")
        colors = plots.palette(AnnData(np.zeros((len(obs), 1)), obs=obs), "high")
        assert len(colors) == len(set(colors.values())) == 10 + 1

    def test_of_many_groups_each_has_its_colour(self):
        assert len(set(distinct(12))) == 12 and distinct(3) == plots.OTHER_COLORS[:3]

    def test_cells_are_drawn_the_smaller_the_more_there_are(self):
        assert point_size(1000) == point_size(10_000) == 9 and point_size(240_000) == 0.5

    def test_style_is_set(self):
        plots.set_style()
        assert not plt.rcParams["axes.spines.top"]


class TestCells:
    def test_umap_of_types(self, embedded):
        for level, column in LEVELS.items():
            fig = plots.umap_types(embedded, level)
            n = embedded.obs[column].astype(str).value_counts()
            assert points(fig.axes[0]) == embedded.n_obs
            assert set(legend(fig.axes[0])) == {f"{t} ({k})" for t, k in n.items()}
            assert labels(fig) == ["UMAP 1", "UMAP 2"]

    def test_umap_on_an_axis_that_is_given(self, embedded):
        fig, axes = plt.subplots(1, 2)
        assert plots.umap_types(embedded, ax=axes[1]) is fig
        assert points(axes[0]) == 0 and points(axes[1]) == embedded.n_obs

    def test_umap_of_studies(self, embedded):
        fig = plots.umap_studies(embedded)
        n = embedded.obs["study"].value_counts()
        assert set(legend(fig.axes[0])) == {f"{s} ({k})" for s, k in n.items()} and len(n) == 2
        assert points(fig.axes[0]) == embedded.n_obs

    def test_umap_of_values_draws_high_ones_on_top(self):
        fig, ax = plt.subplots()
        plots.umap_values(ax, np.arange(6).reshape(3, 2), np.array([5.0, 0, 2]), "title")
        assert ax.collections[0].get_array().tolist() == [0, 2, 5]
        assert ax.collections[0].get_offsets()[-1].tolist() == [0, 1]
        assert fig.axes[1].get_ylabel() == "activation" and ax.get_title() == "title"

    def test_tokens_of_a_cell(self, embedded):
        cell = embedded.obs_names[0]
        bins = embedded[cell].layers["bins"].toarray().ravel()
        ax = plots.cell_tokens_bars(embedded, cell, 12).axes[0]
        assert [bar.get_height() for bar in ax.patches] == sorted(bins)[::-1][:12]
        names = [text.get_text() for text in ax.get_xticklabels()]
        assert bins[embedded.var_names.get_indexer(names)].tolist() == [bar.get_height() for bar in ax.patches]
        assert "bin" in ax.get_ylabel() and f"12 of {(bins > 0).sum()} tokens" in ax.get_title()

    def test_noise_and_the_nearest_cell(self):
        noise = pd.DataFrame({"two draws of the ties": [0.1, 0.2], "nearest other cell": [0.3, 0.4]})
        ax = plots.noise_distances(noise).axes[0]
        assert legend(ax) == list(noise) and "distance" in ax.get_xlabel() and ax.get_ylabel() == "share of cells"
        assert ax.lines[0].get_xdata()[1:].tolist() == [0.1, 0.2]

    def test_tokens_of_a_cell_with_few_genes(self, embedded):
        row = np.flatnonzero(embedded.layers["bins"].getnnz(axis=1) < 400)[0]
        n = embedded.layers["bins"][row].getnnz()
        ax = plots.cell_tokens_bars(embedded, embedded.obs_names[row], 5000).axes[0]
        assert len(ax.patches) == n and min(bar.get_height() for bar in ax.patches) >= 1


class TestDictionary:
    def test_training_curves(self, sae):
        fig = plots.training_curves(sae.history)
        varies = ["concepts of a training cell"] if sae.history["concepts_per_cell"].nunique() > 1 else []
        assert [ax.get_ylabel() for ax in fig.axes] == ["variance not explained (share)", *varies]
        assert all(ax.get_xlabel() == "epoch" for ax in fig.axes) and fig.axes[0].get_yscale() == "log"
        for line, column in zip(fig.axes[0].lines, ["variance_explained", "held_out_variance_explained"], strict=True):
            np.testing.assert_array_equal(line.get_ydata(), 1 - sae.history[column])
        assert legend(fig.axes[0]) == ["training cells", "held-out cells"]

    def test_concepts_per_cell(self, concepts):
        ax = plots.concepts_per_cell(concepts).axes[0]
        assert legend(ax) == ["train", "validation"]
        assert ax.get_xlabel() == "active concepts of a cell" and ax.get_ylabel() == "share of the cells"

    def test_cells_per_concept(self, concepts):
        ax = plots.cells_per_concept(concepts).axes[0]
        assert sum(bar.get_height() for bar in ax.patches) == (concepts.var["n_cells"] > 0).sum()
        assert ax.get_xscale() == "log" and legend(ax) == ["post-processing threshold"]
        assert ax.lines[0].get_xdata()[0] == pytest.approx(concepts.uns["min_frequency"] * concepts.n_obs)

    def test_frequency_and_activation(self, concepts):
        ax = plots.frequency_and_activation(concepts).axes[0]
        alive = concepts.var[concepts.var["n_cells"] > 0]
        assert points(ax) == len(alive)
        assert f"kept ({alive['kept'].sum()})" in legend(ax) and f"dropped ({(~alive['kept']).sum()})" in legend(ax)
        assert "share of the cells" in ax.get_xlabel() and ax.get_ylabel() == "maximal activation"


class TestTaxonomy:
    def test_specificity_and_sensitivity(self, concepts):
        ax = plots.specificity_sensitivity(concepts).axes[0]
        kinds = kept(concepts).var["kind"].value_counts()
        assert points(ax) == kept(concepts).n_vars
        assert legend(ax) == [f"{kind} ({kinds.get(kind, 0)})" for kind in KINDS]
        assert ax.get_xlabel() == "sensitivity, P(active | type)" and ax.get_ylabel() == "specificity, P(type | active)"

    def test_concept_map(self, concepts):
        xy = np.random.default_rng(0).normal(size=(kept(concepts).n_vars, 2))
        ax = plots.concept_map(concepts, xy).axes[0]
        np.testing.assert_array_equal(ax.collections[0].get_offsets(), xy)
        numbers = [int(text.split("(")[1][:-1]) for text in legend(ax) if "(" in text]
        assert sum(numbers) == len(xy) and {text.split(" (")[0] for text in legend(ax) if "(" in text} <= set(
            concepts.obs["cell_type_high"].astype(str)
        )
        assert "active in 10%" in legend(ax)
        biggest = kept(concepts).var["frequency"].to_numpy().argmax()
        assert ax.collections[0].get_sizes().argmax() == biggest

    @pytest.mark.parametrize("level", LEVELS)
    def test_heat_map_of_types(self, concepts, level):
        fig = plots.type_heatmap(concepts, level)
        shown = {text.get_text() for text in fig.axes[0].get_yticklabels()}
        assert shown == set(concepts.obs[LEVELS[level]].astype(str))
        values = fig.axes[0].collections[0].get_array().reshape(len(shown), -1)
        assert values.shape[1] == kept(concepts).n_vars
        np.testing.assert_allclose(values.sum(0), 1)
        assert str(values.shape[1]) in fig.axes[0].get_xlabel() and "share of active cells" in labels(fig)

    def test_examples(self, concepts, concept):
        fig = plots.concept_examples(concepts, [concept])
        left, right = fig.axes[:2]
        shares = type_shares(concepts[:, f"concept_{concept}"]).iloc[0]
        assert points(left) == concepts.n_obs and concepts.var.loc[f"concept_{concept}", "kind"] in left.get_title()
        assert sorted(bar.get_width() for bar in right.patches) == pytest.approx(sorted(shares[shares > 0.01]))
        assert f"{concepts.var.loc[f'concept_{concept}', 'n_cells']} active cells" in right.get_xlabel()

    def test_of_many_types_the_most_frequent_are_named(self, concepts, concept, monkeypatch):
        monkeypatch.setattr(taxonomy, "BARS", 2)
        right = plots.concept_examples(concepts, [concept]).axes[1]
        shares = type_shares(concepts[:, f"concept_{concept}"]).iloc[0].nlargest(2)
        assert [bar.get_width() for bar in right.patches] == pytest.approx([1 - shares.sum(), *shares[::-1]])
        assert [text.get_text() for text in right.get_yticklabels()] == ["all others", *shares.index[::-1]]

    def test_activation_by_type(self, concepts, concept):
        ax = plots.activation_by_type(concepts, concept).axes[0]
        assert points(ax) == concepts.n_obs and ax.get_xlabel() == f"activation of concept {concept}"
        n = concepts.obs["cell_type"].astype(str).value_counts()
        for text in ax.get_yticklabels():
            name = text.get_text().rsplit(" (", 1)[0]
            active = concepts[concepts.obs["cell_type"] == name, f"concept_{concept}"].X.getnnz()
            assert text.get_text() == f"{name} ({active / n[name]:.0%} of {n[name]})"

    def test_several_concepts_in_the_map(self, concepts):
        chosen = [number(name) for name in kept(concepts).var_names[:4]]
        fig = plots.concept_umaps(concepts, chosen, columns=3)
        titles = [ax.get_title() for ax in fig.axes if ax.get_title()]
        assert titles == [f"concept {j}" for j in chosen]


class TestAttributions:
    def test_prototypes_in_the_map(self, embedded, concepts, concept):
        u = concepts[:, f"concept_{concept}"].X.toarray().ravel()
        config = AttributionConfig(n_prototypes=6, n_counterfactuals=2)
        prototypes, counterfactuals = prototypes_and_counterfactuals(embedded.obsm["X_scGPT"], u, config)
        fig = plots.prototypes_in_umap(concepts, concept, prototypes, counterfactuals)
        distinct = len(np.unique(counterfactuals))
        assert legend(fig.axes[1]) == [f"counterfactuals ({distinct})", "prototypes (6)"]
        assert points(fig.axes[1]) == concepts.n_obs + distinct + 6

    def test_strip(self, attributions):
        genes = gene_summary(attributions).index.get_level_values("gene")[:4].tolist()
        ax = plots.attribution_strip(attributions, genes).axes[0]
        assert [text.get_text() for text in ax.get_xticklabels()] == genes
        assert "share of the activation" in ax.get_ylabel()
        assert points(ax) == attributions["gene"].isin(genes).sum()

    def test_deletion(self, embedded, tiny_model, sae, attributions, concept):
        cells = embedded.obs_names.get_indexer(attributions["cell"].unique())
        genes = list(embedded.var_names[:30])
        orders = {name: genes for name in ("most first", "least first", "by name", "by chance")}
        orders |= {f"random {i}": genes[::-1] for i in range(3)}
        curves = deletion_curves(embedded, tiny_model, sae, concept, cells, orders, 5, progress=False)
        ax = plots.deletion(curves).axes[0]
        assert set(legend(ax)) == {"most first", "least first", "by name", "by chance", "3 random orders"}
        lines = [line for line in ax.lines if len(line.get_xdata()) == 6]
        assert len(lines) == 4 and len({line.get_color() for line in lines}) == 4  # none left out for want of a colour
        assert all(line.get_ydata()[0] == pytest.approx(1) for line in lines)
        assert "removed" in ax.get_xlabel() and "relative to the whole cell" in ax.get_ylabel()

    def test_heat_map(self):
        means = pd.DataFrame(
            {"concept_7": [0.1, -0.2, 0.1, 0.0], "concept_3": [0.0, 0.3, 0.0, 0.5]}, index=list("ABCD")
        )
        shares = pd.DataFrame({"mono": [0.9, 0.2], "other": [0.1, 0.8]}, index=means.columns)
        fig = plots.attribution_heatmap(means, shares)
        genes = [text.get_text() for text in fig.axes[1].get_yticklabels()]
        values = fig.axes[1].collections[0].get_array().reshape(4, 2)
        np.testing.assert_array_equal(values, means.loc[genes])
        assert abs(genes.index("A") - genes.index("C")) == 1  # alike, so side by side
        assert [text.get_text() for text in fig.axes[1].get_xticklabels()] == ["7", "3"]
        assert [bar.get_height() for bar in fig.axes[0].patches] == pytest.approx([0.9, 0.2, 0.1, 0.8])
        assert legend(fig.axes[0]) == ["mono", "other"] and "mean attribution" in labels(fig)
        assert fig.axes[1].collections[0].norm.vmin == -0.5 == -fig.axes[1].collections[0].norm.vmax

    def test_heat_map_marks_the_genes_that_pass(self):
        means = pd.DataFrame({"concept_1": [0.4, 0.1, -0.3]}, index=list("ABC"))
        shares = pd.DataFrame({"t": [1.0]}, index=["concept_1"])
        ax = plots.attribution_heatmap(means, shares, means.abs() > 0.2).axes[1]
        marked = {g.get_text(): t.get_text() for g, t in zip(ax.get_yticklabels(), ax.texts)}
        assert marked == {"A": "•", "B": "", "C": "•"}


class TestExpressionAndWords:
    def test_volcano(self):
        table = pd.DataFrame(
            {"log2fc": [3.0, -4, 0.5, 1.0, 30], "padj": [1e-8, 0.0, 0.2, 1e-9, 1e-20],
             "regulation": ["up", "down", "", "", "up"], "never": [False, False, False, False, True]},
            index=["UP", "DOWN", "NOT", "SMALL", "NEVER"],
        )  # fmt: skip
        ax = plots.volcano(table, 2.0, 1e-5).axes[0]
        assert legend(ax) == ["not regulated (2)", "down (1)", "up (1)"]
        assert {text.get_text() for text in ax.texts} == {"UP", "DOWN"}
        assert points(ax) == 4 and max(c.get_offsets()[:, 1].max() for c in ax.collections) == 300  # p = 0 is drawn
        assert "log2 fold change" in ax.get_xlabel() and "-log10 adjusted p-value" in ax.get_ylabel()

    @pytest.mark.parametrize("n", [1, 3, 40])
    def test_words(self, n):
        counts = pd.DataFrame(
            {"word": [f"word{i:02d}" for i in range(n)], "count": np.arange(n, 0, -1), "expected": 0.5, "qvalue": 0.2}
        )
        counts.loc[0, "qvalue"] = 1e-5
        fig = plots.word_cloud(counts, counts[::-1])
        these, random, bars = fig.axes
        assert [these.get_title(), random.get_title()] == ["these genes", "as many random genes"]
        assert len(these.images) == len(random.images) == 1
        assert len(bars.patches) == min(n, 12)
        assert [text.get_text() for text in bars.get_yticklabels()][-1] == "word00"  # the most frequent on top
        assert to_hex(bars.patches[-1].get_facecolor()) == "#08306b"
        assert all(to_hex(bar.get_facecolor()) == "#8c8c8c" for bar in bars.patches[:-1])
        assert bars.get_xlabel() == "genes with the word in their description"
        named = [text.get_text() for text in fig.subfigs[1].legends[0].texts]
        assert named == ["q < 0.001", "q < 0.05", "not enriched", "expected"]

    def test_no_words_are_said_so(self):
        fig = plots.word_cloud(pd.DataFrame({"word": [], "count": [], "expected": [], "qvalue": []}))
        assert [text.get_text() for text in fig.axes[0].texts] == ["no words"]

    def test_gene_sets(self):
        lists = pd.DataFrame({"set": ["A_B", "two words"], "qvalue": [1e-4, 0.5], "size": [9, 4], "count": [5, 1]})
        ranked = pd.DataFrame({"set": ["C", "D"], "qvalue": [0.01, np.nan], "size": [9, 4], "nes": [-2.0, 1.0]})
        fig = plots.gene_set_bars({"lists": lists, "ranking": ranked}, {"lists": pd.DataFrame({"best": [0.1, 1.0]})})
        first, second = fig.axes
        assert [text.get_text() for text in first.get_yticklabels()] == ["two words (1 of 4)", "b (5 of 9)"]
        assert [bar.get_width() for bar in first.patches] == pytest.approx([-np.log10(0.5), 4])
        assert len(first.lines) == 2 and len(second.lines) == 1 and len(second.patches) == 1
        assert to_hex(second.patches[0].get_facecolor()) == "#d55e00"
        assert second.get_xlabel() == "-log10 q-value" and "q = 0.05" in [t.get_text() for t in fig.legends[0].texts]
