"""How numbers of runs are shown: a table on the terminal, and one HTML page with pictures."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any

import torch

from fastsfvae.results import pictures
from fastsfvae.results.evaluation import Evaluation, Number, Trained

_DPI = 130
_STYLE = """\
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 0 0 1.5rem }
td, th { padding: .15rem 1rem .15rem 0; border-bottom: 1px solid #ddd; text-align: left }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100%; display: block; margin: 0 0 1.5rem }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }"""


@torch.no_grad()
def draw(trained: Trained, evaluation: Evaluation) -> dict[str, Any]:
    """Figures by title: reconstructions, samples, traversals, KL, and with m = 2 the manifold."""
    generator, decoder, m = trained.generator(), trained.decoder, trained.mean.shape[1]
    rows = pictures.reconstructions(trained.encoder, decoder, trained.x[:16], generator)
    z = torch.randn(128, m, generator=generator, device=trained.x.device)
    figures = {
        "reconstructions": pictures.rows_of_images(rows),
        "samples": pictures.image_grid(decoder(z), 16, "Decoder output f(z), z drawn from N(0, I)"),
        "traversals": pictures.traversals(decoder, trained.mean[0], evaluation.kl_per_dimension),
        "kl": pictures.kl_bars(evaluation.kl_per_dimension, epsilon=0.05),
    }
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
    columns: list[str],
    sections: dict[str, dict[str, list[str]]],
    conventions: dict[str, Any],
    images: dict[str, bytes],
) -> str:
    """One page that needs no other file: tables, pictures, conventions."""
    parts = [f"<h1>{escape(title)}</h1>"]
    for section, rows in sections.items():
        head = "".join(f'<th class="n">{escape(column)}</th>' for column in columns)
        parts.append(f"<h2>{escape(section)}</h2><table><tr><th></th>{head}</tr>")
        for label, cells in rows.items():
            numbers = "".join(f'<td class="n">{escape(cell)}</td>' for cell in cells)
            parts.append(f"<tr><td>{escape(label)}</td>{numbers}</tr>")
        parts.append("</table>")
    for name, data in images.items():
        source = base64.b64encode(data).decode()
        parts.append(
            f'<h2>{escape(name)}</h2><img alt="{escape(name)}" '
            f'src="data:image/png;base64,{source}">'
        )
    parts.append("<h2>conventions</h2><table>")
    parts += [
        f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>"
        for key, value in conventions.items()
    ]
    parts.append("</table>")
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n"
        "</body></html>\n"
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
    return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.2g}"
