"""State dicts of optimizer, scheduler and random generators, as named tensors and JSON.

No pickle: tensors go to safetensors, everything else is numbers and strings. Names are those of the parameters, so
that one process, DDP and FSDP2 write the same file and read each other's.
"""

from __future__ import annotations

import base64
import importlib
import json
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from plmtune.errors import UserError
from plmtune.modules.sharding import is_sharded
from plmtune.training import distributed

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Quantized states are tensor subclasses; only those named here are rebuilt from a file. Of their parts, codes and
# scale are sharded by rows as the parameter is, and the others are the same on every rank.
_SUBCLASSES = {"OptimState8bit": "torchao.optim.subclass_8bit"}
_SHARDED_PARTS = ("codes", "scale")


def optimizer_state_dict(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of `optimizer`, sharded or not. Every rank gets the same names in the same order.

    Returns:
        (tensors, rest): tensors named "parameter/key", quantized ones as "parameter/key/part"; and the rest,
        JSON-able: settings of each group with its parameters' names, states that are no tensors, and what
        rebuilds quantized tensors.
    """
    names = distributed.parameter_names(model)
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {"groups": [], "values": {}, "quantized": {}}
    for group in optimizer.param_groups:
        settings = {key: _plain(value) for key, value in group.items() if key != "params"}
        rest["groups"].append({"params": [names[p] for p in group["params"]], "settings": settings})
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                name = f"{names[parameter]}/{key}"
                if not isinstance(value, Tensor):
                    rest["values"][name] = _plain(value)
                elif not is_traceable_wrapper_subclass(_local(value)):
                    tensors[name] = value.detach()
                elif is_sharded(value) and not _shards_evenly(value):
                    tensors[name] = distributed.with_local(_local(value).dequantize(), value)
                else:
                    parts, attributes = _local(value).__tensor_flatten__()
                    tensors.update({f"{name}/{part}": _whole_part(part, value) for part in parts})
                    rest["quantized"][name] = {
                        "class": type(_local(value)).__name__,
                        "parts": list(parts),
                        "attributes": [_plain(a) for a in attributes],
                    }
    return tensors, rest


def of_all_stages(rest: Mapping[str, Any], whole: nn.Module) -> dict[str, Any]:
    """The `rest` of `optimizer_state_dict` of a whole model, from those of a pipeline's stages. Every rank calls it."""
    places = {name: place for place, (name, _) in enumerate(whole.named_parameters())}
    of_ranks = [json.loads(text) for text in distributed.gather_texts(json.dumps(rest))]
    numbered = len({len(of_rank["groups"]) for of_rank in of_ranks}) == 1
    groups: dict[str, dict[str, Any]] = {}
    merged: dict[str, Any] = {"groups": [], "values": {}, "quantized": {}}
    for of_rank in of_ranks:
        for number, group in enumerate(of_rank["groups"]):
            # Two groups may have equal settings. A stage may lack a group of an optimizer that is none of ours.
            key = str(number) if numbered else json.dumps(group["settings"])
            same = groups.setdefault(key, {"params": [], "settings": group["settings"]})
            same["params"] += [name for name in group["params"] if name not in same["params"]]
        for key in ("values", "quantized"):
            merged[key] |= of_rank[key]
    for group in groups.values():
        group["params"].sort(key=places.__getitem__)
    return merged | {"groups": list(groups.values())}


def load_optimizer_state_dict(
    model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """Load a state of `optimizer_state_dict`, sharded as the model is. Every rank must call it."""
    names = distributed.parameter_names(model)
    own = set(names.values())  # a pipeline's process has a part of the saved parameters
    saved_groups = [group | {"params": [n for n in group["params"] if n in own]} for group in rest["groups"]]
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    if len(groups) != len(saved_groups):  # a stage may lack a group
        saved_groups = [group for group in saved_groups if group["params"]]
    if groups != [saved["params"] for saved in saved_groups]:
        raise UserError(
            f"The checkpoint's optimizer has {len(saved_groups)} groups of parameters, this run's {len(groups)}, and "
            "not the same parameters in them. Resume with the model and the optimizer that wrote it."
        )
    entries: dict[str, dict[str, Any]] = {}
    for name in (*tensors, *rest["values"], *rest["quantized"]):
        parameter_name, key = name.split("/")[:2]
        entries.setdefault(parameter_name, {})[key] = f"{parameter_name}/{key}"
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        if sorted(saved["settings"]) != sorted(key for key in group if key != "params"):
            raise UserError(
                f"The checkpoint's optimizer has the settings {sorted(saved['settings'])}, this run's "
                f"{sorted(key for key in group if key != 'params')}. Resume with the optimizer that wrote it."
            )
        for key, value in saved["settings"].items():
            group[key] = _as(value, group[key])
        for parameter in group["params"]:
            state = {}
            for key, name in entries.get(names[parameter], {}).items():
                if name in rest["values"]:
                    state[key] = rest["values"][name]
                elif name in rest["quantized"]:
                    state[key] = _placed_quantized(_rebuilt(name, tensors, rest["quantized"][name]), parameter)
                else:
                    state[key] = _placed(key, tensors[name], parameter, group)
            if state:
                optimizer.state[parameter] = state
            else:
                optimizer.state.pop(parameter, None)


def scheduler_state_dict(scheduler: Any) -> dict[str, Any]:
    """The JSON-able state of a learning-rate scheduler."""
    return {key: _plain(value) for key, value in scheduler.state_dict().items()}


def load_scheduler_state_dict(scheduler: Any, state: Mapping[str, Any]) -> None:
    """Load a state of `scheduler_state_dict`; rates that are tensors in this run stay tensors."""
    current = scheduler.state_dict()
    scheduler.load_state_dict({key: _as(value, current.get(key)) for key, value in state.items()})


def seed_everything(seed: int) -> None:
    """Seed torch (CUDA too), numpy and python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """The state of this process's random generators: torch, CUDA, numpy, python."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": _encode(torch.get_rng_state()),
        "cuda": _encode(torch.cuda.get_rng_state()) if torch.cuda.is_initialized() else None,
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": _plain(random.getstate()),
    }


def load_random_state(state: Mapping[str, Any]) -> None:
    """Load a state of `random_state`; ValueError, KeyError or TypeError if it is damaged."""
    try:
        torch.set_rng_state(_decode(state["torch"]))
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(_decode(state["cuda"]))
    except RuntimeError as error:
        raise ValueError(f"random state: {error}") from error
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _plain(value: Any) -> Any:
    """`value` in JSON's types, exactly: a tensor of one element as a number, a dtype as its name."""
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} {value!r} cannot be kept in a checkpoint's JSON")


