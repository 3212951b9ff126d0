"""Text to token ids and back, from a Hugging Face directory: what to encode, how to chat, where to stop.

The `tokenizers` library does the work; this file reads what lies around it. Left out on purpose: training a tokenizer,
slow (Python) tokenizers, and the clean-up of spaces on decoding, which would make the text that a reward sees differ
from the tokens that were sampled.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from minirl.checkpoint import resolve
from minirl.errors import InputError, NoChatTemplate
from minirl.files import read_json, write_atomic, write_json

NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """`stop_ids` end a completion: a chat model often has several, and `eos_id` is the one that ends a document.

    `special_tokens` holds the texts that the configuration names, {"eos_token": "<|im_end|>", ...}, for templates.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict, stop_ids: Sequence[int] = (), where: str = ""):
        backend.no_truncation()  # a file may carry the limits of the run that saved it, and cut prompts in silence
        backend.no_padding()
        self._backend, self._config = backend, config
        self.special_tokens = {key: _token_text(config[key], key, where) for key in NAMED_TOKENS if config.get(key)}
        self.chat_template = _default_template(config.get("chat_template"), where)
        self._mark_special()
        self.bos_id, self.eos_id, self.pad_id = (self._named_id(key, where) for key in NAMED_TOKENS[:3])
        if self.eos_id is None and stop_ids:
            self.eos_id = stop_ids[0]
        self.stop_ids: tuple[int, ...] = tuple(stop_ids) or (() if self.eos_id is None else (self.eos_id,))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """A model folder, or a hub id where huggingface_hub is installed."""
        path = resolve(path)
        backend = _read_backend(path / "tokenizer.json")
        # The older special_tokens_map.json fills what tokenizer_config.json leaves open; a template's own file wins.
        config = _read_if_there(path / "special_tokens_map.json") | _read_if_there(path / "tokenizer_config.json")
        if (path / "chat_template.jinja").is_file():
            config["chat_template"] = (path / "chat_template.jinja").read_text(encoding="utf-8")
        return cls(backend, config, _read_stop_ids(path), where=f" of {path}")

    @classmethod
    def from_chars(cls, alphabet: str) -> "Tokenizer":
        """One token a character after <pad>, <bos>, <eos>; a character outside the alphabet is an error, no <unk>."""
        if not alphabet:
            raise InputError("the alphabet of a character tokenizer is empty: pass every character that will be used")
        named = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
        vocab = {token: index for index, token in enumerate(dict.fromkeys([*named.values(), *alphabet]))}
        backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))  # not in `vocab`: the library raises
        backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Sequence([])  # without any decoder, tokens are joined with spaces
        backend.add_special_tokens(list(named.values()))
        return cls(backend, {**named, "clean_up_tokenization_spaces": False})

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: there may be holes below it, whose ids have no text."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def stop_id(self) -> int:
        """What stands behind a text that ended by itself."""
        if not self.stop_ids:
            raise InputError("the tokenizer names no stop token: give eos_token_id in generation_config.json")
        return self.stop_ids[0]

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # the library has no narrower class
            raise InputError(self._why_not_encoded(text, error)) from error

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def render(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> str:
        if self.chat_template is None:
            raise NoChatTemplate("this tokenizer has no chat template: pass text, or set tokenizer.chat_template")
        from minirl.chat_template import render_chat  # jinja2 is optional

        variables = {**self.special_tokens, **variables}
        return render_chat(self.chat_template, messages, add_generation_prompt=add_generation_prompt, **variables)

    def chat(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> list[int]:
        """The template has written the special tokens already; adding them on encoding would double the first."""
        return self.encode(self.render(messages, add_generation_prompt, **variables))

    def prompt_ids(self, prompt: str | list[dict]) -> list[int]:
        """Messages through the chat template; text with the bos token in front where the tokenizer itself puts one.

        Text that begins with bos already, as rendered templates do, is not given a second; an eos never goes behind.
        """
        if not isinstance(prompt, str):
            return self.chat(prompt)
        ids = self.encode(prompt)
        starts_with_bos = self.bos_id is not None and self.encode("", add_special_tokens=True)[:1] == [self.bos_id]
        return [self.bos_id, *ids] if starts_with_bos and ids[:1] != [self.bos_id] else ids

    def save_pretrained(self, path: str | Path) -> None:
        """Stop ids that the folder names already are kept: they came with the model that is saved there."""
        path = Path(path)
        write_atomic(path / "tokenizer.json", lambda staging: self._backend.save(str(staging)))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._config, **self.special_tokens}
        if _default_template(config.get("chat_template"), "") != self.chat_template:
            config["chat_template"] = self.chat_template
        write_json(path / "tokenizer_config.json", config)
        (path / "chat_template.jinja").unlink(missing_ok=True)  # it would win over the one just written
        generation = _read_if_there(path / "generation_config.json")
        if self.stop_ids and generation.get("eos_token_id") is None:
            ids = list(self.stop_ids) if len(self.stop_ids) > 1 else self.stop_ids[0]
            write_json(path / "generation_config.json", {**generation, "eos_token_id": ids})

    def _mark_special(self) -> None:
        """A token that the configuration names is matched whole and skipped on decoding, as transformers has it."""
        known = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        in_vocabulary = (text for text in self.special_tokens.values() if self._backend.token_to_id(text) is not None)
        self._backend.add_special_tokens([text for text in in_vocabulary if text not in known])

    def _named_id(self, key: str, where: str) -> int | None:
        text = self.special_tokens.get(key)
        index = None if text is None else self._backend.token_to_id(text)
        if text is not None and index is None:
            raise InputError(f"{key}{where} is {text!r}, which tokenizer.json does not hold: name one of its tokens")
        return index

    def _why_not_encoded(self, text: str, error: Exception) -> str:
        if not isinstance(text, str):
            return f"only text can be encoded, not {text!r:.80}: pass a str"
        for position, character in enumerate(text):
            try:
                self._backend.encode(character, add_special_tokens=False)
            except Exception:
                return f"the tokenizer has no token for {character!r} (at {position} in {text!r:.80}): leave it out"
        return f"the tokenizer cannot encode {text!r:.80} ({error}): check its tokenizer.json"


def is_prompt(value: object) -> bool:
    """What `prompt_ids` takes: a text, or chat messages with a role and a content."""
    if isinstance(value, list):
        texts = [message.get(key) for message in value if isinstance(message, dict) for key in ("role", "content")]
        return 0 < 2 * len(value) == len(texts) and all(isinstance(text, str) for text in texts)
    return isinstance(value, str)


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    if not file.is_file():
        raise InputError(f"{file} does not exist: give a folder with a fast tokenizer's tokenizer.json")
    read_json(file)  # the library's own message for broken JSON does not name the file
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:
        raise InputError(f"{file} cannot be read by the tokenizers library ({error}): save it anew") from error


def _read_if_there(file: Path) -> dict:
    return read_json(file) if file.exists() else {}


def _read_stop_ids(path: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        ids = _read_if_there(path / name).get("eos_token_id")
        if ids is None or ids == []:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise InputError(f"eos_token_id in {path / name} must be one id or a list, not {ids!r:.80}: correct it")
        return list(dict.fromkeys(ids))
    return []


def _token_text(value: str | dict, key: str, where: str) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise InputError(f"{key}{where} must be text or an object with 'content', not {value!r:.80}: correct it")
    return text


def _default_template(value: str | list[dict] | None, where: str) -> str | None:
    """A configuration may hold several named templates (tool use, retrieval); the one called default is for chat."""
    if value is None or isinstance(value, str):
        return value
    try:
        named = {entry["name"]: entry["template"] for entry in value}
    except (TypeError, KeyError):
        raise InputError(f"chat_template{where} must be text or a list of name and template: correct it") from None
    if "default" not in named and len(named) != 1:
        raise InputError(f"chat_template{where} has no 'default' among {sorted(named)}: name one so")
    return named["default"] if "default" in named else next(iter(named.values()))
