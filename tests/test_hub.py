"""A model comes from a hub that speaks the hub's protocol; what cannot be had ends in one line."""
import hashlib
import http.server
import os
import shutil
import subprocess
import sys
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
        name, _, file = self.path.strip("/").partition("/resolve/main/")
        repo = self.server.repos.get(name, "RepoNotFound")
        path = os.path.join(repo, file.partition("?")[0])
        if name.startswith("api/models/"):  # what else a repository has
            self.reply(404, {"X-Error-Code": "EntryNotFound"})
        elif repo in ("RepoNotFound", "GatedRepo"):
            self.reply(404 if repo == "RepoNotFound" else 403, {"X-Error-Code": repo})
        elif os.path.isfile(path):
            with open(path, "rb") as f:
                body = f.read()
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            self.reply(200, {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, body)
        else:
            self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def reply(self, status, headers, body=b""):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def environment(tmp_path):
    """What a process needs to speak to our hub: me/tiny, me/bin (pickled weights only) and me/gated."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    shutil.copytree(TINY, tmp_path / "bin")
    os.rename(tmp_path / "bin" / "model.safetensors", tmp_path / "bin" / "pytorch_model.bin")
    server.repos = {"me/tiny": TINY, "me/bin": str(tmp_path / "bin"), "me/gated": "GatedRepo"}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items()
           if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") and "proxy" not in k.lower()}
    yield {**env, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home"),
           "HF_HUB_DISABLE_TELEMETRY": "1"}
    server.shutdown()


def test_what_a_hub_has_is_loaded_and_what_it_has_not_ends_in_one_line(environment):
    words = [sys.executable, "-c", SCRIPT, "me/tiny", "me/typo", "me/gated", "me/bin"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    said = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("me/")}
    assert said["me/tiny"] == "me/tiny loaded 128 False"
    for name, says in (("me/typo", "is not a valid model identifier"), ("me/gated", "gated repo"),
                       ("me/bin", "its weights are not in safetensors files, the only kind that is read")):
        assert said[name].startswith(f"{name} refused 0 cannot load {name!r} from the hub: ")
        assert says in said[name]
        assert "if gated, accept its terms there, then `hf auth login`" in said[name]


def test_a_data_set_that_the_hub_has_not_ends_in_one_line_that_says_what_to_do(environment, tmp_path):
    script = os.path.join(ROOT, "data", "flawed_fictions", "prepare.py")
    done = subprocess.run([sys.executable, script, "--out", str(tmp_path / "out")], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "--from FILE" in done.stderr, done.stderr
    assert "cannot download kahuja/flawed-fictions" in done.stderr.strip().splitlines()[-1]
