import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from sample_run import write_sample
from test_verify import CASE
from typer.testing import CliRunner

import fedsim
from fedsim import cli, registry, runner
from fedsim.errors import ScenarioError
from fedsim.results import load_run

SCENARIOS = Path(__file__).parents[2] / "scenarios"
SMALL = """\
rounds: 20
data: {devices: 4}
strategies: {linear: fedavg, prox: fedprox}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def fedsim_(tmp_path, monkeypatch):
    """Return a function that calls the command line in an empty directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def call(*arguments):
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])

    return call


class FakeRun:
    """Stands for `fedsim.runner.run`: plays a script of progress, then ends in some way."""

    def __init__(self, end=None, last=20):
        self.end, self.last, self.calls = end, last, []

    def __call__(self, scenario, out, *, progress, **options):
        self.calls.append((scenario, out, options))
        name = next(iter(scenario.strategies))
        for number in range(1, self.last + 1):
            state = ("running", name, number, scenario.rounds, 12.5 * number, number / 40, 1500)
            progress(as_progress(*state))
        if isinstance(self.end, BaseException):
            write_sample(out)
            raise self.end
        progress(as_progress("done", name, self.last, scenario.rounds, 250.0, 0.5, 1500))
        return load_run(write_sample(out))


def as_progress(state, strategy, number, rounds, time, accuracy, traffic):
    return runner.Progress(strategy, number, rounds, time, accuracy, traffic, state)


@pytest.fixture
def fake(monkeypatch):
    def install(*arguments, **options):
        fake = FakeRun(*arguments, **options)
        monkeypatch.setattr(runner, "run", fake)
        return fake

    return install


def test_the_version_is_shown(fedsim_):
    result = fedsim_("--version")
    assert (result.exit_code, result.stdout) == (0, f"fedsim {fedsim.__version__}\n")


def test_starting_is_cheap():
    code = (
        "import sys, fedsim.cli; print([m for m in ('torch', 'flwr', 'yaml') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("command", ["run", "validate", "report", "schema", "list", "init"])
def test_every_command_explains_itself_by_example(fedsim_, command):
    result = fedsim_(command, "--help")
    assert result.exit_code == 0
    assert f"fedsim {command}" in result.stdout


def test_a_run_shows_progress_and_the_comparison(fedsim_, file, fake):
    run = fake()
    result = fedsim_("run", file, "--out", "out", "--set", "rounds=40", "--jobs", 2)
    assert result.exit_code == 0, result.output
    scenario, out, options = run.calls[0]
    assert scenario.rounds == 40
    assert out == Path("out")
    expected = {"jobs": 2, "device": "auto", "data_dir": None, "resume": False, "force": False}
    assert options == expected
    lines = result.stderr.splitlines()
    assert len(lines) == 6
    assert lines[0] == ("linear: round 4/40, accuracy 10.0 %, virtual time 50 s, traffic 1.5 kB")
    assert lines[-1].endswith(", done")
    assert "fedmedian" in result.stdout
    assert f"records  {out}" in result.stdout


def test_a_quiet_run_shows_the_comparison_only(fedsim_, file, fake):
    fake()
    result = fedsim_("run", file, "--quiet")
    assert result.stderr == ""
    assert "records  runs/small" in result.stdout


def test_options_of_a_run_reach_the_runner(fedsim_, file, fake):
    run = fake()
    fedsim_("run", file, "--device", "cuda:1", "--data-dir", "data", "--force")
    expected = {"device": "cuda:1", "data_dir": Path("data"), "force": True}
    assert run.calls[0][2] | expected == run.calls[0][2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--resume", "--force"], "give --resume or --force, not both"),
        (["--jobs", "0"], "0 is not in the range"),
        (["--device", "gpu"], "'gpu' is not auto, cpu, cuda or cuda:N"),
        (["--set", "rounds"], "--set rounds: write KEY=VALUE"),
        (["--nonsense"], "No such option"),
    ],
)
def test_wrong_options_end_with_status_2(fedsim_, file, fake, options, said):
    run = fake()
    result = fedsim_("run", file, *options)
    assert result.exit_code == 2
    assert said in result.stderr
    assert run.calls == []


def test_an_interrupted_run_says_how_far_it_came(fedsim_, file, fake):
    fake(KeyboardInterrupt(), last=13)
    result = fedsim_("run", file, "--out", "out")
    assert result.exit_code == 130
    assert "interrupted; what was recorded is in out" in result.stderr
    assert "  linear: round 13/20" in result.stderr
    assert "  prox: not started" in result.stderr
    assert "go on with the same command and --resume" in result.stderr


