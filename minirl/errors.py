"""What a user can get wrong, said in one sentence."""


class InputError(ValueError):
    """Input from outside that cannot be used: a file, a key, a value, a reward function's result.

    The message is one sentence that says what is wrong, where, and what to do. The command line prints it alone and
    exits with code 2; in Python it is an ordinary ValueError.
    """


class NoChatTemplate(InputError):
    """Chat messages, for a tokenizer that has no template for them."""
