"""What ``make docs`` does beyond MkDocs: pages and files of the checkout that lie outside docs/.

The links in README.md, CONTRIBUTING.md and so on are those that a reader of the checkout follows.
On the site these files are pages too, and what else they link to is copied beside them.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# File in the checkout: page of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "dyhead_cuda/detection/shipped/README.md": "digits_detector.md",
    "tests/golden/README.md": "fixtures.md",
}
LINK = re.compile(r"""(?:(?<=\]\()|(?<=src="))(?!\w+:|#)([^)"#\s]+)""")
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def source_of(page: str) -> str:
    """The file in the checkout that a page of the site is made of."""
    for source, name in PAGES.items():
        if name == page:
            return source
    return f"docs/{page}"


def place_of(path: str) -> str:
    """Where a file of the checkout is on the site."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"


def target(source: str, link: str) -> str:
    """The file of the checkout that ``link`` in the file ``source`` means."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def links(text: str) -> Iterator[str]:
    """The relative links of a page, without their anchors."""
    for match in LINK.finditer(CODE.sub("", text)):
        yield match[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages outside docs/, and what any page links to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for page in list(files.documentation_pages()):
        source = source_of(page.src_uri)
        for link in links((ROOT / source).read_text()):
            path = target(source, link)
            place = place_of(path)
            if (ROOT / path).is_file() and files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links of the checkout into those of the site."""
    source = source_of(page.file.src_uri)
    folder = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        return posixpath.relpath(place_of(target(source, match[1])), folder or ".")

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in parts)
