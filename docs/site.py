"""What the site needs beside docs/: pages that lie elsewhere, links between them, the notebook.

The README is the home page. It is read on other sites as well, so that its links are absolute; the
others' are relative, as GitHub follows them. Each is led to the site's page of the same file, and
where the site has none to the repository.
"""

import html
import posixpath
import re
from pathlib import Path

import nbconvert
from latex2mathml.converter import convert as to_mathml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

ROOT = Path(__file__).parents[1]
NOTEBOOK = "examples/digits.ipynb"
# The site's name of each file that does not lie in docs/; all of bench/results is at results/.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    NOTEBOOK: "digits.md",
}
RESULTS = "bench/results/"
# [text](target) and, at the start of a line, [name]: target
LINK = re.compile(r"(\]\(|^\[[^\]]+\]: )([^)\s]+)(\)?)", re.MULTILINE)


def name_on_site(path: str) -> str:
    """The name among the site's files of one of the repository's, if it is shown there."""
    if path.startswith(RESULTS):
        return "results/" + path.removeprefix(RESULTS)
    return ELSEWHERE.get(path, path.removeprefix("docs/"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside of docs/."""
    found = [path for ending in ("md", "png") for path in (ROOT / RESULTS).rglob(f"*.{ending}")]
    for path in [*(ROOT / name for name in ELSEWHERE), *found]:
        name = path.relative_to(ROOT).as_posix()
        if name == NOTEBOOK:
            _add_notebook(path, files, config)
        else:
            files.append(File.generated(config, name_on_site(name), abs_src_path=str(path)))
    return files


def _add_notebook(path: Path, files: Files, config: MkDocsConfig) -> None:
    """As a page, with the outputs that are stored in it."""
    exporter = nbconvert.MarkdownExporter()
    # What was printed line by line is one output.
    exporter.register_preprocessor(CoalesceStreamsPreprocessor, enabled=True)
    text, resources = exporter.from_filename(str(path))
    files.append(File.generated(config, ELSEWHERE[NOTEBOOK], content=text))
    for name, data in resources["outputs"].items():
        files.append(File.generated(config, name, content=data))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where their files are."""
    own = page.file.src_uri
    source = (
        Path(page.file.abs_src_path).relative_to(ROOT).as_posix()
        if page.file.abs_src_path
        else NOTEBOOK
    )
    here = posixpath.dirname(source)

    def lead(match: re.Match) -> str:
        target, _, anchor = match[2].partition("#")
        for start in (f"{config.repo_url}/blob/main/", f"{raw(config)}/main/"):
            if target.startswith(start):
                path = target.removeprefix(start)
                break
        else:
            if not target or ":" in target:
                return match[0]
            path = posixpath.normpath(posixpath.join(here, target))
        anchor = f"#{anchor}{match[3]}" if anchor else match[3]
        shown = name_on_site(path)
        if files.get_file_from_path(shown):
            return f"{match[1]}{posixpath.relpath(shown, posixpath.dirname(own) or '.')}{anchor}"
        if files.get_file_from_path(target):
            return match[0]
        if not (ROOT / path).exists():
            raise PluginError(f"{source} points to {match[2]}, which does not exist")
        return f"{match[1]}{config.repo_url}/blob/main/{path}{anchor}"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [LINK.sub(lead, part) for part in parts[::2]]
    return "".join(parts)


def raw(config: MkDocsConfig) -> str:
    """Where the repository's files are read as they are: a README's pictures."""
    return config.repo_url.replace("github.com", "raw.githubusercontent.com").rstrip("/")


def on_page_content(content: str, **_) -> str:
    """Formulas as MathML, which browsers show without a script."""

    def show(match: re.Match) -> str:
        display = "block" if match[2] == "[" else "inline"
        return to_mathml(html.unescape(match[3]), display=display)

    pattern = r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>'
    return re.sub(pattern, show, content, flags=re.DOTALL)
