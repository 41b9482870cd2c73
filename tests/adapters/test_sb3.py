from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize, VecTransposeImage

from cql_plugins.adapters import DatasetError, OfflineDataset, from_sb3, to_sb3


class Env(gym.Env[Any, Any]):
    """Only spaces; to be a target of a conversion no dynamics are needed."""

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        self.observation_space = observation_space
        self.action_space = action_space


def env_of(dataset: OfflineDataset, **changes: Any) -> Env:
    return Env(changes.get("observation_space", dataset.observation_space), changes.get("action_space", dataset.action_space))


class TestGolden:
    def test_every_array(self, golden: OfflineDataset) -> None:
        buffer = to_sb3(golden, env_of(golden), gamma=0.5)
        assert isinstance(buffer, ReplayBuffer)
        assert (buffer.full, buffer.pos, buffer.size(), buffer.n_envs) == (True, 0, 5, 1)
        assert buffer.observations[:, 0].tolist() == [[0, 0], [1, 10], [2, 20], [100, 5], [101, 6]]
        assert buffer.next_observations[:, 0].tolist() == [[1, 10], [2, 20], [3, 30], [101, 6], [102, 7]]
        assert buffer.actions[:, 0, 0].tolist() == golden.actions[:, 0].tolist()
        assert buffer.rewards[:, 0].tolist() == [1, 2, 4, 8, 16]
        assert buffer.dones[:, 0].tolist() == [0, 0, 1, 0, 1]
        assert buffer.timeouts[:, 0].tolist() == [0, 0, 0, 0, 1]
        assert buffer.returns_to_go[:, 0].tolist() == [3, 4, 4, 16, 16]

    @pytest.mark.parametrize(
        ("tail", "expected"),
        [
            ("zero", [3, 4, 4, 16, 16]),
            ("none", [3, 4, 4, -np.inf, -np.inf]),
            ("bootstrap", [-np.inf] * 5),
        ],
    )
    def test_return_tails(self, golden: OfflineDataset, tail: Any, expected: list[float]) -> None:
        buffer = to_sb3(golden, env_of(golden), gamma=0.5, return_tail=tail)
        assert buffer.returns_to_go[:, 0].tolist() == expected

    def test_method_of_the_dataset(self, golden: OfflineDataset) -> None:
        buffer = golden.scale_rewards(2.0).to_sb3(env_of(golden), gamma=0.5)
        assert buffer.rewards[:, 0].tolist() == [2, 4, 8, 16, 32]
        assert buffer.returns_to_go[:, 0].tolist() == [6, 8, 8, 32, 32]

    def test_samples_bootstrap_only_where_they_should(self, golden: OfflineDataset) -> None:
        samples = to_sb3(golden, env_of(golden), gamma=0.5, device="cpu").sample(200)
        terminal = samples.dones[:, 0] == 1
        assert set(samples.next_observations[terminal][:, 0].tolist()) == {3.0}
        assert 102.0 in samples.next_observations[~terminal][:, 0].tolist()

    def test_returns_follow_a_reward_clip(self, golden: OfflineDataset) -> None:
        """As they do in a buffer that was filled step by step."""
        buffer = to_sb3(golden, env_of(golden), gamma=0.5, device="cpu")
        venv = VecNormalize(DummyVecEnv([lambda: env_of(golden)]), clip_reward=2.0)
        buffer.sample(2, env=venv)
        np.testing.assert_allclose(buffer.returns_to_go[:, 0], [2.5, 3, 2, 3, 2], rtol=1e-6)

    def test_buffer_is_its_own(self, golden: OfflineDataset) -> None:
        buffer = to_sb3(golden, env_of(golden))
        buffer.observations[:] = -1
        buffer.rewards[:] = -1
        buffer.returns_to_go[:] = 0
        assert golden.rewards.tolist() == [1, 2, 4, 8, 16]
        assert golden.returns_to_go(0.99)[4] == 16


@st.composite
def datasets(draw: st.DrawFn) -> OfflineDataset:
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    n_steps = sum(lengths)
    ends = np.zeros(n_steps, bool)
    ends[np.cumsum(lengths) - 1] = True
    terminal = ends & (rng.random(n_steps) < 0.5)
    bounds = spaces.Box(np.array([-1, -3], np.float32), np.array([1, 5], np.float32))
    return OfflineDataset(
        rng.normal(size=(n_steps + len(lengths), 3)).astype(np.float32),
        rng.uniform(bounds.low, bounds.high, (n_steps, 2)).astype(np.float32),
        rng.normal(size=n_steps),
        terminal,
        ends & ~terminal,
        observation_space=spaces.Box(-np.inf, np.inf, (3,), np.float32),
        action_space=bounds,
    )


