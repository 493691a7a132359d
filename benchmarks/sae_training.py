"""Training of the paper's SAE beside sae-lens, dictionary-learning, overcomplete: python benchmarks/sae_training.py

Synthetic embeddings of 512 dimensions from a sparse dictionary; 10,000 concepts, batches of 1,024 cells, about 35
active concepts a cell. All start from the same weights, see the same batches in the same order, and minimise the same
loss by Adam. Each peer runs the training step of its documentation with its own SAE class, in an environment that
this program makes in ``.venv-peers/sae``; ``plain`` is the loss of :class:`scsae_utils.sae.SAE` by autograd and
torch.optim.Adam with its defaults. Each measurement runs in a process of its own, in turns. One that had less than the
share ``QUIET`` of the processor time of its threads was disturbed by other programs: it is repeated, and does not count
if the same contender has a quiet one. ``undisturbed`` says whether all have.

The final loss is computed from the weights that each returns, by one formula, on cells that were not in training. The
libraries do not take quite the same steps, so that it differs: sae-lens and dictionary-learning sum the squared error
over coordinates (the penalty is scaled alike; a factor of the loss changes what Adam's eps does), sae-lens and
overcomplete clip the gradient and do not project it, overcomplete has no ``b_d`` (cells are centred, so that little is
left for it), and sae-lens weighs the penalty by the norm of a concept vector in place of keeping that at 1 (its weights
are brought to unit norm before they are compared, which changes neither function nor loss).
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
import venv
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv-peers" / "sae"
sys.path.insert(0, str(ROOT))

DIM, CONCEPTS, BATCH, L0, L1, RATE = 512, 10_000, 1024, 35, 5e-5, 1e-4
WARM_UP, STEPS, ROUNDS, MOST, QUIET, HELD_OUT = 5, 30, 3, 8, 0.8, 4096
PACKAGES = {"sae-lens": "6.54.12", "dictionary-learning": "0.1.0", "overcomplete": "0.3.0"}


def main() -> None:
    from record import keep, versions

    python, failed = peer_environment()
    who = ["ours", "plain", *(name for name in PACKAGES if name not in failed)]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        runs = {name: [] for name in who}
        for i in range(MOST):
            for name, results in runs.items():
                if i >= ROUNDS and any(r["cpu_share"] >= QUIET for r in results):
                    continue
                results.append(child(python if name in PACKAGES else sys.executable, name, folder))
    rows = [
        {
            "run": name,
            "cells/s": BATCH / statistics.median(r["seconds"] for r in quiet(results)),
            "ms/step": [1000 * r["seconds"] for r in results],
            "cpu_share": [r["cpu_share"] for r in results],
            "loss": results[0]["loss"],
            "l0_start": results[0]["l0_start"],
            "l0_end": results[0]["l0_end"],
            "peak_gib": max(r["peak_gib"] for r in results),
            "before_gib": results[0]["before_gib"],
        }
        for name, results in runs.items()
    ]
    by_name = {row["run"]: row for row in rows}
    peers = [by_name[name] for name in PACKAGES if name in by_name]
    fastest = max(peers, key=lambda row: row["cells/s"]) if peers else by_name["plain"]
    ours = by_name["ours"]
    figures = {
        "ratio_vs_fastest_peer": ours["cells/s"] / fastest["cells/s"],
        "fastest_peer": fastest["run"],
        "ratio_vs_plain": ours["cells/s"] / by_name["plain"]["cells/s"],
        "loss_rel_diff": ours["loss"] / fastest["loss"] - 1,
        "loss_rel_diff_each": {row["run"]: ours["loss"] / row["loss"] - 1 for row in peers},
        "loss_rel_diff_plain": ours["loss"] / by_name["plain"]["loss"] - 1,
        "memory_ratio": ours["peak_gib"] / fastest["peak_gib"],
        "active_of_cell": [ours["l0_start"], ours["l0_end"]],
        "start_loss": runs["ours"][0]["start_loss"],
        "undisturbed": all(max(row["cpu_share"]) >= QUIET for row in rows),
        "not_installed": failed,
    }
    for row in rows:
        print(row)
    keep("sae_training", rows, figures, versions("torch", "numpy", "numba") | PACKAGES)


def quiet(results: list[dict]) -> list[dict]:
    """The measurements that other programs did not disturb; all if there is none."""
    return [r for r in results if r["cpu_share"] >= QUIET] or results


def peer_environment() -> tuple[str, dict[str, str]]:
    """The interpreter of the peers' environment, made if need be; and why a peer is not in it.

    torch is pinned to our version: what these packages ask for would bring another one. Of two of them only what the
    training step imports is installed beside them.
    """
    import torch

    python = PEERS / "bin" / "python"
    done = PEERS / "failed.json"
    if done.is_file():
        return str(python), json.loads(done.read_text())
    venv.create(PEERS, with_pip=True, clear=True)
    pinned = f"torch=={torch.__version__.split('+')[0]}"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, pinned, "numpy", "scipy", "scikit-learn", "einops", "pillow", "tqdm"], check=True)
    failed = {}
    for name, version in PACKAGES.items():
        wanted = [pinned, f"{name}=={version}"] if name == "sae-lens" else ["--no-deps", f"{name}=={version}"]
        run = subprocess.run([*pip, *wanted], capture_output=True, text=True)
        if run.returncode:
            failed[name] = run.stderr[-500:]
    done.write_text(json.dumps(failed))
    return str(python), failed


def prepare(folder: Path) -> None:
    """Cells and start weights, from which each concept fires as often as the feature that it is near."""
    from sklearn.preprocessing import normalize

    from scsae_utils.synthetic import SyntheticConfig, frequencies, make_synthetic

    n = (WARM_UP + STEPS) * BATCH + HELD_OUT
    config = SyntheticConfig(n_cells=n, dim=DIM, n_features=CONCEPTS // 5, l0=L0, groups=50)
    made = make_synthetic(config)
    a = normalize(made.a)
    a -= a.mean(0)
    rng = np.random.default_rng(1)
    near = np.arange(CONCEPTS) % config.n_features
    W_d = normalize(made.vectors[near] + 0.5 / np.sqrt(DIM) * rng.normal(size=(CONCEPTS, DIM))).astype(np.float32)
    before = a[-HELD_OUT:] @ W_d.T
    often = frequencies(config)[near] * L0 / frequencies(config)[near].sum()
    before.sort(axis=0)
    b_e = -before[HELD_OUT - np.ceil(often * HELD_OUT).astype(int), np.arange(CONCEPTS)]
    np.save(folder / "a.npy", a.astype(np.float32))
    np.savez(folder / "start.npz", W_e=W_d.T, b_e=b_e, W_d=W_d, b_d=np.zeros(DIM, np.float32))


def child(python: str, name: str, folder: str) -> dict:
    command = [python, __file__, "--run", name, "--folder", folder]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{name} failed:\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def measure(name: str, folder: Path) -> dict:
    """Train, in this process: seconds a step (median), memory, and loss."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    torch.set_flush_denormal(True)
    a = torch.from_numpy(np.load(folder / "a.npy"))
    train, held_out = a[:-HELD_OUT].split(BATCH), a[-HELD_OUT:]
    start = {k: torch.from_numpy(v) for k, v in np.load(folder / "start.npz").items()}
    times, used = [], []

    def batches():
        """The time of a step is from one batch asked for to the next."""
        for batch in train:
            times.append(time.perf_counter())
            used.append(time.process_time())
            yield batch
        times.append(time.perf_counter())
        used.append(time.process_time())

    train_with = {
        "ours": ours,
        "plain": plain,
        "sae-lens": sae_lens,
        "dictionary-learning": dictionary_learning,
        "overcomplete": overcomplete,
    }[name]
    before = memory("VmRSS")
    weights = train_with({k: v.clone() for k, v in start.items()}, batches())
    peak = memory("VmHWM")
    start_loss, l0_start = evaluate(held_out, **start)
    loss, l0_end = evaluate(held_out, **{k: v.detach() for k, v in weights.items()})
    return {
        "seconds": statistics.median(np.diff(times)[WARM_UP:]),
        "cpu_share": (used[-1] - used[WARM_UP]) / (times[-1] - times[WARM_UP]) / torch.get_num_threads(),
        "start_loss": start_loss,
        "loss": loss,
        "l0_start": l0_start,
        "l0_end": l0_end,
        "peak_gib": peak,
        "before_gib": before,
    }


