"""One drawn token -> what the asker gets, and whether it was the last. Pure: no device, no schedule."""

from __future__ import annotations

from minitune.config import UserError
from minitune.infer.request import Piece
from minitune.infer.slots import Drawn

NOT_FINITE = "the model's scores are not finite: broken weights or too narrow a dtype; try --dtype float32"


def advance(drawn: Drawn) -> tuple[Piece | None, str]:
    """Adds the token to its sequence; (the piece, why the answer ends: "" while it goes on).

    Raises UserError where there is no token to be had, or what the grammar raises.
    """
    sequence, token = drawn.sequence, drawn.token
    handle, request, text = sequence.handle, sequence.request, sequence.text
    if handle.error is not None:
        raise handle.error
    if token < 0:
        raise UserError("the grammar allows no token" if request.grammar else NOT_FINITE)
    if token in request.stop_ids:
        rest = text.flush()
        return Piece(rest) if rest else None, "stop"
    sequence.ids.append(token)
    handle.ids.append(token)
    said = text.push(token)
    finish = ""
    if text.stopped or (request.grammar is not None and request.grammar.accept(token)):
        finish = "stop"
    elif len(handle.ids) >= sequence.room:
        finish = "length" if len(handle.ids) >= request.sampling.max_new_tokens else "context"
    if finish and not text.stopped:
        said += text.flush()
    return Piece(said, (token,), [drawn.logprob] if drawn.logprob else []), finish
