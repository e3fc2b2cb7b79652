"""What happens to the processes of a run when it is ended from outside."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ENDLESS = """\
rounds: 1000000
data: {devices: 4}
evaluation: {every: 1000}
strategies: {linear: fedavg, prox: fedprox}
"""
PATIENCE = 90.0  # s, for a machine that is busy with something else

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="children are read from /proc"),
]


def wait_until(holds):
    """Wait for what will happen sooner or later."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_a_run_that_is_ended(tmp_path, jobs, way):
    (tmp_path / "endless.yaml").write_text(ENDLESS)
    command = [
        sys.executable,
        "-c",
        "from fedsim.cli import main; main()",
        "run",
        "endless.yaml",
        "--out",
        "out",
    ]
    with subprocess.Popen(
        [*command, "--quiet", "--jobs", str(jobs)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        names = ("linear", "prox")[:jobs]
        wait_until(lambda: all((tmp_path / "out" / n / "rounds.jsonl").is_file() for n in names))
        born = children(run.pid)
        run.send_signal(way)
        status = run.wait(PATIENCE)
        wait_until(lambda: not any(map(is_alive, born)))
        said = run.stderr.read()
    assert len(born) >= (jobs if jobs > 1 else 0)
    assert "Traceback" not in said
    if way == signal.SIGTERM:
        assert status == 130
        assert "interrupted; what was recorded is in out" in said


def test_a_script_without_a_main_guard_gets_one_clear_error(tmp_path):
    (tmp_path / "endless.yaml").write_text(ENDLESS)
    (tmp_path / "script.py").write_text(
        "import fedsim\nfedsim.run(fedsim.load_scenario('endless.yaml'), 'out', jobs=2)\n"
    )
    result = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.count("Traceback") == 1
    assert result.stderr.splitlines()[-1].endswith("put the call under  if __name__ == '__main__':")
    assert not (tmp_path / "out").exists()
