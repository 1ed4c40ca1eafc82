"""Mutates the files of one kind, reads each, and reports: run by test_mutations.py, in a process of its own.

    python tests/mutate.py KIND FOLDER MOST

Before each mutation its name is printed, so that a crash names it; an outcome that is neither an error with a clear
message nor the identical result (for a file whose checksum was made to fit: a working model) is printed as FAULT.
"""

import copy
import json
import random
import resource
import signal
import struct
import sys
import traceback
import warnings
from pathlib import Path

import torch

import everlong
from everlong import state as states
from everlong.bench import results as bench
from everlong.checkpoints.folder import _described
from everlong.compare.run import _read
from everlong.config import dumps, find
from everlong.files import sealed, tensor_checksum
from everlong.generation.sampler import Sampling
from everlong.models.blocks import Layer, SwiGLU
from everlong.models.lm import LanguageModel
from everlong.train import checkpoint
from everlong.train.job import Job, read_job, train
from everlong.train.loop import Trainer

SLACK = 400 * 2**20  # bytes of address space beyond what the first reading took: files and models have 0.2 MB
SECONDS = 10
GREEDY = Sampling(temperature=0)
LEAVES = (
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    2**63,
    10**30,
    1e30,
    -0.5,
    "",
    "x" * 10_000,
    "payload:Boo",
    [],
    {},
    [[]],
    {"kind": "mamba"},
)
RAW = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "9" * 5000,
    "[" * 100_000,
    "[" * 300 + "]" * 300,
    "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
)


def model(folder):
    torch.manual_seed(0)
    layers = []
    for name in ("gla", "attention", "rg_lru", "retention", "hyena"):
        options = {"window": 8} if name == "attention" and len(layers) > 9 else {}
        layers.append(Layer.Config(mixer=find(name).Config(**options), mlp=SwiGLU.Config(hidden=16)))
    made = LanguageModel.Config(vocab_size=256, d_model=16, layers=tuple(layers)).build().eval()
    everlong.save(made, folder)
    return made


# JSON


def places(data, path=()):
    """The path of every value."""
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def put(data, path, value):
    if not path:
        return value
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return data


def without(data, path):
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return data


def json_mutations(text, mend=lambda data: data):
    """(name, bytes) of every structural change."""
    data = json.loads(text)
    for path in places(data):
        where = ".".join(map(str, path)) or "all"
        for index, leaf in enumerate(LEAVES):
            yield f"{where} = {str(leaf)[:20]} ({index})", json.dumps(mend(put(data, path, leaf))).encode()
        for raw in RAW:
            marked = json.dumps(mend(put(data, path, "<here>")))
            yield f"{where} = {raw[:12]}", marked.replace('"<here>"', raw).encode("latin-1", "replace")
        if path:
            yield f"{where} dropped", json.dumps(mend(without(data, path))).encode()
        if path and isinstance(path[-1], str):
            yield f"{where} added", json.dumps(mend(put(data, (*path[:-1], "added"), 1))).encode()
            key = json.dumps(path[-1])
            yield f"{where} twice", json.dumps(data).replace(f"{key}:", f"{key}: 1, {key}:", 1).encode()


# Bytes


def byte_mutations(data, rng, head):
    """(name, bytes): flips (most in the first ``head`` bytes), cuts, additions."""
    for index in range(10_000):
        at = rng.randrange(min(head, len(data)) if index % 4 else len(data))
        yield f"bit {at}", data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        if index % 3 == 0:
            yield f"cut at {at}", data[:at]
            yield f"{at} bytes more", data + rng.randbytes(at % 500 + 1)
            yield f"without byte {at}", data[:at] + data[at + 1 :]