@settings(deadline=None, max_examples=40)
@given(datasets())
def test_same_as_adding_step_by_step(dataset: OfflineDataset) -> None:
    """SB3's own `add`, and the scaling of its policies, written out."""
    expected = ReplayBuffer(len(dataset), dataset.observation_space, dataset.action_space)
    low, high = dataset.action_space.low, dataset.action_space.high
    for episode in dataset:
        for t in range(len(episode)):
            expected.add(
                episode.observations[t],
                episode.next_observations[t],
                2 * (episode.actions[t] - low) / (high - low) - 1,
                episode.rewards[t],
                episode.terminations[t] or episode.truncations[t],
                [{"TimeLimit.truncated": bool(episode.truncations[t])}],
            )
    buffer = to_sb3(dataset, env_of(dataset), gamma=0.9)
    for field in ("observations", "next_observations", "rewards", "dones", "timeouts"):
        np.testing.assert_array_equal(getattr(buffer, field), getattr(expected, field))
    # One rounding of float32 in each of SB3's four operations on numbers up to 2.
    np.testing.assert_allclose(buffer.actions, expected.actions, rtol=0, atol=4 * 2.0**-23)
    assert (buffer.pos, buffer.full) == (expected.pos, expected.full)
    np.testing.assert_array_equal(buffer.returns_to_go[:, 0], dataset.returns_to_go(0.9))


@settings(deadline=None, max_examples=40)
@given(datasets())
def test_there_and_back(dataset: OfflineDataset) -> None:
    back = from_sb3(to_sb3(dataset, env_of(dataset)))
    for field in ("observations", "terminations", "truncations", "offsets"):
        np.testing.assert_array_equal(getattr(back, field), getattr(dataset, field))
    np.testing.assert_array_equal(back.rewards, dataset.rewards.astype(np.float32))
    # Half a unit in the last place of a float32 of size 1, stretched by half the widest range, 8 / 2, and once more at the end.
    np.testing.assert_allclose(back.actions, dataset.actions, rtol=0, atol=8 * 2.0**-24)


class TestActions:
    def _dataset(self, arguments: dict[str, Any], actions: list[float], high: float, dtype: Any = np.float32) -> Any:
        space = spaces.Box(-1.0, high, (1,), dtype)
        return OfflineDataset(**arguments | {"actions": np.array(actions, dtype)[:, None], "action_space": space})

    def test_scaled_by_the_bounds(self, arguments: dict[str, Any]) -> None:
        dataset = self._dataset(arguments, [-1.0, 0.0, 1.0, 2.0, 3.0], 3.0)
        buffer = to_sb3(dataset, env_of(dataset))
        assert buffer.actions[:, 0, 0].tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]

    def test_float64(self, arguments: dict[str, Any]) -> None:
        dataset = self._dataset(arguments, [-1.0, 0.0, 1.0, 2.0, 3.0], 3.0, np.float64)
        assert to_sb3(dataset, env_of(dataset)).actions.dtype == np.float32

    @pytest.mark.parametrize("high", [1.0, 3.0])
    def test_clipped_and_counted(self, arguments: dict[str, Any], high: float) -> None:
        dataset = self._dataset(arguments, [-1.0, -1.5, high, high + 0.5, 0.0], high)
        with pytest.warns(UserWarning, match="golden: 2 action value.s. in 2 of 5 transitions lie outside") as caught:
            buffer = to_sb3(dataset, env_of(dataset))
        assert len(caught) == 1
        assert buffer.actions[:4, 0, 0].tolist() == [-1.0, -1.0, 1.0, 1.0]
        assert dataset.actions[1, 0] == -1.5

    def test_rounding_is_not_outside(self, arguments: dict[str, Any]) -> None:
        dataset = self._dataset(arguments, [1 + 1e-12, -1 - 1e-12, 0, 0, 0], 1.0, np.float64)
        assert np.abs(to_sb3(dataset, env_of(dataset)).actions).max() == 1.0

    def test_shape_is_flattened(self, arguments: dict[str, Any]) -> None:
        actions = np.linspace(-1, 1, 20, dtype=np.float32).reshape(5, 2, 2)
        space = spaces.Box(-1.0, 1.0, (2, 2), np.float32)
        dataset = OfflineDataset(**arguments | {"actions": actions, "action_space": space})
        buffer = to_sb3(dataset, env_of(dataset))
        np.testing.assert_array_equal(buffer.actions[:, 0], actions.reshape(5, 4))
        np.testing.assert_array_equal(from_sb3(buffer).actions, actions)

    @pytest.mark.parametrize("dtype", [np.int64, np.uint8])
    def test_whole_numbers(self, arguments: dict[str, Any], dtype: Any) -> None:
        chosen = np.array([[0, 10], [1, 9], [2, 8], [3, 7], [4, 6]], dtype)
        dataset = OfflineDataset(**arguments | {"actions": chosen, "action_space": spaces.Box(0, 10, (2,), dtype)})
        back = from_sb3(to_sb3(dataset, env_of(dataset))).actions
        assert (back.tolist(), back.dtype) == (chosen.tolist(), dtype)

    def test_discrete(self, arguments: dict[str, Any]) -> None:
        chosen = np.array([0, 2, 1, 2, 0])
        dataset = OfflineDataset(**arguments | {"actions": chosen, "action_space": spaces.Discrete(3)})
        buffer = to_sb3(dataset, env_of(dataset), gamma=0.5)
        assert buffer.actions[:, 0, 0].tolist() == chosen.tolist()
        assert buffer.returns_to_go[:, 0].tolist() == [3, 4, 4, 16, 16]
        back = from_sb3(buffer)
        assert back.actions.tolist() == chosen.tolist()
        assert back.actions.dtype == np.int64


