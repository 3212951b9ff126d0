"""Turn text into token ids and back: special tokens, chat templates and stop tokens of a Hugging Face directory.

The `tokenizers` library splits the text; this file reads the configuration files around it. Left out on purpose:
training a tokenizer, slow (Python) tokenizers, and the clean-up of spaces on decoding, which would make the text that a
reward sees differ from the tokens that were sampled.
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
from minirl.files import read_bounded, read_json, write_atomic, write_json

NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")  # of an added token
PLACEHOLDER = "minirl puts the text here"  # ordinary words, which no template changes
NO_THOUGHTS = re.compile(r"<think>\s*</think>\s*$")
CONTEXT = 200  # characters before a text that are encoded with it: the whole prompt would take much longer


class Tokenizer:
    """A tokenizer and its chat template.

    `stop_ids` end a completion: a chat model often has several. `eos_id` is the one that ends a document, and `stop_id`
    the one that training puts at the end of the model's turn.

    `special_tokens` holds the texts that the configuration names, {"eos_token": "<|im_end|>", ...}, for templates.
    `template_variables` and `system` go into every prompt: further variables of the template, and the system message
    of conversations without one of their own. `now` is the date that a template reads.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict, stop_ids: Sequence[int] = (), where: str = ""):
        backend.no_truncation()  # a saved file may hold the limits of another program, which would silently cut prompts
        backend.no_padding()
        self._backend, self._config = backend, config  # the config is written back as it was read
        self.special_tokens = {key: _token_text(config[key], key, where) for key in NAMED_TOKENS if config.get(key)}
        self.chat_template = _default_template(config.get("chat_template"), where)
        self._mark_special(where)
        self.bos_id, self.eos_id, self.pad_id = (self._named_id(key, where) for key in NAMED_TOKENS[:3])
        if self.eos_id is None and stop_ids:  # a folder without tokenizer_config.json names its stop ids all the same
            self.eos_id = stop_ids[0]
        self._ends = tuple(dict.fromkeys([*stop_ids, *([] if self.eos_id is None else [self.eos_id])]))
        self._turn_ends: dict[str | None, int | None] = {None: None}  # by template, which may be set by hand
        self.generation: dict = {}  # generation_config.json: how other engines sample by default
        self.template_variables: dict[str, object] = {}
        self.system: str | None = None
        self.now = datetime.now()

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """Read the tokenizer of a model folder, or of a hub id where huggingface_hub is installed."""
        path = resolve(path)
        backend = _read_backend(path / "tokenizer.json")
        # tokenizer_config.json wins over the older special_tokens_map.json, and a template's own file over both.
        config = _read_if_there(path / "special_tokens_map.json") | _read_if_there(path / "tokenizer_config.json")
        if (path / "chat_template.jinja").is_file():
            config["chat_template"] = _read_text(path / "chat_template.jinja")
        tokenizer = cls(backend, config, _read_stop_ids(path), where=f" of {path}")
        tokenizer.generation = _read_if_there(path / "generation_config.json")
        return tokenizer

    @classmethod
    def from_chars(cls, alphabet: str) -> "Tokenizer":
        """Make a tokenizer with one token a character, after <pad>, <bos> and <eos>. Encoding a character outside the
        alphabet is an InputError: there is no <unk>."""
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
        """Return the largest id plus one. Ids below it may be unused, and have no text."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Return the stop tokens that the model's files name, the tokenizer's eos, and the template's end of a turn."""
        turn_end = self._turn_end()
        return self._ends if turn_end is None or turn_end in self._ends else (*self._ends, turn_end)

    @property
    def stop_id(self) -> int:
        """Return the token that ends a complete text: the chat template's end of an assistant turn, else the eos."""
        if not self.stop_ids:
            raise InputError("the tokenizer names no stop token: give eos_token_id in generation_config.json")
        turn_end = self._turn_end()
        return self.eos_id if turn_end is None else turn_end

    def _turn_end(self) -> int | None:
        """Return the token with which the chat template ends an assistant turn; None without a template or jinja2, or
        where the template marks no end or cannot render a small conversation."""
        if self.chat_template not in self._turn_ends:
            self._turn_ends[self.chat_template] = self._find_turn_end() if importlib.util.find_spec("jinja2") else None
        return self._turn_ends[self.chat_template]

    def _find_turn_end(self) -> int | None:
        """Render a small conversation and return the first stop token, or other special token, after the assistant's
        text. Where there is none, the end may be the token that begins the next turn, if the model's files call it a
        stop token."""
        talk = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": PLACEHOLDER}]
        added = self._backend.get_added_tokens_decoder()
        special = {index for index, token in added.items() if token.special} - {self.bos_id}
        for messages, ends in ((talk, special.union(self._ends)), ([*talk, talk[0]], self._ends)):
            try:
                tail = self._rendered(messages, False, {}).rpartition(PLACEHOLDER)[2]
            except InputError:
                continue
            texts = {self.decode([index], skip_special_tokens=False): index for index in ends}
            # The first in the text, and of several that start there the longest.
            found = [(tail.find(text), -len(text), index) for text, index in texts.items() if text and text in tail]
            if found:
                return min(found)[2]
        return None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of a text; InputError for one that the tokenizer cannot encode."""
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # the library has no narrower class
            raise InputError(self._why_not_encoded(text, error)) from error

    def encode_behind(self, before: str, text: str) -> list[int]:
        """Return the tokens that a text has after another one. Some tokenizers (Llama 2, byte level with a prefix
        space) put a space before everything that they encode, so a completion encoded alone would begin with a space
        too many.

        Where a token would span both texts, the tokens are those that the text has after a line end.
        """
        for context in (before[-CONTEXT:], "\n"):
            known, joined = self.encode(context), self.encode(context + text)
            if joined[: len(known)] == known:
                return joined[len(known) :]
        return self.encode(text)

    def without_end(self, text: str) -> tuple[str, int | None]:
        """Split a text into what comes before the stop token at its end, and this token (None where there is none).
        White space after the token is dropped too, because chat templates write a line end there."""
        body = text.rstrip()
        for index in self.stop_ids:
            end = self.decode([index], skip_special_tokens=False)
            if end and body.endswith(end) and self.encode(end) == [index]:
                return body.removesuffix(end), index
        return text, None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    @property
    def hidden(self) -> set[int]:
        """Return the tokens that no reward sees: those that the configuration names (bos, pad, ...), stop tokens."""
        return {self._backend.token_to_id(text) for text in self.special_tokens.values()}.union(self.stop_ids)

    def shown(self, ids: Iterable[int]) -> str:
        """Return the text that a reward sees: all tokens except `hidden`. Special tokens with a meaning (<think>,
        <answer>) stay in it."""
        hidden = self.hidden
        return self.decode([i for i in ids if int(i) not in hidden], skip_special_tokens=False)

    def render(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> str:
        """Return the text of a conversation. With `add_generation_prompt` it ends where the model continues: after the
        opening of its turn, or where the last message is the assistant's, after the words of that message."""
        if self.chat_template is None:
            raise NoChatTemplate("this tokenizer has no chat template: pass text, or set tokenizer.chat_template")
        check_messages(messages)
        if self.system is not None and all(message["role"] != "system" for message in messages):
            messages = [{"role": "system", "content": self.system}, *messages]
        if add_generation_prompt and messages[-1]["role"] == "assistant":
            return self._continued(messages, variables)
        return self._rendered(messages, add_generation_prompt, variables)

    def prompt_with(self, variables: Mapping[str, object], system: str | None = None) -> None:
        """Set the template's variables and the system message of every prompt. InputError for a variable that the chat
        template does not read, which would have no effect."""
        if self.chat_template is None and (variables or system is not None):
            raise InputError("the model has no chat template, which --template and --system are for: leave them away")
        if variables:
            from minirl.chat import refuse_unread

            refuse_unread(self.chat_template, variables)
        self.template_variables, self.system = dict(variables), system

    def _rendered(self, messages: list[dict], add_generation_prompt: bool, variables: dict) -> str:
        from minirl.chat import render_chat  # jinja2 is optional

        variables = {**self.special_tokens, **self.template_variables, **variables}
        variables["add_generation_prompt"] = add_generation_prompt
        return render_chat(self.chat_template, messages, self.now, **variables)

    def _continued(self, messages: list[dict], variables: dict) -> str:
        """Return a conversation up to the end of its last, unfinished message.

        A template may trim a text or drop thoughts from it, so it renders a placeholder, which is then replaced by the
        text. Some templates put an empty <think></think> before an answer. It is removed, unless the generation prompt
        has it too and the message has no thoughts of its own.
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
        """Return the tokens of a conversation. The template has written the special tokens already, so encoding adds
        none: a second bos would change what the model reads."""
        return self.encode(self.render(messages, add_generation_prompt, **variables))

    def prompt_ids(self, prompt: str | list[dict], tools: list[dict] | None = None) -> list[int]:
        """Return the tokens of a prompt: messages, and the tools that the model may call, through the chat template;
        text with a bos where the tokenizer itself puts one.

        Text that begins with bos already, as rendered templates do, gets no second one; no eos is added.
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
        """Raise an InputError where the tools that come with a prompt would be silently ignored."""
        if isinstance(prompt, str):
            raise InputError("tools are written by a chat template, and this prompt is a text: give messages")
        if self.chat_template is not None and "tools" not in self.chat_template:
            raise InputError("the chat template does not write tools: take them out, or use a model that was given any")

    def save_pretrained(self, path: str | Path) -> None:
        """Write the tokenizer, and the generation_config.json that it was read with. Stop ids that are in the folder's
        file already are kept: they came with the model that is saved there."""
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
        """Add the tokens that the configuration names or lists, as transformers does: they are never split, and special
        ones are skipped on decoding."""
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
        """Return the id of a token that the configuration names by key, such as eos_token; None where it names none."""
        text = self.special_tokens.get(key)
        index = None if text is None else self._backend.token_to_id(text)
        if text is not None and index is None:
            raise InputError(f"{key}{where} is {text!r}, which tokenizer.json does not hold: name one of its tokens")
        return index

    def _why_not_encoded(self, text: str, error: Exception) -> str:
        """Return the sentence for a text that cannot be encoded: it names the first character without a token."""
        if not isinstance(text, str):
            return f"only text can be encoded, not {text!r:.80}: pass a str"
        for position, character in enumerate(text):
            try:
                self._backend.encode(character, add_special_tokens=False)
            except Exception:
                return f"the tokenizer has no token for {character!r} (at {position} in {text!r:.80}): leave it out"
        return f"the tokenizer cannot encode {text!r:.80} ({error}): check its tokenizer.json"


