"""Notebooks as pages; and executed: ``python -m docs.site.notebooks FOLDER`` runs them there and keeps what came out.

A notebook is a text that is run: what stands below its cells is from a run of it, with its paths as a reader has them.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def notebooks() -> list[Path]:
    """In the order of the site."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"), key=lambda path: path.name != "train_and_look.ipynb")


def title(path: Path) -> str:
    """Its first heading."""
    return _cells(path)[0]["source"].splitlines()[0].removeprefix("# ")


def _cells(path: Path) -> list[dict[str, Any]]:
    """Its cells, texts whole. Building the site needs no Jupyter."""
    return [_whole(cell) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def _whole(value: Any) -> Any:
    """Notebooks hold texts by lines."""
    if isinstance(value, dict):
        return {k: _whole(v) for k, v in value.items()}
    if isinstance(value, list):
        return "".join(value) if value and all(isinstance(v, str) for v in value) else [_whole(v) for v in value]
    return value


def page(path: Path) -> str:
    """The notebook in Markdown: texts, code, and below it what came out."""
    first, *cells = _cells(path)
    parts = [first["source"], f'!!! note ""\n    The notebook itself: `notebooks/{path.name}`.']
    for cell in cells:
        parts.append(cell["source"] if cell["cell_type"] == "markdown" else f"```python\n{cell['source']}\n```")
        parts += [shown for output in cell.get("outputs", ()) if (shown := _shown(output))]
    return "\n\n".join(parts) + "\n"


def _shown(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if html := data.get("text/html", "").strip():
        html = re.sub("\n+", "\n", html)  # Markdown ends a block of HTML at an empty line
        return f'<div class="output">{html}</div>'
    text = output["text"] if output["output_type"] == "stream" else data.get("text/plain", "")
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def execute(path: Path, folder: Path, **parameters: Any) -> Any:
    """The notebook, run in ``folder`` by a kernel of this Python, with some of its parameters set otherwise.

    Raises nbclient's `CellExecutionError` where a cell fails.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    (own,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    told = own.source
    for name, value in parameters.items():
        assert re.search(rf"^{name} = ", told, re.M), f"{path.name} has no parameter {name}"
        own.source += f"\n{name} = {value!r}"
    folder.mkdir(parents=True, exist_ok=True)
    NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    own.source = told
    return notebook


def clean(notebook: Any) -> Any:
    """As it is kept: what was said line by line is one text without colours, and nothing says when it was run."""
    from nbformat.v4 import new_output

    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        said, others = "", []
        for output in cell.outputs:
            if output.output_type == "display_data" and "text/plain" in output.data:
                said += output.data["text/plain"]
            elif output.output_type == "stream":
                said += output.text if output.name == "stdout" else ""
            else:
                if "execution_count" in output:
                    output.execution_count = None
                others.append(output)
        said = re.sub(r"\x1b\[[0-9;]*m", "", said)
        cell.outputs = [new_output("stream", name="stdout", text=said)] * bool(said) + others
    return notebook


if __name__ == "__main__":
    import nbformat

    for path in notebooks():
        nbformat.write(clean(execute(path, Path(sys.argv[1]))), path)
