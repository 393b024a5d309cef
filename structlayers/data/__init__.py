"""Lightning data modules over local data; nothing is ever downloaded."""

from structlayers.data.digits import DigitsDataModule
from structlayers.data.fashion_mnist import FashionMNISTDataModule
from structlayers.data.text import TextDataModule
from structlayers.data.tokens import PassagePairsDataModule, TokenDataModule

__all__ = [
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "PassagePairsDataModule",
    "TextDataModule",
    "TokenDataModule",
]
