from __future__ import annotations

import copy
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

from cql_plugins.adapters import DatasetError, OfflineDataset, StackedFrames, from_minari, to_d3rlpy, to_minari

# Frames of one pixel: an episode of three steps that terminates, one of two that is cut short.
PIXELS = np.array([1, 2, 3, 4, 11, 12, 13], dtype=np.uint8)
ZERO = [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [0, 0, 11], [0, 11, 12], [11, 12, 13]]
RESET = [[1, 1, 1], [1, 1, 2], [1, 2, 3], [2, 3, 4], [11, 11, 11], [11, 11, 12], [11, 12, 13]]


def filmed(frames: Any, **changes: Any) -> OfflineDataset:
    space = changes.pop("observation_space", None) or spaces.Box(0, 255, frames.shape[1:], frames.dtype.type)
    arguments: dict[str, Any] = {
        "actions": np.array([0, 1, 2, 3, 4]),
        "rewards": np.array([1.0, 2.0, 4.0, 8.0, 16.0]),
        "terminations": np.array([False, False, True, False, False]),
        "truncations": np.array([False, False, False, False, True]),
        "observation_space": space,
        "action_space": spaces.Discrete(5),
        "name": "film",
    }
    return OfflineDataset(frames, **arguments | changes)


def pixels(*frame: int) -> np.ndarray:
    """Frames of the given shape, all their pixels alike."""
    return np.broadcast_to(PIXELS.reshape(-1, *[1] * len(frame)), (7, *frame)).copy()


class TestEveryStack:
    @pytest.mark.parametrize(("padding", "expected"), [("zero", ZERO), ("reset", RESET)])
    def test_channels_last(self, padding: Any, expected: list[list[int]]) -> None:
        dataset = filmed(pixels(4, 5, 1)).stack_frames(3, padding)
        assert dataset.observation_space == spaces.Box(0, 255, (4, 5, 3), np.uint8)
        assert np.asarray(dataset.observations)[:, 2, 3].tolist() == expected
        transitions = dataset.transitions(np.arange(5))
        assert transitions.observations[:, 0, 0].tolist() == [expected[row] for row in (0, 1, 2, 4, 5)]
        assert transitions.next_observations[:, 0, 0].tolist() == [expected[row] for row in (1, 2, 3, 5, 6)]
        assert transitions.observations.dtype == np.uint8

    @pytest.mark.parametrize("frame", [(1, 4, 5), (4, 5)])
    def test_channels_first_and_grey(self, frame: tuple[int, ...]) -> None:
        dataset = filmed(pixels(*frame)).stack_frames(3)
        assert dataset.observation_space == spaces.Box(0, 255, (3, 4, 5), np.uint8)
        assert np.asarray(dataset.observations)[:, :, 2, 3].tolist() == ZERO

    def test_several_channels_stay_together(self) -> None:
        frames = np.stack([pixels(4, 5), 100 + pixels(4, 5)], axis=-1)
        assert filmed(frames).stack_frames(2).observations[2][0, 0].tolist() == [2, 102, 3, 103]
        turned = filmed(frames.transpose(0, 3, 1, 2)).stack_frames(2)
        assert turned.observations[2][:, 0, 0].tolist() == [2, 102, 3, 103]

    def test_vectors(self) -> None:
        dataset = filmed(np.stack([PIXELS, -1.0 * PIXELS], axis=1)).stack_frames(2)
        assert dataset.observations[[1, 4]].tolist() == [[1, -1, 2, -2], [0, 0, 11, -11]]
        assert dataset.observation_space.shape == (4,)

    def test_longer_than_an_episode(self) -> None:
        dataset = filmed(pixels(4, 5)).stack_frames(6)
        assert dataset.observations[3][:, 0, 0].tolist() == [0, 0, 1, 2, 3, 4]
        assert dataset.observations[6][:, 0, 0].tolist() == [0, 0, 0, 11, 12, 13]

    def test_bounds(self) -> None:
        low = np.array([[[0, 5]]], np.uint8)
        space = spaces.Box(low, np.full((1, 1, 2), 255, np.uint8), dtype=np.uint8)
        stacked = filmed(np.full((7, 1, 1, 2), 9, np.uint8), observation_space=space).stack_frames(2).observation_space
        assert stacked.low.ravel().tolist() == [0, 5, 0, 5]


