"""Gradually Updated Neural Networks (GUNN) for timm. Importing the package registers its models with timm."""
from .gunn import Gunn
from .layer import GunnLayer
from .unstack import unstack_model

__version__ = '0.1.0'

__all__ = ['Gunn', 'GunnLayer', 'unstack_model']
