"""What the command line does; `cql_plugins.cli` starts it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import gymnasium as gym
import numpy as np
import typer
from gymnasium import spaces
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from cql_plugins._files import remove_leftovers
from cql_plugins.adapters import (
    DatasetError,
    OfflineDataset,
    from_d4rl,
    from_minari,
    from_npz,
    normalized_score,
    reference_scores,
    to_d4rl,
    to_npz,
)
from cql_plugins.adapters._findings import Finding, find, inferred_spaces
from cql_plugins.adapters._minari_files import check_id
from cql_plugins.adapters._sources import SUFFIXES, Kind, is_minari, is_path, locate
from cql_plugins.adapters._steps import ReadingWarning, infer_action_space, infer_observation_space
from cql_plugins.adapters._untrusted import MEMORY_VARIABLE, memory_limit
from cql_plugins.adapters._validation import Where
from cql_plugins.adapters.arrays import stem
from cql_plugins.adapters.minari import Beside, beside_transitions, check_new_id, datasets_path, store
from cql_plugins.adapters.report import Quantiles, describe_space, number, printable, saturation
from cql_plugins.adapters.scores import REFERENCE_SCORES

EXIT_CODES = (
    "Exit codes: 0 all is well; 1 the data is refused or cannot be read, or a file cannot be written; 2 the command is used "
    "wrongly, or would overwrite something; 3 inspect --strict has warnings."
)
REFUSED, STRICT = 1, 3
_PIPE_WIDTH = 120
"""Columns of tables that do not go to a terminal."""

app = typer.Typer(
    help="Look at logged data, convert it, score returns, list the published settings of CQL and Cal-QL.",
    epilog=EXIT_CODES,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class Theme(StrEnum):
    """Colours of a figure."""

    LIGHT = "light"
    DARK = "dark"


class Storage(StrEnum):
    """Where a reader keeps the data."""

    MEMORY = "memory"
    MEMMAP = "memmap"


class DataFormat(StrEnum):
    """Minari's storages."""

    HDF5 = "hdf5"
    ARROW = "arrow"
    PARQUET = "parquet"


_FIGURES = (".png", ".svg", ".pdf")

