"""The tokenizer of a hub-layout folder, exactly as its own file says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitune.checkpoint.stream import TextStream
from minitune.config import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_NAMES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
MEND = "download the model again"

__all__ = ["TextStream", "load_tokenizer"]


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of `folder`: `tokenizer.json` where there is one, else sentencepiece's `tokenizer.model`.

    The ids are those of the file itself: of the `tokenizers` library for tokenizer.json (transformers 5
    rebuilds a Llama tokenizer from parts, which gives other ids for leading white space), of sentencepiece
    for tokenizer.model. BOS is added by default where the file (tokenizer.json) or `add_bos_token`
    (tokenizer.model) says so; `add_special_tokens=False` leaves it out.

    Special tokens written in a text: tokenizer.json says whether `</s>` in a text is the EOS id (Llama's
    do). sentencepiece never makes a control symbol of text, nor does this: `</s>` in a user's content stays
    characters, unless `split_special_tokens=False` asks for it, as `apply_chat_template` does since a
    template writes its own.

    Nothing is downloaded and no code of the folder is run: `auto_map` and `tokenizer_class` are ignored.
    Raises UserError where neither file is there or one cannot be read.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        return _from_json(folder)
    if (folder / "tokenizer.model").is_file():
        return _from_sentencepiece(folder)
    raise UserError(f"{folder}: no tokenizer: neither tokenizer.json nor tokenizer.model is there; {MEND}")


def _from_json(folder: Path) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  the library raises no narrower class
        raise _unreadable(path, error) from None
    from minitune.checkpoint.tokenizer_classes import JsonTokenizer

    config = _read_json(folder / "tokenizer_config.json")
    settings = _settings(folder, config, backend.token_to_id, backend.id_to_token)
    added = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, list):
        settings["extra_special_tokens"] = [t for t in map(_content, extra) if t in added]
    tokenizer = JsonTokenizer(backend, **settings)
    tokenizer.name_or_path = str(folder)  # only now: given before, a large vocabulary makes it ask the hub
    return tokenizer


def _from_sentencepiece(folder: Path) -> PreTrainedTokenizerBase:
    from google.protobuf.message import DecodeError
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    path = folder / "tokenizer.model"
    try:
        data = path.read_bytes()
        proto = sentencepiece_model_pb2.ModelProto.FromString(data)  # type: ignore[attr-defined]
        # A file cut between two fields parses, and sentencepiece may take it, with other ids.
        if not (proto.pieces and proto.HasField("trainer_spec") and proto.HasField("normalizer_spec")):
            raise ValueError("the file is cut short")
        model = SentencePieceProcessor(model_proto=data)
    except (DecodeError, RuntimeError, ValueError, OSError) as error:
        raise _unreadable(path, error) from None
    from minitune.checkpoint.tokenizer_classes import SentencePieceTokenizer

    config = _read_json(folder / "tokenizer_config.json")
    added = _added_tokens(folder, config)
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    ids.update({token["content"]: i for i, token in added.items()})
    names = {i: name for name, i in ids.items()}
    settings = _settings(folder, config, ids.get, names.get)
    for name, own in (("bos", model.bos_id()), ("eos", model.eos_id()), ("unk", model.unk_id())):
        if own >= 0 and f"{name}_token" not in config:
            settings.setdefault(f"{name}_token", model.id_to_piece(own))
    for name, default in (("bos", True), ("eos", False)):
        asked = config.get(f"add_{name}_token", default)
        settings[f"add_{name}_token"] = bool(asked) and f"{name}_token" in settings
    tokenizer = SentencePieceTokenizer(path, proto, added, **settings)
    tokenizer.name_or_path = str(folder)
    return tokenizer


def _settings(
    folder: Path,
    config: dict[str, Any],
    id_of: Callable[[str], int | None],
    token_of: Callable[[int], str | None],
) -> dict[str, Any]:
    """The constructor's settings, of tokenizer_config.json, special_tokens_map.json and config.json.

    A special token that the vocabulary lacks is left unset: a new id would lie outside the embedding.
    """
    named = _read_json(folder / "special_tokens_map.json") | config
    model = _read_json(folder / "config.json")
    settings: dict[str, Any] = {}
    for name in SPECIAL_NAMES:
        token = _content(named.get(f"{name}_token"))
        if f"{name}_token" not in named:
            number = model.get(f"{name}_token_id")
            number = number[0] if isinstance(number, list) and number else number
            token = token_of(number) if isinstance(number, int) and number >= 0 else None
        if token is not None and id_of(token) is not None:
            settings[f"{name}_token"] = token
    for key in ("model_max_length", "padding_side", "truncation_side"):
        if config.get(key) is not None:
            settings[key] = config[key]
    template = folder / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = _read_text(template)
    elif config.get("chat_template"):
        settings["chat_template"] = config["chat_template"]
    return settings


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """{id: AddedToken's fields} of tokenizer_config.json, or of the older added_tokens.json."""
    listed = config.get("added_tokens_decoder")
    try:
        if listed is not None:
            return {int(i): {**token, "content": str(token["content"])} for i, token in listed.items()}
        older = _read_json(folder / "added_tokens.json")
        return {int(i): {"content": token, "special": True} for token, i in older.items()}
    except (TypeError, ValueError, KeyError, AttributeError):
        raise UserError(f"{folder}: the added tokens are not written as {{id: token}}; {MEND}") from None


def _content(token: Any) -> str | None:
    """A token written as a string, or as {"content": …}."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read_text(path))
    except ValueError as error:
        raise _unreadable(path, error) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; {MEND}")
    return content


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{path}: cannot be read ({reason}); {MEND}")
