"""The greedy policy as one file that runs without Stable-Baselines3: ONNX or TorchScript."""

from __future__ import annotations

import copy
import io
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import stable_baselines3
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.vec_env import VecNormalize

import cql_plugins
from cql_plugins._files import whole_file
from cql_plugins._onnx import onnx_bytes

_INPUT, _OUTPUT = "observation", "action"
_SUFFIXES = (".onnx", ".pt")


def export_policy(
    model: BaseAlgorithm,
    path: str | os.PathLike[str],
    *,
    vec_normalize: VecNormalize | Literal[False] | None = None,
    channels_last: bool = False,
) -> None:
    """Write what ``model.predict(observations, deterministic=True)`` computes as an ONNX or a TorchScript file.

    All of it is in the file: ``VecNormalize``'s statistics as they are now, the scaling of images, the encoding of discrete
    observations, the network, and the way from its output to the action space. Batches are of any size, and there is always
    one: shape ``(B, ...)`` of the observation space, in its dtype; ``(B,)`` where that is Discrete. The input is named
    ``observation``, or there is one input for each key of a Dict space; a TorchScript file takes a dict of those. The output
    ``action`` has shape ``(B, ...)`` of the action space, within its bounds; indices are int64. Both files have text about
    the model: ``get_modelmeta().custom_metadata_map`` in onnxruntime, ``metadata.json`` among TorchScript's extra files.

    Nothing of the model changes. With ``VecNormalize`` the arithmetic before the network is in float64, as there.

    Args:
        model: A model of this package, of Stable-Baselines3 or sb3-contrib, or of a subclass, that predicts by SB3's
            own ``predict``: not recurrent ones, and not ones with action masks.
        path: Where to; ``.onnx`` or ``.pt`` chooses the format. The file appears whole or not at all.
        vec_normalize: What normalises observations; by default the model's own environment, where that does. ``False`` leaves
            it out: the file then expects normalised observations, as ``predict`` does.
        channels_last: Whether images come as ``(B, height, width, channels)``, as from most environments and cameras, instead
            of the ``(B, channels, height, width)`` of the model's observation space. ``predict`` takes both, a file one.

    Raises:
        ImportError: For ONNX, if the packages that write it are missing.
        TypeError: If ``model`` or ``vec_normalize`` is something else.
        ValueError: If the ending is another; if the model predicts in a way of its own, or has a space that cannot be
            exported; if the statistics do not fit it; or if it was trained with ``VecNormalize`` and there is none now. (Models
            of this package remember that; those of SB3 do not.)
    """
    place = Path(path)
    if place.suffix not in _SUFFIXES:
        raise ValueError(f"path must end in .onnx (ONNX) or .pt (TorchScript); got {str(path)!r}.")
    _check_model(model)
    observations = _subspaces(model)
    normalizer = _normalizer(model, vec_normalize)
    statistics = _statistics(normalizer, observations)
    if normalizer is not None:  # It makes float32 of what comes in another type.
        observations |= {name: one for name, one in _named(normalizer.venv.observation_space).items() if name in statistics}
    moved = {name for name, one in observations.items() if channels_last and _has_channels_first(one, name in statistics)}
    if channels_last and not moved:
        raise ValueError(
            f"channels_last=True is for images of bytes that the policy sees with channels first, and it sees {observations}."
        )
    policy = _Greedy(model, [_Preparation(statistics.get(name), name in moved) for name in observations], list(observations))
    examples = {name: _example(one, name in moved) for name, one in observations.items()}
    metadata = {
        "algorithm": type(model).__name__,
        "observation_space": str(model.observation_space),
        "action_space": str(model.action_space),
        "normalized_inside": json.dumps(sorted(statistics)),
        "channels_last": json.dumps(sorted(moved)),
        "cql_plugins": cql_plugins.__version__,
        "stable_baselines3": stable_baselines3.__version__,
        "torch": str(th.__version__),
    }
    with th.no_grad(), _without_checks():
        if place.suffix == ".onnx":
            contents = onnx_bytes(policy, tuple(examples.values()), list(observations), _OUTPUT, metadata)
        else:
            contents = _torchscript_bytes(policy, examples if policy.takes_dict else examples[_INPUT], metadata)
    with whole_file(place) as file:
        file.write(contents)


