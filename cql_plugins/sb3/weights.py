"""Models as one safetensors file: weights and JSON instead of the pickles in SB3's zip file."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import stable_baselines3
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm, maybe_make_env
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule, check_for_correct_spaces
from stable_baselines3.common.vec_env import VecNormalize, unwrap_vec_normalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

import cql_plugins
from cql_plugins._weights import (
    FLAG,
    NUMBER,
    TEXT,
    Budget,
    Kind,
    WeightsError,
    WeightsFile,
    choice,
    describe_optimizer,
    either,
    integer,
    mapping,
    named,
    number,
    open_weights,
    optional,
    read_field,
    read_optimizer,
    read_record,
    sequence,
    write_field,
    write_weights,
)
from cql_plugins.ensembles import PRECISIONS
from cql_plugins.losses import CQL_VARIANTS
from cql_plugins.returns import RETURN_TAILS
from cql_plugins.sb3.conservative import ConservativeMixin
from cql_plugins.sb3.cql import CQL, CalQL
from cql_plugins.sb3.dqn import DiscreteCalQL, DiscreteCQL


def _contrib(name: str) -> Any:
    """Import a class that needs sb3-contrib, by the door that explains what to do where it is missing."""
    import cql_plugins.sb3 as room

    return getattr(room, name)


_ALGORITHMS: Mapping[str, Callable[[], type[ConservativeMixin]]] = {
    "CQL": lambda: CQL,
    "CalQL": lambda: CalQL,
    "DiscreteCQL": lambda: DiscreteCQL,
    "DiscreteCalQL": lambda: DiscreteCalQL,
    "CQLQRDQN": lambda: _contrib("CQLQRDQN"),
    "CalQLQRDQN": lambda: _contrib("CalQLQRDQN"),
    "CQLTQC": lambda: _contrib("CQLTQC"),
    "CalQLTQC": lambda: _contrib("CalQLTQC"),
}
"""The classes that a file can be of. A name in a file chooses among these and is never imported."""


def save_weights(
    model: ConservativeMixin, path: str | os.PathLike[str], *, optimizer: bool = False, omit: Iterable[str] = ()
) -> None:
    """Save a model as one safetensors file: its weights, and its options as JSON. Nothing is pickled.

    In the file: the policy with its critics and targets, the entropy coefficient, the Lagrange multiplier, the statistics of
    the environment's ``VecNormalize``, the constructor's arguments, the spaces and the counters. Not in it: the replay buffer,
    the dataset, the environment, and what belongs to this machine (``device``, ``data_device``, ``tensorboard_log``,
    ``verbose``).

    Args:
        model: One of the eight classes of this package; not a subclass.
        path: Where to, ``.safetensors`` by custom. The file appears whole or not at all.
        optimizer: Whether to save the optimisers' state, too, so that training goes on as if never interrupted. About twice the
            size.
        omit: Arguments that JSON cannot say (a policy class of your own, a schedule that is a function, action noise), to be
            given to :func:`load_weights` again. One of ``policy_kwargs`` is named ``"policy_kwargs.features_extractor_class"``.

    Raises:
        WeightsError: If the model is of another class, an argument cannot be written and is not in ``omit``, or the model was
            trained on normalised observations and has no ``VecNormalize`` now.
        ImportError: If safetensors is not installed.
    """
    names = set(omit)
    algorithm = type(model).__name__
    if algorithm not in _ALGORITHMS or type(model) is not _ALGORITHMS[algorithm]():
        raise WeightsError(
            f"save_weights is for {', '.join(_ALGORITHMS)} of cql_plugins.sb3; got {type(model).__module__}.{algorithm}. "
            "Use model.save for others."
        )
    _check_names(type(model), names)
    tensors = {f"policy.{name}": tensor for name, tensor in model.policy.state_dict().items()}
    state_dicts, variables = model._get_torch_save_params()
    tensors |= {f"variables.{name}": recursive_getattr(model, name) for name in variables}
    optimizers: dict[str, Any] | None = None
    if optimizer:
        optimizers = {}
        states = model.get_parameters()
        for name in state_dicts:
            if name != "policy":
                optimizers[name], own = describe_optimizer(name, states[name])
                tensors |= {f"optimizers.{name}.{key}": tensor for key, tensor in own.items()}
    normalization, statistics = _describe_normalization(model.get_vec_normalize_env())
    if model._normalized_observations and model.get_vec_normalize_env() is None:
        raise WeightsError(
            "The model was trained on observations normalised by VecNormalize, whose statistics belong in the file, and its "
            "environment has none: call set_env(VecNormalize.load(path, venv)), or load the model with that environment, first."
        )
    document = {
        "framework": "sb3",
        "algorithm": algorithm,
        "policy": None if "policy" in names else _policy_name(model),
        "options": _describe_options(model, names),
        "given_at_load": sorted(names),
        "observation_space": _describe_space("observation_space", model.observation_space),
        "action_space": _describe_space("action_space", model.action_space),
        "n_envs": write_field("n_envs", _ENVIRONMENTS, model.n_envs),
        "counters": _describe_counters(model),
        "normalization": normalization,
        "optimizers": optimizers,
        "versions": {
            "cql_plugins": cql_plugins.__version__,
            "stable_baselines3": stable_baselines3.__version__,
            "torch": str(th.__version__),
        },
    }
    write_weights(path, document, tensors | statistics)


def load_weights(
    path: str | os.PathLike[str],
    env: Any = None,
    device: th.device | str = "auto",
    *,
    allow_non_finite: bool = False,
    **kwargs: Any,
) -> Any:
    """Load a model from a file of :func:`save_weights`. Nothing is unpickled, and nothing that the file names is imported.

    Without an environment the model predicts, and learns offline where it was trained on raw observations; ``learn`` needs
    one. Statistics of a ``VecNormalize`` come back with the environment: one without the wrapper is wrapped, one that has
    seen nothing is filled, one with other statistics is refused.

    Args:
        path: The file; it need not be trusted.
        env: The environment, as for any SB3 model.
        device: Where to.
        allow_non_finite: Whether NaN and infinity among the weights are accepted.
        **kwargs: Arguments of the constructor to be other than in the file. Those that :func:`save_weights` left out have to be
            given; ``policy_kwargs`` are merged with the file's.

    Returns:
        The model, of the class that was saved.

    Raises:
        FileNotFoundError: If there is no such file.
        WeightsError: If the file is no such model, says something that it must not say, or does not fit ``kwargs`` or ``env``.
        ValueError: If the environment's spaces are others than the model's.
        ImportError: If safetensors, or sb3-contrib for a model that needs it, is not installed.
    """
    with open_weights(path, "sb3", allow_non_finite) as file:
        header = read_record("document", _DOCUMENT, file.document)
        cls = _ALGORITHMS[header["algorithm"]]()
        options = _read_options(cls, header)
        missing = [name for name in header["given_at_load"] if not _is_given(name, kwargs)]
        if missing:
            shown = ", ".join(f"{name.partition('.')[0]}=..." for name in missing)
            raise WeightsError(f"{file.path} was saved without {missing}: give them, load_weights(path, {shown}).")
        policy_kwargs = {**options.pop("policy_kwargs"), **(kwargs.pop("policy_kwargs", None) or {})}
        policy = kwargs.pop("policy", header["policy"])
        if isinstance(policy, str) and policy not in cls.policy_aliases:
            raise WeightsError(f"{cls.__name__} has no policy {policy[:100]!r}; it has {list(cls.policy_aliases)}.")
        options |= kwargs
        observation_space = _read_space("observation_space", header["observation_space"])
        action_space = _read_space("action_space", header["action_space"])
        n_elements = _n_elements(observation_space)
        if header["n_envs"] * n_elements > _MAX_SPACE:
            raise WeightsError(f"The file's n_envs is not what it must be: {header['n_envs']} times {n_elements} numbers.")

        statistics = _read_normalization(file, header["normalization"])
        wrapper: VecNormalize | None = None
        if env is not None:
            env, wrapper = _with_statistics(env, statistics)
            env = cls._wrap_env(env, options.get("verbose", 0))
            check_for_correct_spaces(env, observation_space, action_space)
        elif statistics is not None and statistics.options["norm_obs"]:
            warnings.warn(
                "The model was trained on normalised observations, and model.predict expects such: pass "
                "load_weights(path, env=...), and take observations from model.get_env().",
                stacklevel=2,
            )
        if env is None and options.get("replay_buffer_class") is HerReplayBuffer:
            raise WeightsError(
                "The model's HerReplayBuffer needs the environment: pass load_weights(path, env=...), or "
                "replay_buffer_class=None and replay_buffer_kwargs=None for a model that is only to predict."
            )
        model = _build(
            cls, policy, env, device, options, policy_kwargs, observation_space, action_space, header["n_envs"], file
        )

        # All is compared before anything is read, and read before anything is copied.
        state_dicts, variables = model._get_torch_save_params()
        held = {name: recursive_getattr(model, name) for name in variables}
        file.expect("policy.", model.policy.state_dict())
        file.expect("variables.", held)
        reads = {}
        if header["optimizers"] is not None:
            names = [name for name in state_dicts if name != "policy"]
            documents = read_record("optimizers", dict.fromkeys(names, _ANY), header["optimizers"])
            for name in names:
                reads[name] = read_optimizer(file, f"optimizers.{name}.", documents[name], recursive_getattr(model, name))
        file.expect_no_more()
        policy_state, values = file.read_all("policy."), file.read_all("variables.")
        states = {name: read() for name, read in reads.items()}

    model.policy.load_state_dict(policy_state, strict=True)
    with th.no_grad():
        for name, tensor in held.items():
            tensor.copy_(values[name])
    for name, state in states.items():
        recursive_getattr(model, name).load_state_dict(state)
    for name, value in header["counters"].items():
        setattr(model, _COUNTERS[name][0], value)
    model._normalized_observations = statistics is not None and statistics.options["norm_obs"]
    if wrapper is not None and statistics is not None:
        _set_statistics(wrapper, statistics)
    if model.use_sde:
        model.policy.reset_noise()
    return model


def _build(
    cls: type[ConservativeMixin],
    policy: Any,
    env: Any,
    device: Any,
    options: dict[str, Any],
    policy_kwargs: dict[str, Any],
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    n_envs: int,
    file: WeightsFile,
) -> Any:
    """Make the model with networks no larger than the file."""
    try:
        model: Any = cls(policy, env, device=device, _init_setup_model=False, **options, policy_kwargs=policy_kwargs or None)
        if env is None:
            model.observation_space, model.action_space, model.n_envs = observation_space, action_space, n_envs
        with Budget(file, more=_n_elements(observation_space)):
            if env is None:
                model._setup_without_env()
            else:
                model._setup_model()
    except WeightsError:
        raise
    except (ValueError, TypeError, AssertionError, ArithmeticError, RuntimeError, KeyError, IndexError) as error:
        # SB3 checks some of its arguments with asserts, and some not at all.
        raise WeightsError(f"{file.path} has options that {cls.__name__} does not take: {error}.") from error
    return model


# The constructor's arguments ----------------------------------------------------------------------------------------------


def _write_schedule(value: Any) -> dict[str, Any]:
    if type(value) is FloatSchedule:
        return _write_schedule(value.value_schedule)
    if type(value) is LinearSchedule:
        ends = (value.start, value.end, value.end_fraction)
        return {"linear": sequence(NUMBER).write(ends)}
    if type(value) is ConstantSchedule:
        return {"constant": NUMBER.write(value.val)}
    raise ValueError(repr(value))


def _read_schedule(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"linear"}:
        return FloatSchedule(LinearSchedule(*sequence(NUMBER, tuple, 3).read(value["linear"])))
    if isinstance(value, dict) and value.keys() == {"constant"}:
        return FloatSchedule(ConstantSchedule(NUMBER.read(value["constant"])))
    raise ValueError(repr(value)[:200])


_ANY = Kind("an object", lambda value: value, lambda value: value)
_COUNT = integer(0)
_SHARE = number(0.0, 1.0)
_ENVIRONMENTS = integer(1, 2**16)
_RATE = either(number(0.0), Kind("a LinearSchedule or ConstantSchedule of SB3", _write_schedule, _read_schedule))
_SOME = integer(1, 2**20)
"""How many of something that training makes so many rows of."""
_BUFFERS = {
    "ReplayBuffer": ReplayBuffer,
    "DictReplayBuffer": DictReplayBuffer,
    "NStepReplayBuffer": NStepReplayBuffer,
    "HerReplayBuffer": HerReplayBuffer,
}
_BUFFER_KWARGS: dict[str, Kind] = {
    "handle_timeout_termination": FLAG,
    "n_steps": integer(1, 2**20),
    "gamma": _SHARE,
    "n_sampled_goal": integer(0, 2**20),
    "goal_selection_strategy": choice("final", "future", "episode"),
    "copy_info_dict": FLAG,
}
_ACTIVATIONS = {
    name: getattr(th.nn, name)
    for name in ("ReLU", "Tanh", "ELU", "LeakyReLU", "GELU", "SiLU", "Mish", "Softplus", "Sigmoid", "SELU", "CELU", "ReLU6")
}
_EXTRACTORS = {"FlattenExtractor": FlattenExtractor, "NatureCNN": NatureCNN, "CombinedExtractor": CombinedExtractor}
_OPTIMIZERS = {
    name: getattr(th.optim, name) for name in ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "SGD")
}
_WIDTHS = sequence(integer(1))
_POLICY_KWARGS: dict[str, Kind] = {
    "net_arch": optional(either(_WIDTHS, mapping(_WIDTHS))),
    "activation_fn": named(_ACTIVATIONS),
    "log_std_init": NUMBER,
    "use_expln": FLAG,
    "clip_mean": NUMBER,
    "features_extractor_class": named(_EXTRACTORS),
    "features_extractor_kwargs": optional(mapping(either(FLAG, integer(1)))),
    "normalize_images": FLAG,
    "optimizer_class": named(_OPTIMIZERS),
    "optimizer_kwargs": optional(mapping(either(FLAG, NUMBER, sequence(NUMBER, tuple)))),
    "n_critics": integer(1),
    "n_quantiles": integer(1),
    "share_features_extractor": FLAG,
}
_OPTIONS: dict[str, Kind] = {
    "learning_rate": _RATE,
    "buffer_size": integer(1, 10**9),
    "learning_starts": _COUNT,
    "batch_size": _SOME,
    "tau": _SHARE,
    "gamma": _SHARE,
    "train_freq": sequence(either(integer(1), choice("step", "episode")), tuple, 2),
    "gradient_steps": integer(-1),
    "action_noise": Kind("None", lambda value: _only_none(value), lambda value: _only_none(value)),
    "replay_buffer_class": optional(named(_BUFFERS)),
    "replay_buffer_kwargs": Kind(
        f"an object with some of {list(_BUFFER_KWARGS)}",
        lambda value: {name: _known(name).write(one) for name, one in value.items()},
        lambda value: {name: _known(name).read(one) for name, one in mapping(_ANY).read(value).items()},
    ),
    "optimize_memory_usage": FLAG,
    "n_steps": integer(1, 2**20),
    "ent_coef": either(NUMBER, TEXT),
    "target_update_interval": integer(1),
    "target_entropy": either(NUMBER, choice("auto")),
    "top_quantiles_to_drop_per_net": integer(0, 2**20),
    "use_sde": FLAG,
    "sde_sample_freq": integer(-1),
    "use_sde_at_warmup": FLAG,
    "exploration_fraction": _SHARE,
    "exploration_initial_eps": _SHARE,
    "exploration_final_eps": _SHARE,
    "max_grad_norm": optional(NUMBER),
    "stats_window_size": integer(1),
    "policy_kwargs": Kind(
        f"an object with some of {list(_POLICY_KWARGS)}",
        lambda value: value,  # written and read one by one, for better messages
        lambda value: value,
    ),
    "seed": optional(integer(0, 2**32 - 1)),
    # Ours
    "offline_fraction": either(_SHARE, choice("proportional")),
    "cql_alpha": number(0.0),
    "cql_temperature": number(0.0),
    "cql_clip_diff": sequence(NUMBER, tuple, 2),
    "normalize_gap": FLAG,
    "cql_alpha_online": optional(number(0.0)),
    "precision": choice(*PRECISIONS),
    "compile": FLAG,
    "actor_learning_rate": optional(_RATE),
    "cql_n_actions": integer(1, 2**14),
    "cql_variant": choice(*CQL_VARIANTS),
    "cql_lagrange_threshold": optional(NUMBER),
    "max_q_backup": FLAG,
    "mode_q_backup": FLAG,
    "backup_entropy": FLAG,
    "bc_steps": _COUNT,
    "cql_n_backward": optional(integer(1)),
    "double_q": FLAG,
    "offline_target_update_interval": optional(integer(1)),
    "return_tail": choice(*RETURN_TAILS),
    "calibrate_random": FLAG,
}
"""Argument of a constructor, its kind. An argument that is missing here cannot be saved, and a test says so."""
_NOT_SAVED = {"policy", "env", "device", "verbose", "tensorboard_log", "data_device", "_init_setup_model"}
_ATTRIBUTES = {"stats_window_size": "_stats_window_size"}
"""Arguments that the host keeps under another name."""


def _only_none(value: Any) -> None:
    if value is not None:
        raise ValueError(repr(value)[:200])


def _known(name: str) -> Kind:
    if name not in _BUFFER_KWARGS:
        raise ValueError(f"the name {name[:100]!r}")
    return _BUFFER_KWARGS[name]


def _arguments(cls: type) -> list[str]:
    """The constructor's arguments that a file can have."""
    return [name for name in inspect.signature(cls).parameters if name not in _NOT_SAVED]