def test_a_failed_strategy_ends_with_status_1_and_the_others_are_shown(fedsim_, file, fake):
    fake(runner.RunError("prox: out of luck"))
    result = fedsim_("run", file)
    assert result.exit_code == 1
    assert "error: prox: out of luck" in result.stderr
    assert "fedmedian" in result.stdout
    assert "Traceback" not in result.output


def test_an_unexpected_error_shows_its_traceback_only_when_asked(fedsim_, file, fake):
    fake(ZeroDivisionError("one over nothing"))
    result = fedsim_("run", file)
    assert result.exit_code == 1
    assert "error: ZeroDivisionError: one over nothing (fedsim -v … shows where)" in result.stderr
    assert "Traceback" not in result.output
    verbose = fedsim_("-v", "run", file)
    assert verbose.exit_code == 1
    assert "Traceback" in verbose.output


def test_what_the_runner_refuses_is_the_users_mistake(fedsim_, file, fake):
    fake(ScenarioError("--out: out exists"))
    result = fedsim_("-v", "run", file)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "error: --out: out exists"
    assert "Traceback" not in result.output


def test_an_output_directory_that_exists_is_refused(fedsim_, file):
    Path("out").mkdir()
    Path("out/precious").write_text("keep me")
    result = fedsim_("run", file, "--out", "out")
    assert result.exit_code == 2
    assert "--resume" in result.stderr
    assert "--force" in result.stderr
    assert os.listdir("out") == ["precious"]


def test_an_output_directory_that_cannot_be_written_is_refused(fedsim_, file):
    Path("plain").write_text("a file")
    result = fedsim_("run", file, "--out", "plain/out")
    assert result.exit_code == 2
    assert "cannot write plain/out" in result.stderr


def test_a_trace_that_cannot_be_written_is_refused_before_the_run(fedsim_, file, fake):
    run = fake()
    result = fedsim_("run", file, "--trace", "no/such/trace.json")
    assert result.exit_code == 2
    assert "--trace: cannot write no/such/trace.json: No such file" in result.stderr
    assert run.calls == []


MISTAKES = {
    "rounds: 20\nroundz: 3": "did you mean",
    SMALL.replace("fedprox", "fedprxo"): "'fedprxo' is no strategy; did you mean 'fedprox'?",
    f"{SMALL}topology: {{kind: star, bandwidth: 20}}": "20 has no unit; write for example '20 Mb",
    SMALL.replace("20", "-20"): "rounds: -20 should be greater than or equal to 1",
    SMALL.replace("devices: 4", "devices: 0"): "data.devices: 0 should be greater than or equal",
    SMALL.replace(
        "fedavg", "{kind: fedavg, min_available_nodes: 5}"
    ): "above the number of devices",
    "": "is empty; 'fedsim init' writes a scenario to start from",
    "a: !!python/name:os.system": "YAML tags ('!…') are not allowed",
    "a: &a [*a]": "an alias refers to what it is part of",
}


@pytest.mark.parametrize("text", list(MISTAKES))
@pytest.mark.parametrize("command", ["run", "validate"])
def test_a_newcomers_mistakes_end_with_status_2_and_one_message(fedsim_, file, command, text):
    file.write_text(text)
    result = fedsim_(command, file)
    assert result.exit_code == 2
    assert MISTAKES[text] in result.stderr
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_more_devices_than_samples_are_refused(fedsim_, file):
    result = fedsim_("run", file, "--set", "data.devices=2000")
    assert result.exit_code == 2
    assert "2000" in result.stderr
    assert "Traceback" not in result.output


def test_a_file_that_cannot_be_read_is_named(fedsim_):
    result = fedsim_("run", "nowhere.yaml")
    assert result.exit_code == 2
    assert "cannot read nowhere.yaml: No such file or directory" in result.stderr


def test_validate_says_what_it_found(fedsim_, file):
    result = fedsim_("validate", file)
    assert result.exit_code == 0
    assert result.stdout == f"{file} is valid: 4 devices, 20 rounds, strategies linear, prox\n"


def test_validate_shows_the_resolved_scenario(fedsim_, file):
    options = ["--resolved", "--set", "topology.bandwidth=20 MB/s"]
    shown = yaml.safe_load(fedsim_("validate", file, *options).stdout)
    assert shown["topology"]["bandwidth"] == "160 Mbit/s"


def test_a_report_is_written_again_from_the_files(fedsim_):
    write_sample(Path("done"))
    result = fedsim_("report", "done")
    assert result.exit_code == 0, result.output
    assert "report.html" in result.stdout
    assert Path("done/report.html").is_file()


