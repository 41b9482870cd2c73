from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from cql_plugins.adapters import DatasetError, OfflineDataset, from_arrays


class TestArrays:
    def test_counts(self, golden: OfflineDataset) -> None:
        assert len(golden) == 5
        assert golden.n_episodes == 2
        assert golden.offsets.tolist() == [0, 3, 5]
        assert golden.episode_lengths.tolist() == [3, 2]
        assert golden.episode_returns.tolist() == [7.0, 24.0]
        assert repr(golden) == "OfflineDataset('golden', 2 episodes, 5 transitions)"

    def test_every_transition(self, golden: OfflineDataset) -> None:
        transitions = golden.transitions(np.arange(5))
        assert transitions.observations.tolist() == [[0, 0], [1, 10], [2, 20], [100, 5], [101, 6]]
        assert transitions.next_observations.tolist() == [[1, 10], [2, 20], [3, 30], [101, 6], [102, 7]]
        assert transitions.actions[:, 0].tolist() == pytest.approx([0.1, 0.2, 0.3, -0.4, -0.5])
        assert transitions.rewards.tolist() == [1, 2, 4, 8, 16]
        assert transitions.terminations.tolist() == [False, False, True, False, False]
        assert transitions.truncations.tolist() == [False, False, False, False, True]

    def test_transitions_in_any_order(self, golden: OfflineDataset) -> None:
        assert golden.transitions([3, 0]).next_observations.tolist() == [[101, 6], [1, 10]]

    @pytest.mark.parametrize("rows", [[5], [-1]])
    def test_transition_out_of_range(self, golden: OfflineDataset, rows: list[int]) -> None:
        with pytest.raises(IndexError, match=r"\[0, 5\)"):
            golden.transitions(rows)

    def test_episode_is_views(self, golden: OfflineDataset) -> None:
        episode = golden[1]
        assert episode.observations.tolist() == [[100, 5], [101, 6], [102, 7]]
        assert episode.next_observations.tolist() == [[101, 6], [102, 7]]
        assert np.shares_memory(episode.next_observations, golden.observations)
        assert np.shares_memory(episode.actions, golden.actions)
        assert (episode.terminated, episode.truncated) == (False, True)
        assert (len(episode), episode.total_reward) == (2, 24.0)

    @pytest.mark.parametrize("field", ["observations", "actions", "rewards", "terminations", "truncations", "offsets"])
    def test_immutable(self, golden: OfflineDataset, field: str) -> None:
        array = getattr(golden, field)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
        with pytest.raises(AttributeError):
            setattr(golden, field, array)

    def test_arguments_are_copied(self, arguments: dict[str, Any]) -> None:
        dataset = OfflineDataset(**arguments)
        for field in ("observations", "actions", "rewards", "terminations", "truncations"):
            assert not np.shares_memory(arguments[field], getattr(dataset, field))
            arguments[field][:] = 0  # still the caller's own
        assert dataset.rewards.tolist() == [1, 2, 4, 8, 16]

    def test_dict_of_observations_cannot_be_extended(self) -> None:
        dataset = _nested()
        dataset.observations["more"] = 1
        assert set(dataset.observations) == {"image", "state"}

    def test_survives_pickle_and_deepcopy(self, golden: OfflineDataset, assert_same: Any) -> None:
        assert_same(pickle.loads(pickle.dumps(golden)), golden)
        assert_same(copy.deepcopy(golden), golden)
        assert not pickle.loads(pickle.dumps(golden)).rewards.flags.writeable


