"""Features that are known, found again by each architecture: python benchmarks/sae_synthetic.py

Embeddings are made from a known sparse dictionary (:mod:`scsae_utils.synthetic`): frequencies follow a power law, and
features come in groups, as subtypes to a cell type. The dictionaries have twice as many concepts as there are features,
and aim at the true number of active ones; the weight of the paper's penalty is searched for. Concepts and features are
matched one to one by the correlation of their activations, on cells that were not in training. NMF is left out: these
embeddings are no sums of positive parts. Figures are means over seeds of the data and of the dictionaries.
"""

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from anndata import AnnData

sys.path.insert(0, str(Path(__file__).parents[1]))

from scsae_utils.controls import paper_at  # noqa: E402
from scsae_utils.dictionaries import BaselineConfig, fit_baseline  # noqa: E402
from scsae_utils.metrics import l0, recovery, variance_explained  # noqa: E402
from scsae_utils.sae import ARCHITECTURES, SAEConfig  # noqa: E402
from scsae_utils.synthetic import SyntheticConfig, make_synthetic  # noqa: E402
from scsae_utils.training import train_saes  # noqa: E402

TRAIN = 0.8  # share of the cells


def main() -> None:
    from record import keep

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    data = SyntheticConfig(args.cells, args.features // 2, args.features, l0=8, groups=args.features // 8, noise=0.02)
    rows = [row for seed in range(args.seeds) for row in measure(replace(data, seed=seed), args.epochs)]
    names = list(dict.fromkeys(row["dictionary"] for row in rows))
    figures = {
        score: {name: round(statistics.mean(r[score] for r in rows if r["dictionary"] == name), 4) for name in names}
        for score in ("f1", "correlation", "variance_explained", "l0")
    }
    keep("sae_synthetic", rows, figures)


def measure(settings: SyntheticConfig, epochs: int) -> list[dict]:
    """Rows of one data set: each dictionary with its scores on held-out cells."""
    data = make_synthetic(settings)
    n = int(TRAIN * settings.n_cells)
    train, test = data.a[:n], data.a[n:]
    k, size = round(l0(data.U)), 2 * settings.n_features
    config = SAEConfig("batchtopk", size, 256, 2e-3, epochs, l1=1e-2, k=k, decay=0.3, bandwidth=0.1, seed=settings.seed)
    configs = {name: replace(config, sae=name) for name in ARCHITECTURES}
    configs |= {
        "paper": paper_at(AnnData(obsm={"X_scGPT": train}), config),
        "random dictionary": replace(config, train_decoder=False),
    }
    made = dict(zip(configs, train_saes(train, list(configs.values()))))
    for method in ("pca", "ica", "raw"):
        made[method] = fit_baseline(train, BaselineConfig(method, size, k, settings.seed))
    rows = []
    for name, dictionary in made.items():
        U = dictionary.activations(test)
        scores = {key: float(value) for key, value in recovery(U, data.U[n:]).items()}
        explained = variance_explained(test, dictionary.decode_sparse(U))
        rows.append(
            {"dictionary": name, "seed": settings.seed} | scores | {"variance_explained": explained, "l0": l0(U)}
        )
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