def test_a_report_needs_a_directory(fedsim_):
    result = fedsim_("report", "nowhere")
    assert result.exit_code == 2
    assert "nowhere is no directory" in result.stderr


def test_the_schema_is_printed_as_json(fedsim_):
    assert json.loads(fedsim_("schema").stdout)["title"] == "Scenario"


def test_names_are_listed(fedsim_):
    result = fedsim_("list")
    assert all(kind in result.stdout for kind in registry.TABLES)
    assert "fedmedian" in result.stdout


def test_names_of_a_kind_are_listed_with_parameters_and_defaults(fedsim_):
    result = fedsim_("list", "strategy")
    assert "proximal_mu: float (0.0)" in result.stdout
    assert "client_learning_rate: float (required)" in result.stdout


def test_an_unknown_kind_suggests_the_nearest(fedsim_):
    result = fedsim_("list", "strategies")
    assert result.exit_code == 2
    assert "did you mean 'strategy'?" in result.stderr


def test_init_writes_a_scenario_that_is_valid(fedsim_):
    assert fedsim_("init", "mine.yaml").exit_code == 0
    assert Path("mine.yaml").read_text().startswith("#")
    assert fedsim_("validate", "mine.yaml").exit_code == 0


def test_init_does_not_replace_a_file_unasked(fedsim_):
    Path("scenario.yaml").write_text("mine")
    result = fedsim_("init")
    assert result.exit_code == 2
    assert "scenario.yaml exists; give --force" in result.stderr
    assert Path("scenario.yaml").read_text() == "mine"
    assert fedsim_("init", "--force").exit_code == 0
    assert fedsim_("init", "no/such/dir.yaml").exit_code == 2


def test_init_gives_a_scenario_that_runs(fedsim_):
    fedsim_("init")
    options = ["--out", "out", "--set", "rounds=2", "--set", "data.devices=4"]
    result = fedsim_("run", "scenario.yaml", *options)
    assert result.exit_code == 0, result.output
    assert set(load_run(Path("out")).strategies) == {"average", "half"}
    assert load_run(Path("out")).strategies["half"].complete


