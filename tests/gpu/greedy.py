"""Whether a generated text is greedy: by one forward of the model over all of it."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

TOLERANCE = {torch.float16: 3e-2, torch.bfloat16: 2.5e-1, torch.float32: 1e-3}
"""By how much a chosen token's logit may lie below the largest: what roundings in another order change in logits around 10."""


@torch.inference_mode()
def share_of_best(model: PreTrainedModel, prompt: Sequence[int], generated: Sequence[int]) -> float:
    """Assert that every generated token was the most probable one, or tied with it; the share of those that were it.

    The reference is one eager forward over prompt and text, which computes every position at once.
    """
    ids = torch.tensor([[*prompt, *generated]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    tokens = ids[0, len(prompt) :]
    best = logits.max(dim=-1)
    short = best.values - logits.gather(1, tokens[:, None])[:, 0]
    assert short.max() <= TOLERANCE[model.dtype], f"token {int(short.argmax())} is {short.max():.3f} below the best"
    return float((best.indices == tokens).float().mean())
