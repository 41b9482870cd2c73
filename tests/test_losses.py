"""The penalty against derivations of its own: closed forms, NumPy in float64, a tabular fixed point."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch as th

from cql_plugins import losses

LOG_2 = math.log(2.0)
DOUBLE = th.float64


def box_integral(v: np.ndarray, temperature: float) -> float:
    """Integral of exp(v.a / T) over [-1, 1]^A."""
    scaled = v / temperature
    return float(np.prod(2.0 * np.sinh(scaled) / scaled))


def flat_policy(batch: int, mean: float = 0.4, std: float = 0.7, action_dim: int = 2) -> tuple[th.Tensor, th.Tensor]:
    return th.full((batch, action_dim), mean, dtype=DOUBLE), th.full((batch, action_dim), std, dtype=DOUBLE)


def three_groups(batch: int, n: int, action_dim: int = 2) -> list[losses.ProposedActions]:
    mean, std = flat_policy(batch, action_dim=action_dim)
    return [
        losses.propose_uniformly(mean, n),
        losses.propose_from_policy(mean, std, n),
        losses.propose_from_policy(-mean, 1.5 * std, n),
    ]


class TestLogDensity:
    @pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.3), (-2.0, 1.5)])
    def test_integrates_to_one_over_the_action(self, mean: float, std: float) -> None:
        u = np.linspace(-10, 10, 200_001)  # dense where the squash is; five standard deviations and more
        density = losses.squashed_gaussian_log_density(
            th.as_tensor(u).unsqueeze(-1), th.tensor(mean, dtype=DOUBLE), th.tensor(std, dtype=DOUBLE)
        ).exp()
        trapezoid = getattr(np, "trapezoid", None) or getattr(np, "trapz")  # noqa: B009 (its name before NumPy 2)
        assert trapezoid(density.numpy(), np.tanh(u)) == pytest.approx(1.0, abs=1e-6)

    def test_is_exact_where_the_action_is_saturated(self) -> None:
        """float32 against extended precision at u = 8 and 10, where SB3's clamp is off by 1.2 and 4.8 nats."""
        for u, error_of_the_clamp in ((8.0, -1.17), (10.0, -4.81)):
            wide = np.longdouble(u)
            # 1 - tanh(u)^2 = 4 / (exp(u) + exp(-u))^2, with no cancellation.
            log_jacobian = np.log(np.longdouble(4)) - 2 * np.log(np.exp(wide) + np.exp(-wide))
            truth = float(-np.log(2 * np.longdouble(math.pi)) / 2 - log_jacobian)
            ours = losses.squashed_gaussian_log_density(th.tensor([u]), th.tensor([u]), th.tensor([1.0])).item()
            assert ours == pytest.approx(truth, rel=1e-6)
            clamped = float(-np.log(2 * math.pi) / 2 - np.log(4 * math.exp(-2 * u) + 1e-6))
            assert clamped - truth == pytest.approx(error_of_the_clamp, abs=0.02)

    def test_sampled_density_is_that_of_the_sample(self) -> None:
        th.manual_seed(0)
        mean, std = flat_policy(5)
        drawn = losses.propose_from_policy(mean, std, 7)
        again = losses.squashed_gaussian_log_density(th.atanh(drawn.actions), mean[:, None], std[:, None])
        assert th.allclose(drawn.log_density, again, rtol=0, atol=1e-9)
        assert drawn.actions.shape == (5, 7, 2)
        assert drawn.log_density.shape == (5, 7)

    def test_proposals_carry_no_gradient(self) -> None:
        mean = th.zeros(3, 2, requires_grad=True)
        drawn = losses.propose_from_policy(mean, mean.exp(), 4)
        assert not drawn.actions.requires_grad
        assert not drawn.log_density.requires_grad

    def test_uniform_proposal_covers_the_box(self) -> None:
        th.manual_seed(0)
        drawn = losses.propose_uniformly(th.zeros(500, 3), 40)
        assert th.equal(drawn.log_density, th.full((500, 40), -3 * LOG_2))
        # 60,000 draws: the standard error of the mean is 0.0024, of the variance 1/3 about 0.0012.
        assert abs(drawn.actions.mean().item()) < 0.012
        assert drawn.actions.var().item() == pytest.approx(1 / 3, abs=0.006)
        assert drawn.actions.abs().max() <= 1


