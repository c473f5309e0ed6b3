"""What a run measures and shows of its model on the way: validation, exact answers, samples; and the best is kept."""

import sys
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from qsharded.config import TrainConfig
from qsharded.config.evaluated import EXACT_MATCH
from qsharded.data import Prompt
from qsharded.distributed.world import World
from qsharded.report.run_files import BEST_FOLDER
from qsharded.training import evaluation
from qsharded.training.best import Best, Judge
from qsharded.training.metrics import MetricsLog
from qsharded.training.results import Results
from qsharded.training.setup import TrainingSetup

_SHOWN_CHARACTERS = 300  # of an answer in the log; samples.jsonl has all
_SHOWN_MATCHES = 4


@dataclass(frozen=True)
class Evaluations:
    """Every rank has one, and all call the same methods."""

    config: TrainConfig
    world: World
    setup: TrainingSetup
    log: MetricsLog
    results: Results

    @cached_property
    def judge(self) -> Judge:
        """What compares the evaluations."""
        return Judge(self.config, self.setup.progress)

    def before_training(self) -> None:
        """All of it, of the model as it came."""
        self._validate()
        self._match("before training")
        self.sample()

    def between_steps(self) -> None:
        """What there is at each ``--eval-steps``."""
        self._validate()
        if self.config.save_best == EXACT_MATCH:
            self._match(f"at step {self.setup.progress.step}")

    def after_training(self) -> None:
        """All of it; what a run that ended early has just measured is not measured again."""
        if not self.judge.is_patience_out():
            self._validate()
        if not (self.judge.is_patience_out() and self.config.save_best == EXACT_MATCH):
            self._match("after training")
        self.sample()

    def sample(self) -> None:
        """Answer ``--sample-prompts``."""
        setup, prompts = self.setup, self.setup.samples
        if not prompts:
            return
        room, check = self.config.sample_max_new_tokens, setup.stopping.check
        found = evaluation.answers(setup.model, setup.tokenizer, prompts, room, before_forward=check)
        for prompt, answer in zip(prompts, found, strict=True):
            self._show(prompt, answer)
            shown = answer if len(answer) <= _SHOWN_CHARACTERS else answer[:_SHOWN_CHARACTERS] + " ..."
            self.log.message(f"sample at step {setup.progress.step}: {prompt.text!r} -> {shown!r}")

    def _show(self, prompt: Prompt, answer: str) -> None:
        self.log.sample(self.setup.progress.step, prompt.text, answer, prompt.answer or None)

    def _validate(self) -> None:
        setup = self.setup
        values: dict[str, float] = {}
        for name, loader in setup.eval_loaders.items():
            steps = islice(loader.steps(), loader.steps_in_epoch(0))
            values |= evaluation.validation_loss(setup.model, setup.stopping.between(steps), self.world, name)
        if values:
            self._log(values)

    def _match(self, when: str) -> None:
        setup, prompts = self.setup, self.setup.prompts
        if not prompts:
            return
        check = setup.stopping.check
        result = evaluation.exact_match(setup.model, setup.tokenizer, prompts, before_forward=check)
        self._log({EXACT_MATCH: result.accuracy})
        self.log.message(f"exact match {when}: {result.accuracy:.1%} of {len(prompts)} held-out prompts; samples:")
        for prompt, answer in list(zip(prompts, result.answers, strict=True))[:_SHOWN_MATCHES]:
            self._show(prompt, answer)
            verdict = "right" if answer.strip() == prompt.answer.strip() else f"wrong, should be {prompt.answer!r}"
            self.log.message(f"  {prompt.text!r} -> {answer!r} ({verdict})")

    def _log(self, values: dict[str, float]) -> None:
        """Log what was measured, and keep the adapter where it is the best so far."""
        self.log.evaluation(self.setup.progress.step, self.setup.epochs_done(), values)
        judge, measure = self.judge, self.config.save_best
        if measure is None or measure not in values:
            return
        kept = judge.is_best(values)
        if kept:
            unwritten = self.results.save_best(Best(measure, values[measure], self.setup.progress.step))
            kept = unwritten is None
            if unwritten and self.world.is_main:
                print(f"warning: {unwritten}", file=sys.stderr)
        judge.note(values, kept=kept)

    def verdict(self) -> list[str]:
        """Lines on the best evaluation, at the run's end."""
        best, total = self.judge.best, self.setup.total_steps
        if best is None:
            return []
        folder = Path(self.config.output_dir, BEST_FOLDER)
        lines = [f"best {best.measure} {best.value:.4g} at step {best.step}: its adapter is in {folder}"]
        if self.judge.is_patience_out() and self.setup.progress.step < total:
            early = f"ended after step {self.setup.progress.step} of {total}, as {best.no_better} evaluations in a row"
            lines.append(f"{early} were no better (--early-stopping-patience)")
        return lines
