import pytest

from train.data.dataset import PairDataset, open_weights
from train.job.trainer import PairTrainer
from train.model.policy import load_policy


@pytest.fixture
def make_trainer(make_config, model_folder, tmp_path):
    """Return a function that builds a trainer on the tiny model: `make_trainer(optim={...})`."""

    def make(**changes) -> PairTrainer:
        config = make_config(**changes)
        pairs = PairDataset(open_weights(config.data), config.data, vocab_size=128)
        return PairTrainer(
            load_policy(model_folder, config.model, config.lora), pairs, config, checkpoints=tmp_path / "checkpoints"
        )

    return make