def memory(field: str) -> float:
    """GiB of this process: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def evaluate(a, W_e, b_e, W_d, b_d) -> tuple[float, float]:
    """Loss and active concepts of a cell."""
    norm = W_d.norm(dim=1)
    u = ((a - b_d) @ W_e + b_e).relu()
    loss = (u @ W_d + b_d - a).pow(2).mean() + L1 * (u * norm).sum(1).mean()
    return loss.item(), (u > 0).sum(1).double().mean().item()


def our_model(start):
    import torch

    from scsae_utils.sae import SAE, SAEConfig

    sae = SAE(SAEConfig(n_concepts=CONCEPTS, learning_rate=RATE, l1=L1), DIM)
    with torch.no_grad():
        for name, value in start.items():
            getattr(sae, name).copy_(value)
    return sae, torch.zeros(CONCEPTS, dtype=torch.bool)


def ours(start, batches):
    import torch

    from scsae_utils.training import training_step

    sae, dead = our_model(start)
    optimizer = torch.optim.Adam(sae.parameters(), lr=RATE, fused=True)
    for a in batches:
        training_step(sae, optimizer, a, dead)
    return dict(sae.named_parameters())


def plain(start, batches):
    import torch

    from scsae_utils.training import step

    sae, dead = our_model(start)
    optimizer = torch.optim.Adam(sae.parameters(), lr=RATE)
    for a in batches:
        optimizer.zero_grad()
        sae.loss(a, dead)[0].backward()
        step(sae, optimizer)
    return dict(sae.named_parameters())


def sae_lens(start, batches):
    """SAETrainer.fit on a StandardTrainingSAE; its squared error is a sum over coordinates."""
    import torch
    from sae_lens import SAETrainer, StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=DIM, d_sae=CONCEPTS, l1_coefficient=L1 * DIM))
    with torch.no_grad():
        for ours, theirs in {"W_e": "W_enc", "b_e": "b_enc", "W_d": "W_dec", "b_d": "b_dec"}.items():
            getattr(sae, theirs).copy_(start[ours])
    config = SAETrainerConfig((WARM_UP + STEPS) * BATCH, BATCH, lr=RATE, lr_end=RATE)
    SAETrainer(config, sae, batches).fit()
    next(batches, None)
    norm = sae.W_dec.norm(dim=1)
    return {
        "W_e": sae.W_enc * norm,
        "b_e": sae.b_enc * norm,
        "W_d": sae.W_dec / norm[:, None],
        "b_d": sae.b_dec,
    }


def without_init(package: str) -> None:
    """Let the package's modules be imported without its ``__init__``, which imports language or vision models."""
    module = types.ModuleType(package)
    module.__path__ = list(importlib.util.find_spec(package).submodule_search_locations)
    sys.modules[package] = module


