"""scGPT: the model that turns one cell into one vector, in plain torch.

The architecture and the names of the tensors are those of the released checkpoints (Cui et al. 2024), so that the
shipped ``scgpt-mini`` and the whole-human checkpoint open through the same loader. A cell enters as a sequence of
tokens, ``<cls>`` first; each token is the sum of a gene embedding and an embedding of the gene's binned expression;
the output at ``<cls>``, divided by its length, is the cell embedding.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .files import whole

SHIPPED = ("scgpt-mini",)
WEIGHT_FILES = ("model.safetensors", "best_model.safetensors", "best_model.pt")
USED = ("encoder.", "value_encoder.", "transformer_encoder.", "bn.", "dsbn.")  # scGPT's tensors that make an embedding


@dataclass(frozen=True)
class ScGPTConfig:
    """What ``args.json`` says of the architecture, under scGPT's own names.

    Parameters
    ----------
    embsize, nheads, d_hid, nlayers
        Width d of the embedding, attention heads, width of the feed-forward layer, number of layers.
    n_bins
        Expression is binned to the whole numbers 0 (not expressed) to ``n_bins - 1``.
    mask_value, pad_value
        Values that stand for "masked" and "padding"; ``<cls>`` carries ``pad_value`` as in ``embed_data``.
    max_seq_len
        Most tokens of a cell, ``<cls>`` included.
    pad_token
        Symbol of the padding token in the vocabulary.
    pre_norm
        Layer norm before each block (scGPT's ``norm_scheme="pre"``) and not after it.
    n_layers_cls, dropout
        Of parts that make no embedding; kept, since the genuine package does not open a folder without them.
    """

    embsize: int
    nheads: int
    d_hid: int
    nlayers: int
    n_bins: int = 51
    mask_value: int = -1
    pad_value: int = -2
    max_seq_len: int = 1200
    pad_token: str = "<pad>"
    pre_norm: bool = False
    n_layers_cls: int = 3
    dropout: float = 0.0

    def __post_init__(self):
        least = {"embsize": 1, "nheads": 1, "d_hid": 1, "nlayers": 1, "n_bins": 2, "max_seq_len": 2, "n_layers_cls": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ValueError(f"{name} must be a whole number, at least {low}, not {value!r}")
        for name in ("mask_value", "pad_value", "dropout"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"{name} must be a number, not {value!r}")
        if type(self.pre_norm) is not bool or type(self.pad_token) is not str:
            raise ValueError(
                f"pre_norm must be true or false and pad_token a symbol, not {self.pre_norm!r} and {self.pad_token!r}"
            )
        if self.embsize % self.nheads:
            raise ValueError(f"embsize {self.embsize} is not divisible by nheads {self.nheads}")

    @classmethod
    def from_args(cls, args: dict) -> ScGPTConfig:
        """Read from the contents of ``args.json``; other keys are ignored, missing ones are an error."""
        missing = [key for key in ("embsize", "nheads", "d_hid", "nlayers") if key not in args]
        if missing:
            raise ValueError(f"args.json lacks {', '.join(missing)}: it does not describe an scGPT model")
        style = args.get("input_emb_style", "continuous")
        if style != "continuous":
            raise ValueError(f"args.json asks for input_emb_style={style!r}; only 'continuous' models are supported")
        return cls(**{key: args[key] for key in cls.__dataclass_fields__ if key in args})


def bin_values(values: np.ndarray, n_bins: int = 51, rng: np.random.Generator | None = None) -> np.ndarray:
    """Bin one cell's non-zero expression values by their own quantiles, as scGPT does.

    The edges are ``n_bins - 1`` quantiles of the values; the smallest value gets bin 1, the largest ``n_bins - 1``.
    Equal values can span several edges. scGPT then draws each one's bin at random; by default the expectation of
    that draw is taken, so that a cell has one embedding and not a different one each time.

    Parameters
    ----------
    values
        (N,) values above zero, counts or any increasing function of them: the bins are the same.
    n_bins
        Number of bins, that of "not expressed" included.
    rng
        Draw the bins of ties at random with this generator, as scGPT does.

    Returns
    -------
    (N,) float32 bins between 1 and ``n_bins - 1``.
    """
    if len(values) == 0:
        return np.zeros(0, np.float32)
    edges = np.quantile(values, np.linspace(0, 1, n_bins - 1))
    upper, lower = np.searchsorted(edges, values, side="right"), np.searchsorted(edges, values, side="left")
    if rng is not None:
        return np.ceil(rng.random(len(values)) * (lower - upper) + upper).astype(np.float32)
    return np.where(upper > lower, (lower + upper + 1) / 2, upper).astype(np.float32)


class GeneEncoder(nn.Module):
    """Which gene: a learned vector per symbol, layer-normalised."""

    def __init__(self, n_tokens: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, dim)
        self.enc_norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor) -> Tensor:
        return self.enc_norm(self.embedding(ids))


class ValueEncoder(nn.Module):
    """How much: a small network of the binned expression, continuous in it; values above 512 count as 512."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear1 = nn.Linear(1, dim)
        self.linear2 = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, values: Tensor) -> Tensor:
        x = values.unsqueeze(-1).clamp(max=512).to(self.linear1.weight.dtype)
        return self.norm(self.linear2(self.linear1(x).relu_()))