class Film(gym.Env[Any, Any]):
    """Shows the pixels of one episode."""

    action_space = spaces.Discrete(5)

    def __init__(self, shown: np.ndarray) -> None:
        self.shown, self.clock = shown, 0
        self.observation_space = spaces.Box(0, 255, shown.shape[1:], np.uint8)

    def reset(self, **_: Any) -> Any:
        self.clock = 0
        return self.shown[0], {}

    def step(self, action: Any) -> Any:
        self.clock += 1
        return self.shown[self.clock], 0.0, False, False, {}


def test_same_as_the_wrappers_of_both_hosts() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (7, 36, 37, 2), dtype=np.uint8)
    ours = filmed(frames).stack_frames(3)[1].observations
    theirs = VecFrameStack(DummyVecEnv([lambda: Film(frames[4:])]), 3)
    np.testing.assert_array_equal(ours, [theirs.reset()[0], *(theirs.step([0])[0][0] for _ in range(2))])
    reset, _ = (wrapper := FrameStackObservation(Film(frames[4:, ..., 0]), 3, padding_type="reset")).reset()
    grey = filmed(frames[..., 0].copy()).stack_frames(3, "reset")[1].observations
    np.testing.assert_array_equal(grey, [reset, *(wrapper.step(0)[0] for _ in range(2))])


class TestArray:
    def stacks(self) -> Any:
        return filmed(pixels(4, 5)).stack_frames(3).observations

    def test_frames_are_shared(self) -> None:
        single = filmed(pixels(4, 5))
        stacks = single.stack_frames(3).observations
        assert np.shares_memory(stacks.frames, single.observations)
        assert stacks.nbytes <= 7 * 20 + 1
        assert (stacks.shape, stacks.ndim, stacks.size, len(stacks)) == ((7, 3, 4, 5), 4, 420, 7)
        assert repr(stacks) == "StackedFrames(shape=(7, 3, 4, 5), dtype=uint8, n_stack=3)"

    @pytest.mark.parametrize(
        "index",
        [0, -1, np.int64(4), slice(2, 6), slice(5, 2), slice(None, None, -2), [6, 0, 4], [], [[0, -1]], np.arange(7) % 2 == 0],
    )
    def test_indexing_is_that_of_the_array(self, index: Any) -> None:
        stacks = self.stacks()
        np.testing.assert_array_equal(stacks[index], np.asarray(stacks)[index])
        np.testing.assert_array_equal(stacks[2:][:4], np.asarray(stacks)[2:6])

    @pytest.mark.parametrize("index", [(2, 1), (slice(1, 5), 0, 2), ([1, 3], slice(None), 2)])
    def test_further_indices(self, index: Any) -> None:
        np.testing.assert_array_equal(self.stacks()[index], np.asarray(self.stacks())[index])

    @pytest.mark.parametrize("index", [7, [-8], [0, 7], 0.5, np.ones(6, bool)])
    def test_out_of_range(self, index: Any) -> None:
        with pytest.raises(IndexError):
            self.stacks()[index]

    def test_slices_are_views(self) -> None:
        view = self.stacks()[4:]
        assert isinstance(view, StackedFrames)
        assert view[0][:, 0, 0].tolist() == [0, 0, 11]
        assert self.stacks()[2:][0][:, 0, 0].tolist() == [1, 2, 3]  # the frames before the slice are seen

    def test_read_only(self) -> None:
        with pytest.raises(TypeError, match="item assignment"):
            self.stacks()[0] = 0
        with pytest.raises(ValueError, match="read-only"):
            self.stacks().frames[0] = 0
        if hasattr(np, "trapezoid"):  # NumPy 2; before it copy=False asked for nothing
            with pytest.raises(ValueError, match="put together"):
                np.array(self.stacks(), copy=False)

    def test_pickle_and_deepcopy(self) -> None:
        part = self.stacks()[3:]
        for twin in (pickle.loads(pickle.dumps(part)), copy.deepcopy(part)):
            np.testing.assert_array_equal(twin, part)
            assert not twin.frames.flags.writeable