class TestSoftMaximum:
    V = np.array([1.3, -0.7])

    def q(self, actions: th.Tensor) -> th.Tensor:
        return (actions * th.as_tensor(self.V)).sum(-1)[None]

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_grid_gives_the_closed_form(self, temperature: float) -> None:
        """Midpoints of a fine grid with the uniform density: M - T log N is T log of the integral, to the grid's error."""
        side = (np.arange(400) + 0.5) / 200 - 1
        grid = th.as_tensor(np.stack(np.meshgrid(side, side), -1).reshape(1, -1, 2))
        density = th.full(grid.shape[:2], -2 * LOG_2, dtype=DOUBLE)
        value = losses.soft_maximum(self.q(grid), density, temperature).item()
        truth = temperature * math.log(box_integral(self.V, temperature))
        assert value - temperature * math.log(grid.shape[1]) == pytest.approx(truth, abs=2e-5)

    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    @pytest.mark.parametrize("n", [1, 4])
    @pytest.mark.parametrize("group", [0, 1, 2, None])
    def test_mean_over_draws_is_the_integral(self, group: int | None, n: int, temperature: float) -> None:
        """For any N and for each group alone: exp(M/T) / M_actions is an unbiased estimate of the integral."""
        th.manual_seed(1)
        groups = three_groups(200_000 // n, n)
        chosen = groups if group is None else [groups[group]]
        actions = th.cat([g.actions for g in chosen], dim=1)
        density = th.cat([g.log_density for g in chosen], dim=1)
        estimates = (losses.soft_maximum(self.q(actions), density, temperature) / temperature).exp() / actions.shape[1]
        standard_error = estimates.std().item() / math.sqrt(estimates.numel())
        truth = box_integral(self.V, temperature)
        assert abs(estimates.mean().item() - truth) < 4 * standard_error
        assert standard_error < 0.02 * truth, "the check has power"

    @pytest.mark.parametrize("temperature", [1.0, 0.3, 5.0])
    def test_dividing_the_density_by_the_temperature_is_another_number(self, temperature: float) -> None:
        th.manual_seed(2)
        group = three_groups(50_000, 4)[1]
        q = self.q(group.actions)
        wrong = temperature * th.logsumexp((q - group.log_density) / temperature, dim=2)
        ours = losses.soft_maximum(q, group.log_density, temperature)
        assert th.allclose(wrong, ours) == (temperature == 1.0)

    @pytest.mark.parametrize("action_dim", [1, 6])
    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    def test_flat_q_with_uniform_actions_is_exact(self, action_dim: int, temperature: float) -> None:
        n, c = 10, -7.5
        group = losses.propose_uniformly(th.zeros(4, action_dim, dtype=DOUBLE), n)
        value = losses.soft_maximum(th.full((2, 4, n), c, dtype=DOUBLE), group.log_density, temperature)
        truth = c + temperature * (action_dim * LOG_2 + math.log(n))
        assert th.allclose(value, th.full((2, 4), truth, dtype=DOUBLE), rtol=0, atol=1e-12)

    def test_runs_over_the_actions_and_not_over_critics_or_batch(self) -> None:
        q = th.arange(24.0, dtype=DOUBLE).view(2, 3, 4) / 10
        density = th.linspace(-1, 1, 12, dtype=DOUBLE).view(3, 4)
        expected = np.log(np.exp(q.numpy() - density.numpy()[None]).sum(axis=2))
        assert np.allclose(losses.soft_maximum(q, density).numpy(), expected, rtol=0, atol=1e-12)


class TestGap:
    def numpy_gap(self, q_data: np.ndarray, q: np.ndarray, density: np.ndarray, variant: str, t: float) -> np.ndarray:
        n = q.shape[2]
        if variant == "H":
            return t * np.log(np.exp(q / t - density[None]).sum(2)) - q_data
        if variant == "rho":
            return t * np.log(np.exp(q / t).mean(2)) - q_data
        return q.sum(2) / n - (q_data if variant == "mu" else 0.0)

    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    @pytest.mark.parametrize("variant", losses.CQL_VARIANTS)
    def test_variants_against_numpy(self, variant: losses.CQLVariant, temperature: float, rng: np.random.Generator) -> None:
        q_data, q, density = rng.normal(size=(2, 5)), rng.normal(size=(2, 5, 9)), rng.normal(size=(5, 9))
        ours = losses.conservative_gap(
            *map(th.as_tensor, (q_data, q, density)), action_dim=3, variant=variant, temperature=temperature
        )
        assert np.allclose(ours.numpy(), self.numpy_gap(q_data, q, density, variant, temperature), rtol=0, atol=1e-12)

    def test_variants_differ_from_each_other(self, rng: np.random.Generator) -> None:
        tensors = [th.as_tensor(rng.normal(size=s)) for s in ((2, 5), (2, 5, 9), (5, 9))]
        gaps = [losses.conservative_gap(*tensors, action_dim=3, variant=v) for v in ("H", "rho", "mu", "pointwise")]
        for i, first in enumerate(gaps):
            assert not any(th.allclose(first, second) for second in gaps[i + 1 :])

    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    @pytest.mark.parametrize(("action_dim", "n"), [(1, 1), (6, 10), (28, 10)])
    def test_normalized_gap_of_a_flat_q_is_zero(self, action_dim: int, n: int, temperature: float) -> None:
        density = th.full((4, 3 * n), -action_dim * LOG_2, dtype=DOUBLE)
        q_data, q = th.full((2, 4), 3.0, dtype=DOUBLE), th.full((2, 4, 3 * n), 3.0, dtype=DOUBLE)

        def gap(normalize: bool) -> th.Tensor:
            return losses.conservative_gap(
                q_data, q, density, action_dim=action_dim, temperature=temperature, normalize=normalize
            )

        assert th.allclose(gap(True), th.zeros(2, 4, dtype=DOUBLE), rtol=0, atol=1e-12)
        flat = temperature * (action_dim * LOG_2 + math.log(3 * n))
        assert th.allclose(gap(False), th.full((2, 4), flat, dtype=DOUBLE), rtol=0, atol=1e-12)

    def test_gaps_of_flat_q_that_the_docstring_names(self) -> None:
        for action_dim, named in ((3, 5.5), (6, 7.6), (8, 8.9), (24, 20.0), (28, 22.8)):
            assert action_dim * LOG_2 + math.log(30) == pytest.approx(named, abs=0.06)

    def test_gap_rises_with_sampled_values_and_falls_with_the_datas(self) -> None:
        q_data = th.zeros(1, 2, dtype=DOUBLE, requires_grad=True)
        q = th.zeros(1, 2, 6, dtype=DOUBLE, requires_grad=True)
        losses.conservative_gap(q_data, q, th.zeros(2, 6, dtype=DOUBLE), action_dim=1).sum().backward()
        assert q_data.grad is not None
        assert q.grad is not None
        assert th.equal(q_data.grad, -th.ones(1, 2, dtype=DOUBLE))
        assert th.allclose(q.grad, th.full((1, 2, 6), 1 / 6, dtype=DOUBLE))

    def test_clip_is_per_sample_and_stops_the_gradient(self) -> None:
        q_data = th.tensor([[0.0, 500.0, -500.0]], dtype=DOUBLE, requires_grad=True)
        gap = losses.conservative_gap(
            q_data, th.zeros(1, 3, 1, dtype=DOUBLE), th.zeros(3, 1, dtype=DOUBLE), action_dim=1, clip=(-200.0, 300.0)
        )
        assert gap.tolist() == [[0.0, -200.0, 300.0]]
        gap.sum().backward()
        assert q_data.grad is not None
        assert q_data.grad.tolist() == [[-1.0, 0.0, 0.0]]

    @pytest.mark.parametrize(
        ("q_data", "q", "density", "named"),
        [
            ((2, 5), (2, 4, 3), (5, 3), "q_sampled"),
            ((2, 5), (2, 5, 3), (5, 4), "log_density"),
            ((2, 5, 1), (2, 5, 3), (5, 3), "q_data"),
            ((1, 5), (2, 5, 3), (5, 3), "q_sampled"),
        ],
    )
    def test_wrong_shapes_are_named(self, q_data: tuple, q: tuple, density: tuple, named: str) -> None:
        with pytest.raises(ValueError, match=named):
            losses.conservative_gap(th.zeros(q_data), th.zeros(q), th.zeros(density), action_dim=1)

    def test_unknown_variant_is_refused(self) -> None:
        with pytest.raises(ValueError, match="variant"):
            losses.conservative_gap(
                th.zeros(1, 1),
                th.zeros(1, 1, 1),
                th.zeros(1, 1),
                action_dim=1,
                variant="h",  # type: ignore[arg-type]
            )


class TestBound:
    q = th.tensor([[[1.0, -2.0], [3.0, 4.0]], [[0.0, 5.0], [-1.0, 2.0]]], dtype=DOUBLE)  # (C, B, M)

    def test_literal(self) -> None:
        bounded, won = losses.bound_by_returns(self.q, th.tensor([[0.5], [3.5]], dtype=DOUBLE))
        assert bounded.tolist() == [[[1.0, 0.5], [3.5, 4.0]], [[0.5, 5.0], [3.5, 3.5]]]
        assert won.tolist() == [[[False, True], [True, False]], [[True, False], [True, True]]]

    def test_minus_infinity_is_no_bound(self) -> None:
        bounded, won = losses.bound_by_returns(self.q, th.full((2, 1), -math.inf, dtype=DOUBLE))
        assert th.equal(bounded, self.q)
        assert not won.any()

    def test_no_gradient_where_the_return_wins(self) -> None:
        q = self.q.clone().requires_grad_()
        bounded, won = losses.bound_by_returns(q, th.tensor([[0.5], [4.0]], dtype=DOUBLE))
        bounded.sum().backward()
        assert q.grad is not None
        assert th.equal(q.grad, (~won).to(DOUBLE))
        assert q.grad[0, 1, 1] == 1.0, "a tie leaves the gradient with Q"

    def test_wrong_shape_is_named(self) -> None:
        with pytest.raises(ValueError, match="returns_to_go"):
            losses.bound_by_returns(self.q, th.zeros(2))


class TestDiscreteGap:
    Q = th.tensor([[[0.5, 5.0, 2.0], [1.0, 1.0, 1.0]], [[-1.0, 0.0, 3.0], [2.0, -2.0, 0.0]]], dtype=DOUBLE)  # (C, B, A)
    ACTIONS = th.tensor([0, 2])

    def test_worked_example(self) -> None:
        q = th.tensor([[[0.5, 5.0, 2.0]]], dtype=DOUBLE, requires_grad=True)
        gap, bound_rate = losses.discrete_gap(q, th.tensor([[0]]))
        assert gap.item() == pytest.approx(4.5591, abs=5e-5)
        assert bound_rate is None
        gap.sum().backward()
        assert q.grad is not None
        assert np.allclose(q.grad, [[[-0.98953, 0.94260, 0.04693]]], atol=5e-6)
        assert np.allclose(q.detach() - 0.1 * q.grad, [[[0.599, 4.906, 1.995]]], atol=5e-4)

    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_each_critic_has_its_own(self, temperature: float) -> None:
        gap, _ = losses.discrete_gap(self.Q, self.ACTIONS, temperature=temperature)
        expected = [
            [
                temperature * math.log(sum(math.exp(q / temperature) for q in row)) - row[a]
                for row, a in zip(rows, (0, 2), strict=True)
            ]
            for rows in self.Q.tolist()
        ]
        assert np.allclose(gap, expected, rtol=0, atol=1e-12)

    def test_calibrated(self) -> None:
        """The returns bound every action inside the soft maximum; the data's action outside of it stays as it is."""
        returns = th.tensor([[2.5], [-np.inf]], dtype=DOUBLE)
        gap, bound_rate = losses.discrete_gap(self.Q, self.ACTIONS, returns_to_go=returns)
        bounded = [[[2.5, 5.0, 2.5], [1.0, 1.0, 1.0]], [[2.5, 2.5, 3.0], [2.0, -2.0, 0.0]]]
        data = [[0.5, 1.0], [-1.0, 0.0]]
        expected = [
            [math.log(sum(math.exp(q) for q in row)) - value for row, value in zip(rows, values, strict=True)]
            for rows, values in zip(bounded, data, strict=True)
        ]
        assert np.allclose(gap, expected, rtol=0, atol=1e-12)
        assert bound_rate is not None
        assert bound_rate.item() == pytest.approx(4 / 12)

    def test_no_gradient_where_the_return_wins(self) -> None:
        q = self.Q.clone().requires_grad_()
        gap, _ = losses.discrete_gap(q, self.ACTIONS, returns_to_go=th.full((2, 1), np.inf, dtype=DOUBLE))
        gap[:, 0].sum().backward()  # inf - Q
        assert q.grad is not None
        assert np.array_equal(q.grad[:, 0], [[-1.0, 0.0, 0.0]] * 2)

    def test_clip_and_normalisation(self) -> None:
        flat = th.full((1, 1, 4), 7.0, dtype=DOUBLE)
        gap, _ = losses.discrete_gap(flat, th.tensor([1]), temperature=2.0)
        assert gap.item() == pytest.approx(2.0 * math.log(4))
        assert losses.discrete_gap(flat, th.tensor([1]), temperature=2.0, normalize=True)[0].item() == pytest.approx(0.0)
        assert losses.discrete_gap(self.Q, self.ACTIONS, clip=(-1.0, 1.2))[0].max().item() == 1.2

    def test_shapes(self) -> None:
        with pytest.raises(ValueError, match="q_values"):
            losses.discrete_gap(self.Q[0], self.ACTIONS)
        with pytest.raises(ValueError, match="actions must have shape"):
            losses.discrete_gap(self.Q, th.tensor([0, 1, 2]))


class TestTargetAndLosses:
    def test_td_target_literals(self) -> None:
        """A terminated transition does not bootstrap; n-step discounts are taken as they come."""
        target = losses.td_target(
            th.tensor([[1.0], [2.0], [3.0]]), th.tensor([[0.0], [1.0], [0.0]]), th.tensor([[0.5], [0.5], [0.25]]),
            th.tensor([[10.0], [10.0], [8.0]]),
        )  # fmt: skip
        assert target.tolist() == [[6.0], [2.0], [5.0]]

    def test_td_target_refuses_broadcasts(self) -> None:
        with pytest.raises(ValueError, match="next_values"):
            losses.td_target(th.zeros(3, 1), th.zeros(3, 1), 0.9, th.zeros(3))
        with pytest.raises(ValueError, match="discounts"):
            losses.td_target(th.zeros(3, 1), th.zeros(3, 1), th.full((3,), 0.9), th.zeros(3, 1))
        for number in (0.9, th.tensor(0.9)):
            assert (
                losses.td_target(th.zeros(3, 1), th.zeros(3, 1), number, th.ones(3, 1)).tolist() == [[pytest.approx(0.9)]] * 3
            )

    def test_max_backup_takes_the_minimum_over_critics_first(self) -> None:
        q = th.tensor([[[1.0, 9.0, 4.0]], [[8.0, 2.0, 3.0]]])
        value, index = losses.max_backup(q)
        assert value.tolist() == [[3.0]], "max of (1, 2, 3); the maximum first would give min(9, 8)"
        assert index.tolist() == [[2]]

    def test_critic_loss_literal(self) -> None:
        squared = th.tensor([[1.0, 3.0], [5.0, 7.0]])
        gap = th.tensor([[2.0, 4.0], [6.0, 10.0]])
        assert losses.critic_loss(squared.mean(dim=1), None, 0.0).item() == 0.5 * (2 + 6)
        assert losses.critic_loss(squared.mean(dim=1), gap, 10.0).item() == 0.5 * (2 + 6 + 10 * (3 + 8))
        assert losses.critic_loss(squared.mean(dim=1), gap, 10.0, threshold=1.0).item() == 0.5 * (2 + 6 + 10 * (2 + 7))

    def test_lagrange_moves_towards_the_threshold(self) -> None:
        for gap, sign in ((7.0, -1.0), (3.0, 1.0)):
            log_multiplier = th.ones(1, dtype=DOUBLE, requires_grad=True)
            critic_gap = th.full((2, 3), gap, dtype=DOUBLE, requires_grad=True)
            losses.lagrange_loss(log_multiplier, critic_gap, weight=2.0, threshold=5.0).backward()
            # d/dx of -exp(x) w (gap - tau)
            assert log_multiplier.grad is not None
            assert log_multiplier.grad.item() == pytest.approx(sign * math.e * 2.0 * 2.0)
            assert critic_gap.grad is None

    def test_lagrange_multiplier_is_clamped(self) -> None:
        values = losses.lagrange_multiplier(th.tensor([-100.0, 0.0, 100.0]))
        assert values.tolist() == [pytest.approx(0.0, abs=1e-30), 1.0, losses.LAGRANGE_MAX]

    def test_behaviour_cloning_is_finite_at_the_bounds_and_exact_inside(self) -> None:
        mean, std = th.zeros(3, 1, dtype=DOUBLE), th.ones(3, 1, dtype=DOUBLE)
        log_prob = losses.behavior_cloning_log_prob(th.tensor([[1.0], [-1.0], [0.5]], dtype=DOUBLE), mean, std)
        assert th.isfinite(log_prob).all()
        truth = -0.5 * math.atanh(0.5) ** 2 - 0.5 * math.log(2 * math.pi) - math.log(1 - 0.25)
        assert log_prob[2].item() == pytest.approx(truth, abs=1e-12)


class TestTabularFixedPoint:
    """A chain of three states and two actions, solved twice: by minimising our loss, and by the theorem."""

    gamma = 0.9
    rewards = np.array([[0.0, 1.0], [0.5, 0.0], [2.0, -1.0]])
    transitions = np.array(
        [[[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]], [[0.1, 0.0, 0.9], [0.0, 1.0, 0.0]], [[0.3, 0.3, 0.4], [1.0, 0.0, 0.0]]]
    )
    # Data and policy as counts, so that plain means over rows are exact expectations.
    data_counts = np.array([[3, 1], [1, 1], [1, 3]])
    policy_counts = np.array([[1, 3], [3, 1], [2, 2]])

    def solve(self, weight: float, variant: losses.CQLVariant) -> np.ndarray:
        """Iterate: fix the target, minimise the critic's loss over the table exactly (it is quadratic in it)."""
        policy = self.policy_counts / 4
        table = np.zeros((3, 2))
        for _ in range(400):
            target = self.rewards + self.gamma * self.transitions @ (policy * table).sum(1)

            # Rows of the data: every state equally often, actions by their counts (over their least common multiple).
            states, actions = [], []
            for s in range(3):
                repeats = 12 // self.data_counts[s].sum()
                for a in range(2):
                    states += [s] * (self.data_counts[s, a] * repeats)
                    actions += [a] * (self.data_counts[s, a] * repeats)
            s_index, a_index = th.tensor(states), th.tensor(actions)
            proposals = th.tensor([[a for a in range(2) for _ in range(self.policy_counts[s, a])] for s in range(3)])
            y = th.as_tensor(target)[s_index, a_index]

            def loss(flat: th.Tensor, s_index=s_index, a_index=a_index, proposals=proposals, y=y) -> th.Tensor:
                q = flat.view(3, 2)
                q_data = q[s_index, a_index][None]
                q_sampled = q[s_index[:, None], proposals[s_index]][None]
                gap = losses.conservative_gap(
                    q_data, q_sampled, th.zeros(q_sampled.shape[1:], dtype=DOUBLE), action_dim=1, variant=variant
                )
                return losses.critic_loss(((q_data - y) ** 2).mean(dim=1), gap, weight)

            zero = th.zeros(6, dtype=DOUBLE)
            hessian = th.autograd.functional.hessian(loss, zero)
            gradient = th.autograd.functional.jacobian(loss, zero)
            table = th.linalg.solve(hessian, -gradient).view(3, 2).numpy()
        return table

    def closed_form(self, alpha: float, ratio: np.ndarray) -> np.ndarray:
        """Q = (I - gamma P^pi)^-1 (r - alpha * ratio) [CQL, Theorems 3.1 and 3.2]."""
        policy = self.policy_counts / 4
        transition = np.einsum("sat,tb->satb", self.transitions, policy).reshape(6, 6)
        return np.linalg.solve(np.eye(6) - self.gamma * transition, (self.rewards - alpha * ratio).ravel()).reshape(3, 2)

    def test_cql_is_theorem_3_2_with_half_the_weight(self) -> None:
        policy, behavior = self.policy_counts / 4, self.data_counts / self.data_counts.sum(1, keepdims=True)
        solved = self.solve(0.3, "mu")
        assert np.allclose(solved, self.closed_form(0.15, policy / behavior - 1), rtol=0, atol=1e-9)
        assert not np.allclose(solved, self.closed_form(0.3, policy / behavior - 1), atol=1e-2)
        assert not np.allclose(solved, self.closed_form(0.15, policy / behavior), atol=1e-2)

    def test_pointwise_is_theorem_3_1(self) -> None:
        policy, behavior = self.policy_counts / 4, self.data_counts / self.data_counts.sum(1, keepdims=True)
        assert np.allclose(self.solve(0.3, "pointwise"), self.closed_form(0.15, policy / behavior), rtol=0, atol=1e-9)

    def test_without_weight_it_is_policy_evaluation(self) -> None:
        assert np.allclose(self.solve(0.0, "mu"), self.closed_form(0.0, np.zeros((3, 2))), rtol=0, atol=1e-9)
