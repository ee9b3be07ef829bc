"""No connection is opened unless a download is asked for."""

import socket
import subprocess
import sys

import pytest

# The hook sees every module's calls, those of import included; it cannot be taken off again.
PROGRAM = """
import os, sys

def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        os.write(2, f"network: {event}\\n".encode())
        os._exit(99)

sys.addaudithook(hook)
import fastsfvae.cli.main
sys.exit(fastsfvae.cli.main.main(sys.argv[1:]))
"""


def _run(folder, *arguments):
    command = [sys.executable, "-c", PROGRAM, "train", *arguments, "--out", "run"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_training_and_its_report_stay_at_home(tmp_path):
    done = _run(tmp_path, "--model", "tanh", "--latent-dim", "2", "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "results.json").is_file()


def test_a_download_that_is_asked_for_does_not(tmp_path):
    data = ["--data", "omniglot", "--data-dir", "data"]
    assert _run(tmp_path, *data).returncode == 2
    asked = _run(tmp_path, *data, "--download")
    assert asked.returncode == 99 and "network: socket.getaddrinfo" in asked.stderr


def test_no_test_reaches_another_machine():
    with pytest.raises(RuntimeError, match="asks for the network: socket.getaddrinfo example.org"):
        socket.create_connection(("example.org", 80))
    # An address that is reserved for documentation.
    with socket.socket() as other, pytest.raises(RuntimeError, match="socket.connect 192.0.2.1"):
        other.connect(("192.0.2.1", 80))
