from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from cql_plugins.adapters import DatasetError, OfflineDataset, from_arrays, from_npz

FIELDS = ("observations", "actions", "rewards", "terminations", "truncations")


class TestFromArrays:
    def test_with_next_observations(self, steps: dict[str, Any], golden: OfflineDataset, assert_same: Any) -> None:
        dataset = from_arrays(**steps)
        assert_same(dataset, golden)
        assert not any(np.shares_memory(steps[field], getattr(dataset, field)) for field in FIELDS)
        assert steps["rewards"].flags.writeable
        assert dataset.inferred_spaces == frozenset()
        assert not dataset.unflagged_episodes.any()

    def test_without_next_observations(self, steps: dict[str, Any]) -> None:
        del steps["next_observations"]
        with pytest.warns(UserWarning, match=r"golden: 1 transition\(s\) at the end of truncated episodes were dropped") as w:
            dataset = from_arrays(**steps)
        assert Path(w[0].filename) == Path(__file__)
        assert dataset.observations.tolist() == [[0, 0], [1, 10], [2, 20], [2, 20], [100, 5], [101, 6]]
        assert dataset.rewards.tolist() == [1, 2, 4, 8]
        assert dataset.terminations.tolist() == [False, False, True, False]
        assert dataset.truncations.tolist() == [False, False, False, True]
        assert dataset.actions[:, 0].tolist() == pytest.approx([0.1, 0.2, 0.3, -0.4])

    def test_truncated_episode_of_one_step_vanishes(self, steps: dict[str, Any]) -> None:
        del steps["next_observations"]
        steps["truncations"] = np.array([False, False, False, True, True])
        with pytest.warns(UserWarning, match="2 transition"):
            dataset = from_arrays(**steps)
        assert dataset.n_episodes == 1
        assert dataset.observations.tolist() == [[0, 0], [1, 10], [2, 20], [2, 20]]

    def test_nothing_usable(self, steps: dict[str, Any]) -> None:
        del steps["next_observations"]
        steps["terminations"][:] = False
        steps["truncations"][:] = True
        with pytest.raises(DatasetError, match="at least one transition whose next observation is known"):
            from_arrays(**steps)

    def test_last_episode_without_flag(self, steps: dict[str, Any], golden: OfflineDataset, assert_same: Any) -> None:
        steps["truncations"][-1] = False
        with pytest.warns(UserWarning, match=r"1 episode\(s\) end with the record and no flag"):
            dataset = from_arrays(**steps)
        assert_same(dataset, golden)
        assert dataset.unflagged_episodes.tolist() == [False, True]

    def test_break_inside_an_episode(self, steps: dict[str, Any]) -> None:
        steps["next_observations"][0] = [7, 7]
        with pytest.warns(UserWarning, match=r"1 step\(s\) without a flag are followed by"):
            dataset = from_arrays(**steps)
        assert dataset.offsets.tolist() == [0, 1, 3, 5]
        assert dataset.truncations.tolist() == [True, False, False, False, True]
        assert dataset[0].observations.tolist() == [[0, 0], [7, 7]]
        assert dataset[1].observations.tolist() == [[1, 10], [2, 20], [3, 30]]
        assert dataset.unflagged_episodes.tolist() == [True, False, False]

    @pytest.mark.parametrize(("before", "after"), [(np.float32, np.float64), (np.float64, np.float32)])
    def test_observations_of_two_widths(self, steps: dict[str, Any], before: type, after: type) -> None:
        for field, dtype in {"observations": before, "next_observations": after}.items():
            steps[field] = (steps[field].astype(np.float64) / 7).astype(dtype)  # sevenths differ by width
        steps["observation_space"] = spaces.Box(-np.inf, np.inf, (2,), before)
        dataset = from_arrays(**steps)
        assert dataset.offsets.tolist() == [0, 3, 5]
        assert dataset.observations.dtype == before
        steps["next_observations"][0] += 1e-3
        with pytest.warns(UserWarning, match=r"1 step\(s\) without a flag are followed by"):
            assert from_arrays(**steps).offsets.tolist() == [0, 1, 3, 5]

    def test_a_last_observation_too_large_for_the_others_type(self, steps: dict[str, Any]) -> None:
        steps["next_observations"] = steps["next_observations"].astype(np.float64)
        steps["next_observations"][2] = 1e300
        with pytest.raises(DatasetError, match=r"'next_observations': expected values that float32 can hold"):
            from_arrays(**steps)
        steps |= {"observations": np.array([0, 1, 2, 0, 1], np.int8), "observation_space": spaces.Discrete(500)}
        with pytest.raises(DatasetError, match=r"'next_observations': expected values that int8 can hold"):
            from_arrays(**steps | {"next_observations": np.array([1, 2, 300, 1, 2])})
        assert from_arrays(**steps | {"next_observations": np.array([1, 2, 100, 1, 2])}).observations.tolist()[3] == 100

    def test_integers_of_two_widths(self, steps: dict[str, Any]) -> None:
        steps |= {"observations": np.array([0, 300, 44, 0, 1]), "observation_space": spaces.Discrete(500)}
        with pytest.warns(UserWarning, match=r"1 step\(s\) without a flag are followed by"):
            dataset = from_arrays(**steps | {"next_observations": np.array([44, 44, 44, 1, 2], np.uint8)})
        assert dataset.offsets.tolist() == [0, 1, 3, 5], "44 is 300 to eight bits"

    def test_both_flags(self, steps: dict[str, Any], golden: OfflineDataset, assert_same: Any) -> None:
        steps["truncations"][2] = True
        with pytest.raises(DatasetError, match=r"'truncations', row 2: expected at most one.*prefer_termination=True"):
            from_arrays(**steps)
        assert_same(from_arrays(**steps, prefer_termination=True), golden)

    def test_nested_dict(self, steps: dict[str, Any]) -> None:
        steps["observation_space"] = spaces.Dict({"b": spaces.Dict({"c": steps["observation_space"]}), "a": spaces.Discrete(9)})
        rooms = np.array([1, 2, 3, 5, 6])
        steps["observations"] = {"b": {"c": steps["observations"]}, "a": rooms}
        steps["next_observations"] = {"a": rooms + 1, "b": {"c": steps["next_observations"]}}
        dataset = from_arrays(**steps)
        assert dataset.observations["a"].tolist() == [1, 2, 3, 4, 5, 6, 7]
        assert dataset[1].next_observations["b"]["c"].tolist() == [[101, 6], [102, 7]]

    def test_integers_as_rewards(self, steps: dict[str, Any]) -> None:
        assert from_arrays(**steps | {"rewards": [1, 2, 4, 8, 16]}).rewards.dtype == np.float64

    def test_lists(self, steps: dict[str, Any]) -> None:
        for field in ("rewards", "terminations", "truncations"):
            steps[field] = steps[field].tolist()
        assert len(from_arrays(**steps)) == 5


