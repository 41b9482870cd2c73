"""The search for what is not finite, the way back, and the range of Q: each with the twin that must pass."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch as th

from cql_plugins import _guards
from cql_plugins._guards import DeviceNote, NonFiniteError, QRange, Snapshot

NAN, INF = math.nan, math.inf


class TestDetection:
    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_one_number_in_one_tensor_is_enough(self, bad: float, place: int) -> None:
        tensors = [th.randn(3, 4), th.randn(5), th.tensor(1.0)]
        assert _guards.total_is_finite(tensors)
        tensors[place].view(-1)[-1] = bad
        assert not _guards.total_is_finite(tensors)

    def test_opposite_infinities_do_not_cancel(self) -> None:
        assert not _guards.total_is_finite([th.tensor([INF, -INF]), th.zeros(2)])
        assert not _guards.total_is_finite([th.tensor([INF]), th.tensor([-INF])])

    def test_numbers_whose_sum_overflows_are_found_to_be_well(self) -> None:
        huge = th.full((4,), 3e38)
        assert not _guards.total_is_finite([huge])
        assert _guards.find({"huge": huge}) is None

    @pytest.mark.parametrize(("value", "well"), [(-INF, True), (1.0, True), (INF, False), (NAN, False)])
    def test_an_unknown_return_is_well(self, value: float, well: bool) -> None:
        assert _guards.returns_are_well(th.tensor([[0.0], [value], [-INF]])) is well

    def test_only_floats_can_be_sick(self) -> None:
        kept = _guards.floats([th.zeros(2, dtype=th.uint8), th.zeros(2), th.zeros(0), th.zeros(1, dtype=th.int64)])
        assert [tensor.shape for tensor in kept] == [(2,)]


class TestSearch:
    def test_names_count_kinds_and_rows(self) -> None:
        tensor = th.zeros(6, 2)
        tensor[1, 1], tensor[4, 0], tensor[4, 1] = NAN, INF, -INF
        found = _guards.find({"fine": th.ones(3), "a": tensor, "b": tensor[4]})
        assert found is not None
        assert (found.tensor, found.rows) == ("a", (1, 4))
        assert found.text == "a has 3 of 12 values that are not finite (-inf, inf, nan), and so have b"
        assert _guards.find({"fine": th.ones(3), "counts": th.ones(3, dtype=th.int64)}) is None

    def test_a_scalar_is_its_value(self) -> None:
        found = _guards.find({"critic_loss": th.tensor(INF)})
        assert found == ("critic_loss", "critic_loss is inf", ())

    def test_unknown_returns_are_passed_over_by_name(self) -> None:
        returns = th.tensor([[-INF], [1.0]])
        assert _guards.find({"batch.returns_to_go": returns}, ("batch.returns_to_go",)) is None
        assert _guards.find({"batch.rewards": returns}, ("batch.returns_to_go",)) is not None
        returns[1] = NAN
        found = _guards.find({"batch.returns_to_go": returns}, ("batch.returns_to_go",))
        assert found is not None
        assert found.rows == (1,)

    def test_cells_of_a_column_block_by_block(self, monkeypatch: pytest.MonkeyPatch) -> None:
        column = np.zeros((10, 1, 2), dtype=np.float32)
        column[3, 0, 1], column[9, 0, 0] = np.nan, -np.inf
        for block in (2**24, 8, 24):
            monkeypatch.setattr(_guards, "_BLOCK_BYTES", block)
            assert list(_guards.bad_cells("observations", column, 10)) == ["observations[3, 0, 1]", "observations[9, 0, 0]"]
            assert list(_guards.bad_cells("observations", column, 9)) == ["observations[3, 0, 1]"], "a row that is not filled"
            assert list(_guards.bad_cells("returns", column, 10, True)) == ["returns[3, 0, 1]"]
        assert not list(_guards.bad_cells("pixels", np.zeros((4, 2), dtype=np.uint8), 4))
        assert _guards.cells_text(f"r[{i}]" for i in range(9)) == "r[0], r[1], r[2], r[3], r[4] and more"

    def test_rows_of_the_largest_values(self) -> None:
        values, rewards = th.tensor([1.0, -9.0, 3.0, 2.0]), th.tensor([0.0, 0.0, 0.0, 50.0])
        _, rows, text = _guards.largest_rows(values, rewards, 2)
        assert rows == (3, 1)
        assert "row 3: Q 2, reward 50; row 1: Q -9, reward 0" in text
        values[0] = NAN
        _, rows, text = _guards.largest_rows(values, rewards, 2)
        assert rows == (0,)
        assert text.startswith("Q(s, a) of the data's actions is not finite in row 0")


class TestError:
    def test_survives_a_pickle(self) -> None:
        error = NonFiniteError("text", step=3, tensor="batch.rewards", rows=[1, 2], stepped=["critic"], is_usable=False)
        twin = pickle.loads(pickle.dumps(error))
        assert isinstance(twin, ArithmeticError)
        assert vars(twin) == vars(error)
        assert str(twin) == "text"
        assert vars(error) == {
            "step": 3,
            "tensor": "batch.rewards",
            "rows": (1, 2),
            "stepped": ("critic",),
            "is_usable": False,
        }

    def test_listeners_are_told_and_may_fail(self) -> None:
        told: list[NonFiniteError] = []

        def fails(_: NonFiniteError) -> None:
            raise OSError("disk full")

        error = NonFiniteError("text", step=1, tensor="loss")
        with pytest.warns(RuntimeWarning, match=r"fails failed when .* OSError\('disk full'\)"):
            _guards.tell([fails, told.append], error)
        assert told == [error]
        _guards.tell([told.append], NonFiniteError("text", step=1, tensor="loss", is_usable=False))
        assert told == [error], "nothing to save"


class TestSnapshot:
    @pytest.mark.parametrize("steps_before", [0, 2])
    def test_brings_back_number_optimiser_and_noise(self, steps_before: int) -> None:
        value = th.ones(1, requires_grad=True)
        optimizer = th.optim.Adam([value], lr=0.1)

        def step() -> None:
            optimizer.zero_grad()
            (value * th.rand(1)).sum().backward()
            optimizer.step()

        def state() -> list[Any]:
            own = optimizer.state_dict()["state"]
            return [value.detach().clone(), *(v.clone() for s in own.values() for v in s.values()), th.get_rng_state()]

        for _ in range(steps_before):
            step()
        before = state()
        snapshot = Snapshot([optimizer])
        step()
        changed = state()
        assert len(changed) != len(before) or not any(th.equal(a, b) for a, b in zip(before, changed, strict=True))
        snapshot.restore()
        after = state()
        assert len(after) == len(before)
        assert all(th.equal(a, b) for a, b in zip(before, after, strict=True))
        step()
        assert all(th.equal(a, b) for a, b in zip(changed, state(), strict=True)), "the same step again"


class TestDeviceNote:
    """On the CPU, whose fused optimisers can leave out a step as a GPU's do."""

    def make(self, fused: bool = True) -> tuple[DeviceNote, th.Tensor, th.optim.Optimizer]:
        parameter = th.ones(3, requires_grad=True)
        optimizer = th.optim.Adam([parameter], lr=0.1, fused=fused)
        note = DeviceNote(["batch", "loss"], th.device("cpu"))
        assert note.hold(optimizer) is fused
        return note, parameter, optimizer

    def test_steps_are_left_out_from_the_first_sick_one_on(self) -> None:
        note, parameter, optimizer = self.make()
        seen = []
        for step in range(6):
            gradient = th.full((3,), NAN if step == 2 else 1.0)
            parameter.grad = gradient.clone()
            note.look("loss", [th.tensor(1.0), parameter.grad])
            assert th.equal(parameter.grad, gradient) or step == 2
            optimizer.step()
            note.end_step()
            seen.append(parameter.detach().clone())
        assert not th.equal(seen[0], seen[1])
        assert all(th.equal(each, seen[1]) for each in seen[2:])
        assert float(optimizer.state[parameter]["step"]) == 2
        assert note.read() == (["loss"], 2)
        optimizer.step()
        assert not th.equal(parameter, seen[1]), "read, and ready to go on"
        assert note.read() == ([], 0)

    def test_holding_changes_no_number_of_a_healthy_run(self) -> None:
        note, parameter, optimizer = self.make()
        twin = th.ones(3, requires_grad=True)
        plain = th.optim.Adam([twin], lr=0.1, fused=True)
        for _ in range(4):
            gradient = th.randn(3)
            parameter.grad, twin.grad = gradient.clone(), gradient.clone()
            note.look("loss", [parameter.grad])
            optimizer.step()
            plain.step()
        assert th.equal(parameter, twin)

    def test_what_is_not_fused_goes_on(self) -> None:
        note, parameter, optimizer = self.make(fused=False)
        parameter.grad = th.full((3,), NAN)
        note.look("loss", [parameter.grad])
        optimizer.step()
        assert parameter.isnan().all()
        assert note.read()[0] == ["loss"]

    @pytest.mark.parametrize(("value", "kinds"), [(-INF, []), (INF, ["batch"]), (NAN, ["batch"])])
    def test_unknown_returns_are_well_and_left_alone(self, value: float, kinds: list[str]) -> None:
        note, _, _ = self.make()
        returns = th.tensor([[1.0], [value]])
        note.look("batch", [th.zeros(2)], returns)
        assert th.equal(returns.nan_to_num(7.0), th.tensor([[1.0], [value]]).nan_to_num(7.0))
        assert note.read()[0] == kinds


