"""The sparse step is the dense one: gradients, active concepts, and whole trainings; stopping and going on."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from scsae_utils import sparse_training, training
from scsae_utils.sae import SAE, SAEConfig
from scsae_utils.sparse_training import sparse_step
from scsae_utils.training import dense_gradients, step, train_sae, train_saes

QUICK = {"n_concepts": 60, "learning_rate": 3e-3, "batch_size": 32, "epochs": 8, "l1": 3e-3, "progress": False}


def cells(n=100, dim=24, seed=0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, dim))[rng.integers(3, size=n)] + 0.4 * rng.normal(size=(n, dim))
    return torch.from_numpy((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))


def untrained(bias=-0.3, dim=24, n_concepts=150, seed=0, **config):
    """Weights with nothing at its start, and their optimiser."""
    sae = SAE(SAEConfig(n_concepts=n_concepts, **config), dim)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.W_e += 0.1 * torch.randn(sae.W_e.shape, generator=generator)
        sae.b_e += bias + 0.1 * torch.randn(sae.b_e.shape, generator=generator)
        sae.b_d += 0.1 * torch.randn(sae.b_d.shape, generator=generator)
    return sae, torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)


def dense_step(sae, optimizer, a, warm=1.0):
    done = dense_gradients(sae, a, torch.zeros(sae.config.n_concepts, dtype=torch.bool), warm)
    step(sae, optimizer)
    return done


@pytest.fixture
def always_sparse(monkeypatch):
    """However small the dictionary and however many are active."""
    monkeypatch.setattr(sparse_training, "SMALLEST", 0)
    monkeypatch.setattr(sparse_training, "DENSEST", 1.0)


@pytest.fixture
def kinds(monkeypatch):
    """Which kind of step was made, in order."""
    made = []

    def note(name, function):
        def noted(*arguments):
            result = function(*arguments)
            made.extend([name] * (result is not None))
            return result

        return noted

    monkeypatch.setattr(training, "sparse_step", note("sparse", sparse_step))
    monkeypatch.setattr(training, "dense_gradients", note("dense", dense_gradients))
    return made


def weights(sae) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in sae.state_dict().items()}


@pytest.mark.usefixtures("always_sparse")
class TestIsTheDenseStep:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("bias, n, share", [(-0.3, 100, None), (-0.3, 1, None), (-9, 100, 0), (9, 100, 1)])
    def test_loss_and_all_gradients(self, bias, n, share, dtype):
        """Few active, one cell, none active, all active. After one step Adam's first moment is 0.1 gradient."""
        (one, adam), (other, reference) = (untrained(bias, l1=0.01) for _ in range(2))
        a = cells(n)
        expected, found = dense_step(other, reference, a, 0.7), sparse_step(one, adam, a, 0.7, dtype)
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert found.squared_error == pytest.approx(expected.squared_error, rel=1e-6)
        assert torch.equal(found.fired, expected.fired) and found.n_active == expected.n_active
        assert found.n_active == share * n * 150 if share is not None else 0 < found.n_active < 0.5 * n * 150
        for name in ("W_e", "b_e", "W_d", "b_d"):
            p, q = getattr(one, name), getattr(other, name)
            gradient, right = adam.state[p]["exp_avg"] / 0.1, reference.state[q]["exp_avg"] / 0.1
            assert (right.abs().max() > 0) == (name == "b_d" or share != 0)
            torch.testing.assert_close(gradient, right, rtol=0, atol=2e-6 * right.abs().max().item(), msg=name)

    def test_many_steps_and_the_optimiser_after_them(self):
        """Concepts come and go, so that some are moved by momentum alone; a dense step can follow."""
        (one, adam), (other, reference) = (untrained(-0.4, l1=0.01) for _ in range(2))
        for i in range(30):
            dense_step(other, reference, cells(20, seed=i))
            (dense_step if i == 20 else sparse_step)(one, adam, cells(20, seed=i))
        for p, q in zip(one.parameters(), other.parameters()):
            torch.testing.assert_close(p, q, rtol=0, atol=2e-5)
            assert adam.state[p]["step"] == reference.state[q]["step"] == 30
            for moment in ("exp_avg", "exp_avg_sq"):
                right = reference.state[q][moment]
                torch.testing.assert_close(
                    adam.state[p][moment], right, rtol=0, atol=1e-4 * right.abs().max().item(), msg=moment
                )
        np.testing.assert_allclose(one.W_d.detach().norm(dim=1), 1, rtol=1e-6)

    def test_precision_of_the_product_makes_no_difference(self):
        (one, adam), (other, other_adam) = (untrained() for _ in range(2))
        for i in range(5):
            found = [sparse_step(one, adam, cells(seed=i), 1.0, torch.bfloat16)]
            found += [sparse_step(other, other_adam, cells(seed=i), 1.0, torch.float32)]
            assert found[0].loss == found[1].loss and found[0].n_active == found[1].n_active
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_activations_next_to_zero(self, dtype):
        """Every pair lies at -2^-20, 0 or 2^-20 for some cell; only the last is active.

        All values are multiples of 2^-20 below 2^4, so that single precision adds them without error in any order.
        """
        rng = np.random.default_rng(0)
        sae, adam = untrained(dim=16, n_concepts=600)
        a, w = (rng.integers(-1023, 1024, size=shape) / 1024 for shape in ((30, 16), (16, 600)))
        bias = -(a @ w)[rng.integers(30, size=600), np.arange(600)] + rng.integers(-1, 2, size=600) / 2**20
        with torch.no_grad():
            sae.W_e.copy_(torch.from_numpy(w))
            sae.b_e.copy_(torch.from_numpy(bias))
            sae.b_d.zero_()
            a = torch.from_numpy(a.astype(np.float32))
            active = torch.from_numpy(a.numpy().astype(float) @ w + bias > 0)
            rounded = (a.bfloat16() @ sae.W_e.bfloat16()).float() + sae.b_e > 0
        assert (active != rounded).any(0).sum() > 100  # half precision alone is wrong about many concepts
        found = sparse_step(sae, adam, a, 1.0, dtype)
        assert torch.equal(found.fired, active.any(0))
        assert found.n_active == active.sum()

    def test_moments_of_silent_concepts_do_not_become_denormal(self):
        """They would stay so for good, and slow every step, on threads that do not flush them."""
        sae, adam = untrained()
        sparse_step(sae, adam, cells())
        with torch.no_grad():
            sae.b_e -= 9
        smallest = torch.finfo(torch.float32).tiny
        for state in adam.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].mul_(0).add_(1.05 * smallest)
        torch.set_flush_denormal(False)
        sparse_step(sae, adam, cells())
        assert all((adam.state[p]["exp_avg"] == 0).all() for p in (sae.W_e, sae.b_e, sae.W_d))
        assert all((adam.state[p]["exp_avg_sq"] > smallest).all() for p in (sae.W_e, sae.b_e, sae.W_d))

    def test_weights_that_are_not_finite_show(self):
        for name in ("W_e", "b_e", "W_d"):
            sae, adam = untrained(bias=0)
            getattr(sae, name).data[...] = torch.nan
            assert np.isnan(sparse_step(sae, adam, cells()).loss)


