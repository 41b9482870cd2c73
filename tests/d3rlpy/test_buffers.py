"""What d3rlpy samples from our buffers, against literals."""

from __future__ import annotations

import dataclasses
import inspect
import io
import pickle
import re
import textwrap
import warnings
from pathlib import Path
from typing import Any

import d3rlpy
import gymnasium as gym
import numpy as np
import pytest
from d3rlpy.dataset import (
    Episode,
    FrameStackTransitionPicker,
    InfiniteBuffer,
    MixedReplayBuffer,
    MultiStepTransitionPicker,
    ReplayBuffer,
    create_infinite_replay_buffer,
)
from d3rlpy.logging import NoopAdapterFactory
from d3rlpy.torch_utility import TorchMiniBatch
from gymnasium import spaces

import cql_plugins.d3rlpy as room
from cql_plugins.adapters import DatasetError, OfflineDataset, from_d3rlpy, from_minari, to_d3rlpy
from cql_plugins.d3rlpy import OfflineOnlineReplayBuffer, OfflineReplayBuffer, ReturnsToGoReplayBuffer, with_returns_to_go
from cql_plugins.d3rlpy.batches import ReturnsSettings, TailValues
from cql_plugins.d3rlpy.episodes import CompleteEpisode, CompleteTransitionPicker

# Four episodes: terminated after 2 steps, truncated after 2, terminated after 1, without a flag after 2. An observation names
# its episode and its time, an action too, so that a shift of a row shows.
EPISODES: list[dict[str, Any]] = [
    {"observations": [10, 11, 12], "actions": [0.10, 0.11], "rewards": [1, 2], "ends": (True, False)},
    {"observations": [20, 21, 22], "actions": [0.20, 0.21], "rewards": [4, 8], "ends": (False, True)},
    {"observations": [30, 31], "actions": [0.30], "rewards": [16], "ends": (True, False)},
    {"observations": [40, 41, 42], "actions": [0.40, 0.41], "rewards": [32, 64], "ends": (False, False)},
]
# observation, action, reward, next observation, terminal
TRANSITIONS = [
    (10, 0.10, 1, 11, 0),
    (11, 0.11, 2, 12, 1),
    (20, 0.20, 4, 21, 0),
    (21, 0.21, 8, 22, 0),
    (30, 0.30, 16, 31, 1),
    (40, 0.40, 32, 41, 0),
    (41, 0.41, 64, 42, 0),
]
HALF = ReturnsSettings(gamma=0.5)
RETURNS = [2.0, 2.0, 8.0, 8.0, 16.0, 64.0, 64.0]  # zero tail, gamma 0.5


class Literal(gym.Env[Any, Any]):
    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, **_: Any) -> Any:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        raise NotImplementedError


def literal_dataset(**changes: Any) -> OfflineDataset:
    actions = changes.pop("actions", np.array([a for e in EPISODES for a in e["actions"]]))
    is_discrete = isinstance(changes.get("action_space"), spaces.Discrete)
    return OfflineDataset(
        np.array([[o] for e in EPISODES for o in e["observations"]], np.float32),
        actions if is_discrete else actions[:, None].astype(np.float32),
        np.array([r for e in EPISODES for r in e["rewards"]], np.float32),
        np.array([False, True, False, False, True, False, False]),
        np.array([False, False, False, True, False, False, True]),
        **(
            {
                "observation_space": Literal.observation_space,
                "action_space": Literal.action_space,
                "name": "literal",
            }
            | changes
        ),
    )


@pytest.fixture
def minari_id() -> str:
    """The four episodes on disk, in the folder that no user has."""
    minari = pytest.importorskip("minari")
    episodes = [
        minari.data_collector.EpisodeBuffer(
            observations=np.array(e["observations"], np.float32)[:, None],
            actions=np.array(e["actions"], np.float32)[:, None],
            rewards=list(map(float, e["rewards"])),
            terminations=[False] * (len(e["rewards"]) - 1) + [e["ends"][0]],
            truncations=[False] * (len(e["rewards"]) - 1) + [e["ends"][1]],
            infos={},
        )
        for e in EPISODES
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            "literal/four-v0",
            episodes,
            env="Pendulum-v1",  # d3rlpy's reader wants one that it can make
            observation_space=Literal.observation_space,
            action_space=Literal.action_space,
        )
    return "literal/four-v0"


