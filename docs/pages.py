"""Hooks of mkdocs: pages that stand elsewhere in the repository become pages of the site, without a second copy.

README.md ─► index.md; CONTRIBUTING.md, recipes/README.md, the model card ─► the same path; each recipe ─► a page

Links between them lead to the page of their target; those to files that are no page become plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "recipes/README.md": "recipes/README.md",
    "kimi_mm/pretrained/nano/README.md": "kimi_mm/pretrained/nano/README.md",
}
PICTURE = re.compile(r'<img src="([^"]+)" alt="([^"]*)" width="(\d+)">')
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]*)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from outside docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_without_front_matter(text)))
    for recipe in _recipes():
        name = recipe.removeprefix("recipes/").removesuffix(".yaml")
        content = f"# {name}\n\n```yaml\n{(ROOT / recipe).read_text(encoding='utf-8')}```\n"
        page = File.generated(config, recipe.replace(".yaml", ".md"), content=content)
        page.inclusion = page.inclusion.NOT_IN_NAV
        files.append(page)
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Turns links as they stand in the repository into links of the site."""
    here = next((source for source, target in PAGES.items() if target == page.file.src_uri), None)
    here = here or f"docs/{page.file.src_uri}"

    def link(match: re.Match[str]) -> str:
        picture, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        found = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        if found in _recipes():
            found = found.replace(".yaml", ".md")
        elif found == "recipes":
            found = "recipes/README.md"
        elif found in PAGES:
            found = PAGES[found]
        elif found.startswith("docs/"):
            found = found.removeprefix("docs/")
        else:
            return text
        way = posixpath.relpath(found, posixpath.dirname(page.file.src_uri) or ".")
        return f"{picture}[{text}]({way}{anchor})"

    markdown = PICTURE.sub(r"![\2](\1){ width=\3 }", markdown)
    # What stands in code blocks is no link.
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.S | re.M)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def _recipes() -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.yaml")}


def _without_front_matter(text: str) -> str:
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)
