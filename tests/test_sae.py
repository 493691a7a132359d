"""The sparse autoencoder: losses by hand, sparsity, recovery of a planted dictionary, stopping and going on."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from safetensors.torch import load_file, save_file

from scsae_utils import sae as module
from scsae_utils.sae import (
    ARCHITECTURES,
    SAE,
    SAEConfig,
    geometric_median,
    keep_largest,
    load_sae,
    read_metadata,
    save_sae,
    train_sae,
    training_loss,
)

QUICK = {"n_concepts": 12, "k": 3, "learning_rate": 3e-3, "batch_size": 32, "epochs": 6, "progress": False}


def data(n=100, dim=8, seed=0) -> np.ndarray:
    """Cell embeddings: unit length, three clusters."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, dim))[rng.integers(3, size=n)] + 0.4 * rng.normal(size=(n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def random_sae(sae="paper", seed=0, **config) -> SAE:
    """Weights with nothing at its start."""
    model = SAE(SAEConfig(sae=sae, n_concepts=12, k=3, **config), 8)
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
        loss, active = training_loss(sae, torch.from_numpy(a), torch.zeros(12, dtype=torch.bool))
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
        loss, _ = training_loss(sae, torch.from_numpy(a), torch.zeros(12, dtype=torch.bool))
        assert loss.item() == pytest.approx((rest**2).mean(), rel=1e-5)
        loss, _ = training_loss(sae, torch.from_numpy(a), torch.from_numpy(dead))
        expected = (rest**2).mean() + ((rest - u[:, dead] @ W_d[dead]) ** 2).mean() / 32
        assert loss.item() == pytest.approx(expected, rel=1e-5)

    def test_keep_largest(self):
        u = torch.tensor([[5.0, 1, 4], [3, 2, 0]])
        assert keep_largest(u, 2, per_row=True).tolist() == [[5, 0, 0], [3, 0, 0]]  # 2 in 2 rows: one each
        assert keep_largest(u, 2).tolist() == [[5, 0, 4], [0, 0, 0]]  # 2 of the whole batch
        assert keep_largest(u, 99).tolist() == u.tolist()

    def test_geometric_median_resists_outliers(self):
        """Of the corners of a square and its centre it is the centre; one far point does not draw it away."""
        corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
        torch.testing.assert_close(geometric_median(corners + 7), torch.tensor([7.0, 7]))
        line = torch.tensor([[0.0], [1], [2], [3], [1000]])  # on a line it is the median
        torch.testing.assert_close(geometric_median(line, 500), torch.tensor([2.0]), atol=0.01, rtol=0)

    def test_geometric_median_leaves_a_point_it_starts_on(self):
        """The mean of these is the first point, the median is 1."""
        points = torch.tensor([[0.0], [1], [1], [1], [-3]])
        torch.testing.assert_close(geometric_median(points), torch.tensor([1.0]), atol=0.01, rtol=0)


