"""One conversation's answer, token by token: the decoding loop in its plain form."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence

import torch
from torch import Tensor

from minitune.config import UserError
from minitune.infer.sampling import Sampling, pick
from minitune.model.cache import CachedLayout, KVCache
from minitune.model.decoder import Decoder

BLOCK = 256  # tokens by which the cache grows: 4096 at once would be 3 GB of MiniCPM-2B in float32


class GrowingCache(KVCache):
    """The keys and values of one conversation, and the ids that they belong to; kept from turn to turn."""

    def __init__(self, decoder: Decoder):
        super().__init__(decoder.config, 1, 0, decoder.device, decoder.dtype)
        self.limit = decoder.config.max_position_embeddings
        self.ids: list[int] = []

    def keep_prefix(self, prompt_ids: Sequence[int]) -> None:
        """Forgets all behind the longest common prefix with a prompt; its last token is always run again."""
        kept = 0
        for held, wanted in zip(self.ids, prompt_ids[:-1], strict=False):
            if held != wanted:
                break
            kept += 1
        del self.ids[kept:]

    def reserve(self, tokens: int) -> None:
        """Room for this many tokens."""
        if tokens <= self.capacity:
            return
        capacity = max(tokens, min(-(-tokens // BLOCK) * BLOCK, self.limit))
        held = len(self.ids)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:3], capacity, old.shape[4])
            new[..., :held, :] = old[..., :held, :]
            setattr(self, name, new)
        self.capacity = capacity


def _advance(decoder: Decoder, cache: GrowingCache, ids: Sequence[int]) -> Tensor:
    """Runs `ids` behind what the cache holds; the scores [V] of what follows them."""
    start, stop = len(cache.ids), len(cache.ids) + len(ids)
    cache.reserve(stop)
    ids_T = torch.tensor(ids, device=decoder.device)
    position_ids_T = torch.arange(start, stop, device=decoder.device)
    h_TH = decoder.hidden(ids_T, position_ids_T, CachedLayout(cache, 0, start))
    cache.ids += ids
    return decoder.head(h_TH[-1])


def _check(decoder: Decoder, prompt_ids: Sequence[int]) -> None:
    limit, vocab = decoder.config.max_position_embeddings, decoder.config.vocab_size
    if not prompt_ids:
        raise ValueError("an empty prompt")
    if len(prompt_ids) >= limit:
        raise UserError(
            f"the conversation has {len(prompt_ids)} tokens, the model reads fewer than {limit}; shorten it"
        )
    if max(prompt_ids) >= vocab:
        raise UserError(
            f"token {max(prompt_ids)} of the prompt is beyond the model's {vocab}: another model's tokenizer"
        )


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompt_ids: Sequence[int],
    stop_ids: Collection[int],
    sampling: Sampling,
    *,
    cache: GrowingCache | None = None,
) -> Generator[int, None, str]:
    """Yields the answer's token ids; returns why it ended (the value of `yield from`).

    "stop": one of `stop_ids` came (it is not yielded). "length": max_new_tokens. "context": the model's
    max_position_embeddings are full. `cache` holds an earlier turn: only what `prompt_ids` do not share with
    it is computed. Breaking off leaves the cache good. Raises UserError for a prompt that is too long.
    """
    _check(decoder, prompt_ids)
    if cache is None:
        cache = GrowingCache(decoder)
    cache.keep_prefix(prompt_ids)
    generator = sampling.generator(decoder.device)
    history = list(prompt_ids)
    room = decoder.config.max_position_embeddings - len(prompt_ids)
    for _ in range(min(sampling.max_new_tokens, room)):
        token = pick(_advance(decoder, cache, history[len(cache.ids) :]), history, sampling, generator)
        if token in stop_ids:
            return "stop"
        yield token
        history.append(token)
    return "length" if sampling.max_new_tokens <= room else "context"
