"""The command line: typer commands over `runner`, `whatif`, `verify` and `report`.

Exit status: 0 done; 2 the user's input is wrong (one message, no traceback); 130 interrupted;
1 anything else. What a command is for goes to standard output, everything else to standard error.
"""

import contextlib
import json
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from fedsim import __version__
from fedsim.errors import FedsimError, NoNodesError, ScenarioError
from fedsim.problems import choose, shown

if TYPE_CHECKING:
    from fedsim.results import RunResult
    from fedsim.runner import Progress
    from fedsim.scenario import Scenario

__all__ = ["app", "main"]

_VERBOSE = "fedsim.verbose"


class _Group(TyperGroup):
    """Turns what went wrong into one message and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            _complain("interrupted")
            raise typer.Exit(130) from None
        except (ScenarioError, NoNodesError) as error:
            _complain(str(error))
            raise typer.Exit(2) from None
        except Exception as error:
            if ctx.meta.get(_VERBOSE):
                traceback.print_exc()
            message = str(error) if isinstance(error, FedsimError) else _named(error)
            hint = "" if ctx.meta.get(_VERBOSE) else " (fedsim -v … shows where)"
            _complain(f"{message}{hint}")
            raise typer.Exit(1) from None


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _complain(message: str) -> None:
    typer.echo(f"{typer.style('error:', fg='red', bold=True)} {message}", err=True)


app = typer.Typer(
    name="fedsim",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace a value of the file, such as training.learning_rate=0.05; repeatable.",
    ),
]
_DataDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where data files are looked for.")
]
_File = Annotated[Path, typer.Argument(metavar="FILE", help="Scenario, in YAML.")]


def main() -> None:
    """Run the command line."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedsim {__version__}")
        raise typer.Exit


