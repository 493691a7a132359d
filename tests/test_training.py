"""Training: what is learned, stopping and going on, several dictionaries in one pass, data on disk."""

import os
import signal
import subprocess
import sys
import time
from copy import deepcopy

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from safetensors.torch import load_file

from scsae_utils import training as module
from scsae_utils.sae import ARCHITECTURES, SAE, Dictionary, SAEConfig, make_sae, read_metadata, write_tensors
from scsae_utils.training import geometric_median, train_sae, train_saes

QUICK = {"n_concepts": 12, "k": 3, "learning_rate": 3e-3, "batch_size": 32, "epochs": 6, "progress": False}


def data(n=100, dim=8, seed=0) -> np.ndarray:
    """Cell embeddings: unit length, three clusters."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, dim))[rng.integers(3, size=n)] + 0.4 * rng.normal(size=(n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def weights(sae: SAE) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in sae.state_dict().items()}


def test_training_leaves_the_processor_as_it_was():
    """Tiny numbers are zero in training only: what comes after it is the same as without it."""
    train_sae(data(), **QUICK)
    assert (torch.tensor([1e-40]) * 1).item() > 0


class TestMedian:
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
        assert history["variance_explained"].iloc[-1] > 0.6
        assert not trained.training and not any(p.requires_grad for p in trained.parameters())

    def test_history_is_of_the_weights_before_each_step(self):
        """One epoch of one batch: what the untrained dictionary explains, by hand."""
        a = data(50)
        trained = train_sae(a, sae="topk", **(QUICK | {"epochs": 1, "batch_size": 50}))
        start = make_sae(trained.config, 8)
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
        cells.obsm["X_scGPT"][70:] *= 1e6
        other = train_sae(cells, sae="batchtopk", **QUICK)
        alone = train_sae(data()[:70], sae="batchtopk", **QUICK)
        for name, tensor in weights(one).items():
            assert (tensor == weights(other)[name]).all() and (tensor == weights(alone)[name]).all()

    def test_rate_and_penalty_rise_and_the_rate_falls(self, monkeypatch):
        """Ten epochs of one batch: up over the first two, down over the last five."""
        seen, loss, step = [], SAE.loss, module.step
        monkeypatch.setattr(
            SAE, "loss", lambda self, a, dead, warm=1.0: seen.append([warm]) or loss(self, a, dead, warm)
        )
        monkeypatch.setattr(module, "step", lambda s, o: seen[-1].append(o.param_groups[0]["lr"]) or step(s, o))
        train_sae(data(), **(QUICK | {"batch_size": 100, "epochs": 10, "learning_rate": 1.0}), warmup=0.2, decay=0.5)
        warm, rate = np.transpose(seen)
        assert warm == pytest.approx([0.5] + 9 * [1])
        assert rate == pytest.approx([0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])

    def test_early_stopping_takes_the_best_epoch(self):
        """Few cells and many concepts: soon learned by heart. The weights are those after the best epoch."""
        config = SAEConfig("topk", 64, 10, 1e-2, 200, k=4, patience=5)
        held_out = data(60, seed=0)[30:]
        trained = train_sae(data()[:10], config, held_out=held_out, progress=False)
        history = trained.history
        best = int(history["held_out_loss"].argmin())
        assert len(history) == best + 1 + 5 < 200
        error = (trained.decode_sparse(trained.activations(held_out)) - held_out) ** 2
        assert error.mean() == pytest.approx(history["held_out_loss"][best], rel=1e-4)

    @pytest.mark.parametrize("sae", [name for name in ARCHITECTURES if name != "topk"])
    def test_whitening_is_undone_in_the_end(self, sae, monkeypatch):
        """The dictionary before it is mapped back reads whitened cells as the one after it reads cells."""
        before, a = [], torch.from_numpy(data())
        back = Dictionary.map_back
        monkeypatch.setattr(Dictionary, "map_back", lambda d, M: (before.extend([deepcopy(d), M]), back(d, M)))
        trained = train_sae(a.numpy(), sae=sae, whiten=0.5, **(QUICK | {"epochs": 40}))
        whitened, M = before
        with torch.no_grad():
            u, v = whitened.encode(a @ M), trained.encode(a)
            assert torch.equal(u > 0, v > 0)
            torch.testing.assert_close(whitened.decode(u), trained.decode(v) @ M, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(trained.vectors, axis=1), 1, rtol=1e-5)
        if sae == "batchtopk":
            assert trained.activations(data()).nnz == 300

    def test_whitening_by_hand(self):
        """Variances 4 and 1 with whiten = 1: both become 2.5, the total stays 5. A floor of a half leaves 2 of 4."""
        a = torch.tensor([[2.0, 1], [2, -1], [-2, 1], [-2, -1]]) * (3 / 4) ** 0.5
        torch.testing.assert_close(torch.cov((a @ module.whitening(a, 1)).T), 2.5 * torch.eye(2))
        torch.testing.assert_close(module.whitening(a, 0), torch.eye(2))
        half = torch.cov((a @ module.whitening(a, 1, floor=0.5)).T).diagonal()
        torch.testing.assert_close(half, torch.tensor([5 * 2 / 3, 5 / 3]))

    def test_half_precision_learns_as_well(self):
        full, half = (train_sae(data(), sae="topk", precision=p, **(QUICK | {"epochs": 60})) for p in ("fp32", "bf16"))
        ends = [sae.history["variance_explained"].iloc[-1] for sae in (full, half)]
        assert ends[1] == pytest.approx(ends[0], abs=0.03)
        assert half.W_d.dtype == torch.float32

    def test_leaves_the_embeddings_as_they_are(self):
        a = data()
        train_sae(a, sae="topk", **QUICK)
        assert (a == data()).all()


class TestStoppingAndGoingOn:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        return tmp_path / "folder" / "training.safetensors"

    @pytest.fixture
    def stop(self, monkeypatch):
        """Makes training stop before a step."""

        def stop(before: int):
            steps, step = [], module.step

            def stops(*arguments):
                steps.append(1)
                if len(steps) == before:
                    raise KeyboardInterrupt
                step(*arguments)

            monkeypatch.setattr(module, "step", stops)
            return steps

        return stop

    @pytest.mark.parametrize("sae", ARCHITECTURES)
    def test_result_is_the_same_bit_for_bit(self, sae, checkpoint, stop):
        settings = QUICK | {"n_concepts": 60, "k": 1, "dead_epochs": 3}  # many are dead at the stop
        settings |= {"warmup": 0.2, "decay": 0.5, "whiten": 0.0 if sae == "topk" else 0.3}
        progress, config = (
            settings.pop("progress"),
            SAEConfig(sae, **settings),
        )
        whole = train_sae(data(), config, progress=progress)
        steps = stop(before=15)  # in the middle of the fourth epoch of four batches
        with pytest.raises(KeyboardInterrupt):
            train_saes(data(), [config], checkpoint=checkpoint, checkpoint_every=0, progress=progress)
        assert len(read_metadata(checkpoint)["history"][0]) == 3
        again = train_sae(data(), config, checkpoint=checkpoint, progress=progress)
        assert len(steps) == 15 + 12  # three epochs were not done again
        assert all((tensor == weights(again)[name]).all() for name, tensor in weights(whole).items())
        pd.testing.assert_frame_equal(again.history, whole.history)
        assert not checkpoint.exists()

    @pytest.mark.parametrize("before", [9, 90, 170])
    def test_early_stopping_is_the_same_too(self, before, checkpoint, stop):
        """Of two dictionaries in one pass, stopped before either ends, between the two ends, and while one waits."""
        configs = [SAEConfig("topk", 12, 32, rate, 60, k=3, patience=4) for rate in (0.03, 0.003)]
        settings = {"held_out": data(40, seed=0)[:20], "progress": False}
        whole = train_saes(data(), configs, **settings)
        assert len(whole[0].history) < len(whole[1].history)
        stop(before)
        with pytest.raises(KeyboardInterrupt):
            train_saes(data(), configs, checkpoint=checkpoint, checkpoint_every=0, **settings)
        again = train_saes(data(), configs, checkpoint=checkpoint, **settings)
        for one, other in zip(whole, again):
            assert all((tensor == weights(other)[name]).all() for name, tensor in weights(one).items())
            pd.testing.assert_frame_equal(one.history, other.history)

    def test_after_a_kill(self, checkpoint, tmp_path):
        """kill -9 between two checkpoints, or while one is written: the last whole one is used."""
        np.save(tmp_path / "a.npy", data())
        settings = {"sae": "batchtopk", "n_concepts": 12, "k": 3, "learning_rate": 3e-3, "batch_size": 32}
        settings |= {"patience": 100_000, "epochs": 100_000}
        code = (
            "import sys, numpy as np; from scsae_utils.training import SAEConfig, train_saes\n"
            "a = np.load(sys.argv[1])\n"
            f"config = SAEConfig(**{settings!r})\n"
            "train_saes(a[:80], [config], held_out=a[80:], checkpoint=sys.argv[2], checkpoint_every=0)"
        )
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a.npy"), str(checkpoint)])
        deadline = time.time() + 60
        while not checkpoint.exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.05)
        time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        metadata = read_metadata(checkpoint)
        done = len(metadata["history"][0])
        assert done >= 1
        metadata["configs"][0]["epochs"] = done + 3  # go on for three epochs only
        write_tensors(checkpoint, load_file(checkpoint), metadata)
        settings |= {"epochs": done + 3, "held_out": data()[80:], "progress": False}
        again = train_sae(data()[:80], checkpoint=checkpoint, **settings)
        whole = train_sae(data()[:80], **settings)
        assert all((tensor == weights(again)[name]).all() for name, tensor in weights(whole).items())

    @pytest.fixture
    def stopped(self, checkpoint, stop, monkeypatch):
        """A checkpoint after two epochs."""
        config = SAEConfig(**{k: v for k, v in QUICK.items() if k != "progress"}, sae="topk")
        stop(before=9)
        with pytest.raises(KeyboardInterrupt):
            train_saes(data(), [config], checkpoint=checkpoint, checkpoint_every=0, progress=False)
        monkeypatch.undo()
        return checkpoint

    @pytest.mark.parametrize("change", [{"k": 2}, {"seed": 1}, {"epochs": 7}, {"n_concepts": 13}])
    def test_other_settings_are_refused(self, stopped, change):
        with pytest.raises(ValueError, match="of a run with other settings: delete it"):
            train_sae(data(), sae="topk", checkpoint=stopped, **(QUICK | change))
        assert stopped.exists()

    def test_other_cells_are_refused(self, stopped):
        with pytest.raises(ValueError, match="of a run on other embeddings: delete it"):
            train_sae(data(seed=1), sae="topk", checkpoint=stopped, **QUICK)
        with pytest.raises(ValueError, match="of a run on other embeddings: delete it"):
            train_sae(data(), sae="topk", held_out=data(seed=1), checkpoint=stopped, **QUICK)

    def test_a_broken_checkpoint_is_refused(self, stopped):
        stopped.write_bytes(stopped.read_bytes()[:100])
        with pytest.raises(ValueError, match="cannot be read"):
            train_sae(data(), sae="topk", checkpoint=stopped, **QUICK)


class TestOnePass:
    def test_each_dictionary_is_as_if_trained_alone(self):
        """Seeds, widths, sparsities, architectures and lengths may differ."""
        common = {"batch_size": 32, "learning_rate": 3e-3}
        configs = [
            SAEConfig("topk", 12, epochs=6, k=3, seed=0, **common),
            SAEConfig("topk", 12, epochs=6, k=3, seed=1, **common),
            SAEConfig("batchtopk", 20, epochs=3, k=2, **common),
            SAEConfig("jumprelu", 12, epochs=6, k=3, patience=2, **common),
            SAEConfig("paper", 16, epochs=9, precision="bf16", **common),
        ]
        together = train_saes(data(), configs, held_out=data(30, seed=0), progress=False)
        for config, one in zip(configs, together):
            alone = train_sae(data(), config, held_out=data(30, seed=0), progress=False)
            assert one.config == config
            assert all((tensor == weights(alone)[name]).all() for name, tensor in weights(one).items())
            pd.testing.assert_frame_equal(one.history, alone.history)

    def test_what_a_pass_cannot_do_is_refused(self):
        with pytest.raises(ValueError, match="one batch_size and order_seed"):
            train_saes(data(), [SAEConfig(batch_size=8), SAEConfig(batch_size=9)])
        with pytest.raises(ValueError, match="at least one configuration"):
            train_saes(data(), [])
        with pytest.raises(ValueError, match="patience needs held-out cells"):
            train_sae(data(), patience=3)


class TestDataOnDisk:
    @pytest.fixture
    def long(self):
        """Three groups of the reader."""
        return np.random.default_rng(0).normal(size=(2 * module.GROUP + 3000, 3)).astype(np.float32)

    def test_every_cell_comes_once_in_another_order_each_time(self, long):
        long[:, 0] = np.arange(len(long))
        rows = module.Rows(long)
        first, same, other = (torch.cat(list(rows.batches(1000, seed))) for seed in (0, 0, 1))
        assert torch.equal(first, same) and not torch.equal(first, other)
        assert torch.equal(first[:, 0].sort().values, torch.arange(len(long), dtype=torch.float32))
        assert np.corrcoef(first[:, 0], np.arange(len(long)))[0, 1] < 0.2  # well mixed, although read in stretches

    def test_files_give_the_same_dictionary_as_an_array(self, tmp_path):
        a, settings = data(3000), QUICK | {"sae": "batchtopk", "epochs": 2}
        np.save(tmp_path / "a.npy", a)
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file["a"] = a
        expected = weights(train_sae(a, **settings))
        with h5py.File(tmp_path / "a.h5") as file:
            for source in (np.load(tmp_path / "a.npy", mmap_mode="r"), file["a"]):
                found = weights(train_sae(source, **settings))
                assert all((tensor == found[name]).all() for name, tensor in expected.items())

    def test_survey_is_the_sum_of_squares_about_the_mean(self, long):
        chosen = np.sort(np.random.default_rng(1).choice(len(long), 5000, replace=False))
        total, digest = module.Rows(long + 100, chosen).survey()
        x = (long + 100)[chosen].astype(float)
        assert total == pytest.approx(((x - x.mean(0)) ** 2).sum(), rel=1e-6)
        assert digest == module.Rows(x.astype(np.float32)).survey()[1] != module.Rows(long).survey()[1]

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
    def test_memory_does_not_grow_with_the_file(self, tmp_path):
        """Peak of a process that trains on a file of 40 MB, beside one on a file of 240 MB."""
        code = (
            "import sys, numpy as np; from scsae_utils import training\n"
            "training.GROUP = 4096\n"
            "a = np.load(sys.argv[1], mmap_mode='r')\n"
            "training.train_sae(a, sae='topk', n_concepts=8, k=2, batch_size=4096, epochs=1, progress=False)\n"
            "status = dict(line.split(':') for line in open('/proc/self/status'))\n"
            "sys.stdout.write(status['VmHWM'].split()[0])"
        )
        peaks = []
        for n in (20_000, 120_000):
            np.save(tmp_path / "a.npy", np.arange(n * 512, dtype=np.float32).reshape(n, 512) % 7)
            run = subprocess.run([sys.executable, "-c", code, tmp_path / "a.npy"], capture_output=True, check=True)
            peaks.append(int(run.stdout) / 1024)
        assert peaks[1] - peaks[0] < 100  # MB, of 200; pages of the file that are in memory count, as long as they are