class _Preparation(th.nn.Module):
    """From an observation as it comes to one as the policy sees it.

    Args:
        statistics: Mean, scale and clip of ``VecNormalize``, ``None`` where it leaves this one alone.
        moves_channels: Whether channels come last, and have to be first.
    """

    mean: th.Tensor
    scale: th.Tensor

    def __init__(self, statistics: tuple[np.ndarray, np.ndarray, float] | None, moves_channels: bool) -> None:
        super().__init__()
        self.moves_channels, self.clip = moves_channels, None if statistics is None else statistics[2]
        if statistics is not None:
            self.register_buffer("mean", th.as_tensor(statistics[0], dtype=th.float64))
            self.register_buffer("scale", th.as_tensor(statistics[1], dtype=th.float64))

    def forward(self, observation: th.Tensor) -> th.Tensor:
        """Prepare a batch of observations."""
        if self.moves_channels:
            observation = observation.permute(0, 3, 1, 2)
        if self.clip is not None:
            observation = ((observation.double() - self.mean) / self.scale).clamp(-self.clip, self.clip).float()
        return observation


class _Greedy(th.nn.Module):
    """The policy between an observation as it comes and an action as it goes.

    Args:
        model: The model; its policy is copied.
        preparations: For each part of the observation.
        names: Of these parts.
    """

    low: th.Tensor
    high: th.Tensor

    def __init__(self, model: BaseAlgorithm, preparations: list[_Preparation], names: list[str]) -> None:
        super().__init__()
        self.policy = _copy(model.policy).to("cpu").requires_grad_(False)
        self.preparations, self.names = th.nn.ModuleList(preparations), names
        self.takes_dict = isinstance(model.observation_space, spaces.Dict)
        self.action_shape = model.action_space.shape or ()
        self.bounded, self.squashed = isinstance(model.action_space, spaces.Box), model.policy.squash_output
        if isinstance(model.action_space, spaces.Box):
            dtype = np.result_type(model.action_space.dtype, np.float32)  # as NumPy does with the two
            self.register_buffer("low", th.as_tensor(model.action_space.low.astype(dtype)))
            self.register_buffer("high", th.as_tensor(model.action_space.high.astype(dtype)))
        self.eval()

    def forward(self, *observations: Any) -> th.Tensor:
        """Act.

        Args:
            *observations: A tensor for each part, or one dict of them.
        """
        found = [observations[0][name] for name in self.names] if isinstance(observations[0], dict) else observations
        ready = {name: prepare(one) for name, prepare, one in zip(self.names, self.preparations, found, strict=True)}
        actions: th.Tensor = self.policy._predict(ready if self.takes_dict else ready[_INPUT], deterministic=True)
        actions = actions.reshape(-1, *self.action_shape)
        if self.squashed:
            return self.low + 0.5 * (actions + 1.0) * (self.high - self.low)
        return actions.clamp(self.low, self.high) if self.bounded else actions


_NOT_ACTING = ("actor_target", "critic", "critic_target", "q_net_target", "quantile_net_target")
"""Parts of SB3's policies that no action comes from."""


def _copy(policy: BasePolicy) -> Any:
    """Copy the acting part of a policy, so that neither tracing it nor moving it to the CPU touches the model."""
    memo: dict[int, Any] = {}
    for name in _NOT_ACTING:
        if hasattr(policy, name):
            memo[id(getattr(policy, name))] = th.nn.Identity()
    for module in policy.modules():
        if hasattr(module, "optimizer"):
            memo[id(module.optimizer)] = th.nn.Identity()
        if hasattr(module, "action_dist"):
            # gSDE keeps its noise there, with its way back to the parameters, which torch does not copy.
            memo[id(module.action_dist)] = copy.copy(module.action_dist)
    return copy.deepcopy(policy, memo)


