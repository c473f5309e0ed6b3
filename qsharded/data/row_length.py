"""How long a text may be that could still fit: of longer ones no tokens are made, which take many times its memory."""

from qsharded.data.tokenizer import Tokenizer

_MARGIN = 2  # normalizers shorten some texts before they are cut into tokens


def most_characters(tokenizer: Tokenizer, max_length: int) -> int:
    """A text of more characters is certainly of more than ``max_length`` tokens."""
    return max_length * tokenizer.longest_token * _MARGIN
