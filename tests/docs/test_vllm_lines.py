"""The lines for vLLM in the guide to adapters, against an imitation of the addresses they ask.

vLLM needs a GPU and is not installed. The imitation answers as vLLM documents, so that this holds
the guide's lines to the protocol, and says nothing of vLLM.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from docs.blocks import ROOT, blocks_of

PAGE = ROOT / "docs" / "guides" / "adapters.md"
SERVER = "http://127.0.0.1:8000"


def lines(language: str, word: str) -> str:
    """Return the block of the page that is not run and has a word."""
    (found,) = (
        b.text for b in blocks_of(PAGE) if b.why_not and b.language == language and word in b.text
    )
    return found


def adapter(folder: Path, **more: Any) -> Path:
    folder.mkdir(parents=True)
    stated = {"peft_type": "LORA", "r": 32, "lora_alpha": 32, "target_modules": ["q_proj"], **more}
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    return folder


class Imitation:
    """What vLLM's server knows: names of adapters, and the largest rank."""

    def __init__(self, command: list[str]) -> None:
        assert command[:2] == ["vllm", "serve"] and "--enable-lora" in command
        self.base = command[2]
        self.rank = int(command[command.index("--max-lora-rank") + 1])
        self.adapters: dict[str, str] = {}
        for word in command[command.index("--lora-modules") + 1 :]:
            name, _, path = word.partition("=")
            assert self.load({"lora_name": name, "lora_path": path})[0] == 200, word

    def load(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name, path = asked["lora_name"], asked["lora_path"]
        if name in self.adapters:
            return 400, {"error": f"The lora adapter '{name}' has already been loaded."}
        file = Path(path) / "adapter_config.json"
        if not file.is_file():
            return 404, {"error": f"No adapter found for {path}"}
        stated = json.loads(file.read_text())
        refused = stated.get("modules_to_save") or stated.get("use_dora")
        if refused or stated.get("bias", "none") != "none" or stated["r"] > self.rank:
            return 400, {"error": "refused"}
        self.adapters[name] = path
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def answer(self, path: str, asked: dict[str, Any] | None) -> tuple[int, Any]:
        if path == "/v1/models" and asked is None:
            names = [self.base, *self.adapters]
            return 200, {"object": "list", "data": [{"id": n, "object": "model"} for n in names]}
        if path == "/v1/load_lora_adapter" and asked is not None:
            return self.load(asked)
        if path == "/v1/completions" and asked is not None:
            if asked["model"] not in (self.base, *self.adapters):
                return 404, {"error": {"message": f"The model `{asked['model']}` does not exist."}}
            assert isinstance(asked["prompt"], str) and asked["max_tokens"] > 0
            text = f"{asked['model']} of {asked['prompt']}"
            return 200, {"object": "text_completion", "choices": [{"index": 0, "text": text}]}
        return 404, {"error": "Not Found"}


@contextmanager
def serving(imitation: Imitation) -> Iterator[str]:
    """Answer requests at an address of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(None)

        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json"
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, asked: dict[str, Any] | None) -> None:
            code, answer = imitation.answer(self.path, asked)
            body = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def curl(line: str, place: str) -> Any:
    """Ask what a line asks: -d makes it a POST, -H is a header."""
    program, url, *options = shlex.split(line)
    assert program == "curl" and set(options[::2]) <= {"-H", "-d"}
    given = dict(zip(options[::2], options[1::2], strict=True))
    headers = dict([given["-H"].split(": ", 1)]) if "-H" in given else {}
    body = given["-d"].encode() if "-d" in given else None
    with urlopen(Request(url.replace(SERVER, place), body, headers)) as answer:
        return json.load(answer)


@pytest.fixture
def imitation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Imitation:
    monkeypatch.chdir(tmp_path)
    for name in ("sst2", "mnli", "cola"):
        adapter(tmp_path / "adapters" / "experts" / name)
    return Imitation(shlex.split(lines("bash", "vllm serve")))


def test_lines_of_the_shell(imitation: Imitation) -> None:
    load, models = lines("bash", "curl").splitlines()
    with serving(imitation) as place:
        assert "added" in curl(load, place)
        named = [model["id"] for model in curl(models, place)["data"]]
        assert named == ["adapters/merged", "sst2", "mnli", "cola"]
        with pytest.raises(HTTPError, match="400"):  # a second time
            curl(load, place)


def test_a_prompt_goes_to_the_adapter_that_is_chosen(imitation: Imitation) -> None:
    chosen = {"ids": "mnli"}
    known: dict[str, Any] = {
        "tokenizer": lambda prompt, return_tensors: {"input_ids": "ids"},
        "choose": lambda input_ids: [chosen[input_ids]],
    }
    code = lines("python", "def complete")
    exec(compile(code, str(PAGE), "exec"), known)
    assert SERVER in code
    with serving(imitation) as place:
        assert known["complete"]("a b", f"{place}/v1") == "mnli of a b"
        chosen["ids"] = "unknown"
        with pytest.raises(HTTPError, match="404"):
            known["complete"]("a b", f"{place}/v1")


def test_what_the_page_says_is_refused_is(imitation: Imitation, tmp_path: Path) -> None:
    said = re.sub(r"\s+", " ", PAGE.read_text("utf-8"))
    assert (
        "vLLM refuses adapters with a head of their own (`modules_to_save`), DoRA and biases"
        in said
    )
    for number, more in enumerate(
        ({"r": 64}, {"modules_to_save": ["score"]}, {"use_dora": True}, {"bias": "all"})
    ):
        place = adapter(tmp_path / str(number), **more)
        asked = {"lora_name": str(number), "lora_path": str(place)}
        assert imitation.load(asked)[0] == 400
