"""Published settings by family of tasks, as keyword arguments.

    from cql_plugins.sb3 import CalQL
    from cql_plugins.sb3.presets import PRESETS

    family = PRESETS["antmaze"]
    dataset = dataset.scale_rewards(family.reward_scale, family.reward_shift)
    model = CalQL("MultiInputPolicy", env, **family.arguments(CalQL))

What a family does to rewards and observations is said beside its arguments: the dataset and the environment must both have it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

_COMMON: dict[str, Any] = {"learning_rate": 3e-4, "gamma": 0.99, "tau": 0.005, "batch_size": 256, "cql_n_actions": 10}


@dataclass(frozen=True)
class Preset:
    """Settings of a family of tasks.

    Attributes:
        description: Which tasks.
        source: Where the settings were published.
        values: Arguments of the model, by name.
        reward_scale: Rewards are trained on as ``reward_scale * r + reward_shift``.
        reward_shift: See ``reward_scale``.
        reward_clip: Bound on the absolute reward, ``inf`` for none.
        normalize_observations: Whether observations are normalised (SB3's ``VecNormalize`` with ``norm_reward=False``).
        offline_steps: Gradient steps of the published offline phase.
    """

    description: str
    source: str
    values: Mapping[str, Any] = field(repr=False)
    reward_scale: float = 1.0
    reward_shift: float = 0.0
    reward_clip: float = math.inf
    normalize_observations: bool = False
    offline_steps: int = 1_000_000

    def arguments(self, algorithm: type, **changes: Any) -> dict[str, Any]:
        """Get the keyword arguments for an algorithm's class.

        Args:
            algorithm: ``CQL``, ``CalQL``, or another of ours. ``return_tail`` is left out for one that has no returns-to-go.
            **changes: Arguments that are to be others.

        Returns:
            A dict of its own.

        Raises:
            ValueError: If the family is not for this algorithm: it does not take one of the arguments.
        """
        taken = inspect.signature(algorithm).parameters
        values = {name: value for name, value in self.values.items() if name != "return_tail" or name in taken}
        policies = getattr(algorithm, "policy_aliases", {}).values()
        taken_by_policy = {name for policy in policies for name in inspect.signature(policy).parameters}
        unknown = sorted(values.keys() - taken.keys()) + sorted(values.get("policy_kwargs", {}).keys() - taken_by_policy)
        if unknown:
            raise ValueError(
                f"This preset ({self.description}) is not for {algorithm.__name__}, which has no {', '.join(unknown)}."
            )
        policy_kwargs = {**values.get("policy_kwargs", {}), **changes.pop("policy_kwargs", {})}
        return {**values, **changes, **({"policy_kwargs": policy_kwargs} if policy_kwargs else {})}

    def settings(self) -> dict[str, Any]:
        """Get all there is to show, by name: the arguments, then what is done to rewards and observations, and for how long."""
        shown = dict(self.values)
        if (self.reward_scale, self.reward_shift) != (1.0, 0.0):
            shown["rewards"] = f"{self.reward_scale:g} * r + {self.reward_shift:g}"
        if math.isfinite(self.reward_clip):
            shown["rewards"] = f"clipped to +-{self.reward_clip:g}"
        shown["observations"] = "normalised" if self.normalize_observations else "as they are"
        shown["offline gradient steps"] = f"{self.offline_steps:,}"
        return shown


def _continuous(actor: list[int], critic: list[int], **values: Any) -> Mapping[str, Any]:
    networks = {"net_arch": {"pi": actor, "qf": critic}}
    return MappingProxyType(_COMMON | {"actor_learning_rate": 1e-4} | values | {"policy_kwargs": networks})


def _atari(alpha: float) -> Mapping[str, Any]:
    return MappingProxyType(
        {
            "learning_rate": 5e-5,
            "gamma": 0.99,
            "batch_size": 32,
            "cql_alpha": alpha,
            "offline_target_update_interval": 2000,
            "policy_kwargs": {"n_quantiles": 200, "optimizer_kwargs": {"eps": 0.01 / 32}},
        }
    )


_CQL, _CAL_QL = "Kumar et al. 2020", "Nakamoto et al. 2023"
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "locomotion": Preset(
            "MuJoCo locomotion",
            _CQL,
            _continuous([256] * 3, [256] * 3, cql_alpha=10.0, actor_learning_rate=3e-5),
            normalize_observations=True,
        ),
        "locomotion-medium-expert": Preset(
            "MuJoCo locomotion, mixtures with expert data",
            _CQL,
            _continuous([256] * 3, [256] * 3, cql_alpha=5.0, actor_learning_rate=3e-5),
            normalize_observations=True,
        ),
        "antmaze": Preset(
            "AntMaze and other mazes with a reward at the goal",
            _CAL_QL,
            _continuous(
                [256] * 2,
                [256] * 4,
                cql_alpha=5.0,
                cql_lagrange_threshold=0.8,
                max_q_backup=True,
                cql_clip_diff=(-200.0, math.inf),
                offline_fraction=0.5,
                return_tail="sparse",
            ),
            reward_scale=10.0,
            reward_shift=-5.0,
        ),
        "adroit-binary": Preset(
            "Adroit with rewards of -1 and 0",
            _CAL_QL,
            _continuous([512] * 2, [512] * 3, cql_alpha=1.0, max_q_backup=True, offline_fraction=0.5, return_tail="sparse"),
            reward_scale=10.0,
            reward_shift=5.0,
            offline_steps=20_000,
        ),
        "adroit-human": Preset(
            "Adroit from people's and cloned demonstrations",
            _CQL,
            _continuous([256] * 3, [256] * 3, cql_alpha=1.0, max_q_backup=False),
            normalize_observations=True,
        ),
        "kitchen": Preset(
            "FrankaKitchen (published without importance weights, and with returns summed to the cut: no bound for r - 4 <= 0)",
            _CAL_QL,
            _continuous([512] * 3, [512] * 3, cql_alpha=5.0, max_q_backup=True, offline_fraction=0.25, return_tail="bootstrap"),
            reward_shift=-4.0,
        ),
        "atari-1": Preset("Atari, 1 % of the replay, QR-DQN with CnnPolicy", _CQL, _atari(4.0), reward_clip=1.0),
        "atari-10": Preset("Atari, 10 % of the replay, QR-DQN with CnnPolicy", _CQL, _atari(1.0), reward_clip=1.0),
    }
)
"""The families, by name."""


def print_presets() -> None:
    """Print all families with their settings."""
    for name, preset in PRESETS.items():
        print(f"{name}: {preset.description} ({preset.source})")
        for key, value in preset.settings().items():
            print(f"    {key:32} {value}")
