"""`to_sb3` with shared observations, against the buffers that copy them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage

from cql_plugins.adapters import DatasetError, OfflineDataset, from_sb3, to_sb3
from cql_plugins.sb3 import CQL, CalQL
from cql_plugins.sb3.shared_buffer import SharedObservations, SharedReplayBuffer, shared_buffer_class

IMAGE = spaces.Box(0, 255, (36, 37, 1), np.uint8)
ZERO = [[0, 0, 1], [0, 1, 2], [1, 2, 3], [0, 0, 11], [0, 11, 12]]
ZERO_NEXT = [[0, 1, 2], [1, 2, 3], [2, 3, 4], [0, 11, 12], [11, 12, 13]]


class Env(gym.Env[Any, Any]):
    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observation_space, action_space


def filmed(arguments: dict[str, Any], space: spaces.Box = IMAGE, **changes: Any) -> OfflineDataset:
    """The golden episodes, each frame of one shade."""
    shades = np.array([1, 2, 3, 4, 11, 12, 13], space.dtype).reshape(-1, *[1] * len(space.shape))
    frames = np.broadcast_to(shades, (7, *space.shape))
    return OfflineDataset(**arguments | {"observations": frames, "observation_space": space} | changes)


def noisy(arguments: dict[str, Any]) -> OfflineDataset:
    frames = np.random.default_rng(0).integers(0, 256, (7, *IMAGE.shape), dtype=np.uint8)
    return OfflineDataset(**arguments | {"observations": frames, "observation_space": IMAGE})


def rooms(arguments: dict[str, Any]) -> OfflineDataset:
    rng = np.random.default_rng(0)
    space = {"eye": IMAGE, "room": spaces.Discrete(9), "x": spaces.Box(-9, 9, (2,), np.float64)}
    observations = {
        "eye": rng.integers(0, 256, (7, *IMAGE.shape), dtype=np.uint8),
        "room": np.arange(7),
        "x": rng.uniform(-9, 9, (7, 2)),
    }
    return OfflineDataset(**arguments | {"observations": observations, "observation_space": spaces.Dict(space)})


def host(dataset: OfflineDataset, stacked: int = 1) -> Any:
    venv: Any = DummyVecEnv([lambda: Env(dataset.observation_space, dataset.action_space)])
    venv = VecFrameStack(venv, stacked) if stacked > 1 else venv
    return VecTransposeImage(venv) if "uint8" in str(dataset.observation_space) else venv


def batches(buffer: Any, env: Any = None) -> list[Any]:
    np.random.seed(0)
    return [buffer.sample(size, env=env) for size in (1, 7, 32)]


def same(first: Any, second: Any) -> bool:
    if first is None or second is None:
        return first is second
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return first.dtype == second.dtype and first.stride() == second.stride() and th.equal(first, second)


def all_same(first: list[Any], second: list[Any]) -> bool:
    return all(same(*pair) for one, two in zip(first, second, strict=True) for pair in zip(one, two, strict=True))


class TestGolden:
    def test_every_transition(self, golden: OfflineDataset) -> None:
        buffer = to_sb3(golden, Env(golden.observation_space, golden.action_space), gamma=0.5, share=True)
        assert isinstance(buffer, SharedReplayBuffer)
        assert (buffer.full, buffer.pos, buffer.size(), buffer.n_envs) == (True, 0, 5, 1)
        assert buffer.observations[:, 0].tolist() == [[0, 0], [1, 10], [2, 20], [100, 5], [101, 6]]
        assert buffer.next_observations[:, 0].tolist() == [[1, 10], [2, 20], [3, 30], [101, 6], [102, 7]]
        assert buffer.actions[:, 0, 0].tolist() == golden.actions[:, 0].tolist()
        assert buffer.rewards[:, 0].tolist() == [1, 2, 4, 8, 16]
        assert buffer.dones[:, 0].tolist() == [0, 0, 1, 0, 1]
        assert buffer.timeouts[:, 0].tolist() == [0, 0, 0, 0, 1]
        assert buffer.returns_to_go[:, 0].tolist() == [3, 4, 4, 16, 16]

    def test_every_stack(self, arguments: dict[str, Any]) -> None:
        """Single frames for a model of stacks: `VecFrameStack`'s zeros, channels first."""
        dataset = filmed(arguments)
        buffer = to_sb3(dataset, host(dataset, 3))
        assert buffer.observations.shape == (5, 1, 3, 36, 37)
        assert buffer.observations[:, 0, :, 7, 8].tolist() == ZERO
        assert buffer.next_observations[:, 0, :, 7, 8].tolist() == ZERO_NEXT
        assert buffer.observations[0].dtype == np.uint8

    def test_nothing_is_copied(self, arguments: dict[str, Any]) -> None:
        dataset = filmed(arguments)
        buffer = to_sb3(dataset, host(dataset))
        assert np.shares_memory(buffer.observations._leaf, dataset.observations)
        assert np.shares_memory(buffer.next_observations._leaf, dataset.observations)
        assert buffer.observations.nbytes == 0


