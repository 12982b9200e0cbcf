"""Where the bytes live: a mapped file, its durability level and which of its pages exist."""

from pmblk.media.opening import create, open_media
from pmblk.media.pmem import ZEROES, Media

__all__ = ["ZEROES", "Media", "create", "open_media"]
