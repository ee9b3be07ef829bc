"""Training: a run's configuration, its state and files, and the loop."""

from fastsfvae.training.loop import NonFiniteLoss as NonFiniteLoss
from fastsfvae.training.loop import train as train
from fastsfvae.training.run import Run as Run
from fastsfvae.training.run import resume as resume
from fastsfvae.training.run import start as start
