"""What the tests of negative results share: small runs, and what a swap must leave as it was."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from loop import lora
from loop.config import LoraConfig
from loop.model import cross_entropy_head, hidden_fast_paths

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def drawn(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(DEVICE, dtype).requires_grad_()


def run_of(adapters: bool = False, dropout: float = 0.0, **changes) -> SimpleNamespace:
    with hidden_fast_paths():
        import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes, pad_token_id=None)).to(DEVICE)
    if adapters:
        lora.attach(model, LoraConfig(rank=4, dropout=dropout), seed=0)
    return SimpleNamespace(model=model, device=DEVICE, dtype=torch.float32, loss_head=cross_entropy_head, micro_step=None)


def outcome(model: nn.Module) -> list[torch.Tensor]:
    """Loss and gradients of what trains."""
    ids = torch.arange(12, device=DEVICE)[None]
    loss = model(ids, labels=ids).loss
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


def swapped_alike(optimization, run, kind: type[nn.Module], count: int, atol: float = 1e-6) -> None:
    """Applied, it has `count` modules of a kind, the same parameters under the same names, and the same results."""
    names = dict(run.model.named_parameters())
    canonical = {name.replace(".default.", ".") for name in names}
    before = outcome(run.model)
    assert optimization.eligible(run) is None
    optimization.apply(run)
    assert sum(isinstance(module, kind) for module in run.model.modules()) == count
    after = dict(run.model.named_parameters())
    assert {name.replace(".default.", ".") for name in after} == canonical
    assert {id(p) for p in after.values()} == {id(p) for p in names.values()}
    for one, other in zip(before, outcome(run.model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=atol)
