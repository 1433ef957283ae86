"""HTTP with care: what every server of ours stands behind, and how somebody else's is asked.

`server` the listening process, `guard` what stands before its routes, `errors` what a refusal says, `pages` files for a
browser (extra ``[serve]``); `keys` where a key comes from, `exchange` one request in bounded time (no extra). What is
served is for `use.serving` and `watching` to say.
"""