def _as(value: Any, example: Any) -> Any:
    """`value` from JSON in the types of `example`, this run's own value."""
    if isinstance(example, Tensor):
        return torch.tensor(value, dtype=example.dtype, device=example.device)
    if isinstance(example, list | tuple) and isinstance(value, list) and len(value) == len(example):
        return type(example)(_as(v, e) for v, e in zip(value, example, strict=True))
    return value


def _placed(key: str, value: Tensor, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    if key == "step":
        # Fused and capturable kernels read the counter on the device, all others on the host (torch's rule).
        return value.to(parameter.device) if group.get("fused") or group.get("capturable") else value
    return distributed.like(value, parameter) if value.shape == parameter.shape else value.to(parameter.device)


def _local(value: Tensor) -> Any:
    return value.to_local() if is_sharded(value) else value


def _sharded_dimension(value: DTensor) -> int | None:
    """The mesh dimension that shards the rows of `value`, if all others replicate; else None."""
    spread = [i for i, placement in enumerate(value.placements) if not placement.is_replicate()]
    return spread[0] if len(spread) == 1 and value.placements[spread[0]].is_shard(0) else None


def _shards_evenly(value: DTensor) -> bool:
    """Whether every rank holds equally many rows. Only then are its quantized blocks those of the whole tensor."""
    dimension = _sharded_dimension(value)
    return dimension is not None and value.shape[0] % value.device_mesh.size(dimension) == 0


def _whole_part(part: str, value: Tensor) -> Tensor:
    tensor = getattr(_local(value), part)
    if is_sharded(value) and part in _SHARDED_PARTS:
        from torch.distributed.tensor import DTensor

        tensor = DTensor.from_local(tensor, value.device_mesh, value.placements, run_check=False)
    return tensor


def _rebuilt(name: str, tensors: Mapping[str, Tensor], recipe: Mapping[str, Any]) -> Tensor:
    if recipe["class"] not in _SUBCLASSES:
        raise UserError(f"The checkpoint's state {name} is a {recipe['class']}, which this version does not know.")
    subclass = getattr(importlib.import_module(_SUBCLASSES[recipe["class"]]), recipe["class"])
    parts = {part: tensors[f"{name}/{part}"] for part in recipe["parts"]}
    attributes = [_dtype(a) if isinstance(a, str) and a.startswith("torch.") else a for a in recipe["attributes"]]
    return subclass.__tensor_unflatten__(parts, attributes)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise UserError(f"The checkpoint names a data type {name}, which does not exist.")
    return found


def _placed_quantized(value: Any, parameter: Tensor) -> Tensor:
    if not is_sharded(parameter):
        return value.to(parameter.device)
    dimension = _sharded_dimension(parameter)
    shards = parameter.device_mesh.size(dimension)
    if not _shards_evenly(parameter) or len(value.scale) % shards:
        return distributed.like(value.dequantize(), parameter)
    names, attributes = value.__tensor_flatten__()
    mine = parameter.device_mesh.get_local_rank(dimension)
    parts = {}
    for name in names:
        part = getattr(value, name)
        part = part.chunk(shards)[mine] if name in _SHARDED_PARTS else part
        parts[name] = part.to(parameter.device, copy=True)
    return distributed.with_local(type(value).__tensor_unflatten__(parts, attributes), parameter)
