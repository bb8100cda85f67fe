/* Sends the packets that standard input asks for to standard output; C and C++.
 *
 * Each request: u8 kind, i16 label, f32 scale, u8 n, n x u16 dims, u8 what follows (0: end the packet; 1: leave it; 2: end it without its last byte),
 * u32 size, the payload. Its bytes are added 7 at a time, those of int16 and float32 value by value in every other packet. A refused one answers
 * on standard error. */
#include "edgeadapt_frame.h"

#include <stdio.h>
#include <stdlib.h>

/* A promise of the description. */
typedef char fits[sizeof(edgeadapt_sender) <= 300 ? 1 : -1];

static void send_bytes(void *user, const uint8_t *data, size_t size) {
  fwrite(data, 1, size, (FILE *)user);
  fflush((FILE *)user);
}

static bool take(void *into, size_t size) { return fread(into, 1, size, stdin) == size; }

static void add(edgeadapt_sender *sender, uint8_t kind, const uint8_t *payload, uint32_t size, bool values) {
  const uint32_t step = values && kind == EDGEADAPT_FLOAT32 ? 4 : values && kind == EDGEADAPT_INT16 ? 2 : 7;
  uint32_t at;
  for (at = 0; at < size; at += step) {
    int16_t whole;
    float number;
    if (step == 7 || at + step > size) {
      edgeadapt_add(sender, payload + at, at + step > size ? size - at : step);
    } else if (step == 2) {
      memcpy(&whole, payload + at, 2);
      edgeadapt_add_int16(sender, whole);
    } else {
      memcpy(&number, payload + at, 4);
      edgeadapt_add_float(sender, number);
    }
  }
}

int main(int count, char **words) {
  edgeadapt_sender sender;
  uint8_t kind, ndim, then;
  int16_t label;
  float scale;
  uint16_t dims[4];
  uint32_t size;
  bool values = false;
  if (count != 2) return 2;
  edgeadapt_start(&sender, send_bytes, stdout, (uint16_t)atoi(words[1]));
  while (take(&kind, 1)) {
    uint8_t *payload;
    if (!take(&label, 2) || !take(&scale, 4) || !take(&ndim, 1) || ndim > 4 || !take(dims, 2u * ndim) || !take(&then, 1) || !take(&size, 4)) return 3;
    payload = (uint8_t *)malloc(size + 1u);
    if (payload == NULL || !take(payload, size)) return 4;
    if (!edgeadapt_begin(&sender, kind, label, scale, ndim, dims)) {
      fputs("refused\n", stderr);
    } else {
      add(&sender, kind, payload, then == 2 ? size - 1 : size, values);
      values = !values;
      if (then != 1 && !edgeadapt_end(&sender)) fputs("not whole\n", stderr);
    }
    free(payload);
  }
  return 0;
}
