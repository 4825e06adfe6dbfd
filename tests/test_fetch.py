"""Bringing what a recipe names on the hub to a cache, from a small hub on this machine; then using it offline."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock
from urllib.parse import unquote, urlparse

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY_MODEL
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from asr_train.recipe import dump_recipe
from launch import cli
from launch.jobs import submit

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """As much of a hub as its clients ask for: listings and files of repositories, which are folders."""

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.asked = root, []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlparse(self.path).path).strip("/")
        self.server.asked.append(path)
        if path.startswith("api/"):
            self.listing(*path.split("/")[1:])
            return
        kind = "datasets" if path.startswith("datasets/") else "models"
        owner, name, _, _, *rest = path.removeprefix("datasets/").split("/")
        self.file(self.server.root / kind / owner / name, "/".join(rest))

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        kind, owner, name = unquote(urlparse(self.path).path).strip("/").split("/")[1:4]
        wanted = json.loads(body)["paths"] if body.startswith("{") else []
        root = self.server.root / kind / owner / name
        self.answer([self.entry(root, root / path) for path in wanted if (root / path).exists()])

    def listing(self, kind, owner, name, *rest):
        root = self.server.root / kind / owner / name
        if not root.is_dir():
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        files = [path for path in sorted(root.rglob("*")) if path.is_file()]
        if rest[:1] == ("tree",):
            below = root / "/".join(rest[2:])
            self.answer([self.entry(root, path) for path in sorted(below.rglob("*"))])
            return
        names = [{"rfilename": str(path.relative_to(root))} for path in files]
        self.answer({"id": f"{owner}/{name}", "sha": SHA, "siblings": names, "private": False, "tags": []})

    def entry(self, root, path):
        kind = "directory" if path.is_dir() else "file"
        size = 0 if path.is_dir() else path.stat().st_size
        return {"type": kind, "oid": hashlib.sha1(str(path).encode()).hexdigest(), "size": size,
                "path": str(path.relative_to(root))}  # fmt: skip

    def file(self, root, name):
        if not (root / name).is_file():
            self.answer({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        content = (root / name).read_bytes()
        etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA}
        self.answer(content, 200, etag)

    def answer(self, content, status=200, headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {**dict(headers), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, tiny_speech):
    """A hub with a model in two formats and a data set of twelve utterances."""
    root = tmp_path / "hub"
    config = Wav2Vec2Config(**TINY_MODEL, vocab_size=32)
    Wav2Vec2ForCTC(config).save_pretrained(root / "models" / "lab" / "tiny")
    (root / "models" / "lab" / "tiny" / "pytorch_model.bin").write_bytes(b"the same once more")
    (root / "models" / "lab" / "tiny" / "flax_model.msgpack").write_bytes(b"and for others")
    rows = [json.loads(line) for line in (tiny_speech / "dev" / "manifest.jsonl").read_text().splitlines()]
    audio = [{"bytes": (tiny_speech / "dev" / row["audio_filepath"]).read_bytes(), "path": None} for row in rows]
    folder = root / "datasets" / "lab" / "speech" / "data"
    folder.mkdir(parents=True)
    table = pa.table({"audio": audio, "text": [row["text"] for row in rows], "id": [row["id"] for row in rows]})
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    with Hub(root) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def python(*arguments, hub=None, cache, code=0):
    environ = {**os.environ, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        environ.pop(name, None)
    environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"} if hub else {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


def said(done):
    return [line for line in done.stderr.splitlines() if line.startswith("fetching")]


@pytest.fixture
def recipe_file(tiny_recipe, tmp_path):
    def make(**changes):
        path = tmp_path / "recipe.yaml"
        values = {
            "data.train": {"kind": "hub", "dataset": "lab/speech"}, "data.corpus_root": str(tmp_path / "corpora"),
            "eval.sets": {}, "model": {"pretrained": "lab/tiny"}, **changes,
        }  # fmt: skip
        path.write_text(dump_recipe(tiny_recipe(**values)))
        return str(path)

    return make


def test_what_was_fetched_serves_offline(hub, recipe_file, tmp_path):
    cache = tmp_path / "cache"
    recipe = recipe_file()
    done = python("-m", "asr_train.fetch", recipe, hub=hub, cache=cache)
    assert said(done) == ["fetching lab/tiny", "fetching data set lab/speech"]
    fetched = {path.name for path in (cache / "hub").glob("models--lab--tiny/snapshots/*/*")}
    assert "model.safetensors" in fetched and "config.json" in fetched
    assert not fetched & {"pytorch_model.bin", "flax_model.msgpack"}
    python("-m", "asr_train.prepare", recipe, cache=cache)  # offline
    hub.asked.clear()
    program = (
        "import sys; from asr_train.recipe import load_recipe; from asr_train.model import build_model\n"
        "from asr_train.prepare import prepare\nrecipe = load_recipe(sys.argv[1])\n"
        "build_model(recipe, prepare(recipe, progress=False).vocabulary)"
    )
    python("-c", program, recipe, cache=cache)
    assert hub.asked == []


def test_a_prepared_corpus_needs_no_data_set(hub, recipe_file, tmp_path):
    recipe = recipe_file()
    python("-m", "asr_train.fetch", recipe, hub=hub, cache=tmp_path / "cache")
    python("-m", "asr_train.prepare", recipe, cache=tmp_path / "cache")
    done = python("-m", "asr_train.fetch", recipe, hub=hub, cache=tmp_path / "cache")
    assert said(done) == ["fetching lab/tiny"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": {"pretrained": "lab/gone"}}, "lab/gone cannot be fetched"),
        ({"data.train": {"kind": "hub", "dataset": "lab/gone"}}, "lab/gone"),
        ({"data.train": {"kind": "hub", "dataset": "lab/speech", "streaming": True}}, "a stream leaves nothing"),
    ],
)
def test_what_cannot_be_had_is_named(hub, recipe_file, tmp_path, changes, problem):
    done = python("-m", "asr_train.fetch", recipe_file(**changes), hub=hub, cache=tmp_path / "cache", code=4)
    assert problem in done.stderr
    assert "Traceback" not in done.stderr


def test_submit_fills_the_cache_of_the_profile_or_submits_nothing(hub, recipe_file, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(submit, "orphans", lambda run: [])
    submitted = []
    monkeypatch.setattr(submit, "submit", lambda run, settings: submitted.append(run) or mock.Mock(job_id="7"))
    cache = tmp_path / "shared" / "models"
    asked = ["--cluster", "test", "--nodes", "1", "cluster.processes_per_node=1", f"cluster.cache={cache}"]
    assert cli.main(["submit", recipe_file(), f"run_dir={tmp_path / 'run'}", *asked]) == 0
    assert len(submitted) == 1
    assert list((cache / "hub").glob("models--lab--tiny/snapshots/*/model.safetensors"))
    gone = recipe_file(model={"pretrained": "lab/gone"})
    assert cli.main(["submit", gone, f"run_dir={tmp_path / 'other'}", *asked]) == 2
    assert len(submitted) == 1
    assert "lab/gone cannot be fetched" in (said := capfd.readouterr().err)
    assert "could not be filled" in said