class SelfAttention(nn.Module):
    """Multi-head attention of all tokens, or of ``<cls>`` alone, to all tokens; without its last step, ``out_proj``."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (..., heads, N, d / heads) of tokens (..., N, d)."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        return tuple(y.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for y in qkv)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """The heads' outputs side by side (n, N, d)."""
        mask = None if keep is None else keep[:, None, None, :]
        return F.scaled_dot_product_attention(*self.inputs(x), attn_mask=mask).transpose(1, 2).flatten(-2)

    def of_cls(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """The same of ``<cls>`` (n, 1, d), without the keys and values of all tokens: q (K x) = (q K) x, and the sum of
        V x is V times the sum."""
        n, _, dim = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)  # scores in half precision would lose digits
        weights = self.in_proj_weight.to(wide).view(3, self.heads, -1, dim)
        bias = self.in_proj_bias.to(wide).view(3, self.heads, 1, -1)
        x = x.to(wide)
        q = (x[:, 0] @ weights[0].transpose(1, 2) + bias[0]) * weights.shape[2] ** -0.5  # (heads, n, d / heads)
        scores = (q @ weights[1]).transpose(0, 1) @ x.transpose(1, 2)  # the keys' bias is the same for all tokens
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None], -torch.inf)
        y = (scores.softmax(-1) @ x).transpose(0, 1) @ weights[2].transpose(1, 2) + bias[2]
        return y.transpose(0, 1).reshape(n, 1, dim).to(self.in_proj_weight.dtype)


class Layer(nn.Module):
    """One transformer layer. With ``only_cls`` it computes ``<cls>`` alone, which is all that the last one needs."""

    def __init__(self, config: ScGPTConfig):
        super().__init__()
        dim = config.embsize
        self.pre_norm = config.pre_norm
        self.self_attn = SelfAttention(dim, config.nheads)
        self.linear1, self.linear2 = nn.Linear(dim, config.d_hid), nn.Linear(config.d_hid, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, keep: Tensor | None = None, only_cls: bool = False) -> Tensor:
        if self.pre_norm:  # as in scGPT, the residual starts from the normalised input
            x = self.norm1(x)
        if only_cls:
            return self.after_attention(x[:, :1], self.self_attn.of_cls(x, keep))
        return self.after_attention(x, self.self_attn(x, keep))

    def after_attention(self, x: Tensor, y: Tensor) -> Tensor:
        """The rest of the layer: its input x and the heads' outputs y, both (..., d), to its output."""
        return self.feed_forward(self.self_attn.out_proj(y).add_(x))  # in place: new memory costs as much as the sum

    def feed_forward(self, x: Tensor) -> Tensor:
        """The layer from the sum of its input and its attention (..., d) on."""
        x = self.norm2(x) if self.pre_norm else self.norm1(x)
        x = self.linear2(self.linear1(x).relu_()).add_(x)
        return x if self.pre_norm else self.norm2(x)


