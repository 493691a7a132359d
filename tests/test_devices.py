"""On a GPU every step does what it does on the CPU: no tensor is left behind on the wrong side."""

import numpy as np
import pandas as pd
import pytest
import torch
from pretend_gpu import DEVICE, pretend_gpu

from scsae_utils.attribution import AttributionConfig
from scsae_utils.curves import deletion_curves
from scsae_utils.embedding import at_precision, embed
from scsae_utils.encoder import find_device
from scsae_utils.redundancy import set_losses
from scsae_utils.sae import ARCHITECTURES, SAEConfig
from scsae_utils.screening import attribute_all
from scsae_utils.training import train_sae


@pytest.fixture
def on_gpu(tiny_model):
    with pretend_gpu():
        yield at_precision(tiny_model, device="cuda")


class TestTheGPUOfTheseTests:
    def test_refuses_what_a_gpu_refuses(self, on_gpu):
        here, there = torch.ones(3), torch.ones(3, device=DEVICE)
        assert there.device == on_gpu.device == DEVICE
        for mixed in (
            lambda: here + there,
            lambda: here[there.long()],
            lambda: there.numpy(),
            lambda: np.asarray(there),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                mixed()
        np.testing.assert_array_equal((there[here.long()] + 1).cpu().numpy(), [2, 2, 2])


class TestSteps:
    def test_embedding(self, fed, tiny_model, on_gpu):
        there = embed(fed.copy(), tiny_model, device="cuda", progress=False)
        np.testing.assert_allclose(there.obsm["X_scGPT"], fed.obsm["X_scGPT"], atol=1e-6)
        assert there.uns["scgpt"]["device"] == "cuda" and fed.uns["scgpt"]["device"] == "cpu"

    def test_random_weights_are_where_the_model_is(self, tiny_model, on_gpu):
        there, here = on_gpu.random_like(3), tiny_model.random_like(3)
        assert there.device == DEVICE and there.fingerprint() == here.fingerprint()

    @pytest.mark.parametrize("method", ["screened", "exact"])
    def test_attribution(self, fed, tiny_model, relu_sae, on_gpu, method):
        config = AttributionConfig(n_prototypes=3, n_counterfactuals=5)
        here, there = (
            attribute_all(fed, model, relu_sae, [4, 7], config, method, progress=False)
            for model in (tiny_model, on_gpu)
        )
        pd.testing.assert_frame_equal(there, here, atol=1e-4)

    def test_several_genes_at_once_and_deletion_curves(self, fed, tiny_model, relu_sae, on_gpu):
        genes = list(fed.var_names[:6])
        rows = np.flatnonzero(relu_sae.activations(fed.obsm["X_scGPT"])[:, 4].toarray().ravel())[:3]
        for work in (
            lambda model: set_losses(fed, model, relu_sae, {4: rows}, {4: {"some": genes}}, progress=False),
            lambda model: deletion_curves(fed, model, relu_sae, 4, rows, {"one": genes}),
        ):
            pd.testing.assert_frame_equal(work(on_gpu), work(tiny_model), atol=1e-4)

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_training(self, embedded, architecture, tmp_path):
        config = SAEConfig(architecture, n_concepts=16, batch_size=64, learning_rate=1e-3, epochs=3, k=4)
        here = train_sae(embedded, config, progress=False)
        with pretend_gpu():
            there = train_sae(embedded, config, device="cuda", checkpoint=tmp_path / "checkpoint", progress=False)
        assert there.W_e.device.type == "cpu"
        np.testing.assert_allclose(there.vectors, here.vectors, atol=1e-4)
        pd.testing.assert_frame_equal(there.history, here.history, atol=1e-4)


class TestWhere:
    def test_auto_is_the_cpu_where_there_is_no_gpu(self, monkeypatch):
        for backend in ("cuda", "backends.mps"):
            monkeypatch.setattr(f"torch.{backend}.is_available", lambda: False)
        assert find_device("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match="there is no device 'cuda:1' here; there are: cpu"):
            find_device("cuda:1")
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        assert find_device("auto") == torch.device("cuda", 0) and find_device("cuda:1") == torch.device("cuda", 1)

    def test_a_dictionary_is_trained_where_its_cells_were_embedded(self, embedded, monkeypatch):
        cells = embedded.copy()
        cells.uns["scgpt"] = {**cells.uns["scgpt"], "device": "cuda"}
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(ValueError, match="no device 'cuda'"):
            train_sae(cells, n_concepts=4, epochs=1, progress=False)
        train_sae(cells, n_concepts=4, epochs=1, device="cpu", progress=False)
