/* Frames for edgeadapt over a serial line: C99 or C++, nothing allocated, below 300 bytes of RAM. The format is in devices/firmware/README.md.
 *
 *   edgeadapt_sender sender;
 *   edgeadapt_start(&sender, write_bytes, NULL, boot);
 *   for (;;) {
 *     const uint16_t dims[2] = {3, 128};
 *     edgeadapt_begin(&sender, EDGEADAPT_INT16, EDGEADAPT_UNKNOWN, 0.001f, 2, dims);
 *     for (...) edgeadapt_add_int16(&sender, value);
 *     edgeadapt_end(&sender);
 *   }
 *
 * Bytes go out as they are added, through the callback, at most 255 at a time: the payload need not lie in memory as a whole. A sender is used by one
 * thread or interrupt only. */
#ifndef EDGEADAPT_FRAME_H
#define EDGEADAPT_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVR__
#include <avr/pgmspace.h>
#define EDGEADAPT_FLASH PROGMEM
#define EDGEADAPT_WORD(address) pgm_read_dword(address)
#else
#define EDGEADAPT_FLASH
#define EDGEADAPT_WORD(address) (*(address))
#endif

enum { EDGEADAPT_VERSION = 1, EDGEADAPT_BLOCK = 254, EDGEADAPT_UNKNOWN = -1 };

/* What a payload is made of. */
enum {
  EDGEADAPT_UINT8 = 1,   /* an image: height, width and perhaps channels */
  EDGEADAPT_FLOAT32 = 2, /* one to four dimensions */
  EDGEADAPT_INT16 = 3    /* the same; each value counts `scale` */
};

/* Sends bytes, all of them: it waits while there is no room. */
typedef void (*edgeadapt_write)(void *user, const uint8_t *data, size_t size);

/* Only the functions below look inside. */
typedef struct {
  edgeadapt_write write;
  void *user;
  uint32_t crc;
  uint32_t left;     /* bytes of the payload that are still to come */
  uint32_t sequence; /* of the next packet */
  uint16_t boot;
  bool open;
  uint8_t used; /* bytes after the first of the block */
  uint8_t block[EDGEADAPT_BLOCK + 1];
} edgeadapt_sender;

static inline void edgeadapt_flush(edgeadapt_sender *sender) {
  sender->block[0] = (uint8_t)(sender->used + 1);
  sender->write(sender->user, sender->block, (size_t)sender->used + 1);
  sender->used = 0;
}

/* A zero ends a block, and so do 254 bytes without one. */
static inline void edgeadapt_stuff(edgeadapt_sender *sender, uint8_t byte) {
  if (sender->used == EDGEADAPT_BLOCK) edgeadapt_flush(sender);
  if (byte != 0)
    sender->block[++sender->used] = byte;
  else
    edgeadapt_flush(sender);
}

/* CRC-32 as in zlib, four bits at a time. */
static inline uint32_t edgeadapt_crc(uint32_t crc, uint8_t byte) {
  static const uint32_t table[16] EDGEADAPT_FLASH = {
      0x00000000u, 0x1db71064u, 0x3b6e20c8u, 0x26d930acu, 0x76dc4190u, 0x6b6b51f4u, 0x4db26158u, 0x5005713cu,
      0xedb88320u, 0xf00f9344u, 0xd6d6a3e8u, 0xcb61b38cu, 0x9b64c2b0u, 0x86d3d2d4u, 0xa00ae278u, 0xbdbdf21cu};
  crc ^= byte;
  crc = EDGEADAPT_WORD(&table[crc & 15u]) ^ (crc >> 4);
  return EDGEADAPT_WORD(&table[crc & 15u]) ^ (crc >> 4);
}

static inline void edgeadapt_put(edgeadapt_sender *sender, uint32_t value, uint8_t bytes) {
  for (; bytes != 0; bytes--, value >>= 8) {
    sender->crc = edgeadapt_crc(sender->crc, (uint8_t)(value & 255u));
    edgeadapt_stuff(sender, (uint8_t)(value & 255u));
  }
}

static inline uint32_t edgeadapt_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline void edgeadapt_zero(edgeadapt_sender *sender) {
  const uint8_t zero = 0;
  sender->write(sender->user, &zero, 1);
}

