"""Where a number comes from: the version of the code and the machine."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

# The one place for it: the build reads it here.
VERSION = "0.1.0"


def commit() -> str | None:
    """The checkout's commit, with a + where files differ from it; None for an installed package."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Fails for a package that was installed into some other repository's folder.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: torch.device | str) -> str:
    """The GPU's or the processor's name."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
