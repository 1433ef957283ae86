"""Whether a run, its export and a server of it answer alike, and what is said where they do not."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.conftest import TinyParts
from tests.use.serving import KEY, serving
from tests.use.talking import untrained_run
from typer.testing import CliRunner

from beholder.cli import app
from beholder.prepare.tiny import colour_source
from beholder.probes import golden
from beholder.train.trained import open_trained
from beholder.types import UserError
from beholder.use import remote as asking
from beholder.use.export import export, held_out
from beholder.use.parity import parity
from beholder.use.remote import Remote
from beholder.use.vlm import Vlm, load
from beholder.web.keys import key_in


@pytest.fixture(scope="module")
def parts(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    """With questions and answers."""
    source = colour_source(tmp_path_factory.mktemp("data"), "jsonl", 24, dialogues=True)
    assert source.image_root is not None
    return replace(tiny_parts, records=Path(source.json_path), images=Path(source.image_root))


@pytest.fixture(scope="module")
def run(parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a golden set of three."""
    folder = untrained_run(parts, tmp_path_factory.mktemp("parity"))
    held = list(held_out(open_trained(folder, torch.device("cpu"))))
    golden.save(folder / "golden.jsonl", [golden.describe(example, "", 1) for example in held[9:12]])
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "folder"
    export(run, out, samples=1)
    return out


def test_an_export_answers_as_its_run_and_the_golden_set_is_asked_first(run: Path, exported: Path) -> None:
    told = parity(run, exported, samples=5, max_new_tokens=8)

    assert (told.samples, told.equal, told.golden, told.prompts_differ, told.differences) == (5, 5, 3, 0, [])
    assert told.model == "BeholderForConditionalGeneration" and told.share == 1.0


