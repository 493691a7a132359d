"""Metrics of a dictionary: values worked out by hand."""

import numpy as np
import pytest
from scipy import sparse

from scsae_utils import metrics

# Four cells, three concepts; the last concept is dead.
U = sparse.csr_matrix([[1.0, 2, 0], [3, 0, 0], [0, 4, 0], [5, 0, 0]])


def test_sparsity():
    assert metrics.l0(U) == 5 / 4
    assert metrics.density(U) == 5 / 12
    assert metrics.activation_frequency(U).tolist() == [3 / 4, 2 / 4, 0]


def test_post_processing_drops_the_rare_and_the_dead():
    assert metrics.surviving(U, 0.5).tolist() == [True, True, False]
    assert metrics.surviving(U, 0.6).tolist() == [True, False, False]
    assert metrics.surviving(U, 0).tolist() == [True, True, False]


def test_variance_explained():
    """About the mean (1, 0): 2 in all. One coordinate is missed by 1 in one cell."""
    a = np.array([[0.0, 0], [2, 0]])
    assert metrics.variance_explained(a, a) == 1
    assert metrics.variance_explained(a, np.array([[0.0, 0], [2, 1]])) == 1 - 1 / 2
    assert metrics.variance_explained(a, np.array([[1.0, 0], [1, 0]])) == 0  # the mean explains nothing


def test_cosine():
    """45 degrees, 90 degrees, and a cell of which nothing is left."""
    a = np.array([[1.0, 0], [0, 2], [3, 0]])
    b = np.array([[1.0, 1], [5, 0], [0, 0]])
    assert metrics.mean_cosine(a, b) == pytest.approx((np.sqrt(0.5) + 0 + 0) / 3)


def test_bias_of_shrunk_reconstructions():
    a = np.random.default_rng(0).normal(size=(50, 3)) + 10
    assert metrics.reconstruction_bias(a, a) == pytest.approx(1)
    assert metrics.reconstruction_bias(a, a.mean(0) + 0.7 * (a - a.mean(0))) == pytest.approx(0.7)


def test_neighbours_kept():
    """On a line at 0, 1, 3, 7, the nearest are 1, 0, 1, 3. Moved to 4, the second cell's nearest is 3, and 7's is 4."""
    a, b = np.array([[0.0], [1], [3], [7]]), np.array([[0.0], [4], [3], [7]])
    assert metrics.neighbours(a, 1).ravel().tolist() == [1, 0, 1, 2]
    assert metrics.neighbours(b, 1).ravel().tolist() == [2, 2, 1, 1]
    assert metrics.neighbours_kept(a, b, 1) == 1 / 4
    assert metrics.neighbours_kept(a, 2 * a + 1, 2) == 1


def test_f1_of_types():
    """Concept 0 is active in cells 0, 1, 3, type A is cells 0 and 1: 2 * 2 / (3 + 2)."""
    table = metrics.type_f1(U, ["A", "A", "B", "B"])
    assert table["A"].tolist() == [2 * 2 / 5, 2 * 1 / 4, 0]
    assert table["B"].tolist() == [2 * 1 / 5, 2 * 1 / 4, 0]


def test_stability():
    """The third vector has no partner of its own: one way it shares one, one to one it gets what is left."""
    one = np.array([[1.0, 0], [0, 1], [0, 2]])
    other = np.array([[0.0, 3], [5, 0], [1, 0]])
    assert metrics.stability(one, other) == {"max_cosine": 1, "matched_cosine": pytest.approx(2 / 3)}
    assert metrics.stability(one, one[::-1]) == {"max_cosine": 1, "matched_cosine": 1}


def test_correlations_equal_numpy():
    rng = np.random.default_rng(0)
    X, Y = (rng.normal(size=(30, n)) * (rng.random((30, n)) < 0.4) for n in (4, 5))
    Y[:, 2] = 3  # constant: numpy would give NaN
    found = metrics.correlations(sparse.csr_matrix(X), sparse.csr_matrix(Y))
    expected = np.corrcoef(X.T, np.delete(Y, 2, axis=1).T)[:4, 4:]
    np.testing.assert_allclose(np.delete(found, 2, axis=1), expected, atol=1e-12)
    assert (found[:, 2] == 0).all()


def test_recovery():
    """A dictionary of the true features in another order, scaled, with one more, is perfect; each is used once."""
    rng = np.random.default_rng(0)
    truth = sparse.random(200, 4, 0.3, random_state=rng, format="csr")
    noise = sparse.random(200, 1, 0.3, random_state=rng, format="csr")
    found = sparse.hstack([truth[:, [2, 0]], noise, truth[:, [3, 1]] * 7], format="csr")
    assert metrics.recovery(found, truth) == {"f1": pytest.approx(1), "correlation": pytest.approx(1)}
    twice = sparse.hstack([truth[:, [0, 0]]], format="csr")  # both find the first feature
    alone = metrics.recovery(truth[:, [0]], truth)
    assert alone == {"f1": pytest.approx(1 / 4), "correlation": pytest.approx(1 / 4)}
    assert metrics.recovery(twice, truth)["correlation"] < 0.35


def test_recovery_leaves_out_features_that_no_cell_has():
    truth = sparse.csr_matrix([[1.0, 0], [0, 0], [2, 0]])
    assert metrics.recovery(truth, truth) == {"f1": pytest.approx(1), "correlation": pytest.approx(1)}
