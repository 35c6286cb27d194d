"""A model comes from a hub that speaks the hub's protocol, with progress;
what cannot be had ends in one line that says why."""
import fcntl
import hashlib
import http.server
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
import threading

import pytest
from conftest import ROOT

from lib.checkpoint import TINY

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = f"""
import sys; sys.path.insert(0, {ROOT!r})
from lib import UserError
from litereason import load
for name in sys.argv[1:]:
    try:
        model, tokenizer = load(name, "cpu")
        print(name, "loaded", model.config.hidden_size, model.projector_trained)
    except UserError as e:
        print(name, "refused", str(e).count(chr(10)), e)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """`self.server.repos`: {name: a directory, or the error code that the hub gives}."""

    def do_GET(self):
        self.answer(with_body=True)

    def do_HEAD(self):
        self.answer(with_body=False)

    def answer(self, with_body):
        name, _, file = self.path.strip("/").partition("/resolve/main/")
        if name.startswith("api/datasets/"):  # as the hub answers whoever has no token
            private = self.server.repos.get("datasets", "RepoNotFound")
            return self.reply(401 if private == "RepoNotFound" else 403, with_body, {"X-Error-Code": private})
        if name.startswith("api/models/"):
            return self.reply(404, with_body, {"X-Error-Code": "EntryNotFound"})
        repo = self.server.repos.get(name, "RepoNotFound")
        if repo in ("RepoNotFound", "GatedRepo"):
            return self.reply(404 if repo == "RepoNotFound" else 403, with_body, {"X-Error-Code": repo})
        path = os.path.join(repo, file.partition("?")[0])
        if not os.path.isfile(path):
            return self.reply(404, with_body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        with open(path, "rb") as f:
            body = f.read()
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        self.reply(200, with_body, {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, body)

    def reply(self, status, with_body, headers, body=b""):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    shutil.copytree(TINY, tmp_path / "bin")
    os.rename(tmp_path / "bin" / "model.safetensors", tmp_path / "bin" / "pytorch_model.bin")
    server.repos = {"me/tiny": TINY, "me/bin": str(tmp_path / "bin"), "me/gated": "GatedRepo"}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.address = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()


def loads(tmp_path, names, **environment):
    env = {k: v for k, v in os.environ.items()
           if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") and "proxy" not in k.lower()}
    env.update(environment, HF_HOME=str(tmp_path / "home"), HF_HUB_DISABLE_TELEMETRY="1")
    screen, terminal = pty.openpty()  # progress is for people: without a terminal there is none
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    child = subprocess.Popen([sys.executable, "-c", SCRIPT, *names], env=env, stdout=subprocess.PIPE,
                             stderr=terminal, text=True)
    os.close(terminal)
    shown = []
    reader = threading.Thread(target=read_all, args=(screen, shown))
    reader.start()
    out, _ = child.communicate(timeout=120)
    reader.join(timeout=10)
    shown = b"".join(shown).decode(errors="replace")
    assert child.returncode == 0, shown[-2000:]
    return {line.split()[0]: line for line in out.splitlines() if line.startswith("me/")}, shown


def read_all(screen, shown):
    try:
        while block := os.read(screen, 65536):
            shown.append(block)
    except OSError:  # Linux's way to say that the other end is closed
        pass


def test_what_a_hub_has_is_loaded_and_what_it_has_not_ends_in_one_line(hub, tmp_path):
    said, progress = loads(tmp_path, ["me/tiny", "me/typo", "me/gated", "me/bin"], HF_ENDPOINT=hub.address)
    assert said["me/tiny"] == "me/tiny loaded 128 False"
    assert "model.safetensors" in progress and "100%" in progress  # a download is seen
    for name, says in (
            ("me/typo", "refused 0 there is no model 'me/typo' on the hub, or it is private: check the name"),
            ("me/gated", "refused 0 'me/gated' is gated on the hub: accept its terms on "
                         "https://huggingface.co/me/gated"),
            ("me/bin", "refused 0 'me/bin' has no weights in safetensors files, the only kind that is read")):
        assert says in said[name], said[name]


def test_a_dead_proxy_is_known_at_once(tmp_path):
    said, _ = loads(tmp_path, ["me/tiny"], HTTPS_PROXY="http://127.0.0.1:9",
                    HF_ENDPOINT="https://hub.invalid")
    assert "refused 0 cannot fetch 'me/tiny' from the hub" in said["me/tiny"]
    assert json.dumps(said)  # one line


@pytest.mark.parametrize("answer, says", [
    ("RepoNotFound", "error: there is no data set 'kahuja/flawed-fictions' on the hub, or it is private: "
                     "check the name, or `hf auth login` (or set HF_TOKEN); or get the file of the "
                     "flawed_fictions split from "),
    ("GatedRepo", "error: 'kahuja/flawed-fictions' is gated on the hub: accept its terms on "
                  "https://huggingface.co/datasets/kahuja/flawed-fictions, then `hf auth login`")])
def test_a_data_set_that_the_hub_has_not_ends_in_one_line_that_says_what_to_do(hub, tmp_path, answer, says):
    hub.repos["datasets"] = answer
    env = {k: v for k, v in os.environ.items()
           if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") and "proxy" not in k.lower()}
    env.update(HF_ENDPOINT=hub.address, HF_HOME=str(tmp_path / "home"), HF_HUB_DISABLE_TELEMETRY="1")
    script = os.path.join(ROOT, "data", "flawed_fictions", "prepare.py")
    done = subprocess.run([sys.executable, script, "--out", str(tmp_path / "out")], env=env,
                          capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr and "--from FILE" in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Client Error" not in done.stderr
