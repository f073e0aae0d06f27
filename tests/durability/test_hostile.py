"""Checkpoints that somebody prepared: a careless loader would run their code, or write elsewhere."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import klrl
from klrl.errors import UsageError
from klrl.rundir import checkpoint


class Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("touch executed",))


def payloads(path: Path) -> dict[str, Callable[[], None]]:
    """Ways to prepare the checkpoint at ``path`` so that a careless loader runs code or writes elsewhere."""
    manifest = path / "manifest.json"
    entry = json.loads(manifest.read_text())["rows"][0]

    def rows_named(name: str) -> None:
        content = json.loads(manifest.read_text())
        content["rows"] = [{**entry, "name": name}]
        manifest.write_bytes(checkpoint._sealed(content))

    def linked(name: str, target: str) -> None:
        (path / name).unlink()
        (path / name).symlink_to(target)

    def shaped() -> None:
        header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 4]}}).encode()
        forge("tensors.safetensors", len(header).to_bytes(8, "little") + header + bytes(4))

    def forge(name: str, data: bytes) -> None:
        """Replace a file and fit the manifest to it, as an attacker would."""
        import hashlib

        (path / name).write_bytes(data)
        content = json.loads(manifest.read_text())
        content["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        manifest.write_bytes(checkpoint._sealed(content))

    def torch_file() -> None:
        torch.save({"x": Evil()}, "evil.pt")
        forge("tensors.safetensors", Path("evil.pt").read_bytes())

    def zipped() -> None:
        with zipfile.ZipFile("evil.zip", "w") as archive:
            archive.writestr("../executed", "x")
        forge("tensors.safetensors", Path("evil.zip").read_bytes())

    return {
        "a pickle as tensors": lambda: forge("tensors.safetensors", pickle.dumps(Evil())),
        "a pickle as state": lambda: forge("state.json", pickle.dumps(Evil())),
        "a pickle as manifest": lambda: manifest.write_bytes(pickle.dumps(Evil())) and None,
        "a torch file as tensors": torch_file,
        "a zip with a name that climbs": zipped,
        "rows named ../": lambda: rows_named("../../etc/passwd"),
        "rows named /": lambda: rows_named("/etc/passwd"),
        "a link as state": lambda: linked("state.json", "/etc/passwd"),
        "an absurd shape": shaped,
        "JSON 100,000 levels deep": lambda: forge("state.json", b"[" * 100_000 + b"]" * 100_000),
    }


REASONS = [  # why each of ``payloads`` is refused, in their order
    "SafetensorError",
    "JSONDecodeError|UnicodeDecodeError",
    "JSONDecodeError|UnicodeDecodeError",
    "SafetensorError",
    "SafetensorError",
    "it names a file",
    "it names a file",
    "is a link",
    "SafetensorError",
    "RecursionError",
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that loads and resumes."""
    small = {"learning_starts": 32, "batch_size": 16, "hidden_sizes": (8,), "kl": {"every": 16}, "n_envs": 2}
    folder = tmp_path_factory.mktemp("sound")
    run = klrl.train("sac", "CartPole-v1", total_timesteps=100, run_dir=str(folder), quiet=True, eval_every=0, **small)
    shutil.copytree(run.folder, folder / "copy")
    klrl.load(folder / "copy")
    klrl.resume(folder / "copy", total_timesteps=150)
    return run.folder


@pytest.mark.parametrize("name", list(range(10)))
def test_malicious_files_are_refused_and_nothing_is_executed(name: int, sound: Path) -> None:
    shutil.copytree(sound, "run")
    path = checkpoint.resolve(Path("run"))
    list(payloads(path).values())[name]()
    before = set(Path().rglob("*"))
    attempts: list[Callable[[], Any]] = [lambda: klrl.resume("run", total_timesteps=150)]
    if "file" not in REASONS[name]:  # the replay's rows are nothing to an agent that only acts
        attempts.append(lambda: klrl.load(path))
    for attempt in attempts:
        with pytest.raises(UsageError, match=REASONS[name]) as refused:
            attempt()
        assert "\n" not in str(refused.value)
    assert {path for path in Path().rglob("*") if path.name != "lock"} == {p for p in before if p.name != "lock"}
