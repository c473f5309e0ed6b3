"""What a run, or a preview, tells of its rows beside their number: a line for each kind, with one example."""

from qsharded.data.bad_rows import bad_rows_note
from qsharded.data.examples import Dataset
from qsharded.data.omissions import (
    ARGUMENTS,
    CALL,
    EMPTY_ANSWER,
    PLAIN_END,
    REASONING,
    TOOL_ANSWER,
    TOOLS,
    UNHEEDED,
    UNMARKED_END,
    UNTRAINED_END,
)

TRUNCATED, PROMPT_TOO_LONG = "truncated", "prompt too long"

_ANOTHER = "; take a model whose chat template has tools, or another template by --chat-template"
_ADVICE = {
    CALL: "; answers of nothing else are not trained on" + _ANOTHER + ", or write the calls into the content",
    ARGUMENTS: _ANOTHER,
    TOOLS: _ANOTHER,
    TOOL_ANSWER: ", which answers are trained on without" + _ANOTHER,
}
_KEPT_AT_GENERATION = {REASONING: "it", "system messages": "them where generation would"}
_SENTENCES = {
    EMPTY_ANSWER: "{rows} with empty answers, no content and no tool calls, which are not trained on, as at {example}; "
    "--train-on-empty-answers teaches to end the turn at once there",
    UNMARKED_END: "the chat template's {{% generation %}} leaves out the end of the turn in {rows}, as at {example}; "
    "it is trained on all the same",
    UNTRAINED_END: "the end of a turn is not trained on in {rows}, as at {example}, which stands behind what the chat "
    "template marks: the model may not stop there; move {{% endgeneration %}} behind the end of the turn",
    PLAIN_END: "the chat template ends turns by plain text in {rows}, as at {example}: EOS is trained on behind the "
    "last turn alone; --one-example-per-answer does so behind each",
    UNHEEDED: "training on a message that is not the assistant's, or is in a prompt, is asked for in {rows}, as at "
    "{example}: it is not done; --train-on all trains on every token",
    TRUNCATED: "the end of {rows} is cut off, and not trained on, as at {example}; --max-length sets where",
    PROMPT_TOO_LONG: "{rows} dropped, since the prompt alone fills --max-length, as at {example}",
}


def data_notes(data: Dataset, one_example_per_answer: bool) -> list[str]:
    """A line for each kind of what ``data``'s rows have and its examples lack, with what can be done about it, and
    for the bad rows that were skipped."""
    notes = []
    for kind, counted in data.omitted.items():
        rows = f"{counted.rows:,} row{'s' if counted.rows > 1 else ''}"
        said = _sentence(kind, one_example_per_answer).format(rows=rows, example=counted.example)
        notes.append(f"{'note' if kind == EMPTY_ANSWER else 'warning'}: {said}")
    return notes + bad_rows_note(data.bad, data.bad_reasons)


def _sentence(kind: str, one_example_per_answer: bool) -> str:
    if kind in _SENTENCES:
        return _SENTENCES[kind]
    keeps = kind in _KEPT_AT_GENERATION and not one_example_per_answer
    advice = f"; --one-example-per-answer keeps {_KEPT_AT_GENERATION[kind]}" if keeps else _ADVICE.get(kind, "")
    return f"the chat template leaves {kind} out of {{rows}}, as at {{example}}{advice}"