def sampled(buffer: Any, n: int = 400) -> set[tuple[float, ...]]:
    """Distinct transitions of many batches, as numbers."""
    batch = buffer.sample_transition_batch(n)
    columns = (batch.observations, batch.actions, batch.rewards, batch.next_observations, batch.terminals)
    return {tuple(round(float(c[i, 0]), 4) for c in columns) for i in range(n)}


def expected() -> set[tuple[float, ...]]:
    return {tuple(map(float, row)) for row in TRANSITIONS}


class TestEveryTransition:
    def test_of_a_minari_set(self, minari_id: str) -> None:
        with pytest.warns(UserWarning, match="1 episode"):
            dataset = from_minari(minari_id)
        buffer = to_d3rlpy(dataset)
        assert buffer.transition_count == 7
        assert sampled(buffer) == expected()
        one_by_one = [buffer.transition(row) for row in range(7)]
        assert [
            (t.observation.item(), t.action.item(), t.reward.item(), t.next_observation.item(), t.terminal) for t in one_by_one
        ] == [pytest.approx(row) for row in TRANSITIONS]

    def test_d3rlpys_own_reader_fails_this_test(self, minari_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """It joins T + 1 observations for each episode against T actions, and drops the ends of truncated episodes."""
        monkeypatch.setattr("minari.load_dataset", _load_offline(__import__("minari").load_dataset))
        buffer, _ = d3rlpy.datasets.get_minari(minari_id)
        found = sampled(buffer)
        assert found != expected()
        shifted = [row for row in found if not any(row[:3] == literal[:3] for literal in expected())]
        assert shifted, "observations against actions of another time"
        assert len(found & expected()) < 7

    def test_a_batch_is_what_d3rlpy_stacks(self) -> None:
        buffer = to_d3rlpy(literal_dataset())
        rows = np.array([6, 0, 4, 3, 1])
        gathered = buffer.transition_batch(rows)
        stacked = d3rlpy.dataset.TransitionMiniBatch.from_transitions([buffer.transition(int(row)) for row in rows])
        for name in ("observations", "actions", "rewards", "next_observations", "next_actions", "terminals", "intervals"):
            first, second = getattr(gathered, name), getattr(stacked, name)
            assert first.dtype == second.dtype == np.float32
            np.testing.assert_array_equal(first, second)

    def test_d3rlpys_algorithms_get_right_returns_from_it(self) -> None:
        """d3rlpy sums them for each transition, from what the batch's transitions say."""
        buffer = to_d3rlpy(literal_dataset())
        batch = TorchMiniBatch.from_batch(buffer.transition_batch(np.arange(7)), 0.5, compute_returns_to_go=True, device="cpu")
        assert batch.returns_to_go[:, 0].tolist() == RETURNS

    def test_an_episode_is_one_of_d3rlpys_and_stays_what_it_was(self) -> None:
        episode = to_d3rlpy(literal_dataset()).episodes[1]
        assert isinstance(episode, CompleteEpisode)
        assert isinstance(episode, Episode), "which d3rlpy's scaler of tuples asks for"
        assert (episode.size(), len(episode), episode.transition_count, episode.compute_return()) == (2, 2, 2, 12.0)
        theirs = Episode(episode.observations, episode.actions, episode.rewards, terminated=False)
        for name in ("observation_signature", "action_signature", "reward_signature"):
            assert getattr(episode, name) == getattr(theirs, name)
        assert list(episode.serialize()) == ["observations", "actions", "rewards", "terminated", "cut"]
        broken_off = dataclasses.replace(episode, cut=True)
        assert (broken_off.cut, broken_off.all_observations is episode.all_observations) == (True, True)
        assert next(iter(dataclasses.fields(episode))).name == "all_observations"
        with pytest.raises(dataclasses.FrozenInstanceError):
            episode.terminated = True  # type: ignore[misc]
        # By identity, as a key too: d3rlpy's own cannot be compared.
        assert {episode: 1}[episode] == 1
        assert episode != dataclasses.replace(episode)
        again = pickle.loads(pickle.dumps(episode))
        assert again.all_observations.tolist() == [[20], [21], [22]]
        assert again.observations.tolist() == [[20], [21]]
        assert np.shares_memory(episode.observations, episode.all_observations)

    def test_stacked_frames_and_several_steps(self) -> None:
        frames = literal_dataset(observation_space=spaces.Box(-np.inf, np.inf, (1,), np.float32))
        two_steps = to_d3rlpy(frames, transition_picker=MultiStepTransitionPicker(n_steps=2, gamma=0.5))
        picked = [two_steps.transition(row) for row in range(7)]
        assert [(t.observation.item(), t.reward.item(), t.next_observation.item(), t.terminal, t.interval) for t in picked] == [
            (10, 2.0, 12, 1, 2),
            (11, 2.0, 12, 1, 1),
            (20, 8.0, 22, 0, 2),
            (21, 8.0, 22, 0, 1),
            (30, 16.0, 31, 1, 1),
            (40, 64.0, 42, 0, 2),
            (41, 64.0, 42, 0, 1),
        ]
        assert two_steps.sample_transition_batch(3).intervals.shape == (3, 1)

        images = OfflineDataset(
            np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1) * np.ones((1, 1, 4, 4), np.uint8),
            np.zeros((2, 1), np.float32),
            np.zeros(2),
            np.array([False, False]),
            np.array([False, True]),
            observation_space=spaces.Box(0, 255, (1, 4, 4), np.uint8),
            action_space=Literal.action_space,
        )
        stacks = to_d3rlpy(images, transition_picker=FrameStackTransitionPicker(n_frames=2))
        last = stacks.transition(1)
        assert last.observation[:, 0, 0].tolist() == [0, 1]
        assert last.next_observation[:, 0, 0].tolist() == [1, 2], "the frame after the time-out"
        assert last.observation.dtype == np.uint8


