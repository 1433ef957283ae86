"""Every page of the site in one folder, and the builder's config: ``python -m docs.site.pages build/docs``.

Pages are written in `docs/`, made from records (`layouts`, `reference`), or are parts of the README and other files
that stand elsewhere; a text stands in one place. Links are made to fit. What a page takes from a record stands at a
marker, ``<!-- made: stages -->``, which nobody sees where the page is read as a file.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from docs.site import layouts, notebooks, reference

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent

README = {
    "start/quickstart.md": ("Quickstart", ("",)),
    "start/tour.md": ("From your files to a model", ("Your own parts and data",)),
    "start/evidence.md": ("Evidence", ("Evidence that cannot be fooled", "What you can rely on")),
    "start/install.md": ("Installing, offline, what lies where", ("Install", "Where things are", "Licence")),
}
"""Pages made of the README: title, and the sections in it; the first has what stands before any, less the paragraphs
that the home page has. A section that is not named follows the one before it."""
ELSEWHERE = {
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "benchmarks/README.md": "project/benchmarks.md",
}
"""Whole files from other folders."""
OWN = {"home.md": "index.md", "api.md": "reference/api.md"}
"""Pages of this folder: they are of no use but on the site."""


def main(out: Path) -> None:
    """Fills ``out`` anew with ``pages/`` and ``mkdocs.yml``."""
    shutil.rmtree(out, ignore_errors=True)
    for name, text in pages().items():
        path = out / "pages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "images", out / "pages" / "images", dirs_exist_ok=True)
    shutil.copytree(HERE / "assets", out / "pages" / "assets")
    config = (HERE / "mkdocs.yml").read_text(encoding="utf-8")
    (out / "mkdocs.yml").write_text(config + yaml.safe_dump({"nav": nav()}, allow_unicode=True), encoding="utf-8")


def pages() -> dict[str, str]:
    """Every page, by its place on the site."""
    places = _places()
    found: dict[str, str] = {}
    for source, place in places.items():
        if source.endswith(".md") and source != "README.md":
            found[place] = linked(filled((ROOT / source).read_text(encoding="utf-8")), source, place, places)
    for place, text in readme().items():
        found[place] = linked(text, "README.md", place, places)
    for own, place in OWN.items():
        found[place] = filled((HERE / own).read_text(encoding="utf-8"))
    found["layouts/index.md"] = layouts.overview()
    found |= {f"layouts/{name}.md": layouts.page(layout) for name, layout in layouts.LAYOUTS.items()}
    found["reference/commands.md"] = reference.commands_page()
    found["reference/settings/index.md"] = reference.settings_page()
    found |= {f"reference/settings/{n}.md": reference.settings_section(n) for n in reference.section_names()}
    for path in notebooks.notebooks():
        name = path.relative_to(ROOT).as_posix()
        found[places[name]] = linked(notebooks.page(path), name, places[name], places)
    return found


def _places() -> dict[str, str]:
    """File of the repository → its page."""
    docs = ROOT / "docs"
    written = sorted([*docs.glob("*.md"), *docs.glob("decisions/*.md")])
    places = {path.relative_to(ROOT).as_posix(): path.relative_to(docs).as_posix() for path in written}
    places |= ELSEWHERE | {"README.md": next(iter(README))}
    return places | {f"notebooks/{p.name}": f"notebooks/{p.stem}.md" for p in notebooks.notebooks()}


# ---------------------------------------------------------------------------------------------------------------
# Navigation


def nav() -> list[dict[str, Any]]:
    """What stands where; a page of `docs/` that is not named here is under "Out in the world"."""
    named: list[dict[str, Any]] = [
        {"Home": "index.md"},
        {"Start": [
            *({title: place} for place, (title, _) in README.items()),
            *({notebooks.title(p): f"notebooks/{p.stem}.md"} for p in notebooks.notebooks()),
            {"Troubleshooting": "troubleshooting.md"},
        ]},
        {"Your data and parts": [
            {"Your own data": "data.md"},
            {"Data layouts": [
                "layouts/index.md",
                *({group: [{y.title: f"layouts/{y.name}.md"} for y in own]} for group, own in layouts.GROUPS.items()),
            ]},
            {"Your own parts": "own-parts.md"},
        ]},
        {"Train and judge": [
            {"Stages": "stages.md"}, {"Reading the report": "report.md"}, {"Studies": "studies.md"},
            {"Distillation": "distillation.md"}, {"Trackers": "tracking.md"}, {"Footguns": "footguns.md"},
        ]},
        {"Out in the world": []},
        {"Reference": [
            {"Commands": "reference/commands.md"},
            {"Settings": ["reference/settings/index.md",
                          *({n: f"reference/settings/{n}.md"} for n in reference.section_names())]},
            {"Python": "reference/api.md"},
        ]},
        {"Project": [
            {"Architecture": "architecture.md"}, {"Contributing": "project/contributing.md"},
            {"Decisions": [f"decisions/{p.name}" for p in sorted((ROOT / "docs" / "decisions").glob("*.md"))]},
            {"Benchmarks": "project/benchmarks.md"}, {"Log": "LOG.md"}, {"Changelog": "project/changelog.md"},
        ]},
    ]  # fmt: skip
    world = next(entry for entry in named if "Out in the world" in entry)["Out in the world"]
    placed = set(listed(named))
    world += sorted(p.name for p in (ROOT / "docs").glob("*.md") if p.name not in placed)
    return named


def listed(entries: Any) -> Iterator[str]:
    """Every page that a navigation names."""
    match entries:
        case str():
            yield entries
        case dict():
            for inner in entries.values():
                yield from listed(inner)
        case _:
            for inner in entries:
                yield from listed(inner)


# ---------------------------------------------------------------------------------------------------------------
# Parts of the README, and what comes from records


def sections(text: str) -> dict[str, str]:
    """Second-level headings and what stands below each; the first is what stands before any."""
    parts = re.split(r"^## (.+)$", text, flags=re.M)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def readme() -> dict[str, str]:
    """The README's pages."""
    page_of = {heading: place for place, (_, headings) in README.items() for heading in headings}
    found, place = {place: f"# {title}\n" for place, (title, _) in README.items()}, ""
    for heading, text in sections((ROOT / "README.md").read_text(encoding="utf-8")).items():
        place = page_of.get(heading, place)
        title, own = README[place]
        body = text if heading else text.partition(_intro())[2]
        found[place] += f"\n{body.strip()}\n" if heading in (own[0], title) else f"\n## {heading}\n\n{body.strip()}\n"
    return found


