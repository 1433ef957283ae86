"""``beholder watch RUN``: a run while it trains, or after, in a browser (extra ``[serve]``); it only reads.

`so_far` what the run's folder says up to now, `state` that as the page asks for it, `app` the routes and the server,
``watch.html`` with its style and script the page. docs/watch.md has the commands.
"""
