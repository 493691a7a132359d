"""What the network's output depends on; and opening model folders, whole and broken."""

import json
import os
import pickle

import pytest
import torch
from conftest import batch, perturbed
from safetensors.torch import load_file, save_file

from scsae_utils.scgpt import ScGPT, ScGPTConfig, load_model, save_model

SMALL = ScGPTConfig(embsize=16, nheads=4, d_hid=24, nlayers=3)
GENES = [f"G{i}" for i in range(40)]


@pytest.fixture
def folder(tmp_path):
    save_model(perturbed(SMALL, GENES), tmp_path / "model", extra={"decoder.fc.weight": torch.ones(2, 2)})
    return tmp_path / "model"


def rewrite(folder, change):
    """Pass the tensors of a model folder through ``change``."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


class TestNetwork:
    @pytest.mark.parametrize("pre_norm", [False, True])
    def test_only_cls_is_the_first_row_of_all(self, pre_norm):
        model = perturbed(ScGPTConfig(16, 4, 24, 3, pre_norm=pre_norm), GENES)
        ids, values, padding = batch(model, [30, 12])
        x = model.tokens(ids, values)
        torch.testing.assert_close(model.encode(x, ~padding), model.encode(x, ~padding, only_cls=False)[:, 0])

    def test_padding_does_not_matter(self):
        model = perturbed(SMALL, GENES)
        ids, values, padding = batch(model, [12, 30])
        alone = model(ids[:1, :12], values[:1, :12])
        torch.testing.assert_close(model(ids, values, ~padding)[:1], alone, atol=1e-6, rtol=0)
        values[0, 12:] = 33.0
        torch.testing.assert_close(model(ids, values, ~padding)[:1], alone, atol=1e-6, rtol=0)

    def test_all_that_it_is_fed_matters(self):
        """The order of tokens does not; gene, value and the number of tokens do."""
        model = perturbed(SMALL, GENES)
        ids, values, _ = batch(model, [12])
        base = model(ids, values)
        order = torch.tensor([0, *reversed(range(1, 12))])
        torch.testing.assert_close(model(ids[:, order], values[:, order]), base, atol=1e-6, rtol=0)
        swapped = values.clone()
        swapped[0, [1, 2]] = values[0, [2, 1]]
        for other in (model(ids, swapped), model(ids, values + 1), model(ids[:, :-1], values[:, :-1])):
            assert (other - base).abs().max() > 1e-3

    def test_random_like_is_another_network_of_the_same_form_the_same_each_time(self):
        model = perturbed(SMALL, GENES)
        state = torch.random.get_rng_state()
        one, again, other = model.random_like(1), model.random_like(1), model.random_like(2)
        assert one.fingerprint() == again.fingerprint() != other.fingerprint() != model.fingerprint()
        assert one.config == model.config and one.vocab == model.vocab
        assert torch.equal(state, torch.random.get_rng_state())  # leaves the caller's draws alone

    def test_fingerprint_changes_with_any_weight(self):
        model = perturbed(SMALL, GENES)
        before = model.fingerprint()
        model.transformer_encoder["layers"][2].norm2.bias[3] += 1e-3
        assert model.fingerprint() != before

    @pytest.mark.parametrize("symbols", [["<pad>", "A"], ["<cls>", "A"]])
    def test_special_tokens_must_be_there(self, symbols):
        with pytest.raises(ValueError, match="vocabulary has no '<(cls|pad)>' token"):
            ScGPT(SMALL, {s: i for i, s in enumerate(symbols)})

    @pytest.mark.parametrize("ids", [(0, 1, 3), (1, 2, 3), (0, 1, 1)])
    def test_ids_must_be_consecutive(self, ids):
        with pytest.raises(ValueError, match="ids of the vocabulary are not 0 to 2"):
            ScGPT(SMALL, dict(zip(["<pad>", "<cls>", "A"], ids)))

    def test_genes_are_the_symbols_without_special_tokens(self):
        assert perturbed(SMALL, GENES).genes == set(GENES)


class TestFolders:
    def test_round_trip(self, folder):
        model, original = load_model(folder), perturbed(SMALL, GENES)
        assert model.fingerprint() == original.fingerprint()
        assert (model.config, model.vocab) == (original.config, original.vocab)
        assert model.ignored == ["decoder.fc.weight"]
        assert not model.training and not any(p.requires_grad for p in model.parameters())

    def test_half_precision_is_opened_as_single(self, folder):
        original = perturbed(SMALL, GENES)
        save_model(original, folder, half=True)
        model = load_model(folder)
        ids, values, _ = batch(model, [20])
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert load_file(folder / "model.safetensors")["value_encoder.linear2.weight"].dtype == torch.float16
        assert 0 < (model(ids, values) - original(ids, values)).abs().max() < 0.01

    def test_pt_files_and_both_names_of_the_attention(self, folder):
        tensors = load_file(folder / "model.safetensors")
        renamed = {f"module.{k}".replace("self_attn.in_proj_", "self_attn.Wqkv."): v for k, v in tensors.items()}
        torch.save(renamed, folder / "best_model.pt")
        (folder / "model.safetensors").unlink()
        assert load_model(folder).fingerprint() == perturbed(SMALL, GENES).fingerprint()

    def test_a_pickle_with_code_is_refused_and_not_run(self, folder, tmp_path):
        class Trap:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path / 'ran'}",)

        (folder / "model.safetensors").unlink()
        for name, write in {"torch": torch.save, "plain": lambda x, path: path.write_bytes(pickle.dumps(x))}.items():
            write({"encoder.embedding.weight": Trap()}, folder / "best_model.pt")
            with pytest.raises(ValueError, match="cannot be read as weights"):
                load_model(folder)
            assert not (tmp_path / "ran").exists(), name

    def test_missing_tensors_are_all_listed(self, folder):
        """Loaders that are not strict leave missing layers at random."""
        gone = ["encoder.enc_norm.bias", "transformer_encoder.layers.2.norm2.weight", "value_encoder.linear1.weight"]
        rewrite(folder, lambda tensors: [tensors.pop(name) for name in gone])
        with pytest.raises(ValueError, match="does not fit") as error:
            load_model(folder)
        assert all(f"{name}: missing" in str(error.value) for name in gone)

    def test_wrong_shapes_are_listed(self, folder):
        rewrite(folder, lambda tensors: tensors.update({"encoder.embedding.weight": torch.zeros(42, 16)}))
        with pytest.raises(ValueError, match=r"embedding.weight: has shape \(42, 16\), needs \(43, 16\)"):
            load_model(folder)

    def test_more_layers_than_args_json_says_are_refused(self, folder):
        """They are not like a decoder that can be left out: the embedding would come from the wrong layer."""
        args = json.loads((folder / "args.json").read_text())
        (folder / "args.json").write_text(json.dumps(args | {"nlayers": 2}))
        with pytest.raises(ValueError, match="layers.2.linear1.weight: not in this architecture"):
            load_model(folder)

    @pytest.mark.parametrize("key", ["embsize", "nheads", "d_hid", "nlayers"])
    def test_incomplete_args_json(self, folder, key):
        args = json.loads((folder / "args.json").read_text())
        args.pop(key)
        (folder / "args.json").write_text(json.dumps(args))
        with pytest.raises(ValueError, match=f"args.json lacks {key}"):
            load_model(folder)

    @pytest.mark.parametrize(
        "change, message", [({"input_emb_style": "category"}, "only 'continuous'"), ({"nheads": 3}, "not divisible")]
    )
    def test_unsupported_args_json(self, folder, change, message):
        args = json.loads((folder / "args.json").read_text())
        (folder / "args.json").write_text(json.dumps(args | change))
        with pytest.raises(ValueError, match=message):
            load_model(folder)

    def test_vocabulary_without_cls(self, folder):
        vocab = json.loads((folder / "vocab.json").read_text())
        vocab["CLS"] = vocab.pop("<cls>")
        (folder / "vocab.json").write_text(json.dumps(vocab))
        with pytest.raises(ValueError, match="no '<cls>' token"):
            load_model(folder)

    @pytest.mark.parametrize("name", ["args.json", "vocab.json"])
    def test_missing_files(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"has no {name}"):
            load_model(folder)

    def test_missing_weights_and_folder(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="has no weights: looked for .*best_model.pt"):
            load_model(folder)
        with pytest.raises(FileNotFoundError, match="no model folder 'scgpt-mni'.*scgpt-mini"):
            load_model("scgpt-mni")

    @pytest.mark.parametrize("name", ["model.safetensors", "best_model.pt"])
    def test_half_a_download_is_refused(self, folder, name):
        tensors = load_file(folder / "model.safetensors")
        torch.save(tensors, folder / "best_model.pt")
        content = (folder / name).read_bytes()
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=f"{name} cannot be read as weights"):
            load_model(folder)

    def test_the_card_travels_along(self, folder):
        assert load_model(folder).card == {}
        (folder / "card.json").write_text('{"genes": 40}')
        assert load_model(folder).card == {"genes": 40}