class TestDataset:
    def test_episodes(self) -> None:
        episode = filmed(pixels(4, 5)).stack_frames(3)[1]
        assert np.asarray(episode.observations)[:, :, 0, 0].tolist() == ZERO[4:]
        assert np.asarray(episode.next_observations)[:, :, 0, 0].tolist() == ZERO[5:]
        assert isinstance(episode.next_observations, StackedFrames)

    @pytest.mark.parametrize("choose", [lambda d: d[[1, 0]], lambda d: d[1:] + d[:1], lambda d: d[::-1]])
    def test_chosen_and_joined(self, choose: Any) -> None:
        turned = choose(filmed(pixels(4, 5)).stack_frames(3))
        assert np.asarray(turned.observations)[:, :, 0, 0].tolist() == ZERO[4:] + ZERO[:4]
        assert turned.rewards.tolist() == [8, 16, 1, 2, 4]
        assert turned.observations.nbytes <= 7 * 20 + 2 * 2 * 20

    def test_filter(self) -> None:
        kept = filmed(pixels(4, 5)).stack_frames(3, "reset").filter(lambda episode: episode.truncated)
        assert np.asarray(kept.observations)[:, :, 0, 0].tolist() == RESET[4:]

    def test_joining_what_is_stacked_with_what_is_not(self) -> None:
        stacked = filmed(pixels(4, 5)).stack_frames(3)
        plain = filmed(np.asarray(stacked.observations))
        with pytest.raises(DatasetError, match=r"field 'observations': expected frames that are stacked in one way.*unstack"):
            stacked + plain
        joined = stacked + plain.unstack_frames(3)
        assert np.asarray(joined.observations)[:, :, 0, 0].tolist() == ZERO + ZERO

    def test_pickle(self, assert_same: Any) -> None:
        dataset = filmed(pixels(4, 5)).stack_frames(3)
        assert_same(pickle.loads(pickle.dumps(dataset)), dataset)

    def test_summary(self) -> None:
        single = filmed(pixels(4, 5))
        summary = single.stack_frames(3).summary()
        assert summary.observation_space.shape == (3, 4, 5)
        assert summary.nbytes - single.summary().nbytes <= 2
        assert "20 of 60" not in str(summary)
        assert filmed(np.zeros((7, 4, 5), np.uint8)).stack_frames(2).summary().constant_columns == (
            "observations: 40 of 40 entries",
        )

    def test_to_minari(self, assert_same: Any) -> None:
        pytest.importorskip("h5py")
        if pytest.importorskip("minari").__version__ == "0.5.3":
            pytest.skip("Minari 0.5.3 makes JPEGs of bytes")
        dataset = filmed(pixels(4, 5)).stack_frames(3)
        to_minari(dataset, "made/film-v0")
        assert_same(from_minari("made/film-v0"), dataset)

    def test_to_d3rlpy_asks_for_single_frames(self) -> None:
        pytest.importorskip("cql_plugins.d3rlpy", exc_type=ImportError)
        with pytest.raises(DatasetError, match=r"expected single frames.*FrameStackTransitionPicker\(3\)"):
            to_d3rlpy(filmed(pixels(1, 4, 5)).stack_frames(3))

    def test_constructor_keeps_stacks(self) -> None:
        stacks = filmed(pixels(4, 5)).stack_frames(3).observations
        assert filmed(stacks).observations.frames.base is not None
        assert np.asarray(filmed(stacks).observations)[:, :, 0, 0].tolist() == ZERO


class TestDict:
    def rooms(self) -> OfflineDataset:
        space = {"eye": spaces.Box(0, 255, (4, 5, 1), np.uint8), "room": spaces.Discrete(9), "x": spaces.Box(0, 9, (2,))}
        observations = {"eye": pixels(4, 5, 1), "room": np.arange(7), "x": np.ones((7, 2), np.float32)}
        return filmed(observations, observation_space=spaces.Dict(space), name="rooms")

    def test_images_alone(self) -> None:
        stacked = self.rooms().stack_frames(3)
        assert stacked.observations["eye"][:, 0, 0].tolist() == ZERO
        assert stacked.observations["room"].tolist() == list(range(7))
        assert stacked.observation_space["eye"].shape == (4, 5, 3)
        assert stacked.observation_space["x"].shape == (2,)

    def test_chosen_keys(self) -> None:
        stacked = self.rooms().stack_frames(2, keys=["x"])
        assert stacked.observations["x"][0].tolist() == [0, 0, 1, 1]
        assert isinstance(stacked.observations["eye"], np.ndarray)

    @pytest.mark.parametrize("keys", [["nose"], []])
    def test_other_keys(self, keys: list[str]) -> None:
        with pytest.raises(
            DatasetError, match=r"rooms, field 'observations': expected keys of \['eye', 'room', 'x'\] to stack"
        ):
            self.rooms().stack_frames(2, keys=keys)

    def test_refused(self) -> None:
        with pytest.raises(DatasetError, match=r"field 'observations.room': expected frames of a Box space"):
            self.rooms().stack_frames(2, keys=["room"])
        with pytest.raises(DatasetError, match="expected no keys"):
            filmed(pixels(4, 5)).stack_frames(2, keys=["eye"])
        with pytest.raises(DatasetError, match="film, field 'observations': expected single frames, got stacks of 2"):
            filmed(pixels(4, 5)).stack_frames(2).stack_frames(2)
        with pytest.raises(ValueError, match="k=0"):
            filmed(pixels(4, 5)).stack_frames(0)


