from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from cql_plugins.adapters import OfflineDataset, from_d4rl, from_minari, to_sb3

h5py = pytest.importorskip("h5py")
minari = pytest.importorskip("minari")

DOOR = "dapg/door/human-replay-v0"
REPLAY = "published-policies/halfcheetah/replay-v0"


@pytest.fixture
def real_minari(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if "0.5.4" not in minari.supported_dataset_versions:
        pytest.skip(f"the real data was written by Minari 0.5.4, {minari.__version__} does not read it")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(data_root / "minari"))
    return data_root / "minari"


class _Target(gym.Env[Any, Any]):
    def __init__(self, dataset: OfflineDataset) -> None:
        self.observation_space = dataset.observation_space
        self.action_space = dataset.action_space


def test_door_is_the_same_through_both_formats(real_minari: Path, data_root: Path) -> None:
    """Minari keeps float64 and the last observations; HDF5 float32 without them, which costs one transition per episode."""
    double = from_minari(DOOR)
    with pytest.warns(UserWarning, match=r"door-human\.hdf5: 25 transition\(s\) .* dropped"):
        single = from_d4rl(data_root / "d4rl" / "door-human.hdf5")
    assert (double.n_episodes, len(double), double.observations.dtype) == (25, 6729, np.float64)
    assert (single.n_episodes, len(single), single.observations.dtype) == (25, 6704, np.float32)
    kept = np.setdiff1d(np.arange(6729), double.offsets[1:] - 1)
    left, right = double.transitions(kept), single.transitions(np.arange(6704))
    for field in ("observations", "next_observations", "actions", "rewards"):
        np.testing.assert_array_equal(getattr(left, field).astype(np.float32), getattr(right, field))
    np.testing.assert_array_equal(double.episode_lengths - 1, single.episode_lengths)
    assert not double.terminations.any()
    assert not single.terminations.any()
    assert double.references == single.references == (-56.512833, 2880.5693087298737)
    assert double.env_id == "AdroitHandDoor-v1"
    # The twin: one row further, nothing fits.
    shifted = double.transitions(kept + 1)
    assert not np.array_equal(shifted.observations.astype(np.float32), right.observations)


def test_door_reaches_the_buffer_unchanged(real_minari: Path) -> None:
    dataset = from_minari(DOOR)
    buffer = to_sb3(dataset, _Target(dataset))
    everything = dataset.transitions(np.arange(len(dataset)))
    assert buffer.observations.dtype == np.float64
    np.testing.assert_array_equal(buffer.observations[:, 0], everything.observations)
    np.testing.assert_array_equal(buffer.next_observations[:, 0], everything.next_observations)
    np.testing.assert_array_equal(buffer.actions[:, 0], np.clip(everything.actions, -1, 1))
    assert buffer.dones.sum() == buffer.timeouts.sum() == 25


def test_halfcheetah_replay(real_minari: Path, rng: np.random.Generator) -> None:
    dataset = from_minari(REPLAY)
    assert (dataset.n_episodes, len(dataset)) == (200, 200_000)
    assert dataset.env_id == "HalfCheetah-v5"
    assert set(dataset.episode_lengths.tolist()) == {1000}
    assert dataset.normalized_score().mean() == pytest.approx(24.4, abs=0.1)
    buffer = to_sb3(dataset, _Target(dataset))
    rows = rng.integers(0, len(dataset), 300)
    with h5py.File(real_minari / REPLAY / "data" / "main_data.hdf5") as file:
        for row in rows:
            episode, step = file[f"episode_{row // 1000}"], row % 1000
            np.testing.assert_array_equal(buffer.observations[row, 0], episode["observations"][step])
            np.testing.assert_array_equal(buffer.next_observations[row, 0], episode["observations"][step + 1])
            np.testing.assert_array_equal(buffer.actions[row, 0], episode["actions"][step])
            assert buffer.rewards[row, 0] == np.float32(episode["rewards"][step])
            assert buffer.timeouts[row, 0] == episode["truncations"][step]
            assert buffer.dones[row, 0] == (episode["terminations"][step] or episode["truncations"][step])


