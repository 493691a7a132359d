"""Against the genuine scgpt 0.2.4: its network, and its ``embed_data`` from counts to embeddings."""

import json
import os

import numpy as np
import pytest
import torch
from anndata import AnnData
from conftest import batch, perturbed
from safetensors.torch import load_file

from scsae_utils.embedding import embed
from scsae_utils.scgpt import ScGPT, ScGPTConfig, load_model, save_model

SMALL = ScGPTConfig(embsize=16, nheads=4, d_hid=24, nlayers=3)
WHOLE_HUMAN = ScGPTConfig(embsize=512, nheads=8, d_hid=512, nlayers=12)
GENES = [f"G{i}" for i in range(40)]


@pytest.fixture(scope="session")
def network(genuine_module):
    return genuine_module("scgpt.model.model")


def genuine_twin(network, model: ScGPT):
    """The genuine network with the weights of ours."""
    c = model.config
    twin = network.TransformerModel(len(model.vocab), c.embsize, c.nheads, c.d_hid, c.nlayers, vocab=model.vocab)
    left = twin.load_state_dict(model.state_dict(), strict=False)
    assert not left.unexpected_keys
    assert not [key for key in left.missing_keys if not key.startswith(("decoder.", "cls_decoder."))]
    return twin.eval()


def assert_equal(network, model: ScGPT, lengths) -> None:
    """Cell embeddings of random cells, before they are normalised and after."""
    ids, values, padding = batch(model, lengths)
    expected = genuine_twin(network, model)._encode(ids, values, padding)[:, 0]
    keep = ~padding if padding.any() else None
    torch.testing.assert_close(model.encode(model.tokens(ids, values), keep), expected, atol=1e-5, rtol=0)
    unit = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model(ids, values, keep), unit, atol=1e-6, rtol=0)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class TestNetwork:
    @pytest.mark.parametrize("lengths", [[1], [2, 2], [30], [5, 12, 31, 2], [40, 7]])
    def test_cell_embeddings_are_equal(self, network, lengths):
        assert_equal(network, perturbed(SMALL, GENES), lengths)

    @pytest.mark.parametrize("lengths", [[2], [2, 3, 50], [400, 301], [1200]])
    def test_at_the_size_of_the_whole_human_model(self, network, lengths):
        model = perturbed(WHOLE_HUMAN, [f"G{i}" for i in range(1300)])
        assert len(model.state_dict()) == 153
        assert_equal(network, model, lengths)

    @pytest.mark.parametrize("lengths", [[2], [50, 3, 2], [1200, 700]])
    def test_with_trained_weights(self, network, lengths):
        assert_equal(network, load_model("scgpt-mini"), lengths)

    def test_no_tensor_is_idle(self, network):
        """Equality would say nothing of weights that the output does not depend on."""
        model = perturbed(SMALL, GENES)
        ids, values, padding = batch(model, [30, 12])
        before = model(ids, values, ~padding)
        for name, parameter in model.named_parameters():
            kept = parameter.clone()
            parameter += 0.1 * torch.randn(kept.shape, generator=torch.Generator().manual_seed(0))
            assert (model(ids, values, ~padding) - before).abs().max() > 1e-4, name
            parameter.copy_(kept)

    def test_every_token_is_equal(self, network):
        model = perturbed(SMALL, GENES)
        ids, values, padding = batch(model, [9, 9, 9])
        every = model.encode(model.tokens(ids, values), only_cls=False)
        torch.testing.assert_close(every, genuine_twin(network, model)._encode(ids, values, padding), atol=1e-5, rtol=0)

    def test_values_beyond_the_bins_are_treated_alike(self, network):
        """Raw counts above 512 count as 512; masked (-1), padded (-2) and mean values go through the same encoder."""
        model = perturbed(SMALL, GENES)
        values = torch.tensor([[-2.0, -1.0, 0.0, 0.37, 50.0, 512.0, 513.0, 1e5]])
        expected = genuine_twin(network, model).value_encoder(values)
        torch.testing.assert_close(model.value_encoder(values), expected, atol=1e-6, rtol=0)
        assert torch.equal(model.value_encoder(values)[0, 5], model.value_encoder(values)[0, 7])

    @pytest.mark.parametrize("pre_norm", [False, True])
    def test_the_flash_form_and_its_names(self, network, monkeypatch, tmp_path, pre_norm):
        """The released files come from the flash-attention form: ``Wqkv``, and optionally norms before the blocks."""

        class FlashMHA(torch.nn.Module):
            """What flash-attn's layer computes, in plain torch."""

            def __init__(self, embed_dim, num_heads, **_):
                super().__init__()
                self.num_heads = num_heads
                self.Wqkv = torch.nn.Linear(embed_dim, 3 * embed_dim)
                self.out_proj = torch.nn.Linear(embed_dim, embed_dim)

            def forward(self, x, key_padding_mask=None):
                n, length, dim = x.shape
                q, k, v = self.Wqkv(x).view(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
                scores = q @ k.transpose(-1, -2) / (dim // self.num_heads) ** 0.5
                if key_padding_mask is not None:
                    scores = scores.masked_fill(~key_padding_mask[:, None, None], float("-inf"))
                return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, dim)), None

        monkeypatch.setattr(network, "FlashMHA", FlashMHA, raising=False)
        monkeypatch.setattr(network, "flash_attn_available", True)
        torch.manual_seed(1)
        vocab = perturbed(SMALL, GENES).vocab
        twin = network.TransformerModel(
            len(vocab), 16, 4, 24, 3, vocab=vocab, use_fast_transformer=True, pre_norm=pre_norm
        ).eval()
        for parameter in twin.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        args = {"embsize": 16, "nheads": 4, "d_hid": 24, "nlayers": 3, "pre_norm": pre_norm}
        (tmp_path / "args.json").write_text(json.dumps(args))
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        torch.save(twin.state_dict(), tmp_path / "best_model.pt")
        assert any("Wqkv" in key for key in twin.state_dict())
        model = load_model(tmp_path)
        ids, values, padding = batch(model, [9, 20])
        expected = twin._encode(ids, values, padding)[:, 0]
        torch.testing.assert_close(model.encode(model.tokens(ids, values), ~padding), expected, atol=1e-5, rtol=1e-5)
        assert all(name.startswith(("decoder.", "cls_decoder.")) for name in model.ignored) and model.ignored


