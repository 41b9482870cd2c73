"""Algorithms as one safetensors file: weights and JSON instead of d3rlpy's pickle."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal, Union

import d3rlpy
import numpy as np
import torch as th
from d3rlpy.algos import QLearningAlgoBase
from d3rlpy.base import DeviceArg
from d3rlpy.serializable_config import CONFIG_STORAGE, DynamicConfig
from d3rlpy.torch_utility import unwrap_ddp_model
from d3rlpy.types import OptimizerWrapperProto

import cql_plugins
from cql_plugins._weights import (
    FLAG,
    NUMBER,
    TEXT,
    Budget,
    Kind,
    WeightsError,
    choice,
    describe_optimizer,
    either,
    integer,
    mapping,
    open_weights,
    optional,
    read_like,
    read_optimizer,
    read_record,
    sequence,
    write_field,
    write_weights,
)
from cql_plugins.d3rlpy.cal_ql import CalQL, CalQLConfig, DiscreteCalQL, DiscreteCalQLConfig
from cql_plugins.d3rlpy.cql import CQL, CQLConfig, DiscreteCQL, DiscreteCQLConfig

_ALGORITHMS: dict[str, tuple[type[Any], type[Any]]] = {
    "CQL": (CQL, CQLConfig),
    "CalQL": (CalQL, CalQLConfig),
    "DiscreteCQL": (DiscreteCQL, DiscreteCQLConfig),
    "DiscreteCalQL": (DiscreteCalQL, DiscreteCalQLConfig),
}
"""The algorithms that a file can be of, and their configs. A name in a file chooses among these and is never imported."""


def save_weights(
    algo: QLearningAlgoBase[Any, Any], path: str | os.PathLike[str], *, optimizer: bool = False, omit: Iterable[str] = ()
) -> None:
    """Save an algorithm as one safetensors file: its weights, and its config as JSON. Nothing is pickled.

    In the file: all networks with their targets, temperature and multiplier, the config with its fitted scalers, the shapes
    and the count of gradient steps. Not in it: logged data and buffers, the device.

    Args:
        algo: One of the four algorithms of this package, built.
        path: Where to, ``.safetensors`` by custom. The file appears whole or not at all.
        optimizer: Whether to save the optimisers' state (and that of learning-rate schedules), too, so that training goes on as
            if never interrupted. About twice the size.
        omit: Fields of the config with parts that are not d3rlpy's own (an encoder factory of yours), to be given to
            :func:`load_weights` again.

    Raises:
        WeightsError: If the algorithm is another, has no networks yet, or a field cannot be written and is not in ``omit``.
        ImportError: If safetensors is not installed.
    """
    omitted = set(omit)
    name = type(algo).__name__
    if name not in _ALGORITHMS or type(algo) is not _ALGORITHMS[name][0]:
        raise WeightsError(
            f"save_weights is for {', '.join(_ALGORITHMS)} of cql_plugins.d3rlpy; got {type(algo).__module__}.{name}. Use "
            "algo.save for others."
        )
    if algo.impl is None:
        raise WeightsError("The algorithm has no networks yet: call fit, build_with_env or create_impl first.")
    config = algo.config
    kinds = _fields(type(config))
    _check_omitted(kinds, omitted, type(config))
    written = config.serialize_to_dict()
    options = {
        field: write_field(
            field,
            kind,
            written[field],
            f"Leave it out and give it again: save_weights(..., omit=[{field!r}]), load_weights(path, {field}=...).",
        )
        for field, kind in kinds.items()
        if field not in omitted
    }
    tensors: dict[str, th.Tensor] = {}
    optimizers: dict[str, Any] | None = {} if optimizer else None
    for part, module in _parts(algo.impl).items():
        if isinstance(module, th.nn.Module):
            tensors |= {f"networks.{part}.{key}": tensor for key, tensor in module.state_dict().items()}
        elif optimizers is not None:
            state = module.state_dict()
            document, own = describe_optimizer(part, state["optim"])
            schedule = write_field(f"{part}.lr_scheduler", optional(_SCHEDULE), state["lr_scheduler"])
            optimizers[part] = {"optimizer": document, "lr_scheduler": schedule}
            tensors |= {f"optimizers.{part}.{key}": tensor for key, tensor in own.items()}
    document = {
        "framework": "d3rlpy",
        "algorithm": name,
        "options": options,
        "given_at_load": sorted(omitted),
        "observation_shape": write_field("observation_shape", _SHAPE, algo.impl.observation_shape),
        "action_size": algo.impl.action_size,
        "grad_step": algo.grad_step,
        "optimizers": optimizers,
        "versions": {
            "cql_plugins": cql_plugins.__version__,
            "d3rlpy": d3rlpy.__version__,
            "torch": str(th.__version__),
        },
    }
    write_weights(path, document, tensors)


def load_weights(
    path: str | os.PathLike[str], device: DeviceArg = None, *, allow_non_finite: bool = False, **kwargs: Any
) -> Any:
    """Load an algorithm from a file of :func:`save_weights`. Nothing is unpickled, and nothing that the file names is imported.

    Args:
        path: The file; it need not be trusted.
        device: d3rlpy's device argument.
        allow_non_finite: Whether NaN and infinity among the weights are accepted.
        **kwargs: Fields of the config to be other than in the file. Those that :func:`save_weights` left out have to be given.

    Returns:
        The algorithm, of the class that was saved.

    Raises:
        FileNotFoundError: If there is no such file.
        WeightsError: If the file is no such algorithm, says something that it must not say, or does not fit ``kwargs``.
        ImportError: If safetensors is not installed.
    """
    with open_weights(path, "d3rlpy", allow_non_finite) as file:
        header = read_record("document", _DOCUMENT, file.document)
        cls, config_class = _ALGORITHMS[header["algorithm"]]
        kinds = _fields(config_class)
        omitted = header["given_at_load"]
        _check_omitted(kinds, omitted, config_class)
        missing = [name for name in omitted if name not in kwargs]
        if missing:
            shown = ", ".join(f"{name}=..." for name in missing)
            raise WeightsError(f"{file.path} was saved without {missing}: give them, load_weights(path, {shown}).")
        kinds = {name: kind for name, kind in kinds.items() if name not in omitted}
        # A file of an earlier version lacks what came later: the defaults are what it was trained with.
        options = read_record("options", kinds, header["options"], optional_ones=kinds)
        try:
            # Filled up here, since d3rlpy cannot read a config that lacks one of its parts.
            options = config_class().serialize_to_dict() | options
            config = dataclasses.replace(config_class.deserialize_from_dict(options), **kwargs)
            algo: Any = config.create(device)
            shape = header["observation_shape"]
            with Budget(file, more=_n_elements(shape)):
                algo.create_impl(shape, header["action_size"])
        except WeightsError:
            raise
        except (ValueError, TypeError, AssertionError, ArithmeticError, RuntimeError, LookupError) as error:
            # d3rlpy checks some of its fields with asserts, and some not at all.
            raise WeightsError(f"{file.path} has options that {cls.__name__} does not take: {error}.") from error

        # All is compared before anything is read, and read before anything is copied.
        parts = _parts(algo.impl)
        networks = {name: part for name, part in parts.items() if isinstance(part, th.nn.Module)}
        for name, network in networks.items():
            file.expect(f"networks.{name}.", network.state_dict())
        reads = {}
        if header["optimizers"] is not None:
            wrappers = {name: part for name, part in parts.items() if name not in networks}
            documents = read_record("optimizers", dict.fromkeys(wrappers, _ANY), header["optimizers"])
            for name, wrapper in wrappers.items():
                both = read_record(f"optimizers.{name}", {"optimizer": _ANY, "lr_scheduler": _ANY}, documents[name])
                state = read_optimizer(file, f"optimizers.{name}.", both["optimizer"], wrapper.optim)
                fresh = wrapper.state_dict()["lr_scheduler"]
                schedule = read_like(f"optimizers.{name}.lr_scheduler", fresh, both["lr_scheduler"])
                reads[name] = (state, schedule)
        file.expect_no_more()
        states: dict[str, Any] = {name: file.read_all(f"networks.{name}.") for name in networks}
        states |= {name: {"optim": read(), "lr_scheduler": schedule} for name, (read, schedule) in reads.items()}
    for name, state in states.items():
        parts[name].load_state_dict(state)
    algo.set_grad_step(header["grad_step"])
    return algo


def _parts(impl: Any) -> dict[str, Any]:
    """The networks and optimisers of an algorithm by name, as d3rlpy saves them."""
    parts = {
        name: unwrap_ddp_model(part) if isinstance(part, th.nn.Module) else part for name, part in vars(impl.modules).items()
    }
    return {name: part for name, part in parts.items() if isinstance(part, (th.nn.Module, OptimizerWrapperProto))}


# The config --------------------------------------------------------------------------------------------------------------

_ANY = Kind("an object", lambda value: value, lambda value: value)
_PLAIN = either(optional(FLAG), NUMBER)
_SCHEDULE = mapping(either(_PLAIN, sequence(_PLAIN)))
_MAX_SPACE = 2**24
"""Numbers in one observation."""
_LIMITS = {"batch_size": 2**20, "n_action_samples": 2**14, "n_quantiles": 2**14, "n_greedy_quantiles": 2**14}
"""Integers that say how much memory a prediction or a gradient step takes, beside the networks."""


def _fields(config: type[Any]) -> dict[str, Kind]:
    """The fields of a config, each with the kind of what its dict has there."""
    hints = typing.get_type_hints(config)
    return {field.name: _kind_of(field.name, hints[field.name]) for field in dataclasses.fields(config)}


def _kind_of(name: str, hint: Any) -> Kind:
    """The kind that a type hint of d3rlpy's configs stands for."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hasattr(origin, "__value__"):  # a `type` statement's name, such as NumPy's NDArray from 2.5 on
        return _kind_of(name, origin.__value__[inner])
    if hint is bool:
        return FLAG
    if hint is int:
        return integer(high=_LIMITS.get(name, 2**31))
    if hint is float:
        return NUMBER
    if hint is str:
        return TEXT
    if origin is Literal:
        return choice(*inner)
    if origin in (Union, types.UnionType):
        if parts := [part for part in inner if part in CONFIG_STORAGE]:
            return _part_kind(parts[0])
        kinds = [_kind_of(name, part) for part in inner if part is not type(None)]
        return optional(either(*kinds)) if type(None) in inner else either(*kinds)
    if hint in CONFIG_STORAGE:
        return _part_kind(hint)
    if origin is np.ndarray:
        return _array_kind()
    if origin is tuple:
        return sequence(_kind_of(name, inner[0]), length=len(inner))
    if origin in (list, Sequence):
        return sequence(_kind_of(name, inner[0]))
    raise TypeError(f"{name} has the type {hint}, which the weights' format has no form for.")