class ScGPT(nn.Module):
    """The cell encoder phi of the paper (Sec. 2.1).

    Parameters
    ----------
    config
        The architecture.
    vocab
        Symbol to token id, with ``<pad>`` and ``<cls>``; ids are 0 to ``len(vocab) - 1``.

    Attributes
    ----------
    name
        What :func:`load_model` was given, so that a run can open the same model again.
    ignored
        Names of the tensors of the checkpoint that embedding does not need.
    aliases
        Other symbol to the vocabulary's symbol of the same gene, where the folder has them (``aliases.json``).
    card
        The model card as a dict, where the folder has one (``card.json``).
    """

    def __init__(self, config: ScGPTConfig, vocab: dict[str, int]):
        super().__init__()
        for token in (config.pad_token, "<cls>"):
            if token not in vocab:
                raise ValueError(f"the vocabulary has no {token!r} token")
        if not all(type(i) is int for i in vocab.values()) or sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError(f"the ids of the vocabulary are not 0 to {len(vocab) - 1}, each once")
        self.config, self.vocab = config, vocab
        self.name = ""
        self.aliases: dict[str, str] = {}
        self.ignored: list[str] = []
        self.card: dict = {}
        self.encoder = GeneEncoder(len(vocab), config.embsize)
        self.value_encoder = ValueEncoder(config.embsize)
        self.transformer_encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(Layer(config) for _ in range(config.nlayers))}
        )
        nn.init.uniform_(self.encoder.embedding.weight, -0.1, 0.1)  # scGPT's own start

    @property
    def dim(self) -> int:
        """Width d of the cell embedding."""
        return self.config.embsize

    @property
    def cls(self) -> tuple[int, float]:
        """Token id and value of the token for the cell; ``embed_data`` gives it the value of padding."""
        return self.vocab["<cls>"], self.config.pad_value

    @property
    def pad(self) -> tuple[int, float]:
        """Token id and value of padding."""
        return self.vocab[self.config.pad_token], self.config.pad_value

    @property
    def max_tokens(self) -> int:
        """Most tokens of a cell, ``<cls>`` included."""
        return self.config.max_seq_len

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoder.embedding.weight.device

    @property
    def genes(self) -> set[str]:
        """The gene symbols that the model knows."""
        return {symbol for symbol in self.vocab if not symbol.startswith("<")}

    def fingerprint(self) -> str:
        """SHA-256 (first 16 hex digits) of the weights that the embedding uses, to be kept with every result."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def input_values(self, expression: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Bins (N,) of one cell's expression (N,) above zero; see :func:`bin_values`."""
        return bin_values(expression, self.config.n_bins, rng)

    def tokens(self, ids: Tensor, values: Tensor) -> Tensor:
        """Token embeddings (n, N, d) of gene ids and binned values, both (n, N)."""
        return self.encoder(ids) + self.value_encoder(values)

    def encode(self, x: Tensor, keep: Tensor | None = None, only_cls: bool = True) -> Tensor:
        """Transformer output of token embeddings (n, N, d): (n, d) for ``<cls>``, or all (n, N, d) if not ``only_cls``.

        ``keep`` (n, N) is True for real tokens, False for padding; None means that there is no padding.
        """
        *first, last = self.transformer_encoder["layers"]
        for layer in first:
            x = layer(x, keep)
        return last(x, keep, only_cls=True)[:, 0] if only_cls else last(x, keep)

    def forward(self, ids: Tensor, values: Tensor, keep: Tensor | None = None) -> Tensor:
        """Cell embeddings (n, d) of unit length, from gene ids and binned values (n, N), ``<cls>`` in column 0."""
        return F.normalize(self.encode(self.tokens(ids, values), keep).float(), dim=-1)

    def random_like(self, seed: int = 0) -> ScGPT:
        """The same architecture with random weights: the null to compare with."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return ScGPT(self.config, self.vocab).eval().requires_grad_(False).to(self.device)


def load_model(name_or_folder: str | Path = "scgpt-mini") -> ScGPT:
    """Open a pretrained scGPT.

    Parameters
    ----------
    name_or_folder
        ``"scgpt-mini"``, which travels with this package, or a folder in scGPT's own form: ``args.json``,
        ``vocab.json`` and ``best_model.pt`` or ``model.safetensors``.

    Returns
    -------
    ScGPT
        In evaluation mode, single precision, on the CPU.

    Raises
    ------
    FileNotFoundError
        If the folder or one of its files is missing.
    ValueError
        If a tensor that the embedding needs is missing or has another shape, or the checkpoint has further ones that
        an embedding would need (more layers than ``args.json`` says), or a tensor is not of finite floats; the message
        lists them. Also if a file cannot be read, or the weights are a pickle of more than tensors.
    """
    folder = (
        Path(str(files("scsae_utils") / "data" / name_or_folder)) if name_or_folder in SHIPPED else Path(name_or_folder)
    )
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no model folder {str(folder)!r}: give one of {', '.join(SHIPPED)} or a folder with args.json"
        )
    for name in ("args.json", "vocab.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}: a folder in scGPT's form has args.json, vocab.json and weights"
            )
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{folder} has no weights: looked for {', '.join(WEIGHT_FILES)}")
    config, vocab = ScGPTConfig.from_args(read_json(folder / "args.json")), read_json(folder / "vocab.json")
    tensors = read_weights(weights)
    widths = {"embsize": ("encoder.embedding.weight", -1), "d_hid": ("transformer_encoder.layers.0.linear1.weight", 0)}
    found = {name: tensors[k].shape[i] for name, (k, i) in widths.items() if k in tensors and tensors[k].ndim == 2}
    found["nlayers"] = len({k.split(".")[2] for k in tensors if k.startswith("transformer_encoder.layers.")})
    other = [
        f"{name} {n} (args.json: {getattr(config, name)})" for name, n in found.items() if n < getattr(config, name)
    ]
    if other:  # before memory is taken for a model that cannot be
        raise ValueError(f"{weights} does not fit its args.json: it has {', '.join(other)}")
    model = ScGPT(config, vocab)
    needed = model.state_dict()
    problems = [f"{k}: missing, needs {tuple(v.shape)}" for k, v in needed.items() if k not in tensors]
    problems += [
        f"{k}: has shape {tuple(tensors[k].shape)}, needs {tuple(v.shape)}"
        for k, v in needed.items()
        if k in tensors and tensors[k].shape != v.shape
    ]
    problems += [f"{k}: not in this architecture" for k in tensors if k.startswith(USED) and k not in needed]
    problems += [
        f"{k}: holds {'NaN or infinite values' if tensors[k].is_floating_point() else tensors[k].dtype}"
        for k in needed
        if k in tensors and not (tensors[k].is_floating_point() and tensors[k].isfinite().all())
    ]
    if problems:
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise ValueError(
            f"{weights} does not fit its args.json and vocab.json:\n  " + "\n  ".join([*problems[:20], *more])
        )
    model.load_state_dict({k: tensors[k].float() for k in needed})
    model.name = str(name_or_folder)
    model.ignored = sorted(set(tensors) - set(needed))
    for name in ("card", "aliases"):
        if (folder / f"{name}.json").is_file():
            setattr(model, name, read_json(folder / f"{name}.json"))
    if not all(isinstance(symbol, str) for symbol in model.aliases.values()):
        raise ValueError(f"{folder / 'aliases.json'} must lead from symbols to symbols")
    return model.eval().requires_grad_(False)


def read_json(path: Path) -> dict:
    """Read a JSON object; raises ValueError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object, but {type(content).__name__}")
    return content


