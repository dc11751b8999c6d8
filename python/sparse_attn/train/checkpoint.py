# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: one safetensors file, written whole or not at all, checked on every load.

Tensors hold the model, the average of its weights, the optimiser and random states; the metadata
holds the configuration of the model and the progress of the run as JSON, and a digest of all of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.writer import sync_folder

FORMAT = "sparse_attn checkpoint 2"


class CheckpointError(ValueError):
    """A checkpoint is corrupt, truncated, or not the one that was wanted."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds: two dicts of JSON values and named tensors on the CPU."""

    config: dict[str, Any]
    progress: dict[str, Any]
    tensors: dict[str, Tensor]
    path: str = "checkpoint"  # where it was read from, for messages

    def group(self, name: str) -> dict[str, Tensor]:
        """The tensors called `name.something`, by something."""
        start = name + "."
        return {k[len(start) :]: v for k, v in self.tensors.items() if k.startswith(start)}


def save(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path`, replacing the file there only once all is on the disk.

    Whatever interrupts it (a full disk, Ctrl-C), the old file stays and no other is left behind.
    """
    torch_format = import_safetensors()[1]
    path = Path(path)
    config, progress = json.dumps(checkpoint.config), json.dumps(checkpoint.progress)
    tensors = {k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()}
    content = torch_format.save(
        tensors,
        {
            "format": FORMAT,
            "config": config,
            "progress": progress,
            "digest": _digest(config, progress, tensors),
        },
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # One fixed name: what a killed process left is written over by the next save.
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint.

    Raises FileNotFoundError if there is none and CheckpointError if it is not exactly what `save`
    wrote.
    """
    safetensors, torch_format = import_safetensors()
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, wanted a checkpoint file")
    try:
        content = path.read_bytes()
        tensors = torch_format.load(content)
        header_end = 8 + int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8:header_end]).get("__metadata__", {})
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is truncated or corrupt, wanted a checkpoint in safetensors form: {error}"
        ) from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a safetensors file of format {metadata.get('format')!r}, wanted {FORMAT!r}"
        )
    config, progress = metadata.get("config", ""), metadata.get("progress", "")
    if metadata.get("digest") != _digest(config, progress, tensors):
        raise CheckpointError(
            f"{path} is corrupt: its content does not match the digest it was saved with"
        )
    return Checkpoint(json.loads(config), json.loads(progress), tensors, str(path))


def check_same(
    saved: Checkpoint, what: str, found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Raise CheckpointError naming every entry in which `found` differs from `wanted`."""
    differing = [
        f"{name} is {found.get(name)!r}, wanted {wanted.get(name)!r}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        raise CheckpointError(f"{saved.path} belongs to another {what}: {'; '.join(differing)}")


def load_weights(saved: Checkpoint, model: torch.nn.Module, group: str | None = None) -> None:
    """Copy the weights of a checkpoint into `model`; all names and shapes must agree.

    `group` is "average" or "model", the weights that are trained; by default the average if the
    checkpoint has one.
    """
    weights = saved.group(group or "average") or saved.group("model")
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_same(saved, "model", shapes, wanted)
    model.load_state_dict(weights)


def _digest(config: str, progress: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=32)
    digest.update(json.dumps([config, progress]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def import_safetensors() -> tuple[Any, Any]:
    """The modules safetensors and safetensors.torch; ImportError names the extra."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            'checkpoints need safetensors: pip install "sparse-attn[train]"'
        ) from error
    return safetensors, safetensors.torch
