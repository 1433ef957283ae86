"""From `evidence.json` to a page that a person understands in five seconds: did it learn, and does it look?

`render` is the whole interface. A report shows nothing that is not in the evidence, so old runs can be rendered anew.
"""

from beholder.report.render import render, render_html, render_markdown

__all__ = ["render", "render_html", "render_markdown"]
