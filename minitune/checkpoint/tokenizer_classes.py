"""The tokenizers that `load_tokenizer` makes; apart, since `transformers` is slow to import."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

from transformers import AddedToken, TokenizersBackend
from transformers.tokenization_python import Trie
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from minitune.checkpoint.stream import TextStream

INPUT_NAMES = ["input_ids", "attention_mask"]
USER_DEFINED = 4  # sentencepiece's ModelProto.SentencePiece.Type


class JsonTokenizer(TokenizersBackend):
    """A tokenizer.json as it is: no part of it is rebuilt, its own post-processor adds BOS or does not."""

    def __init__(self, backend: Any, **settings: Any) -> None:
        self.__dict__["_tokenizer"] = backend  # given as an argument, 122,753 pieces would be copied (1 s)
        super().__init__(clean_up_tokenization_spaces=False, model_input_names=INPUT_NAMES, **settings)
        # What the file does, for those who ask; set below the property, which would rebuild the processor.
        ids = backend.encode("").ids
        self.__dict__["_add_bos_token"] = bool(ids) and ids[0] == self.bos_token_id
        self.__dict__["_add_eos_token"] = bool(ids) and ids[-1] == self.eos_token_id

    def plain_decode(self, ids: list[int]) -> str:
        return super()._decode(ids, skip_special_tokens=True)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **settings: Any,
    ) -> str:
        """As the library, but a bad byte costs only itself, not the good bytes beside it too."""
        text = super()._decode(token_ids, skip_special_tokens=skip_special_tokens)
        if not skip_special_tokens or "\ufffd" not in text:
            return text
        stream = TextStream(self)
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return "".join([*map(stream.push, ids), stream.flush()])

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **settings: Any) -> tuple[str, ...]:
        files = super().save_pretrained(save_directory, *args, **settings)
        # The name that transformers 4 and 5 both know for "the file as it is".
        _patch_config(save_directory, tokenizer_class="PreTrainedTokenizerFast")
        return files


class SentencePieceTokenizer(SentencePieceBackend):
    """A tokenizer.model, with sentencepiece's own ids: `split_special_tokens` is True by default."""

    def __init__(self, path: Path, proto: Any, added: dict[int, dict[str, Any]], **settings: Any) -> None:
        # sentencepiece itself keeps a user-defined piece whole; a cut there would add a ▁ behind it.
        self._whole = {piece.piece for piece in proto.pieces if piece.type == USER_DEFINED}
        self.add_bos_token = settings.pop("add_bos_token")
        self.add_eos_token = settings.pop("add_eos_token")
        added_tokens = {
            i: AddedToken(**token)
            for i, token in added.items()
            if token.get("special") or i >= len(proto.pieces) or proto.pieces[i].piece != token["content"]
        }
        super().__init__(
            vocab_file=str(path),
            legacy=True,  # False takes add_dummy_prefix out of the model
            split_special_tokens=True,
            added_tokens_decoder=added_tokens,
            model_input_names=INPUT_NAMES,
            **settings,
        )
        self._update_total_vocab_size()

    def _update_trie(self, unique_no_split_tokens: list[str] | None = None) -> None:
        tokens = self._added_tokens_decoder.values()
        self.tokens_trie = Trie([token.content for token in tokens if token.content not in self._whole])

    def tokenize(self, text: str, **settings: Any) -> list[str]:  # type: ignore[override]  # as its own base
        if not settings.pop("split_special_tokens", self.split_special_tokens):
            return super().tokenize(text, split_special_tokens=False)
        plain = {t.content for t in self._added_tokens_decoder.values() if not t.special} - self._whole
        if not plain:
            return self._tokenize(text)
        parts = Trie(plain).split(text)
        return [token for part in parts for token in ([part] if part in plain else self._tokenize(part))]

    def _tokenize(self, text: str, **settings: Any) -> list[str]:
        # By way of the ids: as strings, characters that the model lacks come as they are written, and so
        # could spell a control symbol.
        return [self.sp_model.id_to_piece(i) for i in self.sp_model.encode(text)]

    def _convert_id_to_token(self, index: int) -> str | None:  # type: ignore[override]
        return self.sp_model.id_to_piece(index) if 0 <= index < self.vocab_size else None

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        bos = [self.bos_token_id] if self.add_bos_token else []
        eos = [self.eos_token_id] if self.add_eos_token else []
        first = bos + token_ids_0 + eos
        return first if token_ids_1 is None else first + bos + token_ids_1 + eos

    def get_special_tokens_mask(
        self, token_ids_0: list, token_ids_1: list | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        if already_has_special_tokens:
            special = set(self.all_special_ids)
            return [int(i in special) for i in token_ids_0]
        bos, eos = [1] * self.add_bos_token, [1] * self.add_eos_token
        rows = [token_ids_0] if token_ids_1 is None else [token_ids_0, token_ids_1]
        return [bit for row in rows for bit in (*bos, *([0] * len(row)), *eos)]

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = False,
        **settings: Any,
    ) -> str:
        """sentencepiece's text; a special token is its name or skipped, an unknown id is nothing."""
        out: list[str] = []
        run: list[int] = []
        for i in [token_ids] if isinstance(token_ids, int) else token_ids:
            token = self._added_tokens_decoder.get(i)
            if token is None:
                if 0 <= i < self.vocab_size:
                    run.append(i)
            elif not (skip_special_tokens and token.special):
                out += [self.sp_model.decode(run), token.content]
                run = []
        return "".join([*out, self.sp_model.decode(run)])

    def apply_chat_template(self, *args: Any, **settings: Any) -> Any:
        """As the base; special tokens in the rendered text are parsed, since the template wrote them.

        Those in a message are too, as with any tokenizer.json, unless `sanitize_control_tokens=True`.
        """
        parsing = copy.copy(self)
        parsing.split_special_tokens = False
        return super(SentencePieceTokenizer, parsing).apply_chat_template(*args, **settings)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **settings: Any) -> tuple[str, ...]:
        files = super().save_pretrained(save_directory, *args, **settings)
        _patch_config(
            save_directory,
            tokenizer_class="LlamaTokenizer",
            add_bos_token=self.add_bos_token,
            add_eos_token=self.add_eos_token,
            split_special_tokens=False,  # what another program takes for granted; load_tokenizer sets its own
        )
        return files


def _patch_config(folder: str | os.PathLike, **values: Any) -> None:
    """Sets keys of the tokenizer_config.json that was just written."""
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | values
    config.pop("backend", None)
    temp = path.with_suffix(".json.tmp")
    temp.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temp, path)
