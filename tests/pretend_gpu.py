"""A GPU to test with where there is none: its tensors are on the CPU, but say that they are not.

They refuse what tensors of a GPU refuse: to meet those of the CPU in one operation, and to become arrays. So code that
passes here has moved each tensor to where it is needed. How fast a GPU is, and how it rounds, cannot be told.
"""

import sys
from contextlib import ExitStack, contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy", 0)  # of the kinds that PyTorch knows, one whose gradients need no hardware
COPIES = {torch.ops.aten._to_copy, torch.ops.aten.to, torch.ops.aten.copy_}
PLACES = {torch.ops.aten.index, torch.ops.aten.index_put_}  # a tensor of the GPU takes places from the CPU


class OnGPU(torch.Tensor):
    """A tensor that says it is on :data:`DEVICE`; ``inner`` holds its values."""

    @staticmethod
    def __new__(cls, inner):
        about = {"dtype": inner.dtype, "device": DEVICE, "requires_grad": False}
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), **about
        )

    def __init__(self, inner):
        self.inner = inner

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a tensor of the GPU to numpy: use .cpu() first")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Creation(TorchDispatchMode):
    """Puts new tensors on the GPU, where this is asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, OnGPU)]
    here = [x for x in tensors if not isinstance(x, OnGPU) and x.ndim > 0]
    mixed = there and here and func.overloadpacket not in COPIES
    if mixed and not (func.overloadpacket in PLACES and isinstance(tensors[0], OnGPU)):
        raise RuntimeError(f"{func}: expected all tensors to be on one device, but found the CPU's and the GPU's")
    asked = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.device)]
    on_gpu = bool(there) if not asked else asked[0].type == DEVICE.type

    def taken(x):
        return x.inner if isinstance(x, OnGPU) else torch.device("cpu") if isinstance(x, torch.device) else x

    owner = {id(x.inner): x for x in there}
    inner = tree_map(taken, (args, kwargs))
    out = func(*inner[0], **inner[1])

    def given_back(x):
        if not on_gpu or not isinstance(x, torch.Tensor):
            return x
        return owner[id(x)] if id(x) in owner else OnGPU(x)  # after an operation in place, the tensor itself

    return tree_map(given_back, out)


@contextmanager
def pretend_gpu():
    """In here, whatever device is asked for by name is this one."""
    with ExitStack() as stack:
        for module in ("embedding", "training"):
            stack.enter_context(patch(f"scsae_utils.{module}.find_device", lambda name: DEVICE))
        stack.enter_context(patch("torch.autocast", lambda *args, **kwargs: nullcontext()))
        for name in ("__enter__", "__exit__"):  # inference mode knows no tensors like these
            stack.enter_context(patch.object(torch.inference_mode, name, getattr(torch.no_grad, name)))
        optimizers = sys.modules["torch.optim.optimizer"]
        stack.enter_context(
            patch.object(optimizers, "_get_fused_kernels_supported_devices", lambda: ["cpu", DEVICE.type])
        )
        stack.enter_context(Creation())
        yield