def _load_offline(load: Any) -> Any:
    return lambda name, download=False: load(name)


class TestKindsOfData:
    def test_action_type_comes_from_the_space(self) -> None:
        whole = literal_dataset()
        whole = OfflineDataset(
            whole.observations,
            np.ones_like(whole.actions),
            whole.rewards,
            whole.terminations,
            whole.truncations,
            observation_space=whole.observation_space,
            action_space=whole.action_space,
        )
        info = to_d3rlpy(whole).dataset_info
        assert (info.action_space, info.action_size) == (d3rlpy.ActionSpace.CONTINUOUS, 1)
        guessed = create_infinite_replay_buffer([Episode(np.zeros((2, 1)), np.ones((2, 1)), np.zeros((2, 1)), True)])
        assert guessed.dataset_info.action_space == d3rlpy.ActionSpace.DISCRETE, "which d3rlpy guesses wrong"

    def test_discrete_actions_keep_their_number(self) -> None:
        data = OfflineDataset(
            np.zeros((3, 2), np.float32),
            np.array([0, 1]),
            np.zeros(2),
            np.array([False, True]),
            np.array([False, False]),
            observation_space=spaces.Box(-1, 1, (2,), np.float32),
            action_space=spaces.Discrete(4),
        )
        info = to_d3rlpy(data).dataset_info
        assert (info.action_space, info.action_size) == (d3rlpy.ActionSpace.DISCRETE, 4), "though the data has only two"
        assert from_d3rlpy(to_d3rlpy(data)).action_space == spaces.Discrete(4)
        shifted = OfflineDataset(
            np.zeros((3, 2), np.float32),
            np.array([5, 6]),
            np.zeros(2),
            np.array([False, True]),
            np.array([False, False]),
            observation_space=data.observation_space,
            action_space=spaces.Discrete(4, start=5),
        )
        with pytest.raises(DatasetError, match="from 0 on"):
            to_d3rlpy(shifted)

    def test_dict_observations_become_tuples(self) -> None:
        data = OfflineDataset(
            {"goal": np.arange(3.0, dtype=np.float32)[:, None], "seen": np.arange(6.0, dtype=np.float32).reshape(3, 2)},
            np.zeros((2, 1), np.float32),
            np.zeros(2),
            np.array([False, False]),
            np.array([False, True]),
            observation_space=spaces.Dict(goal=spaces.Box(-9, 9, (1,), np.float32), seen=spaces.Box(-9, 9, (2,), np.float32)),
            action_space=Literal.action_space,
        )
        buffer = to_d3rlpy(data)
        batch = buffer.transition_batch(np.array([1]))
        assert [leaf.tolist() for leaf in batch.observations] == [[[1.0]], [[2.0, 3.0]]]
        assert [leaf.tolist() for leaf in batch.next_observations] == [[[2.0]], [[4.0, 5.0]]]
        back = from_d3rlpy(buffer)
        np.testing.assert_array_equal(back.observations["1"], data.observations["seen"])

    def test_channel_last_images_become_channel_first(self) -> None:
        image = np.arange(2 * 5 * 6 * 3, dtype=np.uint8).reshape(2, 5, 6, 3)
        data = OfflineDataset(
            image,
            np.zeros((1, 1), np.float32),
            np.zeros(1),
            np.array([True]),
            np.array([False]),
            observation_space=spaces.Box(0, 255, (5, 6, 3), np.uint8),
            action_space=Literal.action_space,
        )
        buffer = to_d3rlpy(data)
        assert buffer.dataset_info.observation_signature.shape[0] == (3, 5, 6)
        np.testing.assert_array_equal(buffer.sample_transition().observation, image[0].transpose(2, 0, 1))

    @staticmethod
    def of_observations(observations: np.ndarray, high: float) -> OfflineDataset:
        """One episode of three steps, truncated, in one of two actions."""
        return OfflineDataset(
            observations,
            np.array([0, 1, 0]),
            np.ones(3),
            np.zeros(3, bool),
            np.array([False, False, True]),
            observation_space=spaces.Box(0, high, observations.shape[1:], observations.dtype.type),
            action_space=spaces.Discrete(2),
        )

    def test_grey_images_get_a_channel(self) -> None:
        """Without one d3rlpy stacks along the height, and has no encoder."""
        frames = np.arange(1, 5, dtype=np.uint8)[:, None, None] * np.ones((1, 5, 6), np.uint8)
        data = self.of_observations(frames, 255)
        plain = to_d3rlpy(data)
        assert plain.dataset_info.observation_signature.shape[0] == (1, 5, 6)
        assert np.shares_memory(plain.episodes[0].all_observations, data.observations)
        stacks = to_d3rlpy(data, transition_picker=FrameStackTransitionPicker(n_frames=2))
        picked = stacks.transition(2)
        assert picked.observation.shape == (2, 5, 6)
        assert picked.observation[:, 0, 0].tolist() == [2, 3]
        assert picked.next_observation[:, 0, 0].tolist() == [3, 4]
        back = from_d3rlpy(plain)
        np.testing.assert_array_equal(back.observations, frames[:, None])
        assert back.observation_space.shape == (1, 5, 6)
        assert back.observation_space.dtype == np.uint8
        with_channel = to_d3rlpy(self.of_observations(frames[:, None], 255))
        np.testing.assert_array_equal(with_channel.episodes[0].all_observations, plain.episodes[0].all_observations)

    @pytest.mark.parametrize("shape", [(5, 6), (2, 3, 5, 6)])
    def test_shapes_without_an_encoder(self, shape: tuple[int, ...]) -> None:
        with pytest.warns(UserWarning, match=r"got observations of shape \(.*encoder factory of your own"):
            kept = to_d3rlpy(self.of_observations(np.ones((4, *shape), np.float32), 1.0))
        assert kept.transition(0).observation.shape == shape
        flat = to_d3rlpy(self.of_observations(np.ones((4, *shape), np.float32).reshape(4, -1), 1.0))
        assert flat.transition(0).observation.shape == (int(np.prod(shape)),)

    def test_names_are_not_numbers(self) -> None:
        data = OfflineDataset(
            np.array([0, 1]),
            np.zeros((1, 1), np.float32),
            np.zeros(1),
            np.array([True]),
            np.array([False]),
            observation_space=spaces.Discrete(3),
            action_space=Literal.action_space,
        )
        with pytest.raises(DatasetError, match="One-hot"):
            to_d3rlpy(data)


