"""Models that move between d3rlpy and Stable-Baselines3: same policy, same Q."""

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

from cql_plugins.adapters._validation import require_extra

if TYPE_CHECKING:
    import torch as th
    from d3rlpy.algos import QLearningAlgoBase
    from stable_baselines3.common.vec_env import VecEnv, VecNormalize
    from stable_baselines3.sac.sac import SAC

    AnyAlgo = QLearningAlgoBase[Any, Any]


class ModelError(ValueError):
    """A model, or a part of it, that the other framework cannot have. The message says which and why."""


# d3rlpy -> SB3 --------------------------------------------------------------------------------------------------------


def to_sb3_model(algo: "AnyAlgo", env: Any, **kwargs: Any) -> "SAC":
    """Make a Stable-Baselines3 model of a d3rlpy algorithm, to go on with SB3's parallel environments and callbacks.

    CQL and Cal-QL (ours and d3rlpy's own) become `cql_plugins.sb3.CQL` and `CalQL`, d3rlpy's SAC becomes SB3's. Carried
    are the actor, the critics and their targets, the entropy coefficient, the Lagrange multiplier, and the options that
    both have; optimisers start anew as plain Adam, and a warning says where they were something else. An observation
    scaler becomes a `VecNormalize` around the environment whose statistics stand still: `model.get_env()` has it, and
    `model.predict` wants observations from there. An action scaler must have the bounds of the environment's action
    space, which is what SB3 scales by.

    d3rlpy's own CQL takes the policy's mode in its target; such a model goes on with `mode_q_backup=True`.

    Args:
        algo: The algorithm, built (by `fit`, `build_with_env`, `create_impl` or `d3rlpy.load_learnable`).
        env: Gymnasium or SB3 environment, as for any SB3 model.
        **kwargs: Arguments of the SB3 model that are to be other than the algorithm's.

    Returns:
        The model; what it collects from its first step on is the policy's.

    Raises:
        ModelError: If something cannot be carried.
        ImportError: If d3rlpy or Stable-Baselines3 is not installed.
    """
    _import_both()
    import torch as th
    from stable_baselines3.sac.sac import SAC

    if algo.impl is None:
        raise ModelError("The algorithm has no networks yet: call fit, build_with_env or create_impl first.")
    modules = _unwrapped(algo.impl.modules)
    config = algo.config
    model_class, options = _sb3_options(algo, modules)
    actor_units, activation = _read_encoder(modules["policy"]._encoder, "actor")
    critic_units, critic_activation = _read_encoder(_single_encoder(modules["q_funcs"]), "critic")
    if activation is not critic_activation:
        raise ModelError(f"SB3 has one activation for actor and critics; got {activation} and {critic_activation}.")
    if not hasattr(modules["policy"], "_logstd") or not isinstance(modules["policy"]._logstd, th.nn.Linear):
        raise ModelError("SB3's actor has a standard deviation that depends on the state; this policy's does not.")
    env = _scaled_env(algo, env)
    _warn_of_optimizers(config, kwargs)
    networks = {
        "net_arch": {"pi": actor_units, "qf": critic_units},
        "activation_fn": activation,
        "n_critics": len(modules["q_funcs"]),
    }
    arguments = {
        "learning_rate": config.critic_learning_rate,
        "batch_size": config.batch_size,
        "tau": config.tau,
        "gamma": config.gamma,
        **options,
        **kwargs,
        "policy_kwargs": kwargs.get("policy_kwargs", {}) | networks,
    }
    model: SAC = model_class("MlpPolicy", env, **arguments)
    _check_action_scaler(algo, model.action_space)

    _copy_linears(modules["policy"], model.actor)
    for source, target in ((modules["q_funcs"], model.critic), (modules["targ_q_funcs"], model.critic_target)):
        for theirs, ours in zip(source, target.q_networks, strict=True):
            _copy_linears(theirs, ours)
    with th.no_grad():
        if model.log_ent_coef is not None:
            model.log_ent_coef.copy_(next(modules["log_temp"].parameters()).reshape(1))
        if getattr(model, "log_cql_lagrange", None) is not None:
            model.log_cql_lagrange.copy_(next(modules["log_alpha"].parameters()).reshape(1))  # type: ignore[attr-defined]
    model._n_updates = algo.grad_step
    if hasattr(model, "mark_pretrained"):
        model.mark_pretrained(max(1, algo.grad_step))
    return model


