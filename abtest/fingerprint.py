"""Fingerprints of tensors, batches and runs: equal for equal bits, cheap enough to take at every step."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch

from loop.batch import PackedBatch
from loop.run import Run

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 24  # elements turned into int64 at a time
_STRIDE = -7046029254386353131  # 2**64 over the golden ratio, odd, as a signed integer: keeps positions apart
_MIX = ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1))  # SplitMix64's shifts and factors


def fingerprint(tensors: Mapping[str, torch.Tensor | None]) -> str:
    """A hex digest of names, dtypes, shapes and bits; None counts as a value of its own.

    Tensors of one device and element size are hashed one behind the other, in a few large pieces: two sums modulo 2**64
    over all of them, of bits as integers and of a hash of bits and position. Weights instead of a hash would not do:
    (a, -b, -c, d) and its negation have the same weighted sums. One device synchronisation for each such group.
    """
    groups: dict[tuple[torch.device, int], list[torch.Tensor]] = {}
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        digest.update(f"{name}:{None if tensor is None else (tensor.dtype, tuple(tensor.shape))}".encode())
        if tensor is not None:
            groups.setdefault((tensor.device, tensor.element_size()), []).append(_bits(tensor))
    for (device, size), group in groups.items():
        digest.update(f"{device.type} {size}".encode())
        digest.update(_sums(group).cpu().numpy().tobytes())
    return digest.hexdigest()


def fingerprints(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """By name, a fingerprint of each tensor's dtype, shape and bits alone. One device synchronisation for them all."""
    marks, waiting = {}, defaultdict(list)
    for name, tensor in tensors.items():
        waiting[tensor.device].append((name, _sums([_bits(tensor)])))
    for device, found in waiting.items():
        sums = torch.stack([own for _, own in found]).cpu().numpy()
        for (name, _), own in zip(found, sums, strict=True):
            words = f"{tensors[name].dtype} {tuple(tensors[name].shape)} {device.type}".encode()
            marks[name] = hashlib.blake2b(words + own.tobytes(), digest_size=16).hexdigest()
    return marks


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its elements in order, as integers of their size."""
    return tensor.detach().contiguous().flatten().view(_INTEGERS[tensor.element_size()])


def _sums(group: list[torch.Tensor]) -> torch.Tensor:
    """[sum of bits, sum of hashes] of tensors of one integer dtype, int64 [2] on their device."""
    plain = torch.zeros((), dtype=torch.int64, device=group[0].device)
    hashed, start = torch.zeros_like(plain), 0
    for piece in _pieces(group):
        part = piece.long()
        plain += part.sum()
        positions = torch.arange(start, start + part.numel(), device=part.device)
        hashed += _mix(positions * _STRIDE + part).sum()
        start += part.numel()
    return torch.stack([plain, hashed])


def _pieces(group: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The tensors' elements in order, at most `_CHUNK` at a time, small tensors joined."""
    waiting, count = [], 0
    for tensor in group:
        for part in tensor.split(_CHUNK):
            if count + part.numel() > _CHUNK:
                yield torch.cat(waiting)
                waiting, count = [], 0
            waiting.append(part)
            count += part.numel()
    if count:
        yield torch.cat(waiting) if len(waiting) > 1 else waiting[0]


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), in place on int64: every bit depends on every bit."""
    for shift, factor in _MIX:
        x ^= (x >> shift) & ((1 << (64 - shift)) - 1)  # torch shifts in the sign; the mask takes it out again
        x *= factor
    return x


def batch_fingerprint(batches: Iterable[PackedBatch]) -> str:
    """What the model is fed: token ids, labels, positions, boundaries and the supervised count."""
    tensors = {}
    for index, batch in enumerate(batches):
        for name in ("input_ids", "labels", "position_ids", "cu_seqlens"):
            tensors[f"{index}.{name}"] = getattr(batch, name)
        tensors[f"{index}.supervised"] = torch.tensor(batch.supervised_tokens)
    return fingerprint(tensors)


def rng_fingerprint(device: torch.device) -> str:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return fingerprint(states)


def seams(run: Run) -> str:
    """What an optimization may change, without values: module classes, attention, recomputation, the other three seams."""
    lines = [f"{type(run.optimizer).__qualname__} {_function(run.loss_head)} {_function(run.micro_step)}"]
    lines.append(run.model.config._attn_implementation)
    for name, module in run.model.named_modules():
        lines.append(f"{name} {type(module).__module__}.{type(module).__qualname__} {_recomputes(module)}")
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _recomputes(module: torch.nn.Module) -> bool:
    return bool(getattr(module, "gradient_checkpointing", False))


def _function(function: object) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
