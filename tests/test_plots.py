"""The dashboard of a run: what is read from the logs, and where it is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cql_plugins.plots import plot_run

pytest.importorskip("matplotlib")

HEAD = "time/gradient_steps,time/total_timesteps,train/q_data,train/q_policy,train/cql_gap,eval/mean_reward,rollout/ep_rew_mean"
OFFLINE = ["10,,1.0,2.0,5.0,,", ",15,,,,-3.0,", "20,,1.5,2.5,4.0,,"]
ONLINE = [",8,1.75,2.75,nan,,-2.5", ",16,,,,-1.0,"]


def write(folder: Path, *rows: str) -> Path:
    folder.mkdir()
    (folder / "progress.csv").write_text("\n".join([HEAD, *rows, ""]), encoding="utf-8")
    return folder


def curves(figure: Any) -> dict[str, list[tuple[list[float], list[float]]]]:
    """Panel's title, then the points of its curves; lines across it left out."""
    return {
        axis.get_title(loc="left"): [
            (list(map(float, line.get_xdata())), list(map(float, line.get_ydata())))
            for line in axis.get_lines()
            if line.get_linestyle() == "-" and len(set(line.get_xdata())) == len(line.get_xdata()) and line.get_linewidth() > 1
        ]
        for axis in figure.axes
        if axis.get_visible()
    }


def switches(figure: Any) -> set[float]:
    return {float(line.get_xdata()[0]) for axis in figure.axes for line in axis.get_lines() if line.get_linestyle() == "--"}


def test_stable_baselines(tmp_path: Path) -> None:
    figure = plot_run(write(tmp_path / "run", *OFFLINE, *ONLINE))
    found = curves(figure)
    assert found["return of an episode"] == [([15.0], [-3.0]), ([36.0], [-1.0]), ([28.0], [-2.5])]
    assert found["Q, in units of the reward"] == [
        ([10.0, 20.0], [1.0, 1.5]),
        ([28.0], [1.75]),
        ([10.0, 20.0], [2.0, 2.5]),
        ([28.0], [2.75]),
    ]
    assert found["conservative gap"][0] == ([10.0, 20.0], [5.0, 4.0])
    assert set(found) == {"return of an episode", "Q, in units of the reward", "conservative gap"}
    assert switches(figure) == {20.0}
    labels = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert labels == ["data's actions", "policy's actions"], "once each, though they have two phases"
    assert {axis.get_xlabel() for axis in figure.axes} == {"gradient steps, then environment steps"}


def test_parts_of_a_run(tmp_path: Path) -> None:
    """SB3 begins a file anew for each logger: two folders are drawn as one."""
    whole = plot_run(write(tmp_path / "whole", *OFFLINE, *ONLINE))
    parts = plot_run(write(tmp_path / "offline", *OFFLINE), write(tmp_path / "online", *ONLINE))
    assert str(curves(parts)) == str(curves(whole)), "as text, since NaN is not NaN"
    assert switches(parts) == {20.0}
    alone = plot_run(tmp_path / "online")
    assert not switches(alone)
    assert {axis.get_xlabel() for axis in alone.axes} == {"environment steps"}
    assert curves(alone)["return of an episode"] == [([16.0], [-1.0]), ([8.0], [-2.5])]


def test_scores_come_before_returns(tmp_path: Path) -> None:
    (tmp_path / "progress.csv").write_text(
        "time/gradient_steps,eval/mean_reward,eval/normalized_score,eval/value_bias\n10,-3.0,50.0,-7.0\n", encoding="utf-8"
    )
    found = curves(plot_run(tmp_path))
    assert found["normalised score"] == [([10.0], [50.0])]
    assert found["start of an episode, in units of the reward"] == [([10.0], [-7.0])]
    assert "return of an episode" not in found