def _sb3_options(algo: "AnyAlgo", modules: dict[str, Any]) -> "tuple[type[SAC], dict[str, Any]]":
    """The SB3 class that an algorithm becomes, and its arguments beside those of SAC's networks."""
    import d3rlpy
    from stable_baselines3.sac.sac import SAC

    from cql_plugins.sb3 import CQL, CalQL

    config: Any = algo.config
    temperature = float(next(modules["log_temp"].parameters()).detach().exp()) if "log_temp" in modules else 0.0
    options: dict[str, Any] = {"ent_coef": "auto" if getattr(config, "temp_learning_rate", 0.0) > 0 else temperature}
    if isinstance(algo, d3rlpy.algos.SAC):
        if config.actor_learning_rate != config.critic_learning_rate:
            warnings.warn(
                f"SB3's SAC has one learning rate: the critic's, {config.critic_learning_rate}, is taken for the actor, too "
                f"(d3rlpy: {config.actor_learning_rate}).",
                UserWarning,
                stacklevel=3,
            )
        return SAC, options | {"learning_starts": 0}
    if not isinstance(algo, d3rlpy.algos.CQL):
        raise ModelError(f"{type(algo).__name__} has no counterpart here; CQL, CalQL and SAC have.")

    multiplier = float(next(modules["log_alpha"].parameters()).detach().exp())
    learns_multiplier = config.alpha_learning_rate > 0
    _warn_of_rate("temp_learning_rate", config.temp_learning_rate, "actor's", config.actor_learning_rate)
    _warn_of_rate("alpha_learning_rate", config.alpha_learning_rate, "critic's", config.critic_learning_rate)
    options |= {
        "actor_learning_rate": config.actor_learning_rate,
        "cql_alpha": config.conservative_weight * (1.0 if learns_multiplier else multiplier),
        "cql_lagrange_threshold": config.alpha_threshold if learns_multiplier else None,
        "cql_n_actions": config.n_action_samples,
        "max_q_backup": config.max_q_backup,
        "mode_q_backup": _takes_the_mode(config),
        "backup_entropy": config.soft_q_backup,
    }
    is_calibrated = isinstance(algo, d3rlpy.algos.CalQL) or hasattr(config, "return_tail")
    ours = ["cql_variant", "cql_temperature", "cql_clip_diff", "normalize_gap", "offline_fraction", "precision"]
    ours += ["return_tail", "calibrate_random"] if is_calibrated else []
    options |= {name: getattr(config, name) for name in ours if hasattr(config, name)}
    return (CalQL if is_calibrated else CQL), options


def _takes_the_mode(config: Any) -> bool:
    """Whether the target's action is the policy's mode: that of d3rlpy's own algorithms is, if nothing else is asked for."""
    if getattr(config, "conventions", "d3rlpy") == "d3rlpy":
        return not (config.soft_q_backup or config.max_q_backup)
    return bool(config.mode_q_backup)


def _warn_of_rate(field: str, rate: float, owner: str, taken: float) -> None:
    """Say that a learning rate is another's in SB3; 0 stands for off."""
    if rate not in (0.0, taken):
        warnings.warn(
            f"cql_plugins.sb3 has no {field} of its own: the {owner}, {taken}, is taken (d3rlpy: {rate}).",
            UserWarning,
            stacklevel=4,
        )