def read_weights(path: Path) -> dict[str, Tensor]:
    """The dense tensors of a checkpoint, under the names of plain torch; raises ValueError if it cannot be read."""
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except UnpicklingError as error:  # torch's own text says how to run the code
        raise ValueError(
            f"{path} cannot be read as weights: it is damaged, or a pickle of more than tensors (which was not run)"
        ) from error
    except Exception as error:  # bytes of others: torch raises whatever they lead to
        raise ValueError(f"{path} cannot be read as weights: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(k, str) for k in tensors):
        raise ValueError(f"{path} cannot be read as weights: it holds no tensors by name")
    tensors = {
        k: v for k, v in tensors.items() if isinstance(v, Tensor) and v.layout is torch.strided and not v.is_meta
    }
    return {k.removeprefix("module.").replace("self_attn.Wqkv.", "self_attn.in_proj_"): v for k, v in tensors.items()}


def save_model(model: ScGPT, folder: str | Path, extra: dict[str, Tensor] | None = None, half: bool = False) -> None:
    """Write a model in scGPT's own form (``args.json``, ``vocab.json``, ``model.safetensors``).

    ``extra`` holds further tensors to keep (the decoders of pretraining); ``half`` stores 16-bit floats.
    """
    folder = Path(folder)
    tensors = {**model.state_dict(), **(extra or {})}
    tensors = {k: (v.half() if half else v.float()).contiguous() for k, v in tensors.items()}
    with whole(folder / "model.safetensors") as part:
        save_file(tensors, part)
    args = {**asdict(model.config), "input_emb_style": "continuous", "input_style": "binned"}
    for name, content, indent in (("args", args, 1), ("vocab", model.vocab, 0)):
        with whole(folder / f"{name}.json") as part:
            part.write_text(json.dumps(content, indent=indent) + "\n")