def test_halfcheetah_medium_expert(data_root: Path, rng: np.random.Generator) -> None:
    path = data_root / "d4rl" / "halfcheetah-medium-expert.hdf5"
    with pytest.warns(UserWarning, match=r"200 transition\(s\) .* dropped"):
        dataset = from_d4rl(path)
    assert (dataset.n_episodes, len(dataset)) == (200, 199_800)
    assert set(dataset.episode_lengths.tolist()) == {999}
    assert dataset.normalized_score().mean() == pytest.approx(63.5, abs=0.1)
    rows = rng.integers(0, len(dataset), 300)
    sample = dataset.transitions(rows)
    raw_rows = rows + rows // 999
    with h5py.File(path) as file:
        observations = file["observations"][()]
        np.testing.assert_array_equal(sample.observations, observations[raw_rows])
        np.testing.assert_array_equal(sample.next_observations, observations[raw_rows + 1])
        np.testing.assert_array_equal(sample.actions, file["actions"][()][raw_rows])
        np.testing.assert_array_equal(sample.rewards, file["rewards"][()][raw_rows])


def test_pen_terminates_and_times_out(real_minari: Path) -> None:
    summary = from_minari("dapg/pen/expert-regen-v0").summary()
    assert (summary.n_episodes, summary.n_transitions) == (50, 4898)
    assert (summary.share_terminated, summary.share_truncated) == (0.06, 0.94)
    assert summary.scores is not None
    assert summary.scores.mean == pytest.approx(91.0, abs=0.1)


def test_door_is_the_same_to_d3rlpy(real_minari: Path, rng: np.random.Generator) -> None:
    """All 6,729 transitions, the 25 at the ends of truncated episodes among them; a model carried over says the same."""
    pytest.importorskip("cql_plugins.d3rlpy", exc_type=ImportError)
    import d3rlpy
    import torch as th

    from cql_plugins.adapters import to_d3rlpy, to_sb3_model
    from cql_plugins.d3rlpy import CalQLConfig

    dataset = from_minari(DOOR)
    buffer = to_d3rlpy(dataset)
    assert (buffer.size(), buffer.transition_count) == (25, 6729)
    rows = np.concatenate([dataset.offsets[1:] - 1, rng.integers(0, 6729, 200)])
    batch, expected = buffer.transition_batch(rows), dataset.transitions(rows)
    for field in ("observations", "next_observations", "actions"):
        np.testing.assert_array_equal(getattr(batch, field), getattr(expected, field).astype(np.float32))
    np.testing.assert_array_equal(batch.terminals[:, 0], expected.terminations)

    seen = dataset.observations[dataset.observation_rows(np.arange(6729))]
    scaler = d3rlpy.preprocessing.StandardObservationScaler(mean=seen.mean(axis=0), std=seen.std(axis=0))
    encoder = d3rlpy.models.VectorEncoderFactory([64, 64])
    algo = CalQLConfig(
        batch_size=64,
        n_action_samples=4,
        actor_encoder_factory=encoder,
        critic_encoder_factory=encoder,
        observation_scaler=scaler,
    ).create()
    quiet: dict[str, Any] = {"logger_adapter": d3rlpy.logging.NoopAdapterFactory(), "show_progress": False}
    algo.fit(buffer, n_steps=50, n_steps_per_epoch=50, **quiet)

    model: Any = to_sb3_model(algo, _Target(dataset), device="cpu")
    observations, actions = seen.astype(np.float32), dataset.actions.astype(np.float32)
    normalized = model.get_vec_normalize_env().normalize_obs(observations)
    predicted, _ = model.predict(normalized, deterministic=True)
    np.testing.assert_allclose(predicted, algo.predict(observations), atol=1e-6)
    with th.no_grad():
        ours = th.cat(model.critic(th.as_tensor(normalized).float(), th.as_tensor(actions)), dim=1).mean(dim=1).numpy()
    theirs = algo.predict_value(observations, actions)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(ours, 1.00001 * theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())