def _warn_of_optimizers(config: Any, arguments: dict[str, Any]) -> None:
    """Say what of d3rlpy's optimisers is not plain Adam, where the SB3 model's arguments do not answer it."""
    answered = ["lr_scheduler_factory"] if "learning_rate" in arguments else []
    has_own_class = bool({"optimizer_class", "optimizer_kwargs"} & set(arguments.get("policy_kwargs") or {}))
    lost = []
    for owner in ("actor", "critic", "temp", "alpha"):
        factory = getattr(config, f"{owner}_optim_factory", None)
        if factory is None or getattr(config, f"{owner}_learning_rate") == 0.0:
            continue
        changed = {name: value for name, value in _changed_fields(factory).items() if name not in answered}
        if has_own_class:
            changed = {name: value for name, value in changed.items() if name in ("clip_grad_norm", "lr_scheduler_factory")}
        if changed or (type(factory).__name__ != "AdamFactory" and not has_own_class):
            shown = ", ".join(f"{name}={value}" for name, value in changed.items())
            lost.append(f"{owner}_optim_factory={type(factory).__name__}({shown})")
    if lost:
        warnings.warn(
            f"{'; '.join(lost)}: not carried, the SB3 model steps with plain Adam. Pass optimizer_class and optimizer_kwargs "
            "in policy_kwargs, and a schedule as learning_rate; SB3's SAC does not clip gradients.",
            UserWarning,
            stacklevel=3,
        )


def _changed_fields(factory: Any) -> dict[str, Any]:
    """Fields of a dataclass that are not at their defaults."""
    changed = {}
    for field in dataclasses.fields(factory):
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        value = getattr(factory, field.name)
        if value != default:
            changed[field.name] = value
    return changed


def _scaled_env(algo: "AnyAlgo", env: Any) -> Any:
    """Put the observation scaler around the environment."""
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.vec_env import VecNormalize, unwrap_vec_normalize

    config: Any = algo.config
    if config.reward_scaler is not None:
        raise ModelError(
            f"The reward scaler {config.reward_scaler.get_type()!r} cannot be carried: SB3 has none. Scale the data's rewards "
            "with dataset.scale_rewards(...), the environment's with a wrapper, and train without it."
        )
    vec_env: VecEnv = BaseAlgorithm._wrap_env(env, verbose=0)
    if not isinstance(vec_env.observation_space, spaces.Box) or len(vec_env.observation_space.shape) != 1:
        raise ModelError(f"Only vector observations can be carried; the environment has {vec_env.observation_space}.")
    existing = unwrap_vec_normalize(vec_env)
    if existing is not None and existing.norm_obs:
        raise ModelError(
            "The environment is normalised by VecNormalize, but the algorithm was trained with "
            + ("its own observation scaler. Pass the environment without VecNormalize." if config.observation_scaler else
               "raw observations. Pass the environment without VecNormalize, or with norm_obs=False.")
        )  # fmt: skip
    if config.observation_scaler is None:
        return vec_env
    mean, scale = _affine(config.observation_scaler)
    normalized: Any = VecNormalize(
        vec_env, training=False, norm_obs=True, norm_reward=False, clip_obs=np.inf, gamma=config.gamma
    )
    normalized.obs_rms.mean = mean
    normalized.obs_rms.var = scale**2 - normalized.epsilon
    normalized.obs_rms.count = 1.0  # Seen: not to be set anew from the data.
    return normalized


def _affine(scaler: Any) -> tuple[Any, Any]:
    """Mean and scale of a scaler that computes `(x - mean) / scale`, at d3rlpy's float32."""
    import d3rlpy

    def rounded(values: Any) -> Any:
        return np.asarray(values, dtype=np.float32).astype(np.float64)

    if not scaler.built:
        raise ModelError("The observation scaler has not been fitted.")
    if isinstance(scaler, d3rlpy.preprocessing.StandardObservationScaler):
        return rounded(scaler.mean), rounded(np.asarray(scaler.std, dtype=np.float32) + np.float32(scaler.eps))
    if isinstance(scaler, d3rlpy.preprocessing.MinMaxObservationScaler):
        low, high = rounded(scaler.minimum), rounded(scaler.maximum)
        if not np.all(high > low):
            raise ModelError("The min_max observation scaler divides by zero: an observation is constant in the data.")
        return (high + low) / 2.0, (high - low) / 2.0
    raise ModelError(f"The observation scaler {scaler.get_type()!r} cannot be carried; 'standard' and 'min_max' can.")


