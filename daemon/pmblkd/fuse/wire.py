"""FUSE's messages as the kernel sends them on /dev/fuse: numbers and structs, nothing else.

Everything is in the machine's byte order; x86-64 and arm64 are little-endian, and so is this.
Source: include/uapi/linux/fuse.h, protocol 7.45 (Linux 6.18). The oldest that is spoken is 7.31
(Linux 5.4).
"""

import enum
import struct

MAJOR, MINOR = 7, 45
MINOR_MIN = 31


class Opcode(enum.IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    REMOVEXATTR = 24
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    DESTROY = 38
    IOCTL = 39
    BATCH_FORGET = 42
    FALLOCATE = 43
    RENAME2 = 45
    LSEEK = 46
    TMPFILE = 51


class Init(enum.IntFlag):
    """What kernel and daemon agree on in INIT; from bit 32 on in `flags2`."""

    ASYNC_READ = 1 << 0
    BIG_WRITES = 1 << 5
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    HANDLE_KILLPRIV_V2 = 1 << 28
    INIT_EXT = 1 << 30
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37
    REQUEST_TIMEOUT = 1 << 42


class Open(enum.IntFlag):
    DIRECT_IO = 1 << 0
    PARALLEL_DIRECT_WRITES = 1 << 6
    PASSTHROUGH = 1 << 7


class SetAttr(enum.IntFlag):
    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3


IN_HEADER = struct.Struct("<IIQQIIIHH")  # len opcode unique nodeid uid gid pid extlen padding
IN_HEADER_START = struct.Struct("<IIQQ")
OUT_HEADER = struct.Struct("<IiQ")  # len error unique

INIT_IN = struct.Struct("<IIII")  # major minor max_readahead flags
INIT_IN_FLAGS2 = struct.Struct("<I")  # at byte 16
# major minor max_readahead flags max_background congestion_threshold max_write time_gran max_pages
# map_alignment flags2 max_stack_depth request_timeout
INIT_OUT = struct.Struct("<IIIIHHIIHHIIH22x")
INIT_OUT_VERSION = struct.Struct("<II56x")  # all that is said to a kernel of a later major version

# ino size blocks atime mtime ctime, their nanoseconds, mode nlink uid gid rdev blksize flags
ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
ENTRY_OUT = struct.Struct("<QQQQII")  # nodeid generation entry_valid attr_valid, nanoseconds
ATTR_OUT = struct.Struct("<QII")  # attr_valid attr_valid_nsec dummy
SETATTR_IN = struct.Struct("<IIQQ")  # valid padding fh size
OPEN_IN = struct.Struct("<II")  # flags open_flags
OPEN_OUT = struct.Struct("<QIi")  # fh open_flags backing_id
# fh offset size flags lock_owner flags padding, of READ and WRITE; offset and size are looked at
IO_IN = struct.Struct("<8xQI20x")
WRITE_OUT = struct.Struct("<II")  # size padding
STATFS_OUT = struct.Struct("<QQQQQIIII24x")  # blocks bfree bavail files ffree bsize namelen frsize
FALLOCATE_IN = struct.Struct("<QQQII")  # fh offset length mode padding
LSEEK_IN = struct.Struct("<QQII")  # fh offset whence padding
LSEEK_OUT = struct.Struct("<Q")
IOCTL_IN = struct.Struct("<QIIQII")  # fh flags cmd arg in_size out_size
IOCTL_OUT = struct.Struct("<iIII")  # result flags in_iovs out_iovs
DIRENT = struct.Struct("<QQII")  # ino off namelen type; then the name, padded to 8 bytes

NOTIFY_INVAL_INODE = 2  # where an OUT_HEADER has its error, with unique 0
NOTIFY_INVAL_INODE_OUT = struct.Struct("<Qqq")  # ino off len; a negative off: attributes only

DT_REG = 8

BACKING_OPEN = 0x4010E501  # ioctl of /dev/fuse with BACKING_MAP; its result is the backing's id
BACKING_CLOSE = 0x4004E502  # with BACKING_ID
BACKING_MAP = struct.Struct("<iIQ")  # fd flags padding
BACKING_ID = struct.Struct("<I")

BLKGETSIZE64 = 0x80081272  # include/uapi/linux/fs.h
SIZE64 = struct.Struct("<Q")
