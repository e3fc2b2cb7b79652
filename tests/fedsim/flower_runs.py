"""`flwr run` for tests: quietly, in a home of its own, and nothing of it left running."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def flwr_run(app, home, *, nodes, config, seconds=400):
    """Run a Flower app in the simulation engine; return what it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_ADDRESS": "local",  # not what another test has started
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    told = " ".join(f"{key}={value!r}" for key, value in config.items())
    flwr = Path(sys.executable).with_name("flwr")
    command = [str(flwr if flwr.exists() else shutil.which("flwr")), "run", str(app), "--stream"]
    options = ["--federation-config", f"num-supernodes={nodes}", "--run-config", told]
    for _ in range(3):
        try:
            done = subprocess.run(
                command + options, env=os.environ | quiet, cwd=home.parent, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds, check=False,
            )  # fmt: skip
        finally:
            stop(home)
        if "Failed to start local SuperLink within" not in done.stdout:
            break  # Flower gives it 15 s, which a busy machine may not
    return done.stdout


def stop(home):
    """End the processes that `flwr run` leaves behind on purpose."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        for pid in running(home):
            os.kill(pid, kind)
        for _ in range(50):
            if not running(home):
                return
            time.sleep(0.1)


def remaining(home, seconds=90):
    """Return the processes that are still there after a while: Ray's end by themselves.

    Beside two other workers on two cores one took more than 20 s; nothing waits once all are gone.
    """
    end = time.monotonic() + seconds
    while running(home) and time.monotonic() < end:
        time.sleep(0.2)
    return running(home)


def running(home):
    """Return the processes that have this FLWR_HOME, other than this one."""
    mark = f"FLWR_HOME={home}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = mark in (folder / "environ").read_bytes().split(b"\0")
            is_zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
        if is_ours and not is_zombie and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found