class TestObservations:
    def test_discrete(self, arguments: dict[str, Any]) -> None:
        changes = {"observations": np.arange(7), "observation_space": spaces.Discrete(8)}
        dataset = OfflineDataset(**arguments | changes)
        buffer = to_sb3(dataset, env_of(dataset))
        assert buffer.observations.shape == (5, 1, 1)
        assert buffer.next_observations[:, 0, 0].tolist() == [1, 2, 3, 5, 6]
        assert from_sb3(buffer).observations.tolist() == list(range(7))

    def test_dict(self, arguments: dict[str, Any]) -> None:
        space = spaces.Dict({"x": spaces.Box(-9, 99, (2,), np.float32), "room": spaces.Discrete(8)})
        observations = {"x": arguments["observations"][:, :2] % 50, "room": np.arange(7)}
        dataset = OfflineDataset(**arguments | {"observations": observations, "observation_space": space})
        buffer = to_sb3(dataset, env_of(dataset))
        assert isinstance(buffer, DictReplayBuffer)
        assert buffer.next_observations["room"][:, 0, 0].tolist() == [1, 2, 3, 5, 6]
        assert buffer.observations["x"][:, 0].tolist() == [[0, 0], [1, 10], [2, 20], [0, 5], [1, 6]]
        assert from_sb3(buffer).observations["room"].tolist() == list(range(7))

    def test_precision_of_the_environment(self, golden: OfflineDataset) -> None:
        env = env_of(golden, observation_space=spaces.Box(-np.inf, np.inf, (2,), np.float64))
        assert to_sb3(golden, env).observations.dtype == np.float64

    def test_images_are_transposed_for_a_model_that_does(self, arguments: dict[str, Any]) -> None:
        space = spaces.Box(0, 255, (36, 40, 3), np.uint8)
        images = np.random.default_rng(0).integers(0, 256, (7, 36, 40, 3), dtype=np.uint8)
        dataset = OfflineDataset(**arguments | {"observations": images, "observation_space": space})
        venv = VecTransposeImage(DummyVecEnv([lambda: env_of(dataset)]))
        buffer = to_sb3(dataset, venv)
        assert buffer.observations.shape == (5, 1, 3, 36, 40)
        np.testing.assert_array_equal(buffer.next_observations[3, 0], images[5].transpose(2, 0, 1))
        np.testing.assert_array_equal(to_sb3(dataset, env_of(dataset)).observations[0, 0], images[0])

    def test_images_inside_a_dict(self, arguments: dict[str, Any]) -> None:
        space = spaces.Dict({"eye": spaces.Box(0, 255, (36, 40, 3), np.uint8)})
        images = np.random.default_rng(0).integers(0, 256, (7, 36, 40, 3), dtype=np.uint8)
        dataset = OfflineDataset(**arguments | {"observations": {"eye": images}, "observation_space": space})
        venv = VecTransposeImage(DummyVecEnv([lambda: env_of(dataset)]))
        np.testing.assert_array_equal(to_sb3(dataset, venv).observations["eye"][1, 0], images[1].transpose(2, 0, 1))


