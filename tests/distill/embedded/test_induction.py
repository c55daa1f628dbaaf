"""The induction circuit that training starts from."""

from __future__ import annotations

import torch
from transformers import (
    PreTrainedTokenizerFast,
)

from xlstm_distill.embedded.train import Settings, build


def test_induction_is_there_before_training(tokenizer: PreTrainedTokenizerFast) -> None:
    table = "Gifts:\nAnn pens\nBob caps\nTom figs\nZoe rugs\nMia nets\nWhat has Tom?"
    ids = tokenizer(f"<|bos|><|user|>{table}<|end|><|assistant|>", return_tensors="pt")["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids[0].tolist())

    def looks(induction: bool) -> tuple[float, float]:
        """Return layer 0's least attention at the offsets, and layer 1's on the right value."""
        model = build(Settings(induction=induction), tokenizer)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            first, second, *_ = model(ids, output_attentions=True).attentions
        offsets = min(float(first[0, head].diagonal(-head - 1).mean()) for head in range(4))
        return offsets, float(second[0, 0, -1, tokens.index("figs")])

    assert max(looks(induction=False)) < 0.2
    assert min(looks(induction=True)) > 0.5