@pytest.mark.parametrize("path", sorted(SCENARIOS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_scenario_that_ships_is_valid(fedsim_, path):
    result = fedsim_("validate", path)
    assert result.exit_code == 0, result.output


OWN = """\
from flwr.serverapp.strategy import FedAvg


class Passing(FedAvg):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)


def fails(**supplied):
    raise KeyError("lost")


def one_part(labels, n_devices):
    return [range(len(labels))]


def too_far(labels, n_devices):
    return [[device, len(labels)] for device in range(n_devices)]


def no_module(input_shape, n_classes):
    return 3
"""

UNFIT = {
    "data.devices=5000": "data.devices: 5000 devices",
    "data.dataset={kind: npz, path: nowhere.npz}": "data.dataset.path: no file 'nowhere.npz'",
    "data.dataset={kind: npz, path: own_here.py}": "own_here.py is no .npz file",
    "data.dataset='own_here:one_part'": "data.dataset.labels: is missing",
    "data.dataset='builtins:dict'": "'builtins:dict' makes a dict, not a fedsim.data.datasets.Data",
    "data.partition={kind: dirichlet, alpha: 0}": "data.partition.alpha: 0.0 is not above 0",
    "data.partition='own_here:fails'": "data.partition: partition 'own_here:fails': KeyError('lost",
    "data.partition='own_here:one_part'": "data.partition: gives 1 parts",
    "data.partition='own_here:too_far'": "data.partition: gives device 0 indices 0..1348",
    "devices.speed=0 samples/s": "devices.speed",
    "devices.speed='builtins:dict'": "devices: AttributeError",
    "model={kind: mlp, hidden: [0]}": "model: fc1.weight has shape (0, 64): no weights",
    "model={kind: mlp, hidden: [-1]}": "model: Trying to create tensor with negative dimension",
    "model='own_here:no_module'": "model.kind: no_module makes a int, no nn.Module",
    "executor='builtins:dict'": "executor: 'builtins:dict' is no executor. One of: client_app",
    "topology='builtins:dict'": "topology: 'builtins:dict' is no topology. One of:",
    "training.learning_rate=.inf": "training.learning_rate",
    "training.learning_rate=.nan": "training.learning_rate",
    "strategies.prox='collections:OrderedDict'": "strategies.prox: this makes a OrderedDict, not",
    "strategies.prox={kind: fedadam, eta: .inf}": "strategies.prox.eta",
    "strategies.prox.fraction_train=1.5": "strategies.prox.fraction_train: 1.5 is not between 0",
    "strategies.prox.fraction_evaluate=-1": "strategies.prox.fraction_evaluate: -1.0 is not betw",
    "strategies.prox={kind: 'own_here:Passing', fraction_trian: 1}": "did you mean 'fraction_train",
    "strategies.prox={kind: dp_server_fixed, strategy: fedavg, noise_multiplier: -1, "
    "clipping_norm: 1, num_sampled_clients: 4}": "strategies.prox: strategy 'dp_server_fixed': The",
}


@pytest.mark.parametrize("change", list(UNFIT))
def test_validate_refuses_what_a_run_would_refuse(fedsim_, file, change):
    Path("own_here.py").write_text(OWN)
    results = [fedsim_(command, file, "--set", change) for command in ("validate", "run")]
    sys.modules.pop("own_here", None)
    for result in results:
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {file}: ")
        assert UNFIT[change] in result.stderr
        assert result.stderr.count("\n") == 1
        assert result.stdout == ""
    assert [name for name in os.listdir() if name != "__pycache__"] == ["own_here.py"]


def test_a_data_set_that_is_not_on_this_machine_leaves_a_scenario_valid(fedsim_, file):
    options = ["--data-dir", "nowhere", "--set", "data.dataset=mnist"]
    result = fedsim_("validate", file, *options)
    assert result.exit_code == 0, result.output
    assert f"{file} is valid, but: 4 devices" in result.stdout
    assert "mnist is not there" in result.stdout
    assert fedsim_("run", file, *options).exit_code == 2
    wrong = fedsim_("validate", file, *options, "--set", "strategies.prox='builtins:dict'")
    assert wrong.exit_code == 2


def test_code_in_the_current_directory_is_found(fedsim_, file):
    Path("my_nets_here.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Linear):\n"
        "    def __init__(self, input_shape, n_classes):\n"
        "        super().__init__(64, n_classes)\n"
    )
    result = fedsim_("validate", file, "--set", "model=my_nets_here:Net")
    assert result.exit_code == 0, result.output


def test_a_topology_is_described_and_drawn(fedsim_, tmp_path):
    result = fedsim_("topology", "bcube", "n=3", "k=2", "--out", tmp_path / "bcube.png")
    assert result.exit_code == 0, result.output
    assert ["switches", "6"] in [line.split() for line in result.stdout.splitlines()]
    assert (tmp_path / "bcube.png").is_file()
    assert (tmp_path / "bcube.svg").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fat_tree", "ports=5"], "even"),
        (["bcube", "n=1", "k=2"], "n = 1"),
        (["bcub", "n=3"], "bcube"),
        (["bcube", "3"], "KEY=VALUE"),
    ],
)
def test_a_topology_that_cannot_be_is_one_clear_error(fedsim_, words, said):
    result = fedsim_("topology", *words)
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output


def test_a_study_runs_from_a_file_and_from_options(fedsim_, tmp_path):
    path = SCENARIOS / "whatif" / "edge_hierarchy.yaml"
    result = fedsim_("whatif", path, "--out", tmp_path / "study")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "study" / "results.csv").is_file()
    words = ["--topology", "{kind: bcube, n: 2, k: 2}", "--collective", "bml"]
    words += ["--payload", "1 MB", "--bandwidth", "1 Gbit/s"]
    result = fedsim_("whatif", *words)
    assert result.exit_code == 0, result.output
    assert "bml" in result.stdout


def test_studies_and_scenarios_are_not_mixed_up(fedsim_):
    study = SCENARIOS / "whatif" / "failures.yaml"
    assert "fedsim whatif" in fedsim_("run", study).output
    assert "fedsim run" in fedsim_("whatif", SCENARIOS / "quickstart.yaml").output
    words = ["--topology", "{kind: ring, devices: 4}", "--collective", "bml"]
    result = fedsim_("whatif", *words, "--payload", "vgg19", "--bandwidth", "1 Gbit/s")
    assert result.exit_code == 2
    assert "no pair of topology and collective makes sense" in result.output


def test_verify_prints_each_family_and_fails_with_one_that_misses(fedsim_, tmp_path):
    (tmp_path / "case.json").write_text(json.dumps(CASE))
    result = fedsim_("verify", "--cases", tmp_path)
    assert result.exit_code == 0, result.output
    assert "network" in result.stdout
    (tmp_path / "case.json").write_text(json.dumps(CASE | {"finish_s": {"f": 2.6}}))
    assert fedsim_("verify", "--cases", tmp_path).exit_code == 1
    assert fedsim_("verify", "--cases", tmp_path / "none").exit_code == 2