def _check_action_scaler(algo: "AnyAlgo", space: spaces.Space[Any]) -> None:
    import d3rlpy

    assert isinstance(space, spaces.Box)
    scaler: Any = algo.config.action_scaler
    if scaler is None:
        low, high = -np.ones(space.shape), np.ones(space.shape)
    elif isinstance(scaler, d3rlpy.preprocessing.MinMaxActionScaler) and scaler.built:
        low, high = np.asarray(scaler.minimum), np.asarray(scaler.maximum)
    else:
        raise ModelError(f"The action scaler {scaler.get_type()!r} cannot be carried; a fitted 'min_max' can.")
    if low.shape != space.shape or not (np.allclose(low, space.low, atol=1e-6) and np.allclose(high, space.high, atol=1e-6)):
        raise ModelError(
            f"SB3 scales actions by the bounds of the action space, {space.low.tolist()} and {space.high.tolist()}; this "
            f"algorithm's actions are between {low.tolist()} and {high.tolist()}. Train with "
            "action_scaler=MinMaxActionScaler(minimum=space.low, maximum=space.high), or wrap the environment in "
            "gymnasium.wrappers.RescaleAction."
        )


# SB3 -> d3rlpy --------------------------------------------------------------------------------------------------------


def to_d3rlpy_model(model: "SAC", device: str | bool | int = False, **kwargs: Any) -> "AnyAlgo":
    """Make a d3rlpy algorithm of a Stable-Baselines3 model, for its evaluators, exports and off-policy evaluation.

    `cql_plugins.sb3.CQL` and `CalQL` become ours for d3rlpy, SB3's `SAC` becomes d3rlpy's. Carried is what
    `to_sb3_model` carries. `VecNormalize` becomes an observation scaler with the statistics of this moment (its
    clipping is not carried, and said), the bounds of the action space an action scaler. A warning says what else the model
    trains with and d3rlpy's would not: several steps, cloning, schedules, optimisers other than plain Adam.

    Args:
        model: The model.
        device: d3rlpy's device argument.
        **kwargs: Fields of the config that are to be other than the model's.

    Returns:
        The algorithm; `predict` takes raw observations and returns actions in the environment's units.

    Raises:
        ModelError: If something cannot be carried.
        TypeError: If `kwargs` has what the model's networks decide.
        ImportError: If d3rlpy or Stable-Baselines3 is not installed.
    """
    _import_both()
    import d3rlpy
    import torch as th

    if fixed := sorted({"n_critics", "actor_encoder_factory", "critic_encoder_factory"} & kwargs.keys()):
        raise TypeError(f"to_d3rlpy_model takes {', '.join(fixed)} from the model's networks, which are carried.")
    config_class, options = _d3rlpy_options(model)
    _check_sb3_networks(model)
    actor: Any = model.actor
    critic: Any = model.critic
    activation = _activation_name(model.policy.activation_fn)
    action_space = model.action_space
    assert isinstance(action_space, spaces.Box)
    if not (np.all(action_space.low == -1.0) and np.all(action_space.high == 1.0)):
        options["action_scaler"] = d3rlpy.preprocessing.MinMaxActionScaler(action_space.low, action_space.high)

    def encoder(network: "th.nn.Module") -> Any:
        units = [layer.out_features for layer in _linears(network)]
        return d3rlpy.models.VectorEncoderFactory(units, activation)

    networks = {
        "n_critics": len(critic.q_networks),
        "actor_encoder_factory": encoder(actor.latent_pi),
        "critic_encoder_factory": encoder(critic.q_networks[0][:-1]),
    }
    fields = {
        "batch_size": model.batch_size,
        "gamma": model.gamma,
        "tau": model.tau,
        "critic_learning_rate": model.lr_schedule(1.0),
        "observation_scaler": _observation_scaler(model.get_vec_normalize_env()),
        **options,
        **kwargs,
    }
    algo: AnyAlgo = config_class(**(fields | networks)).create(device)
    for message in _lost_in_d3rlpy(model, kwargs):
        warnings.warn(message, UserWarning, stacklevel=2)
    algo.create_impl(model.observation_space.shape or (), int(np.prod(action_space.shape)))
    assert algo.impl is not None
    modules = _unwrapped(algo.impl.modules)
    _copy_linears(actor, modules["policy"])
    for source, target in ((critic, modules["q_funcs"]), (model.critic_target, modules["targ_q_funcs"])):
        for ours, theirs in zip(source.q_networks, target, strict=True):
            _copy_linears(ours, theirs)
    with th.no_grad():
        if model.log_ent_coef is not None:
            next(modules["log_temp"].parameters()).copy_(model.log_ent_coef.reshape(1, 1))
        if getattr(model, "log_cql_lagrange", None) is not None:
            next(modules["log_alpha"].parameters()).copy_(model.log_cql_lagrange.reshape(1, 1))  # type: ignore[attr-defined]
    algo.set_grad_step(model._n_updates)
    return algo


