"""Attention: `attention(q, k, v, Mask(...))`."""

from datasel.attention.api import attention
from datasel.attention.masks import Mask

__all__ = ['Mask', 'attention']