class TestEpisodes:
    def test_iterates_over_episodes(self, golden: OfflineDataset) -> None:
        assert [len(episode) for episode in golden] == [3, 2]

    def test_index_from_the_end(self, golden: OfflineDataset) -> None:
        assert golden[-1].rewards.tolist() == golden[np.int64(1)].rewards.tolist() == [8, 16]

    @pytest.mark.parametrize("index", [2, -3])
    def test_index_out_of_range(self, golden: OfflineDataset, index: int) -> None:
        with pytest.raises(IndexError, match="2 episodes"):
            golden[index]

    def test_slice_shares_memory(self, golden: OfflineDataset) -> None:
        second = golden[1:]
        assert second.observations.tolist() == [[100, 5], [101, 6], [102, 7]]
        assert second.offsets.tolist() == [0, 2]
        assert np.shares_memory(second.observations, golden.observations)

    @pytest.mark.parametrize("index", [slice(None, None, -1), [1, 0]])
    def test_reordered(self, golden: OfflineDataset, index: Any) -> None:
        turned = golden[index]
        assert turned.rewards.tolist() == [8, 16, 1, 2, 4]
        assert turned.observations[:, 0].tolist() == [100, 101, 102, 0, 1, 2, 3]
        assert not np.shares_memory(turned.observations, golden.observations)

    def test_mask(self, golden: OfflineDataset) -> None:
        assert golden[golden.episode_returns > 10].rewards.tolist() == [8, 16]

    def test_filter(self, golden: OfflineDataset) -> None:
        assert golden.filter(lambda episode: episode.terminated).rewards.tolist() == [1, 2, 4]

    @pytest.mark.parametrize("choose", [lambda d: d.filter(lambda episode: False), lambda d: d[5:], lambda d: d[0:0]])
    def test_nothing_left(self, golden: OfflineDataset, choose: Any) -> None:
        with pytest.raises(DatasetError, match="golden: expected at least one episode, got none of 2"):
            choose(golden)


class TestConcatenate:
    def test_parts_make_the_whole(self, golden: OfflineDataset, assert_same: Any) -> None:
        assert_same(golden[:1] + golden[1:], golden)
        joined = OfflineDataset.concatenate([golden[1:], golden[:1]])
        assert joined.rewards.tolist() == [8, 16, 1, 2, 4]  # the twin: order matters
        assert joined.name == "golden"

    def test_dict(self, assert_same: Any) -> None:
        nested = _nested()
        assert_same((nested + nested)[:1], nested)
        assert len(nested + nested) == 2 * len(nested)

    def test_another_order_of_keys(self, golden: OfflineDataset, arguments: dict[str, Any]) -> None:
        box, rows = arguments["observation_space"], arguments["observations"]

        def part(keys: str) -> OfflineDataset:
            columns = {"a": rows.astype(np.float32), "b": rows.astype(np.float64)}
            dtypes = {key: spaces.Box(-np.inf, np.inf, box.shape, columns[key].dtype.type) for key in keys}
            changes = {
                "observations": {key: columns[key] for key in keys},
                "observation_space": spaces.Dict(list(dtypes.items())),
            }
            return OfflineDataset(**arguments | changes)

        joined = part("ab") + part("ba")
        assert list(joined.observations) == list(part("ab").observations)
        for key, column in joined.observations.items():
            np.testing.assert_array_equal(column, np.concatenate([rows, rows]), err_msg=key)

    def test_references_that_differ_are_none(self, arguments: dict[str, Any]) -> None:
        known = {"name": None, "env_id": "Hopper-v5"}
        first, second = (OfflineDataset(**arguments | known | {"references": (0.0, top)}) for top in (10.0, 20.0))
        table = OfflineDataset(**arguments | known)
        assert table.references is not None
        assert (first + first).references == (0.0, 10.0)
        assert (table + table).references == table.references
        for joined in (first + second, first + table):
            assert joined.references is None
            assert joined[:1].references is None
            assert joined.scale_rewards(2.0).references is None

    def test_nothing(self) -> None:
        with pytest.raises(DatasetError, match="at least one"):
            OfflineDataset.concatenate([])

    def test_not_a_dataset(self, golden: OfflineDataset) -> None:
        with pytest.raises(TypeError):
            golden + 1  # type: ignore[operator]

    def test_other_space(self, golden: OfflineDataset, arguments: dict[str, Any]) -> None:
        other = OfflineDataset(**arguments | {"action_space": spaces.Box(-2.0, 2.0, (1,), np.float32)})
        with pytest.raises(DatasetError, match=r"action_space.*-1\.0, 1\.0.*-2\.0, 2\.0"):
            golden + other

    def test_other_dtype(self, golden: OfflineDataset, arguments: dict[str, Any]) -> None:
        other = OfflineDataset(**arguments | {"actions": arguments["actions"].astype(np.float64)})
        with pytest.raises(DatasetError, match="one dtype"):
            golden + other

    def test_inferred_spaces_widen(self, steps: dict[str, Any], quietly: Any) -> None:
        del steps["observation_space"], steps["action_space"]
        small = quietly(from_arrays, **steps)
        large = quietly(from_arrays, **steps | {"actions": 3 * steps["actions"]})
        joined = small + large
        assert joined.action_space.low.tolist() == pytest.approx([-1.5])
        assert joined.inferred_spaces == {"observation_space", "action_space"}

    def test_given_space_wins(self, golden: OfflineDataset, steps: dict[str, Any], quietly: Any) -> None:
        del steps["action_space"]
        joined = quietly(from_arrays, **steps | {"actions": 3 * steps["actions"]}) + golden
        assert joined.action_space == golden.action_space
        assert joined.inferred_spaces == frozenset()

    def test_discrete_spaces(self, steps: dict[str, Any], quietly: Any) -> None:
        del steps["action_space"]
        few = quietly(from_arrays, **steps | {"actions": np.array([0, 1, 0, 1, 0])})
        many = quietly(from_arrays, **steps | {"actions": np.array([0, 1, 3, 1, 0])})
        assert (few + many).action_space == spaces.Discrete(4)
        given_two = from_arrays(**steps | {"actions": few.actions, "action_space": spaces.Discrete(2)})
        with pytest.raises(DatasetError, match="can be joined"):
            given_two + many


