"""From `evidence.json` to a page that answers: did it learn, does it look, where does it fail, what did it cost, can I
promote it?

`render` is what a run needs, `compare` lays runs side by side; sweeps borrow `page`, `markdown`, `plots` and `words`. A
report shows nothing that is not in the evidence, so old runs can be rendered anew.
"""

from beholder.report.render import render, render_html, render_markdown

__all__ = ["render", "render_html", "render_markdown"]