FORMS: dict[str, Callable[..., OfflineDataset]] = {
    "vector": lambda arguments: OfflineDataset(**arguments),
    "image": noisy,
    "dict": rooms,
}


class TestSameAsTheCopy:
    @pytest.mark.parametrize("tail", ["zero", "none", "bootstrap"])
    @pytest.mark.parametrize("form", FORMS)
    def test_batches(self, arguments: dict[str, Any], form: str, tail: Any) -> None:
        dataset = FORMS[form](arguments)
        options: dict[str, Any] = {"device": "cpu", "return_tail": tail}
        shared, copied = (to_sb3(dataset, host(dataset), share=share, **options) for share in (True, False))
        assert all_same(batches(shared), batches(copied))
        after = batches(shared)
        np.random.seed(1)
        assert not all_same(after, [shared.sample(size) for size in (1, 7, 32)])  # the twin: other random numbers

    def test_stacks(self, arguments: dict[str, Any]) -> None:
        dataset = noisy(arguments)
        shared, copied = (to_sb3(dataset, host(dataset, 3), device="cpu", share=share) for share in (True, False))
        assert all_same(batches(shared), batches(copied))
        assert batches(shared)[0].observations.shape == (1, 3, 36, 37)
        assert batches(shared)[0].observations.dtype == th.uint8

    def test_stacks_channels_first(self, arguments: dict[str, Any]) -> None:
        dataset = filmed(arguments, spaces.Box(0, 255, (1, 36, 37), np.uint8)).stack_frames(3)
        env = Env(dataset.observation_space, dataset.action_space)
        shared, copied = (to_sb3(dataset, env, device="cpu", share=share) for share in (True, False))
        assert copied.next_observations[:, 0, :, 7, 8].tolist() == ZERO_NEXT
        assert all_same(batches(shared), batches(copied))

    def test_n_steps(self, arguments: dict[str, Any]) -> None:
        dataset = noisy(arguments)
        shared, copied = (to_sb3(dataset, host(dataset, 3), device="cpu", n_steps=3, share=share) for share in (True, False))
        assert isinstance(shared, NStepReplayBuffer)
        assert all_same(batches(shared), batches(copied))
        assert not all_same(batches(shared), batches(to_sb3(dataset, host(dataset, 3), device="cpu", n_steps=2)))

    @pytest.mark.parametrize("form", ["vector", "dict"])
    def test_normalized(self, arguments: dict[str, Any], form: str) -> None:
        from cql_plugins.sb3.offline import fill_normalization

        dataset = FORMS[form](arguments)
        keys = ["x"] if form == "dict" else None
        seen = []
        for share in (True, False):
            buffer = to_sb3(dataset, host(dataset), device="cpu", share=share)
            env = VecNormalize(host(dataset), norm_obs_keys=keys, clip_reward=2.0)
            fill_normalization(env, buffer)
            seen.append(batches(buffer, env))
        assert all_same(*seen)
        assert not all_same(seen[0], batches(to_sb3(dataset, host(dataset), device="cpu", share=True)))

    @pytest.mark.parametrize("form", FORMS)
    def test_read_back(self, arguments: dict[str, Any], form: str, assert_same: Any) -> None:
        dataset = FORMS[form](arguments)
        env = Env(dataset.observation_space, dataset.action_space)
        assert_same(from_sb3(to_sb3(dataset, env, share=True)), from_sb3(to_sb3(dataset, env, share=False)))

    def test_pickle(self, arguments: dict[str, Any]) -> None:
        dataset = noisy(arguments)
        buffer = to_sb3(dataset, host(dataset), device="cpu")
        assert all_same(batches(pickle.loads(pickle.dumps(buffer))), batches(buffer))