class TestUnstack:
    @pytest.mark.parametrize("padding", ["zero", "reset"])
    @pytest.mark.parametrize("frame", [(4, 5, 1), (1, 4, 5)])
    def test_there_and_back(self, frame: tuple[int, ...], padding: Any, assert_same: Any) -> None:
        stacked = filmed(pixels(*frame)).stack_frames(3, padding)
        plain = filmed(np.asarray(stacked.observations))
        again = plain.unstack_frames(3)
        assert_same(again, plain)
        assert again.observations.nbytes == 7 * 20 + 2 * 2 * 20
        assert plain.observations.nbytes == 3 * 7 * 20

    def test_first_stack_may_be_anything(self) -> None:
        stacks = np.asarray(filmed(pixels(4, 5)).stack_frames(3).observations).copy()
        stacks[4:, 0] = stacks[4:, 1] = 77
        stacks[6, 1] = 12
        stacks[5, 1] = 11
        stacks[6, 0] = 11
        assert np.asarray(filmed(stacks).unstack_frames(3).observations)[4:, :, 0, 0].tolist() == [
            [77, 77, 11],
            [77, 11, 12],
            [11, 12, 13],
        ]

    def test_a_pixel_that_does_not_continue(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stacks = np.asarray(filmed(pixels(4, 5)).stack_frames(3).observations).copy()
        stacks[5, 0, 3, 4] += 1
        for block_bytes in (1, 10**6):
            monkeypatch.setattr("cql_plugins.adapters._tree.BLOCK_BYTES", block_bytes)
            with pytest.raises(DatasetError, match="film, field 'observations', row 5: expected a stack of 3 frames that"):
                filmed(stacks).unstack_frames(3)

    @pytest.mark.parametrize(("frame", "k"), [((7, 7, 3), 3), ((7, 7, 3), 4), ((3, 6, 7), 4), ((5, 5, 3), 2)])
    def test_stacks_with_more_channels_than_pixels_a_side(self, frame: tuple[int, ...], k: int, assert_same: Any) -> None:
        stacked = filmed(pixels(*frame)).stack_frames(k)
        plain = filmed(np.asarray(stacked.observations))
        again = plain.unstack_frames(k)
        assert_same(again, plain)
        assert again.observations.nbytes < plain.observations.nbytes

    def test_refused(self) -> None:
        with pytest.raises(DatasetError, match=r"expected a multiple of 2 channels, got shape \(3, 4, 5\)"):
            filmed(np.asarray(filmed(pixels(4, 5)).stack_frames(3).observations)).unstack_frames(2)
        with pytest.raises(DatasetError, match="expected stacks of 3 frames as an array"):
            filmed(pixels(4, 5)).stack_frames(3).unstack_frames(3)
        with pytest.raises(ValueError, match="k=1"):
            filmed(pixels(4, 5)).unstack_frames(1)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 4), st.data())
def test_any_rows_of_any_layout(lengths: list[int], k: int, data: st.DataObject) -> None:
    """Against stacks made frame by frame."""
    n_steps = sum(lengths)
    ends = np.isin(np.arange(n_steps), np.cumsum(lengths) - 1)
    frames = np.random.default_rng(0).integers(1, 256, (n_steps + len(lengths), 2), dtype=np.uint8)
    expected, row = [], 0
    for length in lengths:
        queue = [np.zeros(2, np.uint8)] * k
        for _ in range(length + 1):
            queue = [*queue[1:], frames[row]]
            expected.append(np.concatenate(queue))
            row += 1
    dataset = OfflineDataset(
        frames,
        np.zeros(n_steps, np.int64),
        np.zeros(n_steps),
        ends,
        np.zeros(n_steps, bool),
        observation_space=spaces.Box(0, 255, (2,), np.uint8),
        action_space=spaces.Discrete(1),
    ).stack_frames(k)
    np.testing.assert_array_equal(dataset.observations, expected)
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=5))
    joined = OfflineDataset.concatenate([dataset[chosen], dataset[chosen[0] : chosen[0] + 1]])
    parts = [np.asarray(dataset[i].observations) for i in [*chosen, chosen[0]]]
    np.testing.assert_array_equal(joined.observations, np.concatenate(parts))