def test_d3rlpy(tmp_path: Path) -> None:
    for folder, name, text in [
        ("offline", "q_data", "1,100,2.5\n2,200,3.5\n"),
        ("offline", "environment", "1,100,-9.0\n"),
        ("online", "q_data", "1,50,4.5\n"),
        ("online", "evaluation", "1,50,-8.0\n"),
        ("online", "time_environment_step", "1,50,0.001\n"),  # no episode has ended yet: there is no rollout_return
    ]:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.csv").write_text(text, encoding="utf-8")
    figure = plot_run(tmp_path / "offline", tmp_path / "online")
    assert curves(figure) == {
        "return of an episode": [([100.0], [-9.0]), ([250.0], [-8.0])],
        "Q, in units of the reward": [([100.0, 200.0], [2.5, 3.5]), ([250.0], [4.5])],
    }
    assert switches(figure) == {200.0}


@pytest.mark.parametrize(("also", "unit"), [([], "gradient steps"), (["rollout_return"], "environment steps")])
def test_an_evaluator_called_evaluation(also: list[str], unit: str, tmp_path: Path) -> None:
    """d3rlpy's `fit_online` calls its own that; in a `fit` it is a name that the user chose."""
    for name in ("evaluation", "q_data", *also):
        (tmp_path / f"{name}.csv").write_text("1,100,2.5\n", encoding="utf-8")
    assert {axis.get_xlabel() for axis in plot_run(tmp_path).axes} == {unit}


@pytest.mark.parametrize("counts_on", [True, False])
def test_several_folders_of_a_phase(tmp_path: Path, counts_on: bool) -> None:
    """Each fit of d3rlpy's counts from 0: its steps come after those of the one before. Those that count on stay."""
    for number, (folder, names) in enumerate(
        [
            ("first", ["q_data", "q_policy"]),
            ("second", ["q_data"]),
            ("third", ["q_data", "rollout_return"]),
            ("fourth", ["q_data", "rollout_return"]),
        ]
    ):
        (tmp_path / folder).mkdir()
        start = 200 * (number % 2) if counts_on else 0
        text = f"1,{start + 100},{number}.25\n2,{start + 200},{number}.5\n"
        for name in names:
            (tmp_path / folder / f"{name}.csv").write_text(text, encoding="utf-8")
    figure = plot_run(*(tmp_path / folder for folder in ("first", "second", "third", "fourth")))
    assert curves(figure) == {
        "return of an episode": [([500.0, 600.0, 700.0, 800.0], [2.25, 2.5, 3.25, 3.5])],
        "Q, in units of the reward": [
            ([100.0, 200.0, 300.0, 400.0], [0.25, 0.5, 1.25, 1.5]),
            ([500.0, 600.0, 700.0, 800.0], [2.25, 2.5, 3.25, 3.5]),
            ([100.0, 200.0], [0.25, 0.5]),
        ],
    }
    assert switches(figure) == {400.0}


def test_folders_of_a_run_that_was_killed(tmp_path: Path) -> None:
    """It goes on from its checkpoint: what was logged after that is logged again."""
    for folder, steps in (("first", (1000, 2000, 3000, 4000)), ("second", (2500, 3500, 4500))):
        (tmp_path / folder).mkdir()
        text = "".join(f"1,{step},{step}.{len(folder)}\n" for step in steps)
        (tmp_path / folder / "q_data.csv").write_text(text, encoding="utf-8")
    figure = plot_run(tmp_path / "first", tmp_path / "second")
    (curve,) = curves(figure)["Q, in units of the reward"]
    assert curve == ([1000.0, 2000.0, 2500.0, 3500.0, 4500.0], [1000.5, 2000.5, 2500.6, 3500.6, 4500.6])