def _check_names(cls: type, names: Iterable[str]) -> None:
    known = {*_arguments(cls), "policy"}
    for name in names:
        argument, dot, inner = name.partition(".")
        if argument not in known or (dot and (argument != "policy_kwargs" or not inner)):
            raise WeightsError(f"omit names arguments of {cls.__name__}, or some of policy_kwargs; got {name!r}.")


def _is_given(name: str, kwargs: Mapping[str, Any]) -> bool:
    argument, _, inner = name.partition(".")
    given = kwargs.get(argument) if inner else kwargs
    return (inner or argument) in (given or {})


def _hint(name: str) -> str:
    argument, _, inner = name.partition(".")
    shown = f"{argument}={{{inner!r}: ...}}" if inner else f"{argument}=..."
    return f"Leave it out and give it again: save_weights(..., omit=[{name!r}]), load_weights(path, {shown})."


def _policy_name(model: ConservativeMixin) -> str:
    return str(write_field("policy", named(model.policy_aliases), model.policy_class, _hint("policy")))


def _describe_options(model: ConservativeMixin, omitted: set[str]) -> dict[str, Any]:
    """Write the arguments that the model was made with, as far as they are to be in the file."""
    options: dict[str, Any] = {}
    for name in _arguments(type(model)):
        value = getattr(model, _ATTRIBUTES.get(name, name))
        if name in omitted:
            continue
        if name == "policy_kwargs":
            options[name] = {
                inner: write_field(f"{name}.{inner}", _policy_kwarg(inner), one, _hint(f"{name}.{inner}"))
                for inner, one in value.items()
                if inner != "use_sde" and f"{name}.{inner}" not in omitted  # The constructor adds that one by itself.
            }
            continue
        if name == "train_freq":
            value = (value.frequency, value.unit.value)
        elif name == "replay_buffer_class":
            value = None if _is_default_buffer(model) else value
        elif name == "replay_buffer_kwargs" and _is_default_buffer(model):
            value = {key: one for key, one in value.items() if model.n_steps == 1 or key not in ("n_steps", "gamma")}
        if name == "replay_buffer_kwargs" and "goal_selection_strategy" in value:
            strategy = value["goal_selection_strategy"]  # A text, or SB3's enumeration.
            value = {**value, "goal_selection_strategy": getattr(strategy, "name", strategy).lower()}
        options[name] = write_field(name, _OPTIONS[name], value, _hint(name))
    return options