class TestTraining:
    @pytest.mark.parametrize("sae", ARCHITECTURES)
    def test_each_concept_has_unit_norm(self, sae):
        """The trap: W_d is (concepts, width), so the norm is along axis 1; along axis 0 it is of no meaning."""
        trained = train_sae(data(), sae=sae, **QUICK)
        W_d = trained.W_d.numpy()
        assert W_d.shape == (12, 8)
        np.testing.assert_allclose(np.linalg.norm(W_d, axis=1), 1, rtol=1e-5)
        assert np.abs(np.linalg.norm(W_d, axis=0) - 1).max() > 0.05

    @pytest.mark.parametrize("sae", ARCHITECTURES)
    def test_learns_and_keeps_its_history(self, sae):
        trained = train_sae(data(), sae=sae, **(QUICK | {"epochs": 60}))
        history = trained.history
        assert history["epoch"].tolist() == list(range(1, 61))
        assert history["loss"].iloc[-1] < 0.7 * history["loss"].iloc[0]
        assert history["variance_explained"].iloc[-1] > 0.6
        assert not trained.training and not any(p.requires_grad for p in trained.parameters())

    def test_history_is_of_the_weights_before_each_step(self):
        """One epoch of one batch: what the untrained dictionary explains, by hand."""
        a = data(50)
        trained = train_sae(a, sae="topk", **(QUICK | {"epochs": 1, "batch_size": 50}))
        start = SAE(trained.config, 8)
        with torch.no_grad():
            start.b_d.copy_(geometric_median(torch.from_numpy(a)))
            error = ((start.decode(start.encode(torch.from_numpy(a))).numpy() - a) ** 2).sum()
        row = trained.history.iloc[0]
        assert row["variance_explained"] == pytest.approx(1 - error / ((a - a.mean(0)) ** 2).sum(), rel=1e-4)
        assert row["loss"] == pytest.approx(error / a.size, rel=1e-4)

    def test_is_the_same_each_time_and_another_with_another_seed(self):
        one, same, other = (weights(train_sae(data(), sae="topk", seed=s, **QUICK)) for s in (1, 1, 2))
        assert all((one[name] == same[name]).all() for name in one)
        assert np.abs(one["W_d"] - other["W_d"]).max() > 0.1

    def test_recovers_a_planted_dictionary(self):
        """10 directions, 2 of them in each cell: each is found by some concept."""
        rng = np.random.default_rng(0)
        truth = np.linalg.qr(rng.normal(size=(16, 16)))[0][:10]
        u = np.zeros((800, 10))
        for row in u:
            row[rng.choice(10, 2, replace=False)] = rng.uniform(0.5, 1.5, 2)
        a = u @ truth + 0.01 * rng.normal(size=(800, 16))
        trained = train_sae(
            a, sae="topk", n_concepts=24, k=2, learning_rate=1e-2, batch_size=200, epochs=150, progress=False
        )
        best = (truth @ trained.W_d.numpy().T).max(axis=1)
        assert (best > 0.9).sum() >= 9
        assert trained.history["variance_explained"].iloc[-1] > 0.9

    def test_dead_concepts_are_revived(self, monkeypatch):
        """Eight kinds of cells, and all but four concepts start too weak to be chosen: the rest is left unexplained,
        unless the dead concepts are trained on it."""
        a = 3 * np.eye(8)[np.arange(160) % 8] + 0.1 * np.random.default_rng(0).normal(size=(160, 8))
        start = SAE.__init__

        def weak(self, config, dim):
            start(self, config, dim)
            with torch.no_grad():
                self.b_e[:4] += 1
                self.W_e[:, 4:] *= 0.01

        monkeypatch.setattr(SAE, "__init__", weak)
        settings = QUICK | {"sae": "batchtopk", "k": 1, "learning_rate": 0.01, "epochs": 100}
        without, revived = (train_sae(a, dead_epochs=n, **settings) for n in (0, 2))
        alive, after = ((sae.activations(a).getnnz(axis=0) > 0).sum() for sae in (without, revived))
        assert alive == 4 and after >= 7
        assert (
            without.history["variance_explained"].iloc[-1] < 0.7 < 0.95 < revived.history["variance_explained"].iloc[-1]
        )

    def test_only_training_cells_are_used(self):
        cells = AnnData(np.zeros((100, 1), np.float32), obsm={"X_scGPT": data()})
        cells.obs["split"] = pd.Categorical(["train"] * 70 + ["validation"] * 30)
        one = train_sae(cells, sae="batchtopk", **QUICK)
        cells.obsm["X_scGPT"][70:] = 1e6
        other = train_sae(cells, sae="batchtopk", **QUICK)
        alone = train_sae(data()[:70], sae="batchtopk", **QUICK)
        for name, tensor in weights(one).items():
            assert (tensor == weights(other)[name]).all() and (tensor == weights(alone)[name]).all()

    def test_leaves_the_embeddings_as_they_are(self):
        a = data()
        train_sae(a, sae="topk", **QUICK)
        assert (a == data()).all()


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
        assert trained.threshold > 0

    @pytest.mark.parametrize("sae", ARCHITECTURES)
    def test_concepts_of_a_cell_do_not_depend_on_its_batch(self, sae):
        trained = train_sae(data(), sae=sae, **QUICK)
        whole = trained.activations(data()).toarray()
        np.testing.assert_allclose(trained.activations(data()[[5]]).toarray(), whole[[5]], atol=1e-6)
        np.testing.assert_allclose(trained.activations(data(), batch_size=7).toarray(), whole, atol=1e-6)