class TestTraining:
    def test_dense_while_many_are_active_then_sparse(self, monkeypatch, kinds):
        monkeypatch.setattr(sparse_training, "SMALLEST", 0)
        monkeypatch.setattr(sparse_training, "DENSEST", 0.4)
        mixed = train_sae(cells().numpy(), **QUICK)
        assert (kinds[0], kinds[-1]) == ("dense", "sparse")
        monkeypatch.setattr(sparse_training, "SMALLEST", 10**9)
        kinds.clear()
        dense = train_sae(cells().numpy(), **QUICK)
        assert set(kinds) == {"dense"}
        np.testing.assert_allclose(mixed.history, dense.history, rtol=1e-5)
        assert dense.history["loss"].iloc[-1] < 0.8 * dense.history["loss"].iloc[0]

    def test_too_many_active_changes_nothing(self, monkeypatch):
        sae, adam = untrained(bias=0)
        before = weights(sae)
        assert sparse_step(sae, adam, cells()) is None
        assert not adam.state and all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())

    @pytest.mark.usefixtures("always_sparse")
    @pytest.mark.parametrize(
        "config", [{"sae": "topk", "k": 3}, {"precision": "bf16"}, {"train_decoder": False}, {"sae": "jumprelu"}]
    )
    def test_what_it_is_not_made_for_is_dense(self, config, kinds):
        train_sae(cells().numpy(), **QUICK | {"epochs": 1} | config)
        assert set(kinds) == {"dense"}

    @pytest.mark.parametrize("densest", [0.4, 1.0])
    def test_stopping_and_going_on_is_the_same_bit_for_bit(self, densest, monkeypatch, tmp_path, kinds):
        monkeypatch.setattr(sparse_training, "SMALLEST", 0)
        monkeypatch.setattr(sparse_training, "DENSEST", densest)
        whole = weights(train_sae(cells().numpy(), **QUICK))
        assert ("dense" in kinds) == (densest < 1) and kinds[-1] == "sparse"
        kept, training_step, steps = tmp_path / "training.safetensors", training.training_step, []

        def stops(*arguments):
            steps.append(1)
            if len(steps) == 28:  # four batches an epoch: in the seventh
                raise KeyboardInterrupt
            return training_step(*arguments)

        monkeypatch.setattr(training, "training_step", stops)
        config = SAEConfig(**{k: v for k, v in QUICK.items() if k != "progress"})
        with pytest.raises(KeyboardInterrupt):
            train_saes(cells().numpy(), [config], checkpoint=kept, checkpoint_every=0, progress=False)
        again = train_sae(cells().numpy(), config, checkpoint=kept, progress=False)
        assert len(steps) == 28 + 2 * 4
        assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(again).items())


def test_result_does_not_depend_on_the_number_of_threads():
    """In a process of its own, as numba's threads cannot become more."""
    code = (
        "import torch, test_sparse_training as here\n"
        "here.sparse_training.DENSEST, found = 1.0, []\n"
        "for n_threads in (1, 2):\n"
        "    torch.set_num_threads(n_threads)\n"
        "    sae, adam = here.untrained()\n"
        "    for i in range(3): here.sparse_step(sae, adam, here.cells(seed=i))\n"
        "    found.append(here.weights(sae))\n"
        "assert here.sparse_training.numba.get_num_threads() == 2\n"
        "assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())\n"
    )
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"NUMBA_NUM_THREADS": "2", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
