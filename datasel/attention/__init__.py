"""Attention: `attention(q, k, v, Mask(...))`."""

from datasel.attention.api import attention
from datasel.attention.masks import Anchors, Mask

__all__ = ['Anchors', 'Mask', 'attention']
