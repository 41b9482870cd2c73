"""RL Zoo with this package's algorithms: ``python -m cql_plugins.zoo train --algo cql --env Pendulum-v1 --dataset log.npz``."""

from __future__ import annotations

from typing import Any

try:
    import rl_zoo3
    import rl_zoo3.exp_manager
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
except ImportError as error:
    raise ImportError(f'RL Zoo is needed here: {error}. Install it with: pip install "cql-plugins[zoo]"') from error

from cql_plugins import sb3
from cql_plugins.zoo.manager import OfflineExperimentManager

HOSTS = {
    "cql": ("CQL", "sac"),
    "calql": ("CalQL", "sac"),
    "discrete_cql": ("DiscreteCQL", "dqn"),
    "discrete_calql": ("DiscreteCalQL", "dqn"),
    "cqlqrdqn": ("CQLQRDQN", "qrdqn"),
    "calqlqrdqn": ("CalQLQRDQN", "qrdqn"),
    "cqltqc": ("CQLTQC", "tqc"),
    "calqltqc": ("CalQLTQC", "tqc"),
}
"""The Zoo's name of each algorithm: our class, and the host whose search space is its own, too."""


def register() -> None:
    """Add our algorithms to the Zoo's tables, and datasets to its experiments. Can be called again."""
    for name, (class_name, host) in HOSTS.items():
        rl_zoo3.ALGOS[name] = getattr(sb3, class_name)
        HYPERPARAMS_SAMPLER[name] = _with_weight(HYPERPARAMS_SAMPLER[host])
        HYPERPARAMS_CONVERTER[name] = HYPERPARAMS_CONVERTER[host]
    rl_zoo3.exp_manager.ExperimentManager = OfflineExperimentManager


def _with_weight(sample: Any) -> Any:
    """Add the conservative weight to a host's search space."""

    def sample_params(trial: Any, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
        params: dict[str, Any] = sample(trial, n_actions, n_envs, additional_args)
        return params | {"cql_alpha": trial.suggest_float("cql_alpha", 0.1, 20.0, log=True)}

    return sample_params


__all__ = ["HOSTS", "OfflineExperimentManager", "register"]