class TestReturns:
    def test_scale_rewards(self, golden: OfflineDataset) -> None:
        scaled = golden.scale_rewards(10.0, -5.0)
        assert scaled.rewards.tolist() == [5, 15, 35, 75, 155]
        assert golden.rewards.tolist() == [1, 2, 4, 8, 16]
        assert np.shares_memory(scaled.observations, golden.observations)
        assert scaled.scale_rewards(shift=1.0).rewards.tolist() == [6, 16, 36, 76, 156]

    def test_scale_keeps_dtype(self, arguments: dict[str, Any]) -> None:
        single = OfflineDataset(**arguments | {"rewards": arguments["rewards"].astype(np.float32)})
        assert single.scale_rewards(0.1, 0.2).rewards.dtype == np.float32

    @pytest.mark.parametrize(("scale", "shift"), [(0.0, 1.0), (np.nan, 0.0), (1.0, np.inf)])
    def test_scale_refused(self, golden: OfflineDataset, scale: float, shift: float) -> None:
        with pytest.raises(ValueError, match="finite"):
            golden.scale_rewards(scale, shift)

    def test_returns_to_go(self, golden: OfflineDataset) -> None:
        assert golden.returns_to_go(0.5).tolist() == [3, 4, 4, 16, 16]
        assert golden.returns_to_go(0.5, "none").tolist() == [3, 4, 4, -np.inf, -np.inf]
        assert golden.returns_to_go(0.5, "bootstrap", tail_values=[100.0]).tolist() == [3, 4, 4, 41, 66]
        assert golden.scale_rewards(1.0, -20.0).returns_to_go(0.5).tolist() == [-32, -26, -16, -14, -4]

    def test_returns_to_go_twin_with_other_flags(self, arguments: dict[str, Any]) -> None:
        flags = {"terminations": arguments["truncations"], "truncations": arguments["terminations"]}
        twin = OfflineDataset(**arguments | flags)
        assert twin.returns_to_go(0.5, "none").tolist() == [-np.inf, -np.inf, -np.inf, 16, 16]

    def test_sparse_tail(self, arguments: dict[str, Any]) -> None:
        failed = OfflineDataset(**arguments | {"rewards": np.array([-5.0, -5.0, 5.0, -5.0, -5.0])})
        expected = [-5 + 0.99 * (-5 + 0.99 * 5), -5 + 0.99 * 5, 5, -500, -500]
        np.testing.assert_allclose(failed.returns_to_go(0.99, "sparse"), expected, rtol=1e-6)

    def test_returns_are_computed_once(self, golden: OfflineDataset) -> None:
        returns = golden.returns_to_go(0.9)
        assert golden.returns_to_go(0.9) is returns
        assert golden.returns_to_go(0.8) is not returns
        assert golden.returns_to_go(0.9, "none") is not returns
        with pytest.raises(ValueError, match="read-only"):
            returns[0] = 0
        assert golden.scale_rewards(2.0).returns_to_go(0.9)[0] == pytest.approx(2 * returns[0])

    def test_normalized_score(self, arguments: dict[str, Any]) -> None:
        dataset = OfflineDataset(**arguments | {"references": (-1.0, 9.0)})
        assert dataset.normalized_score().tolist() == [80.0, 250.0]
        assert dataset.normalized_score(4.0) == 50.0
        assert dataset.normalized_score([-1.0, 9.0]).tolist() == [0.0, 100.0]

    def test_score_is_that_of_the_original_rewards(self, arguments: dict[str, Any]) -> None:
        dataset = OfflineDataset(**arguments | {"references": (-1.0, 9.0)})
        scaled = dataset.scale_rewards(10.0, -5.0).scale_rewards(2.0, 3.0)
        np.testing.assert_allclose(scaled.normalized_score(), [80.0, 250.0], rtol=1e-12)
        with pytest.raises(DatasetError, match="differently scaled"):
            (dataset + scaled).normalized_score()

    def test_references_by_name_then_environment(self, arguments: dict[str, Any]) -> None:
        assert OfflineDataset(**arguments | {"name": "hopper-medium-v2"}).references == (-20.272305, 3234.3)
        assert OfflineDataset(**arguments | {"env_id": "Ant-v5"}).references == (-325.6, 3879.7)

    def test_no_references(self, golden: OfflineDataset) -> None:
        with pytest.raises(DatasetError, match="no reference returns are known for name 'golden'"):
            golden.normalized_score()


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rewards": np.array([1.0, 2, np.nan, 8, 16])}, "golden, field 'rewards', row 2: expected finite.*got nan"),
            ({"actions": np.full((5, 1), np.inf)}, "field 'actions', row 0: expected finite values, got inf in column 0"),
            ({"actions": np.zeros((4, 1))}, "field 'actions': expected 5 rows, got 4"),
            ({"actions": np.zeros(5)}, r"field 'actions': expected rank 2 .* got shape \(5,\)"),
            ({"actions": np.zeros((5, 2))}, r"field 'actions': expected rows of shape \(1,\)"),
            ({"actions": np.zeros((5, 1), dtype=np.int64)}, "field 'actions': expected floating point"),
            ({"observations": np.zeros((5, 2))}, "field 'observations': expected 7 rows, got 5"),
            ({"observations": {"a": np.zeros((7, 2))}}, r"field 'observations': expected an array .* mapping with \['a'\]"),
            ({"rewards": np.zeros((5, 1))}, "field 'rewards': expected rank 1"),
            ({"rewards": np.array(["a"] * 5)}, "field 'rewards': expected numbers"),
            ({"rewards": {}}, "field 'rewards': expected a vector"),
            ({"terminations": np.zeros(4)}, "field 'terminations': expected 5 rows, got 4"),
            ({"terminations": np.array([0, 0, 2, 0, 0])}, "field 'terminations', row 2: expected 0 or 1, got 2"),
            ({"terminations": np.zeros((5, 1))}, "field 'terminations': expected rank 1"),
            ({"terminations": np.array(list("abcde"))}, "field 'terminations': expected booleans"),
            ({"terminations": {}}, "field 'terminations': expected a vector"),
            ({"truncations": np.array([0, 0, 1, 0, 1])}, "field 'truncations', row 2: expected at most one of"),
            ({"truncations": np.zeros(5)}, "field 'truncations': expected the last of 5 rows to be"),
            ({"observation_space": spaces.Tuple([spaces.Discrete(2)])}, "field 'observations': expected a space of type"),
            ({"action_space": spaces.MultiBinary(2)}, "field 'actions': expected a space of type Box or Discrete"),
            ({"action_space": spaces.Dict({})}, "field 'actions': expected a space of type Box or Discrete"),
        ],
    )
    def test_one_clear_error(self, arguments: dict[str, Any], changes: dict[str, Any], message: str) -> None:
        with pytest.raises(DatasetError, match=message):
            OfflineDataset(**arguments | changes)

    def test_dict_keys(self) -> None:
        space = spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Discrete(2)})
        rest = {
            "actions": np.array([0]),
            "rewards": [1.0],
            "terminations": [True],
            "truncations": [False],
            "observation_space": space,
            "action_space": spaces.Discrete(1),
        }
        with pytest.raises(DatasetError, match=r"expected keys \['a', 'b'\], got \['a'\]"):
            OfflineDataset({"a": np.array([0, 1])}, **rest)
        with pytest.raises(DatasetError, match=r"field 'observations.b', row 1: expected integers in \[0, 1\].*got 2"):
            OfflineDataset({"a": np.array([0, 1]), "b": np.array([0, 2])}, **rest)
        with pytest.raises(DatasetError, match="field 'observations': expected a mapping"):
            OfflineDataset(np.array([0, 1]), **rest)