def _policy_kwarg(name: str) -> Kind:
    """The kind of one of ``policy_kwargs``; one that is not known has no values."""

    def refuse(value: Any) -> Any:
        raise ValueError(f"{value!r}"[:200])

    return _POLICY_KWARGS.get(name, Kind(f"one of {list(_POLICY_KWARGS)}", refuse, refuse))


def _is_default_buffer(model: ConservativeMixin) -> bool:
    """Whether the buffer's class is the one that the host chooses where none is asked for."""
    if isinstance(model.observation_space, spaces.Dict):
        return model.replay_buffer_class is DictReplayBuffer
    return model.replay_buffer_class is (NStepReplayBuffer if model.n_steps > 1 else ReplayBuffer)


def _read_options(cls: type, header: Mapping[str, Any]) -> dict[str, Any]:
    """Read the arguments, each by its kind."""
    omitted = header["given_at_load"]
    _check_names(cls, omitted)
    kinds = {name: _OPTIONS[name] for name in _arguments(cls) if name not in omitted}
    # A file of an earlier version lacks what came later: the defaults are what it was trained with.
    options = read_record("options", kinds, header["options"], optional_ones=kinds)
    inner = options.get("policy_kwargs", {})
    options["policy_kwargs"] = read_record("options.policy_kwargs", _POLICY_KWARGS, inner, optional_ones=_POLICY_KWARGS)
    return options