class TestTraining:
    @pytest.mark.parametrize("tail", ["zero", "bootstrap"])
    def test_same_weights_as_the_copy(self, arguments: dict[str, Any], tail: Any) -> None:
        dataset = noisy(arguments)

        def train(share: bool) -> dict[str, th.Tensor]:
            model = CalQL.from_dataset(
                dataset,
                "CnnPolicy",
                seed=0,
                device="cpu",
                batch_size=4,
                cql_n_actions=2,
                return_tail=tail,
                policy_kwargs={"net_arch": [8], "features_extractor_kwargs": {"features_dim": 8}},
            )
            model.learn_offline(to_sb3(dataset, model, share=share), gradient_steps=3)
            return model.policy.state_dict()

        shared, copied = train(True), train(False)
        assert all(th.equal(shared[name], copied[name]) for name in copied)

    def test_frames_for_a_model_of_stacks_then_online(self, arguments: dict[str, Any]) -> None:
        dataset = noisy(arguments)

        class Still(Env):
            def reset(self, **_: Any) -> Any:
                return np.zeros(IMAGE.shape, np.uint8), {}

            def step(self, action: Any) -> Any:
                return np.ones(IMAGE.shape, np.uint8), 0.0, False, False, {}

        venv = VecFrameStack(DummyVecEnv([lambda: Still(IMAGE, dataset.action_space)]), 4)
        kwargs = {"net_arch": [8], "features_extractor_kwargs": {"features_dim": 8}}
        model = CQL("CnnPolicy", venv, device="cpu", batch_size=4, buffer_size=9, cql_n_actions=2, policy_kwargs=kwargs)
        model.learn_offline(dataset, gradient_steps=1)
        assert isinstance(model.offline_buffer, SharedReplayBuffer)
        assert model.sample_batch(4).observations.shape == (4, 4, 36, 37)
        model.learn(3)
        assert model.replay_buffer.size() == 3


class TestChoice:
    def test_what_is_shared(self, arguments: dict[str, Any], golden: OfflineDataset, tmp_path: Path) -> None:
        def shares(dataset: OfflineDataset) -> bool:
            return isinstance(
                to_sb3(dataset, Env(dataset.observation_space, dataset.action_space)).observations, SharedObservations
            )

        assert not shares(golden)
        assert shares(golden.stack_frames(2))
        assert shares(noisy(arguments))
        np.save(tmp_path / "file.npy", golden.observations)
        mapped = np.load(tmp_path / "file.npy", mmap_mode="r")
        assert shares(golden._replaced(observations=np.asarray(mapped)))

    def test_share_false_gives_a_buffer_of_its_own(self, arguments: dict[str, Any]) -> None:
        dataset = noisy(arguments)
        buffer = to_sb3(dataset, host(dataset), share=False)
        buffer.observations[:] = 0
        assert dataset.observations.any()

    def test_bases(self) -> None:
        for base in (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer):
            assert issubclass(shared_buffer_class(base), base)
        with pytest.raises(TypeError, match="got Other"):
            shared_buffer_class(type("Other", (ReplayBuffer,), {}))