@pytest.mark.slow
def test_changed_weights_are_found_with_the_first_token_that_differs(run: Path, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    tensors = load_file(str(file))
    changed = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[changed] = -tensors[changed].flip(0)
    save_file(tensors, str(file), metadata={"format": "pt"})

    done = CliRunner().invoke(
        app, ["parity", str(run), str(tmp_path / "other"), "--samples", "2", "--max-new-tokens", "8", "--json"]
    )

    assert done.exit_code == 3, done.output
    told = json.loads(done.stdout)
    assert told["equal"] < 2 and told["prompts_differ"] == 0
    first = told["differences"][0]
    assert (
        first["cause"] == "answer" and first["unit"] == "token" and first["at"] >= 0 and first["run"] != first["other"]
    )


def test_code_that_is_not_ours_is_not_run(run: Path, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "other")
    code = tmp_path / "other" / "modeling_beholder.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + code.read_text())
    with pytest.raises(UserError, match=r"modeling_beholder.py is not the code .*--trust-remote-code"):
        parity(run, tmp_path / "other", samples=1)

    shutil.copy(exported / "modeling_beholder.py", code)
    settings = json.loads((exported / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["else--where.Tokenizer", None]}
    (tmp_path / "other" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"asks for the code 'else--where\.Tokenizer'"):
        parity(run, tmp_path / "other", samples=1)

    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("way", ["generate", "below", "list", "base"])
def test_code_is_not_run_by_a_way_around_the_files_that_were_looked_at(
    run: Path, exported: Path, tmp_path: Path, way: str
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(exported, folder)
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    match way:
        case "generate":  # transformers runs it where it may run a modelling file
            (folder / "custom_generate").mkdir()
            (folder / "custom_generate" / "generate.py").write_text(f"{evil}def generate(model, **k): ...\n")
        case "base":
            (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
        case _:
            (folder / "sub").mkdir()
            (folder / "sub" / "code.py").write_text(evil + (exported / "modeling_beholder.py").read_text())
            name = "config.json" if way == "below" else "tokenizer_config.json"
            settings = json.loads((folder / name).read_text())
            settings["auto_map"] = {"AutoConfig": "sub/code.BeholderConfig"} if way == "below" else ["sub/code.T", None]
            (folder / name).write_text(json.dumps(settings))

    with pytest.raises(UserError, match="--trust-remote-code"):
        parity(run, folder, samples=1, max_new_tokens=2)

    assert not (tmp_path / "ran").exists()


def test_settings_without_end_and_pickled_weights_are_refused(run: Path, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "config.json")
    with pytest.raises(UserError, match=r"config\.json is no file"):
        parity(run, tmp_path / "pipe")

    (tmp_path / "huge").mkdir()
    with (tmp_path / "huge" / "config.json").open("wb") as file:
        file.truncate(10**10)
    with pytest.raises(UserError, match="more than 16,000,000 bytes"):
        parity(run, tmp_path / "huge")

    shutil.copytree(exported, tmp_path / "pickled")
    (tmp_path / "pickled" / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.bin"):
        (tmp_path / "pickled" / "adapter" / name).write_text("{}")
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        parity(run, tmp_path / "pickled")


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ("nowhere", "no such folder"), ("ftp://here/v1", "expected a folder, or a URL"),
        ("http://example.org/v1", "unencrypted; expected https"), ("http://localhost.example.org/v1", "unencrypted"),
        ("https://user:word@example.org/v1", "no address of a server"),
        ("http://127.0.0.1:x/v1", "no address of a server"),
        ("https://exa mple.org", "no address of a server"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_with_is_said_before_anything_is_loaded(run: Path, other: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parity(run, other)


def test_a_folder_that_is_no_export_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json does not exist; give a folder that `beholder export` wrote"):
        parity(run, tmp_path)


def test_our_server_answers_as_its_run(run: Path, vlm: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARITY_KEY", KEY)
    with serving(vlm, key=KEY) as running:
        told = parity(run, running.url, samples=4, max_new_tokens=8, key=key_in("PARITY_KEY"), device="cpu")
        with pytest.raises(UserError, match=r"wants another key \(status 401\).*--api-key-env"):
            parity(run, running.url + "/v1/", samples=1, device="cpu")

    assert (told.samples, told.equal, told.golden, told.prompts_differ, told.model) == (4, 4, 3, 0, "tiny")


def test_a_captioning_runs_server_answers_as_the_run(tiny_parts: TinyParts, tmp_path: Path) -> None:
    captions = untrained_run(tiny_parts, tmp_path, stage="align", **{"model.lora": {"enable": False}})

    with serving(load(captions, device="cpu")) as running:
        told = parity(captions, running.url, samples=3, max_new_tokens=8, device="cpu")

    assert (told.equal, told.prompts_differ) == (3, 0)


# ---------------------------------------------------------------------------------------------------------------
# Servers of other people

Reply = Callable[[BaseHTTPRequestHandler, str], None]


@contextmanager
def foreign(reply: Reply, tls: ssl.SSLContext | None = None) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that does what ``reply`` says, and the headers that it was sent."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            seen.append({k.lower(): v for k, v in self.headers.items()})
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            reply(self, self.path)

        do_GET = do_POST = _any

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda request, client_address: None  # who hangs up on it is meant to
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def send(handler: BaseHTTPRequestHandler, told: Any, status: int = 200, **headers: str) -> None:
    body = told if isinstance(told, bytes) else json.dumps(told).encode()
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def saying(text: str, tokens: int | None = None) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"choices": [choice]} | ({} if tokens is None else {"usage": {"prompt_tokens": tokens}})


def test_where_a_server_answers_otherwise_the_cause_is_told(run: Path) -> None:
    asked: list[str] = []

    def reply(handler: BaseHTTPRequestHandler, path: str) -> None:
        asked.append(path)
        match len(asked):
            case 1:
                send(handler, {"error": {"message": "later"}}, 429, Retry_After="0")
            case 2:
                send(handler, saying("another answer"))
            case 3:
                send(handler, saying("another answer", 7))
            case _:
                send(handler, {"error": {"message": "too many <b>pictures</b>"}}, 400)

    with foreign(reply) as (url, _):
        told = parity(run, url, samples=3, model="m", max_new_tokens=4, device="cpu")

    assert [d.cause for d in told.differences] == ["answer", "prompt", "refused"]
    assert told.differences[1].why.startswith("7 tokens, the run ") and told.differences[0].unit == "word"
    assert told.differences[2].why == "status 400: too many <b>pictures</b>" and told.equal == 0
    assert told.prompts_differ == 1 and set(asked) == {"/v1/chat/completions"}


def test_a_redirect_is_not_followed_and_the_key_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with foreign(lambda h, path: send(h, saying("x"))) as (elsewhere, never):
        with foreign(lambda h, path: send(h, b"", 307, Location=elsewhere + path[3:])) as (url, seen):
            with pytest.raises(UserError, match="with status 307"):
                Remote(url, "a-key").answer("m", [], 4)

    assert seen[0]["authorization"] == "Bearer a-key" and not never


def trickle(handler: BaseHTTPRequestHandler, path: str) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (trickle, "did not answer within 0.5 s"),
        (lambda h, path: time.sleep(1.5), "did not answer within 0.5 s"),
        (lambda h, path: send(h, b" " * 3000), "more than 2,000 bytes"),
        (lambda h, path: send(h, b"<html>"), "no JSON object"),
        (lambda h, path: send(h, {"choices": []}), "not as OpenAI's chat completions do"),
        (lambda h, path: send(h, {"choices": [{"message": {"content": None}}]}), "not as OpenAI's"),
        (lambda h, path: send(h, {"detail": "gone"}, 404), "with status 404: gone"),
        (lambda h, path: h.wfile.write(b"nonsense\r\n\r\n"), "cannot be asked"),
    ],
    ids=["trickles", "silent", "large", "html", "no choice", "no text", "404", "no HTTP"],
)  # fmt: skip
def test_a_bad_server_is_named_within_bounds(reply: Reply, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "MAX_BYTES", 2000)
    begun = time.monotonic()

    with foreign(reply) as (url, _), pytest.raises(UserError, match=says):
        Remote(url, timeout_s=0.5).answer("m", [], 4)

    assert time.monotonic() - begun < 5


def test_a_server_that_is_not_there_and_one_with_several_models_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    with pytest.raises(UserError, match=rf"http://127.0.0.1:{port} cannot be asked"):
        Remote(f"http://127.0.0.1:{port}").model()
    with foreign(lambda h, path: send(h, {"data": [{"id": "a"}, {"id": "b"}]})) as (url, _):
        with pytest.raises(UserError, match="has 2 models: a, b; name the one to compare with --model"):
            Remote(url).model()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_over_tls_a_certificate_is_checked_and_a_server_that_trickles_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = [str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-keyout", pair[0], "-out", pair[1]], check=True, capture_output=True,
    )  # fmt: skip
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(pair[1], pair[0])
    with foreign(trickle, own) as (url, _):
        with pytest.raises(UserError, match=r"cannot be asked: .*certificate verify failed"):
            Remote(url, timeout_s=5).answer("m", [], 4)
        monkeypatch.setattr(ssl, "create_default_context", ssl._create_unverified_context)
        begun = time.monotonic()
        with pytest.raises(UserError, match=r"did not answer within 0\.7 s"):
            Remote(url, timeout_s=0.7).answer("m", [], 4)

    assert time.monotonic() - begun < 3


def test_what_vlmevalkit_sends_is_taken(parts: TinyParts, vlm: Vlm) -> None:
    image = next(iter(sorted(parts.images.glob("*.png"))))
    held = io.BytesIO()
    Image.open(image).convert("RGB").save(held, "JPEG")
    url = f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "text", "text": "What colour?"},
    ]

    with serving(vlm) as running:
        told = Remote(running.url, "none").answer("tiny", [{"role": "user", "content": content}], 8)

    assert told.text == vlm.chat("What colour?", Image.open(io.BytesIO(held.getvalue())), max_new_tokens=8)
