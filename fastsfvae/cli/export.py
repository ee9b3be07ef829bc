"""The command ``fastsfvae export``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from fastsfvae.ground.options import UsageError, fail, parse, require_extras

_PROG = "fastsfvae export"


@dataclasses.dataclass(frozen=True)
class ExportArguments:
    """Write a run's model with its card, results and pictures, as the Hugging Face hub takes it."""

    run: Annotated[Path, arg(metavar="RUN")]
    """Folder of the run, such as runs/sampling-free-mlp-1."""

    out: Annotated[str, arg(metavar="FOLDER")] = ""
    """Folder that is written: new, empty, or an earlier export that is as it was written."""

    push: Annotated[str, arg(metavar="USER/NAME")] = ""
    """Repository of the hub that it is uploaded to, by the account of hf auth login."""

    license: str = ""
    """Of the model, as the hub names it, e.g. apache-2.0; left open unless given."""


def export_command(options: list[str]) -> int:
    """Run ``fastsfvae export`` and return its exit code."""
    try:
        arguments = parse(_PROG, ExportArguments, options)
        if not arguments.out and not arguments.push:
            raise UsageError("nothing to do: give --out FOLDER, --push USER/NAME, or both")
        require_extras(("huggingface_hub",), "hub")
        from fastsfvae.hub import TrainedVAE

        vae, license_ = TrainedVAE.from_run(arguments.run), arguments.license or None
        if arguments.out:
            vae.save_pretrained(arguments.out, repo_id=arguments.push, license=license_)
            print(f"exported to {arguments.out}")
        if arguments.push:
            print(f"uploaded: {vae.push_to_hub(arguments.push, license=license_)}")
    except BrokenPipeError:
        raise
    except (UsageError, TypeError, ValueError, RuntimeError, OSError) as error:
        return fail(_PROG, str(error))
    except KeyboardInterrupt:
        return fail(_PROG, "interrupted", code=130)
    return 0