class TestInference:
    @pytest.mark.parametrize(
        ("actions", "space"),
        [
            (np.zeros((5, 3), np.float64), spaces.Box(-1.0, 1.0, (3,), np.float64)),
            (np.array([[0], [1], [2], [0], [-3]], np.float32), spaces.Box(-3.0, 2.0, (1,), np.float32)),
            (np.array([0, 1, 4, 1, 0]), spaces.Discrete(5)),
        ],
    )
    def test_actions(self, steps: dict[str, Any], actions: np.ndarray, space: spaces.Space[Any]) -> None:
        del steps["action_space"]
        with pytest.warns(UserWarning, match="golden: inferred from the values: action_space"):
            dataset = from_arrays(**steps | {"actions": actions})
        assert dataset.action_space == space
        assert dataset.inferred_spaces == {"action_space"}

    @pytest.mark.parametrize(
        ("observations", "space"),
        [
            (np.zeros((5, 2, 2)), spaces.Box(-np.inf, np.inf, (2, 2), np.float64)),
            (np.zeros((5, 8, 8, 3), np.uint8), spaces.Box(0, 255, (8, 8, 3), np.uint8)),
            (np.array([0, 1, 4, 1, 0]), spaces.Discrete(5)),
            ({"x": np.array([0, 1, 0, 0, 0])}, spaces.Dict({"x": spaces.Discrete(2)})),
        ],
    )
    def test_observations(self, steps: dict[str, Any], observations: Any, space: spaces.Space[Any]) -> None:
        del steps["observation_space"], steps["next_observations"]
        with pytest.warns(UserWarning, match="inferred from the values: observation_space"):
            dataset = from_arrays(**steps | {"observations": observations})
        assert dataset.observation_space == space

    def test_rooms_that_only_come_last(self, steps: dict[str, Any]) -> None:
        del steps["observation_space"]
        rooms = np.array([0, 1, 2, 0, 1])
        with pytest.warns(UserWarning, match="inferred from the values: observation_space"):
            dataset = from_arrays(**steps | {"observations": rooms, "next_observations": np.array([1, 2, 3, 1, 4])})
        assert dataset.observation_space == spaces.Discrete(5)
        with pytest.warns(UserWarning, match="inferred from the values: observation_space"):
            dataset = from_arrays(
                **steps | {"observations": {"x": rooms}, "next_observations": {"x": np.array([1, 2, 3, 1, 4])}}
            )
        assert dataset.observation_space == spaces.Dict({"x": spaces.Discrete(5)})
        for wrong in (np.array([1, 2, -3, 1, 4]), np.array([1.0, 2, 3, 1, 4])):
            with pytest.raises(DatasetError, match="field 'next_observations'"):
                from_arrays(**steps | {"observations": rooms, "next_observations": wrong})

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"actions": np.zeros(5)}, "field 'actions': expected floats of rank 2 .* pass action_space"),
            ({"actions": np.zeros((5, 2), int)}, "field 'actions': expected floats of rank 2"),
            ({"actions": np.array([0, 0, -1, 0, 0])}, "field 'actions', row 2: expected integers from 0 on, got -1"),
            ({"actions": np.full((5, 1), np.nan)}, "field 'actions', row 0: expected finite"),
            ({"observations": np.zeros(5)}, "field 'observations': expected floats of rank 2 .* pass observation_space"),
            ({"observations": {}}, "field 'observations': expected at least one key"),
            ({"observations": np.array([], int)}, "field 'observations': expected at least one row"),
            ({"observations": np.zeros((5, 1), bool)}, "field 'observations': expected floats"),
        ],
    )
    def test_refused(self, steps: dict[str, Any], changes: dict[str, Any], message: str) -> None:
        del steps["observation_space"], steps["action_space"], steps["next_observations"]
        with pytest.raises(DatasetError, match=message):
            from_arrays(**steps | changes)

    @pytest.mark.parametrize("dtype", [">u2", ">i4", ">f8"])
    def test_bytes_in_the_other_order(self, steps: dict[str, Any], quietly: Any, dtype: str) -> None:
        """Files from other machines: the same numbers, in this machine's order."""
        for field in ("observations", "next_observations"):
            steps[field] = steps[field].astype(dtype)
        dataset = quietly(from_arrays, **steps | {"observation_space": None})
        assert dataset.observations.dtype == dataset.observation_space.dtype == np.dtype(dtype).newbyteorder("=")
        assert dataset.observations[:, 0].tolist() == [0, 1, 2, 3, 100, 101, 102]


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rewards": []}, "golden, field 'rewards': expected at least one step, got an empty episode"),
            ({"observations": np.full((5, 2), np.nan, np.float32)}, "'observations', row 0: expected finite"),
            ({"next_observations": np.zeros((4, 2), np.float32)}, "'next_observations': expected 5 rows, got 4"),
            ({"next_observations": np.full((5, 2), np.inf)}, "'next_observations', row 0: expected finite"),
            ({"observations": np.zeros((5, 2, 1))}, "'observations': expected rank 2"),
            ({"actions": np.array([[0], [0], [0], [0], ["a"]])}, "'actions': expected floating point"),
            ({"terminations": np.zeros(6, bool)}, "'terminations': expected 5 rows, got 6"),
        ],
    )
    def test_one_clear_error(self, steps: dict[str, Any], changes: dict[str, Any], message: str) -> None:
        with pytest.raises(DatasetError, match=message):
            from_arrays(**steps | changes)

    def test_row_far_down(self) -> None:
        """The row counts from the start of the array, not of the block that is looked at."""
        observations = np.zeros((700_000, 4))
        observations[600_001, 2] = np.nan
        with pytest.raises(DatasetError, match=r"row 600001: expected finite values, got nan in column 2") as caught:
            from_arrays(observations, observations[:, :2], np.zeros(700_000), np.zeros(700_000), np.zeros(700_000))
        assert (caught.value.field, caught.value.row) == ("observations", 600_001)

    @pytest.mark.parametrize(("action", "row"), [(-1, 1), (3, 1)])
    def test_discrete_out_of_range(self, steps: dict[str, Any], action: int, row: int) -> None:
        steps |= {"actions": np.array([0, action, 2, 0, 0]), "action_space": spaces.Discrete(3)}
        with pytest.raises(DatasetError, match=rf"'actions', row {row}: expected integers in \[0, 2\].*got {action}"):
            from_arrays(**steps)

    def test_integers_of_another_width(self, steps: dict[str, Any]) -> None:
        del steps["next_observations"]
        steps |= {"observations": np.zeros((5, 2), int), "observation_space": spaces.Box(0, 255, (2,), np.uint8)}
        with pytest.raises(DatasetError, match="'observations': expected dtype uint8"):
            from_arrays(**steps)