class TestFit:
    def _refused(self, dataset: OfflineDataset, message: str, **changes: Any) -> None:
        with pytest.raises(DatasetError, match=message) as caught:
            to_sb3(dataset, env_of(dataset, **changes))
        for space in changes.values():
            assert str(space) in str(caught.value)
        field = next(iter(changes), "observation_space")
        assert str(getattr(dataset, field)) in str(caught.value)

    def test_shape(self, golden: OfflineDataset) -> None:
        space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self._refused(golden, r"golden, field 'observation_space': .*shape \(2,\) is not \(3,\)", observation_space=space)

    def test_kind_of_numbers(self, golden: OfflineDataset) -> None:
        self._refused(golden, "dtype float32 is not int64", observation_space=spaces.Box(-9, 9, (2,), np.int64))

    def test_kind_of_space(self, golden: OfflineDataset) -> None:
        self._refused(golden, "Box is not Discrete", action_space=spaces.Discrete(2))

    def test_other_bounds(self, golden: OfflineDataset) -> None:
        self._refused(golden, "the bounds 'low' differ", action_space=spaces.Box(-2.0, 2.0, (1,), np.float32))

    def test_missing_bounds_contradict_nothing(self, golden: OfflineDataset) -> None:
        assert to_sb3(golden, env_of(golden, observation_space=spaces.Box(-500, 500, (2,), np.float32))).full

    def test_inferred_bounds_give_way(self, steps: dict[str, Any], quietly: Callable[..., Any]) -> None:
        from cql_plugins.adapters import from_arrays

        del steps["action_space"]
        dataset = quietly(from_arrays, **steps)
        buffer = to_sb3(dataset, env_of(dataset, action_space=spaces.Box(-2.0, 2.0, (1,), np.float32)))
        np.testing.assert_allclose(buffer.actions[:, 0], dataset.actions / 2, rtol=1e-6)

    def test_unbounded_actions(self, arguments: dict[str, Any]) -> None:
        space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        dataset = OfflineDataset(**arguments | {"action_space": space})
        self._refused(dataset, "without finite bounds", action_space=space)

    def test_discrete_ranges(self, arguments: dict[str, Any]) -> None:
        changes = {"actions": np.zeros(5, int), "action_space": spaces.Discrete(3)}
        self._refused(OfflineDataset(**arguments | changes), "integers differ", action_space=spaces.Discrete(4))

    @pytest.mark.parametrize("key", [None, "speed"])
    def test_single_numbers(self, arguments: dict[str, Any], key: str | None) -> None:
        values, space = arguments["observations"][:, 0], spaces.Box(-np.inf, np.inf, (), np.float32)
        changes: dict[str, Any] = {"observations": values, "observation_space": space}
        if key:
            changes = {"observations": {key: values}, "observation_space": spaces.Dict({key: space})}
        dataset = OfflineDataset(**arguments | changes)
        with pytest.raises(DatasetError, match=r"cannot sample observations of shape \(\)\. Give them the shape \(1,\)"):
            to_sb3(dataset, env_of(dataset))

    @pytest.mark.parametrize("field", ["action_space", "observation_space", "key"])
    def test_integers_that_do_not_start_at_0(self, arguments: dict[str, Any], field: str) -> None:
        """SB3's networks have a column for each of 0 to n - 1."""
        for start in (5, 0):
            numbers, space = start + np.arange(7) % 3, spaces.Discrete(3, start=start)
            changes: dict[str, Any] = {"observations": numbers, "observation_space": space}
            if field == "action_space":
                changes = {"actions": numbers[:5], "action_space": space}
            elif field == "key":
                changes = {"observations": {"a": {"b": numbers}}, "observation_space": spaces.Dict(a=spaces.Dict(b=space))}
            dataset = OfflineDataset(**arguments | changes)
            env = env_of(dataset.flatten_observations())
            if start == 0:
                assert to_sb3(dataset, env).full
                continue
            with pytest.raises(DatasetError, match="from 0 on, these start at 5") as caught:
                to_sb3(dataset, env)
            assert caught.value.field == (field if field != "key" else "observation_space")
            assert ("at key 'a/b', " in str(caught.value)) == (field == "key")

    def test_dict_keys_and_leaves(self, arguments: dict[str, Any]) -> None:
        space = spaces.Dict({"a": arguments["observation_space"]})
        dataset = OfflineDataset(**arguments | {"observations": {"a": arguments["observations"]}, "observation_space": space})
        other = spaces.Dict({"b": arguments["observation_space"]})
        self._refused(dataset, r"keys \['a'\] are not \['b'\]", observation_space=other)
        longer = spaces.Dict({"a": spaces.Box(-np.inf, np.inf, (5,), np.float32)})
        self._refused(dataset, "at key 'a', shape", observation_space=longer)

    def test_nested_dict(self, arguments: dict[str, Any]) -> None:
        space = spaces.Dict({"a": spaces.Dict({"b": arguments["observation_space"]})})
        changes = {"observations": {"a": {"b": arguments["observations"]}}, "observation_space": space}
        self._refused(OfflineDataset(**arguments | changes), "no buffer for nested dict observations")

    def test_neither_model_nor_environment(self, golden: OfflineDataset) -> None:
        with pytest.raises(DatasetError, match="expected a Stable-Baselines3 model or an environment, got int"):
            to_sb3(golden, 3)

    def test_sb3_missing(self, golden: OfflineDataset, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "stable_baselines3.common.buffers", None)
        with pytest.raises(ImportError, match='pip install "cql-plugins"'):
            to_sb3(golden, env_of(golden))


