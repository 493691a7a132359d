"""Where the truth is planted: attribution finds the drivers, differential expression takes passengers too."""

import numpy as np
import pytest

from scsae_utils.attribution import AttributionConfig, attribute
from scsae_utils.planted import plant, precision_recall
from scsae_utils.redundancy import interactions, pair_sets, set_losses, tag_genes
from scsae_utils.significance import cells_of_concepts, expression_of_concepts, gene_statistics, mean_bins


@pytest.fixture(scope="module")
def planted(mini_cells):
    return plant(mini_cells)


@pytest.fixture(scope="module")
def leaky(mini_cells):
    """Every gene has some small effect; three concepts of the same kind."""
    return plant(mini_cells, hows=("sum",) * 3, leak=0.01)


def statistics(planted):
    concepts = range(planted.sae.config.n_concepts)
    return gene_statistics(attribute(planted.cells, planted.model, planted.sae, concepts, progress=False))


def test_drivers_and_passengers_go_together_in_the_cells(planted):
    """Within the group of a concept genes are more alike than others are, so that expression cannot tell them apart."""
    X = planted.cells.to_df()
    alike = X.corr().to_numpy()
    every = np.median(alike[np.triu_indices_from(alike, 1)])
    for j, part in planted.truth.groupby("concept"):
        drivers, passengers = (part.loc[part["role"] == r, "gene"] for r in ("driver", "passenger"))
        assert X.corr().loc[drivers, passengers].to_numpy().mean() > every + 0.1, j
    active = (planted.sae.activations(planted.cells.obsm["X_scGPT"]) > 0).mean(0).A1
    assert ((active > 0.02) & (active < 0.2)).all()


def test_no_gene_but_the_drivers_has_an_attribution(planted):
    found = statistics(planted)
    assert set(found.index[found["attribution"].abs() > 1e-5]) <= planted.genes()
    assert set(found.index[found["q_value"] < 0.05]) <= planted.genes()


def test_attribution_finds_the_drivers_and_differential_expression_passengers_too(leaky):
    found = statistics(leaky)
    by_attribution = set(found.index[found["q_value"] < 0.05])
    prototypes, others = cells_of_concepts(leaky.cells, leaky.model, leaky.sae, range(3), AttributionConfig())
    expression = expression_of_concepts(leaky.cells, prototypes, others, progress=False)
    by_expression = set(expression.index[expression["regulation"].isin(["up", "down"])])
    precision, recall = precision_recall(by_attribution, leaky.genes())
    assert precision > 0.9 and recall == 1
    other_precision, other_recall = precision_recall(by_expression, leaky.genes())
    assert other_precision < 0.6 and len(by_expression & leaky.genes("passenger")) >= 3
    paper = set(found.index[found["selected"]])
    assert precision_recall(paper, leaky.genes())[1] == 1


def test_p_values_of_other_genes_are_those_of_a_null(mini_cells):
    """Leaks are exchangeable: at most as many small p-values as uniform ones would have, and the FDR holds."""
    p, false, found = [], 0, 0
    for seed in range(3):
        leaky = plant(mini_cells, hows=("sum",) * 3, leak=0.005, seed=seed)
        table = statistics(leaky)
        others = table[~table.index.isin(leaky.genes())]
        p.append(others["p_value"].dropna())
        found += (table["q_value"] < 0.1).sum()
        false += (others["q_value"] < 0.1).sum()
    p = np.concatenate(p)
    assert len(p) > 800
    assert (p < 0.05).mean() < 0.06 and (p < 0.01).mean() < 0.015
    assert 0.4 < (p < 0.5).mean() < 0.6
    assert found >= 27 and false / found < 0.15


def test_interactions_are_those_that_were_planted(mini_cells):
    """Of "any" two genes one stands in for the other; "all" need both."""
    planted = plant(mini_cells, active=0.3)  # concept 2 is of the kind "any", 4 of "all"
    concepts = [2, 4]
    prototypes, others = cells_of_concepts(
        planted.cells, planted.model, planted.sae, concepts, AttributionConfig(n_prototypes=20)
    )
    drivers = {c: [g for j, g in sorted(planted.genes()) if j == c] for c in concepts}
    passenger = {c: [g for j, g in sorted(planted.genes("passenger")) if j == c][:1] for c in concepts}
    sets = {c: pair_sets(drivers[c] + passenger[c]) for c in concepts}
    losses = set_losses(
        planted.cells, planted.model, planted.sae, prototypes, sets, mean_bins(planted.cells, others), progress=False
    )
    found = interactions(losses)
    tags = tag_genes(found, set())
    assert [tags[2, g] for g in drivers[2]] == ["redundant"] * 2
    assert [tags[4, g] for g in drivers[4]] == ["synergistic"] * 2
    assert [tags[c, passenger[c][0]] for c in concepts] == ["", ""]


def test_of_many_cells_some_are_taken(mini_cells):
    assert plant(mini_cells, max_cells=300).cells.n_obs <= 300


def test_precision_and_recall():
    assert precision_recall({1, 2, 3, 4}, {3, 4, 5}) == (0.5, pytest.approx(2 / 3))
    assert np.isnan(precision_recall(set(), {1})[0])


def test_too_few_genes(mini_cells):
    with pytest.raises(ValueError, match="genes are expressed in 10 to 60 % of the cells; planting needs 1600"):
        plant(mini_cells, hows=("sum",) * 200)