@pytest.fixture
def embed_data(genuine_module, monkeypatch):
    """The genuine ``embed_data`` on a CPU, after ``torch.manual_seed``, as on a machine of ``workers`` cores."""
    tasks = genuine_module("scgpt.tasks.cell_emb")

    def run(adata, folder, seed=0, workers=1, **settings):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(workers)))
        torch.manual_seed(seed)
        settings = {"gene_col": "index", "device": "cpu", "use_fast_transformer": False, **settings}
        return tasks.embed_data(adata.copy(), folder, **settings).obsm["X_scGPT"]

    return run


def released(model: ScGPT, folder, attention: str = "self_attn.Wqkv."):
    """A model folder as scGPT releases them: weights in ``best_model.pt``, the attention under its name there."""
    save_model(model, folder)
    tensors = load_file(folder / "model.safetensors")
    torch.save({k.replace("self_attn.in_proj_", attention): v for k, v in tensors.items()}, folder / "best_model.pt")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def counts(mini_cells) -> AnnData:
    """Counts of 150 cells of both studies, in three batches of ``embed_data``, with genes that no model knows."""
    rows = np.random.default_rng(0).choice(mini_cells.n_obs, 150, replace=False)
    adata = AnnData(mini_cells.layers["counts"][rows].copy(), var=mini_cells.var[[]], obs=mini_cells.obs[[]].iloc[rows])
    adata.var_names = [f"unknown {name}" if i % 50 == 7 else name for i, name in enumerate(adata.var_names)]
    return adata


def ours(adata, model, **settings) -> np.ndarray:
    return embed(adata.copy(), model, progress=False, **settings).obsm["X_scGPT"]


class TestEmbedData:
    @pytest.mark.parametrize("attention", ["self_attn.Wqkv.", "self_attn.in_proj_"])
    def test_one_folder_in_both_packages(self, embed_data, counts, tmp_path, attention):
        """Values without ties leave nothing to chance. The same file, with both names that the attention has."""
        folder = released(load_model("scgpt-mini"), tmp_path, attention)
        untied = counts[:40].copy()
        untied.X.data = np.random.default_rng(1).gamma(2, size=untied.X.nnz).astype(np.float32)
        np.testing.assert_allclose(ours(untied, load_model(folder)), embed_data(untied, folder), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("seed, workers", [(0, 1), (1, 2), (1, 3)])
    def test_counts_with_the_same_draws(self, embed_data, counts, tiny_model, tmp_path, seed, workers):
        drawn = ours(counts, tiny_model, compat="embed_data", seed=seed, workers=workers)
        expected = embed_data(counts, released(tiny_model, tmp_path), seed, workers)
        np.testing.assert_allclose(drawn, expected, atol=1e-6, rtol=0)
        assert np.abs(ours(counts, tiny_model) - expected).max() > 1e-3  # so the draws do matter

    @pytest.mark.parametrize("workers", [1, 2])
    def test_too_long_cells_with_the_same_draws(self, embed_data, counts, tmp_path, workers):
        known = counts[:, ~counts.var_names.str.startswith("unknown")]
        lengths = known.X.getnnz(axis=1)
        limit = int(np.median(lengths)) + 1  # <cls> and the median number of genes: about half are cut, some just fit
        assert (lengths > limit - 1).any() and (lengths == limit - 1).any() and (lengths < limit - 1).any()
        short = ScGPTConfig(embsize=16, nheads=2, d_hid=24, nlayers=2, max_seq_len=limit)
        model = perturbed(short, known.var_names)
        drawn = ours(counts, model, compat="embed_data", seed=3, workers=workers)
        expected = embed_data(counts, released(model, tmp_path), 3, workers, max_length=limit)
        np.testing.assert_allclose(drawn, expected, atol=1e-6, rtol=0)

    def test_missing_tensors_which_it_leaves_at_random(self, embed_data, counts, tiny_model, tmp_path):
        """The reason for a strict loader: the genuine one embeds without a word."""
        folder = released(tiny_model, tmp_path)
        tensors = torch.load(folder / "best_model.pt", weights_only=True)
        tensors.pop("value_encoder.linear2.weight")
        torch.save(tensors, folder / "best_model.pt")
        assert np.isfinite(embed_data(counts[:3], folder)).all()
        with pytest.raises(ValueError, match="value_encoder.linear2.weight: missing"):
            load_model(folder)