def _d3rlpy_options(model: "SAC") -> tuple[Callable[..., Any], dict[str, Any]]:
    """The config class that a model becomes, and its fields beside those of the networks."""
    import d3rlpy
    from stable_baselines3.sac.sac import SAC

    from cql_plugins.d3rlpy import CalQLConfig, CQLConfig
    from cql_plugins.sb3 import CQL, CalQL

    if not isinstance(model, SAC):
        raise ModelError(f"{type(model).__name__} has no counterpart here; CQL, CalQL and SAC have.")
    rate = model.actor_lr_schedule(1.0) if isinstance(model, CQL) else model.lr_schedule(1.0)
    options: dict[str, Any] = {"actor_learning_rate": rate}
    if model.log_ent_coef is not None:
        options["temp_learning_rate"] = rate
        if not math.isclose(float(model.target_entropy), -float(np.prod(model.action_space.shape or (1,)))):
            raise ModelError(f"d3rlpy's target entropy is minus the action dimension; this model's is {model.target_entropy}.")
    else:
        fixed = float(model.ent_coef_tensor)
        if fixed <= 0.0:
            raise ModelError(f"d3rlpy keeps the temperature as a logarithm, so it cannot be {fixed}.")
        options |= {"temp_learning_rate": 0.0, "initial_temperature": fixed}
    if not isinstance(model, CQL):
        return d3rlpy.algos.SACConfig, options

    if model.backup_entropy and model.max_q_backup:
        raise ModelError("d3rlpy has no target with both backup_entropy and max_q_backup.")
    options |= {
        "conservative_weight": model.cql_alpha,
        "n_action_samples": model.cql_n_actions,
        "soft_q_backup": model.backup_entropy,
        "max_q_backup": model.max_q_backup,
        "mode_q_backup": model.mode_q_backup,
    }
    if model.cql_lagrange_threshold is not None:
        options |= {"alpha_learning_rate": model.lr_schedule(1.0), "alpha_threshold": model.cql_lagrange_threshold}
    names = ["cql_variant", "cql_temperature", "cql_clip_diff", "normalize_gap", "offline_fraction", "precision"]
    names += ["return_tail", "calibrate_random"] if isinstance(model, CalQL) else []
    options |= {name: getattr(model, name) for name in names}
    return (CalQLConfig if isinstance(model, CalQL) else CQLConfig), options


