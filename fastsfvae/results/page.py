"""How numbers of runs are shown: a table on the terminal, and one HTML page with pictures."""

from __future__ import annotations

import base64
import io
import struct
from html import escape
from typing import Any

import torch

from fastsfvae.results import pictures
from fastsfvae.results.evaluation import Evaluation, Number, Trained
from fastsfvae.results.samples import posterior_noise, sample_latents

_DPI = 130
# On a narrow screen a picture is scrolled in a box of its own, at a size at which its words can be
# read; so is a table.
_STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem;
  overflow-wrap: anywhere }
th { overflow-wrap: normal }
h1 { font-size: 1.35rem; line-height: 1.3 }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
.verdict { font-size: 1.1rem; border-left: 4px solid #1b6ca8; padding-left: .75rem }
figure { margin: 0 0 2rem }
.box { overflow-x: auto }
img { display: block; max-width: 100%; height: auto }
table { border-collapse: collapse }
td, th { padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
td.n { white-space: nowrap }
td:first-child { min-width: 8rem; overflow-wrap: break-word }
@media (max-width: 48rem) {
  td, th { padding-right: .5rem; font-size: 15px }
  .box img { max-width: none; width: min(var(--width), 44rem) }
}"""
CAPTIONS = {
    "curves": "What training has logged, over its steps",
    "reconstructions": "Test images, the decoder at the posterior mean, and at one posterior "
    "sample where there is one",
    "samples": "Decoder outputs at samples of the prior, or of what stands for it",
    "traversals": "The decoder along each latent dimension, the others held",
    "kl": "Mean KL divergence of each latent dimension, sorted",
    "manifold": "The decoder over the latent plane",
    "side by side": "Test images; of each run the decoder at the posterior mean, at one posterior "
    "sample, and at samples of the prior",
}


@torch.no_grad()
def draw(trained: Trained, evaluation: Evaluation) -> dict[str, Any]:
    """Figures by title: reconstructions, samples, traversals, KL, and with m = 2 the manifold."""
    generator, decoder, m = trained.generator(), trained.decoder, trained.mean.shape[1]
    drawn = posterior_noise(trained.config, generator)
    rows = pictures.reconstructions(trained.encoder, decoder, trained.x[:16], drawn)
    z, origin = sample_latents(trained.config, trained.encoder, 128, generator)
    title, kl = f"Decoder output f(z), z drawn from {origin}", evaluation.kl_per_dimension
    # Without a KL divergence, by how far the means spread.
    spread = trained.mean.var(0, correction=0).tolist()
    figures = {
        "reconstructions": pictures.rows_of_images(rows),
        "samples": pictures.image_grid(decoder(z), 16, title),
        "traversals": pictures.traversals(
            decoder, trained.mean[0], kl or spread, measure="KL" if kl else "variance"
        ),
    }
    if kl:
        figures["kl"] = pictures.kl_bars(kl, epsilon=0.05)
    if m == 2:
        figures["manifold"] = pictures.manifold(decoder, trained.x.device)
    return figures


def png(figure: Any) -> bytes:
    """Render a figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, bbox_inches="tight")
    return file.getvalue()


def print_table(title: str, columns: list[str], sections: dict[str, dict[str, list[str]]]) -> None:
    """Print rows of cells under section titles, with rich."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for section, rows in sections.items():
        table.add_row(f"[bold]{section}[/bold]")
        for label, cells in rows.items():
            table.add_row(f"  {label}", *cells)
    console = Console()
    # A pipe has no width: its lines are not cut.
    console.width = console.width if console.is_terminal else 1000
    console.print(table)


def html(
    title: str,
    verdict: str,
    columns: list[str],
    sections: dict[str, dict[str, list[str]]],
    conventions: dict[str, Any],
    images: dict[str, bytes],
) -> str:
    """One page that needs no other file: a verdict, pictures, tables, conventions.

    Args:
        title: of the page.
        verdict: what the numbers come to, in one line.
        columns: names of the cells of a row; one that is empty throughout a section is left out.
        sections: title -> label -> cells.
        conventions: what the numbers' meaning depends on.
        images: name -> PNG.
    """
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="verdict">{escape(verdict)}</p>']
    parts += [_figure(name, data) for name, data in images.items()]
    for section, rows in sections.items():
        shown = [i for i in range(len(columns)) if any(cells[i] for cells in rows.values())]
        head = "".join(f'<th class="n">{escape(columns[i])}</th>' for i in shown)
        table = f"<tr><th></th>{head}</tr>"
        for label, cells in rows.items():
            numbers = "".join(f'<td class="n">{escape(cells[i])}</td>' for i in shown)
            table += f"\n<tr><td>{escape(label)}</td>{numbers}</tr>"
        parts.append(_table(section, table))
    rows_of_conventions = (
        f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>"
        for key, value in conventions.items()
        if value is not None
    )
    parts.append(_table("Conventions", "\n".join(rows_of_conventions)))
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n"
        "</body></html>\n"
    )


def _table(title: str, rows: str) -> str:
    return f'<h2>{escape(title)}</h2><div class="box"><table>{rows}</table></div>'


def _figure(name: str, data: bytes) -> str:
    caption = escape(CAPTIONS.get(name, name))
    # A PNG begins with a signature and the header of its first chunk, 16 bytes; then these.
    width, height = struct.unpack(">II", data[16:24])
    size = f'width="{width}" height="{height}" style="--width: {width}px"'
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return (
        f'<figure><h2>{caption}</h2><div class="box"><img alt="{caption}" {size} '
        f'src="{source}"></div></figure>'
    )


COLUMNS = ["value", "± over images", "± Monte Carlo"]


def cells(evaluation: Evaluation) -> dict[str, dict[str, list[str]]]:
    """The rows of an evaluation under `COLUMNS`."""
    return {
        title: {label: _row(number) for label, number in numbers.items()}
        for title, numbers in evaluation.sections.items()
    }


def _row(number: Number) -> list[str]:
    return [_format(value) for value in number]


def _format(value: float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.3g}"
