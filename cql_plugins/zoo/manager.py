"""The Zoo's experiment with a dataset: offline gradient steps first, then the Zoo's own loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from zipfile import BadZipFile

import numpy as np
from rl_zoo3 import ALGOS
from rl_zoo3.callbacks import SaveVecNormalizeCallback, TrialEvalCallback
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, CheckpointCallback, EvalCallback

from cql_plugins._files import whole_file
from cql_plugins.adapters import OfflineDataset, from_d4rl, from_minari, from_npz
from cql_plugins.adapters._sources import Kind, locate
from cql_plugins.sb3.offline import OfflineMixin
from cql_plugins.sb3.wrappers import ScaleReward
from cql_plugins.zoo._checkpoints import OFFLINE

HYPERPARAMS = Path(__file__).parent / "hyperparams"


def read_dataset(file_or_id: str) -> OfflineDataset:
    """Read a dataset as the command line does.

    Args:
        file_or_id: A D4RL file, an archive, a folder with Minari data, or the id of a Minari set, which is downloaded where it
            is not on this machine.

    Raises:
        DatasetError: If it is refused.
        ImportError: Without the extra that reads it.
    """
    kind, place = locate(file_or_id)
    if kind is Kind.D4RL:
        return from_d4rl(place)
    return from_npz(place) if kind is Kind.NPZ else from_minari(place, download=True)


class OfflineExperimentManager(ExperimentManager):
    """The Zoo's experiment manager, which also knows our YAML files and two more keys in them.

    ``dataset`` (see :func:`read_dataset`) is learned from for ``offline_steps`` gradient steps before ``n_timesteps``
    environment steps, 0 for none, and stays part of each batch as ``offline_fraction`` says. A ``cql_plugins.sb3.ScaleReward``
    among the YAML file's ``env_wrapper`` scales the dataset's rewards, too. From the end of the offline phase on its
    evaluations have negative time steps in ``evaluations.npz``, gradient steps before the switch at 0, whether an online phase
    follows or not. Its checkpoints are ``rl_model_offline_N_steps.zip``. ``eval_freq`` and ``save_freq`` count gradient steps
    there.
    """

    from_command_line: ClassVar[dict[str, Any]] = {}
    """``dataset`` and ``offline_steps`` as the user gave them: they win over the YAML file's."""

    def __init__(self, args: Any, algo: str, *rest: Any, **kwargs: Any) -> None:
        self.dataset: OfflineDataset | None = None
        self.offline_steps = 0
        self._offline_settings: list[tuple[BaseCallback, str, Any]] = []
        super().__init__(args, algo, *rest, **kwargs)
        own = HYPERPARAMS / f"{algo}.yml"
        if not kwargs.get("config") and own.is_file():
            self.config = str(own)
        self._offline_only = self.n_timesteps == 0

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the YAML file, then the command line; both values of a dataset are saved in ``config.yml``."""
        self.custom_hyperparams = {**(self.custom_hyperparams or {}), **self.from_command_line}
        hyperparams, saved = super().read_hyperparameters()
        if "dataset" not in saved:
            saved.pop("offline_steps", None)
        return hyperparams, saved

    def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> tuple[Any, ...]:
        name, steps = hyperparams.pop("dataset", None), int(hyperparams.pop("offline_steps", 0))
        if name is None and self.from_command_line.get("offline_steps"):
            raise ValueError("--offline-steps: expected --dataset beside it, got none; say what to learn from.")
        if name is not None:
            if not issubclass(ALGOS[self.algo], OfflineMixin):
                raise ValueError(f"--dataset: {self.algo} cannot learn from logged data; take --algo cql or another of ours.")
            self.dataset = _scaled_like(hyperparams.get("env_wrapper"), read_dataset(name))
            self.offline_steps = steps
            if self.continue_training:  # What it has learnt offline it need not learn again.
                self.offline_steps = int(self.from_command_line.get("offline_steps", 0))
        prepared = super()._preprocess_hyperparams(hyperparams)
        if self._offline_only:
            self.n_timesteps = 0
        return prepared

    def create_callbacks(self) -> None:
        """Create the Zoo's callbacks, and note how often they are wanted offline.

        The Zoo divides that by the number of environments, for a call is a step of all of them. Offline it is a gradient step.
        """
        save_freq, eval_freq, users_own = self.save_freq, self.eval_freq, len(self.callbacks)
        super().create_callbacks()  # type: ignore[no-untyped-call]
        for callback in self.callbacks[users_own:]:
            if isinstance(callback, CheckpointCallback):
                self._offline_settings.append((callback, "save_freq", save_freq))
            elif isinstance(callback, EvalCallback):
                self._offline_settings.append((callback, "eval_freq", eval_freq))

    def learn(self, model: BaseAlgorithm) -> None:
        """Learn from the dataset, then from the environment.

        Args:
            model: A new model, or one that goes on.
        """
        if self.dataset is not None:
            assert isinstance(model, OfflineMixin)
            # The Zoo's -1 is the algorithm's default, and what is below it none.
            interval = self.log_interval if self.log_interval > 0 else 1000 if self.log_interval > -2 else 0
            settings = [*self._offline_settings, *_offline_names(self.callbacks)]
            try:
                with _set(settings):
                    model.learn_offline(self.dataset, self.offline_steps, self.callbacks or None, log_interval=interval)
            except KeyboardInterrupt:  # As the Zoo has it: the model is saved as it is.
                return
            finally:
                # A model that went on counted from where it was, and a callback may have ended the phase early.
                for callback in self.callbacks:
                    if isinstance(callback, EvalCallback):
                        _count_from_switch(callback, model._n_offline_steps)
        super().learn(model)

    def hyperparameters_optimization(self) -> None:
        """Search as the Zoo does; each trial learns offline first, and its evaluations begin there."""
        algorithm = ALGOS[self.algo]
        if self.dataset is None:
            super().hyperparameters_optimization()
            return
        # A trial's time is one number for the Zoo: both phases together.
        options = {"trial_dataset": self.dataset, "trial_offline_steps": self.offline_steps}
        ALGOS[self.algo] = type(algorithm.__name__, (_Trial, algorithm), options)
        self.n_timesteps += self.offline_steps
        try:
            super().hyperparameters_optimization()
        finally:
            ALGOS[self.algo] = algorithm
            self.n_timesteps -= self.offline_steps


class _Trial:
    """A model of a search: its time starts with offline gradient steps."""

    trial_dataset: OfflineDataset
    trial_offline_steps: int
    n_envs: int

    def learn(self, total_timesteps: int, callback: Any = None, **kwargs: Any) -> Any:
        learner: Any = super()
        listener: list[BaseCallback] = callback if isinstance(callback, list) else [callback]
        # As for the manager's; here the Zoo has divided already.
        often = [(one, "eval_freq", one.eval_freq * self.n_envs) for one in listener if isinstance(one, TrialEvalCallback)]
        with _set(often):
            learner.learn_offline(self.trial_dataset, self.trial_offline_steps, callback=CallbackList(listener), log_interval=0)
        if not any(getattr(one, "is_pruned", False) for one in listener):
            learner.learn(total_timesteps - self.trial_offline_steps, callback=callback, **kwargs)
        return self


def _offline_names(callbacks: Iterable[BaseCallback]) -> Iterator[tuple[BaseCallback, str, str]]:
    """Name files that are numbered by steps: the online phase counts them anew, and would overwrite these."""
    for callback in callbacks:
        if isinstance(callback, CheckpointCallback | SaveVecNormalizeCallback) and callback.name_prefix is not None:
            yield callback, "name_prefix", f"{callback.name_prefix}_{OFFLINE}"


@contextlib.contextmanager
def _set(settings: Iterable[tuple[BaseCallback, str, Any]]) -> Iterator[None]:
    """Give callbacks other settings for a while."""
    before = [(callback, name, getattr(callback, name), value) for callback, name, value in settings]
    for callback, name, _, value in before:
        setattr(callback, name, value)
    try:
        yield
    finally:
        for callback, name, value, _ in before:
            setattr(callback, name, value)


def _count_from_switch(callback: EvalCallback, switch: int) -> None:
    """Count the evaluations so far from the end of the offline phase, in their file, too: no other may follow to write it."""
    if not callback.evaluations_timesteps:
        return
    callback.evaluations_timesteps = [step - switch for step in callback.evaluations_timesteps]
    if callback.log_path is not None:
        path = f"{callback.log_path}.npz"
        try:
            with np.load(path) as written:
                columns = dict(written)
        except (FileNotFoundError, EOFError, ValueError, BadZipFile):  # SB3 was interrupted while it wrote the file.
            return
        columns["timesteps"] = np.array(callback.evaluations_timesteps[: len(columns["timesteps"])])
        with whole_file(path) as file:
            np.savez(file, **columns)


def _scaled_like(env_wrapper: Any, dataset: OfflineDataset) -> OfflineDataset:
    """Give a dataset the rewards that the YAML file's wrappers give."""
    for entry in env_wrapper if isinstance(env_wrapper, list) else [env_wrapper]:
        for name, arguments in entry.items() if isinstance(entry, dict) else ((entry, {}),):
            if str(name).rpartition(".")[2] == ScaleReward.__name__:
                dataset = dataset.scale_rewards(**arguments)
    return dataset


__all__ = ["HYPERPARAMS", "OfflineExperimentManager", "read_dataset"]
