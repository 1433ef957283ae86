"""The site's pages: what is made of records is complete, every page is in the navigation, every link leads somewhere.

`make docs` builds them strictly; here is what it makes them from, and the notebooks, which are run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from docs.site import layouts, notebooks, pages, reference

import beholder
from beholder.config import GUARDRAILS, STAGES, RunConfig
from beholder.config.section import settings
from beholder.config.wording import annotation_at
from beholder.data.containers import CONTAINERS
from beholder.data.formats import SHAPES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every page of the site."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BEHOLDER_CACHE", str(tmp_path_factory.mktemp("cache")))
        return pages.pages()


# ---------------------------------------------------------------------------------------------------------------
# Complete


def test_every_gate_and_guardrail_has_an_entry_that_says_what_to_do_when_it_fails() -> None:
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    entries = re.findall(
        r"^#### `(\w+)`\n\n<!-- made: (gate|guardrail) (\w+) -->\n\n\*\*When it (?:fails|stops a run):\*\* (?=\S)",
        text,
        re.M,
    )

    assert len(entries) == text.count("\n#### "), "an entry is not as the others are"
    assert all(heading == name for heading, _, name in entries)
    gates = [name for _, kind, name in entries if kind == "gate"]
    assert sorted(gates) == sorted({name for stage in STAGES.values() for name in stage.gates})
    assert sorted(name for _, kind, name in entries if kind == "guardrail") == sorted(GUARDRAILS)


def test_a_gates_entry_has_its_bound_and_its_stages_from_the_records(made: dict[str, str]) -> None:
    told = made["report.md"].partition("#### `looks_clearly`")[2].partition("####")[0]

    assert "`ablation.ratio.shuffled`" in told and "**> 1.05** at the lower end of its interval" in told
    assert "Stages: `align`, `instruct`, `multi`, `distill`." in told


def test_every_layout_has_a_page_with_its_file_and_the_settings_that_it_is_read_with(made: dict[str, str]) -> None:
    spec = importlib.util.spec_from_file_location("formats_table", ROOT / "tests" / "data" / "test_formats.py")
    assert spec is not None and spec.loader is not None
    table: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    shown = {file.name: file.settings for layout in layouts.LAYOUTS.values() for file in layout.files}
    read_as = re.findall(r"\*\*(.+?) of (\w+)\*\*", "".join(made[f"layouts/{name}.md"] for name in layouts.LAYOUTS))

    assert shown == {name: given for name, given, *_ in table.LAYOUTS}
    assert {shape for _, shape in read_as} == set(SHAPES), "a shape of data.formats is on no page"
    assert {title for title, _ in read_as} == {c.title for c in CONTAINERS.values()}, "a container is on no page"


def test_a_layouts_page_shows_what_is_read_and_what_is_rejected_and_why(made: dict[str, str]) -> None:
    page = made["layouts/vqa.md"]

    assert "annotations_path: data/vqa_annotations.json" in page
    assert "2 of 3 records accepted" in page and "`Which colour?`" in page and "`no_annotation`" in page
    assert not re.search(r"(?<![\w/])/(?:\w+/)+", re.sub(r"base64,\S+", "", page)), "a path of this machine"


def test_every_setting_is_on_the_page_of_its_section(made: dict[str, str]) -> None:
    for setting in settings(RunConfig):
        section, _, rest = setting.path.partition(".")
        name = rest.rpartition(".")[2] or section
        place = f"reference/settings/{section if section in reference.section_names() else 'index'}.md"
        assert f"`{name}`" in made[place], setting.path
        if setting.info.description and rest:
            assert reference.cell(setting.info.description) in made[place], setting.path
    assert "`data.sources[]`" in made["reference/settings/data.md"]


def test_every_command_is_told_with_its_options(made: dict[str, str]) -> None:
    from beholder.cli.common import ORDER

    told = made["reference/commands.md"]

    assert {words.partition(" ")[0] for words in reference.commands()} == set(ORDER)
    assert all(f"## `beholder {words}`" in told for words in reference.commands())
    assert "`--promote-anyway`" in told and "`beholder run [OPTIONS] CONFIG`" not in told
    assert "beholder run [OPTIONS] CONFIG\n" in told and "[bold]" not in told


def test_every_public_name_is_in_the_python_reference(made: dict[str, str]) -> None:
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", made["reference/api.md"], re.M)}

    assert set(beholder.__all__) - {"__version__"} <= documented
    assert {"Vlm", "export", "serve"} <= documented


def test_what_the_python_reference_names_is_there(made: dict[str, str]) -> None:
    for name in re.findall(r"^::: ([\w.]+)$", made["reference/api.md"], re.M):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_readme_is_on_the_site_whole_and_once(made: dict[str, str]) -> None:
    headings = list(pages.sections((ROOT / "README.md").read_text(encoding="utf-8")))
    named = [heading for _, own in pages.README.values() for heading in own]
    everything = "\n".join(made[place] for place in ("index.md", *pages.README))

    assert set(named) <= set(headings), "pages.README names a section that the README has not"
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if len(line) > 60 and "](" not in line:
            assert everything.count(line) == 1, line


def test_errors_that_troubleshooting_quotes_are_said_by_the_program() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source) + (ROOT / "Makefile").read_text(encoding="utf-8")
    quoted = re.findall(r'^### "(.+)"$', (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.M)

    assert len(quoted) > 5
    assert [words for words in quoted if words not in source] == []


WRITTEN = ("report.md", "stages.md", "studies.md", "own-parts.md", "troubleshooting.md")


def test_settings_and_commands_that_the_pages_name_are_there() -> None:
    text = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in WRITTEN)
    sections = "|".join(reference.section_names())
    named = set(re.findall(rf"`((?:{sections})(?:\.[a-z_]+)+)(?::[^`]*)?`", text)) - set(
        re.findall(r"`data\.md`", text)
    )
    asked = set(re.findall(r"`beholder ([a-z-]+)", text))

    assert len(named) > 20 and len(asked) > 10
    assert [name for name in sorted(named) if annotation_at(tuple(name.split("."))) is None] == []
    assert asked <= {words.partition(" ")[0] for words in reference.commands()} | {"doctor"}


# ---------------------------------------------------------------------------------------------------------------
# Navigation and links


def test_the_navigation_lists_every_page_once(made: dict[str, str]) -> None:
    listed = list(pages.listed(pages.nav()))

    assert sorted(listed) == sorted(made)


def test_a_page_of_docs_that_nobody_placed_is_in_the_navigation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "docs" / "new-thing.md").write_text("# New\n")
    monkeypatch.setattr(pages, "ROOT", tmp_path)

    assert "new-thing.md" in list(pages.listed(pages.nav()))


def anchors(text: str) -> set[str]:
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    headings = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h) for h in re.findall(r"^#{1,6} (.+)$", text, re.M)]
    return {pages.slug(heading.strip()) for heading in headings}


def test_every_link_between_pages_leads_to_a_page_and_a_heading(made: dict[str, str]) -> None:
    broken, counted = [], 0
    for place, text in made.items():
        text = re.sub(r"^ *```.*?^ *```|`[^`\n]+`(?!\])", "", text, flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            counted += 1
            path, _, anchor = target.partition("#")
            there = os.path.normpath(Path(place).parent / path) if path else place
            known = there in made or (ROOT / "docs" / there).is_file()
            if not known or (anchor and anchor not in anchors(made[there])):
                broken.append(f"{place}: {target}")
    assert broken == []
    assert counted > 100


def test_a_link_to_a_file_without_a_page_is_its_name() -> None:
    linked = functools.partial(
        pages.linked, source="docs/data.md", place="data.md", places={"README.md": "start/quickstart.md"}
    )

    assert linked("see [the map](../Makefile)") == "see `the map`"
    assert linked("see [it](../README.md#offline)") == "see [it](start/install.md#offline)"
    assert linked("`[not](a.md)` and [gone](gone.md)") == "`[not](a.md)` and [gone](gone.md)"


def test_nothing_is_fetched_when_the_site_is_read(made: dict[str, str]) -> None:
    config = (ROOT / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8")
    style = (ROOT / "docs" / "site" / "assets" / "site.css").read_text(encoding="utf-8")

    assert "font: false" in config and "http" not in config + style
    for place, text in made.items():
        assert not re.search(r"!\[[^\]]*\]\(https?:|<(?:img|script|link|iframe)[^>]+https?:", text), place


@pytest.mark.slow
def test_the_site_builds_strictly_and_a_broken_link_stops_it(tmp_path: Path) -> None:
    """In the environment that `make docs` has made; it needs a package registry the first time."""
    builder = ROOT / ".venv-docs" / "bin" / "mkdocs"
    if not builder.exists():
        pytest.skip("no .venv-docs: make docs")
    pages.main(ROOT / "build" / "docs-test")
    config = ROOT / "build" / "docs-test" / "mkdocs.yml"

    def build() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(builder), "build", "-f", str(config), "-d", str(tmp_path / "site")],
            capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        )  # fmt: skip

    try:
        done = build()
        assert done.returncode == 0, done.stdout + done.stderr
        for page in (tmp_path / "site").rglob("*.html"):
            assert not re.search(r'(?:src|rel="stylesheet" href)="https?:', page.read_text(encoding="utf-8")), page
        with (ROOT / "build" / "docs-test" / "pages" / "stages.md").open("a") as page:
            page.write("\n[gone](gone.md#nowhere)\n")
        assert build().returncode != 0
    finally:
        shutil.rmtree(ROOT / "build" / "docs-test")


# ---------------------------------------------------------------------------------------------------------------
# Notebooks

NOTEBOOKS = pytest.mark.parametrize("path", notebooks.notebooks(), ids=lambda path: path.stem)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel of this Python with this source tree, and a folder that is not the reader's own."""
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    return tmp_path