def _check_model(model: Any) -> None:
    """Refuse what does not act by SB3's own ``predict``."""
    if not isinstance(model, BaseAlgorithm):
        raise TypeError(
            f"model must be a Stable-Baselines3 algorithm, such as cql_plugins.sb3.CQL; got {type(model).__name__}."
        )
    is_hosts = type(model).predict.__module__.partition(".")[0] in ("stable_baselines3", "sb3_contrib")
    if not is_hosts or type(model.policy).predict is not BasePolicy.predict:
        cls = type(model.policy if is_hosts else model)
        raise ValueError(
            f"{cls.__module__}.{cls.__name__} has a predict of its own (a recurrent policy, action masks, or your own code), "
            "and the file would compute something else. Export such a policy with torch.onnx.export yourself."
        )


def _named(space: Any) -> dict[str, spaces.Space[Any]]:
    """Name the inputs."""
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {_INPUT: space}


def _subspaces(model: BaseAlgorithm) -> dict[str, spaces.Space[Any]]:
    """Name the inputs of a model, and refuse what no file can take."""
    named = _named(model.observation_space)
    for name, space in named.items():
        if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
            raise ValueError(
                f"The observation space cannot be exported: expected Box, Discrete, MultiDiscrete, MultiBinary or a Dict of "
                f"these, got {space} for {name!r}."
            )
    if _OUTPUT in named:
        raise ValueError(f"The observations have a key {_OUTPUT!r}, which is the name of the output; rename it.")
    return named


def _has_channels_first(space: Any, normalized: bool) -> bool:
    """Whether it is an image as SB3's networks have them; around ``VecNormalize`` it leaves the channels where they are."""
    return is_image_space(space) and (not normalized or is_image_space_channels_first(space))


def _normalizer(model: BaseAlgorithm, given: Any) -> VecNormalize | None:
    """Choose what normalises observations, if anything does."""
    if given is False:
        return None
    chosen = model.get_vec_normalize_env() if given is None else given
    if chosen is None:
        if getattr(model, "_normalized_observations", False):
            raise ValueError(
                "The model was trained on observations normalised by VecNormalize, and its environment is not: pass "
                "vec_normalize=VecNormalize.load(path, venv), or load the model with that environment; vec_normalize=False for "
                "a file that expects normalised observations."
            )
        return None
    if not isinstance(chosen, VecNormalize):
        raise TypeError(f"vec_normalize must be a VecNormalize, False or None; got {type(chosen).__name__}.")
    return chosen if chosen.norm_obs else None


def _statistics(
    normalizer: VecNormalize | None, observations: Mapping[str, spaces.Space[Any]]
) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Take mean, scale and clip of each normalised part."""
    if normalizer is None:
        return {}
    rms: Any = normalizer.obs_rms
    rms = rms if isinstance(rms, dict) else {_INPUT: rms}
    shapes = {name: space.shape for name, space in observations.items()}
    for name, one in rms.items():
        if one.mean.shape != shapes.get(name):
            raise ValueError(
                f"VecNormalize's statistics do not fit what the policy sees: {name!r} has shape {one.mean.shape} there, and "
                f"the policy's observations have {shapes}. Wrappers that change observations belong inside VecNormalize."
            )
    return {name: (one.mean, np.sqrt(one.var + normalizer.epsilon), float(normalizer.clip_obs)) for name, one in rms.items()}


def _example(space: spaces.Space[Any], channels_last: bool) -> th.Tensor:
    """Draw two observations to trace with, from no stream of the model's: the exporter takes a batch of one for a constant."""
    space = copy.deepcopy(space)
    space.seed(0)
    rows = np.stack([space.sample(), space.sample()])
    if channels_last:
        rows = rows.transpose(0, 2, 3, 1)
    return th.as_tensor(rows)


def _torchscript_bytes(policy: th.nn.Module, example: Any, metadata: Mapping[str, str]) -> bytes:
    """Give a module as the contents of a TorchScript file."""
    contents = io.BytesIO()
    with warnings.catch_warnings():
        # torch's notice that TorchScript is to go; the category depends on torch's version.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is (deprecated|not supported)")
        script: Any = th.jit.trace(policy, (example,))
        th.jit.save(script, contents, _extra_files={"metadata.json": json.dumps(metadata)})
    return contents.getvalue()


@contextmanager
def _without_checks() -> Iterator[None]:
    """Let distributions not look at their parameters: a traced number has no value."""
    distribution = th.distributions.Distribution
    before = distribution._validate_args
    distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        distribution.set_default_validate_args(before)


__all__ = ["export_policy"]
