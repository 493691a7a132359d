"""Small things that many tests share, made once. None of them needs the pretrained model or the network."""

import os

# The tensors here are too small to be shared out. Numba counts too: it sets the number of threads that torch uses.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import genuine  # noqa: E402
import matplotlib  # noqa: E402

matplotlib.use("Agg")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import scsae_utils  # noqa: E402
from scsae_utils.cells import split_cells  # noqa: E402
from scsae_utils.concepts import add_taxonomy, concept_data  # noqa: E402
from scsae_utils.sae import SAE, SAEConfig  # noqa: E402
from scsae_utils.scgpt import ScGPT, ScGPTConfig  # noqa: E402


def perturbed(config: ScGPTConfig, genes, seed: int = 0) -> ScGPT:
    """A network whose norms and biases are not at their start (1 and 0), so that leaving one out shows."""
    vocab = {gene: i for i, gene in enumerate(["<pad>", "<cls>", "<eoc>", *genes])}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ScGPT(config, vocab)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn_like(parameter)
            model.encoder.embedding.weight.normal_()
    return model.eval().requires_grad_(False)


def batch(model: ScGPT, lengths, seed: int = 0):
    """Random cells as ``embed_data`` collates them: ids, values and True where there is padding."""
    rng = np.random.default_rng(seed)
    ids = np.full((len(lengths), max(lengths)), model.vocab["<pad>"])
    values = np.full(ids.shape, -2.0, np.float32)
    for row, n in enumerate(lengths):
        ids[row, :n] = np.r_[model.vocab["<cls>"], rng.choice(np.arange(3, len(model.vocab)), n - 1, replace=False)]
        values[row, 1:n] = rng.uniform(1, 50, n - 1)
    padding = np.arange(max(lengths)) >= np.array(lengths)[:, None]
    return torch.from_numpy(ids), torch.from_numpy(values), torch.from_numpy(padding)


def naive(model, ids, values) -> np.ndarray:
    """The model run on one cell, on its own."""
    return model(torch.as_tensor(ids)[None], torch.as_tensor(values, dtype=torch.float32)[None])[0].numpy()


@pytest.fixture(scope="session")
def genuine_module():
    """Imports a module of the genuine scgpt; see :mod:`genuine`.

    The wheel is there for comparison only, so that a machine may lack it; with ``CI`` set it has to be there.
    """
    if not genuine.is_installed():
        message = f"the genuine scgpt is not installed: pip install --no-deps scgpt=={genuine.VERSION}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return genuine.module


@pytest.fixture(scope="session")
def mini_cells():
    """The packaged cells, as they are loaded; copy before a change."""
    return scsae_utils.load_cells()


@pytest.fixture(scope="session")
def tiny_model(mini_cells):
    """scGPT of 2 layers, 16 wide, that knows the genes of the packaged cells."""
    return perturbed(ScGPTConfig(embsize=16, nheads=2, d_hid=24, nlayers=2), mini_cells.var_names)


@pytest.fixture(scope="session")
def embedded(mini_cells, tiny_model):
    """160 cells of both studies, embedded, split and with a map; copy before a change."""
    cells = mini_cells[np.random.default_rng(0).choice(mini_cells.n_obs, 160, replace=False)].copy()
    scsae_utils.embed(cells, tiny_model, progress=False)
    cells.obsm["X_umap"] = cells.obsm["X_scGPT"][:, :2]  # a stand-in: nothing here is about UMAP
    return split_cells(cells)


@pytest.fixture(scope="session")
def sae(embedded):
    """24 concepts, 4 of them active in a cell on average."""
    return scsae_utils.train_sae(
        embedded, sae="batchtopk", n_concepts=24, k=4, learning_rate=3e-3, batch_size=64, epochs=40, progress=False
    )


@pytest.fixture(scope="session")
def concepts(embedded, sae):
    """Cells x concepts with taxonomy."""
    return add_taxonomy(concept_data(embedded, sae))


@pytest.fixture(scope="session")
def few_cells(embedded):
    """60 cells of 80 genes, so that every gene can be occluded in no time; each expresses 5 genes or more."""
    genes = np.asarray((embedded.X > 0).sum(0)).ravel().argsort()[::-1][:240:3]
    part = embedded[:60, np.sort(genes)].copy()
    return part[part.X.getnnz(axis=1) >= 5].copy()


@pytest.fixture(scope="session")
def fed(few_cells, tiny_model):
    return scsae_utils.embed(few_cells.copy(), tiny_model, progress=False)


@pytest.fixture(scope="session")
def relu_sae(fed):
    """12 concepts, each active in about 30 % of the cells, without the jumps of a threshold."""
    sae = SAE(SAEConfig(n_concepts=12, seed=3), fed.obsm["X_scGPT"].shape[1])
    sae.requires_grad_(False)
    sae.b_d.copy_(torch.from_numpy(fed.obsm["X_scGPT"].mean(0)))
    before = (torch.from_numpy(fed.obsm["X_scGPT"]) - sae.b_d) @ sae.W_e
    sae.b_e.copy_(-before.quantile(0.7, dim=0))
    return sae.eval()