def check_messages(messages: list[dict]) -> None:
    """Refuse messages without a role and content: templates read a missing key as empty text, so a misspelt one would
    silently drop the message."""
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f"a chat prompt must be a list of messages with 'role' and 'content', not {messages!r:.80}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"message {index} must be a mapping with a text 'role', not {message!r:.80}")
        content = message.get("content")
        only_calls = content is None and message.get("tool_calls")
        if not isinstance(content, str | list) and not only_calls:
            raise InputError(f"message {index} must have a text 'content', not {message!r:.80}")


def _text_of(message: Mapping) -> str:
    """Return the text of a message that is to be continued; InputError where it has none, or calls tools."""
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
    return read_json(file) if file.exists() or file.is_symlink() else {}  # a link to nowhere is a fault of the folder


def _read_text(file: Path) -> str:
    try:
        return read_bounded(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no text in UTF-8 ({error}): restore the file or download it again") from None


def _read_stop_ids(path: Path) -> list[int]:
    """Return the stop ids of generation_config.json, which wins as in transformers, or else of config.json."""
    for name in ("generation_config.json", "config.json"):
        ids = _read_if_there(path / name).get("eos_token_id")
        if ids is None or ids == []:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise InputError(f"eos_token_id in {path / name} must be one id or a list, not {ids!r:.80}: correct it")
        return list(dict.fromkeys(ids))
    return []


def _listed_tokens(config: dict, where: str) -> list[tuple[int | None, AddedToken]]:
    """Return (id, token) of the added tokens that tokenizer_config.json lists; the id is None where it gives none."""
    by_id = config.get("added_tokens_decoder") or {}
    if not isinstance(by_id, dict) or not all(re.fullmatch("[0-9]{1,9}", i) for i in by_id):
        raise InputError(f"added_tokens_decoder{where} must map ids to tokens, not be {by_id!r:.80}: correct it")
    found = [(int(i), _added_token(by_id[i], "added_tokens_decoder", where, False)) for i in sorted(by_id, key=int)]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(key) or []
        listed = list(listed.values()) if isinstance(listed, dict) else listed
        if not isinstance(listed, list):
            raise InputError(f"{key}{where} must be a list or an object of tokens, not {listed!r:.80}: correct it")
        found += [(None, _added_token(value, key, where, True)) for value in listed]
    return found


def _added_token(value: str | dict, key: str, where: str, special: bool) -> AddedToken:
    """Make the library's token of an entry; `special` holds where the entry itself says nothing."""
    flags = {name: bool(value[name]) for name in FLAGS if name in value} if isinstance(value, dict) else {}
    return AddedToken(_token_text(value, key, where), **{"special": special, "normalized": False} | flags)


def _token_text(value: str | dict, key: str, where: str) -> str:
    """Return the text of a token, which configurations write as a string or as an object with `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):  # half of a surrogate pair has no UTF-8
        raise InputError(f"{key}{where} must be text or an object with 'content', not {value!r:.80}: correct it")
    return text


def _default_template(value: str | list[dict] | None, where: str) -> str | None:
    """Return the template for chat. A configuration may hold several by name (tool use, retrieval): then it is the one
    called default, or the only one."""
    if value is None or isinstance(value, str):
        return value
    try:
        named = {str(entry["name"]): entry["template"] for entry in value}
        if not all(isinstance(template, str) for template in named.values()):
            raise TypeError
    except (TypeError, KeyError):
        raise InputError(f"chat_template{where} must be text or a list of name and template: correct it") from None
    if "default" not in named and len(named) != 1:
        raise InputError(f"chat_template{where} has no 'default' among {sorted(named)}: name one so")
    return named["default"] if "default" in named else next(iter(named.values()))