# Spaces --------------------------------------------------------------------------------------------------------------------

_MAX_SPACE = 2**24
"""Numbers in one observation or action; an image of 2000 x 2000 pixels in four channels is smaller."""
_NUMPY_TYPES = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "bool")
_SHAPE = sequence(integer(1, _MAX_SPACE), tuple)
_BOUND = either(NUMBER, sequence(NUMBER))


def _describe_space(name: str, space: spaces.Space[Any]) -> dict[str, Any]:
    """Write a space."""
    if type(space) is spaces.Box:
        shape = write_field(f"{name}.shape", _SHAPE, space.shape)
        if math.prod(shape) > _MAX_SPACE:
            raise WeightsError(f"The {name} has {math.prod(shape)} numbers, and {_MAX_SPACE} are allowed.")
        bounds = {side: getattr(space, side) for side in ("low", "high")}
        written = {
            side: NUMBER.write(value.flat[0].item()) if (value == value.flat[0]).all() else _BOUND.write(value.ravel().tolist())
            for side, value in bounds.items()
        }
        return {"type": "Box", "shape": shape, "dtype": np.dtype(space.dtype).name, **written}
    if type(space) is spaces.Discrete:
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    if type(space) is spaces.MultiDiscrete and space.nvec.ndim == 1:
        return {"type": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": space.start.tolist()}
    if type(space) is spaces.MultiBinary:
        return {"type": "MultiBinary", "shape": list(space.shape)}
    if type(space) is spaces.Dict and name == "observation_space":
        # In their order, which is that of the network's inputs.
        return {"type": "Dict", "spaces": [[key, _describe_space(key, one)] for key, one in space.spaces.items()]}
    raise WeightsError(f"The {name} cannot be written as JSON: expected Box, Discrete or a Dict of such, got {space!r}.")


def _read_space(name: str, document: Any) -> Any:
    """Read a space, and make it only if it is of a size that makes sense."""
    type_name = document.get("type") if isinstance(document, dict) else None
    if not isinstance(type_name, str):
        raise WeightsError(f"The file's {name} is of no type that is known here: {str(type_name)[:100]!r}.")
    entries = {key: value for key, value in document.items() if key != "type"}
    if type_name == "Dict" and name == "observation_space":
        pairs = read_record(name, {"spaces": sequence(sequence(_ANY, tuple, 2))}, entries)["spaces"]
        inner: dict[str, Any] = {}
        for key, one in pairs:
            inner[read_field(f"{name} key", TEXT, key)] = _read_space(f"{name}.{key}", one)
        if not inner or len(inner) != len(pairs):
            raise WeightsError(f"The file's {name} has no keys, or one twice.")
        total = sum(_n_elements(one) for one in inner.values())
        if total > _MAX_SPACE:
            raise WeightsError(f"The file's {name} has {total} numbers, and {_MAX_SPACE} are allowed.")
        return spaces.Dict(list(inner.items()))  # A mapping it would sort.
    kinds = {
        "Box": {"shape": _SHAPE, "dtype": choice(*_NUMPY_TYPES), "low": _BOUND, "high": _BOUND},
        "Discrete": {"n": integer(1), "start": integer()},
        "MultiDiscrete": {"nvec": sequence(integer(1)), "start": sequence(integer())},
        "MultiBinary": {"shape": _SHAPE},
    }
    if type_name not in kinds:
        raise WeightsError(f"The file's {name} is of no type that is known here: {str(type_name)[:100]!r}.")
    values = read_record(name, kinds[type_name], entries)
    if math.prod(values.get("shape", ())) > _MAX_SPACE:
        raise WeightsError(f"The file's {name} has shape {values['shape']}, and {_MAX_SPACE} numbers are allowed.")
    try:
        if type_name == "Box":
            shape, dtype = values["shape"], np.dtype(values["dtype"])
            if dtype.kind in "iu":  # NumPy 1 would wrap them around
                limits = np.iinfo(dtype)
                for side in ("low", "high"):
                    given = np.asarray(values[side])
                    if (given < limits.min).any() or (given > limits.max).any():
                        raise OverflowError(f"{side} is outside the range of {dtype}")
            low, high = (
                np.full(shape, values[side], dtype)
                if not isinstance(values[side], list)
                else np.array(values[side], dtype).reshape(shape)
                for side in ("low", "high")
            )
            return spaces.Box(low, high, shape, dtype.type)
        if type_name == "MultiDiscrete":
            return spaces.MultiDiscrete(values["nvec"], start=values["start"])
        if type_name == "MultiBinary":
            return spaces.MultiBinary(values["shape"] if len(values["shape"]) > 1 else values["shape"][0])
        return spaces.Discrete(values["n"], start=values["start"])
    except (ValueError, OverflowError, TypeError, AssertionError) as error:
        raise WeightsError(f"The file's {name} is not what it must be: {error}.") from error


def _n_elements(space: spaces.Space[Any]) -> int:
    if isinstance(space, spaces.Dict):
        return sum(_n_elements(one) for one in space.spaces.values())
    return math.prod(space.shape or ())


# Counters, statistics -----------------------------------------------------------------------------------------------------

_COUNTERS: dict[str, tuple[str, Kind]] = {
    "num_timesteps": ("num_timesteps", _COUNT),
    "n_updates": ("_n_updates", _COUNT),
    "n_offline_steps": ("_n_offline_steps", _COUNT),
    "n_calls": ("_n_calls", _COUNT),
    "episode_num": ("_episode_num", _COUNT),
    "total_timesteps": ("_total_timesteps", _COUNT),
    "progress_remaining": ("_current_progress_remaining", number(-1e18, 1.0)),
    "exploration_rate": ("exploration_rate", _SHARE),
}
"""Name in the file, attribute and kind."""


def _describe_counters(model: ConservativeMixin) -> dict[str, Any]:
    counters = {
        name: write_field(name, kind, getattr(model, attribute))
        for name, (attribute, kind) in _COUNTERS.items()
        if hasattr(model, attribute)
    }
    if model._num_timesteps_online is not None:
        # In the middle of an offline run, where gradient steps are the clock.
        counters["num_timesteps"] = model._num_timesteps_online
    return counters


class _Statistics:
    """What a file says of a ``VecNormalize``: its options, and its statistics by name."""

    def __init__(self, options: dict[str, Any], values: dict[str, th.Tensor]) -> None:
        self.options, self.values = options, values


_NORMALIZATION: dict[str, Kind] = {
    "training": FLAG,
    "norm_obs": FLAG,
    "norm_reward": FLAG,
    "clip_obs": number(0.0),
    "clip_reward": number(0.0),
    "gamma": _SHARE,
    "epsilon": number(0.0),
    "norm_obs_keys": optional(sequence(TEXT)),
}
_MOMENTS = ("mean", "var", "count")
_UNSEEN_COUNT = 0.5
"""``RunningMeanStd`` starts with a count of 1e-4; a first observation brings it above 1."""


def _running(env: VecNormalize) -> dict[str, Any]:
    """The statistics of a wrapper, each a ``RunningMeanStd``."""
    every: dict[str, Any] = {"returns": env.ret_rms}
    if env.norm_obs:
        own: Any = env.obs_rms
        every |= {f"observations.{key}": one for key, one in own.items()} if isinstance(own, dict) else {"observations": own}
    return every


def _moments(env: VecNormalize) -> dict[str, th.Tensor]:
    return {
        f"normalization.{name}.{moment}": th.as_tensor(np.asarray(getattr(one, moment), dtype=np.float64))
        for name, one in _running(env).items()
        for moment in _MOMENTS
    }


def _describe_normalization(env: VecNormalize | None) -> tuple[dict[str, Any] | None, dict[str, th.Tensor]]:
    if env is None:
        return None, {}
    options = {name: write_field(f"VecNormalize.{name}", kind, getattr(env, name)) for name, kind in _NORMALIZATION.items()}
    return options, _moments(env)


def _read_normalization(file: WeightsFile, document: Any) -> _Statistics | None:
    """Read the statistics; whether they have the environment's shapes is seen when there is one."""
    if document is None:
        return None
    options = read_record("normalization", _NORMALIZATION, document)
    prefix = "normalization."
    expected = {
        name.removeprefix(prefix): th.empty(file.shapes[name], dtype=th.float64, device="meta") for name in file.names(prefix)
    }
    file.expect(prefix, expected)
    values = file.read_all(prefix)
    for name, tensor in values.items():
        if not name.endswith(_MOMENTS) or (not name.endswith("mean") and bool((tensor < 0).any())):
            raise WeightsError(f"The file's statistics {name!r} are not what they must be: variances and counts are >= 0.")
    return _Statistics(options, {prefix + name: tensor for name, tensor in values.items()})


def _with_statistics(env: Any, statistics: _Statistics | None) -> tuple[Any, VecNormalize | None]:
    """Wrap the environment for the file's statistics, or check that it can have them; return the wrapper that is to have them.

    They are set last: a wrapper of the caller's is not touched by a file that is then refused.
    """
    env = BaseAlgorithm._wrap_env(maybe_make_env(env, 0))
    existing = unwrap_vec_normalize(env)
    if statistics is None:
        if existing is not None and existing.norm_obs:
            raise WeightsError(
                "The environment is normalised by VecNormalize, and the model was trained on raw observations: pass the "
                "environment without it, or with norm_obs=False."
            )
        return env, None
    options = statistics.options
    try:
        wrapper = VecNormalize(env, **options) if existing is None else existing
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"The environment cannot be normalised as the model's was: {error}.") from error
    compared = [name for name in _NORMALIZATION if name != "training"]
    different = [name for name in compared if getattr(wrapper, name) != options[name] and existing is not None]
    if different:
        shown = {name: (getattr(wrapper, name), options[name]) for name in different}
        raise WeightsError(
            f"The environment's VecNormalize has other settings than the model's (its, the file's): {shown}. Pass the "
            "environment without VecNormalize to have it wrapped."
        )
    ours = _moments(wrapper)
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in statistics.values.items()}
    if shapes != theirs:
        raise WeightsError(f"The file's statistics do not fit the environment: expected {shapes}, got {theirs}.")
    seen = [name for name, one in _running(wrapper).items() if one.count > _UNSEEN_COUNT]
    if seen and any(not th.equal(tensor, statistics.values[name]) for name, tensor in ours.items()):
        raise WeightsError(
            "The environment's VecNormalize has statistics of its own, which are not the model's. Pass the environment without "
            "VecNormalize to have it wrapped."
        )
    return (wrapper if existing is None else env), wrapper


def _set_statistics(wrapper: VecNormalize, statistics: _Statistics) -> None:
    for name, one in _running(wrapper).items():
        values = {moment: statistics.values[f"normalization.{name}.{moment}"].numpy() for moment in _MOMENTS}
        one.mean, one.var, one.count = values["mean"].copy(), values["var"].copy(), float(values["count"])


_DOCUMENT: dict[str, Kind] = {
    "algorithm": choice(*_ALGORITHMS),
    "policy": optional(TEXT),
    "options": _ANY,
    "given_at_load": sequence(TEXT),
    "observation_space": _ANY,
    "action_space": _ANY,
    "n_envs": _ENVIRONMENTS,
    "counters": Kind(
        f"an object with some of {list(_COUNTERS)}",
        lambda value: value,
        lambda value: read_record("counters", {name: kind for name, (_, kind) in _COUNTERS.items()}, value, _COUNTERS),
    ),
    "normalization": _ANY,
    "optimizers": _ANY,
    "versions": mapping(TEXT),
}

__all__ = ["WeightsError", "load_weights", "save_weights"]
