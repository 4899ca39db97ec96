"""Hashes of tensors and of whole models: they identify the weights that a number was computed with."""

from __future__ import annotations

import json
from collections.abc import Container
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from plmtune.modules.sharding import full_tensor


def model_digest(model: nn.Module, *, without: Container[str] = ()) -> str:
    """xxh3-128 over the name, shape, dtype and bytes of each tensor of `model`, and its `config` where it has one.

    Equal for one process and for many, and on any device. Every rank must call it.

    Args:
        without: names of tensors that are left out, such as adapters that are switched off.
    """
    digest = xxhash.xxh3_128()
    digest.update(json.dumps(getattr(model, "config", {}), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name not in without:
            add_tensor(digest, name, full_tensor(tensor))
    return digest.hexdigest()


def add_tensor(digest: xxhash.xxh3_128, name: str, tensor: Tensor) -> None:
    """Hash a tensor so that no other sequence of names, shapes and bytes gives the same stream."""
    if is_traceable_wrapper_subclass(tensor):  # quantized: hash the tensors that it consists of
        inner, context = tensor.__tensor_flatten__()
        digest.update(f"{name} {type(tensor).__name__} {context} {len(inner)}\n".encode())
        for part in inner:
            add_tensor(digest, part, getattr(tensor, part))
        return
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))  # a single number may have any stride
    data: Any = flat.view(torch.uint8).numpy()
    digest.update(data)