def _lost_in_d3rlpy(model: Any, fields: dict[str, Any]) -> list[str]:
    """What a model trains with that d3rlpy's algorithm will not, where the config's fields do not answer it."""
    messages = []
    n_steps = max(model.n_steps, (model.replay_buffer_kwargs or {}).get("n_steps", 1))
    if n_steps > 1:
        messages.append(
            f"n_steps={n_steps} is not carried: d3rlpy's buffers look that many steps ahead. Make them with "
            f"transition_picker=MultiStepTransitionPicker({n_steps}, {model.gamma}) of d3rlpy.dataset."
        )
    left = getattr(model, "bc_steps", 0) - model._n_updates
    if left > 0:
        messages.append(
            f"bc_steps={model.bc_steps} is not carried: d3rlpy's actor does not clone the data's actions. Do the {left} "
            "gradient steps that are left before, with learn_offline."
        )
    own = {"target_update_interval": 1, "cql_alpha_online": None}
    for name, default in own.items():
        value = getattr(model, name, default)
        if value != default:
            messages.append(f"{name}={value} is not carried: d3rlpy has no such option.")
    optimizers_given = bool({"actor_optim_factory", "critic_optim_factory"} & set(fields))
    rates = {"learning_rate": model.lr_schedule}
    if getattr(model, "actor_learning_rate", None) is not None:
        rates["actor_learning_rate"] = model.actor_lr_schedule
    scheduled = [name for name, rate in rates.items() if len({rate(float(at)) for at in np.linspace(1.0, 0.0, 101)}) > 1]
    if scheduled and not optimizers_given:
        messages.append(
            f"{' and '.join(scheduled)}: a schedule is not carried, its first value is taken. Pass to_d3rlpy_model an "
            "actor_optim_factory and a critic_optim_factory with an lr_scheduler_factory of d3rlpy.optimizers."
        )
    changed = _changed_optimizer(model.policy)
    if changed and not optimizers_given:
        messages.append(
            f"The optimiser {changed} is not carried: d3rlpy's are plain Adam. Pass to_d3rlpy_model an actor_optim_factory "
            "and a critic_optim_factory of d3rlpy.optimizers."
        )
    return messages


def _changed_optimizer(policy: Any) -> str | None:
    """The optimiser of an SB3 policy where it is not plain Adam; how fast it is computed does not count."""
    import torch as th

    optimizer_class, chosen = policy.optimizer_class, dict(policy.optimizer_kwargs)
    if optimizer_class is th.optim.Adam:
        defaults = {name: parameter.default for name, parameter in inspect.signature(th.optim.Adam).parameters.items()}
        without_effect = ("foreach", "fused", "capturable", "differentiable")
        chosen = {name: value for name, value in chosen.items() if name not in without_effect and value != defaults.get(name)}
        if not chosen:
            return None
    return f"{optimizer_class.__name__}({', '.join(f'{name}={value}' for name, value in chosen.items())})"


def _check_sb3_networks(model: "SAC") -> None:
    from stable_baselines3.common.policies import ContinuousCritic
    from stable_baselines3.common.torch_layers import FlattenExtractor
    from stable_baselines3.sac.policies import Actor

    if model.use_sde:
        raise ModelError("gSDE's noise depends on the state through learned weights that d3rlpy's policy does not have.")
    space = model.observation_space
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise ModelError(f"Only vector observations can be carried; the model has {space}.")
    owners: list[Any] = [model.actor, model.critic]
    if not _linears(owners[0].latent_pi) or not _linears(owners[1].q_networks[0][:-1]):
        raise ModelError("d3rlpy's networks have at least one hidden layer; this model's have none.")
    for owner in owners:
        if not isinstance(owner.features_extractor, FlattenExtractor):
            raise ModelError(
                f"The features extractor {type(owner.features_extractor).__name__} has no counterpart in d3rlpy; only plain "
                "MLP policies can be carried."
            )
    for owner, host, name in zip(owners, (Actor, ContinuousCritic), ("get_action_dist_params", "forward"), strict=True):
        if getattr(type(owner), name) is not getattr(host, name):
            raise ModelError(f"{type(owner).__name__} has a {name} of its own, which d3rlpy's networks would not have.")


