"""``beholder serve RUN``: a trained run behind OpenAI's chat completions (extra ``[serve]``).

`schema` what is asked and answered, `pictures` where its images come from, `batching` the one thread that writes,
`app` the routes, `metrics` what is counted, `serve` all of it. docs/serve.md has the commands.
"""