class TestSettings:
    def test_of_a_model(self, golden: OfflineDataset) -> None:
        model = types.SimpleNamespace(**vars(env_of(golden)), policy=None, gamma=0.5, return_tail="none", n_steps=2)
        model.device = "cpu"
        buffer = to_sb3(golden, model)
        assert isinstance(buffer, NStepReplayBuffer)
        assert (buffer.n_steps, buffer.gamma, str(buffer.device)) == (2, 0.5, "cpu")
        assert buffer.returns_to_go[:, 0].tolist() == [3, 4, 4, -np.inf, -np.inf]
        buffer = to_sb3(golden, model, gamma=1.0, return_tail="zero", n_steps=1)
        assert not isinstance(buffer, NStepReplayBuffer)
        assert buffer.returns_to_go[:, 0].tolist() == [7, 6, 4, 24, 16]

    def test_of_a_real_model(self, golden: OfflineDataset) -> None:
        model = SAC("MlpPolicy", env_of(golden), gamma=0.5, device="cpu", policy_kwargs={"net_arch": [4]})
        buffer = to_sb3(golden, model)
        assert buffer.returns_to_go[:, 0].tolist() == [3, 4, 4, 16, 16]

    def test_gamma_of_a_wrapper_is_not_that_of_the_training(self, golden: OfflineDataset) -> None:
        venv = VecNormalize(DummyVecEnv([lambda: env_of(golden)]), gamma=0.1)
        assert to_sb3(golden, venv).returns_to_go[3, 0] == pytest.approx(8 + 0.99 * 16)

    def test_gymnasium_vector_environment(self, golden: OfflineDataset) -> None:
        venv = gym.vector.SyncVectorEnv([lambda: env_of(golden)] * 2)
        assert to_sb3(golden, venv).observations.shape == (5, 1, 2)

    def test_n_step_returns(self, golden: OfflineDataset) -> None:
        buffer = to_sb3(golden, env_of(golden), n_steps=3, gamma=0.5, device="cpu")
        samples = buffer._get_samples(np.arange(5))
        assert samples.rewards[:, 0].tolist() == [1 + 1 + 1, 2 + 2, 4, 8 + 8, 16]
        assert samples.dones[:, 0].tolist() == [1, 1, 1, 0, 0]
        assert samples.next_observations[:, 0].tolist() == [3, 3, 3, 102, 102]

    def test_no_n_step_for_dicts(self, arguments: dict[str, Any]) -> None:
        space = spaces.Dict({"a": arguments["observation_space"]})
        dataset = OfflineDataset(**arguments | {"observations": {"a": arguments["observations"]}, "observation_space": space})
        with pytest.raises(DatasetError, match="no n-step buffer for dict observations, got n_steps=2"):
            to_sb3(dataset, env_of(dataset), n_steps=2)