def test_curves_that_a_run_which_goes_on_has_not_logged_yet(tmp_path: Path) -> None:
    """Its checkpoint is where all of them end: an evaluation of the part that was thrown away is no longer the run's."""
    for folder, name, steps in [
        ("first", "q_data", (1000, 2000, 3000, 4000)),
        ("first", "environment", (2000, 4000)),
        ("first", "q_gap", (4000,)),
        ("second", "q_data", (2500, 3500)),
        ("third", "q_data", (4500,)),
        ("third", "q_gap", (4500,)),
    ]:
        (tmp_path / folder).mkdir(exist_ok=True)
        text = "".join(f"1,{step},{step}.5\n" for step in steps)
        (tmp_path / folder / f"{name}.csv").write_text(text, encoding="utf-8")
    figure = plot_run(tmp_path / "first", tmp_path / "second")
    assert curves(figure) == {
        "return of an episode": [([2000.0], [2000.5])],
        "Q, in units of the reward": [([1000.0, 2000.0, 2500.0, 3500.0], [1000.5, 2000.5, 2500.5, 3500.5])],
    }
    assert curves(plot_run(tmp_path / "first"))["return of an episode"] == [([2000.0, 4000.0], [2000.5, 4000.5])]
    more = plot_run(*(tmp_path / folder for folder in ("first", "second", "third")))
    assert curves(more)["Q of the data's actions minus uniform ones'"][0] == ([4500.0], [4500.5])


def test_folders_with_different_curves_of_one_run(tmp_path: Path) -> None:
    for name in ("q_data", "q_policy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.csv").write_text("1,100,0.25\n2,200,0.5\n", encoding="utf-8")
    figure = plot_run(tmp_path / "q_data", tmp_path / "q_policy")
    assert curves(figure)["Q, in units of the reward"] == [([100.0, 200.0], [0.25, 0.5])] * 2


def test_two_calls_of_learn_in_one_log(tmp_path: Path) -> None:
    """SB3 counts from 0 again unless it is told not to; the second's steps come after the first's."""
    rows = [*OFFLINE, *ONLINE, ",8,3.75,4.75,,,-1.5", ",16,,,,-0.5,"]
    figure = plot_run(write(tmp_path / "run", *rows))
    found = curves(figure)
    assert found["return of an episode"] == [([15.0], [-3.0]), ([36.0, 52.0], [-1.0, -0.5]), ([28.0, 44.0], [-2.5, -1.5])]
    assert found["Q, in units of the reward"][1] == ([28.0, 44.0], [1.75, 3.75])


def test_an_evaluation_after_the_last_offline_line(tmp_path: Path) -> None:
    """As of a run that was interrupted: its line says that it is offline."""
    figure = plot_run(write(tmp_path / "run", *OFFLINE, "25,25,,,,-2.0,"))
    assert curves(figure)["return of an episode"] == [([15.0, 25.0], [-3.0, -2.0])]
    assert not switches(figure)


BACK = ["30,,2.0,3.0,3.0,,", "40,40,,,,-1.5,"]


def test_offline_online_and_offline_again(tmp_path: Path) -> None:
    """What has SB3's own clock alone is online; the second offline phase goes on from the steps of the first."""
    run = write(tmp_path / "run", *OFFLINE, *ONLINE, *BACK)
    figure = plot_run(run)
    found = curves(figure)
    assert found["Q, in units of the reward"][:2] == [([10.0, 20.0, 30.0], [1.0, 1.5, 2.0]), ([48.0], [1.75])]
    assert found["return of an episode"] == [([15.0, 40.0], [-3.0, -1.5]), ([56.0], [-1.0]), ([48.0], [-2.5])]
    assert switches(figure) == {40.0}
    parts = [tmp_path / name for name in ("first", "second", "third")]
    for part, rows in zip(parts, (OFFLINE, ONLINE, BACK), strict=True):
        write(part, *rows)
    assert str(curves(plot_run(*parts))) == str(found), "three loggers, one run; as text, since NaN is not NaN"


def test_online_before_offline(tmp_path: Path) -> None:
    figure = plot_run(write(tmp_path / "run", ",15,,,,-3.0,", ",16,1.75,,,,-2.5", *OFFLINE))
    found = curves(figure)["return of an episode"]
    assert found == [([15.0], [-3.0]), ([35.0], [-3.0]), ([36.0], [-2.5])]