@app.callback()
def _start(
    ctx: typer.Context,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show log messages and tracebacks.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Federated learning on the network you really have.

    A scenario file says what the devices hold, how fast they and their links are.

    Flower strategies are compared in it: devices really train, the network's time is virtual.

    [bold]Examples[/bold]

    fedsim init my.yaml

    fedsim run my.yaml --out runs/first

    fedsim run my.yaml --out runs/slow --set topology.bandwidth="100 kbit/s"
    """
    ctx.meta[_VERBOSE] = verbose
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("fedsim")
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # so that "my_package.nets:Net" is found


def _load(file: Path, overrides: list[str] | None) -> "Scenario":
    from fedsim.scenario import load_scenario

    return load_scenario(file, overrides or [])


@contextlib.contextmanager
def _named_after(file: Path) -> Iterator[None]:
    """Put the file's name before what is wrong in it; options are not the file's."""
    try:
        yield
    except ScenarioError as error:
        if str(error).startswith(("--", "device:")):
            raise
        raise ScenarioError(f"{file}: {error}") from error


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise typer.BadParameter(f"'{value}' is not auto, cpu, cuda or cuda:N")
    return value


@app.command()
def run(
    file: _File,
    overrides: _Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Directory to write; runs/NAME for a file NAME.yaml."),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            callback=_check_device, metavar="NAME", help="Where to train: auto, cpu, cuda, cuda:N."
        ),
    ] = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Strategies to run side by side.")] = 1,
    data_dir: _DataDir = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write a timeline that opens in Perfetto."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the strategies that are not finished.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier run in DIR.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress display.")] = False,
) -> None:
    """Run every strategy of a scenario and compare them.

    Writes the resolved scenario, a line for each round, a summary and a report to DIR.

    [bold]Examples[/bold]

    fedsim run scenarios/quickstart.yaml

    fedsim run my.yaml --out runs/b --set rounds=10 --set data.devices=50

    fedsim run my.yaml --out runs/b --resume
    """
    if resume and force:
        raise typer.BadParameter("give --resume or --force, not both")
    if trace is not None:
        overrides = [*(overrides or []), "record.transfers=true"]
    scenario = _load(file, overrides)
    out = out or Path("runs") / file.stem
    if trace is not None and (out.exists() or trace.parent != out):
        _check_writable(trace)

    from fedsim import runner

    display = _Display(scenario, is_quiet=quiet)
    try:
        with _terminable(), display, _named_after(file):
            result = runner.run(
                scenario,
                out,
                jobs=jobs,
                device=device,
                data_dir=data_dir,
                resume=resume,
                force=force,
                progress=display.update,
            )
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what was recorded is in {out}", err=True)
        for line in display.summary():
            typer.echo(f"  {line}", err=True)
        typer.echo("go on with the same command and --resume", err=True)
        raise typer.Exit(130) from None
    except runner.RunError:
        from fedsim.results import load_run

        _show_result(load_run(out), out)
        raise
    _show_result(result, out)
    if trace is not None:
        from fedsim.report.trace import trace_events, write_chrome_trace

        try:
            write_chrome_trace(trace, trace_events(result))
        except OSError as error:
            raise ScenarioError(f"--trace: cannot write {trace}: {error.strerror}") from error
        typer.echo(f"timeline {trace}")


def _check_writable(path: Path) -> None:
    """Refuse a file that cannot be written before a run has taken its time."""
    is_new = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ScenarioError(f"--trace: cannot write {path}: {error.strerror}") from error
    if is_new:
        path.unlink()


def _show_result(result: "RunResult", out: Path) -> None:
    from fedsim.report.tables import comparison_table

    console = Console()
    width = console.width if console.is_terminal else 120
    Console(width=width).print(comparison_table(result, width=width))
    typer.echo(f"records  {out}")
    if (out / "report.html").is_file():
        typer.echo(f"report   {out / 'report.html'}")


class _Display:
    """Progress of each strategy: a live table on a terminal, plain lines elsewhere."""

    def __init__(self, scenario: "Scenario", *, is_quiet: bool) -> None:
        self._console = Console(stderr=True)
        self._rounds = scenario.rounds
        self._last: dict[str, Progress | None] = dict.fromkeys(scenario.strategies)
        self._tenth: dict[str, int] = {}
        self._is_quiet = is_quiet
        self._live: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self._console.is_terminal and not is_quiet:
            self._live = Live(
                console=self._console, get_renderable=self._table, refresh_per_second=8
            )

    def __enter__(self) -> None:
        self._live.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._live.__exit__(*exception)

    def update(self, progress: "Progress") -> None:
        """Take up how far a strategy is."""
        self._last[progress.strategy] = progress
        if self._is_quiet or isinstance(self._live, Live):
            return
        is_running = progress.state == "running"
        tenth = 10 * progress.round // progress.rounds if is_running else 10
        if self._tenth.get(progress.strategy, 0) < tenth and not (is_running and tenth == 10):
            self._tenth[progress.strategy] = tenth
            typer.echo(_line(progress), err=True)

    def summary(self) -> Iterator[str]:
        """Yield how far each strategy came."""
        for name, progress in self._last.items():
            yield _line(progress) if progress else f"{name}: not started"

    def _table(self) -> RenderableType:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for heading in ("strategy", "", "round", "accuracy", "virtual time", "traffic", ""):
            table.add_column(heading, justify="left" if heading in ("strategy", "") else "right")
        for name, progress in self._last.items():
            done = progress.round if progress else 0
            bar = ProgressBar(total=self._rounds, completed=done, width=24)
            if progress is None:
                table.add_row(Text(name), bar, "", "", "", "", "waiting")
                continue
            state = "" if progress.state == "running" else progress.state
            table.add_row(Text(name), bar, *_figures(progress), state)
        return table


def _figures(progress: "Progress") -> tuple[str, str, str, str]:
    from fedsim.report.tables import format_bytes, format_duration, format_percent

    return (
        f"{progress.round}/{progress.rounds}",
        format_percent(progress.accuracy),
        format_duration(progress.virtual_time),
        format_bytes(progress.bytes_total),
    )


def _line(progress: "Progress") -> str:
    rounds, accuracy, time, traffic = _figures(progress)
    state = "" if progress.state == "running" else f", {progress.state}"
    return (
        f"{progress.strategy}: round {rounds}, accuracy {accuracy}, virtual time {time}, "
        f"traffic {traffic}{state}"
    )


@app.command()
def validate(
    file: _File,
    overrides: _Overrides = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Print the scenario with every default filled in.")
    ] = False,
    data_dir: _DataDir = None,
) -> None:
    """Check a scenario file and run nothing.

    Everything is built as a run would build it, its data included.

    [bold]Examples[/bold]

    fedsim validate my.yaml

    fedsim validate my.yaml --resolved --set rounds=3
    """
    from fedsim.document import read_document, write_yaml

    if "study" in read_document(file).data:
        from fedsim.whatif import read_study

        study = read_study(read_document(file).data)
        if resolved:
            typer.echo(write_yaml(study.model_dump(mode="json")), nl=False)
            return
        pairs = len(study.topologies) * len(study.collectives)
        typer.echo(f"{file} is a valid study: {pairs} pairs of topology and collective")
        return
    scenario = _load(file, overrides)

    from fedsim.simulation import check

    with _named_after(file):
        missing = check(scenario, device="cpu", data_dir=data_dir)
    if resolved:
        typer.echo(scenario.to_yaml(), nl=False)
        return
    names = ", ".join(scenario.strategies)
    typer.echo(
        f"{file} is valid{', but' if missing else ''}: {scenario.data.devices} devices, "
        f"{scenario.rounds} rounds, strategies {names}"
    )
    if missing:
        typer.echo(f"not checked: the data, the model and the devices. {missing}")


@app.command()
def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="What `fedsim run` has written.")
    ],
) -> None:
    """Write the HTML report of the run in a directory again, from its files alone.

    [bold]Example[/bold]

    fedsim report runs/quickstart
    """
    if not directory.is_dir():
        raise ScenarioError(f"{directory} is no directory; give what 'fedsim run --out' wrote")
    from fedsim.report.html import write_report

    typer.echo(write_report(directory))


@app.command()
def whatif(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Study, in YAML; or use the options.")
    ] = None,
    topology: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help='Such as "{kind: bcube, n: 3, k: 2}"; repeatable.'),
    ] = None,
    collective: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="Such as bml or ring; repeatable.")
    ] = None,
    payload: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE", help='A model or a size: vgg19, "100 MB"; repeatable.'),
    ] = None,
    bandwidth: Annotated[
        list[str] | None, typer.Option(metavar="RATE", help='Such as "10 Gbit/s"; repeatable.')
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other key of a study; repeatable."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory to write tables and plots to.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
) -> None:
    """Compare topologies and collectives without training: times, closed forms, cost.

    [bold]Examples[/bold]

    fedsim whatif scenarios/whatif/bcube_vs_fat_tree.yaml --out runs/bcube

    fedsim whatif --topology "{kind: torus, dims: [4, 4]}" --collective ring --payload resnet50
    --bandwidth "10 Gbit/s" --set "latency=20 us"
    """
    from fedsim.document import read_document, read_value
    from fedsim.whatif import evaluate_study, read_study, study_table, write_study

    data: dict[str, Any] = {"study": "collectives"}
    if file is not None:
        data = read_document(file).data
    options = {"topologies": topology, "collectives": collective}
    for key, given in options.items():
        if given:
            data[key] = [read_value(text, f"--{key}") for text in given]
    data |= {k: v for k, v in {"payloads": payload, "bandwidth": bandwidth}.items() if v}
    for text in overrides or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise ScenarioError(f"--set {text}: write KEY=VALUE")
        data[key] = read_value(value, f"--set {key}")
    if data.get("study") is None:
        raise ScenarioError(f"{file} is a scenario with training: use 'fedsim run'")
    result = evaluate_study(read_study(data), jobs)
    Console(width=None if sys.stdout.isatty() else 200).print(study_table(result.frame))
    for line in result.recommendations:
        typer.echo(line)
    if out is not None:
        try:
            write_study(result, out)
        except OSError as error:
            raise ScenarioError(f"--out: cannot write {out}: {error.strerror}") from error
        typer.echo(f"results  {out / 'results.csv'}\nplots    {out / 'plots'}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def topology(
    ctx: typer.Context,
    kind: Annotated[str, typer.Argument(metavar="KIND", help="Such as bcube; see the list below.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it, as FILE.png and FILE.svg.")
    ] = None,
) -> None:
    """Show what a topology is like: counts, degrees, diameter, bisection, spectral gap, price.

    Sizes follow the kind as KEY=VALUE.

    [bold]Examples[/bold]

    fedsim topology bcube n=3 k=2 --out bcube

    fedsim topology fat_tree ports=4 "bandwidth=10 Gbit/s"

    fedsim topology torus "dims=[4, 4]"
    """
    from fedsim.document import read_value
    from fedsim.whatif import build_topology
    from fedsim.whatif.drawing import draw_topology
    from topologies import describe

    spec: dict[str, Any] = {"kind": kind}
    for text in ctx.args:
        key, equals, value = text.partition("=")
        if not equals or key.startswith("-"):
            raise ScenarioError(f"{text!r}: sizes are written KEY=VALUE, for example n=3")
        spec[key] = read_value(value, key)
    graph = build_topology(spec)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, value in describe(graph).items():
        table.add_row(key.replace("_", " "), "–" if value is None else _plain(value))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if out is not None:
        try:
            paths = draw_topology(graph, out.with_suffix("") if out.suffix else out)
        except OSError as error:
            raise ScenarioError(f"--out: cannot write {out}: {error.strerror}") from error
        typer.echo("\n".join(map(str, paths)))


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} of degree {degree}" for degree, count in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.6g}" if isinstance(value, float) else str(value)


@app.command()
def verify(
    cases: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Replay the cases in DIR instead of those that ship."),
    ] = None,
) -> None:
    """Replay the reference cases through the real engines and show the worst errors.

    The cases that ship were computed by independent programs. Exit status 1 if any misses.

    [bold]Example[/bold]

    fedsim verify
    """
    from fedsim.verify import verify as replay_all

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("family", "cases", "worst error", "tolerance", ""):
        table.add_column(heading, justify="left" if heading in ("family", "") else "right")
    results = replay_all(cases)
    for found in results:
        verdict = "ok" if found.is_passed else f"MISSED in {found.worst_case}"
        table.add_row(
            found.family,
            str(found.n_cases),
            f"{found.worst:.1e}",
            f"{found.tolerance:.0e}",
            verdict,
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if not all(found.is_passed for found in results):
        raise typer.Exit(1)


@app.command()
def data(
    data_dir: _DataDir = None,
) -> None:
    """Show which data files are present, where, and whether their content is the known one.

    Files are looked for below --data-dir, else below FEDSIM_DATA, else below ./data.

    [bold]Example[/bold]

    fedsim data --data-dir ~/datasets
    """
    from fedsim.data.files import present_files
    from fedsim.report.tables import format_bytes

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("data set", "part", "file", "size", "checksum"):
        table.add_column(heading, justify="right" if heading == "size" else "left")
    for found in present_files(data_dir):
        if found.path is None:
            table.add_row(found.file.dataset, found.file.part, f"no {found.file.names[0]}", "", "")
            continue
        verdict = {True: "known", False: "DIFFERENT", None: str(found.sha256)[:12]}[found.is_known]
        size = format_bytes(found.size_bytes)
        table.add_row(found.file.dataset, found.file.part, str(found.path), size, verdict)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


@app.command()
def schema() -> None:
    """Print the JSON Schema of scenario files, for editors.

    [bold]Example[/bold]

    fedsim schema > fedsim.schema.json

    and then, as the first line of a scenario:

    # yaml-language-server: $schema=fedsim.schema.json
    """
    from fedsim.scenario import json_schema

    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def _complete_kind(incomplete: str) -> list[str]:
    from fedsim.registry import TABLES

    return [kind for kind in TABLES if kind.startswith(incomplete)]


@app.command("list")
def list_(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="KIND",
            help="strategy, topology, link, dataset, …",
            autocompletion=_complete_kind,
        ),
    ] = None,
) -> None:
    """Show the names that a scenario can use; of one kind, with parameters and defaults.

    [bold]Examples[/bold]

    fedsim list

    fedsim list strategy
    """
    from fedsim import registry

    if kind is None:
        for each, names in registry.TABLES.items():
            typer.echo(f"{each + ':':14}{', '.join(sorted(names))}")
        typer.echo(
            "\n'fedsim list KIND' shows parameters; 'package.module:name' names your own code"
        )
        return
    if kind not in registry.TABLES:
        raise ScenarioError(choose(kind, "kind of name", registry.TABLES))
    for entry in registry.list_names(kind):
        typer.echo(f"{typer.style(entry.name, bold=True)}  {entry.error or entry.summary}")
        for parameter in entry.parameters:
            value = "required" if parameter.is_required else shown(parameter.default)
            typer.echo(f"    {parameter.name}: {parameter.type} ({value})")


@app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write.")] = Path(
        "scenario.yaml"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented scenario to start from.

    [bold]Example[/bold]

    fedsim init my.yaml && fedsim run my.yaml
    """
    if file.exists() and not force:
        raise ScenarioError(f"{file} exists; give --force to replace it, or another name")
    text = resources.files("fedsim").joinpath("starter.yaml").read_text(encoding="utf-8")
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ScenarioError(f"cannot write {file}: {error.strerror or error}") from error
    typer.echo(f"wrote {file}; run it with: fedsim run {file}")