def _filled(n_envs: int, n_steps: int, size: int, **kwargs: Any) -> ReplayBuffer:
    """A buffer whose observation at step `t` of environment `e` is `100 e + t`; episodes have four steps."""
    space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    actions = spaces.Box(-2.0, 2.0, (1,), np.float32)
    buffer = ReplayBuffer(size * n_envs, space, actions, n_envs=n_envs, **kwargs)
    for t in range(n_steps):
        now = 100.0 * np.arange(n_envs)[:, None] + t
        done = np.full(n_envs, t % 4 == 3)
        following = now + np.where(done, 0.5, 1.0)[:, None]
        infos = [{"TimeLimit.truncated": bool(done[e] and e % 2)} for e in range(n_envs)]
        buffer.add(now, following, np.full((n_envs, 1), 0.25), now[:, 0], done, infos)
    return buffer


class TestFromSb3:
    def test_environments_follow_one_another(self) -> None:
        with pytest.warns(UserWarning, match=r"collected: 2 episode\(s\) end with the record and no flag"):
            dataset = from_sb3(_filled(n_envs=2, n_steps=6, size=10), name="collected")
        pieces = [episode.observations[:, 0].tolist() for episode in dataset]
        assert pieces == [[0, 1, 2, 3, 3.5], [4, 5, 6], [100, 101, 102, 103, 103.5], [104, 105, 106]]
        assert [(episode.terminated, episode.truncated) for episode in dataset] == [
            (True, False),
            (False, True),
            (False, True),
            (False, True),
        ]
        assert dataset.unflagged_episodes.tolist() == [False, True, False, True]
        assert dataset.actions[:, 0].tolist() == [0.5] * 12

    def test_full_buffer_starts_at_its_oldest_step(self) -> None:
        dataset = from_sb3(_filled(n_envs=1, n_steps=12, size=6))
        pieces = [episode.observations[:, 0].tolist() for episode in dataset]
        assert pieces == [[6, 7, 7.5], [8, 9, 10, 11, 11.5]]

    def test_reset_inside_an_episode(self) -> None:
        buffer = _filled(n_envs=1, n_steps=4, size=6)
        buffer.next_observations[1] = 77
        with pytest.warns(UserWarning, match="1 step.*split there"):
            dataset = from_sb3(buffer)
        assert [len(episode) for episode in dataset] == [2, 2]

    @pytest.mark.parametrize(("n_steps", "starts"), [(4, [0, 1, 2, 3]), (12, [7, 8, 9, 10, 11])])
    def test_one_array_for_both_observations(self, n_steps: int, starts: list[int]) -> None:
        buffer = _filled(1, n_steps, 6, optimize_memory_usage=True, handle_timeout_termination=False)
        dataset = from_sb3(buffer)
        assert dataset.rewards.tolist() == starts
        assert dataset.terminations[-1]

    def test_empty(self) -> None:
        with pytest.raises(DatasetError, match="ReplayBuffer: expected at least one step, got an empty buffer"):
            from_sb3(_filled(n_envs=1, n_steps=0, size=6))

    def test_what_sac_collected(self, quietly: Callable[..., Any]) -> None:
        """Through SB3's own loop: the time limit of 200 steps, actions in [-2, 2]."""
        env = gym.make("Pendulum-v1")
        model = SAC("MlpPolicy", env, learning_starts=1000, seed=0, device="cpu", policy_kwargs={"net_arch": [4]})
        model.learn(450)
        dataset = quietly(from_sb3, model.replay_buffer, env_id="Pendulum-v1")
        assert dataset.episode_lengths.tolist() == [200, 200, 50]
        assert dataset.truncations.sum() == 3
        assert 1.5 < dataset.actions.max() <= 2.0
        # The environment's own dynamics: the new angular velocity is an observation.
        episode = dataset[0]
        angle = np.arctan2(episode.observations[:-1, 1], episode.observations[:-1, 0])
        speed = episode.observations[:-1, 2] + 0.05 * (15 * np.sin(angle) + 3 * episode.actions[:, 0])
        # Angles come back through float32 cosines, speeds are up to 8.
        np.testing.assert_allclose(np.clip(speed, -8, 8), episode.next_observations[:, 2], atol=1e-5)