def _part_kind(base: type[DynamicConfig]) -> Kind:
    """The kind of a part with a config of its own (an encoder, an optimiser, a scaler): one of d3rlpy's own."""
    known = {
        name: config for name, config in CONFIG_STORAGE[base].config_list.items() if config.__module__.startswith("d3rlpy.")
    }

    def convert(way: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or value.keys() != {"type", "params"} or not isinstance(value["params"], dict):
            raise ValueError(repr(value)[:200])
        name, params = value["type"], value["params"]
        if name == "none" and not params:
            return {"type": "none", "params": {}}
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"the type {str(name)[:100]!r}")
        kinds = _fields(known[name])
        if params.keys() - kinds.keys():
            raise ValueError(f"the fields {sorted(params)[:20]} of {name!r}")
        return {"type": name, "params": {key: getattr(kinds[key], way)(one) for key, one in params.items()}}

    expected = f"one of d3rlpy's own, {sorted(known)}, with its fields"
    return Kind(expected, lambda value: convert("write", value), lambda value: convert("read", value))


def _array_kind(depth: int = 4) -> Kind:
    """The kind of an array, as nested lists."""
    kind = NUMBER
    for _ in range(depth):
        kind = either(kind, sequence(kind))
    return kind


_FLAT = sequence(integer(1, _MAX_SPACE), tuple)
_SHAPE = either(_FLAT, sequence(_FLAT, tuple))


def _n_elements(shape: Any) -> int:
    """Numbers in one observation; refuse too many."""
    shapes = shape if shape and isinstance(shape[0], tuple) else (shape,)
    total = sum(int(np.prod(one, dtype=object)) for one in shapes)
    if total > _MAX_SPACE:
        raise WeightsError(f"The file's observation_shape has {total} numbers, and {_MAX_SPACE} are allowed.")
    return total


def _check_omitted(kinds: Collection[str], omitted: Iterable[str], config: type) -> None:
    unknown = sorted(set(omitted) - set(kinds))
    if unknown:
        raise WeightsError(f"omit names fields of {config.__name__}; got {unknown}.")


_DOCUMENT: dict[str, Kind] = {
    "algorithm": choice(*_ALGORITHMS),
    "options": _ANY,
    "given_at_load": sequence(TEXT),
    "observation_shape": _SHAPE,
    "action_size": integer(1, _MAX_SPACE),
    "grad_step": integer(0),
    "optimizers": _ANY,
    "versions": mapping(TEXT),
}

__all__ = ["WeightsError", "load_weights", "save_weights"]
