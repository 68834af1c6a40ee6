"""PackedDeltaNet is transformers' layer, document by document; transformers' fast paths never take its place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_truth import worst_error

from loop.delta_net import CHUNK, Pack, PackedDeltaNet, isolate_documents
from loop.model import hidden_fast_paths
from loop.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[2]
RIVAL = """
CALLS = []

def rival(*args, **kwargs):
    CALLS.append(args)
    raise RuntimeError("the fast path was called")

"""


def original_layer(dtype: torch.dtype = torch.float32):
    from transformers import AutoConfig

    with hidden_fast_paths():
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
    torch.manual_seed(0)
    model_type, shape = SHAPES["qwen3.5-tiny"]
    return Qwen3_5GatedDeltaNet(AutoConfig.for_model(model_type, **shape, vocab_size=512), 0).to(dtype)


def forward_backward(layer, x: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(x, **options)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return {"out": out.detach(), "x": x.grad} | {name: p.grad.clone() for name, p in layer.named_parameters()}


def pack_of(lengths: list[int]) -> Pack:
    return Pack(torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32), tuple(lengths))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 128, 130])
def test_one_document_is_what_transformers_computes(length, dtype, tolerance):
    """Bitwise forward where rows are whole chunks. Else the convolution's rows are longer by zeros, and it blocks its sums
    by the length of a row; the zeros of the delta rule are those that transformers adds itself."""
    original = original_layer(dtype)
    packed = PackedDeltaNet(original)
    x = torch.randn(1, length, 128, generator=torch.Generator().manual_seed(length)).to(dtype)
    truth = forward_backward(original, x)
    for options in ({}, {"pack": pack_of([length])}):
        result = forward_backward(packed, x, **options)
        assert result.keys() == truth.keys()
        assert torch.equal(result["out"], truth["out"]) or length % CHUNK
        error, name = worst_error(result, truth)
        assert error < tolerance, name


def test_rows_without_a_pack_are_documents():
    layer = PackedDeltaNet(original_layer())
    x = torch.randn(3, 70, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together, alone = layer(x), torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_the_swap_keeps_names_and_tensors():
    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear_attn = original_layer()

    holder = Holder()
    before = dict(holder.named_parameters())
    assert isolate_documents(holder) == 1 and type(holder.linear_attn) is PackedDeltaNet
    after = dict(holder.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3 * CHUNK), min_size=1, max_size=12), st.integers(1, 3))
def test_join_undoes_split(lengths, width):
    pack = pack_of(lengths)
    x = torch.arange(sum(lengths) * width, dtype=torch.float32).view(1, -1, width) + 1
    parts = pack.split(x)
    assert torch.equal(pack.join(parts), x)
    assert sum(part.shape[0] for part in parts) == len(lengths)
    assert all(part.shape[1] % CHUNK == 0 for part in parts)
    assert sum(float(part.sum()) for part in parts) == pytest.approx(float(x.sum())), "behind the documents are zeros"
    assert sum(int((part != 0).sum()) for part in parts) == x.numel()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 2 * CHUNK + 1), min_size=1, max_size=8))
def test_every_row_of_a_split_is_one_document_in_order(lengths):
    pack = pack_of(lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)) + 1, torch.tensor(lengths))
    place = torch.cat([torch.arange(length) for length in lengths])
    seen = []
    for documents, places in zip(pack.split(document[None]), pack.split(place[None]), strict=True):
        for row, order in zip(documents, places, strict=True):
            length = int((row != 0).sum())
            assert row[:length].unique().numel() == 1 and not row[length:].any()
            assert order[:length].tolist() == list(range(length)) and length == lengths[int(row[0]) - 1]
            seen.append(int(row[0]))
    assert sorted(seen) == list(range(1, len(lengths) + 1))


@pytest.fixture
def rivals(tmp_path: Path) -> Path:
    """A folder with packages `fla` and `causal_conv1d` whose functions note the call and raise."""
    fla = tmp_path / "fla" / "ops" / "gated_delta_rule"
    conv = tmp_path / "causal_conv1d"
    for folder in (fla, conv):
        folder.mkdir(parents=True)
    (tmp_path / "fla" / "__init__.py").write_text("__version__ = '0.6.0'\n" + RIVAL)
    (tmp_path / "fla" / "ops" / "__init__.py").write_text("")
    names = "chunk_gated_delta_rule = fused_recurrent_gated_delta_rule = rival\n"
    (fla / "__init__.py").write_text("from fla import rival\n" + names)
    (conv / "__init__.py").write_text(RIVAL + "causal_conv1d_fn = causal_conv1d_update = rival\n")
    return tmp_path


TRAIN_BESIDE_RIVALS = """
import sys
import torch
if sys.argv[2] == "imported_before":  # a notebook that used transformers before it called the loop
    import transformers.models.qwen3_5.modeling_qwen3_5
from pathlib import Path
from loop.config import Config, DataConfig
from loop.training import train
torch.set_num_threads(1)
data = DataConfig(path=Path(sys.argv[3]), pack_length=128, cache_dir=Path(sys.argv[1]))
log = train(Config(model="qwen3.5-tiny", steps=1, device="cpu", dtype="float32", data=data))
import causal_conv1d, fla
from transformers import AutoConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from loop.shapes import SHAPES
print(repr(log.losses[0]), len(fla.CALLS) + len(causal_conv1d.CALLS))
stock = Qwen3_5GatedDeltaNet(AutoConfig.for_model("qwen3_5_text", **SHAPES["qwen3.5-tiny"][1], vocab_size=512), 0)
try:
    stock(torch.zeros(1, 8, 128))
    print("plain")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(("order", "stock"), [("clean", "plain"), ("imported_before", "the fast path was called")])
def test_installed_fast_paths_are_never_bound(make, cache_dir, chats, rivals, order, stock):
    """`stock` says that the rivals are real: transformers' own layer calls them when it was imported beside them."""
    from loop.training import train

    result = subprocess.run(
        [sys.executable, "-c", TRAIN_BESIDE_RIVALS, str(cache_dir), order, str(chats)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(rivals)]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    loss, calls = first.split()
    default_lora = {"rank": 16, "alpha": 32.0}
    assert float(loss) == train(make(model="qwen3.5-tiny", steps=1, lora=default_lora)).losses[0]
    assert (calls, second) == ("0", stock)
