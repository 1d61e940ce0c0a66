"""Equilibrium cells and the models on them."""

from jiio.models.activation import Activation
from jiio.models.cell import WellPosedCell
from jiio.models.classifier import Classifier, ClassifierConfig, classifier
from jiio.models.context_classifier import ContextClassifier, ContextConfig, context_classifier
from jiio.models.encoder import Encoder, encoder
from jiio.models.film import FilmInjection
from jiio.models.generator import Generator, GeneratorConfig, generator
from jiio.models.image_injection import ImageInjection
from jiio.models.injection import LatentInjection
from jiio.models.mdeq import MDEQ
from jiio.models.spectral import convolution_norm
from jiio.models.stem import Stem
from jiio.models.vae import VAE, VAEConfig, vae

__all__ = [
    "MDEQ",
    "VAE",
    "Activation",
    "Classifier",
    "ClassifierConfig",
    "ContextClassifier",
    "ContextConfig",
    "Encoder",
    "FilmInjection",
    "Generator",
    "GeneratorConfig",
    "ImageInjection",
    "LatentInjection",
    "Stem",
    "VAEConfig",
    "WellPosedCell",
    "classifier",
    "context_classifier",
    "convolution_norm",
    "encoder",
    "generator",
    "vae",
]
