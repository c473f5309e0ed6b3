"""The output folder is moved or deleted while the run writes to it."""

import shutil
from pathlib import Path

import pytest

from qsharded import train
from qsharded.training.output_lock import LOCK_FILE
from qsharded.training.trainer import Trainer
from tests.distributed.test_train import arguments


@pytest.mark.parametrize("fault", ["moved", "deleted", "deleted and made anew"])
@pytest.mark.parametrize("logging_steps", [1, 100])
def test_the_run_stops_at_the_next_write_and_says_what_is_lost(
    model: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    logging_steps: int,
) -> None:
    out = tmp_path / "out"
    step = Trainer.train_step

    def disturbed(self: Trainer, *args: object) -> object:
        if self.setup.progress.step == 4:
            self.writer.wait()
            shutil.move(out, tmp_path / "elsewhere") if fault == "moved" else shutil.rmtree(out)
            if fault == "deleted and made anew":
                out.mkdir()
                (out / "metrics.jsonl").write_text("")
        return step(self, *args)

    monkeypatch.setattr(Trainer, "train_step", disturbed)
    options = {"max_steps": 12, "save_steps": 3, "logging_steps": logging_steps, "eval_split": 0}
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments(model, dataset, out, **options))
    said, noticed = capsys.readouterr().err, 5 if logging_steps == 1 else 6
    assert stopped.value.code == 1
    assert f"error: {out / 'metrics.jsonl'} was moved or deleted while it was written to. The run stops at" in said
    assert f"stops at step {noticed}: the steps since its last checkpoint are lost" in said
    assert "--resume-from-checkpoint auto" in said
    assert not out.exists() or [path.name for path in out.iterdir()] == ["metrics.jsonl"]
    if fault == "moved":
        shutil.move(tmp_path / "elsewhere", out)
        (out / LOCK_FILE).unlink()  # of this process, which a run's end is not the end of here
        monkeypatch.setattr(Trainer, "train_step", step)
        train.main([*arguments(model, dataset, out, **options), "--resume-from-checkpoint", "auto"])
        assert "resumed from" in capsys.readouterr().out
