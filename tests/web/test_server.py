"""Where a server may listen, and its key."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from tests.web.running import KEY

from beholder.types import UserError
from beholder.web.keys import MIN_KEY, key_in
from beholder.web.server import listen


def test_where_others_could_reach_it_a_key_is_needed() -> None:
    for host in ("0.0.0.0", "::", ""):
        with pytest.raises(UserError, match=r"key is needed|--host"):
            listen(host, 0, None)
    for key in (None, KEY):
        with listen("127.0.0.1", 0, key) as listening:
            assert listening.getsockname()[0] == "127.0.0.1"
            with pytest.raises(UserError, match="cannot listen"):
                listen("127.0.0.1", listening.getsockname()[1], None)
    with listen("0.0.0.0", 0, KEY) as listening:
        assert listening.getsockname()[0] == "0.0.0.0"
    with pytest.raises(UserError, match="--host"):
        listen("no such host", 0, KEY)


def test_a_key_comes_from_the_environment_and_is_worth_something() -> None:
    assert key_in(None, {}) is None
    assert key_in("K", {"K": KEY}, least=MIN_KEY) == KEY
    for value in ("", "short", "with a blank in it somewhere", "ключ-ключ-ключ-ключ", "line\nbreak-line-break"):
        with pytest.raises(UserError, match="--api-key-env K") as caught:
            key_in("K", {"K": value}, least=MIN_KEY)
        assert not value or value not in str(caught.value)
    with pytest.raises(UserError, match="no such environment variable"):
        key_in("K", {})


@pytest.mark.parametrize("value", ["two words", "ключ", "line\nbreak"])
def test_another_servers_key_may_be_short_but_must_fit_into_a_header(value: str) -> None:
    assert key_in("K", {"K": "x"}) == "x"
    with pytest.raises(UserError, match=r"^--api-key-env K: the key must have ASCII without blanks$"):
        key_in("K", {"K": value})
