"""The architectures: losses by hand, sparsity, files, settings."""

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from safetensors.torch import load_file, save_file

from scsae_utils import sae as module
from scsae_utils.sae import ARCHITECTURES, SAE, SAEConfig, keep_largest, load_sae, make_sae, read_metadata, save_sae
from scsae_utils.training import train_sae

QUICK = {"n_concepts": 12, "k": 3, "learning_rate": 3e-3, "batch_size": 32, "epochs": 6, "progress": False}


def data(n=100, dim=8, seed=0) -> np.ndarray:
    """Cell embeddings: unit length, three clusters."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, dim))[rng.integers(3, size=n)] + 0.4 * rng.normal(size=(n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def random_sae(sae="paper", seed=0, **config) -> SAE:
    """Weights with nothing at its start."""
    model = make_sae(SAEConfig(sae=sae, n_concepts=12, k=3, **config), 8)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (model.W_e, model.b_e, model.b_d):
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return model


def weights(sae: SAE) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in sae.state_dict().items()}


class TestFormulas:
    def test_encoder_and_decoder_are_those_of_the_paper(self):
        sae, a = random_sae(), data()
        W_e, b_e, W_d, b_d = (getattr(sae, name).detach().numpy() for name in ("W_e", "b_e", "W_d", "b_d"))
        u = np.maximum((a - b_d) @ W_e + b_e, 0)
        with torch.no_grad():
            np.testing.assert_allclose(sae.encode(torch.from_numpy(a)), u, atol=1e-5)
            np.testing.assert_allclose(sae.decode(torch.from_numpy(u)), u @ W_d + b_d, atol=1e-5)
        np.testing.assert_allclose(sae.activations(a, batch_size=33).toarray(), u, atol=1e-5)

    def test_loss_of_the_paper(self):
        sae, a = random_sae(l1=0.01), data(10)
        W_e, b_e, W_d, b_d = (getattr(sae, name).detach().numpy() for name in ("W_e", "b_e", "W_d", "b_d"))
        u = np.maximum((a - b_d) @ W_e + b_e, 0)
        expected = ((u @ W_d + b_d - a) ** 2).mean() + 0.01 * np.abs(u).sum(1).mean()
        loss, active, _ = sae.loss(torch.from_numpy(a), torch.zeros(12, dtype=torch.bool))
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(active.detach(), u, atol=1e-5)

    def test_loss_of_topk_with_dead_concepts(self):
        """The dead explain what the living leave: 1/32 of the error of that."""
        sae, a = random_sae("topk"), data(10)
        W_e, b_e, W_d, b_d = (getattr(sae, name).detach().numpy() for name in ("W_e", "b_e", "W_d", "b_d"))
        u = np.maximum((a - b_d) @ W_e + b_e, 0)
        living = np.where(u >= np.sort(u, axis=1)[:, [-3]], u, 0)
        rest = a - (living @ W_d + b_d)
        dead = np.arange(12) >= 9
        loss, *_ = sae.loss(torch.from_numpy(a), torch.zeros(12, dtype=torch.bool))
        assert loss.item() == pytest.approx((rest**2).mean(), rel=1e-5)
        loss, *_ = sae.loss(torch.from_numpy(a), torch.from_numpy(dead))
        expected = (rest**2).mean() + ((rest - u[:, dead] @ W_d[dead]) ** 2).mean() / 32
        assert loss.item() == pytest.approx(expected, rel=1e-5)

    def test_loss_of_matryoshka(self):
        """The mean over the first 3, 6 and 12 concepts, of activations that were chosen from all together."""
        sae, a = random_sae("matryoshka", prefixes=(0.25, 0.5, 1)), torch.from_numpy(data(10))
        nobody = torch.zeros(12, dtype=torch.bool)
        with torch.no_grad():
            u = keep_largest(sae.pre_activations(a), 3 * 10)
            errors = [((u[:, :n] @ sae.W_d[:n] + sae.b_d - a) ** 2).mean().item() for n in (3, 6, 12)]
            loss, active, rest = sae.loss(a, nobody)
        assert loss.item() == pytest.approx(np.mean(errors), rel=1e-5)
        assert torch.equal(active, u)
        torch.testing.assert_close(rest, a - sae.decode(u))

    def test_loss_and_gradient_of_jumprelu(self):
        """A threshold t moves by what is within the window: -1 / width for the count, -t / width for the activation."""
        sae, a = random_sae("jumprelu", bandwidth=0.2, l0=0.5), torch.from_numpy(data(20))
        pre, t, width = sae.pre_activations(a).detach(), sae.log_threshold.exp().detach(), 0.2
        on, near = (pre > t).float(), ((pre - t).abs() < width / 2).float()
        loss, u, rest = sae.loss(a, torch.zeros(12, dtype=torch.bool), warm=0.3)
        torch.testing.assert_close(u, pre * on)
        scale, count = (a - a.mean(0)).pow(2).mean(), on.sum(1).mean()
        expected = rest.pow(2).mean() / scale + 0.3 * 0.5 * (count / 3 - 1) ** 2
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        loss.backward()
        du = -2 * rest.detach() @ sae.W_d.detach().T / (a.numel() * scale)
        d_count = 0.3 * 0.5 * 2 * (count / 3 - 1) / 3
        d_threshold = (near * (-t / width * du - d_count / width / len(a))).sum(0)
        assert near.any(0).sum() > 6
        torch.testing.assert_close(sae.log_threshold.grad, d_threshold * t, rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("sae", ["batchtopk", "matryoshka"])
    def test_calibration_sets_the_mean_number(self, sae):
        model, a = random_sae(sae), data(100)
        model.calibrate(torch.from_numpy(a), 3)
        assert model.activations(a).nnz == 300
        model.calibrate(torch.from_numpy(a), 12)  # all that are positive
        assert model.activations(a).nnz == (model.pre_activations(torch.from_numpy(a)) > 0).sum()

    def test_the_class_is_that_of_the_configuration(self):
        for name, kind in ARCHITECTURES.items():
            assert type(make_sae(SAEConfig(name, n_concepts=40), 3)) is kind
        with pytest.raises(TypeError, match="make_sae"):
            SAE(SAEConfig("topk"), 3)

    def test_keep_largest(self):
        u = torch.tensor([[5.0, 1, 4], [3, 2, 0]])
        assert keep_largest(u, 2, per_row=True).tolist() == [[5, 0, 0], [3, 0, 0]]  # 2 in 2 rows: one each
        assert keep_largest(u, 2).tolist() == [[5, 0, 4], [0, 0, 0]]  # 2 of the whole batch
        assert keep_largest(u, 99).tolist() == u.tolist()


class TestSparsity:
    def test_topk_keeps_at_most_k(self):
        u = random_sae("topk").activations(data(300))
        assert u.getnnz(axis=1).max() == 3
        dense = random_sae("paper").activations(data(300)).toarray()
        for row, all_of_it in zip(u.toarray(), dense):  # and they are the largest ones
            assert set(np.flatnonzero(row)) == set(np.argsort(-all_of_it)[:3][np.sort(all_of_it)[::-1][:3] > 0])

    def test_batchtopk_is_about_k_on_average(self):
        trained = train_sae(data(400), sae="batchtopk", **(QUICK | {"epochs": 100}))
        active = trained.activations(data(400)).getnnz(axis=1)
        assert 2 < active.mean() < 4 and active.std() > 0  # cells may differ
        assert (trained.threshold > 0).all()

    @pytest.mark.parametrize("sae", ARCHITECTURES)
    def test_concepts_of_a_cell_do_not_depend_on_its_batch(self, sae):
        trained = train_sae(data(), sae=sae, **QUICK)
        whole = trained.activations(data()).toarray()
        np.testing.assert_allclose(trained.activations(data()[[5]]).toarray(), whole[[5]], atol=1e-6)
        np.testing.assert_allclose(trained.activations(data(), batch_size=7).toarray(), whole, atol=1e-6)


class TestFiles:
    @pytest.mark.parametrize("sae", ARCHITECTURES)
    def test_round_trip(self, sae, tmp_path):
        trained = train_sae(data(), sae=sae, **QUICK)
        save_sae(trained, tmp_path / "new" / "sae.safetensors")
        opened = load_sae(tmp_path / "new" / "sae.safetensors")
        assert opened.config == trained.config and not opened.training
        assert (opened.activations(data()) != trained.activations(data())).nnz == 0
        pd.testing.assert_frame_equal(opened.history, trained.history)
        assert [p.name for p in (tmp_path / "new").iterdir()] == ["sae.safetensors"]  # nothing half-written is left

    def test_missing_and_foreign_files(self, tmp_path):
        path = tmp_path / "sae.safetensors"
        with pytest.raises(FileNotFoundError, match="run chapter 02_sae"):
            load_sae(path)
        save_file({"b_d": torch.zeros(3)}, path)
        with pytest.raises(ValueError, match="carries no SAE configuration"):
            load_sae(path)
        path.write_bytes(b"no tensors here")
        with pytest.raises(ValueError, match="cannot be read"):
            load_sae(path)

    @pytest.mark.parametrize("spoil", ["missing", "shape", "setting"])
    def test_files_that_do_not_fit(self, tmp_path, spoil):
        path = tmp_path / "sae.safetensors"
        save_sae(random_sae(), path)
        tensors, metadata = load_file(path), read_metadata(path)
        if spoil == "missing":
            tensors.pop("b_e")
        elif spoil == "shape":
            tensors["W_d"] = torch.zeros(12, 9)
        else:
            metadata["config"]["flavour"] = "sweet"
        module.write_tensors(path, tensors, metadata)
        with pytest.raises(ValueError, match="does not fit its configuration"):
            load_sae(path)


class TestRefusals:
    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"sae": "vanilla"}, "one of paper, topk, batchtopk"),
            ({"n_concepts": 0}, "n_concepts must be at least 1"),
            ({"batch_size": 0}, "batch_size"),
            ({"epochs": -3}, "epochs"),
            ({"learning_rate": 0}, "learning_rate must be positive"),
            ({"learning_rate": float("nan")}, "learning_rate must be positive"),
            ({"l1": -1e-5}, "l1"),
            ({"aux": -1}, "aux"),
            ({"warmup": 0.7, "decay": 0.4}, "shares of the steps"),
            ({"whiten": 1.5}, "whiten must be from 0 to 1"),
            ({"sae": "topk", "whiten": 0.5}, "0 with topk"),
            ({"precision": "fp8"}, "fp32 or bf16"),
            ({"prefixes": (0.5, 0.25, 1)}, "rising shares that end with 1"),
            ({"prefixes": (0.5,)}, "rising shares that end with 1"),
            ({"prefixes": ()}, "rising shares that end with 1"),
            ({"bandwidth": 0}, "bandwidth must be positive"),
            ({"sae": "topk", "n_concepts": 8, "k": 9}, "k = 9 active concepts out of n_concepts = 8"),
        ],
    )
    def test_settings_that_cannot_be(self, settings, message):
        with pytest.raises(ValueError, match=message):
            SAEConfig(**settings)

    def test_defaults_are_the_papers(self):
        config = SAEConfig()
        assert (config.sae, config.n_concepts, config.batch_size, config.epochs) == ("paper", 10_000, 1024, 1000)
        assert (config.learning_rate, config.l1) == (1e-6, 5e-5)

    def test_unknown_settings_and_both_forms(self):
        with pytest.raises(TypeError, match="lamda"):
            train_sae(data(), lamda=3)
        with pytest.raises(ValueError, match="not both"):
            train_sae(data(), SAEConfig(), k=3)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_embeddings_that_are_not_finite(self, value):
        a = data()
        a[7, 3] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            train_sae(a, **QUICK)

    def test_embeddings_that_are_not_there(self):
        with pytest.raises(ValueError, match="no 'X_scGPT': run scsae_utils.embed first"):
            train_sae(AnnData(np.zeros((5, 2))), **QUICK)
        with pytest.raises(ValueError, match="at least two"):
            train_sae(data()[:1], **QUICK)
