"""A model comes from a hub that speaks the hub's protocol; what cannot be had ends in one line."""
import hashlib
import http.server
import os
import subprocess
import sys
import threading

from conftest import ROOT

from lib.checkpoint import TINY

SCRIPT = """
import sys
from lib import UserError
from litereason import load
for name in sys.argv[1:]:
    try:
        model, tokenizer = load(name, "cpu")
        print(name, "loaded", model.config.hidden_size, model.projector_trained)
    except UserError as e:
        print(name, "refused", str(e).count(chr(10)), e)
"""


class Hub(http.server.SimpleHTTPRequestHandler):
    """It has me/tiny, a gate before me/gated, and no me/typo."""

    def translate_path(self, path):
        name, _, file = path.strip("/").partition("/resolve/main/")
        return os.path.join(TINY, file.partition("?")[0] or "nothing") if name == "me/tiny" else "nothing"

    def end_headers(self):
        name = self.path.strip("/").partition("/resolve/")[0]
        error = {"me/gated": "GatedRepo", "me/typo": "RepoNotFound"}.get(name, "EntryNotFound")
        self.send_header("X-Error-Code", error)  # of what is not there
        self.send_header("X-Repo-Commit", "0123456789" * 4)
        self.send_header("ETag", f'"{hashlib.sha1(self.path.encode()).hexdigest()}"')
        super().end_headers()


def test_what_a_hub_has_is_loaded_and_what_it_has_not_ends_in_one_line(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE") and "proxy" not in k.lower()}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path),
            "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": ROOT}
    words = [sys.executable, "-c", SCRIPT, "me/tiny", "me/typo", "me/gated"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    loaded, *refused = [line for line in done.stdout.splitlines() if line.startswith("me/")]
    assert loaded == "me/tiny loaded 128 False"
    for name, says, line in zip(words[-2:], ("is not a valid model identifier", "gated repo"), refused):
        assert line.startswith(f"{name} refused 0 cannot load {name!r} from the hub: ") and says in line
        assert "if gated, accept its terms there, then `hf auth login`" in line
