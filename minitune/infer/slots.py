"""The device's side of the engine: what it holds for each running request, and the two computations over it.

Everything a step needs lies in static tensors, a row a slot; `decode` reads and writes them by slot number. On a card
`captured` does the same by hand, recorded and replayed, and `model.prefill` reads prompts by hand. One fetch a
computation brings the tokens to the host.

Legend: S slots + 1 (the last one idle), B rows, T tokens, H hidden, V vocabulary, P pages of a sequence,
C columns.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from minitune.config import UserError
from minitune.infer.captured import Captured
from minitune.infer.draw import Settings, biased, draw, draw_one, key_of, kind_of
from minitune.infer.request import TokenLogprob
from minitune.infer.schedule import Sequence
from minitune.model.cache import PAGE, DecodeLayout, PagedCache, Part, PrefillLayout
from minitune.model.contract import Contract
from minitune.model.decode import Columns, why_not
from minitune.model.decoder import Decoder, Layer
from minitune.model.lora import Choice
from minitune.model.prefill import Piece, Prefill


@dataclass(frozen=True)
class Drawn:
    """What a computation gave one sequence. token -1: its scores were not finite."""

    sequence: Sequence
    token: int
    logprob: TokenLogprob | None


CAPTURED = ("cuda",)  # devices whose decode steps are captured


class Slots:
    """limit: tokens of a sequence at most. choice: the adapters' (`model.lora.stack`), None without any."""

    def __init__(self, decoder: Decoder, slots: int, pages: int, limit: int, choice: Choice | None):
        self.decoder, self.choice = decoder, choice
        device, rows = decoder.device, slots + 1
        self.cache = PagedCache(decoder.config, pages, device, decoder.dtype)

        # one tensor a kind, so that a sequence's row is written at once
        self._whole_CS = torch.zeros(5, rows, dtype=torch.int64, device=device)
        self._real_CS = torch.zeros(4, rows, dtype=torch.float32, device=device)
        self.token_S, self.position_S, self.prompt_S, self.adapter_S, self.top_k_S = self._whole_CS.unbind()
        self.temperature_S, self.top_p_S, self.min_p_S, self.penalty_S = self._real_CS.unbind()
        self.key_S = torch.zeros(rows, dtype=torch.int32, device=device)
        self.table_SP = torch.zeros(rows, -(-limit // PAGE), dtype=torch.int64, device=device)
        self.seen_SV: Tensor | None = None  # which tokens a sequence holds; made when a penalty first asks for it
        self._batch: tuple[object, Tensor, list[tuple[Tensor | None, int]]] = ((), self.token_S[:0], [])
        self.columns = Columns(self.token_S, self.position_S, self.prompt_S, self.adapter_S, self.table_SP)
        self.plainly = why_not(decoder) if device.type in CAPTURED else "there is no card"
        self.captured = None if self.plainly else Captured(self, limit)
        self.contract: Contract | None = None  # what recorded prompts rest on
        self.by_hand = None if self.plainly else Prefill(decoder, self.cache, self.columns, limit, choice)

    def prepare(self, all_usual: bool) -> bool:
        """Compiles what reads prompts, or records a captured step, one that was asked for or any usual one; False:
        there is nothing to prepare."""
        if self._prepare_prompts(all_usual):
            return True
        captured = self.captured
        try:
            return captured is not None and captured.prepare(all_usual)
        except Exception as error:  # no memory, a compiler that fails: answers are given all the same
            if captured is not None:
                captured.drop()
            self.captured, self.plainly = None, f"{type(error).__name__}: {error}"
            warnings.warn(f"decoding stays plain, which is slow: {self.plainly}", stacklevel=2)
            return False

    def _prepare_prompts(self, all_usual: bool) -> bool:
        by_hand, captured = self.by_hand, self.captured
        if by_hand is None or not (all_usual or by_hand.asked):
            return False
        try:
            if not by_hand.prepare():
                return False
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            if by_hand.ready:
                by_hand.left.clear()
                warnings.warn(f"prompts are launched kernel by kernel: {what}", stacklevel=3)
            else:
                self.by_hand = None
                warnings.warn(f"prompts are read plainly, which is slow: {what}", stacklevel=3)
            return False
        if self.contract is None and captured is not None:
            self.contract = captured.contract = captured.contract or captured._contract()
        return True

    def place(self, sequence: Sequence) -> None:
        """Writes an admitted sequence's row, and copies the page that it takes over."""
        chain, slot, sampling = sequence.held, sequence.slot, sequence.request.sampling
        if chain.copied is not None:
            self.cache.copy(*chain.copied)
        position, prompt = len(sequence.ids) - 1, sequence.handle.prompt_tokens
        whole = [sequence.ids[-1], position, prompt, sequence.adapter, sampling.top_k]
        real = [sampling.temperature, sampling.top_p, sampling.min_p, sampling.repetition_penalty]
        self._whole_CS[:, slot] = self._there(whole)
        self._real_CS[:, slot] = self._there(real)
        self.key_S[slot].fill_(key_of(sequence.seed))
        self.write_pages(sequence)
        self._mark(sequence, sequence.ids)

    def _there(self, numbers: Items[int] | Items[float]) -> Tensor:
        """Numbers on the device, which is not waited for."""
        device = self.decoder.device
        return torch.tensor(numbers, pin_memory=device.type == "cuda").to(device, non_blocking=True)

    def restore(self, sequence: Sequence) -> None:
        """Sets a slot to what the host knows of its sequence, whatever the device has gone on to."""
        self.token_S[sequence.slot] = sequence.ids[-1]
        self.position_S[sequence.slot] = len(sequence.ids) - 1
        self._mark(sequence, sequence.ids)

    def _mark(self, sequence: Sequence, ids: list[int]) -> None:
        """Which tokens the sequence holds, where a penalty asks for it."""
        if sequence.request.sampling.repetition_penalty == 1:
            return
        if self.seen_SV is None:
            shape = (self.token_S.shape[0], self.decoder.config.vocab_size)
            self.seen_SV = torch.zeros(shape, dtype=torch.bool, device=self.decoder.device)
        self.seen_SV[sequence.slot] = False
        self.seen_SV[sequence.slot, torch.tensor(ids, device=self.seen_SV.device)] = True

    def write_pages(self, sequence: Sequence) -> None:
        """The row of the page table, after it grew."""
        pages = sequence.held.pages
        self.table_SP[sequence.slot, : len(pages)] = self._there(pages)

    def write_last_page(self, sequence: Sequence) -> None:
        """The same where one page was added: a number, which does not wait for the device."""
        pages = sequence.held.pages
        self.table_SP[sequence.slot, len(pages) - 1].fill_(pages[-1])

    def prefill(self, parts: Items[tuple[Sequence, int]]) -> list[Drawn]:
        """Runs the ids of each sequence from `computed` up to the number beside it, all in one pack; a token for
        those whose ids end there."""
        pieces = [Piece(s.slot, s.computed, s.ids[s.computed : stop], stop == len(s.ids)) for s, stop in parts]
        done = [s for s, stop in parts if stop == len(s.ids)]
        by_hand = self.by_hand
        if by_hand is not None and by_hand.ready:
            scores_BV = by_hand.run(pieces, any(s.adapter >= 0 for s, _ in parts))
            if self.contract is not None:
                self.contract.check()  # the device computes meanwhile
        else:
            if by_hand is not None:
                by_hand.asked = True
            scores_BV = self._plain_prefill([s for s, _ in parts], pieces)
        if scores_BV is None:
            return []
        rows_B = self._there([s.slot for s in done])
        self.position_S[rows_B] += 1
        return self._draw(scores_BV, rows_B, done)

    def _plain_prefill(self, sequences: Items[Sequence], pieces: Items[Piece]) -> Tensor | None:
        """Scores [B, V] of the pieces that are asked for, by the decoder's layers; None where none is."""
        device = self.decoder.device
        spans = [range(piece.start, piece.start + len(piece.ids)) for piece in pieces]
        ids_T = torch.tensor([token for piece in pieces for token in piece.ids], device=device)
        position_T = torch.tensor([position for span in spans for position in span], device=device)
        slot_T = torch.tensor([p.slot for p in pieces for _ in p.ids], device=device)
        length_T = torch.maximum(self.prompt_S[slot_T], position_T + 1)
        held = [Part(s.held.pages, span.start, span.stop) for s, span in zip(sequences, spans, strict=True)]
        self._choose(sequences, slot_T)
        h_TH = self._hidden(ids_T, position_T, PrefillLayout(self.cache, held, length_T))
        ends = torch.tensor([len(span) for span in spans]).cumsum(0) - 1
        asked = ends[torch.tensor([piece.asked for piece in pieces])]
        return self.decoder.head(h_TH[asked.to(device)]) if len(asked) else None

    def decode(self, sequences: Items[Sequence]) -> list[Drawn]:
        """Runs the newest token of each ready sequence; the next one of each."""
        rows_B, groups = self._rows(sequences)
        scores_BV = self.captured.scores(sequences) if self.captured is not None else None
        if scores_BV is not None:
            return self._draw(scores_BV, rows_B, sequences)
        self._choose(sequences, rows_B)
        position_B = self.position_S[rows_B]
        length_B = torch.maximum(self.prompt_S[rows_B], position_B + 1)
        layout = DecodeLayout(self.cache, self.table_SP[rows_B], position_B, length_B, groups)
        h_BH = self._hidden(self.token_S[rows_B], position_B, layout)
        self.position_S[rows_B] = position_B + 1
        return self._draw(self.decoder.head(h_BH), rows_B, sequences)

    def _rows(self, sequences: Items[Sequence]) -> tuple[Tensor, list[tuple[Tensor | None, int]]]:
        """The slots' numbers, and the groups of rows of like length; made anew only when they change."""
        pages = [s.computed // PAGE + 1 for s in sequences]
        key = tuple(s.slot for s in sequences), tuple(pages)
        if key != self._batch[0]:
            device = self.decoder.device
            groups: list[tuple[Tensor | None, int]] = [(None, max(pages))]
            if max(pages) > max(4, 2 * min(pages)):
                classes: dict[int, list[int]] = {}
                for row, count in enumerate(pages):
                    classes.setdefault(count.bit_length(), []).append(row)
                groups = [
                    (torch.tensor(rows, device=device), max(pages[row] for row in rows)) for rows in classes.values()
                ]
            self._batch = (key, torch.tensor(key[0], device=device), groups)
        return self._batch[1:]

    def _choose(self, sequences: Items[Sequence], slot_T: Tensor) -> None:
        """Tells the adapters which row is whose."""
        if self.choice is not None:
            used = any(s.adapter >= 0 for s in sequences)
            self.choice.index_T = self.adapter_S[slot_T] if used else None

    def _hidden(self, ids_T: Tensor, position_T: Tensor, layout: PrefillLayout | DecodeLayout) -> Tensor:
        """The decoder's plain layers, whatever a training step has put in their place."""
        decoder = self.decoder
        kept = decoder.stack, decoder.layer_forward
        decoder.stack, decoder.layer_forward = None, Layer.__call__
        try:
            return decoder.hidden(ids_T, position_T, layout)
        finally:
            decoder.stack, decoder.layer_forward = kept
            if self.choice is not None:
                self.choice.index_T = None

    def draw_rows(
        self,
        scores_BV: Tensor,
        rows_B: Tensor,
        kinds: frozenset[str],
        penalised: bool,
        allowed_BV: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(float32 scores after penalty and grammar, told [B, 3]: token, settled, scores finite) of the slots
        `rows_B`; the tokens go into the slots. Nothing waits for the device."""
        if penalised and self.seen_SV is not None:
            penalty_B1 = self.penalty_S[rows_B][:, None]
            weaker_BV = torch.where(scores_BV < 0, scores_BV * penalty_B1, scores_BV / penalty_B1)
            scores_BV = torch.where(self.seen_SV[rows_B], weaker_BV, scores_BV)
        if allowed_BV is not None:
            scores_BV = scores_BV.masked_fill(~allowed_BV, -math.inf)
        at = Settings(
            temperature=self.temperature_S[rows_B],
            top_p=self.top_p_S[rows_B],
            top_k=self.top_k_S[rows_B],
            min_p=self.min_p_S[rows_B],
            key=self.key_S[rows_B],
            position=self.position_S[rows_B],
        )
        token_B, settled_B, best_B = draw(scores_BV, at, kinds)
        self.token_S[rows_B] = token_B
        if penalised and self.seen_SV is not None:
            self.seen_SV[rows_B, token_B] = True
        return scores_BV, torch.stack((token_B, settled_B, best_B.isfinite()), dim=1).double()

    def drawn(self, sequence: Sequence, token: int) -> Drawn:
        """A token with nothing told about it."""
        return Drawn(sequence, token, None)

    def _draw(self, logits_BV: Tensor, rows_B: Tensor, sequences: Items[Sequence]) -> list[Drawn]:
        """Scores, bias, penalty, grammar, draw; the tokens go into the slots and, in one fetch, to the host."""
        logits_BV = logits_BV.float()
        penalised = any(s.request.sampling.repetition_penalty != 1 for s in sequences)
        grammars = any(s.request.grammar is not None for s in sequences)
        allowed_BV = self._allowed(sequences) if grammars else None
        kinds = frozenset(kind_of(s.request.sampling) for s in sequences)
        scores_BV = logits_BV
        if any(s.request.bias is not None for s in sequences):
            scores_BV = biased(logits_BV, [b.after(s.handle.ids) if (b := s.request.bias) else {} for s in sequences])
        scores_BV, told = self.draw_rows(scores_BV, rows_B, kinds, penalised, allowed_BV)
        asked = [s.request.logprobs for s in sequences if s.request.logprobs is not None]
        if asked:
            told = torch.cat((told, _logprobs(logits_BV, told[:, 0].long(), max(asked))), dim=1)
        out = []
        for row, (sequence, (token, settled, fine, *logprobs)) in enumerate(
            zip(sequences, told.tolist(), strict=True)  # the one place that waits for the device
        ):
            if fine and not settled:
                token = self._settle(sequence, scores_BV[row])
                if logprobs:
                    logprobs[0] = float(logits_BV[row].log_softmax(-1)[token])
            named = _named(int(token), logprobs, sequence.request.logprobs)
            out.append(Drawn(sequence, int(token) if fine else -1, named))
        return out

    def _settle(self, sequence: Sequence, scores_V: Tensor) -> int:
        """The token of a row whose candidates are too many for the batch."""
        token = draw_one(scores_V, sequence.request.sampling, key_of(sequence.seed), len(sequence.ids))
        self.token_S[sequence.slot] = token
        self._mark(sequence, [*sequence.ids, token])
        return token

    def _allowed(self, sequences: Items[Sequence]) -> Tensor:
        """bool [B, V]: what each row's grammar lets come; everything where there is none."""
        vocabulary = self.decoder.config.vocab_size
        bits_BW = torch.full((len(sequences), -(-vocabulary // 32)), -1, dtype=torch.int32)
        for sequence, bits_W in zip(sequences, bits_BW, strict=True):
            if sequence.request.grammar is not None:
                try:
                    sequence.request.grammar.mask(bits_W)
                except UserError as error:  # this row's fault alone
                    sequence.handle.error = error
        place_32 = torch.arange(32, dtype=torch.int32, device=self.decoder.device)
        allowed_BW32 = (bits_BW.to(place_32.device)[..., None] >> place_32) & 1
        return allowed_BW32.flatten(1)[:, :vocabulary].bool()


def _logprobs(logits_BV: Tensor, token_B: Tensor, top: int) -> Tensor:
    """float64 [B, 1 + 2·top]: the drawn token's, then the likeliest ones' values and ids."""
    mass_B1 = logits_BV.logsumexp(-1, keepdim=True)
    parts = [logits_BV.gather(1, token_B[:, None]) - mass_B1]
    if top:
        value_BC, id_BC = logits_BV.topk(min(top, logits_BV.shape[1]))
        parts += [value_BC - mass_B1, id_BC]
    return torch.cat([part.double() for part in parts], dim=1)


def _named(token: int, values: list[float], top: int | None) -> TokenLogprob | None:
    if top is None:
        return None
    count = (len(values) - 1) // 2
    likeliest = zip(values[1 + count :], values[1 : 1 + count], strict=True)
    return TokenLogprob(token, values[0], [(int(i), value) for i, value in likeliest][:top])
