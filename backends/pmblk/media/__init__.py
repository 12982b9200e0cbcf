"""Where the bytes live: a mapped file, its durability level and which of its pages exist."""

from pmblk.media.pmem import ZEROES, Media, create, open_media

__all__ = ["ZEROES", "Media", "create", "open_media"]
