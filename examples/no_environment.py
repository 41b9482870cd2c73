"""CQL on logged data alone: no simulator and no environment, from arrays to a saved policy.

    python examples/no_environment.py

The log is a heated room's: temperatures inside and outside every 15 minutes, the heater's power that some operator chose, and a
reward that falls with discomfort and with the heating bill. Put your own arrays in the place of ``read_log``.

Without an environment nobody can say what the policy would earn. What can be said is printed: the critic's opinion of the
data's, the policy's and random actions, and what the policy does where the log has been. Writes ``heating.zip`` and
``heating_scale.npz``, which together are all that is needed to act.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

from cql_plugins.adapters import from_arrays
from cql_plugins.sb3 import CQL


def read_log(days: int = 60, seed: int = 0) -> dict[str, np.ndarray]:
    """Return arrays with one row per step; made up here, exported from a database in life."""
    rng = np.random.default_rng(seed)
    columns: dict[str, list[Any]] = {"observations": [], "actions": [], "rewards": [], "next_observations": []}
    for _ in range(days):
        room, outside = rng.uniform(15.0, 25.0), rng.uniform(-5.0, 12.0)
        set_point, briskness = rng.normal(21.0, 1.5), rng.uniform(0.1, 0.6)  # Every day another operator.
        for _ in range(48):
            power = np.clip(0.35 + briskness * (set_point - room) + rng.normal(0.0, 0.1), 0.0, 1.0)
            columns["observations"].append((room, outside))
            columns["actions"].append((power,))
            room += 1.2 * power - 0.03 * (room - outside) + rng.normal(0.0, 0.05)
            outside += rng.normal(0.0, 0.2)
            columns["rewards"].append(-abs(room - 21.0) - 0.5 * power)
            columns["next_observations"].append((room, outside))
    arrays = {key: np.array(values, dtype=np.float32) for key, values in columns.items()}
    # A day is cut off, the room goes on: a truncation. A terminated step would say that nothing more can be earned.
    arrays["truncations"] = np.arange(len(arrays["rewards"])) % 48 == 47
    arrays["terminations"] = np.zeros_like(arrays["truncations"])
    return arrays


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, save, load, act; returns the numbers printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradient-steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument("--no-progress", action="store_true")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    th.set_num_threads(1)  # Networks this small lose more by a second thread than they gain.

    # Degrees are no input for a network. With an environment VecNormalize would do this.
    log = read_log(seed=arguments.seed)
    mean, std = log["observations"].mean(axis=0), log["observations"].std(axis=0)
    for key in ("observations", "next_observations"):
        log[key] = (log[key] - mean) / std
    dataset = from_arrays(
        **log,
        # An array cannot say what values were possible. Left out, spaces are inferred from the values, with a warning.
        observation_space=spaces.Box(-np.inf, np.inf, (2,), np.float32),
        action_space=spaces.Box(0.0, 1.0, (1,), np.float32),
        name="heated room",
    )
    print(dataset.summary())

    model = CQL.from_dataset(
        dataset,
        gamma=0.95,
        learning_rate=1e-3,
        actor_learning_rate=None,
        ent_coef="auto_0.1",
        cql_alpha=1.0,
        batch_size=128,
        policy_kwargs={"net_arch": [64, 64]},
        seed=arguments.seed,
        device="cpu",
    )
    model.learn_offline(dataset, arguments.gradient_steps, progress_bar=not arguments.no_progress)
    model.save(arguments.out / "heating.zip")
    np.savez(arguments.out / "heating_scale.npz", mean=mean, std=std)

    # Somewhere else, later: the model and the scale, no data and no environment.
    policy = CQL.load(arguments.out / "heating.zip", device="cpu")
    scale = np.load(arguments.out / "heating_scale.npz")
    power = {}
    for room in (18.0, 20.0, 21.0, 22.0, 24.0):
        observation = (np.array([room, 4.0]) - scale["mean"]) / scale["std"]
        action, _ = policy.predict(observation.astype(np.float32), deterministic=True)
        power[room] = float(action[0])
        print(f"room {room:.0f} degrees, outside 4: heat at {100 * power[room]:3.0f} %")

    # Compare what the critic says of actions; a policy's value far above the data's would be a reason for distrust.
    rng = np.random.default_rng(0)
    rows = dataset.transitions(rng.integers(len(dataset), size=1000))
    observations = th.as_tensor(rows.observations)
    chosen, _ = policy.predict(rows.observations, deterministic=True)
    values = {}
    for name, actions in (("log", rows.actions), ("policy", chosen), ("dice", rng.uniform(size=chosen.shape))):
        scaled = th.as_tensor(policy.policy.scale_action(actions), dtype=th.float32)  # Critics see actions in [-1, 1].
        with th.no_grad():
            values[name] = float(th.cat(policy.critic(observations, scaled), dim=1).min(dim=1).values.mean())
        print(f"Q of actions of the {name}: {values[name]:.2f}")
    return {"power": power, "q": values}


if __name__ == "__main__":
    main()
