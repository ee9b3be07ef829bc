"""The sampling-free loss in a LightningModule, judged by the sampled ELBO after each epoch.

    pip install 'fastsfvae[examples]'
    python examples/lightning_module.py --epochs 5

Training logs the loss and its terms, validation the sampled ELBO, which is what a model is judged
by: the loss is no bound. No logger and no checkpoints are asked for, so nothing is written.
"""

import argparse
import logging

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastsfvae as sf
from fastsfvae.data import digits

M, NOISE_VAR = 8, 0.5


class SamplingFreeVae(lightning.LightningModule):
    """Encoder, decoder and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 2 * M))
        self.decoder = nn.Sequential(nn.Linear(M, 256), nn.ReLU(), nn.Linear(256, 784))
        # It refers to the decoder, whose weights stay those of this module.
        self.loss_fn = sf.SamplingFreeLoss(self.decoder, likelihood="expected", noise_var=NOISE_VAR)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The loss of x [B, 784]."""
        (x,) = batch
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        loss, terms = self.loss_fn(x, mean, log_var, return_terms=True)
        shown = {"loss": loss, "squared error": terms.squared_error.mean(), "KL": terms.kl.mean()}
        self.log_dict(shown, on_step=False, on_epoch=True, batch_size=len(x))
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """The sampled ELBO of held-out x [B, 784]."""
        (x,) = batch
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        model = self.decoder, x, mean, log_var
        elbo = sf.evaluate.sampled_elbo(*model, noise_var=NOISE_VAR, samples=10).elbo.float()
        self.log("sampled ELBO", elbo.mean(), batch_size=len(x))

    def on_train_epoch_end(self) -> None:
        """Print what was logged."""
        shown = {name: f"{value:.1f}" for name, value in self.trainer.callback_metrics.items()}
        print(f"epoch {self.current_epoch + 1}: {shown}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on both networks."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description="A LightningModule with the sampling-free loss.")
    parser.add_argument("--epochs", type=int, default=2)
    epochs = parser.parse_args().epochs
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    images, test = (TensorDataset(digits(s).images.flatten(1) / 255) for s in ("train", "test"))
    training = DataLoader(images, batch_size=100, shuffle=True)
    trainer.fit(SamplingFreeVae(), training, DataLoader(test, batch_size=100))


if __name__ == "__main__":
    main()