class TestReadOnly:
    def test_it_does_not_grow(self, golden: OfflineDataset) -> None:
        buffer = to_sb3(golden, Env(golden.observation_space, golden.action_space), share=True)
        with pytest.raises(NotImplementedError, match=r"does not grow.*share=False"):
            buffer.add(*[np.zeros((1, 2))] * 5, [{}])
        with pytest.raises(NotImplementedError, match="does not grow"):
            buffer.reset()
        with pytest.raises(ValueError, match="read-only"):
            buffer.observations[0] = 1
        with pytest.raises(ValueError, match="one row more than steps"):
            shared_buffer_class(ReplayBuffer)(
                4,
                golden.observation_space,
                golden.action_space,
                shared_observations=golden.observations,
                offsets=golden.offsets,
            )

    @pytest.mark.parametrize(
        "index",
        [
            0,
            -1,
            slice(1, 4),
            slice(None),
            [4, 0],
            np.arange(5) > 2,
            (2, 0),
            (slice(None), 0, 1),
            ([1, 2], [0, 0]),
            (np.array([[1], [2]]), 0),
        ],
    )
    def test_indexing_is_that_of_the_array(self, golden: OfflineDataset, index: Any) -> None:
        env = Env(golden.observation_space, golden.action_space)
        shared, copied = (to_sb3(golden, env, share=share) for share in (True, False))
        for ours, theirs in (
            (shared.observations, copied.observations),
            (shared.next_observations, copied.next_observations),
        ):
            np.testing.assert_array_equal(ours[index], theirs[index])
        np.testing.assert_array_equal(np.asarray(shared.observations), copied.observations)
        assert (ours.ndim, len(ours)) == (3, 5)

    @pytest.mark.parametrize("index", [5, [-6], [0, 5]])
    def test_out_of_range(self, golden: OfflineDataset, index: Any) -> None:
        with pytest.raises(IndexError, match=r"\[0, 5\)"):
            to_sb3(golden, Env(golden.observation_space, golden.action_space), share=True).observations[index]


class TestStackedToFit:
    @pytest.mark.parametrize(
        ("own", "target"),
        [
            ((36, 37, 1), (36, 37, 3)),
            ((36, 37, 1), (3, 36, 37)),
            ((1, 36, 37), (3, 36, 37)),
            ((36, 37), (3, 36, 37)),
            ((36, 37, 2), (6, 36, 37)),
        ],
    )
    def test_fits(self, arguments: dict[str, Any], own: tuple[int, ...], target: tuple[int, ...]) -> None:
        dataset = filmed(arguments, spaces.Box(0, 255, own, np.uint8))
        env = Env(spaces.Box(0, 255, target, np.uint8), dataset.action_space)
        stacks = to_sb3(dataset, env).observations[:, 0]
        channels = stacks[:, 7, 8] if target[0] == 36 else stacks[:, :, 7, 8]
        assert channels[:, :: own[2] if own == (36, 37, 2) else 1].tolist() == ZERO

    @pytest.mark.parametrize(
        ("own", "target"),
        [
            ((36, 37, 2), (36, 37, 3)),  # no multiple
            ((36, 37, 1), (37, 36, 3)),
            ((1, 36, 37), (36, 37, 3)),  # SB3 never makes channel-first images channel-last
            ((36, 37, 3), (36, 37, 1)),
        ],
    )
    def test_refused(self, arguments: dict[str, Any], own: tuple[int, ...], target: tuple[int, ...]) -> None:
        dataset = filmed(arguments, spaces.Box(0, 255, own, np.uint8))
        with pytest.raises(DatasetError, match="golden, field 'observation_space': the data set does not fit: shape"):
            to_sb3(dataset, Env(spaces.Box(0, 255, target, np.uint8), dataset.action_space))

    def test_bounds_stay_strict(self, arguments: dict[str, Any]) -> None:
        dataset = filmed(arguments, spaces.Box(0, 100, (36, 37, 1), np.uint8))
        with pytest.raises(DatasetError, match="the bounds 'high' differ"):
            to_sb3(dataset, Env(spaces.Box(0, 255, (36, 37, 3), np.uint8), dataset.action_space))

    def test_inside_a_dict(self, arguments: dict[str, Any]) -> None:
        dataset = rooms(arguments)
        space = spaces.Dict(dict(dataset.observation_space.spaces) | {"eye": spaces.Box(0, 255, (3, 36, 37), np.uint8)})
        buffer = to_sb3(dataset, Env(space, dataset.action_space))
        eye = dataset.observations["eye"][..., 0]
        np.testing.assert_array_equal(buffer.observations["eye"][3, 0], [0 * eye[4], 0 * eye[4], eye[4]])
        np.testing.assert_array_equal(buffer.next_observations["eye"][3, 0], [0 * eye[4], eye[4], eye[5]])