class TestStoppingAndGoingOn:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        return tmp_path / "folder" / "training.safetensors"

    @pytest.mark.parametrize("sae", ARCHITECTURES)
    def test_result_is_the_same_bit_for_bit(self, sae, checkpoint, monkeypatch):
        settings = QUICK | {"sae": sae, "n_concepts": 60, "k": 1, "dead_epochs": 3}  # many are dead at the stop
        whole = train_sae(data(), **settings)
        steps, step = [], module.step

        def stops(*arguments):
            steps.append(1)
            if len(steps) == 15:  # in the middle of the fourth epoch of four batches
                raise KeyboardInterrupt
            step(*arguments)

        monkeypatch.setattr(module, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            train_sae(data(), checkpoint=checkpoint, checkpoint_every=2, **settings)
        assert read_metadata(checkpoint)["epoch"] == 2
        again = train_sae(data(), checkpoint=checkpoint, checkpoint_every=2, **settings)
        assert len(steps) == 15 + 16  # two epochs were not done again
        assert all((tensor == weights(again)[name]).all() for name, tensor in weights(whole).items())
        pd.testing.assert_frame_equal(again.history, whole.history)
        assert not checkpoint.exists()

    def test_after_a_kill(self, checkpoint, tmp_path):
        """kill -9 between two checkpoints, or while one is written: the last whole one is used."""
        np.save(tmp_path / "a.npy", data())
        settings = QUICK | {"sae": "batchtopk", "epochs": 100_000}
        code = (
            "import sys, numpy as np; from scsae_utils import train_sae\n"
            f"train_sae(np.load(sys.argv[1]), checkpoint=sys.argv[2], checkpoint_every=1, **{settings!r})"
        )
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a.npy"), str(checkpoint)])
        deadline = time.time() + 60
        while not checkpoint.exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.05)
        time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        done = read_metadata(checkpoint)["epoch"]
        assert done >= 1
        metadata = read_metadata(checkpoint)
        metadata["config"]["epochs"] = done + 3  # go on for three epochs only
        module.write_tensors(checkpoint, load_file(checkpoint), metadata)
        again = train_sae(data(), checkpoint=checkpoint, **(settings | {"epochs": done + 3}))
        whole = train_sae(data(), **(settings | {"epochs": done + 3}))
        assert all((tensor == weights(again)[name]).all() for name, tensor in weights(whole).items())

    @pytest.fixture
    def stopped(self, checkpoint, monkeypatch):
        """A checkpoint after two epochs."""
        with monkeypatch.context() as patch:
            save = module.save_checkpoint

            def save_and_stop(*arguments):
                save(*arguments)
                raise KeyboardInterrupt

            patch.setattr(module, "save_checkpoint", save_and_stop)
            with pytest.raises(KeyboardInterrupt):
                train_sae(data(), sae="topk", checkpoint=checkpoint, checkpoint_every=2, **QUICK)
        return checkpoint

    @pytest.mark.parametrize("change", [{"k": 2}, {"seed": 1}, {"epochs": 7}, {"n_concepts": 13}])
    def test_other_settings_are_refused(self, stopped, change):
        with pytest.raises(ValueError, match="of a run with other settings: delete it"):
            train_sae(data(), sae="topk", checkpoint=stopped, **(QUICK | change))
        assert stopped.exists()

    def test_other_cells_are_refused(self, stopped):
        with pytest.raises(ValueError, match="of a run on other embeddings: delete it"):
            train_sae(data(seed=1), sae="topk", checkpoint=stopped, **QUICK)

    def test_a_broken_checkpoint_is_refused(self, stopped):
        stopped.write_bytes(stopped.read_bytes()[:100])
        with pytest.raises(ValueError, match="cannot be read"):
            train_sae(data(), sae="topk", checkpoint=stopped, **QUICK)


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
            ({"sae": "jumprelu"}, "one of paper, topk, batchtopk"),
            ({"n_concepts": 0}, "n_concepts must be at least 1"),
            ({"batch_size": 0}, "batch_size"),
            ({"epochs": -3}, "epochs"),
            ({"learning_rate": 0}, "learning_rate must be positive"),
            ({"learning_rate": float("nan")}, "learning_rate must be positive"),
            ({"l1": -1e-5}, "l1"),
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
