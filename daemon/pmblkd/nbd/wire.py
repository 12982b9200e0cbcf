"""Every constant and structure of the NBD protocol that the server speaks. All big-endian.

Source: the NBD project's protocol document (doc/proto.md, 2026-05). Names are its names without
the NBD_ prefix.
"""

import enum
from struct import Struct

STRING_BYTES_MAX = 4096

# Handshake: greeting, options and their replies.
GREETING = Struct(">8s8sH")
INIT_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
CLIENT_FLAGS = Struct(">I")
OPTION = Struct(">8sII")  # magic, option, data length
OPTION_REPLY = Struct(">QIII")  # magic, option, reply type, data length
OPTION_REPLY_MAGIC = 0x3E889045565A9
EXPORT_NAME_REPLY = Struct(">QH")  # size, transmission flags
EXPORT_NAME_PADDING = bytes(124)
INFO_EXPORT = Struct(">HQH")  # info type, size, transmission flags
INFO_BLOCK_SIZE = Struct(">HIII")  # info type, minimum, preferred, maximum payload
INFO_TYPE = Struct(">H")
UINT32 = Struct(">I")

FLAG_FIXED_NEWSTYLE = 1 << 0
FLAG_NO_ZEROES = 1 << 1


class Opt(enum.IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Rep(enum.IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 2**31 + 1
    ERR_POLICY = 2**31 + 2
    ERR_INVALID = 2**31 + 3
    ERR_UNKNOWN = 2**31 + 6
    ERR_TOO_BIG = 2**31 + 9


class Info(enum.IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(enum.IntFlag):
    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


# Transmission: requests and their replies.
REQUEST = Struct(">IIQQI")  # magic, flags << 16 | type, cookie, offset, length
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY = Struct(">IIQ")  # magic, error, cookie
SIMPLE_REPLY_MAGIC = 0x67446698
CHUNK = Struct(">IHHQI")  # magic, flags, type, cookie, length
CHUNK_MAGIC = 0x668E33EF
CHUNK_DONE = 1 << 0
HOLE = Struct(">QI")  # payload of OFFSET_HOLE: offset, length
ERROR = Struct(">IH")  # payload of ERROR: error, length of the message that follows
BLOCK_STATUS_EXTENT = Struct(">II")  # length, state

REPLY_NONE = 0
REPLY_OFFSET_DATA = 1
REPLY_OFFSET_HOLE = 2
REPLY_BLOCK_STATUS = 5
REPLY_ERROR = 2**15 + 1

STATE_HOLE = 1 << 0
STATE_ZERO = 1 << 1


class Cmd(enum.IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CmdFlag(enum.IntFlag):
    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4


BASE_ALLOCATION = "base:allocation"
BASE_ALLOCATION_ID = 1

# A length up to 32 MiB is never an attack, says the protocol; the Linux client ignores less.
PAYLOAD_BYTES_MAX = 32 << 20
