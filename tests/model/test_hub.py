"""Checkpoints by their name on the hub: from a filled cache, and from a server on this machine."""

import contextlib
import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants, utils
from safetensors.numpy import load_file, save_file

import kvjax
from kvjax.cli import main
from kvjax.models import presets
from kvjax.models.checkpoints import hub
from kvjax.models.checkpoints.hub import local_folder
from kvjax.tiny import WEIGHTS

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "hf" / "llama2-gqa"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "org/tiny-1.5_b"
NOBODY = "http://127.0.0.1:1"  # where nobody listens
# What such repositories hold beside it, and nobody reads.
OTHERS = ("pytorch_model.bin", "model.gguf", "original/model.safetensors", "README.md")


@pytest.fixture
def files(tmp_path) -> Path:
    """A repository: config, weights in two shards, a tokenizer, and what is not to be fetched."""
    folder = tmp_path / "repository"
    (folder / "original").mkdir(parents=True)
    shutil.copy(CHECKPOINT / "config.json", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(WEIGHTS / name, folder)
    tensors = sorted(load_file(CHECKPOINT / "model.safetensors").items())
    placed = {}
    for number, part in enumerate((tensors[::2], tensors[1::2]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file(dict(part), folder / shard)
        placed |= {name: shard for name, _ in part}
    index = json.dumps({"weight_map": placed})
    (folder / "model.safetensors.index.json").write_text(index)
    for name in OTHERS:
        (folder / name).write_text("x")
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of huggingface_hub's, and nothing of this machine's settings."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between two tries of a transfer
    return folder


class Server(ThreadingHTTPServer):
    """A hub on this machine, of one repository; `fault` is what it does wrong."""

    daemon_threads = True

    def __init__(self, files: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.fault, self.fetched = files, "", []
        self.released = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        fault = self.server.fault
        if fault == "hangs":
            self.server.released.wait(20)
            return self.answer(500)
        path = self.path.split("?")[0]
        if fault in ("401", "404") or NAME not in path:
            return self.answer(int(fault or 404), X_Error_Code="RepoNotFound")
        if fault == "gated":
            return self.answer(403, X_Error_Code="GatedRepo")
        if path.startswith("/api/"):
            return self.about(path)
        if fault == "gated files":
            return self.answer(403, X_Error_Code="GatedRepo")
        return self.file(path.split(f"/{NAME}/resolve/")[1])

    def about(self, path: str) -> None:
        """What a repository holds."""
        if "/revision/" in path and path.split("/revision/")[1] not in ("main", "v2", COMMIT):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        names = [p for p in sorted(self.server.files.rglob("*")) if p.is_file()]
        names = [{"rfilename": p.relative_to(self.server.files).as_posix()} for p in names]
        body = json.dumps({"id": NAME, "sha": COMMIT, "siblings": names}).encode()
        self.answer(200, body, Content_Type="application/json")

    def file(self, path: str) -> None:
        name = path.split("/", 1)[1]
        body = (self.server.files / name).read_bytes()
        facts = {"ETag": f'"{abs(hash(body)):x}"', "X_Repo_Commit": COMMIT}
        if self.command == "GET":
            self.server.fetched.append(name)
        if self.command == "GET" and self.server.fault == "breaks" and name.endswith("tensors"):
            facts |= {"Content_Length": str(len(body))}
            start = self.headers.get("Range") is not None  # the rest, which never comes
            with contextlib.suppress(OSError):
                self.answer(206 if start else 200, b"" if start else body[:100], **facts)
            return self.connection.close()
        self.answer(200, body, **facts)


def use(monkeypatch, endpoint: str) -> None:
    """What `HF_ENDPOINT` does, which huggingface_hub reads once."""
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def server(files, cache, monkeypatch):
    found = Server(files)
    thread = threading.Thread(target=found.serve_forever, args=(0.05,))
    thread.start()
    use(monkeypatch, found.endpoint)
    yield found
    found.released.set()
    found.shutdown()
    found.server_close()
    thread.join()


def fill_cache(cache: Path, files: Path) -> Path:
    """The cache as huggingface_hub leaves it behind, of the main branch."""
    folder = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    shutil.copytree(files, snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return snapshot


def weights(model) -> np.ndarray:
    return np.asarray(model.embed.table_VD[...])


# ---------------------------------------------------------------------------- what works
def test_a_name_is_loaded(server, cache):
    """What it needs is fetched once, and nothing else of the repository."""
    model, tokenizer = kvjax.load(NAME, progress=False)
    assert tokenizer is not None
    assert (weights(model) == weights(kvjax.load(CHECKPOINT, progress=False)[0])).all()
    assert not set(OTHERS) & set(server.fetched)
    assert len(server.fetched) == len(set(server.fetched)) == 6
    folder = local_folder(NAME, progress=False)
    assert folder.name == COMMIT
    assert {path.name for path in folder.iterdir()} == set(server.fetched)
    assert len(server.fetched) == 6  # nothing again


def test_revisions_and_endpoints(server, monkeypatch):
    use(monkeypatch, NOBODY)
    given = {"progress": False, "endpoint": server.endpoint}
    for revision in ("v2", COMMIT):
        assert local_folder(NAME, revision, **given).name == COMMIT


def test_a_filled_cache_needs_no_hub(cache, files, monkeypatch):
    snapshot = fill_cache(cache, files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_folder(NAME, progress=False) == snapshot.resolve()
    model, _ = kvjax.load(NAME, revision="main", progress=False)
    assert model.config.num_layers == 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    use(monkeypatch, NOBODY)
    assert local_folder(NAME, progress=False) == snapshot.resolve()


def test_evaluations_and_benchmarks_take_names(cache, files, monkeypatch, tmp_path, capsys):
    fill_cache(cache, files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = presets.model_config(NAME, 64)
    assert config.num_layers == 2
    held = weights(presets.model_of(NAME, config))
    assert (held == weights(kvjax.load(CHECKPOINT, progress=False)[0])).all()
    settings = f'model = "{NAME}"\nrevision = "v3"\ntasks = ["needle"]\nmethods = ["full"]\n'
    settings += 'budgets = ["25%"]\nlengths = [64]\n'
    (tmp_path / "eval.toml").write_text(settings)
    flags = ["--config", str(tmp_path / "eval.toml"), "--out", str(tmp_path / "out")]
    assert main(["eval", *flags]) == 2
    assert f"model '{NAME}' at revision='v3'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_path_wins(tmp_path, monkeypatch, server):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(CHECKPOINT, tmp_path / NAME)
    assert local_folder(NAME) == Path(NAME)
    assert kvjax.load(NAME, progress=False)[0].config.num_layers == 2
    assert server.fetched == []
    with pytest.raises(ValueError, match=r"^revision='v2' beside the path .*, expected none$"):
        kvjax.load(NAME, revision="v2")


@pytest.mark.parametrize(
    "path", ["tiny", "a/b/c", "/a/b", "./a", "../a", "a/", "/b", "a b/c", "a/b.gguf"]
)
def test_what_is_no_name_stays_a_path(path):
    assert local_folder(path) == Path(path)


# ---------------------------------------------------------------------------- what does not


@pytest.fixture
def asked(run, tmp_path):
    """`kvjax score` of the name: what it says where it fails."""
    tokens = tmp_path / "tokens.jsonl"
    tokens.write_text('{"tokens": [5, 6, 7], "prefix": 2}\n')

    def call(*flags) -> str:
        code, out, err = run("score", "--model", NAME, "--tokens", tokens, *flags)
        assert (code, out) == (2, "")
        lines = [line for line in err.splitlines() if line.startswith("kvjax: ")]
        assert err.endswith(lines[-1] + "\n")
        return lines[-1].removeprefix("kvjax: ")

    return call


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("404", "is no folder here, and no public model on the hub (a private one needs HF_TOKEN)"),
        ("401", "is no folder here, and no public model on the hub (a private one needs HF_TOKEN)"),
        ("gated", "is gated: ask for access on its page, and set HF_TOKEN"),
        ("gated files", "is gated: ask for access on its page, and set HF_TOKEN"),
    ],
)
def test_a_hub_that_says_no(server, cache, asked, fault, message):
    server.fault = fault
    assert asked() == f"model {NAME!r} {message}"
    assert not list(cache.rglob("config.json"))


def test_what_is_cached_needs_no_leave(server, cache, files):
    snapshot, server.fault = fill_cache(cache, files), "401"
    assert local_folder(NAME, progress=False) == snapshot.resolve()


def test_a_revision_that_is_none(server, asked):
    assert asked("--revision", "v9") == f"revision='v9' is not one of model {NAME!r} on the hub"


def test_a_hub_that_hangs(server, asked, monkeypatch):
    monkeypatch.setattr(hub, "_TIMEOUT", 0.2)
    server.fault = "hangs"
    message = asked("--revision", "v2")
    assert message.startswith(
        f"model {NAME!r} at revision='v2' is no folder here, not in the cache, and the hub cannot"
        " be asked ("
    )
    assert "Timeout" in message


def test_a_transfer_that_breaks_off(server, cache, asked):
    """Nothing half-written is left, and the next try goes on with what came whole."""
    server.fault = "breaks"
    message = asked()
    assert message.startswith(f"model {NAME!r} could not be fetched, what came whole ")
    left = [path for path in cache.rglob("*") if path.is_file() or path.is_symlink()]
    assert left
    assert not [path for path in left if path.name.endswith((".incomplete", ".safetensors"))]
    server.fault, server.fetched[:] = "", []
    assert kvjax.load(NAME, progress=False)[0].config.num_layers == 2
    assert {name.split(".")[1] for name in server.fetched} == {"safetensors"}


def test_a_cache_that_lacks_a_shard(cache, files, asked, monkeypatch):
    shard = "model-00002-of-00002.safetensors"
    (fill_cache(cache, files) / shard).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert asked().startswith(
        f"model {NAME!r} lacks {shard} in the cache, and the hub cannot be asked (OfflineModeIs"
    )


def test_an_empty_cache_out_of_reach(cache, asked, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "is no folder here, not in the cache, and the hub cannot be asked (" in asked()


def test_repositories_without_safetensors(server, files, asked):
    for path in files.glob("model*.safetensors*"):
        path.unlink()
    assert asked() == (
        f"model {NAME!r} has no model.safetensors on the hub; pytorch_model.bin is not read,"
        f" convert it with transformers: AutoModelForCausalLM.from_pretrained({NAME!r})"
        ".save_pretrained(FOLDER)"
    )
    (files / "config.json").unlink()
    assert asked() == f"model {NAME!r} has no config.json on the hub, expected a model"


def test_bars_and_logs_are_left_as_they_were():
    tools = utils
    before = tools.logging.get_verbosity(), tools.are_progress_bars_disabled()
    with hub._silent(False):
        assert tools.are_progress_bars_disabled()
    assert (tools.logging.get_verbosity(), tools.are_progress_bars_disabled()) == before