def dictionary_learning(start, batches):
    """StandardTrainer.update; its squared error is a sum over coordinates."""
    import torch

    without_init("dictionary_learning")
    from dictionary_learning.trainers.standard import StandardTrainer

    trainer = StandardTrainer(
        steps=WARM_UP + STEPS,
        activation_dim=DIM,
        dict_size=CONCEPTS,
        layer=0,
        lm_name="",
        lr=RATE,
        l1_penalty=L1 * DIM,
        warmup_steps=0,
        sparsity_warmup_steps=None,
        device="cpu",
    )
    with torch.no_grad():
        trainer.ae.encoder.weight.copy_(start["W_e"].T)
        trainer.ae.encoder.bias.copy_(start["b_e"])
        trainer.ae.decoder.weight.copy_(start["W_d"].T)
        trainer.ae.bias.copy_(start["b_d"])
    for i, a in enumerate(batches):
        trainer.update(i, a)
    ae = trainer.ae
    return {"W_e": ae.encoder.weight.T, "b_e": ae.encoder.bias, "W_d": ae.decoder.weight.T, "b_d": ae.bias}


def overcomplete(start, batches):
    """train_sae with an untied linear encoder, and without its monitoring, which costs time."""
    import torch

    without_init("overcomplete")
    from overcomplete.sae.base import SAE
    from overcomplete.sae.train import train_sae

    model = SAE(DIM, nb_concepts=CONCEPTS).untied(bias=True)
    with torch.no_grad():
        model.dictionary._weights.copy_(start["W_d"])
        model.encoder.weight.copy_(start["W_e"].T)
        model.encoder.bias.copy_(start["b_e"])

    def loss(x, x_hat, pre_codes, codes, dictionary):
        return (x - x_hat).square().mean() + L1 * codes.sum(1).mean()

    train_sae(model, batches, loss, torch.optim.Adam(model.parameters(), lr=RATE), nb_epochs=1, monitoring=0)
    W_d = model.get_dictionary()
    return {"W_e": model.encoder.weight.T, "b_e": model.encoder.bias, "W_d": W_d, "b_d": torch.zeros(DIM)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="one measurement, in this process")
    parser.add_argument("--folder", type=Path, help="of its data")
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(measure(arguments.run, arguments.folder)))
    else:
        main()
