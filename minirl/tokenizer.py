"""Text to token ids and back, from a Hugging Face directory: what to encode, how to chat, where to stop.

The `tokenizers` library does the work; this file reads what lies around it. Left out on purpose: training a tokenizer,
slow (Python) tokenizers, and the clean-up of spaces on decoding, which would make the text that a reward sees differ
from the tokens that were sampled.
"""

import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from minirl.checkpoint import resolve
from minirl.errors import InputError, NoChatTemplate
from minirl.files import read_json, write_atomic, write_json

NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")  # of an added token
PLACEHOLDER = "minirl puts the text here"  # plain words, which no template takes apart
NO_THOUGHTS = re.compile(r"<think>\s*</think>\s*$")
CONTEXT = 200  # characters before a text that can change its tokens: the whole prompt would cost as much again


class Tokenizer:
    """`stop_ids` end a completion: a chat model often has several. `eos_id` is the one that ends a document, and
    `stop_id` the one that a model is taught to end its turn with.

    `special_tokens` holds the texts that the configuration names, {"eos_token": "<|im_end|>", ...}, for templates.
    `template_variables` and `system` go into every prompt: further variables of the template, and the system message
    of conversations without one of their own. `now` is the date that a template reads.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict, stop_ids: Sequence[int] = (), where: str = ""):
        backend.no_truncation()  # a file may carry the limits of the run that saved it, and cut prompts in silence
        backend.no_padding()
        self._backend, self._config = backend, config
        self.special_tokens = {key: _token_text(config[key], key, where) for key in NAMED_TOKENS if config.get(key)}
        self.chat_template = _default_template(config.get("chat_template"), where)
        self._mark_special(where)
        self.bos_id, self.eos_id, self.pad_id = (self._named_id(key, where) for key in NAMED_TOKENS[:3])
        if self.eos_id is None and stop_ids:
            self.eos_id = stop_ids[0]
        self._ends = tuple(dict.fromkeys([*stop_ids, *([] if self.eos_id is None else [self.eos_id])]))
        self._turn_ends: dict[str | None, int | None] = {None: None}  # by template, which may be set by hand
        self.generation: dict = {}  # generation_config.json: how other engines sample by default
        self.template_variables: dict[str, object] = {}
        self.system: str | None = None
        self.now = datetime.now()

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """A model folder, or a hub id where huggingface_hub is installed."""
        path = resolve(path)
        backend = _read_backend(path / "tokenizer.json")
        # The older special_tokens_map.json fills what tokenizer_config.json leaves open; a template's own file wins.
        config = _read_if_there(path / "special_tokens_map.json") | _read_if_there(path / "tokenizer_config.json")
        if (path / "chat_template.jinja").is_file():
            config["chat_template"] = (path / "chat_template.jinja").read_text(encoding="utf-8")
        tokenizer = cls(backend, config, _read_stop_ids(path), where=f" of {path}")
        tokenizer.generation = _read_if_there(path / "generation_config.json")
        return tokenizer

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
    def stop_ids(self) -> tuple[int, ...]:
        """The stop tokens that the model's files name, the tokenizer's eos and the end of a turn in the template."""
        turn_end = self._turn_end()
        return self._ends if turn_end is None or turn_end in self._ends else (*self._ends, turn_end)

    @property
    def stop_id(self) -> int:
        """The token behind a text that ended by itself: the chat template's end of an assistant turn, else the eos."""
        if not self.stop_ids:
            raise InputError("the tokenizer names no stop token: give eos_token_id in generation_config.json")
        turn_end = self._turn_end()
        return self.eos_id if turn_end is None else turn_end

    def _turn_end(self) -> int | None:
        """The token with which the chat template ends an assistant turn; None without a template, or where it cannot
        render a small conversation or marks no end."""
        if self.chat_template not in self._turn_ends:
            self._turn_ends[self.chat_template] = self._find_turn_end() if importlib.util.find_spec("jinja2") else None
        return self._turn_ends[self.chat_template]

    def _find_turn_end(self) -> int | None:
        """The first stop token, or other special token, behind the assistant's text. Where a template writes none,
        the end may be what begins the next turn, if the model's files say so."""
        talk = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": PLACEHOLDER}]
        added = self._backend.get_added_tokens_decoder()
        special = {index for index, token in added.items() if token.special} - {self.bos_id}
        for messages, ends in ((talk, special.union(self._ends)), ([*talk, talk[0]], self._ends)):
            try:
                tail = self._rendered(messages, False, {}).rpartition(PLACEHOLDER)[2]
            except InputError:
                continue
            texts = {self.decode([index], skip_special_tokens=False): index for index in ends}
            found = [(tail.find(text), -len(text), index) for text, index in texts.items() if text and text in tail]
            if found:
                return min(found)[2]
        return None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # the library has no narrower class
            raise InputError(self._why_not_encoded(text, error)) from error

    def encode_behind(self, before: str, text: str) -> list[int]:
        """Tokens of a text as they follow another. Some tokenizers (Llama 2, byte levels with a prefix space) put a
        space before all that they encode, and a completion that is encoded alone has a space that nobody wrote.

        Where the two texts would share a token, the tokens are those behind a line end.
        """
        for context in (before[-CONTEXT:], "\n"):
            known, joined = self.encode(context), self.encode(context + text)
            if joined[: len(known)] == known:
                return joined[len(known) :]
        return self.encode(text)

    def without_end(self, text: str) -> tuple[str, int | None]:
        """A text without the stop token that it ends with, and this token; None where there is none. White space behind
        the token is left out with it, as chat templates write a line end there."""
        body = text.rstrip()
        for index in self.stop_ids:
            end = self.decode([index], skip_special_tokens=False)
            if end and body.endswith(end) and self.encode(end) == [index]:
                return body.removesuffix(end), index
        return text, None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    @property
    def hidden(self) -> set[int]:
        """The tokens that no reward sees: those that the configuration names (bos, pad, ...) and the stop tokens."""
        return {self._backend.token_to_id(text) for text in self.special_tokens.values()}.union(self.stop_ids)

    def shown(self, ids: Iterable[int]) -> str:
        """The text that a reward sees: all but `hidden`. Special tokens that say something (<think>, <answer>) are in
        it."""
        hidden = self.hidden
        return self.decode([i for i in ids if int(i) not in hidden], skip_special_tokens=False)

    def render(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> str:
        """The text of a conversation. With `add_generation_prompt` it ends where the model is to go on: behind the
        opening of its turn, or behind its own words where the last message is the assistant's."""
        if self.chat_template is None:
            raise NoChatTemplate("this tokenizer has no chat template: pass text, or set tokenizer.chat_template")
        check_messages(messages)
        if self.system is not None and all(message["role"] != "system" for message in messages):
            messages = [{"role": "system", "content": self.system}, *messages]
        if add_generation_prompt and messages[-1]["role"] == "assistant":
            return self._continued(messages, variables)
        return self._rendered(messages, add_generation_prompt, variables)

    def prompt_with(self, variables: Mapping[str, object], system: str | None = None) -> None:
        """Set what goes into every prompt. InputError for a variable that the chat template does not read, which would
        have no effect."""
        if self.chat_template is None and (variables or system is not None):
            raise InputError("the model has no chat template, which --template and --system are for: leave them away")
        if variables:
            from minirl.chat_template import refuse_unread

            refuse_unread(self.chat_template, variables)
        self.template_variables, self.system = dict(variables), system

    def _rendered(self, messages: list[dict], add_generation_prompt: bool, variables: dict) -> str:
        from minirl.chat_template import render_chat  # jinja2 is optional

        variables = {**self.special_tokens, **self.template_variables, **variables}
        variables["add_generation_prompt"] = add_generation_prompt
        return render_chat(self.chat_template, messages, self.now, **variables)

    def _continued(self, messages: list[dict], variables: dict) -> str:
        """A conversation up to the end of its last, unfinished message.

        The template gets other words in its place, as it may trim a text or drop thoughts from it. Some templates put
        empty thoughts before an answer; unless the generation prompt has them too, and the message none of its own, it
        begins without them.
        """
        *before, last = messages
        text = _text_of(last)
        whole = self._rendered([*before, {**last, "content": PLACEHOLDER}], False, variables)
        head, found, _ = whole.rpartition(PLACEHOLDER)
        if not found:
            raise InputError(
                "the chat template does not show the assistant's last message, so it cannot be continued: leave it out"
            )
        own = text.lstrip().startswith("<think>")
        if NO_THOUGHTS.search(head) and (own or (before and self._rendered(before, True, variables) != head)):
            head = NO_THOUGHTS.sub("", head)
        return head + text

    def chat(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> list[int]:
        """The template has written the special tokens already; adding them on encoding would double the first."""
        return self.encode(self.render(messages, add_generation_prompt, **variables))

    def prompt_ids(self, prompt: str | list[dict], tools: list[dict] | None = None) -> list[int]:
        """Messages, and the tools that the model may call, through the chat template; text with the bos token in front
        where the tokenizer itself puts one.

        Text that begins with bos already, as rendered templates do, is not given a second; an eos never goes behind.
        """
        if tools:
            self.refuse_unread_tools(prompt)
        if not isinstance(prompt, str):
            return self.chat(prompt, tools=tools) if tools else self.chat(prompt)
        if self.system is not None:
            raise InputError(
                f"a text cannot be given a system message ({prompt!r:.60}): leave --system away, or write the prompts "
                "as chat messages (style=chat makes messages of a task's texts)"
            )
        ids = self.encode(prompt)
        starts_with_bos = self.bos_id is not None and self.encode("", add_special_tokens=True)[:1] == [self.bos_id]
        return [self.bos_id, *ids] if starts_with_bos and ids[:1] != [self.bos_id] else ids

    def refuse_unread_tools(self, prompt: str | list[dict]) -> None:
        """InputError where tools beside a prompt would be dropped in silence."""
        if isinstance(prompt, str):
            raise InputError("tools are written by a chat template, and this prompt is a text: give messages")
        if self.chat_template is not None and "tools" not in self.chat_template:
            raise InputError("the chat template does not write tools: take them out, or use a model that was given any")

    def save_pretrained(self, path: str | Path) -> None:
        """The tokenizer, and the generation_config.json that it was read with. Stop ids that the folder names already
        are kept: they came with the model that is saved there."""
        path = Path(path)
        write_atomic(path / "tokenizer.json", lambda staging: self._backend.save(str(staging)))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._config, **self.special_tokens}
        if _default_template(config.get("chat_template"), "") != self.chat_template:
            config["chat_template"] = self.chat_template
        write_json(path / "tokenizer_config.json", config)
        (path / "chat_template.jinja").unlink(missing_ok=True)  # it would win over the one just written
        there = _read_if_there(path / "generation_config.json")
        generation = {**self.generation, "eos_token_id": None, **there}
        if self.stop_ids and generation["eos_token_id"] is None:
            generation["eos_token_id"] = list(self.stop_ids) if len(self.stop_ids) > 1 else self.stop_ids[0]
            write_json(path / "generation_config.json", generation)

    def _mark_special(self, where: str) -> None:
        """A token that the configuration names, or lists as added, is matched whole; a special one is skipped on
        decoding. So has transformers it."""
        for index, token in _listed_tokens(self._config, where):
            known = self._backend.get_added_tokens_decoder().get(self._backend.token_to_id(token.content))
            if known is None or (token.special and not known.special):
                (self._backend.add_special_tokens if token.special else self._backend.add_tokens)([token])
            if index not in (None, found := self._backend.token_to_id(token.content)):
                raise InputError(
                    f"added_tokens_decoder{where} gives {token.content!r} the id {index}, and tokenizer.json {found}: "
                    "correct one of the two"
                )
        in_vocabulary = (text for text in self.special_tokens.values() if self._backend.token_to_id(text) is not None)
        known = {token.content for token in self._backend.get_added_tokens_decoder().values() if token.special}
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


def check_messages(messages: list[dict]) -> None:
    """Templates read missing keys as empty text, so a misspelt one would vanish without a word."""
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f"a chat prompt must be a list of messages with 'role' and 'content', not {messages!r:.80}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"message {index} must be a mapping with a text 'role', not {message!r:.80}")
        content = message.get("content")
        said_otherwise = content is None and message.get("tool_calls")
        if not isinstance(content, str | list) and not said_otherwise:
            raise InputError(f"message {index} must have a text 'content', not {message!r:.80}")


def _text_of(message: Mapping) -> str:
    """The words of a message that is to be continued."""
    content = message.get("content")
    parts = content if isinstance(content, list) and not message.get("tool_calls") else [{"text": content}]
    if message.get("tool_calls") or not all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in parts):
        raise InputError(
            f"the last message of the prompt is the assistant's, and has no text to go on from ({message!r:.80}): end "
            "the prompt with another message"
        )
    return "".join(part["text"] for part in parts)


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


def _listed_tokens(config: dict, where: str) -> list[tuple[int | None, AddedToken]]:
    """(id, token) of the added tokens that tokenizer_config.json lists; id None where it gives none."""
    found = []
    by_id = config.get("added_tokens_decoder") or {}
    for index in sorted(by_id, key=int):
        found.append((int(index), _added_token(by_id[index], "added_tokens_decoder", where, False)))
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(key) or []
        for value in listed.values() if isinstance(listed, dict) else listed:
            found.append((None, _added_token(value, key, where, True)))
    return found


def _added_token(value: str | dict, key: str, where: str, special: bool) -> AddedToken:
    flags = {name: bool(value[name]) for name in FLAGS if name in value} if isinstance(value, dict) else {}
    return AddedToken(_token_text(value, key, where), **{"special": special, "normalized": False} | flags)


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