@pytest.mark.parametrize(
    ("rows", "phase"),
    [
        ([",15,,,,-3.0,"], "offline"),
        ([",10,,,,-3.0,", ",20,,,,-2.0,"], "offline"),
        ([",5,,,,-3.0,"], "online"),  # an environment's clock: it does not lie between the lines
        ([",25,,,,-3.0,"], "online"),
        ([",15,1.5,,,-3.0,"], "online"),  # offline, metrics have lines of their own
        ([",15,,,,-3.0,-2.0"], "online"),
        ([",15,,,,-3.0,", ",16,,,,,-2.0"], "online"),
        ([",16,,,,,-2.0", ",17,,,,-3.0,"], "online"),
    ],
)
def test_evaluations_with_the_hosts_clock_alone(rows: list[str], phase: str, tmp_path: Path) -> None:
    """Older versions wrote those of the offline phase so, too; other lines and other clocks tell them from online ones."""
    figure = plot_run(write(tmp_path / "run", "10,,1.0,2.0,5.0,,", *rows, "20,,1.5,2.5,4.0,,"))
    assert {axis.get_xlabel() for axis in figure.axes} == {
        "gradient steps" if phase == "offline" else "gradient steps, then environment steps"
    }


@pytest.mark.parametrize("end", ["40,,1.2", "40,,1.25,2.25,3.0,,\n50,", "40,,1.25,2.25,3.0,,\n50,,-", "40,,1.25,2.25,3.0,,\n5"])
def test_a_log_of_a_run_that_was_killed(tmp_path: Path, end: str) -> None:
    """Its last line may be half written, which a number cut short does not show."""
    folder = write(tmp_path / "run", *OFFLINE)
    with (folder / "progress.csv").open("a", encoding="utf-8") as log:
        log.write(end)
    data, _ = curves(plot_run(folder))["Q, in units of the reward"]
    assert data == (([10.0, 20.0, 40.0], [1.0, 1.5, 1.25]) if "\n" in end else ([10.0, 20.0], [1.0, 1.5]))
    (tmp_path / "q_data.csv").write_text("1,100,2.5\n2,200,3.", encoding="utf-8")
    assert curves(plot_run(tmp_path))["Q, in units of the reward"] == [([100.0], [2.5])]


def test_words_in_a_log(tmp_path: Path) -> None:
    """SB3's logger takes words, too."""
    rows = [f"{row},{note}" for row, note in zip([HEAD, *OFFLINE], ["note", "hello", "", '"two, in\nlines"'], strict=True)]
    (tmp_path / "progress.csv").write_text("\n".join([*rows, "later,,5.0,5.0,,,,\n"]), encoding="utf-8")
    assert curves(plot_run(tmp_path))["Q, in units of the reward"][0] == ([10.0, 20.0], [1.0, 1.5])


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_files_and_themes(tmp_path: Path, suffix: str) -> None:
    run = write(tmp_path / "run", *OFFLINE)
    sizes = {}
    for theme in ("light", "dark"):
        path = tmp_path / f"{theme}.{suffix}"
        figure = plot_run(run, path=path, title="Run", theme=theme)  # type: ignore[arg-type]
        assert path.stat().st_size > 1000
        sizes[theme] = path.read_bytes()
        assert figure.get_suptitle() == "Run"
    assert sizes["light"] != sizes["dark"]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="log_folders: expected at least one folder"):
        plot_run()
    with pytest.raises(ValueError, match="theme: expected one of light, dark, got 'pink'"):
        plot_run(tmp_path, theme="pink")  # type: ignore[arg-type]
    for missing in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=r"expected SB3's progress.csv, from model.set_logger"):
            plot_run(missing)
    with pytest.raises(ValueError, match=r"nothing to draw in .* hold neither evaluations nor training metrics"):
        plot_run(write(tmp_path / "empty"))
    (tmp_path / "q_data.csv").write_text("1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"q_data.csv, line 1: expected epoch, step and value, got \['1', '2'\]"):
        plot_run(tmp_path)