class TestNpz:
    def test_same_as_arrays(self, tmp_path: Path, steps: dict[str, Any], assert_same: Any) -> None:
        expected = from_arrays(**steps)
        kept = {key: steps.pop(key) for key in ("observation_space", "action_space")}
        steps.pop("name")
        np.savez_compressed(tmp_path / "door-human.npz", **steps)
        dataset = from_npz(tmp_path / "door-human.npz", **kept)
        assert_same(dataset, expected)
        assert (dataset.name, dataset.references) == ("door-human", (-56.512833, 2880.5693087298737))

    def test_d4rl_names_and_dict(self, tmp_path: Path, steps: dict[str, Any], quietly: Any) -> None:
        path = tmp_path / "data.npz"
        np.savez(
            path,
            **{"observations/x/y": steps["observations"], "observations/z": np.arange(5)},
            actions=steps["actions"],
            rewards=steps["rewards"],
            terminals=steps["terminations"],
            timeouts=steps["truncations"],
        )
        dataset = quietly(from_npz, path)
        assert dataset.observations["x"]["y"].shape == (6, 2)
        assert dataset.observations["z"].tolist() == [0, 1, 2, 2, 3, 4]

    @pytest.mark.parametrize("field", FIELDS)
    def test_missing_key(self, tmp_path: Path, steps: dict[str, Any], field: str) -> None:
        np.savez(tmp_path / "data.npz", **{key: steps[key] for key in FIELDS if key != field})
        with pytest.raises(DatasetError, match=rf"data\.npz, field '{field}': expected this field, got only"):
            from_npz(tmp_path / "data.npz")

    def test_never_unpickles(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> Any:
                return (tmp_path / "sprung").touch, ()

        np.savez(tmp_path / "data.npz", observations=np.array([Trap()], dtype=object))
        with pytest.raises(DatasetError, match=r"data\.npz, field 'observations': expected a plain array"):
            from_npz(tmp_path / "data.npz")
        np.save(tmp_path / "data.npy", np.array([Trap()], dtype=object))
        with pytest.raises(DatasetError, match=r"data\.npy: expected an \.npz file"):
            from_npz(tmp_path / "data.npy")
        assert not (tmp_path / "sprung").exists()

    def test_not_an_archive(self, tmp_path: Path, steps: dict[str, Any]) -> None:
        with pytest.raises(DatasetError, match="there is no such file"):
            from_npz(tmp_path / "absent.npz")
        np.save(tmp_path / "one.npy", np.zeros(3))
        with pytest.raises(DatasetError, match=r"single .npy array"):
            from_npz(tmp_path / "one.npy")
        np.savez(tmp_path / "whole.npz", **{key: steps[key] for key in FIELDS})
        content = (tmp_path / "whole.npz").read_bytes()
        for name, part in {"cut": content[: len(content) // 2], "text": b"hello", "empty": b""}.items():
            (tmp_path / f"{name}.npz").write_bytes(part)
            with pytest.raises(DatasetError, match=rf"{name}\.npz: expected an \.npz file"):
                from_npz(tmp_path / f"{name}.npz")
        damaged = bytearray(content)
        damaged[200:210] = b"\xff" * 10
        (tmp_path / "damaged.npz").write_bytes(bytes(damaged))
        with pytest.raises(DatasetError, match=r"damaged\.npz"):
            from_npz(tmp_path / "damaged.npz")