class TestQRange:
    def test_bounds_and_margin(self) -> None:
        allowed = QRange()
        allowed.widen(-1.0, 2.0, 0.9)
        assert (allowed.low, allowed.high) == (pytest.approx(-10), pytest.approx(20))
        # The width of 30 and 1 on each side.
        assert allowed.warning({"q_data": 50.9, "q_policy": None, "q_random": -1e9}, "cql_alpha", 7) is None
        assert allowed.warning({"q_data": -40.9}, "cql_alpha", 7) is None
        text = allowed.warning({"q_data": 0.0, "q_policy": 51.1}, "cql_alpha", 7)
        assert text is not None
        assert text.startswith("q_policy is 51.1 at gradient step 7, but no rewards seen so far can sum to more than 20 ")
        assert "a larger cql_alpha" in text
        assert allowed.warning({"q_data": 1e9}, "cql_alpha", 7) is None, "said once"

    def test_the_datas_own_values_may_be_too_low(self) -> None:
        allowed = QRange()
        allowed.widen(0.0, 1.0, 0.9)
        text = allowed.warning({"q_data": -11.1}, "conservative_weight", 7)
        assert text is not None
        assert "less than 0 " in text
        assert "a smaller conservative_weight" in text

    def test_is_as_wide_as_it_ever_was_and_zero_is_always_allowed(self) -> None:
        allowed = QRange()
        allowed.widen(3.0, 4.0, 0.5)
        allowed.widen(1.0, 1.0, 0.5)
        assert (allowed.low, allowed.high) == (0.0, 8.0)
        allowed.widen(1.0, 1.0, 0.5, entropy=9.0)
        assert (allowed.low, allowed.high) == (-16.0, 20.0)
        allowed.widen(NAN, NAN, 0.5)
        assert (allowed.low, allowed.high) == (-16.0, 20.0)

    def test_without_discount_nothing_is_too_much(self) -> None:
        allowed = QRange()
        allowed.widen(0.0, 1.0, 1.0)
        assert allowed.warning({"q_data": 1e30}, "cql_alpha", 1) is None
