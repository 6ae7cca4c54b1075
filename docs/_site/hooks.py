"""What `mkdocs build` asks us on its way: which pages there are, where their links go, what stands in their blocks.

A page whose first lines say `needs: MODEL` is left out until that model ships, and so are the card of a model that does not
and what stands between `<!-- needs: MODEL -->` and `<!-- end -->`. CONTRIBUTING and CHANGELOG become pages, and every module
of the package gets one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import declared
import execute
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tunemri import methods

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
FROM_ROOT = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
_LINK = re.compile(r"(?<!!)\[([^\[\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")
_SHIM = "https://unpkg.com/iframe-worker/shim"
_NEEDS = re.compile(r"^ *<!-- needs: (\S+) -->\n(.*?)^ *<!-- end -->\n", re.M | re.S)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages that exist today where the navigation says `folder/*`, and drop those that do not."""
    named = {page for page in _pages_of(config.nav) if not page.endswith("*")}
    config.nav = _expanded(config.nav, named)
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Leave out what is not there yet, add what the package itself writes."""
    for file in list(files.documentation_pages()):
        if not _kept(file.src_uri):
            files.remove(file)
    for page, source in FROM_ROOT.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for name in declared.modules():
        text = f"---\ntitle: {name}\n---\n\n# tunemri.{name}\n\n::: tunemri.{name}\n    options:\n      show_root_heading: false\n"
        files.append(File.generated(config, f"reference/modules/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill the marks, mend the links, run the blocks."""
    uri = page.file.src_uri
    shipped = methods.bundled()
    markdown = _NEEDS.sub(lambda found: found[2] if found[1] in shipped else "", markdown)
    markdown = _LINK.sub(lambda found: _link(found, uri, files), declared.fill(markdown))
    stem, count = Path(uri).stem, 0

    def picture(png: bytes) -> str:
        nonlocal count
        count += 1
        name = f"{stem}-{count}.png"
        files.append(File.generated(config, str(Path(uri).parent / name), content=png))
        return name

    try:
        return execute.run_page(markdown, picture)
    except execute.Failed as error:
        raise PluginError(f"{uri}: {error}") from error


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    """Our own stand-in for the search worker instead of one from the network."""
    root = os.path.relpath(".", Path(page.url).parent)
    return output.replace(_SHIM, f"{root}/assets/search.js")


def on_post_template(output: str, *, template_name: str, config: MkDocsConfig) -> str:
    """The same for 404.html, which is no page."""
    return output.replace(_SHIM, "/assets/search.js")


def _kept(uri: str) -> bool:
    """Whether a page of the folder belongs on the site today."""
    path = DOCS / uri
    if path.parent.name == "models" and path.stem != "index":
        return path.stem in methods.bundled()
    needs = re.match(r"---\n(?:.*\n)*?needs: (\S+)\n", path.read_text(encoding="utf-8"))
    return needs is None or needs[1] in methods.bundled()


def _pages_of(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for item in (nav.values() if isinstance(nav, dict) else nav) for page in _pages_of(item)]


def _expanded(nav: Any, named: set[str]) -> Any:
    """The navigation with `folder/*` written out (what is not named elsewhere), without pages that are not there."""
    if isinstance(nav, dict):
        return {title: _expanded(item, named) for title, item in nav.items()}
    if isinstance(nav, list):
        flat = [page for item in nav for page in (_folder(item, named) if str(item).endswith("*") else [item])]
        return [_expanded(item, named) for item in flat if not isinstance(item, str) or _there(item)]
    return nav


def _folder(pattern: str, named: set[str]) -> list[str]:
    if pattern == "reference/modules/*":
        return [f"reference/modules/{name}.md" for name in declared.modules()]
    pages = [path.relative_to(DOCS).as_posix() for path in sorted((DOCS / pattern).parent.glob("*.md"))]
    return [page for page in pages if page not in named]


def _there(page: str) -> bool:
    return page in FROM_ROOT or page.startswith("reference/modules/") or ((DOCS / page).exists() and _kept(page))


def _link(found: re.Match[str], uri: str, files: Files) -> str:
    """A link to another page of the site, `/…` from its root; what leads to a file that is no page stays as its words."""
    words, to, anchor = found[1], found[2], found[3] or ""
    origin = ROOT / FROM_ROOT[uri] if uri in FROM_ROOT else DOCS / uri
    target = DOCS / to[1:] if to.startswith("/") else Path(os.path.normpath(origin.parent / to))
    pages = {ROOT / source: page for page, source in FROM_ROOT.items()}
    page = pages.get(target) or (target.relative_to(DOCS).as_posix() if target.is_relative_to(DOCS) else "")
    if files.get_file_from_path(page) is not None:
        return f"[{words}]({os.path.relpath(page, Path(uri).parent)}{anchor})"
    return words if target.exists() else found[0]  # a link to nowhere is for MkDocs to refuse