def _nested() -> OfflineDataset:
    space = spaces.Dict(
        {
            "state": spaces.Dict({"room": spaces.Discrete(4), "speed": spaces.Box(-9, 9, (1,), np.float64)}),
            "image": spaces.Box(0, 255, (4, 4, 3), np.uint8),
        }
    )
    image = np.arange(3 * 48, dtype=np.uint8).reshape(3, 4, 4, 3)
    return OfflineDataset(
        {"image": image, "state": {"speed": np.array([[1.0], [2.0], [3.0]]), "room": np.array([0, 3, 1])}},
        np.array([1, 0]),
        [0.0, 1.0],
        [False, False],
        [False, True],
        observation_space=space,
        action_space=spaces.Discrete(2),
    )


def test_nested_dict_keeps_dtypes() -> None:
    episode = _nested()[0]
    assert episode.next_observations["state"]["room"].tolist() == [3, 1]
    assert episode.observations["image"].dtype == np.uint8
    assert episode.observations["state"]["speed"].dtype == np.float64
    assert np.shares_memory(episode.next_observations["image"], episode.observations["image"])


@st.composite
def flagged_steps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    kinds = draw(st.lists(st.sampled_from("..tx"), min_size=1, max_size=60))
    kinds[-1] = draw(st.sampled_from("tx"))
    return np.array([kind == "t" for kind in kinds]), np.array([kind == "x" for kind in kinds])


