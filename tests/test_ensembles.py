"""Critics at many actions of each state: against the layers one by one, and against NumPy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from torch import nn

from cql_plugins import ensembles
from cql_plugins.ensembles import Workspace, evaluate_actions, linear_layers, perceptrons

FEATURES, ACTIONS = 5, 3


def make_networks(
    n_critics: int = 2, widths: tuple[int, ...] = (16, 12), n_outputs: int = 1, dtype: th.dtype = th.float64
) -> list[nn.Sequential]:
    th.manual_seed(0)
    networks = []
    for _ in range(n_critics):
        modules: list[nn.Module] = []
        width = FEATURES + ACTIONS
        for following in widths:
            modules += [nn.Linear(width, following), nn.ReLU()]
            width = following
        networks.append(nn.Sequential(*modules, nn.Linear(width, n_outputs)).to(dtype))
    return networks


def make_inputs(n_states: int = 6, n_actions: int = 7, dtype: th.dtype = th.float64) -> tuple[th.Tensor, th.Tensor]:
    generator = th.Generator().manual_seed(1)
    features = th.randn(n_states, FEATURES, generator=generator, dtype=th.float64)
    actions = th.rand(n_states, n_actions, ACTIONS, generator=generator, dtype=th.float64) * 2 - 1
    return features.to(dtype), actions.to(dtype)


def layers_of(networks: list[nn.Sequential]) -> list[list[nn.Linear]]:
    found = [linear_layers(network) for network in networks]
    assert all(found)
    return [own for own in found if own]


def one_by_one(networks: list[nn.Sequential], features: th.Tensor, actions: th.Tensor) -> th.Tensor:
    columns = [th.cat((features, actions[:, i]), dim=1) for i in range(actions.shape[1])]
    return th.stack([th.stack([network(column) for column in columns], dim=1) for network in networks])


def soft_gap(values: th.Tensor, scale: float = 1.0) -> th.Tensor:
    """A loss of CQL's form; weights are the more concentrated the larger the scale."""
    values = values.sum(-1) * scale
    return (th.logsumexp(values[:, :, 1:], dim=2) - values[:, :, 0]).mean() + (values[:, :, 0] ** 2).mean()


def gradients(loss: th.Tensor, networks: list[nn.Sequential], *more: th.Tensor) -> list[th.Tensor]:
    return list(th.autograd.grad(loss, [p for network in networks for p in network.parameters()] + list(more)))


