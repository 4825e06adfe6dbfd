"""What is missing, said with its remedy: libraries, a login or a way to the hub, room on a disk."""

import errno
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import encoded, speech, write_jsonl

from asr_train import prepare as preparing
from asr_train import trouble
from asr_train.data.text import Vocabulary
from asr_train.disk import no_room
from asr_train.errors import EXIT_FAILED, EXIT_USAGE, CorpusError, LibraryError, ModelError, run_main
from asr_train.model import build_model
from asr_train.model_config import load_model_config
from asr_train.recipe import load_recipe
from asr_train.strategy import check_environment
from launch.node import devices, placement

ROOT = Path(__file__).resolve().parent.parent


# --- libraries --------------------------------------------------------------------------------------------------


@pytest.fixture
def without(monkeypatch):
    """Have a library not installed."""

    def remove(module):
        monkeypatch.setitem(sys.modules, module, None)

    return remove


def test_zero_without_deepspeed(without, monkeypatch, tiny_recipe):
    monkeypatch.setattr(devices, "num_gpus", lambda: 2)
    monkeypatch.setattr(devices, "torch_is_cpu_build", lambda: False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)  # a training in this process has set it
    recipe = tiny_recipe()
    assert placement.place(recipe, accelerate="zero2", processes=2).num_processes == 2
    without("deepspeed")
    with pytest.raises(
        LibraryError, match=r"--accelerate zero2: needs deepspeed.*pip install 'wavefleet\[deepspeed\]'"
    ):
        placement.place(recipe, accelerate="zero2", processes=2)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as `accelerate launch` without us sets it
    with pytest.raises(LibraryError, match="the accelerate config: needs deepspeed"):
        check_environment(recipe)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed(tracker, without, tiny_recipe):
    without(tracker)
    with pytest.raises(
        LibraryError, match=f"log.trackers: {tracker}: needs {tracker}, which is not installed: pip install"
    ):
        check_environment(tiny_recipe(**{"log.trackers": [tracker]}))


def test_flash_attention_without_its_library(without, tiny_recipe):
    without("flash_attn")
    recipe = tiny_recipe(**{"model.attention": "flash_attention_2"})
    with pytest.raises(LibraryError, match=r"needs flash-attn.*Without it: model.attention=sdpa"):
        build_model(recipe, Vocabulary.build(["abc"]))


def test_the_demo_without_its_synthesiser(without, tmp_path):
    without("espeakng_loader")
    recipe = load_recipe("demo", [f"data.corpus_root={tmp_path}", "data.num_proc=1"])
    with pytest.raises(CorpusError, match=r"eSpeak NG, which is not installed here: pip install 'wavefleet\[demo\]'"):
        preparing.prepare(recipe, progress=False)


def test_a_missing_library_is_the_users_to_mend():
    """So that nothing tries it again and again."""
    assert LibraryError.exit_code == EXIT_USAGE


def test_a_library_that_everything_needs(capsys):
    def needs(_):
        import no_such_library  # noqa: F401, PLC0415

    assert run_main(needs, []) == EXIT_FAILED
    assert "the library no_such_library is not installed" in capsys.readouterr().err


def test_a_module_of_ours_that_is_not_there_is_a_defect():
    def needs(_):
        import asr_train.no_such_module  # noqa: F401, PLC0415

    with pytest.raises(ModuleNotFoundError):
        run_main(needs, [])


def test_every_library_that_may_be_missing_is_asked_for_somewhere():
    """The names are those of the optional dependencies, and of what recipes can ask for."""
    for module in trouble.LIBRARIES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(LibraryError, match=r"which is not installed: pip install"):
                trouble.need(module, "a field")


# --- the hub ----------------------------------------------------------------------------------------------------

ANSWERS = {
    "/me/gated": (403, "GatedRepo", "Access to model me/gated is restricted."),
    "/me/private": (401, "RepoNotFound", "Repository not found"),
    "/me/forbidden": (403, "", "Your token may not read this."),
}


class Refuses(BaseHTTPRequestHandler):
    """A hub that says no, as the real one does."""

    def do_HEAD(self):
        for prefix, (status, code, message) in ANSWERS.items():
            if self.path.startswith((prefix, f"/api/models{prefix}")):
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", message)
                self.send_header("Content-Length", "0")
                self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """What loading from such a hub says, by repository; in one process of its own, which begins with its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = """
import json, sys
from asr_train.config import ModelSettings
from asr_train.errors import ModelError
from asr_train.model_config import load_model_config, load_vocabulary
found = {}
for name in sys.argv[1:]:
    for work in (lambda: load_model_config(ModelSettings(pretrained=name)), lambda: load_vocabulary(name)):
        try:
            work()
        except ModelError as error:
            found.setdefault(name, []).append(str(error))