/* Before the first packet, when the line is open. `boot` should differ from one start to the next, so that the receiver knows of it: a counter in
 * EEPROM or a random number. The zero that goes out ends whatever was on the line before, such as a boot loader's greeting. */
static inline void edgeadapt_start(edgeadapt_sender *sender, edgeadapt_write write, void *user, uint16_t boot) {
  memset(sender, 0, sizeof *sender);
  sender->write = write;
  sender->user = user;
  sender->boot = boot;
  edgeadapt_zero(sender);
}

/* Begins a packet. `label`: the class by number where it is known, else EDGEADAPT_UNKNOWN. `scale`: what an int16 of 1 is worth; unused with others.
 * False, and nothing is sent, where there are no such packets. One that was not ended is given up. */
static inline bool edgeadapt_begin(edgeadapt_sender *sender, uint8_t kind, int16_t label, float scale, uint8_t ndim, const uint16_t *dims) {
  uint32_t size = kind == EDGEADAPT_FLOAT32 ? 4 : kind == EDGEADAPT_INT16 ? 2 : 1;
  float positive = scale < 0 ? -scale : scale;
  uint8_t at;
  if (kind < EDGEADAPT_UINT8 || kind > EDGEADAPT_INT16 || ndim < 1 || ndim > 4) return false;
  if (kind == EDGEADAPT_UINT8 && (ndim < 2 || ndim > 3)) return false;
  if (kind == EDGEADAPT_INT16 && !(positive >= 7.88860905e-31f && positive <= 1.2676506e30f)) return false; /* 2 to the -100 and 100; nor NaN */
  for (at = 0; at < ndim; at++) {
    if (dims[at] == 0 || size > UINT32_MAX / dims[at]) return false;
    size *= dims[at];
  }
  if (sender->open) {
    edgeadapt_zero(sender);
    sender->sequence++;
  }
  sender->open = true;
  sender->used = 0;
  sender->left = size;
  sender->crc = 0xffffffffu;
  edgeadapt_put(sender, EDGEADAPT_VERSION, 1);
  edgeadapt_put(sender, kind, 1);
  edgeadapt_put(sender, sender->boot, 2);
  edgeadapt_put(sender, sender->sequence, 4);
  edgeadapt_put(sender, (uint16_t)label, 2);
  edgeadapt_put(sender, ndim, 1);
  edgeadapt_put(sender, 0, 1);
  edgeadapt_put(sender, edgeadapt_bits(kind == EDGEADAPT_INT16 ? scale : 1.0f), 4);
  for (at = 0; at < ndim; at++) edgeadapt_put(sender, dims[at], 2);
  return true;
}

/* The next bytes of the payload, as they lie in memory (little endian). What is too much is left out. */
static inline void edgeadapt_add(edgeadapt_sender *sender, const void *data, size_t size) {
  const uint8_t *bytes = (const uint8_t *)data;
  if (size > sender->left) size = (size_t)sender->left;
  sender->left -= (uint32_t)size;
  for (; size != 0; size--) edgeadapt_put(sender, *bytes++, 1);
}

/* The next value of an EDGEADAPT_INT16 or EDGEADAPT_FLOAT32 payload, on any machine. */
static inline void edgeadapt_add_int16(edgeadapt_sender *sender, int16_t value) {
  if (sender->left < 2) return;
  sender->left -= 2;
  edgeadapt_put(sender, (uint16_t)value, 2);
}

static inline void edgeadapt_add_float(edgeadapt_sender *sender, float value) {
  if (sender->left < 4) return;
  sender->left -= 4;
  edgeadapt_put(sender, edgeadapt_bits(value), 4);
}

/* Ends the packet. False where the payload was not added as a whole: the receiver will refuse such a packet. */
static inline bool edgeadapt_end(edgeadapt_sender *sender) {
  const bool whole = sender->open && sender->left == 0;
  if (!sender->open) return false;
  edgeadapt_put(sender, ~sender->crc, 4);
  edgeadapt_flush(sender);
  edgeadapt_zero(sender);
  sender->open = false;
  sender->left = 0;
  sender->sequence++;
  return whole;
}

#endif
