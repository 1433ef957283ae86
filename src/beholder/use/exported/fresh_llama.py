"""Run in a process of its own by `use.export.gguf_proof`: what llama.cpp makes of an exported folder, through
the binding `xllamacpp` alone.

``fresh_llama.py JOB``: JOB holds job.json and images; answers.json is written beside them.
"""

import base64
import importlib
import json
import os
import secrets
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


class NoBeholder:
    """An exported folder must not need the package that it came from."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "beholder":
            raise ImportError(f"an exported folder imports {name}")


def main(job: Path) -> None:
    sys.meta_path.insert(0, NoBeholder())
    asked = json.loads((job / "job.json").read_text("utf-8"))
    os.environ["LLAMA_MEDIA_MARKER"] = asked["marker"]  # else a random one, which prompts could not name
    sys.path.append(asked["binding"])
    xllamacpp: Any = importlib.import_module("xllamacpp")  # where it lies has just been said

    params = xllamacpp.CommonParams()
    params.model.path = asked["model"]
    params.mmproj.path = asked["mmproj"]
    params.mmproj_use_gpu = False
    params.n_gpu_layers = 0
    params.n_ctx = asked["context"]
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked["threads"]
    # What is stored between steps stays as it was computed.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.fit_params = False
    params.warmup = False
    params.use_jinja = True
    # The binding serves what it loads, to this machine alone; nobody else has the key.
    key = secrets.token_hex(32)
    params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [key]
    llama = Llama(xllamacpp.Server(params), key)
    told = [ask(llama, sample, asked, job) for sample in asked["samples"]]
    (job / "answers.json").write_text(json.dumps({"version": xllamacpp.__version__, "answers": told}), "utf-8")


class Llama:
    """What is asked over HTTP: the binding's own calls take no image in a prompt that is a text."""

    def __init__(self, server: Any, key: str) -> None:
        self.server, self.key = server, key
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __call__(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.server.listening_address}/{route}", json.dumps(body).encode(), headers)
        try:
            with self.opener.open(request) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise SystemExit(
                f"llama.cpp answers {error.code}: {error.read()[:2000].decode('utf-8', 'replace')}"
            ) from None


def ask(llama: Llama, sample: dict[str, Any], asked: dict[str, Any], job: Path) -> dict[str, Any]:
    """``prompt``: tokens read; ``ids``: of the answer, its end token among them; ``scored``: tokens, and of each step
    ids and log-probabilities of the likeliest; ``chat``: of the first token the same, with the tokens read, where the
    chat template laid the prompt out.

    The server lists no step whose token is only a part of a character; where there is one, what is scored is another
    answer, which is not let write such tokens. Log-probabilities are those from before that.
    """
    data = [base64.b64encode((job / name).read_bytes()).decode() for name in sample["images"]]
    how: dict[str, Any] = {"temperature": 0.0, "cache_prompt": False, "seed": 0}
    prompt = {"prompt_string": sample["prompt"], "multimodal_data": data}
    how |= {"n_probs": asked["shown"]}
    body = how | {"prompt": prompt, "n_predict": asked["max_new_tokens"], "return_tokens": True}
    told = llama("completion", body)
    ids, scored = told["tokens"], told
    if len(told.get("completion_probabilities", [])) < len(ids):
        scored = llama("completion", body | {"logit_bias": [[i, False] for i in asked["partial"]]})
    steps = scored.get("completion_probabilities", [])
    out = {"prompt": told["tokens_evaluated"], "ids": ids, "chat": None,
           "scored": {"ids": [s["id"] for s in steps], "steps": [step(s) for s in steps]}}  # fmt: skip
    if sample["messages"] is not None:
        images = iter(data)
        messages = [
            {"role": m["role"], "content": [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{next(images)}"}}
                if p["type"] == "image" else p for p in m["content"]
            ]} for m in sample["messages"]
        ]  # fmt: skip
        told = llama(
            "v1/chat/completions",
            how | {"messages": messages, "max_tokens": 1, "logprobs": True, "top_logprobs": asked["shown"]},
        )
        logprobs = told["choices"][0].get("logprobs") or {"content": []}
        steps = [step(s) for s in logprobs["content"]]
        out["chat"] = {"prompt": told["usage"]["prompt_tokens"], "steps": steps}
    return out


def step(told: dict[str, Any]) -> dict[str, Any]:
    shown = told["top_logprobs"]
    return {"ids": [t["id"] for t in shown], "logprobs": [t["logprob"] for t in shown]}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