class TestRoundTrips:
    def test_ours(self, assert_same: Any) -> None:
        data = literal_dataset()
        assert_same(from_d3rlpy(to_d3rlpy(data)), data)

    def test_d3rlpys_own_buffer_says_what_is_lost(self) -> None:
        episodes = [
            Episode(np.array([[0.0], [1.0], [2.0]]), np.full((3, 1), 0.5), np.ones((3, 1)), True),
            Episode(np.array([[5.0], [6.0], [7.0]]), np.full((3, 1), 0.5), np.ones((3, 1)), False),
        ]
        with pytest.warns(UserWarning, match="1 transition"):
            data = from_d3rlpy(create_infinite_replay_buffer(episodes), name="theirs")
        assert data.episode_lengths.tolist() == [3, 2]
        assert data.observations[:, 0].tolist() == [0, 1, 2, 2, 5, 6, 7]
        assert data.terminations.tolist() == [False, False, True, False, False]

    def test_through_d3rlpys_file(self) -> None:
        buffer = to_d3rlpy(literal_dataset())
        file = io.BytesIO()
        buffer.dump(file)
        loaded = ReplayBuffer.load(
            file, InfiniteBuffer(), episode_cls=CompleteEpisode, transition_picker=CompleteTransitionPicker()
        )
        assert loaded.transition_count == 7
        assert sampled(loaded) == expected()

    @pytest.mark.parametrize("wrapped", [False, True], ids=["offline", "wrapped"])
    @pytest.mark.parametrize("discrete", [False, True], ids=["whole numbers", "two of five"])
    def test_the_docstrings_recipe(
        self, discrete: bool, wrapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """d3rlpy guesses these actions wrong: whole numbers are discrete to it, and two actions are all there are."""
        actions = np.array([0, 1, 1, 0, 1, 0, 1])
        data = literal_dataset(action_space=spaces.Discrete(5) if discrete else Literal.action_space, actions=actions)
        buffer = to_d3rlpy(data)
        info = buffer.dataset_info
        assert info.action_size == (5 if discrete else 1)
        docstring = inspect.getdoc(OfflineReplayBuffer.dump)
        assert docstring is not None
        recipe = textwrap.dedent(docstring.split("::\n")[1].split("Args:")[0])
        if discrete:
            recipe = recipe.replace("ActionSpace.CONTINUOUS", "ActionSpace.DISCRETE")
        recipe = recipe.replace("action_size=6", f"action_size={info.action_size}")
        monkeypatch.chdir(tmp_path)
        with open("data.h5", "w+b") as file:
            (with_returns_to_go(create_infinite_replay_buffer(list(buffer.episodes))) if wrapped else buffer).dump(file)
        names: dict[str, Any] = {}
        exec(recipe, names)
        self.check(names["buffer"], info)

        with pytest.raises(NotImplementedError, match="action_space=") as refusal, open("data.h5", "rb") as file:
            OfflineReplayBuffer.load(file, InfiniteBuffer())
        call = re.search(r"Use (.*\)), with", str(refusal.value))
        assert call is not None
        kind = f"action_space=d3rlpy.{info.action_space}, action_size={info.action_size}"
        with open("data.h5", "rb") as file:
            given = {"d3rlpy": d3rlpy, "f": file} | {
                n: getattr(room, n) for n in ("CompleteEpisode", "CompleteTransitionPicker")
            }
            loaded = eval(call[1].replace("action_space=..., action_size=...", kind), given)
        self.check(loaded, info)

    def check(self, loaded: ReplayBuffer, info: Any) -> None:
        assert loaded.dataset_info == info
        assert loaded.transition_count == 7
        picked = [loaded.transition_picker(*loaded.buffer[row]) for row in range(7)]
        assert [(t.observation.item(), t.next_observation.item(), t.terminal) for t in picked] == [
            (row[0], row[3], row[4]) for row in TRANSITIONS
        ]
        config: Any = room.DiscreteCalQLConfig if info.action_space == d3rlpy.ActionSpace.DISCRETE else room.CalQLConfig
        algo = config(batch_size=8).create()
        options = {"n_steps": 2, "n_steps_per_epoch": 2, "show_progress": False, "logger_adapter": NoopAdapterFactory()}
        algo.fit(loaded, **options)
        assert algo.impl.action_size == info.action_size

    def test_nothing_to_read(self) -> None:
        one_row = [Episode(np.zeros((1, 1)), np.full((1, 1), 0.5), np.ones((1, 1)), False)] * 2
        with pytest.raises(DatasetError, match="at least one transition"):
            from_d3rlpy(create_infinite_replay_buffer(one_row))


class TestReturns:
    def test_literals_of_each_tail(self) -> None:
        buffer = to_d3rlpy(literal_dataset())
        assert buffer.returns_to_go(HALF).tolist() == RETURNS
        none = buffer.returns_to_go(ReturnsSettings(0.5, "none"))
        assert none.tolist() == [2, 2, -np.inf, -np.inf, 16, -np.inf, -np.inf]
        values = TailValues(lambda observations: observations[:, 0])
        bootstrapped = buffer.returns_to_go(ReturnsSettings(0.5, "bootstrap", tail_values=values))
        assert bootstrapped.tolist() == [2, 2, 8 + 0.25 * 22, 8 + 0.5 * 22, 16, 64 + 0.25 * 42, 64 + 0.5 * 42]
        before = buffer.returns_to_go(ReturnsSettings(0.5, "bootstrap"))
        assert before.tolist() == none.tolist(), "no value is known before the first estimate"

    def test_sparse(self) -> None:
        rewards = [-1.0, 0.0, -1.0, -1.0, 0.0, -1.0, -1.0]
        data = literal_dataset()
        data = OfflineDataset(
            data.observations,
            data.actions,
            np.array(rewards),
            data.terminations,
            data.truncations,
            observation_space=data.observation_space,
            action_space=data.action_space,
        )
        sums = to_d3rlpy(data).returns_to_go(ReturnsSettings(0.5, "sparse"))
        assert sums.tolist() == [-1, 0, -2, -2, 0, -2, -2]

    def test_of_scaled_rewards(self) -> None:
        scaler = d3rlpy.preprocessing.ConstantShiftRewardScaler(shift=-1.0)
        buffer = to_d3rlpy(literal_dataset())
        shifted = buffer.returns_to_go(ReturnsSettings(0.5, reward_scaler=scaler))
        assert shifted.tolist() == [0.5, 1, 6.5, 7, 15, 62.5, 63]
        assert buffer.smallest_reward(scaler) == 0.0

    def test_summed_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        buffer = to_d3rlpy(literal_dataset())
        calls = []
        monkeypatch.setattr(ReturnsSettings, "sum", _counted(ReturnsSettings.sum, calls))
        for _ in range(5):
            buffer.sample_transition_batch(4).returns_to_go(ReturnsSettings(0.5))
        assert len(calls) == 1
        buffer.sample_transition_batch(4).returns_to_go(ReturnsSettings(0.9))
        assert len(calls) == 2

    def test_a_foreign_buffer_gets_them(self) -> None:
        episodes = [
            Episode(np.array([[0.0], [1.0]]), np.full((2, 1), 0.5), np.array([[1.0], [2.0]]), True),
            Episode(np.array([[5.0], [6.0], [7.0]]), np.full((3, 1), 0.5), np.array([[4.0], [8.0], [16.0]]), False),
        ]
        buffer = with_returns_to_go(create_infinite_replay_buffer(episodes))
        batch = buffer.sample_transition_batch(200)
        for settings, literals in (
            (HALF, {0: 2.0, 1: 2.0, 5: 12.0, 6: 16.0}),
            (ReturnsSettings(0.5, "none"), {0: 2.0, 1: 2.0, 5: -np.inf, 6: -np.inf}),
            # The last row's observation is what is known after the transition before it.
            (
                ReturnsSettings(0.5, "bootstrap", tail_values=TailValues(lambda o: 100 * o[:, 0])),
                {0: 2.0, 1: 2.0, 5: 8 + 0.25 * 700, 6: 8 + 0.5 * 700},
            ),
        ):
            found = {(o.item(), g.item()) for o, g in zip(batch.observations, batch.returns_to_go(settings), strict=True)}
            assert found == set(literals.items())

    def test_a_mixed_buffer_is_mixed_with_returns(self) -> None:
        episode = Episode(np.array([[0.0], [1.0]]), np.full((2, 1), 0.5), np.array([[1.0], [2.0]]), True)
        plain = create_infinite_replay_buffer([episode])
        mixed = with_returns_to_go(MixedReplayBuffer(plain, create_infinite_replay_buffer([episode]), 0.25))
        assert isinstance(mixed, OfflineOnlineReplayBuffer)
        assert mixed.offline_fraction == 0.25
        assert with_returns_to_go(mixed) is mixed


def _counted(function: Any, calls: list[int]) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return function(*args, **kwargs)

    return counted


class TestIsWhatD3rlpyExpects:
    def test_does_not_grow(self) -> None:
        buffer = to_d3rlpy(literal_dataset())
        for call in (
            lambda: buffer.append(np.zeros(1), np.zeros(1), 0.0),
            lambda: buffer.append_episode(buffer.episodes[0]),
            lambda: buffer.clip_episode(True),
            lambda: buffer.buffer.append(buffer.episodes[0], 0),
        ):
            with pytest.raises(NotImplementedError, match="OfflineOnlineReplayBuffer"):
                call()

    def test_scalers_evaluators_and_slicers(self) -> None:
        buffer = to_d3rlpy(literal_dataset())
        scaler = d3rlpy.preprocessing.StandardObservationScaler()
        scaler.fit_with_transition_picker(buffer.episodes, buffer.transition_picker)
        observations = [row[0] for row in TRANSITIONS]
        assert scaler.mean == pytest.approx(np.mean(observations))
        assert scaler.std == pytest.approx(np.std(observations))
        trajectory = buffer.sample_trajectory_batch(8, 2)
        assert trajectory.observations.shape == (8, 2, 1)
        assert set(np.unique(trajectory.observations)) <= {0.0, *map(float, observations)}, "no padded step"

    def test_views_share_memory(self) -> None:
        data = literal_dataset()
        buffer = to_d3rlpy(data)
        assert all(np.shares_memory(e.all_observations, data.observations) for e in buffer.episodes)

    def test_wrong_number_of_observations(self) -> None:
        with pytest.raises(ValueError, match="one row more than steps in each episode, 2 \\+ 1 rows; got 2"):
            OfflineReplayBuffer(
                np.zeros((2, 1)), np.zeros((2, 1)), np.zeros(2), np.zeros(2), np.array([0, 2]), discrete=False, action_size=1
            )

    def test_large_buffers_are_indexed_as_small_ones(self) -> None:
        rng = np.random.default_rng(0)
        lengths = rng.integers(1, 9, size=200)
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        n = int(offsets[-1])
        terminated = np.zeros(n, bool)
        terminated[offsets[1:] - 1] = rng.random(200) < 0.5
        observations = rng.normal(size=(n + 200, 2)).astype(np.float32)
        buffer = OfflineReplayBuffer(
            observations, rng.normal(size=(n, 1)), rng.normal(size=n), terminated, offsets, discrete=False, action_size=1
        )
        rows = rng.integers(n, size=300)
        batch = buffer.transition_batch(rows)
        for i, row in enumerate(rows):
            episode = int(np.searchsorted(offsets, row, side="right")) - 1
            np.testing.assert_array_equal(batch.observations[i], observations[row + episode])
            np.testing.assert_array_equal(batch.next_observations[i], observations[row + episode + 1])
            assert batch.terminals[i, 0] == terminated[row]


def test_returns_to_go_buffer_is_exported() -> None:
    assert issubclass(ReturnsToGoReplayBuffer, d3rlpy.dataset.ReplayBufferBase)


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """d3rlpy's loops write logs into the working directory unless told otherwise; buffers never do."""
    monkeypatch.chdir(tmp_path)
    to_d3rlpy(literal_dataset()).sample_transition_batch(2)
    assert not list(tmp_path.iterdir())
