/* An NBD server that only answers: what this client can take, measured from below.
 *
 *     ceiling FD FILE (simple|structured)
 *
 * Serves the transmission phase on the connected socket FD, after the handshake, until the client
 * is gone. Reads are views of the mapped FILE, payloads of writes are received and dropped, every
 * other command is a success that does nothing. One receive for all requests that have arrived,
 * one sendmsg for all their replies. Protocol: doc/proto.md of the NBD project. */
#define _GNU_SOURCE
#include <endian.h>
#include <err.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { READ = 0, WRITE = 1, DISCONNECT = 2 };
enum { CHUNK_OFFSET_DATA = 1, CHUNK_DONE = 1, OFFSET_BYTES = 8 };
enum { IN_BYTES = 256 << 10, BATCH_MAX = 512 }; /* stays in the L2 cache; IOV_MAX is 1024 */
static const uint32_t REQUEST_MAGIC = 0x25609513, SIMPLE_MAGIC = 0x67446698,
                      CHUNK_MAGIC = 0x668e33ef;
enum { LARGE_BYTES = 32 << 10 }; /* data to send that takes longer than a pause */
static const struct timespec PAUSE = {.tv_nsec = 20000};

/* As on the wire, big-endian; cookies go back as they came. */
struct __attribute__((packed)) request {
    uint32_t magic; uint16_t flags, type; uint64_t cookie, offset; uint32_t length;
};
struct __attribute__((packed)) simple { uint32_t magic, error; uint64_t cookie; };
struct __attribute__((packed)) chunk {
    uint32_t magic; uint16_t flags, type; uint64_t cookie; uint32_t length; uint64_t offset;
};

static int fd;
static bool structured;
static uint8_t *file, in[IN_BYTES]; /* in[start..end) has arrived and was not looked at */
static uint64_t file_bytes;
static size_t start, end;
static size_t payload_left; /* of the write whose cookie this is */
static uint64_t payload_cookie;
static union { struct simple simple; struct chunk chunk; } headers[BATCH_MAX];
static struct iovec out[2 * BATCH_MAX];
static size_t replies, pieces, out_bytes;
static bool large; /* a reply of this batch is */

static void add(void *base, size_t bytes) {
    out[pieces++] = (struct iovec){base, bytes};
    out_bytes += bytes;
}

static void reply_simple(uint64_t cookie) {
    struct simple *header = &headers[replies++].simple;
    *header = (struct simple){htobe32(SIMPLE_MAGIC), 0, cookie};
    add(header, sizeof *header);
}

static void reply_data(const struct request *request) {
    uint64_t offset = be64toh(request->offset), length = be32toh(request->length);
    if (offset > file_bytes || length > file_bytes - offset) errx(1, "read beyond the end");
    if (structured) {
        struct chunk *header = &headers[replies++].chunk;
        *header = (struct chunk){htobe32(CHUNK_MAGIC), htobe16(CHUNK_DONE),
                                 htobe16(CHUNK_OFFSET_DATA), request->cookie,
                                 htobe32(OFFSET_BYTES + length), request->offset};
        add(header, sizeof *header);
    } else {
        reply_simple(request->cookie);
    }
    add(file + offset, length);
    large |= length >= LARGE_BYTES;
}

/* Drops what has arrived of the payload; a write is answered when all of it has, not before. */
static bool drop_payload(void) {
    size_t here = end - start < payload_left ? end - start : payload_left;
    start += here;
    payload_left -= here;
    if (payload_left) return false;
    reply_simple(payload_cookie);
    return true;
}

/* Answers what has arrived, up to a batch; how many replies that made. */
static size_t answer(void) {
    struct request request;
    replies = pieces = out_bytes = 0;
    large = false;
    while (replies < BATCH_MAX) {
        if (payload_left && !drop_payload()) break;
        if (replies == BATCH_MAX || end - start < sizeof request) break;
        memcpy(&request, in + start, sizeof request);
        start += sizeof request;
        if (request.magic != htobe32(REQUEST_MAGIC)) errx(1, "a request without its magic");
        switch (be16toh(request.type)) {
        case READ: reply_data(&request); break;
        case WRITE:
            payload_cookie = request.cookie;
            payload_left = be32toh(request.length);
            if (payload_left == 0) reply_simple(request.cookie);
            break;
        case DISCONNECT: exit(0);
        default: reply_simple(request.cookie);
        }
    }
    return replies;
}

static void send_replies(void) {
    struct msghdr message = {.msg_iov = out, .msg_iovlen = pieces};
    ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
    if (sent < 0) err(1, "sendmsg");
    /* A blocking socket takes all of it, unless a signal interrupts: none has a handler. */
    if ((size_t)sent != out_bytes) errx(1, "a short sendmsg");
}

static void receive(void) {
    memmove(in, in + start, end - start); /* less than one request */
    end -= start;
    start = 0;
    ssize_t got = recv(fd, in + end, IN_BYTES - end, 0);
    if (got < 0) err(1, "recv");
    if (got == 0) exit(0);
    end += got;
}

int main(int count, char **words) {
    if (count != 4) errx(2, "usage: ceiling FD FILE (simple|structured)");
    fd = atoi(words[1]);
    structured = strcmp(words[3], "structured") == 0;
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    prctl(PR_SET_TIMERSLACK, 1); /* or 20 us are 70 */
    int descriptor = open(words[2], O_RDONLY);
    if (descriptor < 0) err(1, "%s", words[2]);
    file_bytes = lseek(descriptor, 0, SEEK_END);
    file = mmap(NULL, file_bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, descriptor, 0);
    if (file == MAP_FAILED) err(1, "mmap");
    for (bool pause = false;;) {
        size_t batch = answer();
        if (batch) {
            send_replies();
            pause = batch > 1 && !large; /* not for a client that sends one at a time */
        } else {
            if (pause && start == end && payload_left == 0) nanosleep(&PAUSE, NULL);
            receive();
        }
    }
}