@NOTEBOOKS
def test_what_is_kept_of_a_notebook_has_no_path_of_a_machine_and_no_error(path: Path) -> None:
    text = path.read_text(encoding="utf-8")

    assert not re.search(r"(?<![\w./:])/(?:home|tmp|root|work|Users|usr|opt|var)/", text)
    for cell in json.loads(text)["cells"]:
        assert cell.get("execution_count") is None
        assert all(output["output_type"] != "error" for output in cell.get("outputs", ()))


@NOTEBOOKS
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own: this Python's event loop, its sockets
def test_every_cell_of_a_notebook_runs_on_tiny_parts(path: Path, kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEHOLDER_CACHE", str(kernel / "cache"))
    done = notebooks.execute(path, kernel / "there", SMOKE=True, STEPS=4)

    said = json.dumps([cell.get("outputs", []) for cell in done.cells])
    assert "ablation.loss.shuffled" in said and "text/html" in said


@NOTEBOOKS
@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.filterwarnings("ignore")
def test_a_notebook_as_it_stands_ends_with_a_model_that_looks(path: Path, kernel: Path) -> None:
    """With the quickstart's parts (fetched where they are missing), as a reader runs it."""
    done = notebooks.execute(path, kernel / "there")

    evidence = json.loads(next((kernel / "there" / "outputs").glob("*/evidence.json")).read_text(encoding="utf-8"))
    failed = [gate["name"] for gate in evidence["gates"] if not gate["passed"]]
    assert failed == [], failed
    assert all(not cell.get("outputs") or cell.outputs[0].output_type != "error" for cell in done.cells)


def test_what_a_cell_said_is_kept_as_one_text_without_colours() -> None:
    v4 = importlib.import_module("nbformat").v4
    line = {"output_type": "display_data", "data": {"text/plain": "\x1b[1ma\x1b[0m\n", "text/html": "<pre>a</pre>"}}
    warned = v4.new_output("stream", name="stderr", text="careful\n")
    table = v4.new_output("execute_result", data={"text/html": "<b>b</b>\n\n<i>c</i>"}, execution_count=3)
    outputs = [v4.new_output(**line), v4.new_output(**line), warned, table]
    cell = v4.new_code_cell("1", execution_count=3, outputs=outputs, metadata={"execution": {"at": "now"}})

    (kept,) = notebooks.clean(v4.new_notebook(cells=[cell])).cells

    assert [o.get("text") or o.data["text/html"] for o in kept.outputs] == ["a\na\n", "<b>b</b>\n\n<i>c</i>"]
    assert kept.execution_count is None and kept.outputs[1].execution_count is None and not kept.metadata
