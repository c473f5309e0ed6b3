"""Datasets that are trained on while they are tokenized: a mixture for each window of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qsharded.data.examples import Dataset
from qsharded.data.growing import Growing
from qsharded.data.held_out import split_examples
from qsharded.data.mixture import Mixture
from qsharded.data.notes import data_notes


@dataclass(frozen=True)
class Streams:
    """Several growing datasets, read side by side.

    Attributes:
        parts: the datasets by the user's names for them.
        weights: as of :class:`Mixture`, in each window.
        held_out: the fraction of the first window of each that is not trained on.
        seed: which examples that are.
    """

    parts: Mapping[str, Growing]
    weights: Sequence[float] | None = None
    held_out: float = 0.0
    seed: int = 0

    def window(self, number: int) -> Mixture:
        """What is trained on in a window; it waits until that is tokenized.

        Raises:
            ValueError: the tokenizing has failed.
        """
        return Mixture({name: self._kept(part, number) for name, part in self.parts.items()}, self.weights, self)

    def evaluation(self) -> Dataset:
        """What is held out."""
        first = Mixture({name: part.window(0).rows for name, part in self.parts.items()})
        return first.split(self.held_out, self.seed)[1]

    def notes(self, one_example_per_answer: bool) -> list[str]:
        """What is told of all rows that were read so far."""
        try:
            found = {name: part.window(0).rows for name, part in self.parts.items()}
        except ValueError as error:  # of rows that the run no longer needed
            return [f"warning: {error}"]
        return [f"{name}: {note}" for name, rows in found.items() for note in data_notes(rows, one_example_per_answer)]

    def _kept(self, part: Growing, number: int) -> Dataset:
        found = part.window(number)
        if self.held_out and found.number == 0:
            return split_examples(found.rows, self.held_out, self.seed)[0]
        return found.rows
