"""Named shapes have as many weights as the published models."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loop.shapes import SHAPES

# Billions, embeddings left out and on their own: worked out by hand from the published dimensions of the text models.
WEIGHTS = {
    "qwen3.5-0.8b": (0.498, 0.254),
    "qwen3.5-2b": (1.373, 0.509),
    "qwen3.5-4b": (3.570, 0.636),
    "qwen3-1.7b": (1.409, 0.311),
}


@pytest.mark.parametrize("name", [name for name in SHAPES if not name.endswith("-tiny")])
def test_weights_of_a_shape(name):
    model_type, values = SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    embeddings = model.get_input_embeddings().weight.numel()
    assert model.get_output_embeddings().weight.numel() == embeddings and model.config.tie_word_embeddings
    rest = sum(parameter.numel() for parameter in model.parameters()) - embeddings
    assert (rest / 1e9, embeddings / 1e9) == pytest.approx(WEIGHTS[name], abs=0.0005)