_SOURCE_HELP = (
    "An HDF5 file in D4RL's layout (.hdf5, .h5), an .npz file, a folder with Minari data, or the id of a Minari data set, "
    "looked up under $MINARI_DATASETS_PATH."
)
FileOrId = Annotated[str, typer.Argument(metavar="FILE_OR_ID", help=_SOURCE_HELP, show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document; what is not finite is null.")]
PreferTermination = Annotated[
    bool, typer.Option("--prefer-termination", help="Read a step with both flags as terminated instead of refusing it.")
]
MaxEpisodeSteps = Annotated[
    int | None,
    typer.Option(min=1, show_default=False, help="The environment's time limit, for D4RL files without timeouts."),
]
StorageOption = Annotated[
    Storage, typer.Option(help="memmap reads data larger than memory, through files in the user's cache.")
]


# Reading --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Read:
    """A data set, how and where it is stored, and what its reader decided."""

    kind: Kind
    place: str | Path
    dataset: OfflineDataset
    notes: tuple[str, ...]


def _say(text: object) -> None:
    """Write one line to stderr."""
    typer.echo(f"cql-plugins: {printable(' '.join(str(text).split()))}", err=True)


def _refuse(problem: object) -> NoReturn:
    _say(problem)
    raise typer.Exit(REFUSED)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Say in a line what data or the disk does not allow; whatever else is raised is a bug and shows where it is."""
    try:
        yield
    except (DatasetError, ImportError, OSError) as error:
        _refuse(error)
    except MemoryError as error:
        _refuse(f"{error or 'out of memory'}. --storage memmap reads data that is larger than memory")


def _notes(caught: Iterable[warnings.WarningMessage], sort: type[Warning] = UserWarning) -> list[str]:
    """Take the notes out of warnings of one sort; the others are warned of again."""
    notes: list[str] = []
    for warning in caught:
        if isinstance(warning.message, ReadingWarning):
            notes += warning.message.notes
        elif isinstance(warning.message, sort):
            notes.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return notes


def _read(source: str, prefer_termination: bool, max_episode_steps: int | None, storage: Storage) -> _Read:
    """Read a data set of any kind, or leave with a message."""
    try:
        memory_limit()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"${MEMORY_VARIABLE}") from error
    with _refusals(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kind, place = locate(source)
        if max_episode_steps is not None and kind is not Kind.D4RL:
            raise typer.BadParameter("only D4RL files need it", param_hint="--max-episode-steps")
        options: dict[str, Any] = {"prefer_termination": prefer_termination, "storage": storage.value}
        if kind is Kind.D4RL:
            dataset = from_d4rl(place, max_episode_steps=max_episode_steps, **options)
        elif kind is Kind.NPZ:
            dataset = from_npz(place, **options)
        else:
            dataset = from_minari(place, **options)
    notes = _notes(caught, ReadingWarning)
    # What a finding says with its consequence.
    notes = [note for note in notes if not note.startswith("inferred from the values") and "episode(s) end with" not in note]
    return _Read(kind, place, dataset, tuple(notes))


# Showing --------------------------------------------------------------------------------------------------------------


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def _print_json(document: Any) -> None:
    # Infinity is no JSON.
    finite = json.loads(json.dumps(document), parse_constant=lambda _: None)
    typer.echo(json.dumps(finite, indent=1))


def _table(title: str, *header: str) -> Table:
    table = Table(title=Text(title) if title else None, show_header=bool(header))
    for name in header:
        table.add_column(name)
    return table


@app.command()
def inspect(
    source: FileOrId,
    as_json: AsJson = False,
    figure: Annotated[
        Path | None, typer.Option(metavar="OUT.png", show_default=False, help="Also draw it, as PNG, SVG or PDF.")
    ] = None,
    theme: Annotated[Theme, typer.Option(help="Colours of the figure.")] = Theme.LIGHT,
    gamma: Annotated[float, typer.Option(min=0, max=1, help="Discount factor of the returns-to-go.")] = 0.99,
    strict: Annotated[bool, typer.Option("--strict", help="Leave with exit code 3 where there are warnings.")] = False,
    prefer_termination: PreferTermination = False,
    max_episode_steps: MaxEpisodeSteps = None,
    storage: StorageOption = Storage.MEMORY,
) -> None:
    """Report what is in a data set, and warn of what will make training on it go wrong."""
    if figure is not None and figure.suffix.lower() not in _FIGURES:
        raise typer.BadParameter(f"expected a name ending in {', '.join(_FIGURES)}, got {figure}", param_hint="--figure")
    read = _read(source, prefer_termination, max_episode_steps, storage)
    dataset, summary = read.dataset, read.dataset.summary()
    findings = [*(Finding("reading", note) for note in read.notes), *find(dataset, summary, gamma)]
    returns_to_go = Quantiles.of(dataset.returns_to_go(gamma))
    if figure is not None:
        from cql_plugins.adapters._figure import draw

        with _refusals():
            draw(dataset, figure, gamma=gamma, theme=theme.value)
    if as_json:
        document = dataclasses.asdict(summary) | {
            "source": source,
            "kind": read.kind.value,
            "observation_space": describe_space(dataset.observation_space),
            "action_space": describe_space(dataset.action_space),
            "inferred_spaces": sorted(dataset.inferred_spaces),
            "action_saturation": _saturation(dataset, dataset.action_space),
            "gamma": gamma,
            "returns_to_go": dataclasses.asdict(returns_to_go),
            "warnings": [dataclasses.asdict(finding) for finding in findings],
        }
        _print_json(document)
    else:
        table = summary.__rich__()
        cut = ", 0 after a cut" if dataset.truncations.any() else ""
        table.add_row(Text(f"return-to-go, gamma {gamma:g}{cut}"), Text(str(returns_to_go)))
        console = _console()
        console.print(table)
        for finding in findings:
            message = f": {printable(finding.message)}."
            console.print(Text.assemble(("warning ", "bold yellow"), (finding.code, "bold"), message))
        if not findings:
            console.print("no warnings")
    if strict and findings:
        raise typer.Exit(STRICT)


def _saturation(dataset: OfflineDataset, space: spaces.Space[Any]) -> dict[str, list[float]] | None:
    """Compute the share of action values within 1 % of each bound, by dimension."""
    if not isinstance(space, spaces.Box):
        return None
    lower, upper = saturation(dataset.actions, space)
    return {"lower": lower.tolist(), "upper": upper.tolist()}


# Converting -----------------------------------------------------------------------------------------------------------


@app.command()
def convert(
    source: FileOrId,
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A .hdf5, .h5 or .npz file; else the id of a Minari data set, such as mine/door-v0, or a folder of such a "
            "name that begins with . or / or ~.",
            show_default=False,
        ),
    ],
    to: Annotated[
        Kind | None, typer.Option(help="The target's format, where its name does not say.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there, once the new data is whole.")] = False,
    env_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Store this environment's id (Minari only).", show_default=False)
    ] = None,
    data_format: Annotated[DataFormat, typer.Option(help="How Minari stores it.")] = DataFormat.HDF5,
    prefer_termination: PreferTermination = False,
    max_episode_steps: MaxEpisodeSteps = None,
    storage: StorageOption = Storage.MEMORY,
) -> None:
    """Convert a data set to another format; the target is there whole or not at all."""
    named = SUFFIXES.get(Path(target).suffix.lower())
    if to is not None and named is not None and to is not named:
        raise typer.BadParameter(f"{target} is the name of a {named} file", param_hint="--to")
    kind = to or named or Kind.MINARI
    if env_id is not None and kind is not Kind.MINARI:
        raise typer.BadParameter(f"{kind} files hold none", param_hint="--env-id")
    place = Path(target).expanduser()
    if kind is Kind.MINARI:
        with _refusals():
            root, dataset_id = _minari_place(target)
        place = root / dataset_id
    if os.path.lexists(place):
        if not force:
            raise typer.BadParameter(f"{place} exists; choose another name, or replace it with --force", param_hint="TARGET")
        if kind is Kind.MINARI and not is_minari(place):
            raise typer.BadParameter(f"{place} is no Minari data set, and is not replaced", param_hint="TARGET")
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console)
    with bar if console.is_terminal else contextlib.nullcontext():
        reading = bar.add_task("reading", total=None)
        read = _read(source, prefer_termination, max_episode_steps, storage)
        dataset = read.dataset if env_id is None else read.dataset._replaced(env_id=env_id)
        beside = Beside()
        if read.kind is Kind.MINARI:
            with _refusals():
                beside = beside_transitions(read.place)
        if dataset.env_id != read.dataset.env_id:
            beside.arguments.pop("env_spec", None)
        if kind is Kind.MINARI and dataset.env_id is not None and "env_spec" not in beside.arguments:
            _register(dataset.env_id)
        bar.update(reading, total=1, completed=1)
        writing = bar.add_task("writing", total=1)

        def progress(share: float) -> None:
            bar.update(writing, completed=share)

        with _refusals(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            remove_leftovers(place.parent)
            if kind is Kind.D4RL:
                to_d4rl(dataset, place, overwrite=force, progress=progress)
            elif kind is Kind.NPZ:
                to_npz(dataset, place, overwrite=force, progress=progress)
            else:
                store(
                    dataset,
                    root,
                    dataset_id,
                    replace=force,
                    data_format=data_format,
                    metadata=beside.metadata,
                    progress=progress,
                    **beside.arguments,
                )
    for note in (*read.notes, *_notes(caught), *_left_out(dataset, beside, kind, place)):
        _say(f"note: {note}")
    typer.echo(f"{place}: {dataset.n_episodes:,} episodes, {len(dataset):,} transitions, {kind}")


def _minari_place(target: str) -> tuple[Path, str]:
    """Split a target into the folder that is Minari's, and the id there."""
    if is_path(target):
        path = Path(os.path.abspath(Path(target).expanduser()))
        root, dataset_id = path.parent, path.name
    else:
        root, dataset_id = datasets_path().absolute(), target
    check_id(dataset_id, target)
    check_new_id(dataset_id, target)
    return root, dataset_id


def _register(env_id: str) -> None:
    """Let Gymnasium know the environments that most data sets are from: Minari stores the id only of one it knows."""
    if env_id not in gym.registry:
        with contextlib.suppress(ImportError):
            import gymnasium_robotics

            gym.register_envs(gymnasium_robotics)


def _left_out(dataset: OfflineDataset, beside: Beside, kind: Kind, place: Path) -> Iterator[str]:
    """Say what the target does not hold, and what it holds now as if it were known."""
    if beside.lost:
        yield f"not carried over: {', '.join(beside.lost)}"
    if kind is Kind.MINARI:
        for finding in inferred_spaces(dataset):
            yield f"stored as if it were known: {finding.message}"
        if dataset.env_id is not None and dataset.env_id not in gym.registry and "env_spec" not in beside.arguments:
            yield f"the environment's id {dataset.env_id} is not stored: it is not registered with Gymnasium here"
        return
    if dataset._reward_transform != (1.0, 0.0):
        yield f"{kind} files do not say that rewards are stored after scale_rewards: scores of them are wrong"
    metadata = [name for name in (*beside.arguments, *beside.metadata) if name != "env_spec"]
    if metadata:
        yield f"{kind} files do not hold the metadata: {', '.join(metadata)}"
    lost = [
        f"{name} {describe_space(space)}"
        for name, space, infer in (
            (
                "observation_space",
                dataset.observation_space,
                lambda where: infer_observation_space(dataset.observations, "", where),
            ),
            ("action_space", dataset.action_space, lambda where: infer_action_space(dataset.actions, where)),
        )
        if not _is_what_is_inferred(space, infer)
    ]
    if dataset.env_id is not None:
        lost.append(f"env_id {dataset.env_id!r}")
    if dataset.references is not None and dataset.references != reference_scores(stem(str(place))):
        lost.append(f"references {dataset.references}")
    if lost:
        yield f"{kind} files do not hold these, give them to the reader: {'; '.join(lost)}"


def _is_what_is_inferred(space: Any, infer: Callable[[Where], Any]) -> bool:
    try:
        return bool(infer(Where("")) == space)
    except DatasetError:
        return False


# Scores ---------------------------------------------------------------------------------------------------------------


class _SeveralReturns(TyperCommand):
    """Lets `--returns` take all the numbers that follow it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        taking = False
        for arg in args:
            if taking and _is_number(arg) and spread[-1] != "--returns":
                spread.append("--returns")
            taking = arg == "--returns" or arg.startswith("--returns=") or (taking and _is_number(arg))
            spread.append(arg)
        return super().parse_args(ctx, spread)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@app.command(cls=_SeveralReturns)
def score(
    source: Annotated[
        str | None,
        typer.Argument(metavar="FILE_OR_ID", help=f"{_SOURCE_HELP} Its own episodes are scored.", show_default=False),
    ] = None,
    returns: Annotated[
        list[float] | None,
        typer.Option(metavar="R1 R2 ...", help="Score these undiscounted returns instead.", show_default=False),
    ] = None,
    env_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Take this environment's reference returns.", show_default=False)
    ] = None,
    dataset_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Take those of this D4RL or Minari data set.", show_default=False)
    ] = None,
    references: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Returns of a random and of an expert policy.", show_default=False),
    ] = None,
    as_json: AsJson = False,
    prefer_termination: PreferTermination = False,
    max_episode_steps: MaxEpisodeSteps = None,
    storage: StorageOption = Storage.MEMORY,
) -> None:
    """Compute D4RL's normalised score: 0 for a random policy, 100 for an expert; notes on the reading go to stderr."""
    if references is not None and not (all(map(math.isfinite, references)) and references[0] < references[1]):
        raise typer.BadParameter(
            f"expected two finite numbers, the lower one first, got {references}", param_hint="--references"
        )
    if not all(map(math.isfinite, returns or ())):
        raise typer.BadParameter(f"expected finite numbers, got {returns}", param_hint="--returns")
    if source is None and not returns:
        raise typer.BadParameter("give a data set, or --returns", param_hint="FILE_OR_ID")
    scale = references or _look_up(dataset_name, "--dataset-name") or _look_up(env_id, "--env-id")
    title = source or dataset_name or env_id or "given references"
    read = None if source is None else _read(source, prefer_termination, max_episode_steps, storage)
    dataset = None if read is None else read.dataset
    scale = scale or (dataset.references if dataset else None)
    if scale is None:
        where = "--references LOW HIGH, --env-id or --dataset-name"
        if dataset is None:
            raise typer.BadParameter("no reference returns are given", param_hint=where)
        _refuse(f"{source}: no reference returns are known for {dataset.name!r}. Give {where}")
    values = returns or ([] if dataset is None else _own_returns(dataset))
    if read is not None and not returns and read.notes:
        for note in read.notes:
            _say(f"note: {note}")
        _say("note: the scores are of the transitions that could be read")
    scores = normalized_score(values, scale).tolist()
    if as_json:
        _print_json({"references": scale, "returns": values, "scores": scores, "mean": float(np.mean(scores))})
        return
    if returns:
        rows = [("", value, normalized) for value, normalized in zip(values, scores, strict=True)]
        rows += [("mean", float(np.mean(values)), float(np.mean(scores)))] if len(rows) > 1 else []
    else:
        spreads = [dataclasses.asdict(Quantiles.of(column)) for column in (values, scores)]
        rows = [(name.replace("_", " "), spreads[0][name], spreads[1][name]) for name in spreads[0]]
    table = _table("", "", "return", "normalised score")
    for label, value, normalized in rows:
        table.add_row(label, number(value), f"{normalized:.2f}")
    console = _console()
    console.print(Text(f"{title}: 0 is a return of {number(scale[0])}, 100 one of {number(scale[1])}"))
    console.print(table)


def _own_returns(dataset: OfflineDataset) -> list[float]:
    """Compute the returns of the episodes, with `scale_rewards` before `to_minari` undone."""
    if dataset._reward_transform is None:
        _refuse(f"{dataset.name}: its rewards were stored after different calls of scale_rewards, they have no score")
    scale, shift = dataset._reward_transform
    returns: list[float] = ((dataset.episode_returns - shift * dataset.episode_lengths) / scale).tolist()
    return returns


def _look_up(name: str | None, option: str) -> tuple[float, float] | None:
    if name is None:
        return None
    found = reference_scores(name)
    if found is None:
        raise typer.BadParameter(
            f"no reference returns are known for {name!r}, only for {', '.join(REFERENCE_SCORES)}; give --references LOW HIGH",
            param_hint=option,
        )
    return found


# Presets --------------------------------------------------------------------------------------------------------------


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A family of tasks.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """List the published settings by family of tasks (`cql_plugins.sb3.presets`)."""
    from cql_plugins.sb3.presets import PRESETS, Preset

    if name is not None and name not in PRESETS:
        raise typer.BadParameter(f"expected one of {', '.join(PRESETS)}, got {name!r}", param_hint="NAME")
    chosen = PRESETS if name is None else {name: PRESETS[name]}
    if as_json:
        fields = [field.name for field in dataclasses.fields(Preset)]
        _print_json(
            {
                key: {field: getattr(preset, field) for field in fields} | {"values": dict(preset.values)}
                for key, preset in chosen.items()
            }
        )
        return
    if name is not None:
        preset = PRESETS[name]
        table = _table(f"{name}: {preset.description} ({preset.source})")
        for key, value in preset.settings().items():
            table.add_row(Text(key), Text(str(value)))
    else:
        shown = ("cql_alpha", "return_tail", "rewards", "offline gradient steps")
        table = _table("settings by family of tasks; `cql-plugins presets NAME` has all of one", "name", "tasks", *shown)
        table.columns[0].no_wrap = True
        for key, preset in chosen.items():
            settings = preset.settings()
            table.add_row(key, f"{preset.description} ({preset.source})", *(str(settings.get(one, "")) for one in shown))
    _console().print(table)