def _observation_scaler(env: "VecNormalize | None") -> Any:
    import d3rlpy

    if env is None:
        return None
    if env.norm_reward:
        raise ModelError(
            "VecNormalize normalises rewards by statistics that go on moving: Q is in units that d3rlpy cannot have. Train "
            "with norm_reward=False."
        )
    if not env.norm_obs:
        return None
    statistics: Any = env.obs_rms
    if np.isfinite(env.clip_obs):
        warnings.warn(
            f"VecNormalize clips observations to +-{env.clip_obs}, d3rlpy's scaler does not: beyond, the two differ.",
            UserWarning,
            stacklevel=3,
        )
    std = np.sqrt(statistics.var + env.epsilon)
    return d3rlpy.preprocessing.StandardObservationScaler(mean=statistics.mean, std=std, eps=0.0)


# Networks -------------------------------------------------------------------------------------------------------------

_ACTIVATIONS = {"ReLU": "relu", "Tanh": "tanh", "GELU": "gelu", "SiLU": "swish"}
"""Name of torch's class, d3rlpy's name for it."""


def _activation_name(activation: type) -> str:
    if activation.__name__ not in _ACTIVATIONS:
        raise ModelError(f"d3rlpy has no activation {activation.__name__}; it has {sorted(_ACTIVATIONS)}.")
    return _ACTIVATIONS[activation.__name__]


def _unwrapped(modules: Any) -> dict[str, Any]:
    """The networks of a d3rlpy algorithm by name, without the wrappers of distributed training."""
    from d3rlpy.torch_utility import unwrap_ddp_model

    return {name: unwrap_ddp_model(module) for name, module in modules.get_torch_modules().items()}


def _single_encoder(q_funcs: Any) -> Any:
    for q_func in q_funcs:
        if type(q_func).__name__ != "ContinuousMeanQFunction":
            raise ModelError(f"SB3's SAC has one value for each action; {type(q_func).__name__} has a distribution.")
    if len(q_funcs) > 1 and q_funcs[0].encoder is q_funcs[1].encoder:
        raise ModelError("The critics share an encoder (share_encoder=True), which SB3's do not.")
    return q_funcs[0].encoder


def _read_encoder(encoder: Any, which: str) -> "tuple[list[int], type[th.nn.Module]]":
    """Hidden units and activation of a plain MLP encoder."""
    import torch as th
    from d3rlpy.models.torch import VectorEncoder, VectorEncoderWithAction
    from d3rlpy.torch_utility import Swish

    if not isinstance(encoder, (VectorEncoder, VectorEncoderWithAction)):
        raise ModelError(f"The {which}'s {type(encoder).__name__} cannot be carried; only plain MLP encoders can.")
    layers: list[Any] = list(encoder._layers)  # type: ignore[call-overload]
    units, activations = [], set()
    for layer in layers:
        if isinstance(layer, th.nn.Linear):
            units.append(layer.out_features)
        else:
            activations.add(th.nn.SiLU if isinstance(layer, Swish) else type(layer))
    regular = len(layers) == 2 * len(units) and all(isinstance(layer, th.nn.Linear) for layer in layers[::2])
    if not regular or len(activations) != 1 or next(iter(activations)).__name__ not in _ACTIVATIONS:
        names = [type(layer).__name__ for layer in layers]
        raise ModelError(f"The {which}'s layers {names} cannot be carried; SB3 has linear layers with one activation between.")
    return units, activations.pop()


def _linears(network: "th.nn.Module") -> "list[th.nn.Linear]":
    """Linear layers in the order in which they run: hidden ones, then the outputs (mean before deviation)."""
    import torch as th

    return [module for module in network.modules() if isinstance(module, th.nn.Linear)]


def _copy_linears(source: "th.nn.Module", target: "th.nn.Module") -> None:
    """Copy weights and biases layer by layer."""
    import torch as th

    with th.no_grad():
        for ours, theirs in zip(_linears(target), _linears(source), strict=True):
            ours.weight.copy_(theirs.weight)
            ours.bias.copy_(theirs.bias)


def _import_both() -> None:
    """Import both frameworks, or say what brings the missing one."""
    try:
        import_module("stable_baselines3")
    except ImportError as error:
        raise require_extra("stable_baselines3", None, error) from error
    import_module("cql_plugins.d3rlpy")  # Says itself what to install.
