"""What the site needs besides pages and mkdocs.yml: navigation by folder, pages made of other files, formulas as MathML."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
MADE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md", "tour.md": "docs/tour.ipynb"}
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a folder's pages where the navigation names the folder."""
    config.nav = _expanded(config.nav, Path(config.docs_dir))
    return config


def _expanded(entry: Any, docs: Path) -> Any:
    if isinstance(entry, list):
        return [part for inner in entry for part in _pages(inner, docs)]
    return {title: _expanded(inner, docs) for title, inner in entry.items()}


def _pages(entry: Any, docs: Path) -> list[Any]:
    """One entry of the navigation as a list: the pages of a folder, the one about all of it first."""
    if not isinstance(entry, str):
        return [_expanded(entry, docs)]
    if not entry.endswith("/"):
        return [entry]
    pages = sorted((docs / entry).glob("*.md"), key=lambda path: (path.stem not in {"README", "torchmto"}, path.name))
    return [path.relative_to(docs).as_posix() for path in pages]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of files elsewhere, or of another kind."""
    for name, source in MADE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        page = notebook(text) if source.endswith(".ipynb") else text.replace("](docs/", "](")
        files.append(File.generated(config, name, content=page))
    return files


def notebook(text: str) -> str:
    """A notebook as Markdown: its text, its code, and what the code printed or drew."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [_output(output) for output in cell.get("outputs", ()) if output.get("name") != "stderr"]
    return "\n\n".join(parts)


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![What the code above draws](data:image/png;base64,{''.join(data['image/png']).strip()})"
    if "text/html" in data:
        return "".join(data["text/html"]).replace(' border="1" class="dataframe"', "")  # a table as all others
    return f"```text\n{''.join(output.get('text') or data['text/plain']).rstrip()}\n```"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Sessions are highlighted as such, so that their prompts and outputs aren't copied."""
    return markdown.replace("```python\n>>> ", "```pycon\n>>> ")


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw by themselves."""
    return _FORMULA.sub(_mathml, html)


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found[1] == "div" else "inline"
    formula = convert(html.unescape(found[2]), display=display)
    return f'<{found[1]} class="math">{formula}</{found[1]}>'