def _intro() -> str:
    """What the README says first; it stands on the home page."""
    return "\n\n".join(sections((ROOT / "README.md").read_text(encoding="utf-8"))[""].split("\n\n")[1:3])


MADE: Mapping[str, Callable[[], str]] = {
    "intro": _intro,
    "stages": reference.stages_table,
    "layouts": lambda: "A page for each layout, with a file of it and what is read: [Data layouts](layouts/index.md).",
}
"""What stands at a marker."""


def filled(text: str) -> str:
    """A page with what its markers stand for. ``<!-- made: gate NAME -->`` and ``guardrail NAME`` have their facts."""

    def made(match: re.Match[str]) -> str:
        kind, _, name = match[1].partition(" ")
        if name:
            return {"gate": reference.gate_facts, "guardrail": reference.guardrail_facts}[kind](name)
        return MADE[kind]()

    return re.sub(r"<!-- made: (.+?) -->", made, text)


# ---------------------------------------------------------------------------------------------------------------
# Links


def linked(text: str, source: str, place: str, places: Mapping[str, str]) -> str:
    """Links between files of the repository as links between pages. A file that has no page is named, not linked."""

    def fit(match: re.Match[str]) -> str:
        return match[0] if match["code"] else _link(match, source, place, places)

    return _LINKS.sub(fit, text)


_LINKS = re.compile(
    r"(?P<code>^ *```.*?^ *```|`[^`\n]+`(?!\]))"
    r"|(?P<image>!?)\[(?P<words>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)", re.M | re.S
)  # fmt: skip
"""A link, or code, in which there is none."""


def _link(match: re.Match[str], source: str, place: str, places: Mapping[str, str]) -> str:
    image, words, target = match["image"], match["words"], match["target"]
    if re.match(r"[a-z]+:", target):
        return match[0]
    path, _, anchor = target.partition("#")
    there = os.path.normpath(PurePosixPath(source).parent / path) if path else source
    if image and there.startswith("docs/images/"):
        goal = there.removeprefix("docs/")
    elif there == "README.md" and anchor:
        goal = _page_of_heading(anchor)
    elif there in places:
        goal = places[there]
    elif (ROOT / there).exists():
        return words if words.startswith("`") else f"`{words}`"
    else:
        return match[0]  # the builder says that it is broken
    relative = os.path.relpath(goal, PurePosixPath(place).parent)
    return f"{image}[{words}]({relative}{'#' + anchor if anchor else ''})"


def _page_of_heading(anchor: str) -> str:
    for place, text in readme().items():
        if any(slug(heading) == anchor for heading in re.findall(r"^#+ (.+)$", text, re.M)):
            return place
    return f"no-heading-of-the-readme-has-the-anchor-{anchor}.md"


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub has it and the site's builder is told to have it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