print(json.dumps(found))
"""
    address = f"http://127.0.0.1:{server.server_address[1]}"
    environ = {
        **os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path_factory.mktemp("hf")), "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    command = [sys.executable, "-c", program, "me/gated", "me/private", "me/forbidden"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("me/gated", ["it is gated: accept its conditions", "hf auth login", "HF_TOKEN"]),
        ("me/private", ["no such repository, or a private one", "hf auth login"]),
        ("me/forbidden", ["the hub refused (403)", "an account that may read it"]),
    ],
)
def test_a_repository_that_may_not_be_read(name, words, refusals):
    for message in refusals[name]:
        assert all(word in message for word in (name, *words)), message
    assert len(refusals[name]) == 2


def test_a_model_of_the_hub_without_a_way_there(monkeypatch):
    """Nothing listens at the address that the hub's client asks."""
    import huggingface_hub  # noqa: PLC0415

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    settings = load_recipe("demo", ["model.pretrained=me/nowhere", "model.config={}"]).model
    with pytest.raises(ModelError, match=r"me/nowhere.*not in the cache.*a folder on this machine"):
        load_model_config(settings)


def test_an_error_that_is_not_known_has_no_remedy():
    assert trouble.remedy(ValueError("something else")) is None


def test_the_remedy_is_found_behind_the_error_that_a_library_made_of_it():
    try:
        try:
            raise ConnectionError("refused")
        except ConnectionError as cause:
            raise OSError("We couldn't connect") from cause
    except OSError as error:
        assert "the hub cannot be reached from here" in trouble.remedy(error)
        assert "We couldn't connect" in trouble.remedy(error)


# --- disks ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_anywhere_says_where_things_are_written(capsys):
    def write(_):
        with Path("/dev/full").open("w") as stream:
            stream.write("x")
        return 0

    assert run_main(write, []) == EXIT_FAILED
    message = capsys.readouterr().err
    assert "the disk is full" in message
    assert "data.corpus_root (corpora), run_dir (runs), HF_HOME" in message


def test_a_full_disk_while_a_corpus_is_prepared(tiny_recipe, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preparing, "write_shards", full)
    recipe = tiny_recipe(**{"data.corpus_root": str(tmp_path / "corpora")})
    with pytest.raises(
        CorpusError, match=r"the disk is full where .*corpora.* GiB free of .* GiB.*what is done is kept"
    ):
        preparing.prepare(recipe, progress=False)


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the quota is used up")]
)
def test_how_much_is_free_is_said_of_a_file_that_is_not_there_yet(number, words, tmp_path):
    message = no_room(OSError(number, "no room", str(tmp_path / "a" / "b")))
    assert message.startswith(f"{words} where {tmp_path / 'a' / 'b'} is: ")
    assert "GiB free" in message


# --- what is left behind ----------------------------------------------------------------------------------------


def test_bad_input_leaves_no_empty_corpus_folder(tiny_recipe, tmp_path):
    manifest = write_jsonl(tmp_path / "m.jsonl", [{"audio_filepath": None, "text": "x"}])
    recipe = tiny_recipe(
        **{"data.train": {"kind": "jsonl", "path": str(manifest)}, "data.corpus_root": str(tmp_path / "corpora")}
    )
    with pytest.raises(CorpusError, match="bad input"):
        preparing.prepare(recipe, progress=False)
    assert not (tmp_path / "corpora").exists()


def test_bad_input_leaves_other_corpora_alone(tiny_recipe, tmp_path):
    (tmp_path / "corpora" / "another").mkdir(parents=True)
    recipe = tiny_recipe(
        **{"data.train": {"kind": "jsonl", "path": "none"}, "data.corpus_root": str(tmp_path / "corpora")}
    )
    with pytest.raises(CorpusError):
        preparing.prepare(recipe, progress=False)
    assert [path.name for path in (tmp_path / "corpora").iterdir()] == ["another"]


def test_a_script_without_a_guard_may_prepare_in_several_processes(tmp_path):
    """Workers do not import the program that is run, as they would by themselves."""
    rows = []
    for number in range(4):
        (tmp_path / f"{number}.wav").write_bytes(encoded(speech("one", 0.5)))
        rows.append({"audio_filepath": f"{number}.wav", "text": "one"})
    write_jsonl(tmp_path / "m.jsonl", rows)
    script = tmp_path / "notebook.py"
    script.write_text(f"""
print("begun")
from pathlib import Path
from asr_train.config import TableSource, TextSettings
from asr_train.data.shard_pool import cut, write_shards
from asr_train.data.shards import RowChecks
from asr_train.data.sources import open_sources
from asr_train.data.text import Vocabulary
from asr_train.geometry import FrameGeometry
listings = open_sources([TableSource(kind="jsonl", path={str(tmp_path / "m.jsonl")!r})])
checks = RowChecks(training=True, text=TextSettings(), vocabulary=Vocabulary.build(["one"]),
                   unknown_characters="reject", geometry=FrameGeometry(kernels=(10,), strides=(5,)),
                   min_duration_s=0.0, max_duration_s=9.0, encoding="pcm16")
write_shards(Path({str(tmp_path / "out")!r}), cut({{"train": listings}}, 2), lambda _: checks, 2, False)
print(__file__, sorted(path.name for path in Path({str(tmp_path / "out" / "train")!r}).glob("*.arrow")))
""")
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["begun", f"{script} ['shard-00000.arrow', 'shard-00001.arrow']"]
