"""What a modern CQL might have, tried in the grid `pendulum-modern` before any of it becomes an option of the package."""

from __future__ import annotations

from typing import Any

import torch as th
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import TensorDict
from stable_baselines3.sac.policies import SACPolicy
from torch import nn

from cql_plugins import losses
from cql_plugins.sb3 import CQL


class LayerNormPolicy(SACPolicy):
    """SAC's policy with critics that normalise each hidden layer before its activation [RLPD, Section 4.2]."""

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> ContinuousCritic:
        critic = super().make_critic(features_extractor)
        for index, network in enumerate(critic.q_networks):
            layers: list[nn.Module] = []
            for module in network.children():
                if isinstance(module, self.activation_fn):
                    layers.append(nn.LayerNorm(layers[-1].out_features))  # type: ignore[arg-type]
                layers.append(module)
            critic.q_networks[index] = nn.Sequential(*layers).to(self.device)
            setattr(critic, f"qf{index}", critic.q_networks[index])
        return critic


class SubsetCQL(CQL):
    """CQL whose target is the smallest of some critics drawn anew in each step [REDQ, Algorithm 1]."""

    n_target_critics = 2

    def _next_values(self, observations: th.Tensor | TensorDict, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        values = self._critic_outputs(self.critic_target, observations, actions)[..., 0]
        chosen = th.randperm(len(values), device=values.device)[: self.n_target_critics]
        return losses.max_backup(values[chosen])


def build(options: dict[str, Any]) -> tuple[type[CQL], type[SACPolicy] | str, dict[str, Any]]:
    """Take the candidates' options out of an arm's; return class, policy and the policy's arguments."""
    policy = LayerNormPolicy if options.pop("layer_norm", False) else "MlpPolicy"
    nets = {"n_critics": options.pop("n_critics")} if "n_critics" in options else {}
    subset = options.pop("n_target_critics", 0)
    algorithm = type("SubsetCQL", (SubsetCQL,), {"n_target_critics": subset}) if subset else CQL
    return algorithm, policy, nets