def header_mutations(data):
    """(name, bytes): every field of the header of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    for size in (0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1):
        yield f"header length {size}", struct.pack("<Q", size) + data[8:]
    body = data[8 + length :]
    for name, changed in json_mutations(data[8 : 8 + length]):
        yield f"header: {name}", struct.pack("<Q", len(changed)) + changed + body
    header = json.loads(data[8 : 8 + length])
    for key in (key for key in header if key != "__metadata__"):
        for dtype in ("I32", "U8", "BOOL", "F16", "BF16", "F64", "I64", "F8_E4M3", "F8_E5M2", "F4", "C64"):
            changed = json.dumps(put(header, (key, "dtype"), dtype)).encode()
            yield f"header: {key} is {dtype}", struct.pack("<Q", len(changed)) + changed + body


WIDE = (
    lambda t: t[:, :1],
    lambda t: torch.cat([t, t, t], 1),
    lambda t: t.new_zeros(*t.shape[:1], 0, *t.shape[2:]),
)
CHANGES = (
    *WIDE,
    lambda t: t[:0] if t.dim() else t[None],
    lambda t: torch.cat([t[None], t[None]]).flatten(0, min(1, t.dim())),
    lambda t: t[None],
    lambda t: t.flatten(),
    lambda t: t.sum(),
    lambda t: t.bool(),
    lambda t: t.int(),
    lambda t: t.to(torch.uint8),
    lambda t: t.bfloat16(),
    lambda t: t.double(),
    lambda t: t.half(),
    lambda t: t.to(torch.float8_e4m3fn),
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.uint8).fill_(7).view(torch.bool),
)


def tensor_mutations(tensors):
    """(name, tensors): values, shapes and dtypes of every tensor."""
    for name, tensor in tensors.items():
        for value in (-5, -1, 1, 10**6, 10**12, 2**63 - 1, -(2**63), float("nan"), float("inf"), 1e38):
            if tensor.is_floating_point() or (isinstance(value, int) and tensor.dtype == torch.int64):
                yield f"{name} = {value}", {**tensors, name: torch.full_like(tensor, value)}
        for change in CHANGES:
            if tensor.dim() < 2 and change in WIDE:
                continue
            changed = change(tensor)
            yield f"{name}: {list(changed.shape)} {changed.dtype}", {**tensors, name: changed.contiguous()}
        yield f"{name} dropped", {key: value for key, value in tensors.items() if key != name}
        yield f"{name} renamed", {("x" + key if key == name else key): value for key, value in tensors.items()}


# Kinds: each yields (name, write, read, whether the result must be identical)


def _model_files(folder, rng):
    model(folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    whole, data = config.read_bytes(), weights.read_bytes()

    def read():
        loaded = everlong.load(folder)
        ids = torch.arange(8)[None]
        return [loaded(ids)[0], torch.tensor(list(everlong.generate(loaded, [1, 2], max_tokens=2, sampling=GREEDY)))]

    def both(text, tensors=data):
        config.write_bytes(text)
        weights.write_bytes(tensors)

    return config, whole, weights, data, read, both


def config_kind(folder, rng):
    _, whole, _, _, read, both = _model_files(folder, rng)
    yield "as it is", lambda: both(whole), read, True
    for name, text in json_mutations(whole):
        yield name, (lambda text=text: both(text)), read, True
    for name, text in byte_mutations(whole, rng, len(whole)):
        if rng.random() < 0.1:
            yield name, (lambda text=text: both(text)), read, True


def options_kind(folder, rng):
    _, whole, _, _, read, both = _model_files(folder, rng)
    data = json.loads(whole)
    data.pop("fingerprint")
    yield "as it is", lambda: both(whole), read, True
    for name, text in json_mutations(json.dumps(data)):
        yield name, (lambda text=text: both(text)), read, False


def weights_kind(folder, rng):
    _, whole, _weights, data, read, both = _model_files(folder, rng)
    yield "as it is", lambda: both(whole), read, True
    for name, changed in byte_mutations(data, rng, 3000):
        yield name, (lambda changed=changed: both(whole, changed)), read, True


def header_kind(folder, rng):
    """Weights whose checksum was made to fit."""
    _, whole, weights, data, read, both = _model_files(folder, rng)
    yield "as it is", lambda: both(whole), read, True

    def fitting(changed):
        both(whole, changed)
        both(json.dumps(put(json.loads(whole), ("weights",), _described(weights))).encode(), changed)

    from safetensors.torch import load, save

    for name, changed in header_mutations(data):
        yield name, (lambda changed=changed: fitting(changed)), read, False
    for name, tensors in tensor_mutations(load(data)):
        yield name, (lambda tensors=tensors: fitting(save(tensors, {"format": "pt"}))), read, False


def tokenizer_kind(folder, rng, fits=False):
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    library = Tokenizer(BPE({"a": 0, "b": 1, "ab": 2, "c": 3, "</s>": 4, "[UNK]": 5}, [("a", "b")], unk_token="[UNK]"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    library.save(str(folder / "tokenizer.json"))
    made = model(folder)
    everlong.save(made, folder, everlong.tokenizer.FileTokenizer(folder / "tokenizer.json"))
    path, config = folder / "tokenizer.json", folder / "config.json"
    whole = path.read_bytes()
    if fits:
        data = json.loads(config.read_bytes())
        data.pop("tokenizer")
        config.write_text(json.dumps(data))

    def read():
        tokenizer = everlong.load_tokenizer(folder)
        ids = tokenizer.encode("ab c abcab")
        stream = tokenizer.decoder(ids)
        return [torch.tensor(ids), tokenizer.decode(ids), "".join(map(stream.feed, ids[:3])), tokenizer.vocab_size]

    yield "as it is", lambda: path.write_bytes(whole), read, True
    for name, text in json_mutations(whole):
        yield name, (lambda text=text: path.write_bytes(text)), read, not fits


def vocabulary_kind(folder, rng):
    yield from tokenizer_kind(folder, rng, fits=True)


def session_kind(folder, rng, fits=False):
    made, path = model(folder), folder / "session"
    tokens = everlong.generate(made, [1, 2, 3], max_tokens=4, sampling=GREEDY)
    list(tokens)
    everlong.save_session(tokens.session, path, made)
    data = path.read_bytes()

    def read():
        session = everlong.load_session(path, made)
        return [torch.tensor(list(everlong.generate(made, [5], max_tokens=3, sampling=GREEDY, session=session)))]

    yield "as it is", lambda: path.write_bytes(data), read, True
    if not fits:
        for name, changed in header_mutations(data):
            yield name, (lambda changed=changed: path.write_bytes(changed)), read, True
        for name, changed in byte_mutations(data, rng, 3000):
            yield name, (lambda changed=changed: path.write_bytes(changed)), read, True
        return
    from safetensors.torch import load, save

    meta = states.read_meta(path)
    for name, tensors in tensor_mutations(load(data)):

        def write(tensors=tensors):
            said = json.dumps(meta)
            header = {"format": "everlong-state", "meta": said, "crc32": states._seal(tensors, said)}
            path.write_bytes(save(tensors, header))

        yield name, write, read, False


def state_kind(folder, rng):
    yield from session_kind(folder, rng, fits=True)


def run_kind(folder, rng, fits=False):
    """The checkpoint of a run, and its metrics."""
    cfg = Trainer.Config(tokens=4 * 2 * 8, context=8, batch=2, save_every=2)
    text = folder / "text.txt"
    text.write_text("some text of a run. " * 30)
    torch.manual_seed(0)
    layer = Layer.Config(mixer=find("gla").Config(n_heads=2), mlp=SwiGLU.Config(hidden=16))
    job = Job(model=LanguageModel.Config(vocab_size=256, d_model=16, layers=(layer,)), train=cfg, paths=(str(text),))
    (folder / "job.json").write_text(dumps(job))
    train(job, folder, device="cpu")
    names = ("job.json", checkpoint.FILE, "metrics.jsonl")
    files = {name: (folder / name).read_bytes() for name in names}

    def restore(**changed):
        for name, data in {**files, **changed}.items():
            (folder / name).write_bytes(data)

    def read():
        found = train(read_job(folder), folder, device="cpu")
        written = (folder / "metrics.jsonl").read_text()
        return [*found.model.state_dict().values(), str(found.curve), str(found.loss), written]

    yield "as it is", restore, read, True
    yield from _run_mutations(files, restore, read, rng, fits)


def _run_mutations(files, restore, read, rng, fits):
    data = files[checkpoint.FILE]
    if fits:
        from safetensors.torch import load, save

        length = struct.unpack("<Q", data[:8])[0]
        run = json.loads(data[8 : 8 + length])["__metadata__"]["run"]
        for name, tensors in tensor_mutations(load(data)):

            def write(tensors=tensors):
                import zlib

                crc = str(tensor_checksum(tensors, zlib.crc32(run.encode())))
                restore(**{checkpoint.FILE: save(tensors, {"format": "everlong-run-2", "run": run, "crc32": crc})})

            yield name, write, read, False
        return
    for name, text in json_mutations(files["job.json"]):
        yield f"job {name}", (lambda text=text: restore(**{"job.json": text})), read, True
    for name, changed in header_mutations(data):
        yield name, (lambda changed=changed: restore(**{checkpoint.FILE: changed})), read, True
    for name, changed in byte_mutations(files["metrics.jsonl"], rng, 10_000):
        if rng.random() < 0.05:
            yield f"metrics {name}", (lambda changed=changed: restore(**{"metrics.jsonl": changed})), read, True


def checkpoint_kind(folder, rng):
    yield from run_kind(folder, rng, fits=True)


def results_kind(folder, rng):
    path = folder / "results.json"
    one = {
        "name": "gla",
        "title": "GLA",
        "params": 100,
        "status": "partial",
        "training": {"tokens": 5, "curve": [[1, 2.5]]},
    }
    compared = sealed({"version": 1, "complete": False, "run": {"settings": {"seed": 0}, "text": "t"}, "models": [one]})
    timed = sealed({"version": 1, "kind": "ops", "complete": True, "rows": [{"op": "gla", "ms": {"median": 1.5}}]})
    for label, data, reader in (
        ("compare", compared, lambda: _read(path)),
        ("bench", timed, lambda: bench.load(folder)),
    ):
        whole = json.dumps(data).encode()

        def read(reader=reader):
            return [json.dumps(reader(), sort_keys=True)]

        yield f"{label}: as it is", (lambda whole=whole: path.write_bytes(whole)), read, True
        for name, text in json_mutations(whole):
            yield f"{label}: {name}", (lambda text=text: path.write_bytes(text)), read, True
        for name, text in json_mutations(whole, lambda data: sealed(data) if isinstance(data, dict) else data):
            yield f"{label}, sealed: {name}", (lambda text=text: path.write_bytes(text)), read, False


KINDS = {name.removesuffix("_kind"): kind for name, kind in list(globals().items()) if name.endswith("_kind")}


class Hangs(BaseException):
    """A reading took too long."""


def _alarm(*ignored):
    raise Hangs


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


def outcome(write, read, expected):
    """None where all is well, else what is not."""
    write()
    try:
        found = read()
    except (ValueError, OSError) as error:
        said = str(error)
        if not said or len(said) > 1500 or said.count("\n") > 3:
            return f"an error that tells nothing: {said[:300]!r}"
        return None
    except Hangs:
        return f"more than {SECONDS} s\n{traceback.format_exc(limit=-6)}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}\n{traceback.format_exc(limit=-6)}"
    return None if expected is None or same(found, expected) else "another result, without a word"


def chosen(cases, most, rng):
    """The first case, and ``most`` of the others from beginning to end."""
    first = next(cases)
    others = list(cases)
    return first, [others[index] for index in sorted(rng.sample(range(len(others)), min(most, len(others))))]


def main(kind, folder, most):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _alarm)
    folder, rng = Path(folder), random.Random(f"{kind} 1")
    (_, write, read, _), cases = chosen(KINDS[kind](folder, rng), most, rng)
    write()
    expected = read()
    if kind == "results":
        expected = None  # of two files: an alteration must be noticed, or be read as it stands
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SLACK
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    faults = 0
    for name, write, read, identical in cases:
        print("TRY", name, flush=True)
        signal.alarm(SECONDS)
        wrong = outcome(write, read, expected if identical else None)
        signal.alarm(0)
        if wrong:
            faults += 1
            print(f"FAULT {name}: {wrong}", flush=True)
    print("DONE", len(cases), faults, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