@settings(deadline=None, max_examples=80)
@given(flagged_steps(), st.data())
def test_any_layout_keeps_every_transition(flags: tuple[np.ndarray, np.ndarray], data: st.DataObject) -> None:
    """Each step gets a unique observation, and the last of an episode a next one of its own."""
    terminations, truncations = flags
    n_steps = len(terminations)
    observations = np.arange(n_steps, dtype=np.float64)[:, None]
    ends = terminations | truncations
    following = np.where(ends[:, None], observations + 0.5, observations + 1)
    dataset = from_arrays(
        observations,
        -observations,
        observations[:, 0],
        terminations,
        truncations,
        next_observations=following,
        observation_space=spaces.Box(-np.inf, np.inf, (1,), np.float64),
        action_space=spaces.Box(-np.inf, np.inf, (1,), np.float64),
    )
    everything = dataset.transitions(np.arange(n_steps))
    np.testing.assert_array_equal(everything.observations, observations)
    np.testing.assert_array_equal(everything.next_observations, following)
    np.testing.assert_array_equal(dataset.truncations, truncations)
    chosen = data.draw(st.lists(st.integers(0, dataset.n_episodes - 1), min_size=1, max_size=8))
    part = dataset[chosen]
    for episode, index in zip(part, chosen, strict=True):
        np.testing.assert_array_equal(episode.observations, dataset[index].observations)
        np.testing.assert_array_equal(episode.rewards, dataset[index].rewards)
