"""RL Zoo with this package's algorithms: ``python -m cql_plugins.zoo train --algo cql --env Pendulum-v1 --dataset log.npz``."""

from __future__ import annotations

from typing import Any

try:
    import rl_zoo3
    import rl_zoo3.exp_manager
    import rl_zoo3.utils
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER, convert_offpolicy_params
except ImportError as error:
    raise ImportError(f'RL Zoo is needed here: {error}. Install it with: pip install "cql-plugins[zoo]"') from error

from cql_plugins import sb3
from cql_plugins.zoo._checkpoints import get_model_path
from cql_plugins.zoo.manager import OfflineExperimentManager

ALGOS = {
    "cql": "CQL",
    "calql": "CalQL",
    "discrete_cql": "DiscreteCQL",
    "discrete_calql": "DiscreteCalQL",
    "cqlqrdqn": "CQLQRDQN",
    "calqlqrdqn": "CalQLQRDQN",
    "cqltqc": "CQLTQC",
    "calqltqc": "CalQLTQC",
}
"""The Zoo's names of our classes."""


def register() -> None:
    """Add our algorithms to the Zoo's tables, and datasets to its experiments. Can be called again."""
    for name, class_name in ALGOS.items():
        rl_zoo3.ALGOS[name] = getattr(sb3, class_name)
        HYPERPARAMS_SAMPLER[name] = sample_params
        HYPERPARAMS_CONVERTER[name] = convert_offpolicy_params
    setattr(rl_zoo3.exp_manager, "ExperimentManager", OfflineExperimentManager)  # noqa: B010 (mypy: a class is no variable)
    rl_zoo3.utils.get_model_path = get_model_path


def sample_params(trial: Any, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """Sample hyperparameters for a trial of the Zoo's tuning; what is not here stays the YAML file's.

    Batches end at 512, where the Zoo's own searches go on to 2048: a conservative step evaluates ``3 cql_n_actions`` actions of
    each state. The weight's range has the published ones in it, 1 to 10.

    Args:
        trial: Optuna's.
        n_actions: Not used.
        n_envs: Not used.
        additional_args: Not used.
    """
    params = {
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 0.002, log=True),
        "batch_size_pow": trial.suggest_int("batch_size_pow", 5, 9),
        "net_arch": trial.suggest_categorical("net_arch", ["small", "medium", "large"]),
        "cql_alpha": trial.suggest_float("cql_alpha", 0.1, 20.0, log=True),
    }
    found: dict[str, Any] = convert_offpolicy_params(params)
    return found


__all__ = ["ALGOS", "OfflineExperimentManager", "register", "sample_params"]