@pytest.fixture(params=["one-by-one", "stacked"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU's form, and the one that is used on a GPU."""
    monkeypatch.setattr(ensembles, "_stacks", lambda _: request.param == "stacked")
    return str(request.param)


class TestValues:
    def test_by_hand(self, form: str) -> None:
        networks = make_networks()
        features, actions = make_inputs()
        values = evaluate_actions(layers_of(networks), features, actions).detach().numpy()
        for c, network in enumerate(networks):
            w1, b1, w2, b2, w3, b3 = (p.detach().numpy() for p in network.parameters())
            for state in range(len(features)):
                for i in range(actions.shape[1]):
                    row = np.concatenate([features[state].numpy(), actions[state, i].numpy()])
                    hidden = np.maximum(w2 @ np.maximum(w1 @ row + b1, 0) + b2, 0)
                    np.testing.assert_allclose(values[c, state, i], w3 @ hidden + b3, rtol=0, atol=1e-14)

    @pytest.mark.parametrize("n_outputs", [1, 5])
    @pytest.mark.parametrize("widths", [(8,), (8, 8, 8)])
    @pytest.mark.parametrize("n_critics", [1, 3])
    def test_shape(self, form: str, n_critics: int, widths: tuple[int, ...], n_outputs: int) -> None:
        networks = make_networks(n_critics, widths, n_outputs)
        values = evaluate_actions(layers_of(networks), *make_inputs())
        assert values.shape == (n_critics, 6, 7, n_outputs)
        assert th.allclose(values, one_by_one(networks, *make_inputs()), rtol=0, atol=1e-14)


class TestGradients:
    @pytest.mark.parametrize("scale", [1.0, 300.0])
    @pytest.mark.parametrize("n_outputs", [1, 5])
    @pytest.mark.parametrize("n_critics", [1, 3])
    def test_equal_autograds(self, form: str, n_critics: int, n_outputs: int, scale: float) -> None:
        networks = make_networks(n_critics, n_outputs=n_outputs)
        features, actions = make_inputs()
        features.requires_grad_()
        ours = gradients(soft_gap(evaluate_actions(layers_of(networks), features, actions), scale), networks, features)
        theirs = gradients(soft_gap(one_by_one(networks, features, actions), scale), networks, features)
        for own, their in zip(ours, theirs, strict=True):
            # Sums of up to 126 rounded terms, none above the largest gradient by more than a factor of its own size.
            assert th.allclose(own, their, rtol=0, atol=1e-13 * max(float(their.abs().max()), scale))
        with pytest.raises(AssertionError):
            th.testing.assert_close(ours[0], 1.001 * theirs[0])

    def test_single_precision_leaves_rows_out_that_rounding_would_not_show(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kept = []
        find = ensembles._rows_that_matter

        def spying(*args: Any) -> Any:
            rows = find(*args)
            kept.append(1.0 if rows is None else len(rows) / len(args[0]))
            return rows

        monkeypatch.setattr(ensembles, "_rows_that_matter", spying)
        exact_networks = make_networks()
        features, actions = make_inputs(n_states=64, n_actions=31)
        exact = gradients(soft_gap(one_by_one(exact_networks, features, actions), 1000.0), exact_networks)
        networks = make_networks(dtype=th.float32)

        def error() -> float:
            values = evaluate_actions(layers_of(networks), features.float(), actions.float())
            ours = gradients(soft_gap(values, 1000.0), networks)
            return max(float((own - e).abs().max() / e.abs().max()) for own, e in zip(ours, exact, strict=True))

        skipping = error()
        assert max(kept) < 0.6, "the test's weights are concentrated"
        monkeypatch.setattr(ensembles, "_rows_that_matter", lambda *_: None)
        full = error()
        assert skipping < 1.5 * full + 1e-6
        # The twin: left out rows that do matter show.
        monkeypatch.setattr(ensembles, "_NEGLIGIBLE", {th.float32: 3.0})
        monkeypatch.setattr(ensembles, "_rows_that_matter", spying)
        assert error() > 100 * full

    def test_equal_weights_keep_all_rows(self) -> None:
        gradient = th.full((12 * 31, 1), 1 / 31)
        assert ensembles._rows_that_matter(gradient, 31, th.float32) is None

    @pytest.mark.parametrize("broken", [float("nan"), float("inf")])
    def test_what_is_not_a_number_comes_through(self, broken: float) -> None:
        networks = make_networks(dtype=th.float32)
        values = evaluate_actions(layers_of(networks), *make_inputs(dtype=th.float32))
        upstream = th.zeros_like(values)
        upstream[0, 2, 3] = broken
        weights = [network[0].weight for network in networks]
        first, second = th.autograd.grad(values, weights, upstream)
        assert not first.isfinite().all()
        assert (second == 0).all()

    def test_no_gradient_is_no_gradient(self) -> None:
        networks = make_networks()
        values = evaluate_actions(layers_of(networks), *make_inputs())
        assert all((g == 0).all() for g in gradients((values * 0).sum(), networks))

    def test_actions_are_taken_as_given(self) -> None:
        features, actions = make_inputs()
        values = evaluate_actions(layers_of(make_networks()), features, actions.requires_grad_())
        values.sum().backward()
        assert actions.grad is None


class TestWorkspace:
    @pytest.mark.parametrize("precision", ["f32", "bf16"])
    @pytest.mark.parametrize("scale", [1.0, 1000.0])
    def test_changes_nothing(self, scale: float, precision: Any) -> None:
        networks = make_networks(widths=(16, 16, 16), dtype=th.float32)
        workspace = Workspace()
        for n_states in (200, 40, 200):  # More rows than a block, fewer, and more again in memory that was used.
            features, actions = make_inputs(n_states, 31, th.float32)
            values = [
                evaluate_actions(layers_of(networks), features, actions, precision, workspace=space)
                for space in (None, workspace)
            ]
            assert th.allclose(*values, rtol=0, atol=1e-6 if precision == "f32" else 2**-9)
            ours, theirs = (gradients(soft_gap(value, scale), networks) for value in reversed(values))
            for own, their in zip(ours, theirs, strict=True):
                size = max(1.0, float(their.abs().max()))
                assert th.allclose(own, their, rtol=0, atol=(1e-5 if precision == "f32" else 2**-9) * size)

    def test_takes_no_new_memory(self) -> None:
        networks = make_networks(dtype=th.float32)
        workspace = Workspace()
        held = []
        for _ in range(3):
            with th.no_grad():  # targets in between
                evaluate_actions(layers_of(networks), *make_inputs(50, 10, th.float32), workspace=workspace)
            values = evaluate_actions(layers_of(networks), *make_inputs(50, 31, th.float32), "bf16", workspace=workspace)
            gradients(soft_gap(values), networks)
            held.append({name: buffer.data_ptr() for name, buffer in workspace._buffers.items()})
        assert held[0] == held[1] == held[2]

    def test_a_later_evaluation_is_found_out(self) -> None:
        networks = make_networks(dtype=th.float32)
        workspace = Workspace()
        first, _ = (
            evaluate_actions(layers_of(networks), *make_inputs(dtype=th.float32), workspace=workspace) for _ in range(2)
        )
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            first.sum().backward()


class TestDrawnBackward:
    """Fewer rows go back, chosen at random: right in the mean."""

    def draws(self, n_backward: int, n_draws: int) -> tuple[th.Tensor, th.Tensor, float]:
        """Exact gradient of the first layer, drawn ones, and the share of rows that went back."""
        networks = make_networks(1)
        features, actions = make_inputs()
        exact = gradients(soft_gap(evaluate_actions(layers_of(networks), features, actions), 30.0), networks)[0]
        upstream: list[th.Tensor] = []
        values = evaluate_actions(layers_of(networks), features, actions)
        values.register_hook(upstream.append)
        gradients(soft_gap(values, 30.0), networks)
        rows = upstream[0][0].reshape(-1, 1)
        share = float((ensembles._thin_out(rows, 7, n_backward) != 0).double().mean())
        found = []
        for _ in range(n_draws):
            values = evaluate_actions(layers_of(networks), features, actions, n_backward=n_backward)
            found.append(gradients(soft_gap(values, 30.0), networks)[0])
        return exact, th.stack(found), share

    def test_mean_is_the_gradient(self) -> None:
        th.manual_seed(0)
        exact, drawn, share = self.draws(2, 3000)
        assert share < 0.5
        error = (drawn.mean(0) - exact).abs()
        # Five standard errors, of 128 numbers.
        standard_error = drawn.std(0) / 3000**0.5
        assert (error <= 5 * standard_error + 1e-12).all()
        assert (drawn.std(0) > 0).any(), "something was left to chance"

    def test_mean_of_rows_without_their_weight_is_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        thin = ensembles._thin_out
        monkeypatch.setattr(ensembles, "_thin_out", lambda rows, *rest: th.where(thin(rows, *rest) != 0, rows, 0.0))
        th.manual_seed(0)
        exact, drawn, _ = self.draws(2, 500)
        assert ((drawn.mean(0) - exact).abs() > 5 * drawn.std(0) / 500**0.5 + 1e-12).any()

    def test_large_rows_are_in_every_draw(self) -> None:
        rows = th.tensor([[8.0], [1.0], [1.0], [0.0], [-2.0], [0.0], [0.0], [0.0]])
        for _ in range(20):
            thinned = ensembles._thin_out(rows, 4, 2).squeeze(1)
            assert thinned[0] == 8.0, "twice its share of 0.8 is certain"
            assert thinned[4] == -2.0
            assert set(thinned[[1, 2]].tolist()) <= {0.0, 5.0}, "a chance of 0.2"
            assert (thinned[[3, 5, 6, 7]] == 0).all()

    def test_gradients_stay_numbers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Rows next to nothing have a chance next to nothing, whose inverse is none; and a draw may be 0."""
        rows = th.tensor([[0.01], [1e-42], [1e-30], [1e-44], [5e-9], [0.0]])
        monkeypatch.setattr(th, "rand_like", th.zeros_like)
        thinned = ensembles._thin_out(rows, 6, 2).squeeze(1)
        assert thinned.isfinite().all()
        assert thinned[0] == rows[0, 0]
        assert thinned[[1, 2, 3, 5]].tolist() == [0.0] * 4
        assert thinned[4] == pytest.approx(0.01 / 2, rel=1e-3), "a chance of a millionth, and it was met"

    def test_more_rows_than_there_are_is_exact_for_equal_ones(self) -> None:
        rows = th.full((12, 1), 0.3)
        assert th.equal(ensembles._thin_out(rows, 4, 4), rows)


class TestBfloat16:
    def test_is_near_and_not_the_same(self, form: str) -> None:
        networks = make_networks(widths=(64, 64), dtype=th.float32)
        features, actions = make_inputs(32, 31, th.float32)
        exact = evaluate_actions(layers_of(networks), features, actions)
        rough = evaluate_actions(layers_of(networks), features, actions, "bf16")
        assert rough.dtype == th.float32
        # 2^-9 a product, three in a row, random signs.
        assert 1e-5 < float(((rough - exact).abs().max() / exact.abs().max()).detach()) < 3 * 2**-8
        for own, theirs in zip(
            gradients(soft_gap(rough, 30.0), networks), gradients(soft_gap(exact, 30.0), networks), strict=True
        ):
            assert own.dtype == th.float32
            assert th.nn.functional.cosine_similarity(own.flatten(), theirs.flatten(), dim=0) > 0.995

    def test_the_output_layer_is_single_precision(self, form: str) -> None:
        """A hidden layer that bfloat16 holds exactly, and output weights that it does not."""
        networks = make_networks(1, (8,), dtype=th.float32)
        with th.no_grad():
            networks[0][0].weight.zero_()
            networks[0][0].bias.fill_(1.0)
            networks[0][2].weight.fill_(1.0 + 2.0**-12)
            networks[0][2].bias.zero_()
        values = evaluate_actions(layers_of(networks), *make_inputs(dtype=th.float32), "bf16")
        assert (values == 8.0 * (1.0 + 2.0**-12)).all()


class TestDoor:
    def test_reads_perceptrons_only(self) -> None:
        perceptron = make_networks(1)[0]
        assert linear_layers(perceptron) == [perceptron[0], perceptron[2], perceptron[4]]
        others = [
            nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)),
            nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.ReLU(), nn.Linear(3, 1)),
            nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 1)),
            nn.Sequential(nn.Linear(3, 3), nn.ReLU()),
            nn.Sequential(nn.Linear(3, 1)),
            nn.Linear(3, 1),
        ]
        assert [linear_layers(other) for other in others] == [None] * len(others)

    def test_leaves_alone_what_has_a_way_of_its_own(self) -> None:
        class Doubling(nn.Sequential):
            def forward(self, inputs: th.Tensor) -> th.Tensor:
                return 2 * super().forward(inputs)

        assert linear_layers(Doubling(*make_networks(1)[0])) is None
        watches: list[Any] = [
            lambda network: network[1].register_forward_hook(lambda *_: None),
            lambda network: network.register_forward_pre_hook(lambda *_: None),
            lambda network: network[0].register_full_backward_hook(lambda *_: None),
            lambda network: network[2].register_full_backward_pre_hook(lambda *_: None),
            lambda network: setattr(network[0], "forward", lambda inputs: inputs),
        ]
        for watch in watches:
            network = make_networks(1)[0]
            assert linear_layers(network) is not None
            watch(network)
            assert linear_layers(network) is None

    def test_takes_critics_of_one_shape(self) -> None:
        alike, wider, deeper = make_networks(2), make_networks(1, (16, 13)), make_networks(1, (16, 12, 12))
        found = perceptrons((network,) for network in alike)
        assert found is not None
        assert [len(layers) for layers in found] == [3, 3]
        assert perceptrons((network,) for network in alike + wider) is None
        assert perceptrons((network,) for network in alike + deeper) is None
        assert perceptrons([(alike[0],), (nn.Tanh(),)]) is None

    @pytest.mark.parametrize(
        ("features", "actions", "words"),
        [
            ((6, 5), (5, 7, 3), r"\(6, 5\) and \(5, 7, 3\)"),
            ((6, 5), (6, 3), r"\(6, 5\) and \(6, 3\)"),
            ((6, 4), (6, 7, 3), "take 8 numbers; got 4 features and 3 of the action"),
        ],
    )
    def test_refuses_other_shapes(self, features: Any, actions: Any, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            evaluate_actions(layers_of(make_networks()), th.zeros(features), th.zeros(actions))


class TestSlowBfloat16:
    """A processor without bfloat16 products is not left to crawl in silence."""

    def test_warns_where_there_are_no_such_products(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ensembles, "multiplies_bf16", lambda: False)
        with pytest.warns(UserWarning, match=r"precision='bf16' is slow on this processor.*Set precision='f32'"):
            ensembles.warn_of_slow_bf16("bf16", th.device("cpu"))

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize(
        ("precision", "device", "has_products"), [("bf16", "cpu", True), ("f32", "cpu", False), ("bf16", "cuda", False)]
    )
    def test_says_nothing_elsewhere(
        self, monkeypatch: pytest.MonkeyPatch, precision: str, device: str, has_products: bool
    ) -> None:
        monkeypatch.setattr(ensembles, "multiplies_bf16", lambda: has_products)
        ensembles.warn_of_slow_bf16(precision, th.device(device))

    def test_it_is_what_the_processor_has(self) -> None:
        """Linux lists the processor's instructions; AVX-512 is what oneDNN computes bfloat16 with on x86."""
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
        if not re.search(r"^flags\s*:", flags, re.MULTILINE):
            pytest.skip("the instructions of an x86 processor are read from /proc/cpuinfo")
        assert ensembles.multiplies_bf16() == all(f" avx512{part}" in flags for part in ("vl", "bw", "dq"))

    def test_a_build_that_cannot_tell_is_not_warned_of(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ensembles.th, "ops", None)
        assert ensembles.multiplies_bf16()
