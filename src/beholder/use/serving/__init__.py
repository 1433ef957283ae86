"""``beholder serve RUN``: a trained run behind OpenAI's chat completions (extra ``[serve]``).

`schema` what is asked and answered, `pictures` where its images come from, `batching` the one thread that writes,
`app` the routes, `guard` what stands before them, `server` the listening process. docs/serve.md has the commands.
"""
