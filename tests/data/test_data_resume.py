"""Under Lightning: a run resumed from any checkpoint sees the batches that the uninterrupted run saw."""

import lightning as L
import pytest
import torch
from torch import nn

from structlayers.data import TextDataModule

STEPS = 4


class Recorder(L.LightningModule):
    """Remembers the batches that it trains on."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, _):
        x, y = batch
        self.seen.append((self.current_epoch, x.tolist(), y.tolist()))
        return self.layer(x.float().mean()[None]).sum()

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEverywhere(L.Callback):
    """Writes a checkpoint at each of the places where ModelCheckpoint may."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, trainer, kind):
        trainer.save_checkpoint(self.folder / f"{kind} {trainer.global_step}.ckpt")

    def on_train_batch_end(self, trainer, *_):
        self.save(trainer, "batch")

    def on_validation_end(self, trainer, *_):
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer, *_):
        self.save(trainer, "epoch")


@pytest.fixture
def train(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(251)))

    def run(folder, ckpt_path=None, **options):
        # 200 training bytes: 28 windows of 7, 4 steps of 6 windows an epoch
        data = TextDataModule(str(text), context_length=7, batch_size=6, val_fraction=0.1, test_fraction=0.1)
        module = Recorder()
        trainer = L.Trainer(
            **{"max_epochs": 3, **options},
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[SaveEverywhere(tmp_path / folder)],
        )
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return module.seen

    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2}, {"max_epochs": -1, "max_steps": 3 * STEPS}])
def test_resumed_run_sees_the_remaining_batches(train, tmp_path, options):
    whole = train("whole", **options)
    assert len(whole) == 3 * STEPS and len({str(batch) for batch in whole}) == 3 * STEPS
    for file in sorted((tmp_path / "whole").iterdir()):
        kind, step = file.stem.split()
        if int(step) < len(whole):
            assert train("rest", ckpt_path=str(file), **options) == whole[int(step) :], (kind, step)


@pytest.mark.filterwarnings("ignore")
def test_run_with_fewer_batches_an_epoch_resumes(train, tmp_path):
    options = {"limit_train_batches": 3}
    whole = train("whole", **options)
    for step in (2, 3, 4):
        assert train("rest", ckpt_path=str(tmp_path / "whole" / f"batch {step}.ckpt"), **options) == whole[step:], step
