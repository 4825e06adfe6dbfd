"""The message that a run is done or needs a person."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from asr_train.run_dir import RunDir
from launch.jobs.notify import WEBHOOK, notify
from launch.verdict import Verdict

VERDICT = Verdict(kind="data", action="stop", message='Rank 0 failed: "shard 3" is gone.', exit_code=4)


@pytest.fixture
def webhook(monkeypatch):
    """A server on this machine; what was posted to it. `answer` is its status."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(Handler.answer)
            self.end_headers()

        def log_message(self, *_):
            pass

    posted = []
    Handler.answer = 200
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv(WEBHOOK, f"http://127.0.0.1:{server.server_port}/hooks/s3cret")
        yield posted, Handler
        server.shutdown()


def test_a_verdict_is_posted(webhook, tmp_path):
    notify(RunDir(tmp_path / "minds14"), VERDICT)
    assert webhook[0] == [
        {
            "text": 'minds14: data: Rank 0 failed: "shard 3" is gone.',
            "run": str(tmp_path / "minds14"),
            "kind": "data",
            "action": "stop",
            "exit_code": 4,
        }
    ]


def test_nothing_is_sent_where_no_address_is_named(webhook, tmp_path, monkeypatch):
    monkeypatch.delenv(WEBHOOK)
    notify(RunDir(tmp_path), VERDICT)
    assert webhook[0] == []


@pytest.mark.parametrize("address", ["refusing", "nobody listens", "no address"])
def test_an_address_that_fails_is_said_without_its_secret(webhook, tmp_path, monkeypatch, capsys, address):
    _, handler = webhook
    handler.answer = 500
    if address == "nobody listens":
        monkeypatch.setenv(WEBHOOK, "http://127.0.0.1:9/hooks/s3cret")
    if address == "no address":
        monkeypatch.setenv(WEBHOOK, "s3cret")
    notify(RunDir(tmp_path), VERDICT)
    said = capsys.readouterr().err
    assert f"{WEBHOOK} did not take the message" in said
    assert "s3cret" not in said
